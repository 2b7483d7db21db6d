"""Processes that belong together, none of which outlives the others; and those that must not get in each other's way."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_chatgpt.errors import ConfigError, UserError

_POLL_SECONDS = 0.5

PARENT = "LIGHTNING_CHATGPT_PARENT"  # set in the environment of a process that is to end with another, to that one's id


def end_with_parent() -> None:
    """End this process soon after its parent is gone: nobody would tell it to, and it could wait for ever in a collective operation."""
    parent = os.getppid()
    if os.environ.pop(PARENT, str(parent)) != str(parent):
        os._exit(1)  # it is gone already

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()


@contextmanager
def alone_in(folder: Path, *, at_work: str) -> Iterator[None]:
    """Work in a folder, which is made if it is not there, while no other process does.

    Args:
        folder: Where.
        at_work: What another process does there, for the error.

    Raises:
        ConfigError: One does, or the folder cannot be made.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise ConfigError(f"{folder}: {at_work}; wait until that has ended, or name another folder") from None
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written to ({error.strerror or error}); name another folder") from None
    try:
        yield
    finally:
        lock.release()


def end_within(seconds: float, exception: BaseException, *, is_stuck: Callable[[], bool]) -> threading.Event:
    """End this process if it gets stuck after an exception, for something waits for a process that is gone.

    Args:
        seconds: How long on end it may be stuck.
        exception: What is told of then, and chooses the exit code.
        is_stuck: Asked in another thread, again and again.

    Returns: what ends the watch when it is set.
    """
    if isinstance(exception, SystemExit):
        told, code = "", exception.code
    elif isinstance(exception, UserError):
        told, code = f"error: {exception}\n", exception.exit_code
    else:
        told, code = "".join(traceback.format_exception(exception)), 1
    is_over = threading.Event()

    def watch() -> None:
        since = time.monotonic()
        while not is_over.wait(_POLL_SECONDS):
            if not is_stuck():
                since = time.monotonic()
            elif time.monotonic() - since >= seconds:
                print(f"{told}this process did not end by itself in {seconds:.0f} s, and is ended", file=sys.stderr, flush=True)
                os._exit(code if isinstance(code, int) else 1)

    threading.Thread(target=watch, daemon=True, name="end-within").start()
    return is_over


def shield_from_signals(worker_id: int = 0) -> None:
    """Leave signals to the parent: a worker that a signal to the whole group ends would take the run's last steps with it.

    Only the parent ends a worker, with SIGTERM. For a ``DataLoader``'s ``worker_init_fn``.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS, Windows
        return
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True, name="wait-for-parent").start()
