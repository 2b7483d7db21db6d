"""Text as people would have typed it: nothing invisible, no stray spaces, characters in place of entities."""

from __future__ import annotations

import html
import re
import unicodedata
from html.entities import html5

# Arabic with Syriac and N'Ko, the scripts of India, Burmese, Khmer, Mongolian, and Arabic's presentation forms.
_JOINING = "\u0600-\u08ff\u0900-\u0dff\u1000-\u109f\u1780-\u18af\ufb50-\ufdff\ufe70-\ufefc"
_ENTITY = re.compile(r"&(#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
_LINE_END = re.compile("\r\n|[\r\v\f\x85\u2028\u2029]")
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f]")
_ZERO_WIDTH = re.compile("[\u00ad\u180e\u200b\u2060-\u2064\ufeff]")
_JOINERS = re.compile("[\u200c\u200d]+")
_SPACE = " \u00a0\u1680\u2000-\u200a\u202f\u205f\u3000"
_SPACES = re.compile(rf"(?<=\S)[{_SPACE}]+")  # within a line: what a line begins with is the indentation of code
_SPACES_AT_END = re.compile(rf"(?<![{_SPACE}\t])[{_SPACE}\t]+(?=\n)")


def decode_entities(text: str) -> str:
    """HTML entities become the characters they stand for."""
    return _ENTITY.sub(_character, text)


def drop_control(text: str) -> str:
    """Control characters go, but for tabs; line ends of any kind become line breaks."""
    return _CONTROL.sub("", _LINE_END.sub("\n", text))


def drop_zero_width(text: str) -> str:
    """Zero-width characters go, but for joiners that join something, as in RFC 5892, appendix A."""
    return _JOINERS.sub(_joiner, _ZERO_WIDTH.sub("", text))


def tidy_spaces(text: str) -> str:
    """Runs of spaces become one, those at line ends go, more than two line breaks in a row become two; indentation stays."""
    return re.sub("\n{3,}", "\n\n", _SPACES_AT_END.sub("", _SPACES.sub(" ", text)))


def _character(match: re.Match[str]) -> str:
    # Only what ends in a semicolon: html.unescape alone would turn &copy=1 of an address into ©=1.
    return html.unescape(match[0]) if match[1][0] == "#" or f"{match[1]};" in html5 else match[0]


def _joiner(match: re.Match[str]) -> str:
    before, after = match.string[: match.start()][-1:], match.string[match.end() : match.end() + 1]
    if not before:
        return ""
    within_word = re.fullmatch(f"[{_JOINING}]{{2}}", before + after) is not None
    after_virama = unicodedata.combining(before) == 9
    between_emoji = match[0][0] == "\u200d" and bool(after) and _may_be_emoji(before) and _may_be_emoji(after)
    return match[0][0] if within_word or after_virama or between_emoji else ""


def _may_be_emoji(character: str) -> bool:
    # Symbols, skin tones (Sk) and the variation selector; ^ and + are symbols too.
    return character == "\ufe0f" or (not character.isascii() and unicodedata.category(character) in {"So", "Sk", "Sm"})
