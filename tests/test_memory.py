"""What glibc does with freed blocks, counted by the system."""

from __future__ import annotations

import ctypes
import gc
import platform
import subprocess
import sys

import pytest

from lightning_chatgpt.memory import keep_freed_memory, uncollected

# Ten times in a row 64 MiB are taken, written and freed; the system counts the pages it hands out.
SCRIPT = """
import ctypes, resource, sys
from lightning_chatgpt.memory import keep_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.memset.argtypes, libc.free.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], [ctypes.c_void_p]
if sys.argv[1] == "kept":
    assert keep_freed_memory() is True
for i in range(11):
    if i == 1:
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(64 << 20)
    libc.memset(block, 1, 64 << 20)
    libc.free(block)
usage = resource.getrusage(resource.RUSAGE_SELF)
print(usage.ru_minflt - faults, usage.ru_maxrss)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_freed_blocks_are_used_again_and_cost_no_more_memory() -> None:
    def run(how: str) -> tuple[int, int]:
        done = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True)
        faults, peak = map(int, done.stdout.split())
        return faults, peak

    (plain_faults, plain_peak), (faults, peak) = run("plain"), run("kept")
    # 10 · 64 MiB in pages of 4 KiB, or of 2 MiB where the system makes pages huge by itself.
    assert plain_faults >= 10 * 32
    assert faults <= plain_faults / 10
    assert peak < 1.5 * plain_peak


class NoLibrary:
    """A C library that is not glibc."""

    def __getattr__(self, name: str) -> object:
        raise AttributeError(name)


def refuse(name: None) -> None:
    raise TypeError("argument of type NoneType")


@pytest.mark.parametrize("load", [lambda name: NoLibrary(), refuse])
def test_elsewhere_nothing_is_done(load: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", load)
    assert keep_freed_memory() is False


def test_garbage_is_collected_again_after_imports() -> None:
    """Garbage of before is left; what was imported is not looked at any more; a failed import changes nothing."""
    n_before = gc.get_freeze_count()
    with uncollected():
        assert not gc.isenabled()
        kept = [[]]  # a stand-in for a module's objects
    assert gc.isenabled() and gc.get_freeze_count() > n_before
    assert not any(found is kept for found in gc.get_objects())
    gc.unfreeze()
    with pytest.raises(ImportError), uncollected():
        raise ImportError
    assert gc.isenabled() and gc.get_freeze_count() == 0
