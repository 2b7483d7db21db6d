"""``tokenizer`` as a user meets it: what it writes, measures, prints and refuses, and how much it holds."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import ByteLevelBPETokenizer, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import lightning_chatgpt
from lightning_chatgpt.__main__ import main
from lightning_chatgpt.chat.conversation import Conversation
from lightning_chatgpt.chat.encoding import Encoder
from lightning_chatgpt.chat.tokenizer import cut_text, load_tokenizer, stop_token_ids, train_tokenizer
from lightning_chatgpt.commands import tokenizer as command
from lightning_chatgpt.data.chat import ChatDataModule
from lightning_chatgpt.data.splits import position
from lightning_chatgpt.models.causal_lm import CausalLMModule
from tests.conftest import ARCHITECTURE, chat, trainer
from tests.test_cli import refused

SPECIAL = ["<|tool|>", "[SEP]", "<｜end▁of▁turn｜>"]
BUILTIN = Path(lightning_chatgpt.__file__).parent / "base" / "smalltalk"
LOADED: dict[Path, list[PreTrainedTokenizerFast]] = {}
Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, empty, whatever this machine's own holds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, chats: list[Conversation]) -> Path:
    """A tokenizer with special tokens of its own, trained by the command on real chats."""
    place = tmp_path_factory.mktemp("trained")
    (place / "chats.jsonl").write_text("".join(json.dumps(c.to_dict()) + "\n" for c in chats), encoding="utf-8")
    special = json.dumps(SPECIAL, ensure_ascii=False)
    main(["tokenizer", str(place / "chats.jsonl"), str(place / "mine"), "--vocab_size", "600", "--special_tokens", special])
    return place / "mine"


def train(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    """Run the command; returns its report and what it says beside it."""
    main(["tokenizer", *arguments, "--json", "-"])
    printed = capsys.readouterr()
    return json.loads(printed.out), printed.err


def test_the_merges_are_those_of_the_tokenizers_library(folder: Path) -> None:
    data = ChatDataModule()
    read = list(data.read(str(folder.parent / "chats.jsonl")))
    trained_on = [c for c in read if position(c.split_key) >= 0.05]
    assert 0.92 < len(trained_on) / len(read) < 0.98
    bpe = ByteLevelBPETokenizer()
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *SPECIAL]
    texts = [m.content for c in trained_on for m in c.messages]
    bpe.train_from_iterator(texts, vocab_size=600, min_frequency=0, special_tokens=control, show_progress=False)
    expected, found = json.loads(bpe._tokenizer.to_str()), json.loads((folder / "tokenizer.json").read_text())
    assert found["model"]["vocab"] == expected["model"]["vocab"]
    assert found["model"]["merges"] == expected["model"]["merges"] and len(found["model"]["merges"]) == 600 - 256 - 6


def test_a_run_would_train_the_same(write_chats: Write, chats: list[Conversation], tmp_path: Path) -> None:
    source = str(write_chats(chats[:200]))
    main(["tokenizer", source, "mine", "--vocab_size", "400"])
    data = ChatDataModule(source, validation=0.05, vocab_size=400, max_length=64, max_leak=None)
    data.setup("fit")
    assert data.tokenizer is not None
    assert data.tokenizer.get_vocab() == load_tokenizer("mine").get_vocab()


@pytest.mark.parametrize("load", [AutoTokenizer.from_pretrained, load_tokenizer], ids=["transformers", "ours"])
def test_it_loads_with_template_and_control_tokens(load: Callable[[Path], Any], folder: Path) -> None:
    tokenizer = load(folder)
    assert len(tokenizer) == 600
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *SPECIAL]) == list(range(6))
    assert set(tokenizer.all_special_ids) == set(range(6))
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, stop_token_ids(tokenizer)) == (0, 0, [2, 0])
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text == "<|im_start|>user\nHi<|im_end|>\n"


@settings(max_examples=100, deadline=None)
@given(text=st.text() | st.lists(st.sampled_from([*SPECIAL, "<|im_end|>", " ", "a", "é", "\r\n"])).map("".join))
def test_any_text_comes_back_and_holds_no_control_token(text: str, folder: Path) -> None:
    for tokenizer in LOADED.setdefault(folder, [AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)]):
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert not set(ids) & set(tokenizer.all_special_ids)


def test_what_a_user_types_is_no_special_token(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    (encoded,) = Encoder(tokenizer, max_length=200).encode([chat("".join(SPECIAL), "ok")])
    assert not set(tokenizer.convert_tokens_to_ids(SPECIAL)) & set(encoded.examples[0].input_ids)
    assert tokenizer.encode("<|tool|>[SEP]", add_special_tokens=False) == tokenizer.convert_tokens_to_ids(SPECIAL[:2])


def test_a_model_from_scratch_takes_it(folder: Path, write_chats: Write, tmp_path: Path) -> None:
    source = str(write_chats([chat(f"question {i}", f"answer {i}") for i in range(8)]))
    module = CausalLMModule(architecture=ARCHITECTURE)
    trainer(tmp_path, max_steps=1).fit(module, ChatDataModule(source, validation=None, tokenizer=str(folder)))
    assert module.tokenizer is not None and module.tokenizer.get_vocab() == load_tokenizer(folder).get_vocab()
    assert module.network.config.vocab_size == 600


# What is measured.


def test_a_measure_by_hand() -> None:
    tokenizer = train_tokenizer(["ab ab ab"], vocab_size=260)  # one merge: a and b, three times
    assert command.measure(tokenizer, ["ab ab", "é"]) == {
        "vocabulary": 260,
        "bytes": 7,
        "tokens": 5,  # ab, the space, ab; two bytes of é
        "bytes_per_token": 7 / 5,
        "used": 4 / 257,
    }
    assert command.measure(tokenizer, ["<|im_end|>"])["tokens"] == 10  # spelt out
    assert command.measure(tokenizer, [])["bytes_per_token"] == 0


def test_only_what_is_held_out_is_measured(write_chats: Write, chats: list[Conversation], capsys: pytest.CaptureFixture[str]) -> None:
    source = str(write_chats(chats))
    report, _ = train(source, "mine", "--vocab_size", "500", capsys=capsys)
    held_out = [c for c in ChatDataModule().read(source) if position(c.split_key) < 0.05]
    contents = [m.content for c in held_out for m in c.messages]
    assert (report["held_out"], report["trained_on"], report["share"]) == (len(held_out), len(chats) - len(held_out), 1)
    assert [found["name"] for found in report["tokenizers"]] == ["mine", "builtin:smalltalk"]
    for found, place in zip(report["tokenizers"], ("mine", BUILTIN), strict=True):
        tokenizer = AutoTokenizer.from_pretrained(place)
        ids = [tokenizer(text, split_special_tokens=True, add_special_tokens=False)["input_ids"] for text in contents]
        assert found["bytes"] == sum(len(text.encode()) for text in contents)
        assert found["tokens"] == sum(map(len, ids))
        assert found["bytes_per_token"] == found["bytes"] / found["tokens"]
        assert found["used"] == len({i for some in ids for i in some}) / (found["vocabulary"] - 3)
    lengths = [len(entry.encode()) for entry in report["longest"]]
    entries = [entry for entry in AutoTokenizer.from_pretrained("mine").get_vocab() if not entry.startswith("<|")]
    assert lengths == sorted(map(len, entries), reverse=True)[: len(lengths)]  # each byte is spelt as one character


def test_gpt2_is_compared_with_where_it_is_at_hand(
    write_chats: Write, chats: list[Conversation], plain_gpt2: Path, hub_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(write_chats(chats[:60])), "mine", "--vocab_size", "300", "--overwrite", "true"]
    report, said = train(*arguments, capsys=capsys)
    assert [found["name"] for found in report["tokenizers"]] == ["mine", "builtin:smalltalk"]
    assert "GPT-2's tokenizer is not in the hub's cache" in said
    snapshot = hub_cache / "models--openai-community--gpt2" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("abc")
    shutil.copy(plain_gpt2 / "tokenizer.json", snapshot)
    report, said = train(*arguments, capsys=capsys)
    assert [found["name"] for found in report["tokenizers"]] == ["mine", "openai-community/gpt2", "builtin:smalltalk"]
    assert report["tokenizers"][1]["vocabulary"] == 500  # as it lies there: no chat tokens are added
    assert "GPT-2" not in said
    report, said = train(*arguments, "--compare", str(plain_gpt2), capsys=capsys)
    assert [found["vocabulary"] for found in report["tokenizers"]] == [300, 500] and "GPT-2" not in said


def test_what_is_printed(write_chats: Write, chats: list[Conversation], capsys: pytest.CaptureFixture[str]) -> None:
    source = str(write_chats(chats[:60]))
    main(["tokenizer", source, "mine", "--vocab_size", "300", "--json", "report.json"])
    printed = capsys.readouterr().out
    report = json.loads(Path("report.json").read_text())
    mine, small = report["tokenizers"]
    assert f"{source}: 60 read as chats" in printed and f"Measured on {report['held_out']} held out, {mine['bytes']:,} bytes" in printed
    for row, cells in {
        "vocabulary": ["300", "8,192"],
        "tokens": [f"{mine['tokens']:,}", f"{small['tokens']:,}"],
        "difference": ["", f"{small['tokens'] / mine['tokens'] - 1:+.1%}"],
        "bytes per token": [f"{mine['bytes_per_token']:.3f}", f"{small['bytes_per_token']:.3f}"],
    }.items():
        (line,) = [line for line in printed.splitlines() if line.startswith(f"│ {row} ")]
        assert [cell.strip() for cell in line.strip("│").split("│")][1:] == cells


def test_one_document_is_measured_on_itself(capsys: pytest.CaptureFixture[str]) -> None:
    Path("book.txt").write_text("a long story " * 20)
    main(["tokenizer", "book.txt", "mine", "--vocab_size", "262"])
    printed = capsys.readouterr()
    assert "Measured on the text it was trained on, as one document cannot be held out, 260 bytes" in printed.out
    main(["tokenizer", "book.txt", "mine", "--vocab_size", "5000", "--overwrite", "true"])
    assert f"too small for 5000 entries; there are {len(load_tokenizer('mine'))}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        ({"a.jsonl": json.dumps(chat("Hi", "ho").to_dict())}, "chats"),
        ({"a.jsonl": '{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}'}, "chats"),
        ({"a.jsonl": json.dumps(chat("Hi", "ho").to_dict()), "README.md": "Some chats."}, "chats"),
        ({"a.txt": "User: Hi\nAssistant: ho\n"}, "chats"),
        ({"a.txt": "Once upon a time."}, "text"),
        ({"a.jsonl": '{"text": "some text"}'}, "text"),
    ],
)
def test_chats_and_plain_text_are_told_apart(files: dict[str, str], kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("data").mkdir()
    for name, content in files.items():
        Path("data", name).write_text(content)
    report, _ = train("data", "mine", "--vocab_size", "259", capsys=capsys)
    assert report["sources"] == [{"source": "data", "kind": kind, "documents": 1}]


def test_sources_of_both_kinds_are_read_together(write_chats: Write, capsys: pytest.CaptureFixture[str]) -> None:
    write_chats([chat("Quokka?", "Quokka quokka!")])
    Path("wombat.txt").write_text("wombat wombat wombat")
    report, _ = train('["wombat.txt", {source: chats.jsonl, name: mine}]', "mine", "--vocab_size", "280", capsys=capsys)
    assert {(found["source"], found["kind"]) for found in report["sources"]} == {("wombat.txt", "text"), ("mine", "chats")}
    report, _ = train("chats.jsonl", "other", "--kind", "chats", "--schema", "openai", "--vocab_size", "280", capsys=capsys)
    assert " quokka" in load_tokenizer("other").decode(range(280))


# How much is held.


@settings(max_examples=100, deadline=None)
@given(
    words=st.lists(st.sampled_from(["a", "don't", "größe", "你好", "12", "x_y", "..."])), gap=st.sampled_from([" ", "\n", "\n\n ", " \t"])
)
def test_a_cut_text_has_the_same_words(words: list[str], gap: str) -> None:
    text = gap.join(words)
    cutter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces = list(cut_text(text, size=12))
    assert "".join(pieces) == text and max(map(len, pieces)) <= 24
    assert [word for piece in pieces for word, _ in cutter.pre_tokenize_str(piece)] == [word for word, _ in cutter.pre_tokenize_str(text)]


def test_text_without_white_space_is_cut_too() -> None:
    assert [len(piece) for piece in cut_text("x" * 100, size=20)] == [40, 40, 20]
    assert list(cut_text("")) == [""]


def strange_words(n: int) -> Iterator[str]:
    """Pieces of ten words of eight bytes each, no word twice."""
    return (" ".join(f"w{10 * i + j:07}" for j in range(10)) for i in range(n))


@pytest.mark.parametrize(("limit", "share"), [(100_000, 1.0), (80_000, 1.0), (79_999, 0.5), (20_500, 0.25), (900, 1 / 128)])
def test_as_much_is_taken_as_fits(limit: int, share: float) -> None:
    assert command.fitting_share(strange_words(1000), limit=limit) == share
    taken, double = (sum(place < bound for place, _ in command.placed(strange_words(1000))) for bound in (share, 2 * share))
    assert 80 * taken <= limit and (share == 1 or 80 * double > limit)


def test_frequent_words_are_held_once() -> None:
    assert command.fitting_share((f"{text} and the rest" for text in strange_words(3) for _ in range(500)), limit=80 * 3 + 10) == 1


def test_what_is_counted_does_not_grow_with_the_text() -> None:
    peaks = []
    for n in (1_000, 8_000):
        tracemalloc.start()
        command.fitting_share(strange_words(n), limit=20_000)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_training_is_fed_a_sample_piece_by_piece(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    Path("book.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in strange_words(1000)))
    monkeypatch.setattr(command, "_COST", 1e9 / 20_000)  # a gigabyte is for 20,000 bytes of different words
    fed: list[str] = []

    def watched(texts: Any, **settings: Any) -> PreTrainedTokenizerFast:
        assert texts == [] or isinstance(texts, Iterator)
        fed.extend(texts)
        return train_tokenizer(fed, **settings)

    monkeypatch.setattr("lightning_chatgpt.chat.tokenizer.train_tokenizer", watched)
    main(["tokenizer", "book.jsonl", "mine", "--vocab_size", "300"])
    assert "Trained on 1/4 of the text" in capsys.readouterr().out
    assert 10_000 < sum(len(word) for word in {word for text in fed for word in text.split()}) <= 20_000
    fed.clear()
    main(["tokenizer", "book.jsonl", "mine", "--vocab_size", "300", "--max_memory", "4", "--overwrite", "true"])
    assert "of the text" not in capsys.readouterr().out and len(fed) >= 940


# What is refused, in one line.


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["chats.jsonl", "full"], "full: is not empty; name another folder, or add --overwrite true"),
        (["chats.jsonl", "chats.jsonl"], "chats.jsonl: is not empty"),
        (["chats.jsonl", "chats.jsonl/mine"], "chats.jsonl/mine: cannot be written"),
        (["missing.jsonl", "mine"], "missing.jsonl: no such file"),
        (["empty.jsonl", "mine"], "empty.jsonl: nothing to read"),
        (["bad.jsonl", "mine"], "bad.jsonl:2: "),
        (["chats.jsonl", "mine", "--kind", "text"], "chats.jsonl:1: expected an object like"),
        (["chats.jsonl", "mine", "--kind", "text", "--schema", "openai"], "schema 'openai' is for chats"),
        (["chats.jsonl", "mine", "--vocab_size", "258"], "needs at least 259"),
        (["chats.jsonl", "mine", "--vocab_size", "260", "--special_tokens", '["<|a|>", "<|b|>"]'], "needs at least 261"),
        (["chats.jsonl", "mine", "--special_tokens", '["<|a|>", "<|a|>"]'], "'<|a|>' is there twice"),
        (["chats.jsonl", "mine", "--special_tokens", "<|im_end|>"], "'<|im_end|>' is there twice, or comes with the template"),
        (["chats.jsonl", "mine", "--special_tokens", '[""]'], "'' is empty"),
        (["chats.jsonl", "mine", "--special_tokens", '[" <|a|>"]'], "' <|a|>' begins or ends with white space"),
        (["chats.jsonl", "mine", "--special_tokens", "TOOL"], "'TOOL' could be a word that a user types; write it as <|TOOL|>"),
        (["chats.jsonl", "mine", "--special_tokens", "<|"], "could be a word that a user types; write it as <|name|>"),
        (["chats.jsonl", "mine", "--special_tokens", "Ã©"], "could be a word"),  # how the two bytes of é are spelt
        (["chats.jsonl", "mine", "--template", "chatlm"], "data.template chatlm"),
        (["chats.jsonl", "mine", "--compare", "some/model"], "compare: some/model is no folder with a tokenizer.json"),
        (["chats.jsonl", "mine", "--compare", "a/b/c/d"], "compare: a/b/c/d is no folder"),
        (["chats.jsonl", "mine", "--compare", "builtin:talk"], "builtin:talk is unknown"),
        (["chats.jsonl", "mine", "--compare", "broken"], "tokenizer.json: cannot be read"),
        (["chats.jsonl", "mine", "--max_memory", "0.01"], "max_memory must be at least 0.1"),
        (["chats.jsonl", "mine", "--vocab_size", "260", "--json", "no/report.json"], "no/report.json: cannot be written"),
    ],
)
def test_refused(arguments: list[str], expected: str, write_chats: Write, capsys: pytest.CaptureFixture[str]) -> None:
    write_chats([chat("Hi", "ho"), chat("Hey", "you")])
    Path("full").mkdir()
    Path("full", "notes.txt").write_text("mine")
    Path("empty.jsonl").write_text("")
    Path("bad.jsonl").write_text(json.dumps(chat("a", "b").to_dict()) + '\n{"messages": []}\n')
    Path("broken").mkdir()
    Path("broken", "tokenizer.json").write_text("{}")
    message = refused("tokenizer", *arguments, capsys=capsys)
    assert expected in message
    assert Path("full", "notes.txt").read_text() == "mine"
