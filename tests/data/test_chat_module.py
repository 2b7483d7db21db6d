"""ChatDataModule from files to batches: formats, sources, plugins, augmentation, cleaning, packing, ranks, truncation."""

from __future__ import annotations

import csv
import gzip
import importlib
import io
import json
import sys
import threading
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
import zstandard
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedTokenizerFast

from lightning_chatgpt import ChatDataModule
from lightning_chatgpt.chat.conversation import Conversation, Message
from lightning_chatgpt.chat.encoding import Encoder
from lightning_chatgpt.errors import ConfigError, DataError, UserError
from tests.conftest import chat

PAIRS = [
    ("Hello, how are you?", "Fine; and you?"),
    ("A line\nand another, with \"quotes\" and 'more'", "Tabs\tand, commas; and\nlines"),
    ("Grüße 😀 مرحبا", "你好 — naïve"),
    ("What is 1 + 1?", "2"),
    ('{"a": [1, 2]}', "<|im_end|> is text \\ here"),
]
CHATS = [chat(question, answer) for question, answer in PAIRS]
MESSAGES = [{"messages": [message.to_dict() for message in c.messages]} for c in CHATS]
FLAT = [{"question": question, "answer": answer} for question, answer in PAIRS]

Made = Callable[..., ChatDataModule]


@pytest.fixture
def module(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Made:
    """Builds a data module with the tests' tokenizer and a cache of its own, set up for training."""

    def make(train: Any, **settings: Any) -> ChatDataModule:
        defaults = {"validation": None, "max_length": 128, "batch_size": 4, "cache_dir": str(tmp_path / "cache")}
        made = ChatDataModule(train=train if isinstance(train, (dict, list)) else str(train), **{**defaults, **settings})
        made.tokenizer = tokenizer
        made.setup("fit")
        return made

    return make


def ids(data: ChatDataModule, part: str = "train") -> list[list[int]]:
    dataset = data.datasets[part]
    return [dataset.example(i)[0].tolist() for i in range(len(dataset))]


def texts(data: ChatDataModule, part: str = "train") -> list[str]:
    assert data.tokenizer is not None
    return [data.tokenizer.decode(found) for found in ids(data, part)]


def jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table(rows: list[dict[str, Any]], delimiter: str) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def parquet(rows: list[Any]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def arrow(rows: list[Any], new: Any) -> bytes:
    made = pa.Table.from_pylist(rows)
    sink = io.BytesIO()
    with new(sink, made.schema) as writer:
        writer.write_table(made)
    return sink.getvalue()


def spoken(pairs: list[tuple[str, str]]) -> str:
    return "\n\n".join(f"User: {question}\nAssistant: {answer}" for question, answer in pairs)


FORMATS: dict[str, bytes] = {
    "messages.jsonl": jsonl(MESSAGES),
    "messages.json": json.dumps(MESSAGES, indent=1).encode(),
    "inside.json": json.dumps({"version": 1, "data": MESSAGES}).encode(),
    "messages.yaml": yaml.safe_dump(MESSAGES, allow_unicode=True).encode(),
    "messages.parquet": parquet(MESSAGES),
    "messages.arrow": arrow(MESSAGES, pa.ipc.new_stream),
    "messages.feather": arrow(MESSAGES, pa.ipc.new_file),
    "messages.csv": table([{"messages": json.dumps(row["messages"])} for row in MESSAGES], ","),
    "flat.jsonl": jsonl(FLAT),
    "flat.csv": table(FLAT, ","),
    "flat.tsv": table(FLAT, "\t"),
    "flat.parquet": parquet(FLAT),
    "pairs.csv": table(FLAT, ",").split(b"\r\n", 1)[1],  # without a header
    "sharegpt.jsonl": jsonl([{"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in PAIRS]),
    "alpaca.json": json.dumps([{"instruction": q, "input": "", "output": a} for q, a in PAIRS]).encode(),
    "dolly.jsonl": jsonl([{"instruction": q, "context": "", "response": a, "category": "x"} for q, a in PAIRS]),
    "completion.jsonl": jsonl([{"prompt": q, "completion": a} for q, a in PAIRS]),
    "lines.json": json.dumps([[q, a] for q, a in PAIRS]).encode(),
    "lines.yml": yaml.safe_dump({"categories": ["x"], "conversations": [[q, a] for q, a in PAIRS]}).encode(),
    "spoken.txt": spoken(PAIRS).encode(),
    "packed.jsonl.gz": gzip.compress(jsonl(MESSAGES)),
    "packed.json.zst": zstandard.compress(json.dumps(MESSAGES).encode()),
    "packed.csv.gz": gzip.compress(table(FLAT, ",")),
    "packed.txt.zst": zstandard.compress(spoken(PAIRS).encode()),
}


def expected(tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    encoder = Encoder(tokenizer, max_length=128)
    return [list(example.input_ids) for encoded in encoder.encode(CHATS) for example in encoded.examples]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_ids(tmp_path: Path, module: Made, tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(FORMATS[name])
    data = module(path)
    assert ids(data) == expected(tokenizer)
    (report,) = data.report["sources"].values()
    assert (report["records"], report["items"], report["files"]) == (5, 5, [str(path)])
    assert sum(report["schemas"].values()) == 5


def test_saved_data_sets_give_the_same_ids(tmp_path: Path, module: Made, tokenizer: PreTrainedTokenizerFast) -> None:
    import datasets

    made = datasets.Dataset.from_list(MESSAGES)
    made.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": made}).save_to_disk(tmp_path / "only")
    datasets.DatasetDict({"train": made, "test": made.select([0])}).save_to_disk(tmp_path / "two")
    assert ids(module(tmp_path / "one")) == expected(tokenizer)
    assert ids(module(tmp_path / "only")) == expected(tokenizer)
    assert ids(module(tmp_path / "two" / "train")) == expected(tokenizer)
    with pytest.raises(DataError, match="two: holds several splits; name one: .*two/train, .*two/test"):
        module(tmp_path / "two")


def test_a_folder_and_a_list_of_formats(tmp_path: Path, module: Made, tokenizer: PreTrainedTokenizerFast) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for name in ("flat.csv", "packed.jsonl.gz", "messages.parquet"):
        (folder / name).write_bytes(FORMATS[name])
    (folder / "README.txt").write_text("Not a chat at all.")
    assert ids(module(folder)) == 3 * expected(tokenizer)
    data = module([str(folder / "flat.csv"), {"source": str(folder / "messages.parquet"), "name": "mine"}])
    assert ids(data) == 2 * expected(tokenizer)
    assert list(data.report["sources"]) == [str(folder / "flat.csv"), "mine"]


def test_schemas_may_be_mixed_in_one_file(tmp_path: Path, module: Made, tokenizer: PreTrainedTokenizerFast) -> None:
    rows: list[Any] = [
        MESSAGES[0],
        {"conversations": [{"from": "human", "value": PAIRS[1][0]}, {"from": "gpt", "value": PAIRS[1][1]}]},
        FLAT[2],
        {"prompt": PAIRS[3][0], "completion": PAIRS[3][1]},
        list(PAIRS[4]),
    ]
    (tmp_path / "mixed.jsonl").write_bytes(jsonl(rows))
    data = module(tmp_path / "mixed.jsonl")
    assert ids(data) == expected(tokenizer)
    (report,) = data.report["sources"].values()
    assert report["schemas"] == {"openai": 1, "sharegpt": 1, "question_answer": 1, "prompt_completion": 1, "lines": 1}
    with pytest.raises(DataError, match="mixed.jsonl:2: the record does not follow data.schema 'openai' \\(found 'conversations'\\)"):
        module(tmp_path / "mixed.jsonl", schema="openai")


def test_fields_and_roles_say_where_things_are(tmp_path: Path, module: Made, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"chat": {"turns": [{"who": "caller", "said": q}, {"who": "agent", "said": a}]}, "n": i} for i, (q, a) in enumerate(PAIRS)]
    (tmp_path / "own.jsonl").write_bytes(jsonl(rows))
    fields = {"messages": "chat.turns", "role": "who", "content": "said", "id": "n"}
    roles = {"caller": "user", "agent": "assistant"}
    assert ids(module(tmp_path / "own.jsonl", fields=fields, roles=roles)) == expected(tokenizer)
    # Or for one source alone, beside another that is openai's.
    (tmp_path / "plain.jsonl").write_bytes(FORMATS["messages.jsonl"])
    sources = [{"source": str(tmp_path / "own.jsonl"), "fields": fields, "roles": roles}, str(tmp_path / "plain.jsonl")]
    assert ids(module(sources)) == 2 * expected(tokenizer)
    with pytest.raises(DataError, match="own.jsonl:1: message 1: role 'caller' is unknown"):
        module(tmp_path / "own.jsonl", fields=fields)


# A user's own functions.

OWN = '''
from lightning_chatgpt.chat.conversation import Conversation, Message

PAIRS = {pairs!r}

def records(n=5, as_objects=False):
    for question, answer in PAIRS[:n]:
        if as_objects:
            yield Conversation((Message("user", question), Message("assistant", answer)), id="mine")
        else:
            yield {{"question": question, "answer": answer}}

def plugin(argument):
    return records(int(argument))

def ticket(record):
    """A schema: a record in, messages out."""
    if "asked" not in record:
        return None
    return [{{"role": "user", "content": record["asked"]}}, {{"role": "assistant", "content": record["told"]}}]
'''


@pytest.fixture
def own_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed distribution, as pip leaves it: a module and a dist-info with entry points."""
    site = tmp_path / "site"
    info = site / "own_chats-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "own_chats.py").write_text(OWN.format(pairs=PAIRS))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-chats\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[lightning_chatgpt.sources]\nticketing = own_chats:plugin\n\n[lightning_chatgpt.schemas]\nticket = own_chats:ticket\n"
    )
    monkeypatch.syspath_prepend(str(site))
    importlib.invalidate_caches()
    monkeypatch.delitem(sys.modules, "own_chats", raising=False)
    return site


def test_sources_are_functions_too(own_package: Path, module: Made, tokenizer: PreTrainedTokenizerFast) -> None:
    source = {"class_path": "own_chats.records", "init_args": {"n": 3}, "name": "mine"}
    data = module(source)
    assert ids(data) == expected(tokenizer)[:3]
    assert data.report["sources"]["mine"]["schemas"] == {"question_answer": 3}
    assert ids(module({"class_path": "own_chats.records", "init_args": {"as_objects": True}})) == expected(tokenizer)
    with pytest.raises(ConfigError, match="data.class_path own_chats.recrods: cannot be imported"):
        module({"class_path": "own_chats.recrods"})
    with pytest.raises(ConfigError, match="a source needs one of source and class_path"):
        module({"class_path": "own_chats.records", "source": "x"})
    with pytest.raises(ConfigError, match=r"\.shema is no setting; did you mean schema\?"):
        module({"source": "x", "shema": "openai"})


def test_entry_points_name_sources_and_schemas(own_package: Path, tmp_path: Path, module: Made, tokenizer: PreTrainedTokenizerFast) -> None:
    assert ids(module("ticketing:2")) == expected(tokenizer)[:2]
    rows = [{"asked": question, "told": answer} for question, answer in PAIRS]
    (tmp_path / "tickets.jsonl").write_bytes(jsonl(rows))
    for schema in ("ticket", "own_chats.ticket"):
        data = module(tmp_path / "tickets.jsonl", schema=schema)
        assert ids(data) == expected(tokenizer)
        (report,) = data.report["sources"].values()
        assert report["schemas"] == {schema: 5}
    assert ids(module({"source": str(tmp_path / "tickets.jsonl"), "schema": "ticket"})) == expected(tokenizer)
    (tmp_path / "tickets.jsonl").write_bytes(jsonl([*rows, {"a": 1}]))
    with pytest.raises(DataError, match="tickets.jsonl:6: the record does not follow data.schema 'ticket' \\(found 'a'\\)"):
        module(tmp_path / "tickets.jsonl", schema="ticket")
    with pytest.raises(ConfigError, match="data.schema 'tickets' is unknown; did you mean ticket\\?"):
        module(tmp_path / "tickets.jsonl", schema="tickets")


def test_an_entry_point_that_is_gone_is_no_source(module: Made) -> None:
    with pytest.raises(DataError, match="ticketing:2: no such file or folder"):
        module("ticketing:2")


def test_a_user_function_is_read_again_each_time(
    own_package: Path, module: Made, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(ids(module({"class_path": "own_chats.records"}))) == 5
    monkeypatch.setattr(sys.modules["own_chats"], "PAIRS", PAIRS[:2])
    assert ids(module({"class_path": "own_chats.records"})) == expected(tokenizer)[:2]


@pytest.mark.timeout(60)
def test_a_hub_that_is_offline_is_told_at_once(module: Made) -> None:
    with pytest.raises(DataError) as error:
        module("hub:org/name?split=train")
    assert str(error.value) == (
        "hub:org/name?split=train: the hub cannot be reached (HF_HUB_OFFLINE is set); connect and try again, or name a local file or folder"
    )
    with pytest.raises(ConfigError, match=r"hub:org/name\?splt=train: 'splt' is unknown; did you mean split\?"):
        module("hub:org/name?splt=train")


@pytest.mark.timeout(60)
def test_a_hub_that_accepts_and_never_answers_is_given_up(module: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against minutes of silence: such a server gave nothing in 280 s."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        accepted: list[socket.socket] = []

        def accept() -> None:
            try:
                while True:
                    accepted.append(server.accept()[0])
            except OSError:
                pass

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        monkeypatch.delenv("HF_HUB_OFFLINE")
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr("lightning_chatgpt.hub._DEADLINE_SECONDS", 0.5)
        with pytest.raises(DataError, match="hub:org/name: the hub cannot be reached \\("):
            module("hub:org/name")
        for connection in accepted:
            connection.close()


def test_chatterbot_in_all_languages(module: Made) -> None:
    data = module("corpus:chatterbot/*", truncation="skip", mixture={"label": "language", "caps": {"english": 10}})
    languages = [json.loads(text)["language"] for s in data.datasets["train"].sources for text in s.table.column("labels", s.rows)]
    assert len(set(languages)) == 28
    assert Counter(languages)["english"] == 899
    draws = data.train_sampler(data.datasets["train"]).draws
    assert draws is not None
    assert draws.sizes["english"][0] == 10 and draws.sizes["german"][0] > 10


# Mixtures by label, through the module.


def test_a_mixture_by_label(tmp_path: Path, module: Made) -> None:
    rows = [{**MESSAGES[i % 5], "topic": "ab"[i % 4 == 0], "id": str(i)} for i in range(40)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(rows))
    data = module(tmp_path / "a.jsonl", mixture={"label": "topic", "weights": {"b": 3}})
    sampler = data.train_sampler(data.datasets["train"])
    read = Counter("ab"[i % 4 == 0] for (i,) in sampler.epoch_rows(0))
    assert read == {"a": 10, "b": 30}
    assert len(data.train_dataloader()) == 10
    with pytest.raises(ConfigError, match="there is no topic 'c'; there are a, b"):
        module(tmp_path / "a.jsonl", mixture={"label": "topic", "weights": {"c": 3}}).train_dataloader()


def test_a_mixture_by_source(tmp_path: Path, module: Made) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(MESSAGES * 4))
    (tmp_path / "b.csv").write_bytes(FORMATS["flat.csv"])
    sources = [{"source": str(tmp_path / "a.jsonl"), "name": "a"}, {"source": str(tmp_path / "b.csv"), "name": "b"}]
    sampler = module(sources, mixture={"epochs": {"b": 3, "a": 0.5}}).train_sampler
    data = module(sources, mixture={"epochs": {"b": 3, "a": 0.5}})
    read = Counter("b" if i >= 20 else "a" for (i,) in sampler(data.datasets["train"]).epoch_rows(1))
    assert read == {"a": 10, "b": 15}
    assert Counter(i for (i,) in sampler(data.datasets["train"]).epoch_rows(1) if i >= 20) == dict.fromkeys(range(20, 25), 3)


# Augmentation, cleaning, truncation.


def test_only_training_chats_are_augmented(tmp_path: Path, module: Made) -> None:
    rows = [chat(f"one two three four {i}", f"answer {i}").to_dict() for i in range(40)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(rows))
    settings = {"validation": 0.3, "max_leak": None, "augmentation": {"copies": 2, "mask": 0.5, "mask_text": "###"}}
    data, plain = module(tmp_path / "a.jsonl", **settings), module(tmp_path / "a.jsonl", **{**settings, "augmentation": None})
    n = len(plain.datasets["train"])
    assert ids(data, "validation") == ids(plain, "validation")
    assert len(data.datasets["train"]) == 3 * n
    assert data.report["parts"]["train"]["augmented"] == 2 * n
    assert not data.report["parts"]["validation"].get("augmented")
    found = texts(data)
    assert found[::3] == texts(plain)  # the original stands before its copies
    for original, *copies in zip(found[::3], found[1::3], found[2::3], strict=True):
        answer = original.split("<|im_start|>assistant")[1]
        for copy in copies:
            assert copy.split("<|im_start|>assistant")[1] == answer
            assert copy.count("\n") == original.count("\n")
    masked = [text for text in found if "###" in text]
    assert len(masked) > n
    assert not any("###" in text.split("<|im_start|>assistant")[1] for text in masked)
    # Copies belong to their conversation: caps and mixtures take them together.
    assert data.datasets["train"].conversations.tolist() == [i // 3 for i in range(3 * n)]
    again = module(tmp_path / "a.jsonl", **settings, cache_dir=str(tmp_path / "other"))
    assert ids(again) == ids(data)
    assert ids(module(tmp_path / "a.jsonl", **settings, seed=1)) != ids(data)


def test_cleaning_is_counted(tmp_path: Path, module: Made) -> None:
    rows = [
        chat("Hello  there", "Fine").to_dict(),
        chat("write to me@example.org", "ok&amp;fine").to_dict(),
        chat("tell me", "I'm sorry, but I cannot assist with that request.").to_dict(),
        chat("x" * 500, "y").to_dict(),
        chat("plain", "as it is").to_dict(),
        chat("plain", "as it is").to_dict(),
    ]
    (tmp_path / "a.jsonl").write_bytes(jsonl(rows))
    cleaning: list[Any] = ["normalise", {"redact": {"kinds": ["email"]}}, "refusals", {"length": {"max_chars": 100}}, "duplicates"]
    data = module(tmp_path / "a.jsonl", cleaning=cleaning)
    (report,) = data.report["sources"].values()
    assert (report["records"], report["items"]) == (6, 4)
    assert report["cleaning"] == [
        {"step": "normalise", "changed": 2},
        {"step": "redact", "email": 1, "changed": 1},
        {"step": "refusals", "dropped": 1},
        {"step": "length", "dropped": 1},
    ]
    assert data.report["duplicates"] == {"train": {"exact": 1, "near": 0}}
    assert data.report["parts"]["train"]["items"] == 3
    learnt = [text.removeprefix("<|im_start|>user\n").split("<|im_end|>")[0] for text in texts(data)]
    assert learnt == ["Hello there", "write to <EMAIL>", "plain"]
    assert "ok&fine" in texts(data)[1]
    # What was found in the cache is told as well.
    assert module(tmp_path / "a.jsonl", cleaning=cleaning).report == data.report


def test_what_is_too_long_is_counted_by_policy(tmp_path: Path, module: Made, tokenizer: PreTrainedTokenizerFast) -> None:
    short = chat("Hi", "Yo")
    long = chat(*(f"{'question answer'.split()[i % 2]} {i} one two three" for i in range(12)))
    wide = chat("Why?", "because " * 60)
    (tmp_path / "a.jsonl").write_bytes(jsonl([c.to_dict() for c in (short, long, wide)]))
    whole = module(tmp_path / "a.jsonl", max_length=1000)
    assert whole.report["parts"]["train"]["truncated"] == 0
    n_supervised = whole.report["parts"]["train"]["supervised"]
    lengths = whole.datasets["train"].lengths
    assert (lengths > 48).tolist() == [False, True, True]
    found = {policy: module(tmp_path / "a.jsonl", max_length=48, truncation=policy) for policy in ("drop_oldest", "split", "skip")}
    for policy, data in found.items():
        counts = data.report["parts"]["train"]
        # What `split` spreads over several examples is whole; the long message is cut with either.
        assert counts["items"] == 3 and counts["truncated"] == (1 if policy == "split" else 2), policy
        assert counts["whole_tokens"] == int(lengths.sum())
        assert counts["supervised"] + counts["lost"] == n_supervised, policy  # nothing goes unsaid
        assert data.datasets["train"].lengths.max() <= 48
        assert counts["tokens"] == int(data.datasets["train"].lengths.sum())
    n_examples = {policy: len(data.datasets["train"]) for policy, data in found.items()}
    assert n_examples["drop_oldest"] == 3 and n_examples["split"] > 4 and n_examples["skip"] == 1
    counts = {policy: data.report["parts"]["train"] for policy, data in found.items()}
    assert counts["skip"]["skipped"] == 2 and counts["drop_oldest"]["skipped"] == 0
    assert counts["drop_oldest"]["cut"] == counts["split"]["cut"] == 1 and counts["skip"]["cut"] == 0
    assert counts["split"]["lost"] < counts["drop_oldest"]["lost"] < counts["skip"]["lost"]
    assert all(text.rstrip("\n").endswith("<|im_end|>") for data in found.values() for text in texts(data))
    with pytest.raises(DataError, match=r"a.jsonl:2: [0-9]+ tokens are more than data.max_length 48; raise it, or set data.truncation"):
        module(tmp_path / "a.jsonl", max_length=48, truncation="error")


# Batches.


def many(path: Path, n: int = 60) -> Path:
    path.write_bytes(jsonl([chat(f"question {i} {'word ' * (i % 7)}", f"answer {i} {'thing ' * (i % 5)}").to_dict() for i in range(n)]))
    return path


def real_tokens(batches: list[Any]) -> Counter[tuple[int, ...]]:
    """The examples of batches, by where positions begin anew, padding left out."""
    found: Counter[tuple[int, ...]] = Counter()
    for batch in batches:
        for row, positions, mask in zip(batch["input_ids"], batch["position_ids"], batch["attention_mask"], strict=True):
            n = int(mask.sum())
            assert mask[:n].all()
            starts = [*np.flatnonzero(positions[:n].numpy() == 0).tolist(), n]
            found.update(tuple(row[a:b].tolist()) for a, b in pairwise(starts))
    return found


@pytest.mark.parametrize("packing", [False, True])
def test_workers_give_the_same_batches(tmp_path: Path, module: Made, packing: bool) -> None:
    source = many(tmp_path / "a.jsonl")
    loaders = [module(source, packing=packing, num_workers=n).train_dataloader() for n in (0, 2)]
    for epoch in range(2):
        batches = []
        for loader in loaders:
            loader.sampler.set_epoch(epoch)
            batches.append(list(loader))
        assert len(batches[0]) == len(batches[1]) == len(loaders[0])
        for one, other in zip(*batches, strict=True):
            assert one.keys() == other.keys()
            for mine, theirs in zip(tree_leaves(one), tree_leaves(other), strict=True):  # targets and stretches hold several
                assert torch.equal(torch.as_tensor(mine), torch.as_tensor(theirs))


def test_packed_batches_are_max_length_wide_and_hold_every_example(tmp_path: Path, module: Made) -> None:
    source = many(tmp_path / "a.jsonl")
    data = module(source, packing=True, validation=0.3, max_leak=None)
    for part, loader in (("train", data.train_dataloader()), ("validation", data.val_dataloader())):
        batches = list(loader)
        assert {batch["input_ids"].shape[1] for batch in batches} == {128}
        assert all(
            batch[key].shape == batch["input_ids"].shape for batch in batches for key in batch if isinstance(batch[key], torch.Tensor)
        )
        assert real_tokens(batches) == Counter(map(tuple, ids(data, part)))
        n_rows = sum(len(batch["input_ids"]) for batch in batches)
        assert n_rows < len(data.datasets[part]) / 2
        supervised = sum(int((batch["labels"] != -100).sum()) for batch in batches)
        assert supervised == data.report["parts"][part]["supervised"]
    unpacked = list(module(source, validation=0.3, max_leak=None).train_dataloader())
    assert max(batch["input_ids"].shape[1] for batch in unpacked) < 128
    assert real_tokens(unpacked) == real_tokens(list(data.train_dataloader()))


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_read_everything_once_in_evaluation(
    tmp_path: Path, module: Made, monkeypatch: pytest.MonkeyPatch, packing: bool, world_size: int
) -> None:
    source = many(tmp_path / "a.jsonl", 61)
    data = module(source, validation=0.4, max_leak=None, packing=packing, max_length=64)
    n_rows = set()
    seen: Counter[tuple[int, ...]] = Counter()
    trained: Counter[tuple[int, ...]] = Counter()
    for rank in range(world_size):
        monkeypatch.setattr(data, "_ranks", lambda rank=rank: {"rank": rank, "world_size": world_size})
        seen += real_tokens(list(data.val_dataloader()))
        batches = list(data.train_dataloader())
        trained += real_tokens(batches)
        n_rows.add(sum(len(batch["input_ids"]) for batch in batches))
    assert seen == Counter(map(tuple, ids(data, "validation")))
    assert len(n_rows) == 1  # in training all make as many steps
    expected = Counter(map(tuple, ids(data)))
    assert set(trained) == set(expected)
    assert (trained - expected).total() <= (world_size - 1) * max(1, 64 // int(data.datasets["train"].lengths.min()))


def test_too_few_rows_for_the_processes_are_refused(tmp_path: Path, module: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    data = module(many(tmp_path / "a.jsonl", 20), validation=0.1, max_leak=None, packing=True)
    monkeypatch.setattr(data, "_ranks", lambda: {"rank": 0, "world_size": 2})
    assert len(data.datasets["validation"]) < 5
    with pytest.raises(DataError, match="data.validation holds 1 row\\(s\\), too few for 2 processes; add more, or use fewer"):
        data.val_dataloader()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"packing": True, "group_by_length": True}, "data.packing fills every row, so data.group_by_length has nothing to do"),
        ({"max_leak": 1.5}, "data.max_leak is a fraction of the held-out items: 0 to 1, or null for no check, not 1.5"),
        ({"mixture": {"unit": "words"}}, "data.mixture.unit cannot be 'words'"),
        ({"schema": "openai", "fields": {"messages": "m"}}, "data.schema 'openai' and data.fields contradict each other"),
        ({"fields": {"user": "q"}}, "data.fields must say where messages is, or where user and assistant are"),
        ({"fields": {"massages": "q"}}, "data.fields: 'massages' is unknown; did you mean messages?"),
        ({"roles": {"bot": "robot"}}, "data.roles: 'bot' is mapped to 'robot'; map it to system, user, assistant or tool"),
        ({"cleaning": ["normalize"]}, "data.cleaning: 'normalize' is no step; did you mean normalise?"),
        ({"schema": "open"}, "data.schema 'open' is unknown; "),
        ({"supervise": "nobody"}, "nobody"),
    ],
)
def test_settings_are_refused_in_one_line(tmp_path: Path, module: Made, settings: dict[str, Any], says: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(FORMATS["messages.jsonl"])
    with pytest.raises(UserError) as error:
        module(tmp_path / "a.jsonl", **settings)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_system_message_and_weights_reach_the_batch(tmp_path: Path, module: Made, tokenizer: PreTrainedTokenizerFast) -> None:
    messages = (
        Message("system", "Be brief."),
        Message("user", "One?"),
        Message("assistant", "Yes", weight=0),
        Message("user", "Two?"),
        Message("assistant", "No", weight=0.5),
    )
    (tmp_path / "a.jsonl").write_bytes(jsonl([Conversation(messages).to_dict()]))
    (batch,) = module(tmp_path / "a.jsonl").train_dataloader()
    weights = batch["loss_weights"][0]
    assert set(weights.tolist()) == {0.0, 0.5}
    assert tokenizer.decode(batch["labels"][0][batch["labels"][0] != -100]) == "No<|im_end|>"
    assert tokenizer.decode(batch["input_ids"][0]).startswith("<|im_start|>system\nBe brief.<|im_end|>")
