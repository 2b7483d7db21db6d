"""What the shipped tasks of lm-eval read: local files, named by its ``metadata``, checked as all our data are.

lm-eval calls these with whatever else is in its metadata, such as the model's name; what they do not need they pass over.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_chatgpt.chat.faults import Faults
from lightning_chatgpt.chat.jinja import template_of
from lightning_chatgpt.chat.tokenizer import load_tokenizer
from lightning_chatgpt.chat.validation import check_characters
from lightning_chatgpt.data.readers import read_records
from lightning_chatgpt.data.sources import SourceReport, find_files, read_conversations, read_documents
from lightning_chatgpt.errors import ConfigError, DataError, ModelError
from lightning_chatgpt.models.build import find_pretrained, read_config

if TYPE_CHECKING:
    from datasets import Dataset

    from lightning_chatgpt.chat.conversation import Conversation
    from lightning_chatgpt.chat.template import Segment, Template


def documents(data: str = "", **_: Any) -> dict[str, Dataset]:
    """Documents, as :func:`~lightning_chatgpt.data.sources.read_documents` reads them.

    Returns: the split ``test``, with a ``text`` in each row.

    Raises:
        ConfigError: No data are named.
        DataError: They cannot be used (``file:line: what``).
    """
    report = SourceReport()
    rows = []
    for text in read_documents(_named(data), report=report):
        if not text:
            raise DataError(f"{report.faults.place}: the text is empty, so there is nothing to predict; remove it")
        rows.append({"text": text})
    return _split(rows, data)


def choices(data: str = "", **_: Any) -> dict[str, Dataset]:
    """Questions with several answers, of which one is right.

    Returns: the split ``test``, with ``question``, ``choices`` and ``answer``, the index of the right choice, in each row.

    Raises:
        ConfigError: No data are named.
        DataError: They cannot be used (``file:line: what``).
    """
    faults = Faults()
    files = find_files(_named(data))
    return _split([_question(record.value, faults) for path in files for record in read_records(path, faults=faults)], data)


def chats(data: str = "", pretrained: str = "", **_: Any) -> dict[str, Dataset]:
    """Conversations up to the assistant's last message, as text, and that message.

    Args:
        data: A source of conversations, as :func:`~lightning_chatgpt.data.sources.read_conversations` takes it.
        pretrained: The model, whose chat template writes them.

    Returns: the split ``test``, with ``prompt``, ``reply`` (the message and what ends it) and ``n_bytes`` (of the message) in each row;
        replies of more tokens than the model has positions are left out, with a warning.

    Raises:
        ConfigError: No data are named.
        DataError: They cannot be used (``file:line: what``).
        ModelError: The model carries no chat template.
    """
    source, folder = _named(data), find_pretrained(pretrained)
    try:
        tokenizer = load_tokenizer(folder, template="tokenizer")
    except ConfigError:
        raise ModelError(f"{folder}: its tokenizer carries no chat template to write chats with; name a chat model") from None
    n_positions = read_config(folder).max_position_embeddings
    template, control = template_of(tokenizer), [str(token) for token in tokenizer.all_special_tokens]
    found = list(read_conversations(source))
    rows = []
    for chat in found:
        row = _reply(chat, template)
        space = row["prompt"][len(row["prompt"].rstrip()) :]  # which lm-eval predicts as well
        if len(tokenizer(space + row["reply"])["input_ids"]) <= n_positions:
            rows.append(row)
    if n_spelt := sum(any(token in message.content for token in control for message in chat.messages) for chat in found):
        about = f"{n_spelt} of {len(found)} chats spell a control token, such as {control[0]}"
        warnings.warn(f"harness: {source}: {about}; lm-eval takes it for one, and our own evaluation for text", stacklevel=2)
    if len(rows) < len(found):
        about = f"{len(found) - len(rows)} of {len(found)} chats are left out"
        warnings.warn(f"harness: {source}: {about}, as their reply is longer than the model's {n_positions} positions", stacklevel=2)
    return _split(rows, source)


def _named(data: str) -> str:
    if not data:
        raise ConfigError("the task needs a file of its own: name it with data (lm_eval --metadata data=FILE)")
    return str(data)


def _split(rows: list[dict[str, Any]], data: str) -> dict[str, Dataset]:
    from datasets import Dataset

    if not rows:
        raise DataError(f"{data}: holds no records; a task needs one at least")
    return {"test": Dataset.from_list(rows)}


def _question(record: Any, faults: Faults) -> dict[str, Any]:
    """A checked question; errors begin with the place that ``faults`` knows."""
    if not isinstance(record, Mapping) or not isinstance(record.get("question"), str) or not isinstance(record.get("choices"), list):
        raise DataError(f'{faults.place}: expected an object like {{"question": "...", "choices": ["...", "..."], "answer": 0}}')
    question, offered, answer = record["question"], record["choices"], record.get("answer")
    if not question.strip():
        raise DataError(f"{faults.place}: the question is empty; write one, or remove the record")
    if len(offered) < 2:
        raise DataError(f"{faults.place}: choices holds {len(offered)}; two are needed at least")
    for choice in offered:
        if not isinstance(choice, str) or not choice.strip():
            raise DataError(f"{faults.place}: the choice {choice!r} is not a text that says something; write one, or remove it")
    if type(answer) is not int or not 0 <= answer < len(offered):
        raise DataError(f"{faults.place}: answer is {answer!r}, and not the index of a choice; give a number from 0 to {len(offered) - 1}")
    for text in (question, *offered):
        check_characters(text, "a text", faults)
    return {"question": question, "choices": offered, "answer": answer}


def _reply(chat: Conversation, template: Template) -> dict[str, Any]:
    last = max(number for number, message in enumerate(chat.messages) if message.role == "assistant")
    before, opening = template.write_prompt(chat.messages[:last])
    prompt = "".join(_text(turn.before) + turn.content + _text(turn.after) for turn in before) + _text(opening)
    reply = template.write(chat.messages[: last + 1])[-1]
    end = _text([segment for segment in reply.after if segment.is_learnt])
    return {"prompt": prompt, "reply": reply.content + end, "n_bytes": len(reply.content.encode())}


def _text(segments: Sequence[Segment]) -> str:
    return "".join(segment.text for segment in segments)
