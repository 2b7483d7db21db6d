"""What only GPUs show. Each test says how many it wants, and is skipped with that reason where there are fewer.

Strategies take up to two GPUs: one is enough to run their code, two to cut something.
"""

from __future__ import annotations

import csv
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_chatgpt.data.collate import collate
from lightning_chatgpt.models.attention import set_attention
from lightning_chatgpt.models.build import load_model
from lightning_chatgpt.models.loss import token_losses
from tests.conftest import ARCHITECTURE, chat
from tests.test_cli import run

DEVICE = "cuda"
ACCELERATOR = ["--trainer.accelerator", "gpu", "--trainer.devices"]
N_GPUS = torch.cuda.device_count()
N_STEPS = 8

pytestmark = [pytest.mark.slow, pytest.mark.skipif(N_GPUS < 1, reason="needs a GPU, and this machine has none")]
two_gpus = pytest.mark.skipif(N_GPUS < 2, reason=f"needs two GPUs, and this machine has {N_GPUS}")
deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed: pip install deepspeed")
flash_attention = pytest.mark.skipif(find_spec("flash_attn") is None, reason="needs flash-attn: pip install flash-attn")

STAGE = "--trainer.strategy.init_args.stage"
STRATEGIES = {
    "ddp": ["ddp"],
    "fsdp2": ["fsdp2"],
    "fsdp2-tensor": ["fsdp2", "--trainer.strategy.init_args.tensor_parallel_size", "2"],
    "fsdp": ["fsdp"],
    "deepspeed-2": ["deepspeed", STAGE, "2"],
    "deepspeed-3": ["deepspeed", STAGE, "3"],
}
MARKS = {"fsdp2-tensor": [two_gpus], "deepspeed-2": [deepspeed], "deepspeed-3": [deepspeed]}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chats, and a config of eight optimizer steps that read four chats each, in two micro-batches."""
    folder = tmp_path_factory.mktemp("gpu")
    for name, n in (("train.jsonl", 16), ("five.jsonl", 5)):
        chats = [chat(f"question {i}", f"answer {i} " * (i + 1)) for i in range(n)]
        (folder / name).write_text("".join(json.dumps(c.to_dict()) + "\n" for c in chats))
    config = {
        "trainer": {
            "max_epochs": 2, "gradient_clip_val": 0.5, "accumulate_grad_batches": 2, "log_every_n_steps": 1, "enable_progress_bar": False,
            "precision": "32-true",
        },
        "model": {
            "architecture": {**ARCHITECTURE, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
            "learning_rate": 1e-2, "schedule": "constant",
        },
        "data": {"train": "train.jsonl", "validation": "five.jsonl", "predict": "five.jsonl", "max_leak": None, "vocab_size": 300,
                 "max_new_tokens": 8},
        "samples": {"prompts": ["question 1"], "max_new_tokens": 4},
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


def fit(project: Path, name: str, *arguments: str, rows: int, n_devices: int = 1) -> list[float]:
    """Train; returns train_loss of each optimizer step."""
    where = [*ACCELERATOR, str(n_devices), "--data.batch_size", str(rows), "--trainer.default_root_dir", f"runs/{name}"]
    run("fit", "-c", "run.yaml", *arguments, *where, cwd=project)
    with (project / f"runs/{name}/metrics.csv").open() as lines:
        return [float(row["train_loss"]) for row in csv.DictReader(lines) if row["train_loss"]]


@pytest.fixture(scope="module")
def lone(project: Path) -> list[float]:
    """The losses of one GPU."""
    found = fit(project, "lone", rows=2)
    assert len(found) == N_STEPS and found[-1] < found[0] - 1
    return found


@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, [])) for name in STRATEGIES])
def test_a_strategy_learns_what_one_gpu_does(name: str, project: Path, lone: list[float]) -> None:
    """Clipping and accumulation included; validation and samples take other numbers of batches in each process."""
    overlay, *settings = STRATEGIES[name]
    n_devices = min(2, N_GPUS)
    rows = 2 if n_devices == 1 or "tensor" in name else 1
    found = fit(project, name, "-c", f"lightning_chatgpt:strategy/{overlay}", *settings, rows=rows, n_devices=n_devices)
    assert found == pytest.approx(lone, rel=1e-3)
    samples = [json.loads(line) for line in (project / f"runs/{name}/samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [0, 4, 8]
    exported = load_model(project / f"runs/{name}").network.state_dict()
    whole = load_model(project / "runs/lone").network.state_dict()
    assert exported.keys() == whole.keys()
    assert all((exported[key] - value).abs().max() < 1e-2 for key, value in whole.items())  # after eight steps of 1e-2
    if overlay != "deepspeed":
        load_model(project / f"runs/{name}/checkpoints/last.ckpt")


@two_gpus
@pytest.mark.parametrize("name", ["ddp", "fsdp2", "fsdp"])
def test_predictions_are_those_of_one_gpu(name: str, project: Path, lone: list[float]) -> None:
    overlay = ["-c", f"lightning_chatgpt:strategy/{name}"]
    said = []
    for arguments, n_devices in (([], 1), (overlay, 2)):
        where = [*ACCELERATOR, str(n_devices), "--trainer.default_root_dir", "runs/lone", "--data.batch_size", "2", "--ckpt_path", "last"]
        run("predict", "-c", "run.yaml", *arguments, *where, cwd=project)
        said.append((project / "runs/lone/predictions.jsonl").read_text())
    assert len(said[0].splitlines()) == 5 and said[0] == said[1]


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_half_precision_learns_the_same(precision: str, project: Path, lone: list[float]) -> None:
    found = fit(project, precision, "--trainer.precision", precision, rows=2)
    assert found == pytest.approx(lone, rel=3e-2)
    assert found != lone


@pytest.mark.parametrize(
    "attention", ["auto", "sdpa", "eager", "stretches", pytest.param("flash_attention_2", marks=flash_attention)]
)  # fmt: skip
def test_packed_chats_do_not_see_each_other(attention: Any) -> None:
    """Guards against attention across packed chats, which moves losses by 5e-2 and more."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=64, n_positions=128, vocab_size=97, bos_token_id=0, eos_token_id=0, initializer_range=0.3
    )
    network = GPT2LMHeadModel(config).to(DEVICE).eval()
    set_attention(network, attention)
    generator = torch.Generator().manual_seed(0)
    chats = [(torch.randint(97, (n,), generator=generator).int().numpy(), torch.ones(n).numpy()) for n in (31, 17, 9)]
    packed, alone = [chats], [[one] for one in chats]

    def nll(rows: Any) -> torch.Tensor:
        batch = collate(rows, pad_token_id=0)
        on_device = {name: _to_device(value) for name, value in batch.items()}
        with torch.no_grad(), torch.autocast(DEVICE, dtype=torch.bfloat16):
            return token_losses(network, on_device).nll  # type: ignore[arg-type]

    together, apart = nll(packed), nll(alone)
    shuffled = nll([[chats[1], chats[0], chats[2]]])
    assert (together - apart).abs().max() < 0.1 * together.std()
    assert (together[:30] - shuffled[16:46]).abs().max() < 0.1 * together.std()  # the first chat, after another one


def _to_device(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(DEVICE)
    return type(value)(*map(_to_device, value)) if hasattr(value, "_fields") else value


def test_compiled_blocks_learn_the_same(project: Path, lone: list[float]) -> None:
    found = fit(project, "compiled", "--model.compile", "true", "--data.packing", "true", "--trainer.max_steps", "3", rows=2)
    plain = fit(project, "packed", "--data.packing", "true", "--trainer.max_steps", "3", rows=2)
    assert found == pytest.approx(plain, rel=1e-3)
