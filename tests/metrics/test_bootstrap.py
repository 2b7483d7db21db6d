"""Intervals: against a loop over drawn records, closed forms, and how often they hold the truth."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_chatgpt.metrics.bootstrap import Estimate, difference, estimate, resampled_counts
from lightning_chatgpt.metrics.perplexity import MeanLoss, Perplexity


def rows_of(n: int, *, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    n_tokens = torch.randint(1, 30, (n,), generator=generator).double()
    return torch.stack([n_tokens * (2 + torch.rand(n, generator=generator).double()), n_tokens], dim=1)


def test_every_resample_draws_as_many_records_as_there_are() -> None:
    counts = torch.cat(list(resampled_counts(7, n_resamples=50)))
    assert counts.shape == (50, 7)
    assert counts.sum(1).tolist() == [7.0] * 50
    assert torch.equal(counts, torch.cat(list(resampled_counts(7, n_resamples=50))))
    assert not torch.equal(counts, torch.cat(list(resampled_counts(7, n_resamples=50, seed=1))))


def test_the_interval_is_that_of_a_plain_loop_over_resamples() -> None:
    rows = rows_of(40, seed=0)
    found = estimate(rows, Perplexity().of_sums)
    figures = []
    for counts in torch.cat(list(resampled_counts(40))).tolist():
        drawn = [row for row, n in zip(rows.tolist(), counts, strict=True) for _ in range(int(n))]
        figures.append(math.exp(sum(nll for nll, _ in drawn) / sum(n for _, n in drawn)))
    figures.sort()
    assert found.n == 40
    assert found.value == pytest.approx(math.exp(rows[:, 0].sum() / rows[:, 1].sum()))
    # Linear between the two nearest of 1000: places 24.975 and 974.025.
    assert found.low == pytest.approx(figures[24] + 0.975 * (figures[25] - figures[24]))
    assert found.high == pytest.approx(figures[974] + 0.025 * (figures[975] - figures[974]))


def test_95_percent_intervals_hold_the_truth_about_that_often() -> None:
    held = 0
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(60, generator=generator, dtype=torch.float64) + 3
        found = estimate(torch.stack([values, torch.ones(60, dtype=torch.float64)], dim=1), MeanLoss().of_sums, seed=seed)
        held += found.low < 3 < found.high
    assert 178 <= held <= 199  # 190 expected, 186 of percentile intervals of 60


def test_pairs_tell_what_each_alone_does_not() -> None:
    """Guards against intervals of two models taken apart, which overlap here."""
    ours = rows_of(40, seed=1)
    theirs = ours.clone()
    theirs[:, 0] += 0.02 * theirs[:, 1]
    mean = MeanLoss().of_sums
    assert estimate(ours, mean).high > estimate(theirs, mean).low
    found = difference(ours, theirs, mean)
    assert found.excludes_zero
    assert found.value == pytest.approx(-0.02)
    assert difference(theirs, ours, mean).value == pytest.approx(0.02)


def test_a_model_against_itself_is_no_different() -> None:
    rows = rows_of(40, seed=1)
    found = difference(rows, rows, MeanLoss().of_sums)
    assert found == Estimate(0.0, 0.0, 0.0, 40)
    assert not found.excludes_zero


def test_one_record_has_no_interval_and_none_no_figure() -> None:
    one = estimate(rows_of(1, seed=0), MeanLoss().of_sums)
    assert one.n == 1 and one.value > 0 and math.isnan(one.low) and not one.excludes_zero
    none = estimate(torch.zeros(0, 2), MeanLoss().of_sums)
    assert none.to_dict() == {"value": None, "low": None, "high": None, "n": 0}


def test_a_resample_with_nothing_to_count_is_left_aside() -> None:
    rows = torch.zeros(3, 2)
    rows[0] = torch.tensor([2.0, 1.0])
    found = estimate(rows, MeanLoss().of_sums)
    assert (found.value, found.low, found.high) == (2.0, 2.0, 2.0)
