"""What the tests share: a tiny GPT-2, its tokenizer trained here, a few real chats; no network."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: a test that needs the network is a bug
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Two tests at a time share two cores: threads that wait for each other take ten times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["LIGHTNING_CHATGPT_CACHE"] = tempfile.mkdtemp(prefix="lightning_chatgpt-tests-")

import pytest

from lightning_chatgpt.chat.conversation import Conversation, Message
from lightning_chatgpt.chat.tokenizer import train_tokenizer
from lightning_chatgpt.data.sources import read_conversations

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file's tests share what its fixtures made, so they stay together; the pages of the docs take minutes each, and do not."""
    for item in items:
        if item.path.name != "test_docs.py":
            item.add_marker(pytest.mark.xdist_group(item.path.name))


ARCHITECTURE = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 128}


@pytest.fixture(scope="session")
def chats() -> list[Conversation]:
    """Real conversations: ChatterBot's English corpus."""
    return list(read_conversations("corpus:chatterbot/english"))


@pytest.fixture(scope="session")
def tokenizer(chats: list[Conversation]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 600 entries, trained on the real chats."""
    return train_tokenizer((m.content for chat in chats for m in chat.messages), vocab_size=600)


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer without merges: every byte is a token, so that ids can be written by hand."""
    return train_tokenizer([], vocab_size=259)


@pytest.fixture(scope="session")
def plain_gpt2(tmp_path_factory: pytest.TempPathFactory, chats: list[Conversation]) -> Path:
    """A transformers folder as the hub has them: a GPT-2 with random weights whose tokenizer knows no chat."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("plain_gpt2")
    bpe = ByteLevelBPETokenizer()
    texts = [m.content for chat in chats[:200] for m in chat.messages]
    bpe.train_from_iterator(texts, vocab_size=500, special_tokens=["<|endoftext|>"], show_progress=False)
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=end, bos_token=end).save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(**ARCHITECTURE, vocab_size=bpe.get_vocab_size(), bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def write_chats(tmp_path: Path) -> Callable[..., Path]:
    """Writes conversations to a JSONL file in the test's own folder."""

    def write(conversations: list[Conversation], name: str = "chats.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(c.to_dict()) + "\n" for c in conversations), encoding="utf-8")
        return path

    return write


def chat(*contents: str, system: str | None = None) -> Conversation:
    """A conversation of alternating user and assistant messages."""
    messages = [Message("system", system)] if system is not None else []
    messages += [Message(("user", "assistant")[i % 2], content) for i, content in enumerate(contents)]
    return Conversation(tuple(messages))


def trainer(folder: Path, **settings: Any) -> Any:
    """A quiet Trainer on the CPU."""
    from lightning.pytorch import Trainer

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return Trainer(**{"accelerator": "cpu", "devices": 1, "default_root_dir": folder, **quiet, **settings})
