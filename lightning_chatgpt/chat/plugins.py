"""A user's own functions: by dotted path, or registered as entry points of an installed package."""

from __future__ import annotations

import inspect
import uuid
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from lightning_chatgpt.errors import ConfigError


def find_function(name: str, *, setting: str, group: str | None = None) -> Callable[..., Any]:
    """Import a function that the user named.

    Args:
        name: A dotted path such as ``my_package.read_tickets``, or the name of an entry point.
        setting: Where it was named, for the error.
        group: The group of entry points that are looked through first.

    Raises:
        ConfigError: There is no such function, or it is not one.
    """
    for entry in entry_points(group=group, name=name) if group else ():
        function: Any = entry.load()
        break
    else:
        module, _, attribute = name.rpartition(".")
        try:
            function = getattr(import_module(module or "builtins"), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(f"{setting} {name}: cannot be imported ({error}); is it on the path, and spelt right?") from None
    if not callable(function) or isinstance(function, type):
        raise ConfigError(f"{setting} {name}: is a {type(function).__name__}, not a function")
    return function  # type: ignore[no-any-return]


def check_arguments(function: Callable[..., Any], *arguments: Any, setting: str, **init_args: Any) -> None:
    """Refuse arguments that a user's function does not take.

    Raises:
        ConfigError: It does not.
    """
    try:
        signature = inspect.signature(function)
    except ValueError:
        return  # written in C, without a signature
    try:
        signature.bind(*arguments, **init_args)
    except TypeError as error:
        raise ConfigError(f"{setting} does not take these init_args: {error}") from None


def source_of(function: Callable[..., Any]) -> str:
    """The code of the module that a user's function stands in, to tell whether it changed; never the same where there is none."""
    try:
        return inspect.getsource(inspect.getmodule(function) or function)
    except (OSError, TypeError):
        return uuid.uuid4().hex


def plugin_names(group: str) -> list[str]:
    """The entry points that installed packages registered in a group."""
    return sorted({entry.name for entry in entry_points(group=group)})
