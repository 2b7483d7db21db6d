"""A run that goes on with another number of processes reads the same rows in the same steps."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from tests.faults.runs import TWO, run, state_of, write_project

pytestmark = pytest.mark.slow
LAST = "checkpoints/last.ckpt"
# The same 12 rows in each step.
SHAPES = {1: ("--data.batch_size", "4", "--trainer.accumulate_grad_batches", "3"), 2: (*TWO, "--data.batch_size", "6")}
# Adam divides by the size of gradients and makes much of their last bits; tests/test_equivalence.py is about that.
OPTIMIZATION = ("--model.optimizer", "sgd", "--model.learning_rate", "0.05", "--model.schedule", "constant")
COMMON = ("fit", "-c", "run.yaml", *OPTIMIZATION, "--trainer.max_epochs", "null")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of twenty steps, in one process; they end in the third epoch."""
    folder = write_project(tmp_path_factory.mktemp("elastic"), n_chats=100)
    dropout = [word for name in ("resid", "embd", "attn") for word in (f"--model.architecture.{name}_pdrop", "0.0")]
    (folder / "dropout").write_text(" ".join(dropout))
    run(*COMMON, *dropout, *SHAPES[1], "--trainer.max_steps", "20", "--trainer.default_root_dir", "runs/whole", cwd=folder)
    return folder


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_processes_goes_on_with_the_same_rows(before: int, after: int, project: Path) -> None:
    name = f"runs/{before}to{after}"
    common = (*COMMON, *(project / "dropout").read_text().split(), "--trainer.default_root_dir", name)
    run(*common, *SHAPES[before], "--trainer.max_steps", "12", cwd=project)
    run(*common, *SHAPES[after], "--trainer.max_steps", "20", "--ckpt_path", "last", cwd=project)
    whole, parts = (
        [float(row["train_loss"]) for row in csv.DictReader((project / run / "metrics.csv").read_text().splitlines()) if row["train_loss"]]
        for run in ("runs/whole", name)
    )
    assert len(whole) == 20 and parts == pytest.approx(whole, rel=1e-6)
    one, other = state_of(project / "runs/whole" / LAST), state_of(project / name / LAST)
    weights = [key for key in one if key.startswith("network.")]
    assert max(float((one[key] - other[key]).abs().max()) for key in weights) < 1e-6
    assert not all(torch.equal(one[key], other[key]) for key in weights)  # other sums were made


def test_sizes_that_do_not_divide_are_refused(project: Path) -> None:
    name = "runs/refused"
    common = (*COMMON, *(project / "dropout").read_text().split(), "--trainer.default_root_dir", name)
    run(*common, *SHAPES[1], "--trainer.max_steps", "2", cwd=project)
    output = run(*common, "--data.batch_size", "7", "--trainer.max_steps", "20", "--ckpt_path", "last", cwd=project, code=2)
    assert (
        "error: the run was left after 24 rows of the epoch, which optimizer steps of 7 rows do not divide (data.batch_size 7, "
        "1 process(es), trainer.accumulate_grad_batches 1); let them come to 2, 3, 4, 6, 8, 12" in output
    )
    grouped = ("--data.group_by_length", "true", "--trainer.default_root_dir", "runs/grouped")
    run(*common, *grouped, *SHAPES[1], "--trainer.max_steps", "2", cwd=project)
    output = run(*common, *grouped, "--data.batch_size", "8", "--trainer.max_steps", "20", "--ckpt_path", "last", cwd=project, code=2)
    assert "error: data.group_by_length orders an epoch by its optimizer steps of 12 rows, not 8; keep data.batch_size times" in output
