"""CausalLMModule in a plain Trainer: training, checkpoints that stand alone, replies, subclasses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything

from lightning_chatgpt import CausalLMModule, ChatDataModule, RunCheckpoint, load_model
from lightning_chatgpt.chat.encoding import Encoder
from lightning_chatgpt.errors import ConfigError, UserError
from tests.conftest import ARCHITECTURE, chat, trainer

PAIRS = [("Hello", "Hi there!"), ("What is your name?", "I am GPT."), ("Bye", "See you.")]


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> tuple[CausalLMModule, ChatDataModule, Any, Path]:
    """A model from scratch that has learnt three answers by heart, and the folder of its run."""
    seed_everything(0, verbose=False)
    folder = tmp_path_factory.mktemp("taught")
    source = folder / "chats.jsonl"
    source.write_text("".join(json.dumps(chat(*pair).to_dict()) + "\n" for pair in PAIRS * 4))
    module = CausalLMModule(architecture=ARCHITECTURE, learning_rate=1e-2, weight_decay=0.0)
    data = ChatDataModule(train=str(source), validation=str(source), max_leak=None, vocab_size=300, batch_size=4)
    checkpoint = RunCheckpoint(dirpath=folder / "checkpoints")
    run = trainer(folder, max_epochs=60, check_val_every_n_epoch=20, callbacks=[checkpoint], enable_checkpointing=True, log_every_n_steps=1)
    run.fit(module, data)
    return module, data, run, folder


def test_it_learns_and_a_checkpoint_stands_alone(taught: tuple, tmp_path: Path) -> None:
    module, _, run, folder = taught
    assert run.callback_metrics["val_token_accuracy"] == 1.0
    assert run.callback_metrics["val_loss"] < 0.3
    checkpoint = folder / "checkpoints" / "last.ckpt"
    torch.load(checkpoint, weights_only=True)  # plain data only

    # Another folder, another process, and nothing left of the data: only the checkpoint.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.move(checkpoint, elsewhere / "last.ckpt")
    shutil.rmtree(folder)
    script = (
        "from lightning_chatgpt import CausalLMModule, Conversation, Message\n"
        "from lightning_chatgpt.chat.encoding import Encoder\n"
        "from lightning_chatgpt.generation.generate import generate_replies\n"
        "module = CausalLMModule.load_from_checkpoint('last.ckpt').eval()\n"
        f"for question, _ in {PAIRS!r}:\n"
        "    ids = Encoder(module.tokenizer, max_length=99).encode_prompt(Conversation((Message('user', question),)))\n"
        "    print(generate_replies(module.network, module.tokenizer, [ids], max_new_tokens=20)[0].text)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=elsewhere, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [answer for _, answer in PAIRS], done.stderr

    network, tokenizer = load_model(elsewhere / "last.ckpt")
    for name, value in module.network.state_dict().items():
        assert torch.equal(network.state_dict()[name], value)
    assert module.tokenizer is not None
    assert tokenizer.get_vocab() == module.tokenizer.get_vocab()


def test_export_answers_the_same_in_plain_transformers(taught: tuple, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    module = taught[0]
    folder = module.export(tmp_path / "hf", facts={"val_loss": "0.1234"})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for question, answer in PAIRS:
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        assert prompt["input_ids"][0].tolist() == Encoder(module.tokenizer, max_length=99).encode_prompt(chat(question))
        reply = model.generate(**prompt, max_new_tokens=30, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        # It stops by itself: the end token is in the folder's generation_config.
        assert tokenizer.decode(reply) == f"{answer}<|im_end|>"
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers") and "| val_loss | 0.1234 |" in card


def test_predictions_have_replies_references_and_counts(taught: tuple, write_chats: Callable[..., Path]) -> None:
    module, data, run, _ = taught
    source = write_chats([chat("Hello", "Hi!"), chat("Bye")], "questions.jsonl")
    asked = ChatDataModule(predict=str(source), max_new_tokens=16, batch_size=2)
    (batch,) = run.predict(module, asked)
    assert [r["reply"] for r in batch] == ["Hi there!", "See you."]
    assert [r["reference"] for r in batch] == ["Hi!", None]
    assert [r["finish_reason"] for r in batch] == ["stop", "stop"]
    assert batch[0]["prompt"] == [{"role": "user", "content": "Hello"}]
    ids = Encoder(data.tokenizer, max_length=99).encode_prompt(chat("Hello"))
    assert batch[0]["prompt_tokens"] == len(ids)
    reply_ids = data.tokenizer("Hi there!", add_special_tokens=False)["input_ids"]
    assert batch[0]["completion_tokens"] == len(reply_ids) + 1


def test_dropout_is_on_while_training(plain_gpt2: Path, tmp_path: Path) -> None:
    """Guards against from_pretrained's evaluation mode, which left dropout silently off."""
    module = CausalLMModule(pretrained=str(plain_gpt2))
    data = ChatDataModule(train="corpus:chatterbot/german", validation=0.2)
    seen: list[bool] = []
    original = module.training_step

    def step(batch: Any, batch_idx: int) -> Any:
        seen.append(all(m.training for m in module.modules()))
        return original(batch, batch_idx)

    module.training_step = step  # type: ignore[method-assign]
    trainer(tmp_path, max_steps=2, limit_val_batches=1).fit(module, data)
    assert seen == [True, True]


def test_a_checkpoint_goes_on_without_its_base(plain_gpt2: Path, tmp_path: Path, write_chats: Callable[..., Path]) -> None:
    base = tmp_path / "base"
    shutil.copytree(plain_gpt2, base)
    source = str(write_chats([chat(*pair) for pair in PAIRS] * 4))
    run = trainer(tmp_path, max_steps=2)
    module = CausalLMModule(pretrained=str(base))
    run.fit(module, ChatDataModule(train=source, validation=source, max_leak=None))
    (expected,) = run.validate(module, datamodule=ChatDataModule(validation=source, max_leak=None), verbose=False)
    run.save_checkpoint(tmp_path / "x.ckpt")
    shutil.rmtree(base)
    again = trainer(tmp_path)
    again.ckpt_path = tmp_path / "x.ckpt"
    (logged,) = again.validate(CausalLMModule(pretrained=str(base)), ChatDataModule(validation=source, max_leak=None), verbose=False)
    assert logged == expected
    module = CausalLMModule.load_from_checkpoint(tmp_path / "x.ckpt")
    (logged,) = trainer(tmp_path).validate(module, ChatDataModule(validation=source, max_leak=None), verbose=False)
    assert logged == expected


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "there is no model to start from"),
        ({"pretrained": "x", "learning_rate": -1.0}, "model.learning_rate must be a finite number of at least 0, not -1.0"),
        ({"pretrained": "x", "weight_decay": float("nan")}, "model.weight_decay"),
    ],
)
def test_settings_are_refused(settings: dict, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        CausalLMModule(**settings)
    assert says in str(error.value)


def test_max_length_over_the_positions_is_refused(plain_gpt2: Path, tmp_path: Path) -> None:
    data = ChatDataModule(train="corpus:chatterbot/german", max_length=129)
    with pytest.raises(UserError, match="data.max_length 129 is more than the model's 128 positions"):
        trainer(tmp_path, max_steps=1).fit(CausalLMModule(pretrained=str(plain_gpt2)), data)


def test_two_tokenizers_are_refused(plain_gpt2: Path, tmp_path: Path) -> None:
    data = ChatDataModule(train="corpus:chatterbot/german", tokenizer=str(plain_gpt2))
    with pytest.raises(UserError, match="contradicts the model's weights"):
        trainer(tmp_path, max_steps=1).fit(CausalLMModule(pretrained=str(plain_gpt2)), data)


def test_a_schedule_shorter_than_its_warmup_is_warned_about(plain_gpt2: Path, tmp_path: Path) -> None:
    module = CausalLMModule(pretrained=str(plain_gpt2), warmup_steps=5)
    data = ChatDataModule(train="corpus:chatterbot/german", validation=None)
    with pytest.warns(UserWarning, match="warmup_steps 5 leave nothing of the run's 2 optimizer steps"):
        trainer(tmp_path, max_steps=2).fit(module, data)


def test_plain_data_in_hyper_parameters() -> None:
    module = CausalLMModule(architecture=ARCHITECTURE, warmup_steps=3)
    assert json.loads(json.dumps(dict(module.hparams)))["architecture"] == ARCHITECTURE


def test_data_of_another_model_is_refused(plain_gpt2: Path, tmp_path: Path, write_chats: Callable[..., Path]) -> None:
    """Guards against training on another vocabulary's ids."""
    source = str(write_chats([chat(*pair) for pair in PAIRS] * 4))
    data = ChatDataModule(train=source, validation=None, vocab_size=300)
    scratch = CausalLMModule(architecture=ARCHITECTURE)
    run = trainer(tmp_path, max_steps=1)
    run.fit(scratch, data)
    with pytest.raises(UserError, match="another model's tokenizer"):
        trainer(tmp_path, max_steps=1).fit(CausalLMModule(pretrained=str(plain_gpt2)), data)
    run.save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="the checkpoint's tokenizer is not the data's"):
        other = ChatDataModule(train=source, validation=None, vocab_size=280)
        trainer(tmp_path, max_steps=2).fit(CausalLMModule(architecture=ARCHITECTURE), other, ckpt_path=tmp_path / "x.ckpt")
