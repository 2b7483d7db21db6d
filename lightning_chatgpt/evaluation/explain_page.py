"""An explanation of a reply as one HTML page that opens from disk: no network, light and dark, readable on a phone.

The page is explain.html.jinja; everything that comes from the model is escaped there. All numbers stand in it as text; a few lines of
JavaScript choose which are shown, and colour the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_chatgpt.pages.render import render, token_text

_LEVELS = (0.9, 0.5, 0.2, 0.05)  # probabilities below which a token of the reply is coloured one step more
_N_MOVERS = 8
_PART = "⋯"  # in place of a token that is part of a character


def render_page(report: Mapping[str, Any]) -> str:
    """Render an explanation as a page.

    Args:
        report: What :meth:`lightning_chatgpt.evaluation.explain.Explanation.to_dict` gives; with ``is_own_reply``, whether the model said
            that itself; with ``command``, ``version`` and ``date`` where they are known.

    Returns: HTML, the same for the same report.
    """
    prompt, reply = report["prompt"], report["reply"]
    tokens = [{**token, "shown": token_text(token["text"] or _PART), "label": label(token["text"])} for token in [*prompt, *reply]]
    judged = []
    for token, row in zip(tokens[len(prompt) :], report["attributions"], strict=True):
        places = strongest(row, n=_N_MOVERS)
        judged.append(
            {
                **token,
                "level": sum(token["probability"] < bound for bound in _LEVELS),
                "alternatives": [{**one, "label": label(one["text"])} for one in token["alternatives"]],
                "movers": [{**tokens[place], "moved": row[place], "in_reply": place >= len(prompt)} for place in places],
                "rest": sum(row) - sum(row[place] for place in places),
                "n_rest": sum(map(bool, row)) - len(places),
            }
        )
    return render(
        "evaluation/explain.html.jinja",
        report=report,
        prompt=tokens[: len(prompt)],
        reply=judged,
        log_probability=sum(token["log_probability"] for token in reply),
        shares=[_shares(row[: len(prompt) + number]) for number, row in enumerate(report["attributions"])],
    )


def strongest(row: Sequence[float], *, n: int) -> list[int]:
    """The places of the tokens that moved one most, whichever way, the strongest first; those that moved it at all."""
    return [place for place in sorted(range(len(row)), key=lambda place: -abs(row[place]))[:n] if row[place]]


def label(text: str) -> str:
    """A token's text on one line: the spaces it begins with as ·, a line break as ↵, and ⋯ for part of a character."""
    leading, lines = token_text(text)
    return f"{'·' * len(leading)}{'↵'.join(lines)}" or _PART


def _shares(row: Sequence[float]) -> list[int]:
    """How strongly each token moved one, in percent of what moved it most."""
    most = max(map(abs, row), default=0.0) or 1.0
    return [round(100 * value / most) for value in row]
