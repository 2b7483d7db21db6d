"""Figures from records that are written by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lightning_chatgpt.evaluation.figures import likelihood_figures, reply_figures, reply_scores


def record(number: int, *, worse: float = 0.0, **changed: Any) -> dict[str, Any]:
    """A conversation of two exchanges; 10 bytes and 4 tokens a message."""

    def score(role: str, nll: float, weight: float = 1.0) -> dict[str, Any]:
        return {"role": role, "weight": weight, "tokens": 4, "nll": nll + worse, "correct": 1, "bytes": 10}

    messages = [("user", "aaaaaaaaaa"), ("assistant", "bbbbbbbbbb"), ("user", "cccccccccc")]
    return {
        "id": f"chats.jsonl:{number}",
        "source": "a.jsonl" if number % 2 else "b.jsonl",
        "prompt": [{"role": role, "content": content} for role, content in messages],
        "reference": "you and me",
        "reply": "you and I",
        "finish_reason": "stop",
        "scores": [
            score("user", 8.0),
            score("assistant", 4.0 + number),
            score("user", 8.0),
            score("assistant", 2.0, weight=0.5),
            {"role": "markers", "weight": 0.0, "tokens": 2, "nll": 1.0, "correct": 0, "bytes": 0},
        ],
        **changed,
    }


def found(models: list[list[dict[str, Any]]]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(figure.part, figure.name): figure.to_dict() for figure in (*likelihood_figures(models), *reply_figures(models))}


def test_figures_by_hand() -> None:
    figures = found([[record(1), record(2)]])

    def value(part: str, name: str) -> float:
        return float(figures[part, name]["models"][0]["value"])

    # Assistant's: 5 + 0.5 · 2 and 6 + 0.5 · 2 nats of 4 + 0.5 · 4 tokens each.
    assert value("assistant", "perplexity") == pytest.approx(math.exp(13 / 12))
    assert value("assistant", "bits_per_byte") == pytest.approx(15 / math.log(2) / 40)
    assert value("assistant", "token_accuracy") == 4 / 16
    assert value("all tokens", "perplexity") == pytest.approx(math.exp((15 + 32 + 2) / 36))
    assert value("turn 1", "perplexity") == pytest.approx(math.exp(11 / 8))
    assert value("turn 2", "perplexity") == pytest.approx(math.exp(4 / 8))
    assert value("role user", "bits_per_byte") == pytest.approx(32 / math.log(2) / 40)
    assert value("up to 100 characters", "perplexity") == value("assistant", "perplexity")
    assert value("source a.jsonl", "perplexity") == pytest.approx(math.exp(6 / 6))
    assert figures["source a.jsonl", "perplexity"]["models"][0]["n"] == 1
    assert ("101 to 400 characters", "perplexity") not in figures
    assert value("replies", "exact_match") == 0
    assert value("replies", "end_rate") == 1
    assert value("replies", "distinct1") == 3 / 6


def test_the_worse_of_two_is_found_and_a_model_against_itself_is_not() -> None:
    good = [record(number) for number in range(30)]
    bad = [record(number, worse=0.1) for number in range(30)]
    figures = found([good, bad, good])
    worse, same = figures["assistant", "perplexity"]["differences"]
    assert worse["verdict"] == "worse" and worse["low"] > 0
    assert same == {"value": 0.0, "low": 0.0, "high": 0.0, "n": 30, "verdict": "no difference shown"}
    # Neither more nor fewer words are better.
    assert figures["replies", "length_ratio"]["differences"][0]["verdict"] is None


def test_other_tokens_are_told_of() -> None:
    longer = record(1)
    longer["scores"][0]["tokens"] = 5
    figures = found([[record(1)], [longer]])
    assert "bits per byte" in figures["assistant", "perplexity"]["note"]
    assert not figures["assistant", "bits_per_byte"]["note"]


def test_a_prompt_without_reference_counts_where_none_is_needed() -> None:
    asked = record(3, reference=None, scores=record(3)["scores"][2:3] + record(3)["scores"][4:])
    figures = found([[record(1), record(2), asked]])
    assert figures["replies", "bleu"]["models"][0]["n"] == 2
    assert figures["replies", "loop_rate"]["models"][0]["n"] == 3
    assert figures["assistant", "perplexity"]["models"][0]["n"] == 2
    scores = reply_scores([record(1), asked])
    assert scores[0]["nll"] == 2.0 / 4 and scores[0]["chrf"] is not None and scores[0]["chrf"] > 50
    assert scores[1] == {"chrf": None, "nll": None}


def test_documents_have_no_replies() -> None:
    document = {
        "id": "a",
        "source": "a",
        "labels": {},
        "scores": [{"role": "text", "weight": 1.0, "tokens": 4, "nll": 8.0, "correct": 0, "bytes": 8}],
    }
    figures = found([[document, document]])
    assert list(figures) == [("text", "perplexity"), ("text", "bits_per_byte"), ("text", "token_accuracy")]
    assert figures["text", "perplexity"]["models"][0]["value"] == pytest.approx(math.exp(2))
