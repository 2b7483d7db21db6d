"""Which rows are read when, and by which process. A row is one example, or several that are packed together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_chatgpt.data.mixture import Draws
from lightning_chatgpt.data.packing import pack, shuffle_equal

Row = Sequence[int]
Ints = npt.NDArray[np.int64]

_STEPS_SORTED_TOGETHER = 50  # sorting all would put equal lengths side by side in every epoch


class _Numbers(Dataset[int]):
    """Stands for a data set where only its length is asked for."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length


class EpochSampler(DistributedSampler[Any]):
    """Shuffles training rows: what an epoch reads, and in which order, is a function of seed and epoch alone.

    Each process gets as many rows: where they do not share out evenly, the last ones get rows without tokens, which weigh nothing. So
    an optimizer step reads the same rows however many processes and micro-batches share it.

    It is a ``DistributedSampler`` because Lightning leaves those alone and tells them the epoch.

    Args:
        lengths: (N,) tokens of each example.
        step_size: Rows that all processes together read in one optimizer step.
        seed: Chooses the order.
        draws: Which rows an epoch reads; None for each example once.
        capacity: Tokens of a packed row; None for one example in each row. Rows that are drawn are packed already.
        group_by_length: Whether rows of about one length share an optimizer step, whose batches are then padded little.
        rank: Which process this is, from 0.
        world_size: How many processes read.

    Attributes:
        n_read: Rows of its share that this process has read already, and that the epoch begins behind.
    """

    def __init__(
        self,
        lengths: Sequence[int] | Ints,
        *,
        step_size: int,
        seed: int,
        draws: Draws | None = None,
        capacity: int | None = None,
        group_by_length: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.step_size = step_size
        self.n_read = 0
        self.draws = draws
        self.group_by_length = group_by_length
        self._packed = pack(self.lengths, capacity=capacity) if capacity is not None and draws is None else None
        n_rows = sum(draws.n_rows.values()) if draws is not None else len(self.lengths if self._packed is None else self._packed)
        super().__init__(_Numbers(n_rows), num_replicas=world_size, rank=rank, seed=seed)

    def __iter__(self) -> Iterator[Row]:
        """The rows of this process that are left, in this epoch's order."""
        order = self.epoch_rows(self.epoch)
        order += [()] * (self.total_size - len(order))  # torch would read the first ones twice
        yield from order[self.rank + self.n_read * self.num_replicas : self.total_size : self.num_replicas]

    def epoch_rows(self, epoch: int) -> list[Row]:
        """All rows of an epoch, over all processes, in order."""
        rows: Sequence[Row]
        if self.draws is not None:
            rows = self.draws.epoch(epoch)
        elif self._packed is not None:
            rows = shuffle_equal(self.lengths, self._packed, generator=np.random.default_rng((self.seed, epoch)))
        else:
            rows = [[i] for i in range(len(self.lengths))]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(rows), generator=generator).numpy()
        if self.group_by_length and len(rows):
            order = self._grouped(order, np.array([self.lengths[list(row)].sum() for row in rows]), generator)
        return [rows[i] for i in order.tolist()]

    def _grouped(self, order: Ints, lengths: Ints, generator: torch.Generator) -> Ints:
        size = self.step_size
        steps: list[Ints] = []
        for start in range(0, len(order), size * _STEPS_SORTED_TOGETHER):
            chunk = order[start : start + size * _STEPS_SORTED_TOGETHER]
            chunk = chunk[np.argsort(lengths[chunk], kind="stable")]
            steps += [chunk[i : i + size] for i in range(0, len(chunk), size)]
        # A short step anywhere but at the end would shift all that follow.
        short = [step for step in steps if len(step) < size]
        full = [step for step in steps if len(step) == size]
        shuffled = [full[i] for i in torch.randperm(len(full), generator=generator).tolist()]
        return np.concatenate([*shuffled, *short])


class ShardSampler(DistributedSampler[Any]):
    """Reads each row exactly once over all processes, in order: process r reads r, r + n, r + 2n, …

    torch's own ``DistributedSampler`` reads some twice to make shares equal, which counts them twice in a metric.

    Args:
        rows: What is read.
        n_read: Rows of its share that this process has read already, and begins behind.
        rank: Which process this is, from 0.
        world_size: How many processes read.
    """

    def __init__(self, rows: Sequence[Any], *, n_read: int = 0, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(_Numbers(len(rows)), num_replicas=world_size, rank=rank, shuffle=False)
        self.share = rows[rank::world_size][n_read:]

    def __iter__(self) -> Iterator[Any]:
        """The rows of this process."""
        return iter(self.share)

    def __len__(self) -> int:
        """How many rows this process reads."""
        return len(self.share)


class TrainLoader(DataLoader[Any]):
    """Serves training batches; those of an epoch that was begun before, from where it was left.

    What an epoch reads is a function of seed and epoch, so that these two numbers tell all there is to know.

    Args:
        begin: Tells the sampler's epoch and how many batches of it are done; asked with the epoch that Lightning has set, when the first
            batch is wanted.
        *args: What a ``DataLoader`` takes.
        **kwargs: What a ``DataLoader`` takes.
    """

    def __init__(self, *args: Any, begin: Callable[[int], tuple[int, int]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.begin = begin

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # a generator: Lightning asks for it before it knows epoch and position
        """The epoch's batches that are left."""
        if isinstance(self.sampler, EpochSampler):  # Lightning puts another in its place to overfit on purpose
            assert self.batch_size is not None
            epoch, n_batches = self.begin(self.sampler.epoch)
            self.sampler.set_epoch(epoch)
            self.sampler.n_read = n_batches * self.batch_size
        yield from super().__iter__()
