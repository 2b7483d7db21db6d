"""Loading never runs code, whatever is loaded, and however."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_chatgpt import CausalLMModule, ChatDataModule, DurableCheckpointIO, load_model
from lightning_chatgpt.chat.tokenizer import load_tokenizer
from lightning_chatgpt.errors import ModelError, UserError
from tests.conftest import ARCHITECTURE, chat, trainer
from tests.faults.runs import command, environment, write_project


class Canary:
    """Leaves a file where it is unpickled by a loader that runs code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat(f"q{i}", "a").to_dict()) + "\n" for i in range(8)))
    run = trainer(folder, max_steps=1, log_every_n_steps=1, plugins=[DurableCheckpointIO()])
    run.fit(CausalLMModule(architecture=ARCHITECTURE), ChatDataModule(train=str(folder / "chats.jsonl"), validation=None, vocab_size=300))
    run.save_checkpoint(folder / "good.ckpt")
    return folder / "good.ckpt"


@pytest.fixture
def canary(checkpoint: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint that would leave a folder behind, and that folder; a loader that runs code does."""
    hit = tmp_path / "hit"
    content = torch.load(checkpoint, weights_only=True)
    torch.save({**content, "callbacks": {"a": Canary(hit)}}, tmp_path / "bad.ckpt")
    torch.load(tmp_path / "bad.ckpt", weights_only=False)
    hit.rmdir()
    return tmp_path / "bad.ckpt", hit


def fit_on(path: Path) -> None:
    run = trainer(path.parent, max_steps=2, log_every_n_steps=1, plugins=[DurableCheckpointIO()])
    (path.parent / "chats.jsonl").write_text("".join(json.dumps(chat(f"q{i}", "a").to_dict()) + "\n" for i in range(8)))
    data = ChatDataModule(train=str(path.parent / "chats.jsonl"), validation=None, vocab_size=300)
    run.fit(CausalLMModule(architecture=ARCHITECTURE), data, ckpt_path=path, weights_only=False)


WAYS: dict[str, Callable[[Path], Any]] = {
    "load_model": load_model,
    "load_from_checkpoint": CausalLMModule.load_from_checkpoint,
    "load_from_checkpoint, asked to": lambda path: CausalLMModule.load_from_checkpoint(path, weights_only=False),
    "fit, asked to": fit_on,
    "plugin, asked to": lambda path: DurableCheckpointIO().load_checkpoint(path, weights_only=False),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("override", [None, "1"])
def test_no_way_of_loading_a_checkpoint_runs_code(
    way: str, override: str | None, canary: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, hit = canary
    if override:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", override)
    says = "unset it" if override else "more than plain data"
    with pytest.raises(ModelError, match=says):
        WAYS[way](path)
    assert not hit.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "verb", ["fit", "predict", "chat", *(pytest.param(verb, marks=pytest.mark.faults) for verb in ("validate", "test", "export"))]
)
def test_no_verb_runs_code(verb: str, canary: tuple[Path, Path], tmp_path: Path) -> None:
    path, hit = canary
    write_project(tmp_path)
    arguments = {"chat": ["chat", path, "--prompt", "Hi"], "export": ["export", path, "out"]}.get(
        verb, [verb, "-c", "run.yaml", "--ckpt_path", path]
    )
    done = subprocess.run(command(*arguments), cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "bad.ckpt: holds more than plain data, which could run code" in done.stderr, done.stderr[-2000:]
    assert not hit.exists() and "Traceback" not in done.stderr


@pytest.mark.parametrize("way", [name for name in WAYS if name != "load_model"])
def test_a_url_is_refused(way: str) -> None:
    with pytest.raises(UserError, match="http://localhost:1/x.ckpt: checkpoints are read from files only"):
        if way == "fit, asked to":
            trainer(Path(), plugins=[DurableCheckpointIO()]).strategy.checkpoint_io.load_checkpoint("http://localhost:1/x.ckpt")
        else:
            WAYS[way]("http://localhost:1/x.ckpt")  # type: ignore[arg-type]


def test_a_class_that_a_checkpoint_names_is_not_imported(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a checkpoint beside a Python file: its settings are plain data, and a class in them is imported."""
    (tmp_path / "intruder.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'hit')!r})\n")
    monkeypatch.syspath_prepend(tmp_path)
    content = torch.load(checkpoint, weights_only=True)
    content["hyper_parameters"]["optimizer"] = {"class_path": "intruder.Optimizer"}
    torch.save(content, tmp_path / "bad.ckpt")
    for way in ("load_from_checkpoint", "fit, asked to"):
        with pytest.raises(ModelError, match="intruder.Optimizer, of a module that is not imported"):
            WAYS[way](tmp_path / "bad.ckpt")
    load_model(tmp_path / "bad.ckpt")  # which builds no optimizer
    assert not (tmp_path / "hit").exists() and "intruder" not in sys.modules


def test_weights_that_are_pickled_code_are_refused(plain_gpt2: Path, tmp_path: Path) -> None:
    folder, hit = tmp_path / "folder", tmp_path / "hit"
    shutil.copytree(plain_gpt2, folder)
    weights = load_model(plain_gpt2).network.state_dict()
    (folder / "model.safetensors").unlink()
    torch.save({**weights, "more": Canary(hit)}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="its weights hold more than plain data, which could run code; take safetensors"):
        load_model(folder)
    assert not hit.exists()


def test_safetensors_come_first(plain_gpt2: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(plain_gpt2, folder)
    with (folder / "pytorch_model.bin").open("wb") as file:
        pickle.dump(Canary(tmp_path / "hit"), file)
    load_model(folder)
    assert not (tmp_path / "hit").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_no_code_of_a_folder_is_run(name: str, plain_gpt2: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(plain_gpt2, folder)
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'hit')!r})\n")
    kind = {
        "config.json": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
        "tokenizer_config.json": {"AutoTokenizer": ["own.T", None]},
    }
    content = json.loads((folder / name).read_text())
    content |= {"auto_map": kind[name], "model_type": "own"} if name == "config.json" else {"auto_map": kind[name], "tokenizer_class": "T"}
    (folder / name).write_text(json.dumps(content))
    start = time.monotonic()
    try:
        load_model(folder)
    except ModelError as error:
        assert "\n" not in str(error)
    assert time.monotonic() - start < 10  # nobody is asked whether to run it
    assert not (tmp_path / "hit").exists()


@pytest.mark.parametrize(
    "loops",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    ],
)
def test_a_template_cannot_take_for_ever(loops: str, plain_gpt2: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(plain_gpt2, folder)
    (folder / "chat_template.jinja").write_text(loops + "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}")
    start = time.monotonic()
    with pytest.raises(UserError, match="the template takes more than 2 s to write a conversation of . messages"):
        load_tokenizer(folder)
    assert time.monotonic() - start < 10
