"""A deadline for Python code that others wrote, such as a chat template: it may loop for days."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

_POLL_SECONDS = 0.1


class TookTooLong(Exception):
    """The deadline passed."""


class _Interrupt(BaseException):
    """Raised amid the code; no ``except Exception`` of its own stops it."""


class _Call:
    """One call: when it is to be over, and whether it was interrupted."""

    def __init__(self, seconds: float) -> None:
        self.thread = threading.get_ident()
        self.until = time.monotonic() + seconds
        self.is_interrupted = False


class _Watch:
    """A thread that looks at the calls which are on, and interrupts those that take too long."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.lock = threading.Lock()
        self.calls: list[_Call] = []
        self.has_calls = threading.Event()
        threading.Thread(target=self._watch, daemon=True, name="deadlines").start()

    def begin(self, seconds: float) -> _Call:
        call = _Call(seconds)
        with self.lock:
            self.calls.append(call)
        self.has_calls.set()
        return call

    def end(self, call: _Call) -> None:
        with self.lock:
            if call in self.calls:
                self.calls.remove(call)

    def _watch(self) -> None:
        while True:
            self.has_calls.wait()
            time.sleep(_POLL_SECONDS)
            with self.lock:
                if not self.calls:
                    self.has_calls.clear()
                for call in self.calls:
                    if time.monotonic() > call.until and not call.is_interrupted:
                        call.is_interrupted = True
                        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(call.thread), ctypes.py_object(_Interrupt))


_the_watch: list[_Watch] = []  # one a process


def within(seconds: float, function: Callable[[], Result]) -> Result:
    """Call a function, and break it off when a time has passed. One long operation in C is not broken off amid it.

    Args:
        seconds: How long it may take.
        function: What to call.

    Returns: what it returns.

    Raises:
        TookTooLong: It took longer.
    """
    if not _the_watch or _the_watch[0].process != os.getpid():  # threads do not survive a fork
        _the_watch[:] = [_Watch()]
    watch = _the_watch[0]
    call = watch.begin(seconds)
    try:
        try:
            return function()
        finally:
            watch.end(call)
            if call.is_interrupted and not isinstance(sys.exc_info()[1], _Interrupt):
                time.sleep(1)  # the interruption is on its way, and is not to come amid something else
    except _Interrupt:
        watch.end(call)
        raise TookTooLong from None
