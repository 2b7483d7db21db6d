"""What a model is evaluated on: files that are named, or what a run held out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from lightning_chatgpt.chat.conversation import Conversation
from lightning_chatgpt.chat.faults import Faults, OnFault
from lightning_chatgpt.data.base import TokenDataModule
from lightning_chatgpt.data.preparation import tell_faults
from lightning_chatgpt.data.selection import SourceRows
from lightning_chatgpt.data.sources import Source, SourceReport, SourceSettings, read_conversations, read_documents
from lightning_chatgpt.errors import ConfigError, DataError, UserError
from lightning_chatgpt.evaluation.records import Item


def read_items(sources: Source | list[Source], *, is_text: bool = False, on_fault: OnFault = "error") -> list[Item]:
    """Read conversations, or documents of plain text.

    Args:
        sources: As ``data.train`` takes them.
        is_text: Whether they hold documents.
        on_fault: What is done about a record that cannot be used.

    Raises:
        DataError: There is no such source, nothing in it, or a record of it cannot be used.
    """
    items = []
    for source in sources if isinstance(sources, list) else [sources]:
        name = SourceSettings.of(source).name
        report = SourceReport(Faults(on_fault))
        contents: Iterator[Conversation | str] = (
            read_documents(source, report=report) if is_text else read_conversations(source, report=report, needs_reply=False)
        )
        items += [Item(content, _id(content, name, number), name) for number, content in enumerate(contents, start=1)]
        tell_faults(name, report.to_dict())
    if not items:
        raise DataError(f"{sources}: nothing to read in there")
    return items


def run_folder(models: Sequence[str]) -> Path | None:
    """The first of the models that is a run folder; None where none is."""
    return next((Path(model) for model in models if (Path(model) / "config.yaml").is_file()), None)


def training_chats(folder: Path) -> list[Conversation]:
    """The conversations that a run was trained on, read as its config says."""
    module = _data_module(folder / "config.yaml")
    items = items_of(module, module.load_parts("fit").get("train", []))
    return [item.content for item in items if isinstance(item.content, Conversation)]


def held_out_items(models: Sequence[str]) -> tuple[list[Item], str]:
    """What the first run folder among the models held out when it was trained: its test split, or else its validation split.

    Returns: the items, and a sentence that says what they are.

    Raises:
        ConfigError: There is no run folder among them, or it held nothing out.
    """
    folder = run_folder(models)
    if folder is None:
        raise ConfigError("there is nothing to evaluate on: none of the models is a run folder that held something out; set --data FILE")
    module = _data_module(folder / "config.yaml")
    part = "test" if module.test else "validation"
    if not getattr(module, part):
        raise ConfigError(f"{folder}: the run held nothing out (data.validation, data.test); set --data FILE")
    return items_of(module, module.load_parts("test" if part == "test" else "validate")[part]), f"the {part} split of {folder}"


def items_of(module: TokenDataModule[Any], sources: Sequence[SourceRows]) -> list[Item]:
    """The items of some rows of a data module's sources."""
    return [
        Item(content, _id(content, source.name, number), source.name)
        for source in sources
        for number, content in enumerate((module.load(text) for text in source.table.column("content", source.rows)), start=1)
    ]


def _id(content: Conversation | str, source: str, number: int) -> str:
    return (content.id if isinstance(content, Conversation) else "") or f"{source}:{number}"


def _data_module(config: Path) -> TokenDataModule[Any]:
    """The data module that a run's config describes."""
    try:
        data = yaml.safe_load(config.read_text(encoding="utf-8"))["data"]
        module, _, name = data["class_path"].rpartition(".")
        cls = getattr(import_module(module), name)
        built = cls(**data.get("init_args", {}))
    except UserError:
        raise
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, ImportError, AttributeError) as error:
        raise ConfigError(f"{config}: tells no data module that can be built ({' '.join(str(error).split())}); set --data FILE") from None
    if not isinstance(built, TokenDataModule):
        raise ConfigError(f"{config}: its data is a {name}, of which it is not known what it holds out; set --data FILE")
    return built
