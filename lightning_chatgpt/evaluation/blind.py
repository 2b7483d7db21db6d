"""The blind comparison: people say which of two models' replies is better, without knowing whose is whose."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_chatgpt.checkpoints.file import replace_file
from lightning_chatgpt.errors import ConfigError
from lightning_chatgpt.evaluation.blind_replies import answer, read_prompts
from lightning_chatgpt.evaluation.blind_server import Judging, bind, check_serving, serve
from lightning_chatgpt.evaluation.votes import MODELS, VoteFile, preferences, summarise
from lightning_chatgpt.processes import alone_in

VOTES_FILE = "votes.jsonl"
RESULT_FILE = "result.json"
PREFERENCES_FILE = "preferences.jsonl"


def run_blind(
    models: Sequence[str],
    *,
    prompts: str,
    output: Path,
    rater: str,
    port: int,
    seed: int,
    max_new_tokens: int,
    batch_size: int,
    accelerator: str = "auto",
) -> dict[str, Any]:
    """Let a person compare two models on a page, until everything is judged or Ctrl-C; the same call goes on where it was left.

    ``output`` then holds ``votes.jsonl`` (each vote at once), ``preferences.jsonl``, ``result.json``, and in ``records`` what was answered.

    Args:
        models: Two models, A and B: run folders, ``.ckpt`` files, transformers folders, ``builtin:NAME`` or hub names.
        prompts: A source of conversations; one that ends with the assistant is asked anew up to there.
        output: A folder, made if it is not there.
        rater: Who judges; several may, one after another, each under a name of their own.
        port: Of this machine, for the page; 0 for one that is free.
        seed: Decides, with rater and prompt, whose reply is shown left.
        max_new_tokens: Tokens a reply may have.
        batch_size: Prompts that are answered at once.
        accelerator: Where they are answered: auto, cpu, gpu, mps.

    Returns: what ``result.json`` holds: the figures of :func:`~lightning_chatgpt.evaluation.votes.summarise` and what they are of.

    Raises:
        ConfigError: A setting is out of range, a package is missing, the port or the folder is in use, or it holds votes on other replies.
        DataError: The prompts or the votes cannot be read.
        ModelError: A model cannot be loaded.
        SaveError: Something could not be written.
    """
    if len(models) != 2:
        raise ConfigError(f"a blind comparison is between two models, not {len(models)}; name A and B")
    if not rater.strip():
        raise ConfigError("the rater has no name; give one, such as --rater me")
    if min(max_new_tokens, batch_size) < 1:
        raise ConfigError(f"max_new_tokens and batch_size must be at least 1, not {max_new_tokens} and {batch_size}")
    check_serving()
    items = read_prompts(prompts)
    with alone_in(output, at_work="somebody is judging in there"), bind(port) as listening:
        records = output / "records"
        settings = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
        pairs, digests = answer(items, models=models, folder=records, accelerator=accelerator, **settings)
        by_id = {pair.id: pair for pair in pairs}
        file = VoteFile(output / VOTES_FILE, pairs=by_id, models=dict(zip(MODELS, models, strict=True)))
        judging = Judging(pairs, file=file, rater=rater, identities=digests, seed=seed)

        def announce(address: str) -> None:
            print(f"{rater} has judged {judging.n_judged} of {len(pairs)} pairs. Judge at\n  {address}")
            print("Ctrl-C ends; every vote is kept, and the same command goes on.", flush=True)

        def finish() -> dict[str, Any]:
            result = {"models": file.models, "source": prompts, "pairs": len(pairs), **summarise(file.votes.values())}
            decided = preferences(file.votes.values(), by_id)
            replace_file(output / PREFERENCES_FILE, (json.dumps(record, ensure_ascii=False) + "\n" for record in decided))
            replace_file(output / RESULT_FILE, [json.dumps(result, indent=2, ensure_ascii=False) + "\n"])
            return result

        if judging.n_judged < len(pairs):
            serve(judging, listening=listening, finish=lambda: in_words(finish()), announce=announce)
        result = finish()
    print(f"\n{rater} has judged {judging.n_judged} of {len(pairs)} pairs.")
    _print(result)
    print(f"Written to {output}: {RESULT_FILE}, {VOTES_FILE}, {PREFERENCES_FILE}")
    return result


def in_words(result: dict[str, Any]) -> list[str]:
    """A result in sentences that name no model, for who may go on judging."""
    votes, win_rate = result["votes"], result["win_rate"]
    return [
        f"The model that was named first wins {win_rate['value']:.1%} of the time, ties and both bad counted as half "
        f"(95% interval {_interval(win_rate)}, over {win_rate['n']} prompts).",
        f"Votes: {votes['A']} for the first, {votes['B']} for the second, {votes['tie']} ties, {votes['both_bad']} times both bad. "
        "The terminal tells which is which.",
        *(
            f"{_names(found)}: {found['agreed']:.0%} alike, {_kappa(found)}, over {found['prompts']} prompts."
            for found in result["agreement"]
        ),
    ]


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("", title="Blind comparison", title_justify="left")
    for column in ("votes", "share", "95% interval", "prompts"):
        table.add_column(column, justify="right")
    votes = result["votes"]
    labels = {**{model: f"{model}: {name}" for model, name in result["models"].items()}, "tie": "tie", "both_bad": "both bad"}
    for verdict, label in labels.items():
        table.add_row(Text(label), f"{votes[verdict]}")  # Text: a name such as "[b]" is no markup
    shares = {
        "win_rate": ("A wins, undecided as half", sum(votes.values())),
        "left_wins": ("left wins, where decided", votes["A"] + votes["B"]),
    }
    for key, (label, n) in shares.items():
        found = result[key]
        if n:
            table.add_row(label, f"{n}", f"{found['value']:.1%}", _interval(found), f"{found['n']}")
    for found in result["agreement"]:
        table.add_row(Text(_names(found)), "", f"{found['agreed']:.0%} alike", _kappa(found), f"{found['prompts']}")
    Console(highlight=False).print(table)


def _interval(found: dict[str, Any]) -> str:
    return "–" if found["low"] is None else f"{found['low']:.1%} to {found['high']:.1%}"


def _names(found: dict[str, Any]) -> str:
    return " and ".join(found["raters"])


def _kappa(found: dict[str, Any]) -> str:
    return "kappa undefined" if found["kappa"] is None else f"kappa {found['kappa']:.2f}"
