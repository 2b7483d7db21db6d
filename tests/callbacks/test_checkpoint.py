"""RunCheckpoint keeps the best, and the last wherever training ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_chatgpt import CausalLMModule, ChatDataModule, RunCheckpoint
from tests.conftest import ARCHITECTURE, chat, trainer


@pytest.mark.parametrize("validation", [True, False])
@pytest.mark.parametrize("max_steps", [3, 4])
def test_last_holds_the_last_step(tmp_path: Path, write_chats: Callable[..., Path], validation: bool, max_steps: int) -> None:
    """Guards against weights lost where training ends amid an epoch: Lightning saves at validations only."""
    source = str(write_chats([chat(f"q{i}", f"a{i}") for i in range(8)]))
    module = CausalLMModule(architecture=ARCHITECTURE)
    data = ChatDataModule(train=source, validation=source if validation else None, vocab_size=300, batch_size=4)
    checkpoint = RunCheckpoint(dirpath=tmp_path)
    trainer(tmp_path, max_steps=max_steps, callbacks=[checkpoint], enable_checkpointing=True).fit(module, data)
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert last["global_step"] == max_steps
    kept = [p.name for p in tmp_path.glob("epoch*.ckpt")]
    assert len(kept) == 1
    assert ("val_loss=" in kept[0]) == validation
