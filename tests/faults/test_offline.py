"""A hub that cannot be reached is found out within seconds, whatever is wrong with it, and the error says what to do."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_chatgpt.errors import ModelError
from lightning_chatgpt.models.build import find_pretrained
from tests.faults.runs import command, environment, write_project


@pytest.fixture(scope="module")
def silent_server() -> Iterator[str]:
    """A server that takes every connection and never answers."""
    kept = []
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(50)
        server.settimeout(0.2)
        is_over = threading.Event()

        def accept() -> None:
            while not is_over.is_set():
                try:
                    kept.append(server.accept()[0])
                except TimeoutError:
                    continue

        thread = threading.Thread(target=accept)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        is_over.set()
        thread.join()
    for connection in kept:
        connection.close()


@pytest.mark.slow
@pytest.mark.parametrize(("verb", "how"), [("chat", "refused"), ("chat", "no such name"), ("fit", "never answers"), ("chat", "offline")])
def test_an_error_within_ten_seconds(verb: str, how: str, silent_server: str, tmp_path: Path) -> None:
    """Guards against the client's retries: 24 to 48 seconds where a connection is refused, and for ever where nobody answers."""
    write_project(tmp_path)
    endpoint = {"refused": "http://127.0.0.1:9", "no such name": "http://no-such-host.invalid", "never answers": silent_server}
    env = {**environment(), "HF_HOME": str(tmp_path / "cache"), "HF_ENDPOINT": endpoint.get(how, "https://huggingface.co")}
    if how != "offline":
        del env["HF_HUB_OFFLINE"]
    arguments = ["chat", "gpt2", "--prompt", "Hi"]
    if verb == "fit":
        arguments = ["fit", "-c", "run.yaml", "--model.architecture", "null", "--model.pretrained", "gpt2"]
    start = time.monotonic()
    done = subprocess.run(command(*arguments), cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=60)
    took = time.monotonic() - start
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2
    assert line.startswith(
        f"error: gpt2: no such folder here, not in the cache ({tmp_path / 'cache' / 'hub'}), and the hub cannot be reached ("
    )
    assert "connect and try again, or name a folder that holds it (hf download gpt2 --local-dir FOLDER" in line
    assert took < 20  # with the imports, on a machine that does other work besides; alone it is half of that


def test_the_flag_is_an_answer_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set"):
        find_pretrained("gpt2")  # what it needs is imported by now
    start = time.monotonic()
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set"):
        find_pretrained("gpt2-medium")
    assert time.monotonic() - start < 1
