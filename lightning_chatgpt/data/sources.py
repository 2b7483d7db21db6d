"""Where conversations and documents come from: JSONL and text files, folders, globs, and corpora from PyPI.

Every error says ``file:line``.
"""

from __future__ import annotations

import glob
import importlib.util
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning_chatgpt.chat.conversation import Conversation, Message
from lightning_chatgpt.chat.schemas import parse_openai
from lightning_chatgpt.errors import DataError

CORPUS_PREFIX = "corpus:"
_SPEAKERS = ("second", "first", "both")


def read_conversations(source: str) -> Iterator[Conversation]:
    """Read conversations from one source.

    Args:
        source: A JSONL file, a folder or glob of them (``**`` descends), ``corpus:chatterbot/LANGUAGE`` (exact repeats are
            read once), or ``corpus:chitchat`` (add ``/first``, ``/second`` or ``/both`` for who is taken as the
            assistant; second is the default).

    Raises:
        DataError: There is no such source, or a record in it cannot be used (``file:line: what``).
    """
    if source.startswith(CORPUS_PREFIX):
        yield from _read_corpus(source.removeprefix(CORPUS_PREFIX))
        return
    for path in find_files(source, suffixes=(".jsonl",)):
        for number, record in read_jsonl(path):
            try:
                yield parse_openai(record, default_id=f"{path.name}:{number}")
            except DataError as error:
                raise DataError(f"{path}:{number}: {error}") from None


def read_documents(source: str) -> Iterator[str]:
    """Read plain-text documents from one source.

    Args:
        source: A text file (``.txt`` or ``.md``: one document), a JSONL file (one document a line, its ``text``), a folder
            or glob of them, or a corpus as in :func:`read_conversations` (a conversation is a document, a message a line).

    Raises:
        DataError: There is no such source, or a record in it cannot be used.
    """
    if source.startswith(CORPUS_PREFIX):
        for conversation in read_conversations(source):
            yield "\n".join(message.content for message in conversation.messages)
        return
    for path in find_files(source, suffixes=(".txt", ".md", ".jsonl")):
        if path.suffix != ".jsonl":
            yield _read_text(path)
            continue
        for number, record in read_jsonl(path):
            text = record.get("text") if isinstance(record, dict) else None
            if not isinstance(text, str):
                raise DataError(f'{path}:{number}: expected an object like {{"text": "..."}} in a JSONL file of documents')
            yield text


def find_files(source: str, *, suffixes: Sequence[str]) -> list[Path]:
    """The files a source names, sorted: itself, or those in a folder or glob that end with one of the suffixes.

    Raises:
        DataError: There is no such file, or the folder or glob holds none.
    """
    path = Path(source).expanduser()
    wanted = " or ".join(f"*{suffix}" for suffix in suffixes)
    if path.is_file():
        return [path]
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in suffixes)
        if not files:
            raise DataError(f"{source}: the folder holds no {wanted} file")
        return files
    if glob.has_magic(str(path)):
        files = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
        if not files:
            raise DataError(f"{source}: no file matches the pattern")
        return files
    raise DataError(f"{source}: no such file or folder; name a {wanted} file, a folder or glob of them, or a corpus:NAME")


def read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    """Read a JSONL file: line number (from 1) and parsed value, blank lines left out.

    Raises:
        DataError: A line is not JSON, or the file is not UTF-8.
    """
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    yield number, json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(
                        f"{path}:{number}: broken JSON at column {error.colno} ({error.msg}); one object a line is expected"
                    ) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start}: {error.reason}); save it as UTF-8") from None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start}: {error.reason}); save it as UTF-8") from None


def _read_corpus(name: str) -> Iterator[Conversation]:
    corpus, _, part = name.partition("/")
    if corpus == "chatterbot":
        yield from _read_chatterbot(part)
    elif corpus == "chitchat":
        yield from _read_chitchat(part or _SPEAKERS[0])
    else:
        raise DataError(f"corpus:{name} is unknown; there are corpus:chatterbot/LANGUAGE and corpus:chitchat")


def _package_folder(package: str, distribution: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise DataError(f"the corpus needs the package {distribution}, which is not installed: pip install 'lightning-chatgpt[corpora]'")
    return Path(spec.origin).parent


def _read_chatterbot(language: str) -> Iterator[Conversation]:
    import yaml

    folder = _package_folder("chatterbot_corpus", "chatterbot-corpus") / "data"
    languages = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name.isidentifier() and p.name[0] != "_")
    if language not in languages:
        raise DataError(f"corpus:chatterbot/{language} is unknown; the languages are {', '.join(languages)}")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    seen: set[tuple[str, ...]] = set()
    for path in sorted((folder / language).glob("*.yml")):
        records = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)["conversations"]
        for number, lines in enumerate(records, start=1):
            # A question and its answer, or a dialogue; some lines are numbers or yes/no as YAML reads them.
            lines = [str(line).strip() for line in lines if line is not None]
            lines = [line for line in lines if line]
            # Some files repeat one exchange a hundred times over.
            if len(lines) < 2 or tuple(lines) in seen:
                continue
            seen.add(tuple(lines))
            roles = ("user", "assistant")
            messages = tuple(Message(roles[i % 2], line) for i, line in enumerate(lines))
            # Answers to one question stay together, so that no validation question was trained on.
            yield Conversation(messages, id=f"{language}/{path.stem}:{number}", group=f"chatterbot/{lines[0].lower()}")


def _read_chitchat(assistant: str) -> Iterator[Conversation]:
    if assistant not in _SPEAKERS:
        raise DataError(f"corpus:chitchat/{assistant} is unknown; the assistant may be {', '.join(_SPEAKERS)}")
    path = _package_folder("chitchat_dataset", "chitchat-dataset") / "dataset.json"
    records = json.loads(path.read_text(encoding="utf-8"))
    for key, record in records.items():
        turns: list[tuple[str, list[str]]] = []
        for utterance in (utterance for block in record["messages"] for utterance in block):
            text = utterance["text"].strip()
            if not text:
                continue
            if turns and turns[-1][0] == utterance["sender"]:
                turns[-1][1].append(text)
            else:
                turns.append((utterance["sender"], [text]))
        if len(turns) < 2:
            continue  # only one person spoke: nobody answered
        for view in ("second", "first") if assistant == "both" else (assistant,):
            # The user speaks first: with the first speaker as the assistant, their opening turn is left out.
            taken = turns if view == "second" else turns[1:]
            if len(taken) < 2:
                continue
            messages = tuple(Message("user" if sender == taken[0][0] else "assistant", "\n".join(texts)) for sender, texts in taken)
            yield Conversation(messages, id=f"chitchat/{view}:{key}", group=f"chitchat/{key}")
