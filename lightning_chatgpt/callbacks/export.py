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
    """Writes ``hf/`` in the run folder when training ends: the best checkpoint's weights, or the last where there is none.

    Args:
        dirname: The folder in the run folder.
    """

    def __init__(self, dirname: str = "hf") -> None:
        self.dirname = dirname

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the folder."""
        if trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
            return
        module: Any = pl_module
        checkpoint = next((c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)), None)
        target = Path(trainer.default_root_dir) / self.dirname
        # A strategy that saves folders of shards has no single file to read the best from.
        if checkpoint is not None and Path(checkpoint.best_model_path).is_file():
            score = checkpoint.best_model_score
            facts = {checkpoint.monitor: f"{score:.4f}"} if checkpoint.monitor and score is not None else {}
            folder = module.export(target, checkpoint=checkpoint.best_model_path, facts=facts)
        else:
            folder = module.export(target)
        rank_zero_info(f"The model is in {folder}; talk to it: python -m lightning_chatgpt chat {trainer.default_root_dir}")
