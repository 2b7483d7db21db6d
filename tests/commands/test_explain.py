"""``explain`` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_chatgpt.__main__ import main
from tests.test_cli import refused


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")


def test_the_models_own_reply(plain_gpt2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("explain.html").write_text("an older one")
    main(["explain", str(plain_gpt2), "--prompt", "Hi [b]", "--max_new_tokens", "3", "--json", "all.json"])
    printed = capsys.readouterr()
    report = json.loads(Path("all.json").read_text())
    assert report["is_own_reply"] and len(report["reply"]) == 3
    rows = [line.strip("│").split("│") for line in printed.out.splitlines() if line.startswith("│")]
    numbers = [[cell.strip() for cell in row[1:4]] for row in rows if row[1].strip()]
    assert numbers == [[f"{t['probability']:.1%}", f"{t['log_probability']:.2f}", str(t["rank"])] for t in report["reply"]]
    moved = [float(row[5].split()[0]) for row in rows]
    expected = [value for row in report["attributions"] for value in sorted(row, key=lambda value: -abs(value))[:3]]
    assert moved == pytest.approx(expected, abs=0.0051)
    total = sum(token["log_probability"] for token in report["reply"])
    assert f"the model's own reply: a log-probability of {total:.2f} nats in all, {total / 3:.2f} a token" in printed.out
    assert ("it is cut there" in printed.out) != report["reply"][-1]["is_end"]
    assert "written to explain.html" in printed.err and "written to all.json" in printed.err
    page = Path("explain.html").read_text()
    assert page.startswith("<!DOCTYPE html>") and page.count('role="option"') == 3
    assert "<title>Why it said that</title>" in page


def test_a_given_reply_for_scripts(plain_gpt2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--prompt", "Hi", "--reply", "ho", "--system", "Be kind.", "--html", "null", "--json", "-"]
    main(["explain", str(plain_gpt2), *arguments])
    report = json.loads(capsys.readouterr().out)
    assert not report["is_own_reply"]
    prompt, reply = ("".join(token["text"] for token in report[part]) for part in ("prompt", "reply"))
    assert prompt.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>") and reply == "ho<|im_end|>"
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "prompt: nothing is asked; add --prompt TEXT"),
        (["--prompt", "Hi", "--reply", "ho", "--max_new_tokens", "3"], "max_new_tokens is for the model's own reply"),
        (["--prompt", "Hi", "--max_new_tokens", "0"], "max_new_tokens must be at least 1, not 0"),
        (["--prompt", "Hi", "--html", "no/page.html"], "html no/page.html: cannot be written; name a file, in a folder that is there"),
        (["--prompt", "Hi", "--json", "."], "json .: cannot be written"),
        (["--prompt", "word " * 90, "--reply", "word " * 90], "are more than the model's 128 positions"),
    ],
)
def test_refused(arguments: list[str], expected: str, plain_gpt2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in refused("explain", plain_gpt2, *arguments, capsys=capsys)
    assert not list(Path().iterdir())
