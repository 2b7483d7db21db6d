"""Lists of examples to one batch.

Shapes: B examples, T tokens of the longest (training: padded right; prompts: padded left, as generation needs).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from lightning_chatgpt.chat.conversation import Conversation
from lightning_chatgpt.chat.encoding import Example

IGNORE_INDEX = -100  # what torch and transformers leave out of a loss


class Batch(TypedDict):
    """What the model is trained on.

    Attributes:
        input_ids: (B, T) token ids.
        labels: (B, T) the same ids where they are supervised, else -100; not shifted.
        position_ids: (B, T) places within each row, from 0.
        attention_mask: (B, T) 1 for real tokens, 0 for padding, which always stands on the right.
        loss_weights: (B, T) float32; what each token's loss is multiplied by, 0 where unsupervised.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    loss_weights: Tensor


class PromptBatch(TypedDict):
    """What replies are predicted for; the lists have one entry for each of the B conversations.

    Attributes:
        conversations: Ids, prompt messages and, where there is one, the reference reply.
        prompt_ids: Token ids of each prompt.
        max_new_tokens: Tokens a reply may have.
    """

    conversations: list[dict[str, Any]]
    prompt_ids: list[list[int]]
    max_new_tokens: int


def collate(examples: Sequence[Example], *, pad_token_id: int) -> Batch:
    """Pad examples on the right to one batch."""
    n_rows, n_columns = len(examples), max(len(example.input_ids) for example in examples)
    input_ids = torch.full((n_rows, n_columns), pad_token_id)
    loss_weights = torch.zeros(n_rows, n_columns)
    attention_mask = torch.zeros(n_rows, n_columns, dtype=torch.long)
    for row, example in enumerate(examples):
        n = len(example.input_ids)
        input_ids[row, :n] = torch.tensor(example.input_ids)
        loss_weights[row, :n] = torch.tensor(example.loss_weights)
        attention_mask[row, :n] = 1
    return Batch(
        input_ids=input_ids,
        labels=torch.where(loss_weights > 0, input_ids, IGNORE_INDEX),
        # Padding goes on counting: transformers takes a position that does not for the start of another text.
        position_ids=torch.arange(n_columns).expand(n_rows, n_columns).contiguous(),
        attention_mask=attention_mask,
        loss_weights=loss_weights,
    )


def collate_prompts(items: Sequence[tuple[Conversation, list[int]]], *, max_new_tokens: int) -> PromptBatch:
    """Put conversations to be answered together; nothing is padded yet."""
    described = []
    for conversation, _ in items:
        prompt, reference = conversation.prompt_and_reference()
        described.append({"id": conversation.id, "prompt": prompt.to_dict()["messages"], "reference": reference})
    return PromptBatch(
        conversations=described,
        prompt_ids=[prompt_ids for _, prompt_ids in items],
        max_new_tokens=max_new_tokens,
    )
