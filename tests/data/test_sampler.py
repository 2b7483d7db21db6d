"""Who reads what: every example, by somebody, in an order that depends on seed and epoch alone."""

import random

import pytest

from lightning_chatgpt.data.sampler import EpochSampler, ShardSampler

LENGTHS = random.Random(0).choices(range(5, 500), k=1003)


@pytest.mark.parametrize("group_by_length", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_epoch_reads_every_example(group_by_length: bool, world_size: int) -> None:
    ranks = [
        list(EpochSampler(LENGTHS, batch_size=8, seed=1, rank=r, world_size=world_size, group_by_length=group_by_length))
        for r in range(world_size)
    ]
    assert len({len(indices) for indices in ranks}) == 1  # or a process would wait for ever
    read = [i for rows in ranks for (i,) in rows]
    assert set(read) == set(range(len(LENGTHS)))
    assert len(read) - len(LENGTHS) < world_size


def test_order_changes_with_epoch_and_seed_and_comes_back() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = EpochSampler(LENGTHS, batch_size=8, seed=seed)
        sampler.set_epoch(epoch)
        return [i for (i,) in sampler]

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(s, e)) for s in (1, 2) for e in (0, 1)}) == 4


@pytest.mark.parametrize("world_size", [1, 2])
def test_grouping_saves_padding(world_size: int) -> None:
    def padded_tokens(group_by_length: bool) -> int:
        total = 0
        for rank in range(world_size):
            rows = EpochSampler(LENGTHS, batch_size=8, seed=1, rank=rank, world_size=world_size, group_by_length=group_by_length)
            order = [i for (i,) in rows]
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
