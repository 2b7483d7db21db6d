"""Memory: what a training step frees is kept for the next one, what imports make is not searched for garbage, and a bound for searches."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_chatgpt.errors import ConfigError

_CGROUP = Path("/sys/fs/cgroup")

# Parameters of glibc's mallopt, from its malloc.h, and what they are set to: never map a block by itself, never give the heap's end back.
_SETTINGS = {-4: 0, -1: -1}  # M_MMAP_MAX, M_TRIM_THRESHOLD


def keep_freed_memory() -> bool:
    """Let the C library keep large blocks that are freed, in place of handing each back to the system.

    Otherwise most tensors are mapped anew in each step, and the system clears and hands out each of their pages again. Peak memory
    grows by a few percent, and between peaks it is not given back. Blocks that are mapped already stay so: call it before training.

    Returns: whether it could be done; False where the C library is not glibc.
    """
    try:
        libc = ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows
        return False
    if not hasattr(libc, "gnu_get_libc_version"):  # macOS, musl
        return False
    return all([libc.mallopt(parameter, value) == 1 for parameter, value in _SETTINGS.items()])


def give_freed_memory_back() -> None:
    """Hand what is free to the system, once: after work that took more than what follows will. Nothing where the C library is not glibc."""
    try:
        libc = ctypes.CDLL(None)
    except (OSError, TypeError):
        return
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def available_memory() -> int:
    """The memory that this process may still take before the system ends it, its control groups looked at too; in bytes. Linux only."""
    told = Path("/proc/meminfo").read_text(encoding="ascii")
    found = re.search(r"^MemAvailable:\s+(\d+) kB", told, re.MULTILINE)
    assert found is not None
    left = [int(found[1]) * 1024]
    for limit, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        try:
            told = (_CGROUP / used).with_name("memory.stat").read_text(encoding="ascii")
            cached = re.search(r"^(?:total_)?inactive_file (\d+)", told, re.MULTILINE)  # is given up where it is needed
            left.append(int((_CGROUP / limit).read_text()) - int((_CGROUP / used).read_text()) + int(cached[1] if cached else 0))
        except (OSError, ValueError):  # no such control group, or "max"
            continue
    return max(0, min(left))


@contextmanager
def limited_memory(share: float = 0.9) -> Iterator[None]:
    """Have a process that takes more memory than there is fail with an error, as on a GPU; the system would end it.

    Args:
        share: Of the available memory that it may take.

    Raises:
        ConfigError: This system knows no such limit.
    """
    if sys.platform != "linux":
        raise ConfigError("batch_size_find needs a GPU here: beyond its memory, this system ends the process in place of telling it")
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    told = re.search(r"^VmData:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    assert told is not None
    limit = int(told[1]) * 1024 + int(share * available_memory())
    bounds = [bound for bound in (limit, *before) if bound != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min(bounds), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


@contextmanager
def uncollected() -> Iterator[None]:
    """Put up with garbage while modules are imported, and never look at what they made again.

    Torch, Lightning and transformers make hundreds of thousands of objects that stay. To search them for garbage, time and again while
    they come in, takes a fifth of their imports' time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        if was_enabled:
            gc.enable()
