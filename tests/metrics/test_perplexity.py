"""Metrics: closed forms, any cut into batches, any number of processes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from lightning_chatgpt.metrics.perplexity import BitsPerByte, MeanLoss, Perplexity, TokenAccuracy


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(dtype: torch.dtype) -> None:
    nll = F.cross_entropy(torch.zeros(1000, 8192, dtype=dtype).float(), torch.arange(1000), reduction="none")
    metric = Perplexity()
    metric.update(nll, torch.ones(1000))
    assert metric.compute().item() == pytest.approx(8192, rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_batches_do_not_matter_and_weights_do(batch_size: int) -> None:
    """Guards against a mean of means."""
    generator = torch.Generator().manual_seed(0)
    nll = torch.rand(100, generator=generator) * 10
    weights = torch.randint(0, 3, (100,), generator=generator) / 2
    metrics = [MeanLoss(), Perplexity()]
    for metric in metrics:
        for a, b in zip(nll.split(batch_size), weights.split(batch_size), strict=True):
            metric.update(a, b)
    expected = sum(n * w for n, w in zip(nll.tolist(), weights.tolist(), strict=True)) / sum(weights.tolist())
    assert metrics[0].compute().item() == pytest.approx(expected, rel=1e-7)
    assert metrics[1].compute().item() == pytest.approx(math.exp(expected), rel=1e-6)


def test_sums_stay_exact_in_a_half_precision_network() -> None:
    """Guards against a count of 3520 in place of 3700: bfloat16 sums, after the Trainer moved the network to it."""
    module = torch.nn.ModuleDict({"loss": MeanLoss()}).to(torch.bfloat16)
    for _ in range(2):
        for _ in range(100):
            module["loss"].update(torch.full((37,), 2.5), torch.ones(37))
        assert module["loss"].sums[1].item() == 3700
        assert module["loss"].compute().item() == 2.5
        module["loss"].reset()


def test_bits_per_byte_by_hand() -> None:
    metric = BitsPerByte([0, 1, 4])  # an end token without bytes, a token of one byte and one of four
    metric.update(torch.tensor([3.0, 2.0]) * math.log(2), torch.tensor([2, 1]))
    metric.update(torch.tensor([1.0]) * math.log(2), torch.tensor([0]))
    assert metric.compute().item() == pytest.approx((3 + 2 + 1) / 5)


def test_accuracy_by_hand() -> None:
    metric = TokenAccuracy()
    metric.update(torch.tensor([True, False, True]))
    metric.update(torch.tensor([False]))
    assert metric.compute().item() == 0.5


def test_two_processes_sum_before_they_divide() -> None:
    a, b, together = MeanLoss(), MeanLoss(), MeanLoss()
    a.update(torch.tensor([1.0, 2.0, 3.0]), torch.ones(3))
    b.update(torch.tensor([9.0]), torch.ones(1))
    together.update(torch.tensor([1.0, 2.0, 3.0, 9.0]), torch.ones(4))
    a._reduce_states(b.metric_state)
    assert a.compute() == together.compute() == pytest.approx(15 / 4)
