"""The verbs beside the Trainer's, one file each."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

from lightning_chatgpt import __version__
from lightning_chatgpt.errors import ConfigError


def run_command(verb: str, arguments: Sequence[str]) -> None:
    """Run one of the commands.

    Args:
        verb: The command's name, that of its file and of its function in there.
        arguments: The command line after the verb.
    """
    from jsonargparse import auto_cli

    from lightning_chatgpt.arguments import OneLineParser
    from lightning_chatgpt.configuration import resolve_arguments

    class Parser(OneLineParser):
        def format_help(self, formatter: Any = None) -> str:
            return super().format_help(formatter).replace("[ITEM,...]", "NAME [NAME ...]")  # as as_parsed takes a list

    function = getattr(import_module(f"{__name__}.{verb}"), verb)
    given = as_parsed(function, resolve_arguments(arguments)[0])
    auto_cli(function, args=given, as_positional=True, prog=f"lightning-chatgpt {verb}", parser_class=Parser)


def as_parsed(function: Callable[..., Any], arguments: Sequence[str]) -> list[str]:
    """A command line as people write it, in the form that jsonargparse takes.

    Several names where the function's first parameter is a list become one argument, ``["a", "b"]``; a switch alone, ``--overwrite``,
    becomes ``--overwrite=true``.

    Args:
        function: What is called with it, annotated by text.
        arguments: The command line after the verb.
    """
    from lightning_chatgpt.arguments import fill_switches

    parameters = signature(function).parameters
    switches = {f"--{name}" for name, parameter in parameters.items() if parameter.annotation == "bool"}
    takes_list = next(iter(parameters.values())).annotation == "list[str]"
    options: list[str] = []
    names: list[str] = []
    rest = fill_switches(arguments, switches)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("-"):
            names.append(argument)
        elif "=" in argument or argument in ("-h", "--help") or not rest:
            options.append(argument)
        else:
            options += ["--config" if argument == "-c" else argument, rest.pop(0)]
    if takes_list and names and not names[0].startswith("["):
        names = [json.dumps(names)]
    return [*names, *options]


def report_head() -> dict[str, str]:
    """What every report begins with: the version, the command that was run, when."""
    return {
        "version": __version__,
        "command": shlex.join(["python", "-m", "lightning_chatgpt", *sys.argv[1:]]),
        "date": datetime.now().strftime("%Y-%m-%d %H:%M"),
    }


def tell_report(
    report: dict[str, Any],
    *,
    show: Callable[[dict[str, Any]], None],
    render: str,
    html_file: str | None,
    json_file: str | None,
) -> None:
    """Show a report in the terminal, and write it where that was asked for.

    Args:
        report: Plain data.
        show: Prints it for people.
        render: The module whose ``render_page`` makes a page of it, imported only for that.
        html_file: A file for the page, the command's ``html``; None for none.
        json_file: One for scripts, its ``json``; - for standard output, and nothing else there. None for none.

    Raises:
        ConfigError: A file cannot be written.
    """
    if json_file == "-":
        print(json.dumps(report, ensure_ascii=False))
    else:
        show(report)
        if json_file is not None:
            _write(json_file, json.dumps(report, ensure_ascii=False, indent=1), setting="json")
    if html_file is not None:
        _write(html_file, import_module(render).render_page(report), setting="html")


def _write(name: str, text: str, *, setting: str) -> None:
    try:
        Path(name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{setting} {name}: cannot be written ({error.strerror}); name another file") from None
    print(f"report written to {name}", file=sys.stderr)
