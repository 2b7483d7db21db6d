"""Gaps between groups: against plain loops, by hand, and how often they find what is there and what is not."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from lightning_chatgpt.metrics.bootstrap import N_RESAMPLES, resampled_counts
from lightning_chatgpt.metrics.fairness import Gap, holm, largest_gap, mean_difference, ratio
from lightning_chatgpt.metrics.perplexity import Perplexity


def rows_of(n: int, *, generator: torch.Generator, loss: float = 2.0) -> torch.Tensor:
    """Conversations of 3 to 39 tokens; each has a loss of its own around the group's."""
    n_tokens = torch.randint(3, 40, (n,), generator=generator).double()
    return torch.stack([n_tokens * (loss + 0.5 * torch.randn(n, generator=generator).double()), n_tokens], dim=1)


def gap_of(losses: dict[str, float], *, seed: int, n: int = 40) -> Gap:
    generator = torch.Generator().manual_seed(seed)
    found = largest_gap({name: rows_of(n, generator=generator, loss=loss) for name, loss in losses.items()}, ratio, seed=seed)
    assert found is not None
    return found


def test_the_interval_is_that_of_a_plain_loop_over_resamples() -> None:
    generator = torch.Generator().manual_seed(0)
    groups = {"a": rows_of(15, generator=generator), "b": rows_of(30, generator=generator), "c": rows_of(20, generator=generator, loss=3)}

    def perplexity(rows: list[list[float]]) -> float:
        return math.exp(sum(nll for nll, _ in rows) / sum(n for _, n in rows))

    figures = [perplexity(rows.tolist()) for rows in groups.values()]
    draws = [torch.cat(list(resampled_counts(len(rows), seed=i))).tolist() for i, rows in enumerate(groups.values())]
    ranges = []
    for counts in zip(*draws, strict=True):
        drawn = [
            perplexity([row for row, n in zip(rows.tolist(), of_group, strict=True) for _ in range(int(n))])
            for rows, of_group in zip(groups.values(), counts, strict=True)
        ]
        moved = [a - b for a, b in zip(drawn, figures, strict=True)]
        ranges.append(max(moved) - min(moved))
    ranges.sort()
    margin = ranges[949] + 0.05 * (ranges[950] - ranges[949])  # place 949.05 of 0 to 999
    found = largest_gap(groups, Perplexity().of_sums)
    assert found is not None
    estimate = found.tested.estimate
    assert (found.highest, found.lowest, estimate.n) == ("c", ["a", "b"][figures[1] < figures[0]], 65)
    assert estimate.value == pytest.approx(max(figures) - min(figures))
    assert estimate.high - estimate.value == pytest.approx(margin)
    assert estimate.low == pytest.approx(max(0, estimate.value - margin))


def test_groups_that_do_not_differ_show_about_no_gap() -> None:
    """Guards against a percentile interval of the gap itself, which lies above 0 every time."""
    found = [gap_of(dict.fromkeys("abc", 2.0), seed=seed).tested for seed in range(30)]
    assert all(of.estimate.value > 0 for of in found)
    assert sum(of.estimate.excludes_zero for of in found) <= 4  # 1.5 expected, more than 4 once in 60 times
    assert sum(of.p_value < 0.05 for of in found) <= 4


def test_a_planted_gap_is_found_and_its_interval_holds_it() -> None:
    found = [gap_of({"a": 2.0, "b": 2.4, "c": 2.8}, seed=seed) for seed in range(20)]
    assert all((gap.highest, gap.lowest) == ("c", "a") for gap in found)
    assert all(gap.tested.estimate.excludes_zero and gap.tested.p_value < 0.05 for gap in found)
    assert sum(gap.tested.estimate.low <= 0.8 <= gap.tested.estimate.high for gap in found) >= 17


def test_the_p_value_is_that_of_all_ways_to_deal_the_records() -> None:
    """12 flags among 20 records: the number in a group of 10 is hypergeometric."""
    first, second = [1.0] * 8 + [0.0] * 2, [1.0] * 4 + [0.0] * 6
    found = largest_gap({name: torch.tensor([[x, 1.0] for x in values]) for name, values in (("a", first), ("b", second))}, ratio)
    assert found is not None
    exact = sum(math.comb(12, k) * math.comb(8, 10 - k) for k in range(2, 11) if abs(2 * k - 12) >= 4) / math.comb(20, 10)
    assert found.tested.p_value == pytest.approx(exact, abs=4 * math.sqrt(exact / N_RESAMPLES))


def test_small_groups_and_those_without_a_figure_are_left_out() -> None:
    generator = torch.Generator().manual_seed(0)
    nothing = torch.zeros(20, 2)
    groups = {"a": rows_of(20, generator=generator), "small": rows_of(9, generator=generator, loss=9), "nothing": nothing}
    assert largest_gap(groups, ratio) is None
    found = largest_gap({**groups, "b": rows_of(20, generator=generator)}, ratio)
    assert found is not None and {found.highest, found.lowest} == {"a", "b"} and found.tested.estimate.n == 40


def test_groups_alike_in_every_record_have_no_gap() -> None:
    rows = torch.tensor([[2.0, 1.0]] * 10)
    found = largest_gap({"a": rows, "b": rows}, ratio)
    assert found is not None and found.tested.estimate[:3] == (0, 0, 0) and found.tested.p_value == 1


def test_flipped_signs_by_hand() -> None:
    differences = [0.5, 0.7, -0.1, 0.9, 0.4, 0.6, 0.2, 0.8]
    found = mean_difference(torch.tensor([[d, 1.0] for d in differences]))
    flips = [abs(sum(s * d for s, d in zip(signs, differences, strict=True))) for signs in itertools.product((-1, 1), repeat=8)]
    exact = sum(flip >= sum(differences) - 1e-9 for flip in flips) / len(flips)
    assert found.estimate.value == pytest.approx(0.5)
    assert found.p_value == pytest.approx(exact, abs=4 * math.sqrt(exact / 9999))
    assert found.estimate.excludes_zero
    none = mean_difference(torch.zeros(8, 2) + torch.tensor([0.0, 1.0]))
    assert none.p_value == 1 and not none.estimate.excludes_zero


def test_p_values_of_a_family_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_found_needs_both_the_interval_and_the_test() -> None:
    tested = gap_of({"a": 2.0, "b": 3.0}, seed=0).tested
    assert tested.to_dict(p_adjusted=0.01)["is_found"]
    assert not tested.to_dict(p_adjusted=0.2)["is_found"]
    assert not gap_of({"a": 2.0, "b": 2.0}, seed=0).tested.to_dict(p_adjusted=0.01)["is_found"]
