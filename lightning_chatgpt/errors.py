"""What a user is told when something they gave cannot be used.

Every message says what happened, where, the value, and the remedy, in one line. The CLI prints it and leaves with
exit code 2; in Python it is an ordinary exception.
"""


class UserError(ValueError):
    """Something the user gave cannot be used; the message is one line and names the remedy."""

    exit_code = 2


class DataError(UserError):
    """A source, a record or a split cannot be used."""


class ModelError(UserError):
    """A model, a tokenizer or a checkpoint cannot be found or does not fit."""


class ConfigError(UserError):
    """A setting is unknown, out of range, or contradicts another."""
