"""Records, as they stand in files, to conversations.

One schema for now: OpenAI's fine-tuning format, ``{"messages": [{"role": …, "content": …, "weight": …}, …]}``.
"""

from __future__ import annotations

from typing import Any

from lightning_chatgpt.chat.conversation import Conversation, Message
from lightning_chatgpt.errors import DataError

_MESSAGE_KEYS = {"role", "content", "weight"}


def parse_openai(record: Any, *, default_id: str) -> Conversation:
    """Read one record of OpenAI's fine-tuning format.

    Args:
        record: The parsed JSON value.
        default_id: The conversation's id where the record has no ``id`` of its own.

    Raises:
        DataError: The record is not of this format; the message says which part, without the place in the file.
    """
    if not isinstance(record, dict):
        raise DataError(f'expected an object like {{"messages": [...]}}, found {type(record).__name__}')
    if "messages" not in record:
        found = ", ".join(map(repr, list(record)[:5])) or "no keys"
        raise DataError(f"no 'messages' in the record (found {found}); write it as {{\"messages\": [...]}}")
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
        raise DataError("'messages' must be a list of at least one message")
    return Conversation(
        tuple(_parse_message(message, number) for number, message in enumerate(messages, start=1)),
        id=str(record.get("id", default_id)),
    )


def _parse_message(message: Any, number: int) -> Message:
    if not isinstance(message, dict):
        raise DataError(f"message {number} must be an object with role and content, found {type(message).__name__}")
    missing = {"role", "content"} - message.keys()
    if missing:
        raise DataError(f"message {number} has no {sorted(missing)[0]!r}; every message needs role and content")
    # A key that would change what is learnt, such as tool_calls, is refused rather than dropped.
    unknown = message.keys() - _MESSAGE_KEYS
    if unknown:
        raise DataError(f"message {number} has the key {sorted(unknown)[0]!r}; only role, content and weight are read")
    try:
        return Message(message["role"], message["content"], message.get("weight", 1.0))
    except DataError as error:
        raise DataError(f"message {number}: {error}") from None
