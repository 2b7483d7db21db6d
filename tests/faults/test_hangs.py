"""A process of two that fails or is killed: all are gone within 30 seconds, and none says that all went well."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.runs import TWO, Fail, Meet, callback, environment, left, run, started, wait_for, write_project

pytestmark = pytest.mark.slow
VERBS = {
    "training": ("fit", "on_train_batch_end"),
    "validation": ("fit", "on_validation_batch_end"),
    "predict": ("predict", "on_predict_batch_end"),
}
# One of each in every run of the tests, and all of them by `pytest -m faults`.
EVERYWHERE = [
    pytest.param(place, rank, marks=[] if rank == (place != "validation") else pytest.mark.faults) for place in VERBS for rank in (0, 1)
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint to predict with."""
    folder = write_project(tmp_path_factory.mktemp("trained"), max_epochs=1)
    run("fit", "-c", "run.yaml", cwd=folder)
    return folder / "runs/one/checkpoints/last.ckpt"


def arguments_of(place: str, trained: Path, cls: type, **settings: Any) -> list[str]:
    """A run of two processes to which something happens."""
    verb, hook = VERBS[place]
    rest = ["--ckpt_path", str(trained)] if verb == "predict" else []
    return [verb, "-c", "run.yaml", *TWO, *callback(cls, hook=hook, **settings), *rest]


@pytest.mark.parametrize(("place", "rank"), EVERYWHERE)
def test_an_exception_in_one_process_ends_all(place: str, rank: int, trained: Path, tmp_path: Path) -> None:
    folder = write_project(tmp_path)
    with started(*arguments_of(place, trained, Fail, rank=rank), cwd=folder) as process:
        wait_for(folder, process=process)
        assert left(process, within=30) != 0
    assert "this process fails on purpose" in (folder / "output.txt").read_text()


@pytest.mark.parametrize(("place", "rank"), EVERYWHERE)
def test_a_killed_process_ends_all(place: str, rank: int, trained: Path, tmp_path: Path) -> None:
    folder = write_project(tmp_path)
    with started(*arguments_of(place, trained, Meet, step=3), cwd=folder) as process:
        os.kill(wait_for(folder, 2, process=process)[rank], signal.SIGKILL)
        assert left(process, within=30) != 0


def test_a_worker_that_is_killed_ends_the_run(tmp_path: Path) -> None:
    folder = write_project(tmp_path)
    arguments = ("fit", "-c", "run.yaml", "--data.num_workers", "1", *callback(Meet, hook="on_train_batch_end"))
    with started(*arguments, cwd=folder) as process:
        (main,) = wait_for(folder, process=process)
        worker = Path(f"/proc/{main}/task/{main}/children").read_text().split()[0]
        os.kill(int(worker), signal.SIGKILL)
        assert left(process, within=30) == 1


def test_workers_leave_signals_to_the_run(tmp_path: Path) -> None:
    """Guards against workers that die of a signal to the whole group, and take the run with them before it is saved."""
    folder = write_project(tmp_path)
    arguments = ("fit", "-c", "run.yaml", "--data.num_workers", "2", *callback(Meet, hook="on_train_batch_end"))
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        rest = ("--ckpt_path", "auto", "--trainer.max_epochs", "5")
        with started(*arguments, *rest, cwd=folder) as process:
            wait_for(folder, process=process)
            os.killpg(process.pid, number)
            assert left(process, within=15) == code
    run("fit", "-c", "run.yaml", *rest, cwd=folder)


SCRIPT = """
import atexit, sys, time
from lightning.pytorch import Callback, Trainer
from lightning_chatgpt import ProcessWatch
from lightning_chatgpt.callbacks import stopping
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning_chatgpt.errors import ConfigError

where = sys.argv[1]
stopping._LEAVE_SECONDS = 1

class Fail(Callback):
    n_fits = 0

    def setup(self, trainer, module, stage):
        self.n_fits += 1
        if self.n_fits == 2:
            time.sleep(2)

    def on_train_start(self, trainer, module):
        if self.n_fits == 1:
            raise ConfigError("data.train: the cause")

    def on_exception(self, trainer, module, exception):
        if where == "teardown":
            time.sleep(30)

if where == "exit":
    atexit.register(time.sleep, 30)
Trainer.world_size = property(lambda self: 2)  # as the callback sees it
trainer = Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[ProcessWatch(), Fail()])
try:
    trainer.fit(BoringModel())
except ConfigError:
    if where not in ("caught", "again"):
        raise
    if where == "again":
        trainer.fit(BoringModel())
        assert trainer.global_step == 1
    time.sleep(2)
    print("the script went on")
"""


@pytest.mark.parametrize(("where", "code"), [("teardown", 2), ("exit", 2), ("caught", 0), ("again", 0)])
def test_only_a_process_that_is_stuck_is_ended_and_says_why(where: str, code: int, tmp_path: Path) -> None:
    """Guards against an end without a cause, with another exit code than the error's, and against the end of a script that caught it."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, where], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == code, done.stderr
    assert ("the script went on" in done.stdout) == (code == 0)
    assert ("error: data.train: the cause\nthis process did not end by itself in 1 s, and is ended" in done.stderr) == (code != 0)
