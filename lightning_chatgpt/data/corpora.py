"""Real conversations that come as packages of the Python index: ChatterBot's corpus and chitchat."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from lightning_chatgpt.chat.conversation import Conversation, Message
from lightning_chatgpt.errors import DataError

_SPEAKERS = ("second", "first", "both")
_DISTRIBUTIONS = {"chatterbot": "chatterbot-corpus", "chitchat": "chitchat-dataset"}


def read_corpus(name: str) -> Iterator[Conversation]:
    """Read a corpus.

    Args:
        name: ``chatterbot/LANGUAGE`` (exact repeats are read once), ``chatterbot/*`` for all languages, or ``chitchat`` (add
            ``/first``, ``/second`` or ``/both`` for who is taken as the assistant; second is the default).

    Raises:
        DataError: There is no such corpus, or the package that brings it is not installed.
    """
    corpus_version(name)
    corpus, _, part = name.partition("/")
    yield from _read_chatterbot(part) if corpus == "chatterbot" else _read_chitchat(part or _SPEAKERS[0])


def corpus_version(name: str) -> str:
    """The package that a corpus comes from and its version, which say what is in it.

    Raises:
        DataError: There is no such corpus, or the package that brings it is not installed.
    """
    corpus = name.partition("/")[0]
    if corpus not in _DISTRIBUTIONS:
        raise DataError(f"corpus:{name} is unknown; there are corpus:chatterbot/LANGUAGE and corpus:chitchat")
    _package_folder(corpus)
    return f"{_DISTRIBUTIONS[corpus]} {version(_DISTRIBUTIONS[corpus])}"


def _package_folder(corpus: str) -> Path:
    distribution = _DISTRIBUTIONS[corpus]
    spec = importlib.util.find_spec(distribution.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise DataError(f"the corpus needs the package {distribution}, which is not installed: pip install 'lightning-chatgpt[corpora]'")
    return Path(spec.origin).parent


def _read_chatterbot(language: str) -> Iterator[Conversation]:
    import yaml

    folder = _package_folder("chatterbot") / "data"
    languages = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name.isidentifier() and p.name[0] != "_")
    if language == "*":
        for one in languages:
            yield from _read_chatterbot(one)
        return
    if language not in languages:
        raise DataError(f"corpus:chatterbot/{language} is unknown; the languages are {', '.join(languages)}, or * for all")
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
            yield Conversation(
                messages,
                id=f"{language}/{path.stem}:{number}",
                # Answers to one question stay together, so that no validation question was trained on.
                group=f"chatterbot/{lines[0].lower()}",
                labels={"language": language, "topic": path.stem},
            )


def _read_chitchat(assistant: str) -> Iterator[Conversation]:
    if assistant not in _SPEAKERS:
        raise DataError(f"corpus:chitchat/{assistant} is unknown; the assistant may be {', '.join(_SPEAKERS)}")
    path = _package_folder("chitchat") / "dataset.json"
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
