"""A figure that is a function of sums over records: the same in any cut into batches, on any number of processes."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class SumMetric(Metric):
    """Adds up a row of S numbers for each record; the figure is a function of the sums, taken once, at the end.

    So one class serves a running total, and the resamples of :mod:`lightning_chatgpt.metrics.bootstrap`.

    Attributes:
        n_sums: S.
        higher_is_better: Whether more of it is better; None where neither is.
    """

    full_state_update = False
    n_sums = 2
    sums: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Apple's GPUs know no float64; elsewhere a long sum of float32 would lose digits.
        dtype = torch.float32 if torch.backends.mps.is_available() else torch.float64
        self.add_state("sums", torch.zeros(self.n_sums, dtype=dtype), dist_reduce_fx="sum")

    @abstractmethod
    def of_sums(self, sums: Tensor) -> Tensor:
        """The figure; (..., S) -> (...). NaN where there was nothing to count."""

    def add_rows(self, rows: Tensor) -> None:
        """Add records: (N, S)."""
        self.sums += rows.detach().to(self.sums).sum(0)

    def compute(self) -> Tensor:
        """The figure; shape ()."""
        return self.of_sums(self.sums)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        # A network moved to half precision must not take its sums along: bfloat16 counts 256 + 1 as 256.
        dtype = self.sums.dtype
        super()._apply(*args, **kwargs)
        self.sums = self.sums.to(dtype)
        self._defaults = {name: zero.to(dtype) for name, zero in self._defaults.items() if isinstance(zero, Tensor)}
        return self


class Ratio(SumMetric):
    """A sum divided by another: of a share, a mean."""

    def of_sums(self, sums: Tensor) -> Tensor:
        """The first sum by the second; (..., 2) -> (...)."""
        return sums[..., 0] / sums[..., 1]

    def add(self, numerator: Tensor, denominator: Tensor) -> None:
        """Add to both sums; tensors of any shape."""
        dtype = self.sums.dtype
        self.add_rows(torch.stack([numerator.detach().to(dtype).sum(), denominator.detach().to(dtype).sum()])[None])
