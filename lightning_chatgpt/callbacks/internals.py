"""Where a Trainer stands, and how to put it there again. What is done with the private parts of Lightning's loops is done in this file.

Lightning 2.6 saves how far its loops have come in the midst of their own book-keeping, and goes on in ways that depend on the hook a
checkpoint was saved in: a validation is left out, an epoch is counted twice. Here a place in a run is a few numbers, whatever hook they
were read in, and the loops are set to them. tests/callbacks/test_internals.py fails where another version of Lightning works otherwise.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.call import _call_and_handle_interrupt
from lightning.pytorch.trainer.states import TrainerStatus

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

_COUNTERS = ("ready", "started", "processed", "completed")


class Position(NamedTuple):
    """A place in a run: behind an optimizer step.

    Attributes:
        epoch: Epochs that are done.
        n_batches: Micro-batches of the next one that are done, in each process.
        n_all_batches: Those of all epochs.
        n_steps: Optimizer steps that are done, as Lightning counts them for its loggers.
        is_last_batch: Whether these were all of the epoch, of which only its end is left.
        needs_validation: Whether a validation is due here that has not been finished.
    """

    epoch: int
    n_batches: int
    n_all_batches: int
    n_steps: int
    is_last_batch: bool
    needs_validation: bool

    @property
    def is_at_end(self) -> bool:
        """Whether nothing is left of the epoch but its end."""
        return self.is_last_batch and not self.needs_validation


def position_of(trainer: Trainer) -> Position:
    """The place a run would go on from, if what is in memory now were saved.

    Amid an accumulation that is behind the last optimizer step: its weights are the ones in memory, and the gradients gathered since
    are made again from the same micro-batches.
    """
    fit_loop = trainer.fit_loop
    loop = fit_loop.epoch_loop
    # Their types are those of their base class.
    batches: Any = loop.batch_progress
    epochs: Any = fit_loop.epoch_progress.current
    n_batches = batches.current.processed
    is_last_batch = batches.is_last_batch and n_batches == batches.current.ready
    is_after_epoch = epochs.processed == epochs.ready  # its end has been gone through, or max_steps broke it off
    epoch = epochs.ready - 1 if is_after_epoch else epochs.processed
    n_all, n_steps = batches.total.processed, loop._batches_that_stepped
    is_before_epoch = epochs.ready == epochs.started + 1 or (is_after_epoch and n_batches == 0)
    if is_before_epoch or (is_after_epoch and is_last_batch):
        return Position(epochs.processed, 0, n_all, n_steps, is_last_batch=False, needs_validation=False)
    excess = 0 if is_last_batch else n_batches % trainer.accumulate_grad_batches
    if excess:
        return Position(epoch, n_batches - excess, n_all - excess, n_steps, is_last_batch=False, needs_validation=False)
    # Lightning counts a step for the loggers once the validation after it is over; when the next batch is there, it is.
    is_at_step = n_batches == batches.current.ready and n_batches > 0
    needs_validation = False
    if not is_after_epoch and is_at_step:
        n_steps += 1
        needs_validation = not _has_seen_last(trainer) if trainer.validating else _is_validation_due(trainer)
    return Position(epoch, n_batches, n_all, n_steps, is_last_batch=is_last_batch, needs_validation=needs_validation)


def write_position(loops: dict[str, Any], position: Position) -> None:
    """Set the loops' state in a checkpoint to a place.

    Args:
        loops: What a checkpoint holds under ``loops``, ``fit_loop``.
        position: The place.
    """
    batches = loops["epoch_loop.batch_progress"]
    in_epoch = position.n_batches > 0
    _count(batches["total"], position.n_all_batches)
    _count(batches["current"], position.n_batches)
    batches["is_last_batch"] = position.is_last_batch
    for epochs in loops["epoch_progress"].values():
        _count(epochs, position.epoch)
        if in_epoch:
            epochs["ready"] = epochs["started"] = position.epoch + 1
    validation = loops["epoch_loop.val_loop.batch_progress"]
    for counts in (validation["total"], validation["current"]):
        _count(counts, 0)
        if position.needs_validation:  # as if one had been begun: Lightning goes back to it
            counts["ready"] = counts["started"] = 1
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = position.n_steps


def go_on_from(trainer: Trainer, position: Position) -> Position:
    """Make the loops begin where they were set to; called when training starts.

    Returns: the place as it holds in this run, which may validate at others.
    """
    fit_loop = trainer.fit_loop
    loop = fit_loop.epoch_loop
    if position.n_batches == 0:
        fit_loop._restarting = loop.restarting = False  # an epoch like any other; the setter keeps it where max_steps is set
        return position
    if position.is_last_batch and trainer.num_training_batches != float("inf"):  # of this run: another number of processes has another
        _count(vars(loop.batch_progress.current), int(trainer.num_training_batches))
    is_due = _is_validation_due(trainer)
    position = position._replace(needs_validation=position.needs_validation and is_due)
    if position.is_at_end:
        loop._batches_that_stepped = position.n_steps
        loop.val_loop._has_run = True  # or Lightning would train on a batch beyond trainer.limit_train_batches
    else:
        # Lightning takes one turn of its loop without a batch where a validation is due or was just done, and counts it.
        loop._batches_that_stepped = position.n_steps - int(is_due)
    return position


def end_epoch(trainer: Trainer) -> None:
    """Make the next epoch one like any other; called when the first one ends of which the last batch was done before."""
    loop = trainer.fit_loop.epoch_loop
    loop.restarting = loop.val_loop._has_run = False


def has_validated(trainer: Trainer) -> bool:
    """Whether the run has been through a validation, so that what it logs is known."""
    return trainer.fit_loop.epoch_loop.val_loop._has_run


def is_ending(trainer: Trainer) -> bool:
    """Whether the main thread is in the hands of a Trainer that was broken off, or behind the script's end. Asked by other threads."""
    main = threading.main_thread()
    if not main.is_alive():
        return True
    if trainer.state.status != TrainerStatus.INTERRUPTED:  # it was begun again
        return False
    frame = sys._current_frames().get(main.ident or 0)
    while frame is not None and not (frame.f_code is _call_and_handle_interrupt.__code__ and frame.f_locals.get("trainer") is trainer):
        frame = frame.f_back
    return frame is not None


def environment_of(trainer: Trainer) -> Any:
    """What starts the processes: SLURM, torchrun, Lightning itself."""
    return trainer._accelerator_connector.cluster_environment


@contextmanager
def trained_weights(trainer: Trainer) -> Iterator[None]:
    """Have the weights that are trained in the module: for a validation, Lightning's averaging puts their mean in their place."""
    is_amid = trainer.validating and trainer.fit_loop.epoch_loop.val_loop.batch_progress.current.ready > 0 and not _has_seen_last(trainer)
    swapped = [callback for callback in averaging_of(trainer) if is_amid and callback._average_model is not None]
    for callback in swapped:
        callback._swap_models(trainer.lightning_module)
    try:
        yield
    finally:
        for callback in swapped:
            callback._swap_models(trainer.lightning_module)


def averaging_of(trainer: Trainer) -> list[WeightAveraging]:
    """The callbacks that average weights."""
    return [callback for callback in trainer.callbacks if isinstance(callback, WeightAveraging)]  # type: ignore[attr-defined]


def _has_seen_last(trainer: Trainer) -> bool:
    """Whether a validation has been through its last batch."""
    validation: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress
    return bool(validation.is_last_batch and validation.current.completed == validation.current.ready > 0)


def _is_validation_due(trainer: Trainer) -> bool:
    """Whether a validation follows the batch that the loops stand at."""
    fetcher: Any = trainer.fit_loop._data_fetcher
    return trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def _count(counts: dict[str, int], number: int) -> None:
    for name in _COUNTERS:
        if name in counts:
            counts[name] = number
