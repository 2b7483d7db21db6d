"""The versions of what this package is built on: whether they will do, and which they are."""

from __future__ import annotations

import platform
import re
from importlib.metadata import PackageNotFoundError, requires, version

from lightning_chatgpt.errors import ConfigError

_OWN = "lightning-chatgpt"


def check_versions() -> None:
    """Make sure that what is installed is new enough, before an old one fails in its own words.

    Raises:
        ConfigError: Something is too old, too new, or missing.
    """
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(line) for line in requires(_OWN) or ()]
    except PackageNotFoundError:  # a checkout on the path, not installed
        return
    for requirement in wanted:
        if requirement.marker is not None:
            continue  # an extra, which says so itself where it is missing
        install = f"pip install '{requirement.name}{requirement.specifier}'"
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            raise ConfigError(f"{requirement.name} is not installed; {install}") from None
        if not requirement.specifier.contains(found, prereleases=True):
            raise ConfigError(f"{requirement.name} {found} is installed, and {_OWN} needs {requirement.specifier}; {install}")


def installed_versions() -> dict[str, str]:
    """Python, this package, and what it is built on, by name."""
    names = sorted({re.split(r"[^\w.-]", line)[0] for line in _requires() if "extra ==" not in line})
    return {"python": platform.python_version(), **{name: _version(name) for name in [_OWN, *names]}}


def _requires() -> list[str]:
    try:
        return requires(_OWN) or []
    except PackageNotFoundError:
        return ["torch", "lightning", "transformers", "tokenizers"]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
