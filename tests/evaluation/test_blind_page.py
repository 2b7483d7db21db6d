"""The page as a person uses it, in headless Chromium: votes by keyboard, reload, Ctrl-C, going on; nothing leaves the machine."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from tests.conftest import chat
from tests.evaluation.test_blind_replies import tiny_models

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

pytestmark = pytest.mark.slow
pytest.importorskip("uvicorn", reason="needs the extra serve")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
N = 4
COMMAND = [sys.executable, "-u", "-m", "lightning_chatgpt", "evaluate", "--blind"]
SETTINGS = ["--rater", "r1", "--max_new_tokens", "6", "--batch_size", "4"]


class Run:
    """The command, as a user starts it."""

    def __init__(self, arguments: list[str]) -> None:
        self.process = subprocess.Popen([*COMMAND, *arguments, *SETTINGS], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        found = next(filter(None, (re.search(r"http://\S+", line) for line in self.process.stdout)), None)
        assert found is not None, "the command ended without an address"
        self.address = found[0]

    def end(self, *, by_signal: bool) -> str:
        """What it says at its end, which must be in order."""
        if by_signal:
            self.process.send_signal(signal.SIGINT)
        out, _ = self.process.communicate(timeout=60)
        assert self.process.returncode == 0
        return out


def test_a_person_judges_by_keyboard_and_goes_on_later(
    browser: Any, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, write_chats: Callable[..., Path]
) -> None:
    models = tiny_models(tmp_path / "secret", tokenizer)
    # What a prompt says is shown, and never obeyed.
    hostile = '<img src="https://evil.example/x" onerror="alert(1)"><script>alert(2)</script>'
    prompts = write_chats([chat(hostile, "Yes?", "Go on."), *(chat(f"question {i}") for i in range(1, N))])
    output = tmp_path / "out"
    arguments = [*models, "--prompts", str(prompts), "--output", str(output)]

    page = browser.new_page(viewport={"width": 390, "height": 780})
    complaints: list[str] = []
    requests: list[str] = []
    bodies: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(dialog.message))
    page.on("request", lambda request: requests.append(request.url))
    page.on("requestfailed", lambda request: complaints.append(f"{request.url}: {request.failure}"))
    page.on("requestfinished", lambda request: bodies.append(request.response().text()))
    status = page.locator("#status")
    expect = playwright.expect

    def votes() -> list[str]:
        path = output / "votes.jsonl"
        return [record["vote"] for record in map(json.loads, path.read_text().splitlines())] if path.exists() else []

    def shown() -> list[str]:
        return [element.text_content() for element in page.locator(".reply .text").all()]

    run = Run(arguments)
    page.goto(run.address)
    expect(status).to_have_text(f"1 of {N}")
    assert [element.text_content() for element in page.locator("#prompt .text").all()] == [hostile, "Yes?", "Go on."]
    left, right = (page.locator(".reply").nth(i).bounding_box() for i in (0, 1))
    assert right["y"] >= left["y"] + left["height"] and left["width"] > 300  # one below the other on a phone
    page.set_viewport_size({"width": 1100, "height": 700})
    left, right = (page.locator(".reply").nth(i).bounding_box() for i in (0, 1))
    assert right["x"] >= left["x"] + left["width"] and right["y"] == left["y"]
    first = shown()
    page.reload()
    expect(status).to_have_text(f"1 of {N}")
    assert shown() == first  # the sides stay
    page.keyboard.press("5")
    page.keyboard.press("Control+2")
    page.keyboard.press("1")
    expect(status).to_have_text(f"2 of {N}")
    assert len(votes()) == 1
    first_vote = json.loads((output / "votes.jsonl").read_text())
    assert first_vote["replies"][first_vote["vote"]] == first[0] and first_vote["left"] == first_vote["vote"]
    page.keyboard.press("Backspace")
    expect(status).to_have_text(f"1 of {N}")
    expect(page.locator("[aria-pressed=true]")).to_have_text("1 Reply 1 is better")
    page.keyboard.press("2")
    expect(status).to_have_text(f"2 of {N}")
    page.keyboard.press("3")
    expect(status).to_have_text(f"3 of {N}")
    assert votes()[1:] == [{"A": "B", "B": "A"}[first_vote["vote"]], "tie"]
    third = shown()
    said = run.end(by_signal=True)
    assert f"r1 has judged 2 of {N} pairs." in said and "A: " in said

    run = Run(arguments)
    page.goto(run.address)
    expect(status).to_have_text(f"3 of {N}")
    assert shown() == third
    page.get_by_role("button", name="Both are bad").click()
    expect(status).to_have_text(f"4 of {N}")
    page.keyboard.press("1")
    expect(status).to_have_text(f"All {N} judged")
    page.keyboard.press("u")
    expect(status).to_have_text(f"4 of {N}")
    page.keyboard.press("4")
    expect(page.locator("#finish")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#result")).to_contain_text("2 times both bad")
    assert f"r1 has judged {N} of {N} pairs." in run.end(by_signal=False)
    assert votes()[3] == "both_bad" and votes()[4] in ("A", "B") and votes()[5:] == ["both_bad"]

    assert complaints == []
    assert {urlsplit(url).hostname for url in requests} == {"127.0.0.1"}
    assert len(bodies) == len(requests) >= 14
    assert not any("secret" in body for body in bodies)  # where the models lie
