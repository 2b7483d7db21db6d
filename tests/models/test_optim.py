"""Decay groups and schedules, against transformers' own."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)
from transformers.trainer_pt_utils import get_parameter_names

from lightning_chatgpt.errors import ConfigError
from lightning_chatgpt.models.optim import build_schedule, decay_groups
from tests.conftest import ARCHITECTURE


def test_matrices_decay_and_vectors_do_not() -> None:
    network = GPT2LMHeadModel(GPT2Config(**ARCHITECTURE, vocab_size=300, bos_token_id=0, eos_token_id=0))
    decaying, others = decay_groups(network, weight_decay=0.1)
    # transformers' Trainer: all but biases and layer norms.
    names = [n for n in get_parameter_names(network, [torch.nn.LayerNorm]) if not n.endswith("bias")]
    expected = {id(dict(network.named_parameters(remove_duplicate=False))[n]) for n in names}
    assert {id(p) for p in decaying["params"]} == expected
    assert decaying["weight_decay"] == 0.1 and others["weight_decay"] == 0.0
    assert len(decaying["params"]) + len(others["params"]) == len(list(network.parameters()))
    network.transformer.wpe.weight.requires_grad_(False)
    assert all(p is not network.transformer.wpe.weight for g in decay_groups(network, weight_decay=1) for p in g["params"])


@pytest.mark.parametrize(
    ("name", "theirs"),
    [("cosine", get_cosine_schedule_with_warmup), ("linear", get_linear_schedule_with_warmup), ("constant", None)],
)
@pytest.mark.parametrize("warmup_steps", [0, 10])
def test_schedules_equal_transformers_after_warmup(name: str, theirs: object, warmup_steps: int) -> None:
    def rates(make: object) -> list[float]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule = make(optimizer)
        out = []
        for _ in range(100):
            out.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return out

    ours = rates(lambda o: build_schedule(o, schedule=name, warmup_steps=warmup_steps, total_steps=100))
    if theirs is None:
        expected = rates(lambda o: get_constant_schedule_with_warmup(o, warmup_steps))
    else:
        expected = rates(lambda o: theirs(o, warmup_steps, 100))
    assert ours[warmup_steps:] == pytest.approx(expected[warmup_steps:])
    # Ours does not waste its first step on a rate of 0.
    assert ours[:warmup_steps] == pytest.approx([(i + 1) / 10 for i in range(warmup_steps)])


def test_a_run_without_end_cannot_decay() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ConfigError, match="needs an end"):
        build_schedule(optimizer, schedule="cosine", warmup_steps=0, total_steps=math.inf)
    build_schedule(optimizer, schedule="constant", warmup_steps=0, total_steps=math.inf)
