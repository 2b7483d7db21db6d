"""Loss, perplexity, bits per byte and accuracy over supervised tokens.

Each keeps two sums, so a figure is the same whatever the batches and however many processes. Shapes: N supervised tokens.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class _Ratio(Metric):
    """A sum divided by another, once, at the end."""

    full_state_update = False
    numerator: Tensor
    denominator: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Apple's GPUs know no float64; elsewhere a long sum of float32 would lose digits.
        dtype = torch.float32 if torch.backends.mps.is_available() else torch.float64
        self.add_state("numerator", torch.zeros((), dtype=dtype), dist_reduce_fx="sum")
        self.add_state("denominator", torch.zeros((), dtype=dtype), dist_reduce_fx="sum")

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        # A network moved to half precision must not take its sums along: bfloat16 counts 256 + 1 as 256.
        dtype = self.numerator.dtype
        super()._apply(*args, **kwargs)
        self.numerator, self.denominator = self.numerator.to(dtype), self.denominator.to(dtype)
        self._defaults = {name: zero.to(dtype) for name, zero in self._defaults.items() if isinstance(zero, Tensor)}
        return self

    def compute(self) -> Tensor:
        """The ratio; shape ()."""
        return self.numerator / self.denominator

    def _add(self, numerator: Tensor, denominator: Tensor) -> None:
        self.numerator += numerator.detach().to(self.numerator.dtype).sum()
        self.denominator += denominator.detach().to(self.denominator.dtype).sum()


class MeanLoss(_Ratio):
    """Mean negative log-likelihood over supervised tokens, weighted, in nats."""

    def update(self, nll: Tensor, weights: Tensor) -> None:
        """Add tokens: their losses in nats (N,) and their loss weights (N,)."""
        self._add(nll.to(self.numerator.dtype) * weights, weights)


class Perplexity(MeanLoss):
    """Exponential of the mean negative log-likelihood; a uniform model has the size of its vocabulary.

    Unlike torchmetrics' own it takes losses, not logits: no second tensor of that size, and no overflow in half precision.
    """

    def compute(self) -> Tensor:
        """The perplexity; shape ()."""
        return super().compute().exp()


class BitsPerByte(_Ratio):
    """Bits that the model spends on each byte of supervised text; comparable between tokenizers.

    End tokens count in the bits and have no bytes. Loss weights play no part.

    Args:
        byte_lengths: How many bytes of text each token id stands for.
    """

    byte_lengths: Tensor

    def __init__(self, byte_lengths: list[int]) -> None:
        super().__init__()
        self.register_buffer("byte_lengths", torch.tensor(byte_lengths), persistent=False)

    def update(self, nll: Tensor, targets: Tensor) -> None:
        """Add tokens: their losses in nats (N,) and their ids (N,)."""
        self._add(nll / math.log(2), self.byte_lengths[targets])


class TokenAccuracy(_Ratio):
    """How often the most likely token is the right one, over supervised tokens."""

    def update(self, is_correct: Tensor) -> None:
        """Add tokens: whether each was right (N,)."""
        self._add(is_correct, torch.ones_like(is_correct))
