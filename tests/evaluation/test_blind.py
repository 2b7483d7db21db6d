"""A blind comparison from two models to its files, without a browser: what is served is judged by the test."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from filelock import FileLock

from lightning_chatgpt.data.sources import read_conversations
from lightning_chatgpt.errors import ConfigError
from lightning_chatgpt.evaluation import blind
from lightning_chatgpt.evaluation.blind_server import Judging, bind
from tests.conftest import chat
from tests.evaluation.test_blind_replies import tiny_models

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

pytest.importorskip("uvicorn", reason="needs the extra serve")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return tiny_models(tmp_path_factory.mktemp("models"), tokenizer)


@pytest.fixture
def run(models: list[str], tmp_path: Path, write_chats: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs a comparison of six prompts in which the given votes are cast, and gives back what the page was told at the end."""
    prompts = write_chats([chat(f"question {i}") for i in range(6)], "prompts.jsonl")
    settings = {"prompts": str(prompts), "output": tmp_path / "out", "rater": "r1", "port": 0, "seed": 0}

    def judge(said: str = "", **changes: Any) -> Any:
        told: list[str] = []

        def serve(judging: Judging, *, listening: Any, finish: Callable[[], list[str]], announce: Callable[[str], None]) -> None:
            announce("http://127.0.0.1:1/?key=k")
            for letter in said:
                number = judging.view()["number"]
                sides = judging.sides(judging.pairs[number - 1])
                judging.vote(number, sides.index(letter) + 1 if letter in sides else "tb".index(letter) + 3)  # type: ignore[arg-type]
            if judging.n_judged == len(judging.pairs):
                told.extend(finish())

        monkeypatch.setattr(blind, "serve", serve)
        chosen = changes.pop("models", models)
        result = blind.run_blind(chosen, **{**settings, "max_new_tokens": 5, "batch_size": 4, **changes})
        return result, told

    return judge


def test_a_comparison_is_stopped_and_taken_up_again(
    run: Callable[..., Any], models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result, told = run("AAB")
    assert (result["votes"], result["pairs"], told) == ({"A": 2, "B": 1, "tie": 0, "both_bad": 0}, 6, [])
    out = capsys.readouterr().out
    assert "r1 has judged 0 of 6 pairs. Judge at\n  http://127.0.0.1:1/?key=k\n" in out
    assert "r1 has judged 3 of 6 pairs." in out and "66.7%" in out

    result, told = run("tbA")
    assert result["win_rate"]["value"] == (3 + 2 * 0.5) / 6
    assert told[0].startswith("The model that was named first wins 66.7% of the time, ties and both bad counted as half (95% interval ")
    assert told[1].startswith("Votes: 3 for the first, 1 for the second, 1 ties, 1 times both bad.")
    assert not any(model in line for model in models for line in told)
    out = capsys.readouterr().out
    assert "r1 has judged 3 of 6 pairs. Judge at" in out and "r1 has judged 6 of 6 pairs." in out
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == result
    votes = [json.loads(line) for line in (tmp_path / "out" / "votes.jsonl").read_text().splitlines()]
    assert [vote["vote"] for vote in votes] == ["A", "A", "B", "tie", "both_bad", "A"]
    preferred = list(read_conversations(str(tmp_path / "out" / "preferences.jsonl")))
    assert len(preferred) == 4
    for chosen, vote in zip(preferred, (votes[0], votes[1], votes[2], votes[5]), strict=True):
        other = {"A": "B", "B": "A"}[vote["vote"]]
        assert chosen.messages[-1].content == vote["replies"][vote["vote"]]
        assert chosen.rejected[0].content == vote["replies"][other]

    again, told = run("never asked")  # all is judged: nothing to serve
    assert again == result and told == []
    assert "Judge at" not in capsys.readouterr().out


def test_a_second_rater_is_compared_with_the_first(run: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    run("AABBAB")
    result, told = run("AABBBA", rater="r2")
    assert result["raters"] == {"r1": 6, "r2": 6}
    # 4 of 6 alike; by chance 0.5: (4 / 6 - 1 / 2) / (1 / 2) = 1 / 3.
    (found,) = result["agreement"]
    assert found["kappa"] == pytest.approx(1 / 3, abs=1e-6) and found["prompts"] == 6
    assert told[-1] == "r1 and r2: 67% alike, kappa 0.33, over 6 prompts."
    assert "r1 and r2" in capsys.readouterr().out


def test_settings_that_cannot_be_obeyed_are_refused(run: Callable[..., Any], models: list[str], tmp_path: Path) -> None:
    for changes, message in (
        ({"models": models[:1]}, "a blind comparison is between two models, not 1; name A and B"),
        ({"rater": " "}, "the rater has no name; give one, such as --rater me"),
        ({"batch_size": 0}, "max_new_tokens and batch_size must be at least 1, not 5 and 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(**changes)
    assert not (tmp_path / "out").exists()


def test_a_taken_port_is_told_before_anything_is_generated(run: Callable[..., Any], tmp_path: Path) -> None:
    with bind(0) as taken, pytest.raises(ConfigError, match="cannot be used"):
        run(port=taken.getsockname()[1])
    assert not (tmp_path / "out" / "records").exists()


def test_two_do_not_judge_in_one_folder_at_once(run: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with (
        FileLock(tmp_path / "out" / ".lock"),
        pytest.raises(ConfigError, match="out: somebody is judging in there; wait until that has ended"),
    ):
        run()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file: cannot be written to \(File exists\); name another folder"):
        run(output=tmp_path / "file")
    run("A")  # the folder is free again
