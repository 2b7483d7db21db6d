"""What two models answer is kept, gone on with, and never mixed up with what others answered."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lightning_chatgpt.chat.conversation import Conversation, Message
from lightning_chatgpt.chat.encoding import Encoder
from lightning_chatgpt.errors import ConfigError, DataError, ModelError
from lightning_chatgpt.evaluation.blind_replies import answer, identity, read_prompts
from lightning_chatgpt.evaluation.votes import Pair
from lightning_chatgpt.generation import generate
from lightning_chatgpt.models.build import load_model
from tests.conftest import ARCHITECTURE, chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PROMPTS = [Conversation((Message("user", f"What is the number {i}?"),), id=f"p{i}") for i in range(5)]


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


def answered(models: list[str], output: Path, prompts: list[Conversation] = PROMPTS, **changes: Any) -> list[Pair]:
    settings = {"identities": [identity(model) for model in models], "max_new_tokens": 6, "batch_size": 2, **changes}
    return answer(prompts, models=models, output=output, **settings)


def test_replies_are_those_of_each_model_alone(models: list[str], tmp_path: Path) -> None:
    pairs = answered(models, tmp_path)
    assert [pair.id for pair in pairs] == ["p0", "p1", "p2", "p3", "p4"]
    assert all(pair.replies["A"] != pair.replies["B"] for pair in pairs)
    assert len({pair.replies["A"] for pair in pairs}) > 1
    for model, letter in zip(models, ("A", "B"), strict=True):
        network, tokenizer = load_model(model)
        for prompt, pair in zip(PROMPTS, pairs, strict=True):
            ids = Encoder(tokenizer, max_length=122).encode_prompt(prompt)
            (alone,) = generate.generate_replies(network, tokenizer, [ids], max_new_tokens=6)
            assert (pair.replies[letter], letter in pair.cut) == (alone.text, alone.finish_reason == "length")  # type: ignore[index]


def test_what_was_answered_is_not_asked_again(models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "whole").mkdir()
    expected = answered(models, tmp_path / "whole")
    n_asked: list[int] = []
    real: Callable[..., Any] = generate.generate_replies

    def counted(network: Any, tokenizer: Any, prompts: Any, **settings: Any) -> Any:
        if len(n_asked) == 4:  # A has answered all in three batches, B two
            n_asked.append(0)
            raise KeyboardInterrupt
        n_asked.append(len(prompts))
        return real(network, tokenizer, prompts, **settings)

    monkeypatch.setattr(generate, "generate_replies", counted)
    with pytest.raises(KeyboardInterrupt):
        answered(models, tmp_path)
    path = tmp_path / "replies.jsonl"
    assert len(path.read_text().splitlines()) == 7
    path.write_bytes(path.read_bytes()[:-3])  # a kill while the last was written
    assert answered(models, tmp_path) == expected
    assert n_asked == [2, 2, 1, 2, 0, 2, 2]
    monkeypatch.setattr("lightning_chatgpt.models.build.load_model", None)  # not needed any more
    assert answered(models, tmp_path) == expected
    assert [pair.replies["B"] for pair in answered(models[::-1], tmp_path)] == [pair.replies["A"] for pair in expected]
    assert len(path.read_text().splitlines()) == 10


def test_another_model_or_length_answers_anew_unless_there_are_votes(models: list[str], tmp_path: Path) -> None:
    first = answered(models, tmp_path)
    longer = answered(models, tmp_path, max_new_tokens=9)
    assert all(len(b.replies["A"]) > len(a.replies["A"]) for a, b in zip(first, longer, strict=True) if "A" in a.cut)
    assert len((tmp_path / "replies.jsonl").read_text().splitlines()) == 10
    (tmp_path / "votes.jsonl").touch()
    more = [*PROMPTS, Conversation((Message("user", "And what is this?"),), id="p5")]
    assert answered(models, tmp_path, more, max_new_tokens=9)[:5] == longer  # what is added does no harm
    for changes in ({"max_new_tokens": 6}, {"prompts": PROMPTS[:4], "max_new_tokens": 9}, {"identities": ["x", "y"], "max_new_tokens": 9}):
        with pytest.raises(
            ConfigError, match="holds votes on replies of other models, to other prompts or of another length; name another"
        ):
            answered(models, tmp_path, **changes)


def test_a_file_of_something_else_is_not_overwritten(models: list[str], tmp_path: Path) -> None:
    (tmp_path / "replies.jsonl").write_text('{"reply": "mine"}\n')
    with pytest.raises(DataError, match=r"replies\.jsonl: holds something else than replies; remove it, and they are generated anew"):
        answered(models, tmp_path)
    assert (tmp_path / "replies.jsonl").read_text() == '{"reply": "mine"}\n'


def test_a_reply_that_leaves_no_room_for_a_prompt_is_refused(models: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_new_tokens 128 leaves no room for a prompt in the 128 positions of .*first"):
        answered(models, tmp_path, max_new_tokens=128)


def test_prompts_end_where_the_assistant_is_to_speak(write_chats: Callable[..., Path]) -> None:
    whole = chat("Hi", "Hello.", "How are you?", "Well.", system="Be brief.")
    path = write_chats([whole, chat("Hi")])
    first, second = read_prompts(str(path))
    assert first.messages == whole.messages[:-1]
    assert second.messages == (Message("user", "Hi"),)
    assert (first.id, second.id) == ("chats.jsonl:1", "chats.jsonl:2")


def test_prompts_that_cannot_be_told_apart_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"id": "x", "messages": [{"role": "user", "content": text}]}) + "\n" for text in "ab"))
    with pytest.raises(DataError, match=r"prompts\.jsonl: two prompts have the id 'x'"):
        read_prompts(str(path))
    path.write_text("")
    with pytest.raises(DataError, match="nothing to read in there"):
        read_prompts(str(path))


def test_a_model_is_known_by_what_it_is_not_by_where_it_lies(models: list[str], tmp_path: Path) -> None:
    from lightning_chatgpt.checkpoints.file import write_checkpoint

    copy = tmp_path / "copy"
    shutil.copytree(models[0], copy)
    (copy / "README.md").write_text("Another card.")
    assert identity(str(copy)) == identity(models[0]) != identity(models[1])
    config = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "{{ messages }}"}))
    assert identity(str(copy)) != identity(models[0])
    write_checkpoint({"state_dict": {}}, tmp_path / "a.ckpt")
    shutil.copy(tmp_path / "a.ckpt", tmp_path / "b.ckpt")
    write_checkpoint({"state_dict": {}}, tmp_path / "c.ckpt")
    first, second, third = (identity(str(tmp_path / f"{name}.ckpt")) for name in "abc")
    assert first == second != third
    with pytest.raises(ModelError, match="no such checkpoint"):
        identity(str(tmp_path / "d.ckpt"))
