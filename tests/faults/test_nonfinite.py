"""NaN and infinity: the run stops before the weights take them, and names the step and the records; or the step is skipped and counted."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from lightning_chatgpt import CausalLMModule, ChatDataModule, DurableCheckpointIO, NonFiniteGuard, RunCheckpoint
from lightning_chatgpt.errors import NonFiniteError
from tests.conftest import ARCHITECTURE, chat, trainer
from tests.faults.runs import TWO, Poison, callback, differences, run, write_project


class Weights(Callback):
    """Keeps the weights after each optimizer step."""

    def __init__(self) -> None:
        self.after: dict[int, dict[str, torch.Tensor]] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *arguments: Any) -> None:
        self.after[trainer.global_step] = {name: value.clone() for name, value in pl_module.state_dict().items()}


def fit(folder: Path, data: Any, *callbacks: Callback, **settings: Any) -> Any:
    settings = {"max_epochs": 2, "log_every_n_steps": 1, "enable_checkpointing": True, "plugins": [DurableCheckpointIO()], **settings}
    run = trainer(folder, callbacks=[RunCheckpoint(), *callbacks], **settings)
    run.fit(CausalLMModule(architecture=ARCHITECTURE, learning_rate=1e-2), data)
    return run


@pytest.fixture
def data(write_chats: Callable[..., Path]) -> ChatDataModule:
    path = write_chats([chat(f"question {i}", f"answer {i}") for i in range(24)])
    return ChatDataModule(train=str(path), validation=None, vocab_size=300, batch_size=2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("accumulated", [1, 3])
def test_the_run_stops_with_the_weights_of_the_step_before(what: str, value: float, accumulated: int, data: Any, tmp_path: Path) -> None:
    """Guards against Lightning, which ends normally with weights that are NaN."""
    weights, poison = Weights(), Poison(what, value, step=3, batch=3 * accumulated + accumulated // 2)
    with pytest.raises(NonFiniteError) as error:
        fit(tmp_path, data, NonFiniteGuard(), poison, weights, accumulate_grad_batches=accumulated)
    message = str(error.value)
    assert message.startswith("step 4: ") and "--nonfinite.action skip" in message
    records = re.findall(r"chats\.jsonl:(\d+)", message)
    assert {int(number) - 1 for number in records} == set(poison.records if what == "loss" else poison.records_of_step)
    saved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 3
    assert all(torch.equal(saved["state_dict"][name], value) for name, value in weights.after[3].items())


def test_what_is_large_is_finite(data: Any, tmp_path: Path) -> None:
    """Guards against a sum of squares that overflows where the number does not."""
    run = fit(tmp_path, data, NonFiniteGuard(), Poison("gradient", 1e30, step=3, batch=3), max_steps=5)
    assert run.global_step == 5


def test_a_step_is_skipped_and_counted(data: Any, tmp_path: Path) -> None:
    weights = Weights()
    with pytest.warns(
        UserWarning, match=r"step 4: the loss of batch 3 of epoch 0 is nan \(chats.jsonl:\d+, .*; the step is skipped \(1 so far\)"
    ):
        run = fit(tmp_path, data, NonFiniteGuard("skip"), Poison("loss", float("nan"), step=3, batch=3), weights)
    assert all(torch.equal(weights.after[3][name], value) for name, value in weights.after[4].items())
    assert not all(torch.equal(weights.after[4][name], value) for name, value in weights.after[5].items())
    assert run.callback_metrics["skipped_steps"] == 1
    assert all(torch.isfinite(value).all() for value in weights.after[24].values())
    saved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert saved["callbacks"]["NonFiniteGuard"] == {"n_skipped": 1}


@pytest.mark.filterwarnings("ignore:.*the step is skipped")
def test_not_every_step_is_skipped(data: Any, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="step 24: "):
        fit(tmp_path, data, NonFiniteGuard("skip"), Poison("gradient", float("inf"), step=3, batch=None))


@pytest.mark.slow
@pytest.mark.parametrize(("value", "rank"), [("nan", 1), pytest.param("inf", 0, marks=pytest.mark.faults)])
def test_one_process_of_two(value: str, rank: int, tmp_path: Path) -> None:
    """Both leave, with one line of what was wrong in either; the run goes on once such steps are left out."""
    folder = write_project(tmp_path)
    poison = callback(Poison, what="loss", value=f".{value}", step=4, batch=4, rank=rank)
    output = run("fit", "-c", "run.yaml", *TWO, *poison, cwd=folder, code=1)
    places = r"\(chats.jsonl:\d+, chats.jsonl:\d+\)"
    assert re.search(rf"error: step 5: the loss of batch 4 of epoch 0 is {value} in process {rank} {places}; the weights", output)
    assert "Traceback" not in output
    assert torch.load(folder / "runs/one/checkpoints/last.ckpt", weights_only=True)["global_step"] == 4
    skipped = [*poison, "--nonfinite.action", "skip"]
    run("fit", "-c", "run.yaml", *TWO, *skipped, "--ckpt_path", "last", cwd=folder)
    run("fit", "-c", "run.yaml", *TWO, *skipped, "--trainer.default_root_dir", "runs/whole", cwd=folder)
    assert differences(folder / "runs/one/checkpoints/last.ckpt", folder / "runs/whole/checkpoints/last.ckpt") == []
    rows = list(csv.DictReader((folder / "runs/one/metrics.csv").read_text().splitlines()))
    assert [row["skipped_steps"] for row in rows if row["skipped_steps"]][-1] == "1.0"
