"""No run begins anew, or goes on otherwise, without saying so."""

from __future__ import annotations

import csv
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule

from lightning_chatgpt import CausalLMModule, ChatDataModule, ExactResume
from tests.conftest import ARCHITECTURE, chat, trainer
from tests.faults import runs
from tests.faults.runs import Meet, callback, left, run, started, wait_for, write_project

pytestmark = pytest.mark.slow
AUTO = ("fit", "-c", "run.yaml", "--ckpt_path", "auto")
CHECKPOINTS = "runs/one/checkpoints"


def test_every_way_is_told(tmp_path: Path) -> None:
    folder = write_project(tmp_path)
    output = run(*AUTO, "--trainer.max_epochs", "1", cwd=folder)
    assert f"ckpt_path auto: there is no checkpoint in {CHECKPOINTS}; starting anew" in output
    output = run(*AUTO, "--trainer.max_epochs", "2", cwd=folder)
    assert f"ckpt_path auto: going on from {CHECKPOINTS}/last.ckpt" in output and " was " not in output

    # The command line wins, the learning rate of the next step included.
    output = run(*AUTO, "--model.learning_rate", "0.5", "--model.schedule", "constant", "--data.max_new_tokens", "5", cwd=folder)
    assert "model.learning_rate is 0.5, and was 0.01 when the checkpoint was saved; going on with 0.5" in output
    assert "model.schedule is 'constant', and was 'cosine' when the checkpoint was saved; going on with 'constant'" in output
    assert "data.max_new_tokens is 5, and was 4 when the checkpoint was saved; going on with 5" in output
    rows = csv.DictReader((folder / "runs/one/metrics.csv").read_text().splitlines())
    rates = {int(row["step"]): float(row["learning_rate"]) for row in rows if row["learning_rate"]}
    assert len(rates) == 36 and rates[23] < 0.01 and rates[24] == 0.5
    output = run(*AUTO, "--model.architecture.resid_pdrop", "0.3", "--trainer.max_epochs", "4", cwd=folder)
    assert "'resid_pdrop': 0.3" in output and "; the checkpoint's stays" in output
    output = run(*AUTO, "--model.optimizer", "sgd", "--trainer.max_epochs", "4", cwd=folder, code=2)
    assert "error: model.optimizer SGD cannot go on with the state of the checkpoint's AdamW; keep that, or begin a new run" in output

    # A damaged checkpoint is named, and the next one taken.
    last = folder / CHECKPOINTS / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-1000])
    (best,) = (folder / CHECKPOINTS).glob("epoch=*.ckpt")
    output = run(*AUTO, "--trainer.max_epochs", "5", cwd=folder)
    assert f"{CHECKPOINTS}/last.ckpt: cannot be read, it seems to be cut short or damaged" in output
    assert f"ckpt_path auto: going on from {CHECKPOINTS}/{best.name}" in output
    for path in (folder / CHECKPOINTS).glob("*.ckpt"):
        path.write_bytes(b"")
    assert "there is no whole checkpoint in" in run("fit", "-c", "run.yaml", "--ckpt_path", "last", cwd=folder, code=2)


def test_a_slurm_job_is_requeued_once_it_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_project(tmp_path)
    (folder / "bin").mkdir()
    scontrol = folder / "bin" / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {folder}/asked\nls {folder}/{CHECKPOINTS} >> {folder}/asked\n')
    scontrol.chmod(0o755)
    task = {"SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "chat", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1", "SLURM_PROCID": "0",
            "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost", "SLURM_NNODES": "1"}  # fmt: skip
    whole = runs.environment()
    monkeypatch.setattr(runs, "environment", lambda: {**whole, **task, "PATH": f"{folder}/bin:{os.environ['PATH']}"})
    with started("fit", "-c", "run.yaml", *callback(Meet, hook="on_train_batch_end"), cwd=folder) as process:
        os.kill(wait_for(folder, process=process)[0], signal.SIGUSR1)
        assert left(process, within=15) == 143
    assert (folder / "asked").read_text().split() == ["requeue", "17", "last.ckpt"]
    monkeypatch.setattr(runs, "environment", lambda: whole)
    run(*AUTO, cwd=folder)


class OwnOptimizer(CausalLMModule):
    """What Lightning restores of its optimizer holds, the learning rate too."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


class Foreign(LightningModule):
    """Of another project, with a setting that compares entry by entry."""

    def __init__(self, rates: Any, depth: int = 1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(torch.ones(1, 1)).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:The `train_dataloader` does not have many workers")
def test_what_wins_is_what_holds(tmp_path: Path, write_chats: Callable[..., Path]) -> None:
    """Guards against promising a learning rate that the restored optimizer does not have."""
    path = tmp_path / "a.ckpt"
    source = str(write_chats([chat(f"q{i}", "a") for i in range(8)]))

    def fit(module: Any, data: Any, *, max_steps: int, **settings: Any) -> float:
        run = trainer(tmp_path, max_steps=max_steps, callbacks=[ExactResume(seed=0)], **settings)
        run.fit(module, data, **({"ckpt_path": path, "weights_only": True} if path.exists() else {}))
        run.save_checkpoint(path)
        return float(run.optimizers[0].param_groups[0]["lr"])

    def data(**settings: Any) -> ChatDataModule:
        return ChatDataModule(train=source, **{"vocab_size": 300, "batch_size": 2, **settings})

    assert fit(OwnOptimizer(architecture=ARCHITECTURE, learning_rate=0.1), data(), max_steps=1) == 0.1
    with (
        pytest.warns(UserWarning, match=r"model.learning_rate is 0.2, and was 0.1 .*; the checkpoint's stays"),
        pytest.warns(UserWarning, match=r"data.vocab_size is 280, and was 300 .*; the checkpoint's stays"),
    ):
        module = OwnOptimizer(architecture=ARCHITECTURE, learning_rate=0.2)
        assert fit(module, data(vocab_size=280), max_steps=2) == 0.1

    path.unlink()
    loader = torch.utils.data.DataLoader([0, 1, 2, 3])  # type: ignore[arg-type]
    fit(Foreign(torch.tensor([1.0, 2.0])), loader, max_steps=1)
    with pytest.warns(UserWarning) as warned:
        fit(Foreign(torch.tensor([1.0, 2.0]), depth=2), loader, max_steps=2)
    told = [str(warning.message) for warning in warned if "was saved" in str(warning.message)]
    assert told == ["model.depth is 2, and was 1 when the checkpoint was saved; going on with 2, as far as nothing that was restored holds "
                    "the other"]  # fmt: skip
