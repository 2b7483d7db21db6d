"""OpenAI's fine-tuning format is read, and nothing in it is dropped silently."""

from typing import Any

import pytest

from lightning_chatgpt.chat.conversation import Message
from lightning_chatgpt.chat.schemas import parse_openai
from lightning_chatgpt.errors import DataError


def test_reads_roles_contents_weights_and_id() -> None:
    record = {
        "id": 7,
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hi", "weight": 0},
        ],
    }
    conversation = parse_openai(record, default_id="x.jsonl:1")
    assert conversation.id == "7"
    assert conversation.messages == (Message("system", "Be kind."), Message("user", "Hello"), Message("assistant", "Hi", 0))
    assert conversation.to_dict()["messages"] == record["messages"]


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ([], "expected an object"),
        ({"text": "hi"}, "no 'messages' in the record (found 'text')"),
        ({"messages": []}, "at least one message"),
        ({"messages": "hi"}, "must be a list"),
        ({"messages": ["hi"]}, "message 1 must be an object"),
        ({"messages": [{"role": "user"}]}, "message 1 has no 'content'"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "gpt", "content": "x"}]}, "message 2: role 'gpt'"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": []}]}, "the key 'tool_calls'"),
    ],
)
def test_refuses(record: Any, says: str) -> None:
    with pytest.raises(DataError) as error:
        parse_openai(record, default_id="x")
    assert says in str(error.value)
