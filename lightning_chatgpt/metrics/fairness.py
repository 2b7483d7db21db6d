"""Whether groups differ: the largest gap of a figure, with an interval and a test that say about none where there is none.

The largest minus the smallest of several figures is above 0 by chance alone, and so is each of its resamples: a plain
percentile interval of it never holds 0. What is given here in its place holds the true gap, 0 included. Shapes: G groups, N
records of a group, S sums, R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_chatgpt.metrics.bootstrap import LEVEL, N_RESAMPLES, Estimate, Statistic, estimate, resampled_counts

MIN_RECORDS = 10  # below, a bootstrap's resamples vary too little to be believed
N_FLIPS = 9999

_NUMBERS_AT_ONCE = 2**22
_TIE = 1e-9  # sums in another order differ in their last digits


class Tested(NamedTuple):
    """A difference, how sure it is, and how probable one as large would be if there were none.

    Attributes:
        estimate: The difference with its 95 % interval.
        p_value: The share of relabellings by chance that give one at least as large.
    """

    estimate: Estimate
    p_value: float

    def to_dict(self, *, p_adjusted: float) -> dict[str, Any]:
        """As plain data.

        Args:
            p_adjusted: The p-value among all of its family (:func:`holm`); with an interval apart from 0 it decides ``is_found``.
        """
        is_found = self.estimate.excludes_zero and p_adjusted < 1 - LEVEL
        return {**self.estimate.to_dict(), "p_value": self.p_value, "p_adjusted": p_adjusted, "is_found": is_found}


class Gap(NamedTuple):
    """The largest gap of a figure among groups.

    Attributes:
        highest: The group of the largest figure.
        lowest: The group of the smallest.
        tested: The one less the other. Its interval holds the true largest gap 95 times in 100 or more, whichever groups that is
            between, and begins at 0 where none is shown; ``n`` counts the records of all groups compared.
    """

    highest: str
    lowest: str
    tested: Tested


def ratio(sums: Tensor) -> Tensor:
    """The first sum by the second: a mean, a share; (..., 2) -> (...)."""
    return sums[..., 0] / sums[..., 1]


def largest_gap(groups: Mapping[str, Tensor], statistic: Statistic, *, seed: int = 0) -> Gap | None:
    """Compare a figure among groups.

    The interval: each group's records are resampled on their own; the range of the G figures, each less what it is in the
    data, has a 95 % quantile c; all true differences between two groups lie within c of those found, at once, so the largest
    does too. Source: simultaneous intervals by the range, as Tukey's (Hochberg and Tamhane 1987), its distribution by the bootstrap
    (Beran 1988, Balanced simultaneous confidence sets); groups resampled apart: Efron and Tibshirani 1993, ch. 8.

    The p-value: groups keep their sizes and records are dealt among them by chance. It is exact for any number of records
    where groups do not differ at all; where they differ in something else, such as length, it is approximate. Source: Efron and
    Tibshirani 1993, ch. 15; the 1 added to both counts: Phipson and Smyth 2010.

    Args:
        groups: For each group (N, S) what each record that counts adds to the sums; those of fewer than 10 records are left out.
        statistic: From the sums to the figure.
        seed: Chooses the resamples.

    Returns: the gap; None where fewer than two groups have enough records and a figure.
    """
    rows = {name: of_group.double() for name, of_group in groups.items() if len(of_group) >= MIN_RECORDS}
    rows = {name: of_group for name, of_group in rows.items() if not statistic(of_group.sum(0)).isnan()}
    if len(rows) < 2:
        return None
    figures = torch.stack([statistic(of_group.sum(0)) for of_group in rows.values()])
    # A seed each: groups of one size would be resampled alike, and their errors would cancel.
    resampled = [
        torch.cat([statistic(counts @ of_group) for counts in resampled_counts(len(of_group), seed=seed + number)])
        for number, of_group in enumerate(rows.values())
    ]
    moved = _range(torch.stack(resampled, dim=1) - figures)  # (R, G) -> (R,)
    margin = float(moved[~moved.isnan()].quantile(LEVEL))
    value = float(_range(figures))
    found = Estimate(value, max(0.0, value - margin), value + margin, sum(map(len, rows.values())))
    names = list(rows)
    highest, lowest = names[int(figures.argmax())], names[int(figures.argmin())]
    return Gap(highest, lowest, Tested(found, _dealing_p_value(list(rows.values()), statistic, value, seed=seed)))


def mean_difference(rows: Tensor, *, seed: int = 0) -> Tested:
    """The mean of paired differences, and how often flipping their signs by chance gives one at least as far from 0.

    Source of the test: Fisher 1935, The Design of Experiments, section 21; exact where, if there is no difference, either sign is as
    probable.

    Args:
        rows: (N, 2) for each unit, such as a template, the sum of its differences and how many they are.
        seed: Chooses resamples and signs.
    """
    rows = rows.double()
    found = estimate(rows, ratio, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    least = float(rows[:, 0].sum().abs()) * (1 - _TIE)
    n_as_large = 0
    at_once = max(1, _NUMBERS_AT_ONCE // max(1, len(rows)))
    for start in range(0, N_FLIPS, at_once):
        signs = torch.randint(2, (min(at_once, N_FLIPS - start), len(rows)), generator=generator).double() * 2 - 1
        n_as_large += int(((signs @ rows[:, 0]).abs() >= least).sum())
    return Tested(found, (1 + n_as_large) / (1 + N_FLIPS))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values of one family, each as large as it has to be for one false finding among all to be as rare as of one alone.

    Source: Holm 1979.
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = adjusted[place] = max(largest, min(1.0, p_values[place] * (len(p_values) - rank)))
    return adjusted


def _dealing_p_value(rows: list[Tensor], statistic: Statistic, gap: float, *, seed: int) -> float:
    pooled, sizes = torch.cat(rows), [len(of_group) for of_group in rows]
    generator = torch.Generator().manual_seed(seed)
    n_as_large = 0
    for _ in range(N_RESAMPLES):
        dealt = torch.split(pooled[torch.randperm(len(pooled), generator=generator)], sizes)
        n_as_large += not float(_range(statistic(torch.stack([part.sum(0) for part in dealt])))) < gap * (1 - _TIE)
    return (1 + n_as_large) / (1 + N_RESAMPLES)


def _range(figures: Tensor) -> Tensor:
    return figures.amax(-1) - figures.amin(-1)
