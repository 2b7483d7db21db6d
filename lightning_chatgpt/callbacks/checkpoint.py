"""RunCheckpoint: the best weights of a run, and always the last."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import ModelCheckpoint

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class RunCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, with ``last.ckpt`` written when training ends, wherever in an epoch that is.

    Without a validation split there is nothing to compare by: the latest weights are kept in place of the best.

    Args:
        monitor: The logged number that tells the best.
        filename: Names the files of the best.
        save_last: Whether ``last.ckpt`` is written along with them.
        **kwargs: The other settings of Lightning's ModelCheckpoint, such as save_top_k, mode and every_n_train_steps.
    """

    def __init__(
        self,
        monitor: str | None = "val_loss",
        filename: str | None = "{epoch}-{step}-{val_loss:.3f}",
        save_last: bool | None = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(monitor=monitor, filename=filename, save_last=save_last, **kwargs)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder; drop a monitor that nothing will be logged for."""
        datasets = getattr(getattr(trainer, "datamodule", None), "datasets", {})
        if self.monitor == "val_loss" and "train" in datasets and "validation" not in datasets:
            self.monitor, self.filename = None, "{epoch}-{step}"
        if self.dirpath is None:  # Lightning would take the first logger's folder
            self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        super().setup(trainer, pl_module, stage)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the best and, where these weights are none of the best, ``last.ckpt`` alone."""
        super().on_validation_end(trainer, pl_module)
        is_saving_time = not self._should_save_on_train_epoch_end(trainer)
        if trainer.state.fn == "fit" and not trainer.sanity_checking and is_saving_time:
            self._save_last(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same, where Lightning saves at the end of an epoch."""
        super().on_train_epoch_end(trainer, pl_module)
        if self._should_save_on_train_epoch_end(trainer):
            self._save_last(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write ``last.ckpt`` unless these very weights were just saved."""
        super().on_train_end(trainer, pl_module)
        self._save_last(trainer)

    def _save_last(self, trainer: Trainer) -> None:
        if self.save_last and self._last_global_step_saved != trainer.global_step and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            assert self.dirpath is not None
            self._last_global_step_saved = trainer.global_step
            trainer.save_checkpoint(Path(self.dirpath) / f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}")
