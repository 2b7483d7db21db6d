"""PredictionWriter: replies to a file as they come, in order, each conversation once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from lightning.pytorch.callbacks import BasePredictionWriter
from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_chatgpt.checkpoints.file import replace_file, whole_lines, written_at

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class PredictionWriter(BasePredictionWriter):
    """Writes each predicted reply as one line of JSON, in the order of the conversations.

    A line holds ``id``, ``prompt`` (messages), ``reply``, ``reference`` (null if there is none), ``prompt_tokens``,
    ``completion_tokens`` and ``finish_reason``. Processes that answer different ones write a part each,
    which are put together at the end. A predict of the same checkpoint and prompts that was broken off is gone on with; a module that
    comes from elsewhere says by ``prediction_key`` what its replies depend on.

    Args:
        filename: The file in the run folder.
    """

    def __init__(self, filename: str = "predictions.jsonl") -> None:
        super().__init__(write_interval="batch")
        self.filename = filename
        self._file: TextIO | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find what a predict that was broken off has answered already."""
        data: Any = getattr(trainer, "datamodule", None)
        if stage != "predict":
            return
        if trainer.is_global_zero:
            self._folder(trainer).mkdir(parents=True, exist_ok=True)
            self._take_up(trainer, pl_module, data)
        trainer.strategy.barrier("predictions taken up")
        if hasattr(data, "prediction_key"):
            part, _ = self._share(trainer)
            data.n_predicted = len(whole_lines(self._part(trainer, part)))

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open this process's part; of processes that split a model's layers, and answer the same, the first writes."""
        part, place = self._share(trainer)
        if place == 0:
            self._file = self._part(trainer, part).open("a", encoding="utf-8")

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write a batch's replies."""
        if self._file is None:
            return
        for record in prediction:
            self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close this process's part, for the next predict to go on with."""
        if self._file is not None:
            self._file.close()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the parts together: conversation i is the next line of part i mod n."""
        if self._file is not None:
            self._file.close()
        trainer.strategy.barrier("predictions written")
        if not trainer.is_global_zero:
            return
        parts = [self._part(trainer, part) for part in range(self._n_parts(trainer))]
        target = self._folder(trainer) / self.filename
        # A kill at any time leaves the replies, in the parts or in the file.
        replace_file(target, _interleaved(parts))
        for path in (self._state(trainer), *parts):
            path.unlink(missing_ok=True)
        rank_zero_info(f"Replies written to {target}")

    def _take_up(self, trainer: Trainer, pl_module: LightningModule, data: Any) -> None:
        """Share out among the processes what is there, or remove it, where it answers something else."""
        state = self._state(trainer)
        old = sorted(self._folder(trainer).glob(f"{self.filename}.part*"), key=lambda path: int(path.name.rpartition("part")[2]))
        key = _key(trainer, pl_module, data)
        lines: dict[int, str] = {}
        if key and state.is_file() and state.read_text(encoding="utf-8") == key:
            lines = {i * len(old) + part: line for part, path in enumerate(old) for i, line in enumerate(whole_lines(path))}
        n_parts, n_kept = self._n_parts(trainer), 0
        shares: list[list[str]] = []
        for part in range(n_parts):
            share = range(part, len(data.prompts), n_parts) if lines else range(0)
            answered = next((i for i, prompt in enumerate(share) if prompt not in lines), len(share))
            # As the batches were: a reply's last digits depend on what it shares a batch with. Each process has at least one to do.
            kept = min(answered, len(share) - 1) // data.batch_size * data.batch_size if share else 0
            shares.append([lines[prompt] for prompt in share[:kept]])
            n_kept += kept
        if old and (n_parts != len(old) or not lines):
            state.unlink(missing_ok=True)  # what a kill leaves from here on is not taken up
            for path in old:
                path.unlink()
        for part, share_lines in enumerate(shares):
            replace_file(self._part(trainer, part), share_lines)
        if n_kept:
            rank_zero_info(f"{n_kept} replies are there from a predict that was broken off; going on after them (without {state}: anew)")
        state.write_text(key, encoding="utf-8")

    def _share(self, trainer: Trainer) -> tuple[int, int]:
        return divmod(trainer.global_rank, trainer.world_size // self._n_parts(trainer))

    def _state(self, trainer: Trainer) -> Path:
        return self._folder(trainer) / f"{self.filename}.state"

    def _n_parts(self, trainer: Trainer) -> int:
        shares = trainer.distributed_sampler_kwargs
        return int(shares["num_replicas"]) if shares else 1

    def _folder(self, trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir)

    def _part(self, trainer: Trainer, part: int) -> Path:
        return self._folder(trainer) / f"{self.filename}.part{part}"


def _key(trainer: Trainer, pl_module: LightningModule, data: Any) -> str:
    """What replies depend on; empty where that is not known."""
    path = trainer.ckpt_path
    own = getattr(pl_module, "prediction_key", None)
    if own is None and path is not None and Path(path).is_file():
        own = f"{written_at(path)} {type(pl_module).__qualname__}"
    return f"{own} {data.prediction_key}" if own is not None and hasattr(data, "prediction_key") else ""


def _interleaved(parts: Sequence[Path]) -> Iterator[str]:
    """Line i of the whole is the next of part i mod n."""
    with ExitStack() as opened:
        files = [opened.enter_context(part.open(encoding="utf-8")) for part in parts]
        turns = cycle(files)
        while line := next(turns).readline():
            yield line
