"""Runs of the command line that something happens to: started, met at a known place, hit, and looked at."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback

from tests.conftest import ARCHITECTURE, chat

ROOT = Path(__file__).parent.parent.parent
TWO = ("-c", "lightning_chatgpt:strategy/ddp", "--trainer.devices", "2")


class Meet(Callback):
    """Waits in a hook, once, and tells that it does.

    Args:
        hook: Its name.
        step: Optimizer steps that are to be done before.
        seconds: How long it waits.
        folder: Where ``met.<rank>`` is written, with the process's id.
    """

    def __init__(self, hook: str, step: int = 5, seconds: float = 1.0, folder: str = ".") -> None:
        self.hook, self.step, self.seconds, self.folder = hook, step, seconds, folder
        self.is_done = False
        setattr(self, hook, self._wait)

    def _wait(self, trainer: Any, *arguments: Any) -> None:
        if self.is_done or trainer.sanity_checking or (trainer.state.fn == "fit" and trainer.global_step < self.step):
            return
        self.is_done = True
        met = Path(self.folder) / f"met.{trainer.global_rank}"
        part = met.with_name(f".{met.name}")
        part.write_text(str(os.getpid()))
        part.rename(met)
        end = time.monotonic() + self.seconds
        while time.monotonic() < end:  # a sleep that a signal does not cut short
            time.sleep(0.02)


class Fail(Callback):
    """Raises in a hook, in one process.

    Args:
        hook: Its name.
        rank: The process.
        step: Optimizer steps that are to be done before.
    """

    def __init__(self, hook: str, rank: int, step: int = 3) -> None:
        self.rank, self.step = rank, step
        setattr(self, hook, self._fail)

    def _fail(self, trainer: Any, *arguments: Any) -> None:
        is_there = trainer.state.fn != "fit" or (trainer.global_step >= self.step and not trainer.sanity_checking)
        if trainer.global_rank == self.rank and is_there:
            Path("met.0").write_text(str(os.getpid()))
            raise RuntimeError("this process fails on purpose")


class Poison(Callback):
    """Makes a loss or a gradient NaN or infinite.

    Args:
        what: loss or gradient.
        value: Instead of what it is.
        step: Optimizer steps that are done before.
        batch: The micro-batch of the epoch; none for all after ``step``.
        rank: The process.

    Attributes:
        records: The numbers in the chats of that micro-batch.
        records_of_step: Those of all that are accumulated with it.
    """

    def __init__(self, what: str, value: float, step: int, batch: int | None, rank: int = 0) -> None:
        self.what, self.value, self.step, self.batch, self.rank = what, value, step, batch, rank
        self.records: list[int] = []
        self.records_of_step: list[int] = []
        self._is_here = False

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Look whether this is the batch."""
        is_step = trainer.global_step >= self.step if self.batch is None else trainer.global_step == self.step
        self._is_here = is_step and batch_idx in (self.batch, self.batch or batch_idx) and trainer.global_rank == self.rank
        if is_step:
            texts = [pl_module.tokenizer.decode(row) for row in batch["input_ids"]]
            numbers = [int(text.split("question ")[1].split("<")[0]) for text in texts]
            self.records_of_step += numbers
            self.records += numbers if self._is_here else []

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: torch.Tensor) -> None:
        """Spoil the loss: what is back-propagated comes from it."""
        if self._is_here and self.what == "loss":
            loss.data.mul_(float(self.value))
            for parameter in pl_module.parameters():
                parameter.register_hook(lambda gradient: gradient * float(self.value) if self._is_here else gradient)

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Spoil one gradient."""
        if self._is_here and self.what == "gradient":
            parameter = list(pl_module.parameters())[3]
            parameter.grad.view(-1)[0] = float(self.value)


def write_project(folder: Path, *, n_chats: int = 24, **trainer: Any) -> Path:
    """A folder with chats and a config, ``run.yaml``."""
    chats = [chat(f"question {i}", f"answer {i} " * (1 + i % 5)) for i in range(n_chats)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(c.to_dict()) + "\n" for c in chats))
    (folder / "five.jsonl").write_text("".join(json.dumps(c.to_dict()) + "\n" for c in chats[:5]))
    config = {
        "seed_everything": 0,
        "trainer": {
            "default_root_dir": "runs/one",
            "max_epochs": 3,
            "accelerator": "cpu",
            "devices": 1,
            "log_every_n_steps": 1,
            "enable_model_summary": False,
            "enable_progress_bar": False,
            **trainer,
        },
        "model": {"architecture": ARCHITECTURE, "learning_rate": 1e-2},
        "data": {"train": "chats.jsonl", "validation": "five.jsonl", "predict": "chats.jsonl", "max_leak": None, "vocab_size": 300,
                 "batch_size": 2, "max_new_tokens": 4},
        "samples": {"prompts": ["question 1"], "max_new_tokens": 4},
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


def callback(cls: type, **settings: Any) -> list[str]:
    """The arguments that add a callback of this file."""
    given = [word for name, value in settings.items() for word in (f"--trainer.callbacks.init_args.{name}", str(value))]
    return ["--trainer.callbacks+", f"tests.faults.runs.{cls.__name__}", *given]


def command(*arguments: str) -> list[str]:
    """The command line."""
    return [sys.executable, "-m", "lightning_chatgpt", *map(str, arguments)]


def environment() -> dict[str, str]:
    """The environment of a run; this package of tests can be imported in it."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@contextmanager
def started(*arguments: str, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    """A run in a process group of its own, of which nothing is left afterwards."""
    for met in cwd.glob("met.*"):
        met.unlink()
    with (cwd / "output.txt").open("w") as output:
        process = subprocess.Popen(
            command(*arguments),
            cwd=cwd,
            env=environment(),
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            text=True,
        )
        try:
            yield process
        finally:
            if alive(process.pid):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(folder: Path, n_processes: int = 1, *, process: subprocess.Popen[str], seconds: float = 120) -> list[int]:
    """The ids of a run's processes, once all of them wait where they are to be met."""
    end = time.monotonic() + seconds
    while len(met := sorted(folder.glob("met.[0-9]"))) < n_processes:
        assert process.poll() is None and time.monotonic() < end, (folder / "output.txt").read_text()[-3000:]
        time.sleep(0.02)
    return [int(path.read_text()) for path in met]


def left(process: subprocess.Popen[str], *, within: float) -> int:
    """The exit code of a run all of whose processes leave in time."""
    end = time.monotonic() + within
    folder_output = f"after {within} s processes are left"
    code = process.wait(timeout=within)
    while alive(process.pid):
        assert time.monotonic() < end, folder_output
        time.sleep(0.05)
    return code


def alive(group: int) -> bool:
    """Whether any process of a group lives; those that only wait to be asked for their exit code do not."""
    listed = subprocess.run(["ps", "-e", "-o", "pgid=,stat="], capture_output=True, text=True, check=True).stdout
    return any(int(row.split()[0]) == group and not row.split()[1].startswith("Z") for row in listed.splitlines())


def run(*arguments: str, cwd: Path, code: int = 0) -> str:
    """A run from start to end; returns what it printed."""
    done = subprocess.run(
        command(*arguments), cwd=cwd, env=environment(), capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def state_of(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint's weights and of its optimizer."""
    checkpoint = torch.load(path, weights_only=True)
    found = dict(checkpoint["state_dict"])
    for i, state in checkpoint["optimizer_states"][0]["state"].items():
        found |= {f"{i}.{name}": value for name, value in state.items()}
    return found


def differences(one: Path, other: Path) -> list[str]:
    """The names of the tensors in which two checkpoints are not equal to the last bit."""
    a, b = state_of(one), state_of(other)
    assert a.keys() == b.keys() and len(a) > 10
    return [name for name in a if not torch.equal(a[name], b[name])]
