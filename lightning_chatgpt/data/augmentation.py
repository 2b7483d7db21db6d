"""Augmentation: copies of training conversations in which the user says the same a little differently."""

from __future__ import annotations

import inspect
import json
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from hashlib import blake2b
from typing import Any

from lightning_chatgpt.chat.conversation import Conversation
from lightning_chatgpt.chat.plugins import find_function
from lightning_chatgpt.data.duplicates import CJK
from lightning_chatgpt.errors import ConfigError, DataError
from lightning_chatgpt.settings import check_settings

_WORD = re.compile(rf"[{CJK}]|[^\s{CJK}]+")
_CJK = re.compile(f"[{CJK}]")
_PROBABILITIES = ("mask", "dropout", "swap", "typos")
_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Augmentation:
    """Makes augmented copies of conversations: only what the user says changes, and each copy differently.

    In this order: paraphrase, typos, swap, dropout, mask. Words are what stands between spaces, and each Han or kana
    character. Line breaks and spaces stay, but for one space beside each word that drops out.

    Source: swap and dropout as in Wei and Zou 2019, EDA; dropping user words in place of ``mask_text`` as in Iyyer et al. 2015.

    Args:
        copies: Augmented copies beside each training conversation, at least 1.
        mask: The probability that a word becomes ``mask_text``; in [0, 1], as the others.
        mask_text: What stands for a masked word.
        dropout: The probability that a word is left out; one word always stays.
        swap: The probability that a word changes places with the next one.
        typos: The probability that a letter is mistyped: a neighbouring key (of a QWERTY keyboard), two letters the wrong
            way round, one left out, or one doubled; Han and kana are left alone.
        paraphrase: The dotted path of a function ``(text: str) -> str`` or ``(text, rng)`` with a :class:`random.Random` to
            draw from; such as a translation there and back.

    Raises:
        ConfigError: A value is out of range, nothing would be augmented, or there is no such function.
    """

    copies: int = 1
    mask: float = 0.0
    mask_text: str = "_"
    dropout: float = 0.0
    swap: float = 0.0
    typos: float = 0.0
    paraphrase: str | None = None

    def __post_init__(self) -> None:
        if self.copies < 1:
            raise ConfigError(f"data.augmentation.copies must be at least 1, not {self.copies}; for none, leave data.augmentation out")
        for name in _PROBABILITIES:
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"data.augmentation.{name} is a probability and must be from 0 to 1, not {getattr(self, name)}")
        if not any(getattr(self, name) for name in _PROBABILITIES) and self.paraphrase is None:
            raise ConfigError(
                "data.augmentation: nothing would be augmented; set mask, dropout, swap or typos above 0, or name a paraphrase function"
            )
        if not self.mask_text.strip():
            raise ConfigError("data.augmentation.mask_text is blank; give it something to put in place of a word, or use dropout")
        if self.mask_text != "_" and not self.mask:
            raise ConfigError(f"data.augmentation.mask_text {self.mask_text!r} is never used; set data.augmentation.mask above 0")
        if self.paraphrase is not None:
            _paraphraser(self.paraphrase)

    def copies_of(self, conversation: Conversation, *, seed: int) -> list[Conversation]:
        """Make the copies of a conversation.

        What they say depends on the seed, the conversation's split key and the copy's number alone, so that it is the same in
        every order, process and run.

        Args:
            conversation: A training conversation.
            seed: Another seed, other copies.

        Returns: the copies, their ids ending in ``#1``, ``#2`` and so on, in the original's group; none where no user speaks,
            since a copy would be a mere repetition.

        Raises:
            DataError: The paraphrase function returns no text.
        """
        if not any(message.role == "user" for message in conversation.messages):
            return []
        key = conversation.split_key
        copies = []
        for number in range(1, self.copies + 1):
            digest = blake2b(json.dumps([seed, key, number]).encode(), digest_size=16).digest()
            rng = random.Random(int.from_bytes(digest, "big"))
            messages = tuple(
                replace(message, content=self._augment(message.content, rng)) if message.role == "user" else message
                for message in conversation.messages
            )
            copies.append(replace(conversation, messages=messages, id=f"{conversation.id}#{number}", group=key))
        return copies

    def _augment(self, text: str, rng: random.Random) -> str:
        if not text.strip():
            return text
        if self.paraphrase is not None:
            text = self._paraphrase(text, rng)
        words, gaps = _WORD.findall(text), _WORD.split(text)  # a gap before, between and after all words
        if self.typos:
            words = [word if _CJK.match(word) else mistype(word, probability=self.typos, rng=rng) for word in words]
        if self.swap:
            _swap(words, self.swap, rng)
        if self.dropout:
            _drop(words, gaps, self.dropout, rng)
        if self.mask:
            words = [self.mask_text if rng.random() < self.mask else word for word in words]
        return gaps[0] + "".join(word + gap for word, gap in zip(words, gaps[1:], strict=True))

    def _paraphrase(self, text: str, rng: random.Random) -> str:
        assert self.paraphrase is not None
        function, takes_rng = _paraphraser(self.paraphrase)
        result = function(text, rng) if takes_rng else function(text)
        if not isinstance(result, str):
            raise DataError(f"data.augmentation: {self.paraphrase} returned a {type(result).__name__} for {text[:40]!r}; return a text")
        if not result.strip():
            raise DataError(f"data.augmentation: {self.paraphrase} returned nothing for {text[:40]!r}; return the text itself at least")
        return result


def build_augmentation(settings: Mapping[str, Any]) -> Augmentation:
    """Build what ``data.augmentation`` describes: the arguments of :class:`Augmentation` as a mapping.

    Raises:
        ConfigError: A setting is unknown or cannot be used, or nothing would be augmented.
    """
    return Augmentation(**check_settings("data.augmentation", settings, Augmentation))


def mistype(word: str, *, probability: float, rng: random.Random) -> str:
    """Mistype a word's letters, each with a probability; the case is kept, and the word never becomes empty.

    Args:
        word: A word; what is no letter stays.
        probability: For each letter, in [0, 1].
        rng: What to draw from.
    """
    typed, i = "", 0
    while i < len(word):
        letter, following = word[i], word[i + 1 : i + 2]
        i += 1
        if not letter.isalpha() or rng.random() >= probability:
            typed += letter
            continue
        ways = [letter + letter]
        if len(word) > 1:
            ways.append("")
        if letter.lower() in _neighbours():
            keys = _neighbours()[letter.lower()]
            key = keys[_below(len(keys), rng)]
            ways.append(key.upper() if letter.isupper() else key)
        swapped = following + letter
        if following.isalpha() and following != letter:
            ways.append(swapped)
        chosen = ways[_below(len(ways), rng)]
        typed += chosen
        i += chosen == swapped and following != letter
    return typed or word


def _swap(words: list[str], probability: float, rng: random.Random) -> None:
    i = 0
    while i < len(words) - 1:
        if rng.random() < probability:
            words[i], words[i + 1] = words[i + 1], words[i]
            i += 1  # a word moves once
        i += 1


def _drop(words: list[str], gaps: list[str], probability: float, rng: random.Random) -> None:
    dropped = [i for i in range(len(words)) if rng.random() < probability]
    if len(dropped) == len(words):
        del dropped[_below(len(dropped), rng)]
    for i in reversed(dropped):
        # Of the gaps at both sides the text's ends stay, then line breaks.
        is_first, is_last = i == 0, i == len(words) - 1
        before, after = gaps[i], gaps[i + 1]
        keeps_after = is_last or (not is_first and (after.count("\n"), len(after)) > (before.count("\n"), len(before)))
        gaps[i : i + 2] = [after if keeps_after else before]
        del words[i]


def _below(n: int, rng: random.Random) -> int:
    # random() alone is promised to draw the same in every version of Python.
    return int(rng.random() * n)


@cache
def _neighbours() -> dict[str, str]:
    """For each letter of a QWERTY keyboard the letters around it; each row is half a key to the right of the one above."""
    places = {letter: (column + row / 2, row) for row, letters in enumerate(_ROWS) for column, letter in enumerate(letters)}
    return {
        letter: "".join(other for other, (u, v) in places.items() if other != letter and abs(u - x) <= 1 and abs(v - y) <= 1)
        for letter, (x, y) in places.items()
    }


@cache
def _paraphraser(path: str) -> tuple[Callable[..., Any], bool]:
    """A user's function, and whether it takes something to draw from."""
    function = find_function(path, setting="data.augmentation.paraphrase")
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:  # written in C, without a signature
        return function, False
    needed = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    takes_rng = len(needed) == 2 or [p.name for p in parameters[1:2]] == ["rng"]
    if len(needed) > 2:
        raise ConfigError(
            f"data.augmentation.paraphrase: {path} needs {len(needed)} arguments; it may take the text, and an rng to draw from"
        )
    return function, takes_rng
