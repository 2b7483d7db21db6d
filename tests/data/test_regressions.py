"""What went wrong once in the data room, each with its guard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from lightning_chatgpt import ChatDataModule, TextDataModule
from lightning_chatgpt.data.mixture import Draws, Mixture
from lightning_chatgpt.data.report import describe
from lightning_chatgpt.data.sampler import EpochSampler
from lightning_chatgpt.data.splits import position
from lightning_chatgpt.errors import UserError
from tests.conftest import chat


def said(question: str, answer: str, *, weight: float = 1.0, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer, "weight": weight}]
    return {"messages": messages, **more}


@pytest.fixture
def module(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    def make(rows: list[Any], *, cls: type[Any] = ChatDataModule, is_strict: bool = True, **settings: Any) -> Any:
        path = tmp_path / "a.jsonl"
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        defaults = {"train": str(path), "validation": None, "max_length": 64, "cache_dir": str(tmp_path / "cache")}
        made = cls(**{**defaults, **settings})
        made.tokenizer = tokenizer
        made.is_strict = is_strict
        made.setup("fit")
        return made

    return make


def draws(lengths: Any, mixture: dict[str, Any], *, groups: list[str] | None = None, capacity: int | None = None) -> Draws:
    n = len(lengths)
    return Draws(
        Mixture.of(mixture),
        lengths=np.array(lengths),
        conversations=np.arange(n),
        groups=groups or ["a", "b"] * (n // 2),
        places=np.linspace(0, 0.99, n),
        seed=0,
        capacity=capacity,
    )


def test_a_small_packed_group_that_is_asked_for_is_read_some_time_or_refused() -> None:
    """Guards against:
    with packing, shares are rounded to whole rows: a small group of which less than half a row is asked for is never read, unsaid.
    """
    try:
        drawn = draws([10] * 105, {"epochs": {"b": 0.4}}, groups=["a"] * 100 + ["b"] * 5, capacity=64)
    except UserError:
        return
    assert any(i >= 100 for epoch in range(10) for row in drawn.epoch(epoch) for i in row)


def test_packing_and_a_whole_mixture_make_batches_in_every_epoch(module) -> None:
    """Guards against this: batches of a packed mixture with whole epochs cannot be collated from the second epoch on."""
    data = module([said(f"q {i}", "word " * (i % 9), topic="ab"[i % 2]) for i in range(1, 60) if i % 9], packing=True,
                  mixture={"label": "topic", "epochs": {"a": 2}})  # fmt: skip
    loader = data.train_dataloader()
    for epoch in range(4):
        loader.sampler.set_epoch(epoch)
        assert {batch["input_ids"].shape[1] for batch in loader} == {64}


def test_chats_that_teach_nothing_can_be_described(module) -> None:
    """Guards against this: inspect divides by zero where a part has no examples."""
    data = module([said("a", f"b {i}", weight=0) for i in range(10)], is_strict=False)
    report = describe(data, n_examples=1, max_truncated=0.1)
    assert report["surprises"][0].startswith("train: no token is supervised, so nothing can be learnt")


def test_nothing_can_be_grouped_by_length() -> None:
    """Guards against this: an empty training part cannot be grouped by length: np.concatenate of nothing."""
    assert EpochSampler([], batch_size=4, seed=0, group_by_length=True).epoch_rows(0) == []


def test_examples_are_shown_under_their_own_ids(module, tmp_path: Path) -> None:
    """Guards against this: describe looks ids up in the first few of each source one after another, as if no conversation were left out."""
    (tmp_path / "b.jsonl").write_text(json.dumps(said("g", "h", id="of b")) + "\n")
    rows = [said("a", "b", weight=0, id="unlearnt"), said("c", "d", id="right"), said("e", "f", id="next")]
    data = module(rows, train=[str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")])
    (example,) = describe(data, n_examples=1, max_truncated=0.1)["examples"]
    assert example["id"] == "right"


RECORD = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], '


@pytest.mark.parametrize(
    "row",
    [
        RECORD + '"id": "\\ud800"}',
        RECORD + '"topic": "\\ud800"}',
        RECORD.replace('"content": "a"', '"content": "a", "name": "\\ud800"') + '"x": 1}',
    ],
    ids=["id", "label", "name"],
)
def test_half_a_character_beside_the_content(module, row: str) -> None:
    """Guards against a traceback: half a character anywhere but in content."""
    try:
        assert len(module([row, said("c", "d")], on_fault="skip").datasets["train"]) in (1, 2)
    except UserError:
        pass


def test_half_a_character_in_a_document(module) -> None:
    """Guards against this: half a character in a document ends in a traceback."""
    try:
        assert len(module(['{"text": "\\ud800 abc"}', '{"text": "abc"}'], cls=TextDataModule, on_fault="skip").datasets["train"])
    except UserError:
        pass


def test_messages_as_broken_json_text_are_a_fault(module) -> None:
    """Guards against a traceback: messages that stand there as a text are JSON too, and may be broken."""
    data = module([{"messages": '[{"role": "user"'}, said("c", "d")], on_fault="skip")
    assert len(data.datasets["train"]) == 1


@pytest.mark.parametrize("history", [[["only one"]], [None], 3, [["q", "a", "more"]]], ids=str)
def test_a_history_without_pairs_is_a_fault(module, history: Any) -> None:
    """Guards against a traceback: an alpaca history that is not made of pairs."""
    data = module([{"instruction": "a", "output": "b", "history": history}, said("c", "d")], on_fault="skip")
    assert len(data.datasets["train"]) == 1


def test_a_file_of_words_may_stand_at_home(module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against this: fingerprint reads the words' file without expanding ~, which the step itself does."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "words.txt").write_text("nothing\n")
    assert len(module([said("c", "d")], cleaning=[{"words": {"file": "~/words.txt"}}]).datasets["train"]) == 1


def test_parts_that_say_the_same_with_other_weights_are_encoded_apart(module) -> None:
    """Guards against this: tokens are found by the digests of a part's rows, which leave out weights and names: two parts of one source can
    share a file."""
    in_train = next(i for i in range(99) if position(f"id:{i}") > 0.5)
    in_validation = next(i for i in range(99) if position(f"id:{i}") < 0.5)
    rows = [said("a", "b", id=in_train), said("a", "b", weight=0.5, id=in_validation)]
    data = module(rows, validation=0.5, max_leak=None)
    assert [float(data.datasets[part].example(0)[1].max()) for part in ("train", "validation")] == [1.0, 0.5]


def test_two_sources_of_one_name_are_both_told_or_refused(module, tmp_path: Path) -> None:
    """Guards against this: the report has one entry a name: of two sources of one name, only the last is told."""
    (tmp_path / "b.jsonl").write_text(json.dumps(said("g", "h")) + "\n")
    named = [{"source": str(tmp_path / name), "name": "n"} for name in ("a.jsonl", "b.jsonl")]
    try:
        data = module([said("a", "b"), said("c", "d")], train=named)
    except UserError:
        return
    assert sum(source["items"] for source in data.report["sources"].values()) == 3


def test_the_report_outlives_a_second_setup(module) -> None:
    """Guards against this: a second setup leaves only the number of items in the report."""
    data = module([said(f"q {i}", f"a {i}") for i in range(30)], validation=0.3, max_leak=None)
    before = {part: counts["tokens"] for part, counts in data.report["parts"].items()}
    data.setup("validate")
    assert {part: counts["tokens"] for part, counts in data.report["parts"].items()} == before


@pytest.mark.parametrize("source", [{"class_path": "json.loads", "init_args": {"x": 1}}, {"class_path": "time.time"}], ids=str)
def test_what_a_user_function_does_not_take_is_told(module, source: dict[str, Any]) -> None:
    """Guards against a traceback: init_args that a source's function does not take, or a function that returns nothing to read."""
    with pytest.raises(UserError):
        module([], train=source)


def test_settings_that_a_corpus_cannot_obey_are_refused_or_warned_of(module) -> None:
    """Guards against this: split_by, fields, roles and schema are left aside without a word where a corpus is read."""
    try:
        with pytest.warns(UserWarning, match="split_by"):
            module([], train="corpus:chatterbot/german", split_by="nothing", max_leak=None)
    except UserError:
        pass


@pytest.mark.parametrize(("threshold", "n_permutations"), [(1.0, 128), (0.98, 16)])
def test_a_high_threshold_of_near_duplicates(module, threshold: float, n_permutations: int) -> None:
    """Guards against a traceback: datasketch takes no threshold that leaves it a single band."""
    rows = [chat(f"one two three four five six {i}", "fine").to_dict() for i in range(3)]
    settings = {"near": True, "threshold": threshold, "n_permutations": n_permutations}
    try:
        assert len(module(rows, cleaning=[{"duplicates": settings}]).datasets["train"]) == 3
    except UserError:
        pass


def test_a_number_that_is_broken_yaml_is_refused() -> None:
    """Guards against a traceback: numbers that the command line left as text are read as YAML."""
    with pytest.raises(UserError, match="takes a number"):
        Mixture.of({"weights": {"a": "["}})
