"""Lists of examples to one batch.

Shapes: B examples, T tokens of the longest (training: padded right; prompts: padded left, as generation needs).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from typing_extensions import NotRequired

from lightning_chatgpt.chat.conversation import Conversation

Tokens = tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]

IGNORE_INDEX = -100  # what torch and transformers leave out of a loss


class Targets(NamedTuple):
    """What is predicted in a batch, in reading order.

    Attributes:
        positions: (N,) places in the flattened (B · T) batch that a supervised token is predicted from: one before its own.
        token_ids: (N,) the tokens.
        weights: (N,) their loss weights, float32.
    """

    positions: Tensor
    token_ids: Tensor
    weights: Tensor


class Stretches(NamedTuple):
    """Which tokens of a flattened (B · T) batch see each other: those of one example, or of the padding behind them.

    Attributes:
        lengths: Tokens of each of the S stretches, in order; B · T together.
        ends: (S + 1,) int32: 0, and where each stretch ends.
        longest: The most tokens of a stretch.
    """

    lengths: list[int]
    ends: Tensor
    longest: int


class Batch(TypedDict):
    """What the model is trained on.

    Attributes:
        input_ids: (B, T) token ids.
        labels: (B, T) the same ids where they are supervised, else -100; not shifted.
        position_ids: (B, T) places within each example, from 0; several examples in a row begin anew.
        attention_mask: (B, T) 1 for real tokens, 0 for padding, which always stands on the right.
        loss_weights: (B, T) float32; what each token's loss is multiplied by, 0 where unsupervised.
        targets: What that supervises. Found here, in main memory, a GPU need not be waited for; where it is missing it is found later.
        stretches: Which tokens see each other; ``position_ids`` tell the same.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    loss_weights: Tensor
    targets: NotRequired[Targets]
    stretches: NotRequired[Stretches]


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


def collate(rows: Sequence[Sequence[Tokens]], *, pad_token_id: int, width: int | None = None) -> Batch:
    """Put rows of examples into one batch.

    Args:
        rows: For each row its examples: token ids and loss weights, of equal length. Several in a row are packed: positions begin
            anew with each, from which transformers knows that they must not see each other, and no example's first token is
            predicted from the one before it. A row without examples is all padding.
        pad_token_id: What fills the places on the right.
        width: Columns of the batch; None takes as many as the longest row has tokens.
    """
    n_columns = width or max(1, *(sum(len(ids) for ids, _ in row) for row in rows))
    shape = (len(rows), n_columns)
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    loss_weights = np.zeros(shape, dtype=np.float32)
    attention_mask = np.zeros(shape, dtype=np.int64)
    position_ids = np.tile(np.arange(n_columns), (len(rows), 1))
    lengths: list[int] = []
    for r, row in enumerate(rows):
        start = 0
        for ids, weights in row:
            end = start + len(ids)
            input_ids[r, start:end] = ids
            loss_weights[r, start + 1 : end] = weights[1:]
            # Padding goes on counting: transformers takes a position that does not for the start of another text.
            position_ids[r, start:] = np.arange(n_columns - start)
            start = end
            lengths.append(len(ids))
        attention_mask[r, :start] = 1
        lengths.append(n_columns - start)
    batch = Batch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(np.where(loss_weights > 0, input_ids, IGNORE_INDEX)),
        position_ids=torch.from_numpy(position_ids),
        attention_mask=torch.from_numpy(attention_mask),
        loss_weights=torch.from_numpy(loss_weights),
    )
    lengths = [length for length in lengths if length]
    ends = torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32))
    batch["targets"] = find_targets(batch)
    batch["stretches"] = Stretches(lengths, ends, max(lengths))
    return batch


def find_targets(batch: Batch) -> Targets:
    """Find what a batch supervises."""
    # Shifting is done here: the token at t + 1 is predicted at t. A row's first token has nothing before it and is never scored.
    labels = batch["labels"][:, 1:]
    rows, columns = (labels != IGNORE_INDEX).nonzero(as_tuple=True)
    return Targets(
        positions=rows * batch["labels"].size(1) + columns,
        token_ids=labels[rows, columns],
        weights=batch["loss_weights"][rows, columns + 1],
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
