"""Config files before they are parsed: where the shipped ones are, and whether every key is known.

jsonargparse answers a mistyped key of a model with a page; these checks answer with the nearest key, and its line.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Collection, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lightning_chatgpt.errors import ConfigError

SHIPPED_PREFIX = "lightning_chatgpt:"


class Key(NamedTuple):
    """A dotted key a user wrote, and where."""

    name: str
    place: str


def shipped_configs() -> Path:
    """The folder of shipped configs: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def resolve_config(name: str) -> str:
    """The path of a config file; ``lightning_chatgpt:NAME`` names a shipped one.

    Raises:
        ConfigError: There is no such file.
    """
    if name.startswith(SHIPPED_PREFIX):
        folder = shipped_configs()
        path = folder / f"{name.removeprefix(SHIPPED_PREFIX)}.yaml"
        if not path.is_file():
            known = sorted(str(p.relative_to(folder).with_suffix("")) for p in folder.rglob("*.yaml"))
            raise ConfigError(f"{name}: no such shipped config; there are {', '.join(known)}")
        return str(path)
    if not Path(name).is_file() and not name.lstrip().startswith(("{", "\n")):
        raise ConfigError(f"{name}: no such config file; shipped ones are named {SHIPPED_PREFIX}quickstart")
    return name


def resolve_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Resolve the config files among command-line arguments.

    Returns: the arguments with full paths, and the config files, in order.
    """
    resolved: list[str] = []
    configs: list[str] = []
    is_config = False
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if is_config:
            argument = resolve_config(argument)
            configs.append(argument)
        elif equals and name in ("-c", "--config"):
            configs.append(resolve_config(value))
            argument = f"{name}={configs[-1]}"
        is_config = argument in ("-c", "--config")
        resolved.append(argument)
    return resolved, configs


def check_keys(arguments: Sequence[str], configs: Sequence[str], *, known: Collection[str], classes: dict[str, type]) -> None:
    """Refuse keys that no setting has, and name the nearest that one has.

    Args:
        arguments: The command line after the verb.
        configs: Its config files.
        known: Dotted names of the settings there are.
        classes: The class whose settings stand under a key (``model``, ``data``) unless a ``class_path`` names another.

    Raises:
        ConfigError: A key is unknown, or a config file is no YAML mapping.
    """
    keys = [key for config in configs for key in _config_keys(config)]
    paths = [(key.name.removesuffix(".class_path"), value) for key, value in keys if key.name.endswith(".class_path")]
    written = [key for key, _ in keys]
    for place, argument in enumerate(arguments):
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            written.append(Key(name.removesuffix("+"), "command line"))
            if name in classes or name.endswith(".class_path"):
                given = value if equals else (arguments[place + 1] if place + 1 < len(arguments) else "")
                paths.append((name.removesuffix(".class_path"), given))
    chosen = {**classes, **{name: _import_class(path) for name, path in paths if name in classes}}
    settings = set(known)
    for name, cls in chosen.items():
        parameters = _init_parameters(cls)
        settings |= {f"{name}.{p}" for p in parameters} | {f"{name}.init_args.{p}" for p in parameters}
        settings |= {f"{name}.{p}" for p in ("class_path", "init_args", "dict_kwargs")} | {name}
    groups = {setting.partition(".")[0] for setting in settings}
    for key in written:
        if not _is_known(key.name, settings):
            candidates = settings if key.name.partition(".")[0] in groups else groups
            near = difflib.get_close_matches(key.name, sorted(candidates), n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else "see --help for the settings there are"
            raise ConfigError(f"{key.place}: {key.name} is no setting; {hint}")


def _is_known(name: str, settings: Collection[str]) -> bool:
    if name in settings or any(setting.startswith(f"{name}.") for setting in settings):
        return True
    # Below a setting that is itself a mapping or a class, such as model.architecture.n_layer, is the setting's own affair.
    parents = [name[:i] for i, letter in enumerate(name) if letter == "."]
    return any(parent in settings and not any(setting.startswith(f"{parent}.") for setting in settings) for parent in parents)


def _config_keys(config: str) -> Iterator[tuple[Key, Any]]:
    path = Path(config)
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else config
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{config}:{mark.line + 1}" if mark else config
        raise ConfigError(f"{place}: broken YAML ({getattr(error, 'problem', None) or error}); mend that line") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{config}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    if node is None:
        return
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(
            f"{config}: expected 'key: value' lines such as 'trainer:', found a {type(node).__name__.removesuffix('Node').lower()}"
        )
    yield from _node_keys(node, "", config)


def _node_keys(node: yaml.MappingNode, prefix: str, config: str) -> Iterator[tuple[Key, Any]]:
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        yield Key(name, f"{config}:{key.start_mark.line + 1}"), value.value
        if isinstance(value, yaml.MappingNode):
            yield from _node_keys(value, f"{name}.", config)


def _import_class(path: Any) -> type:
    module_name, _, name = str(path).rpartition(".")
    try:
        cls = getattr(import_module(module_name or "lightning_chatgpt"), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"class_path {path}: cannot be imported ({error}); is it on the path, and spelt right?") from None
    if not isinstance(cls, type):
        raise ConfigError(f"class_path {path}: is a {type(cls).__name__}, not a class")
    return cls


def _init_parameters(cls: type) -> set[str]:
    """The settings of a class: its __init__'s, and its base classes' as far as it passes **kwargs on."""
    names: set[str] = set()
    for base in cls.__mro__:
        if "__init__" not in vars(base) or base is object:
            continue
        parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        names |= {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return names
