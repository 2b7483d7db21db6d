"""Data to an HTML page that opens from disk: what comes from the data is escaped, and nothing is asked for over the network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader

_CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}


class TokenText(NamedTuple):
    """A token's text, for the macro ``token_text``: the spaces it begins with, and the rest, cut at its line breaks."""

    leading: str
    lines: list[str]


def environment() -> Environment:
    """What pages are rendered with: templates by their file within the package, everything escaped, filters ``show`` and ``percent``."""
    loader = FileSystemLoader(Path(__file__).parent.parent)
    found = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    found.filters.update(show=show, percent=percent)
    return found


def render(template: str, **context: Any) -> str:
    """Render a page.

    Args:
        template: Its file within the package, such as ``data/report_page.html.jinja``.
        **context: What the template is given.

    Returns: HTML, the same for the same context.
    """
    # Half a UTF-16 character could not be written to a file.
    return environment().get_template(template).render(context).encode("utf-8", "replace").decode()


def token_text(text: str) -> TokenText:
    """Cut a token's text where something is to be seen that cannot be; control characters become pictures of them."""
    text = text.translate(_CONTROL_PICTURES)
    rest = text.lstrip(" ")
    return TokenText(text[: len(text) - len(rest)], rest.split("\n"))


def show(value: Any) -> str:
    """Plain data for people: thousands separators, yes and no, lists with commas."""
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {show(inner)}" for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(show, value))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def percent(share: float) -> str:
    """A share for people, with a decimal where it matters."""
    if 0 < share < 0.001:
        return "under 0.1%"
    return f"{share:.1%}" if 0 < share < 0.0995 or 0.9905 < share < 1 else f"{share:.0%}"
