"""Two processes on one CPU: they train, validate and predict; metrics equal one process's, each conversation is answered once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.faults.runs import write_project
from tests.test_cli import run

pytestmark = pytest.mark.slow
TWO = ["-c", "lightning_chatgpt:strategy/ddp", "--trainer.devices", "2"]
ONE = ["--trainer.devices", "1"]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_project(tmp_path_factory.mktemp("two"), n_chats=16, max_epochs=2)
    run("fit", "-c", "run.yaml", *TWO, cwd=folder)
    return folder


def validated(project: Path, *where: str) -> dict[str, float]:
    out = run("validate", "-c", "run.yaml", "--ckpt_path", "last", *where, cwd=project).stdout
    rows = [line.replace("│", " ").split() for line in out.splitlines() if "val_" in line]
    return {row[0]: float(row[1]) for row in rows}


def test_training_shares_the_data(project: Path) -> None:
    samples = [json.loads(line) for line in (project / "runs/one/samples.jsonl").read_text().splitlines()]
    assert [s["step"] for s in samples] == [0, 4, 8]  # 16 chats, 2 processes, batches of 2: 4 steps an epoch


def test_metrics_equal_one_process(project: Path) -> None:
    """Guards against padded shares: five conversations over two processes counted one twice."""
    one, two = validated(project, *ONE), validated(project, *TWO)
    assert set(one) == {"val_loss", "val_perplexity", "val_token_accuracy", "val_bits_per_byte"}
    assert two == pytest.approx(one, rel=1e-6)


def test_every_conversation_is_predicted_once_in_order(project: Path) -> None:
    target = project / "runs/one/predictions.jsonl"
    run("predict", "-c", "run.yaml", "--data.predict", "five.jsonl", "--ckpt_path", "last", *ONE, cwd=project)
    one = target.read_text()
    target.unlink()
    run("predict", "-c", "run.yaml", "--data.predict", "five.jsonl", "--ckpt_path", "last", *TWO, cwd=project)
    two = target.read_text()
    assert [json.loads(line)["id"] for line in two.splitlines()] == [f"five.jsonl:{i}" for i in range(1, 6)]
    assert one == two
    assert not list(target.parent.glob("*.part*"))
