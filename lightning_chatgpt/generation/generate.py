"""Generate replies for a batch of prompts, with transformers' own generation.

Shapes: B prompts, T tokens of the longest, padded on the left so that all replies begin at one column.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch.compiler import set_stance

from lightning_chatgpt.chat.tokenizer import stop_token_ids
from lightning_chatgpt.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast
    from transformers.generation.streamers import BaseStreamer


class Reply(NamedTuple):
    """What the model answered.

    Attributes:
        text: The reply, without its end token.
        n_tokens: Tokens generated, the end token included.
        finish_reason: ``stop`` where the model ended by itself, ``length`` where it ran out of tokens.
    """

    text: str
    n_tokens: int
    finish_reason: Literal["stop", "length"]


def max_positions(network: PreTrainedModel) -> int:
    """How many tokens a prompt and its reply may have together."""
    return int(network.config.max_position_embeddings)  # GPT-2 answers to this name too


@torch.no_grad()
def generate_replies(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    streamer: BaseStreamer | None = None,
) -> list[Reply]:
    """Answer prompts.

    Args:
        network: In evaluation mode.
        tokenizer: The network's.
        prompts: Token ids of each prompt, as ``chat.encoding.Encoder.encode_prompt`` gives them.
        max_new_tokens: Tokens a reply may have; fewer where the model's positions end.
        temperature: 0 takes the most likely token each time (greedy); higher samples more freely.
        top_k: Samples among this many most likely tokens; 0 for all.
        top_p: Samples among the most likely tokens that together have this probability.
        streamer: Is handed the tokens of a single prompt's reply as they come.

    Returns: one reply for each prompt, in order.

    Raises:
        ConfigError: A setting is out of range, or a prompt leaves no room for a reply.
    """
    from transformers import GenerationConfig

    check_sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p)
    longest = max(map(len, prompts))
    room = max_positions(network) - longest
    if room < 1:
        raise ConfigError(f"a prompt of {longest} tokens leaves no room for a reply in {max_positions(network)} positions")
    pad_id = tokenizer.pad_token_id
    device = network.device
    rows = [[pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    stop_ids = stop_token_ids(tokenizer)
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p} if temperature > 0 else {}
    generate: Any = network.generate
    with set_stance("force_eager"):  # blocks compiled for training would be compiled anew for every length of a reply
        generated = generate(
            input_ids=torch.tensor(rows, device=device),
            attention_mask=torch.tensor(mask, device=device),
            generation_config=GenerationConfig(
                do_sample=temperature > 0,
                max_new_tokens=min(max_new_tokens, room),
                eos_token_id=stop_ids,
                pad_token_id=pad_id,
                **sampling,
            ),
            streamer=streamer,
        )
    return [_to_reply(row, tokenizer, stop_ids) for row in generated[:, longest:].tolist()]


def check_sampling(*, max_new_tokens: int, temperature: float, top_k: int, top_p: float) -> None:
    """Refuse settings that no reply can be generated with.

    Raises:
        ConfigError: One of them is out of range.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    if temperature < 0:
        raise ConfigError(f"temperature must be at least 0, not {temperature}")
    if top_k < 0:
        raise ConfigError(f"top_k must be at least 0, not {top_k}")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p must be above 0 and at most 1, not {top_p}")


def _to_reply(ids: list[int], tokenizer: PreTrainedTokenizerFast, stop_ids: list[int]) -> Reply:
    end = next((i for i, token_id in enumerate(ids) if token_id in stop_ids), None)
    # After a control token that should not be there, show what was said all the same.
    text = str(tokenizer.decode(ids[:end], skip_special_tokens=True))
    if end is None:
        return Reply(text, len(ids), "length")
    return Reply(text, end + 1, "stop")
