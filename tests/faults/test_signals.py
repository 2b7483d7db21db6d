"""Signals: the run is saved, every process leaves in time with the right code, and the run that goes on is the one that was not stopped."""

from __future__ import annotations

import csv
import os
import signal
import time
from pathlib import Path

import pytest

from lightning_chatgpt.checkpoints.file import read_plain
from tests.faults.runs import TWO, Meet, callback, differences, left, run, started, wait_for, write_project

pytestmark = pytest.mark.slow
LAST = "runs/one/checkpoints/last.ckpt"
HOOKS = {
    "training": "on_train_batch_end",
    "accumulation": "on_after_backward",
    "validation": "on_validation_batch_end",
    "sampling": "on_validation_end",
    "saving": "on_save_checkpoint",
}


FAULTS = pytest.mark.faults


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


def logged(folder: Path) -> list[dict[str, str]]:
    """What was logged of a run, its speed aside."""
    rows = csv.DictReader((folder / "runs/one/metrics.csv").read_text().splitlines())
    return [{name: value for name, value in row.items() if "per_sec" not in name and "throughput" not in name} for row in rows]


def check_a_stop(place: str, target: str, undisturbed: tuple[Path, tuple[str, ...]], folder: Path) -> None:
    whole, where = undisturbed
    write_project(folder, accumulate_grad_batches=3)
    stopped(folder, where, number=signal.SIGTERM, hook=HOOKS[place], target=target, code=143)
    assert "go on with --ckpt_path last" in (folder / "output.txt").read_text()
    output = run("fit", "-c", "run.yaml", *where, "--ckpt_path", "last", "--seed_everything", "5", cwd=folder)
    assert "resume.seed is 5, and was 0 when the checkpoint was saved; the checkpoint's stays" in output
    assert differences(folder / LAST, whole / LAST) == []
    assert logged(folder) == logged(whole)


@pytest.mark.parametrize(("place", "target"), [("validation", "group"), ("saving", "0"), pytest.param("accumulation", "1", marks=FAULTS)])
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
    for i in range(9):
        folder = tmp_path / str(i)
        folder.mkdir()
        write_project(folder, accumulate_grad_batches=3)
        stopped(folder, where, number=signal.SIGTERM, hook=HOOKS[place], target=target, code=143)
        read_plain(folder / LAST)
    (tmp_path / "tenth").mkdir()
    check_a_stop(place, target, undisturbed, tmp_path / "tenth")


def test_other_signals(tmp_path: Path) -> None:
    folder = write_project(tmp_path)
    for number, code in ((signal.SIGUSR1, 143), (signal.SIGINT, 130)):
        arguments = () if not (folder / LAST).exists() else ("--overwrite", "true")
        stopped(folder, arguments, number=number, hook="on_train_batch_end", target="group", code=code)


def test_a_signal_to_another_process_has_its_own_exit_code(tmp_path: Path) -> None:
    """Guards against 143 for a Ctrl-C that reached the second process alone."""
    folder = write_project(tmp_path)
    stopped(folder, TWO, number=signal.SIGINT, hook="on_train_batch_end", target="1", code=130)
    assert "SIGINT: stopped after step" in (folder / "output.txt").read_text()


def test_a_second_ctrl_c_leaves_at_once(tmp_path: Path) -> None:
    folder = write_project(tmp_path)
    output = folder / "output.txt"
    with started("fit", "-c", "run.yaml", *callback(Meet, hook="on_train_batch_end", step=3, seconds=60), cwd=folder) as process:
        (main,) = wait_for(folder, process=process)
        os.kill(main, signal.SIGINT)
        while "press Ctrl-C again to leave at once" not in output.read_text():
            time.sleep(0.02)
        assert process.poll() is None
        os.kill(main, signal.SIGINT)
        assert left(process, within=15) == 130  # of 60
    assert "stopped after step" not in output.read_text() and not (folder / LAST).exists()
