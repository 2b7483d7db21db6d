"""PredictionWriter: replies to a file as they come, in order, each conversation once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from lightning.pytorch.callbacks import BasePredictionWriter
from lightning_utilities.core.rank_zero import rank_zero_info

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class PredictionWriter(BasePredictionWriter):
    """Writes each predicted reply as one line of JSON, in the order of the conversations.

    A line holds ``id``, ``prompt`` (messages), ``reply``, ``reference`` (null if there is none), ``prompt_tokens``,
    ``completion_tokens`` and ``finish_reason``. Processes that answer different ones write a part each,
    which are put together at the end.

    Args:
        filename: The file in the run folder.
    """

    def __init__(self, filename: str = "predictions.jsonl") -> None:
        super().__init__(write_interval="batch")
        self.filename = filename
        self._file: TextIO | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open this process's part; of processes that split a model's layers, and answer the same, the first writes."""
        n_parts = self._n_parts(trainer)
        part, place = divmod(trainer.global_rank, trainer.world_size // n_parts)
        if place == 0:
            path = self._part(trainer, part)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w", encoding="utf-8")

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

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the parts together: conversation i is the next line of part i mod n."""
        if self._file is not None:
            self._file.close()
        trainer.strategy.barrier("predictions written")
        if not trainer.is_global_zero:
            return
        parts = [self._part(trainer, part) for part in range(self._n_parts(trainer))]
        target = self._folder(trainer) / self.filename
        if len(parts) == 1:
            parts[0].replace(target)
        else:
            _interleave(parts, target)
        rank_zero_info(f"Replies written to {target}")

    def _n_parts(self, trainer: Trainer) -> int:
        shares = trainer.distributed_sampler_kwargs
        return int(shares["num_replicas"]) if shares else 1

    def _folder(self, trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir)

    def _part(self, trainer: Trainer, part: int) -> Path:
        return self._folder(trainer) / f"{self.filename}.part{part}"


def _interleave(parts: Sequence[Path], target: Path) -> None:
    files = [part.open(encoding="utf-8") for part in parts]
    with target.open("w", encoding="utf-8") as lines:
        turn = 0
        while line := files[turn % len(files)].readline():
            lines.write(line)
            turn += 1
    for file, part in zip(files, parts, strict=True):
        file.close()
        part.unlink()
