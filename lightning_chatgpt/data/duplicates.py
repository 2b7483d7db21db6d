"""Texts seen before: near duplicates among the training conversations, and held-out ones that leaked into them.

Shapes: N words of a buffer, C conversations in it, G n-grams, H held-out conversations.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_chatgpt.data.redaction import clean_package
from lightning_chatgpt.errors import ConfigError

CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003347f"  # Han and kana, for use within [ ]

_WORD = re.compile(rf"[{CJK}]|[^\W{CJK}]+")
_ASCII_WORD = re.compile(r"\w+", re.ASCII)
_SHINGLE_WORDS = 5
_SHINGLE_CHARS = 8
_LONG = 50  # words from which on a held-out conversation is compared by 13-grams
_LONG_GRAM = 13
_SHORT_GRAM = 8
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no bit of a word's hash is lost
_BUFFER_CHARS = 1 << 20
_BUFFER_CONVERSATIONS = 1 << 16
_WORDS_KEPT = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class DuplicateSettings:
    """How repeated conversations are found, after all cleaning.

    Args:
        near: Near duplicates count too, not only conversations that say exactly the same.
        threshold: From which Jaccard similarity on, of 1, texts are near duplicates.
        n_permutations: How many hashes a text is compared by; more are slower and more exact.

    Raises:
        ConfigError: A number is out of range, or given without ``near``.
    """

    near: bool = False
    threshold: float = 0.8
    n_permutations: int = 128

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ConfigError(f"data.cleaning: duplicates.threshold must be between 0 and 1, not {self.threshold}; equal ones go anyway")
        if not 16 <= self.n_permutations <= 4096:
            raise ConfigError(f"data.cleaning: duplicates.n_permutations must be from 16 to 4096, not {self.n_permutations}")
        if not self.near and (self.threshold, self.n_permutations) != (0.8, 128):
            raise ConfigError("data.cleaning: duplicates.threshold and n_permutations are for near duplicates; add near: true")


class NearDuplicates:
    """Remembers texts, and finds the one that a new text nearly repeats.

    Texts are compared as sets of 5 words in a row, those of fewer words as sets of 8 characters in a row; never one kind with
    the other. About 1.5 kB are kept for each text.

    Source: Broder 1997, On the resemblance and containment of documents; the hashing is datasketch's MinHashLSH.

    Args:
        threshold: From which Jaccard similarity on, of 1, two texts are near duplicates; it is estimated with a standard
            error of at most ``0.5 / sqrt(n_permutations)``.
        n_permutations: How many hashes a text is compared by.

    Raises:
        ConfigError: datasketch is not installed.
    """

    def __init__(self, threshold: float = 0.8, n_permutations: int = 128) -> None:
        self.threshold = threshold
        self.n_permutations = n_permutations
        self._datasketch = clean_package("datasketch")
        # A candidate too many is refused below, one too few is lost: the index is tuned for recall.
        try:
            self._index = self._datasketch.MinHashLSH(threshold=threshold, num_perm=n_permutations, weights=(0.1, 0.9))
        except ValueError:
            raise ConfigError(
                f"data.cleaning: duplicates.threshold {threshold} is too high for {n_permutations} permutations; raise n_permutations"
            ) from None
        self._keys: list[int] = []
        self._signatures: list[Any] = []

    def first_like(self, key: int, text: str) -> int | None:
        """Look for a text that came before; remember this one if there is none.

        Args:
            key: What the text is known by.
            text: The text; case and punctuation do not matter from five words on.

        Returns: the key of the first remembered text that this one nearly repeats; None if there is none.
        """
        signature = self._datasketch.MinHash(num_perm=self.n_permutations)
        signature.update_batch(shingle.encode() for shingle in sorted(shingles(text)))
        candidates: list[int] = sorted(self._index.query(signature))
        for number in candidates:
            if signature.jaccard(self._signatures[number]) >= self.threshold:
                return self._keys[number]
        self._index.insert(len(self._keys), signature, check_duplication=False)
        self._keys.append(key)
        self._signatures.append(signature)
        return None


class LeakCheck:
    """Measures how much of each held-out conversation stands in the training conversations, by n-grams of words.

    A word is a run of letters and digits, its case folded; each Han or kana character is one. The n-grams run over the
    borders of messages but not of conversations. n is 13, as in Brown et al. 2020 (GPT-3), appendix C; 8 for a held-out
    conversation of fewer than 50 words, as in Chowdhery et al. 2022 (PaLM). One of fewer than 8 words is a single n-gram,
    found only where a training conversation says exactly that and no more.

    Words are compared by 64-bit hashes. The memory used grows with the held-out conversations, not with the training set.

    Args:
        held_out: The contents of each held-out conversation's messages, without system messages.
    """

    def __init__(self, held_out: Iterable[Sequence[str]]) -> None:
        self._hashes = _WordHashes()
        self._buffer: list[str] = []
        self._buffered_chars = 0
        ids, lengths = self._words(["\n".join(contents) for contents in held_out])
        grams = np.select([lengths >= _LONG, lengths >= _SHORT_GRAM], [_LONG_GRAM, _SHORT_GRAM], lengths)  # (H,)
        self._n_held_out = len(lengths)
        # One that says no word is no n-gram either.
        self._tables = {int(n): _Table(ids, lengths, int(n), grams == n) for n in np.unique(grams) if n}

    def see(self, contents: Sequence[str]) -> None:
        """Take a training conversation into account.

        Args:
            contents: Its messages' contents, without system messages.
        """
        text = "\n".join(contents)
        self._buffer.append(text)
        self._buffered_chars += len(text)
        if self._buffered_chars >= _BUFFER_CHARS or len(self._buffer) >= _BUFFER_CONVERSATIONS:
            self._flush()

    def shares(self) -> npt.NDArray[np.float64]:
        """How much of each held-out conversation was seen so far.

        Returns: for each, how many of its n-grams (one a position) stand in a training conversation, divided by how many there
            are; 0 for one without words; shape (H,).
        """
        self._flush()
        shares = np.zeros(self._n_held_out)
        for table in self._tables.values():
            shares += table.shares(self._n_held_out)
        return shares

    def _flush(self) -> None:
        if self._buffer and self._tables:
            ids, lengths = self._words(self._buffer)
            for table in self._tables.values():
                table.see(ids, lengths)
        self._buffer = []
        self._buffered_chars = 0

    def _words(self, texts: list[str]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
        """The hashes of all words, one text after the other, shape (N,), and how many words each text has, shape (C,)."""
        if len(self._hashes) > _WORDS_KEPT:
            self._hashes.clear()
        lengths = np.zeros(len(texts), dtype=np.int64)
        parts: list[npt.NDArray[np.uint64]] = [np.zeros(0, dtype=np.uint64)]
        for i, text in enumerate(texts):
            words = find_words(text)
            lengths[i] = len(words)
            parts.append(np.fromiter(map(self._hashes.__getitem__, words), dtype=np.uint64, count=len(words)))
        return np.concatenate(parts), lengths


def find_words(text: str) -> list[str]:
    """The words of a text, their case folded; each Han or kana character is one."""
    text = text.casefold()
    return (_ASCII_WORD if text.isascii() else _WORD).findall(text)


def shingles(text: str) -> set[str]:
    """What two texts are compared by: all 5 words in a row, or, where there are fewer words, all 8 characters in a row.

    Case does not matter, nor, from five words on, punctuation and spaces.
    """
    words = find_words(text)
    if len(words) >= _SHINGLE_WORDS:
        return {" ".join(words[i : i + _SHINGLE_WORDS]) for i in range(len(words) - _SHINGLE_WORDS + 1)}
    text = text.casefold()
    return {text[i : i + _SHINGLE_CHARS] for i in range(max(1, len(text) - _SHINGLE_CHARS + 1))}


class _WordHashes(dict[str, int]):
    """Words to 64-bit numbers, the same on every machine; computed when first asked for."""

    def __missing__(self, word: str) -> int:
        number = self[word] = int.from_bytes(blake2b(word.encode(), digest_size=8).digest(), "little")
        return number


class _Table:
    """The held-out n-grams of one n, and which of them were seen.

    Args:
        ids: Word hashes of all held-out conversations; shape (N,).
        lengths: How many words each has; shape (H,).
        n: Words in an n-gram.
        chosen: Which conversations are compared by this n; shape (H,).
    """

    def __init__(self, ids: npt.NDArray[np.uint64], lengths: npt.NDArray[np.int64], n: int, chosen: npt.NDArray[np.bool_]) -> None:
        self.n = n
        owner = np.repeat(np.arange(len(lengths)), lengths)  # (N,)
        positions = self._positions(lengths)
        positions = positions[chosen[owner[positions]]]
        self._owner = owner[positions]  # (G,)
        self._grams, self._which = np.unique(self._hash(ids, positions), return_inverse=True)
        self._seen = np.zeros(len(self._grams), dtype=np.bool_)

    def see(self, ids: npt.NDArray[np.uint64], lengths: npt.NDArray[np.int64]) -> None:
        """Mark what stands in these training conversations; shapes (N,) and (C,)."""
        # Sorted needles keep searchsorted within the cache.
        grams = np.sort(self._hash(ids, self._positions(lengths)))
        places = np.minimum(np.searchsorted(self._grams, grams), len(self._grams) - 1)
        self._seen[places[self._grams[places] == grams]] = True

    def shares(self, n_held_out: int) -> npt.NDArray[np.float64]:
        """The fraction seen of each conversation's n-grams, 0 where another n is used; shape (H,)."""
        seen = np.bincount(self._owner[self._seen[self._which]], minlength=n_held_out)
        return seen / np.maximum(np.bincount(self._owner, minlength=n_held_out), 1)

    def _positions(self, lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Where an n-gram begins that ends within its conversation; for a short n, where a conversation of n words begins."""
        ends: npt.NDArray[np.int64] = np.cumsum(lengths)  # (C,)
        positions: npt.NDArray[np.int64]
        if self.n < _SHORT_GRAM:
            positions = (ends - lengths)[lengths == self.n]
        else:
            positions = np.flatnonzero(np.repeat(ends, lengths) - np.arange(lengths.sum()) >= self.n)
        return positions

    def _hash(self, ids: npt.NDArray[np.uint64], positions: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
        """A polynomial in the word hashes, modulo 2**64 (Karp and Rabin 1987)."""
        grams = np.zeros(len(positions), dtype=np.uint64)
        for k in range(self.n):
            grams = grams * _BASE + ids[positions + k]
        return grams
