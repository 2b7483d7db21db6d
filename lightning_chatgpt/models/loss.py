"""The loss: next-token prediction at supervised positions only, weighted.

Shapes: B rows, T tokens, N supervised tokens in the batch, V entries of the vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_chatgpt.data.collate import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lightning_chatgpt.data.collate import Batch


class TokenLosses(NamedTuple):
    """What a network makes of a batch's supervised tokens, in reading order.

    Attributes:
        nll: (N,) negative log-likelihood of each, in nats, float32 or better.
        weights: (N,) loss weight of each.
        targets: (N,) token ids.
        is_correct: (N,) whether the most likely token was the right one.
    """

    nll: Tensor
    weights: Tensor
    targets: Tensor
    is_correct: Tensor

    def mean(self) -> Tensor:
        """Mean negative log-likelihood, weighted, in nats; shape (). 0 where nothing is supervised."""
        return (self.nll * self.weights).sum() / self.weights.sum().clamp(min=torch.finfo(self.weights.dtype).tiny)


def token_losses(network: PreTrainedModel, batch: Batch) -> TokenLosses:
    """Run a network over a batch and score its supervised tokens.

    Args:
        network: A causal language model of transformers.
        batch: As ``data.collate`` builds it.

    Returns: one entry for each supervised token; the first token of a row has nothing before it and is never scored.
    """
    # Shifting is done here: the token at t + 1 is predicted at t, and only such positions are projected on the vocabulary.
    labels = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
    weights = F.pad(batch["loss_weights"][:, 1:], (0, 1))
    is_supervised = labels != IGNORE_INDEX
    logits = network(
        input_ids=batch["input_ids"],
        # No attention mask: padding stands right of every real token, where causal attention never looks. With a mask torch
        # leaves its fastest kernel.
        position_ids=batch["position_ids"],
        use_cache=False,
        logits_to_keep=is_supervised,
    ).logits  # (B, T, V) -> (N, V): supervised positions only
    targets = labels[is_supervised]
    # Half precision would round each loss to three digits.
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return TokenLosses(
        nll=F.cross_entropy(logits, targets, reduction="none"),
        weights=weights[is_supervised],
        targets=targets,
        is_correct=logits.detach().argmax(-1) == targets,
    )
