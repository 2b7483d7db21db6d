"""Who reads what: every example, by somebody, in an order that depends on seed and epoch alone."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest

from lightning_chatgpt.data.mixture import Draws, Mixture
from lightning_chatgpt.data.packing import pack
from lightning_chatgpt.data.sampler import EpochSampler, ShardSampler

LENGTHS = random.Random(0).choices(range(5, 500), k=1003)


@pytest.mark.parametrize("group_by_length", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_epoch_reads_every_example(group_by_length: bool, world_size: int) -> None:
    ranks = [
        list(EpochSampler(LENGTHS, step_size=8, seed=1, rank=r, world_size=world_size, group_by_length=group_by_length))
        for r in range(world_size)
    ]
    assert len({len(indices) for indices in ranks}) == 1  # or a process would wait for ever
    read = [i for rows in ranks for row in rows for i in row]
    assert sorted(read) == list(range(len(LENGTHS)))
    assert sum(not row for rows in ranks for row in rows) < world_size


@pytest.mark.parametrize("group_by_length", [False, True])
def test_a_step_reads_the_same_rows_however_it_is_shared(group_by_length: bool) -> None:
    """Guards against an order that depends on how many processes and micro-batches there are."""

    def steps(world_size: int, batch_size: int, n_batches: int) -> list[set[int]]:
        ranks = [
            list(EpochSampler(LENGTHS, step_size=12, seed=1, rank=r, world_size=world_size, group_by_length=group_by_length))
            for r in range(world_size)
        ]
        share = batch_size * n_batches
        return [{i for rows in ranks for row in rows[at : at + share] for i in row} for at in range(0, len(ranks[0]), share)]

    whole = steps(1, 12, 1)
    assert len(whole) == -(-len(LENGTHS) // 12)
    assert whole == steps(1, 3, 4) == steps(2, 3, 2) == steps(3, 1, 4) == steps(4, 3, 1)


def test_order_changes_with_epoch_and_seed_and_comes_back() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = EpochSampler(LENGTHS, step_size=8, seed=seed)
        sampler.set_epoch(epoch)
        return [i for (i,) in sampler]

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(s, e)) for s in (1, 2) for e in (0, 1)}) == 4


@pytest.mark.parametrize("world_size", [1, 2])
def test_grouping_saves_padding(world_size: int) -> None:
    def padded_tokens(group_by_length: bool) -> int:
        total = 0
        for rank in range(world_size):
            rows = EpochSampler(
                LENGTHS, step_size=8 * world_size, seed=1, rank=rank, world_size=world_size, group_by_length=group_by_length
            )
            order = [i for row in rows for i in row]
            batches = [order[i : i + 8] for i in range(0, len(order), 8)]
            total += sum(max(LENGTHS[i] for i in batch) * len(batch) for batch in batches)
        return total

    assert padded_tokens(True) < 1.1 * sum(LENGTHS) < 1.5 * sum(LENGTHS) < padded_tokens(False)


@pytest.mark.parametrize(("n", "world_size"), [(5, 2), (7, 3), (1, 2), (6, 2)])
def test_shards_read_each_example_once(n: int, world_size: int) -> None:
    """Guards against evaluation counting examples twice: torch's own sampler pads the shares."""
    samplers = [ShardSampler(range(n), rank=rank, world_size=world_size) for rank in range(world_size)]
    assert sorted(i for sampler in samplers for i in sampler) == list(range(n))
    assert [len(sampler) for sampler in samplers] == [len(list(sampler)) for sampler in samplers]


def packed(**settings: Any) -> EpochSampler:
    return EpochSampler(LENGTHS, **{"step_size": 8, "seed": 1, "capacity": 512, **settings})


def read(sampler: EpochSampler, epoch: int) -> list[tuple[int, ...]]:
    """The rows that a process reads in an epoch, as a DataLoader would ask for them."""
    sampler.set_epoch(epoch)
    return [tuple(row) for row in sampler]


def test_packed_epochs_read_every_example_once() -> None:
    sampler = packed()
    epochs = [read(sampler, epoch) for epoch in range(4)]
    for rows in epochs:
        assert sorted(i for row in rows for i in row) == list(range(len(LENGTHS)))
        assert max(sum(LENGTHS[i] for i in row) for row in rows) <= 512
        assert len(rows) == len(sampler) == len(pack(LENGTHS, capacity=512))
    # What is in a row changes, but for its lengths: no epoch is packed worse than the first.
    shapes = [Counter(tuple(sorted(LENGTHS[i] for i in row)) for row in rows) for rows in epochs]
    assert shapes[0] == shapes[1] == shapes[2] == shapes[3]


def test_packed_order_and_neighbours_change_with_the_epoch_and_come_back() -> None:
    first, second = read(packed(), 0), read(packed(), 1)

    def neighbours(rows: list[tuple[int, ...]]) -> set[frozenset[int]]:
        return {frozenset((a, b)) for row in rows for a in row for b in row if a != b}

    assert [sum(LENGTHS[i] for i in row) for row in first] != [sum(LENGTHS[i] for i in row) for row in second]
    assert len(neighbours(first) & neighbours(second)) < 0.3 * len(neighbours(first))
    assert read(packed(), 0) == first
    assert read(packed(seed=2), 0) != first


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_packed_rows(world_size: int) -> None:
    ranks = [read(packed(rank=rank, world_size=world_size), 3) for rank in range(world_size)]
    assert len({len(rows) for rows in ranks}) == 1
    whole = Counter(read(packed(), 3))
    shared = Counter(row for rows in ranks for row in rows)
    assert shared.pop((), 0) < world_size  # rows of nothing, so that shares are equal
    assert shared == whole


def draws(lengths: list[int], mixture: dict[str, Any], *, seed: int = 0, capacity: int | None = None) -> Draws:
    """Every third example is of group b."""
    n = len(lengths)
    return Draws(
        Mixture.of(mixture),
        lengths=np.array(lengths),
        conversations=np.arange(n),
        groups=["aab"[i % 3] for i in range(n)],
        places=np.linspace(0, 0.999, n),
        seed=seed,
        capacity=capacity,
    )


@pytest.mark.parametrize("n", [40, 3000])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(
    "mixture",
    [{"epochs": {"a": 2}}, {"epochs": {"a": 0.5, "b": 1.3}}, {"weights": {"b": 3}}, {"weights": {"a": 2}, "unit": "tokens"}],
    ids=str,
)
def test_packed_epochs_of_a_mixture_are_of_one_length_and_lose_nothing(mixture: dict[str, Any], world_size: int, n: int) -> None:
    """Guards against rows that did not fit, or were cut off, from the second epoch on: the epochs read different chats, which pack
    differently, and Lightning asks once how many batches an epoch has."""
    lengths = np.clip(np.random.default_rng(3).lognormal(4.5, 1, n).astype(int), 5, 500).tolist()
    drawn = draws(lengths, mixture, capacity=512)
    samplers = [
        EpochSampler(lengths, step_size=8, seed=1, draws=drawn, capacity=512, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    length = len(samplers[0])
    assert 0 <= length * world_size - sum(drawn.n_rows.values()) < world_size
    for epoch in range(5):
        wanted = Counter(map(tuple, drawn.epoch(epoch)))
        shares = [read(sampler, epoch) for sampler in samplers]
        assert {len(rows) for rows in shares} == {len(sampler) for sampler in samplers} == {length}
        found = Counter(row for share in shares for row in share)
        assert max(sum(lengths[i] for i in row) for row in found) <= 512
        assert found.pop((), 0) < world_size
        assert found == wanted


@pytest.mark.parametrize("mixture", [{"epochs": {"a": 2, "b": 0.5}}, {"weights": {"b": 3}, "unit": "tokens"}], ids=str)
def test_epochs_of_a_mixture_without_packing_read_what_is_drawn(mixture: dict[str, Any]) -> None:
    drawn = draws(LENGTHS, mixture)
    sampler = EpochSampler(LENGTHS, step_size=8, seed=1, draws=drawn)
    for epoch in range(3):
        rows = read(sampler, epoch)
        assert len(rows) == len(sampler)
        assert Counter(i for (i,) in rows) == Counter(i for (i,) in drawn.epoch(epoch))
    assert read(sampler, 0) != read(sampler, 1)


def test_grouping_by_length_goes_with_a_mixture() -> None:
    drawn = draws(LENGTHS, {"epochs": {"a": 0.5}})
    sampler = EpochSampler(LENGTHS, step_size=8, seed=1, draws=drawn, group_by_length=True)
    rows = read(sampler, 2)
    assert Counter(i for (i,) in rows) == Counter(i for (i,) in drawn.epoch(2))
    spread = [max(LENGTHS[i] for (i,) in rows[k : k + 8]) - min(LENGTHS[i] for (i,) in rows[k : k + 8]) for k in range(0, len(rows) - 8, 8)]
    assert np.median(spread) < 40


def test_an_example_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="an example of 499 tokens does not fit into a row of 400"):
        packed(capacity=400)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_shards_read_each_packed_row_once(world_size: int) -> None:
    rows = pack(LENGTHS, capacity=512)
    shares = [list(ShardSampler(rows, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert sorted(map(tuple, (row for share in shares for row in share))) == sorted(map(tuple, rows))
