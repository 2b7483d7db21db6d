"""What lies in the cache: conversations or documents as they were read, and examples as they were encoded. Both are Arrow files.

Shapes: an example has T tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from lightning_chatgpt.chat.encoding import Example

Ints = npt.NDArray[np.int64]

_ROWS_AT_ONCE = 1000
_CHARS_AT_ONCE = 1 << 25  # or tokens: a batch of long documents must stay in memory, and Arrow counts its characters in 31 bits
_ABOUT = b"lightning_chatgpt"  # where a file says what is in it

_ITEM_SCHEMA = pa.schema(
    [("content", pa.string()), ("place", pa.float64()), ("digest", pa.binary(16)), ("labels", pa.string()), ("n_chars", pa.int64())]
)
_TOKEN_SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32())), ("loss_weights", pa.list_(pa.float32())), ("row", pa.int64())])


@dataclass(frozen=True, slots=True)
class ItemRow:
    """One item as it is stored.

    Attributes:
        content: The item, as its data module writes it down.
        place: Where it stands in [0, 1), which decides its split; equal places stay together.
        digest: 16 bytes that are equal for equal contents.
        labels: What the record said of it.
        n_chars: Its length.
    """

    content: str
    place: float
    digest: bytes
    labels: dict[str, str]
    n_chars: int


def _view(array: pa.Array, dtype: str) -> npt.NDArray[Any]:
    """A column without nulls as numpy has it. pyarrow's own way imports pandas."""
    if not len(array):
        return np.empty(0, dtype)
    return np.frombuffer(array.buffers()[1], dtype)[array.offset : array.offset + len(array)]


class ItemTable:
    """Items of one source on disk; read in order, never all in memory.

    Args:
        path: The file.

    Attributes:
        about: What reading the source met with, as plain data, and ``digest``, which is equal for equal contents.
        places: (N,) the items' places.
        digests: (N,) the items' digests, 16 bytes each.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # Copies: a view would keep the whole batch in memory, contents and all.
        batches = [(_view(b["place"], "f8").copy(), _view(b["digest"], "S16").copy()) for b in self._batches("place", "digest")]
        self.places: npt.NDArray[np.float64] = np.concatenate([np.array([], np.float64), *(places for places, _ in batches)])
        self.digests: npt.NDArray[np.bytes_] = np.concatenate([np.array([], "S16"), *(digests for _, digests in batches)])
        with pa.OSFile(str(path)) as file:
            self.about = _read_about(pa.ipc.open_file(file))

    def __len__(self) -> int:
        return len(self.places)

    def column(self, name: str, rows: Ints) -> Iterator[Any]:
        """One column of some rows, which are in ascending order."""
        start = 0
        for batch in self._batches(name):
            first, last = np.searchsorted(rows, (start, start + batch.num_rows))
            if first < last:
                yield from batch[name].take(pa.array(rows[first:last] - start)).to_pylist()
            start += batch.num_rows

    def _batches(self, *names: str) -> Iterator[pa.RecordBatch]:
        options = pa.ipc.IpcReadOptions(included_fields=[_ITEM_SCHEMA.get_field_index(name) for name in names])
        with pa.OSFile(str(self.path)) as file:  # not memory-mapped: what is read once need not stay resident
            reader = pa.ipc.open_file(file, options=options)
            for i in range(reader.num_record_batches):
                yield reader.get_batch(i)

    @staticmethod
    def write(path: Path, rows: Iterable[ItemRow], about: Callable[[], dict[str, Any]]) -> None:
        """Write items to a file.

        Args:
            path: Where to.
            rows: The items.
            about: Asked at the end what the file is to say of itself.
        """
        batch: list[ItemRow] = []
        n_chars = 0
        with _Writer(path, _ITEM_SCHEMA) as writer:
            for row in rows:
                batch.append(row)
                n_chars += row.n_chars
                if len(batch) == _ROWS_AT_ONCE or n_chars > _CHARS_AT_ONCE:
                    writer.add(_item_batch(batch))
                    batch, n_chars = [], 0
            if batch:
                writer.add(_item_batch(batch))
            writer.about = about()


class TokenTable:
    """Examples on disk, memory-mapped: those that are not read take no memory, and processes share those that are.

    Args:
        path: The file.

    Attributes:
        about: Counts, as plain data.
        lengths: (N,) tokens of each example.
        rows: (N,) which item of its table each example came from.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = pa.memory_map(str(path))
        reader = pa.ipc.open_file(self._file)
        self.about = _read_about(reader)
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        columns = [
            (_view(b["input_ids"].values, "i4"), _view(b["loss_weights"].values, "f4"), _view(b["input_ids"].offsets, "i4"))
            for b in batches
        ]
        self._batches = columns
        self._starts = np.cumsum([0, *(batch.num_rows for batch in batches)])
        empty = np.array([], dtype=np.int64)
        self.lengths: Ints = np.concatenate([empty, *(np.diff(offsets) for _, _, offsets in columns)])
        self.rows: Ints = np.concatenate([empty, *(_view(b["row"], "i8") for b in batches)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __reduce__(self) -> Any:
        return TokenTable, (self.path,)

    def example(self, index: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """Token ids and loss weights of an example; shapes (T,)."""
        batch = int(np.searchsorted(self._starts, index, side="right")) - 1
        ids, weights, offsets = self._batches[batch]
        start, end = offsets[index - self._starts[batch]], offsets[index - self._starts[batch] + 1]
        return ids[start:end], weights[start:end]

    @staticmethod
    def write(path: Path, examples: Iterable[tuple[int, Sequence[Example]]], about: Callable[[], dict[str, Any]]) -> None:
        """Write examples to a file.

        Args:
            path: Where to.
            examples: For each item its row and its examples.
            about: Asked at the end what the file is to say of itself.
        """
        with _Writer(path, _TOKEN_SCHEMA) as writer:
            batch = _TokenBatch()
            for n_read, (row, found) in enumerate(examples, start=1):
                for example in found:
                    batch.add(row, example)
                if n_read % _ROWS_AT_ONCE == 0 or len(batch.ids) > _CHARS_AT_ONCE:
                    writer.add(batch.to_arrow())
                    batch = _TokenBatch()
            writer.add(batch.to_arrow())
            writer.about = about()


@dataclass
class _TokenBatch:
    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    offsets: list[int] = field(default_factory=lambda: [0])
    rows: list[int] = field(default_factory=list)

    def add(self, row: int, example: Example) -> None:
        self.ids += example.input_ids
        self.weights += example.loss_weights
        self.offsets.append(len(self.ids))
        self.rows.append(row)

    def to_arrow(self) -> pa.RecordBatch:
        offsets = pa.array(self.offsets, pa.int32())
        columns = [
            pa.ListArray.from_arrays(offsets, pa.array(np.array(self.ids, np.int32))),
            pa.ListArray.from_arrays(offsets, pa.array(np.array(self.weights, np.float32))),
            pa.array(self.rows, pa.int64()),
        ]
        return pa.RecordBatch.from_arrays(columns, schema=_TOKEN_SCHEMA)


class _Writer:
    """Writes an Arrow file that says at its end what is in it."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.about: dict[str, Any] = {}
        self._schema = schema
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._file, schema)

    def __enter__(self) -> _Writer:
        return self

    def add(self, batch: pa.RecordBatch) -> None:
        self._writer.write_batch(batch)

    def __exit__(self, *error: object) -> None:
        # The counts are known at the end only, and a schema's metadata is written first: an empty batch carries them.
        nothing = pa.RecordBatch.from_pylist([], schema=self._schema)
        self._writer.write_batch(nothing, custom_metadata={_ABOUT: json.dumps(self.about)})
        self._writer.close()
        self._file.close()


def _read_about(reader: Any) -> dict[str, Any]:
    last = reader.get_batch_with_custom_metadata(reader.num_record_batches - 1)
    about: dict[str, Any] = json.loads(last.custom_metadata[_ABOUT])
    return about


def _item_batch(rows: Sequence[ItemRow]) -> pa.RecordBatch:
    columns = [
        pa.array([row.content for row in rows], pa.string()),
        pa.array([row.place for row in rows], pa.float64()),
        pa.array([row.digest for row in rows], pa.binary(16)),
        pa.array([json.dumps(row.labels) if row.labels else "" for row in rows], pa.string()),
        pa.array([row.n_chars for row in rows], pa.int64()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=_ITEM_SCHEMA)
