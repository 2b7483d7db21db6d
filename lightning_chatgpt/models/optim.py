"""Parameter groups, warmup and decay."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from lightning_chatgpt.errors import ConfigError

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR

Schedule = Literal["cosine", "linear", "constant"]


def decay_groups(module: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters: matrices decay, vectors (biases and layer norms) do not.

    Returns: two groups for an optimizer; a tied parameter stands in one of them, once.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def learning_rate_factor(step: int, *, schedule: Schedule, warmup_steps: int, total_steps: float) -> float:
    """What the learning rate is multiplied by in an optimizer step.

    It grows linearly over ``warmup_steps``, then follows half a cosine or a line down to 0 at ``total_steps``, or stays.

    Args:
        step: The optimizer step, from 0.
        schedule: cosine, linear or constant.
        warmup_steps: Steps until the full rate.
        total_steps: Steps of the whole run.

    Source: Loshchilov and Hutter 2017, eq. 5, with no restarts and a final rate of 0.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1.0, total_steps - warmup_steps))
    return 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def build_schedule(optimizer: Optimizer, *, schedule: Schedule, warmup_steps: int, total_steps: float) -> LambdaLR:
    """The learning-rate schedule, stepped once an optimizer step.

    Raises:
        ConfigError: The run has no end for the schedule to decay to.
    """
    from torch.optim.lr_scheduler import LambdaLR

    if schedule != "constant" and math.isinf(total_steps):
        raise ConfigError(f"model.schedule {schedule} needs an end; set trainer.max_epochs or trainer.max_steps, or take constant")
    return LambdaLR(
        optimizer,
        lambda step: learning_rate_factor(step, schedule=schedule, warmup_steps=warmup_steps, total_steps=total_steps),
    )
