"""Models and data to a report: plain data, which the page and scripts read."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_chatgpt.chat.conversation import Conversation
from lightning_chatgpt.errors import ConfigError, UserError
from lightning_chatgpt.evaluation.counterfactual import counterfactual_report
from lightning_chatgpt.evaluation.counterfactual_files import read_counterfactuals
from lightning_chatgpt.evaluation.fairness import LIMITS, FairnessSettings, audit, check_label, group_report
from lightning_chatgpt.evaluation.figures import LEARNT, likelihood_figures, reply_figures, reply_scores
from lightning_chatgpt.evaluation.harness import harness_folder, run_harness
from lightning_chatgpt.evaluation.items import run_folder, training_chats
from lightning_chatgpt.evaluation.records import Item, Measurer, Measuring, Record, items_digest, measure, network_digest
from lightning_chatgpt.evaluation.words import read_words
from lightning_chatgpt.generation.generate import max_positions
from lightning_chatgpt.metrics.text import BertScore, Bleu, Rouge
from lightning_chatgpt.models.build import LoadedModel, load_model
from lightning_chatgpt.plots import check_matplotlib
from lightning_chatgpt.precision import ChatTrainer

CURVES = ("train_loss", "val_loss")


def evaluate_models(
    models: Sequence[str],
    items: Sequence[Item],
    *,
    trainer: ChatTrainer,
    measuring: Measuring,
    bertscore: str | None = None,
    fairness: FairnessSettings | None = None,
) -> dict[str, Any]:
    """Measure models on the same items, and hold each against the first.

    Args:
        models: As ``load_model`` takes them.
        items: What they are measured on.
        trainer: Whose ``default_root_dir`` the records are written to.
        measuring: How.
        bertscore: A local folder with an encoder for BERTScore; None for none.
        fairness: What is looked at as to fairness; None for nothing.

    Returns: the report's ``models``, ``figures``, ``replies``, ``data`` and ``fairness``; on other processes than the first nothing.
    """
    names = unique_names(models)
    runs = [describe_run(model) for model in models]
    if fairness is not None:
        labels = [item.content.labels for item in items if isinstance(item.content, Conversation)]
        for label in filter(None, (fairness.group, fairness.flag)):
            check_label(label, labels)
    described: list[dict[str, Any]] = []
    records: list[list[Record]] = []
    for name, model, run in zip(names, models, runs, strict=True):
        loaded = load_model(model)
        rank_zero_info(f"{name}: {len(items):,} items")
        about = describe_model(loaded)
        records.append(measure(loaded, items, trainer=trainer, name=name, digest=about["digest"], settings=measuring))
        described.append({"name": name, "path": model, **about, **run})
    if not trainer.is_global_zero:
        return {}
    figures = [*likelihood_figures(records), *reply_figures(records, bertscore=bertscore)]
    found = {
        "data": {"items": len(items), "digest": items_digest(items), "sources": dict(Counter(item.source for item in items))},
        "models": described,
        "figures": [figure.to_dict() for figure in figures],
        "replies": _replies(records),
    }
    if fairness is not None:
        device = trainer.strategy.root_device
        found["fairness"] = _fairness(models, records, fairness, measuring, device=device)
    return found


def check_extras(*, replies: bool, bertscore: str | None, fairness: FairnessSettings | None) -> None:
    """Make sure that what a report needs is there: packages, an encoder, the files that fairness names.

    Raises:
        ConfigError: It is not.
        DataError: A file cannot be used.
    """
    check_matplotlib("the report's page", extra="evaluate")
    if replies:
        Bleu()
        Rouge("rouge1")
    if bertscore is not None:
        BertScore(bertscore)
    if fairness is not None:
        read_words(fairness.words)
        if fairness.counterfactual is not None:
            read_counterfactuals(fairness.counterfactual)


def _fairness(
    models: Sequence[str], records: Sequence[Sequence[Record]], settings: FairnessSettings, measuring: Measuring, *, device: Any
) -> dict[str, Any]:
    """Groups and counterfactuals of each model, and what the first run was trained on."""
    counterfactuals = read_counterfactuals(settings.counterfactual) if settings.counterfactual is not None else None
    words = read_words(settings.words)
    found = []
    for name, model, own in zip(unique_names(models), models, records, strict=True):
        groups = group_report(own, settings=settings) if settings.group is not None else None
        compared = None
        if counterfactuals is not None:
            loaded = load_model(model)
            loaded.network.to(device)
            measurer = Measurer(loaded, measuring)

            def score(chats: list[Conversation], measurer: Measurer = measurer, name: str = name) -> list[tuple[float, int]]:
                scores = [scores[-1] for scores in measurer.message_scores(chats, title=f"{name}: variants")]
                return [(-score.nll, score.tokens) for score in scores]

            def reply(chats: list[Conversation], measurer: Measurer = measurer, name: str = name) -> list[str]:
                return [reply.text for reply in measurer.replies(chats, title=f"{name}: replies to variants")]

            compared = counterfactual_report(counterfactuals, score=score, reply=reply, words=words)
        found.append({"name": name, "groups": groups, "counterfactual": compared})
    return {"models": found, "audit": _audit(run_folder(models), settings), "limits": LIMITS}


def _audit(folder: Path | None, settings: FairnessSettings) -> dict[str, Any] | None:
    """What the data say that a run was trained on; None where there is no run, or its data are gone."""
    if folder is None:
        return None
    try:
        return audit(training_chats(folder), settings=settings)
    except UserError as error:
        rank_zero_warn(f"{folder}: what it was trained on cannot be looked at ({error}); the report does without")
        return None


def harness_results(
    models: Sequence[str], *, task: str, data: str | None, batch_size: int, limit: int | None, device: str | None
) -> list[dict[str, Any]]:
    """What EleutherAI's lm-evaluation-harness says of each model; arguments as ``run_harness`` takes them."""
    found = []
    for name, model in zip(unique_names(models), models, strict=True):
        with harness_folder(model) as folder:
            found.append({"model": name, **run_harness(folder, task=task, data=data, batch_size=batch_size, limit=limit, device=device)})
    return found


def unique_names(models: Sequence[str]) -> list[str]:
    """What the report calls models: what they were called on the command line, numbered where one comes twice."""
    seen: Counter[str] = Counter()
    names = []
    for model in models:
        seen[model] += 1
        names.append(model if seen[model] == 1 else f"{model} ({seen[model]})")
    return names


def describe_model(model: LoadedModel) -> dict[str, Any]:
    """Its size, and a digest of its weights and tokenizer."""
    network, tokenizer = model
    return {
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "vocabulary": len(tokenizer),
        "positions": max_positions(network),
        "digest": network_digest(model),
    }


def describe_run(model: str) -> dict[str, Any]:
    """What a run folder tells of how the model was trained: its last start, and its loss curves; nothing of other models."""
    found: dict[str, Any] = {}
    for name, key, read in (("run.json", "run", _last_start), ("metrics.csv", "curves", read_curves)):
        path = Path(model) / name
        try:
            if path.is_file():
                found[key] = read(path)
        except (OSError, ValueError, KeyError, IndexError, TypeError, csv.Error) as error:
            raise ConfigError(f"{path}: cannot be read ({error}); mend or remove it, and the report does without") from None
    return found


def _last_start(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))["starts"][-1]


def read_curves(path: Path) -> dict[str, list[tuple[int, float]]]:
    """The losses that a run's ``metrics.csv`` tells, by step."""
    curves: dict[str, list[tuple[int, float]]] = {name: [] for name in CURVES}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            for name, points in curves.items():
                if row.get(name) and row.get("step") and math.isfinite(float(row[name])):
                    points.append((int(row["step"]), float(row[name])))
    return {name: points for name, points in curves.items() if points}


def main_figures(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The figures that count: of what a model is there to say, and of the replies."""
    return [figure for figure in report["figures"] if figure["part"] in (*LEARNT, "replies")]


def verdicts(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the main figures say of each model against the first: which are better, worse, or not shown to differ."""
    told = []
    for number, model in enumerate(report["models"][1:]):
        found: dict[str, Any] = {"model": model["name"], "against": report["models"][0]["name"]}
        for figure in main_figures(report):
            if verdict := figure["differences"][number]["verdict"]:
                found.setdefault(verdict, []).append(figure["title"])
        told.append(found)
    return told


def _replies(models: Sequence[Sequence[Record]]) -> list[dict[str, Any]]:
    """Prompts, and what each model replied, side by side."""
    scores = [reply_scores(records) for records in models]
    found = []
    for i, record in enumerate(models[0]):
        if "reply" not in record:
            continue
        own = [
            {"reply": records[i]["reply"], "finish_reason": records[i]["finish_reason"], **scores[m][i]} for m, records in enumerate(models)
        ]
        found.append({key: record[key] for key in ("id", "source", "prompt", "reference")} | {"models": own})
    return found
