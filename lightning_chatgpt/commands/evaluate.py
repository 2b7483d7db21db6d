"""``evaluate``: how good models are, and which is better."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning_chatgpt.chat.faults import OnFault
from lightning_chatgpt.commands import report_head
from lightning_chatgpt.errors import ConfigError
from lightning_chatgpt.versions import installed_versions


def evaluate(
    models: list[str],
    data: str | dict[str, Any] | list[str | dict[str, Any]] | None = None,
    text: str | dict[str, Any] | list[str | dict[str, Any]] | None = None,
    on_fault: OnFault = "error",
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
        on_fault: What is done about a record of them that cannot be used: error, skip or fix.
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
        prompts: What both are asked, with blind: a text file with a prompt a line, or conversations as data.train takes them.
        rater: Who judges, with blind.
        port: Of that page; 0 for one that is free.
        seed: Decides, with rater and prompt, whose reply is shown left.
    """
    if data is not None and text is not None:
        raise ConfigError("data and text exclude each other; evaluate on one, then on the other, each with an output of its own")
    least = {"limit": (limit, 1), "batch_size": (batch_size, 1), "max_new_tokens": (max_new_tokens, 0), "devices": (devices, 1)}
    for name, (value, lowest) in least.items():
        if value is not None and value < lowest:
            raise ConfigError(f"{name} must be at least {lowest}, not {value}")
    if blind or prompts is not None:
        others: dict[str, Any] = {
            "data": data,
            "text": text,
            "limit": limit,
            "stride": stride,
            "bertscore": bertscore,
            "fairness": fairness,
        }
        others |= {"fairness": fairness, "harness": harness, "harness_data": harness_data, "devices": devices if devices > 1 else None}
        given = [name for name, value in others.items() if value is not None]
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
            accelerator=accelerator,
        )
        return
    if (rater, port, seed) != ("me", 0, 0):
        raise ConfigError("rater, port and seed are of a blind comparison; leave them out, or add --blind and --prompts FILE")
    if harness is None and harness_data is not None:
        raise ConfigError("harness_data is what a harness task reads; set harness to one, such as local_perplexity, or leave it out")
    if text is not None or not max_new_tokens:
        for name, setting in (("fairness", fairness), ("bertscore", bertscore)):
            if setting is not None:
                raise ConfigError(f"{name} is of replies in chats; leave out text, and let max_new_tokens be at least 1, or leave it out")
    from lightning_chatgpt.checkpoints.file import replace_file
    from lightning_chatgpt.evaluation.evaluate import check_extras, evaluate_models, harness_results
    from lightning_chatgpt.evaluation.fairness import FairnessSettings
    from lightning_chatgpt.evaluation.figures import finite
    from lightning_chatgpt.evaluation.items import held_out_items, read_items
    from lightning_chatgpt.evaluation.records import Measuring, measuring_trainer
    from lightning_chatgpt.evaluation.report_page import render_page
    from lightning_chatgpt.quiet import quieten

    quieten()
    # What is wrong is told before anything is measured.
    looked_at = FairnessSettings.of(fairness) if fairness is not None else None
    measuring = Measuring(batch_size=batch_size, max_new_tokens=0 if text is not None else max_new_tokens, stride=stride)
    check_extras(replies=measuring.max_new_tokens > 0, bertscore=bertscore, fairness=looked_at)
    folder = Path(output)
    try:
        (folder / "records").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output {output}: no such folder can be made ({error.strerror or error}); name another") from None
    source = data if data is not None else text
    if source is not None:
        items, what = read_items(source, is_text=text is not None, on_fault=on_fault), str(source)
    else:
        items, what = held_out_items(models)
    items = items[:limit]
    trainer = measuring_trainer(folder / "records", accelerator=accelerator, devices=devices)
    report: dict[str, Any] = report_head()
    if harness is not None and trainer.is_global_zero:
        own = harness_data or (source if harness.startswith("local_") else None)
        if own is not None and not isinstance(own, str):
            raise ConfigError(f"harness task {harness} reads one source, not {own!r}; name it with --harness_data")
        device = {"cpu": "cpu", "mps": "mps"}.get(accelerator)
        report["harness"] = harness_results(models, task=harness, data=own, batch_size=batch_size, limit=limit, device=device)
    found = evaluate_models(models, items, trainer=trainer, measuring=measuring, bertscore=bertscore, fairness=looked_at)
    if not trainer.is_global_zero:
        return
    report |= {**found, "versions": installed_versions()}
    report["data"]["what"] = what
    report = finite(report)
    print_report(report)
    replace_file(folder / "report.json", [json.dumps(report, ensure_ascii=False, indent=1, allow_nan=False)])
    replace_file(folder / "report.html", [render_page(report)])
    print(f"report written to {folder / 'report.html'} and {folder / 'report.json'}")


def print_report(report: dict[str, Any]) -> None:
    """Print the figures of the whole data to the terminal."""
    from rich.console import Console
    from rich.table import Table

    from lightning_chatgpt.evaluation.evaluate import main_figures, verdicts

    table = Table(title=f"{report['data']['items']:,} items of {report['data']['what']}; [95 % interval]", title_justify="left")
    for column in ("", *(model["name"] for model in report["models"])):
        table.add_column(column, overflow="fold")
    for figure in main_figures(report):
        table.add_row(figure["title"], *(shown_estimate(found) for found in figure["models"]))
    console = Console(highlight=False)
    console.print(table)
    for found in report.get("harness", ()):
        for task, result in found["results"].items():
            values = ", ".join(f"{name} {metric['value']:.4g}" for name, metric in result["metrics"].items())
            console.print(f"{found['model']} in lm-eval {found['lm_eval']}, {task} (n = {result['n']}): {values}", soft_wrap=True)
    for told in verdicts(report):
        for verdict in ("better", "worse", "no difference shown", "too few to tell"):
            if told.get(verdict):
                console.print(f"{told['model']} against {told['against']}, {verdict}: {', '.join(told[verdict])}", soft_wrap=True)


def shown_estimate(found: dict[str, Any]) -> str:
    """A figure for people: the value and its interval."""
    if found["value"] is None:
        return "–"
    return f"{found['value']:.4g}" + (f" [{found['low']:.4g}, {found['high']:.4g}]" if found["low"] is not None else "")
