"""One local file to records: JSONL, JSON, CSV, Parquet, Arrow, YAML and chats as text, streamed where the format lets it.

What a record means is for others to say. What is wrong with one is told to :class:`~lightning_chatgpt.chat.faults.Faults`,
which stops at it, leaves the record out, or has it mended.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import unicodedata
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning.fabric.utilities.rank_zero import rank_zero_info

from lightning_chatgpt.chat.faults import Faults, SkipRecord
from lightning_chatgpt.data.json_stream import Decoder, JsonFault, JsonStream, ends_early, holds_records
from lightning_chatgpt.data.text_file import AGAIN, PACKED, TextFile
from lightning_chatgpt.errors import DataError

if TYPE_CHECKING:
    import yaml

RECORD_BYTES = 64 << 20  # a file without line breaks would fill the memory

_TEXTS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".yaml", ".yml", ".txt")
_TABLES = (".parquet", ".arrow", ".feather")
SUFFIXES: tuple[str, ...] = (*_TEXTS, *_TABLES)

_SKIP = "or set data.on_fault to skip"
_DEEPEST = 1000  # libyaml's nodes are built by recursion in C, which ends the process where they are too deep
_NAME_LENGTH = 30
SPOKEN = re.compile(r"\s*([^:]+?)\s*:(?:\s+(.*))?")  # "http://" and "10:30" name nobody
_RETURN = re.compile(rb"(?<=\r)(?=[^\n])")  # a line of an old Macintosh ends here


class Record(NamedTuple):
    """A record of a file.

    Attributes:
        place: Where it stands, for messages: ``chats.jsonl:17``, ``chats.json: record 3 (byte 1204)``, ``a.parquet: row 3``.
        value: What stands there, as plain data.
    """

    place: str
    value: Any


def format_of(path: str | Path) -> str | None:
    """The suffix that says how records are read, in lower case, without ``.gz`` or ``.zst``; None if they cannot be."""
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix in PACKED:
        inner = Path(path.stem).suffix.lower()
        return inner if inner in _TEXTS else None
    return suffix if suffix in SUFFIXES else None


def read_records(path: Path, *, faults: Faults, columns: Collection[str] = ()) -> Iterator[Record]:
    """Read the records of a file, in order.

    A JSON file holds an array of records, an object of them, or an object with an array of them under a key such as
    ``data``; a YAML file a list, or a mapping with one; a text file chats, separated by blank lines, of lines such as
    ``Ada: Hello``. An empty file holds no records.

    Args:
        path: The file; its suffix says how it is read (:data:`SUFFIXES`, those of text with ``.gz`` or ``.zst`` behind too).
        faults: What is done about faults; its ``place`` is the record's own whenever one is given out.
        columns: Names by which the header of a CSV file is known. A file of two columns without any of them has no header;
            its records are ``{"prompt": ..., "completion": ...}``.

    Raises:
        DataError: There is no such file, it is of no format that can be read, its columns are not known, a package is
            missing, or there is a fault and ``faults`` makes an error of it.
    """
    form = format_of(path)
    _check(path)
    if form is None:
        packed = " and ".join(PACKED)
        raise DataError(f"{path}: files of this kind cannot be read; give one of {', '.join(SUFFIXES)} ({packed} behind those of text)")
    with contextlib.suppress(SkipRecord):  # a file is left out from where it cannot be read on
        if form in _TABLES:
            yield from _read_table(path, faults=faults)
            return
        with contextlib.closing(TextFile(path, faults=faults)) as file:
            if form in (".jsonl", ".ndjson"):
                yield from _read_jsonl(file)
            elif form == ".json":
                yield from _read_json(file)
            elif form in (".csv", ".tsv"):
                yield from _read_csv(file, tabs=form == ".tsv", columns=columns)
            elif form == ".txt":
                yield from _read_chats(file)
            else:
                yield from _read_yaml(file)
            file.check_whole()


def read_text(path: Path, *, faults: Faults) -> str:
    """Read a whole text document, unpacked where it is ``.gz`` or ``.zst``.

    Returns:
        Its text; what was read before the cut, or nothing, where it has a fault and is left out.

    Raises:
        DataError: There is no such file, a package is missing, or there is a fault and ``faults`` makes an error of it.
    """
    _check(path)
    text = ""
    with contextlib.suppress(SkipRecord), contextlib.closing(TextFile(path, faults=faults)) as file:
        text = _document(file)
        file.check_whole()
    return text


def _check(path: Path) -> None:
    if path.is_dir():
        raise DataError(f"{path}: this is a folder; name a file that ends with one of {', '.join(SUFFIXES)}")
    try:
        path.open("rb").close()
    except OSError as error:
        raise DataError(f"{path}: the file cannot be opened ({error.strerror}); check its name and its rights") from None


def _document(file: TextFile) -> str:
    data = file.stream.read()
    file.faults.place = str(file.path)
    return file.decode(data, byte=file.start)


def _read_jsonl(file: TextFile) -> Iterator[Record]:
    faults, decoder = file.faults, Decoder()
    number, end = 0, file.start
    while line := file.stream.readline(RECORD_BYTES + 1):
        number, begin, end = number + 1, end, end + len(line)
        place = faults.place = f"{file.path}:{number}"
        try:
            last = not line.endswith(b"\n")
            if last and len(line) > RECORD_BYTES:
                end += _pass_line(file)
                faults.refuse("too_large", f"the line is longer than {RECORD_BYTES} bytes; one object a line is expected, split it {_SKIP}")
            if not line.strip():
                continue
            if last and (file.cut or _breaks_off(line, decoder=decoder)):
                file.truncated(f"the file ends at byte {end}{file.unit}, in the middle of this line, which begins at byte {begin}")
            remedy = f"one object a line is expected, mend the line {_SKIP}"
            if number == 1 and line.strip() in (b"[", b"{"):
                remedy = "if this is one value over many lines, name the file .json"
            value = _parse(line, byte=begin, file=file, decoder=decoder, remedy=remedy)
        except SkipRecord:
            continue
        yield Record(place, value)


def _pass_line(file: TextFile) -> int:
    """Pass the rest of a line; its length in bytes."""
    size = 0
    while piece := file.stream.readline(1 << 20):
        size += len(piece)
        if piece.endswith(b"\n"):
            break
    return size


def _breaks_off(line: bytes, *, decoder: Decoder) -> bool:
    try:
        decoder.strict.decode(line.decode("utf-8", "surrogateescape"))
    except json.JSONDecodeError as error:
        return ends_early(error)
    except (RecursionError, ValueError):
        pass
    return False


def _parse(data: bytes, *, byte: int, file: TextFile, decoder: Decoder, remedy: str) -> Any:
    """A JSON value from its bytes, every fault told."""
    text = file.decode(data, byte=byte).removeprefix("\ufeff").rstrip()  # files with a mark each may have been joined
    decoder.clear()
    value, fault = None, ""
    try:
        value = decoder.strict.decode(text)
    except json.JSONDecodeError as error:
        fault = f" at column {error.pos + 1} ({error.msg})"
    except RecursionError:
        fault = " (nested too deeply)"
    except ValueError as error:  # an integer of thousands of digits
        fault = f" ({str(error).partition(';')[0]})"
    if decoder.constants:
        fault = f" ({decoder.constants[0]} is no JSON number)"
    if fault:
        file.faults.refuse("broken_json", f"broken JSON{fault}; {remedy}")
    for key in decoder.repeated[:1]:
        _mend_repeated(key, faults=file.faults)
    return value


def _mend_repeated(key: str, *, faults: Faults) -> None:
    faults.mend("duplicate_keys", f"the key {key!r} is there twice; leave one out, or set data.on_fault to fix to take the last")


def _read_json(file: TextFile) -> Iterator[Record]:
    faults, decoder = file.faults, Decoder()
    stream = JsonStream(file.stream.read, start=file.start, limit=RECORD_BYTES, unit=file.unit)
    if stream.is_lines():
        file.rewind()
        yield from _read_jsonl(file)
        return
    items = stream.records()
    while True:
        try:
            item = next(items, None)
        except JsonFault as fault:
            faults.place = f"{file.path}: record {stream.number} (byte {stream.begin})"
            if fault.kind == "truncated_file":
                file.truncated(str(fault))
            faults.refuse(fault.kind, str(fault))
        if item is None:
            return
        place = faults.place = f"{file.path}: record {item.number} (byte {item.byte})"
        value = item.value
        if item.raw is not None:
            try:
                value = _parse(item.raw, byte=item.byte, file=file, decoder=decoder, remedy=f"mend the record {_SKIP}")
            except SkipRecord:
                continue
        if item.key is not None and isinstance(value, dict):
            value.setdefault("id", item.key)
        yield Record(place, value)


def _read_csv(file: TextFile, *, tabs: bool, columns: Collection[str]) -> Iterator[Record]:
    faults = file.faults
    taken: list[bytes] = []  # the lines of the row at hand
    end = file.start

    def lines() -> Iterator[str]:
        nonlocal end
        while line := file.stream.readline(RECORD_BYTES + 1):
            for piece in _RETURN.split(line):
                taken.append(piece)
                end += len(piece)
                yield piece.replace(b"\0", b"").decode("utf-8", "surrogateescape")
            if len(line) > RECORD_BYTES and not line.endswith(b"\n"):
                end += _pass_line(file)

    first = file.stream.peek().lstrip().split(b"\n", 1)[0]
    delimiter = "\t" if tabs else ";" if b";" in first and b"," not in first else ","
    rows = csv.reader(lines(), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        taken.clear()
        begin = end
        place = faults.place = f"{file.path}:{rows.line_num + 1}"
        try:
            cells = _next_row(rows, file=file)
            raw = b"".join(taken)
            if not raw:
                return
            if len(raw) > RECORD_BYTES:
                faults.refuse("too_large", f"the row is longer than {RECORD_BYTES} bytes; split it {_SKIP}")
            if file.cut and not raw.endswith((b"\n", b"\r")):
                file.truncated(f"the file ends at byte {end}{file.unit}, in the middle of this row, which begins at byte {begin}")
            if not raw.strip():
                continue
            text = file.decode(raw, byte=begin)
            if text.encode() != raw:
                cells = _next_row(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True), file=file)
            if header is None:
                header = _header(cells, columns=columns, faults=faults)
                if header is not None:
                    continue
                header = ["prompt", "completion"]
            if len(cells) != len(header):
                remedy = f"quote cells that hold {delimiter!r} or a line break {_SKIP}"
                faults.refuse("broken_json", f"the row has {len(cells)} cells where {len(header)} are expected; {remedy}")
        except SkipRecord:
            if header is None:
                raise  # without the header, no row can be understood
            continue
        yield Record(place, dict(zip(header, cells, strict=True)))


def _next_row(rows: Iterator[list[str]], *, file: TextFile) -> list[str]:
    """The cells of the next row, none at the end."""
    limit = csv.field_size_limit(RECORD_BYTES)  # the whole process's, so it is put back
    try:
        return next(rows, [])
    except csv.Error as error:
        fault = str(error)
    finally:
        csv.field_size_limit(limit)
    if fault.startswith("unexpected end"):
        file.truncated("the file ends in the middle of this row, within quotes")
    kind = "too_large" if fault.startswith("field larger") else "broken_json"
    file.faults.refuse(kind, f"broken CSV ({fault}); look for a quote that is not closed or not doubled {_SKIP}")


def _header(cells: list[str], *, columns: Collection[str], faults: Faults) -> list[str] | None:
    """The names of the columns by the first row; None where that is a record of two columns."""
    names = [cell.strip() for cell in cells]
    if not {name.casefold() for name in names} & {column.strip().casefold() for column in columns}:
        if len(names) == 2:
            rank_zero_info(
                f"{faults.place}: no column names are known, so line 1 is taken as a chat; else say where things are by data.fields"
            )
            return None
        raise DataError(f"{faults.place}: none of the columns {', '.join(map(repr, names))} is known; name them with data.fields")
    known = {column.strip().casefold(): column.strip() for column in columns}
    names = [known.get(name.casefold(), name) for name in names]
    for name in [name for name in names if names.count(name) > 1][:1]:
        _mend_repeated(name, faults=faults)
    return names


def _read_table(path: Path, *, faults: Faults) -> Iterator[Record]:
    import pyarrow as pa

    number = 0
    batches = _batches(path)
    while True:
        faults.place = f"{path}: row {number + 1}" if number else str(path)
        try:
            batch = next(batches, None)
        except (pa.ArrowException, OSError, ValueError, MemoryError) as error:  # a damaged length asks for all the memory
            damage = _first_line(error)
            kind = "truncated_file" if _is_cut(path, damage=damage) else "broken_json"
            faults.refuse(kind, f"the table cannot be read on ({damage}); {AGAIN}")
        if batch is None:
            return
        for row in range(len(batch)):
            number += 1
            place = faults.place = f"{path}: row {number}"
            try:
                value = _table_row(batch.slice(row, 1), faults=faults)
            except SkipRecord:
                continue
            yield Record(place, value)


def _table_row(row: Any, *, faults: Faults) -> Any:
    """The value of a table of one row."""
    import pyarrow as pa

    try:
        row.validate(full=True)  # pyarrow takes what a file says of lengths on trust, and would read outside its memory
        return row.to_pylist()[0]
    except (pa.ArrowException, ValueError) as error:
        problem = _first_line(error)
        kind = "wrong_encoding" if "UTF8" in problem else "broken_json"
        faults.refuse(kind, f"the row cannot be read ({problem}); write the table anew {_SKIP}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _batches(path: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with path.open("rb") as file:
        head = file.read(len(b"ARROW1"))
        file.seek(0)
        if not head:
            return
        if path.suffix.lower() == ".parquet":
            yield from pq.ParquetFile(file).iter_batches(batch_size=1024)
        elif head == b"ARROW1":
            table = pa.ipc.open_file(file)
            yield from (table.get_batch(i) for i in range(table.num_record_batches))
        else:
            yield from pa.ipc.open_stream(file)


def _is_cut(path: Path, *, damage: str) -> bool:
    """Whether a damaged table ends too early: it begins with its mark and does not end with it."""
    with path.open("rb") as file:
        head = file.read(6)
        file.seek(max(0, path.stat().st_size - 6))
        tail = file.read()
    for mark in (b"PAR1", b"ARROW1"):
        if head.startswith(mark):
            return not tail.endswith(mark)
    return damage.startswith("Expected to be able to read")  # a stream of Arrow has no mark


def _read_yaml(file: TextFile) -> Iterator[Record]:
    import yaml

    text, faults = _document(file), file.faults
    if file.cut:
        file.check_whole()  # where YAML is cut, what stands before may mean something else
    kind: type[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    if _is_deep(text, kind=kind):
        faults.refuse("broken_json", f"broken YAML (nested more than {_DEEPEST} deep); mend the file {_SKIP}")
    loader = kind(text)
    nodes = _yaml_nodes(loader)
    while True:
        try:
            node = next(nodes, None)
        except yaml.YAMLError as error:
            faults.place = f"{file.path}{_line(error)}"
            faults.refuse("broken_json", f"broken YAML ({_problem(error)}); mend the line {_SKIP} the file from there on")
        if node is None:
            return
        place = faults.place = f"{file.path}:{node.start_mark.line + 1}"
        try:
            for key in _repeated_keys(node)[:1]:
                _mend_repeated(key, faults=faults)
            value = _construct(node, loader=loader, faults=faults)
        except SkipRecord:
            continue
        yield Record(place, value)


def _is_deep(text: str, *, kind: type[Any]) -> bool:
    import yaml

    depth = 0
    with contextlib.suppress(yaml.YAMLError):  # told again when the nodes are made
        for event in yaml.parse(text, Loader=kind):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:
                return True
    return False


def _yaml_nodes(loader: Any) -> Iterator[yaml.Node]:
    """The nodes of the records of all documents."""
    import yaml

    while loader.check_node():
        root = loader.get_node()
        if isinstance(root, yaml.SequenceNode):
            yield from root.value
        elif isinstance(root, yaml.MappingNode):
            arrays = [value for key, value in root.value if _holds_nodes(key, value)]
            yield from (node for array in arrays for node in array.value) if arrays else [root]
        elif root.value:
            yield root


def _holds_nodes(key: yaml.Node, value: yaml.Node) -> bool:
    import yaml

    if not isinstance(value, yaml.SequenceNode) or not value.value:
        return False
    first = value.value[0]
    if isinstance(first, yaml.MappingNode):
        return holds_records(key.value, {key.value: None for key, _ in first.value if isinstance(key, yaml.ScalarNode)})
    return holds_records(key.value, [] if isinstance(first, yaml.SequenceNode) else None)


def _repeated_keys(root: yaml.Node) -> list[str]:
    import yaml

    repeated = []
    seen, left = set(), [root]
    while left:
        node = left.pop()
        if id(node) in seen:  # an alias
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            repeated += [key for key in keys if keys.count(key) > 1] if len(set(keys)) != len(keys) else []
            left += [value for _, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            left += node.value
    return repeated


def _construct(node: yaml.Node, *, loader: Any, faults: Faults) -> Any:
    import yaml

    try:
        return loader.construct_document(node)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2020-13-45
        faults.refuse("broken_json", f"broken YAML ({_problem(error)}); mend the record {_SKIP}")


def _line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f":{mark.line + 1}" if mark else ""


def _problem(error: Exception) -> str:
    return str(getattr(error, "problem", None) or _first_line(error))


def _read_chats(file: TextFile) -> Iterator[Record]:
    text = _document(file)
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    starts = [i for i, line in enumerate(lines) if line.strip() and (i == 0 or not lines[i - 1].strip())]
    if file.cut:
        starts = starts[:-1]  # a chat that may be cut is none
    for start in starts:
        place = file.faults.place = f"{file.path}:{start + 1}"
        try:
            messages = _chat(lines, start=start, faults=file.faults)
        except SkipRecord:
            continue
        yield Record(place, {"messages": messages})


def _chat(lines: list[str], *, start: int, faults: Faults) -> list[dict[str, str]]:
    messages: list[dict[str, str]] = []
    for line in lines[start:]:
        if not line.strip():
            break
        spoken = SPOKEN.fullmatch(line)
        if spoken and _is_name(spoken[1]):
            messages.append({"role": spoken[1], "content": (spoken[2] or "").strip()})
        elif messages:
            messages[-1]["content"] = f"{messages[-1]['content']}\n{line.rstrip()}".removeprefix("\n")
        else:
            faults.refuse(
                "unknown_schema", f"nobody speaks in {line.strip()[:40]!r}; begin a chat with a name, such as 'User: Hello', {_SKIP}"
            )
    return messages


def _is_name(text: str) -> bool:
    """Whether a text is 1 to 3 words of letters; vowel signs are letters too."""
    words = text.split()
    letters = all(unicodedata.category(character)[0] in "LM" for character in "".join(words))
    return letters and 1 <= len(words) <= 3 and len(text) <= _NAME_LENGTH
