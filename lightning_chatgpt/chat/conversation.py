"""Message and Conversation: checked values that every other room relies on."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from lightning_chatgpt.errors import DataError

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[str, ...] = get_args(Role)


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation.

    Args:
        role: Who speaks: system, user, assistant or tool.
        content: The text, exactly as it is to be learnt or answered.
        weight: What the loss of each of this message's tokens is multiplied by; 0 keeps the message as context only.

    Raises:
        DataError: The role is unknown, the content is no text, or the weight is not a finite number of at least 0.
    """

    role: str
    content: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise DataError(f"role {self.role!r} is unknown; use {', '.join(ROLES[:-1])} or {ROLES[-1]}")
        if not isinstance(self.content, str):
            raise DataError(f"content must be text, not {type(self.content).__name__}; put a string in it")
        try:
            self.content.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"content holds half a character ({self.content[error.start]!r} at {error.start}); write the text as valid UTF-8"
            ) from None
        is_number = isinstance(self.weight, (int, float)) and not isinstance(self.weight, bool)
        if not is_number or not math.isfinite(self.weight) or self.weight < 0:
            raise DataError(f"weight must be a finite number of at least 0, not {self.weight!r}")

    def to_dict(self) -> dict[str, Any]:
        """This message in OpenAI's fine-tuning format; the weight is left out where it is 1."""
        record: dict[str, Any] = {"role": self.role, "content": self.content}
        return record if self.weight == 1.0 else {**record, "weight": self.weight}


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation: its messages in order, and a name to find it again.

    Args:
        messages: At least one message.
        id: Names the conversation in reports and predictions, such as ``chats.jsonl:17``.
        group: Conversations of one group always fall in the same split; empty means the conversation's own content.

    Raises:
        DataError: There is no message.
    """

    messages: tuple[Message, ...]
    id: str = ""
    group: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not self.messages:
            raise DataError("the conversation has no messages; give it at least one")

    @property
    def split_key(self) -> str:
        """What decides the split: the group, or else a digest of roles and contents, so that order never matters."""
        if self.group:
            return self.group
        text = json.dumps([(message.role, message.content) for message in self.messages])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """This conversation in OpenAI's fine-tuning format."""
        return {"messages": [message.to_dict() for message in self.messages]}

    def prompt_and_reference(self) -> tuple[Conversation, str | None]:
        """Split off the last assistant message.

        Returns: the conversation up to the last assistant message, and that message's content; if the conversation
            does not end with the assistant, all of it and None.
        """
        if self.messages[-1].role != "assistant" or len(self.messages) == 1:
            return self, None
        return Conversation(self.messages[:-1], self.id, self.group), self.messages[-1].content
