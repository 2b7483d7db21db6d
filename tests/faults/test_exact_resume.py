"""A run that goes on equals, to the last bit, one that was not stopped: in whatever hook it was saved, and with another global seed."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers.logger import DummyLogger

from lightning_chatgpt import CausalLMModule, ChatDataModule, ExactResume, RunCheckpoint, TextDataModule
from lightning_chatgpt.callbacks.stopping import GracefulStop, Stopped
from tests.conftest import ARCHITECTURE, chat, trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:Be aware that when using .ckpt_path", "ignore:.*samples is not supported", "ignore:resume.seed is"
)


class Diary(Callback):
    """Writes down what each micro-batch holds, and every weight and state after each optimizer step."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, int, str]] = []
        self.steps: dict[int, str] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        content = hashlib.sha1(batch["input_ids"].numpy().tobytes()).hexdigest()
        self.batches.append((trainer.current_epoch, batch_idx, content))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps[trainer.global_step] = digest(pl_module, trainer)


class Saving(Callback):
    """Saves a checkpoint in every hook of training and of the validations in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.saved: list[tuple[Path, int]] = []  # and how much was logged by then

    def _save(self, trainer: Any, pl_module: Any, *arguments: Any) -> None:
        if not trainer.sanity_checking:
            path = self.folder / f"{len(self.saved):03d}-{pl_module._current_fx_name}.ckpt"
            trainer.save_checkpoint(path)
            self.saved.append((path, len(trainer.logger.rows)))

    on_train_start = on_train_epoch_start = on_train_batch_start = on_train_batch_end = on_train_epoch_end = on_train_end = _save
    on_validation_start = on_validation_batch_end = on_validation_end = _save


class Log(DummyLogger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""


def digest(module: Any, trainer: Any) -> str:
    found = hashlib.sha1()
    for value in module.state_dict().values():
        found.update(value.numpy().tobytes())
    for state in trainer.optimizers[0].state_dict()["state"].values():
        for value in state.values():
            found.update(torch.as_tensor(value).numpy().tobytes())
    found.update(repr(trainer.lr_scheduler_configs[0].scheduler.get_last_lr()).encode())
    return found.hexdigest()


@pytest.fixture
def make_data(tmp_path: Path, write_chats: Callable[..., Path]) -> Callable[..., Any]:
    chats = write_chats([chat(f"question {i}", f"answer {i} " * (1 + i % 5)) for i in range(22)])
    held_out = write_chats([chat(f"ask {i}", f"reply {i}") for i in range(4)], "held_out.jsonl")
    for i in range(3):
        (tmp_path / f"shard{i}.txt").write_text(" ".join(f"word {n}" for n in range(100 * i, 100 * i + 90)))

    def make(kind: str, **settings: Any) -> Any:
        common = {"vocab_size": 300, "max_length": 64, "batch_size": 4, "max_leak": None, **settings}
        if kind == "text":
            train = [str(tmp_path / f"shard{i}.txt") for i in range(3)]
            return TextDataModule(train=train, validation=str(tmp_path / "shard0.txt"), **common)
        return ChatDataModule(train=str(chats), validation=str(held_out), **common)

    return make


CASES = {
    "plain": ("chat", {}, {}),
    "accumulated": ("chat", {"batch_size": 2}, {"accumulate_grad_batches": 3}),
    "packed": ("chat", {"packing": True, "batch_size": 2}, {}),
    "workers": ("chat", {"num_workers": 2}, {"accumulate_grad_batches": 3}),
    "workers-packed": ("chat", {"num_workers": 2, "packing": True, "batch_size": 1}, {"accumulate_grad_batches": 3}),
    "text": ("text", {"batch_size": 3}, {"accumulate_grad_batches": 3}),
    "text-workers": ("text", {"batch_size": 3, "num_workers": 2}, {}),
    "validation-amid-epochs": ("chat", {"batch_size": 2}, {"val_check_interval": 4, "accumulate_grad_batches": 2}),
    "validation-amid-accumulation": ("chat", {"batch_size": 2}, {"val_check_interval": 2, "accumulate_grad_batches": 3}),
    "validation-across-epochs": ("chat", {}, {"val_check_interval": 4, "check_val_every_n_epoch": None, "max_epochs": 3}),
    "max-steps": ("chat", {"batch_size": 2}, {"max_epochs": -1, "max_steps": 14, "val_check_interval": 4}),
    "no-validation": ("chat", {}, {"limit_val_batches": 0}),
    "limited": ("chat", {"batch_size": 2}, {"limit_train_batches": 4, "check_val_every_n_epoch": 2, "max_epochs": 4}),
    "limited-validation-amid-epochs": ("chat", {"batch_size": 2}, {"limit_train_batches": 5, "val_check_interval": 2}),
    "validation-every-other-epoch": ("chat", {}, {"check_val_every_n_epoch": 2, "max_epochs": 3}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("every", [3, pytest.param(1, marks=[pytest.mark.faults, pytest.mark.slow])])
def test_a_run_resumed_after_any_step_is_the_run_that_was_not_stopped(
    every: int, name: str, make_data: Callable[..., Any], tmp_path: Path
) -> None:
    kind, data_settings, trainer_settings = CASES[name]

    def fit(seed: int, ckpt_path: Path | None = None, *callbacks: Callback) -> tuple[Diary, Log, str]:
        seed_everything(seed, verbose=False)
        diary, log = Diary(), Log()
        settings = {"max_epochs": 2, "log_every_n_steps": 2, "num_sanity_val_steps": 0}
        run = trainer(tmp_path, callbacks=[diary, ExactResume(), *callbacks], logger=log, **{**settings, **trainer_settings})
        module = CausalLMModule(architecture={**ARCHITECTURE, "n_layer": 1}, learning_rate=1e-2, warmup_steps=2)
        run.fit(module, datamodule=make_data(kind, **data_settings), ckpt_path=ckpt_path)
        return diary, log, digest(module, run)

    saving = Saving(tmp_path)
    diary, log, end = fit(0, None, saving)
    assert len({content for _, _, content in diary.batches}) > len(diary.batches) // 3
    # One in three: all hooks and steps come up among the cases.
    for seed, (path, n_rows) in list(enumerate(saving.saved, start=1))[list(CASES).index(name) % every :: every]:
        after, logged, there = fit(seed, path)
        assert there == end, path
        assert after.batches == diary.batches[len(diary.batches) - len(after.batches) :], path
        assert after.steps == {step: state for step, state in diary.steps.items() if step in after.steps}, path
        assert logged.rows == log.rows[len(log.rows) - len(logged.rows) :], path
        n_repeated = n_rows - (len(log.rows) - len(logged.rows))
        # What is logged of a step comes after its hooks; an accumulation that was begun is done again, with a validation amid it.
        assert n_repeated in ((-1, 0) if "on_train_batch_end" in path.name else (0,)) or "accumulate_grad_batches" in trainer_settings, path
        assert n_repeated >= -1, path


class Signal(Callback):
    """Sends this process a signal in a hook after an optimizer step."""

    def __init__(self, hook: str, step: int) -> None:
        self.step = step
        setattr(self, hook, self._send)

    def _send(self, trainer: Any, *arguments: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def fit(make_data: Callable[..., Any], tmp_path: Path) -> Callable[..., tuple[dict[str, Any], list[Any]]]:
    """Train into a folder as the command line does, with a signal or without; gives ``last.ckpt`` and what was logged."""

    def fit(name: str, *callbacks: Callback, ckpt_path: Path | None = None, **settings: Any) -> tuple[dict[str, Any], list[Any]]:
        log = Log()
        model = {"schedule": settings.pop("schedule", "constant")}
        run = trainer(
            tmp_path / name,
            callbacks=[*callbacks, ExactResume(seed=0), RunCheckpoint(save_top_k=1), GracefulStop()],
            logger=log,
            **{"enable_checkpointing": True, "log_every_n_steps": 1, "num_sanity_val_steps": 0, **settings},
        )
        seed_everything(0 if ckpt_path is None else 1, verbose=False)
        module = CausalLMModule(architecture={**ARCHITECTURE, "n_layer": 1}, learning_rate=1e-2, **model)
        is_stopped = any(isinstance(callback, Signal) for callback in callbacks)
        try:
            run.fit(module, datamodule=make_data("chat", batch_size=2), ckpt_path=ckpt_path)
            assert not is_stopped
        except Stopped:
            assert is_stopped
        return torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True), log.rows

    return fit


def assert_same(one: Any, other: Any) -> None:
    """Check that what was saved is equal to the last bit."""
    assert one.keys() == other.keys()
    for key in ("state_dict", "current_model_state", "averaging_state"):
        assert key not in one or all(torch.equal(value, other[key][name]) for name, value in one[key].items()), key
    assert one["lr_schedulers"][0]["_last_lr"] == other["lr_schedulers"][0]["_last_lr"]
    assert [group["lr"] for group in one["optimizer_states"][0]["param_groups"]] == [
        group["lr"] for group in other["optimizer_states"][0]["param_groups"]
    ]
    for i, state in one["optimizer_states"][0]["state"].items():
        assert all(torch.equal(value, other["optimizer_states"][0]["state"][i][name]) for name, value in state.items())


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
@pytest.mark.parametrize("hook", ["on_validation_batch_end", "on_train_batch_end"])
def test_averaged_weights_and_those_that_are_trained_are_not_mixed_up(hook: str, fit: Callable[..., Any], tmp_path: Path) -> None:
    """Guards against a stop amid a validation, in which Lightning has put the average in the place of the weights."""

    def average() -> EMAWeightAveraging:
        return EMAWeightAveraging(decay=0.5, use_buffers=False)

    settings = {"val_check_interval": 4, "max_epochs": 2}
    whole, rows = fit("whole", average(), **settings)
    fit("stopped", average(), Signal(hook, 8), **settings)
    last = tmp_path / "stopped" / "checkpoints" / "last.ckpt"
    again, rows_after = fit("stopped", average(), ckpt_path=last, **settings)
    assert "current_model_state" in whole and 0 < len(rows_after) < len(rows)
    assert_same(again, whole)
    assert rows_after == rows[-len(rows_after) :]


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
def test_a_run_with_averaging_can_be_made_longer(fit: Callable[..., Any], tmp_path: Path) -> None:
    """Guards against Lightning's ending training with the average in the place of the weights, before the last save."""
    settings = {"check_val_every_n_epoch": 3}
    whole, _ = fit("whole", EMAWeightAveraging(decay=0.5, use_buffers=False), max_epochs=2, **settings)
    fit("longer", EMAWeightAveraging(decay=0.5, use_buffers=False), max_epochs=1, **settings)
    last = tmp_path / "longer" / "checkpoints" / "last.ckpt"
    again, _ = fit("longer", EMAWeightAveraging(decay=0.5, use_buffers=False), max_epochs=2, ckpt_path=last, **settings)
    assert_same(again, whole)


def test_the_validation_after_the_very_last_step_is_made_up_for(fit: Callable[..., Any], tmp_path: Path) -> None:
    """Guards against Lightning's not beginning a run that has made all its steps: its last validation, and its best, would be lost."""
    settings = {"val_check_interval": 4, "max_steps": 15, "max_epochs": -1, "schedule": "cosine"}
    whole, rows = fit("whole", **settings)
    fit("stopped", Signal("on_validation_batch_end", 15), **settings)
    again, rows_after = fit("stopped", ckpt_path=tmp_path / "stopped" / "checkpoints" / "last.ckpt", **settings)
    assert rows_after == rows[-1:] and "val_loss" in rows[-1][1] and again["global_step"] == 15
    assert_same(again, whole)
    names = [sorted(path.name for path in (tmp_path / name / "checkpoints").iterdir()) for name in ("whole", "stopped")]
    assert names[0] == names[1] and len(names[0]) == 2


@pytest.mark.parametrize("limit", [{"limit_val_batches": 0}, {"val_check_interval": 11}])
def test_no_step_is_made_beyond_the_last_where_no_validation_is_due_any_more(
    limit: dict[str, Any], fit: Callable[..., Any], tmp_path: Path
) -> None:
    settings = {"val_check_interval": 4, "max_steps": 15, "max_epochs": -1}
    fit("stopped", Signal("on_validation_batch_end", 15), **settings)
    again, _ = fit("stopped", ckpt_path=tmp_path / "stopped" / "checkpoints" / "last.ckpt", **{**settings, **limit})
    assert again["global_step"] == 15
