"""Signals: the run is saved, every process leaves in time with the right code, and the run that goes on is the one that was not stopped."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from lightning_chatgpt.checkpoints.file import read_plain
from tests.faults.runs import TWO, Meet, callback, differences, left, run, started, wait_for, write_project

pytestmark = pytest.mark.slow
LAST = "runs/one/checkpoints/last.ckpt"
HOOKS = {
    "training": "on_train_batch_end",
    "validation": "on_validation_batch_end",
    "sampling": "on_validation_end",
    "saving": "on_save_checkpoint",
}


@pytest.fixture(scope="module", params=[1, 2], ids=["one-process", "two-processes"])
def undisturbed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[str, ...]]:
    """A run that nothing happens to, and the arguments it was made with."""
    folder = write_project(tmp_path_factory.mktemp("undisturbed"), accumulate_grad_batches=3)
    where = TWO if request.param == 2 else ()
    run("fit", "-c", "run.yaml", *where, cwd=folder)
    return folder, where


def stopped(folder: Path, where: tuple[str, ...], *, number: signal.Signals, hook: str, target: str, code: int, times: int = 1) -> None:
    """Stop a run with a signal while it waits in a hook."""
    n_processes = 2 if TWO[1] in where else 1
    with started("fit", "-c", "run.yaml", *where, *callback(Meet, hook=hook, step=3), cwd=folder) as process:
        processes = wait_for(folder, n_processes, process=process)
        for _ in range(times):
            if target == "group":
                os.killpg(process.pid, number)
            else:
                os.kill(processes[int(target)], number)
        assert left(process, within=15) == code, (folder / "output.txt").read_text()[-3000:]


def check_a_stop(place: str, target: str, undisturbed: tuple[Path, tuple[str, ...]], folder: Path) -> None:
    whole, where = undisturbed
    write_project(folder, accumulate_grad_batches=3)
    stopped(folder, where, number=signal.SIGTERM, hook=HOOKS[place], target=target, code=143)
    assert "go on with --ckpt_path last" in (folder / "output.txt").read_text()
    run("fit", "-c", "run.yaml", *where, "--ckpt_path", "last", cwd=folder)
    assert differences(folder / LAST, whole / LAST) == []


@pytest.mark.parametrize(("place", "target"), [("training", "1"), ("validation", "group"), ("saving", "0")])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    place: str, target: str, undisturbed: tuple[Path, tuple[str, ...]], tmp_path: Path
) -> None:
    """Guards against Lightning's leaving with 0 and no checkpoint, and against a process that waits for one that left."""
    if place != "validation" and not undisturbed[1]:
        pytest.skip("ten times each are run by `pytest -m faults`")
    check_a_stop(place, target, undisturbed, tmp_path)


@pytest.mark.faults
@pytest.mark.parametrize("place", HOOKS)
@pytest.mark.parametrize("target", ["0", "1", "group"])
def test_ten_times_each(target: str, place: str, undisturbed: tuple[Path, tuple[str, ...]], tmp_path: Path) -> None:
    where = undisturbed[1]
    if target == "1" and not where:
        pytest.skip("there is one process")
    for time in range(9):
        folder = tmp_path / str(time)
        folder.mkdir()
        write_project(folder, accumulate_grad_batches=3)
        stopped(folder, where, number=signal.SIGTERM, hook=HOOKS[place], target=target, code=143)
        read_plain(folder / LAST)
    (tmp_path / "tenth").mkdir()
    check_a_stop(place, target, undisturbed, tmp_path / "tenth")


def test_other_signals(tmp_path: Path) -> None:
    folder = write_project(tmp_path)
    for number, times, code in ((signal.SIGUSR1, 1, 143), (signal.SIGINT, 1, 130), (signal.SIGINT, 2, 130)):
        arguments = () if not (folder / LAST).exists() else ("--overwrite", "true")
        stopped(folder, arguments, number=number, hook="on_train_batch_end", target="group", code=code, times=times)
