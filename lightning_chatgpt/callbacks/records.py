"""The files a run writes line by line, which a run that goes on takes up where its checkpoint was saved."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning_utilities.core.rank_zero import rank_zero_only

from lightning_chatgpt.checkpoints.file import replace_file
from lightning_chatgpt.errors import SaveError


class MetricsFile(CSVLogger):
    """Lightning's CSVLogger, whose ``metrics.csv`` is that of one run however often the run was stopped.

    Args:
        folder: Where the file lies.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder, name="", version="")

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """What writes, in the first process; made when it is first asked for."""
        if self._experiment is None:
            self._experiment = _Rows(log_dir=self.log_dir)
        return self._experiment

    @property
    def n_records(self) -> int:
        """How many rows were logged in all; asked of the first process."""
        return int(self.experiment.n_written + len(self.experiment.metrics))

    @rank_zero_only
    def go_on_after(self, n_records: int) -> None:
        """Keep as many rows of what earlier processes wrote."""
        keep_records(Path(self.experiment.metrics_file_path), n_records, header=True)
        self.experiment.take_up()


class _Rows(ExperimentWriter):
    """Lightning's writer, which does not remove the file of an earlier run."""

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self.n_written = 0
        self.take_up()

    def take_up(self) -> None:
        """Go on after what the file holds."""
        path = Path(self.metrics_file_path)
        if path.is_file():
            with path.open(encoding="utf-8", newline="") as file:
                rows = csv.reader(file)
                self.metrics_keys = next(rows, [])
                self.n_written = sum(1 for _ in rows)

    def _check_log_dir_exists(self) -> None:
        """Nothing: the run folder is cleared by whoever begins a new run in it."""

    def save(self) -> None:
        """Write what was logged since the last time.

        Raises:
            SaveError: It could not be written.
        """
        n_new = len(self.metrics)
        try:
            super().save()
        except OSError as error:
            raise SaveError(
                f"{self.metrics_file_path}: could not be saved ({error.strerror or error}); make room, and go on with --ckpt_path last"
            ) from error
        self.n_written += n_new

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        """Write what is there with another header; Lightning's would lose it to a crash."""
        path = Path(self.metrics_file_path)
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=fieldnames)
        writer.writeheader()
        writer.writerows(rows)
        replace_file(path, [text.getvalue()])


def keep_records(path: Path, n_records: int, *, header: bool = False) -> None:
    """Shorten a file of one record a line to its first records; the whole file is kept under another name if that leaves something out.

    Args:
        path: The file; it may be missing.
        n_records: How many to keep.
        header: Whether the first line is none.
    """
    if not path.is_file():
        return
    with path.open(encoding="utf-8", newline="") as file:
        lines = file.readlines()
    kept = lines[: n_records + int(header)]
    if len(kept) == len(lines):
        return
    n_earlier = len(list(path.parent.glob(f"{path.stem}.*{path.suffix}")))
    replace_file(path.with_name(f"{path.stem}.{n_earlier + 1}{path.suffix}"), lines)
    replace_file(path, kept)


def records_of(loggers: list[Any]) -> list[MetricsFile]:
    """Those loggers that can go on with what they wrote."""
    return [logger for logger in loggers if isinstance(logger, MetricsFile)]
