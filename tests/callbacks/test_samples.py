"""SampleGeneration leaves training as it found it, and its samples can be found again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_chatgpt import CausalLMModule, ChatDataModule, SampleGeneration
from lightning_chatgpt.errors import ConfigError
from tests.conftest import ARCHITECTURE, chat, trainer


def fit(folder: Path, source: Path, callbacks: list[Any], **settings: Any) -> CausalLMModule:
    seed_everything(3, verbose=False)
    module = CausalLMModule(architecture={**ARCHITECTURE, "resid_pdrop": 0.5}, learning_rate=1e-2)
    data = ChatDataModule(train=str(source), validation=str(source), max_leak=None, vocab_size=300, batch_size=2)
    trainer(folder, max_epochs=2, callbacks=callbacks, **settings).fit(module, data)
    return module


@pytest.fixture
def source(write_chats: Callable[..., Path]) -> Path:
    return write_chats([chat(f"q{i}", f"a{i}") for i in range(8)])


def test_training_is_bit_for_bit_the_same_with_and_without(tmp_path: Path, source: Path) -> None:
    """Guards against samples that change what is trained: dropout's random numbers, or evaluation mode left on."""
    sampling = SampleGeneration(prompts=["q1", "q2"], every_n_steps=1, max_new_tokens=4, temperature=1.0)
    watched = fit(tmp_path / "a", source, [sampling])
    alone = fit(tmp_path / "b", source, [])
    assert all(torch.equal(a, b) for a, b in zip(watched.parameters(), alone.parameters(), strict=True))
    steps = [json.loads(line)["step"] for line in (tmp_path / "a/samples.jsonl").read_text().splitlines()]
    assert steps == [step for step in range(1, 9) for _ in range(2)]


def test_samples_reach_tensorboard_as_text(tmp_path: Path, source: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="tensorboard", version="")
    fit(tmp_path, source, [SampleGeneration(prompts=["q|1"], max_new_tokens=4)], logger=logger)
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    entries = events.Tensors("samples/text_summary")
    assert [entry.step for entry in entries] == [0, 4, 8]
    assert "| q\\|1 |" in entries[-1].tensor_proto.string_val[0].decode()


@pytest.mark.parametrize("settings", [{"every_n_steps": 0}, {"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}])
def test_settings_are_refused(settings: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        SampleGeneration(**settings)
