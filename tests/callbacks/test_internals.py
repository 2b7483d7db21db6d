"""What lightning_chatgpt.callbacks.internals takes Lightning's private loops to be. Where this fails, that file is to be looked at."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ThroughputMonitor, WeightAveraging
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from lightning_chatgpt import CausalLMModule, ChatDataModule
from lightning_chatgpt.callbacks.internals import Position, position_of
from tests.conftest import ARCHITECTURE, chat, trainer

COUNTERS = {"ready", "started", "processed", "completed"}


class Places(Callback):
    """Keeps the run's position in every hook, with what Lightning calls the hook."""

    def __init__(self) -> None:
        self.places: list[tuple[str, Position]] = []
        self.loops: dict[str, Any] = {}

    def _note(self, trainer: Any, pl_module: Any, *arguments: Any) -> None:
        if not trainer.sanity_checking:
            self.places.append((pl_module._current_fx_name, position_of(trainer)))
            self.loops = trainer.fit_loop.state_dict()

    on_train_start = on_train_epoch_start = on_train_batch_start = on_train_batch_end = on_train_epoch_end = on_train_end = _note
    on_validation_start = on_validation_batch_end = on_validation_end = _note


@pytest.fixture
def places(tmp_path: Path, write_chats: Callable[..., Path]) -> Places:
    path = str(write_chats([chat(f"question {i}", "answer") for i in range(8)]))
    found = Places()
    data = ChatDataModule(train=path, validation=path, max_leak=None, vocab_size=300, batch_size=2)
    run = trainer(tmp_path, callbacks=[found], max_epochs=2, accumulate_grad_batches=3, limit_val_batches=1, log_every_n_steps=1)
    run.fit(CausalLMModule(architecture=ARCHITECTURE), data)
    return found


def test_the_place_in_every_hook(places: Places) -> None:
    """Four micro-batches an epoch, three to a step: a step after the third, and one after the last. Written by hand."""

    def at(epoch: int, n_batches: int, n_all: int, n_steps: int, is_last: bool = False, needs_validation: bool = False) -> Position:
        return Position(epoch, n_batches, n_all, n_steps, is_last, needs_validation)

    assert places.places[0] == ("on_train_start", at(0, 0, 0, 0))
    found = places.places[1:]
    one_epoch = [
        ("on_train_epoch_start", at(0, 0, 0, 0)),
        ("on_train_batch_start", at(0, 0, 0, 0)),
        ("on_train_batch_end", at(0, 0, 0, 0)),  # one is done, and is done again
        ("on_train_batch_start", at(0, 0, 0, 0)),
        ("on_train_batch_end", at(0, 0, 0, 0)),
        ("on_train_batch_start", at(0, 0, 0, 0)),
        ("on_train_batch_end", at(0, 3, 3, 1)),
        ("on_train_batch_start", at(0, 3, 3, 1)),
        ("on_train_batch_end", at(0, 4, 4, 2, True, True)),
        ("on_validation_start", at(0, 4, 4, 2, True, True)),
        ("on_validation_batch_end", at(0, 4, 4, 2, True, True)),
        ("on_validation_end", at(0, 4, 4, 2, True, False)),
        ("on_train_epoch_end", at(1, 0, 4, 2)),
    ]
    n = len(one_epoch)
    assert found[:n] == one_epoch
    second = [(hook, p._replace(epoch=p.epoch + 1, n_all_batches=p.n_all_batches + 4, n_steps=p.n_steps + 2)) for hook, p in one_epoch]
    assert found[n : 2 * n] == second
    assert found[2 * n :] == [("on_train_end", at(2, 0, 8, 4))]


def test_what_a_checkpoint_holds_of_the_loops(places: Places) -> None:
    assert places.loops.keys() >= {
        "epoch_loop.state_dict",
        "epoch_loop.batch_progress",
        "epoch_loop.val_loop.batch_progress",
        "epoch_progress",
    }
    assert places.loops["epoch_loop.state_dict"].keys() == {"_batches_that_stepped"}
    for name in ("epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress"):
        assert places.loops[name].keys() == {"total", "current", "is_last_batch"}
        assert places.loops[name]["total"].keys() == places.loops[name]["current"].keys() == COUNTERS
    assert places.loops["epoch_progress"].keys() == {"total", "current"}
    assert places.loops["epoch_progress"]["current"].keys() == COUNTERS


def test_what_is_overridden_of_lightning_is_still_called_so() -> None:
    """Methods that Lightning calls by these names, in classes that are subclassed here; one that was renamed would never be called."""
    overridden = {
        ModelCheckpoint: ("_save_topk_checkpoint", "_save_last_checkpoint", "_save_checkpoint", "_should_save_on_train_epoch_end"),
        ExperimentWriter: ("_rewrite_with_new_header", "_check_log_dir_exists", "save"),
        ThroughputMonitor: ("_compute",),
        LightningCLI: ("_parse_ckpt_path", "_prepare_subcommand_parser"),
        WeightAveraging: ("_swap_models",),
    }
    for cls, names in overridden.items():
        assert [name for name in names if not callable(getattr(cls, name, None))] == [], cls
    assert "_last_global_step_saved" in vars(ModelCheckpoint())
    assert "_average_model" in vars(WeightAveraging())
    source = inspect.getsource(LightningCLI)
    assert "self._parse_ckpt_path()" in source and "self._subcommand_parsers" in source
    assert "_call_and_handle_interrupt(" in inspect.getsource(Trainer.fit)
