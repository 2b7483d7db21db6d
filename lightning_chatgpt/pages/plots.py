"""Plots for pages: inline SVG whose text is text, so that the page's CSS gives it font and colour.

Sizes are in inches, of 72 SVG units each.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from lightning_chatgpt.plots import COLOURS, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK = "#808080"  # reads on white and on black, where the page's CSS is lost
_WIDTH = 5.2
_LABEL_LENGTH = 26


@dataclass(frozen=True, slots=True)
class Plot:
    """One plot: its title and a sentence below it, as the page shows them, and the picture."""

    title: str
    note: str
    svg: Markup


def bars(
    title: str,
    series: Mapping[str, Mapping[str, float]],
    *,
    axis: str,
    label: Callable[[str, str], str],
    category: str = "",
    chosen: str | None = None,
    note: str = "",
    is_share: bool = False,
) -> Iterator[Plot]:
    """Horizontal bars, those of one category together; no plot where there is nothing but zeros.

    Args:
        title: What is shown, in words.
        series: For each colour the length of each category's bar.
        axis: What the bars measure.
        label: What stands beside the bar of a series and a category.
        category: What the categories are.
        chosen: The category that is set; the others' bars are paler.
        note: A sentence below the plot.
        is_share: Whether bars are fractions of 1.
    """
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    categories = list(dict.fromkeys(key for values in series.values() for key in values))
    if not any(any(values.values()) for values in series.values()):
        return
    colours = [COLOURS[i % len(COLOURS)] for i in range(len(series))]
    thickness = 0.8 / len(series)
    longest = max(max(values.values(), default=0.0) for values in series.values())
    n_label = max(len(label(name, key)) for name, values in series.items() for key in values)

    def draw(axes: Axes) -> None:
        for i, (name, values) in enumerate(series.items()):
            for key, value in values.items():
                place = categories.index(key) + (i - (len(series) - 1) / 2) * thickness
                alpha = 0.45 if chosen in categories and key != chosen else 1.0
                axes.barh(place, value, thickness * 0.9, color=colours[i], alpha=alpha)
                axes.annotate(label(name, key), (value, place), (4, 0), textcoords="offset points", va="center", fontsize=9)
        axes.set_yticks(range(len(categories)), [_clean(key) + " (chosen)" * (key == chosen) for key in categories])
        axes.set_ylim(len(categories) - 0.45, -0.55)
        axes.set_xlim(0, longest * (1.06 + 0.032 * n_label))  # room for the label beside the longest bar
        axes.set(xlabel=axis, ylabel=category)
        axes.xaxis.set_major_formatter((lambda x, _: f"{x:.0%}" if x <= 1 else "") if is_share else "{x:,.0f}")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.tick_params(axis="y", length=0)
        if len(series) > 1:
            patches = [Patch(color=colour, label=_clean(name)) for colour, name in zip(colours, series, strict=True)]
            axes.figure.legend(handles=patches, loc="outside upper left", ncols=3, frameon=False)

    data = "; ".join(f"{name}, {key}: {label(name, key)}" for name, values in series.items() for key in values)
    height = 0.75 + (0.3 if len(series) > 1 else 0) + len(categories) * (0.14 + 0.2 * len(series))
    yield plot(title, note, draw, height=height, data=data)


def plot(title: str, note: str, draw: Callable[[Axes], None], *, height: float, data: str) -> Plot:
    """Draw on axes of their own, without pyplot and without a trace in matplotlib's settings.

    Args:
        title: What is shown; it salts the ids of the SVG too, which have to differ within the page.
        note: A sentence below the plot.
        draw: Draws.
        height: In inches.
        data: The numbers in words, for who does not see the plot.
    """
    from matplotlib.figure import Figure

    settings: dict[str, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": ascii(title),
        "text.parse_math": False,  # a source may be called $x$
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
    }
    with styled(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # the browser has a font for it
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        draw(figure.add_subplot())
        svg = _svg(figure)
    alt = escape(" ".join(filter(None, [f"{title}.", note, data])))
    return Plot(title, note, Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{alt}" ', 1)))


def _svg(figure: Figure) -> str:
    """A figure as an inline SVG element that takes the width it is given."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg ") :]
    svg = re.sub(r'(?<= )(?:width|height)="[^"]*" ', "", svg, count=2)
    svg = re.sub(r"\s*<defs>\s*<style[^>]*>[^<]*</style>\s*</defs>", "", svg, count=1)  # it would hold for the whole page
    return re.sub(r'<g id="[^"]*"(/?)>', r"<g\1>", svg)  # nothing refers to these, and each plot has the same


def _clean(label: str) -> str:
    """A label from the data, on one line of bounded length."""
    label = "".join(c if c.isprintable() else "\ufffd" for c in label)
    half = _LABEL_LENGTH // 2
    return label if len(label) <= _LABEL_LENGTH else f"{label[: half - 1]}…{label[-half:]}"
