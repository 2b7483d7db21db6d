"""What a CPU computes faster than by torch's own operators: attention by stretches, dropout, GELU. The numbers are the same.

Shapes: T tokens of a flattened batch, H heads, E width of a head, n tokens of a stretch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_STEPS = 1 << 16  # a probability of dropout is a multiple of one in this many


def dropout_factors(like: Tensor, *, dropout: float) -> Tensor:
    """What dropout multiplies elements by: 0, or what keeps the mean.

    Four decisions are taken from each 64-bit random number, which is four times as fast as one number for each.

    Args:
        like: A tensor of the shape and the type.
        dropout: The probability that an element is dropped, in [0, 1).
    """
    n_dropped = round(dropout * _STEPS)
    bits = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device).random_(-(1 << 63), None)
    kept = bits.view(torch.int16)[: like.numel()].view(like.shape) >= n_dropped - _STEPS // 2
    return kept.to(like.dtype).mul_(_STEPS / (_STEPS - n_dropped))


class Dropout(nn.Dropout):
    """``nn.Dropout`` with :func:`dropout_factors`."""

    def forward(self, input: Tensor) -> Tensor:
        """Drop elements while training; any shape."""
        if input.device.type != "cpu" or not self.training or not 0 < self.p < 1:
            return super().forward(input)
        return input * dropout_factors(input, dropout=self.p)


class StretchAttention(torch.autograd.Function):
    """Causal attention within each stretch: query, key, value (T, H, E) -> (T, H, E).

    Takes Σ n² products where masked attention takes B · T², and no mask. Source: Vaswani et al. 2017, eq. 1.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], dropout: float, scaling: float) -> Tensor:
        """Attend; ``lengths`` are the stretches', T together."""
        output = _empty_like(query)
        longest = max(lengths)
        future = torch.full((longest, longest), -torch.inf, dtype=query.dtype, device=query.device).triu_(1)
        saved: list[Tensor] = []
        for q, k, v, out in zip(*(_heads_first(tensor, lengths) for tensor in (query, key, value, output)), strict=True):
            n = q.size(1)
            probabilities = torch.baddbmm(future[:n, :n], q, k.transpose(1, 2), alpha=scaling).softmax(-1)  # (H, n, n)
            used = probabilities * dropout_factors(probabilities, dropout=dropout)
            torch.bmm(used, v, out=out)
            saved += [probabilities, used]
        ctx.save_for_backward(query, key, value, *saved)
        ctx.lengths, ctx.scaling = lengths, scaling
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_output: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients by query, key and value."""
        query, key, value, *saved = ctx.saved_tensors
        gradients = [_empty_like(query) for _ in range(3)]
        stretches = zip(*(_heads_first(tensor, ctx.lengths) for tensor in (query, key, value, by_output, *gradients)), strict=True)
        for (q, k, v, by_out, by_q, by_k, by_v), probabilities, used in zip(stretches, saved[::2], saved[1::2], strict=True):
            torch.bmm(used.transpose(1, 2), by_out, out=by_v)
            # With what was dropped in it, the softmax's gradient p · (g - Σ g · p) is g · p - p · Σ g · p, where g · p is what was used.
            weighted = torch.bmm(by_out, v.transpose(1, 2)).mul_(used)
            by_scores = weighted.addcmul_(probabilities, weighted.sum(-1, keepdim=True), value=-1).mul_(ctx.scaling)
            torch.bmm(by_scores, k, out=by_q)
            torch.bmm(by_scores.transpose(1, 2), q, out=by_k)
        return (*gradients, None, None, None)


def _empty_like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)  # contiguous, which a view's like is not


def _heads_first(tensor: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """(T, H, E) -> for each stretch a view (H, n, E)."""
    return [piece.transpose(0, 1) for piece in torch.split(tensor, list(lengths))]


def use_fast_kernels(network: nn.Module) -> None:
    """Exchange a network's dropout, and GPT-2's GELU written in five operators, for the same in one; changes ``network``."""
    from transformers.activations import NewGELUActivation

    for module in network.modules():
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, Dropout(child.p).train(child.training))
            elif type(child) is NewGELUActivation:
                setattr(module, name, nn.GELU(approximate="tanh"))


def blocks_of(network: Any) -> list[nn.Module]:
    """A network's transformer blocks, in order: the modules that transformers never parts among devices."""
    return [module for module in network.modules() if type(module).__name__ in (network._no_split_modules or ())]
