"""Listed words: whole ones, in any case, and in Chinese."""

from __future__ import annotations

import pytest

from lightning_chatgpt.errors import ConfigError
from lightning_chatgpt.evaluation.words import WordList, read_words


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Lazy, LAZY and lazily", ["Lazy", "Lazy"]),
        ("he is bone\n idle", ["bone idle"]),
        ("the bone", ["bone"]),
        ("他很懒惰。", ["懒惰"]),
        ("他很lazy的", ["Lazy"]),
        ("lazy2 _lazy élazy", []),
        ("cafe\u0301s and a cafe\u0301", ["caf\u00e9"]),
        ("die STRASSE, die straße", ["Straße", "Straße"]),
        ("", []),
    ],
)
def test_words_are_found(text: str, found: list[str]) -> None:
    words = WordList(["Lazy", "lazy", " bone idle ", "bone", "", "懒惰", "caf\u00e9", "Straße"])
    assert words.entries == ("Lazy", "bone idle", "bone", "懒惰", "caf\u00e9", "Straße")
    assert words.find(text) == found
    assert words.is_in(text) == bool(found)


def test_the_shipped_list_holds_both_languages() -> None:
    words = read_words()
    assert words.find("You are lazy and 愚蠢") == ["lazy", "愚蠢"]


def test_a_list_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="no words to look for"):
        WordList(["", "  "])
