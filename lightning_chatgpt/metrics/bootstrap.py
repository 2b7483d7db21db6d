"""How sure a figure is: percentile intervals of the bootstrap, over records, and of the paired bootstrap, between models.

A record, a conversation as a rule, is drawn whole: its tokens depend on each other. Shapes: N records, S sums, R resamples.
Sources: Efron and Tibshirani 1993, ch. 13 (percentile intervals); Koehn 2004 (paired resampling of a test set).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

N_RESAMPLES = 1000
LEVEL = 0.95

Statistic = Callable[[Tensor], Tensor]  # of sums (..., S) -> (...), as SumMetric.of_sums is

_NUMBERS_AT_ONCE = 2**22  # 32 MiB of counts


class Estimate(NamedTuple):
    """A figure and how sure it is.

    Attributes:
        value: The figure over all records; NaN where there was nothing to count.
        low: Where its 95 % interval begins; NaN where fewer than two records tell.
        high: Where it ends.
        n: Records that it is made of.
    """

    value: float
    low: float
    high: float
    n: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of 0; of a difference, whether it means something."""
        return self.low > 0 or self.high < 0

    def to_dict(self) -> dict[str, float | int | None]:
        """As plain data; null in place of what is not finite, which is no JSON."""
        return {name: value if math.isfinite(value) else None for name, value in self._asdict().items()}


class Resampled(NamedTuple):
    """A figure, and what it is in each resample of the records.

    Attributes:
        value: The figure over all records; NaN where there was nothing to count.
        figures: (R,) the figure in each resample; the r-th resample of as many records draws the same ones, whatever the figure.
        n: Records.
    """

    value: float
    figures: Tensor
    n: int

    def estimate(self) -> Estimate:
        """The figure with its interval."""
        low, high = interval(self.figures)
        return Estimate(self.value, low, high, self.n)

    def minus(self, other: Resampled) -> Estimate:
        """This figure less that of another model over the same records, in the same order: the paired bootstrap."""
        assert self.n == other.n, "pairs are of the same records"
        return Resampled(self.value - other.value, self.figures - other.figures, self.n).estimate()


def resampled_counts(n: int, *, n_resamples: int = N_RESAMPLES, seed: int = 0) -> Iterator[Tensor]:
    """How often each of n records is drawn in each resample of n.

    Yields: counts of some resamples, float64, (r, n); R rows in all. The same for the same n and seed.
    """
    generator = torch.Generator().manual_seed(seed)
    at_once = max(1, _NUMBERS_AT_ONCE // max(1, n))
    for start in range(0, n_resamples, at_once):
        drawn = torch.randint(n, (min(at_once, n_resamples - start), n), generator=generator)
        yield torch.zeros(drawn.shape, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(drawn.shape, dtype=torch.float64))


def resample(rows: Tensor, statistic: Statistic, *, seed: int = 0) -> Resampled:
    """A figure, over all records and in each resample.

    Args:
        rows: (N, S) what each record adds to the sums.
        statistic: From the sums to the figure.
        seed: Chooses the resamples.
    """
    rows = rows.double()
    if len(rows) < 2:  # nothing varies
        return Resampled(float(statistic(rows[0])) if len(rows) else float("nan"), torch.zeros(0, dtype=torch.float64), len(rows))
    figures = torch.cat([statistic(counts @ rows) for counts in resampled_counts(len(rows), seed=seed)])
    return Resampled(float(statistic(rows.sum(0))), figures, len(rows))


def estimate(rows: Tensor, statistic: Statistic, *, seed: int = 0) -> Estimate:
    """A figure with its interval; arguments as :func:`resample` takes them."""
    return resample(rows, statistic, seed=seed).estimate()


def difference(ours: Tensor, theirs: Tensor, statistic: Statistic, *, seed: int = 0) -> Estimate:
    """A figure of one model less that of another over the same records, with the interval of the paired bootstrap.

    Args:
        ours: (N, S) what each record adds to the sums of the one.
        theirs: (N, S) the same records, in the same order, of the other.
        statistic: From the sums to the figure.
        seed: Chooses the resamples.
    """
    return resample(ours, statistic, seed=seed).minus(resample(theirs, statistic, seed=seed))


def interval(resampled: Tensor) -> tuple[float, float]:
    """The middle 95 % of resampled figures (R,); those that are NaN, for a resample had nothing to count, are left aside."""
    known = resampled[~resampled.isnan()]
    if not len(known):
        return float("nan"), float("nan")
    low, high = known.quantile(torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=known.dtype)).tolist()
    return low, high
