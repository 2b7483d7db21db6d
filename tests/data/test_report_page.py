import re
import sys
from html.parser import HTMLParser

import matplotlib
import pytest

from lightning_chatgpt.chat.faults import KINDS
from lightning_chatgpt.data.report_page import render_page
from lightning_chatgpt.errors import ConfigError

VOID = {"meta", "br", "hr", "img", "link", "input"}
HOSTILE = '"><img src=https://evil.example/x onerror=alert(1)><script>alert(2)</script></svg>-->'


class Page(HTMLParser):
    """What a browser would see: elements with their attributes and own text; fails where a tag is not closed."""

    def __init__(self, html):
        super().__init__()
        self.elements = []
        self.open = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        element = {"tag": tag, "attrs": dict(attrs), "text": "", "within": [outer["tag"] for outer in self.open]}
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.elements.append({"tag": tag, "attrs": dict(attrs), "text": "", "within": []})

    def handle_endtag(self, tag):
        assert self.open and self.open[-1]["tag"] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag, **attrs):
        return [e for e in self.elements if e["tag"] == tag and all(e["attrs"].get(k) == v for k, v in attrs.items())]

    def texts(self, tag):
        return [e["text"].strip() for e in self.all(tag)]


def part(**changes):
    return {
        "items": 860,
        "examples": 1900,
        "tokens": 44409,
        "supervised": 22319,
        "longer": 43,
        "truncated": 43,
        "lost": 58,
        "cut": 1,
        "lengths": [[0, 16, 500], [16, 32, 300], [32, 48, 60]],
        "turns": {"2": 700, "4": 160},
        "roles": {"user": {"messages": 900, "characters": 40000}, "assistant": {"messages": 900, "characters": 80000}},
        "sources": {"chats.jsonl": 860},
        "policies": {"drop_oldest": {"lost": 58, "examples": 860}, "split": {"lost": 0, "examples": 900}},
        "padding": {"shuffled": 0.41, "grouped by length": 0.08, "packed": 0.003},
        **changes,
    }


def full_report(name="chats.jsonl"):
    return {
        "command": f"python -m lightning_chatgpt inspect --data.train {name}",
        "version": "0.1.0",
        "date": "2026-11-22 10:11",
        "settings": {"template": "chatml", "max_length": 32, "truncation": "drop_oldest", "packing": True, "supervise": name},
        "surprises": [f"{name}: 12 of 40 conversations stand in train too"],
        "sources": {
            name: {
                "items": 899,
                "records": 901,
                "schemas": {"openai": 890, name: 11},
                "files": [name],
                "faults": {
                    "counts": {"broken_json": {"skip": 2}, "repeated_role": {"fix": 3}, name: {"skip": 1}},
                    "places": {"broken_json": [f"{name}:17"], "repeated_role": [f"{name}:4"]},
                },
                "cleaning": [{"step": "redact", "email": 4, "changed": 3}, {"step": name, "dropped": 2}],
            }
        },
        "duplicates": {"train": {"exact": 3, "near": 5}, name: {"exact": 0, "near": 0}},
        "leaks": {"validation": {"n": 40, "exact": 1, "overlapping": 2, "any": 5, "share": 0.05}},
        "parts": {
            "train": part(sources={name: 860}, roles={name: {"messages": 3, "characters": 9}}, padding={name: 0.5, "packed": 0.1}),
            "validation": part(items=40, tokens=2000, supervised=500),
            name: part(),
        },
        "examples": [{"id": f"{name}:1", "part": "train", "tokens": [[name, 0.0, True], [name, 0.5, False], ["\n", 1.0, False]]}],
    }


def example_page(tokens):
    return Page(render_page({"parts": {}, "examples": [{"id": "a:1", "part": "train", "tokens": tokens}]}))


def example_tokens(page):
    shown = page.all("p", **{"class": "tokens"})[0]
    start = page.elements.index(shown)
    return [e for e in page.elements[start + 1 :] if "token" in (e["attrs"].get("class") or "").split()]


def test_page_is_self_contained():
    html = render_page(full_report())
    page = Page(html)
    assert html.startswith("<!DOCTYPE html>")
    for element in page.elements:
        assert element["tag"] not in {"script", "link", "img", "iframe", "object", "base"}
        assert not any(attribute.startswith("on") for attribute in element["attrs"])
        for attribute in ("src", "href", "xlink:href", "action", "data", "srcset"):
            assert element["attrs"].get(attribute, "#").startswith("#")
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)]*)", html))
    assert "@import" not in html


def test_svg_references_are_within_the_page_and_unique():
    html = render_page(full_report())
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]*)"', html)) | set(re.findall(r"url\(#([^)]*)\)", html)) <= set(ids)


def test_data_are_escaped_everywhere():
    plain, page = Page(render_page(full_report())), Page(render_page(full_report(HOSTILE)))
    assert {e["tag"] for e in page.elements} == {e["tag"] for e in plain.elements}
    for pages in (plain, page):
        assert not pages.all("script") and not pages.all("img")
    assert f"{HOSTILE}: 12 of 40 conversations stand in train too" in page.texts("li")
    assert [t["text"].removesuffix("0.5") for t in example_tokens(page)[:2]] == [HOSTILE, HOSTILE]
    assert any(HOSTILE in (svg["attrs"]["aria-label"] or "") for svg in page.all("svg"))


def test_names_that_matplotlib_or_a_file_could_not_take():
    html = render_page(full_report("$x^$ 闲聊 \ud800\x00\n_" + "long" * 30))
    html.encode("utf-8")
    svg_texts = Page(html).texts("text")
    assert any(text.startswith("$x^$ 闲聊 ") and len(text) <= 26 and "…" in text for text in svg_texts)


@pytest.mark.parametrize("key", [None, *(key for key in full_report() if key != "parts")])
def test_any_key_may_be_missing_or_empty(key):
    report = {**full_report(), "parts": {"train": {"items": 2, "tokens": 9, "lengths": [[0, 8, 2]], "policies": {"skip": {"lost": 1}}}}}
    keys = [k for k in report if k != "parts"] if key is None else [key]
    without = render_page({k: v for k, v in report.items() if k not in keys})
    Page(without)
    assert len(without) < len(render_page(report))
    for emptied in (type(report[keys[0]])(), None):
        Page(render_page({**report, **dict.fromkeys(keys, emptied)}))


@pytest.mark.parametrize("key", part())
def test_any_key_of_a_part_may_be_missing(key):
    shown = Page(render_page({"parts": {"train": {k: v for k, v in part().items() if k != key}}}))
    is_plotted = key in {"lengths", "turns", "roles", "sources", "policies", "padding"}
    assert len(shown.all("svg")) == 6 - is_plotted


@pytest.mark.parametrize("parts", [{}, {"train": {}}, {"train": {"items": 0, "tokens": 0, "supervised": 0, "lengths": [], "policies": {}}}])
def test_empty_parts_make_no_plots(parts):
    page = Page(render_page({"parts": parts}))
    assert not page.all("svg")
    assert page.texts("h1") == ["What the model will be fed"]
    assert page.texts("h2") == (["In numbers"] if parts.get("train") else [])


def test_surprises_come_first_and_none_is_said():
    page = Page(render_page(full_report()))
    assert page.texts("h2")[0] == "What would surprise you"
    assert "Nothing that would surprise" in render_page({"parts": {}, "surprises": []})
    assert "surprise" not in render_page({"parts": {}})


def test_supervised_markup_matches_weights():
    tokens = [
        ["<|im_start|>", 0.0, True],
        ["a", 0.0, False],
        ["b", 1.0, False],
        ["c", 0.5, False],
        ["d", 0.5, False],
        ["<|end|>", 2.0, True],
    ]
    shown = example_tokens(example_page(tokens))
    assert [t["tag"] == "mark" for t in shown] == [weight > 0 for _, weight, _ in tokens]
    assert ["control" in t["attrs"]["class"] for t in shown] == [control for _, _, control in tokens]
    assert [t["attrs"].get("title") for t in shown] == [None, None, None, "loss weight 0.5", "loss weight 0.5", "loss weight 2"]
    # The weight is written beside the first token that has it.
    assert [t["text"] for t in shown] == ["<|im_start|>", "a", "b", "c0.5", "d", "<|end|>2"]


def test_supervised_tokens_are_told_apart_without_colour():
    style = Page(render_page({"parts": {}})).all("style")[0]["text"]
    assert "text-decoration: underline" in re.search(r"mark\.token {([^}]*)}", style)[1]


def test_line_breaks_and_leading_spaces_are_shown():
    page = example_page([["  two", 1.0, False], ["x\n\n", 0.0, False], [" \n", 0.0, False], ["bell\x07", 0.0, False]])
    shown = example_tokens(page)
    assert [t["text"] for t in shown] == ["  two", "x↵\n↵\n", " ↵\n", "bell␇"]
    assert len([e for e in page.all("i", **{"class": "space"}) if "details" in e["within"]]) == 3


def test_long_examples_are_folded():
    assert "open" in example_page([["a", 1.0, False]] * 200).all("details")[0]["attrs"]
    long = example_page([["a", 1.0, False]] * 150 + [["a", 0.0, False]] * 1050)
    assert "open" not in long.all("details")[0]["attrs"]
    assert "1,200 tokens, 150 learnt" in long.texts("summary")[0]


def test_numbers_are_those_of_the_report():
    page = Page(render_page(full_report()))
    cells = page.texts("td")
    assert "44,409" in cells and "22,319 (50%)" in cells and "500 (25%)" in cells and "5.0%" in cells
    assert "2 left out" in cells and f"3 mended: {KINDS['repeated_role'].fix}" in cells
    assert "email 4" in cells and "chats.jsonl:17" in cells
    assert any(KINDS["broken_json"].about in cell for cell in cells)
    assert "43 of 860 (5.0%) are longer than max_length, 32 tokens (the dashed line)." in page.texts("p")


def test_plots_are_told_in_words_and_the_chosen_is_marked():
    page = Page(render_page({"parts": {"train": part()}, "settings": {"truncation": "split", "packing": False}}))
    labels = [svg["attrs"]["aria-label"] for svg in page.all("svg", role="img")]
    assert len(labels) == 6
    assert any(label.startswith("train: how long the conversations are. 0 to 16: 500;") for label in labels)
    assert any("train, drop_oldest: 58 (860 examples); train, split: 0 (900 examples)" in label for label in labels)
    texts = page.texts("text")
    assert "split (chosen)" in texts and "drop_oldest" in texts and "packed" in texts
    assert "packed (chosen)" in Page(render_page(full_report())).texts("text")


def test_many_sources_and_lengths_of_chats_are_summed_up():
    many = part(sources={f"s{i}": 100 - i for i in range(40)}, turns={str(n): 1 for n in range(1, 61)})
    labels = [svg["attrs"]["aria-label"] for svg in Page(render_page({"parts": {"train": many}})).all("svg")]
    assert any(f"29 others: {sum(100 - i for i in range(11, 40)):,}" in label for label in labels)
    assert any("train, 11: 1; train, 12 or more: 49" in label for label in labels)


def test_page_is_deterministic_and_leaves_matplotlib_alone():
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red"}):
        changed = render_page(full_report())
    assert render_page(full_report()) == changed
    assert dict(matplotlib.rcParams) == before


def test_missing_matplotlib_is_told(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"pip install 'lightning-chatgpt\[report\]'"):
        render_page({"parts": {}})
