"""Every kind of fault, as a user meets it: the whole message, what is left under skip and under fix, and what is counted."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lightning_chatgpt import ChatDataModule
from lightning_chatgpt.chat.conversation import Conversation
from lightning_chatgpt.chat.faults import KINDS, Faults
from lightning_chatgpt.data.sources import SourceReport, read_conversations
from lightning_chatgpt.errors import ConfigError, DataError


def said(*contents: Any, roles: str = "ua", **more: Any) -> dict[str, Any]:
    names = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
    return {"messages": [{"role": names[role], "content": content} for role, content in zip(roles, contents, strict=True)], **more}


def lines(*records: Any) -> bytes:
    return "".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in records).encode()


GOOD = said("before", "fine"), said("after", "fine")
OUTER = ["before/fine", "after/fine"]


def between(record: Any) -> bytes:
    """A record between two good ones."""
    return lines(GOOD[0], record, GOOD[1])


def first(record: dict[str, Any], **more: Any) -> dict[str, Any]:
    """More in the first message of a record."""
    return {**record, "messages": [{**record["messages"][0], **more}, *record["messages"][1:]]}


Q = said("q", "a")
REFUSED = "refused"  # as a setting; under fix for everything it is left out all the same

# For each kind: file, content, the whole message behind the path, what is left under skip, and what is between the good ones under fix.
FAULTS: list[tuple[str, str, bytes, str, list[str], Any]] = [
    (
        "broken_json",
        "a.jsonl",
        between('{"messages": [}'),
        "{path}:2: broken JSON at column 15 (Expecting value); one object a line is expected, mend the line or set data.on_fault to skip",
        OUTER,
        REFUSED,
    ),
    (
        "broken_json",
        "a.csv",
        b"question,answer\nbefore,fine\nq,a,b\nafter,fine\n",
        "{path}:3: the row has 3 cells where 2 are expected; quote cells that hold ',' or a line break or set data.on_fault to skip",
        OUTER,
        REFUSED,
    ),
    (
        "truncated_file",
        "a.json",
        (json.dumps([*GOOD, Q])[:-10]).encode(),
        "{path}: record 3 (byte 194): the file ends at byte 272, in the middle of what begins at byte 194; "
        "fetch or write the file anew, or set data.on_fault to skip to use what stands before",
        OUTER,
        REFUSED,
    ),
    (
        "truncated_file",
        "a.jsonl",
        lines(*GOOD, Q)[:-20],
        "{path}:3: the file ends at byte 259, in the middle of this line, which begins at byte 191; "
        "fetch or write the file anew, or set data.on_fault to skip to use what stands before",
        OUTER,
        REFUSED,
    ),
    (
        "truncated_file",
        "a.jsonl.gz",
        gzip.compress(lines(*GOOD))[:-4],
        "{path}: the compressed file breaks off (Compressed file ended before the end-of-stream marker was reached); "
        "fetch or write the file anew, or set data.on_fault to skip to use what stands before",
        OUTER,
        REFUSED,
    ),
    (
        "wrong_encoding",
        "a.jsonl",
        between(json.dumps(said("café", "a"), ensure_ascii=False)).decode().encode("latin-1"),
        '{path}:2: byte 142 is 0xE9, which is not UTF-8; it looks like Latin-1: \'ntent": "café"}, {"role"\'; '
        "save the file as UTF-8, or set data.on_fault to fix to read it as Latin-1",
        OUTER,
        ["café/a"],
    ),
    (
        "wrong_encoding",
        "a.jsonl",
        between(json.dumps(said("😀 é", "a"), ensure_ascii=False)).decode().encode("utf-16"),
        "{path}: the file is UTF-16; save it as UTF-8, or set data.on_fault to fix to read it as UTF-16",
        [],
        ["😀 é/a"],
    ),
    (
        "wrong_encoding",
        "a.csv",
        "question,answer\r\nbefore,fine\r\né,a\r\nafter,fine\r\n".encode("utf-16-le"),
        "{path}: the file is UTF-16; save it as UTF-8, or set data.on_fault to fix to read it as UTF-16",
        [],
        ["é/a"],
    ),
    (
        "nul_bytes",
        "a.jsonl",
        between(json.dumps(Q).replace('"q"', '"q\0"')),
        "{path}:2: byte 140 is NUL, which no text holds; remove it, or set data.on_fault to fix to leave it out",
        OUTER,
        ["q/a"],
    ),
    (
        "nul_bytes",
        "a.jsonl",
        between(said("q\0", "a")),  # written as \u0000, which is valid JSON
        "{path}:2: message 1: content holds a NUL character at 1; remove it",
        OUTER,
        ["q/a"],
    ),
    (
        "lone_surrogate",
        "a.jsonl",
        between(said("q\ud83d!", "a")),
        "{path}:2: message 1: content holds half a character ('\\ud83d' at 1); write the text as valid UTF-8",
        OUTER,
        ["q\ufffd!/a"],
    ),
    (
        "duplicate_keys",
        "a.jsonl",
        between(json.dumps(Q).replace('{"role": "user"', '{"role": "system", "role": "user"')),
        "{path}:2: the key 'role' is there twice; leave one out, or set data.on_fault to fix to take the last",
        OUTER,
        ["q/a"],
    ),
    (
        "wrong_type",
        "a.jsonl",
        between(said("q", 12)),
        "{path}:2: message 2: content must be text, not int (12); put it in quotes",
        OUTER,
        ["q/12"],
    ),
    (
        "wrong_type",
        "a.jsonl",
        between(said("q", {"text": "a"})),
        "{path}:2: message 2: content must be text, not dict; put a string in it",
        OUTER,
        [],
    ),
    (
        "wrong_type",
        "a.jsonl",
        between({"messages": "q"}),
        "{path}:2: the messages (openai) must be a list, found str; write them as a list",
        OUTER,
        [],
    ),
    (
        "unknown_schema",
        "a.jsonl",
        between({"a": 1, "b": 2}),
        "{path}:2: no schema fits the record (found 'a', 'b'); write it as {\"messages\": [...]}, or say where things are with data.fields",
        OUTER,
        REFUSED,
    ),
    (
        "unknown_key",
        "a.jsonl",
        between(first(Q, reasoning="hm")),
        "{path}:2: message 1 has the key 'reasoning', which would be lost; remove it, or set data.on_fault to fix",
        OUTER,
        ["q/a"],
    ),
    (
        "unknown_role",
        "a.jsonl",
        between(first(Q, role="bot")),
        "{path}:2: message 1: role 'bot' is unknown; use system, user, assistant or tool, or map it with data.roles",
        OUTER,
        REFUSED,
    ),
    (
        "bad_name",
        "a.jsonl",
        between(first(Q, name="Ada <b>")),
        "{path}:2: message 1: name 'Ada <b>' cannot be used; take up to 64 letters or digits without spaces or markup",
        OUTER,
        ["q/a"],
    ),
    (
        "bad_weight",
        "a.jsonl",
        between(first(Q, weight=-1)),
        "{path}:2: message 1: weight must be a finite number of at least 0, not -1",
        OUTER,
        ["q/a"],
    ),
    (
        "no_messages",
        "a.jsonl",
        between({"messages": []}),
        "{path}:2: the conversation has no messages; give it at least one, or set data.on_fault to skip",
        OUTER,
        REFUSED,
    ),
    (
        "empty_content",
        "a.jsonl",
        between(said("q", " \n", "r", "a", roles="uaua")),
        "{path}:2: message 2 is empty; remove it, or set data.on_fault to fix or skip",
        OUTER,
        [],  # what is left has two messages of one role in a row, which is a fault of its own; see below
    ),
    (
        "only_system",
        "a.jsonl",
        between(said("Be kind.", roles="s")),
        "{path}:2: there is only a system message; add what the user and the assistant say",
        OUTER,
        REFUSED,
    ),
    (
        "no_assistant",
        "a.jsonl",
        between(said("q", roles="u")),
        "{path}:2: the assistant says nothing, so nothing can be learnt; add its reply, or set data.on_fault to skip",
        OUTER,
        REFUSED,
    ),
    (
        "assistant_first",
        "a.jsonl",
        between(said("Welcome!", "q", "a", roles="aua")),
        "{path}:2: message 1: the assistant speaks first; begin with a user message, or set data.on_fault to fix",
        OUTER,
        ["q/a"],
    ),
    (
        "repeated_role",
        "a.jsonl",
        between(said("q", "q2", "a", roles="uua")),
        "{path}:2: message 2: two user messages in a row; join them, or set data.on_fault to fix",
        OUTER,
        ["q\nq2/a"],
    ),
    (
        "late_system",
        "a.jsonl",
        between(said("q", "Be kind.", "a", roles="usa")),
        "{path}:2: message 2: a system message after the conversation began; put it first, or set data.on_fault to fix",
        OUTER,
        ["Be kind./q/a"],
    ),
    (
        "too_large",
        "a.jsonl",
        between(said("q", "x" * 1_000_001)),
        "{path}:2: message 2 has 1000001 characters, beyond all measure (1000000 at most); split it",
        OUTER,
        REFUSED,
    ),
    (
        "too_large",
        "a.jsonl",
        between(said(*"qa" * 5001, roles="ua" * 5001)),
        "{path}:2: 10002 messages are beyond all measure (10000 at most); split the conversation",
        OUTER,
        REFUSED,
    ),
]
IDS = [f"{kind}-{sum(row[0] == kind for row in FAULTS[:i])}" for i, (kind, *_) in enumerate(FAULTS)]


def test_the_table_covers_every_kind() -> None:
    assert {row[0] for row in FAULTS} == set(KINDS)
    for kind, _, _, _, _, fixed in FAULTS:
        assert (fixed is REFUSED) == (not KINDS[kind].fix), kind


def written(chats: Iterator[Conversation] | list[Conversation]) -> list[str]:
    return ["/".join(message.content for message in chat.messages) for chat in chats]


class Loaded:
    """Loads one file through a data module."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        self.folder = folder
        self.tokenizer = tokenizer

    def module(self, path: Path, on_fault: Any) -> ChatDataModule:
        settings = {"validation": None, "max_length": 128, "cache_dir": str(self.folder / "cache"), "truncation": "skip"}
        module = ChatDataModule(train=str(path), on_fault=on_fault, **settings)
        module.tokenizer = self.tokenizer
        return module

    def __call__(self, path: Path, on_fault: Any) -> tuple[list[str], dict[str, Any], int]:
        """What is trained on, the report on the source, and how many examples came of it."""
        module = self.module(path, on_fault)
        module.setup("fit")
        dataset = module.datasets["train"]
        found = [Conversation.from_record(json.loads(c)) for s in dataset.sources for c in s.table.column("content", s.rows)]
        return written(found), module.report["sources"][str(path)], len(dataset)


@pytest.fixture
def loaded(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Loaded:
    return Loaded(tmp_path, tokenizer)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path


@pytest.mark.parametrize(("kind", "name", "content", "message", "skipped", "fixed"), FAULTS, ids=IDS)
def test_a_fault(loaded: Loaded, place: Path, kind: str, name: str, content: bytes, message: str, skipped: list[str], fixed: Any) -> None:
    path = place / name
    path.write_bytes(content)

    with pytest.raises(DataError) as error:
        loaded.module(path, "error").setup("fit")
    assert str(error.value) == message.replace("{path}", str(path))
    with pytest.raises(DataError) as error:  # the kind is what it is called: all others being left out, it is an error still
        loaded.module(path, {"default": "skip", kind: "error"}).setup("fit")
    assert str(error.value) == message.replace("{path}", str(path))

    where = message.split(": ")[0].replace("{path}", str(path))
    for on_fault in ("skip", {kind: "skip"}):
        if skipped:
            found, report, n = loaded(path, on_fault)
            assert (found, n) == (skipped, len(skipped))
            assert report["items"] == len(skipped)
            assert report["faults"]["counts"] == {kind: {"skip": 1}}
            assert [p.split(": ")[0] for p in report["faults"]["places"][kind]] == [where]
        else:
            with pytest.raises(DataError, match=f"nothing to read in there \\(left out: {kind}\\)"):
                loaded(path, on_fault)

    if fixed is REFUSED:
        with pytest.raises(ConfigError) as refused:
            loaded.module(path, {kind: "fix"})
        assert str(refused.value) == f"data.on_fault: {kind} ({KINDS[kind].about}) cannot be mended; use error or skip"
        found, report, _ = loaded(path, "fix")
        assert found == skipped
        assert report["faults"]["counts"] == {kind: {"skip": 1}}
    elif fixed:
        for on_fault in ("fix", {kind: "fix"}):
            found, report, n = loaded(path, on_fault)
            assert (found, n) == ([OUTER[0], *fixed, OUTER[1]], len(fixed) + 2)
            assert report["faults"]["counts"] == {kind: {"fix": 1}}
            assert report["records"] == 3


def test_a_fault_that_mending_another_brings_is_told_too(loaded: Loaded, place: Path) -> None:
    path = place / "a.jsonl"
    path.write_bytes(between(said("q", "", "r", "a", roles="uaua")))
    with pytest.raises(DataError, match="a.jsonl:2: message 2: two user messages in a row"):
        loaded(path, {"empty_content": "fix"})
    found, report, _ = loaded(path, "fix")
    assert found == [OUTER[0], "q\nr/a", OUTER[1]]
    assert report["faults"]["counts"] == {"empty_content": {"fix": 1}, "repeated_role": {"fix": 1}}
    found, report, _ = loaded(path, {"empty_content": "fix", "repeated_role": "skip"})
    assert found == OUTER
    assert report["faults"]["counts"] == {"empty_content": {"fix": 1}, "repeated_role": {"skip": 1}}


def test_what_a_fix_leaves_out_of_messages(loaded: Loaded, place: Path) -> None:
    path = place / "a.jsonl"
    path.write_bytes(between(first(first(Q, weight=float("inf")), name="Ada <b>")).replace(b"Infinity", b'"much"'))
    loaded(path, "fix")
    (mended,) = [c for c in read_conversations(str(path), report=SourceReport(Faults("fix"))) if c.messages[0].content == "q"]
    assert (mended.messages[0].weight, mended.messages[0].name) == (1.0, "")


def test_many_faults_are_counted_and_the_first_few_places_kept(loaded: Loaded, place: Path) -> None:
    path = place / "a.jsonl"
    path.write_bytes(lines(*[GOOD[0], first(Q, role="bot"), "{"] * 20, GOOD[1]))
    found, report, _ = loaded(path, "skip")
    assert found == [OUTER[0]] * 20 + [OUTER[1]]
    assert report["faults"]["counts"] == {"unknown_role": {"skip": 20}, "broken_json": {"skip": 20}}
    assert report["faults"]["places"]["unknown_role"] == [f"{path}:{3 * i + 2}" for i in range(5)]
    assert report["faults"]["places"]["broken_json"] == [f"{path}:{3 * i + 3}" for i in range(5)]
    assert report["records"] == 41  # what is no JSON is no record


def test_faults_found_in_the_cache_are_told_again(loaded: Loaded, place: Path) -> None:
    path = place / "a.jsonl"
    path.write_bytes(between("{"))
    first_time, second_time = loaded(path, "skip")[1], loaded(path, "skip")[1]
    assert first_time == second_time
    assert second_time["faults"]["counts"] == {"broken_json": {"skip": 1}}


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + lines(*GOOD),
        lines(*GOOD).replace(b"\n", b"\r\n"),
        b"\xef\xbb\xbf" + lines(*GOOD).replace(b"\n", b"\r\n\r\n"),
        lines(*GOOD).rstrip(),
        lines(GOOD[0]) + b"\xef\xbb\xbf" + lines(GOOD[1]),  # two files, each with a mark, that were joined
    ],
    ids=["bom", "crlf", "bom-crlf-blank", "no-end", "joined"],
)
def test_what_is_no_fault(loaded: Loaded, place: Path, content: bytes) -> None:
    path = place / "a.jsonl"
    path.write_bytes(content)
    found, report, _ = loaded(path, "error")
    assert found == OUTER
    assert report["faults"] == {"counts": {}, "places": {}}


def test_every_cut_of_a_json_array_within_a_string_is_told_by_its_byte(place: Path) -> None:
    data = json.dumps([*GOOD, said("déjà vu", "mémoire")], ensure_ascii=False).encode()
    begin = data.index(b"vu")
    for cut in range(begin, data.index(b'", "', begin)):
        path = place / "a.json"
        path.write_bytes(data[:cut])
        with pytest.raises(DataError, match=f"record 3 .byte 194.: the file ends at byte {cut}, in the middle of what begins at byte 194;"):
            list(read_conversations(str(path)))
        report = SourceReport(Faults("skip"))
        assert written(read_conversations(str(path), report=report)) == OUTER
        assert report.faults.counts == {"truncated_file": {"skip": 1}}


@pytest.mark.parametrize(
    ("on_fault", "says"),
    [
        ("ignore", "data.on_fault: 'ignore' cannot be done about default; use error, skip or fix"),
        ({"broken": "skip"}, "data.on_fault: 'broken' is no kind of fault; did you mean broken_json?"),
        ({"broken_json": "no"}, "data.on_fault: 'no' cannot be done about broken_json; use error, skip or fix"),
    ],
)
def test_settings_that_are_refused(on_fault: Any, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        ChatDataModule(train="x.jsonl", on_fault=on_fault)
    assert str(error.value) == says


def test_the_default_stands_for_the_kinds_that_are_not_named(loaded: Loaded, place: Path) -> None:
    path = place / "a.jsonl"
    path.write_bytes(lines(GOOD[0], said("q", 1), said("q", roles="u"), GOOD[1]))
    found, report, _ = loaded(path, {"default": "skip", "wrong_type": "fix"})
    assert found == [OUTER[0], "q/1", OUTER[1]]
    assert report["faults"]["counts"] == {"wrong_type": {"fix": 1}, "no_assistant": {"skip": 1}}
    with pytest.raises(DataError, match="a.jsonl:3: the assistant says nothing"):
        loaded(path, {"wrong_type": "fix"})
