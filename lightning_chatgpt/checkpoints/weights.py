"""Folders of safetensors: put in their place whole, with checksums that are looked at before the weights are loaded."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_chatgpt.checkpoints.file import PART_SUFFIX, sync_folder
from lightning_chatgpt.errors import ModelError, SaveError

SUMS = "SHA256SUMS"  # as sha256sum writes and checks it


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write to, whose files take their places in another once all of them are on the disk, and their checksums last.

    Args:
        folder: Where the files come to; others there stay as they are.

    Raises:
        SaveError: They could not be written; then what was there still is.
    """
    part = folder / PART_SUFFIX  # within, so that it is on the same disk
    try:
        shutil.rmtree(part, ignore_errors=True)
        is_new = not folder.exists()
        part.mkdir(parents=True)
        try:
            yield part
            names = sorted(path.name for path in part.iterdir())
            _write_sums(part)
            for name in [*names, SUMS]:
                with (part / name).open("rb") as file:
                    os.fsync(file.fileno())
            for name in [*names, SUMS]:
                os.replace(part / name, folder / name)
            # Weights in more or fewer files than before: transformers would load the old ones.
            for path in folder.glob("*.safetensors*"):
                if path.name not in names:
                    path.unlink()
            sync_folder(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
            if is_new and folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
    except OSError as error:
        raise SaveError(f"{folder}: could not be written ({error.strerror or error}); mend that, and export again") from error


def check_weights(folder: Path) -> None:
    """Make sure that a folder's weights are those that were written, where it says so.

    Raises:
        ModelError: They are not, or some are missing.
    """
    sums = folder / SUMS
    if not sums.is_file():
        return
    for line in sums.read_text(encoding="utf-8").splitlines():
        digest, _, name = line.partition("  ")
        path = folder / name
        if not path.is_file():
            raise ModelError(f"{path}: is missing, and {SUMS} names it; export the model again from its checkpoint")
        if _digest(path) != digest:
            raise ModelError(
                f"{path}: is damaged (its checksum is not the one in {SUMS}); export the model again from its checkpoint, "
                f"or remove {SUMS} if you changed the weights yourself"
            )


def _write_sums(folder: Path) -> None:
    lines = [f"{_digest(path)}  {path.name}\n" for path in sorted(folder.glob("*.safetensors"))]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
