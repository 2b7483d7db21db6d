"""A run that goes on within an epoch reads what it had not read, and nothing twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_chatgpt import CausalLMModule, ChatDataModule, TextDataModule
from lightning_chatgpt.errors import ConfigError
from tests.conftest import ARCHITECTURE, chat, trainer


class Reading(Callback):
    """Keeps the token ids of every batch that is learnt from."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, list[list[int]]]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append((batch_idx, batch["input_ids"].tolist()))


@pytest.fixture
def make_data(tmp_path: Path, write_chats: Callable[..., Path]) -> Callable[..., Any]:
    chats = write_chats([chat(f"question {i}", f"answer {i} " * (1 + i % 5)) for i in range(22)])
    for i in range(3):
        (tmp_path / f"shard{i}.txt").write_text(" ".join(f"word {n}" for n in range(100 * i, 100 * i + 90)))

    def make(kind: str, **settings: Any) -> Any:
        common = {"validation": None, "vocab_size": 300, "max_length": 64, "batch_size": 4, "max_leak": None, **settings}
        if kind == "text":
            return TextDataModule(train=[str(tmp_path / f"shard{i}.txt") for i in range(3)], **common)
        return ChatDataModule(train=str(chats), **common)

    return make


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path")
@pytest.mark.parametrize(
    ("kind", "settings"),
    [("chat", {}), ("chat", {"packing": True, "batch_size": 2}), ("chat", {"num_workers": 2, "group_by_length": True}), ("text", {})],
    ids=["chat", "packed", "workers", "text"],
)
def test_each_row_of_an_epoch_is_read_once(kind: str, settings: dict[str, Any], make_data: Callable[..., Any], tmp_path: Path) -> None:
    """Stopped after every optimizer step, the last of an epoch included; text is read across the files of its source."""

    def fit(ckpt_path: Path | None = None, *callbacks: Callback) -> list[tuple[int, list[list[int]]]]:
        reading = Reading()
        settings_of_run = {"max_epochs": 2, "accumulate_grad_batches": 2, "log_every_n_steps": 1, "enable_checkpointing": bool(callbacks)}
        run = trainer(tmp_path, callbacks=[reading, *callbacks], **settings_of_run)
        module = CausalLMModule(architecture={**ARCHITECTURE, "n_layer": 1})
        run.fit(module, datamodule=make_data(kind, **settings), ckpt_path=ckpt_path)
        return reading.batches

    whole = fit(None, ModelCheckpoint(tmp_path / "steps", "{step}", every_n_train_steps=1, save_top_k=-1))
    n_batches = len(whole) // 2
    assert n_batches > 2 and whole[:n_batches] != whole[n_batches:]  # an order of its own for each epoch
    n_steps = -(-n_batches // 2)  # an epoch's last batch is a step, whether or not another is accumulated with it
    for epoch in range(2):
        for step in range(1, n_steps + 1):
            n_done = epoch * n_batches + min(2 * step, n_batches)
            after = fit(tmp_path / "steps" / f"step={epoch * n_steps + step}.ckpt")
            assert after == whole[n_done:], f"after step {step} of epoch {epoch}"


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path")
def test_a_run_that_max_steps_broke_off_reads_the_rest_of_its_epoch(make_data: Callable[..., Any], tmp_path: Path) -> None:
    """Guards against Lightning's taking an epoch that was broken off for a whole one, and reading the next one from the middle."""

    def fit(max_steps: int, ckpt_path: Path | None = None, **settings: Any) -> list[Any]:
        reading = Reading()
        run = trainer(tmp_path, max_steps=max_steps, max_epochs=-1, callbacks=[reading], log_every_n_steps=1)
        run.fit(CausalLMModule(architecture=ARCHITECTURE), datamodule=make_data("chat", **settings), ckpt_path=ckpt_path)
        run.save_checkpoint(tmp_path / "stopped.ckpt")
        return reading.batches

    whole = fit(6)
    first = fit(4)
    assert first + fit(6, tmp_path / "stopped.ckpt") == whole
    fit(4)
    with pytest.raises(ConfigError, match="begun with 4 rows in the batches of all processes, and cannot go on with 2"):
        fit(6, tmp_path / "stopped.ckpt", batch_size=2)


def test_a_loader_is_whole_again_after_a_fit(make_data: Callable[..., Any], tmp_path: Path) -> None:
    """Guards against a loader that takes the progress of a run that is over for its own."""
    data = make_data("chat")
    trainer(tmp_path, max_epochs=1, log_every_n_steps=1).fit(CausalLMModule(architecture=ARCHITECTURE), datamodule=data)
    n_rows = sum(len(batch["input_ids"]) for batch in data.train_dataloader())
    assert n_rows == 22


@pytest.mark.filterwarnings("ignore:You requested to overfit", "ignore:.*overfit_batches")
def test_batches_are_overfitted_on_purpose(make_data: Callable[..., Any], tmp_path: Path) -> None:
    reading = Reading()
    run = trainer(tmp_path, max_epochs=3, overfit_batches=1, callbacks=[reading], log_every_n_steps=1)
    run.fit(CausalLMModule(architecture=ARCHITECTURE), datamodule=make_data("chat"))
    assert len(reading.batches) == 3 and reading.batches[0] == reading.batches[1] == reading.batches[2]
