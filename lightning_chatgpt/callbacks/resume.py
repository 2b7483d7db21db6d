"""ExactResume: a run that was stopped and goes on is the run that was not stopped."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import Callback
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_chatgpt.callbacks.internals import Position, end_epoch, go_on_from, position_of, write_position
from lightning_chatgpt.callbacks.records import records_of

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_TRAINING, _VALIDATION = 0, 1


class ExactResume(Callback):
    """Makes every checkpoint one to go on from exactly: same batches, dropout, learning rate and logged numbers, to the last bit.

    Random numbers are a function of seed, epoch, batch and process: each batch begins with its own. A checkpoint saved amid an
    accumulation goes on from the optimizer step before it, and one saved before a validation begins with that. The data module has to
    read on where it was, as :class:`ChatDataModule` and :class:`TextDataModule` do.

    Args:
        seed: Chooses the random numbers of a new run; null takes that of ``seed_everything``. A run that goes on keeps its own.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed
        self._position: Position | None = None
        self._max_steps: int | None = None  # while the loops have been told otherwise

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the seed."""
        self._position = self._max_steps = None
        if self.seed is None:
            self.seed = int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed() % 2**32))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write down where the run stands."""
        if trainer.state.fn != "fit":
            return
        state = {"seed": self.seed, "trainer": _settings_of(trainer), **position_of(trainer)._asdict()}
        for logger in records_of(trainer.loggers) if trainer.is_global_zero else ():
            logger.save()  # or a crash would take what was logged before the checkpoint
            state["n_records"] = logger.n_records
        checkpoint.setdefault("callbacks", {})[self.state_key] = state

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the loops there, before Lightning reads how far they were."""
        saved = checkpoint.get("callbacks", {}).get(self.state_key)
        if saved is None or trainer.state.fn != "fit":
            return
        _tell_changes(checkpoint, pl_module, getattr(trainer, "datamodule", None))
        now = {**_settings_of(trainer), "resume.seed": self.seed}
        for name, then in {**saved.get("trainer", {}), "resume.seed": saved["seed"]}.items():
            if name in now and now[name] != then:
                wins = "the checkpoint's stays" if name == "resume.seed" else f"going on with {now[name]!r}"
                rank_zero_warn(f"{name} is {now[name]!r}, and was {then!r} when the checkpoint was saved; {wins}")
        self.seed = saved["seed"]
        position = Position(**{name: saved[name] for name in Position._fields})
        count_batches = getattr(getattr(trainer, "datamodule", None), "count_batches", None)
        if count_batches is not None:
            position = position._replace(n_batches=count_batches(position.n_batches, is_epoch=position.is_last_batch))
        write_position(checkpoint["loops"]["fit_loop"], position)
        for logger in records_of(trainer.loggers):
            logger.go_on_after(saved.get("n_records", 0))
        self._position = position
        if trainer.strategy.restore_checkpoint_after_setup:
            self._allow_validation(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let a run begin that has a validation left."""
        self._allow_validation(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the loops begin there."""
        if self._position is not None:
            self._position = go_on_from(trainer, self._position)
            if not self._position.needs_validation:
                self._restore_max_steps(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin with the batch's own random numbers."""
        self._seed(trainer, _TRAINING, batch_idx)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on, the run is one like any other."""
        if self._position is not None and self._position.is_at_end:
            end_epoch(trainer)
        self._position = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same for a validation, and what follows it."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._seed(trainer, _VALIDATION, trainer.fit_loop.epoch_loop.batch_idx)
            self._restore_max_steps(trainer)  # this is the validation that was left

    def _allow_validation(self, trainer: Trainer) -> None:
        """Have a run that was stopped in the validation after its very last step make up for it; Lightning would not begin it."""
        loop = trainer.fit_loop.epoch_loop
        if self._position is not None and self._position.needs_validation and 0 <= loop.max_steps <= self._position.n_steps:
            # The optimizer's schedule was built for the steps there are.
            self._max_steps, loop.max_steps = loop.max_steps, self._position.n_steps + 1

    def _restore_max_steps(self, trainer: Trainer) -> None:
        if self._max_steps is not None:
            trainer.fit_loop.epoch_loop.max_steps, self._max_steps = self._max_steps, None

    def _seed(self, trainer: Trainer, purpose: int, batch_idx: int) -> None:
        shares = trainer.distributed_sampler_kwargs
        rank = shares["rank"] if shares else 0  # processes that split a model's layers draw alike
        assert self.seed is not None
        numbers = np.random.SeedSequence([self.seed, trainer.current_epoch, batch_idx, rank, purpose]).generate_state(3)
        # torch.manual_seed looks for devices of every kind, each time.
        torch.default_generator.manual_seed(int(numbers[0]))
        device = trainer.strategy.root_device
        if device.type != "cpu":
            torch.get_device_module(device).manual_seed(int(numbers[0]))
        np.random.seed(int(numbers[1]))
        random.seed(int(numbers[2]))


def _tell_changes(checkpoint: Mapping[str, Any], module: Any, data: Any) -> None:
    """Name the settings that a run goes on with and that are not those it was saved with."""
    for place, key, owner in (("model", "hyper_parameters", module), ("data", "datamodule_hyper_parameters", data)):
        then, now = checkpoint.get(key, {}), getattr(owner, "hparams", {})
        kept = getattr(owner, "kept_settings", ())
        is_known = type(owner).__module__.startswith("lightning_chatgpt.")
        for name in sorted(then.keys() & now.keys()):
            if name.startswith("_") or _are_equal(then[name], now[name]):
                continue
            hedge = "" if is_known else ", as far as nothing that was restored holds the other"
            wins = "the checkpoint's stays" if name in kept else f"going on with {now[name]!r}{hedge}"
            rank_zero_warn(f"{place}.{name} is {now[name]!r}, and was {then[name]!r} when the checkpoint was saved; {wins}")


def _are_equal(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except (RuntimeError, ValueError, TypeError):  # of tensors, which are compared entry by entry
        return repr(one) == repr(other)


def _settings_of(trainer: Trainer) -> dict[str, Any]:
    """The Trainer's settings that change what is learnt from the same batches."""
    names = ("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "precision")
    found = {f"trainer.{name}": getattr(trainer, name) for name in names}
    return {name: value if value is None or isinstance(value, int | float) else str(value) for name, value in found.items()}
