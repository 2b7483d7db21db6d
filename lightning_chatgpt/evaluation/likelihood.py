"""How likely a model finds what was really said: each token scored once, however long a text is.

Shapes: T tokens of a text, P parts of it (messages, say), N tokens that a window scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities import move_data_to_device

from lightning_chatgpt.chat.conversation import Conversation
from lightning_chatgpt.chat.encoding import Encoder
from lightning_chatgpt.data.collate import Targets, collate
from lightning_chatgpt.errors import ConfigError
from lightning_chatgpt.generation.generate import max_positions
from lightning_chatgpt.models.loss import token_losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MARKERS = -1  # the part of tokens that nobody said: what the template writes around messages


class Text(NamedTuple):
    """A text to be scored.

    Attributes:
        ids: (T,) token ids. The first has nothing before it, and is never scored.
        parts: (T,) the part each token is of, from 0; MARKERS for none.
    """

    ids: Sequence[int]
    parts: Sequence[int]


class Score(NamedTuple):
    """What a model makes of some tokens.

    Attributes:
        tokens: How many they are.
        nll: Their negative log-likelihood, in nats, summed.
        correct: How often the most likely token was the right one.
    """

    tokens: int
    nll: float
    correct: int


class Window(NamedTuple):
    """What is read at once, and what of it is scored.

    Attributes:
        start: The first token that is read.
        first: The first token that is scored; those before it are context only.
        end: One past the last token that is scored, which itself need not be read.
    """

    start: int
    first: int
    end: int


def windows(n_tokens: int, *, capacity: int, stride: int) -> list[Window]:
    """Cut a text so that every token but the first is scored exactly once.

    A window reads up to ``capacity`` tokens and scores what follows them; each window but the first scores up to ``stride`` new tokens, and
    has at least ``capacity - stride + 1`` before each. With ``stride`` = ``capacity`` they are those of the lm-evaluation-harness.

    Args:
        n_tokens: T.
        capacity: Positions that the model has.
        stride: Tokens that a window scores anew.
    """
    found = []
    first, end = 1, min(n_tokens, capacity + 1)
    while first < n_tokens:
        found.append(Window(max(0, end - 1 - capacity), first, end))
        first, end = end, min(n_tokens, end + stride)
    return found


def default_stride(network: PreTrainedModel) -> int:
    """Half of a network's positions: a token of a long text has at least as many before it."""
    return max(1, max_positions(network) // 2)


def text_of_chat(encoder: Encoder, conversation: Conversation) -> Text:
    """A conversation whose parts are its messages: what is said, and the markers that are learnt with it.

    Args:
        encoder: With ``supervise`` all, as each message is a part, whoever speaks.
        conversation: It may be longer than the model's positions.
    """
    ids: list[int] = []
    parts: list[int] = []
    for turn in encoder.turns(conversation):
        ids += turn.ids()
        is_part = [*turn.before.weights, *[1.0] * len(turn.content), *turn.after.weights]
        parts += [turn.number if is_ else MARKERS for is_ in is_part]
    return Text(ids, parts)


@torch.no_grad()
def score_texts(
    network: PreTrainedModel, texts: Sequence[Text], *, pad_token_id: int, batch_size: int, stride: int | None = None
) -> list[dict[int, Score]]:
    """Score every token of each text but its first.

    Args:
        network: A causal language model of transformers, in evaluation mode.
        texts: What is scored.
        pad_token_id: What fills shorter rows.
        batch_size: Windows at once.
        stride: As :func:`windows` takes it; None for :func:`default_stride`.

    Returns: for each text the score of each of its parts.

    Raises:
        ConfigError: ``stride`` is out of range.
    """
    capacity = max_positions(network)
    stride = default_stride(network) if stride is None else stride
    if not 1 <= stride <= capacity:
        raise ConfigError(f"stride is a number of tokens, 1 to the model's {capacity} positions, not {stride}")
    n_parts = [max(text.parts, default=MARKERS) + 2 for text in texts]  # the last for MARKERS
    sums = [np.zeros((n, 3)) for n in n_parts]
    cut = [(number, window) for number, text in enumerate(texts) for window in windows(len(text.ids), capacity=capacity, stride=stride)]
    # Rows of about one length are padded little.
    cut.sort(key=lambda pair: pair[1].end - pair[1].start)
    for start in range(0, len(cut), batch_size):
        rows = cut[start : start + batch_size]
        # The last token is scored and not read, so that all positions are context.
        read = [np.asarray(texts[number].ids[window.start : window.end - 1], dtype=np.int32) for number, window in rows]
        batch = collate([[(ids, np.zeros(len(ids), np.float32))] for ids in read], pad_token_id=pad_token_id)
        width = batch["input_ids"].size(1)
        scored = [slice(window.first, window.end) for _, window in rows]
        places = [torch.arange(w.first - 1, w.end - 1) - w.start + row * width for row, (_, w) in enumerate(rows)]
        token_ids = torch.cat([torch.tensor(texts[number].ids[here]) for (number, _), here in zip(rows, scored, strict=True)])
        batch["targets"] = Targets(torch.cat(places), token_ids, torch.ones(len(token_ids)))
        losses = token_losses(network, move_data_to_device(batch, network.device))
        found = torch.stack([torch.ones(len(token_ids)).double(), losses.nll.cpu().double(), losses.is_correct.cpu().double()], dim=1)
        for (number, _), here, row in zip(rows, scored, torch.split(found, [s.stop - s.start for s in scored]), strict=True):
            np.add.at(sums[number], np.asarray(texts[number].parts[here]), row.numpy())
    return [
        {part: Score(int(row[0]), float(row[1]), int(row[2])) for part, row in zip([*range(len(rows) - 1), MARKERS], rows, strict=True)}
        for rows in sums
    ]
