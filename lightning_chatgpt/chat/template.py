"""How a conversation is written down. One template writes for training, sampling, chat and export.

``chatml`` is the default; ``plain`` needs no new tokens; any Jinja template that a tokenizer brings, or a user's file, is taken apart
by :mod:`lightning_chatgpt.chat.jinja`. All give the same thing: turns, whose markers are control tokens that nobody can type.

    <|im_start|>user            user
    Hello<|im_end|>             Hello<|endoftext|>assistant
    <|im_start|>assistant       Hi there<|endoftext|>
    Hi there<|im_end|>
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from lightning_chatgpt.chat.conversation import ROLES, Message
from lightning_chatgpt.errors import ConfigError, nearest

START_TOKEN = "<|im_start|>"
END_TOKEN = "<|im_end|>"

# Plain transformers writes the same with these; they travel with an exported model.
_SPEAKER_JINJA = "message['role'] + (' name=' + message['name'] if message['name'] else '') + '\\n' + message['content']"
CHATML_JINJA = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + " + _SPEAKER_JINJA + " + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)  # fmt: skip
PLAIN_JINJA = (
    "{% for message in messages %}"
    "{{ " + _SPEAKER_JINJA + " + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant\\n' }}{% endif %}"
)  # fmt: skip

Supervise = str | list[str]


class Segment(NamedTuple):
    """A piece of what stands around a message's content.

    Attributes:
        text: Ordinary text, or the name of one control token.
        is_control: Whether ``text`` names a control token; ordinary text never becomes one.
        is_learnt: Whether it is learnt together with the content, as the token that ends a reply is.
    """

    text: str
    is_control: bool = False
    is_learnt: bool = False


class Turn(NamedTuple):
    """One message, written down.

    Attributes:
        role: Who speaks.
        before: What stands before the content.
        content: What is said, the only part that truncation may cut.
        after: What stands after it.
    """

    role: str
    before: tuple[Segment, ...]
    content: str
    after: tuple[Segment, ...]


class Template(ABC):
    """Writes conversations down.

    Attributes:
        name: What it is called in messages.
        jinja: The same template for ``apply_chat_template`` of transformers.
        stop_token: The control token that ends a reply.
        is_additive: Whether a message is written the same whatever stands around it.
    """

    name: str
    jinja: str
    stop_token: str
    is_additive: bool

    @abstractmethod
    def write(self, messages: Sequence[Message]) -> list[Turn]:
        """Write messages down, one turn each.

        Raises:
            DataError: The template cannot write them.
        """

    @abstractmethod
    def write_prompt(self, messages: Sequence[Message]) -> tuple[list[Turn], tuple[Segment, ...]]:
        """Write messages down, and what stands before the assistant's reply to them."""


class FramedTemplate(Template):
    """A marker, the speaker, a line break, the content, a marker: ChatML and its like.

    Args:
        name: What it is called in messages.
        jinja: The same template in Jinja.
        start_token: The control token before each message; empty for none.
        end_token: The control token after each.
        separator: Text between messages.
    """

    is_additive = True

    def __init__(self, name: str, jinja: str, *, start_token: str, end_token: str, separator: str) -> None:
        self.name = name
        self.jinja = jinja
        self.stop_token = end_token
        start = (Segment(start_token, is_control=True),) if start_token else ()
        end = Segment(end_token, is_control=True, is_learnt=True)
        self._after = (end, Segment(separator)) if separator else (end,)
        self._before = {role: (*start, Segment(f"{role}\n")) for role in ROLES}
        self._start = start

    def write(self, messages: Sequence[Message]) -> list[Turn]:
        """Write messages down, one turn each."""
        return [Turn(m.role, self._opening(m), m.content, self._after) for m in messages]

    def write_prompt(self, messages: Sequence[Message]) -> tuple[list[Turn], tuple[Segment, ...]]:
        """Write messages down, and what stands before the assistant's reply to them."""
        return self.write(messages), self._before["assistant"]

    def _opening(self, message: Message) -> tuple[Segment, ...]:
        if not message.name:
            return self._before[message.role]
        return (*self._start, Segment(f"{message.role} name={message.name}\n"))


@cache
def framed_template(jinja: str, eos_token: str | None) -> FramedTemplate | None:
    """Our own template that a Jinja text stands for; None where it is somebody else's."""
    if jinja == CHATML_JINJA:
        return FramedTemplate("chatml", jinja, start_token=START_TOKEN, end_token=END_TOKEN, separator="\n")
    if jinja == PLAIN_JINJA and eos_token is not None:
        return FramedTemplate("plain", jinja, start_token="", end_token=eos_token, separator="")
    return None


def is_learnt(messages: Sequence[Message], supervise: Supervise) -> list[bool]:
    """Whether each message is learnt.

    Args:
        messages: A conversation's.
        supervise: ``assistant``, ``last`` (the assistant's last message), ``all``, or a list of roles.
    """
    roles = supervised_roles(supervise)
    learnt = [message.role in roles for message in messages]
    if supervise == "last" and any(learnt):
        last = max(i for i, is_ in enumerate(learnt) if is_)
        learnt = [i == last for i in range(len(messages))]
    return learnt


def supervised_roles(supervise: Supervise) -> frozenset[str]:
    """The roles of which at least some messages are learnt.

    Raises:
        ConfigError: ``supervise`` is none of the things it may be.
    """
    if supervise == "all":
        return frozenset(ROLES)
    roles = ["assistant"] if supervise == "last" else [supervise] if isinstance(supervise, str) else supervise
    for role in roles or [""]:
        if role not in ROLES:
            known = ["assistant", "last", "all", *ROLES] if isinstance(supervise, str) else ROLES
            raise ConfigError(f"data.supervise {role!r} cannot be used; {nearest(role, known)}")
    return frozenset(roles)
