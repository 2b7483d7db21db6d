"""Lightning's finders before a run: what they find, that nothing of them is left, what is refused."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from lightning_chatgpt.__main__ import main
from lightning_chatgpt.errors import ConfigError
from lightning_chatgpt.finders import suggest
from tests.conftest import ARCHITECTURE, chat
from tests.test_cli import refused

PAIRS = [("Hello", "Hi there!"), ("What is your name?", "I am GPT."), ("Bye", "See you, and have a nice day."), ("Really?", "Yes.")]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with 24 chats and the config of a run of four steps, with dropout."""
    monkeypatch.chdir(tmp_path)
    Path("chats.jsonl").write_text("".join(json.dumps(chat(*pair).to_dict()) + "\n" for pair in PAIRS * 6))
    config = {
        "trainer": {"default_root_dir": "runs/hand", "max_steps": 4, "accelerator": "cpu", "devices": 1, "log_every_n_steps": 1},
        "model": {"architecture": {**ARCHITECTURE, "n_positions": 64}, "warmup_steps": 2},
        "data": {"train": "chats.jsonl", "validation": "chats.jsonl", "max_leak": None, "vocab_size": 300, "batch_size": 4},
        "samples": {"prompts": []},
    }
    Path("mine.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def fit(*arguments: str, folder: str = "runs/hand") -> dict[str, Any]:
    """Train; returns the checkpoint."""
    import torch

    main(["fit", "-c", "mine.yaml", "--trainer.default_root_dir", folder, *arguments])
    return torch.load(f"{folder}/checkpoints/last.ckpt", weights_only=True)


def check_same(one: Any, other: Any) -> None:
    """Two states are equal to the last bit."""
    import torch

    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            check_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            check_same(*pair)
    else:
        assert one == other


def rows(folder: str) -> list[str]:
    """What was logged, its speed aside."""
    lines = [line.split(",") for line in Path(folder, "metrics.csv").read_text().splitlines()]
    place = lines[0].index("tokens_per_second") if "tokens_per_second" in lines[0] else len(lines[0])
    return [",".join(line[:place] + line[place + 1 :]) for line in lines]


@pytest.mark.parametrize(
    ("flag", "setting", "extra"),
    [
        pytest.param("lr_find", "model.learning_rate", [], marks=pytest.mark.slow),
        ("lr_find", "model.learning_rate", ["--data.packing=true", "--trainer.accumulate_grad_batches=2", "--data.batch_size=2"]),
        ("batch_size_find", "data.batch_size", ["--data.packing=true", "--data.max_length=40"]),
    ],
    ids=["padded", "packed and accumulated", "batch size"],
)
def test_a_run_after_a_search_is_the_run_with_what_was_found(
    flag: str, setting: str, extra: list[str], project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.warns(UserWarning, match="an epoch is 2 optimizer step") if flag == "batch_size_find" else nullcontext():
        found = fit(f"--{flag}=true", *extra, folder="runs/found")
    said, log = capsys.readouterr()
    saved = yaml.safe_load(Path("runs/found/config.yaml").read_text())
    group, name = setting.split(".")
    value = saved[group]["init_args"][name]
    assert f"{flag}: {setting} {value:g}," in said
    if flag == "batch_size_find":
        assert value == 16 and "trying batch size 64" not in log  # there are fewer packed rows than 32
    assert flag not in saved
    by_hand = fit(f"--{setting}={value}", *extra)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "hyper_parameters", "datamodule_hyper_parameters"):
        check_same(found[part], by_hand[part])
    assert rows("runs/found") == rows("runs/hand")
    extras = {"plots"} if flag == "lr_find" else set()
    assert {p.name for p in Path("runs/found").iterdir()} == {p.name for p in Path("runs/hand").iterdir()} | extras
    if flag == "lr_find":
        assert Path("runs/found/plots/lr_find.png").read_bytes().startswith(b"\x89PNG") and "runs/found/plots/lr_find.png shows it" in said
        assert 1e-4 < value < 0.1
    if not extra:
        main(["fit", "-c", "runs/found/config.yaml", "--trainer.default_root_dir", "runs/again"])
        assert rows("runs/again") == rows("runs/hand")


def test_the_batch_size_is_what_memory_has_room_for(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A batch is too large if its longest rows are; the rows that come first by chance may be short."""
    from lightning_chatgpt import CausalLMModule

    seen = []

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        seen.append(tuple(batch["input_ids"].shape))
        if batch["input_ids"].numel() > 8 * longest:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory: you tried to")
        return step(self, batch, batch_idx)

    step, longest = CausalLMModule.training_step, 10**9
    monkeypatch.setattr(CausalLMModule, "training_step", training_step)
    fit("--trainer.max_steps=12", folder="runs/epochs")
    longest = max(width for _, width in seen)
    seen.clear()
    with pytest.warns(UserWarning, match="with data.batch_size 8 an epoch is 3 optimizer step"):
        fit("--batch_size_find=true", folder="runs/found")
    assert "data.batch_size 8, the largest power of two that fits" in capsys.readouterr().out
    assert (16, longest) in seen and (8, longest) in seen
    longest = 0
    assert "no memory for a batch of one row" in refused("fit", "-c", "mine.yaml", "--batch_size_find=true", capsys=capsys)
    assert not Path("runs/hand").exists()


def test_a_cpu_that_runs_out_of_memory_says_so() -> None:
    """Without a limit the system ends the process."""
    import torch
    from lightning.pytorch.utilities.memory import is_oom_error

    from lightning_chatgpt.memory import available_memory, limited_memory

    size = available_memory()
    assert 0 < size < 2**50
    with limited_memory(0.1):
        torch.empty(size // 100, dtype=torch.uint8)
        with pytest.raises(RuntimeError) as error:
            torch.empty(size // 5, dtype=torch.uint8)
    assert is_oom_error(error.value)
    torch.empty(size // 5, dtype=torch.uint8)


def test_the_suggestion_is_a_tenth_of_the_lowest() -> None:
    """A curve that is known: it falls by half up to 1e-2 and then diverges, with noise of a tenth, and one step that is NaN."""
    rates = np.geomspace(1e-6, 1, 100)
    distance = np.log10(rates) + 2
    curve = 3 + 1.5 * np.tanh(-distance - 1) + np.exp(3 * np.maximum(distance, 0)) - 1
    noisy = curve * (1 + 0.1 * np.random.default_rng(0).standard_normal(100))
    noisy[40] = np.nan
    suggestion = suggest(rates, noisy)
    assert 3e-4 < suggestion.rate < 3e-3
    assert suggestion.rate == pytest.approx(rates[suggestion.lowest] / 10, rel=0.05)
    assert np.isnan(suggestion.smoothed[40])
    # By the definition, in plain sums.
    weights = [0.0 if i == 40 else 0.8 ** abs(i - 20) for i in range(100)]
    mean = sum(w * np.log(x) for w, x in zip(weights, noisy, strict=True) if w) / sum(weights)
    assert suggestion.smoothed[20] == pytest.approx(np.exp(mean))


@pytest.mark.parametrize("slope", [0.0, 1.0], ids=["flat", "rising"])
def test_noise_is_no_suggestion(slope: float) -> None:
    rates = np.geomspace(1e-6, 1, 100)
    for seed in range(50):
        losses = 4 + slope * np.linspace(0, 4, 100) ** 2 + 0.5 * np.random.default_rng(seed).standard_normal(100)
        with pytest.raises(ConfigError, match="no more than its noise"):
            suggest(rates, losses)
    with pytest.raises(ConfigError, match="2 of 100 losses are finite"):
        suggest(rates, np.where(np.arange(100) < 2, losses, np.nan))


def test_no_suggestion_is_an_error(project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_chatgpt import CausalLMModule

    monkeypatch.setattr(
        CausalLMModule, "training_step", lambda self, batch, batch_idx: self.step_loss.add(self.score(batch)) * float("nan")
    )
    message = refused("fit", "-c", "mine.yaml", "--lr_find=true", "--model.weight_decay=0", capsys=capsys)
    assert "of 100 losses are finite" in message and "runs/hand/plots/lr_find.png shows it" in message
    assert [p.name for p in Path("runs/hand").rglob("*")] == ["plots", "lr_find.png"]
    monkeypatch.undo()
    monkeypatch.chdir(project)
    fit()  # what is left of a search that found nothing is no earlier run
    assert not Path("runs/hand/plots/lr_find.png").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--ckpt_path=auto"], "lr_find is for a new run, and ckpt_path auto goes on with one; leave one out"),
        (["--trainer.fast_dev_run=true"], "lr_find takes more steps than trainer.fast_dev_run lets it"),
        (["--trainer.devices=2"], "lr_find searches on one device, and trainer.strategy DDPStrategy has 2 process(es)"),
        (["--batch_size_find=true", "--trainer.strategy=ddp"], "batch_size_find searches on one device, and trainer.strategy DDP"),
        (["--model.class_path=tests.test_finders.Bare", "--model.init_args.n=2"], "tests.test_finders.Bare has no setting learning_rate"),
    ],
)  # fmt: skip
def test_what_cannot_be_searched_is_refused(arguments: list[str], says: str, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = yaml.safe_load(Path("mine.yaml").read_text())
    if "--model.init_args.n=2" in arguments:
        del config["model"]
        Path("mine.yaml").write_text(yaml.safe_dump(config))
    assert says in refused("fit", "-c", "mine.yaml", "--lr_find=true", *arguments, capsys=capsys)
    assert not Path("runs/hand").exists()


def test_a_plot_that_cannot_be_drawn_is_refused_at_once(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    said = refused("fit", "-c", "mine.yaml", "--lr_find=true", capsys=capsys)
    assert "lr_find needs matplotlib for its plot" in said and "pip install 'lightning-chatgpt[report]'" in said


def __getattr__(name: str) -> type:
    """A module without a learning rate, made when the command line asks for it: Lightning is slow to import."""
    if name != "Bare":
        raise AttributeError(name)
    from lightning.pytorch import LightningModule

    class Bare(LightningModule):
        def __init__(self, n: int = 1) -> None:
            super().__init__()

    return Bare
