"""metrics.csv is that of one run, however many processes wrote it."""

from __future__ import annotations

import csv
from pathlib import Path

from lightning_chatgpt.callbacks.records import MetricsFile, keep_records


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]


def test_another_process_goes_on_in_the_same_file(tmp_path: Path) -> None:
    """Guards against Lightning's CSVLogger, which removes what an earlier process wrote; also where no checkpoint tells of rows."""
    first = MetricsFile(tmp_path)
    for step in range(3):
        first.log_metrics({"loss": step / 2}, step)
    first.save()
    assert first.n_records == 3
    second = MetricsFile(tmp_path)
    second.log_metrics({"loss": 1.5, "rate": 0.1}, 3)
    assert second.n_records == 4
    second.save()
    earlier = [{"loss": str(step / 2), "step": str(step)} for step in range(3)]
    assert rows(tmp_path / "metrics.csv") == [*earlier, {"loss": "1.5", "rate": "0.1", "step": "3"}]


def test_rows_after_the_checkpoint_are_written_anew_and_kept_aside(tmp_path: Path) -> None:
    first = MetricsFile(tmp_path)
    for step in range(3):
        first.log_metrics({"loss": step / 2}, step)
    first.save()
    again = MetricsFile(tmp_path)
    again.go_on_after(2)
    again.log_metrics({"loss": 7.0}, 2)
    again.save()
    assert [row["loss"] for row in rows(tmp_path / "metrics.csv")] == ["0.0", "0.5", "7.0"]
    assert [row["loss"] for row in rows(tmp_path / "metrics.1.csv")] == ["0.0", "0.5", "1.0"]
    again.go_on_after(3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.1.csv", "metrics.csv"]


def test_a_file_without_a_header_keeps_its_first_lines(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    keep_records(path, 1)
    assert not path.exists()
    path.write_text("1\n2\n3\n")
    keep_records(path, 2)
    assert path.read_text() == "1\n2\n" and (tmp_path / "samples.1.jsonl").read_text() == "1\n2\n3\n"
