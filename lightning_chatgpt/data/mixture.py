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

from lightning_chatgpt.errors import ConfigError, nearest
from lightning_chatgpt.settings import check_settings

Ints = npt.NDArray[np.int64]
Unit = Literal["conversations", "tokens"]

SOURCE_LABEL = "source"


@dataclass(frozen=True)
class Mixture:
    """What an epoch is made of.

    Attributes:
        label: What groups are told apart by: ``source``, or a label of the records such as ``topic``.
        weights: Shares of groups; those that are not named weigh 1. The epoch is as long as all groups together, each read once.
        epochs: How many times a group is read in an epoch, such as 2 or 0.5, in place of a weight.
        caps: The most conversations of a group that are used at all; which ones depends on themselves alone.
        unit: Whether weights and passes count conversations or tokens.
        temperature: Without weights, a group's share is its size to the power of 1 / temperature: 1 leaves sizes as they are,
            more makes them alike. Source: Conneau et al. 2020, section 3.1 (their exponent is 1 / temperature).
    """

    label: str = SOURCE_LABEL
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
    """Which examples each epoch reads, in no order yet.

    Each group is an endless row of shuffled passes over its conversations, of which every epoch takes the next piece: a
    conversation comes again only when all others of its group have come. It is a function of seed and epoch alone.

    Args:
        mixture: What the epoch is made of.
        lengths: (N,) tokens of each example.
        conversations: (N,) which conversation each example came from; its examples stand together.
        groups: For each conversation the group it is in.
        places: For each conversation where it stands in [0, 1), which decides whether it is under a cap.
        seed: Chooses the order within groups.

    Attributes:
        sizes: For each group its name, conversations and tokens, caps applied.
        targets: For each group how much of it an epoch takes, in the mixture's unit.

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
    ) -> None:
        self._seed = seed
        # First example of each conversation, and one past the last.
        self._first = np.searchsorted(conversations, np.arange(len(places)))
        self._end = np.searchsorted(conversations, np.arange(len(places)), side="right")
        tokens = np.add.reduceat(np.append(lengths, 0), self._first) if len(places) else np.array([], np.int64)
        tokens[self._first == self._end] = 0
        members = _members(mixture, groups, tokens, places)
        sizes = tokens if mixture.unit == "tokens" else np.ones_like(tokens)
        self._members = {name: chosen for name, chosen in members.items() if len(chosen)}
        self._sizes = {name: sizes[chosen] for name, chosen in self._members.items()}
        self.sizes = {name: (len(chosen), int(tokens[chosen].sum())) for name, chosen in self._members.items()}
        self.targets = _targets(mixture, {name: int(size.sum()) for name, size in self._sizes.items()})
        if not any(self.targets.values()):
            raise ConfigError("data.mixture leaves nothing to read; raise a weight or a cap")

    @property
    def is_whole(self) -> bool:
        """Whether every epoch reads the same conversations, each group a whole number of times."""
        return all(self.targets[name] % int(size.sum()) == 0 for name, size in self._sizes.items())

    def epoch(self, epoch: int) -> Ints:
        """Indices of the examples that an epoch reads."""
        found = [self._conversations(name, epoch) for name in self._members]
        taken = np.concatenate([np.array([], np.int64), *found])
        counts = (self._end - self._first)[taken]
        # The examples of each conversation, first to last.
        starts = np.repeat(self._first[taken] - np.cumsum(np.append(0, counts))[:-1], counts)
        return np.asarray(starts + np.arange(counts.sum()), dtype=np.int64)

    def _conversations(self, name: str, epoch: int) -> Ints:
        """A group's piece: conversations that begin in [epoch * target, (epoch + 1) * target) of its endless row."""
        members, sizes, target = self._members[name], self._sizes[name], self.targets[name]
        length = int(sizes.sum())
        first, end = epoch * target, (epoch + 1) * target
        found: list[Ints] = []
        for number in range(first // length, -(-end // length) if target else 0):
            digest = hashlib.blake2b(f"{self._seed}/{name}/{number}".encode(), digest_size=8).digest()
            order = np.random.default_rng(int.from_bytes(digest, "big")).permutation(len(members))
            begins = number * length + np.cumsum(np.append(0, sizes[order]))[:-1]
            found.append(members[order[(begins >= first) & (begins < end)]])
        return np.concatenate([np.array([], np.int64), *found])


def _members(mixture: Mixture, groups: Sequence[str], tokens: Ints, places: npt.NDArray[np.float64]) -> dict[str, Ints]:
    names, which = np.unique(np.array(groups, dtype=object).astype(str), return_inverse=True)
    for setting in ("weights", "epochs", "caps"):
        for name in getattr(mixture, setting):
            if name not in names:
                raise ConfigError(f"data.mixture.{setting}: there is no {mixture.label} {name!r}; {nearest(name, names.tolist()[:20])}")
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
