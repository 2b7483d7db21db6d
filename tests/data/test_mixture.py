"""Mixtures: how much of what an epoch reads, to the conversation, and in which turn."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_chatgpt.data.mixture import Draws, Mixture
from lightning_chatgpt.data.packing import pack
from lightning_chatgpt.data.splits import position
from lightning_chatgpt.errors import ConfigError


class Corpus:
    """Conversations of some groups, with tokens and examples."""

    def __init__(self, sizes: Mapping[str, int], *, tokens: Mapping[str, int] | None = None, n_examples: int = 1) -> None:
        self.groups = [name for name, size in sizes.items() for _ in range(size)]
        self.places = np.array([position(f"{name} {i}") for name, size in sizes.items() for i in range(size)])
        self.conversations = np.repeat(np.arange(len(self.groups)), n_examples)
        self.lengths = np.array([(tokens or {}).get(self.groups[c], 10) for c in self.conversations], dtype=np.int64)

    def draws(self, settings: Mapping[str, Any], *, seed: int = 0, capacity: int | None = None) -> Draws:
        return Draws(
            Mixture.of(settings),
            lengths=self.lengths,
            conversations=self.conversations,
            groups=self.groups,
            places=self.places,
            seed=seed,
            capacity=capacity,
        )

    def counts(self, settings: Mapping[str, Any], *, epoch: int = 0) -> dict[str, int]:
        """Examples that an epoch reads of each group."""
        return dict(Counter(self.groups[self.conversations[i]] for i in examples(self.draws(settings), epoch)))


def examples(draws: Draws, epoch: int) -> list[int]:
    """The examples that an epoch reads, where each is a row."""
    rows = draws.epoch(epoch)
    assert all(len(row) == 1 for row in rows)
    return [i for row in rows for i in row]


SIZES = {"a": 60, "b": 30, "c": 10}


@pytest.mark.parametrize("epoch", [0, 1, 7])
@pytest.mark.parametrize(
    ("mixture", "expected"),
    [
        ({"temperature": 1.0, "epochs": {"a": 1}}, {"a": 60, "b": 30, "c": 10}),
        ({"epochs": {"c": 2}}, {"a": 60, "b": 30, "c": 20}),
        ({"epochs": {"c": 2.5, "a": 0.5}}, {"a": 30, "b": 30, "c": 25}),
        ({"epochs": {"a": 0, "b": 0.1}}, {"b": 3, "c": 10}),
        ({"weights": {"a": 2, "b": 2}}, {"a": 40, "b": 40, "c": 20}),  # 100 in all, c weighs 1
        ({"weights": {"a": 0, "b": 3}}, {"b": 75, "c": 25}),
        ({"weights": {"a": 1, "b": 1}, "epochs": {"c": 2}}, {"a": 45, "b": 45, "c": 20}),  # the rest is as long as a and b
        ({"weights": {"a": 1, "b": 1, "c": 1}}, {"a": 34, "b": 33, "c": 33}),
        ({"caps": {"a": 5}}, {"a": 5, "b": 30, "c": 10}),
        ({"caps": {"a": 5, "b": 500, "c": 0}}, {"a": 5, "b": 30}),
        ({"caps": {"a": 10, "b": 10}, "weights": {"c": 4}}, {"a": 5, "b": 5, "c": 20}),
        ({"caps": {"a": 10}, "epochs": {"a": 2.5}}, {"a": 25, "b": 30, "c": 10}),
        ({"temperature": 1e9}, {"a": 34, "b": 33, "c": 33}),  # all alike; a's share is the largest by a hair
        # Roots 7.746, 5.477, 3.162 of 16.385: 47.27, 33.43, 19.30 of 100.
        ({"temperature": 2.0}, {"a": 47, "b": 34, "c": 19}),
        ({"temperature": 2.0, "epochs": {"a": 1}}, {"a": 60, "b": 25, "c": 15}),  # 25.36 and 14.64 of 40
    ],
)
def test_counts(mixture: dict[str, Any], expected: dict[str, int], epoch: int) -> None:
    assert Corpus(SIZES).counts(mixture, epoch=epoch) == expected


def test_weights_of_tokens() -> None:
    """One group has long conversations: equal weights are equal tokens, not equal conversations."""
    corpus = Corpus({"long": 40, "short": 400}, tokens={"long": 100, "short": 10})
    draws = corpus.draws({"weights": {"long": 1, "short": 1}, "unit": "tokens"})
    assert draws.n_rows == {"long": 40, "short": 400}
    assert corpus.counts({"weights": {"long": 3}, "unit": "tokens"}) == {"long": 60, "short": 200}
    assert corpus.counts({"weights": {"long": 3}}) == {"long": 330, "short": 110}
    assert corpus.counts({"epochs": {"long": 0.5}, "unit": "tokens"}) == {"long": 20, "short": 400}
    assert corpus.counts({"temperature": 1e9, "unit": "tokens"}) == {"long": 40, "short": 400}


def test_tokens_of_uneven_conversations_are_right_in_the_long_run() -> None:
    corpus = Corpus({"a": 97, "b": 200})
    corpus.lengths = np.random.default_rng(0).integers(1, 200, len(corpus.groups))
    draws = corpus.draws({"epochs": {"a": 0.3}, "unit": "tokens"})
    total = sum(int(corpus.lengths[i]) for epoch in range(40) for i in examples(draws, epoch) if i < 97)
    assert total == pytest.approx(40 * 0.3 * corpus.lengths[:97].sum(), rel=0.01)


@settings(deadline=None)
@given(
    st.dictionaries(st.sampled_from("abcdefg"), st.integers(1, 40), min_size=1),
    st.data(),
)
def test_shares_add_up_and_are_off_by_less_than_one(sizes: dict[str, int], data: st.DataObject) -> None:
    weights = {name: data.draw(st.floats(0.01, 10)) for name in sizes}
    targets = Corpus(sizes).draws({"weights": weights}).n_rows
    total = sum(sizes.values())
    assert sum(targets.values()) == total
    for name, target in targets.items():
        want = total * weights[name] / sum(weights.values())
        assert math.floor(want - 1e-9) <= target <= math.ceil(want + 1e-9)


def test_the_largest_remainders_are_rounded_up() -> None:
    # 10 x (.61, .27, .12) = 6.1, 2.7, 1.2
    assert Corpus({"a": 4, "b": 3, "c": 3}).draws({"weights": {"a": 61, "b": 27, "c": 12}}).n_rows == {"a": 6, "b": 3, "c": 1}
    # 7 x (.36, .36, .28) = 2.52, 2.52, 1.96
    assert Corpus({"a": 3, "b": 2, "c": 2}).draws({"weights": {"a": 36, "b": 36, "c": 28}}).n_rows["c"] == 2


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 30),
    st.floats(0.05, 3.3),
    st.integers(0, 5),
    st.sampled_from(["conversations", "tokens"]),
)
def test_nothing_comes_again_before_all_others_have_come(size: int, epochs: float, seed: int, unit: str) -> None:
    """Guards against sampling with replacement, which leaves a third of the chats unread in an epoch."""
    corpus = Corpus({"a": size, "rest": 5})
    corpus.lengths = np.random.default_rng(seed).integers(1, 50, len(corpus.groups))
    draws = corpus.draws({"epochs": {"a": epochs}, "unit": unit}, seed=seed)
    read = [i for epoch in range(9) for i in examples(draws, epoch) if i < size]
    for start in range(0, len(read) - size + 1, size):
        assert sorted(read[start : start + size]) == list(range(size))
    rest = read[len(read) // size * size :]
    assert len(set(rest)) == len(rest)
    if unit == "conversations":
        assert len(read) == 9 * round(epochs * size)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=40), st.floats(0.5, 2.6), st.integers(0, 5))
def test_packed_rows_come_again_only_when_all_have_come(lengths: list[int], epochs: float, seed: int) -> None:
    """Of a packed group too, each conversation is read once in a pass, and no row has more than fits."""
    corpus = Corpus({"a": len(lengths), "rest": 3})
    corpus.lengths = np.array([*lengths, 1, 2, 3])
    draws = corpus.draws({"epochs": {"a": epochs}}, seed=seed, capacity=40)
    n_rows = len(pack(lengths, capacity=40))
    drawn = [draws.epoch(epoch) for epoch in range(7)]
    assert {len(rows) for rows in drawn} == {sum(draws.n_rows.values())}
    assert draws.n_rows["rest"] == 1
    assert all(corpus.lengths[row].sum() <= 40 for rows in drawn for row in rows)
    assert all(len({i < len(lengths) for i in row}) == 1 for rows in drawn for row in rows)  # groups share no row
    series = [row for rows in drawn for row in rows if row[0] < len(lengths)]
    for start in range(0, len(series) - n_rows + 1, n_rows):
        assert sorted(i for row in series[start : start + n_rows] for i in row) == list(range(len(lengths)))


def test_packed_shares_are_of_rows() -> None:
    corpus = Corpus({"a": 400, "b": 100})
    draws = corpus.draws({"weights": {"a": 1, "b": 1}}, capacity=50)  # five conversations of ten tokens in a row
    assert draws.n_rows == {"a": 50, "b": 50}
    read = Counter(corpus.groups[i] for row in draws.epoch(3) for i in row)
    assert read == {"a": 250, "b": 250}


def test_neighbours_change_from_pass_to_pass() -> None:
    corpus = Corpus({"a": 200})
    corpus.lengths = np.random.default_rng(0).integers(4, 30, 200)
    draws = corpus.draws({"epochs": {"a": 2}}, capacity=64)
    rows = draws.epoch(0)
    half = len(rows) // 2

    def neighbours(rows: list[list[int]]) -> set[frozenset[int]]:
        return {frozenset((a, b)) for row in rows for a in row for b in row if a != b}

    first, second = neighbours(rows[:half]), neighbours(rows[half:])
    assert len(first & second) < 0.3 * len(first)


def test_passes_have_orders_of_their_own() -> None:
    draws = Corpus({"a": 50}).draws({"epochs": {"a": 2}})
    first, second = examples(draws, 0)[:50], examples(draws, 0)[50:]
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert examples(draws, 1)[:50] not in (first, second)


def test_what_an_epoch_reads_depends_on_seed_and_epoch_alone() -> None:
    mixture = {"weights": {"a": 1, "b": 2}, "unit": "tokens"}
    draws = Corpus(SIZES).draws(mixture, seed=3)
    in_order = [draws.epoch(e) for e in range(4)]
    fresh = Corpus(SIZES).draws(mixture, seed=3)
    assert [fresh.epoch(e) for e in (3, 1, 0, 2)] == [in_order[e] for e in (3, 1, 0, 2)]
    assert Corpus(SIZES).draws(mixture, seed=4).epoch(0) != in_order[0]


def test_a_group_is_drawn_alike_whatever_else_is_read() -> None:
    alone = examples(Corpus({"a": 20}).draws({"epochs": {"a": 0.5}}), 3)
    beside = examples(Corpus({"a": 20, "b": 7}).draws({"epochs": {"a": 0.5}}), 3)
    assert [i for i in beside if i < 20] == alone


def test_every_example_of_a_conversation_is_read() -> None:
    """`split` makes several of a long one; one that teaches nothing has none."""
    conversations = np.repeat([0, 1, 3, 4], [3, 1, 2, 4])  # 2 has none
    draws = Draws(
        Mixture.of({"epochs": {"a": 2}, "caps": {"b": 1}}),
        lengths=np.array([5, 5, 5, 9, 7, 7, 4, 4, 4, 4]),
        conversations=conversations,
        groups=["a", "a", "a", "b", "b"],
        places=np.array([0.1, 0.2, 0.3, 0.5, 0.4]),
        seed=0,
    )
    assert draws.sizes == {"a": (2, 24), "b": (1, 16)}  # the one without examples is none; the cap takes the lower place
    for epoch in range(3):
        assert Counter(examples(draws, epoch)) == {**dict.fromkeys(range(4), 2), **dict.fromkeys(range(6, 10), 1)}


def capped(corpus: Corpus, cap: int, *, seed: int = 0) -> set[float]:
    """The places, which are names, of the conversations under a cap."""
    return set(corpus.places[examples(corpus.draws({"caps": {"a": cap}}, seed=seed), 0)].tolist())


def test_what_is_under_a_cap_stays_when_data_are_added() -> None:
    small, large = Corpus({"a": 200}), Corpus({"a": 220})
    before, after = capped(small, 50), capped(large, 50)
    assert len(before) == len(after) == 50
    # Those that went made room for new ones, and no others.
    assert after - before <= set(large.places.tolist()) - set(small.places.tolist())
    assert len(before - after) == len(after - before) <= 12
    assert before == capped(small, 50, seed=9) <= capped(small, 60)
    assert max(before) < min(set(small.places.tolist()) - before)


@pytest.mark.parametrize(
    ("mixture", "is_whole"),
    [
        ({"epochs": {"a": 2}}, True),
        ({"epochs": {"a": 0}}, True),
        ({"caps": {"a": 7}}, True),
        ({"weights": {"a": 6, "b": 3, "c": 1}}, True),
        ({"epochs": {"a": 0.5}}, False),
        ({"weights": {"a": 2}}, False),
    ],
)
def test_whole_passes_read_the_same_in_every_epoch(mixture: dict[str, Any], is_whole: bool) -> None:
    draws = Corpus(SIZES).draws(mixture)
    epochs = [sorted(examples(draws, epoch)) for epoch in range(3)]
    assert (epochs[0] == epochs[1] == epochs[2]) == is_whole
    assert len({len(epoch) for epoch in epochs}) == 1


@pytest.mark.parametrize(
    ("mixture", "says"),
    [
        ({"weight": {}}, "data.mixture.weight is no setting; did you mean weights?"),
        ({"unit": "token"}, "data.mixture.unit cannot be 'token'; did you mean tokens?"),
        ({"label": 3}, "data.mixture.label takes text, not 3; put it in quotes"),
        ({"weights": [1, 2]}, "data.mixture.weights takes names and values, not [1, 2]"),
        ({"weights": {"a": "much"}}, "data.mixture.weights a takes a number, not 'much'"),
        ({"weights": {"a": float("nan")}}, "data.mixture.weights a takes a number, not nan"),
        ({"weights": {"a": -1}}, "data.mixture.weights: a must be at least 0, not -1"),
        ({"epochs": {"a": -0.5}}, "data.mixture.epochs: a must be at least 0, not -0.5"),
        ({"caps": {"a": -3}}, "data.mixture.caps a takes a whole number of at least 0, not -3"),
        ({"caps": {"a": 1.5}}, "data.mixture.caps a takes a whole number of at least 0, not 1.5"),
        ({"temperature": 0}, "data.mixture.temperature must be above 0, not 0"),
        ({"temperature": -1}, "data.mixture.temperature must be above 0, not -1"),
        ({"temperature": 2.0, "weights": {"a": 1}}, "data.mixture: weights and temperature both set shares; leave one out"),
        ({"weights": {"a": 1}, "epochs": {"a": 1}}, "data.mixture: a has both a weight and epochs; leave one out"),
        ({"weights": {"A": 2}}, "data.mixture.weights: there is no source 'A'; there are a, b, c"),
        ({"epochs": {"aa": 2}}, "data.mixture.epochs: there is no source 'aa'; did you mean a?"),
        ({"caps": {"d": 2}, "label": "topic"}, "data.mixture.caps: there is no topic 'd'; there are a, b, c"),
        ({"weights": {"a": 0, "b": 0, "c": 0}}, "data.mixture leaves nothing to read; raise a weight or a cap"),
        ({"caps": {"a": 0, "b": 0, "c": 0}}, "data.mixture leaves nothing to read; raise a weight or a cap"),
        ({"epochs": {"a": 0, "b": 0.01, "c": 0}}, "data.mixture leaves nothing to read; raise a weight or a cap"),
    ],
)
def test_what_cannot_be_is_refused(mixture: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        Corpus(SIZES).draws(mixture)
    assert str(error.value) == says


def test_no_mixture_is_the_default_one() -> None:
    assert Mixture.of(None) == Mixture.of({}) == Mixture()


def test_sizes_tell_conversations_and_tokens_under_the_caps() -> None:
    corpus = Corpus({"a": 6, "b": 3}, tokens={"a": 7, "b": 100}, n_examples=2)
    assert corpus.draws({"caps": {"a": 4}}).sizes == {"a": (4, 56), "b": (3, 600)}
