"""Tables: what is written is read again, from any place, without taking memory for what is not read."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from lightning_chatgpt.chat.encoding import Example
from lightning_chatgpt.data.tables import ItemRow, ItemTable, TokenTable

TEXTS = ["plain", "", "😀🧑‍🚀 مرحبا", "a\nb\r\n\t\x01", "é" * 5000, '{"a": "\\ud83d"}']


def item(i: int) -> ItemRow:
    digest = i.to_bytes(16, "big")[::-1]  # most end in zero bytes, which numpy's text types leave out
    labels = {"topic": TEXTS[i % 3], "n": str(i)} if i % 2 else {}
    return ItemRow(f"{i} {TEXTS[i % len(TEXTS)]}", i / 10_000, digest, labels, i * 7)


def write_items(path: Path, n: int) -> ItemTable:
    ItemTable.write(path, map(item, range(n)), lambda: {"faults": {"é": 1}, "n": n})
    return ItemTable(path)


@pytest.mark.parametrize("n", [0, 1, 999, 1000, 1001, 2500])
def test_items_come_back(tmp_path: Path, n: int) -> None:
    table = write_items(tmp_path / "a.arrow", n)
    assert len(table) == n
    assert table.about == {"faults": {"é": 1}, "n": n}
    assert table.places.dtype == np.float64
    assert table.places.tolist() == [item(i).place for i in range(n)]
    assert table.digests.tobytes() == b"".join(item(i).digest for i in range(n))
    assert len(set(table.digests.tolist())) == n
    everything = np.arange(n)
    assert list(table.column("content", everything)) == [item(i).content for i in range(n)]
    assert list(table.column("n_chars", everything)) == [item(i).n_chars for i in range(n)]
    labels = [json.loads(text) if text else {} for text in table.column("labels", everything)]
    assert labels == [item(i).labels for i in range(n)]


@pytest.mark.parametrize(
    "rows", [[], [0], [2499], [999, 1000], [1, 1000, 1001, 2000, 2499], list(range(0, 2500, 7)), list(range(1000, 2000))]
)
def test_rows_are_chosen_across_batches(tmp_path: Path, rows: list[int]) -> None:
    table = write_items(tmp_path / "a.arrow", 2500)
    assert list(table.column("content", np.array(rows, dtype=np.int64))) == [item(i).content for i in rows]


def test_about_is_asked_for_at_the_end(tmp_path: Path) -> None:
    seen = []

    def rows():
        for i in range(3):
            seen.append(i)
            yield item(i)

    ItemTable.write(tmp_path / "a.arrow", rows(), lambda: {"seen": list(seen)})
    assert ItemTable(tmp_path / "a.arrow").about == {"seen": [0, 1, 2]}


# Items without examples, with several, with an empty one; more than a batch's worth, some batches without any.
def found(i: int) -> list[Example]:
    if i % 5 == 0 or 1000 <= i < 2000:
        return []
    if i % 7 == 0:
        return [Example([i, i + 1], [0.0, 1.0]), Example([], []), Example([i] * 3, [0.25, 0.5, 0.0])]
    return [Example(list(range(i % 13)), [1.5] * (i % 13))]


def write_tokens(path: Path, n: int) -> TokenTable:
    TokenTable.write(path, ((i, found(i)) for i in range(n)), lambda: {"counts": {"items": n}})
    return TokenTable(path)


@pytest.mark.parametrize("n", [0, 1, 2, 1000, 1001, 3500])
def test_examples_come_back(tmp_path: Path, n: int) -> None:
    table = write_tokens(tmp_path / "a.arrow", n)
    expected = [(i, example) for i in range(n) for example in found(i)]
    assert len(table) == len(expected)
    assert table.about == {"counts": {"items": n}}
    assert table.rows.tolist() == [i for i, _ in expected]
    assert table.lengths.tolist() == [len(example.input_ids) for _, example in expected]
    for index, (_, example) in enumerate(expected):
        ids, weights = table.example(index)
        assert ids.tolist() == example.input_ids
        assert weights.tolist() == example.loss_weights


def test_types(tmp_path: Path) -> None:
    table = write_tokens(tmp_path / "a.arrow", 50)
    ids, weights = table.example(0)
    assert (ids.dtype, weights.dtype, table.lengths.dtype, table.rows.dtype) == (np.int32, np.float32, np.int64, np.int64)


def test_a_token_id_beyond_32_bits_is_no_silent_wrap(tmp_path: Path) -> None:
    with pytest.raises((OverflowError, pa.ArrowException)):
        TokenTable.write(tmp_path / "a.arrow", [(0, [Example([1 << 31], [1.0])])], lambda: {})


def test_tokens_stay_on_disk(tmp_path: Path) -> None:
    """Memory-mapped: nothing is copied when a table is opened or an example read; the file may go while it is open."""
    before = pa.total_allocated_bytes()
    table = write_tokens(tmp_path / "a.arrow", 900)
    n_bytes = (tmp_path / "a.arrow").stat().st_size
    assert n_bytes > 40_000
    ids, weights = table.example(3)
    assert not ids.flags.owndata and not weights.flags.owndata
    assert not ids.flags.writeable
    assert pa.total_allocated_bytes() - before < n_bytes / 10
    (tmp_path / "a.arrow").unlink()
    last = [example for i in range(900) for example in found(i)][-1]
    assert table.example(len(table) - 1)[0].tolist() == last.input_ids


def test_a_table_is_mapped(tmp_path: Path) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("/proc tells what is mapped")
    table = write_tokens(tmp_path / "mapped.arrow", 900)
    assert "mapped.arrow" in maps.read_text()
    items = write_items(tmp_path / "items.arrow", 900)
    assert "items.arrow" not in maps.read_text()  # what is read once need not stay resident
    assert len(table) and len(items)


def test_a_pickled_table_is_its_path(tmp_path: Path) -> None:
    """Guards against workers that get a copy of all tokens each."""
    table = write_tokens(tmp_path / "a.arrow", 900)
    data = pickle.dumps(table)
    assert len(data) < 500
    again = pickle.loads(data)
    assert again.rows.tolist() == table.rows.tolist()
    assert all(again.example(i)[0].tolist() == table.example(i)[0].tolist() for i in range(len(table)))


def test_pickled_items_are_read_again(tmp_path: Path) -> None:
    table = pickle.loads(pickle.dumps(write_items(tmp_path / "a.arrow", 1500)))
    assert list(table.column("content", np.array([3, 1400]))) == [item(3).content, item(1400).content]


def test_a_file_that_breaks_off_is_no_table(tmp_path: Path) -> None:
    write_tokens(tmp_path / "a.arrow", 900)
    data = (tmp_path / "a.arrow").read_bytes()
    (tmp_path / "cut.arrow").write_bytes(data[: len(data) // 2])
    with pytest.raises(pa.ArrowException):
        TokenTable(tmp_path / "cut.arrow")
