"""Models and data to a report: plain data, which the page and scripts read."""

from __future__ import annotations

import csv
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_chatgpt.errors import ConfigError
from lightning_chatgpt.evaluation.figures import likelihood_figures, reply_figures, reply_scores
from lightning_chatgpt.evaluation.records import Item, Measuring, Record, items_digest, measure, network_digest
from lightning_chatgpt.generation.generate import max_positions
from lightning_chatgpt.models.build import LoadedModel, load_model
from lightning_chatgpt.precision import ChatTrainer

CURVES = ("train_loss", "val_loss")


def evaluate_models(
    models: Sequence[str], items: Sequence[Item], *, trainer: ChatTrainer, measuring: Measuring, bertscore: str | None = None
) -> dict[str, Any]:
    """Measure models on the same items, and hold each against the first.

    Args:
        models: As ``load_model`` takes them.
        items: What they are measured on.
        trainer: Whose ``default_root_dir`` the records are written to.
        measuring: How.
        bertscore: A local folder with an encoder for BERTScore; None for none.

    Returns: the report's ``models``, ``figures``, ``replies`` and ``data``; on other processes than the first nothing.
    """
    described: list[dict[str, Any]] = []
    records: list[list[Record]] = []
    for name, model in zip(unique_names(models), models, strict=True):
        loaded = load_model(model)
        rank_zero_info(f"{name}: {len(items):,} items")
        records.append(measure(loaded, items, trainer=trainer, name=re.sub(r"[^\w.-]+", "-", name).strip("-"), settings=measuring))
        described.append({"name": name, "path": model, **describe_model(loaded), **describe_run(model)})
    if not trainer.is_global_zero:
        return {}
    figures = [*likelihood_figures(records), *reply_figures(records, bertscore=bertscore)]
    return {
        "data": {"items": len(items), "digest": items_digest(items), "sources": dict(Counter(item.source for item in items))},
        "models": described,
        "figures": [figure.to_dict() for figure in figures],
        "replies": _replies(records),
    }


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
    folder = Path(model)
    found: dict[str, Any] = {}
    if (folder / "run.json").is_file():
        try:
            found["run"] = json.loads((folder / "run.json").read_text(encoding="utf-8"))["starts"][-1]
        except (ValueError, KeyError, IndexError) as error:
            raise ConfigError(f"{folder / 'run.json'}: cannot be read ({error}); remove it, and the report does without") from None
    if (folder / "metrics.csv").is_file():
        found["curves"] = read_curves(folder / "metrics.csv")
    return found


def read_curves(path: Path) -> dict[str, list[tuple[int, float]]]:
    """The losses that a run's ``metrics.csv`` tells, by step."""
    curves: dict[str, list[tuple[int, float]]] = {name: [] for name in CURVES}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            for name, points in curves.items():
                if row.get(name) and row.get("step") and math.isfinite(float(row[name])):
                    points.append((int(row["step"]), float(row[name])))
    return {name: points for name, points in curves.items() if points}


def verdicts(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the figures of the whole data say of each model against the first: which are better, worse, or not shown to differ."""
    whole = report["figures"][0]["part"] if report["figures"] else ""
    told = []
    for number, model in enumerate(report["models"][1:]):
        found: dict[str, Any] = {"model": model["name"], "against": report["models"][0]["name"]}
        for figure in report["figures"]:
            difference = figure["differences"][number]
            if figure["part"] in (whole, "replies") and difference["verdict"]:
                found.setdefault(difference["verdict"], []).append(figure["title"])
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
