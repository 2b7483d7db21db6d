"""ChatDataModule and TextDataModule, without a Trainer and with one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from lightning_chatgpt import ChatDataModule, TextDataModule
from lightning_chatgpt.chat.conversation import Conversation, Message
from lightning_chatgpt.chat.encoding import Example
from lightning_chatgpt.data.collate import collate
from lightning_chatgpt.errors import ConfigError, DataError, UserError
from tests.conftest import chat


def test_collate_by_hand() -> None:
    batch = collate([[Example([5, 6, 7], [0.0, 1.0, 0.5])], [Example([8, 9], [0.0, 1.0])]], pad_token_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, 9, -100]]
    assert batch["loss_weights"].tolist() == [[0.0, 1.0, 0.5], [0.0, 1.0, 0.0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 1, 2]]


def test_padding_is_never_a_label() -> None:
    """Guards against padding taught as text: GPT-2 pads with its end-of-text token, which is also a real one."""
    batch = collate([[Example([0, 5, 0], [0.0, 1.0, 1.0])], [Example([0, 5], [0.0, 1.0])]], pad_token_id=0)
    assert batch["labels"].tolist() == [[-100, 5, 0], [-100, 5, -100]]


def test_chat_module_by_itself(tmp_path: Path, write_chats: Callable[..., Path]) -> None:
    source = write_chats([chat(f"question {i}", f"answer {i}") for i in range(40)])
    data = ChatDataModule(train=str(source), validation=0.25, vocab_size=300, max_length=64, batch_size=4)
    data.setup("fit")
    assert data.tokenizer is not None
    seen = []
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for batch in loader:
            for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
                seen.append((data.tokenizer.decode(ids), data.tokenizer.decode(labels[labels != -100])))
    assert len(seen) == 40
    for text, learnt in seen:
        number = learnt.removeprefix("answer ").removesuffix("<|im_end|>")
        assert text.startswith(f"<|im_start|>user\nquestion {number}<|im_end|>")


def test_the_tokenizer_never_sees_validation_text(write_chats: Callable[..., Path]) -> None:
    train = write_chats([chat("abc", "abc")] * 5, "train.jsonl")
    held_out = write_chats([chat("xyzxyz", "xyzxyz")] * 5, "held_out.jsonl")
    data = ChatDataModule(train=str(train), validation=str(held_out), vocab_size=300, max_length=64)
    data.setup("fit")
    assert data.tokenizer is not None
    assert "abc" in data.tokenizer.get_vocab()
    assert not any("xyz"[: i + 1] in data.tokenizer.get_vocab() for i in (1, 2))


def test_sources_of_its_own(tokenizer: PreTrainedTokenizerFast) -> None:
    class Mine(ChatDataModule):
        def read(self, source: str):
            yield chat(f"{source}?", f"{source}!")
            yield chat(f"{source}??", f"{source}!!")

    data = Mine(train=["a", "b"], validation=None, max_length=64)
    data.tokenizer = tokenizer
    data.setup("fit")
    assert len(data.datasets["train"]) == 4
    assert data.val_dataloader() == []


def test_windows_that_teach_nothing_are_left_out_and_none_at_all_is_an_error(
    tokenizer: PreTrainedTokenizerFast, write_chats: Callable[..., Path]
) -> None:
    """Guards against a loss of 0 / 0: a chat whose every token is masked."""
    unlearnt = Conversation((Message("user", "Only"), Message("assistant", "context", 0)))
    data = ChatDataModule(train=str(write_chats([chat("Hi", "Yo"), unlearnt])), validation=None, max_length=64)
    data.tokenizer = tokenizer
    data.setup("fit")
    assert len(data.datasets["train"]) == 1
    assert data.report["parts"]["train"]["unsupervised"] == 1
    data = ChatDataModule(train=str(write_chats([unlearnt])), validation=None, max_length=64)
    data.tokenizer = tokenizer
    with pytest.raises(DataError, match="none of its tokens is supervised"):
        data.setup("fit")


@pytest.mark.parametrize(
    ("settings", "stage", "says"),
    [
        ({}, "fit", "data.train is not set"),
        ({"train": "corpus:chatterbot/german", "validation": None}, "validate", "data.validation is not set"),
        ({"train": "corpus:chatterbot/german"}, "test", "data.test is not set"),
        ({"train": "corpus:chatterbot/german", "max_length": None}, "fit", "data.max_length is not set"),
        ({"train": "corpus:chatterbot/german", "batch_size": 0}, "fit", "data.batch_size must be at least 1, not 0"),
    ],
)
def test_settings_are_refused(settings: dict, stage: str, says: str, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError) as error:
        data = ChatDataModule(**{"max_length": 64, **settings})
        data.tokenizer = tokenizer
        data.setup(stage)
    assert says in str(error.value)


def test_text_blocks_score_every_token_once(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    documents = [f"Document {i}. " * (i + 1) for i in range(12)]
    for i, document in enumerate(documents):
        (tmp_path / f"{i:02}.txt").write_text(document)
    data = TextDataModule(train=str(tmp_path), validation=None, max_length=16, batch_size=3)
    data.tokenizer = tokenizer
    data.setup("fit")
    dataset = data.datasets["train"]
    blocks = [dataset.example(i) for i in range(len(dataset))]
    assert max(dataset.lengths) == 16
    # Put the supervised tokens of the blocks one after another: the documents come back, each behind an end of text.
    scored = [
        i for ids, weights in blocks for i, w in zip(ids.tolist(), weights, strict=True) if w > 0
    ]  # fmt: skip
    assert tokenizer.decode(scored) == "".join(f"{document}<|endoftext|>" for document in documents)


def test_text_that_spells_a_control_token_is_text(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "a.txt").write_text("a <|endoftext|> b <|im_end|>")
    data = TextDataModule(train=str(tmp_path), validation=None, max_length=128)
    data.tokenizer = tokenizer
    data.setup("fit")
    ids = data.datasets["train"].example(0)[0].tolist()
    assert [i for i in ids if i in tokenizer.all_special_ids] == [0, 0]


def test_too_short_blocks_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "a.txt").write_text("a b c")
    data = TextDataModule(train=str(tmp_path), validation=None, max_length=1)
    data.tokenizer = tokenizer
    with pytest.raises(ConfigError, match="at least 2"):
        data.setup("fit")


def test_predict_prompts_in_order(write_chats: Callable[..., Path], tokenizer: PreTrainedTokenizerFast) -> None:
    source = write_chats([chat(f"q{i}", f"a{i}") for i in range(5)])
    data = ChatDataModule(predict=str(source), max_length=64, max_new_tokens=8, batch_size=2)
    data.tokenizer = tokenizer
    data.setup("predict")
    batches = list(data.predict_dataloader())
    assert [len(b["prompt_ids"]) for b in batches] == [2, 2, 1]
    described = [c for b in batches for c in b["conversations"]]
    assert [c["reference"] for c in described] == [f"a{i}" for i in range(5)]
    assert [c["id"] for c in described] == [f"chats.jsonl:{i}" for i in range(1, 6)]
    assert tokenizer.decode(batches[0]["prompt_ids"][0]) == "<|im_start|>user\nq0<|im_end|>\n<|im_start|>assistant\n"
