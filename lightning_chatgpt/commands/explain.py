"""``explain``: how likely each token of a reply was, and which tokens of the prompt moved it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_chatgpt.chat.conversation import Conversation, Message
from lightning_chatgpt.commands import report_head, tell_report
from lightning_chatgpt.errors import ConfigError

_MAX_NEW_TOKENS = 64
_N_SHOWN = 3


def explain(
    model: str,
    prompt: str | None = None,
    reply: str | None = None,
    system: str | None = None,
    max_new_tokens: int = _MAX_NEW_TOKENS,
    html: str | None = "explain.html",
    json: str | None = None,
) -> None:
    """See how likely each token of a reply was, and which tokens before it moved that; a table here, and a page to look at.

    Args:
        model: A run folder, a .ckpt, a transformers folder, builtin:NAME, or a hub name.
        prompt: What the user says.
        reply: What is explained: what would the model have thought of this answer? Left out, it is the model's own, taking the most
            likely token each time.
        system: A system message to begin with.
        max_new_tokens: Tokens that the model's own reply may have.
        html: The page to write, over one that is there; null for none.
        json: A file to write all numbers to for scripts; - for standard output, and nothing else there.
    """
    if prompt is None:
        raise ConfigError("prompt: nothing is asked; add --prompt TEXT")
    if reply is not None and max_new_tokens != _MAX_NEW_TOKENS:
        raise ConfigError("max_new_tokens is for the model's own reply; remove it, or reply")
    for setting, name in (("html", html), ("json", json)):
        path = Path(name or "-").absolute()
        if path.is_dir() or not path.parent.is_dir():
            raise ConfigError(f"{setting} {name}: cannot be written; name a file, in a folder that is there")
    from transformers.utils import logging

    from lightning_chatgpt.evaluation.explain import explain_reply
    from lightning_chatgpt.models.build import load_model

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    messages = [Message("system", system)] if system else []
    network, tokenizer = load_model(model)
    explanation = explain_reply(
        network,
        tokenizer,
        Conversation((*messages, Message("user", prompt))),
        reply=reply,
        max_new_tokens=max_new_tokens,
        show_progress=True,
    )
    report = {
        **report_head(),
        "model": model,
        "is_own_reply": reply is None,
        **explanation.to_dict(),
    }
    tell_report(report, show=_print, render="lightning_chatgpt.evaluation.explain_page", html_file=html, json_file=json)


def _print(report: dict[str, Any]) -> None:
    """Print each token of the reply with its numbers; it reads the same without colour."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from lightning_chatgpt.evaluation.explain_page import label, strongest

    labels = [label(token["text"]) for token in [*report["prompt"], *report["reply"]]]
    table = Table("token")
    for column in ("p", "log p", "rank"):
        table.add_column(column, justify="right")
    for column in ("most likely", "moved most by"):
        table.add_column(column, overflow="fold")
    n_prompt = len(report["prompt"])
    for number, (token, row) in enumerate(zip(report["reply"], report["attributions"], strict=True)):
        likely = "\n".join(f"{one['probability']:4.0%} {label(one['text'])}" for one in token["alternatives"][:_N_SHOWN])
        moved = [Text(f"{row[i]:+.2f} {labels[i]}", style="green" if row[i] > 0 else "red") for i in strongest(row, n=_N_SHOWN)]
        numbers = (f"{token['probability']:.1%}", f"{token['log_probability']:.2f}", f"{token['rank']:,}")
        table.add_row(Text(labels[n_prompt + number]), *numbers, Text(likely), Text("\n").join(moved), end_section=True)
    console = Console(highlight=False)
    console.print(table)
    total, n_tokens = sum(token["log_probability"] for token in report["reply"]), len(report["reply"])
    whose = "the model's own reply" if report["is_own_reply"] else "this reply"
    print(f"{whose}: a log-probability of {total:.2f} nats in all, {total / n_tokens:.2f} a token")
    if not report["reply"][-1]["is_end"]:
        print("it is cut there: the model had not ended")
