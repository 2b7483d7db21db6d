"""How much of what is read in an epoch: weights, caps and passes of sources, or of any label of the records.

Nothing is tokenized again when they change: a mixture only says which examples are read when.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lightning_chatgpt.data.packing import pack, shuffle_equal
from lightning_chatgpt.errors import ConfigError, nearest
from lightning_chatgpt.settings import check_settings

Ints = npt.NDArray[np.int64]
Unit = Literal["conversations", "tokens"]


@dataclass(frozen=True)
class Mixture:
    """What an epoch is made of.

    Attributes:
        label: What groups are told apart by: a label of the records such as ``topic`` or ``group``; None for the sources' names.
        weights: Shares of groups; those that are not named weigh 1. The epoch is as long as all groups together, each read once.
        epochs: How many times a group is read in an epoch, such as 2 or 0.5, in place of a weight.
        caps: The most conversations of a group that are used at all; which ones depends on themselves alone.
        unit: Whether shares are of conversations or of tokens.
        temperature: Without weights, a group's share is its size to the power of 1 / temperature: 1 leaves sizes as they are,
            more makes them alike. Source: Conneau et al. 2020, section 3.1 (their exponent is 1 / temperature).
    """

    label: str | None = None
    weights: dict[str, float] = field(default_factory=dict)
    epochs: dict[str, float] = field(default_factory=dict)
    caps: dict[str, int] = field(default_factory=dict)
    unit: Unit = "conversations"
    temperature: float = 1.0

    @classmethod
    def of(cls, settings: Mapping[str, Any] | None) -> Mixture:
        """Read ``data.mixture``.

        Raises:
            ConfigError: A setting is unknown or out of range, or two contradict each other.
        """
        mixture = cls(**check_settings("data.mixture", settings or {}, cls))
        if not mixture.temperature > 0:
            raise ConfigError(f"data.mixture.temperature must be above 0, not {mixture.temperature}")
        if mixture.weights and mixture.temperature != 1.0:
            raise ConfigError("data.mixture: weights and temperature both set shares; leave one out")
        for name in mixture.weights.keys() & mixture.epochs.keys():
            raise ConfigError(f"data.mixture: {name} has both a weight and epochs; leave one out")
        for setting in ("weights", "epochs", "caps"):
            for name, value in getattr(mixture, setting).items():
                if not value >= 0:
                    raise ConfigError(f"data.mixture.{setting}: {name} must be at least 0, not {value}")
        return mixture


class Draws:
    """Which rows each epoch reads, in no order yet.

    Each group is an endless series of shuffled passes over its rows, of which every epoch takes the next piece: a row comes again
    only when all others of its group have come. Every epoch has as many rows, and is a function of seed and epoch alone. Groups
    never share a row.

    Args:
        mixture: What the epoch is made of.
        lengths: (N,) tokens of each example.
        conversations: (N,) which conversation each example came from.
        groups: For each conversation the group it is in.
        places: For each conversation where it stands in [0, 1), which decides whether it is under a cap.
        seed: Chooses the order within groups.
        capacity: Tokens of a packed row; None for one example in each row.

    Attributes:
        sizes: For each group its conversations and tokens, caps applied.
        n_rows: For each group how many of its rows an epoch takes.
        n_all_rows: For each group how many rows it has.

    Raises:
        ConfigError: The mixture names a group that is not there, or leaves nothing to read.
    """

    def __init__(
        self,
        mixture: Mixture,
        *,
        lengths: Ints,
        conversations: Ints,
        groups: Sequence[str],
        places: npt.NDArray[np.float64],
        seed: int,
        capacity: int | None = None,
    ) -> None:
        self._seed = seed
        tokens = np.bincount(conversations, weights=lengths, minlength=len(places)).astype(np.int64)
        members = {name: chosen for name, chosen in _members(mixture, groups, tokens, places).items() if len(chosen)}
        self.sizes = {name: (len(chosen), int(tokens[chosen].sum())) for name, chosen in members.items()}
        sizes = {name: n_tokens if mixture.unit == "tokens" else n for name, (n, n_tokens) in self.sizes.items()}
        shares = {name: target / sizes[name] for name, target in _targets(mixture, sizes).items()}
        self._examples = {name: np.flatnonzero(np.isin(conversations, chosen)) for name, chosen in members.items()}
        self._lengths = {name: lengths[examples] for name, examples in self._examples.items()}
        self._rows: dict[str, list[list[int]]] = {
            name: pack(found, capacity=capacity) if capacity is not None else [[i] for i in range(len(found))]
            for name, found in self._lengths.items()
        }
        self.n_all_rows = {name: len(rows) for name, rows in self._rows.items()}
        # A group of few rows that has a share at all is never without one.
        self.n_rows = {name: max(round(share * len(self._rows[name])), int(share > 0)) for name, share in shares.items()}
        if not any(self.n_rows.values()):
            raise ConfigError("data.mixture leaves nothing to read; raise a weight or a cap")

    def epoch(self, epoch: int) -> list[list[int]]:
        """The rows that an epoch reads, each with the indices of its examples."""
        return [row for name, n_rows in self.n_rows.items() for row in self._piece(name, epoch * n_rows, (epoch + 1) * n_rows)]

    def _piece(self, name: str, first: int, end: int) -> list[list[int]]:
        """Rows ``first`` to ``end`` of a group's endless series."""
        rows, examples = self._rows[name], self._examples[name]
        found: list[list[int]] = []
        for number in range(first // len(rows), -(-end // len(rows)) if end > first else 0):
            digest = hashlib.blake2b(f"{self._seed}/{name}/{number}".encode(), digest_size=8).digest()
            generator = np.random.default_rng(int.from_bytes(digest, "big"))
            shuffled = shuffle_equal(self._lengths[name], rows, generator=generator)
            start = number * len(rows)
            found += [examples[row].tolist() for row in shuffled[max(first - start, 0) : end - start]]
        return found


def _members(mixture: Mixture, groups: Sequence[str], tokens: Ints, places: npt.NDArray[np.float64]) -> dict[str, Ints]:
    names, which = np.unique(np.array(groups, dtype=object).astype(str), return_inverse=True)
    for setting in ("weights", "epochs", "caps"):
        for name in getattr(mixture, setting):
            if name not in names:
                raise ConfigError(
                    f"data.mixture.{setting}: there is no {mixture.label or 'source'} {name!r}; {nearest(name, names.tolist()[:20])}"
                )
    members: dict[str, Ints] = {}
    for number, name in enumerate(names.tolist()):
        chosen = np.flatnonzero((which == number) & (tokens > 0))
        cap = mixture.caps.get(name)
        if cap is not None:
            # By place: more data moves few out, and the same ones are taken on every machine.
            chosen = np.sort(chosen[np.argsort(places[chosen], kind="stable")[:cap]])
        members[name] = chosen
    return members


def _targets(mixture: Mixture, sizes: Mapping[str, int]) -> dict[str, int]:
    targets = {name: round(mixture.epochs[name] * size) for name, size in sizes.items() if name in mixture.epochs}
    rest = {name: size for name, size in sizes.items() if name not in targets}
    if not mixture.weights and mixture.temperature == 1.0:
        return {**targets, **rest}
    shares = {name: mixture.weights.get(name, 1.0) if mixture.weights else size ** (1 / mixture.temperature) for name, size in rest.items()}
    total = sum(shares.values())
    if not total:
        return {**targets, **dict.fromkeys(rest, 0)}
    wanted = {name: sum(rest.values()) * share / total for name, share in shares.items()}
    # Whole numbers that add up: the largest remainders are rounded up.
    rounded = {name: int(want) for name, want in wanted.items()}
    missing = sum(rest.values()) - sum(rounded.values())
    for name in sorted(wanted, key=lambda name: rounded[name] - wanted[name])[:missing]:
        rounded[name] += 1
    return {**targets, **rounded}
