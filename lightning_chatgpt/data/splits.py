"""Train, validation and test: which conversation falls where depends on itself alone."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from lightning_chatgpt.errors import ConfigError, DataError

Ints = npt.NDArray[np.int64]


def position(key: str) -> float:
    """A key's place in [0, 1): the same on every machine and in every order of files; uniform over keys."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "big") / 2**56


def split(places: npt.NDArray[np.float64], *, validation: float, test: float) -> dict[str, Ints]:
    """Split items by their places.

    A place below ``test`` makes a test item, below ``test + validation`` a validation item, else a training item. More items never
    move those that were there. A part that was asked for and would come out empty gets the items nearest to it.

    Args:
        places: Where each item stands in [0, 1), as :func:`position` says; items with one place stay together.
        validation: The fraction of the items to validate on; 0 for none.
        test: The fraction of the items to test on; 0 for none.

    Returns: indices of the items of ``train``, ``validation`` and ``test``, in ascending order.

    Raises:
        ConfigError: A fraction is not in [0, 1) or both together leave nothing to train on.
        DataError: There are too few different items to split.
    """
    for name, fraction in (("validation", validation), ("test", test)):
        if not 0 <= fraction < 1:
            raise ConfigError(f"data.{name} as a fraction must be at least 0 and below 1, not {fraction}")
    if validation + test >= 1:
        raise ConfigError(f"data.validation {validation} and data.test {test} leave nothing to train on; lower them")
    distinct, which = np.unique(places, return_inverse=True)
    parts = np.where(distinct < test, "test", np.where(distinct < test + validation, "validation", "train"))
    for part, fraction in (("test", test), ("validation", validation)):
        candidates = np.flatnonzero(parts == "train")
        if fraction and part not in parts and len(candidates) > 1:
            parts[candidates[0]] = part
    for part, fraction in (("train", 1.0), ("validation", validation), ("test", test)):
        if fraction and part not in parts:
            raise DataError(
                f"{len(distinct)} different conversation(s) are too few to split: nothing is left for {part}; "
                "add more, name files as data.validation and data.test, or set them to null"
            )
    return {part: np.flatnonzero(parts[which] == part) for part in ("train", "validation", "test")}
