"""The loss: next-token prediction at supervised positions only, weighted, its vocabulary-sized part in chunks.

Shapes: B rows, T tokens, N supervised tokens in the batch, D width of the network, V entries of the vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_chatgpt.data.collate import find_targets
from lightning_chatgpt.errors import ModelError
from lightning_chatgpt.models.attention import attention_settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lightning_chatgpt.data.collate import Batch

LOGITS_MIB = 128  # what a chunk of float32 logits may take, whatever the batch; smaller chunks are slower, larger ones no faster


class TokenLosses(NamedTuple):
    """What a network makes of a batch's supervised tokens, in reading order.

    Attributes:
        total: Σ weight · nll, in nats; shape (). The one entry that gradients flow through.
        nll: (N,) negative log-likelihood of each, in nats, float32 or better.
        weights: (N,) loss weight of each.
        targets: (N,) token ids.
        is_correct: (N,) whether the most likely token was the right one.
    """

    total: Tensor
    nll: Tensor
    weights: Tensor
    targets: Tensor
    is_correct: Tensor

    @property
    def is_empty(self) -> bool:
        """Whether nothing was supervised; known without asking a device."""
        return len(self.targets) == 0

    def mean(self) -> Tensor:
        """Mean negative log-likelihood of this batch, weighted, in nats; shape (). 0 where nothing is supervised."""
        return self.total / self.weights.sum().clamp(min=torch.finfo(self.weights.dtype).tiny)


def token_losses(network: PreTrainedModel, batch: Batch) -> TokenLosses:
    """Run a network over a batch and score its supervised tokens.

    Args:
        network: A causal language model of transformers.
        batch: As ``data.collate`` builds it; ``targets`` may be missing.

    Returns: one entry for each supervised token.
    """
    targets = batch["targets"] if "targets" in batch else find_targets(batch)
    body: Any = network.base_model
    # No mask of the padding: it stands right of every real token, where causal attention never looks.
    settings = attention_settings(network, batch["stretches"]) if "stretches" in batch else {}
    hidden = body(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False, **settings
    ).last_hidden_state  # (B, T, D)
    hidden = hidden.flatten(0, 1)[targets.positions]  # (N, D)
    head: Any = network.get_output_embeddings()
    total, nll, is_correct = _HeadLoss.apply(  # type: ignore[no-untyped-call]
        hidden, head.weight, getattr(head, "bias", None), targets.token_ids, targets.weights, torch.is_grad_enabled()
    )
    return TokenLosses(total, nll, targets.weights, targets.token_ids, is_correct)


def check_head(network: PreTrainedModel) -> None:
    """Make sure that a network's logits are its hidden states times its head, as the loss takes them to be.

    Raises:
        ModelError: They are scaled, capped or made in some other way.
    """
    head: Any = network.get_output_embeddings()
    body: Any = network.base_model
    was_training = network.training
    network.eval()
    with torch.no_grad():
        spread = torch.linspace(0, head.weight.size(0) - 1, 8, dtype=torch.float64)  # bfloat16 would round the last one up
        ids = spread.long()[:, None].to(network.device)  # (8, 1)
        settings: Any = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        expected = network(**settings).logits
        found = head(body(**settings).last_hidden_state)
    network.train(was_training)
    if not torch.allclose(found.float(), expected.float(), rtol=1e-3, atol=1e-4):
        raise ModelError(
            f"{type(network).__name__}: its logits are not its hidden states times its head (are they scaled or capped?); "
            "the loss is not made for that; override CausalLMModule.score in a subclass"
        )


class _HeadLoss(torch.autograd.Function):
    """Head, softmax and cross-entropy of a few rows at a time; the gradient is taken along, so that no logits are kept.

    Source: the gradient of a weighted cross-entropy by the logits is weight · (softmax - one-hot), which the upstream gradient of the
    sum, a scalar, only scales.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, weights: Tensor, is_training: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        # Weights that are trained ask for their gradient even where none is recorded, as in validation.
        wants_gradient = is_training and any(ctx.needs_input_grad)
        with torch.autocast(device, enabled=False):
            rows, matrix = hidden.to(dtype), weight.to(dtype)
            # Half precision would round each loss to three digits, and a sum of gradients to less.
            exact = torch.float64 if dtype == torch.float64 else torch.float32
            weights = weights.to(exact)
            # With nothing to back-propagate, the last digits of evaluation cost nothing; Apple's GPUs know no float64.
            nll_dtype = exact if wants_gradient or device == "mps" else torch.float64
            nll = torch.empty(len(rows), dtype=nll_dtype, device=rows.device)
            is_correct = torch.empty(len(rows), dtype=torch.bool, device=rows.device)
            by_hidden = torch.empty_like(rows) if wants_gradient else None
            by_weight = torch.zeros_like(weight, dtype=exact) if wants_gradient and ctx.needs_input_grad[1] else None
            by_bias = torch.zeros_like(bias, dtype=exact) if wants_gradient and bias is not None else None
            n_rows = max(1, int(LOGITS_MIB * 2**20 / (weight.size(0) * exact.itemsize)))
            for start in range(0, len(rows), n_rows):
                here = slice(start, start + n_rows)
                ids, own = token_ids[here, None], weights[here, None]  # (n, 1)
                logits = torch.nn.functional.linear(rows[here], matrix, None if bias is None else bias.to(dtype)).to(exact)  # (n, V)
                best = logits.argmax(-1, keepdim=True)
                is_correct[here] = (best == ids)[:, 0]
                if by_hidden is None:
                    highest, reached = logits.gather(1, best), logits.gather(1, ids)
                    total = logits.sub_(highest).exp_().sum(-1, keepdim=True)  # of equal logits exactly V
                    nll[here] = (total.to(nll_dtype).log() + (highest.to(nll_dtype) - reached.to(nll_dtype)))[:, 0]
                    continue
                log_probabilities = torch.log_softmax(logits, -1, out=logits)
                nll[here] = -log_probabilities.gather(1, ids)[:, 0]
                error = log_probabilities.exp_().scatter_add_(1, ids, torch.full_like(own, -1))  # softmax - one-hot
                if by_bias is not None:
                    by_bias += (error * own).sum(0)
                error = error.to(dtype)
                by_hidden[here] = (error @ matrix) * own
                if by_weight is None:
                    continue
                weighted = (rows[here] * own).to(dtype)
                if dtype == exact:
                    by_weight.addmm_(error.T, weighted)
                else:
                    by_weight += error.T @ weighted
        ctx.save_for_backward(by_hidden, by_weight, by_bias)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(nll, is_correct)
        return (nll * weights).sum(), nll, is_correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_total: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        gradients = (
            None if saved is None else saved.mul_(by_total).to(dtype) for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*gradients, None, None, None)
