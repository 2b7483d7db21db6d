"""Which number format is trained in, for hardware that has it and hardware that has not."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jsonargparse
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CUDAAccelerator

from lightning_chatgpt import precision
from lightning_chatgpt.errors import ConfigError
from lightning_chatgpt.precision import ChatTrainer, bf16_speedup, choose_precision

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


def unexpected(**_: object) -> float:
    raise AssertionError("nothing should be measured")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Pretends that there is a GPU, with bfloat16 arithmetic or without."""

    def pretend(has_bf16: bool) -> None:
        monkeypatch.setattr(CUDAAccelerator, "is_available", staticmethod(lambda: True))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
        # Without `including_emulation=False` torch says yes for every GPU.
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16 or including_emulation)

    return pretend


@pytest.mark.parametrize(("speedup", "expected"), [(1.7, "bf16-mixed"), (1.2, "bf16-mixed"), (1.1, "32-true"), (0.6, "32-true")])
def test_auto_measures_a_cpu_and_says_what_it_found(speedup: float, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "bf16_speedup", lambda: speedup)
    monkeypatch.setattr(precision, "_has_bf16", lambda device: True)
    chosen, reason = choose_precision("auto", accelerator="cpu")
    assert chosen == expected
    assert expected in reason and f"{speedup:.2f} times" in reason


def test_auto_measures_nothing_where_it_could_not_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "bf16_speedup", unexpected)
    monkeypatch.setattr(precision, "_has_bf16", lambda device: False)
    chosen, reason = choose_precision("auto", accelerator="cpu")
    assert chosen == "32-true" and "no bfloat16" in reason
    monkeypatch.setattr(precision, "_has_bf16", lambda device: True)
    chosen, reason = choose_precision("auto", accelerator="cpu", measure=False)
    assert chosen == "32-true" and "several processes" in reason
    assert ChatTrainer(accelerator="cpu", devices=2, precision="auto", **QUIET).precision == "32-true"
    assert choose_precision("auto", accelerator="tpu")[0] == "32-true"


def test_auto_takes_bfloat16_of_a_gpu_that_has_it(gpu: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "bf16_speedup", unexpected)
    gpu(True)
    for accelerator in ("auto", "gpu", "cuda", CUDAAccelerator()):
        chosen, reason = choose_precision("auto", accelerator=accelerator)
        assert chosen == "bf16-mixed" and "Tesla T4" in reason
    gpu(False)
    chosen, reason = choose_precision("auto", accelerator="auto")
    assert chosen == "32-true" and "Tesla T4" in reason and "16-mixed" in reason


@pytest.mark.parametrize("asked", ["bf16-mixed", "bf16-true", "bf16"])
def test_bfloat16_that_is_imitated_is_warned_of(asked: str, gpu: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(False)
    with pytest.warns(UserWarning, match=f"{asked.removesuffix('-mixed')}.*Tesla T4 has no bfloat16"):
        chosen, reason = choose_precision(asked, accelerator="gpu")
    assert chosen == {"bf16": "bf16-mixed"}.get(asked, asked) and reason == ""
    monkeypatch.setattr(precision, "_has_bf16", lambda device: False)
    with pytest.warns(UserWarning, match="this CPU has no bfloat16"):
        choose_precision(asked, accelerator="cpu")
    gpu(True)
    monkeypatch.setattr(precision, "_has_bf16", lambda device: True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choose_precision(asked, accelerator="gpu")


def test_float16_on_a_cpu_becomes_what_lightning_makes_of_it() -> None:
    with pytest.warns(UserWarning, match="16-mixed needs a GPU"):
        ours = ChatTrainer(accelerator="cpu", precision="16-mixed", **QUIET).precision
    with pytest.warns(UserWarning, match="fp16 is not supported"):
        theirs = Trainer(accelerator="cpu", precision="16-mixed", **QUIET).precision
    assert ours == theirs == "bf16-mixed"


@pytest.mark.parametrize("asked", ["32-true", "32", 32, "64-true", 64, "16-true", "bf16-mixed", "bf16-true"])
def test_other_names_mean_what_they_mean_to_lightning(asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_has_bf16", lambda device: True)
    theirs = Trainer(accelerator="cpu", precision=asked, **QUIET).precision
    assert choose_precision(asked, accelerator="cpu") == (theirs, "")
    assert ChatTrainer(accelerator="cpu", precision=asked, **QUIET).precision == theirs
    assert ChatTrainer(accelerator="cpu", **QUIET).precision == "32-true"


def test_an_unknown_precision_is_told_the_nearest() -> None:
    with pytest.raises(ConfigError, match="trainer.precision bf16-mixde is unknown; did you mean bf16-mixed?"):
        choose_precision("bf16-mixde")


def test_the_ratio_is_of_float32_to_bfloat16_with_its_casts(monkeypatch: pytest.MonkeyPatch) -> None:
    # A clock that only multiplications move: by 3 s in float32, by 1 s in bfloat16; and by 50 s where it is first asked to.
    clock = [0.0]
    steps: list[tuple[bool, torch.dtype]] = []

    def linear(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        in_bf16 = torch.is_autocast_enabled("cpu")
        out = torch.matmul(states, weight.t())
        clock[0] += (1.0 if in_bf16 else 3.0) + (50.0 if len(steps) < 2 else 0.0)
        steps.append((in_bf16, out.dtype))
        assert states.requires_grad and weight.dtype == torch.float32  # autocast casts, and gradients are wanted
        return out

    monkeypatch.setattr(F, "linear", linear)
    monkeypatch.setattr(precision.time, "perf_counter", lambda: clock[0])
    state = torch.get_rng_state()
    with torch.no_grad():
        assert bf16_speedup(seconds=120) == 3.0
    assert set(steps) == {(False, torch.float32), (True, torch.bfloat16)}
    assert torch.equal(torch.get_rng_state(), state)  # measuring must not change what is trained


def test_the_measurement_ends_on_this_machine() -> None:
    assert 0.001 < bf16_speedup(seconds=0.0) < 1000


def test_a_config_may_say_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    def parser_of(cls: type) -> jsonargparse.ArgumentParser:
        parser = jsonargparse.ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(cls, "trainer")
        return parser

    # Every setting of Lightning's is still there, with its type.
    ours, theirs = ({a.dest: str(getattr(a, "_typehint", None)) for a in parser_of(cls)._actions} for cls in (ChatTrainer, Trainer))
    assert ours == {**theirs, "trainer.precision": ours["trainer.precision"]}
    monkeypatch.setattr(precision, "bf16_speedup", lambda: 2.0)
    monkeypatch.setattr(precision, "_has_bf16", lambda device: True)
    parser = parser_of(ChatTrainer)
    for text, expected in (("auto", "bf16-mixed"), ("32", "32-true"), ("64-true", "64-true"), ("null", "32-true")):
        config = parser.parse_args(["--trainer.accelerator", "cpu", "--trainer.logger", "false", "--trainer.precision", text])
        assert parser.instantiate_classes(config).trainer.precision == expected
