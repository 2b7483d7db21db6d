"""DurableCheckpointIO: how a Lightning Trainer writes and reads checkpoints here."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.plugins import CheckpointIO

from lightning_chatgpt.checkpoints.file import read_plain, write_checkpoint
from lightning_chatgpt.errors import ConfigError, ModelError


class DurableCheckpointIO(CheckpointIO):
    """Checkpoints that are whole or not there, and whose loading never runs code.

    ``Trainer(plugins=[DurableCheckpointIO()])``. A save is forced to the disk and then renamed into place, and one that fails is an
    error. A load makes sure of the checksum, and takes plain data only, whatever Lightning or the environment ask for.
    """

    def save_checkpoint(self, checkpoint: Mapping[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            SaveError: It could not be written; what stood there before is intact.
            ConfigError: The path is no local one.
        """
        if storage_options is not None:
            raise ConfigError("storage_options are for remote storage; checkpoints are written to local folders, and copied from there")
        write_checkpoint(checkpoint, _local(path))

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint onto the CPU.

        Raises:
            ModelError: It is not there, damaged, or holds more than plain data; or it is a URL.
        """
        return read_plain(path, mmap=False)  # a file that is gone while its pages are in use would end the process

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint, if it is there."""
        path = _local(path)
        if path.is_dir():  # some strategies write folders
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _local(path: str | Path) -> Path:
    if "://" in str(path):
        raise ModelError(f"{path}: checkpoints are read and written in local folders only; download it, and name the file")
    return Path(path)
