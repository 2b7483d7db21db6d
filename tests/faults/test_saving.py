"""Saving: a checkpoint is whole or as it was; one that is damaged is named and skipped; a save that failed is an error."""

from __future__ import annotations

import ctypes
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from lightning_chatgpt import CausalLMModule, ChatDataModule, DurableCheckpointIO, RunCheckpoint, SaveError
from lightning_chatgpt.checkpoints.file import check_checkpoint, read_plain, replace_file, write_checkpoint, written_at
from lightning_chatgpt.checkpoints.folder import best_checkpoint, newest_checkpoint
from lightning_chatgpt.checkpoints.plain import find_foreign
from lightning_chatgpt.checkpoints.weights import SUMS
from lightning_chatgpt.errors import ConfigError, ModelError
from lightning_chatgpt.models.build import load_model
from lightning_chatgpt.models.export import export_folder
from tests.conftest import ARCHITECTURE, chat, trainer
from tests.faults.runs import command, environment, run, write_project

LAST = "runs/one/checkpoints/last.ckpt"

KILLED = """
import sys, torch
from lightning_chatgpt.checkpoints.file import write_checkpoint
number = 0
while True:
    weights = {str(i): torch.full((1 << 18,), float(number)) for i in range(16)}
    write_checkpoint({"number": number, "state_dict": weights}, sys.argv[1])
    number += 1
    print(number, flush=True)
"""


def kill_while_saving(folder: Path, *, times: int, seed: int) -> list[int]:
    """Kill a process that saves 16 MiB over and over, at random moments; returns what the file held each time."""
    path = folder / "last.ckpt"
    found = []
    moments = random.Random(seed)
    for _ in range(times):
        env = {**environment(), "TMPDIR": "/dev/shm"}  # another file system, where there is one
        with subprocess.Popen([sys.executable, "-c", KILLED, str(path)], env=env, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(moments.uniform(0, 0.2))
            process.kill()
            n_saved = len(process.stdout.readlines()) + 1
        assert not Path("/dev/shm").is_dir() or os.stat("/dev/shm").st_dev != os.stat(folder).st_dev
        checkpoint = read_plain(path)
        assert all(torch.equal(w, torch.full_like(w, checkpoint["number"])) for w in checkpoint["state_dict"].values())
        assert checkpoint["number"] in (n_saved - 1, n_saved)  # the last that was said to be saved, or the next
        found.append(checkpoint["number"])
    return found


def test_a_kill_while_saving_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """Guards against a file that is opened for writing in its place: a kill left it empty, and the old one gone."""
    kill_while_saving(tmp_path, times=3, seed=0)


def test_what_is_renamed_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a rename that reaches the disk before what it names, which a loss of power would leave empty."""
    done: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (done.append(Path(f"/proc/self/fd/{number}").readlink().name), fsync(number)))
    monkeypatch.setattr(os, "replace", lambda one, other: (done.append("renamed"), replace(one, other)))
    write_checkpoint({"weight": torch.arange(5)}, tmp_path / "a.ckpt")
    replace_file(tmp_path / "a.txt", ["line\n"])
    assert done == [".a.ckpt.part", "renamed", tmp_path.name, ".a.txt.part", "renamed", tmp_path.name]


@pytest.mark.faults
@pytest.mark.slow
def test_fifty_kills(tmp_path: Path) -> None:
    assert len(kill_while_saving(tmp_path, times=50, seed=1)) == 50


def damage(path: Path, how: str, place: float) -> None:
    content = bytearray(path.read_bytes())
    at = int(place * len(content))
    if how == "cut":
        path.write_bytes(content[:at])
    else:
        content[at] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize("how", ["cut", "flipped"])
@pytest.mark.parametrize("place", [0.0, 0.3, 0.7, 0.95])
def test_a_damaged_checkpoint_is_named_and_skipped(how: str, place: float, tmp_path: Path) -> None:
    """Guards against torch, which takes a flipped bit for a weight."""
    for step in range(3):
        state = {"ModelCheckpoint": {"best_model_path": "elsewhere/step=1.ckpt"}}
        checkpoint = {"global_step": step, "callbacks": state, "state_dict": {"weight": torch.randn(5000)}}
        write_checkpoint(checkpoint, tmp_path / f"step={step}.ckpt")
    damage(tmp_path / "step=2.ckpt", how, place)
    with pytest.raises(ModelError, match=r"step=2\.ckpt: (is damaged|cannot be read|is no checkpoint)"):
        read_plain(tmp_path / "step=2.ckpt")
    with pytest.warns(UserWarning, match=r"step=2\.ckpt: .*; skipped"):
        assert newest_checkpoint(tmp_path) == tmp_path / "step=1.ckpt"
    with pytest.warns(UserWarning, match="skipped"):
        assert best_checkpoint(tmp_path) == tmp_path / "step=1.ckpt"


def test_checkpoints_are_what_everyone_reads_and_keep_their_time(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    before = time.time_ns()
    write_checkpoint({"weight": torch.arange(5)}, path)
    assert torch.load(path, weights_only=True)["weight"].tolist() == [0, 1, 2, 3, 4]
    assert torch.load(path, weights_only=True, mmap=True)["weight"].tolist() == [0, 1, 2, 3, 4]
    os.utime(path, (0, 0))
    assert before < written_at(path) < time.time_ns()
    torch.save({"weight": torch.arange(5)}, tmp_path / "others.ckpt")
    check_checkpoint(tmp_path / "others.ckpt")
    assert read_plain(tmp_path / "others.ckpt")["weight"].tolist() == [0, 1, 2, 3, 4]
    assert sorted(tmp_path.iterdir()) == [path, tmp_path / "others.ckpt"]


class Colour(Enum):
    """What somebody's settings may be made of."""

    RED = 1


@pytest.mark.parametrize(
    ("value", "place"),
    [
        (Path("chats"), "hyper_parameters.folder is a PosixPath"),
        ({"deep": [0, {"red": Colour.RED}]}, "hyper_parameters.folder.deep.1.red is a Colour"),
        (lambda: 0, "hyper_parameters.folder is a function"),
        ({Colour.RED: 1}, "hyper_parameters.folder.Colour.RED is a Colour"),
    ],
)
def test_what_could_not_be_read_again_is_not_written(value: Any, place: str, tmp_path: Path) -> None:
    """Guards against a run of a night that leaves a file which loading plain data refuses."""
    path = tmp_path / "a.ckpt"
    write_checkpoint({"weight": torch.arange(5)}, path)
    with pytest.raises(SaveError, match="a.ckpt: was not saved") as caught:
        write_checkpoint({"weight": torch.arange(6), "hyper_parameters": {"rate": 0.1, "folder": value}}, path)
    assert f"({place})" in str(caught.value)
    assert read_plain(path)["weight"].tolist() == [0, 1, 2, 3, 4] and list(tmp_path.iterdir()) == [path]
    # What torch itself takes for plain is.
    plain = {"type": torch.float32, "size": torch.Size([1, 2]), "set": {1, 2}, "bytes": b"x", "many": OrderedDict(a=(1, 2.0, None, True))}
    assert find_foreign(plain) is None
    write_checkpoint(plain, path)
    assert read_plain(path) == plain


def test_a_setting_no_checkpoint_can_hold_is_refused_before_training(tmp_path: Path, write_chats: Callable[..., Path]) -> None:
    class Module(CausalLMModule):
        def __init__(self, folder: Any, **settings: Any) -> None:
            super().__init__(**settings)
            self.save_hyperparameters()

    source = write_chats([chat(f"q{i}", "a") for i in range(8)])
    settings: dict[str, Any] = {"callbacks": [RunCheckpoint()], "enable_checkpointing": True, "max_steps": 1, "limit_val_batches": 0}
    durable = {**settings, "plugins": [DurableCheckpointIO()]}
    data = ChatDataModule(train=str(source), vocab_size=300)
    with pytest.raises(ConfigError, match="model.folder is a PosixPath, and checkpoints hold plain data; let it be text"):
        trainer(tmp_path, **durable).fit(Module(tmp_path, architecture=ARCHITECTURE), data)
    trainer(tmp_path, **settings).fit(Module(tmp_path, architecture=ARCHITECTURE), data)  # Lightning's own files may hold it


@pytest.mark.parametrize("how", ["cut", "flipped"])
def test_damaged_safetensors_are_named(how: str, plain_gpt2: Path, tmp_path: Path) -> None:
    export_folder(*load_model(plain_gpt2), tmp_path / "hf")
    load_model(tmp_path / "hf")
    assert subprocess.run(["sha256sum", "--check", "--quiet", SUMS], cwd=tmp_path / "hf", check=False).returncode == 0
    damage(tmp_path / "hf/model.safetensors", how, 0.8)
    with pytest.raises(ModelError, match=r"hf/model\.safetensors: is damaged"):
        load_model(tmp_path / "hf")
    (tmp_path / "hf" / SUMS).unlink()  # as a folder of others'
    if how == "cut":
        with pytest.raises(ModelError, match=r"hf: the weights cannot be loaded \("):
            load_model(tmp_path / "hf")


def test_an_export_that_fails_leaves_what_was_there(plain_gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(plain_gpt2)
    export_folder(*model, tmp_path / "hf")
    (tmp_path / "hf" / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}

    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(Exception, match=r"hf: could not be written \(No space left on device\)"):
        export_folder(*model, tmp_path / "hf")
    assert {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def limited(*arguments: str, cwd: Path, prepare: Callable[[], None]) -> tuple[int, str]:
    """A run in a process that ``prepare`` takes something from."""
    done = subprocess.run(command(*arguments), cwd=cwd, env=environment(), capture_output=True, text=True, check=False, preexec_fn=prepare)
    return done.returncode, done.stdout + done.stderr


def drop_override() -> None:
    """Root may write where nobody may; a process without this capability is a user like any other."""
    libc = ctypes.CDLL(None)
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_to_is_an_error_before_training(tmp_path: Path) -> None:
    folder = write_project(tmp_path, max_epochs=1)
    run("fit", "-c", "run.yaml", cwd=folder)
    before = (folder / LAST).read_bytes()
    (folder / "runs/one/checkpoints").chmod(0o555)
    arguments = ("fit", "-c", "run.yaml", "--ckpt_path", "last", "--trainer.max_epochs", "2")
    code, output = limited(*arguments, cwd=folder, prepare=drop_override)
    assert code == 1 and "runs/one/checkpoints: checkpoints cannot be written there (Permission denied); mend that" in output
    assert "Traceback" not in output and (folder / LAST).read_bytes() == before


@pytest.mark.slow
def test_a_full_disk_is_an_error_and_costs_nothing(tmp_path: Path) -> None:
    """Guards against Lightning, which says that all went well, and names a best checkpoint that is not there."""
    folder = write_project(tmp_path, max_epochs=1)
    run("fit", "-c", "run.yaml", cwd=folder)
    before = {path.name: path.read_bytes() for path in (folder / "runs/one/checkpoints").iterdir()}
    size = (folder / LAST).stat().st_size // 2
    arguments = ("fit", "-c", "run.yaml", "--ckpt_path", "last", "--trainer.max_epochs", "2", "--trainer.logger", "false")
    code, output = limited(*arguments, cwd=folder, prepare=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
    assert code == 1 and "could not be saved (File too large); what was saved before it is intact" in output, output[-3000:]
    assert "Traceback" not in output and "The model is in" not in output
    assert {path.name: path.read_bytes() for path in (folder / "runs/one/checkpoints").iterdir()} == before
    arguments = ("fit", "-c", "run.yaml", "--ckpt_path", "last", "--trainer.max_epochs", "2")  # now the smaller files, too
    code, output = limited(*arguments, cwd=folder, prepare=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)))
    assert code == 1 and output.count("error: ") == 1 and "could not be saved (File too large)" in output, output[-3000:]


def test_a_folder_that_vanishes_is_an_error(tmp_path: Path, write_chats: Callable[..., Path]) -> None:
    class Vanish(Callback):
        def on_train_epoch_start(self, trainer: Any, *arguments: Any) -> None:
            if trainer.current_epoch == 1:
                shutil.rmtree(tmp_path / "checkpoints")

    data = ChatDataModule(train=str(write_chats([chat(f"q{i}", "a") for i in range(8)])), vocab_size=300, validation=None)
    settings = {"callbacks": [RunCheckpoint(), Vanish()], "enable_checkpointing": True, "plugins": [DurableCheckpointIO()]}
    with pytest.raises(SaveError, match="checkpoints: was removed while the run went on"):
        trainer(tmp_path, max_epochs=2, log_every_n_steps=1, **settings).fit(CausalLMModule(architecture=ARCHITECTURE), data)


def test_the_best_is_a_file_after_a_save_that_failed(tmp_path: Path, write_chats: Callable[..., Path]) -> None:
    """Guards against Lightning, which names the best before it writes it."""
    source = str(write_chats([chat(f"q{i}", f"a{i}") for i in range(8)]))
    data = ChatDataModule(train=source, validation=source, max_leak=None, vocab_size=300, batch_size=2)
    checkpoint = RunCheckpoint()
    failing = DurableCheckpointIO()

    class Fill(Callback):
        def on_validation_start(self, trainer: Any, *arguments: Any) -> None:
            if trainer.current_epoch == 1:
                failing.save_checkpoint = full  # type: ignore[method-assign]

    def full(*arguments: Any, **settings: Any) -> None:
        raise SaveError("full")

    settings = {"callbacks": [checkpoint, Fill()], "enable_checkpointing": True, "plugins": [failing], "num_sanity_val_steps": 0}
    with pytest.raises(SaveError, match="full"):
        trainer(tmp_path, max_epochs=2, **settings).fit(CausalLMModule(architecture=ARCHITECTURE, learning_rate=1e-2), data)
    assert Path(checkpoint.best_model_path).is_file() and "epoch=0" in checkpoint.best_model_path
    assert list(checkpoint.best_k_models) == [checkpoint.best_model_path] == [checkpoint.kth_best_model_path]
