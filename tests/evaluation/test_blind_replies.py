"""What two models answer to the same prompts, against each of them alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lightning_chatgpt.chat.conversation import Conversation
from lightning_chatgpt.chat.encoding import Encoder
from lightning_chatgpt.errors import ConfigError, DataError
from lightning_chatgpt.evaluation import records
from lightning_chatgpt.evaluation.blind_replies import answer, read_prompts
from lightning_chatgpt.evaluation.records import Item
from lightning_chatgpt.evaluation.votes import Pair
from lightning_chatgpt.generation.generate import generate_replies
from lightning_chatgpt.models.build import load_model
from tests.conftest import ARCHITECTURE, chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ITEMS = [Item(chat(f"What is the number {i}?", "It is odd."), f"p{i}", "numbers") for i in range(5)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return tiny_models(tmp_path_factory.mktemp("models"), tokenizer)


def tiny_models(folder: Path, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Two transformers folders with random weights."""
    import torch

    from lightning_chatgpt.models.build import network_from_scratch
    from lightning_chatgpt.models.export import export_folder

    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        network = network_from_scratch(ARCHITECTURE, tokenizer=tokenizer)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(8)  # so that replies depend on the prompt
        export_folder(network, tokenizer, folder / name)
    return [str(folder / "first"), str(folder / "second")]


def answered(models: list[str], folder: Path, items: list[Item] = ITEMS, **changes: Any) -> tuple[list[Pair], list[str]]:
    return answer(items, models=models, folder=folder, **{"max_new_tokens": 6, "batch_size": 2, **changes})


def test_replies_are_those_of_each_model_alone(models: list[str], tmp_path: Path) -> None:
    pairs, _ = answered(models, tmp_path)
    assert [pair.id for pair in pairs] == ["p0", "p1", "p2", "p3", "p4"]
    assert all(pair.replies["A"] != pair.replies["B"] for pair in pairs)
    assert len({pair.replies["A"] for pair in pairs}) > 1
    for model, letter in zip(models, ("A", "B"), strict=True):
        network, tokenizer = load_model(model)
        for item, pair in zip(ITEMS, pairs, strict=True):
            assert pair.prompt == item.content.messages[:1]  # type: ignore[union-attr]  # the reply that is there is no prompt
            ids = Encoder(tokenizer, max_length=122).encode_prompt(Conversation(pair.prompt))
            (alone,) = generate_replies(network, tokenizer, [ids], max_new_tokens=6)
            assert (pair.replies[letter], letter in pair.cut) == (alone.text, alone.finish_reason == "length")  # type: ignore[index]


def test_what_was_answered_is_not_answered_again(models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, digests = answered(models, tmp_path)
    longer, _ = answered(models, tmp_path, max_new_tokens=9)
    assert all(len(b.replies["A"]) > len(a.replies["A"]) for a, b in zip(pairs, longer, strict=True) if "A" in a.cut)
    monkeypatch.setattr(records, "generate_replies", None)
    assert answered(models, tmp_path) == (pairs, digests)
    swapped, swapped_digests = answered(models[::-1], tmp_path)
    assert [pair.replies["B"] for pair in swapped] == [pair.replies["A"] for pair in pairs]
    assert swapped_digests == digests[::-1]


def test_one_model_against_itself_is_refused(models: list[str], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(models[0], copy)
    with pytest.raises(ConfigError, match=r"first and .*copy are the same model; name two that differ"):
        answered([models[0], str(copy)], tmp_path)


def test_prompts_need_no_reply(write_chats: Callable[..., Path]) -> None:
    path = write_chats([chat("Hi", "Hello.", "How are you?"), chat("Hi")])
    first, second = read_prompts(str(path))
    assert (first.id, second.id) == ("chats.jsonl:1", "chats.jsonl:2")


def test_a_text_file_holds_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("Hello there\n\n What is 2: 1?\n")
    assert [(item.id, item.content.messages[0].content) for item in read_prompts(str(path))] == [
        ("prompts.txt:1", "Hello there"),
        ("prompts.txt:3", "What is 2: 1?"),
    ]
    path.write_text("User: Hello\nAssistant: Hi\n")
    (item,) = read_prompts(str(path))
    assert [message.role for message in item.content.messages] == ["user", "assistant"]


def test_prompts_that_cannot_be_told_apart_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"id": "x", "messages": [{"role": "user", "content": text}]}) + "\n" for text in "ab"))
    with pytest.raises(DataError, match=r"prompts\.jsonl: two conversations have the id 'x'"):
        read_prompts(str(path))
    path.write_text("")
    with pytest.raises(DataError, match="nothing to read in there"):
        read_prompts(str(path))
