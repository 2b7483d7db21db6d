"""The parts that guard a run, one by one, in somebody else's project: a module of Lightning's own, a LightningCLI, a config."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_chatgpt import DurableCheckpointIO, GracefulStop, RunCheckpoint
from lightning_chatgpt.callbacks.stopping import Stopped
from tests.conftest import trainer
from tests.faults.runs import environment

SCRIPT = """
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
LightningCLI(BoringModel, BoringDataModule)
"""
PARTS = {
    "RunCheckpoint": {"monitor": None, "filename": "{step}", "every_n_train_steps": 5},
    "ExactResume": {"seed": 3},
    "NonFiniteGuard": {"action": "skip"},
    "GracefulStop": {},
    "ProcessWatch": {},
}


def fit(folder: Path, parts: dict[str, dict[str, Any]], *, plugin: bool, steps: int, ckpt_path: Path | None = None) -> str:
    """Run another project's command line with some of the parts."""
    config = {
        "trainer": {
            "accelerator": "cpu",
            "max_steps": steps,
            "limit_train_batches": 6,
            "logger": False,
            "default_root_dir": str(folder),
            "enable_progress_bar": False,
            "enable_checkpointing": "RunCheckpoint" in parts,
            "callbacks": [{"class_path": f"lightning_chatgpt.{name}", "init_args": settings} for name, settings in parts.items()],
            "plugins": [{"class_path": "lightning_chatgpt.DurableCheckpointIO"}] if plugin else None,
        },
        "ckpt_path": str(ckpt_path) if ckpt_path else None,
    }
    (folder / "theirs.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-c", SCRIPT, "fit", "-c", "theirs.yaml"]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "config.yaml").unlink()  # Lightning's own, which it would not write over
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "RunCheckpoint",
        "GracefulStop",
        *(
            pytest.param(name, marks=pytest.mark.faults)
            for name in ("ExactResume", "NonFiniteGuard", "ProcessWatch", "DurableCheckpointIO")
        ),
    ],
)
def test_each_part_alone_from_yaml(name: str, tmp_path: Path) -> None:
    fit(tmp_path, {name: PARTS[name]} if name in PARTS else {}, plugin=name == "DurableCheckpointIO", steps=3)
    assert (tmp_path / "checkpoints/last.ckpt").is_file() == (name == "RunCheckpoint")


@pytest.mark.slow
def test_all_parts_from_yaml_go_on_exactly(tmp_path: Path) -> None:
    for name, stops in (("whole", [12]), ("parted", [6, 12])):
        (tmp_path / name).mkdir()
        last = tmp_path / name / "checkpoints" / "last.ckpt"
        for steps in stops:
            fit(tmp_path / name, PARTS, plugin=True, steps=steps, ckpt_path=last if last.exists() else None)
    whole, parted = (torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True) for name in ("whole", "parted"))
    assert whole["global_step"] == parted["global_step"] == 12
    assert whole["callbacks"]["ExactResume"]["seed"] == 3
    assert all(torch.equal(value, parted["state_dict"][key]) for key, value in whole["state_dict"].items())


def test_without_exact_resume_a_stop_waits_for_the_step(tmp_path: Path) -> None:
    """Guards against a checkpoint amid an accumulation, which Lightning by itself goes on from with half of the step's gradients."""

    class Signal(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    settings = {"callbacks": [RunCheckpoint(monitor=None, filename=None), Signal(), GracefulStop()], "enable_checkpointing": True}
    with pytest.raises(Stopped):
        run = trainer(tmp_path, max_epochs=1, accumulate_grad_batches=3, plugins=[DurableCheckpointIO()], limit_val_batches=0, **settings)
        run.fit(BoringModel())
    saved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 2 and saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["processed"] == 6
