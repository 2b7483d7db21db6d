"""What went wrong once in the data room, each with its guard."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from lightning_chatgpt import ChatDataModule, Conversation, TextDataModule
from lightning_chatgpt.data.mixture import Draws, Mixture
from lightning_chatgpt.data.report import describe
from lightning_chatgpt.data.sampler import EpochSampler
from lightning_chatgpt.data.sources import read_conversations
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
    assert EpochSampler([], step_size=4, seed=0, group_by_length=True).epoch_rows(0) == []


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


def own_conversations() -> list[Conversation]:
    """A user's own source, with labels and no group."""
    chats = [chat(f"question {i}", f"answer {i}") for i in range(40)]
    return [Conversation(c.messages, id=str(i), labels={"customer": str(i % 5)}) for i, c in enumerate(chats)]


def test_split_by_keeps_conversations_of_a_users_own_function_together(module) -> None:
    """Guards against split_by being left aside for Conversations, so that one customer's chats stood on both sides."""
    source = {"class_path": f"{__name__}.own_conversations"}
    data = module([], train=source, split_by="customer", validation=0.3, max_leak=None)
    seen = {
        part: {json.loads(text)["customer"] for of in dataset.sources for text in of.table.column("labels", of.rows)}
        for part, dataset in data.datasets.items()
    }
    assert seen["train"] and seen["validation"] and not seen["train"] & seen["validation"]
    with pytest.raises(UserError, match="split_by looks for 'shop'"):
        module([], train=source, split_by="shop")


def test_a_mixture_is_told_of_a_label_that_no_record_has_and_takes_groups_by_split_by(module) -> None:
    """Guards against a mistyped label making one nameless group of everything."""
    rows = [said(f"q {i}", f"a {i}", topic="ab"[i % 2], customer=str(i % 3)) for i in range(30)]
    with pytest.raises(UserError, match="data.mixture.label 'topik' is said of no record; did you mean topic?"):
        module(rows, mixture={"label": "topik", "temperature": 2}).train_dataloader()
    data = module(rows, split_by="customer", mixture={"label": "group", "epochs": {"customer:0": 2}})
    assert data.train_sampler(data.datasets["train"]).draws.n_rows == {"customer:0": 20, "customer:1": 10, "customer:2": 10}
    report = describe(data, n_examples=0, max_truncated=0.1)
    shown = report["mixture"]["customer:0"]
    assert (shown["items"], shown["rows"], shown["rows_per_epoch"]) == (10, 10, 20)


def test_settings_below_a_key_may_come_with_dots_and_numbers_as_names() -> None:
    """Guards against --data.mixture.weights.mine 2 being no setting, and years being numbers that match no label."""
    assert Mixture.of({"weights.c.jsonl": "3", "weights.mine": 2}).weights == {"c.jsonl": 3, "mine": 2}
    assert Mixture.of({"caps": {2026: 5}}).caps == {"2026": 5}


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("user,assistant\nhello,hi\n", [("user", "hello"), ("assistant", "hi")]),
        ("Question,Answer\nhello,hi\n", [("user", "hello"), ("assistant", "hi")]),
        ("input,output\nhello,hi\n", [("user", "hello"), ("assistant", "hi")]),
    ],
)
def test_a_header_of_usual_names_is_no_chat(tmp_path: Path, text: str, messages: list[tuple[str, str]]) -> None:
    """Guards against a table's header being taught as a chat."""
    (tmp_path / "a.csv").write_text(text)
    (found,) = read_conversations(str(tmp_path / "a.csv"))
    assert [(m.role, m.content) for m in found.messages] == messages


def test_what_a_record_says_besides_is_not_lost(tmp_path: Path) -> None:
    """Guards against a prompt's context and history, and rejected beside messages, being dropped without a word."""
    records = [
        {"prompt": "Who?", "completion": "Bob", "context": "He is Bob.", "history": [["Hi", "Yo"]]},
        {"prompt": "p", "messages": [], "chosen": "good", "rejected": "bad"},
    ]
    (tmp_path / "a.json").write_text(json.dumps(records))
    first, second = read_conversations(str(tmp_path / "a.json"))
    assert [m.content for m in first.messages] == ["Hi", "Yo", "He is Bob.\n\nWho?", "Bob"]
    assert [m.content for m in second.rejected] == ["bad"]


def test_redaction_takes_labels_too(module) -> None:
    """Guards against an e-mail address that stands beside the messages staying in the cache."""
    data = module([said("a", "b", contact="joe@example.com")], cleaning=["redact"])
    (source,) = data.datasets["train"].sources
    assert [json.loads(text) for text in source.table.column("labels", source.rows)] == [{"contact": "<EMAIL>"}]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"truncation": "drop-oldest"}, "data.truncation 'drop-oldest' cannot be used; did you mean drop_oldest?"),
        ({"num_workers": -1}, "data.num_workers must be at least 0, not -1"),
        ({"train": [1]}, "data: 1 is no source"),
        ({"cache_dir": "/proc/nowhere"}, "the cache /proc/nowhere cannot be written to"),
    ],
)
def test_settings_are_refused_in_one_line(module, settings: dict[str, Any], says: str) -> None:
    """Guards against tracebacks, and against a policy that is none being taken for split."""
    with pytest.raises(UserError) as error:
        module([said("a", "b")], **settings)
    assert says in str(error.value)


def test_validating_with_duplicates_cleaned_needs_no_training_data(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Guards against data.train being asked for where only held-out chats are scored."""
    (tmp_path / "a.jsonl").write_text((json.dumps(said("a", "b")) + "\n") * 2)
    data = ChatDataModule(validation=str(tmp_path / "a.jsonl"), cleaning=["duplicates"], max_length=64, cache_dir=str(tmp_path / "c"))
    data.tokenizer = tokenizer
    data.setup("validate")
    assert len(data.datasets["validation"]) == 1


def test_what_a_killed_process_left_is_cleared_away(module, tmp_path: Path) -> None:
    """Guards against unfinished files of processes that are gone filling the cache."""
    (tmp_path / "cache").mkdir()
    gone = tmp_path / "cache" / f"{platform.node()}-999999999-abc.unfinished"
    gone.write_text("half")
    module([said("a", "b")])
    assert not gone.exists()


def test_prompts_are_prepared_by_workers_too(module, tmp_path: Path) -> None:
    """Guards against num_workers being left aside where replies are predicted."""
    data = module([said(f"q {i}", "a") for i in range(5)], predict=str(tmp_path / "a.jsonl"), num_workers=2, batch_size=2, max_new_tokens=4)
    data.setup("predict")
    loader = data.predict_dataloader()
    assert loader.num_workers == 2
    alone = module([said(f"q {i}", "a") for i in range(5)], predict=str(tmp_path / "a.jsonl"), batch_size=2, max_new_tokens=4)
    alone.setup("predict")
    assert [batch["prompt_ids"] for batch in loader] == [batch["prompt_ids"] for batch in alone.predict_dataloader()]
