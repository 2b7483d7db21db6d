"""Where conversations and documents come from: files, folders, globs, data sets of the hub, corpora, and a user's own functions."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from lightning.fabric.utilities.rank_zero import rank_zero_warn

from lightning_chatgpt.chat.conversation import Conversation
from lightning_chatgpt.chat.faults import Faults, SkipRecord
from lightning_chatgpt.chat.plugins import check_arguments, find_function, plugin_names
from lightning_chatgpt.chat.schemas import COLUMNS, SCHEMAS, RecordParser
from lightning_chatgpt.chat.validation import check_characters
from lightning_chatgpt.data.corpora import corpus_version, read_corpus
from lightning_chatgpt.data.readers import SUFFIXES, Record, format_of, read_records, read_text
from lightning_chatgpt.errors import ConfigError, DataError, nearest
from lightning_chatgpt.hub import hub_problem
from lightning_chatgpt.settings import check_settings

Source = str | dict[str, Any]

CORPUS_PREFIX = "corpus:"
HUB_PREFIX = "hub:"
ENTRY_POINTS = "lightning_chatgpt.sources"
_HUB_OPTIONS = ("split", "revision", "config")


@dataclass(frozen=True)
class SourceSettings:
    """One source, and what is particular to it.

    Attributes:
        source: A file, a folder, a glob, ``corpus:NAME``, ``hub:ORG/NAME?split=…&revision=…`` or ``PLUGIN:ARGUMENT``.
        class_path: A user's function that returns records or conversations, in place of ``source``.
        init_args: What that function is called with.
        name: What mixtures and reports call it; its source where it is not named.
        schema: As ``data.schema``, for this source alone.
        fields: As ``data.fields``.
        roles: As ``data.roles``.
    """

    source: str = ""
    class_path: str = ""
    init_args: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    schema: str | None = None
    fields: dict[str, str] | None = None
    roles: dict[str, str] | None = None

    @classmethod
    def of(cls, source: Source) -> SourceSettings:
        """Read what stands in ``data.train`` and its like.

        Raises:
            ConfigError: A setting is unknown, or it names no source.
        """
        if isinstance(source, str):
            return cls(source=source, name=source)
        if not isinstance(source, Mapping):
            raise ConfigError(f"data: {source!r} is no source; name a file, a folder, corpus:NAME or hub:ORG/NAME")
        check_settings("data: source", source, cls)
        if ("source" in source) == ("class_path" in source):
            raise ConfigError(f"data: a source needs one of source and class_path, found {source!r}")
        return cls(**{"name": source.get("source") or source["class_path"], **source})


@dataclass
class SourceReport:
    """What reading a source met with.

    Attributes:
        faults: What was wrong, and what was done about it.
        n_records: Records read.
        schemas: How many followed which schema.
        files: The files read.
    """

    faults: Faults = field(default_factory=Faults)
    n_records: int = 0
    schemas: dict[str, int] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """This report as plain data."""
        return {"records": self.n_records, "schemas": dict(self.schemas), "files": self.files, "faults": self.faults.to_dict()}


def read_conversations(
    source: Source,
    *,
    report: SourceReport | None = None,
    schema: str | None = None,
    fields: Mapping[str, str] | None = None,
    roles: Mapping[str, str] | None = None,
    split_by: str | None = None,
    needs_reply: bool = True,
) -> Iterator[Conversation]:
    """Read conversations from one source.

    Args:
        source: As :class:`SourceSettings` describes; a text, or a mapping of its settings.
        report: Decides what is done about faults, and is told what was read.
        schema: As :class:`~lightning_chatgpt.chat.schemas.RecordParser` takes it, where the source does not say.
        fields: Likewise.
        roles: Likewise.
        split_by: Likewise.
        needs_reply: Whether a conversation in which the assistant says nothing is a fault.

    Raises:
        DataError: There is no such source, or a record in it cannot be used (``file:line: what``).
        ConfigError: A setting names something that is not there.
    """
    settings = SourceSettings.of(source)
    report = report if report is not None else SourceReport()
    if settings.source.startswith(CORPUS_PREFIX):
        given = {"schema": schema, "fields": fields, "roles": roles, "split_by": split_by}
        for name in (name for name, value in given.items() if value):
            rank_zero_warn(f"{settings.source} is no file of records: data.{name} is left aside for it")
        for conversation in read_corpus(settings.source.removeprefix(CORPUS_PREFIX)):
            report.n_records += 1
            yield conversation
        return
    parser = RecordParser(
        faults=report.faults,
        schema=settings.schema or schema,
        fields=settings.fields or fields,
        roles=settings.roles or roles,
        split_by=split_by,
        needs_reply=needs_reply,
    )
    # Shared, so that the report is right even of a source that fails midway.
    report.schemas = parser.counts
    columns = COLUMNS.union(parser.fields.values(), (split_by or "",))
    for place, value in _records(settings, report=report, columns=columns):
        report.n_records += 1
        try:
            if isinstance(value, Conversation):
                yield parser.regrouped(value)
                continue
            yield parser.parse(value, default_id=place)
        except SkipRecord:
            continue


def read_documents(source: Source, *, report: SourceReport | None = None) -> Iterator[str]:
    """Read plain-text documents from one source.

    Args:
        source: A text file (``.txt`` or ``.md``: one document), a file of records with a ``text`` each, a folder or glob of them, or any
            source of conversations that :func:`read_conversations` reads (a conversation is a document, a message a line).
        report: Decides what is done about faults, and is told what was read.

    Raises:
        DataError: There is no such source, or a record in it cannot be used.
    """
    settings = SourceSettings.of(source)
    report = report if report is not None else SourceReport()
    if settings.source.startswith(CORPUS_PREFIX):
        for conversation in read_conversations(source, report=report):
            yield "\n".join(message.content for message in conversation.messages)
        return
    for _, value in _records(settings, report=report, columns={"text"}, whole_texts=True):
        report.n_records += 1
        text = value if isinstance(value, str) else value.get("text") if isinstance(value, Mapping) else None
        try:
            if not isinstance(text, str):
                report.faults.refuse("unknown_schema", 'expected an object like {"text": "..."} in a file of documents')
            text = check_characters(text, "the text", report.faults)
        except SkipRecord:
            continue
        yield text


def source_fingerprint(source: Source, *, schema: str | None = None) -> str | None:
    """What a source holds, without parsing it: equal fingerprints, equal content.

    Args:
        source: What is asked about.
        schema: The schema of its records, where the source does not say.

    Returns: a digest, or None where only reading tells (a user's function, or a data set of the hub without a fixed revision).
    """
    settings = SourceSettings.of(source)
    if settings.class_path or (settings.schema or schema or "openai") not in SCHEMAS:
        return None
    if settings.source.startswith(CORPUS_PREFIX):
        return corpus_version(settings.source.removeprefix(CORPUS_PREFIX))
    if settings.source.partition(":")[0] in plugin_names(ENTRY_POINTS):
        return None
    if settings.source.startswith(HUB_PREFIX):
        revision = _hub_options(settings.source)[1].get("revision", "")
        return settings.source if len(revision) == 40 else None  # a commit's hash, not a branch that moves
    digest = hashlib.blake2b(digest_size=16)
    path = Path(settings.source).expanduser()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else find_files(settings.source)
    for file in files:
        digest.update(f"{file}\0{file.stat().st_size}\0".encode())  # the name too: ids and errors tell it
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def find_files(source: str, *, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """The files a source names, sorted: itself, or those in a folder or glob that end with one of the suffixes.

    Text files of a folder are taken only where there is nothing else: a folder of chats often has a README.txt.

    Raises:
        DataError: There is no such file, or the folder or glob holds none.
    """
    path = Path(source).expanduser()
    wanted = ", ".join(suffixes)
    if path.is_file():
        return [path]
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and (format_of(p) or p.suffix.lower()) in suffixes)
        records = [p for p in files if format_of(p) not in (".txt", None)]
        if not files:
            raise DataError(f"{source}: the folder holds no file that can be read ({wanted})")
        return files if ".md" in suffixes else records or files
    if glob.has_magic(str(path)):
        files = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
        if not files:
            raise DataError(f"{source}: no file matches the pattern")
        return files
    raise DataError(f"{source}: no such file or folder; name a file ({wanted}), a folder or glob of them, corpus:NAME or hub:ORG/NAME")


def _records(
    settings: SourceSettings, *, report: SourceReport, columns: Iterable[str], whole_texts: bool = False
) -> Iterator[tuple[str, Any]]:
    """Records with the place of each, short enough for an id; the fault's place is kept up to date."""
    plugin, colon, argument = settings.source.partition(":")
    if settings.class_path:
        function = find_function(settings.class_path, setting="data.class_path")
        check_arguments(function, setting=f"data.class_path {settings.class_path}", **settings.init_args)
        yield from _numbered(function(**settings.init_args), settings.name, report)
    elif colon and plugin in plugin_names(ENTRY_POINTS):
        found = find_function(plugin, setting="data", group=ENTRY_POINTS)(argument)
        yield from _numbered(found, settings.name, report)
    elif settings.source.startswith(HUB_PREFIX):
        yield from _numbered(_read_hub(settings.source), settings.source, report)
    elif (saved := Path(settings.source).expanduser()).is_dir() and _is_saved_dataset(saved):
        yield from _numbered(_read_saved(saved), settings.source, report)
    else:
        for path in find_files(settings.source, suffixes=(*SUFFIXES, ".md") if whole_texts else SUFFIXES):
            report.files.append(str(path))
            report.faults.place = str(path)
            if whole_texts and (format_of(path) in (".txt", None) or path.suffix == ".md"):
                if text := read_text(path, faults=report.faults):
                    yield str(path), text
            else:
                for record in read_records(path, faults=report.faults, columns=list(columns)):
                    yield path.name + record.place.removeprefix(str(path)), record.value


def _numbered(values: Iterable[Any], name: str, report: SourceReport) -> Iterator[Record]:
    if not isinstance(values, Iterable):
        raise DataError(f"{name}: gave a {type(values).__name__}; return or yield records or Conversations")
    for number, value in enumerate(values, start=1):
        report.faults.place = f"{name}: record {number}"
        yield Record(f"{name}:{number}", value)


def _is_saved_dataset(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _read_saved(folder: Path) -> Iterable[Any]:
    from datasets import DatasetDict, load_from_disk

    try:
        dataset = load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: cannot be read as a saved data set ({str(error).splitlines()[0]})") from None
    if isinstance(dataset, DatasetDict):
        if len(dataset) > 1:
            raise DataError(f"{folder}: holds several splits; name one: {', '.join(str(folder / split) for split in dataset)}")
        dataset = next(iter(dataset.values()))
    return dataset  # type: ignore[no-any-return]


def _hub_options(source: str) -> tuple[str, dict[str, str]]:
    name, _, query = source.removeprefix(HUB_PREFIX).partition("?")
    options = dict(parse_qsl(query))
    for key in options:
        if key not in _HUB_OPTIONS:
            raise ConfigError(f"{source}: {key!r} is unknown; {nearest(key, _HUB_OPTIONS)}")
    return name, options


def _read_hub(source: str) -> Iterable[Any]:
    name, options = _hub_options(source)
    problem = hub_problem()
    if problem is not None:
        raise DataError(f"{source}: the hub cannot be reached ({problem}); connect and try again, or name a local file or folder")
    from datasets import load_dataset

    try:
        # Streamed: the rows go to our own cache, and need not lie in another as well.
        return load_dataset(  # type: ignore[no-any-return]
            name, options.get("config"), split=options.get("split", "train"), revision=options.get("revision"), streaming=True
        )
    except (OSError, ValueError) as error:
        raise DataError(f"{source}: cannot be read from the hub ({str(error).splitlines()[0]}); check name, split and revision") from None
