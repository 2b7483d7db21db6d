"""Which example is read when, and by which process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, DistributedSampler

_BATCHES_SORTED_TOGETHER = 50  # sorting all would put equal lengths side by side in every epoch


class _Numbers(Dataset[int]):
    """Stands for a data set where only its length is asked for."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length


class EpochSampler(DistributedSampler[Any]):
    """Shuffles training examples: the order is a function of seed and epoch alone.

    Each process gets as many examples, and with ``lengths`` examples of about one length stand together, so that a batch is
    padded little. It is a ``DistributedSampler`` because Lightning leaves those alone and tells them the epoch.

    Args:
        lengths: Tokens of each example.
        batch_size: Examples a process reads in one batch.
        seed: Chooses the order.
        rank: Which process this is, from 0.
        world_size: How many processes read.
        group_by_length: Whether examples of about one length share a batch.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        group_by_length: bool = False,
    ) -> None:
        super().__init__(_Numbers(len(lengths)), num_replicas=world_size, rank=rank, seed=seed)
        self.lengths = lengths
        self.batch_size = batch_size
        self.group_by_length = group_by_length

    def __iter__(self) -> Iterator[int]:
        """The indices of this process, in this epoch's order."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        if self.group_by_length:
            order = self._grouped(order, generator)
        # Ranks must make equally many steps: the first few of the order are read twice, as torch does.
        order = (order * self.num_replicas)[: self.total_size]
        yield from order[self.rank : self.total_size : self.num_replicas]

    def _grouped(self, order: list[int], generator: torch.Generator) -> list[int]:
        size = self.batch_size * self.num_replicas
        batches: list[list[int]] = []
        for start in range(0, len(order), size * _BATCHES_SORTED_TOGETHER):
            chunk = order[start : start + size * _BATCHES_SORTED_TOGETHER]
            chunk.sort(key=self.lengths.__getitem__)
            batches += [chunk[i : i + size] for i in range(0, len(chunk), size)]
        # A short batch anywhere but at the end would shift all that follow.
        short = [batch for batch in batches if len(batch) < size]
        full = [batch for batch in batches if len(batch) == size]
        shuffled = [full[i] for i in torch.randperm(len(full), generator=generator).tolist()]
        return [index for batch in [*shuffled, *short] for index in batch]


class ShardSampler(DistributedSampler[Any]):
    """Reads each example exactly once over all processes, in order: process r reads r, r + n, r + 2n, …

    torch's own ``DistributedSampler`` reads some twice to make shares equal, which counts them twice in a metric.
    """

    def __init__(self, n_examples: int, *, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(_Numbers(n_examples), num_replicas=world_size, rank=rank, shuffle=False)
        self.share = range(rank, n_examples, world_size)

    def __iter__(self) -> Iterator[int]:
        """The indices of this process."""
        return iter(self.share)

    def __len__(self) -> int:
        """How many examples this process reads."""
        return len(self.share)
