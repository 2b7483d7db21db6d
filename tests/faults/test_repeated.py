"""The same seed on the same machine gives the same bits; the run folder says what it takes to repeat a run; long runs stay as they are."""

from __future__ import annotations

import csv
import json
import os
import subprocess
from pathlib import Path

import pytest
from lightning.pytorch import Callback

from lightning_chatgpt import __version__
from tests.faults.runs import differences, run, write_project

pytestmark = pytest.mark.slow
ARGUMENTS = ("fit", "-c", "run.yaml", "--data.num_workers", "2", "--data.packing", "true", "--data.max_length", "64")


def test_two_runs_are_the_same_to_the_last_bit(tmp_path: Path) -> None:
    folder = write_project(tmp_path)
    for command in (["init", "-q"], ["add", "run.yaml"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    starts = []
    for name in ("one", "two"):
        if name == "two":
            (folder / "run.yaml").write_text((folder / "run.yaml").read_text() + "\n")
        run(*ARGUMENTS, "--trainer.default_root_dir", f"runs/{name}", cwd=folder)
        starts += json.loads((folder / "runs" / name / "run.json").read_text())["starts"]
    assert differences(folder / "runs/one/checkpoints/last.ckpt", folder / "runs/two/checkpoints/last.ckpt") == []
    metrics = [list(csv.DictReader((folder / "runs" / name / "metrics.csv").read_text().splitlines())) for name in ("one", "two")]
    assert len(metrics[0]) > 5
    without_time = [[{key: value for key, value in row.items() if key != "tokens_per_second"} for row in rows] for rows in metrics]
    assert without_time[0] == without_time[1]
    assert (folder / "runs/one/samples.jsonl").read_text() == (folder / "runs/two/samples.jsonl").read_text()

    one, two = starts
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    assert one["git"] == {"commit": head, "is_changed": False} and two["git"] == {"commit": head, "is_changed": True}
    assert one["command"] == ["lightning_chatgpt", *ARGUMENTS, "--trainer.default_root_dir", "runs/one"]
    assert one["seed"] == 0 and one["goes_on_from"] is None and one["processes"] == 1
    assert (
        one["versions"]["lightning-chatgpt"] == __version__ and {"python", "torch", "lightning", "transformers"} <= one["versions"].keys()
    )
    assert one["data"] == two["data"] and one["data"].keys() == {"train", "validation"}
    (folder / "chats.jsonl").write_text((folder / "chats.jsonl").read_text().replace("question 1", "question one"))
    run(*ARGUMENTS, "--ckpt_path", "last", "--trainer.max_epochs", "4", "--trainer.default_root_dir", "runs/two", cwd=folder)
    *_, last = json.loads((folder / "runs/two/run.json").read_text())["starts"]
    assert last["goes_on_from"] == "runs/two/checkpoints/last.ckpt" and last["data"]["train"] != one["data"]["train"]


class Footprint(Callback):
    """Prints resident memory, in KiB, and open files, after some numbers of optimizer steps."""

    def __init__(self, steps: list[int]) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer, pl_module, *arguments) -> None:  # type: ignore[no-untyped-def]
        """Look at this process."""
        if trainer.global_step in self.steps:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            print(
                "footprint", trainer.global_step, pages * os.sysconf("SC_PAGE_SIZE") // 1024, len(os.listdir("/proc/self/fd")), flush=True
            )


def footprints(folder: Path, *steps: int) -> list[list[int]]:
    """A run that validates, samples and saves every ten steps: its memory in KiB and its open files at some steps."""
    write_project(folder, val_check_interval=10, max_epochs=-1)
    given = ["--trainer.callbacks+", "tests.faults.test_repeated.Footprint", "--trainer.callbacks.init_args.steps", str(list(steps))]
    settings = ("--trainer.max_steps", str(steps[-1]), "--model.schedule", "constant", "--checkpoint.every_n_train_steps", "10")
    output = run("fit", "-c", "run.yaml", *settings, *given, cwd=folder)
    return [[int(word) for word in line.split()[2:]] for line in output.splitlines() if line.startswith("footprint")]


def test_a_run_holds_no_more_files_after_a_while(tmp_path: Path) -> None:
    (_, early), (_, late) = footprints(tmp_path, 40, 120)
    assert late == early


@pytest.mark.faults
def test_two_thousand_steps(tmp_path: Path) -> None:
    (memory_early, files_early), (memory_late, files_late) = footprints(tmp_path, 200, 2000)
    print(f"memory {memory_early} KiB, {memory_late} KiB; files {files_early}, {files_late}")
    assert files_late == files_early
    assert memory_late < memory_early * 1.02
