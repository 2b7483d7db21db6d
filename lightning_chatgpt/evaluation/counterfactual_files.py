"""Counterfactuals on disk: templates with terms of our own format, and the files of StereoSet, CrowS-Pairs and BOLD.

Our own format is JSON Lines. A line with ``messages`` is a template, ``{term}`` standing where terms are swapped; a line with
``terms`` alone is a set of terms for every template of its language::

    {"language": "en", "messages": [{"role": "user", "content": "My friend is {term}."}, {"role": "assistant", "content": "How nice."}]}
    {"axis": "age", "language": "en", "terms": {"young": "young", "old": "old"}}

A template with ``axis`` and ``terms`` of its own takes no others. A term may fill several places of its own name:
``{"woman": {"term": "a woman", "they": "she"}, …}``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lightning_chatgpt.chat.conversation import Conversation, Message
from lightning_chatgpt.chat.faults import Faults
from lightning_chatgpt.data.readers import read_records, read_text
from lightning_chatgpt.data.sources import find_files
from lightning_chatgpt.errors import DataError, nearest
from lightning_chatgpt.evaluation.words import BUILTIN

OPENING = "Tell me something."  # what whole sentences, as of CrowS-Pairs, are said to as the assistant's answer

_FILE = Path(__file__).with_name("counterfactuals.jsonl")
_SUFFIXES = (".jsonl", ".json", ".csv")
_SLOT = re.compile(r"\{([A-Za-z_]\w*)\}")
_KEYS = ("id", "axis", "language", "messages", "terms")
_ARTICLE = re.compile(r"(?:an?|the)\s+", re.IGNORECASE)

Terms = Mapping[str, Mapping[str, str]]  # names of groups, and what each puts into which place


@dataclass(frozen=True, slots=True)
class Counterfactual:
    """One text in several variants that differ in who it is about.

    Args:
        id: Names the template; what comes of one template is drawn together.
        axis: What variants differ in, such as gender.
        variants: For each group the conversation. With one alone, as in BOLD, it is a prompt of that group, with no counterpart.
        language: The template's, where it says so; languages are not mixed.
        terms: What was swapped, without an English article; empty where a file does not say.
    """

    id: str
    axis: str
    variants: Mapping[str, Conversation]
    language: str = ""
    terms: Mapping[str, str] = field(default_factory=dict)


def read_counterfactuals(name: str = BUILTIN) -> list[Counterfactual]:
    """Read ``fairness.counterfactual``.

    Args:
        name: ``builtin``, or a file, folder or glob of them: ours (``.jsonl``), StereoSet's ``dev.json``, CrowS-Pairs' ``.csv``, or
            BOLD's prompts (``.json``); told apart by what is in them.

    Raises:
        DataError: There is no such file, or one cannot be used.
    """
    found: list[Counterfactual] = []
    for path in [_FILE] if name == BUILTIN else find_files(name, suffixes=_SUFFIXES):
        if path.suffix.lower() == ".csv":
            found += _read_crows(path)
        elif path.suffix.lower() == ".json":
            found += _read_json(path)
        elif path.suffix.lower() == ".jsonl":
            found += _read_own(path)
        else:
            raise DataError(f"{path}: counterfactuals are read from {', '.join(_SUFFIXES)}; give one of these")
    if not found:
        raise DataError(f"{name}: there is nothing in it; docs/fairness.md tells the formats")
    return found


# Ours.


def _read_own(path: Path) -> Iterator[Counterfactual]:
    templates: list[tuple[str, Mapping[str, Any]]] = []
    sets: dict[str, list[tuple[str, str, Terms]]] = {}  # by language: place, axis, terms
    for place, record in read_records(path, faults=Faults()):
        _check_keys(record, place)
        if "messages" in record:
            templates.append((place, record))
        else:
            sets.setdefault(record.get("language", ""), []).append((place, _axis(record, place), _terms(record, place)))
    used = {record.get("language", "") for _, record in templates if "terms" not in record}
    for language in sets.keys() - used:
        raise DataError(f"{sets[language][0][0]}: no template takes these terms (language {language!r}); give both the same language")
    for place, record in templates:
        language = record.get("language", "")
        own = "terms" in record
        taken = [(place, _axis(record, place), _terms(record, place))] if own else sets.get(language, [])
        if not taken:
            raise DataError(f"{place}: there are no terms for this template (language {language!r}); give it terms, or add a line of them")
        template = _template(record, place)
        for _, axis, terms in taken:
            variants = {name: _fill(template, slots, place) for name, slots in terms.items()}
            texts = {name: _ARTICLE.sub("", slots["term"], count=1) for name, slots in terms.items() if "term" in slots}
            yield Counterfactual(template.id, axis, variants, language, texts)


def _check_keys(record: Any, place: str) -> None:
    if not isinstance(record, Mapping) or not ("messages" in record or "terms" in record):
        raise DataError(f"{place}: neither a template nor terms; give it messages, or axis and terms")
    for key, value in record.items():
        if key not in _KEYS:
            raise DataError(f"{place}: {key!r} is no key here; {nearest(str(key), _KEYS)}")
        if key in ("id", "axis", "language") and not isinstance(value, str):
            raise DataError(f"{place}: {key} must be text, not {value!r}")


def _axis(record: Mapping[str, Any], place: str) -> str:
    if not record.get("axis"):
        raise DataError(f"{place}: terms need an axis, what they differ in; give axis, such as gender")
    return str(record["axis"])


def _terms(record: Mapping[str, Any], place: str) -> Terms:
    terms = record["terms"]
    if not isinstance(terms, Mapping) or len(terms) < 2:
        raise DataError(f"{place}: terms must be at least two names and what each puts in, not {terms!r}")
    filled = {name: {"term": value} if isinstance(value, str) else value for name, value in terms.items()}
    for name, slots in filled.items():
        if not isinstance(slots, Mapping) or not slots or not all(isinstance(text, str) for text in slots.values()):
            raise DataError(f"{place}: the term {name!r} must be text, or places and their texts, not {slots!r}")
    return filled


def _template(record: Mapping[str, Any], place: str) -> Conversation:
    messages = record["messages"]
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise DataError(f"{place}: messages must be a list of role and content, not {messages!r}")
    try:
        template = Conversation(
            tuple(Message(message.get("role"), message.get("content")) for message in messages), id=record.get("id", place)
        )
    except DataError as error:
        raise DataError(f"{place}: {error}") from None
    if not template.messages[-1].content.strip():
        raise DataError(f"{place}: the last message says nothing, and it is what is scored; write it")
    if not any(_SLOT.search(message.content) for message in template.messages):
        raise DataError(f"{place}: no message has a place for terms; write {{term}} where they go")
    return template


def _fill(template: Conversation, slots: Mapping[str, str], place: str) -> Conversation:
    def text_of(match: re.Match[str]) -> str:
        if match[1] not in slots:
            raise DataError(f"{place}: nothing fills {match[0]}; {nearest(match[1], slots)}, or give every term a {match[1]!r}")
        return slots[match[1]]

    return replace(template, messages=tuple(replace(m, content=_SLOT.sub(text_of, m.content)) for m in template.messages))


# Others'.


def _read_crows(path: Path) -> Iterator[Counterfactual]:
    columns = ("sent_more", "sent_less", "stereo_antistereo", "bias_type")
    for number, (place, record) in enumerate(read_records(path, faults=Faults(), columns=columns), 1):
        if missing := [column for column in columns if not str(record.get(column, "")).strip()]:
            raise DataError(f"{place}: {missing[0]} is missing; a file of CrowS-Pairs has the columns {', '.join(columns)}")
        # Whichever group stereo_antistereo says it is about, sent_more is the more stereotyping one.
        variants = {"stereotype": _said(record["sent_more"], OPENING), "anti-stereotype": _said(record["sent_less"], OPENING)}
        yield Counterfactual(f"{path.name}:{number}", record["bias_type"], variants)


def _read_json(path: Path) -> Iterator[Counterfactual]:
    try:
        value = json.loads(read_text(path, faults=Faults()))
    except ValueError as error:
        raise DataError(f"{path}: broken JSON ({error}); get the file anew") from None
    data = value.get("data") if isinstance(value, Mapping) else None
    try:
        if isinstance(data, Mapping) and data.keys() & {"intersentence", "intrasentence"}:
            yield from _read_stereoset(data)
        else:
            yield from _read_bold(value, axis=re.sub(r"_(prompts?|wiki\w*)$", "", path.stem))
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except (AttributeError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: neither StereoSet nor BOLD ({type(error).__name__}: {error}); StereoSet holds data with intersentence and "
            "intrasentence, BOLD groups, names and prompts"
        ) from None


def _read_stereoset(data: Mapping[str, Any]) -> Iterator[Counterfactual]:
    for kind in ("intersentence", "intrasentence"):
        for item in data.get(kind, ()):
            prompt = item["context"] if kind == "intersentence" else OPENING  # of the other, sentences are whole
            said = {sentence["gold_label"]: _said(sentence["sentence"], prompt) for sentence in item["sentences"]}
            variants = {name: said[name] for name in ("stereotype", "anti-stereotype")}
            yield Counterfactual(item["id"], item["bias_type"], variants)


def _read_bold(value: Any, *, axis: str) -> Iterator[Counterfactual]:
    for group, names in value.items():
        for name, prompts in names.items():
            if not isinstance(prompts, list):
                raise TypeError(f"{name} is no list of prompts")
            for number, prompt in enumerate(prompts, 1):
                yield Counterfactual(f"{name}:{number}", axis, {group: Conversation((Message("user", prompt),))})


def _said(sentence: str, prompt: str) -> Conversation:
    return Conversation((Message("user", prompt), Message("assistant", sentence)))
