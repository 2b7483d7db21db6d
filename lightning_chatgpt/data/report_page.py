"""A report on chat data as one HTML page that opens from disk: no network, no JavaScript, light and dark, readable on a phone.

The page is report_page.html.jinja; everything that comes from the data is escaped there. The plots are inline SVG whose text
is text, so that the page's CSS gives it font and colour. Sizes of plots are in inches, of 72 SVG units each.
"""

from __future__ import annotations

import io
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup, escape

from lightning_chatgpt.chat.faults import KINDS
from lightning_chatgpt.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK = "#808080"  # reads on white and on black, where the page's CSS is lost
_COLOURS = ("#3b82c4", "#d97b29", "#3f9f6b", "#9b6fc0", "#b8a02c")
_LIMIT_COLOUR = "#d1495b"
_WIDTH = 5.2
_MOST_BARS = 12
_LABEL_LENGTH = 26
_SHORT_EXAMPLE = 200  # tokens up to which an example is shown unfolded
_CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}

# What is counted in a part, and how it is told.
_COUNTS = {
    "items": "conversations",
    "examples": "examples made of them",
    "augmented": "augmented copies, their examples counted above",
    "tokens": "tokens the model reads",
    "supervised": "tokens it learns to say (supervised)",
    "longer": "conversations longer than max_length",
    "truncated": "conversations shortened by truncation",
    "lost": "supervised tokens lost by that",
    "cut": "conversations with a message cut in the middle",
    "skipped": "conversations too long and left out",
    "unsupervised": "conversations with nothing to learn, left out",
}


@dataclass(frozen=True, slots=True)
class Plot:
    """One plot: its title and a sentence below it, as the page shows them, and the picture."""

    title: str
    note: str
    svg: Markup


@dataclass(frozen=True, slots=True)
class ShownToken:
    """One token as the page shows it.

    Attributes:
        leading: The spaces it begins with.
        lines: The rest of its text, cut at its line breaks.
        is_learnt: Whether it counts in the loss.
        is_control: Whether it is a control token, which no text can spell.
        weight: Its loss weight where that is neither 0 nor 1, else empty.
        begins_weight: Whether the token before has another weight; only then is it written beside the token.
    """

    leading: str
    lines: list[str]
    is_learnt: bool
    is_control: bool
    weight: str
    begins_weight: bool


def render_page(report: Mapping[str, Any]) -> str:
    """Render a report as a page.

    Args:
        report: What :func:`lightning_chatgpt.data.report.describe` found, with ``command``, ``version`` and ``date``; only ``parts``
            has to be there. What has nothing to show is left out.

    Returns: HTML, the same for the same report.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"the report's page needs matplotlib for its plots, which cannot be imported ({error}): pip install 'lightning-chatgpt[report]'"
        ) from None
    parts: Mapping[str, Mapping[str, Any]] = report["parts"]
    settings = report.get("settings") or {}
    sources = report.get("sources") or {}
    environment = Environment(
        loader=PackageLoader("lightning_chatgpt", "data"), autoescape=True, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters.update(show=_show, percent=_percent)
    page = environment.get_template("report_page.html.jinja").render(
        report=report,
        parts=parts,
        counts={key: about for key, about in _COUNTS.items() if any(key in part for part in parts.values())},
        sources=sources,
        faults=list(_faults(sources)),
        cleaning=list(_cleaning(sources)),
        examples=[(example, _tokens(example["tokens"])) for example in report.get("examples") or ()],
        short_example=_SHORT_EXAMPLE,
        plots={
            "shape": [*_lengths(parts, settings.get("max_length")), *_turns(parts)],
            "mix": [*_roles(parts), *_sources(parts)],
            "fit": [*_policies(parts, settings.get("truncation")), *_padding(parts, packing=bool(settings.get("packing")))],
        },
    )
    return page.encode("utf-8", "replace").decode()  # half a UTF-16 character could not be written to a file


# Tables and examples.


def _faults(sources: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str, str]]:
    """For each source and kind of fault: source, kind, what it is, what was done, the first places."""
    for name, source in sources.items():
        faults = source.get("faults") or {}
        for kind, counts in (faults.get("counts") or {}).items():
            known = KINDS.get(kind)
            done = [f"{counts['skip']:,} left out"] if counts.get("skip") else []
            if counts.get("fix"):
                done.append(f"{counts['fix']:,} mended" + (f": {known.fix}" if known else ""))
            places = (faults.get("places") or {}).get(kind) or ()
            yield name, kind, known.about if known else "", "; ".join(done), ", ".join(places)


def _cleaning(sources: Mapping[str, Any]) -> Iterator[tuple[str, str, int, int, str]]:
    """For each source and step of cleaning: source, step, conversations changed and left out, what else was counted."""
    for name, source in sources.items():
        for step in source.get("cleaning") or ():
            others = {key: count for key, count in step.items() if key not in ("step", "changed", "dropped")}
            yield name, step.get("step", ""), step.get("changed", 0), step.get("dropped", 0), _show(others)


def _tokens(tokens: Sequence[Sequence[Any]]) -> list[ShownToken]:
    shown = []
    previous = 0.0
    for text, weight, is_control in tokens:
        text = str(text).translate(_CONTROL_PICTURES)
        rest = text.lstrip(" ")
        written = "" if weight in (0, 1) else f"{weight:g}"
        leading = text[: len(text) - len(rest)]
        shown.append(ShownToken(leading, rest.split("\n"), weight != 0, bool(is_control), written, weight != previous))
        previous = weight
    return shown


def _show(value: Any) -> str:
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
        return ", ".join(f"{key} {_show(inner)}" for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_show, value))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _percent(share: float) -> str:
    if 0 < share < 0.001:
        return "under 0.1%"
    return f"{share:.1%}" if 0 < share < 0.0995 or 0.9905 < share < 1 else f"{share:.0%}"


# Plots.


def _lengths(parts: Mapping[str, Mapping[str, Any]], max_length: Any) -> Iterator[Plot]:
    from matplotlib.ticker import MaxNLocator

    for name, part in parts.items():
        bins = part.get("lengths") or ()
        n_all = sum(count for _, _, count in bins)
        if not n_all:
            continue
        title = f"{name}: how long the conversations are"
        note, end = "", max(stop for _, stop, _ in bins)
        if isinstance(max_length, int):
            # Encoding counts exactly; the bins can only say how many may be longer.
            n_long = part.get("longer", sum(count for start, _, count in bins if start > max_length))
            share = _percent(n_long / n_all) if n_long else ""
            note = f"{n_long:,} of {n_all:,} ({share}) are" if n_long else f"None of {n_all:,} is"
            note += f" longer than max_length, {max_length:,} tokens" + (" (the dashed line)." if max_length < 1.5 * end else ".")

        def draw(axes: Axes, bins: Any = bins, end: int = end) -> None:
            starts, stops, counts = zip(*((max(start, 1), stop, count) for start, stop, count in bins), strict=True)
            widths = [stop - start for start, stop in zip(starts, stops, strict=True)]
            axes.bar(starts, counts, width=widths, align="edge", color=_COLOURS[0], edgecolor="#ffffff40", linewidth=0.4)
            axes.set_xscale("log", base=2)  # chats range from a few tokens to tens of thousands
            axes.set(xlabel="tokens of the whole conversation", ylabel="conversations")
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.yaxis.set_major_formatter("{x:,.0f}")
            axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
            if isinstance(max_length, int) and max_length < 1.5 * end:
                axes.axvline(max_length, color=_LIMIT_COLOUR, linestyle="--", linewidth=1.5)

        yield _plot(title, note, draw, height=2.6, data="; ".join(f"{start} to {stop}: {count}" for start, stop, count in bins if count))


def _turns(parts: Mapping[str, Mapping[str, Any]]) -> Iterator[Plot]:
    found = {name: {int(n): count for n, count in (part.get("turns") or {}).items()} for name, part in parts.items()}
    numbers = sorted({n for counts in found.values() for n in counts})
    last = numbers[_MOST_BARS - 1] if len(numbers) > _MOST_BARS else None
    series: dict[str, Counter[str]] = {}
    for name, counts in found.items():
        series[name] = Counter({str(n): 0 for n in numbers if last is None or n < last})
        for n, count in counts.items():
            series[name][f"{last} or more" if last is not None and n >= last else str(n)] += count
    yield from _share_bars("How many messages a conversation has", series, of="conversations", category="messages")


def _roles(parts: Mapping[str, Mapping[str, Any]]) -> Iterator[Plot]:
    series: dict[str, Counter[str]] = {"messages": Counter(), "characters": Counter()}
    for part in parts.values():
        for role, counts in (part.get("roles") or {}).items():
            for unit, count in series.items():
                count[role] += counts.get(unit, 0)
    yield from _share_bars("Who says how much", series, of="all messages, and of all characters", note="All parts together.")


def _sources(parts: Mapping[str, Mapping[str, Any]]) -> Iterator[Plot]:
    series = {name: Counter(part.get("sources") or {}) for name, part in parts.items()}
    total = sum(series.values(), Counter())
    if len(total) > _MOST_BARS:
        kept = [name for name, _ in total.most_common(_MOST_BARS - 1)]
        for name, counts in series.items():
            shown = {source: counts[source] for source in kept}
            series[name] = Counter(shown | {f"{len(total) - len(kept)} others": counts.total() - sum(shown.values())})
    yield from _share_bars("Where the conversations come from", series, of="conversations")


def _policies(parts: Mapping[str, Mapping[str, Any]], chosen: Any) -> Iterator[Plot]:
    found = {name: part["policies"] for name, part in parts.items() if part.get("policies")}
    yield from _bars(
        "What each way of truncation would lose",
        {name: {policy: counts.get("lost", 0) for policy, counts in policies.items()} for name, policies in found.items()},
        axis="supervised tokens lost",
        label=lambda name, policy: f"{found[name][policy].get('lost', 0):,} ({found[name][policy].get('examples', 0):,} examples)",
        chosen=chosen,
    )


def _padding(parts: Mapping[str, Mapping[str, Any]], *, packing: bool) -> Iterator[Plot]:
    found = {name: part["padding"] for name, part in parts.items() if part.get("padding")}
    yield from _bars(
        "How much of a batch is padding",
        found,
        axis="share of a batch's places that no token fills",
        label=lambda name, way: _percent(found[name][way]),
        chosen="packed" if packing else None,
        is_share=True,
    )


def _share_bars(title: str, series: Mapping[str, Counter[str]], *, of: str, category: str = "", note: str = "") -> Iterator[Plot]:
    """Bars of counts as shares of each series, which may be of very different size; the counts stand beside them."""
    shares = {name: {key: count / counts.total() for key, count in counts.items()} for name, counts in series.items() if counts.total()}

    def label(name: str, key: str) -> str:
        return f"{series[name][key]:,}"

    yield from _bars(title, shares, axis=f"share of {of}", label=label, category=category, note=note, is_share=True)


def _bars(
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
    colours = [_COLOURS[i % len(_COLOURS)] for i in range(len(series))]
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
    yield _plot(title, note, draw, height=height, data=data)


def _plot(title: str, note: str, draw: Callable[[Axes], None], *, height: float, data: str) -> Plot:
    """Draw on axes of their own, without pyplot and without a trace in matplotlib's settings.

    Args:
        title: What is shown; it salts the ids of the SVG too, which have to differ within the page.
        note: A sentence below the plot.
        draw: Draws.
        height: In inches.
        data: The numbers in words, for who does not see the plot.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    settings: dict[str, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": ascii(title),
        "text.parse_math": False,  # a source may be called $x$
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
    }
    with style.context(settings, after_reset=True), warnings.catch_warnings():
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
