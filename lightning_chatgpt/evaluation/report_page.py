"""The report of an evaluation as one HTML page: report_page.html.jinja, in which everything that comes from data or models is escaped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_chatgpt.evaluation.evaluate import main_figures, verdicts
from lightning_chatgpt.pages.plots import Plot, plot
from lightning_chatgpt.pages.render import render
from lightning_chatgpt.plots import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_REPLIES = 2000  # more would make the page slow to open; report.json has all


def render_page(report: Mapping[str, Any]) -> str:
    """Render a report as a page.

    Args:
        report: As the ``evaluate`` command writes it to report.json.

    Returns: HTML, the same for the same report.
    """
    figures = report["figures"]
    return render(
        "evaluation/report_page.html.jinja",
        report=report,
        names=[model["name"] for model in report["models"]],
        verdicts=verdicts(report),
        main=main_figures(report),
        parts=_by_part([figure for figure in figures if figure["part"] != "replies"]),
        replies={"names": [model["name"] for model in report["models"]], "items": report["replies"][:_MOST_REPLIES]},
        n_replies=len(report["replies"]),
        colours=COLOURS,
        curves=[*_curves(report["models"])],
        intervals=[*_intervals(report)],
    )


def _by_part(figures: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """For each part of the data its figures by name."""
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for figure in figures:
        found.setdefault(figure["part"], {})[figure["name"]] = figure
    return found


def _curves(models: Sequence[Mapping[str, Any]]) -> Iterator[Plot]:
    for name, title in (("val_loss", "Validation loss"), ("train_loss", "Training loss")):
        curves = {model["name"]: model["curves"][name] for model in models if model.get("curves", {}).get(name)}
        if not curves:
            continue

        def draw(axes: Axes, curves: Any = curves) -> None:
            for label, points in curves.items():
                steps, losses = zip(*points, strict=True)
                axes.plot(steps, losses, marker="o" if len(points) < 30 else None, markersize=3, color=_colour(models, label), label=label)
            axes.set(xlabel="optimizer steps", ylabel="nats a token")
            axes.figure.legend(loc="outside upper left", ncols=2, frameon=False)

        data = "; ".join(f"{label}: {points[0][1]:.3f} to {points[-1][1]:.3f}" for label, points in curves.items())
        yield plot(title, "As each run's metrics.csv tells it.", draw, height=3.0, data=data)


def _colour(models: Sequence[Mapping[str, Any]], name: str) -> str:
    number = next(i for i, model in enumerate(models) if model["name"] == name)
    return COLOURS[number % len(COLOURS)]


def _intervals(report: Mapping[str, Any]) -> Iterator[Plot]:
    """Bits per byte by part of the data, each model's interval."""
    figures = [
        figure
        for figure in report["figures"]
        if figure["name"] == "bits_per_byte" and all(found["low"] is not None for found in figure["models"])
    ]
    if len(figures) < 2:
        return
    names = [model["name"] for model in report["models"]]

    def draw(axes: Axes) -> None:
        for place, figure in enumerate(figures):
            for i, found in enumerate(figure["models"]):
                y = place + (i - (len(names) - 1) / 2) * 0.6 / len(names)
                colour = COLOURS[i % len(COLOURS)]
                axes.plot([found["low"], found["high"]], [y, y], color=colour, linewidth=2, label=names[i] if place == 0 else None)
                axes.plot([found["value"]], [y], "o", color=colour, markersize=5)
        axes.set_yticks(range(len(figures)), [figure["part"] for figure in figures])
        axes.set_ylim(len(figures) - 0.4, -0.6)
        axes.set_xlim(left=0)
        axes.set_xlabel("bits per byte, with 95 % intervals; fewer is better")
        axes.figure.legend(loc="outside upper left", ncols=2, frameon=False)

    data = "; ".join(
        f"{figure['part']}, {name}: {found['value']:.3f}" for figure in figures for name, found in zip(names, figure["models"], strict=True)
    )
    yield plot("Where it finds the data hard", "", draw, height=1.0 + len(figures) * (0.14 + 0.2 * len(names)), data=data)
