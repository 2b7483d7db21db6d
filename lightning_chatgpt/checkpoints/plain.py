"""Plain data: what a checkpoint may hold, so that loading it runs no code."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from typing import Any, NamedTuple

_PLAIN = (str, int, float, bool, type(None))


class Foreign(NamedTuple):
    """A value that is no plain data.

    Attributes:
        place: Where it stands, as keys with dots between.
        kind: Its class.
    """

    place: str
    kind: str

    def __str__(self) -> str:
        """For a message."""
        return f"{self.place} is a {self.kind}"


def find_foreign(values: Any, place: str = "") -> Foreign | None:
    """The first value in a nested structure that a load of plain data would refuse; None where there is none.

    Args:
        values: Of dicts, lists and tuples.
        place: What they are called.
    """
    import torch

    if type(values) in (*_PLAIN, torch.Tensor, torch.nn.Parameter):
        return None
    if isinstance(values, Mapping | list | tuple):
        items = list(values.items() if isinstance(values, Mapping) else enumerate(values))
        places = [f"{place}.{key}" if place else str(key) for key, _ in items]
        parts = [(part, where) for where, (key, value) in zip(places, items, strict=True) for part in (key, value)]
        inner = (find_foreign(part, where) for part, where in parts)
        found = next((foreign for foreign in inner if foreign is not None), None)
        if found is not None or type(values) in (dict, list, tuple):
            return found
    buffer = io.BytesIO()
    try:
        torch.save(values, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except (pickle.PickleError, AttributeError, TypeError):  # pickle's own, of what cannot be written at all
        return Foreign(place, type(values).__name__)
    return None
