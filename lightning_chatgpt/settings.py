"""Settings that stand below a key of a config as plain data, checked against what takes them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Mapping
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from lightning_chatgpt.errors import ConfigError, nearest


def check_settings(place: str, settings: Mapping[str, Any], target: type) -> dict[str, Any]:
    """Check a user's settings against the annotations of a class's ``__init__``.

    Args:
        place: Where the settings stand, for the error; such as ``data.augmentation``.
        settings: Names and values, as YAML has them.
        target: What they are for; its ``__init__`` takes nothing but named plain data.

    Returns: the settings; numbers that the command line left as text are numbers.

    Raises:
        ConfigError: A setting is unknown, missing, or of a type that the annotation does not allow.
    """
    hints = get_type_hints(target.__init__)  # type: ignore[misc]  # only read
    parameters = inspect.signature(target).parameters
    typed = {}
    for name, value in _nested(settings, parameters).items():
        if name not in parameters:
            raise ConfigError(f"{place}.{name} is no setting; {nearest(str(name), parameters)}")
        typed[name] = value = _typed(value, hints[name])
        if (problem := _misfit(value, hints[name])) is not None:
            raise ConfigError(f"{place}.{name} {problem}")
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in settings:
            raise ConfigError(f"{place}.{name} is missing; give it")
    return typed


def _nested(settings: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """What ``--data.mixture.weights.mine 2`` gives: its names are joined by dots, and a group's own name may hold some too."""
    nested: dict[str, Any] = {}
    for name, value in settings.items():
        outer, dot, inner = str(name).partition(".")
        if dot and outer in known:
            nested[outer] = {**(nested.get(outer) or {}), inner: value}
        else:
            nested[name] = value
    return nested


def _typed(value: Any, hint: Any) -> Any:
    """What ``--data.mixture.weights.mine 2`` gives is text where the annotation says number; YAML's own values stay as they are."""
    choices = get_args(hint)
    if isinstance(value, Mapping) and get_origin(hint) is dict:
        return {str(name): _typed(item, choices[1]) for name, item in value.items()}  # YAML takes a year for a number
    if isinstance(value, str) and {hint, *choices} & {int, float, bool} and str not in choices:
        try:
            return yaml.safe_load(value)
        except yaml.YAMLError:
            return value  # refused as the text it is
    return value


def _misfit(value: Any, hint: Any) -> str | None:
    """What is wrong with a value where an annotation says what it may be; None where nothing is."""
    if hint is Any:
        return None
    choices, origin = get_args(hint), get_origin(hint)
    if origin is Literal:
        if value in choices and isinstance(value, str):
            return None
        return f"cannot be {value!r}; {nearest(str(value), choices)}"
    if origin is list:
        if not isinstance(value, (list, tuple)):
            return f"takes a list such as [a, b], not {value!r}"
        return next((problem for item in value if (problem := _misfit(item, choices[0])) is not None), None)
    if origin is dict:
        if not isinstance(value, Mapping):
            return f"takes names and values, not {value!r}"
        return next((f"{name} {problem}" for name, item in value.items() if (problem := _misfit(item, choices[1])) is not None), None)
    if choices:  # a union; all of ours are one type or None
        return None if value is None else _misfit(value, next(choice for choice in choices if choice is not NoneType))
    if hint is bool:
        return None if isinstance(value, bool) else f"takes true or false, not {value!r}"
    if hint is int:
        fits = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        return None if fits else f"takes a whole number of at least 0, not {value!r}"
    if hint is float:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        return None if fits else f"takes a number, not {value!r}"
    return None if isinstance(value, str) else f"takes text, not {value!r}; put it in quotes"
