"""Lists of words that a report looks for in what is said."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from pathlib import Path

from lightning_chatgpt.data.words import read_word_lines, word_entries, words_pattern
from lightning_chatgpt.errors import ConfigError

BUILTIN = "builtin"  # what ships with the package, in place of a file's name

_FILE = Path(__file__).with_name("words.txt")


class WordList:
    """Words and phrases to look for: whole words in any case, also in scripts that write no spaces.

    Args:
        entries: The words; blank ones are left out, and of equal ones all but the first.

    Attributes:
        entries: Those that are looked for.

    Raises:
        ConfigError: There are none.
    """

    def __init__(self, entries: Iterable[str]) -> None:
        folded = {_fold(entry): entry for entry in reversed(word_entries(entries))}
        if not folded:
            raise ConfigError("fairness.words has no words to look for; write one a line")
        self.entries = tuple(reversed(folded.values()))
        self._folded = folded
        self._pattern = words_pattern(folded)

    def find(self, text: str) -> list[str]:
        """Each occurrence of a word, as the word stands in the list, in order."""
        return [self._folded[_fold(match[0])] for match in self._pattern.finditer(text.casefold())]

    def is_in(self, text: str) -> bool:
        """Whether a text holds any of the words."""
        return self._pattern.search(text.casefold()) is not None


def read_words(name: str = BUILTIN) -> WordList:
    """Read ``fairness.words``: a UTF-8 file of one word or phrase a line, or the list that ships with the package.

    Raises:
        ConfigError: The file cannot be read, or holds no words.
    """
    return WordList(read_word_lines(str(_FILE) if name == BUILTIN else name, setting="fairness.words"))


def _fold(text: str) -> str:
    return unicodedata.normalize("NFC", " ".join(text.split()).casefold())
