"""Texts to token ids: what people type, in which no control token is ever found, whatever it spells."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# The pieces that GPT-2 cuts text into before it merges bytes, for ASCII. Source: the pattern in Radford et al. 2019's encoder.py,
# with the letters, digits and white space of ASCII spelt out: Python's own \s has four characters more.
_WORD = re.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+| ?[^\t-\r A-Za-z0-9]+|[\t-\r ]+(?![^\t-\r ])|[\t-\r ]+",
)
_MOST_WORDS = 500_000  # some hundred megabytes


class TextEncoder:
    """Encodes texts through the tokenizer's batch interface, on all cores.

    With a tokenizer that cuts text as GPT-2's does, each different word of ASCII text is encoded once: chats say the same words
    again and again, and merging their bytes is what takes the time. The ids are the same.

    Args:
        tokenizer: What encodes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._words: dict[str, list[int]] | None = {} if _cuts_as_gpt2(self._backend) else None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts.

        Returns: the token ids of each.
        """
        if self._words is None:
            return self._encode_whole(texts)
        cut = [_WORD.findall(text) if text.isascii() else None for text in texts]
        words = self._words
        if len(words) > _MOST_WORDS:
            words.clear()
        new = list(set(chain.from_iterable(found for found in cut if found is not None)).difference(words))
        words.update(zip(new, self._encode_whole(new), strict=True))
        whole = iter(self._encode_whole([text for text, found in zip(texts, cut, strict=True) if found is None]))
        return [next(whole) if found is None else list(chain.from_iterable(map(words.__getitem__, found))) for found in cut]

    def _encode_whole(self, texts: Sequence[str]) -> list[list[int]]:
        was_encoding_special = self._backend.encode_special_tokens
        self._backend.encode_special_tokens = True  # as ordinary text, that is
        try:
            return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        finally:
            self._backend.encode_special_tokens = was_encoding_special


def _cuts_as_gpt2(backend: Any) -> bool:
    """Whether words by themselves give the same ids as in their text."""
    settings = json.loads(backend.to_str())
    model, cutter = settings["model"], settings["pre_tokenizer"] or {}
    return (
        model["type"] == "BPE"
        and not any(model.get(name) for name in ("dropout", "ignore_merges", "continuing_subword_prefix", "end_of_word_suffix"))
        and settings["normalizer"] is None
        and cutter.get("type") == "ByteLevel"
        and cutter.get("use_regex", True)
        and not cutter.get("add_prefix_space", True)
        # A token that was added to the vocabulary, and is no control token, is found across words.
        and all(token["special"] for token in settings["added_tokens"])
    )
