"""Records as they stand in real data sets, schema by schema; what settings of the reading do, and which are refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_chatgpt.chat.conversation import Conversation, Message
from lightning_chatgpt.chat.faults import Faults
from lightning_chatgpt.chat.schemas import SCHEMAS, RecordParser, find_schema
from lightning_chatgpt.errors import ConfigError, DataError

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
U, A, S, T = "user", "assistant", "system", "tool"
TWO = [(U, "q"), (A, "a")]
SAID = [{"role": U, "content": "q"}, {"role": A, "content": "a"}]


def parse(record: Any, *, on_fault: Any = "error", **settings: Any) -> Conversation:
    return RecordParser(faults=Faults(on_fault), **settings).parse(record, default_id="chats.jsonl:7")


def said(messages: tuple[Message, ...]) -> list[tuple[str, str]]:
    return [(m.role, m.content) for m in messages]


# What it shows, the schema it follows, the record, and who says what.
RECORDS: list[tuple[str, str, Any, list[tuple[str, str]]]] = [
    ("openai", "openai", {"messages": SAID}, TWO),
    (
        "openai, a tool",
        "openai",
        {
            "messages": [
                {"role": "developer", "content": "Help."},
                {"role": U, "content": "Weather?"},
                {
                    "role": A,
                    "content": None,
                    "refusal": None,
                    "tool_calls": [
                        {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "K\\u00f6ln"}'}},
                        {"id": "c2", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}},
                    ],
                },
                {"role": T, "tool_call_id": "c1", "content": "12 °C"},
                {"role": T, "tool_call_id": "c2", "content": "12 °C"},
                {"role": A, "content": "Cold."},
            ],
            "tools": [{"type": "function"}],
        },
        [(S, "Help."), (U, "Weather?"), (A, f"{CALL}\n{CALL}"), (T, "12 °C"), (T, "12 °C"), (A, "Cold.")],
    ),
    (
        "openai, a function call beside text",
        "openai",
        {
            "messages": [
                {"role": U, "content": "Weather?"},
                {"role": A, "content": "Let me see.", "function_call": {"name": "weather", "arguments": '{"city": "Köln"}'}},
                {"role": "function", "name": "weather", "content": "12"},
                {"role": A, "content": "Cold."},
            ]
        },
        [(U, "Weather?"), (A, f"Let me see.\n{CALL}"), (T, "12"), (A, "Cold.")],
    ),
    (
        "openai, arguments that are no JSON",
        "openai",
        {"messages": [SAID[0], {"role": A, "tool_calls": [{"function": {"name": "f", "arguments": "{oops"}}]}]},
        [(U, "q"), (A, '<tool_call>\n{"name": "f", "arguments": "{oops"}\n</tool_call>')],
    ),
    (
        "openai, content parts",
        "openai",
        {"messages": [{"role": U, "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}, SAID[1]]},
        [(U, "one\ntwo"), (A, "a")],
    ),
    ("openai, JSON in a column", "openai", {"messages": json.dumps(SAID), "topic": "x"}, TWO),
    ("openai, JSON in a column after blanks", "openai", {"messages": "\n " + json.dumps(SAID)}, TWO),
    (
        "sharegpt",
        "sharegpt",
        {"id": "s1", "conversations": [{"from": S, "value": "Be brief."}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        [(S, "Be brief."), *TWO],
    ),
    (
        "sharegpt, a tool",
        "sharegpt",
        {
            "system": "Be brief.",
            "conversations": [
                {"from": "human", "value": "Weather?", "weight": None},
                {"from": "function_call", "value": '{"name": "weather"}'},
                {"from": "observation", "value": "12"},
                {"from": "gpt", "value": "Cold.", "weight": 0},
            ],
            "tools": "[]",
        },
        [(S, "Be brief."), (U, "Weather?"), (A, '{"name": "weather"}'), (T, "12"), (A, "Cold.")],
    ),
    ("sharegpt, roles", "sharegpt", {"conversation": SAID}, TWO),
    ("alpaca", "alpaca", {"instruction": "q", "input": "", "output": "a"}, TWO),
    ("alpaca, input", "alpaca", {"instruction": "Add.", "input": "1 2", "output": "3"}, [(U, "Add.\n\n1 2"), (A, "3")]),
    (
        "alpaca, history",
        "alpaca",
        {"instruction": "q", "input": None, "output": "a", "system": "Be brief.", "history": [["q1", "a1"], ["q2", "a2"]]},
        [(S, "Be brief."), (U, "q1"), (A, "a1"), (U, "q2"), (A, "a2"), *TWO],
    ),
    ("dolly", "dolly", {"instruction": "q", "context": "", "response": "a", "category": "open_qa"}, TWO),
    ("dolly, context", "dolly", {"instruction": "Who?", "context": "Ann did.", "response": "Ann"}, [(U, "Who?\n\nAnn did."), (A, "Ann")]),
    ("prompt and completion", "prompt_completion", {"prompt": "q", "completion": "a"}, TWO),
    ("prompt and response", "prompt_completion", {"prompt": "q", "response": "a", "system": "S"}, [(S, "S"), *TWO]),
    ("prompt and completion, lists", "prompt_completion", {"prompt": SAID[:1], "completion": SAID[1:]}, TWO),
    ("question and answer", "question_answer", {"question": "q", "answer": "a"}, TWO),
    ("question and answer, context", "question_answer", {"context": "C.", "question": "q", "answer": "a"}, [(U, "C.\n\nq"), (A, "a")]),
    ("lines", "lines", ["q", "a", "q2", "a2"], [*TWO, (U, "q2"), (A, "a2")]),
    ("lines, dialog", "lines", {"dialog": ["q", "a"], "act": [1, 2]}, TWO),
    ("lines, dialogue", "lines", {"dialogue": ["q", "a"]}, TWO),
    ("lines, lines", "lines", {"lines": ["q", "a"]}, TWO),
    ("preference, texts", "preference", {"prompt": "q", "chosen": "a", "rejected": "bad", "system": "S"}, [(S, "S"), *TWO]),
    ("preference, replies", "preference", {"prompt": SAID[:1], "chosen": SAID[1:], "rejected": [{"role": A, "content": "bad"}]}, TWO),
    ("preference, whole chats", "preference", {"prompt": "q", "chosen": SAID, "rejected": [SAID[0], {"role": A, "content": "bad"}]}, TWO),
    ("preference, whole chats alone", "preference", {"chosen": SAID, "rejected": [SAID[0], {"role": A, "content": "bad"}]}, TWO),
]


@pytest.mark.parametrize(("schema", "record", "expected"), [row[1:] for row in RECORDS], ids=[row[0] for row in RECORDS])
@pytest.mark.parametrize("is_named", [False, True], ids=["found out", "named"])
def test_records_are_read(schema: str, record: Any, expected: list[tuple[str, str]], is_named: bool) -> None:
    parser = RecordParser(faults=Faults(), schema=schema if is_named else None)
    conversation = parser.parse(record, default_id="chats.jsonl:7")
    assert said(conversation.messages) == expected
    assert parser.counts == {schema: 1}
    rejected = [(A, "bad")] if schema == "preference" else []
    assert said(conversation.rejected) == rejected


def test_every_schema_has_a_record() -> None:
    assert {row[1] for row in RECORDS} == set(SCHEMAS)


@pytest.mark.parametrize(
    ("record", "schema"),
    [
        ({"messages": None, "conversations": SAID}, "sharegpt"),  # columns of a table that are empty here
        ({"conversations": None, "prompt": "q", "completion": "a"}, "prompt_completion"),
        ({"prompt": "q", "chosen": "a", "rejected": "bad", "response": "a"}, "preference"),
        ({"instruction": "q", "output": "a", "response": "a"}, "alpaca"),
        ({"question": "q", "answer": "a", "prompt": "q", "response": "a"}, "prompt_completion"),
    ],
)
def test_the_first_schema_that_fits_is_taken(record: dict, schema: str) -> None:
    parser = RecordParser(faults=Faults())
    assert said(parser.parse(record, default_id="x").messages) == TWO
    assert parser.counts == {schema: 1}


def test_weights_and_names_are_kept() -> None:
    messages = [
        {**SAID[0], "name": "Ann"},
        {**SAID[1], "weight": 0},
        {"role": U, "content": "q2"},
        {"role": A, "content": "a2", "weight": 0.5},
    ]
    conversation = parse({"messages": messages})
    assert [(m.name, m.weight) for m in conversation.messages] == [("Ann", 1.0), ("", 0.0), ("", 1.0), ("", 0.5)]
    shared = parse({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": 0}]})
    assert [m.weight for m in shared.messages] == [1.0, 0.0]


@pytest.mark.parametrize("record", [{"text": "hi"}, {}, "text", 3, None, {"prompt": "q"}, {"chosen": "a"}, {"instruction": "q"}])
def test_a_record_that_no_schema_fits_is_refused(record: Any) -> None:
    found = ", ".join(map(repr, record)) or "no keys" if isinstance(record, dict) else f"{type(record).__name__}, not an object"
    with pytest.raises(DataError) as error:
        parse(record)
    assert str(error.value) == (
        f'no schema fits the record (found {found}); write it as {{"messages": [...]}}, or say where things are with data.fields'
    )


@pytest.mark.parametrize("record", [{"question": "q", "answer": "a"}, "text", None])
def test_a_record_that_does_not_follow_the_named_schema_is_refused(record: Any) -> None:
    with pytest.raises(DataError, match=r"^the record does not follow data.schema 'alpaca' \(found "):
        parse(record, schema="alpaca")


@pytest.mark.parametrize("messages", ["hello", {"role": "user"}, 3])
def test_messages_must_be_a_list(messages: Any) -> None:
    with pytest.raises(DataError, match=rf"^the messages \(openai\) must be a list, found {type(messages).__name__}; write them as a list"):
        parse({"messages": messages})


@pytest.mark.parametrize(
    ("fields", "record", "expected"),
    [
        ({"user": "ask", "assistant": "reply"}, {"ask": "q", "reply": "a"}, TWO),
        ({"user": "ask", "assistant": "reply", "system": "s"}, {"ask": "q", "reply": "a", "s": "S"}, [(S, "S"), *TWO]),
        ({"user": "ask", "assistant": "reply", "system": "s"}, {"ask": "q", "reply": "a", "s": ""}, TWO),
        ({"user": "ask", "assistant": "reply", "system": "s"}, {"ask": "q", "reply": "a"}, TWO),
        ({"user": "in.text", "assistant": "out.best.text"}, {"in": {"text": "q"}, "out": {"best": {"text": "a"}}}, TWO),
        ({"user": "in.text", "assistant": "reply"}, {"in.text": "q", "in": {"text": "not this"}, "reply": "a"}, TWO),
        ({"messages": "data.turns"}, {"data": {"turns": SAID}}, TWO),
        (
            {"messages": "turns", "role": "who.kind", "content": "text"},
            {"turns": [{"who": {"kind": "human"}, "text": "q", "time": 1}, {"who": {"kind": "gpt"}, "text": "a"}]},
            TWO,
        ),
    ],
)
def test_fields_say_where_things_are(fields: dict, record: dict, expected: list[tuple[str, str]]) -> None:
    parser = RecordParser(faults=Faults(), fields=fields)
    assert said(parser.parse(record, default_id="x").messages) == expected
    assert parser.counts == {"fields": 1}


def test_fields_of_weight_name_and_id() -> None:
    fields = {"messages": "turns", "role": "who", "content": "text", "weight": "w", "name": "nick", "id": "meta.key"}
    turns = [{"who": U, "text": "q", "nick": "Ann"}, {"who": A, "text": "a", "w": 0.5}]
    conversation = parse({"turns": turns, "meta": {"key": 12}}, fields=fields)
    assert [(m.name, m.weight) for m in conversation.messages] == [("Ann", 1.0), ("", 0.5)]
    assert (conversation.id, conversation.group) == ("12", "id:12")


@pytest.mark.parametrize(
    ("fields", "record", "says"),
    [
        ({"user": "ask", "assistant": "reply"}, {"ask": "q"}, "data.fields looks for assistant 'reply', which is not there (found 'ask')"),
        ({"messages": "a.b"}, {"a": [1]}, "data.fields looks for messages 'a.b', which is not there (found 'a')"),
        ({"messages": "a"}, ["q", "a"], "data.fields needs records that are objects (found list, not an object)"),
        ({"messages": "a"}, {"a": "text"}, "the messages (fields) must be a list, found str"),
        ({"messages": "a"}, {"a": ["text"]}, "message 1 must be an object with role and content, found str"),
        ({"messages": "a", "content": "text"}, {"a": [{"role": U, "content": "q"}]}, "message 1 has no 'content'"),
    ],
)
def test_fields_that_are_not_there_are_named(fields: dict, record: Any, says: str) -> None:
    with pytest.raises(DataError) as error:
        parse(record, fields=fields)
    assert str(error.value).startswith(says)


def test_roles_of_ones_own() -> None:
    turns = [{"role": "Kundin", "content": "q"}, {"role": "7", "content": "a"}]
    assert said(parse({"messages": turns}, roles={"Kundin": U, "7": A}).messages) == TWO
    # A number is looked for as it is written; names that are known anyway need no mapping, however they are written.
    mixed = [{"role": " Human ", "content": "q"}, {"role": 7, "content": "a"}]
    assert said(parse({"messages": mixed}, roles={"7": A}).messages) == TWO
    # One's own comes first: here the user is what gets trained.
    assert said(
        parse({"messages": SAID}, roles={"user": A, "assistant": U}, on_fault={"assistant_first": "fix"}, needs_reply=False).messages
    ) == [(U, "a")]
    with pytest.raises(
        DataError, match="^message 1: role 'kundin' is unknown; use system, user, assistant or tool, or map it with data.roles"
    ):
        parse({"messages": [{"role": "kundin", "content": "q"}]}, roles={"Kundin": U})


def test_ids_and_groups() -> None:
    assert (parse({"messages": SAID}).id, parse({"messages": SAID}).group) == ("chats.jsonl:7", "")
    assert (parse({"messages": SAID, "id": 0}).id, parse({"messages": SAID, "id": 0}).group) == ("0", "id:0")
    assert parse({"messages": SAID, "id": ""}).id == parse({"messages": SAID, "id": None}).id == "chats.jsonl:7"
    grouped = parse({"messages": SAID, "id": 5, "meta": {"ticket": 9}}, split_by="meta.ticket")
    assert (grouped.id, grouped.group, grouped.split_key) == ("5", "meta.ticket:9", "meta.ticket:9")
    with pytest.raises(DataError, match=r"^data.split_by looks for 'ticket', which is not there \(found 'messages'\)"):
        parse({"messages": SAID}, split_by="ticket")


def test_labels_are_what_the_record_says_of_itself() -> None:
    record = {"question": "q", "answer": "a", "context": "c", "id": "x", "topic": "law", "stars": 5, "is_new": True, "long": "x" * 201}
    conversation = parse({**record, "tags": ["a"], "none": None, "200": "x" * 200})
    assert conversation.labels == {"topic": "law", "stars": "5", "is_new": "True", "200": "x" * 200}


def plugin(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> str:
    """A module of a user's with one function; its dotted path."""
    name = f"schema_of_a_user_{abs(hash((body, str(folder))))}"
    (folder / f"{name}.py").write_text(f"def read(record):\n    {body}\nnot_a_function = 3\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, name, raising=False)
    return f"{name}.read"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return [{'role': 'user', 'content': record['q']}, {'role': 'assistant', 'content': record['a']}]", (TWO, "law", "chats.jsonl:7")),
        (
            "return {'messages': [{'role': 'user', 'content': 'q'}, {'role': 'gpt', 'content': record['a']}], 'id': 4, 'topic': 'T'}",
            (TWO, "T", "4"),
        ),
    ],
)
def test_a_users_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, expected: tuple) -> None:
    path = plugin(tmp_path, monkeypatch, body)
    parser = RecordParser(faults=Faults(), schema=path)
    conversation = parser.parse({"q": "q", "a": "a", "topic": "law"}, default_id="chats.jsonl:7")
    assert (said(conversation.messages), conversation.labels["topic"], conversation.id) == expected
    assert parser.counts == {path: 1}


def test_a_users_schema_may_give_a_conversation_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imports = "from lightning_chatgpt.chat.conversation import Conversation, Message; "
    path = plugin(tmp_path, monkeypatch, imports + "return Conversation((Message('assistant', 'a'),), id='own')")
    assert parse({}, schema=path) == Conversation((Message(A, "a"),), id="own")
    nothing = plugin(tmp_path, monkeypatch, "return None")
    with pytest.raises(DataError, match=rf"^the record does not follow data.schema '{nothing}' \(found 'q'\)"):
        parse({"q": 1}, schema=nothing)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("alpacca", "data.schema 'alpacca' is unknown; did you mean alpaca?"),
        (
            "xyz",
            "data.schema 'xyz' is unknown; there are preference, openai, sharegpt, alpaca, dolly, ",
        ),
        (
            "no_such_module.read",
            "data.schema no_such_module.read: cannot be imported (No module named 'no_such_module'); is it on the path",
        ),
        ("json.no_such_name", "data.schema json.no_such_name: cannot be imported (module 'json' has no attribute 'no_such_name')"),
        ("json.decoder", "data.schema json.decoder: is a module, not a function"),
        ("json.JSONDecoder", "data.schema json.JSONDecoder: is a type, not a function"),
    ],
)
def test_schemas_that_are_not_there_are_refused(name: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        find_schema(name)
    assert str(error.value).startswith(says)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"schema": "alpaca", "fields": {"messages": "m"}}, "data.schema 'alpaca' and data.fields contradict each other; leave one out"),
        ({"fields": {"massages": "m"}}, "data.fields: 'massages' is unknown; did you mean messages?"),
        ({"fields": {"user": "q"}}, "data.fields must say where messages is, or where user and assistant are"),
        ({"fields": {"id": "key"}}, "data.fields must say where messages is, or where user and assistant are"),
        ({"roles": {"Kundin": "client"}}, "data.roles: 'Kundin' is mapped to 'client'; map it to system, user, assistant or tool"),
        ({"roles": {"Kundin": "human"}}, "data.roles: 'Kundin' is mapped to 'human'; map it to"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        RecordParser(faults=Faults(), **settings)
    assert str(error.value).startswith(says)
