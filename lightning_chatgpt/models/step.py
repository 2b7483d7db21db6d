"""One loss for one optimizer step: Σ weight · nll / Σ weight over all its micro-batches and all processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_chatgpt.errors import ConfigError

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

    from lightning_chatgpt.models.loss import TokenLosses

# Back-propagated losses are divided by this, so that sums over tokens stay in float16's range. A power of two rounds nothing.
SCALE = 4096.0


class StepLoss:
    """Makes the gradients of an optimizer step those of one mean over all its supervised tokens.

    A mean of each micro-batch's mean is another number wherever they differ in tokens. So sums are back-propagated, and when the
    last micro-batch is done, the gradients are divided by the step's weight. It is found by one all-reduce, and happens before
    gradients are unscaled, looked at by callbacks or clipped.

    Args:
        module: Whose gradients these are.

    Attributes:
        made: What the last optimizer step is to log: ``train_loss``, in nats, over all processes, and ``learning_rate``. Empty where
            the last micro-batch made no step.
    """

    def __init__(self, module: LightningModule) -> None:
        self._module = (module,)  # in a tuple: the module must not become a submodule of itself
        self._sums: Tensor | None = None  # of this process: Σ weight · nll, Σ weight
        self._has_targets = False
        self.made: dict[str, Any] = {}

    @staticmethod
    def check(strategy: Any) -> None:
        """Refuse a strategy whose gradients are not to be had.

        Raises:
            ConfigError: It accumulates gradients by itself, and says nothing of when it steps.
        """
        if strategy.handles_gradient_accumulation and not hasattr(strategy, "scale_gradients"):
            name = type(strategy).__name__
            raise ConfigError(f"trainer.strategy {name} hides its gradients; take ZeroStrategy, as configs/strategy/deepspeed.yaml does")

    def add(self, losses: TokenLosses) -> Tensor:
        """Add a micro-batch.

        Returns: what to back-propagate; shape ().
        """
        self.made = {}
        sums = torch.stack([losses.total.detach(), losses.weights.to(losses.total.dtype).sum()])
        self._has_targets |= not losses.is_empty
        self._sums = sums if self._sums is None else self._sums + sums
        return losses.total / SCALE

    def closure(self, optimizer_closure: Callable[[], Any]) -> Any:
        """Run the step's last micro-batch, and set the gradients right.

        Args:
            optimizer_closure: Lightning's: runs training_step and backward.

        Returns: what that returns; None where nothing in the whole step was supervised, and no parameter is to change.
        """
        result = optimizer_closure()
        if self._sums is None:
            return result  # a subclass's own training_step says what its loss is
        module = self._module[0]
        trainer = module.trainer
        strategy: Any = trainer.strategy
        if not getattr(strategy, "is_last_of_step", True):
            return result  # DeepSpeed's engine accumulates by itself, and comes here after each micro-batch
        sums, has_targets = self._sums, self._has_targets
        self._sums, self._has_targets = None, False
        if trainer.world_size > 1:
            sums = strategy.reduce(sums, reduce_op="sum")
        total, weight = sums.unbind()
        self._note(total, weight)
        # Lightning has divided by the micro-batches, and the strategy by the processes.
        factor = SCALE * trainer.accumulate_grad_batches * trainer.world_size / weight
        if hasattr(strategy, "scale_gradients"):
            strategy.scale_gradients(factor if weight else torch.ones_like(weight))
            return result
        # Asked of the device only where this process has no target: each comes to the same answer.
        if not has_targets and not weight:
            for parameter in module.parameters():
                parameter.grad = None  # zeros would still decay weights and follow momentum
            return None
        scale_gradients(module.parameters(), factor)
        return result

    def _note(self, total: Tensor, weight: Tensor) -> None:
        learning_rate = self._module[0].trainer.optimizers[0].param_groups[0]["lr"]
        self.made = {"train_loss": total / weight, "learning_rate": learning_rate}


def scale_gradients(parameters: Iterable[nn.Parameter], factor: Tensor) -> None:
    """Multiply gradients in place.

    Args:
        parameters: Cut among devices or not.
        factor: The same on all devices; shape ().
    """
    gradients: list[Any] = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if gradients:
        torch._foreach_mul_([gradient.to_local() if hasattr(gradient, "to_local") else gradient for gradient in gradients], factor)
