"""GracefulStop and ProcessWatch: a run that is to end saves itself first, and no process of it is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from typing import TYPE_CHECKING, Any

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_chatgpt.callbacks.agreement import greatest, least
from lightning_chatgpt.callbacks.checkpoint import save_last
from lightning_chatgpt.callbacks.internals import environment_of, is_ending
from lightning_chatgpt.callbacks.resume import ExactResume
from lightning_chatgpt.processes import end_with_parent, end_within

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_LEAVE_SECONDS = 10  # for loggers and process groups to close; then a process is ended
_SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")


class Stopped(SystemExit):
    """A run that a signal ended, once it was saved; the exit code is 143, or 130 after Ctrl-C."""


class GracefulStop(Callback):
    """Ends a run cleanly on SIGTERM, SIGUSR1 (with which SLURM warns) and Ctrl-C.

    The batch that is being worked on is finished, ``last.ckpt`` is written, and all processes leave, whichever of them got the signal,
    with exit code 143 (130 after Ctrl-C). Amid a validation that happens at its next batch; the run goes on with that validation. A
    second Ctrl-C leaves at once. Where Lightning would requeue the SLURM job on SIGUSR1, that is done once the run is saved.
    """

    def __init__(self) -> None:
        self._signal: signal.Signals | None = None
        self._n_batches = 0  # of the evaluation, that every process has

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the signal that ended an earlier run of this process."""
        self._signal = None

    # Lightning sets handlers of its own shortly before these.

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen."""
        self._listen(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen."""
        self._listen(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Stop before the next batch."""
        # DeepSpeed's engine counts micro-batches by itself, and would go on amid an accumulation; so would Lightning's loops by themselves.
        is_exact = any(isinstance(callback, ExactResume) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        waits = trainer.strategy.handles_gradient_accumulation or not is_exact
        if not (waits and batch_idx % trainer.accumulate_grad_batches):
            self._stop_if_asked(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop before a validation."""
        self._begin_evaluation(trainer, trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches)
        if not trainer.sanity_checking:
            self._stop_if_asked(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen."""
        self._begin_evaluation(trainer, trainer.num_test_batches)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen."""
        self._begin_evaluation(trainer, trainer.num_predict_batches)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Stop amid an evaluation."""
        # One process may have a batch more than another, and would ask alone.
        if batch_idx < self._n_batches and dataloader_idx == 0:
            self._stop_if_asked(trainer)

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def _listen(self, trainer: Trainer) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # where alone Python lets handlers be set
        numbers = {getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)}
        requeue = getattr(environment_of(trainer), "requeue_signal", None)
        for number in numbers if requeue is None else {*numbers, requeue}:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        if self._signal is not None and number == signal.SIGINT:
            os._exit(_code(signal.SIGINT))
        if self._signal is None and number == signal.SIGINT:
            # Not print: it may be interrupted amid another print.
            os.write(2, b"\nstopping after this batch and saving; press Ctrl-C again to leave at once\n")
        self._signal = self._signal or signal.Signals(number)

    def _begin_evaluation(self, trainer: Trainer, n_batches: list[int | float]) -> None:
        self._listen(trainer)
        first = n_batches[0] if n_batches else 0
        self._n_batches = least(trainer, int(first) if first != float("inf") else 0)

    def _stop_if_asked(self, trainer: Trainer) -> None:
        number = greatest(trainer, int(self._signal or 0))
        if not number:
            return
        received = signal.Signals(number)
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            release: Any = getattr(trainer.lightning_module, "release", None)
            if release is not None:
                release()
            path = save_last(trainer)
            rank_zero_info(f"{received.name}: stopped after step {trainer.global_step}, saved {path}; go on with --ckpt_path last")
            self._requeue(trainer, received)
        else:
            rank_zero_info(f"{received.name}: stopped")
        # A process that rank 0 has started tells it so by 0; else rank 0 would be killed before it can say 143.
        is_child = isinstance(environment_of(trainer), LightningEnvironment) and trainer.local_rank > 0
        raise Stopped(0 if is_child else _code(received))

    def _requeue(self, trainer: Trainer, received: signal.Signals) -> None:
        environment = environment_of(trainer)
        asked = received == getattr(environment, "requeue_signal", None)
        if not (asked and isinstance(environment, SLURMEnvironment) and environment.auto_requeue and trainer.is_global_zero):
            return
        array = os.environ.get("SLURM_ARRAY_JOB_ID")
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
        try:
            done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
        except OSError as error:
            rank_zero_warn(f"SLURM job {job} could not be requeued ({error.strerror}); submit it again")
            return
        if done.returncode:
            rank_zero_warn(f"SLURM job {job} could not be requeued ({done.stderr.strip()}); submit it again")


class ProcessWatch(Callback):
    """Ends all processes of a run when one of them fails: an error in one of several is no reason for the others to wait for ever."""

    def __init__(self) -> None:
        self._is_watching = False
        self._end_of_watch = threading.Event()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Do not outlive the process that started this one."""
        self._end_of_watch.set()  # a script that caught an exception goes on
        if trainer.local_rank > 0 and not self._is_watching:
            self._is_watching = True
            end_with_parent()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave, even where what is to be closed waits for a process that is gone."""
        if trainer.world_size > 1:
            self._end_of_watch = end_within(_LEAVE_SECONDS, exception, is_stuck=lambda: is_ending(trainer))


def _code(number: signal.Signals) -> int:
    return 130 if number == signal.SIGINT else 143
