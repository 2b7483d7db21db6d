"""``evaluate``: how good models are, and which is better."""

from __future__ import annotations

import json
import shlex
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from lightning_chatgpt import __version__
from lightning_chatgpt.errors import ConfigError
from lightning_chatgpt.versions import installed_versions


def evaluate(
    models: list[str],
    data: str | None = None,
    text: str | None = None,
    output: str = "evaluation",
    limit: int | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 64,
    stride: int | None = None,
    bertscore: str | None = None,
    fairness: dict[str, Any] | None = None,
    harness: str | None = None,
    harness_data: str | None = None,
    accelerator: str = "auto",
    devices: int = 1,
    blind: bool = False,
    prompts: str | None = None,
    rater: str = "me",
    port: int = 0,
    seed: int = 0,
) -> None:
    """Tell how good models are, and which is better: figures with intervals, differences from the first, replies side by side.

    Writes report.html and report.json into the output folder. What was broken off is gone on with; what was measured before is not
    measured again.

    Args:
        models: Run folders, .ckpt files, transformers folders, builtin:NAME, or hub names; the others are held against the first.
        data: Conversations to evaluate on, as data.train takes them; null takes what the first run folder held out (test, or else
            validation).
        text: Plain text to evaluate on in place of conversations: how likely it is, without replies.
        output: The folder that is written to.
        limit: Takes that many at the most, from the beginning.
        batch_size: Items at once, in each process.
        max_new_tokens: Tokens a reply may have, greedy; 0 for no replies.
        stride: Tokens of a text longer than the model's positions that are scored at once; fewer see more of what stands before
            them. null takes half of the positions.
        bertscore: A local transformers folder with an encoder, to score replies with BERTScore.
        fairness: Looks at groups and at texts whose terms are swapped: --fairness.group LABEL, .flag LABEL, .words FILE, .counterfactual
            FILE (docs/fairness.md); {} takes the shipped texts.
        harness: A task of EleutherAI's lm-evaluation-harness to score the models on besides: local_perplexity, local_choices,
            local_chats, or another that it knows (docs/harness.md).
        harness_data: What a local task reads; null takes text, or else data.
        accelerator: Where to compute: auto, cpu, gpu, mps.
        devices: Processes that share the work.
        blind: Lets a person judge two models' replies on a page of this machine instead, without names (docs/blind.md).
        prompts: What both are asked, with blind: conversations, as data.train takes them.
        rater: Who judges, with blind.
        port: Of that page; 0 for one that is free.
        seed: Decides, with rater and prompt, whose reply is shown left.
    """
    if blind or prompts is not None:
        others = {"data": data, "text": text, "limit": limit, "stride": stride, "bertscore": bertscore, "fairness": fairness}
        given = [name for name, value in {**others, "harness": harness}.items() if value is not None]
        if not blind or prompts is None:
            raise ConfigError("blind and prompts belong together: evaluate --blind A B --prompts FILE")
        if given:
            raise ConfigError(f"{given[0]} has no part in a blind comparison; leave it out, or evaluate without --blind")
        from lightning_chatgpt.evaluation.blind import run_blind
        from lightning_chatgpt.quiet import quieten

        quieten()
        run_blind(
            models,
            prompts=prompts,
            output=Path(output),
            rater=rater,
            port=port,
            seed=seed,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
        )
        return
    if data is not None and text is not None:
        raise ConfigError("data and text exclude each other; evaluate on one, then on the other, each with an output of its own")
    for name, value, least in (
        ("limit", limit, 1),
        ("batch_size", batch_size, 1),
        ("max_new_tokens", max_new_tokens, 0),
        ("devices", devices, 1),
    ):
        if value is not None and value < least:
            raise ConfigError(f"{name} must be at least {least}, not {value}")
    from lightning_chatgpt.evaluation.evaluate import evaluate_models, harness_results
    from lightning_chatgpt.evaluation.fairness import FairnessSettings
    from lightning_chatgpt.evaluation.items import held_out_items, read_items
    from lightning_chatgpt.evaluation.records import Measuring, measuring_trainer
    from lightning_chatgpt.evaluation.report_page import render_page
    from lightning_chatgpt.plots import check_matplotlib
    from lightning_chatgpt.quiet import quieten

    check_matplotlib("the report's page", extra="evaluate")
    quieten()
    looked_at = FairnessSettings.of(fairness) if fairness is not None else None
    if looked_at is not None and (text is not None or not max_new_tokens):
        raise ConfigError("fairness is of replies in chats; leave out text, and let max_new_tokens be at least 1")
    if harness is None and harness_data is not None:
        raise ConfigError("harness_data is what a harness task reads; set harness to one, such as local_perplexity, or leave it out")
    if data is not None or text is not None:
        source = data if data is not None else text
        assert source is not None
        items, what = read_items(source, is_text=text is not None), source
    else:
        items, what = held_out_items(models)
    items = items[:limit]
    folder = Path(output)
    trainer = measuring_trainer(folder / "records", accelerator=accelerator, devices=devices)
    measuring = Measuring(batch_size=batch_size, max_new_tokens=0 if text is not None else max_new_tokens, stride=stride)
    found = evaluate_models(models, items, trainer=trainer, measuring=measuring, bertscore=bertscore, fairness=looked_at)
    if not trainer.is_global_zero:
        return
    report: dict[str, Any] = {
        "version": __version__,
        "command": shlex.join(["python", "-m", "lightning_chatgpt", *sys.argv[1:]]),
        "date": datetime.now().strftime("%Y-%m-%d %H:%M"),
        **found,
        "versions": installed_versions(),
    }
    report["data"]["what"] = what
    if harness is not None:
        is_local = harness.startswith("local_")
        report["harness"] = harness_results(
            models,
            task=harness,
            data=harness_data or (text or data if is_local else None),
            batch_size=batch_size,
            limit=limit,
            device="cpu" if accelerator == "cpu" else None,
        )
    print_report(report)
    (folder / "report.json").write_text(json.dumps(report, ensure_ascii=False, indent=1), encoding="utf-8")
    (folder / "report.html").write_text(render_page(report), encoding="utf-8")
    print(f"report written to {folder / 'report.html'} and {folder / 'report.json'}")


def print_report(report: dict[str, Any]) -> None:
    """Print the figures of the whole data to the terminal."""
    from rich.console import Console
    from rich.table import Table

    from lightning_chatgpt.evaluation.evaluate import verdicts

    table = Table(title=f"{report['data']['items']:,} items of {report['data']['what']}; [95 % interval]", title_justify="left")
    for column in ("", *(model["name"] for model in report["models"])):
        table.add_column(column, overflow="fold")
    whole = report["figures"][0]["part"] if report["figures"] else ""
    for figure in report["figures"]:
        if figure["part"] in (whole, "replies"):
            table.add_row(figure["title"], *(shown_estimate(found) for found in figure["models"]))
    console = Console(highlight=False)
    console.print(table)
    for found in report.get("harness", ()):
        for task, result in found["results"].items():
            values = ", ".join(f"{name} {metric['value']:.4g}" for name, metric in result["metrics"].items())
            console.print(f"{found['model']} in lm-eval {found['lm_eval']}, {task} (n = {result['n']}): {values}", soft_wrap=True)
    for told in verdicts(report):
        for verdict in ("better", "worse", "no difference shown"):
            if told.get(verdict):
                console.print(f"{told['model']} against {told['against']}, {verdict}: {', '.join(told[verdict])}", soft_wrap=True)


def shown_estimate(found: dict[str, Any]) -> str:
    """A figure for people: the value and its interval."""
    if found["value"] is None:
        return "–"
    return f"{found['value']:.4g}" + (f" [{found['low']:.4g}, {found['high']:.4g}]" if found["low"] is not None else "")
