"""RunCheckpoint keeps the best, and the last wherever training ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_chatgpt import CausalLMModule, ChatDataModule, RunCheckpoint
from tests.conftest import ARCHITECTURE, chat, trainer


def test_last_is_written_also_when_validation_got_worse(tmp_path: Path, write_chats: Callable[..., Path]) -> None:
    """Guards against a last.ckpt that is as old as the best: Lightning writes it along with a best one only."""
    source = str(write_chats([chat(f"q{i}", f"a{i}") for i in range(8)]))
    held_out = str(write_chats([chat("something", "else altogether")], "held_out.jsonl"))
    module = CausalLMModule(architecture=ARCHITECTURE, learning_rate=0.1, schedule="constant")
    data = ChatDataModule(train=source, validation=held_out, vocab_size=300, batch_size=4)
    steps: list[int] = []

    class Watch(RunCheckpoint):
        def on_train_epoch_end(self, *arguments: Any) -> None:
            super().on_train_epoch_end(*arguments)
            steps.append(torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"])

    checkpoint = Watch(dirpath=tmp_path, save_last=True)
    trainer(tmp_path, max_epochs=5, callbacks=[checkpoint], enable_checkpointing=True).fit(module, data)
    assert steps == [2, 4, 6, 8, 10]
    assert "step=10" not in checkpoint.best_model_path  # it did get worse


@pytest.mark.parametrize("validation", [True, False])
@pytest.mark.parametrize("max_steps", [3, 4])
def test_last_holds_the_last_step(tmp_path: Path, write_chats: Callable[..., Path], validation: bool, max_steps: int) -> None:
    """Guards against weights lost where training ends amid an epoch: Lightning saves at validations only."""
    source = str(write_chats([chat(f"q{i}", f"a{i}") for i in range(8)]))
    module = CausalLMModule(architecture=ARCHITECTURE)
    data = ChatDataModule(train=source, validation=source if validation else None, max_leak=None, vocab_size=300, batch_size=4)
    checkpoint = RunCheckpoint(dirpath=tmp_path)
    trainer(tmp_path, max_steps=max_steps, callbacks=[checkpoint], enable_checkpointing=True).fit(module, data)
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert last["global_step"] == max_steps
    kept = [p.name for p in tmp_path.glob("epoch*.ckpt")]
    assert len(kept) == 1
    assert ("val_loss=" in kept[0]) == validation


def test_a_save_between_validations_does_not_keep_the_best_from_being_written(tmp_path: Path, write_chats: Callable[..., Path]) -> None:
    """Guards against Lightning's not saving twice after one step: amid an accumulation, a validation may follow a save of last.ckpt."""
    source = str(write_chats([chat(f"q{i}", f"a{i}") for i in range(12)]))
    data = ChatDataModule(train=source, validation=source, max_leak=None, vocab_size=300, batch_size=2)
    checkpoint = RunCheckpoint(dirpath=tmp_path, every_n_train_steps=1, filename="{step}")
    settings = {"accumulate_grad_batches": 3, "val_check_interval": 4, "max_epochs": 1, "limit_val_batches": 1}
    trainer(tmp_path, callbacks=[checkpoint], enable_checkpointing=True, **settings).fit(CausalLMModule(architecture=ARCHITECTURE), data)
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["last.ckpt", "step=1.ckpt"]


def test_the_first_process_tells_which_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against processes that disagree about the best where a node does not see the first one's files."""
    (tmp_path / "best.ckpt").touch()
    state = {
        **RunCheckpoint(dirpath=str(tmp_path), save_top_k=2).state_dict(),
        "best_k_models": {"/elsewhere/best.ckpt": torch.tensor(1.0), "/elsewhere/gone.ckpt": torch.tensor(2.0)},
        "best_model_path": "/elsewhere/best.ckpt",
        "kth_best_model_path": "/elsewhere/gone.ckpt",
    }
    told: list[Any] = []
    monkeypatch.setattr("lightning_chatgpt.callbacks.checkpoint.of_first", lambda value: told.append(value) or told[0])
    best = str(tmp_path / "best.ckpt")
    for _ in range(2):  # the first process, and one that sees nothing
        checkpoint = RunCheckpoint(dirpath=str(tmp_path), save_top_k=2)
        checkpoint.load_state_dict(state)
        assert checkpoint.best_model_path == checkpoint.kth_best_model_path == best and list(checkpoint.best_k_models) == [best]
        Path(best).unlink(missing_ok=True)
    assert told[0] != told[1]
