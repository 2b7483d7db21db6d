"""What people said of pairs of replies: kept line by line, read again, and counted.

"A" is the model that was named first, "B" the other; what was shown left or right plays a part in the position bias alone.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, get_args

from lightning_chatgpt.chat.conversation import Message
from lightning_chatgpt.checkpoints.file import replace_file, whole_lines
from lightning_chatgpt.errors import DataError, SaveError

Model = Literal["A", "B"]
Verdict = Literal["A", "B", "tie", "both_bad"]
MODELS: tuple[Model, ...] = get_args(Model)
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)

_SCORES = {"A": 1.0, "B": 0.0}  # of A; half for what is not decided


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt and what the two models answered.

    Attributes:
        id: The prompt's, which no other has.
        prompt: Its messages.
        replies: The reply of each model.
        cut: The models whose replies ran out of tokens.
    """

    id: str
    prompt: tuple[Message, ...]
    replies: Mapping[Model, str]
    cut: frozenset[Model] = frozenset()


@dataclass(frozen=True, slots=True)
class Vote:
    """What one person said of one pair.

    Attributes:
        id: The pair's.
        vote: Who is better: ``A``, ``B``, ``tie`` or ``both_bad``.
        left: The model whose reply was shown on the left.
        rater: Who said so.
        time: When, as ISO 8601.
    """

    id: str
    vote: Verdict
    left: Model
    rater: str
    time: str

    def __post_init__(self) -> None:
        if self.vote not in VERDICTS or self.left not in MODELS or not all(isinstance(text, str) for text in (self.id, self.rater)):
            raise ValueError(self)


class VoteFile:
    """Votes in a file, one line each; it is on the disk before a vote counts, and the last of several on one pair holds.

    Args:
        path: The file; it need not be there.
        pairs: What is voted on, by id.
        models: What the models are called, for the file alone.

    Attributes:
        votes: The vote that holds, by rater and pair.

    Raises:
        DataError: A line is no vote, or one on other replies.
    """

    def __init__(self, path: Path, *, pairs: Mapping[str, Pair], models: Mapping[Model, str]) -> None:
        self.path = path
        self.pairs = pairs
        self.models = dict(models)
        self.votes: dict[tuple[str, str], Vote] = {}
        if not path.exists():
            return
        lines = whole_lines(path)
        for number, line in enumerate(lines, start=1):
            vote = self._parse(line, number)
            self.votes[vote.rater, vote.id] = vote
        if sum(len(line.encode()) for line in lines) < path.stat().st_size:
            replace_file(path, lines)  # half a line, that a kill left

    def add(self, vote: Vote) -> None:
        """Write a vote down.

        Raises:
            SaveError: It could not be written, and does not count.
        """
        pair = self.pairs[vote.id]
        record = {
            "id": vote.id,
            "prompt": [message.to_dict() for message in pair.prompt],
            "replies": dict(pair.replies),
            "models": self.models,
            "vote": vote.vote,
            "left": vote.left,
            "rater": vote.rater,
            "time": vote.time,
        }
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("ab") as file:
                file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):  # half a line at the end is left out when the file is read, too
                os.truncate(self.path, size)
            raise SaveError(f"{self.path}: the vote could not be saved ({error.strerror or error}); make room, and vote again") from error
        self.votes[vote.rater, vote.id] = vote

    def _parse(self, line: str, number: int) -> Vote:
        try:
            record = json.loads(line)
            vote = Vote(*(record[name] for name in ("id", "vote", "left", "rater", "time")))
            replies, prompt = record["replies"], record["prompt"]
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{self.path}:{number}: is no vote; remove the line, or name another folder") from None
        pair = self.pairs.get(vote.id)
        if pair is None or replies != pair.replies or prompt != [message.to_dict() for message in pair.prompt]:
            raise DataError(
                f"{self.path}:{number}: is a vote on {vote.id!r} with another prompt, or other replies than A and B give now; take the "
                "prompts, the models, in the order, and the settings that it was cast with, or name another folder"
            )
        return vote


def preferences(votes: Collection[Vote], pairs: Mapping[str, Pair]) -> Iterator[dict[str, Any]]:
    """What was decided, as records with ``prompt``, ``chosen`` and ``rejected``, which are lists of messages.

    Pairs with an empty reply are left out: nothing could be learnt from it.

    Yields: records that ``data.train`` reads, and that other tools for preference tuning take as they are.
    """
    for vote in votes:
        pair = pairs[vote.id]
        if vote.vote not in MODELS or not all(reply.strip() for reply in pair.replies.values()):
            continue
        chosen, rejected = (pair.replies[model] for model in sorted(MODELS, key=lambda model: model != vote.vote))
        yield {
            "id": vote.id,
            "prompt": [message.to_dict() for message in pair.prompt],
            "chosen": [Message("assistant", chosen).to_dict()],
            "rejected": [Message("assistant", rejected).to_dict()],
            "rater": vote.rater,
        }


def summarise(votes: Collection[Vote]) -> dict[str, Any]:
    """Votes to figures.

    Args:
        votes: Those that hold: one for each rater and pair.

    Returns: ``votes`` (how many of each kind), ``prompts`` and ``raters`` (votes of each); ``win_rate`` of A, ties and both bad as half;
        ``left_wins``, the share of decided votes that went to what was shown left; both with 95 % intervals, for which prompts are drawn
        with all votes on them; ``agreement`` of each two raters.
    """
    counts = Counter(vote.vote for vote in votes)
    return {
        "votes": {verdict: counts[verdict] for verdict in VERDICTS},
        "prompts": len({vote.id for vote in votes}),
        "raters": dict(sorted(Counter(vote.rater for vote in votes).items())),
        "win_rate": _share([(vote.id, _SCORES.get(vote.vote, 0.5)) for vote in votes]),
        "left_wins": _share([(vote.id, float(vote.vote == vote.left)) for vote in votes if vote.vote in MODELS]),
        "agreement": list(_agreement(votes)),
    }


def _share(scores: Sequence[tuple[str, float]]) -> dict[str, Any]:
    """Mean score with its interval; scores of one prompt belong together."""
    import torch

    from lightning_chatgpt.metrics.bootstrap import estimate

    rows: dict[str, list[float]] = {}
    for prompt, score in scores:
        row = rows.setdefault(prompt, [0.0, 0.0])
        row[0] += score
        row[1] += 1
    table = torch.tensor([rows[prompt] for prompt in sorted(rows)], dtype=torch.float64)  # sorted: whatever the order of the votes
    return estimate(table, lambda sums: sums[..., 0] / sums[..., 1]).to_dict()


def _agreement(votes: Collection[Vote]) -> Iterator[dict[str, Any]]:
    """How far each two raters agree on the prompts that both judged; kappa is null where both said one and the same of all."""
    import torch
    from torchmetrics.functional import cohen_kappa

    said: dict[str, dict[str, int]] = {}
    for vote in votes:
        said.setdefault(vote.rater, {})[vote.id] = VERDICTS.index(vote.vote)
    for one, other in combinations(sorted(said), 2):
        both = sorted(said[one].keys() & said[other].keys())
        if not both:
            continue
        ours, theirs = (torch.tensor([said[rater][prompt] for prompt in both]) for rater in (one, other))
        kappa = float(cohen_kappa(ours, theirs, task="multiclass", num_classes=len(VERDICTS)))
        agreed = float((ours == theirs).double().mean())
        # Chance alone would agree on all of them: 0 / 0.
        yield {"raters": [one, other], "prompts": len(both), "agreed": agreed, "kappa": None if kappa != kappa else kappa}
