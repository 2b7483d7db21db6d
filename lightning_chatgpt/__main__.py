"""``python -m lightning_chatgpt VERB …``: finds the verb and imports only what it needs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext

from lightning_chatgpt import __version__
from lightning_chatgpt.errors import ConfigError, UserError
from lightning_chatgpt.memory import uncollected
from lightning_chatgpt.processes import PARENT, end_with_parent
from lightning_chatgpt.versions import check_versions

_TRAINER_VERBS = {
    "inspect": "see what the data holds and what the model will be fed",
    "fit": "train a model",
    "validate": "score a model on the validation split",
    "test": "score a model on the test split",
    "predict": "write a reply to each conversation",
}
_COMMANDS = {
    "chat": "talk to a model in the terminal",
    "evaluate": "tell how good models are, and which is better",
    "explain": "see how likely each token of a reply was, and what moved it",
    "sweep": "search for the best settings, a fit for each try",
    "export": "write a model as a plain transformers folder",
    "tokenizer": "train a tokenizer and compare it with GPT-2's",
}

_HELP = """usage: lightning-chatgpt VERB [options]

Turn a GPT into your own ChatGPT.

{verbs}

  lightning-chatgpt fit -c configs/quickstart.yaml     first steps: fine-tune, watch the replies
  lightning-chatgpt chat runs/quickstart               talk to the result
  lightning-chatgpt VERB --help                        a verb's options

Shipped configs are also found by name, from any folder: -c lightning_chatgpt:quickstart
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a verb and leave: 0 where it went well, 2 with one line on what the user can mend."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    verb = arguments[0] if arguments else "--help"
    if os.environ.get("LOCAL_RANK", "0") != "0" or PARENT in os.environ:
        end_with_parent()
    try:
        if verb in ("-h", "--help"):
            verbs = {**_TRAINER_VERBS, **_COMMANDS}
            print(_HELP.format(verbs="\n".join(f"  {name:<10}{about}" for name, about in verbs.items())), end="")
        elif verb == "--version":
            print(f"lightning-chatgpt {__version__}")
        elif verb in _TRAINER_VERBS:
            check_versions()
            # Only once in a process: what an earlier run left is garbage.
            with nullcontext() if "lightning" in sys.modules else uncollected():
                from lightning_chatgpt.cli import run_trainer_verb

            run_trainer_verb(arguments)
        elif verb in _COMMANDS:
            check_versions()
            from lightning_chatgpt.commands import run_command

            run_command(verb, arguments[1:])
        else:
            import difflib

            near = difflib.get_close_matches(verb, [*_TRAINER_VERBS, *_COMMANDS], n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join([*_TRAINER_VERBS, *_COMMANDS])}"
            raise ConfigError(f"{verb!r} is no verb; {hint}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
