"""Load, train, store and restore a tokenizer, with the control tokens a chat needs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lightning_chatgpt.chat.template import CHATML_JINJA, END_TOKEN, START_TOKEN
from lightning_chatgpt.errors import ModelError

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, as GPT-2's, on texts.

    Args:
        texts: What to learn the merges from.
        vocab_size: Entries at the most, control tokens and the 256 bytes included; small texts give fewer.

    Returns: a tokenizer that writes any text without unknown tokens, with the chat's control tokens.

    Raises:
        ModelError: ``vocab_size`` leaves no room for the 256 bytes and the control tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    control_tokens = [END_OF_TEXT, START_TOKEN, END_TOKEN]
    smallest = 256 + len(control_tokens)
    if vocab_size < smallest:
        raise ModelError(f"vocab_size {vocab_size} is too small; a byte-level tokenizer needs at least {smallest}")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=control_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer=trainer)
    return _wrap(backend.to_str(), {"eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT, "pad_token": END_OF_TEXT})


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """Load a tokenizer from a local transformers folder and give it the chat's control tokens.

    Raises:
        ModelError: The folder holds no tokenizer that the ``tokenizers`` library backs.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise ModelError(f"{folder}: no tokenizer could be loaded ({first_line}); it needs a tokenizer.json") from None
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"{folder}: the tokenizer has no tokenizer.json; save it again with a fast tokenizer")
    return add_chat_tokens(tokenizer)


def add_chat_tokens(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Add the control tokens that are missing, set the template, and give padding a token; changes ``tokenizer``."""
    # special=True: only special tokens are left alone by split_special_tokens, which keeps a user's text harmless.
    # Said of tokens that are there already too: a control token in the vocabulary is not yet known as one.
    tokenizer.add_special_tokens({"extra_special_tokens": [START_TOKEN, END_TOKEN]}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or END_TOKEN
    tokenizer.chat_template = CHATML_JINJA
    return tokenizer


def stop_token_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Ids that end a reply: the end-of-message token, then the end-of-text token where there is one."""
    ids = [tokenizer.convert_tokens_to_ids(END_TOKEN), tokenizer.eos_token_id]
    return list(dict.fromkeys(token_id for token_id in ids if token_id is not None))


def token_byte_lengths(tokenizer: PreTrainedTokenizerFast) -> list[int] | None:
    """How many bytes of text each token id stands for; control tokens stand for none.

    Returns: one length for each id, or None where the tokenizer is not byte-level, as the lengths are not known then.
    """
    decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"]
    if (decoder or {}).get("type") != "ByteLevel":
        return None
    special = set(tokenizer.all_special_ids)
    # A byte-level vocabulary spells each byte as one character.
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return [0 if i in special or token is None else len(token) for i, token in enumerate(tokens)]


def tokenizer_state(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The tokenizer as plain data (text only), to stand in a checkpoint."""
    named = {k: str(v) for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
    return {"tokenizer_json": tokenizer.backend_tokenizer.to_str(), "special_tokens": named}


def tokenizer_from_state(state: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer that :func:`tokenizer_state` wrote down."""
    return _wrap(state["tokenizer_json"], state["special_tokens"])


def _wrap(tokenizer_json: str, special_tokens: dict[str, str]) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(tokenizer_json)
    # Truncation and padding are ours to do; a saved tokenizer may still carry both.
    backend.no_truncation()
    backend.no_padding()
    return add_chat_tokens(PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special_tokens))
