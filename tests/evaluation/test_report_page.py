"""The report in a real browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_chatgpt.evaluation.report_page import render_page

HOSTILE = "</script><img src=x onerror=alert(1)> <b>bold</b> & \u2028"


def report(n_replies: int) -> dict[str, Any]:
    """A report on two models, the second better at every reply but the last."""

    def estimate(value: float) -> dict[str, Any]:
        return {"value": value, "low": value - 1, "high": value + 1, "n": n_replies}

    def figure(name: str, part: str, first: float, second: float, verdict: str) -> dict[str, Any]:
        differences = [{**estimate(second - first), "verdict": verdict}]
        models = [estimate(first), estimate(second)]
        return {
            "name": name,
            "title": name,
            "part": part,
            "higher_is_better": False,
            "note": "",
            "models": models,
            "differences": differences,
        }

    def reply(number: int, model: int) -> dict[str, Any]:
        chrf = float(number + 50 * model) if number < n_replies - 1 else 90.0 - 80 * model
        return {"reply": f"reply {number} of {model} {HOSTILE}", "finish_reason": "stop", "chrf": chrf, "nll": number / 10}

    models = [
        {
            "name": name,
            "path": name,
            "parameters": 10,
            "vocabulary": 5,
            "positions": 4,
            "digest": "d" * 32,
            "curves": {"val_loss": [[1, 3.0], [2, 2.5]]},
        }
        for name in ("runs/the-first-of-them", "runs/the-second-of-them")
    ]
    parts = [
        ("perplexity", "assistant", 9.0, 5.0, "better"),
        ("bits_per_byte", "assistant", 3.0, 2.0, "better"),
        ("bits_per_byte", "turn 1", 3.0, 3.5, "no difference shown"),
    ]
    return {
        "version": "0.1.0",
        "command": "python -m lightning_chatgpt evaluate runs/the-first-of-them runs/the-second-of-them",
        "date": "2026-11-23 10:11",
        "data": {"items": n_replies, "what": "chats.jsonl", "digest": "e" * 32, "sources": {"chats.jsonl": n_replies}},
        "versions": {"python": "3.11"},
        "models": models,
        "figures": [figure(*part) for part in parts],
        "replies": [
            {
                "id": f"chats.jsonl:{n}",
                "source": "chats.jsonl",
                "prompt": [{"role": "user", "content": f"question {n} {HOSTILE}"}],
                "reference": f"reference {n}",
                "models": [reply(n, model) for model in (0, 1)],
            }
            for n in range(n_replies)
        ],
    }


@pytest.mark.slow
def test_sorted_and_searched_in_a_browser(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(render_page(report(45)), encoding="utf-8")
    said: list[str] = []
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url) if request.url != path.as_uri() else None)
    page.goto(path.as_uri())

    def shown() -> list[int]:
        return [int(turn.inner_text().split("question ")[1].split()[0]) for turn in page.locator(".card .turn").all()]

    def choose(order: str) -> list[int]:
        page.locator("#order").select_option(label=order)
        return shown()

    assert "Better: perplexity, bits_per_byte" in page.locator(".box").inner_text()
    assert page.locator("figure").count() == 2
    drawn = shown()
    assert len(set(drawn)) == 20 and drawn != sorted(drawn)
    assert page.locator("#count").inner_text() == "20 of 45"
    assert choose("best replies of runs/the-first-of-them (chrF)")[:3] == [44, 43, 42]
    assert choose("worst replies of runs/the-second-of-them (chrF)")[:2] == [44, 0]
    assert choose("runs/the-second-of-them most behind runs/the-first-of-them (chrF)")[0] == 44
    assert choose("references least expected by runs/the-first-of-them")[:2] == [44, 43]
    page.locator("#more").click()
    page.locator("#more").click()
    assert len(shown()) == 45 and not page.locator("#more").is_visible()
    page.locator("#search").fill("QUESTION 7 ")
    assert shown() == [7]
    assert HOSTILE.replace("\u2028", "").strip() in page.locator(".side .reply").first.inner_text()
    assert page.locator("main img, main b").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert said == []
