"""Message and Conversation: checked values that every other room relies on."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from lightning_chatgpt.errors import DataError

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[str, ...] = get_args(Role)
NAME = re.compile(r"[^\s<|\\/>\ud800-\udfff]{1,64}")  # what OpenAI takes as a speaker's name: nothing that could look like a marker


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation.

    Args:
        role: Who speaks: system, user, assistant or tool.
        content: The text, exactly as it is to be learnt or answered.
        weight: What the loss of each of this message's tokens is multiplied by; 0 keeps the message as context only.
        name: Who of several speakers of one role this is, or which tool; empty where it does not matter.

    Raises:
        DataError: The role is unknown, the content is no text, the weight is not a finite number of at least 0, or the name
            holds spaces or markup.
    """

    role: str
    content: str
    weight: float = 1.0
    name: str = ""

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
        if self.name and not NAME.fullmatch(self.name):
            raise DataError(f"name {self.name!r} cannot be used; take up to 64 letters or digits without spaces or markup")

    def to_dict(self) -> dict[str, Any]:
        """This message in OpenAI's fine-tuning format; a weight of 1 and an empty name are left out."""
        record: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.name:
            record["name"] = self.name
        if self.weight != 1.0:
            record["weight"] = self.weight
        return record


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation: its messages in order, and a name to find it again.

    Args:
        messages: At least one message.
        id: Names the conversation in reports and predictions, such as ``chats.jsonl:17``.
        group: Conversations of one group always fall in the same split; empty means the conversation's own content.
        labels: What else the record said of the conversation, such as its topic; mixtures and reports tell chats apart by it.
        rejected: What should not have been said in place of the last messages, kept for preference tuning.

    Raises:
        DataError: There is no message.
    """

    messages: tuple[Message, ...]
    id: str = ""
    group: str = field(default="", compare=False)
    labels: Mapping[str, str] = field(default_factory=dict, compare=False)
    rejected: tuple[Message, ...] = ()

    def __post_init__(self) -> None:
        if not self.messages:
            raise DataError("the conversation has no messages; give it at least one")

    @property
    def digest(self) -> bytes:
        """16 bytes that are equal for equal roles and contents."""
        text = json.dumps([(message.role, message.content) for message in self.messages])
        return hashlib.blake2b(text.encode(), digest_size=16).digest()

    @property
    def split_key(self) -> str:
        """What decides the split: the group, or else a digest of roles and contents, so that order never matters."""
        return self.group or self.digest.hex()

    def to_dict(self) -> dict[str, Any]:
        """This conversation in OpenAI's fine-tuning format."""
        return {"messages": [message.to_dict() for message in self.messages]}

    def to_record(self) -> dict[str, Any]:
        """All there is to know of this conversation, as plain data that :meth:`from_record` reads again."""
        record = {"id": self.id, "group": self.group, "labels": dict(self.labels), **self.to_dict()}
        return {**record, "rejected": [message.to_dict() for message in self.rejected]} if self.rejected else record

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Conversation:
        """The conversation that :meth:`to_record` wrote down."""
        messages, rejected = (tuple(Message(**message) for message in record.get(key, ())) for key in ("messages", "rejected"))
        return cls(messages, record["id"], record["group"], record["labels"], rejected)

    def prompt_and_reference(self) -> tuple[Conversation, str | None]:
        """Split off the last assistant message.

        Returns: the conversation up to the last assistant message, and that message's content; if the conversation
            does not end with the assistant, all of it and None.
        """
        if self.messages[-1].role != "assistant" or len(self.messages) == 1:
            return self, None
        return replace(self, messages=self.messages[:-1]), self.messages[-1].content
