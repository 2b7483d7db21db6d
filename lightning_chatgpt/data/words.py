"""Words of a list, found in text: whole words in any case, and right in scripts that write no spaces."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from lightning_chatgpt.data.duplicates import CJK
from lightning_chatgpt.errors import ConfigError

_UNSPACED = CJK + "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u1100-\u11ff\uac00-\ud7af"  # Thai, Lao, Burmese, Khmer, Hangul


def read_word_lines(file: str, *, setting: str) -> list[str]:
    """The lines of a UTF-8 file of words, one a line.

    Args:
        file: The file.
        setting: Where its name was given, for the error.

    Raises:
        ConfigError: It cannot be read.
    """
    try:
        return Path(file).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{setting} {file} cannot be read ({error}); give a UTF-8 text file") from None


def word_entries(lines: Iterable[str]) -> list[str]:
    """Each word or phrase once, composed (NFC), without spaces around it, in order."""
    return list(dict.fromkeys(unicodedata.normalize("NFC", line.strip()) for line in lines if line.strip()))


def words_pattern(entries: Iterable[str]) -> re.Pattern[str]:
    """What finds any of some words or phrases: whole words in any case; in scripts without spaces (and Hangul) anywhere.

    The longest counts where several begin at one place: a phrase, not the word it begins with. A letter of a script without
    spaces is no part of a word of another: ``lazy`` is found in ``他很lazy``.
    """
    return re.compile("|".join(map(_word_pattern, sorted(entries, key=lambda entry: (-len(entry), entry)))), re.IGNORECASE)


def _word_pattern(entry: str) -> str:
    # Both normal forms, so that a composed é finds a decomposed one.
    forms = [unicodedata.normalize(form, entry) for form in ("NFC", "NFD")]
    pattern = "|".join(r"\s+".join(map(re.escape, form.split())) for form in dict.fromkeys(forms))
    pattern = f"(?:{pattern})"
    letter = rf"(?![{_UNSPACED}])[\w{_marks()}]"
    return pattern if re.search(f"[{_UNSPACED}]", entry) else rf"(?<!{letter}){pattern}(?!{letter})"


@cache
def _marks() -> str:
    # Python's \w leaves out the vowel signs of India and accents on their own, which are as much of a word as letters.
    return "".join(chr(i) for i in range(0x300, 0x10000) if unicodedata.category(chr(i))[0] == "M")
