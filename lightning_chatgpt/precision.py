"""The number format to train in: what was asked for, held against what the hardware is good at."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_chatgpt.errors import ConfigError, nearest

SPEEDUP = 1.2  # what bfloat16 has to gain on a CPU to be taken: less is within the noise, and it rounds to three digits

_LONG_NAMES = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}
_NAMES = (
    "auto",
    "32-true",
    "bf16-mixed",
    "16-mixed",
    "bf16-true",
    "16-true",
    "64-true",
    "transformer-engine",
    "transformer-engine-float16",
)


class ChatTrainer(Trainer):
    """Lightning's Trainer, whose ``precision`` may be ``auto`` and is checked for what the hardware has.

    Args:
        precision: auto, 32-true, bf16-mixed, 16-mixed, bf16-true, or another that Lightning knows. auto takes bf16-mixed where it is
            fast, which a CPU is measured for, and else 32-true. None for 32-true.
        kwargs: Lightning's own settings.

    Raises:
        ConfigError: There is no such precision.
    """

    def __init__(self, *, precision: str | int | None = None, **kwargs: Any) -> None:
        if precision is not None:
            precision = _chosen(precision, kwargs)
        super().__init__(precision=precision, **kwargs)  # type: ignore[arg-type]  # one of Lightning's names by now


def choose_precision(asked: str | int, *, accelerator: Any = "auto", measure: bool = True) -> tuple[str, str]:
    """The precision for Lightning's Trainer, with a warning where the hardware lacks what was asked for.

    Args:
        asked: ``auto``, or what Lightning takes, short forms such as ``bf16`` and 32 included.
        accelerator: As the Trainer takes it.
        measure: Whether a CPU may be measured for ``auto``, which takes a third of a second; without, it trains in float32.

    Returns: Lightning's name of a precision, and a sentence that says why it was chosen; empty where it was asked for by name.

    Raises:
        ConfigError: There is no such precision.
    """
    precision = _LONG_NAMES.get(str(asked), str(asked))
    if precision not in _NAMES:
        raise ConfigError(f"trainer.precision {asked} is unknown; {nearest(precision, _NAMES)}")
    device = _device(accelerator)
    if precision == "auto":
        return _choose(device, measure=measure)
    if device == "cpu" and precision == "16-mixed":
        # Lightning would do the same; float16 on a CPU it does not know.
        rank_zero_warn("trainer.precision 16-mixed needs a GPU: bf16-mixed is taken in its place; set 32-true or auto for this CPU")
        return "bf16-mixed", ""
    if device in ("cpu", "cuda") and precision.startswith("bf16") and not _has_bf16(device):
        name = "this CPU" if device == "cpu" else torch.cuda.get_device_name()
        faster = "32-true" if device == "cpu" else "16-mixed"
        rank_zero_warn(f"trainer.precision {precision}: {name} has no bfloat16 arithmetic and imitates it slowly; {faster} is faster")
    return precision, ""


def bf16_speedup(*, seconds: float = 0.3) -> float:
    """Measure how many times as fast as float32 this CPU trains a GPT-2's matrices in bfloat16, the casts of autocast included.

    Instructions do not tell: of two CPUs with the same ``avx512_bf16``, one trained 1.5 times as fast as in float32 (EPYC, Zen 4), and
    the other multiplied 0.6 times as fast (Xeon without AMX).

    Args:
        seconds: How long to go on measuring; a machine too slow for it is measured once.

    Returns: the fastest run in float32 by the fastest in bfloat16, taken in turns; above 1 bfloat16 is faster.
    """
    # M rows of K wide states: the two matrices of a small GPT-2's MLP, one stored as Conv1D (K, N) and one as Linear (K, N).
    n_rows, width, inner = 1024, 256, 1024
    states = torch.ones(n_rows, width, requires_grad=True)
    conv1d = torch.ones(width, inner, requires_grad=True)
    linear = torch.ones(width, inner, requires_grad=True)
    bias = torch.zeros(inner)

    def run(*, in_bf16: bool) -> float:
        start = time.perf_counter()
        with torch.enable_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=in_bf16, cache_enabled=False):
            hidden = torch.addmm(bias, states, conv1d)  # (M, K) -> (M, N)
            total = F.linear(hidden, linear).sum()  # (M, N) -> (M, K) -> ()
        torch.autograd.grad(total, (states, conv1d, linear))
        return time.perf_counter() - start

    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    while not times[0] or time.perf_counter() < end:
        for in_bf16 in (False, True):
            times[in_bf16].append(run(in_bf16=in_bf16))
    # Whatever else a machine does only ever adds to a time.
    return min(times[0]) / min(times[1])


def _chosen(asked: str | int, settings: dict[str, Any]) -> str:
    """The precision for a Trainer of other settings. A function: jsonargparse would take ``kwargs.get`` for a setting without a type."""
    # Processes of one run that measured could come to different answers.
    is_alone = str(settings.get("devices", "auto")) in ("auto", "1") and settings.get("num_nodes", 1) == 1
    precision, reason = choose_precision(asked, accelerator=settings.get("accelerator", "auto"), measure=is_alone)
    if reason:
        rank_zero_info(reason)
    return precision


def _choose(device: str, *, measure: bool) -> tuple[str, str]:
    if device == "cuda":
        name = torch.cuda.get_device_name()
        if _has_bf16(device):
            return "bf16-mixed", f"precision auto: bf16-mixed, as {name} has bfloat16 arithmetic"
        return "32-true", f"precision auto: 32-true, as {name} has no bfloat16 arithmetic; 16-mixed may be faster"
    if device != "cpu":
        return "32-true", f"precision auto: 32-true, as it is not known how fast bfloat16 is on {device}; set bf16-mixed to try"
    if not _has_bf16(device):
        return "32-true", "precision auto: 32-true, as this CPU has no bfloat16 arithmetic"
    if not measure:
        return "32-true", "precision auto: 32-true, as a CPU is not measured for several processes; set bf16-mixed to try"
    speedup = bf16_speedup()
    chosen = "bf16-mixed" if speedup >= SPEEDUP else "32-true"
    return chosen, f"precision auto: {chosen}, as this CPU multiplies in bfloat16 {speedup:.2f} times as fast as in float32 (measured)"


def _device(accelerator: Any) -> str:
    """The kind of device that a Trainer's accelerator means here: cpu, cuda, mps, or the name of another."""
    name = accelerator if isinstance(accelerator, str) else type(accelerator).__name__.lower().removesuffix("accelerator")
    for device, kind in (("cuda", CUDAAccelerator), ("mps", MPSAccelerator)):
        if name in ("auto", "gpu", device) and kind.is_available():
            return device
    return "cpu" if name == "auto" else name


def _has_bf16(device: str) -> bool:
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # type: ignore[no-untyped-call]
