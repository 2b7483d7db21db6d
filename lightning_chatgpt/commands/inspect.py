"""``inspect``: see what the data holds and what the model will be fed, before training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningDataModule, LightningModule

from lightning_chatgpt.chat.faults import KINDS
from lightning_chatgpt.commands import report_head, tell_report
from lightning_chatgpt.data.chat import ChatDataModule
from lightning_chatgpt.data.report import describe
from lightning_chatgpt.errors import ConfigError
from lightning_chatgpt.precision import ChatTrainer

if TYPE_CHECKING:
    from rich.console import Console


class InspectTrainer(ChatTrainer):
    """A Trainer with one verb more, so that ``inspect`` takes every setting that ``fit`` takes."""

    @property
    def distributed_sampler_kwargs(self) -> None:
        """None: one process looks at all there is, whatever the strategy."""

    def inspect(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        examples: int = 3,
        html: str | None = None,
        json: str | None = None,
        max_truncated: float = 0.1,
        ckpt_path: str | None = None,
    ) -> None:
        """See what the data holds and what the model will be fed; leaves with exit code 1 where something would surprise.

        Args:
            model: Says which tokenizer and how many positions there are.
            datamodule: What is looked at.
            examples: How many examples are shown token by token.
            html: A file to write the report to as a page, with plots.
            json: A file to write the report to for scripts; - for standard output, and nothing else there.
            max_truncated: The fraction of conversations that truncation may shorten before it is a surprise.
            ckpt_path: A checkpoint whose tokenizer is taken.
        """
        if not isinstance(datamodule, ChatDataModule):
            raise ConfigError(f"inspect looks at chats; data is a {type(datamodule).__name__}, not a ChatDataModule")
        if examples < 0:
            raise ConfigError(f"examples must be at least 0, not {examples}")
        if not 0 <= max_truncated <= 1:
            raise ConfigError(f"max_truncated is a fraction of the conversations: 0 to 1, not {max_truncated}")
        self.strategy._lightning_module = model  # what fit does before it sets the data up
        datamodule.trainer = self
        datamodule.is_strict = False  # what would stop a run is what this is to show
        datamodule.setup("fit")
        report = {
            **report_head(),
            **describe(datamodule, n_examples=examples, max_truncated=max_truncated),
        }
        tell_report(report, show=print_report, render="lightning_chatgpt.data.report_page", html_file=html, json_file=json)
        if report["surprises"]:
            raise SystemExit(1)


def print_report(report: dict[str, Any]) -> None:
    """Print a report to the terminal; it reads the same without colour."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=False)
    _print_sources(console, report)
    _print_parts(console, report)
    if report["mixture"]:
        table = _table("An epoch of training", "group", "conversations", "tokens", "rows", "rows in an epoch")
        for name, counts in report["mixture"].items():
            table.add_row(name, *(f"{counts[key]:,}" for key in ("items", "tokens", "rows", "rows_per_epoch")))
        console.print(table)
    for example in report["examples"]:
        console.print(Text(f"\n{example['id']} as the model reads it; «what it learns»", style="bold"))
        console.print(example_text(example["tokens"]))
    console.print()
    for line in report["surprises"]:
        console.print(Text(f"! {line}", style="bold red"))
    if not report["surprises"]:
        console.print(Text("Nothing that would surprise.", style="green"))


def example_text(tokens: list[list[Any]]) -> Any:
    """An example's tokens: parted by ¦, what is learnt between « and » and in green."""
    from rich.text import Text

    text = Text()
    was_learnt = False
    begins_line = True
    for piece, weight, is_control in tokens:
        if not piece:
            continue  # the first bytes of a character, which stands with the last
        is_learnt = weight > 0
        if was_learnt and not is_learnt:
            text.append("»", style="green")
        elif not begins_line and was_learnt == is_learnt:
            text.append("¦", style="dim")
        if is_learnt and not was_learnt:
            text.append("«", style="green")
        shown = piece if is_control else piece.replace("\n", "⏎\n")
        text.append(shown, style="bold green" if is_learnt else "cyan" if is_control else "")
        was_learnt, begins_line = is_learnt, shown.endswith("\n")
    if was_learnt:
        text.append("»", style="green")
    return text


def _print_sources(console: Console, report: dict[str, Any]) -> None:
    table = _table("Sources", "source", "records", "kept", "schemas", "cleaning")
    faults = _table("Faults", "source", "kind", "what it is", "left out", "mended", "first places")
    for name, source in report.get("sources", {}).items():
        schemas = ", ".join(f"{schema} {n}" for schema, n in source.get("schemas", {}).items())
        cleaned = ["; ".join([step["step"], *(f"{k} {n}" for k, n in step.items() if k != "step")]) for step in source.get("cleaning", [])]
        table.add_row(name, f"{source['records']:,}", f"{source['items']:,}", schemas, "\n".join(cleaned))
        for kind, counts in source.get("faults", {}).get("counts", {}).items():
            places = "\n".join(source["faults"]["places"][kind][:2])
            faults.add_row(name, kind, KINDS[kind].about, str(counts.get("skip", 0)), str(counts.get("fix", 0)), places)
    console.print(table)
    if faults.row_count:
        console.print(faults)


def _print_parts(console: Console, report: dict[str, Any]) -> None:
    parts = report["parts"]
    settings = ", ".join(f"{name} {value}" for name, value in report["settings"].items())
    table = _table(f"What the model will be fed ({settings})", "", *parts)

    def row(name: str, *values: str) -> None:
        table.add_row(name, *values)

    def number(name: str, key: str) -> None:
        row(name, *(f"{counts.get(key, 0):,}" for counts in parts.values()))

    number("conversations", "items")
    number("examples", "examples")
    number("tokens", "tokens")
    row("supervised", *(f"{c['supervised']:,} ({c['supervised'] / max(1, c['tokens']):.0%})" for c in parts.values()))
    number("longer than max_length", "longer")
    number("shortened by truncation", "truncated")
    number("cut inside a message", "cut")
    number("nothing to learn, left out", "unsupervised")
    for policy in ("drop_oldest", "split", "skip"):
        row(f"supervised tokens lost by {policy}", *(f"{c['policies'][policy]['lost']:,}" for c in parts.values()))
    for way in ("shuffled", "grouped by length", "packed"):
        row(f"padding, {way}", *(f"{c['padding'][way]:.1%}" for c in parts.values()))
    for name, key in (("exact duplicates left out", "exact"), ("near duplicates left out", "near")):
        if "duplicates" in report:
            row(name, *(str(report["duplicates"].get(part, {}).get(key, 0)) for part in parts))
    if report.get("leaks"):
        row("word for word in train", *(str(report["leaks"].get(part, {}).get("exact", "")) for part in parts))
        row("half of their n-grams in train", *(str(report["leaks"].get(part, {}).get("overlapping", "")) for part in parts))
    console.print(table)


def _table(title: str, *columns: str) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")  # an ellipsis would hide what scripts look for
    return table
