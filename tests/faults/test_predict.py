"""A predict that was killed goes on where it was: each conversation is answered once, on any number of processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.runs import TWO, Meet, callback, environment, left, run, started, wait_for, write_project

pytestmark = pytest.mark.slow
PREDICT = ("predict", "-c", "run.yaml", "--ckpt_path", "last")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = write_project(tmp_path_factory.mktemp("predict"), max_epochs=1)
    run("fit", "-c", "run.yaml", cwd=folder)
    run(*PREDICT, cwd=folder)
    return folder, (folder / "runs/one/predictions.jsonl").read_text()


class MeetLater(Meet):
    """Meets a predict in its fourth batch."""

    n_batches = 0

    def _wait(self, *arguments: object) -> None:
        self.n_batches += 1
        if self.n_batches == 4:
            super()._wait(*arguments)


@pytest.mark.parametrize(("before", "after"), [(2, 1), *(pytest.param(*n, marks=pytest.mark.faults) for n in ((1, 1), (1, 2)))])
def test_a_killed_predict_goes_on(before: int, after: int, project: tuple[Path, str]) -> None:
    folder, whole = project
    shapes = {1: (), 2: TWO}
    target = folder / "runs/one/predictions.jsonl"
    target.unlink(missing_ok=True)
    meet = [word.replace("faults.runs.Meet", "faults.test_predict.MeetLater") for word in callback(Meet, hook="on_predict_batch_end")]
    with started(*PREDICT, *shapes[before], *meet, cwd=folder) as process:
        for pid in wait_for(folder, before, process=process):
            os.kill(pid, signal.SIGKILL)
        assert left(process, within=30) != 0
    assert not target.exists()
    with next(iter(target.parent.glob("*.part0"))).open("a") as part:
        part.write('{"id": "torn')  # as a kill may leave it
    output = run(*PREDICT, *shapes[after], cwd=folder)
    n_kept = int(output.split(" replies are there from a predict")[0].split()[-1])
    assert n_kept >= 4
    assert target.read_text() == whole
    assert sorted(path.name for path in target.parent.glob("predictions*")) == ["predictions.jsonl"]


@pytest.mark.parametrize("moment", ["replace", pytest.param("unlink", marks=pytest.mark.faults)])
def test_a_kill_while_parts_are_put_together_loses_nothing(moment: str, project: tuple[Path, str]) -> None:
    """Guards against parts that are removed, or a file that is begun, before the whole is there."""
    folder, whole = project
    target = folder / "runs/one/predictions.jsonl"
    target.unlink(missing_ok=True)
    script = f"""
import os, pathlib, sys
from lightning_chatgpt.__main__ import main
def die(*arguments, **settings):
    if "predictions" in str(arguments[0]):
        os._exit(9)
    return real(*arguments, **settings)
if {moment!r} == "replace":
    real, os.replace = os.replace, lambda a, b: die(a, b) if str(b).endswith("jsonl") else real(a, b)
else:
    real, pathlib.Path.unlink = pathlib.Path.unlink, lambda path, missing_ok=False: die(path, missing_ok=missing_ok)
main(sys.argv[1:])
"""
    done = subprocess.run([sys.executable, "-c", script, *PREDICT], cwd=folder, env=environment(), capture_output=True, check=False)
    assert done.returncode == 9, done.stderr[-2000:]
    assert target.exists() == (moment == "unlink") and (not target.exists() or target.read_text() == whole)
    output = run(*PREDICT, cwd=folder)
    assert int(output.split(" replies are there from a predict")[0].split()[-1]) >= 20  # of 24: all but the last batch
    assert target.read_text() == whole
    assert sorted(path.name for path in target.parent.glob("*predictions*")) == ["predictions.jsonl"]


def test_what_answers_something_else_is_not_taken_up(project: tuple[Path, str]) -> None:
    folder, _ = project
    meet = [word.replace("faults.runs.Meet", "faults.test_predict.MeetLater") for word in callback(Meet, hook="on_predict_batch_end")]
    with started(*PREDICT, *meet, cwd=folder) as process:
        os.kill(wait_for(folder, process=process)[0], signal.SIGKILL)
        assert left(process, within=30) != 0
    output = run(*PREDICT, "--data.max_new_tokens", "5", cwd=folder)
    assert "replies are there" not in output
    records = [json.loads(line) for line in (folder / "runs/one/predictions.jsonl").read_text().splitlines()]
    assert [record["id"] for record in records] == [f"chats.jsonl:{i}" for i in range(1, 25)]


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_an_evaluation_counts_each_record_once(verb: str, project: tuple[Path, str]) -> None:
    """Guards against shares that are filled up: five records on two processes were six."""
    folder, _ = project
    arguments = (verb, "-c", "run.yaml", "--ckpt_path", "last", "--data.test", "five.jsonl")
    figures = []
    for where in ((), TWO):
        rows = [
            line.replace("│", " ").split() for line in run(*arguments, *where, cwd=folder).splitlines() if "_loss" in line or "_per" in line
        ]
        figures.append({row[0]: float(row[1]) for row in rows})
    assert len(figures[0]) >= 2 and figures[1] == pytest.approx(figures[0], rel=1e-6)
