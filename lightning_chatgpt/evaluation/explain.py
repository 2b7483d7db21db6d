"""Why a model said what it said: how likely each token of a reply was, and which tokens before it moved that.

Gradient × input is how fast a token's log-probability changes as the embedding of a token before it is scaled, at the scale it has:
d log p / d s at s = 1, where s · e stands in place of the embedding e. Source: Shrikumar et al. 2016, arXiv 1605.01713.

Shapes: P tokens of the prompt, R of the reply, V entries of the vocabulary, D width of an embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers.generation.streamers import BaseStreamer

from lightning_chatgpt.chat.conversation import Conversation, Message
from lightning_chatgpt.chat.encoding import Encoder
from lightning_chatgpt.chat.tokenizer import stop_token_ids, token_texts
from lightning_chatgpt.errors import ConfigError
from lightning_chatgpt.generation.generate import generate_replies, max_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

_N_ALTERNATIVES = 5
_WHOLE = 1 << 30  # tokens: an explanation is of all that was said, so nothing is left out to fit


@dataclass(frozen=True, slots=True)
class Token:
    """A token that the model read.

    Attributes:
        text: What it stands for; empty for the first tokens of a character that several make together, as the last has it.
        id: Its number in the vocabulary.
        is_control: Whether it is a control token, which no text can spell.
    """

    text: str
    id: int
    is_control: bool


@dataclass(frozen=True, slots=True)
class Alternative:
    """A token that could have stood in the place of another, and the probability that the model gave it there.

    Its text is � where it is part of a character.
    """

    text: str
    id: int
    probability: float


@dataclass(frozen=True, slots=True)
class ReplyToken(Token):
    """A token of a reply, and what the model thought of it, given all tokens before.

    Attributes:
        log_probability: In nats.
        probability: The same between 0 and 1.
        rank: 1 where no token was more probable, 2 where one was, and so on.
        entropy: Of the distribution that the token was drawn from, in nats; 0 where the model was certain.
        is_end: Whether it ends a reply.
        alternatives: The most probable tokens, the first most so.
    """

    log_probability: float
    probability: float
    rank: int
    entropy: float
    is_end: bool
    alternatives: list[Alternative]


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a model thought of a reply.

    Attributes:
        prompt: The tokens it read, the control tokens of the chat template among them.
        reply: The tokens of the reply.
        vocabulary: How many tokens there were to choose from: V.
        attributions: For each token of the reply and each of prompt and reply, how much the second moved the log-probability of the
            first: gradient × input, in nats; above 0 where more of it would raise that, and 0 for what comes later. Shape (R, P + R).
    """

    prompt: list[Token]
    reply: list[ReplyToken]
    vocabulary: int
    attributions: list[list[float]]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        return asdict(self)


def explain_reply(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    conversation: Conversation,
    *,
    reply: str | None = None,
    max_new_tokens: int = 64,
    show_progress: bool = False,
) -> Explanation:
    """Explain a model's reply to a conversation.

    Args:
        network: A causal language model of transformers; left as it is.
        tokenizer: The network's.
        conversation: Ends where the assistant is to speak.
        reply: What is explained; None for what the model says itself, taking the most likely token each time.
        max_new_tokens: Tokens that the model's own reply may have.
        show_progress: Whether a bar shows how far it is.

    Raises:
        ConfigError: captum is not installed, or prompt and reply are more than the network's positions.
    """
    encoder = Encoder(tokenizer, max_length=_WHOLE)
    prompt_ids = encoder.encode_prompt(conversation)
    if reply is None:
        reply_ids = _greedy_ids(network, tokenizer, prompt_ids, max_new_tokens=max_new_tokens)
    else:
        whole = Conversation((*conversation.messages, Message("assistant", reply)))
        ((ids, weights),) = next(encoder.encode([whole])).examples
        # What a template writes after the end token is no part of the reply: the model is never asked for it.
        reply_ids = [token_id for token_id, weight in list(zip(ids, weights, strict=True))[len(prompt_ids) :] if weight]
    return explain_ids(network, tokenizer, prompt_ids, reply_ids, show_progress=show_progress)


def explain_ids(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompt_ids: Sequence[int],
    reply_ids: Sequence[int],
    *,
    show_progress: bool = False,
) -> Explanation:
    """Explain a reply that is given as token ids.

    Args:
        network: A causal language model of transformers; left as it is.
        tokenizer: The network's.
        prompt_ids: What the model read, as ``chat.encoding.Encoder.encode_prompt`` gives it.
        reply_ids: What it said, at least one token.
        show_progress: Whether a bar shows how far it is.

    Raises:
        ConfigError: captum is not installed, or prompt and reply are more than the network's positions.
    """
    n_prompt, n_reply, n_most = len(prompt_ids), len(reply_ids), max_positions(network)
    if n_prompt + n_reply > n_most:
        raise ConfigError(
            f"a prompt of {n_prompt} tokens and a reply of {n_reply} are more than the model's {n_most} positions; shorten one of them"
        )
    ids = torch.tensor([[*prompt_ids, *reply_ids]], device=network.device)  # (1, P + R)
    texts = _texts(tokenizer, ids[0].tolist())
    special, stops = set(tokenizer.all_special_ids), stop_token_ids(tokenizer)
    tokens = [Token(text, token_id, token_id in special) for text, token_id in zip(texts, ids[0].tolist(), strict=True)]
    with _evaluating(network):
        attributions = gradient_x_input(network, ids, n_reply=n_reply, show_progress=show_progress)
        with torch.no_grad():
            # The last token is asked for nothing. (R, V)
            logits = network(ids, use_cache=False, logits_to_keep=n_reply + 1).logits[0, :-1]
    reply = [_judge(tokenizer, token, row, is_end=token.id in stops) for token, row in zip(tokens[n_prompt:], logits, strict=True)]
    return Explanation(tokens[:n_prompt], reply, logits.shape[-1], attributions.tolist())


def gradient_x_input(network: PreTrainedModel, ids: Tensor, *, n_reply: int, show_progress: bool = False) -> Tensor:
    """How much each token moved the log-probability of each of the last ones.

    What is scaled is a token's own embedding, as the network looks it up; where the token stands (GPT-2 adds an embedding of its place)
    is no part of it. Memory is that of one sequence: one forward and one backward pass for each token of the reply.

    Args:
        network: In evaluation mode; no gradient is left on its parameters.
        ids: Shape (1, P + R).
        n_reply: R.
        show_progress: Whether a bar shows how far it is.

    Returns: gradient × input, summed over the embedding's width, in nats; shape (R, P + R), float64, 0 for what comes later.

    Raises:
        ConfigError: captum is not installed.
    """
    try:
        from captum.attr import LayerGradientXActivation
    except ImportError as error:
        raise ConfigError(
            f"explain needs captum for its attributions, which cannot be imported ({error}): pip install 'lightning-chatgpt[explain]'"
        ) from None

    def log_probabilities(read: Tensor) -> Tensor:
        last: Tensor = network(read, use_cache=False, logits_to_keep=1).logits[:, -1]
        return last.double().log_softmax(-1)  # (1, V)

    method = LayerGradientXActivation(log_probabilities, network.get_input_embeddings())
    n_all = ids.shape[1]
    moved = torch.zeros(n_reply, n_all, dtype=torch.float64)
    for row in tqdm(range(n_reply), desc="explaining", unit=" tokens", disable=not show_progress, leave=False):
        place = n_all - n_reply + row
        products = method.attribute(ids[:, :place], target=int(ids[0, place]))  # (1, place, D)
        moved[row, :place] = products[0].detach().double().sum(-1)
    return moved


class _CollectIds(BaseStreamer):
    """Keeps the ids that ``generate`` hands on: the prompt's first, then those of the reply one by one."""

    def __init__(self) -> None:
        self.ids: list[int] = []

    def put(self, value: Tensor) -> None:
        """Take what comes. Called by transformers."""
        self.ids += value.flatten().tolist()

    def end(self) -> None:
        """There is nothing to be done. Called by transformers."""


def _greedy_ids(network: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt_ids: list[int], *, max_new_tokens: int) -> list[int]:
    # Not the reply's text encoded anew: the model may have spelt it with other tokens.
    collect = _CollectIds()
    with _evaluating(network):
        generate_replies(network, tokenizer, [prompt_ids], max_new_tokens=max_new_tokens, streamer=collect)
    return collect.ids[len(prompt_ids) :]


@contextmanager
def _evaluating(network: PreTrainedModel) -> Iterator[None]:
    """Without dropout, and afterwards as it was."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _judge(tokenizer: PreTrainedTokenizerFast, token: Token, logits: Tensor, *, is_end: bool) -> ReplyToken:
    log_probabilities = logits.double().log_softmax(-1)  # (V,)
    probabilities = log_probabilities.exp()
    log_probability = log_probabilities[token.id]
    best = probabilities.topk(min(_N_ALTERNATIVES, len(probabilities)))
    return ReplyToken(
        text=token.text,
        id=token.id,
        is_control=token.is_control,
        log_probability=float(log_probability),
        probability=float(probabilities[token.id]),
        rank=1 + int((logits > logits[token.id]).sum()),
        entropy=float(torch.special.entr(probabilities).sum()),
        is_end=is_end,
        alternatives=[
            Alternative(str(tokenizer.decode([token_id])), token_id, probability)
            for token_id, probability in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ],
    )


def _texts(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> list[str]:
    """The text of each token; some weights have more rows than their tokenizer has entries, and these stand for nothing."""
    texts = iter(token_texts(tokenizer, [token_id for token_id in ids if token_id < len(tokenizer)]))
    return [next(texts) if token_id < len(tokenizer) else "" for token_id in ids]
