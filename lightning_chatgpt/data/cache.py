"""Files that are built once: by one process while others wait, and whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import uuid
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from lightning.fabric.utilities.rank_zero import rank_zero_info

from lightning_chatgpt.errors import ConfigError

ENVIRONMENT_VARIABLE = "LIGHTNING_CHATGPT_CACHE"
_PATIENCE_SECONDS = 5.0


def cache_folder(setting: str | None) -> Path:
    """The folder of built files: the one set, that of the environment, or the user's own."""
    chosen = setting or os.environ.get(ENVIRONMENT_VARIABLE)
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "lightning_chatgpt"


def make_folder(folder: Path) -> None:
    """Make the cache's folder, and clear away what processes of this machine that are gone left unfinished there.

    Raises:
        ConfigError: It cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, "Permission denied")
    except OSError as error:
        raise ConfigError(
            f"the cache {folder} cannot be written to ({error.strerror}); set data.cache_dir or {ENVIRONMENT_VARIABLE} to another folder"
        ) from None
    for path in folder.glob(f"{platform.node()}-*.unfinished"):
        if not _is_running(int(path.name.rsplit("-", 2)[1])):
            path.unlink(missing_ok=True)


def unfinished_path(folder: Path) -> Path:
    """A name for a file of this process that is not finished yet."""
    return folder / f"{platform.node()}-{os.getpid()}-{uuid.uuid4().hex}.unfinished"


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # somebody else's
    return True


def key_of(*parts: Any) -> str:
    """A digest of plain data: equal parts, equal key."""
    text = json.dumps([_own_code(), *parts], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


@cache
def _own_code() -> str:
    """A digest of the code that reads and encodes: what another version of it wrote is not found again."""
    digest = hashlib.blake2b(digest_size=16)
    package = Path(__file__).parent.parent
    for path in sorted([*(package / "chat").glob("*.py"), *(package / "data").glob("*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def build_once(path: Path, build: Callable[[Path], None]) -> Path:
    """Build a file, unless it is there.

    Other processes that want it wait and then find it. It is written beside its place and moved there when it is whole, so
    an interrupted build leaves nothing that could be taken for it.

    Args:
        path: Where it is to be; its name says what is in it.
        build: Writes the file to the path it is given.

    Returns: ``path``.
    """
    if path.exists():
        return path
    make_folder(path.parent)
    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire(timeout=_PATIENCE_SECONDS)
    except Timeout:
        rank_zero_info(f"Waiting for another process that builds {path}")
        lock.acquire()
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        if not path.exists():  # or another process built it while this one waited
            build(unfinished)  # what a killed process left there is overwritten
            publish(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
        lock.release()
    return path


def publish(unfinished: Path, path: Path) -> None:
    """Move a file that is whole to its place, so that it is there wholly or not at all even if the machine stops."""
    with unfinished.open("rb") as written:
        os.fsync(written.fileno())
    unfinished.replace(path)
