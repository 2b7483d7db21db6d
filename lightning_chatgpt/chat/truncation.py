"""Cutting a conversation that is too long: between whole exchanges, never its end.

Lengths are in tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Literal, NamedTuple

from lightning_chatgpt.errors import DataError

Truncation = Literal["drop_oldest", "split", "skip", "error"]

_ANSWERING = ("assistant", "tool")


class Frame(NamedTuple):
    """What stands on one side of a content, as token ids.

    Attributes:
        ids: The ids.
        weights: For each of them 1 where it is learnt with the content, else 0.
        n_learnt: How many are.
    """

    ids: list[int]
    weights: list[float]
    n_learnt: int


@dataclass(slots=True, eq=False)  # frozen would double the time of making it, and there are many
class EncodedTurn:
    """One message as token ids.

    Attributes:
        role: Who speaks.
        number: Which message of the conversation it is, from 0.
        weight: Loss weight of its content and of the markers that are learnt with it; 0 where it is not learnt.
        content: Ids of what is said.
        before: What stands before the content.
        after: What stands after it.
        is_cut: Whether the content lost its middle.
        length: Its tokens, in all.
        n_supervised: How many of them count in the loss.
    """

    role: str
    number: int
    weight: float
    content: list[int]
    before: Frame
    after: Frame
    is_cut: bool = False
    length: int = field(init=False)
    n_supervised: int = field(init=False)

    def __post_init__(self) -> None:
        n_content = len(self.content)
        self.length = len(self.before.ids) + n_content + len(self.after.ids)
        self.n_supervised = self.before.n_learnt + n_content + self.after.n_learnt if self.weight else 0

    def ids(self) -> list[int]:
        """All of its token ids."""
        return self.before.ids + self.content + self.after.ids

    def weights(self) -> list[float]:
        """The loss weight of each token."""
        if not self.weight:
            return [0.0] * self.length
        content = [self.weight] * len(self.content)
        if self.weight == 1.0:
            return self.before.weights + content + self.after.weights
        return [self.weight * w for w in self.before.weights] + content + [self.weight * w for w in self.after.weights]


_length = attrgetter("length")


def total_length(turns: Iterable[EncodedTurn]) -> int:
    """Tokens of turns together."""
    return sum(map(_length, turns))


def fit(
    turns: list[EncodedTurn], *, max_length: int, truncation: Truncation, continuations: Set[int] = frozenset()
) -> list[list[EncodedTurn]]:
    """Cut a conversation's turns into windows of at most ``max_length`` tokens, between whole exchanges.

    Args:
        turns: The conversation's.
        max_length: Tokens a window may have.
        truncation: ``drop_oldest`` or ``split``.
        continuations: Ids of tokens that begin within a character: no content is cut before one.

    Returns: one window of the latest exchanges, or with ``split`` as many as all exchanges need, each with the system message.

    Raises:
        DataError: ``max_length`` leaves no room for a message's own markers.
    """
    if total_length(turns) <= max_length:
        return [turns]
    n_system = next((i for i, turn in enumerate(turns) if turn.role != "system"), len(turns))
    system = _shorten(
        turns[:n_system], max_length=max_length - max_length // 4, continuations=continuations
    )  # leaves the exchanges some room
    room = max_length - total_length(system)
    windows: list[list[EncodedTurn]] = []
    n_free = 0
    # From the latest backwards, so that with either policy the newest exchanges share a full window.
    for exchange in reversed(_exchanges(turns[n_system:])):
        length = total_length(exchange)
        if windows and length <= n_free:
            windows[-1] = exchange + windows[-1]
        elif windows and truncation == "drop_oldest":
            break
        else:
            windows.append(_shorten(exchange, max_length=room, continuations=continuations))
            length = total_length(windows[-1])
            n_free = room
        n_free -= length
    return [system + window for window in reversed(windows)] or [system]


def drop_unlearnt_end(turns: list[EncodedTurn], *, max_length: int) -> list[EncodedTurn]:
    """Leave out turns after the last one that is learnt, until the rest fits: they teach nothing, and would push out what does."""
    end = len(turns)
    while end > 1 and not turns[end - 1].weight and total_length(turns[:end]) > max_length:
        end -= 1
    return turns[:end]


def _exchanges(turns: list[EncodedTurn]) -> list[list[EncodedTurn]]:
    """Group turns into exchanges: what is said to the assistant, and its answer."""
    exchanges: list[list[EncodedTurn]] = []
    for turn in turns:
        # A tool's answer belongs to the question that it was called for.
        starts = turn.role not in _ANSWERING and (not exchanges or exchanges[-1][-1].role in _ANSWERING)
        if starts or not exchanges:
            exchanges.append([])
        exchanges[-1].append(turn)
    return exchanges


def _shorten(turns: list[EncodedTurn], *, max_length: int, continuations: Set[int]) -> list[EncodedTurn]:
    """Cut the middle out of the longest contents until the turns fit."""
    turns = list(turns)
    excess = total_length(turns) - max_length
    while excess > 0:
        i = max(range(len(turns)), key=lambda i: len(turns[i].content), default=0)
        longest = turns[i].content if turns else []
        if len(longest) < 2:
            raise DataError(f"max_length is too short by {excess} tokens for a message's own markers and the system message; raise it")
        n_kept = max(len(longest) - excess, len(longest) // 2)
        head = (n_kept + 1) // 2
        tail = len(longest) - (n_kept - head)
        while head > 0 and longest[head] in continuations:
            head -= 1
        while tail < len(longest) and longest[tail] in continuations:
            tail += 1
        excess -= tail - head
        turns[i] = replace(turns[i], content=longest[:head] + longest[tail:], is_cut=True)
    return turns
