"""RunCheckpoint: the best weights of a run, and always the last."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_chatgpt.callbacks.agreement import any_process, of_first
from lightning_chatgpt.callbacks.internals import averaging_of, has_validated, trained_weights
from lightning_chatgpt.checkpoints.folder import remove_parts
from lightning_chatgpt.checkpoints.plain import find_foreign
from lightning_chatgpt.checkpoints.plugin import DurableCheckpointIO
from lightning_chatgpt.errors import ConfigError, SaveError

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_NAMED = ("best_k_models", "best_model_path", "best_model_score", "kth_best_model_path", "kth_value", "current_score", "last_model_path")


class RunCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, with ``last.ckpt`` written at every validation, at times between, and when training ends.

    Without a validation split there is nothing to compare by: the latest weights are kept in place of the best.

    Args:
        monitor: The logged number that tells the best.
        filename: Names the files of the best.
        save_last: Whether ``last.ckpt`` is written.
        every_n_train_steps: Optimizer steps after which ``last.ckpt`` is written too; null for validations and times only.
        train_time_interval: Time after which it is, as hours:minutes:seconds; null for validations and steps only.
        **kwargs: The other settings of Lightning's ModelCheckpoint, such as save_top_k, mode and every_n_epochs.

    Raises:
        ConfigError: A setting is out of range.
        SaveError: A checkpoint could not be written, or there is no room for what the run will write.
    """

    def __init__(
        self,
        monitor: str | None = "val_loss",
        filename: str | None = "{epoch}-{step}-{val_loss:.3f}",
        save_last: bool | None = True,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = timedelta(minutes=15),
        **kwargs: Any,
    ) -> None:
        if every_n_train_steps is not None and every_n_train_steps < 1:
            raise ConfigError(f"checkpoint.every_n_train_steps must be at least 1, not {every_n_train_steps}")
        if every_n_train_steps is not None and not save_last:
            raise ConfigError("checkpoint.every_n_train_steps is about last.ckpt, and checkpoint.save_last is false; leave one of them out")
        if train_time_interval is not None and train_time_interval <= timedelta():
            raise ConfigError(f"checkpoint.train_time_interval must be more than no time, not {train_time_interval}")
        # Lightning would save within the hooks of a batch, before what is logged of it.
        super().__init__(monitor=monitor, filename=filename, save_last=save_last, **kwargs)
        self.steps_between = every_n_train_steps
        self.time_between = train_time_interval
        self._last_time = 0.0
        self._last_step = 0
        self._was_there = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder; drop a monitor that nothing will be logged for.

        Raises:
            ConfigError: ``save_on_exception`` with several processes, of which one alone may fail; or a setting of model or data that
                no checkpoint can hold.
            SaveError: The folder cannot be made.
        """
        if self.save_on_exception and trainer.world_size > 1:
            raise ConfigError("checkpoint.save_on_exception waits for ever where one of several processes fails; leave it out")
        if stage == "fit" and isinstance(trainer.strategy.checkpoint_io, DurableCheckpointIO) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            _check_settings({"model": pl_module, "data": getattr(trainer, "datamodule", None)})
        datasets = getattr(getattr(trainer, "datamodule", None), "datasets", {})
        if self.monitor == "val_loss" and "train" in datasets and "validation" not in datasets:
            self.monitor, self.filename = None, "{epoch}-{step}"
        if self.dirpath is None:  # Lightning would take the first logger's folder
            self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make sure that there is room for what will be saved."""
        self._last_time = time.monotonic()
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._check_room(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Write ``last.ckpt`` where it is time to: now that all is done that belongs to the batch before."""
        step = trainer.global_step
        if not self.save_last or step in (0, self._last_step, self._last_global_step_saved) or batch_idx % trainer.accumulate_grad_batches:
            return
        is_time = self.steps_between is not None and step % self.steps_between == 0
        if not is_time and self.time_between is not None:
            # Processes look at clocks of their own.
            is_time = any_process(trainer, time.monotonic() - self._last_time >= self.time_between.total_seconds())
        if is_time:
            self._save_between(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the best and, where these weights are none of the best, ``last.ckpt`` alone."""
        super().on_validation_end(trainer, pl_module)
        is_saving_time = not self._should_save_on_train_epoch_end(trainer)
        if trainer.state.fn == "fit" and not trainer.sanity_checking and is_saving_time:
            self._save_last(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same, where Lightning saves at the end of an epoch, or averages weights: before it ends with their mean in their place."""
        super().on_train_epoch_end(trainer, pl_module)
        if self._should_save_on_train_epoch_end(trainer):
            self._save_last(trainer)
        elif averaging_of(trainer):
            self._save_between(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write ``last.ckpt`` unless these very weights were just saved."""
        super().on_train_end(trainer, pl_module)
        if not (averaging_of(trainer) and self._last_step == trainer.global_step):
            self._save_last(trainer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over which checkpoints are the best, as far as the first process sees them, in whatever folder that is now."""
        assert self.dirpath is not None
        folder = Path(self.dirpath)

        def here(path: str) -> str:
            return str(folder / Path(path).name) if path and (folder / Path(path).name).is_file() else ""

        found = {
            **state_dict,
            "best_k_models": {here(path): score for path, score in state_dict["best_k_models"].items() if here(path)},
            **{name: here(state_dict[name]) for name in ("best_model_path", "kth_best_model_path", "last_model_path")},
        }
        super().load_state_dict({**of_first(found), "dirpath": self.dirpath})
        best = self.best_k_models
        if best and self.kth_best_model_path not in best:
            self.kth_best_model_path = (max if self.mode == "min" else min)(best, key=lambda path: best[path])

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Any]) -> None:
        """Write one of the best; nothing where training ends before the first validation."""
        if self.monitor is None or self.monitor in monitor_candidates or has_validated(trainer):
            with self._kept_if_it_fails():
                super()._save_topk_checkpoint(trainer, monitor_candidates)

    @contextmanager
    def _kept_if_it_fails(self) -> Iterator[None]:
        """Name no file as the best or the last that could not be written; Lightning does before it writes."""
        before = {name: copy(getattr(self, name)) for name in _NAMED}
        try:
            yield
        except BaseException:
            vars(self).update(before)
            raise

    def _save_between(self, trainer: Trainer) -> None:
        """Write ``last.ckpt`` where there was no validation."""
        n_saved = self._last_global_step_saved
        self._save_last(trainer)
        self._last_global_step_saved = n_saved  # or a validation before the next step would not write its best
        self._last_step = trainer.global_step

    def _save_last(self, trainer: Trainer) -> None:
        if self._last_global_step_saved != trainer.global_step and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._save_last_checkpoint(trainer, {})

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Any]) -> None:
        """Write ``last.ckpt``; Lightning would begin ``last-v1.ckpt`` beside one that another process wrote."""
        if self.save_last:
            assert self.dirpath is not None
            with self._kept_if_it_fails():
                self.last_model_path = str(Path(self.dirpath) / f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}")
                self._save_checkpoint(trainer, self.last_model_path)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        folder = Path(self.dirpath or ".")
        if trainer.is_global_zero and self._was_there and not folder.is_dir():
            raise SaveError(f"{folder}: was removed while the run went on, and its checkpoints with it; put it back, or start anew")
        with trained_weights(trainer):
            super()._save_checkpoint(trainer, filepath)
        self._last_time = time.monotonic()

    def _check_room(self, pl_module: LightningModule) -> None:
        """Make sure of the folder, and of room on its disk: weights, two moments of each one that is trained, in each file kept.

        Raises:
            SaveError: The folder cannot be written to, or there is not enough room.
        """
        assert self.dirpath is not None
        folder = Path(self.dirpath)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / ".write-test.part"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise SaveError(
                f"{folder}: checkpoints cannot be written there ({error.strerror}); mend that, or name another trainer.default_root_dir"
            ) from None
        self._was_there = True
        remove_parts(folder)
        lora = getattr(pl_module, "lora", None)
        is_whole = lora is None or lora.save_base  # else the frozen weights stay where they are
        parameters = [p for p in pl_module.parameters() if is_whole or p.requires_grad]
        size = sum(p.numel() * p.element_size() for p in parameters)
        if not self.save_weights_only:
            size += 2 * sum(p.numel() * 4 for p in parameters if p.requires_grad)
        # Each file is written before the one it takes the place of is removed.
        n_files = max(1, self.save_top_k) + int(bool(self.save_last)) + 1
        there = sum(path.stat().st_size for path in folder.glob("*.ckpt"))
        free = shutil.disk_usage(folder).free + there
        if size * n_files > free:
            raise SaveError(
                f"{folder}: the disk has {_size(free)} for checkpoints, and this run needs {_size(size * n_files)} "
                f"({n_files} files of {_size(size)}); make room, lower checkpoint.save_top_k, or name another trainer.default_root_dir"
            )


def _check_settings(owners: dict[str, Any]) -> None:
    for name, owner in owners.items():
        found = find_foreign(dict(getattr(owner, "hparams", {})), name)
        if found is not None:
            raise ConfigError(
                f"{found}, and checkpoints hold plain data; let it be text, a number, a list or a dict, "
                "or leave it out of save_hyperparameters"
            )


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.1f} MiB"


def save_last(trainer: Trainer) -> Path:
    """Write ``last.ckpt`` where the run's checkpoints are, at once; all processes take part.

    Returns: its path.
    """
    callbacks = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    callback = next((c for c in callbacks if isinstance(c, RunCheckpoint)), callbacks[0] if callbacks else None)
    folder = Path(callback.dirpath) if callback is not None and callback.dirpath else Path(trainer.default_root_dir) / "checkpoints"
    path = folder / f"{ModelCheckpoint.CHECKPOINT_NAME_LAST}{ModelCheckpoint.FILE_EXTENSION}"
    with trained_weights(trainer):
        trainer.save_checkpoint(path)
    return path
