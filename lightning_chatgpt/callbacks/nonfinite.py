"""NonFiniteGuard: no NaN and no infinity reaches the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from lightning.pytorch import Callback
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_chatgpt.callbacks.agreement import any_process, gathered
from lightning_chatgpt.callbacks.checkpoint import save_last
from lightning_chatgpt.errors import ConfigError, NonFiniteError, nearest

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch.optim import Optimizer

Action = Literal["stop", "skip"]

MOST_IN_SUCCESSION = 20  # skipped steps after which it is not the data's fault
_MOST_NAMED = 8


class NonFiniteGuard(Callback):
    """Looks at each optimizer step's losses and gradients, in all processes, before the weights take them.

    Where one is not finite, the run stops and names the step and the records of its batches; its weights are those of the step before,
    and saved as ``last.ckpt``. It costs a pass over the gradients. With float16's loss scaling, which skips steps of that kind by
    itself, and with DeepSpeed, which holds the gradients, only losses are looked at.

    Args:
        action: stop; or skip, which leaves such a step out, names its records in a warning, and logs ``skipped_steps``, unless
            20 are skipped in succession.

    Raises:
        ConfigError: There is no such action.
        NonFiniteError: A loss or a gradient was not finite.
    """

    def __init__(self, action: Action = "stop") -> None:
        if action not in get_args(Action):
            raise ConfigError(f"nonfinite.action {action!r} cannot be used; {nearest(str(action), get_args(Action))}")
        self.action = action
        self.n_skipped = 0
        self._n_in_succession = 0
        self._losses: list[tuple[int, Tensor]] = []  # of this optimizer step, by micro-batch

    def state_dict(self) -> dict[str, Any]:
        """How many steps were skipped. Called by Lightning."""
        return {"n_skipped": self.n_skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting. Called by Lightning."""
        self.n_skipped = state_dict["n_skipped"]

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keep the loss of a micro-batch; no device is waited for."""
        self._losses.append((trainer.fit_loop.epoch_loop.batch_idx, loss.detach()))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Look at the step's numbers."""
        losses, self._losses = self._losses, []
        numbers = [loss for _, loss in losses]
        if getattr(trainer.precision_plugin, "scaler", None) is None and not trainer.strategy.handles_gradient_accumulation:
            gradients: list[Any] = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            numbers += [getattr(gradient, "_local_tensor", gradient) for gradient in gradients]
        if not any_process(trainer, not _are_finite(numbers)):
            self._n_in_succession = 0
            return
        told = self._tell(trainer, losses)
        self._n_in_succession += 1
        if self.action == "stop" or self._n_in_succession > MOST_IN_SUCCESSION:
            path = save_last(trainer)
            raise NonFiniteError(
                f"{told}; the weights are those of step {trainer.global_step}, saved in {path}: lower model.learning_rate, set "
                "trainer.gradient_clip_val, mend the records, or leave such steps out by --nonfinite.action skip"
            )
        self.n_skipped += 1
        rank_zero_warn(f"{told}; the step is skipped ({self.n_skipped} so far)")
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None  # zeros would still decay weights and follow momentum

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log how many were skipped, once there are some."""
        if self.n_skipped:
            pl_module.log("skipped_steps", float(self.n_skipped), rank_zero_only=True)

    def _tell(self, trainer: Trainer, losses: list[tuple[int, Tensor]]) -> str:
        """What is not finite, and where it came from."""
        bad = [(batch_idx, float(loss)) for batch_idx, loss in losses if not torch.isfinite(loss)]
        of_all = [place for found in gathered(trainer, [(trainer.global_rank, *place) for place in bad]) for place in found]  # type: ignore[attr-defined]
        named = getattr(getattr(trainer, "datamodule", None), "records_of_batch", None)
        records = [] if named is None else [name for batch_idx, _ in (bad if of_all else losses) for name in named(batch_idx)]
        names = [name for found in gathered(trainer, records[:_MOST_NAMED]) for name in found]  # type: ignore[attr-defined]
        step = trainer.global_step + 1
        if of_all:
            rank, batch_idx, loss = of_all[0]
            what = f"the loss of batch {batch_idx} of epoch {trainer.current_epoch} is {loss}"
            what += f" in process {rank}" if trainer.world_size > 1 else ""
        else:
            what = "a gradient is not finite"
        shown = f" ({', '.join(names[:_MOST_NAMED])}{', …' if len(names) > _MOST_NAMED else ''})" if names else ""
        return f"step {step}: {what}{shown}"


def _are_finite(tensors: list[Tensor]) -> bool:
    kinds = dict.fromkeys((tensor.device, tensor.dtype) for tensor in tensors)
    for kind in kinds:
        same = [tensor for tensor in tensors if (tensor.device, tensor.dtype) == kind]
        # The fastest pass there is. What overflows in it, of very large numbers, is looked at again.
        norms = torch.stack(torch._foreach_norm(same))
        if not torch.isfinite(norms).all() and not all(torch.isfinite(tensor).all() for tensor in same):
            return False
    return True
