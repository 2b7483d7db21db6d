"""One checkpoint file: written whole or not at all, sealed with a checksum, and read without running code.

A checkpoint is what ``torch.save`` writes, a zip archive. Its checksum and the time stand in the archive's comment, so that file and
checksum cannot part, and every other reader of checkpoints takes the file as it is.
"""

from __future__ import annotations

import errno
import os
import pickle
import stat
import time
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from lightning_chatgpt.checkpoints.plain import find_foreign
from lightning_chatgpt.errors import ModelError, SaveError

if TYPE_CHECKING:
    import xxhash

PART_SUFFIX = ".part"  # of a file that is being written

_TITLE = b"lightning_chatgpt xxh3-128 "
_COMMENT_LENGTH = len(_TITLE) + 32 + 1 + 20  # the digest in hexadecimal, a blank, nanoseconds since 1970
_LENGTH_FIELD = 2  # bytes; the last entry of a zip archive without a comment tells that there is none
_CHUNK = 1 << 22
_MAGIC = b"PK"  # of a zip archive
_OVERRIDE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


def write_checkpoint(checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Write a checkpoint so that, whatever happens, the path holds either all of it or what it held before.

    It is written beside its place, forced to the disk, found to be readable, and then renamed, which no file system does by halves.

    Args:
        checkpoint: What is to be saved: plain data.
        path: Where to; its folder is made if it is not there.

    Raises:
        SaveError: It could not be written, or could not be read again.
    """
    import torch

    path = Path(path)
    part = path.with_name(f".{path.name}{PART_SUFFIX}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("w+b") as file:
                sealed = _Sealed(file)
                try:
                    torch.save(checkpoint, sealed)  # type: ignore[arg-type]  # torch asks for nothing but write and flush
                except RuntimeError:  # torch's own, about what a failed write left
                    if sealed.error is None:
                        raise
                    raise sealed.error from None
                sealed.close()
                os.fsync(file.fileno())
            try:
                torch.load(part, map_location="cpu", weights_only=True, mmap=True)  # what tensors hold need not be read
            except RuntimeError:  # a file system without such a thing
                torch.load(part, map_location="cpu", weights_only=True)
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    except (pickle.PickleError, AttributeError, TypeError) as error:  # pickle's own, of what it cannot write
        found = find_foreign(checkpoint) or str(error).splitlines()[0]
        raise SaveError(
            f"{path}: was not saved, for it would hold more than plain data ({found}), which nobody could read again; turn that into "
            "text, numbers, lists or dicts"
        ) from error
    except OSError as error:
        raise SaveError(
            f"{path}: could not be saved ({error.strerror or error}); what was saved before it is intact; "
            "mend that, and go on with --ckpt_path last"
        ) from error


def replace_file(path: Path, lines: Iterable[str]) -> None:
    """Write a text file so that, whatever happens, the path holds either all of it or what it held before.

    Args:
        path: Where to.
        lines: What it is to hold, with the ends of the lines.

    Raises:
        SaveError: It could not be written.
    """
    part = path.with_name(f".{path.name}{PART_SUFFIX}")
    try:
        with part.open("w", encoding="utf-8", newline="") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        sync_folder(path.parent)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise SaveError(
            f"{path}: could not be saved ({error.strerror or error}); what it held is intact; make room, and try again"
        ) from error


def whole_lines(path: Path) -> list[str]:
    """The lines of a text file with their ends; a kill may have cut the last one short, even within a character, and it is left out."""
    whole, end, _ = path.read_bytes().rpartition(b"\n")
    return [f"{line}\n" for line in whole.decode("utf-8").split("\n")] if end else []


def check_checkpoint(path: str | Path) -> None:
    """Make sure that a checkpoint is whole: that it is what was written. One without a seal, saved by others, is taken as it is.

    Raises:
        ModelError: It is not there, or not what was written.
    """
    state = _state_of(path)
    _check(str(path), *state)


def written_at(path: str | Path) -> int:
    """When a checkpoint was written, wherever it was copied since; in nanoseconds since 1970."""
    seal = _seal_of(Path(path)) if Path(path).is_file() else None
    return int(seal[1]) if seal is not None else Path(path).stat().st_mtime_ns


def read_plain(path: str | Path, *, mmap: bool = True) -> dict[str, Any]:
    """Read a checkpoint that holds plain data only, on the CPU; loading never runs code.

    Args:
        path: The file.
        mmap: Whether tensors stay in the file until they are used.

    Raises:
        ModelError: It is not there, damaged, or holds more than plain data, or the environment asks to run what it holds.
    """
    import torch

    if "://" in str(path):
        raise ModelError(f"{path}: checkpoints are read from files only; download it, and name the file")
    if os.environ.get(_OVERRIDE, "0").lower() not in ("", "0", "false", "n", "no"):
        raise ModelError(f"{path}: is not read while {_OVERRIDE} is set, which lets checkpoints run code; unset it")
    check_checkpoint(path)
    with open(path, "rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise ModelError(f"{path}: is no checkpoint (it does not begin as one); name a .ckpt file, or take another")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError:
        raise ModelError(f"{path}: holds more than plain data, which could run code; it is not read") from None
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise ModelError(f"{path}: cannot be read, it seems to be cut short or damaged ({reason}); take another checkpoint") from None
    if not isinstance(checkpoint, dict):
        raise ModelError(f"{path}: is no checkpoint, but a {type(checkpoint).__name__}; name a .ckpt file")
    return checkpoint


def sync_folder(folder: Path) -> None:
    """Force a folder's list of files to the disk, where the system knows of such a thing."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems know no such thing
            raise
    finally:
        os.close(handle)


class _Sealed:
    """What ``torch.save`` writes to: counts the checksum along, and puts it at the archive's end."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = _new_digest()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        """Write; what goes wrong is kept, as torch tells of something else."""
        self.digest.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        """Hand on what is buffered."""
        self.file.flush()

    def close(self) -> None:
        """Write the seal."""
        now = b"%020d" % time.time_ns()
        self.digest.update(now)
        self.file.seek(-_LENGTH_FIELD, os.SEEK_END)
        self.file.write(_COMMENT_LENGTH.to_bytes(_LENGTH_FIELD, "little"))
        self.file.write(_TITLE + self.digest.hexdigest().encode() + b" " + now)
        self.file.flush()


def _new_digest() -> xxhash.xxh3_128:
    import xxhash

    return xxhash.xxh3_128()


def _state_of(path: str | Path) -> tuple[int, int, int]:
    try:
        found = os.stat(path)
    except OSError as error:
        raise ModelError(f"{path}: no such checkpoint ({error.strerror})") from None
    if stat.S_ISDIR(found.st_mode):
        raise ModelError(f"{path}: is a folder, no checkpoint; name a .ckpt file")
    return found.st_ino, found.st_size, found.st_mtime_ns


def _seal_of(path: Path) -> tuple[bytes, bytes] | None:
    """Digest and time in a checkpoint's comment."""
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) <= _COMMENT_LENGTH:
            return None
        file.seek(-_COMMENT_LENGTH, os.SEEK_END)
        comment = file.read()
    if not comment.startswith(_TITLE):
        return None
    digest, _, written = comment.removeprefix(_TITLE).partition(b" ")
    return (digest, written) if written.isdigit() else None


@lru_cache(maxsize=64)
def _check(path: str, inode: int, size: int, changed: int) -> None:
    """Read a file through, once for each state it is in."""
    seal = _seal_of(Path(path))
    if seal is None:
        return
    digest = _new_digest()
    left = size - _COMMENT_LENGTH - _LENGTH_FIELD
    with open(path, "rb") as file:
        while left and (data := file.read(min(_CHUNK, left))):
            digest.update(data)
            left -= len(data)
    digest.update(bytes(_LENGTH_FIELD) + seal[1])
    if digest.hexdigest().encode() != seal[0]:
        raise ModelError(f"{path}: is damaged (its checksum is another than when it was saved); take another checkpoint")
