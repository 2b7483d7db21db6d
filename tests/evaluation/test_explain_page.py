"""The page of an explanation: what stands in it, that it is escaped, and what a browser makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_chatgpt.evaluation.explain_page import label, render_page, strongest
from tests.data.test_report_page import HOSTILE, Page


def reply_token(text: str, probability: float, rank: int, **changes: Any) -> dict[str, Any]:
    alternatives = [{"text": "Yes", "id": 9, "probability": 0.5}, {"text": text, "id": 8, "probability": probability}]
    numbers = {"log_probability": -1.25, "probability": probability, "rank": rank, "entropy": 0.75}
    return {"text": text, "id": 8, "is_control": False, "is_end": False, "alternatives": alternatives, **numbers, **changes}


def report(name: str = "Hello\n", **changes: Any) -> dict[str, Any]:
    return {
        "command": f"python -m lightning_chatgpt explain {name}",
        "version": "0.1.0",
        "date": "2026-11-23 10:11",
        "is_own_reply": True,
        "vocabulary": 8192,
        "prompt": [{"text": "<|im_start|>", "id": 1, "is_control": True}, {"text": name, "id": 5, "is_control": False}],
        "reply": [
            reply_token(" I", 0.97, 1),
            reply_token(name, 0.3, 2),
            reply_token("", 0.0004, 1234),
            reply_token("<|im_end|>", 0.6, 1, is_control=True, is_end=True),
        ],
        "attributions": [
            [0.5, -0.25, 0, 0, 0, 0],
            [-2.0, 0.0, 1.0, 0, 0, 0],
            [0.0, 0.0, 0.0, 0.0, 0, 0],
            [0.1, 0.2, 0.3, 0.4, -0.5, 0],
        ],
        **changes,
    }


def rows(detail: dict[str, Any]) -> list[str]:
    """The lines of text of an element."""
    return [line.strip() for line in detail["text"].splitlines() if line.strip()]


def test_numbers_are_those_of_the_explanation() -> None:
    page = Page(render_page(report()))
    details = page.all("section")
    assert [detail["attrs"]["id"] for detail in details] == ["d0", "d1", "d2", "d3"]
    # Of the second token of the reply: its own numbers, the alternatives, what moved it.
    assert rows(details[1]) == [
        *("Hello↵", "probability30%", "log-probability-1.250 nats", "rank2 of 8,192", "entropy0.750 nats"),
        *("The most likely here", "Yes50%", "Hello↵30%"),
        *("What moved it most, in nats", "<|im_start|>-2.000", "·I in the reply+1.000"),
    ]
    assert rows(details[3])[:2] == ["<|im_end|> ends the reply", "probability60%"]
    assert "log-probability of -5.00 nats in all, -1.25 a token." in " ".join(page.all("p")[0]["text"].split())


def test_what_is_no_room_for_is_summed_up() -> None:
    prompt = [{"text": str(i), "id": i, "is_control": False} for i in range(20)]
    row = [0.01 * i * (-1) ** i for i in range(20)]
    changed = report(prompt=prompt, reply=report()["reply"][:1], attributions=[[*row, 0.0]])
    shown = rows(Page(render_page(changed)).all("section")[0])
    # Token 0 moved nothing; the others together -1 + 2 - 3 … - 11 hundredths.
    assert shown[-4:] == ["14+0.140", "13-0.130", "12+0.120", "11 others together-0.060"]
    assert strongest(row, n=3) == [19, 18, 17] and strongest([0.0, 0.0], n=3) == []


def test_tokens_of_the_conversation() -> None:
    page = Page(render_page(report()))
    options = page.all("span", role="option")
    assert [t["text"] for t in options] == [" I", "Hello↵\n2", "⋯1,234", "<|im_end|>"]
    assert [t["attrs"]["class"] for t in options] == ["token l0", "token l2", "token l4", "token l1 control"]
    assert [t["attrs"]["tabindex"] for t in options] == ["0", "-1", "-1", "-1"]
    assert [label(text) for text in ("  a b", "\n\n", " ", "", "\x07")] == ["··a b", "↵↵", "·", "⋯", "␇"]


def test_what_the_page_says_of_the_reply() -> None:
    assert "What the model says" in render_page(report()) and "It is cut there" not in render_page(report())
    given = render_page(report(is_own_reply=False))
    assert "What the model would have thought of this reply" in given and "What is said" in given
    cut = report(reply=report()["reply"][:1], attributions=report()["attributions"][:1])
    assert "It is cut there: the model had not ended." in render_page(cut)
    assert "first part of a character" in render_page(report()) and "first part of a character" not in render_page(cut)


def test_hostile_text_is_escaped() -> None:
    plain, page = Page(render_page(report())), Page(render_page(report(HOSTILE)))
    assert [e["tag"] for e in page.elements if e["tag"] != "i"] == [e["tag"] for e in plain.elements if e["tag"] != "i"]
    assert len(page.all("script")) == 2 and not page.all("img")
    assert page.all("span", role="option")[1]["text"] == HOSTILE + "2"


def test_page_is_self_contained_and_the_same_each_time() -> None:
    html = render_page(report())
    assert html == render_page(report())
    for element in Page(html).elements:
        assert element["tag"] not in {"link", "img", "iframe", "object", "base"}
        assert not {"src", "href"} & set(element["attrs"])
    assert "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'" in html


@pytest.mark.slow
def test_in_a_browser(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "explain.html"
    path.write_text(render_page(report(HOSTILE)), encoding="utf-8")
    said: list[str] = []
    page = browser.new_page(viewport={"width": 390, "height": 800}, has_touch=True)
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url) if request.url != path.as_uri() else None)
    page.goto(path.as_uri())

    def signs() -> list[str | None]:
        return [token.get_attribute("data-sign") for token in page.locator(".prompt .token, .reply .token").all()]

    def chosen() -> list[str]:
        visible = [detail.get_attribute("id") for detail in page.locator(".detail").all() if detail.is_visible()]
        selected = [token.get_attribute("id") for token in page.locator("[aria-selected=true]").all()]
        assert [name[1:] for name in visible] == [name[1:] for name in selected]
        return selected

    assert (chosen(), signs()) == (["t0"], ["up", "down", None, None, None, None])
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    assert (chosen(), signs()) == (["t1"], ["down", None, "up", None, None, None])
    assert page.evaluate("document.activeElement.id") == "t1"
    tint = "getComputedStyle(document.querySelector('.prompt .token')).backgroundColor"
    strong = page.evaluate(tint)
    page.keyboard.press("End")
    page.keyboard.press("ArrowRight")  # there is no token after the last
    assert (chosen(), signs()) == (["t3"], ["up", "up", "up", "up", "down", None])
    assert len({strong, page.evaluate(tint)}) == 2
    assert page.locator(".prompt .token").first.evaluate("token => token.style.getPropertyValue('--share')") == "0.2"
    # Pointing at a token shows it until the pointer leaves; a tap keeps it.
    page.locator("#t0").hover()
    assert chosen() == ["t0"]
    page.mouse.move(1, 1)
    assert chosen() == ["t3"]
    page.locator("#t1").tap()
    page.mouse.move(1, 1)
    assert chosen() == ["t1"]
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.emulate_media(color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 24, 28)"
    assert said == []


@pytest.mark.slow
def test_without_javascript_all_numbers_are_there(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "explain.html"
    path.write_text(render_page(report()), encoding="utf-8")
    page = browser.new_context(java_script_enabled=False).new_page()
    page.goto(path.as_uri())
    assert all(detail.is_visible() for detail in page.locator(".detail").all())
    assert not page.locator("p.js-only").is_visible()
