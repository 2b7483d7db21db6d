"""Loss, perplexity, bits per byte and accuracy over supervised tokens.

Each keeps two sums, so a figure is the same whatever the batches and however many processes. Shapes: N supervised tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_chatgpt.metrics.sums import Ratio


class MeanLoss(Ratio):
    """Mean negative log-likelihood over supervised tokens, weighted, in nats."""

    higher_is_better = False

    def update(self, nll: Tensor, weights: Tensor) -> None:
        """Add tokens: their losses in nats (N,) and their loss weights (N,)."""
        self.add(nll.to(self.sums.dtype) * weights, weights)


class Perplexity(MeanLoss):
    """Exponential of the mean negative log-likelihood; a uniform model has the size of its vocabulary.

    Unlike torchmetrics' own it takes losses, not logits: no second tensor of that size, and no overflow in half precision.
    """

    def of_sums(self, sums: Tensor) -> Tensor:
        """The perplexity; (..., 2) -> (...)."""
        return super().of_sums(sums).exp()


class BitsPerByte(Ratio):
    """Bits that the model spends on each byte of supervised text; comparable between tokenizers.

    End tokens count in the bits and have no bytes. Loss weights play no part.

    Args:
        byte_lengths: How many bytes of text each token id stands for.
    """

    byte_lengths: Tensor
    higher_is_better = False

    def __init__(self, byte_lengths: list[int]) -> None:
        super().__init__()
        self.register_buffer("byte_lengths", torch.tensor(byte_lengths), persistent=False)

    def update(self, nll: Tensor, targets: Tensor) -> None:
        """Add tokens: their losses in nats (N,) and their ids (N,)."""
        self.add(nll / math.log(2), self.byte_lengths[targets])


class TokenAccuracy(Ratio):
    """How often the most likely token is the right one, over supervised tokens."""

    higher_is_better = True

    def update(self, is_correct: Tensor) -> None:
        """Add tokens: whether each was right (N,)."""
        self.add(is_correct, torch.ones_like(is_correct))
