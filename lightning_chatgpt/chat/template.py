"""How a conversation is written down: ChatML, as segments and as the same thing in Jinja for other programs.

    <|im_start|>user
    Hello<|im_end|>
    <|im_start|>assistant
    Hi there<|im_end|>

The segments are the one truth for training, sampling and chat. ``CHATML_JINJA`` travels with an exported model, so that
``apply_chat_template`` of transformers writes the same.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from lightning_chatgpt.chat.conversation import Message

START_TOKEN = "<|im_start|>"
END_TOKEN = "<|im_end|>"

CHATML_JINJA = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

Supervise = Literal["assistant", "all"]


class Segment(NamedTuple):
    """A piece of a written-down conversation.

    Attributes:
        text: Ordinary text, or the name of one control token.
        is_control: Whether ``text`` names a control token; ordinary text never becomes one.
        weight: Loss weight of each of its tokens; 0 means read, not learnt.
        is_content: Whether this is what somebody said, the only part that truncation may cut.
    """

    text: str
    is_control: bool = False
    weight: float = 0.0
    is_content: bool = False


def message_segments(message: Message, *, supervise: Supervise = "assistant") -> list[Segment]:
    """Write one message down.

    Args:
        message: What is said.
        supervise: Whose words are learnt: the assistant's, or everybody's.

    Returns: the message's segments; where it is learnt, its content and its end token carry its weight.
    """
    is_learnt = supervise == "all" or message.role == "assistant"
    weight = float(message.weight) if is_learnt else 0.0
    return [
        Segment(START_TOKEN, is_control=True),
        Segment(f"{message.role}\n"),
        Segment(message.content, weight=weight, is_content=True),
        Segment(END_TOKEN, is_control=True, weight=weight),
        Segment("\n"),
    ]


def reply_segments() -> list[Segment]:
    """What stands before an assistant's reply; generation goes on from here."""
    return [Segment(START_TOKEN, is_control=True), Segment("assistant\n")]
