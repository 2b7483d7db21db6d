"""Sources: real corpora, JSONL files, and the place of every fault."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from lightning_chatgpt.data.sources import read_conversations, read_documents
from lightning_chatgpt.errors import DataError

GOOD = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}\n'


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_files_folders_and_globs(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", GOOD * 2)
    write(tmp_path / "deep" / "a.jsonl", "\ufeff" + GOOD + "\r\n\n" + GOOD)  # a byte-order mark, CRLF and blank lines are fine
    write(tmp_path / "notes.md", "not a chat")
    assert len(list(read_conversations(str(tmp_path)))) == 4
    assert len(list(read_conversations(str(tmp_path / "*.jsonl")))) == 2
    assert [c.id for c in read_conversations(str(tmp_path / "**" / "a.jsonl"))] == ["a.jsonl:1", "a.jsonl:4"]


def test_a_folder_of_documents_may_hold_nothing_but_markdown(tmp_path: Path) -> None:
    write(tmp_path / "deep" / "b.md", "second")
    write(tmp_path / "a.MD", "first")
    assert list(read_documents(str(tmp_path))) == ["first", "second"]
    write(tmp_path / "c.txt", "third")
    assert list(read_documents(str(tmp_path))) == ["first", "third", "second"]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("no/such.jsonl", "no/such.jsonl: no such file or folder"),
        ("no/*.jsonl", "no file matches the pattern"),
        ("corpus:nothing", "there are corpus:chatterbot/LANGUAGE and corpus:chitchat"),
        ("corpus:chatterbot/klingon", "the languages are bengali, chinese"),
        ("corpus:chitchat/third", "the assistant may be second, first, both"),
    ],
)
def test_a_missing_source_is_named(source: str, says: str) -> None:
    with pytest.raises(DataError) as error:
        list(read_conversations(source))
    assert says in str(error.value)


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the folder holds no file that can be read"):
        list(read_conversations(str(tmp_path)))


def test_chatterbot_is_read_once_each_and_in_every_language() -> None:
    import chatterbot_corpus

    folder = Path(chatterbot_corpus.__file__).parent / "data"
    languages = [p.name for p in folder.iterdir() if p.is_dir() and list(p.glob("*.yml"))]
    assert len(languages) == 28
    for language in languages:
        conversations = list(read_conversations(f"corpus:chatterbot/{language}"))
        assert len({c.messages for c in conversations}) == len(conversations) > 0
        assert all([m.role for m in c.messages[:2]] == ["user", "assistant"] for c in conversations)
    english = list(read_conversations("corpus:chatterbot/english"))
    assert len(english) == 899


def test_chitchat_turns_are_the_speakers_own_messages() -> None:
    import chitchat_dataset

    records = json.loads((Path(chitchat_dataset.__file__).parent / "dataset.json").read_text())
    conversations = {c.id: c for c in read_conversations("corpus:chitchat/both")}
    checked = 0
    for key, record in list(records.items())[:500]:
        utterances = [u for block in record["messages"] for u in block if u["text"].strip()]
        second = conversations.get(f"chitchat/second:{key}")
        if len({u["sender"] for u in utterances}) < 2:
            assert second is None
            continue
        assert second is not None
        first_sender = utterances[0]["sender"]
        for role, said in (("user", True), ("assistant", False)):
            contents = [m.content for m in second.messages if m.role == role]
            texts = [u["text"].strip() for u in utterances if (u["sender"] == first_sender) == said]
            assert "\n".join(contents) == "\n".join(texts)
        roles = [m.role for m in second.messages]
        assert all(a != b for a, b in pairwise(roles))  # consecutive messages are one turn
        first = conversations.get(f"chitchat/first:{key}")
        if first is not None:
            assert [m.content for m in first.messages] == [m.content for m in second.messages[1:]]
            assert first.messages[0].role == "user"
            assert first.split_key == second.split_key  # never one in train and the other in validation
            checked += 1
    assert checked > 100


def test_a_missing_corpus_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install 'lightning-chatgpt\[corpora\]'"):
        list(read_conversations("corpus:chitchat"))


def test_documents(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "First.\n\nStill first.")
    write(tmp_path / "b.jsonl", '{"text": "Second."}\n{"text": "Third."}\n')
    assert list(read_documents(str(tmp_path))) == ["First.\n\nStill first.", "Second.", "Third."]
    bad = write(tmp_path / "c.jsonl", '{"content": "x"}\n')
    with pytest.raises(DataError, match=f"{bad}:1: expected an object like"):
        list(read_documents(str(bad)))
