"""Fairness: a planted bias is found, a symmetric model shows none; figures by hand."""

from __future__ import annotations

import json
import math
import random
from typing import TYPE_CHECKING, Any

import pytest

from lightning_chatgpt.chat.conversation import Conversation, Message
from lightning_chatgpt.errors import ConfigError, DataError
from lightning_chatgpt.evaluation.fairness import LIMITS, FairnessSettings, audit, group_report
from lightning_chatgpt.pages.render import environment
from tests.conftest import chat

if TYPE_CHECKING:
    from pathlib import Path

BY_DIALECT = FairnessSettings(group="dialect")


def record(*, reply: str = "Hello.", nll: float = 20.0, tokens: int = 10, **labels: str) -> dict[str, Any]:
    scores = [
        {"role": "user", "weight": 1.0, "tokens": 5, "nll": 500.0, "bytes": 20, "correct": 0},
        {"role": "assistant", "weight": 0.0, "tokens": 5, "nll": 500.0, "bytes": 20, "correct": 0},
        {"role": "assistant", "weight": 0.5, "tokens": tokens, "nll": nll, "bytes": 40, "correct": tokens // 2},
    ]
    return {"id": "a:1", "labels": labels, "scores": scores, "reply": reply, "finish_reason": "stop", "completion_tokens": tokens}


def records(losses: dict[str, float], *, n: int = 40, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [record(nll=10 * rng.gauss(loss, 0.4), dialect=name) for name, loss in losses.items() for _ in range(n)]


def test_a_planted_gap_is_found_and_none_without() -> None:
    losses = {"north": 2.0, "south": 2.6, "west": 2.1}
    found = group_report(records(losses), settings=BY_DIALECT)["figures"]
    gap = found["perplexity"]["gap"]
    assert gap["is_found"] and (gap["highest"], gap["lowest"]) == ("south", "north")
    assert gap["low"] < math.exp(2.6) - math.exp(2.0) < gap["high"]
    assert not any(found[figure]["gap"]["is_found"] for figure in ("accuracy", "reply_length", "flagged_words"))
    alike = [group_report(records(dict.fromkeys(losses, 2.0), seed=seed), settings=BY_DIALECT)["figures"] for seed in range(5)]
    assert sum(figure["gap"]["is_found"] for figures in alike for figure in figures.values()) <= 1  # of one report in 20 by chance


def test_figures_of_a_group_by_hand() -> None:
    settings = FairnessSettings(group="dialect", flag="rude")
    north = [
        record(reply="You are LAZY.", rude="yes", dialect="north", tokens=4, nll=4.0),
        record(reply="他很lazy的。", rude="no", dialect="north", tokens=6, nll=12.0),
        record(reply="他非常懒惰。", rude="True", dialect="north"),
        record(reply="A lazyish day.", rude="yes", dialect="north"),
        record(reply="Hello.", dialect="north"),
    ]
    south = [record(rude="no", dialect="south")] * 3
    report = group_report([*north, *south, record()], settings=settings)
    figures = {name: of["groups"] for name, of in report["figures"].items()}
    # Only the assistant's message of weight 0.5 counts, and that weight cancels.
    assert figures["perplexity"]["north"]["value"] == pytest.approx(math.exp((4 + 12 + 60) / (4 + 6 + 30)))
    assert figures["accuracy"]["north"]["value"] == pytest.approx(20 / 40)
    assert figures["reply_length"]["north"]["value"] == pytest.approx(40 / 5)
    assert figures["flagged_words"]["north"]["value"] == pytest.approx(3 / 5)
    assert figures["precision"]["north"]["value"] == pytest.approx(2 / 3) and figures["precision"]["north"]["n"] == 3
    assert figures["recall"]["north"]["value"] == pytest.approx(2 / 3) and figures["recall"]["north"]["n"] == 3
    assert figures["precision"]["south"]["value"] is None  # no reply there holds a listed word
    assert report["groups"] == {"north": 5, "south": 3}
    assert report["figures"]["perplexity"]["gap"] is None
    assert report["notes"] == [
        "1 of 9 records have no label dialect and are left out.",
        "2 of 9 records have no label rude and count in neither precision nor recall.",
        "Fewer than 10 records, shown and not compared: north, south.",
    ]


def test_replies_that_were_cut_off_are_told_of() -> None:
    report = group_report([{**record(dialect="north"), "finish_reason": "length"}, record(dialect="south")], settings=BY_DIALECT)
    assert "1 of 2 replies were cut off at the most tokens a reply may have, so lengths are too short." in report["notes"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group": "dialekt"}, "no conversation has the label 'dialekt'; did you mean dialect?"),
        ({"group": "dialect", "flag": "nice"}, "no conversation has the label 'nice'"),
        ({"group": "number"}, "fairness.group 'number' has 60 values"),
        ({"flag": "rude"}, "fairness.flag 'rude' is only told by group"),
        ({"groups": "dialect"}, "fairness.groups is no setting; did you mean group?"),
        ({"group": 3}, "fairness.group takes text, not 3"),
        ({"group": "dialect", "words": "/no/such/file"}, "fairness.words /no/such/file cannot be read"),
    ],
)
def test_settings_that_cannot_be_used(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        group_report([record(dialect="north", number=str(i)) for i in range(60)], settings=FairnessSettings.of(settings))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_flag_is_yes_or_no() -> None:
    with pytest.raises(DataError, match="a:1: the label rude is 'perhaps', neither yes nor no"):
        group_report([record(dialect="north", rude="perhaps")], settings=FairnessSettings(group="dialect", flag="rude"))


def test_an_audit_counts_by_hand(tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("lazy\nbone idle\n懒惰\nnever said\n", encoding="utf-8")
    chats = [
        chat("My boss is a woman, a lazy, LAZY woman.", "No, not lazy."),
        chat("This man is bone  idle.", "他不懒惰。"),
        Conversation((Message("user", "Hi."), Message("assistant", "Women and mankind are no terms; the man is."))),
    ]
    labelled = [Conversation(c.messages, labels={"dialect": name} if name else {}) for c, name in zip(chats, ("n", "s", ""), strict=True)]
    report = audit(iter(labelled), settings=FairnessSettings(group="dialect", words=str(words)))
    assert (report["conversations"], report["without_label"], report["n_words"]) == (3, 1, 4)
    assert report["groups"]["n"] == {"conversations": 1, "messages": 2, "characters": 39 + 13, "flagged": 2}
    assert report["roles"]["user"]["conversations"] == 3 and report["roles"]["user"]["flagged"] == 2
    lazy = {"occurrences": 3, "messages": 2, "roles": {"user": 1, "assistant": 1}, "groups": {"n": 2}}
    assert report["words"] == {
        "lazy": lazy,
        "bone idle": {"occurrences": 1, "messages": 1, "roles": {"user": 1}, "groups": {"s": 1}},
        "懒惰": {"occurrences": 1, "messages": 1, "roles": {"assistant": 1}, "groups": {"s": 1}},
    }
    man = {"occurrences": 2, "messages": 2, "flagged": 1, "roles": {"user": 1, "assistant": 1}, "groups": {"s": 1}}
    assert report["terms"]["man"] == {"axis": "gender", **man}
    assert report["terms"]["woman"]["occurrences"] == 2 and report["terms"]["woman"]["flagged"] == 1
    json.dumps(report)


def test_terms_are_found_however_they_are_written(tmp_path: Path) -> None:
    """Guards against a KeyError where a term in the file is decomposed, or has spaces around it."""
    template = {"messages": [{"role": "user", "content": "{term}"}], "axis": "job", "terms": {"a": " caf\u0065\u0301tier ", "b": "Cook"}}
    (tmp_path / "mine.jsonl").write_text(json.dumps(template), encoding="utf-8")
    settings = FairnessSettings(counterfactual=str(tmp_path / "mine.jsonl"))
    report = audit([chat("a caf\u00e9tier, a COOK")], settings=settings)
    assert {term: of["axis"] for term, of in report["terms"].items()} == {"caf\u00e9tier": "job", "Cook": "job"}


def test_an_audit_needs_the_label_and_no_terms() -> None:
    assert audit([chat("a", "b")], settings=BY_DIALECT)["without_label"] == 1
    with pytest.raises(ConfigError, match="fairness.group 'number' has 51 values or more"):
        audit([Conversation(chat("a").messages, labels={"number": str(i)}) for i in range(60)], settings=FairnessSettings(group="number"))
    report = audit([chat("a man", "b")], settings=FairnessSettings(counterfactual=None))
    assert (report["groups"], report["terms"], report["n_terms"], report["without_label"]) == ({}, {}, 0, 0)


def page(**report: Any) -> str:
    text = '{% import "evaluation/fairness.html.jinja" as fairness %}{{ fairness.section(report) }}'
    return environment().from_string(text).render(report={"limits": LIMITS, **report})


def test_the_page_tells_gaps_and_limits_and_escapes_the_data() -> None:
    hostile = "<script>alert(1)</script>"
    groups = group_report([*records({hostile: 2.0, "south": 3.0}), record(dialect="few")], settings=BY_DIALECT)
    told = audit([Conversation(chat("You are lazy, man.", "No.").messages, labels={"dialect": hostile})], settings=BY_DIALECT)
    html = page(groups=groups, audit=told, counterfactual=None)
    assert hostile not in html and "&lt;script&gt;" in html
    assert html.count("<strong>found</strong>") == 1 and html.count("<td>not shown</td>") == 3
    assert all(line.split("(")[0][:40] in html for line in LIMITS)
    assert html.count("<table>") == html.count("</table>") == html.count('class="scroll"')
    assert f"{groups['figures']['perplexity']['groups']['south']['value']:.2f}" in html
