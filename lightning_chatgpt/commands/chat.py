"""``chat``: talk to a model in the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from lightning_chatgpt.chat.conversation import Conversation, Message
from lightning_chatgpt.errors import ConfigError

if TYPE_CHECKING:
    from lightning_chatgpt.models.build import LoadedModel


def chat(
    model: str,
    prompt: str | None = None,
    system: str | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> None:
    """Talk to a model. An empty line or Ctrl-D leaves; piped input is answered line by line.

    Args:
        model: A run folder, a .ckpt, a transformers folder, builtin:NAME, or a hub name.
        prompt: Answer this and leave.
        system: A system message to begin with.
        max_new_tokens: Tokens a reply may have.
        temperature: 0 takes the most likely token each time; higher samples more freely.
        top_k: Samples among this many most likely tokens; 0 for all.
        top_p: Samples among the most likely tokens that together have this probability.
        seed: Makes sampling repeatable.
    """
    from transformers.utils import logging

    from lightning_chatgpt.generation.generate import check_sampling
    from lightning_chatgpt.models.build import load_model

    check_sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p)
    if temperature == 0 and (top_k or top_p != 1.0 or seed is not None):
        raise ConfigError("top_k, top_p and seed only matter when sampling; set a temperature above 0")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    loaded = load_model(model)
    if seed is not None:
        import torch

        torch.manual_seed(seed)
    sampling: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    messages = [Message("system", system)] if system else []
    if prompt is not None:
        _answer(loaded, [*messages, Message("user", prompt)], max_new_tokens, sampling)
        return
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print(f"Talking to {model}. An empty line or Ctrl-D leaves.")
    while True:
        try:
            line = input("you> " if is_terminal else "").strip()
        except (EOFError, KeyboardInterrupt):
            break
        if not line and is_terminal:
            break
        if not line:
            continue
        messages.append(Message("user", line))
        if is_terminal:
            print("gpt> ", end="", flush=True)
        messages.append(Message("assistant", _answer(loaded, messages, max_new_tokens, sampling)))


def _answer(loaded: LoadedModel, messages: list[Message], max_new_tokens: int, sampling: dict[str, Any]) -> str:
    """Print the reply as it comes, and return it."""
    from transformers import TextStreamer

    from lightning_chatgpt.chat.encoding import Encoder
    from lightning_chatgpt.generation.generate import generate_replies, max_positions

    network, tokenizer = loaded
    room = max_positions(network) - max_new_tokens
    if room < 1:
        raise ConfigError(f"max_new_tokens {max_new_tokens} leaves no room for a prompt in {max_positions(network)} positions")
    prompt_ids = Encoder(tokenizer, max_length=room).encode_prompt(Conversation(tuple(messages)))
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    (reply,) = generate_replies(network, tokenizer, [prompt_ids], max_new_tokens=max_new_tokens, streamer=streamer, **sampling)
    return reply.text
