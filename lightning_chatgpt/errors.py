"""What a user is told when something they gave cannot be used.

Every message says what happened, where, the value, and the remedy, in one line. The CLI prints it and leaves with
exit code 2; in Python it is an ordinary exception.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user gave cannot be used; the message is one line and names the remedy."""

    exit_code = 2


class DataError(UserError):
    """A source, a record or a split cannot be used."""


class ModelError(UserError):
    """A model, a tokenizer or a checkpoint cannot be found or does not fit."""


class SaveError(UserError):
    """Something could not be written; the command line leaves with 1, as what the user gave was right."""

    exit_code = 1


class NonFiniteError(UserError):
    """A loss or a gradient is NaN or infinite; the command line leaves with 1."""

    exit_code = 1


class ConfigError(UserError):
    """A setting is unknown, out of range, or contradicts another."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The remedy for a name that is not known: the nearest that is, or else all of them."""
    names = list(dict.fromkeys(known))
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
