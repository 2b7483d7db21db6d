"""Personal data in a text: found by kind, and replaced by placeholders that keep the kind."""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from importlib import import_module
from typing import Any, Literal, get_args

from lightning_chatgpt.errors import ConfigError

Kind = Literal["key", "email", "iban", "card", "ip", "phone"]
# A key may hold anything, an IBAN a card number, a card number a phone number: whatever can hold another comes first.
KINDS: tuple[Kind, ...] = get_args(Kind)

_LETTER = "A-Za-z\u00c0-\u024f\u0370-\u052f"  # Latin, Greek, Cyrillic; not Han: Chinese puts no space before an address
_LOCAL = rf"[0-9{_LETTER}_.%+'-]"
_EMAIL = re.compile(
    rf"(?<!{_LOCAL})(?!git@){_LOCAL}{{1,64}}@(?![0-9.]+x\.)"  # neither git@github.com nor logo@2x.png
    rf"(?:[0-9{_LETTER}](?:[0-9{_LETTER}-]{{0,61}}[0-9{_LETTER}])?\.)+(?:xn--[a-z0-9-]{{2,59}}|[{_LETTER}]{{2,63}})"
)
_KEY = re.compile(
    r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----.{1,16384}?-----END (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----"
    r"|(?<![A-Za-z0-9_-])(?:"
    r"eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*"  # a JWT: its header and its payload are JSON in base64, which begin with a brace
    r"|sk-(?=[\w-]{0,200}[0-9])[\w-]{20,}"  # OpenAI, Anthropic; without a digit it is a name such as a CSS class
    r"|[rs]k_(?:live|test)_[A-Za-z0-9]{16,}"  # Stripe
    r"|gh[oprsu]_[A-Za-z0-9]{36,}|github_pat_\w{22,}|glpat-[\w-]{20,}"
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Z0-9])"
    r"|xox[abeprs]-[A-Za-z0-9-]{10,}"  # Slack
    r"|AIza[\w-]{35}"  # Google
    r"|hf_[A-Za-z0-9]{30,}"
    r")",
    re.DOTALL | re.ASCII,
)
_IBAN = re.compile(r"(?<![0-9A-Za-z])[A-Z]{2}[0-9]{2}(?:[ -]?[0-9A-Z]){11,30}", re.IGNORECASE | re.ASCII)
_DIGIT_GROUPS = re.compile(r"(?<![0-9A-Za-z_+.,])(?<![0-9A-Za-z]-)[0-9]{4,}(?:[ -][0-9]{3,})*(?![0-9A-Za-z_]|[.,][0-9])")
_IPV4 = re.compile(r"(?<![0-9A-Za-z_.])(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?![0-9A-Za-z_]|\.[0-9])")
_IPV6 = re.compile(
    r"(?<![0-9A-Za-z_.])(?<![0-9A-Fa-f:]:)(?:[0-9A-Fa-f]{0,4}:){2,7}(?:(?:[0-9]{1,3}\.){3}[0-9]{1,3}|[0-9A-Fa-f]{0,4})"
    r"(?![0-9A-Za-z_:]|\.[0-9])"
)
_PHONE_DIGITS = 4  # no country's numbers are shorter; Niue's are that short
_VERSION = re.compile(r"\b(?:version|release|build|firmware|ver\.?|v\.?)[ :=]{0,2}\Z", re.IGNORECASE)


def clean_package(name: str) -> Any:
    """Import a module of the packages that cleaning needs, which are installed only where they are asked for.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"data.cleaning needs the package {name.partition('.')[0]}, which cannot be imported ({error}): "
            "pip install 'lightning-chatgpt[clean]'"
        ) from None


def redact(text: str, *, kinds: Collection[Kind] = KINDS, country: str = "US") -> tuple[str, Counter[Kind]]:
    """Replace personal data by ``<EMAIL>``, ``<PHONE>``, ``<CARD>``, ``<IBAN>``, ``<IP>`` and ``<KEY>``.

    What is checked, not only looked at: IBANs (ISO 13616) and the Luhn digit of card numbers (ISO/IEC 7812) by
    python-stdnum, phone numbers by phonenumbers, IP addresses by :mod:`ipaddress`. Loopback and unspecified addresses
    (127.0.0.1, ::1) and those that end in .0.0 (networks and versions) tell nothing of anybody and stay. Names of people
    and where they live are not found.

    Args:
        text: Any text.
        kinds: What to look for.
        country: Whose phone numbers may stand without a country code: two letters, such as GB.

    Returns: the text, and how many of each kind were replaced.

    Raises:
        ConfigError: A package that a kind needs is not installed.
    """
    counts: Counter[Kind] = Counter()
    for kind in KINDS:
        if kind not in kinds:
            continue
        pieces, end = [], 0
        for start, stop in _FINDERS[kind](text, country):
            pieces += [text[end:start], f"<{kind.upper()}>"]
            counts[kind] += 1
            end = stop
        text = "".join([*pieces, text[end:]])
    return text, counts


def _find_keys(text: str, country: str) -> Iterator[tuple[int, int]]:
    return (match.span() for match in _KEY.finditer(text))


def _find_emails(text: str, country: str) -> Iterator[tuple[int, int]]:
    return (match.span() for match in _EMAIL.finditer(text))


def _find_ibans(text: str, country: str) -> Iterator[tuple[int, int]]:
    end = 0
    while match := _IBAN.search(text, end):
        start, end = match.start(), match.start() + 4
        # The words that follow look like more of it.
        for stop in range(match.end(), start + 14, -1):
            if text[stop - 1].isalnum() and not text[stop : stop + 1].isalnum() and _is_iban(text[start:stop]):
                yield start, stop
                end = stop
                break


def _is_iban(text: str) -> bool:
    return bool(clean_package("stdnum.iban").is_valid(text))


def _find_cards(text: str, country: str) -> Iterator[tuple[int, int]]:
    is_luhn = clean_package("stdnum.luhn").is_valid
    for match in _DIGIT_GROUPS.finditer(text):
        groups = [(match.start() + group.start(), match.start() + group.end()) for group in re.finditer("[0-9]+", match[0])]
        first = 0
        while first < len(groups):
            for last in range(min(len(groups), first + 6), first, -1):
                start, stop = groups[first][0], groups[last - 1][1]
                digits = re.sub("[ -]", "", text[start:stop])
                # No card begins with 0, 1, 20 or 21, but milliseconds, padded numbers and lists of years do.
                if 13 <= len(digits) <= 19 and digits[:2] not in {"20", "21"} and digits[0] not in "01" and is_luhn(digits):
                    yield start, stop
                    first = last - 1
                    break
            first += 1


def _find_addresses(text: str, country: str) -> Iterator[tuple[int, int]]:
    spans = [match.span() for match in _IPV6.finditer(text) if _is_address(match[0])]
    for match in _IPV4.finditer(text):
        inside = any(start <= match.start() < stop for start, stop in spans)
        if not inside and _is_address(match[0]) and not _VERSION.search(text, max(0, match.start() - 12), match.start()):
            spans.append(match.span())
    return iter(sorted(spans))


def _is_address(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    if address.is_loopback or address.is_unspecified or text.endswith(".0.0"):
        return False
    # 1::2 is a slice, dead::beef a C++ name, and eight pairs of digits the name of a device.
    return address.version == 4 or (any(len(group) > 2 for group in text.split(":")) and any(map(str.isdigit, text)))


def _find_phones(text: str, country: str) -> Iterator[tuple[int, int]]:
    if len(re.findall(r"\d", text)) < _PHONE_DIGITS:  # the matcher takes 2 microseconds a character
        return iter(())
    phonenumbers = clean_package("phonenumbers")
    matcher = phonenumbers.PhoneNumberMatcher(text, country, leniency=phonenumbers.Leniency.VALID)
    # Where cards are not looked for they stay; some would pass for German phone numbers.
    cards = list(_find_cards(text, country))
    return ((m.start, m.end) for m in matcher if not any(start < m.end and m.start < stop for start, stop in cards))


_FINDERS: dict[Kind, Callable[[str, str], Iterator[tuple[int, int]]]] = {
    "key": _find_keys,
    "email": _find_emails,
    "iban": _find_ibans,
    "card": _find_cards,
    "ip": _find_addresses,
    "phone": _find_phones,
}
