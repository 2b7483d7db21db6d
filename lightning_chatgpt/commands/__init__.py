"""The verbs beside the Trainer's, one file each."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module


def run_command(verb: str, arguments: Sequence[str]) -> None:
    """Run one of the commands.

    Args:
        verb: The command's name, that of its file and of its function in there.
        arguments: The command line after the verb.
    """
    from jsonargparse import auto_cli

    from lightning_chatgpt.arguments import OneLineParser
    from lightning_chatgpt.configuration import resolve_arguments

    function = getattr(import_module(f"{__name__}.{verb}"), verb)
    given = ["--config" if argument == "-c" else argument for argument in resolve_arguments(arguments)[0]]
    auto_cli(function, args=given, as_positional=True, prog=f"lightning-chatgpt {verb}", parser_class=OneLineParser)
