"""What can be wrong with a record, and what is done about it: stop, leave the record out, or mend it; counted either way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, get_args

from lightning_chatgpt.errors import ConfigError, DataError, nearest

OnFault = Literal["error", "skip", "fix"]

_PLACES_KEPT = 5


@dataclass(frozen=True, slots=True)
class FaultKind:
    """A kind of fault.

    Attributes:
        about: What it is, for people.
        fix: What mending it does; empty where nobody but the user can mend it.
    """

    about: str
    fix: str = ""


KINDS: dict[str, FaultKind] = {
    "broken_json": FaultKind("a record that is no JSON, or a row that does not fit its table"),
    "truncated_file": FaultKind("a file that ends in the middle of a record"),
    "wrong_encoding": FaultKind("text that is not UTF-8", "it is read as UTF-16 or Latin-1, whichever it looks like"),
    "nul_bytes": FaultKind("NUL characters", "they are removed"),
    "lone_surrogate": FaultKind("half a UTF-16 character", "it becomes U+FFFD"),
    "duplicate_keys": FaultKind("one key twice in an object", "the last one counts"),
    "wrong_type": FaultKind("a value of the wrong type", "numbers and booleans become text"),
    "unknown_schema": FaultKind("a record in no format that is known"),
    "unknown_key": FaultKind("a key of a message that would be lost", "it is left out"),
    "unknown_role": FaultKind("a role that is not known"),
    "bad_name": FaultKind("a speaker's name with spaces or markup in it", "it is left out"),
    "bad_weight": FaultKind("a weight that is no finite number of at least 0", "it becomes 1"),
    "no_messages": FaultKind("a conversation without messages"),
    "empty_content": FaultKind("a message that says nothing", "it is left out"),
    "only_system": FaultKind("only a system message"),
    "no_assistant": FaultKind("nothing the assistant says"),
    "assistant_first": FaultKind("the assistant speaks before anybody else", "what it says there is left out"),
    "repeated_role": FaultKind("two messages of one role in a row", "they are joined by a line break"),
    "late_system": FaultKind("a system message after the conversation began", "it is moved to the front"),
    "too_large": FaultKind("a record, a message or a number of messages beyond all measure"),
}


class SkipRecord(Exception):
    """The record at hand is left out; raised and caught within the package."""


class Faults:
    """Decides what is done about each fault, and counts them.

    Args:
        on_fault: ``error`` stops at the first fault, ``skip`` leaves the record out, ``fix`` mends what can be mended and
            leaves out the rest. Or a mapping from kinds to one of these, kinds that are not named being errors; the kind
            ``default`` stands for all others.

    Attributes:
        place: Where the record at hand stands; a reader keeps it up to date.
        counts: How often each kind was met, by what was done: ``{kind: {"skip": n}}``.
        places: The first few places of each kind.

    Raises:
        ConfigError: A kind or an action is unknown, or a kind that cannot be mended is to be.
    """

    def __init__(self, on_fault: OnFault | Mapping[str, OnFault] = "error") -> None:
        chosen: dict[str, Any] = {"default": on_fault} if isinstance(on_fault, str) else dict(on_fault)
        for kind, action in chosen.items():
            if kind not in KINDS and kind != "default":
                raise ConfigError(f"data.on_fault: {kind!r} is no kind of fault; {nearest(kind, KINDS)}")
            if action not in get_args(OnFault):
                raise ConfigError(f"data.on_fault: {action!r} cannot be done about {kind}; use error, skip or fix")
            if action == "fix" and kind != "default" and not KINDS[kind].fix:
                raise ConfigError(f"data.on_fault: {kind} ({KINDS[kind].about}) cannot be mended; use error or skip")
        self.on_fault = chosen
        self.place = ""
        self.counts: dict[str, dict[str, int]] = {}
        self.places: dict[str, list[str]] = {}

    def mend(self, kind: str, message: str) -> None:
        """Meet a fault that the caller can mend: returns where it is to be mended.

        Raises:
            DataError: Faults of this kind are errors; the message begins with the place.
            SkipRecord: They are left out.
        """
        action = self.on_fault.get(kind, self.on_fault.get("default", "error"))
        if action == "fix" and KINDS[kind].fix:
            self._count(kind, "fix")
            return
        self._stop(kind, message, action)

    def refuse(self, kind: str, message: str) -> NoReturn:
        """Meet a fault that cannot be mended.

        Raises:
            DataError: Faults of this kind are errors; the message begins with the place.
            SkipRecord: They are left out.
        """
        self._stop(kind, message, self.on_fault.get(kind, self.on_fault.get("default", "error")))

    def to_dict(self) -> dict[str, Any]:
        """Counts and places as plain data."""
        return {"counts": self.counts, "places": self.places}

    def _stop(self, kind: str, message: str, action: str) -> NoReturn:
        if action == "error":
            raise DataError(f"{self.place}: {message}" if self.place else message)
        self._count(kind, "skip")
        raise SkipRecord

    def _count(self, kind: str, action: str) -> None:
        counts = self.counts.setdefault(kind, {})
        counts[action] = counts.get(action, 0) + 1
        places = self.places.setdefault(kind, [])
        if len(places) < _PLACES_KEPT:
            places.append(self.place)
