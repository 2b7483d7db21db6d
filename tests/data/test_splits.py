"""Splits are stable, disjoint, of about the asked size, and never empty."""

from collections.abc import Sequence

import numpy as np
import pytest

from lightning_chatgpt.data.splits import position
from lightning_chatgpt.data.splits import split as split_places
from lightning_chatgpt.errors import ConfigError, DataError

KEYS = [f"conversation {i}" for i in range(2000)]


def split(items: Sequence, keys: Sequence[str], *, validation: float, test: float) -> tuple[list, list, list]:
    """The items of train, validation and test."""
    rows = split_places(np.array([position(key) for key in keys]), validation=validation, test=test)
    train, validation_items, test_items = ([items[i] for i in rows[part]] for part in ("train", "validation", "test"))
    return train, validation_items, test_items


def test_sizes_are_about_as_asked_and_nothing_is_lost() -> None:
    train, validation, test = split(KEYS, KEYS, validation=0.1, test=0.2)
    assert sorted(train + validation + test) == sorted(KEYS)
    assert 160 <= len(validation) <= 240 and 350 <= len(test) <= 450


def test_order_and_growth_move_nothing() -> None:
    parts = split(KEYS, KEYS, validation=0.1, test=0.1)
    shuffled = split(KEYS[::-1], KEYS[::-1], validation=0.1, test=0.1)
    more = [*KEYS, *(f"later {i}" for i in range(500))]
    grown = split(more, more, validation=0.1, test=0.1)
    for part, other, larger in zip(parts, shuffled, grown, strict=True):
        assert set(part) == set(other) <= set(larger)


def test_the_same_on_every_machine() -> None:
    # What `printf hello | b2sum -l 56` prints, as a fraction.
    assert position("hello") == 0x21855381D95110 / 2**56


def test_one_key_stays_together() -> None:
    items = [(key, i) for key in KEYS[:200] for i in range(5)]
    parts = split(items, [key for key, _ in items], validation=0.3, test=0.3)
    seen = [{key for key, _ in part} for part in parts]
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_a_part_that_was_asked_for_is_never_empty(n: int) -> None:
    train, validation, _ = split(KEYS[:n], KEYS[:n], validation=0.01, test=0)
    assert train and validation


def test_refusals() -> None:
    with pytest.raises(DataError, match="too few"):
        split(KEYS[:1], KEYS[:1], validation=0.5, test=0)
    with pytest.raises(ConfigError, match="data.validation as a fraction must be at least 0 and below 1, not 1.5"):
        split(KEYS, KEYS, validation=1.5, test=0)
    with pytest.raises(ConfigError, match="leave nothing to train on"):
        split(KEYS, KEYS, validation=0.5, test=0.5)
