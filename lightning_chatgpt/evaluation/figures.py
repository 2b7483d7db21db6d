"""From records to figures: of each model, with intervals, and of each against the first."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_chatgpt.evaluation.records import Record
from lightning_chatgpt.metrics.bootstrap import Resampled, resample
from lightning_chatgpt.metrics.perplexity import BitsPerByte, Perplexity, TokenAccuracy
from lightning_chatgpt.metrics.text import (
    BertScore,
    Bleu,
    Chrf,
    Distinct,
    EditDistance,
    ExactMatch,
    LengthRatio,
    LoopRate,
    ReplyMetric,
    Rouge,
    is_ascii,
    is_unspaced,
)

LEARNT = ("assistant", "text")  # whose tokens a model is there to say
MIN_RECORDS = 20  # of fewer, percentile intervals leave 0 out too often: of 5 equal ones in 15 of 100, of 36 in 8
_LENGTHS = (100, 400, 1600)  # characters of a conversation, which are the same whatever the tokenizer
_MOST_TURNS = 4
_MOST_SOURCES = 12

Select = Callable[[Record], list[Record]]  # of a record's scores


@dataclass(frozen=True)
class Figure:
    """One figure of each model.

    Attributes:
        name: What scripts call it.
        title: What people call it.
        part: What of the data it is taken from: ``assistant``, ``all tokens``, ``role user``, ``replies``, …
        higher_is_better: Whether more of it is better; None where neither is.
        models: What it is in each model.
        note: What has to be known of it.
    """

    name: str
    title: str
    part: str
    higher_is_better: bool | None
    models: Sequence[Resampled]
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As plain data; ``differences`` are each other model's less the first's, with what they mean."""
        first, *others = self.models
        return {
            "name": self.name,
            "title": self.title,
            "part": self.part,
            "higher_is_better": self.higher_is_better,
            "note": self.note,
            "models": [found.estimate().to_dict() for found in self.models],
            "differences": [self._difference(found, first) for found in others],
        }

    def _difference(self, found: Resampled, first: Resampled) -> dict[str, Any]:
        difference = found.minus(first)
        verdict = None
        if self.higher_is_better is not None and difference.n < MIN_RECORDS:
            verdict = "too few to tell"
        elif self.higher_is_better is not None and math.isfinite(difference.low) and math.isfinite(difference.high):
            is_better = (difference.value > 0) == self.higher_is_better
            verdict = ("better" if is_better else "worse") if difference.excludes_zero else "no difference shown"
        return {**difference.to_dict(), "verdict": verdict}


def finite(value: Any) -> Any:
    """Plain data with null in place of numbers that are not finite, which JSON does not know."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def likelihood_figures(models: Sequence[Sequence[Record]]) -> Iterator[Figure]:
    """Perplexity, bits per byte and accuracy: of what the assistant says, and of other parts of the data.

    Args:
        models: The records of each model, of the same items in the same order.
    """
    n_tokens = {tuple(sum(s["tokens"] for s in record["scores"]) for record in records) for records in models}
    note = "" if len(n_tokens) == 1 else "the models cut text into different tokens, so compare their bits per byte"
    for part, select in _parts(models[0]):
        chosen = [i for i, record in enumerate(models[0]) if sum(score["bytes"] for score in select(record))]
        if not chosen:
            continue
        taken = [[records[i] for i in chosen] for records in models]
        is_learnt = part != "all tokens"

        def nll(score: Record, is_learnt: bool = is_learnt) -> tuple[float, float]:
            weight = score["weight"] if is_learnt else 1.0
            return weight * score["nll"], weight * score["tokens"]

        def bits(score: Record) -> tuple[float, float]:
            return score["nll"] / math.log(2), score["bytes"]

        def correct(score: Record) -> tuple[float, float]:
            return score["correct"], score["tokens"]

        for name, title, metric, of_score in (
            ("perplexity", "perplexity", Perplexity(), nll),
            ("bits_per_byte", "bits per byte", BitsPerByte([]), bits),
            ("token_accuracy", "token accuracy", TokenAccuracy(), correct),
        ):
            found = [resample(_rows(records, select, of_score), metric.of_sums) for records in taken]
            yield Figure(name, title, part, metric.higher_is_better, found, "" if name == "bits_per_byte" else note)


def reply_figures(models: Sequence[Sequence[Record]], *, bertscore: str | None = None) -> Iterator[Figure]:
    """What the replies are like, and how near they come to the references.

    Args:
        models: The records of each model, of the same items in the same order.
        bertscore: A local folder with an encoder to score with.
    """
    answered = [i for i, record in enumerate(models[0]) if "reply" in record]
    referenced = [i for i in answered if models[0][i]["reference"]]
    references = [models[0][i]["reference"] for i in referenced]
    if not answered:
        return
    metrics: list[tuple[str, str, ReplyMetric | Distinct]] = []
    if references:
        bleu = Bleu("zh" if is_unspaced(references) else "13a")
        by_words = not is_ascii(references)
        metrics += [("bleu", "BLEU", bleu), ("chrf", "chrF", Chrf())]
        metrics += [
            (kind, f"ROUGE-{kind.removeprefix('rouge')}", Rouge(kind, by_words=by_words)) for kind in ("rouge1", "rouge2", "rougeL")
        ]
        if bertscore is not None:
            metrics.append(("bertscore", "BERTScore (F1)", BertScore(bertscore)))
        metrics += [
            ("exact_match", "exact match", ExactMatch()),
            ("edit_distance", "edit distance", EditDistance()),
            ("length_ratio", "length ratio", LengthRatio()),
        ]
    metrics += [(f"distinct{order}", f"distinct-{order}", Distinct(order)) for order in (1, 2, 3)]
    metrics.append(("loop_rate", "replies that loop", LoopRate()))
    for name, title, metric in metrics:
        chosen = referenced if metric.needs_reference else answered
        replies = [[records[i]["reply"] for i in chosen] for records in models]
        found = [metric.resampled(own, references if metric.needs_reference else ()) for own in replies]
        note = metric.signature if isinstance(metric, (Bleu, Chrf)) else ""
        yield Figure(name, title, "replies", metric.higher_is_better, found, note)
    ended = [torch.tensor([[records[i]["finish_reason"] == "stop", 1.0] for i in answered]) for records in models]
    yield Figure("end_rate", "replies that end by themselves", "replies", True, [resample(r, TokenAccuracy().of_sums) for r in ended])


def reply_scores(records: Sequence[Record]) -> list[dict[str, float | None]]:
    """For each record what its reply can be sorted by: ``chrf`` against the reference, and ``nll`` of the reference, in nats a token."""
    chrf = Chrf() if any("reply" in record for record in records) else None
    found: list[dict[str, float | None]] = []
    for record in records:
        score = None
        if chrf is not None and record.get("reference") and "reply" in record:
            score = float(chrf.of_sums(chrf.rows([record["reply"]], [record["reference"]])[0]))
        last = record["scores"][-2] if record.get("reference") else None  # the last message; markers stand behind it
        found.append({"chrf": score, "nll": last["nll"] / last["tokens"] if last and last["tokens"] else None})
    return found


def _parts(records: Sequence[Record]) -> Iterator[tuple[str, Select]]:
    """What of the data figures are taken from; the first is the one that counts."""
    roles = {score["role"] for record in records for score in record["scores"]}
    yield ("text" if "text" in roles else "assistant"), _learnt
    if "text" in roles:
        yield from _sources(records)
        return
    yield "all tokens", lambda record: list(record["scores"])
    most = max((len(_learnt(record)) for record in records), default=0)
    if most > 1:
        for turn in range(1, min(most, _MOST_TURNS) + 1):
            is_last = turn == _MOST_TURNS < most
            yield f"turn {turn}{' and later' if is_last else ''}", partial(_turn, first=turn - 1, last=None if is_last else turn)
    for role in ("system", "user", "tool"):
        if role in roles:
            yield f"role {role}", partial(_of_role, role=role)
    edges = (0, *_LENGTHS, math.inf)
    for low, high in itertools.pairwise(edges):
        title = (
            f"up to {high:,} characters"
            if low == 0
            else f"more than {low:,} characters"
            if math.isinf(high)
            else f"{low + 1:,} to {high:,} characters"
        )
        yield title, partial(_of_length, low=low, high=high)
    yield from _sources(records)


def _sources(records: Sequence[Record]) -> Iterator[tuple[str, Select]]:
    sources = Counter(record["source"] for record in records)
    if len(sources) > 1:
        for source, _ in sources.most_common(_MOST_SOURCES):
            yield f"source {source}", partial(_of_source, source=source)


def _learnt(record: Record) -> list[Record]:
    return [score for score in record["scores"] if score["role"] in LEARNT and score["weight"]]


def _turn(record: Record, *, first: int, last: int | None) -> list[Record]:
    return _learnt(record)[first:last]


def _of_role(record: Record, *, role: str) -> list[Record]:
    return [score for score in record["scores"] if score["role"] == role]


def _of_length(record: Record, *, low: float, high: float) -> list[Record]:
    length = sum(len(message["content"]) for message in record["prompt"]) + len(record["reference"] or "")
    return _learnt(record) if low < length <= high else []


def _of_source(record: Record, *, source: str) -> list[Record]:
    return _learnt(record) if record["source"] == source else []


def _rows(records: Sequence[Record], select: Select, of_score: Callable[[Record], tuple[float, float]]) -> Tensor:
    """What each record adds to the two sums of a ratio; (N, 2)."""
    addends = [[of_score(score) for score in select(record)] for record in records]
    return torch.tensor([[sum(a for a, _ in pairs), sum(b for _, b in pairs)] for pairs in addends], dtype=torch.float64)
