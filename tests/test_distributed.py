"""Two processes on one CPU: they train, validate and predict; metrics equal one process's, each conversation is answered once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.conftest import ARCHITECTURE, chat
from tests.test_cli import run

pytestmark = pytest.mark.slow
TWO = ["-c", "lightning_chatgpt:strategy/ddp", "--trainer.devices", "2", "--trainer.accelerator", "cpu"]
ONE = ["--trainer.devices", "1", "--trainer.accelerator", "cpu"]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    for name, n in (("train.jsonl", 16), ("five.jsonl", 5)):
        chats = [chat(f"question {i}", f"answer {i} " * (i + 1)) for i in range(n)]
        (folder / name).write_text("".join(json.dumps(c.to_dict()) + "\n" for c in chats))
    config = {
        "trainer": {"default_root_dir": "runs/two", "max_epochs": 2, "log_every_n_steps": 1},
        "model": {"architecture": ARCHITECTURE, "learning_rate": 1e-2},
        "data": {"train": "train.jsonl", "validation": "five.jsonl", "predict": "five.jsonl", "max_leak": None, "vocab_size": 300,
                 "batch_size": 2, "max_new_tokens": 8},
        "samples": {"prompts": ["question 1"], "max_new_tokens": 4},
    }  # fmt: skip
    (folder / "two.yaml").write_text(yaml.safe_dump(config))
    run("fit", "-c", "two.yaml", *TWO, cwd=folder)
    return folder


def validated(project: Path, *where: str) -> dict[str, float]:
    out = run("validate", "-c", "two.yaml", "--ckpt_path", "last", *where, cwd=project).stdout
    rows = [line.replace("│", " ").split() for line in out.splitlines() if "val_" in line]
    return {row[0]: float(row[1]) for row in rows}


def test_training_shares_the_data(project: Path) -> None:
    samples = [json.loads(line) for line in (project / "runs/two/samples.jsonl").read_text().splitlines()]
    assert [s["step"] for s in samples] == [0, 4, 8]  # 16 chats, 2 processes, batches of 2: 4 steps an epoch


def test_metrics_equal_one_process(project: Path) -> None:
    """Guards against padded shares: five conversations over two processes counted one twice."""
    one, two = validated(project, *ONE), validated(project, *TWO)
    assert set(one) == {"val_loss", "val_perplexity", "val_token_accuracy", "val_bits_per_byte"}
    assert two == pytest.approx(one, rel=1e-6)


def test_every_conversation_is_predicted_once_in_order(project: Path) -> None:
    target = project / "runs/two/predictions.jsonl"
    run("predict", "-c", "two.yaml", "--ckpt_path", "last", *ONE, cwd=project)
    one = target.read_text()
    target.unlink()
    run("predict", "-c", "two.yaml", "--ckpt_path", "last", *TWO, cwd=project)
    two = target.read_text()
    assert [json.loads(line)["id"] for line in two.splitlines()] == [f"five.jsonl:{i}" for i in range(1, 6)]
    assert one == two
    assert not list(target.parent.glob("*.part*"))
