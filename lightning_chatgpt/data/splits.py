"""Train, validation and test: which conversation falls where depends on itself alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

from lightning_chatgpt.errors import ConfigError, DataError

T = TypeVar("T")


def position(key: str) -> float:
    """A key's place in [0, 1): the same on every machine and in every order of files; uniform over keys."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "big") / 2**56


def split(items: Sequence[T], keys: Sequence[str], *, validation: float, test: float) -> tuple[list[T], list[T], list[T]]:
    """Split items by their keys.

    An item's place in [0, 1) decides: below ``test`` it is a test item, below ``test + validation`` a validation item, else a
    training item. More items never move those that were there. A part that was asked for and would come out empty gets
    the item nearest to it.

    Args:
        items: What to split.
        keys: One for each item; items with one key stay together.
        validation: The fraction of the items to validate on; 0 for none.
        test: The fraction of the items to test on; 0 for none.

    Returns: training, validation and test items, each in the order given.

    Raises:
        ConfigError: A fraction is not in [0, 1) or both together leave nothing to train on.
        DataError: There are too few different items to split.
    """
    for name, fraction in (("validation", validation), ("test", test)):
        if not 0 <= fraction < 1:
            raise ConfigError(f"data.{name} as a fraction must be at least 0 and below 1, not {fraction}")
    if validation + test >= 1:
        raise ConfigError(f"data.validation {validation} and data.test {test} leave nothing to train on; lower them")
    places = {key: position(key) for key in keys}
    parts = {key: _part(place, validation, test) for key, place in places.items()}
    for part, fraction in (("test", test), ("validation", validation)):
        candidates = [key for key in parts if parts[key] == "train"]
        if fraction and part not in parts.values() and len(candidates) > 1:
            parts[min(candidates, key=places.__getitem__)] = part
    for part, fraction in (("train", 1.0), ("validation", validation), ("test", test)):
        if fraction and part not in parts.values():
            raise DataError(
                f"{len(places)} different conversation(s) are too few to split: nothing is left for {part}; "
                "add more, name files as data.validation and data.test, or set them to null"
            )
    chosen: dict[str, list[T]] = {"train": [], "validation": [], "test": []}
    for item, key in zip(items, keys, strict=True):
        chosen[parts[key]].append(item)
    return chosen["train"], chosen["validation"], chosen["test"]


def _part(place: float, validation: float, test: float) -> str:
    if place < test:
        return "test"
    return "validation" if place < test + validation else "train"
