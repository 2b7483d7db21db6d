"""Readers: every format gives the same records, and every fault is told with its place, left out or mended."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
import zstandard

from lightning_chatgpt.chat.faults import Faults
from lightning_chatgpt.data import readers
from lightning_chatgpt.data.json_stream import JsonStream
from lightning_chatgpt.data.readers import SUFFIXES, format_of, read_records, read_text
from lightning_chatgpt.errors import DataError

COLUMNS = ("prompt", "completion")
TEXTS = [
    "plain",
    "quote \"two\" and 'one'",
    "lines\nof\r\ntext\n",
    "😀🧑‍🚀",
    "مرحبا, עולם",
    "a,b;c\td",
    "\\n \\u0041 \\",
    "[{]}",
    "é\u2028ß",
]
ROWS = [{"prompt": text, "completion": text[::-1] or "x"} for text in TEXTS]


def write(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def values(path: Path, on_fault: Any = "error", columns: tuple[str, ...] = COLUMNS) -> list[Any]:
    """The values of a file; at each, the faults' place is the record's."""
    faults = Faults(on_fault)
    found = []
    for record in read_records(path, faults=faults, columns=columns):
        assert record.place == faults.place
        assert record.place.startswith(f"{path}:")
        found.append(record.value)
    return found


def fault(path: Path) -> str:
    """What is said of a file that has a fault, behind its name."""
    with pytest.raises(DataError) as error:
        list(read_records(path, faults=Faults(), columns=COLUMNS))
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"{path}:")
    return message.removeprefix(f"{path}:")


def pairs(*rows: str) -> list[dict[str, str]]:
    return [dict(zip(COLUMNS, row, strict=True)) for row in rows]


def jsonl(rows: list[dict[str, str]], **settings: Any) -> bytes:
    return "".join(json.dumps(row, **settings) + "\n" for row in rows).encode()


def table(rows: list[dict[str, str]], *, delimiter: str, end: str = "\r\n") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), delimiter=delimiter, lineterminator=end)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def arrow(rows: list[dict[str, str]], new: Callable[..., Any]) -> bytes:
    made = pa.Table.from_pylist(rows)
    sink = io.BytesIO()
    with new(sink, made.schema) as writer:
        for batch in made.to_batches(2):
            writer.write_batch(batch)
    return sink.getvalue()


def parquet(rows: list[dict[str, str]], **settings: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, **settings)
    return sink.getvalue()


FORMATS: dict[str, Callable[[list[dict[str, str]]], bytes]] = {
    "a.json": lambda rows: json.dumps(rows, ensure_ascii=False).encode(),
    "indented.json": lambda rows: json.dumps(rows, indent=2).encode(),
    "inside.json": lambda rows: json.dumps({"version": 1, "data": rows, "of": ["x"]}).encode(),
    "lines.json": jsonl,
    "a.json.gz": lambda rows: gzip.compress(json.dumps(rows).encode()),
    "a.jsonl": lambda rows: jsonl(rows, ensure_ascii=False),
    "crlf.ndjson": lambda rows: b"\xef\xbb\xbf" + jsonl(rows).replace(b"\n", b"\r\n\r\n"),
    "open.jsonl": lambda rows: jsonl(rows, ensure_ascii=False).rstrip(),
    "a.JSONL.gz": lambda rows: gzip.compress(jsonl(rows[:4])) + gzip.compress(jsonl(rows[4:])),
    "a.jsonl.zst": lambda rows: zstandard.compress(jsonl(rows[:4])) + zstandard.compress(jsonl(rows[4:])),
    "a.csv": lambda rows: table(rows, delimiter=","),
    "unix.csv": lambda rows: b"\xef\xbb\xbf" + table(rows, delimiter=",", end="\n"),
    "semicolon.csv": lambda rows: table(rows, delimiter=";"),
    "macintosh.csv": lambda rows: table(rows, delimiter=",", end="\r"),
    "a.tsv.zst": lambda rows: zstandard.compress(table(rows, delimiter="\t")),
    "a.yaml": lambda rows: yaml.safe_dump(rows, allow_unicode=True).encode(),
    "inside.yml": lambda rows: yaml.safe_dump({"data": rows, "of": ["x"]}).encode(),
    "a.parquet": parquet,
    "groups.parquet": lambda rows: parquet(rows, row_group_size=2),
    "stream.arrow": lambda rows: arrow(rows, pa.ipc.new_stream),
    "file.arrow": lambda rows: arrow(rows, pa.ipc.new_file),
    "file.feather": lambda rows: arrow(rows, pa.ipc.new_file),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_records(tmp_path: Path, name: str) -> None:
    assert values(write(tmp_path / name, FORMATS[name](ROWS))) == ROWS


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.yaml", "a.txt", "a.parquet", "a.arrow", "a.jsonl.gz", "a.csv.zst"])
def test_an_empty_file_holds_no_records(tmp_path: Path, name: str) -> None:
    packed = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix, bytes)
    assert values(write(tmp_path / name, b"")) == values(write(tmp_path / name, packed(b""))) == []


@pytest.mark.parametrize(
    ("name", "form"),
    [("a.jsonl", ".jsonl"), ("b.c.JSON.GZ", ".json"), ("a.csv.zst", ".csv"), ("a.parquet.gz", None), ("a.docx", None), ("gz", None)],
)
def test_the_suffix_says_the_format(name: str, form: str | None) -> None:
    assert format_of(name) == form


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("none.jsonl", "the file cannot be opened (No such file or directory)"),
        (".", "this is a folder"),
        ("a.docx", "files of this kind cannot"),
    ],
)
def test_what_is_no_file_of_records_is_named(tmp_path: Path, name: str, says: str) -> None:
    write(tmp_path / "a.docx", "x")
    with pytest.raises(DataError) as error:
        list(read_records(tmp_path / name, faults=Faults("fix")))
    assert str(error.value).startswith(f"{tmp_path / name}: {says}")
    assert name == "none.jsonl" or all(suffix in str(error.value) for suffix in SUFFIXES)


# Name, content, what is said, the records under skip, and under fix; a fault that cannot be mended is left out there too.
SAME = "same as under skip"
FAULTS: list[tuple[str, str | bytes, str, list[Any], Any]] = [
    (
        "a.jsonl",
        '{"a": 1}\n{"a": 2}, \n[3]',
        "2: broken JSON at column 9 (Extra data); one object a line is expected",
        [{"a": 1}, [3]],
        SAME,
    ),
    ("a.jsonl", '{"messages": [\n[1]\n', "1: broken JSON at column 15 (Expecting value); one object", [[1]], SAME),
    ("a.jsonl", "[\n1\n]\n", "1: broken JSON at column 2 (Expecting value); if this is one value over many lines, name", [1], SAME),
    ("a.jsonl", '[1]\n{"é": "x\\u00', "2: the file ends at byte 17, in the middle of this line, which begins at byte 4", [[1]], SAME),
    ("a.jsonl", '[1]\n["é'.encode()[:-1], "2: the file ends at byte 7, in the middle of this line", [[1]], SAME),
    ("a.jsonl", "[1]\n[2", "2: the file ends at byte 6, in the middle of this line", [[1]], SAME),
    ("a.jsonl", "[1]\n[2}", "2: broken JSON at column 3", [[1]], SAME),
    ("a.jsonl", "[NaN]\n[-Infinity]\n[1]", "1: broken JSON (NaN is no JSON number)", [[1]], SAME),
    ("a.jsonl", f"[{'1' * 5000}]\n[1]", "1: broken JSON (Exceeds the limit (4300 digits) for integer", [[1]], SAME),
    ("a.jsonl", f"{'[' * 100000}\n[1]", "1: broken JSON (nested too deeply)", [[1]], SAME),
    ("a.jsonl", '[{"a": 1, "b": {"c": 2, "c": 3}}]\n[1]', "1: the key 'c' is there twice", [[1]], [[{"a": 1, "b": {"c": 3}}], [1]]),
    ("a.jsonl", b'["a\0b\0"]\n[1]', "1: byte 3 is NUL", [[1]], [["ab"], [1]]),
    (
        "a.jsonl",
        b'[1]\n["caf\xe9 \x93x\x94"]\n',
        "2: byte 9 is 0xE9, which is not UTF-8; it looks like Latin-1: '[\"café",
        [[1]],
        [[1], ["café “x”"]],
    ),
    ("a.jsonl", b'["\x81\xe9"]\n["\xc3\xa9"]', "1: byte 2 is 0x81, which is not UTF-8", [["é"]], [["\x81é"], ["é"]]),
    ("a.jsonl", '["é"]\n["b"]'.encode("utf-16"), " the file is UTF-16; save it as UTF-8", [], [["é"], ["b"]]),
    ("a.json", '[["é"], ["b"]]'.encode("utf-16-be"), " the file is UTF-16; save it as UTF-8", [], [["é"], ["b"]]),
    ("a.csv", "prompt,completion\né,b\n".encode("utf-16-le"), " the file is UTF-16", [], [{"prompt": "é", "completion": "b"}]),
    ("a.json", '[1, "é", [2,]]', " record 3 (byte 10): broken JSON at byte 13 (", [1, "é"], SAME),
    (
        "a.json",
        "[1, 2 3]",
        " record 3 (byte 6): broken JSON at byte 6 (Expecting ',' or ']'); mend it there, for nothing behind",
        [1, 2],
        SAME,
    ),
    ("a.json", '{"data": [[1], [2]], 3}', " record 2 (byte 15): broken JSON at byte 21 (a key in", [[1], [2]], SAME),
    ("a.json", '["é", {"a": "bé', " record 2 (byte 7): the file ends at byte 17, in the middle of what begins at byte 7", ["é"], SAME),
    ("a.json", '["é", "é'.encode()[:-1], " record 2 (byte 7): the file ends at byte 9, in the middle", ["é"], SAME),
    ("a.json", "[1, 2", " record 3 (byte 5): the file ends at byte 5, before ']'", [1, 2], SAME),
    ("a.json", "[1, 2,", " record 3 (byte 6): the file ends at byte 6", [1, 2], SAME),
    ("a.json", '{"x": {"a": 1}, "y": {"a"', " record 2 (byte 21): the file ends at byte 25", [{"a": 1, "id": "x"}], SAME),
    ("a.json", '{"x": {"a": 1}, "y', " record 2 (byte 16): the file ends at byte 18", [{"a": 1, "id": "x"}], SAME),
    ("a.json", '{"messages": ["a"', " record 1 (byte 0): the file ends at byte 17", [], SAME),
    ("a.json", "[1] x", " record 2 (byte 4): more follows behind the end of the JSON, at byte 4", [1], SAME),
    ("a.json", '{"a": 1} {"a": 2}', " record 2 (byte 9): more follows", [{"a": 1}], SAME),
    ("a.json", "[1, NaN, 2]", " record 2 (byte 4): broken JSON (NaN is no JSON number); mend the record", [1, 2], SAME),
    ("a.json", f"[1, {'1' * 5000}, 2]", " record 2 (byte 4): broken JSON (Exceeds the limit (4300 digits)", [1, 2], SAME),
    ("a.json", f"[1, {'[' * 100000}, 2]", " record 2 (byte 4): the JSON from byte 4 on is nested too deeply", [1], SAME),
    ("a.json", '[1, {"a": 1, "a": 2}, 3]', " record 2 (byte 4): the key 'a' is there twice", [1, 3], [1, {"a": 2}, 3]),
    ("a.json", b'[1, "a\0", 3]', " record 2 (byte 4): byte 6 is NUL", [1, 3], [1, "a", 3]),
    ("a.json", b'["\xc3\xa9", "\xe9", "\xc3\xa9"]', " record 2 (byte 7): byte 8 is 0xE9, which is not UTF-8", ["é", "é"], ["é", "é", "é"]),
    ("a.json", '{"a": 1\n{"a": 2}\n', " record 1 (byte 0): broken JSON at byte 8 (", [], SAME),
    ("a.csv", "prompt,completion\na,b,c\nd,e\n", "2: the row has 3 cells where 2 are expected", pairs("de"), SAME),
    ("a.csv", '"a\nb",c\nd\n', "3: the row has 1 cells where 2 are expected", [{"prompt": "a\nb", "completion": "c"}], SAME),
    (
        "a.csv",
        'a,b\n"c"d,e\nf,g',
        "2: broken CSV (',' expected after '\"')",
        pairs("ab", "fg"),
        SAME,
    ),
    ("a.csv", 'a,b\n"c,d\n', "2: the file ends in the middle of this row, within quotes", pairs("ab"), SAME),
    (
        "a.csv",
        b"a,b\n\xe9\0,\xe9\n",
        "2: byte 4 is 0xE9",
        pairs("ab"),
        pairs("ab", "éé"),
    ),
    ("a.csv", b"a\0,b\n", "1: byte 1 is NUL", [], pairs("ab")),
    ("a.csv", "prompt,x,x\na,b,c\n", "1: the key 'x' is there twice", [], [{"prompt": "a", "x": "c"}]),
    ("a.yml", "- a: 1\n- a: 1\n  a: 2\n", "2: the key 'a' is there twice", [{"a": 1}], [{"a": 1}, {"a": 2}]),
    ("a.yml", "- 2020-13-45\n- b\n", "1: broken YAML (month must be in 1..12", ["b"], SAME),
    ("a.yml", "- !thing a\n- b\n", "1: broken YAML (could not determine a constructor", ["b"], SAME),
    ("a.yml", "- a\n---\n- b: [\n", "4: broken YAML (did not find expected node content)", ["a"], SAME),
    ("a.yml", "[" * 100000, " broken YAML (nested more than 1000 deep)", [], SAME),
    ("a.yml", "- " * 1500 + "a", " broken YAML (nested more than 1000 deep)", [], SAME),
    ("a.yml", b"- caf\xe9\n", " byte 5 is 0xE9", [], ["café"]),
    ("a.txt", "hello\nAda: x\n\nAda: y", "1: nobody speaks in 'hello'", [{"messages": [{"role": "Ada", "content": "y"}]}], SAME),
    ("a.txt", b"Ada: caf\xe9\0", " byte 8 is 0xE9", [], [{"messages": [{"role": "Ada", "content": "café"}]}]),
    ("a.jsonl.gz", gzip.compress(b"[1]\nx\n[2]\n"), "2: broken JSON at column 1", [[1], [2]], SAME),
    ("a.jsonl.gz", gzip.compress(b"[1]\n[\xe9]\n"), "2: byte 5 of the uncompressed text is 0xE9", [[1]], SAME),
    ("a.jsonl.gz", gzip.compress(b"[1]\n")[:-4], " the compressed file breaks off (Compressed file ended before", [[1]], SAME),
    ("a.jsonl.gz", b"[1]\n", " the compressed file breaks off (Not a gzipped file", [], SAME),
    ("a.json.zst", zstandard.compress(b"[1, 2]")[:-2], " record 2 (byte 4): the file ends at byte 4 of the uncompressed text", [1], SAME),
]


@pytest.mark.parametrize(("name", "content", "says", "skipped", "fixed"), FAULTS, ids=[f"{i}-{row[0]}" for i, row in enumerate(FAULTS)])
def test_a_fault_is_told_left_out_or_mended(
    tmp_path: Path, name: str, content: str | bytes, says: str, skipped: list[Any], fixed: Any
) -> None:
    path = write(tmp_path / name, content)
    assert fault(path)[: len(says)] == says
    assert values(path, "skip") == skipped
    assert values(path, "fix") == (skipped if fixed is SAME else fixed)


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.jsonl", "x\n", "broken_json"),
        ("a.jsonl", "[", "truncated_file"),
        ("a.json", "[1", "truncated_file"),
        ("a.json", "[x]", "broken_json"),
        ("a.json", b'["\0"]', "nul_bytes"),
        ("a.jsonl", b'["\xe9"]\n', "wrong_encoding"),
        ("a.jsonl", '{"a": 1, "a": 2}', "duplicate_keys"),
        ("a.csv", 'a,b\n"c', "truncated_file"),
        ("a.txt", "hello", "unknown_schema"),
        ("a.parquet", b"PAR1" + b"x" * 100, "truncated_file"),
        ("a.parquet", b"x" * 100, "broken_json"),
    ],
)
def test_a_fault_is_counted_once_under_its_kind(tmp_path: Path, name: str, content: str | bytes, kind: str) -> None:
    faults = Faults("skip")
    path = write(tmp_path / name, content)
    list(read_records(path, faults=faults))
    assert faults.counts == {kind: {"skip": 1}}
    assert faults.places[kind][0].startswith(str(path))


@pytest.mark.parametrize(
    ("name", "content", "says", "kept"),
    [
        ("a.jsonl", b'[1]\n["' + b"x" * 200 + b'"]\n[2]\n', "2: the line is longer than 100 bytes", [[1], [2]]),
        ("a.jsonl", b'["' + b"x" * 96 + b'"]\n[2]\n', "", [["x" * 96], [2]]),
        ("a.jsonl", b"x" * 1000, "1: the line is longer than 100 bytes", []),
        ("a.json", b'[1, "' + b"x" * 200 + b'", 2]', " record 2 (byte 4): what begins at byte 4 is longer than 100 characters", [1]),
        ("a.csv", b"a,b\nc," + b"x" * 200 + b"\nd,e\n", "2: the row is longer than 100 bytes", pairs("ab", "de")),
        ("a.csv", b'a,b\n"' + b"x\n" * 80 + b'"\nd,e\n', "2: broken CSV (field larger than field limit (100))", pairs("ab")),
        ("a.csv", b"a,b\n" + b"xy," * 80 + b"\nd,e\n", "2: the row is longer than 100 bytes", pairs("ab", "de")),
    ],
)
def test_a_record_beyond_the_limit_is_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, says: str, kept: list[Any]
) -> None:
    monkeypatch.setattr(readers, "RECORD_BYTES", 100)
    monkeypatch.setattr("lightning_chatgpt.data.json_stream._CHUNK", 10)
    path = write(tmp_path / name, content)
    assert not says or fault(path).startswith(says)
    faults = Faults("skip")
    found = [record.value for record in read_records(path, faults=faults)]
    assert found == kept
    assert faults.counts.get("too_large", {}) == ({"skip": 1} if says else {})
    assert csv.field_size_limit() == 131072  # the process's own limit is as it was


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([[1, 2], ["q", "a"]], [[1, 2], ["q", "a"]]),
        ({"x": {"a": 1}, "y": {"id": "own"}}, [{"a": 1, "id": "x"}, {"id": "own"}]),
        ({"about": "x", "rows": [{"a": 1}, {"a": 2}], "n": 2}, [{"a": 1}, {"a": 2}]),
        ({"meta": {"a": 1}, "data": [{"a": 1}]}, [{"a": 1}]),
        ({"train": [{"a": 1}], "items": [["q", "a"]]}, [{"a": 1}, ["q", "a"]]),
        ({"conversations": [["q", "a"], ["r", "b"]]}, [["q", "a"], ["r", "b"]]),
        *(([record], [record]) for record in ({"data": [{"a": 1}]}, {"x": {}})),
        *(
            (record, [record])
            for record in (
                {"conversations": [{"from": "human", "value": "q"}]},
                {"data": [{"role": "user", "content": "q"}]},
                {"items": [{"speaker": "A", "text": "q"}]},
                {"data": ["q", "a"]},
                {"messages": [{"a": 1}]},
                {"meta": {"a": 1}, "messages": []},
                {"meta": {"a": 1}, "n": 1},
                {"data": []},
                {},
                "text",
                12,
            )
        ),
    ],
)
def test_what_the_records_of_a_json_document_are(tmp_path: Path, content: Any, expected: list[Any]) -> None:
    for indent in (None, 1):
        assert values(write(tmp_path / "a.json", json.dumps(content, indent=indent))) == expected


@pytest.mark.parametrize("step", [1, 2, 3, 7])
def test_a_json_document_may_be_read_in_pieces_of_any_size(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """A piece may end within a number, a literal, an escape, a character or between records."""
    monkeypatch.setattr("lightning_chatgpt.data.json_stream._CHUNK", step)
    numbers = [1, -12.5e-10, 1.5e300, 0, -1, True, False, None]
    rows = [numbers, *numbers, {'é😀\\"': 'a\\b"\n\u2028😀'}, {}, [], {"a": {"b": [[[]]]}}, "😀" * 20]
    for ascii_only, indent in ((True, None), (False, None), (True, 20)):
        for content in (
            rows,
            {"n": 1.5, "data": [{"a": row} for row in rows], "m": None},
            {str(i): {"a": row} for i, row in enumerate(rows)},
        ):
            data = json.dumps(content, ensure_ascii=ascii_only, indent=indent).encode()
            stream = JsonStream(io.BytesIO(data).read, start=0, limit=1000)
            items = list(stream.records())
            found = [item.value for item in items]
            assert found == (content if isinstance(content, list) else [{"a": row} for row in rows])
            for item, value in zip(items, found, strict=True):  # the byte is where the record begins
                assert json.JSONDecoder().raw_decode(data[item.byte :].decode())[0] == value


def test_every_cut_of_a_document_is_called_one(tmp_path: Path) -> None:
    rows = [{"a": [1.5e-10, -2, True, False, None]}, {"é": 'x\\ \u00e9\n😀" y'}, {"b": {}, "c": [[]]}]
    data = json.dumps(rows).encode() + b"\n"
    line = json.dumps(rows[1], ensure_ascii=False).encode() + json.dumps(rows[0]).encode()
    ends = [data.index(json.dumps(row).encode()) + len(json.dumps(row)) for row in rows]
    for end in range(1, len(data) - 2):
        path = write(tmp_path / "a.json", data[:end])
        assert f"the file ends at byte {end}" in fault(path)
        assert values(path, "skip") == rows[: sum(e <= end for e in ends)]
    for end in range(1, line.index(b"}{")):
        assert f"the file ends at byte {end + 3}, in the middle of this line" in fault(write(tmp_path / "a.jsonl", b"[]\n" + line[:end]))


def test_long_records_cross_the_borders_of_what_is_read(tmp_path: Path) -> None:
    rows = [
        {"n": n, "text": letter * size}
        for n, (letter, size) in enumerate([("é", 1_500_000), ("x", 3_000_000), ("\n", 1_400_000), ("😀", 10)])
    ]
    path = write(tmp_path / "a.json", json.dumps(rows, ensure_ascii=False))
    assert values(path) == rows
    data = path.read_bytes()
    begins = [data.index(b'{"n": %d' % n) for n in range(4)]
    places = [record.place for record in read_records(path, faults=Faults())]
    assert places == [f"{path}: record {n + 1} (byte {begin})" for n, begin in enumerate(begins)]


@pytest.mark.parametrize("inside", [False, True])
def test_a_big_array_is_read_in_little_memory_up_to_its_cut(tmp_path: Path, inside: bool) -> None:
    rows = [json.dumps({"n": n, "text": "é😀 word" * 120}, ensure_ascii=False) for n in range(20_000)]
    begin = '{"about": "x", "data": [' if inside else "["
    data = (begin + ", ".join(rows)).encode()
    assert len(data) > 20_000_000
    last = data.index(b'{"n": 19990,')
    cut = data.index("é".encode(), last + 200) + 1  # within a character, within a string
    path = write(tmp_path / "a.json", data[:cut])
    del data
    with pytest.raises(DataError) as error:
        for _ in read_records(path, faults=Faults()):
            pass
    assert str(error.value).startswith(
        f"{path}: record 19991 (byte {last}): the file ends at byte {cut}, in the middle of what begins at byte {last}"
    )
    faults = Faults("skip")
    tracemalloc.start()
    numbers = [record.value["n"] for record in read_records(path, faults=faults)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert numbers == list(range(19_990))
    assert faults.counts == {"truncated_file": {"skip": 1}}
    assert peak < 18 << 20 < path.stat().st_size  # what is read ahead, not the file


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_what_stands_before_the_cut_of_a_packed_file_is_kept(tmp_path: Path, name: str, suffix: str) -> None:
    rows = [{"prompt": f"{n}", "completion": " ".join(str(n * i % 977) for i in range(300))} for n in range(2000)]
    pack: Callable[[bytes], bytes] = gzip.compress if suffix == ".gz" else zstandard.compress
    packed = pack(FORMATS[name](rows))
    path = write(tmp_path / f"{name}{suffix}", packed[: len(packed) // 2])
    kept = values(path, "skip")
    assert 500 < len(kept) < 1500
    assert kept == rows[: len(kept)]
    message = fault(path)
    assert "the file ends at byte" in message
    assert "of the uncompressed text" in message
    assert "(Compressed file ended" in message


@pytest.mark.parametrize(
    ("content", "columns", "expected"),
    [
        ("a,b\nc,d\n", ("prompt",), [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]),
        (
            " Question ,b,c\n1,2,3\n\n4,5,6\n",
            ("question ",),
            [{"question": "1", "b": "2", "c": "3"}, {"question": "4", "b": "5", "c": "6"}],
        ),
        ("role;b\n1;2,3\n", ("ROLE",), [{"ROLE": "1", "b": "2,3"}]),
        ("role\n1\n", ("role",), [{"role": "1"}]),
    ],
)
def test_the_header_of_a_csv_file_is_known_by_its_columns(
    tmp_path: Path, content: str, columns: tuple[str, ...], expected: list[Any]
) -> None:
    assert values(write(tmp_path / "a.csv", content), columns=columns) == expected


def test_unknown_columns_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "x,y ,z\n1,2,3\n")
    assert fault(path) == "1: none of the columns 'x', 'y', 'z' is known; name them with data.fields"


def test_places(tmp_path: Path) -> None:
    for name, content, places in (
        ("a.jsonl", "\n[1]\n\n[2]", ["2", "4"]),
        ("a.json", '\n [ "é",\n"b"]', [" record 1 (byte 4)", " record 2 (byte 10)"]),
        ("bom.json", '\ufeff["é","b"]', [" record 1 (byte 4)", " record 2 (byte 9)"]),
        ("a.csv", 'a,"b\nc"\n\nd,e', ["1", "4"]),
        ("a.yml", "x: 1\nconversations:\n- - q\n  - a\n- - q\n  - a\n---\n- b\n", ["3", "5", "8"]),
        ("a.txt", "\nAda: a\nBob: b\n \n\nAda: c", ["2", "6"]),
        ("a.parquet", parquet(ROWS[:2]), [" row 1", " row 2"]),
        ("a.arrow", arrow(ROWS[:3], pa.ipc.new_stream), [" row 1", " row 2", " row 3"]),
    ):
        path = write(tmp_path / name, content)
        assert [record.place for record in read_records(path, faults=Faults())] == [f"{path}:{place}" for place in places]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("categories:\n- AI\nconversations:\n- - q\n  - a\n- - r\n  - 1\n  - yes\n", [["q", "a"], ["r", 1, True]]),
        ("conversations:\n- from: human\n  value: q\n", [{"conversations": [{"from": "human", "value": "q"}]}]),
        ("a: &x {b: 1}\nc: {<<: *x, d: 2}\n", [{"a": {"b": 1}, "c": {"b": 1, "d": 2}}]),
        ("- 1\n---\n- 2\n---\n", [1, 2]),
        ("# nothing\n", []),
    ],
)
def test_what_the_records_of_a_yaml_file_are(tmp_path: Path, content: str, expected: list[Any]) -> None:
    assert values(write(tmp_path / "a.yml", content)) == expected


def test_the_chatterbot_corpus_is_read_as_yaml_reads_it(tmp_path: Path) -> None:
    import chatterbot_corpus

    paths = sorted((Path(chatterbot_corpus.__file__).parent / "data" / "english").glob("*.yml"))
    assert len(paths) > 10
    for path in paths:
        assert values(path) == yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]


def test_chats_as_text(tmp_path: Path) -> None:
    text = (
        "Ada Lovelace: Hello: you\r\nsee http://x.y: there\r\n  10:30 it is\r\nबॉट:\r\nनमस्ते\r\n\r\n"
        "A b c d: too many words\nAda: kept\n\n\nA1: no letter\nAda: x"
    )
    path = write(tmp_path / "a.txt", text)
    ada = {"role": "Ada Lovelace", "content": "Hello: you\nsee http://x.y: there\n  10:30 it is"}
    assert values(path, "skip") == [{"messages": [ada, {"role": "बॉट", "content": "नमस्ते"}]}]
    assert fault(path).startswith("7: nobody speaks in 'A b c d: too many words'; begin a chat with a name, such as 'User: Hello'")


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_damaged_table(tmp_path: Path, kind: str) -> None:
    rows = [{"text": f"{n} " * 50} for n in range(3000)]
    data = parquet(rows, row_group_size=1000) if kind == "parquet" else arrow(rows, pa.ipc.new_stream)
    path = write(tmp_path / f"a.{kind}", data[: len(data) * 2 // 3])
    message = fault(path)
    assert "the table cannot be read on (" in message
    assert "\n" not in message
    kept = values(path, "skip")
    assert kept == rows[: len(kept)]
    assert len(kept) == 0 if kind == "parquet" else 1000 < len(kept) < 3000  # what a Parquet file holds is written at its end
    faults = Faults({"truncated_file": "skip"})
    list(read_records(path, faults=faults))


def test_a_row_of_a_table_that_is_not_utf8(tmp_path: Path) -> None:
    column = pa.array([b"a", b"\xe9", b"c"]).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert fault(tmp_path / "a.parquet").startswith(" row 2: the row cannot be read (In column 0: Invalid: Invalid UTF8")
    assert values(tmp_path / "a.parquet", "skip") == [{"text": "a"}, {"text": "c"}]


def test_a_table_that_lies_about_lengths_is_not_believed(tmp_path: Path) -> None:
    """pyarrow read outside its memory where the offsets in a damaged file led it there."""
    data = bytearray(arrow([{"text": "a"}, {"text": "bc"}, {"text": "d"}], pa.ipc.new_stream))
    at = data.index(bytes([0, 0, 0, 0, 1, 0, 0, 0, 3, 0, 0, 0]))  # where "a" and "bc" begin and end
    data[at + 4 : at + 8] = (1 << 30).to_bytes(4, "little")
    path = write(tmp_path / "a.arrow", bytes(data))
    assert "the row cannot be read (" in fault(path)
    assert values(path, "skip") == [{"text": "d"}]


def test_text_documents(tmp_path: Path) -> None:
    text = "Grüße 😀\r\nand more\n"
    for name, data in {
        "a.txt": text.encode(),
        "a.md": b"\xef\xbb\xbf" + text.encode(),
        "a.txt.gz": gzip.compress(text.encode()),
        "a.md.zst": zstandard.compress(text.encode()),
    }.items():
        assert read_text(write(tmp_path / name, data), faults=Faults()) == text
    path = write(tmp_path / "b.txt", "Grüße".encode("latin-1"))
    with pytest.raises(DataError) as error:
        read_text(path, faults=Faults())
    assert str(error.value).startswith(
        f"{path}: byte 2 is 0xFC, which is not UTF-8; it looks like Latin-1: 'Grüße'; save the file as UTF-8"
    )
    assert [read_text(path, faults=Faults(action)) for action in ("skip", "fix")] == ["", "Grüße"]
    path = write(tmp_path / "c.txt", text.encode("utf-16"))
    assert [read_text(path, faults=Faults(action)) for action in ("skip", "fix")] == ["", text]
    path = write(tmp_path / "d.txt.gz", gzip.compress(text.encode())[:-3])
    assert read_text(path, faults=Faults("skip")) == text
    with pytest.raises(DataError, match=r"d.txt.gz: the compressed file breaks off"):
        read_text(path, faults=Faults())
    with pytest.raises(DataError, match=r"none.txt: the file cannot be opened"):
        read_text(tmp_path / "none.txt", faults=Faults())


def test_a_missing_package_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl.zst", zstandard.compress(b"[1]\n"))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert fault(path).endswith("pip install 'lightning-chatgpt[data]'")


def test_a_duplicate_key_of_a_long_record_is_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record that is not read whole at first is scanned again; its faults were counted at every scan."""
    monkeypatch.setattr("lightning_chatgpt.data.json_stream._CHUNK", 4)
    faults = Faults("fix")
    path = write(tmp_path / "a.json", '[1, {"a": 1, "a": 2, "b": "' + "x" * 100 + '"}]')
    assert [record.value for record in read_records(path, faults=faults)][1]["a"] == 2
    assert faults.counts == {"duplicate_keys": {"fix": 1}}
