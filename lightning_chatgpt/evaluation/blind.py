"""The blind comparison: people say which of two models' replies is better, without knowing whose is whose."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lightning_chatgpt.checkpoints.file import replace_file
from lightning_chatgpt.errors import ConfigError, SaveError
from lightning_chatgpt.evaluation.blind_replies import answer, identity, read_prompts
from lightning_chatgpt.evaluation.blind_server import Judging, bind, check_serving, serve
from lightning_chatgpt.evaluation.votes import MODELS, VOTES_FILE, VoteFile, preferences, summarise

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
) -> dict[str, Any]:
    """Let a person compare two models on a page, until everything is judged or Ctrl-C; the same call goes on where it was left.

    ``output`` then holds ``replies.jsonl``, ``votes.jsonl`` (each vote at once), ``preferences.jsonl`` and ``result.json``.

    Args:
        models: Two models, A and B: run folders, ``.ckpt`` files, transformers folders, ``builtin:NAME`` or hub names.
        prompts: A source of conversations; one that ends with the assistant is asked anew up to there.
        output: A folder, made if it is not there.
        rater: Who judges; several may, one after another, each under a name of their own.
        port: Of this machine, for the page; 0 for one that is free.
        seed: Decides, with rater and prompt, whose reply is shown left.
        max_new_tokens: Tokens a reply may have.
        batch_size: Prompts that are answered at once.

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
        raise ConfigError("the rater has no name; give one, such as --rater anna")
    if min(max_new_tokens, batch_size) < 1:
        raise ConfigError(f"max_new_tokens and batch_size must be at least 1, not {max_new_tokens} and {batch_size}")
    check_serving()
    identities = [identity(model) for model in models]
    if identities[0] == identities[1]:
        raise ConfigError(f"{models[0]} and {models[1]} are the same model; name two that differ")
    chats = read_prompts(prompts)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(f"{output}: the folder cannot be made ({error.strerror or error}); name another") from None
    try:
        with FileLock(output / ".lock", timeout=0), bind(port) as listening:
            pairs = answer(chats, models=models, identities=identities, output=output, max_new_tokens=max_new_tokens, batch_size=batch_size)
            by_id = {pair.id: pair for pair in pairs}
            file = VoteFile(output / VOTES_FILE, pairs=by_id, models=dict(zip(MODELS, models, strict=True)))
            judging = Judging(pairs, file=file, rater=rater, identities=identities, seed=seed)

            def finish() -> dict[str, Any]:
                result = {"models": file.models, "source": prompts, "pairs": len(pairs), **summarise(file.votes.values())}
                decided = preferences(file.votes.values(), by_id)
                replace_file(output / PREFERENCES_FILE, (json.dumps(record, ensure_ascii=False) + "\n" for record in decided))
                replace_file(output / RESULT_FILE, [json.dumps(result, indent=2, ensure_ascii=False) + "\n"])
                return result

            if judging.n_judged < len(pairs):

                def announce(address: str) -> None:
                    print(f"{rater} has judged {judging.n_judged} of {len(pairs)} pairs. Judge at")
                    print(f"  {address}")
                    print("Ctrl-C ends; every vote is kept, and the same command goes on.", flush=True)

                serve(judging, listening=listening, finish=lambda: in_words(finish()), announce=announce)
            result = finish()
    except Timeout:
        raise ConfigError(f"{output}: somebody is judging in there; wait until they have ended, or name another folder") from None
    print(f"\n{rater} has judged {judging.n_judged} of {len(pairs)} pairs.")
    _print(result)
    print(f"Written to {output}: {RESULT_FILE}, {VOTES_FILE}, {PREFERENCES_FILE}")
    return result


def in_words(result: dict[str, Any]) -> list[str]:
    """A result in sentences that name no model, for who may go on judging."""
    votes, win_rate = result["votes"], result["win_rate"]
    lines = [
        f"The model that was named first wins {_percent(win_rate)} of the time, ties and both bad counted as half.",
        f"Votes: {votes['A']} for the first, {votes['B']} for the second, {votes['tie']} ties, {votes['both_bad']} times both bad. "
        "The terminal tells which is which.",
    ]
    return [*lines, *(f"{' and '.join(found['raters'])}: {_agreement(found)}." for found in result["agreement"])]


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Blind comparison", title_justify="left", show_header=False)
    votes = result["votes"]
    for model, name in result["models"].items():
        table.add_row(Text(f"{model}: {name}"), f"{votes[model]} votes")  # Text: a name such as "[b]" is no markup
    table.add_row("tie, both bad", f"{votes['tie']}, {votes['both_bad']} votes")
    table.add_row("A wins, ties as half", _percent(result["win_rate"]))
    table.add_row("left wins, of what was decided", _percent(result["left_wins"]))
    for found in result["agreement"]:
        table.add_row(Text(" and ".join(found["raters"])), _agreement(found))
    Console(highlight=False).print(table)


def _percent(estimate: dict[str, Any]) -> str:
    value, low, high, n = (estimate[name] for name in ("value", "low", "high", "n"))
    if value is None:
        return "–"
    interval = f"95 % interval {low:.1%} to {high:.1%}" if low is not None else "no interval"
    return f"{value:.1%} ({interval}, {n} prompt{'s' * (n != 1)})"


def _agreement(found: dict[str, Any]) -> str:
    kappa = "kappa not defined" if found["kappa"] is None else f"kappa {found['kappa']:.2f}"
    return f"{kappa} ({found['agreed']:.0%} alike, {found['prompts']} prompt{'s' * (found['prompts'] != 1)})"
