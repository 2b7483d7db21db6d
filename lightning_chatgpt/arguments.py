"""What jsonargparse says of a command line, in one line."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Sequence
from typing import Any

from jsonargparse import ArgumentParser

from lightning_chatgpt.errors import nearest


class OneLineParser(ArgumentParser):
    """Says in one line what is wrong, in place of a page, and leaves with exit code 2."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Print the line that tells most, and leave."""
        said = one_line(message)
        if unknown := re.fullmatch(r"unrecognized arguments: (--[\w.-]+).*", said):
            options = [option for option in self._option_string_actions if option.startswith("--")]
            said = f"{unknown[1]} is no option; {nearest(unknown[1], options)}"
        elif unknown := re.fullmatch(r"Option '([\w.-]+)' is not accepted", said):  # of a config file
            said = f"{unknown[1]} is no option; {nearest(unknown[1], [option[2:] for option in self._option_string_actions])}"
        elif said.startswith(("unrecognized arguments:", "the following arguments are required:")):
            said = f"{said}; see {self.prog} --help"
        sys.stderr.write(f"error: {said}\n")
        self.exit(2)


def fill_switches(arguments: Sequence[str], switches: Collection[str]) -> list[str]:
    """A command line on which ``--switch`` alone is ``--switch=true``, as people write it.

    Args:
        arguments: The command line.
        switches: The options that take true or false.
    """
    following = [*arguments, ""][1:]
    values = ("true", "false", "yes", "no")
    return [f"{a}=true" if a in switches and b.lower() not in values else a for a, b in zip(arguments, following, strict=True)]


def one_line(message: str) -> str:
    """Jsonargparse's error, as one line: the key, what it takes, and what it was given."""
    key = re.search(r'Parser key "([^"]+)"', message)
    plain = re.search(r"Expected an? (.+?)\. Got value: (.*)", message)
    union = re.search(r"Subtypes: \[(.*)\]", message)
    given = re.search(r"Given value: (.*)", message)
    if key and plain:
        return f"{key[1]}: {plain[2]!r} cannot be used; it takes {_type_names(plain[1])}"
    if key and union and given:
        return f"{key[1]}: {given[1]!r} cannot be used; it takes {_type_names(union[1])}"
    return " ".join(message.split())


def union_reason(message: str) -> str | None:
    """What a class said of its own settings, out of jsonargparse's page about a setting that takes a name or a class; None if nothing."""
    reasons: list[str] = re.findall(r"^\s+- (?!Expected )(.+)$", message, re.MULTILINE)
    return reasons[-1] if reasons else None


def _type_names(types: str) -> str:
    types = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", types).replace("NoneType", "null")
    return re.sub(r"typing\.Literal\[([^\]]*)\]", r"\1", types).replace("typing.", "").replace(", ", " or ")
