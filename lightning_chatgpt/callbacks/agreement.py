"""What the processes of a run decide together, on the CPU: no device is waited for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

_groups: list[tuple[object, dist.ProcessGroup]] = []  # the default group, and the one beside it


def any_process(trainer: Trainer, flag: bool) -> bool:
    """Whether a flag is set in any process. All of them have to ask."""
    return greatest(trainer, int(flag)) > 0


def greatest(trainer: Trainer, number: int) -> int:
    """The greatest of all processes' numbers. All of them have to ask."""
    return _reduced(trainer, number, dist.ReduceOp.MAX)


def least(trainer: Trainer, number: int) -> int:
    """The least of all processes' numbers. All of them have to ask."""
    return _reduced(trainer, number, dist.ReduceOp.MIN)


def gathered(trainer: Trainer, value: object) -> list[object]:
    """Every process's value, in order. All of them have to ask."""
    if trainer.world_size == 1 or not dist.is_initialized():
        return [value]
    values: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_group())
    return values


def of_first(value: Any) -> Any:
    """The first process's value. All of them have to ask."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=_group())
    return values[0]


def _reduced(trainer: Trainer, number: int, operation: dist.ReduceOp.RedOpType) -> int:
    if trainer.world_size == 1 or not dist.is_initialized():
        return number
    tensor = torch.tensor(number)
    dist.all_reduce(tensor, op=operation, group=_group())
    return int(tensor)


def _group() -> dist.ProcessGroup:
    default = dist.group.WORLD
    if not _groups or _groups[0][0] is not default:
        _groups[:] = [(default, dist.new_group(backend="gloo"))]
    return _groups[0][1]
