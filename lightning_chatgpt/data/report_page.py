"""A report on chat data as one HTML page that opens from disk: no network, no JavaScript, light and dark, readable on a phone.

The page is report_page.html.jinja; everything that comes from the data is escaped there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_chatgpt.chat.faults import KINDS
from lightning_chatgpt.pages.plots import Plot, bars, plot
from lightning_chatgpt.pages.render import TokenText, percent, render, show, token_text
from lightning_chatgpt.plots import COLOURS, LIMIT_COLOUR, check_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_BARS = 12
_SHORT_EXAMPLE = 200  # tokens up to which an example is shown unfolded

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
class ShownToken:
    """One token as the page shows it.

    Attributes:
        text: Its text, cut where something is to be seen.
        is_learnt: Whether it counts in the loss.
        is_control: Whether it is a control token, which no text can spell.
        weight: Its loss weight where that is neither 0 nor 1, else empty.
        begins_weight: Whether the token before has another weight; only then is it written beside the token.
    """

    text: TokenText
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
    check_matplotlib("the report's page")
    parts: Mapping[str, Mapping[str, Any]] = report["parts"]
    settings = report.get("settings") or {}
    sources = report.get("sources") or {}
    return render(
        "data/report_page.html.jinja",
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
            yield name, step.get("step", ""), step.get("changed", 0), step.get("dropped", 0), show(others)


def _tokens(tokens: Sequence[Sequence[Any]]) -> list[ShownToken]:
    shown = []
    previous = 0.0
    for text, weight, is_control in tokens:
        written = "" if weight in (0, 1) else f"{weight:g}"
        shown.append(ShownToken(token_text(str(text)), weight != 0, bool(is_control), written, weight != previous))
        previous = weight
    return shown


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
            share = percent(n_long / n_all) if n_long else ""
            note = f"{n_long:,} of {n_all:,} ({share}) are" if n_long else f"None of {n_all:,} is"
            note += f" longer than max_length, {max_length:,} tokens" + (" (the dashed line)." if max_length < 1.5 * end else ".")

        def draw(axes: Axes, bins: Any = bins, end: int = end) -> None:
            starts, stops, counts = zip(*((max(start, 1), stop, count) for start, stop, count in bins), strict=True)
            widths = [stop - start for start, stop in zip(starts, stops, strict=True)]
            axes.bar(starts, counts, width=widths, align="edge", color=COLOURS[0], edgecolor="#ffffff40", linewidth=0.4)
            axes.set_xscale("log", base=2)  # chats range from a few tokens to tens of thousands
            axes.set(xlabel="tokens of the whole conversation", ylabel="conversations")
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.yaxis.set_major_formatter("{x:,.0f}")
            axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
            if isinstance(max_length, int) and max_length < 1.5 * end:
                axes.axvline(max_length, color=LIMIT_COLOUR, linestyle="--", linewidth=1.5)

        yield plot(title, note, draw, height=2.6, data="; ".join(f"{start} to {stop}: {count}" for start, stop, count in bins if count))


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
    yield from bars(
        "What each way of truncation would lose",
        {name: {policy: counts.get("lost", 0) for policy, counts in policies.items()} for name, policies in found.items()},
        axis="supervised tokens lost",
        label=lambda name, policy: f"{found[name][policy].get('lost', 0):,} ({found[name][policy].get('examples', 0):,} examples)",
        chosen=chosen,
    )


def _padding(parts: Mapping[str, Mapping[str, Any]], *, packing: bool) -> Iterator[Plot]:
    found = {name: part["padding"] for name, part in parts.items() if part.get("padding")}
    yield from bars(
        "How much of a batch is padding",
        found,
        axis="share of a batch's places that no token fills",
        label=lambda name, way: percent(found[name][way]),
        chosen="packed" if packing else None,
        is_share=True,
    )


def _share_bars(title: str, series: Mapping[str, Counter[str]], *, of: str, category: str = "", note: str = "") -> Iterator[Plot]:
    """Bars of counts as shares of each series, which may be of very different size; the counts stand beside them."""
    shares = {name: {key: count / counts.total() for key, count in counts.items()} for name, counts in series.items() if counts.total()}

    def label(name: str, key: str) -> str:
        return f"{series[name][key]:,}"

    yield from bars(title, shares, axis=f"share of {of}", label=label, category=category, note=note, is_share=True)
