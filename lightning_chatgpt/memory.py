"""Memory: what a training step frees is kept for the next one, and what imports make is not searched for garbage."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager

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
