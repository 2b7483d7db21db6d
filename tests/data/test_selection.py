"""Selection: what is trained on and what is held out; duplicates go, leaks are found."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from lightning_chatgpt import ChatDataModule
from lightning_chatgpt.chat.conversation import Conversation
from lightning_chatgpt.data.duplicates import DuplicateSettings
from lightning_chatgpt.data.selection import Parts, drop_duplicates, find_leaks, split_parts
from lightning_chatgpt.data.splits import position
from lightning_chatgpt.data.tables import ItemRow, ItemTable
from lightning_chatgpt.errors import DataError
from tests.conftest import chat

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau upsilon".split()


def prose(n: int, seed: int) -> str:
    """Words of which no eight in a row come twice."""
    return " ".join(random.Random(seed).choices(WORDS, k=n))


def table(folder: Path, texts: Sequence[str], *, keys: Sequence[str] | None = None, name: str = "a") -> ItemTable:
    rows = [
        ItemRow(text, position(keys[i] if keys else text), hashlib.blake2b(text.encode(), digest_size=16).digest(), {}, len(text))
        for i, text in enumerate(texts)
    ]
    ItemTable.write(folder / f"{name}.arrow", rows, dict)
    return ItemTable(folder / f"{name}.arrow")


def contents(parts: Parts, part: str) -> list[str]:
    return [content for source in parts.get(part, []) for content in source.table.column("content", source.rows)]


def test_several_sources_are_split_as_one(tmp_path: Path) -> None:
    texts = {name: [f"{name} {i}" for i in range(400)] for name in "ab"}
    tables = [(name, table(tmp_path, texts[name], name=name)) for name in "ab"]
    parts = split_parts({"train": tables}, validation=0.1, test=0.2)
    for name in "ab":
        for part, low, high in (("test", 0.0, 0.2), ("validation", 0.2, 0.3), ("train", 0.3, 1.0)):
            (source,) = (source for source in parts[part] if source.name == name)
            assert list(source.table.column("content", source.rows)) == [t for t in texts[name] if low <= position(t) < high]


def test_a_source_of_its_own_is_not_split(tmp_path: Path) -> None:
    tables = {"train": [("t", table(tmp_path, [f"t{i}" for i in range(50)], name="t"))]}
    tables["validation"] = [("v", table(tmp_path, ["v1", "v2"], name="v"))]
    parts = split_parts(tables, validation=0.0, test=0.3)
    assert contents(parts, "validation") == ["v1", "v2"]
    assert len(contents(parts, "train")) + len(contents(parts, "test")) == 50
    assert set(contents(parts, "test")) == {f"t{i}" for i in range(50) if position(f"t{i}") < 0.3}
    assert split_parts({"validation": tables["validation"]}, validation=0.0, test=0.0).keys() == {"validation"}


def records(keys: Iterable[int], *, per_key: int = 3) -> list[dict[str, Any]]:
    return [{**chat(f"question {key} {i}", f"answer {key} {i}").to_dict(), "customer": f"c{key}"} for key in keys for i in range(per_key)]


class Split:
    """Writes records, sets a data module up, and says which questions fell where."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        self.folder = folder
        self.tokenizer = tokenizer

    def write(self, found: Iterable[dict[str, Any] | Conversation], name: str = "chats.jsonl") -> str:
        lines = (json.dumps(one.to_dict() if isinstance(one, Conversation) else one) + "\n" for one in found)
        (self.folder / name).write_text("".join(lines))
        return str(self.folder / name)

    def __call__(self, **settings: Any) -> dict[str, list[str]]:
        self.module = ChatDataModule(**{"max_length": 128, "cache_dir": str(self.folder / "cache"), **settings})
        self.module.tokenizer = self.tokenizer
        parts = self.module.load_parts("fit")
        return {
            part: [Conversation.from_record(json.loads(content)).messages[0].content for content in contents(parts, part)] for part in parts
        }


@pytest.fixture
def split(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Split:
    return Split(tmp_path, tokenizer)


def customers(questions: Iterable[str]) -> set[str]:
    return {question.split()[1] for question in questions}


def test_split_by_keeps_a_group_together(split: Split) -> None:
    source = split.write(records(range(60)))
    parts = split(train=source, validation=0.2, test=0.2, split_by="customer", max_leak=None)
    groups = [customers(parts[part]) for part in ("train", "validation", "test")]
    assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]
    assert sum(map(len, groups)) == 60 and min(map(len, groups)) > 3
    assert sum(map(len, parts.values())) == 180
    # Without it, a customer's chats fall apart: the test above could fail.
    apart = split(train=source, validation=0.2, test=0.2, max_leak=None)
    assert customers(apart["train"]) & customers(apart["validation"])


def test_split_by_looks_into_nested_records_and_says_where_it_finds_nothing(split: Split) -> None:
    nested = [{"of": {"customer": record.pop("customer")}, **record} for record in records(range(30))]
    parts = split(train=split.write(nested), validation=0.2, split_by="of.customer", max_leak=None)
    assert not customers(parts["train"]) & customers(parts["validation"])
    with pytest.raises(
        DataError, match=r"chats.jsonl:1: data.split_by looks for 'customer', which is not there \(found 'of', 'messages'\)"
    ):
        split(train=str(split.folder / "chats.jsonl"), split_by="customer")


def test_more_data_moves_nothing(split: Split) -> None:
    small = split(train=split.write(records(range(50))), validation=0.2, test=0.1, split_by="customer", max_leak=None)
    shuffled = records(range(80))
    random.Random(0).shuffle(shuffled)
    large = split(train=split.write(shuffled), validation=0.2, test=0.1, split_by="customer", max_leak=None)
    for part in ("train", "validation", "test"):
        assert set(small[part]) <= set(large[part])
        assert len(large[part]) > len(small[part])


TWICE = [chat(prose(20, i), "fine") for i in range(30)]


def test_exact_duplicates_stay_in_what_is_held_out(split: Split) -> None:
    held_out = split.write([*TWICE[:5], TWICE[0]], "held_out.jsonl")
    train = split.write([*TWICE, *TWICE[10:13]], "train.jsonl")
    parts = split(train=train, validation=held_out, cleaning=["duplicates"])
    assert parts["validation"] == [c.messages[0].content for c in TWICE[:5]]
    assert parts["train"] == [c.messages[0].content for c in TWICE[5:]]
    assert split.module.report["duplicates"] == {"validation": {"exact": 1, "near": 0}, "train": {"exact": 8, "near": 0}}
    assert split.module.report["parts"] == {"train": {"items": 25}, "validation": {"items": 5}}
    assert split.module.report["leaks"]["validation"]["share"] == 0
    # Other case or another answer is no exact duplicate.
    other = split.write([chat(TWICE[0].messages[0].content.upper(), "fine"), chat(TWICE[1].messages[0].content, "fine!")], "other.jsonl")
    assert len(split(train=other, validation=held_out, cleaning=["duplicates"], max_leak=None)["train"]) == 2


def test_test_comes_before_validation(split: Split) -> None:
    names = {part: split.write(TWICE[:n], f"{part}.jsonl") for part, n in (("train", 20), ("validation", 9), ("test", 4))}
    parts = split(**names, cleaning=["duplicates"])
    assert {part: len(found) for part, found in parts.items()} == {"train": 11, "validation": 5, "test": 4}
    assert split.module.report["duplicates"] == {
        "test": {"exact": 0, "near": 0},
        "validation": {"exact": 4, "near": 0},
        "train": {"exact": 9, "near": 0},
    }


def test_near_duplicates_go_too(split: Split) -> None:
    text = prose(60, 1)
    held_out = split.write([chat(text, "fine")], "held_out.jsonl")
    near = chat(f"{text.title()}!! indeed", "fine")  # case and punctuation do not matter, one word does a little
    train = split.write([near, chat(text, "fine"), *TWICE[:3], chat(prose(60, 2), "fine")], "train.jsonl")
    exact = split(train=train, validation=held_out, cleaning=["duplicates"], max_leak=None)
    assert len(exact["train"]) == 5
    parts = split(train=train, validation=held_out, cleaning=[{"duplicates": {"near": True}}])
    assert parts["train"] == [*(c.messages[0].content for c in TWICE[:3]), prose(60, 2)]
    assert split.module.report["duplicates"] == {"validation": {"exact": 0, "near": 0}, "train": {"exact": 1, "near": 1}}
    strict = split(train=train, validation=held_out, cleaning=[{"duplicates": {"near": True, "threshold": 0.99}}], max_leak=None)
    assert len(strict["train"]) == 5


def test_near_duplicates_are_counted_over_all_sources(tmp_path: Path) -> None:
    texts = [prose(40, seed) for seed in range(6)]
    sources = [(name, table(tmp_path, [f"{text} {name}" for text in texts[i : i + 4]], name=name)) for i, name in enumerate("abc")]
    parts = split_parts({"train": sources}, validation=0.0, test=0.0)
    kept, counts = drop_duplicates(parts, DuplicateSettings(near=True), texts=lambda content: [content])
    assert counts == {"train": {"exact": 0, "near": 6}}
    assert [len(source.rows) for source in kept["train"]] == [4, 1, 1]
    assert contents(kept, "train") == [*(f"{text} a" for text in texts[:4]), f"{texts[4]} b", f"{texts[5]} c"]


# Leaks.


def leaks(folder: Path, train: list[str], held_out: list[str]) -> dict[str, Any]:
    sources = {"train": [("t", table(folder, train, name="t"))], "validation": [("v", table(folder, held_out, name="v"))]}
    return find_leaks(split_parts(sources, validation=0.0, test=0.0), texts=lambda content: [content])["validation"]


def test_leaks_are_counted_by_how_much_they_overlap(tmp_path: Path) -> None:
    long = prose(60, 1)
    words = long.split()
    half = " ".join(words[:40])  # 28 of the 48 n-grams of 13 words
    bit = " ".join(words[:20])  # 8 of 48
    cases = {
        "exact": ([long], (1, 1, 1)),
        "in other case": ([long.upper()], (0, 1, 1)),
        "within a longer text": ([f"{prose(9, 7)} {long} {prose(9, 8)}"], (0, 1, 1)),
        "half": ([half], (0, 1, 1)),
        "bit": ([bit], (0, 0, 1)),
        "too short a bit": ([" ".join(words[:12])], (0, 0, 0)),
        "nothing": ([prose(60, 2)], (0, 0, 0)),
        "halves of two": ([" ".join(words[:30]), " ".join(words[28:])], (0, 1, 1)),
    }
    for name, (train, expected) in cases.items():
        found = leaks(tmp_path, train, [long, prose(60, 9)])
        assert (found["exact"], found["overlapping"], found["any"]) == expected, name
        assert found["n"] == 2
        assert found["share"] == expected[1] / 2


def test_short_texts_leak_as_a_whole_only(tmp_path: Path) -> None:
    assert leaks(tmp_path, ["so how are you today then", "Hello THERE!"], ["how are you", "hello there"])["overlapping"] == 1
    assert leaks(tmp_path, ["well " + " ".join(WORDS[:9])], [" ".join(WORDS[:9])])["overlapping"] == 1  # n-grams of 8


def test_leaks_above_the_threshold_are_refused(split: Split) -> None:
    train = split.write(TWICE[:20], "train.jsonl")
    held_out = split.write([*TWICE[:2], chat(TWICE[2].messages[0].content.upper(), "Fine"), *TWICE[20:30]], "held_out.jsonl")
    with pytest.raises(DataError) as error:
        split(train=train, validation=held_out)
    assert str(error.value) == (
        "data.validation: 3 of 13 items (23%) stand in data.train too, 2 of them word for word; "
        "set data.split_by, clean duplicates, or raise data.max_leak (0.1)"
    )
    # The threshold itself is allowed; what is no error is in the report all the same.
    assert len(split(train=train, validation=held_out, max_leak=3 / 13)["validation"]) == 13
    assert split.module.report["leaks"] == {"validation": {"n": 13, "exact": 2, "overlapping": 3, "any": 3, "share": 3 / 13}}
    with pytest.raises(DataError, match="raise data.max_leak \\(0.23\\)"):
        split(train=train, validation=held_out, max_leak=0.23)
    assert len(split(train=train, validation=held_out, max_leak=None)["validation"]) == 13
    assert "leaks" not in split.module.report
    with pytest.raises(DataError, match=r"data.test: 3 of 13 items"):
        split(train=train, validation=None, test=held_out)


def test_system_messages_are_no_leak(split: Split) -> None:
    """Many chats share one system message of many words."""
    system = prose(100, 77)
    train = split.write([chat(prose(20, i), "ok", system=system) for i in range(10)], "train.jsonl")
    held_out = split.write([chat(prose(20, i), "ok", system=system) for i in range(10, 15)], "held_out.jsonl")
    split(train=train, validation=held_out)
    assert split.module.report["leaks"]["validation"]["any"] == 0


def test_leaks_within_one_source_are_found_too(split: Split) -> None:
    """A fraction is held out of chats of which each stands there twice, under ids that split them apart."""
    found = [{**c.to_dict(), "id": f"{c.messages[0].content[:9]} {i} {n}"} for i, c in enumerate(TWICE) for n in range(2)]
    with pytest.raises(DataError, match="stand in data.train too, [1-9][0-9]* of them word for word"):
        split(train=split.write(found), validation=0.3)
    parts = split(train=split.write(found), validation=0.3, cleaning=["duplicates"])
    assert sum(map(len, parts.values())) == 30
    # By content, as without ids, repetitions never fall apart.
    split(train=split.write([*TWICE, *TWICE]), validation=0.3)
    assert split.module.report["leaks"]["validation"]["exact"] == 0


def test_rows_of_a_part_are_ascending(tmp_path: Path) -> None:
    """Tables are read in order, so that nothing is kept in memory."""
    parts = split_parts({"train": [("a", table(tmp_path, [f"x {i}" for i in range(3000)]))]}, validation=0.3, test=0.3)
    for part in parts.values():
        assert (np.diff(part[0].rows) > 0).all()


def test_setup_refuses_what_leaks_before_it_encodes(split: Split, write_chats: Callable[..., Path]) -> None:
    source = str(write_chats(TWICE[:5]))
    module = ChatDataModule(train=source, validation=source, max_length=64, cache_dir=str(split.folder / "other"))
    module.tokenizer = split.tokenizer
    with pytest.raises(DataError, match="5 of 5 items \\(100%\\) stand in data.train too, 5 of them word for word"):
        module.setup("fit")
    assert not list((split.folder / "other").glob("*.tokens.arrow"))
    module.is_strict = False
    module.setup("fit")
    assert len(module.datasets["validation"]) == 5
