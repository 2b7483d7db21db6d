"""metrics.json: what the test verb writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_chatgpt import CausalLMModule, ChatDataModule, TextDataModule
from lightning_chatgpt.chat.conversation import Conversation
from lightning_chatgpt.errors import ConfigError
from lightning_chatgpt.evaluation import on_test
from lightning_chatgpt.evaluation.on_test import TestMetrics
from tests.conftest import trainer


def measured(folder: Path, plain_gpt2: Path, data: Any, **settings: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    module = CausalLMModule(pretrained=str(plain_gpt2))
    (logged,) = trainer(folder, callbacks=[TestMetrics(max_new_tokens=8)], **settings).test(module, data, verbose=False)
    return dict(logged), json.loads((folder / "metrics.json").read_text())


def test_what_was_logged_has_an_interval(
    tmp_path: Path, plain_gpt2: Path, chats: list[Conversation], write_chats: Callable[..., Path]
) -> None:
    data = ChatDataModule(test=str(write_chats(chats[:10])), batch_size=4)
    logged, written = measured(tmp_path, plain_gpt2, data)
    assert written["logged"] == logged
    assert written["items"] == 10
    figures = {(figure["part"], figure["name"]): figure for figure in written["figures"]}
    assert figures["assistant", "perplexity"]["value"] == pytest.approx(logged["test_perplexity"], rel=1e-6)
    for part, name in figures:
        if part == "replies":
            assert logged[f"test_{name}"] == pytest.approx(figures[part, name]["value"], rel=1e-6)
    assert {"bleu", "chrf", "rougeL", "distinct2", "end_rate"} <= {name for part, name in figures if part == "replies"}
    figure = figures["assistant", "bits_per_byte"]
    assert figure["low"] < figure["value"] < figure["high"] and figure["n"] == 10


def test_limits_hold_for_both(tmp_path: Path, plain_gpt2: Path, chats: list[Conversation], write_chats: Callable[..., Path]) -> None:
    data = ChatDataModule(test=str(write_chats(chats[:10])), batch_size=4)
    logged, written = measured(tmp_path, plain_gpt2, data, limit_test_batches=1)
    assert written["items"] == 4
    assert written["figures"][0]["value"] == pytest.approx(logged["test_perplexity"], rel=1e-6)


def test_text_has_no_replies(tmp_path: Path, plain_gpt2: Path) -> None:
    (tmp_path / "story.txt").write_text("Once there was a computer. " * 30)
    logged, written = measured(tmp_path, plain_gpt2, TextDataModule(test=str(tmp_path / "story.txt"), max_length=64))
    assert {figure["part"] for figure in written["figures"]} == {"text"}
    assert "test_bleu" not in logged


def test_a_missing_package_is_told_of_and_the_rest_is_measured(
    tmp_path: Path, plain_gpt2: Path, chats: list[Conversation], write_chats: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_test, "find_spec", lambda name: None)
    data = ChatDataModule(test=str(write_chats(chats[:4])))
    with pytest.warns(UserWarning, match=r"pip install 'lightning-chatgpt\[evaluate\]'"):
        _, written = measured(tmp_path, plain_gpt2, data)
    assert "replies" not in {figure["part"] for figure in written["figures"]}


def test_a_setting_out_of_range() -> None:
    with pytest.raises(ConfigError, match="max_new_tokens must be at least 0, not -1"):
        TestMetrics(max_new_tokens=-1)
