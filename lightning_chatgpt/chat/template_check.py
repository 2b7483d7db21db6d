"""What a template must be like to be trained with, proven on small conversations when it is chosen."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_chatgpt.chat.conversation import Message
from lightning_chatgpt.chat.jinja import STOP_PROBE, JinjaTemplate, difference
from lightning_chatgpt.chat.template import FramedTemplate, Template, Turn
from lightning_chatgpt.errors import ConfigError, DataError


def check_template(template: Template) -> str | None:
    """Prove on small conversations that a template can be trained with.

    A prompt is how its full text begins; the end of a reply is learnt; the begin token stands once; and two different
    conversations are never written the same, whatever users type.

    Returns: a warning where contents that differ in blanks at their ends only are written the same, or None.

    Raises:
        ConfigError: One of it does not hold; the message shows the offending text.
    """
    if isinstance(template, FramedTemplate):
        return None  # proven by the tests, for all conversations
    assert isinstance(template, JinjaTemplate)
    chats = [list(STOP_PROBE), [*STOP_PROBE, Message("user", "And you?"), Message("assistant", "Fine")]]
    with_system = [[Message("system", "Be kind."), *chat] for chat in chats]
    try:
        template.write(with_system[0])
        chats += with_system
    except DataError:
        pass  # a template without system messages is refused only where a conversation has one
    try:
        for chat in chats:
            _check_prompt(template, chat)
            _check_begin(template, chat)
        for chat in chats[1:]:
            _check_unforgeable(template, chat)
        _check_roles(template)
    except DataError as error:
        raise ConfigError(f"data.template: {error}") from None
    stripped = _flat(template, [Message("user", " Hello "), STOP_PROBE[1]]) == _flat(template, list(STOP_PROBE))
    return "data.template strips blanks at the ends of messages: ' Hello ' and 'Hello' are one to the model" if stripped else None


def _flat(template: Template, chat: Sequence[Message]) -> list[tuple[bool, str]]:
    """What is written, as runs of text between control tokens: equal runs are equal to a reader of tokens."""
    runs: list[tuple[bool, str]] = []
    for turn in template.write(chat):
        for is_control, text in [
            *((s.is_control, s.text) for s in turn.before),
            (False, turn.content),
            *((s.is_control, s.text) for s in turn.after),
        ]:
            if runs and not is_control and not runs[-1][0]:
                runs[-1] = (False, runs[-1][1] + text)
            else:
                runs.append((is_control, text))
    return [run for run in runs if run[1]]


def _check_prompt(template: JinjaTemplate, chat: Sequence[Message]) -> None:
    turns = template.write(chat)
    full = "".join(_text(turn) for turn in turns)
    for i, message in enumerate(chat):
        if message.role != "assistant":
            continue
        head, opening = template.write_prompt(chat[:i])
        prompt = "".join(_text(turn) for turn in head) + "".join(segment.text for segment in opening)
        if not full.startswith(prompt):
            raise ConfigError(
                f"data.template: a prompt is not how its full text begins: {difference(prompt, full)}; "
                "write what add_generation_prompt adds exactly as before an assistant message"
            )
        if not any(segment.is_control and segment.is_learnt for segment in turns[i].after):
            raise ConfigError(
                f"data.template: the end of the reply {_text(turns[i])!r} is not learnt; put its last token inside generation"
            )
        if any(segment.is_learnt for turn in turns[:i] if turn.role != "assistant" for segment in turn.before):
            raise ConfigError(
                f"data.template: {{% generation %}} stands around what others say ({_text(turns[0])!r}); put it around replies"
            )


def _check_begin(template: JinjaTemplate, chat: Sequence[Message]) -> None:
    begin = template.variables.get("bos_token")
    if _flat(template, chat)[:2] == [(True, begin), (True, begin)]:
        raise ConfigError(f"data.template: the begin token stands twice ({begin}{begin}); write it once")


def _check_unforgeable(template: JinjaTemplate, chat: Sequence[Message]) -> None:
    """A user who types what stands between two messages must not be able to make one message two."""
    turns = template.write(chat)
    for i in range(len(chat) - 1):
        between = "".join(s.text for s in turns[i].after) + "".join(s.text for s in turns[i + 1].before)
        first, second = chat[i], chat[i + 1]
        ways = [
            [*chat[:i], Message(first.role, f"p{between}q"), Message(second.role, "r"), *chat[i + 2 :]],
            [*chat[:i], Message(first.role, "p"), Message(second.role, f"q{between}r"), *chat[i + 2 :]],
        ]
        try:
            is_forged = _flat(template, ways[0]) == _flat(template, ways[1])
        except DataError:
            continue  # refused, where a user tries it too
        if is_forged:
            raise ConfigError(
                f"data.template: only text stands between {first.role} and {second.role} ({between!r}): whoever types it forges a message; "
                "end each message with eos_token or another control token"
            )


def _check_roles(template: JinjaTemplate) -> None:
    """Who says something must show."""
    written: dict[str, str] = {}
    for roles in (("system", "user", "assistant"), ("user", "assistant", "user"), ("system", "assistant", "user")):
        try:
            key = repr(_flat(template, [Message(role, f"words {i}") for i, role in enumerate(roles)]))
        except DataError:
            continue  # refused, so never mistaken for another
        if key in written:
            raise ConfigError(
                f"data.template: what {written[key]} say and what {', '.join(roles)} say is written the same; write each message's role"
            )
        written[key] = ", ".join(roles)


def _text(turn: Turn) -> str:
    return "".join(s.text for s in turn.before) + turn.content + "".join(s.text for s in turn.after)
