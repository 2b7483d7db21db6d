"""The checkpoints of a folder: which is the newest that is whole, and which the best."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_chatgpt.checkpoints.file import PART_SUFFIX, read_plain, written_at
from lightning_chatgpt.errors import ModelError


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a folder; those that are damaged are named in a warning, and skipped.

    Returns: None where there is none.
    """
    return next(_whole(folder), None)


def best_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that the newest one names as the best and that is still there; the newest itself where none is.

    Returns: None where there is none.
    """
    newest = None
    for path in _whole(folder):
        newest = newest or path
        for state in read_plain(path).get("callbacks", {}).values():
            # By name alone: the run folder may have been moved.
            best = folder / Path(state.get("best_model_path") or path.name).name
            if state.get("best_model_path") and best.is_file():
                return best
    return newest


def remove_parts(folder: Path) -> None:
    """Remove what is left of saves that were broken off."""
    for path in folder.glob(f".*{PART_SUFFIX}"):
        path.unlink(missing_ok=True)


def _whole(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.glob("*.ckpt"), key=written_at, reverse=True):
        try:
            read_plain(path)
        except ModelError as error:
            rank_zero_warn(f"{error}; skipped")
        else:
            yield path
