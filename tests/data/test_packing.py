"""Packing: rows hold each example once and no more than fits, and what shares a row never sees its neighbours."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_chatgpt.data.collate import Batch, Tokens, collate
from lightning_chatgpt.data.packing import pack, padding_share, shuffle_equal
from lightning_chatgpt.models.loss import token_losses
from tests.conftest import ARCHITECTURE

VOCABULARY = 100
WIDTH = 64
PROBLEMS = st.integers(1, 80).flatmap(lambda capacity: st.tuples(st.just(capacity), st.lists(st.integers(1, capacity), max_size=60)))


def fills(rows: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[int]:
    """Tokens of each row, sorted."""
    return sorted(sum(lengths[i] for i in row) for row in rows)


def naive_best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """The textbook's way: look at every row for each example."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [r for r in range(len(rows)) if room[r] >= lengths[i]]
        if fitting:
            row = min(fitting, key=lambda r: room[r])
        else:
            row = len(rows)
            rows.append([])
            room.append(capacity)
        rows[row].append(i)
        room[row] -= lengths[i]
    return rows


@settings(deadline=None)
@given(st.integers(0, 80).flatmap(lambda capacity: st.tuples(st.just(capacity), st.lists(st.integers(0, capacity), max_size=60))))
def test_nothing_is_lost_repeated_or_overfilled(problem: tuple[int, list[int]]) -> None:
    capacity, lengths = problem
    rows = pack(lengths, capacity=capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(row for row in rows)
    assert max(fills(rows, lengths), default=0) <= capacity


@settings(deadline=None)
@given(PROBLEMS)
def test_it_is_best_fit_decreasing(problem: tuple[int, list[int]]) -> None:
    capacity, lengths = problem
    assert fills(pack(lengths, capacity=capacity), lengths) == fills(naive_best_fit_decreasing(lengths, capacity), lengths)


def test_it_is_best_fit_decreasing_with_many_long_examples() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(4.5, 0.8, 3000).astype(int), 1, 512).tolist()
    rows = pack(lengths, capacity=512)
    assert fills(rows, lengths) == fills(naive_best_fit_decreasing(lengths, 512), lengths)
    assert padding_share(lengths, rows, capacity=512) < 0.02


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 200), st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_rows_are_at_most_11_ninths_of_the_fewest_possible(capacity: int, fewest: int, seed: int) -> None:
    """Full rows are cut at random: as many rows are enough, and no fewer can be."""
    generator = np.random.default_rng(seed)
    lengths: list[int] = []
    for _ in range(fewest):
        cuts = np.sort(generator.choice(np.arange(1, capacity), size=generator.integers(0, min(6, capacity)), replace=False))
        lengths += np.diff(np.concatenate([[0], cuts, [capacity]])).tolist()
    assert sum(lengths) == fewest * capacity
    assert fewest <= len(pack(lengths, capacity=capacity)) <= 11 / 9 * fewest + 1


def test_the_worst_case_is_reached_and_not_passed() -> None:
    """Johnson's example: 9 rows would do for what best-fit decreasing puts into 11."""
    lengths = [51] * 6 + [27] * 6 + [26] * 6 + [23] * 12
    assert fills([[51, 26, 23]] * 6 + [[27, 27, 23, 23]] * 3, range(101)) == [100] * 9
    assert len(pack(lengths, capacity=100)) == 11


def test_too_long_examples_are_refused() -> None:
    with pytest.raises(ValueError, match="an example of 9 tokens does not fit into a row of 8"):
        pack([3, 9, 4], capacity=8)
    assert pack([8, 1], capacity=8) == [[0], [1]]
    assert pack([], capacity=8) == []


def test_time_does_not_grow_with_the_number_of_open_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts lines that run: a search through the rows would make them grow with the square."""
    import sys

    def n_lines(n: int) -> int:
        # All rows keep a little room that nothing fits into, of many sizes.
        lengths = np.random.default_rng(0).integers(520, 1000, n)
        count = 0

        def trace(frame, event, argument):  # type: ignore[no-untyped-def]
            nonlocal count
            count += event == "line"
            return trace if frame.f_code is pack.__code__ or frame.f_back.f_code is pack.__code__ else None

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            pack(lengths, capacity=1000)
        finally:
            sys.settrace(before)
        return count

    few, many = n_lines(500), n_lines(4000)
    assert few > 500  # it did count
    assert many < 9 * few


@settings(deadline=None)
@given(PROBLEMS, st.integers(0, 2**32 - 1))
def test_shuffling_keeps_the_fit(problem: tuple[int, list[int]], seed: int) -> None:
    capacity, lengths = problem
    rows = pack(lengths, capacity=capacity)
    shuffled = shuffle_equal(np.array(lengths, dtype=np.int64), rows, generator=np.random.default_rng(seed))
    assert sorted(i for row in shuffled for i in row) == list(range(len(lengths)))

    def shapes(rows: Sequence[Sequence[int]]) -> Counter[tuple[int, ...]]:
        return Counter(tuple(sorted(lengths[i] for i in row)) for row in rows)

    assert shapes(shuffled) == shapes(rows)


def test_shuffling_changes_rows_and_neighbours() -> None:
    lengths = np.random.default_rng(1).integers(4, 30, 400)
    rows = pack(lengths, capacity=64)
    first, second = (shuffle_equal(lengths, rows, generator=np.random.default_rng(seed)) for seed in (1, 2))

    def neighbours(rows: list[list[int]]) -> set[frozenset[int]]:
        return {frozenset((a, b)) for row in rows for a in row for b in row if a != b}

    assert [len(row) for row in first] != [len(row) for row in second]
    assert len(neighbours(first) & neighbours(second)) < 0.3 * len(neighbours(first))
    assert first == shuffle_equal(lengths, rows, generator=np.random.default_rng(1))


@pytest.mark.parametrize(
    ("lengths", "rows", "share"),
    [([10, 10], [[0], [1]], 0.0), ([5, 5], [[0, 1]], 0.0), ([5, 4], [[0], [1]], 0.55), ([1], [[0]], 0.9), ([], [], 0.0)],
)
def test_padding_share(lengths: list[int], rows: list[list[int]], share: float) -> None:
    assert padding_share(lengths, rows, capacity=10) == pytest.approx(share)


# What the network makes of packed rows.


def examples(*lengths: int, seed: int = 0) -> list[Tokens]:
    """Examples of random tokens and weights."""
    generator = np.random.default_rng(seed)
    weights = np.array([0.0, 1.0, 0.5], dtype=np.float32)
    return [(generator.integers(0, VOCABULARY, n, dtype=np.int32), weights[generator.integers(0, 3, n)]) for n in lengths]


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def network(request: pytest.FixtureRequest) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    no_dropout = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    config = GPT2Config(**ARCHITECTURE, **no_dropout, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, initializer_range=0.3)
    config._attn_implementation = request.param
    network = GPT2LMHeadModel(config).eval()
    assert network.config._attn_implementation == request.param
    return network


def logits(network: GPT2LMHeadModel, batch: Batch) -> torch.Tensor:
    """As models.loss runs the network, at every place."""
    with torch.no_grad():
        return network(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits


PACKED = [[0, 1, 2], [3], [4, 5, 6, 7], [8]]
LENGTHS = [20, 30, 14, 64, 1, 2, 7, 40, 33]


def test_packed_logits_are_those_of_each_example_alone(network: GPT2LMHeadModel) -> None:
    """Guards against packed chats that read each other: transformers does so by default (5e-2 apart)."""
    found = examples(*LENGTHS)
    rows = [[found[i] for i in row] for row in PACKED]
    packed = logits(network, collate(rows, pad_token_id=0, width=WIDTH))
    checked = 0
    for r, row in enumerate(rows):
        start = 0
        for example in row:
            n = len(example[0])
            alone = logits(network, collate([[example]], pad_token_id=0))[0]
            assert alone.shape == (n, VOCABULARY)
            torch.testing.assert_close(packed[r, start : start + n], alone, rtol=0, atol=1e-5)
            start += n
            checked += n
    assert checked == sum(LENGTHS)
    # And the positions decide it: were they to go on counting, the chats would read each other.
    leaking = collate(rows, pad_token_id=0, width=WIDTH)
    leaking["position_ids"] = torch.arange(WIDTH).expand(len(rows), -1)
    assert (logits(network, leaking)[0, 20:] - packed[0, 20:]).abs().max() > 1e-2


def test_other_tokens_in_one_example_change_nothing_of_its_neighbours(network: GPT2LMHeadModel) -> None:
    found = examples(20, 30, 10)
    before = logits(network, collate([found], pad_token_id=0, width=WIDTH))[0]
    changed = [found[0], ((found[1][0] + 1) % VOCABULARY, found[1][1]), found[2]]
    after = logits(network, collate([changed], pad_token_id=0, width=WIDTH))[0]
    is_same = (before == after).all(dim=1)
    assert is_same[:20].all() and is_same[50:60].all()
    assert not is_same[20:50].any()


def test_what_pads_changes_nothing(network: GPT2LMHeadModel) -> None:
    found = examples(20, 30)
    first, second = (logits(network, collate([found], pad_token_id=pad, width=WIDTH))[0, :50] for pad in (0, 7))
    assert torch.equal(first, second)


def test_losses_of_a_packed_batch_are_those_of_the_examples(network: GPT2LMHeadModel) -> None:
    found = examples(*LENGTHS, seed=1)
    with torch.no_grad():
        packed = token_losses(network, collate([[found[i] for i in row] for row in PACKED], pad_token_id=0, width=WIDTH))
        padded = token_losses(network, collate([[found[i]] for row in PACKED for i in row], pad_token_id=0))
    supervised = sum(int((weights[1:] > 0).sum()) for _, weights in found)
    assert len(packed.nll) == len(padded.nll) == supervised > 100
    # Reading order is the same in both, for the first token of an example is never scored.
    assert torch.equal(packed.targets, padded.targets)
    assert torch.equal(packed.weights, padded.weights)
    assert set(packed.weights.tolist()) == {1.0, 0.5}
    torch.testing.assert_close(packed.nll, padded.nll, rtol=0, atol=1e-5)
    torch.testing.assert_close(packed.mean(), padded.mean(), rtol=0, atol=1e-6)


def test_a_packed_batch_by_hand() -> None:
    def example(ids: list[int], weights: list[float]) -> Tokens:
        return np.array(ids, dtype=np.int32), np.array(weights, dtype=np.float32)

    row = [example([5, 6, 7], [1, 1, 0]), example([8, 9], [0.5, 0.5])]
    batch = collate([row, [example([4], [1])]], pad_token_id=9, width=7)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 9, 9], [4, 9, 9, 9, 9, 9, 9]]
    # No first token is predicted from the example before it.
    assert batch["labels"].tolist() == [[-100, 6, -100, -100, 9, -100, -100], [-100] * 7]
    assert batch["loss_weights"].tolist() == [[0, 1, 0, 0, 0.5, 0, 0], [0] * 7]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6]]
    assert batch["attention_mask"].tolist() == [[1] * 5 + [0] * 2, [1] + [0] * 6]


def test_the_oracle_of_this_file_knows_a_full_row() -> None:
    """The naive reference must itself be best-fit: it takes the fullest row that has room."""
    rows = naive_best_fit_decreasing([6, 5, 3, 4], 10)
    assert sorted(map(sorted, rows)) == [[0, 3], [1, 2]]
    assert bisect.bisect(fills(rows, [6, 5, 3, 4]), 8) == 1
