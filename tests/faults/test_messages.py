"""Bad input gets one line, and exit code 2. What it says stands in tests/golden/messages.txt, to be read as a user would.

Where messages were changed on purpose, `WRITE_GOLDEN=1 pytest tests/faults/test_messages.py` writes that file anew, to be read.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml

from lightning_chatgpt.__main__ import main
from lightning_chatgpt.checkpoints.file import write_checkpoint
from lightning_chatgpt.models.build import load_model
from lightning_chatgpt.models.export import export_folder
from tests.faults.runs import write_project

GOLDEN = Path(__file__).parent.parent / "golden" / "messages.txt"


def prepare(folder: Path, plain_gpt2: Path) -> None:
    """Everything that can be wrong, side by side."""
    write_project(folder, max_epochs=1)
    config = yaml.safe_load((folder / "run.yaml").read_text())

    def write_config(name: str, change: Callable[[dict], None]) -> None:
        changed = json.loads(json.dumps(config))
        change(changed)
        (folder / name).write_text(yaml.safe_dump(changed, sort_keys=False))

    write_config("key.yaml", lambda c: c["data"].update(batchsize=4))
    write_config("group.yaml", lambda c: c.update(modle=c.pop("model")))
    write_config("nested.yaml", lambda c: c["model"]["architecture"].update(n_layers=2))
    (folder / "tabs.yaml").write_text("trainer:\n\tmax_epochs: 1\n")
    (folder / "latin.yaml").write_bytes("data:\n  train: caf\xe9.jsonl\n".encode("latin-1"))
    # Models
    (folder / "empty").mkdir()
    shutil.copytree(plain_gpt2, folder / "whole")
    for name in ("other-tokenizer", "no-tokenizer", "no-weights", "cut-weights", "broken-config", "other-kind"):
        shutil.copytree(plain_gpt2, folder / name)
    tokenizer = json.loads((folder / "other-tokenizer/tokenizer.json").read_text())
    n = len(tokenizer["model"]["vocab"])
    tokenizer["model"]["vocab"] |= {f"other{i}": n + i for i in range(300)}
    (folder / "other-tokenizer/tokenizer.json").write_text(json.dumps(tokenizer))
    for path in (folder / "no-tokenizer").glob("tokenizer*"):
        path.unlink()
    (folder / "no-weights/model.safetensors").unlink()
    weights = folder / "cut-weights/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (folder / "broken-config/config.json").write_text("{")
    (folder / "other-kind/config.json").write_text(json.dumps({"model_type": "nonesuch"}))
    export_folder(*load_model(plain_gpt2), folder / "exported")
    weights = folder / "exported/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    # Checkpoints
    write_checkpoint({"state_dict": {"weight": torch.zeros(1000)}}, folder / "others.ckpt")
    (folder / "cut.ckpt").write_bytes((folder / "others.ckpt").read_bytes()[:2000])
    content = bytearray((folder / "others.ckpt").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "flipped.ckpt").write_bytes(content)
    (folder / "text.ckpt").write_text("this is no checkpoint")
    torch.save({"state_dict": {}, "more": Path("x")}, folder / "code.ckpt")
    write_checkpoint({"state_dict": {}, "lightning_chatgpt": {}}, folder / "weights-alone.ckpt")
    for checkpoints in (folder / "runs/unreadable/checkpoints", folder / "elsewhere"):
        checkpoints.mkdir(parents=True)
        (checkpoints / "last.ckpt").write_bytes((folder / "cut.ckpt").read_bytes())


FIT = "fit -c run.yaml"
START = f"{FIT} --model.architecture null --model.pretrained"
CASES = [
    "fit -c key.yaml",
    "fit -c group.yaml",
    "fit -c nested.yaml",
    "fit -c tabs.yaml",
    "fit -c latin.yaml",
    "fit -c rum.yaml",
    f"{FIT} --trainer.max_epoch 3",
    f"{FIT} --nonfinite.action jump",
    f"{FIT} --checkpoint.every_n_train_steps 0",
    f"{FIT} --checkpoint.train_time_interval 0:00:00",
    f"{FIT} --weights_only false",
    f"{FIT} --ckpt_path last",
    f"{FIT} --ckpt_path best",
    f"{FIT} --ckpt_path nowhere.ckpt",
    f"{FIT} --ckpt_path https://example.org/model.ckpt",
    f"{FIT} --ckpt_path cut.ckpt",
    f"{FIT} --ckpt_path flipped.ckpt",
    f"{FIT} --ckpt_path text.ckpt",
    f"{FIT} --ckpt_path code.ckpt",
    f"{FIT} --ckpt_path others.ckpt",
    f"{FIT} --ckpt_path whole",
    f"{FIT} --ckpt_path weights-alone.ckpt",
    f"{FIT} --ckpt_path auto --trainer.default_root_dir runs/unreadable",
    f"{FIT} --ckpt_path auto --checkpoint.dirpath elsewhere",
    f"{START} empty",
    f"{START} nowhere/model",
    f"{START} other-tokenizer",
    f"{START} no-tokenizer",
    f"{START} no-weights",
    f"{START} cut-weights",
    f"{START} broken-config",
    f"{START} other-kind",
    f"{START} whole --data.tokenizer other-tokenizer",
    "chat exported --prompt Hi",
    "chat empty --prompt Hi",
    "chat cut.ckpt --prompt Hi",
    "export flipped.ckpt out",
    "chat --prompt Hi",
    "validate -c run.yaml --ckpt_path last",
]


def message(arguments: str, folder: Path, *, expected: int = 2) -> str:
    """What a command line says, with this machine's paths left out."""
    errors = io.StringIO()
    code: object = 0
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            main(arguments.split())
        except SystemExit as left:
            code = left.code
    lines = [line for line in errors.getvalue().splitlines() if line.startswith("error: ")]
    assert code == expected and len(lines) == 1, (arguments, code, errors.getvalue())
    return lines[0].replace(str(folder), "").replace(os.path.expanduser("~"), "~")


def versions(arguments: str, name: str, version: str, folder: Path) -> str:
    """What it says where a version is another."""
    installed = importlib.metadata.version
    with mock.patch("lightning_chatgpt.versions.version", lambda package: version if package == name else installed(package)):
        return message(arguments, folder)


def all_messages(folder: Path) -> str:
    said = [f"$ {arguments}\n{message(arguments, folder)}\n" for arguments in CASES]
    for name, version in (("transformers", "4.57.1"), ("torch", "2.8.0"), ("lightning", "2.6.3")):
        said.append(f"$ {FIT}   # with {name} {version}\n{versions(FIT, name, version, folder)}\n")
    usage = shutil.disk_usage(folder)._replace(free=100_000)
    with mock.patch("lightning_chatgpt.callbacks.checkpoint.shutil.disk_usage", return_value=usage):
        said.append(f"$ {FIT}   # with 100 kB left on the disk\n{message(FIT, folder, expected=1)}\n")
    return "\n".join(said)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*; skipped")
def test_every_message_is_the_one_that_was_read(plain_gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path, plain_gpt2)
    if os.environ.get("WRITE_GOLDEN"):
        GOLDEN.write_text(all_messages(tmp_path), encoding="utf-8")
    assert all_messages(tmp_path) == GOLDEN.read_text(encoding="utf-8")
    assert not list(tmp_path.rglob("samples.jsonl"))  # nor was anything begun
