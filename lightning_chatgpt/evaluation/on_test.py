"""TestMetrics: what the ``test`` verb tells beside the loss."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from tqdm.auto import tqdm

from lightning_chatgpt.callbacks.agreement import gathered
from lightning_chatgpt.chat.conversation import Conversation
from lightning_chatgpt.checkpoints.file import replace_file
from lightning_chatgpt.data.base import TokenDataModule
from lightning_chatgpt.data.serving import share_of
from lightning_chatgpt.errors import ConfigError
from lightning_chatgpt.evaluation.figures import Figure, finite, likelihood_figures, reply_figures
from lightning_chatgpt.evaluation.items import items_of
from lightning_chatgpt.evaluation.records import Measurer, Measuring, Record, items_digest
from lightning_chatgpt.models.build import LoadedModel
from lightning_chatgpt.models.standalone import StandaloneModule

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class TestMetrics(Callback):
    """Measures the test split when it was tested, by part of the data and by the replies, and writes it down with intervals.

    ``metrics.json`` in the run folder holds what was logged, and ``figures``: name, part, value, the 95 % interval (low, high), n.
    The figures of replies are logged too (``test_bleu``, …). They are of whole conversations, each once over all processes.

    Args:
        filename: The file in the run folder.
        max_new_tokens: Tokens a reply may have, greedy; 0 for no replies.

    Raises:
        ConfigError: A setting is out of range.
    """

    __test__ = False  # pytest takes it for a test

    def __init__(self, filename: str = "metrics.json", max_new_tokens: int = 64) -> None:
        if max_new_tokens < 0:
            raise ConfigError(f"test_metrics.max_new_tokens must be at least 0, not {max_new_tokens}")
        self.filename = filename
        self.max_new_tokens = max_new_tokens
        self._found: dict[str, Any] = {}

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, each process its share, and log."""
        self._found = {}
        data: Any = getattr(trainer, "datamodule", None)
        if not isinstance(data, TokenDataModule) or not isinstance(pl_module, StandaloneModule):
            return
        if pl_module.is_sharded:
            rank_zero_warn(f"{self.filename} will hold what is logged alone: a network that is cut among devices is measured by evaluate")
            return
        figures, digest, n = self._figures(trainer, pl_module, data)
        self._found = {"items": n, "digest": digest, "figures": [_flat(figure) for figure in figures]}
        for figure in figures:
            if figure.part == "replies":
                pl_module.log(f"test_{figure.name}", figure.models[0].value, sync_dist=True)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file, on the first process."""
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        path = Path(trainer.default_root_dir) / self.filename
        path.parent.mkdir(parents=True, exist_ok=True)
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        report = {"checkpoint": str(trainer.ckpt_path) if trainer.ckpt_path else None, "logged": logged, **self._found}
        replace_file(path, [json.dumps(finite(report), indent=1, ensure_ascii=False, allow_nan=False), "\n"])
        rank_zero_info(f"Metrics written to {path}")

    def _figures(self, trainer: Trainer, module: StandaloneModule, data: TokenDataModule[Any]) -> tuple[list[Figure], str, int]:
        assert module.tokenizer is not None
        max_new_tokens = self.max_new_tokens
        if max_new_tokens and not (find_spec("sacrebleu") and find_spec("rouge_score")):
            rank_zero_warn(
                "replies are not scored, for which sacrebleu and rouge-score are missing: pip install 'lightning-chatgpt[evaluate]'"
            )
            max_new_tokens = 0
        items = items_of(data, data.datasets["test"].sources)
        share = share_of(trainer)
        limit = trainer.limit_test_batches
        is_limited = isinstance(limit, int) or limit < 1  # 1 is one batch, 1.0 all of them
        if is_limited and (data.packing or not isinstance(items[0].content, Conversation)):
            rank_zero_warn(f"trainer.limit_test_batches is of rows that several share: {self.filename} is of the whole test split")
        elif is_limited:
            items = items[: int(trainer.num_test_batches[0]) * data.batch_size * share["world_size"]]
        own = items[share["rank"] :: share["world_size"]]
        measurer = Measurer(
            LoadedModel(module.network, module.tokenizer), Measuring(batch_size=data.batch_size, max_new_tokens=max_new_tokens, stride=None)
        )
        records: list[Record] = []
        for start in tqdm(range(0, len(own), data.batch_size), desc="measuring", disable=not trainer.is_global_zero, leave=False):
            records += measurer.records(own[start : start + data.batch_size])
        parts: Any = gathered(trainer, records)
        # Processes that split a model's layers have one share, and the same records.
        parts = parts[:: len(parts) // share["world_size"]]
        whole = [parts[i % len(parts)][i // len(parts)] for i in range(len(items))]
        return [*likelihood_figures([whole]), *reply_figures([whole])], items_digest(items), len(items)


def _flat(figure: Figure) -> dict[str, Any]:
    return {"name": figure.name, "part": figure.part, **figure.models[0].estimate().to_dict()}
