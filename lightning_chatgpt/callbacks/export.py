"""HuggingFaceExport: the best model of a run as a plain transformers folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_utilities.core.rank_zero import rank_zero_info

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class HuggingFaceExport(Callback):
    """Writes ``hf/`` in the run folder when training ends: the best checkpoint's weights, or the last where there is no file of them.

    Args:
        dirname: The folder in the run folder.
    """

    def __init__(self, dirname: str = "hf") -> None:
        self.dirname = dirname

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the folder."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        module: Any = pl_module
        found = next((c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)), None)
        target = Path(trainer.default_root_dir) / self.dirname
        # A strategy that saves folders of shards has no single file to read the best from: all processes gather the current weights.
        if not trainer.strategy.broadcast(found is not None and Path(found.best_model_path).is_file()):
            if module.is_sharded or trainer.is_global_zero:
                module.export(target)
        elif trainer.is_global_zero:
            assert found is not None
            score = found.best_model_score
            facts = {found.monitor: f"{score:.4f}"} if found.monitor and score is not None else {}
            module.export(target, checkpoint=found.best_model_path, facts=facts)
        rank_zero_info(f"The model is in {target}; talk to it: python -m lightning_chatgpt chat {trainer.default_root_dir}")
