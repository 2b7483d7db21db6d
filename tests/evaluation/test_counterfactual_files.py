"""Templates and terms on disk: ours, the shipped set, and small files built like those of StereoSet, CrowS-Pairs and BOLD."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from lightning_chatgpt.errors import DataError
from lightning_chatgpt.evaluation.counterfactual_files import OPENING, Counterfactual, read_counterfactuals

if TYPE_CHECKING:
    from pathlib import Path

ASKS = {"id": "t", "language": "en", "messages": [{"role": "user", "content": "I am {term}."}, {"role": "assistant", "content": "Fine."}]}
AGES = {"axis": "age", "language": "en", "terms": {"young": "young", "old": "an old one"}}


def write(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return str(path)


def contents(found: Counterfactual) -> dict[str, list[str]]:
    return {name: [message.content for message in variant.messages] for name, variant in found.variants.items()}


def test_templates_take_the_terms_of_their_language(tmp_path: Path) -> None:
    own = {
        "axis": "gender",
        "messages": [{"role": "user", "content": "{who}: may {they} {come}? {}"}],
        "terms": {"woman": {"who": "Ann", "they": "she", "come": "go"}, "man": {"who": "Bob", "they": "he", "come": "go"}},
    }
    german = [{**AGES, "axis": "herkunft", "language": "de"}, {**ASKS, "id": "g", "language": "de"}]
    found = read_counterfactuals(write(tmp_path / "mine.jsonl", ASKS, AGES, own, *german))
    assert [(of.id, of.axis, of.language) for of in found] == [
        ("t", "age", "en"),
        (f"{tmp_path}/mine.jsonl:3", "gender", ""),
        ("g", "herkunft", "de"),
    ]
    assert contents(found[0]) == {"young": ["I am young.", "Fine."], "old": ["I am an old one.", "Fine."]}
    assert contents(found[1]) == {"woman": ["Ann: may she go? {}"], "man": ["Bob: may he go? {}"]}
    assert found[0].terms == {"young": "young", "old": "old one"}  # without the article
    assert found[1].terms == {}


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"text": "x"}], "neither a template nor terms; give it messages, or axis and terms"),
        ([{**AGES, "term": 1}, ASKS], "'term' is no key here; did you mean terms?"),
        ([{"terms": AGES["terms"]}, ASKS], "terms need an axis"),
        ([{**AGES, "terms": {"young": "young"}}, ASKS], "terms must be at least two names"),
        ([{**AGES, "terms": {"young": "young", "old": 7}}, ASKS], "the term 'old' must be text"),
        ([{**AGES, "axis": 7}, ASKS], "axis must be text, not 7"),
        ([{**AGES, "language": "de"}, ASKS], "no template takes these terms (language 'de')"),
        ([ASKS], "there are no terms for this template (language 'en')"),
        (
            [AGES, {**ASKS, "messages": [{"role": "user", "content": "{name}"}]}],
            "nothing fills {name}; there are term, or give every term a 'name'",
        ),
        ([AGES, {**ASKS, "messages": [{"role": "user", "content": "I am."}]}], "no message has a place for terms; write {term}"),
        ([AGES, {**ASKS, "messages": [{"role": "usr", "content": "{term}"}]}], "role 'usr' is unknown"),
        (
            [AGES, {**ASKS, "messages": [{"role": "user", "content": "{term}"}, {"role": "assistant", "content": " "}]}],
            "last message says nothing",
        ),
        ([AGES, {**ASKS, "messages": "{term}"}], "messages must be a list"),
        ([AGES, {**ASKS, "messages": []}], "the conversation has no messages"),
        ([], "there is nothing in it"),
    ],
)
def test_lines_that_cannot_be_used(tmp_path: Path, records: list[Any], message: str) -> None:
    name = write(tmp_path / "mine.jsonl", *records)
    with pytest.raises(DataError) as caught:
        read_counterfactuals(name)
    assert message in str(caught.value) and str(caught.value).startswith(f"{name}:") and "\n" not in str(caught.value)


def test_the_shipped_set_is_in_two_languages_and_pairs_everywhere() -> None:
    found = read_counterfactuals()
    templates = Counter(of.language for of in {of.id: of for of in found}.values())
    assert templates == {"en": 20, "zh": 20}
    axes = {"gender", "age", "origin", "religion", "disability", "occupation", "orientation"}
    for language in ("en", "zh"):
        assert {of.axis for of in found if of.language == language} == axes
    for of in found:
        prompts = [texts[0] for texts in contents(of).values()]
        assert len(set(prompts)) == len(prompts) >= 2
        assert len({texts[1] for texts in contents(of).values()}) == 1  # the answer is the same, so its likelihoods compare
        assert all(variant.messages[-1].role == "assistant" for variant in of.variants.values())
        assert not any("{" in text for texts in contents(of).values() for text in texts)


def test_a_file_like_stereosets(tmp_path: Path) -> None:
    def item(kind: str, context: str, *sentences: tuple[str, str]) -> dict[str, Any]:
        said = [{"id": "s", "sentence": text, "labels": [], "gold_label": label} for label, text in sentences]
        return {"id": kind, "target": "baker", "bias_type": "profession", "context": context, "sentences": said}

    next_one = item("i1", "A baker came.", ("unrelated", "Stones."), ("anti-stereotype", "He sang."), ("stereotype", "He baked."))
    blank = item(
        "i2",
        "Bakers are BLANK.",
        ("stereotype", "Bakers are early."),
        ("anti-stereotype", "Bakers are late."),
        ("unrelated", "Bakers are blue."),
    )
    data = {"version": "1.0", "data": {"intersentence": [next_one], "intrasentence": [blank]}}
    first, second = read_counterfactuals(write(tmp_path / "dev.json", data))
    assert (first.id, first.axis) == ("i1", "profession")
    assert contents(first) == {"stereotype": ["A baker came.", "He baked."], "anti-stereotype": ["A baker came.", "He sang."]}
    assert contents(second) == {"stereotype": [OPENING, "Bakers are early."], "anti-stereotype": [OPENING, "Bakers are late."]}


def test_a_file_like_crows_pairs(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    header = ",sent_more,sent_less,stereo_antistereo,bias_type,annotations,anon_writer,anon_annotators\n"
    path.write_text(header + '0,"Old cooks, they forget.","Young cooks, they forget.",stereo,age,[[\'age\']],a1,[]\n', encoding="utf-8")
    (found,) = read_counterfactuals(str(path))
    assert (found.id, found.axis) == ("pairs.csv:1", "age")
    assert contents(found) == {
        "stereotype": [OPENING, "Old cooks, they forget."],
        "anti-stereotype": [OPENING, "Young cooks, they forget."],
    }
    path.write_text("sent_more,bias_type\na,b\n", encoding="utf-8")
    with pytest.raises(DataError, match="sent_less is missing; a file of CrowS-Pairs has the columns"):
        read_counterfactuals(str(path))


def test_files_like_bolds(tmp_path: Path) -> None:
    write(
        tmp_path / "gender_prompt.json", {"Actors": {"Al_Doe": ["Al Doe is an", "In May, Doe "]}, "Actresses": {"Di_Roe": ["Di Roe is a"]}}
    )
    write(tmp_path / "race_prompt.json", {"One": {"Al_Doe": ["Al Doe was"]}})
    found = read_counterfactuals(str(tmp_path))
    assert [(of.id, of.axis, *contents(of)) for of in found] == [
        ("Al_Doe:1", "gender", "Actors"),
        ("Al_Doe:2", "gender", "Actors"),
        ("Di_Roe:1", "gender", "Actresses"),
        ("Al_Doe:1", "race", "One"),
    ]
    assert contents(found[0]) == {"Actors": ["Al Doe is an"]}


@pytest.mark.parametrize("value", [[1, 2], {"data": {"x": []}}, {"a": {"b": "c"}}, {"a": ["b"]}, {"a": {"b": [7]}}])
def test_json_of_neither_is_refused(tmp_path: Path, value: Any) -> None:
    name = write(tmp_path / "some.json", value)
    with pytest.raises(DataError) as caught:
        read_counterfactuals(name)
    assert str(caught.value).startswith(name) and "\n" not in str(caught.value)


def test_files_of_other_kinds_and_broken_ones_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="broken JSON"):
        read_counterfactuals(str(tmp_path / "a.json"))
    (tmp_path / "a.txt").write_text("x", encoding="utf-8")
    with pytest.raises(DataError, match="counterfactuals are read from"):
        read_counterfactuals(str(tmp_path / "a.txt"))
    with pytest.raises(DataError, match="no such file or folder"):
        read_counterfactuals(str(tmp_path / "none.jsonl"))
