"""Votes are kept whatever happens, read again, and counted as a hand would count them."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from lightning_chatgpt.chat.conversation import Message
from lightning_chatgpt.data.sources import read_conversations
from lightning_chatgpt.errors import DataError, SaveError
from lightning_chatgpt.evaluation.votes import Pair, Vote, VoteFile, preferences, summarise

NAMES = {"A": "runs/a", "B": "runs/b"}
PAIRS = {
    f"p{i}": Pair(f"p{i}", (Message("user", f"question {i}"),), {"A": f"answer {i} of the one – é", "B": f"answer {i} of the other"})
    for i in range(1, 5)
}


def vote(prompt: str, said: str, *, rater: str = "r1", left: str = "A") -> Vote:
    return Vote(prompt, said, left, rater, "2026-11-23T10:00:00+00:00")  # type: ignore[arg-type]


def said_of(votes: list[str], *, rater: str = "r1") -> list[Vote]:
    return [vote(f"p{i}", said, rater=rater) for i, said in enumerate(votes, start=1)]


def test_votes_are_read_again_and_the_last_holds(tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    file = VoteFile(path, pairs=PAIRS, models=NAMES)
    for said in (vote("p1", "A"), vote("p2", "tie"), vote("p1", "B", rater="r2"), vote("p1", "both_bad", left="B")):
        file.add(said)
    assert len(path.read_text().splitlines()) == 4
    again = VoteFile(path, pairs=PAIRS, models=NAMES)
    assert again.votes == file.votes
    assert again.votes["r1", "p1"] == vote("p1", "both_bad", left="B")
    assert set(again.votes) == {("r1", "p1"), ("r1", "p2"), ("r2", "p1")}
    assert json.loads(path.read_text().splitlines()[0]) == {
        "id": "p1",
        "prompt": [{"role": "user", "content": "question 1"}],
        "replies": {"A": "answer 1 of the one – é", "B": "answer 1 of the other"},
        "models": {"A": "runs/a", "B": "runs/b"},
        "vote": "A",
        "left": "A",
        "rater": "r1",
        "time": "2026-11-23T10:00:00+00:00",
    }


@pytest.mark.parametrize("n_lost", [1, 150, "within a character"])
def test_half_a_line_that_a_kill_left_is_dropped_and_the_next_vote_stands_alone(tmp_path: Path, n_lost: int | str) -> None:
    path = tmp_path / "votes.jsonl"
    file = VoteFile(path, pairs=PAIRS, models=NAMES)
    file.add(vote("p1", "A"))
    file.add(vote("p2", "B"))
    whole = path.read_bytes()
    n_kept = whole.rindex("é".encode()) + 1 if isinstance(n_lost, str) else len(whole) - n_lost
    path.write_bytes(whole[:n_kept])
    again = VoteFile(path, pairs=PAIRS, models=NAMES)
    assert set(again.votes) == {("r1", "p1")}
    again.add(vote("p2", "B"))
    assert path.read_bytes() == whole


def test_a_vote_that_could_not_be_saved_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "votes.jsonl"
    file = VoteFile(path, pairs=PAIRS, models=NAMES)
    file.add(vote("p1", "A"))
    before = path.read_bytes()

    def is_full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", is_full)
        with pytest.raises(
            SaveError, match=r"votes\.jsonl: the vote could not be saved \(No space left on device\); make room, and vote again"
        ):
            file.add(vote("p2", "A"))
    assert path.read_bytes() == before and set(file.votes) == {("r1", "p1")}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"votes\.jsonl:2: is no vote; remove the line"),
        ('{"id": "p1", "vote": "C", "left": "A", "rater": "r1", "time": "", "prompt": [], "replies": {}}', r"votes\.jsonl:2: is no vote"),
        ('["p1"]', r"votes\.jsonl:2: is no vote"),
        (
            '{"id": "p9", "vote": "A", "left": "A", "rater": "r1", "time": "", "prompt": [], "replies": {}}',
            r"votes\.jsonl:2: is a vote on 'p9' with another prompt",
        ),
        (
            '{"id": "p1", "vote": "A", "left": "A", "rater": "r1", "time": "", "prompt": [], "replies": {"A": "x", "B": "y"}}',
            r"votes\.jsonl:2: is a vote on 'p1' with another prompt, or other replies than A and B give now; take the prompts",
        ),
    ],
)
def test_a_line_that_is_no_vote_on_these_replies_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "votes.jsonl"
    VoteFile(path, pairs=PAIRS, models=NAMES).add(vote("p1", "A"))
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match=message):
        VoteFile(path, pairs=PAIRS, models=NAMES)


def test_data_train_reads_what_was_decided(tmp_path: Path) -> None:
    system = (Message("system", "Be brief."), Message("user", "Hi"), Message("assistant", "Hello."), Message("user", "And now?"))
    pairs = {**PAIRS, "p4": Pair("p4", system, {"A": "Bye.", "B": "Good bye."}), "p5": Pair("p5", system, {"A": " ", "B": "Good bye."})}
    votes = [vote("p1", "A"), vote("p2", "tie"), vote("p3", "both_bad"), vote("p4", "B"), vote("p5", "B"), vote("p1", "B", rater="r2")]
    path = tmp_path / "preferences.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in preferences(votes, pairs)))
    first, second, third = read_conversations(str(path))
    assert first.messages == (Message("user", "question 1"), Message("assistant", "answer 1 of the one – é"))
    assert first.rejected == (Message("assistant", "answer 1 of the other"),)
    assert second.messages == (*system, Message("assistant", "Good bye."))
    assert second.rejected == (Message("assistant", "Bye."),)
    assert third.messages[-1].content == "answer 1 of the other" and third.rejected[0].content == "answer 1 of the one – é"
    assert first.group == third.group != second.group  # one prompt stays in one split
    assert [each.labels["rater"] for each in (first, second, third)] == ["r1", "r1", "r2"]


def test_the_win_rate_counts_what_is_not_decided_as_half() -> None:
    found = summarise(said_of(["A", "A", "tie", "B", "both_bad", "A", "tie", "A"]))
    assert found["votes"] == {"A": 4, "B": 1, "tie": 2, "both_bad": 1}
    assert found["win_rate"]["value"] == 5.5 / 8
    assert found["win_rate"]["n"] == found["prompts"] == 8


def test_the_interval_is_that_of_coin_tosses() -> None:
    """Resamples of 8 A and 8 B are 16 tosses: P(X <= 3) = 0.0106, P(X <= 4) = 0.0384, so that the middle 95% is 4 to 12 of 16."""
    found = summarise(said_of(["A", "B"] * 8))["win_rate"]
    assert (found["value"], found["low"], found["high"]) == (0.5, 0.25, 0.75)


def test_a_prompt_is_drawn_with_all_its_votes() -> None:
    """One prompt with one vote for A, another with three for B: a quarter of the resamples holds the first alone, and says 100%.

    Votes drawn one by one would say so once in 256.
    """
    votes = [vote("p1", "A"), *(vote("p2", "B", rater=rater) for rater in ("r1", "r2", "r3"))]
    found = summarise(votes)["win_rate"]
    assert (found["value"], found["low"], found["high"], found["n"]) == (0.25, 0.0, 1.0, 2)


def test_figures_do_not_depend_on_the_order_of_votes() -> None:
    votes = [*said_of(["A", "B", "tie", "A"]), *said_of(["A", "A", "B", "both_bad"], rater="r2")]
    assert summarise(votes) == summarise(votes[::-1])


def test_how_often_the_left_side_wins_is_of_decided_votes() -> None:
    sides = [("A", "A"), ("A", "B"), ("B", "B"), ("tie", "A"), ("both_bad", "B"), ("B", "B")]
    found = summarise([vote(f"p{i}", said, left=left) for i, (said, left) in enumerate(sides)])["left_wins"]
    assert found["value"] == 3 / 4 and found["n"] == 4
    assert summarise([vote("p1", "tie")])["left_wins"] == {"value": None, "low": None, "high": None, "n": 0}


def test_kappa_is_that_of_the_table_by_hand() -> None:
    """Of 50 prompts 35 alike: 0.7. By chance alike: 0.5 * 0.6 + 0.5 * 0.4 = 0.5. Kappa: (0.7 - 0.5) / (1 - 0.5) = 0.4."""
    table = [("A", "A")] * 20 + [("A", "B")] * 5 + [("B", "A")] * 10 + [("B", "B")] * 15
    one, other = zip(*table, strict=True)
    alone = vote("p99", "tie", rater="r2")  # judged by nobody else
    (found,) = summarise([*said_of(list(one)), *said_of(list(other), rater="r2"), alone])["agreement"]
    assert found == {"raters": ["r1", "r2"], "prompts": 50, "agreed": 0.7, "kappa": pytest.approx(0.4)}


def test_kappa_knows_four_verdicts_and_each_two_raters() -> None:
    """Two of four alike, each verdict once each: (0.5 - 4 / 16) / (1 - 4 / 16) = 1 / 3."""
    votes = [*said_of(["A", "B", "tie", "both_bad"]), *said_of(["A", "B", "both_bad", "tie"], rater="r2"), vote("p1", "A", rater="r3")]
    one, other, third = summarise(votes)["agreement"]
    assert one["kappa"] == pytest.approx(1 / 3)
    assert other == {"raters": ["r1", "r3"], "prompts": 1, "agreed": 1.0, "kappa": None}
    assert third["raters"] == ["r2", "r3"]


def test_kappa_is_undefined_where_both_say_one_thing_only() -> None:
    (found,) = summarise([*said_of(["A"] * 5), *said_of(["A"] * 5, rater="r2")])["agreement"]
    assert found["agreed"] == 1.0 and found["kappa"] is None
    json.dumps(found, allow_nan=False)


def test_without_votes_there_are_no_figures() -> None:
    found = summarise([])
    assert found["win_rate"] == {"value": None, "low": None, "high": None, "n": 0} and found["agreement"] == []
