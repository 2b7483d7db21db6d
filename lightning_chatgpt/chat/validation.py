"""Messages, as somebody wrote them, to checked ones: every fault that can be in them is found here.

What is done about a fault is for :class:`~lightning_chatgpt.chat.faults.Faults` to say.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning_chatgpt.chat.conversation import NAME, ROLES, Message
from lightning_chatgpt.chat.faults import Faults

MAX_MESSAGE_CHARS = 1_000_000
MAX_MESSAGES = 10_000

# What other programs call the four roles; the user's own names come from data.roles.
ROLE_ALIASES = {
    **{role: role for role in ROLES},
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "developer": "system",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}
# tool_call_id and its like only link an answer to its call, which stands before it anyway.
KNOWN_KEYS = {"role", "content", "weight", "name", "tool_calls", "function_call", "tool_call_id", "id", "refusal", "audio"}


def check_each(raw: Sequence[Any], *, faults: Faults, roles: Mapping[str, str] | None = None) -> tuple[Message, ...]:
    """Check each message of a conversation by itself, and mend what is to be mended.

    Args:
        raw: Objects with role and content and, if need be, weight, name and tool_calls.
        faults: Decides what is done about a fault.
        roles: The user's own names for roles, each with the role it stands for.

    Raises:
        DataError: A fault that is an error.
        SkipRecord: A fault for which the conversation is left out.
    """
    if len(raw) > MAX_MESSAGES:
        faults.refuse("too_large", f"{len(raw)} messages are beyond all measure ({MAX_MESSAGES} at most); split the conversation")
    checked = (_check_message(message, number, faults, roles or {}) for number, message in enumerate(raw, start=1))
    messages = tuple(message for message in checked if message is not None)
    if not messages:
        faults.refuse("no_messages", "the conversation has no messages; give it at least one, or set data.on_fault to skip")
    return messages


def check_order(messages: Sequence[Message], *, faults: Faults, needs_reply: bool = True) -> tuple[Message, ...]:
    """Check who speaks after whom, and mend what is to be mended.

    Args:
        messages: A conversation's, at least one.
        faults: Decides what is done about a fault.
        needs_reply: Whether a conversation in which the assistant says nothing is a fault.

    Raises:
        DataError: A fault that is an error.
        SkipRecord: A fault for which the conversation is left out.
    """
    messages = _system_first(list(messages), faults)
    messages = _join_repeated(messages, faults)
    first = next((i for i, message in enumerate(messages) if message.role != "system"), len(messages))
    if first < len(messages) and messages[first].role == "assistant":
        faults.mend(
            "assistant_first", f"message {first + 1}: the assistant speaks first; begin with a user message, or set data.on_fault to fix"
        )
        start = next((i for i in range(first, len(messages)) if messages[i].role != "assistant"), len(messages))
        messages = messages[:first] + messages[start:]
    if not messages:
        faults.refuse("no_messages", "nothing is left but what the assistant said first; add a user message")
    if all(message.role == "system" for message in messages):
        faults.refuse("only_system", "there is only a system message; add what the user and the assistant say")
    if needs_reply and not any(message.role == "assistant" for message in messages):
        faults.refuse("no_assistant", "the assistant says nothing, so nothing can be learnt; add its reply, or set data.on_fault to skip")
    return tuple(messages)


def check_characters(text: str, where: str, faults: Faults) -> str:
    """Check that a text can be written down: no NUL characters, no halves of UTF-16 pairs.

    Args:
        text: What is checked.
        where: What it is, for the message.
        faults: Decides what is done about a fault.

    Returns: the text, mended where it is to be.
    """
    if "\0" in text:
        faults.mend("nul_bytes", f"{where} holds a NUL character at {text.index(chr(0))}; remove it")
        text = text.replace("\0", "")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        place = f"({text[error.start]!r} at {error.start})"
        faults.mend("lone_surrogate", f"{where} holds half a character {place}; write the text as valid UTF-8")
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _check_message(message: Any, number: int, faults: Faults, roles: Mapping[str, str]) -> Message | None:
    where = f"message {number}"
    if not isinstance(message, Mapping):
        faults.refuse("wrong_type", f"{where} must be an object with role and content, found {type(message).__name__}")
    missing = [key for key in ("role", "content") if key not in message and not (key == "content" and _calls(message))]
    if missing:
        faults.refuse("wrong_type", f"{where} has no {missing[0]!r}; every message needs role and content")
    unknown = sorted(str(key) for key in message.keys() - KNOWN_KEYS if message[key] is not None)
    if unknown:
        faults.mend("unknown_key", f"{where} has the key {unknown[0]!r}, which would be lost; remove it, or set data.on_fault to fix")
    content = _check_content(message.get("content"), where, faults)
    content = "\n".join(part for part in (content, *map(_write_call, _calls(message))) if part)
    content = check_characters(content, f"{where}: content", faults)
    if not content.strip():
        faults.mend("empty_content", f"{where} is empty; remove it, or set data.on_fault to fix or skip")
        return None
    if len(content) > MAX_MESSAGE_CHARS:
        faults.refuse("too_large", f"{where} has {len(content)} characters, beyond all measure ({MAX_MESSAGE_CHARS} at most); split it")
    return Message(
        _check_role(message["role"], where, faults, roles),
        content,
        _check_weight(message.get("weight"), where, faults),
        _check_name(message.get("name"), where, faults),
    )


def _check_content(content: Any, where: str, faults: Faults) -> str:
    if content is None:
        return ""
    if isinstance(content, Sequence) and not isinstance(content, str):
        # OpenAI's content parts: pictures and sound are nothing a language model of text can read.
        texts = [part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else None for part in content]
        if not all(isinstance(text, str) for text in texts):
            faults.refuse("wrong_type", f"{where}: content is a list with something else than text in it; put a string in it")
        content = "\n".join(map(str, texts))
    if not isinstance(content, str):
        if not isinstance(content, (int, float)):
            faults.refuse("wrong_type", f"{where}: content must be text, not {type(content).__name__}; put a string in it")
        faults.mend("wrong_type", f"{where}: content must be text, not {type(content).__name__} ({content!r}); put it in quotes")
    return str(content)


def _check_role(role: Any, where: str, faults: Faults, roles: Mapping[str, str]) -> str:
    known = roles.get(str(role), ROLE_ALIASES.get(str(role).strip().lower()))
    if not isinstance(known, str):
        faults.refuse(
            "unknown_role", f"{where}: role {role!r} is unknown; use {', '.join(ROLES[:-1])} or {ROLES[-1]}, or map it with data.roles"
        )
    return known


def _check_weight(weight: Any, where: str, faults: Faults) -> float:
    if weight is None:
        return 1.0
    is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if not is_number or not math.isfinite(weight) or weight < 0:
        faults.mend("bad_weight", f"{where}: weight must be a finite number of at least 0, not {weight!r}")
        return 1.0
    return float(weight)


def _check_name(name: Any, where: str, faults: Faults) -> str:
    if name is None or name == "":
        return ""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        faults.mend("bad_name", f"{where}: name {name!r} cannot be used; take up to 64 letters or digits without spaces or markup")
        return ""
    return name


def _calls(message: Mapping[Any, Any]) -> list[Any]:
    calls = message.get("tool_calls") or message.get("function_call") or []
    return list(calls) if isinstance(calls, Sequence) and not isinstance(calls, str) else [calls]


def _write_call(call: Any) -> str:
    """A tool call as text, the way most open models write it."""
    function = call.get("function", call) if isinstance(call, Mapping) else call
    if isinstance(function, Mapping) and isinstance(function.get("arguments"), str):
        try:
            function = {**function, "arguments": json.loads(function["arguments"])}
        except ValueError:
            pass  # arguments that are no JSON stay the string they are
    return f"<tool_call>\n{json.dumps(function, ensure_ascii=False)}\n</tool_call>"


def _system_first(messages: list[Message], faults: Faults) -> list[Message]:
    n_system = next((i for i, message in enumerate(messages) if message.role != "system"), len(messages))
    late = next((i for i in range(n_system, len(messages)) if messages[i].role == "system"), None)
    if late is None:
        return messages
    faults.mend(
        "late_system", f"message {late + 1}: a system message after the conversation began; put it first, or set data.on_fault to fix"
    )
    return sorted(messages, key=lambda message: message.role != "system")  # stable: the order is kept otherwise


def _join_repeated(messages: list[Message], faults: Faults) -> list[Message]:
    joined: list[Message] = []
    for number, message in enumerate(messages, start=1):
        # Several tools may answer, and several named people speak, one after another.
        if joined and message.role == joined[-1].role != "tool" and message.name == joined[-1].name:
            faults.mend("repeated_role", f"message {number}: two {message.role} messages in a row; join them, or set data.on_fault to fix")
            # The smaller weight: what was not to be learnt stays so.
            last = joined[-1]
            joined[-1] = replace(last, content=f"{last.content}\n{message.content}", weight=min(last.weight, message.weight))
        else:
            joined.append(message)
    return joined
