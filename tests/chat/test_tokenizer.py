"""Tokenizers: trained, completed, written down and restored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from lightning_chatgpt.chat.tokenizer import (
    load_tokenizer,
    stop_token_ids,
    token_byte_lengths,
    tokenizer_from_state,
    tokenizer_state,
    train_tokenizer,
)
from lightning_chatgpt.errors import ModelError

TEXT = "Größe 你好 🙂\u200d\t x  y\r\n<|im_end|> שלום"


def test_any_text_comes_back(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer(TEXT, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids) == TEXT


def test_vocabulary_size_is_obeyed_and_too_small_refused(chats: list) -> None:
    texts = [m.content for chat in chats for m in chat.messages]
    assert len(train_tokenizer(texts, vocab_size=300)) == 300
    with pytest.raises(ModelError, match="at least 259"):
        train_tokenizer(texts, vocab_size=258)


def test_state_is_plain_data_and_gives_the_same_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    state = json.loads(json.dumps(tokenizer_state(tokenizer)))
    restored = tokenizer_from_state(state)
    assert restored.get_vocab() == tokenizer.get_vocab()
    assert restored.special_tokens_map == tokenizer.special_tokens_map
    assert restored.chat_template == tokenizer.chat_template
    assert restored(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]


def test_chat_tokens_are_added_to_a_plain_gpt2(plain_gpt2: Path) -> None:
    tokenizer = load_tokenizer(plain_gpt2)
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [500, 501]
    assert stop_token_ids(tokenizer) == [501, 0]
    assert tokenizer.pad_token_id == 0
    # Loaded once more from its own save, nothing is added twice.
    assert len(tokenizer_from_state(tokenizer_state(tokenizer))) == len(tokenizer) == 502


def test_byte_lengths_add_up_to_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    lengths = token_byte_lengths(tokenizer)
    assert lengths is not None
    ids = tokenizer(TEXT, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert sum(lengths[i] for i in ids) == len(TEXT.encode())
    assert [lengths[i] for i in tokenizer.all_special_ids] == [0] * len(tokenizer.all_special_ids)


def test_a_folder_without_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=str(tmp_path)):
        load_tokenizer(tmp_path)
