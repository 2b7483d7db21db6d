"""The cache: each file is built once, whole or not at all, and found again exactly as long as nothing that matters changed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from lightning_chatgpt import ChatDataModule
from lightning_chatgpt.chat.conversation import Conversation
from lightning_chatgpt.chat.tokenizer import train_tokenizer
from lightning_chatgpt.data.cache import ENVIRONMENT_VARIABLE, build_once, cache_folder, key_of
from lightning_chatgpt.errors import DataError
from tests.conftest import chat

ROOT = Path(__file__).parents[2]

BUILDER = """
import sys, time
from pathlib import Path
from lightning_chatgpt.data.cache import build_once

place, log, marker = map(Path, sys.argv[1:])

def build(path):
    with log.open("a") as file:
        file.write("building\\n")
    path.write_text("half")
    marker.touch()
    time.sleep(float(sys.stdin.readline()))
    path.write_text("whole")

marker.with_suffix(".ready").touch()
print(build_once(place, build).read_text())
"""


def builder(folder: Path, name: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BUILDER, str(folder / "deep" / "a.arrow"), str(folder / "log"), str(folder / name)]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def wait_for(path: Path) -> None:
    for _ in range(6000):
        if path.exists():
            return
        time.sleep(0.01)
    raise AssertionError(f"{path} never came")


def test_two_processes_build_once(tmp_path: Path) -> None:
    first, second = builder(tmp_path, "first"), builder(tmp_path, "second")
    try:
        assert first.stdin is not None and second.stdin is not None
        for name in ("first", "second"):
            wait_for(tmp_path / f"{name}.ready")
        for process in (first, second):
            process.stdin.write("1\n")  # the one that builds takes its time; the other meets its lock
            process.stdin.flush()
        outputs = [process.communicate(timeout=60)[0] for process in (first, second)]
    finally:
        first.kill()
        second.kill()
    assert outputs == ["whole\n", "whole\n"]
    assert (tmp_path / "log").read_text() == "building\n"


def test_a_killed_build_leaves_nothing_that_is_taken_for_it(tmp_path: Path) -> None:
    process = builder(tmp_path, "marker")
    try:
        assert process.stdin is not None
        process.stdin.write("60\n")
        process.stdin.flush()
        wait_for(tmp_path / "marker")
        place = tmp_path / "deep" / "a.arrow"
        assert not place.exists()
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=60) == -signal.SIGKILL
    finally:
        process.kill()
        process.communicate()
    assert not place.exists()
    assert [path.read_text() for path in (tmp_path / "deep").glob("*.unfinished")] == ["half"]
    # Whoever comes next is not kept waiting by a dead process's lock.
    assert build_once(place, lambda path: path.write_text("whole") and None).read_text() == "whole"
    assert not list((tmp_path / "deep").glob("*.unfinished"))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_build_that_fails_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def fail(path: Path) -> None:
        path.write_text("half")
        raise error

    place = tmp_path / "a.arrow"
    with pytest.raises(error):
        build_once(place, fail)
    assert not list(tmp_path.glob("*.arrow")) and not list(tmp_path.glob("*.unfinished"))
    built: list[Path] = []
    for _ in range(2):
        build_once(place, lambda path: (built.append(path), path.write_text("whole")) and None)
    assert place.read_text() == "whole"
    assert len(built) == 1 and built[0] != place


def test_keys_tell_everything_apart_that_differs() -> None:
    assert key_of("a", {"x": 1, "y": 2}) == key_of("a", {"y": 2, "x": 1})
    parts = [("a",), ("b",), ("a", ""), ("a", None), (["a"],), ("a", 1), ("a", "1"), ("a", 1.5), ("a", True), ({"a": 1},), ("\ud800",)]
    assert len({key_of(*part) for part in parts}) == len(parts)
    assert Path(key_of("a")).name == key_of("a")


def test_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "/elsewhere")
    assert cache_folder("~/mine") == tmp_path / "mine"
    assert cache_folder(None) == Path("/elsewhere")
    monkeypatch.delenv(ENVIRONMENT_VARIABLE)
    assert cache_folder(None) == tmp_path / ".cache" / "lightning_chatgpt"


# What makes ChatDataModule read or encode again.

CHATS = [chat(f"question {i} " + "word " * (i % 9), f"answer {i} " + "thing " * (i % 7)) for i in range(40)]


class Prepared:
    """Sets data modules up in one cache folder; says how many files of items and of tokens each made."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        self.folder = folder
        self.tokenizer = tokenizer
        self.source = folder / "chats.jsonl"
        self.cache = folder / "cache"
        self.write(CHATS)

    def write(self, chats: list[Conversation]) -> None:
        self.source.write_text("".join(json.dumps(c.to_dict()) + "\n" for c in chats), encoding="utf-8")

    def files(self) -> set[str]:
        return {path.name for path in self.cache.iterdir() if path.suffix == ".arrow"} if self.cache.exists() else set()

    def __call__(self, cls: type[ChatDataModule] = ChatDataModule, **settings: Any) -> tuple[int, int]:
        before = self.files()
        tokenizer = settings.pop("_tokenizer", self.tokenizer)
        self.module = cls(
            **{"train": str(self.source), "validation": 0.2, "max_length": 32, "max_leak": None, "cache_dir": str(self.cache), **settings}
        )
        self.module.tokenizer = tokenizer
        self.module.setup("fit")
        list(self.module.train_dataloader())
        new = self.files() - before
        return sum(name.endswith(".items.arrow") for name in new), sum(name.endswith(".tokens.arrow") for name in new)


@pytest.fixture
def prepared(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Prepared:
    found = Prepared(tmp_path, tokenizer)
    assert found() == (1, 2)  # tokens of train and of validation
    assert found() == (0, 0)
    return found


UNTOUCHED: list[dict[str, Any]] = [
    {"batch_size": 3},
    {"mixture": {"temperature": 2.0}},
    {"mixture": {"weights": {"{source}": 2}}},
    {"mixture": {"epochs": {"{source}": 0.5}, "unit": "tokens"}},
    {"seed": 9},
    {"num_workers": 1},
    {"packing": True},
    {"group_by_length": True},
    {"max_new_tokens": 3},
    {"test": 0.0},
    {"vocab_size": 999},
]


@pytest.mark.parametrize("settings", UNTOUCHED, ids=str)
def test_what_encodes_nothing_again(prepared: Prepared, settings: dict[str, Any]) -> None:
    source = str(prepared.source)
    for name in ("weights", "epochs"):
        if name in settings.get("mixture", {}):
            settings = {"mixture": {**settings["mixture"], name: {source: settings["mixture"][name]["{source}"]}}}
    assert prepared(**settings) == (0, 0)


@pytest.mark.parametrize(
    ("settings", "made"),
    [
        ({"max_length": 33}, (0, 2)),
        ({"truncation": "split"}, (0, 2)),
        ({"supervise": "all"}, (0, 2)),
        ({"supervise": "last"}, (0, 2)),
        ({"augmentation": {"mask": 0.5}}, (0, 1)),  # only training chats are augmented
        ({"validation": 0.3}, (0, 2)),
        ({"cleaning": [{"length": {"min_turns": 1}}]}, (1, 0)),  # read again, but nothing came out otherwise
        ({"cleaning": [{"normalise": {"lowercase": True}}, {"words": {"words": ["5"]}}]}, (1, 2)),
        ({"on_fault": "skip"}, (1, 0)),
        ({"roles": {"agent": "assistant"}}, (1, 0)),
        ({"train": {"source": "{source}", "name": "mine"}}, (1, 0)),
    ],
    ids=str,
)
def test_what_reads_or_encodes_again(prepared: Prepared, settings: dict[str, Any], made: tuple[int, int]) -> None:
    if "train" in settings:
        settings = {"train": {**settings["train"], "source": str(prepared.source)}}
    assert prepared(**settings) == made
    assert prepared(**settings) == (0, 0)
    assert prepared() == (0, 0)  # the old files are there still


def test_the_seed_matters_where_it_augments(prepared: Prepared) -> None:
    assert prepared(augmentation={"mask": 0.5}) == (0, 1)
    assert prepared(augmentation={"mask": 0.5}, seed=9) == (0, 1)
    assert prepared(augmentation={"mask": 0.6}, seed=9) == (0, 1)
    assert prepared(augmentation={"mask": 0.5}) == (0, 0)


def test_another_tokenizer_or_template_encodes_again(prepared: Prepared, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [m.content for c in CHATS for m in c.messages]
    other = train_tokenizer(texts, vocab_size=300)
    assert prepared(_tokenizer=other) == (0, 2)
    plain = train_tokenizer(texts, vocab_size=300, template="plain")
    assert prepared(_tokenizer=plain) == (0, 2)
    # One that is trained anew on the same texts is the same one.
    assert prepared(_tokenizer=train_tokenizer(texts, vocab_size=300)) == (0, 0)
    assert prepared(_tokenizer=None, vocab_size=280) == (0, 2)
    assert prepared(_tokenizer=None, vocab_size=280) == (0, 0)
    assert prepared(_tokenizer=None, vocab_size=280, template="plain") == (0, 2)


def test_one_character_of_the_text_matters(prepared: Prepared) -> None:
    text = prepared.source.read_text()
    assert text.count("question 7 ") == 1
    prepared.source.write_text(text.replace("question 7 ", "question é "))
    made = prepared()
    assert made[0] == 1 and made[1] >= 1
    found = [prepared.tokenizer.decode(dataset.example(i)[0]) for dataset in prepared.module.datasets.values() for i in range(len(dataset))]
    assert sum("question é " in text for text in found) == 1 and not any("question 7 " in text for text in found)
    prepared.source.write_text(text)
    assert prepared() == (0, 0)


def test_a_loss_weight_is_a_difference_though_the_digest_is_the_same(prepared: Prepared) -> None:
    """Guards against stale weights: a conversation's digest is of roles and contents alone."""
    records = [json.loads(line) for line in prepared.source.read_text().splitlines()]
    before = sum(float(dataset.example(i)[1].sum()) for dataset in prepared.module.datasets.values() for i in range(len(dataset)))
    for record in records:
        record["messages"][1]["weight"] = 0.5
    prepared.source.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert prepared() == (1, 2)
    after = sum(float(dataset.example(i)[1].sum()) for dataset in prepared.module.datasets.values() for i in range(len(dataset)))
    assert after == pytest.approx(before / 2)


def test_when_a_file_was_written_does_not_matter(prepared: Prepared) -> None:
    os.utime(prepared.source, (1, 1))
    assert prepared() == (0, 0)
    prepared.source.write_text(prepared.source.read_text())
    assert prepared() == (0, 0)


def test_a_change_that_keeps_size_and_time_is_seen(prepared: Prepared) -> None:
    stat = prepared.source.stat()
    text = prepared.source.read_text()
    prepared.source.write_text(text.replace("answer 3 ", "answer X "))
    os.utime(prepared.source, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert prepared.source.stat().st_size == stat.st_size
    assert prepared()[0] == 1


def test_what_was_left_unfinished_is_built_anew(prepared: Prepared, tmp_path: Path) -> None:
    (name,) = (name for name in prepared.files() if name.endswith(".items.arrow"))
    whole = (prepared.cache / name).read_bytes()
    (prepared.cache / name).unlink()
    (prepared.cache / f"{name}.unfinished").write_bytes(whole[:100])
    assert prepared() == (1, 0)
    assert (prepared.cache / name).read_bytes() == whole
    assert not list(prepared.cache.glob("*.unfinished"))


def test_a_source_that_fails_midway_leaves_no_file(prepared: Prepared) -> None:
    before = prepared.files()
    with prepared.source.open("a") as file:
        file.write("{broken\n")
    with pytest.raises(DataError, match="chats.jsonl:41: broken JSON"):
        prepared()
    assert prepared.files() == before
    assert not list(prepared.cache.glob("*.unfinished"))


class Own(ChatDataModule):
    """A subclass that reads in its own way."""

    n_read = 0
    greeting = "Hello"

    def read(self, source: Any) -> Any:
        type(self).n_read += 1
        for i in range(10):
            yield chat(f"{self.greeting} {i}", f"reply {i}")


def test_a_subclass_is_always_read_again_but_encoded_once(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its code reads may change without a sign."""
    monkeypatch.setattr(Own, "n_read", 0)
    assert prepared(Own, train="anything") == (1, 2)
    assert prepared(Own, train="anything") == (0, 0)
    assert Own.n_read == 2
    monkeypatch.setattr(Own, "greeting", "Good day")
    made = prepared(Own, train="anything")
    assert made[0] == 1 and made[1] >= 1
    assert Own.n_read == 3


class Encodes(ChatDataModule):
    """A subclass that encodes in its own way: every loss weight is 2."""

    def encode(self, items: Any, *, counts: Any, part: str) -> Any:
        for examples in super().encode(items, counts=counts, part=part):
            yield [example._replace(loss_weights=[2.0 * bool(w) for w in example.loss_weights]) for example in examples]


class Labels(ChatDataModule):
    """A subclass that stores in its own way."""

    def labels(self, item: Conversation) -> dict[str, str]:
        return {"length": str(len(item.messages[0].content))}


def test_a_subclass_does_not_find_what_others_encoded(prepared: Prepared) -> None:
    assert prepared(Encodes) == (0, 2)
    dataset = prepared.module.datasets["train"]
    assert {float(w) for i in range(len(dataset)) for w in dataset.example(i)[1]} == {0.0, 2.0}
    assert prepared(Encodes) == (0, 0)
    assert prepared(Labels)[0] == 1
    assert prepared() == (0, 0)


def test_a_file_that_a_cleaning_step_names_matters(prepared: Prepared, tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("nothing\n")
    cleaning: list[Any] = [{"words": {"file": str(words)}}]
    assert prepared(cleaning=cleaning) == (1, 0)
    assert prepared(cleaning=cleaning) == (0, 0)
    words.write_text("answer\n")
    with pytest.raises(ValueError, match="nothing to read in there"):
        prepared(cleaning=cleaning)
    words.write_text("thing\n")
    assert prepared(cleaning=cleaning) == (1, 2)


def test_folders_and_globs_are_known_by_content(prepared: Prepared, tmp_path: Path, write_chats: Callable[..., Path]) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(prepared.source.read_bytes())
    for source in (str(folder), str(folder / "*.jsonl")):
        assert prepared(train=source)[0] == 1
        assert prepared(train=source) == (0, 0)
    (folder / "b.jsonl").write_text(json.dumps(chat("new", "one").to_dict()) + "\n")
    for source in (str(folder), str(folder / "*.jsonl")):
        assert prepared(train=source)[0] == 1
        assert len(np.concatenate([d.lengths for d in prepared.module.datasets.values()])) == 41
