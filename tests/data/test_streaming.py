"""A file far larger than what is held of it: a JSON array of 125 MB that breaks off within a string."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_chatgpt.data.sources import SourceReport, read_conversations
from lightning_chatgpt.errors import DataError

ROOT = Path(__file__).parents[2]
N_BYTES = 125_000_000
MEMORY = 24 << 20  # what reading may take at its peak, beside what the process has anyway

READER = """
import resource, sys
from lightning_chatgpt.chat.faults import Faults
from lightning_chatgpt.data.sources import SourceReport, read_conversations

small, big, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
sum(1 for _ in read_conversations(small))  # what is imported late is there now
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + limit, size + limit))
report = SourceReport(Faults("skip"))
n, last = 0, ""
for chat in read_conversations(big, report=report):
    n, last = n + 1, chat.messages[0].content
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(n, last.split()[0], report.faults.counts, peak << 10, sep="|")
"""


def records() -> Iterator[str]:
    n = 0
    while True:
        question, answer = f"q{n} " + 'wie geht es dir, Wörld? 😀 \\"x\\"\\n' * 40, f"a{n} " + "gut! \\u00e9 " * 60
        yield f'{{"messages": [{{"role": "user", "content": "{question}"}}, {{"role": "assistant", "content": "{answer}"}}]}}'
        n += 1


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int, int]]:
    """A JSON array of 125 MB; how many whole records it has, and where the last one begins, which is cut within a string."""
    path = tmp_path_factory.mktemp("big") / "chats.json"
    written, n, begin = 1, 0, 1
    with path.open("wb") as file:
        file.write(b"[")
        made = records()
        while True:
            record = next(made).encode()
            if written + 600 > N_BYTES:
                file.write(record[:600])  # within the question
                break
            begin = written + len(record) + 2
            file.write(record + b",\n")
            written, n = begin, n + 1
    yield path, n, begin
    path.unlink()


def test_it_is_what_it_is_to_be(cut: tuple[Path, int, int]) -> None:
    path, n, begin = cut
    assert abs(path.stat().st_size - N_BYTES) < 10_000
    assert n > 30_000
    with path.open("rb") as file:
        file.seek(begin)
        rest = file.read()
    assert rest.startswith(b'{"messages"')
    with pytest.raises(json.JSONDecodeError, match="Unterminated string"):
        json.loads(rest)


@pytest.mark.skipif(sys.platform != "linux", reason="limits its memory as Linux does")
def test_it_loads_up_to_the_cut_in_little_memory(cut: tuple[Path, int, int], tmp_path: Path) -> None:
    """In a process that may have 64 MB more than it had: half of the file."""
    path, n, _ = cut
    small = tmp_path / "small.json"
    small.write_text(f"[{next(records())}]")
    command = [sys.executable, "-c", READER, str(small), str(path), str(64 << 20)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found, last, counts, peak = done.stdout.strip().split("|")
    assert int(found) == n
    assert last == f"q{n - 1}"
    assert counts == "{'truncated_file': {'skip': 1}}"
    assert int(peak) < MEMORY < path.stat().st_size / 4


def test_the_error_names_the_byte(cut: tuple[Path, int, int]) -> None:
    path, n, begin = cut
    report = SourceReport()
    with pytest.raises(DataError) as error:
        for _ in read_conversations(str(path), report=report):
            pass
    end = path.stat().st_size
    assert str(error.value) == (
        f"{path}: record {n + 1} (byte {begin}): the file ends at byte {end}, in the middle of what begins at byte {begin}; "
        "fetch or write the file anew, or set data.on_fault to skip to use what stands before"
    )
    assert report.n_records == n  # told after all that could be read
