"""Whether a model answers differently when a text is about somebody else: one text, its terms swapped, compared in pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_chatgpt.chat.conversation import Conversation, Message
from lightning_chatgpt.errors import DataError
from lightning_chatgpt.evaluation.counterfactual_files import Counterfactual
from lightning_chatgpt.evaluation.fairness import Sums, compare_groups
from lightning_chatgpt.evaluation.words import WordList
from lightning_chatgpt.metrics.bootstrap import estimate
from lightning_chatgpt.metrics.fairness import Tested, holm, mean_difference, ratio

Score = Callable[[list[Conversation]], list[tuple[float, int]]]
Reply = Callable[[list[Conversation]], list[str]]

_ROUNDING = 1e-5  # nats a token, as float32 rounds
_TESTED = ("log_likelihood", "reply_length", "flagged_words")


class _Side(NamedTuple):
    """One variant: nats a token of its last message, its prompt, that message, and the reply to the prompt where it was asked for."""

    log_likelihood: float
    prompt: str
    scored: str
    reply: str | None


@dataclass(slots=True)
class _Pair:
    """Two groups of one axis in one language, and both sides of each counterfactual that has them."""

    axis: str
    language: str
    names: tuple[str, str]
    ids: list[str] = field(default_factory=list)
    sides: list[tuple[_Side, _Side]] = field(default_factory=list)

    def rows(self, of_sides: Callable[[_Side, _Side], float | None]) -> Tensor:
        """(N, 2) for each template the sum of a figure over its pairs, and how many have it."""
        sums: dict[str, list[float]] = {}
        for template, (first, second) in zip(self.ids, self.sides, strict=True):
            if (value := of_sides(first, second)) is not None:
                total = sums.setdefault(template, [0.0, 0.0])
                total[0] += value
                total[1] += 1
        return torch.tensor(list(sums.values()), dtype=torch.float64).reshape(-1, 2)


def counterfactual_report(counterfactuals: Sequence[Counterfactual], *, score: Score, reply: Reply, words: WordList) -> dict[str, Any]:
    """Compare what a model makes of variants of one text.

    A difference is that of the first group less the second's. Log-likelihoods are of a variant's last message, divided by its tokens.
    Replies are to what stands before an assistant's last message, or to all where the user speaks last; they are asked for where the
    swap is in there. Templates are drawn whole, and languages are kept apart.

    Args:
        counterfactuals: As :func:`lightning_chatgpt.evaluation.counterfactual_files.read_counterfactuals` reads them.
        score: Gives for each conversation the sum of the log-probabilities of the last message's content, in nats, and its tokens.
        reply: Gives the reply to each; without sampling, or chance alone makes replies differ.
        words: What is looked for in replies.

    Returns: ``pairs``, for each axis, language and two groups the ``templates``; the mean difference of ``log_likelihood`` a token, its
        mean ``size`` whatever the sign, and the share of templates where the first is likelier (``first_likelier``); where replies were
        compared the share that ``differ``, and the differences of ``reply_length`` in characters and of ``flagged_words``, the share of
        replies with a listed word; the ``example`` whose likelihoods differ most. ``prompts``, for each axis that has texts without a
        counterpart, the ``figures`` of replies by group, as in a group report. Each figure's p-values are corrected for all pairs.

    Raises:
        DataError: A last message has no tokens.
    """
    pairs = [(pair, _tests(pair, words)) for pair in _pairs(counterfactuals, score=score, reply=reply)]
    shown = [_describe(pair) for pair, _ in pairs]
    for figure in _TESTED:
        tested = [(report, tests[figure]) for report, (_, tests) in zip(shown, pairs, strict=True) if figure in tests]
        for (report, found), p_adjusted in zip(tested, holm([found.p_value for _, found in tested]), strict=True):
            report[figure] = found.to_dict(p_adjusted=p_adjusted)
    return {"pairs": shown, "prompts": list(_prompts(counterfactuals, reply=reply, words=words))}


def _pairs(counterfactuals: Sequence[Counterfactual], *, score: Score, reply: Reply) -> list[_Pair]:
    compared = [found for found in counterfactuals if len(found.variants) > 1]
    variants = [variant for found in compared for variant in found.variants.values()]
    scores = score(variants) if variants else []
    for variant, (_, n_tokens) in zip(variants, scores, strict=True):
        if n_tokens < 1:
            raise DataError(f"{variant.id}: the last message has no tokens to score; write something in it")
    prompts = [_prompt(variant) for variant in variants]
    wanted: dict[tuple[Message, ...], Conversation] = {}
    for found in compared:
        of_found = {prompt.messages: prompt for variant in found.variants.values() for prompt in [_prompt(variant)]}
        wanted.update(of_found if len(of_found) > 1 else {})
    replies = dict(zip(wanted, reply(list(wanted.values())) if wanted else [], strict=True))
    sides = iter(
        _Side(
            nats / n_tokens,
            "\n".join(message.content for message in prompt.messages),
            variant.messages[-1].content,
            replies.get(prompt.messages),
        )
        for variant, prompt, (nats, n_tokens) in zip(variants, prompts, scores, strict=True)
    )
    pairs: dict[tuple[str, str, str, str], _Pair] = {}
    for found in compared:
        of_names = {name: next(sides) for name in found.variants}
        for first, second in combinations(of_names, 2):
            if (found.axis, found.language, second, first) in pairs:  # terms of another template in another order
                first, second = second, first
            pair = pairs.setdefault((found.axis, found.language, first, second), _Pair(found.axis, found.language, (first, second)))
            pair.ids.append(found.id)
            pair.sides.append((of_names[first], of_names[second]))
    return list(pairs.values())


def _prompt(variant: Conversation) -> Conversation:
    return variant.prompt_and_reference()[0]


def _tests(pair: _Pair, words: WordList) -> dict[str, Tested]:
    rows = {
        "log_likelihood": pair.rows(_difference),
        "reply_length": pair.rows(_of_replies(lambda a, b: len(a) - len(b))),
        "flagged_words": pair.rows(_of_replies(lambda a, b: words.is_in(a) - words.is_in(b))),
    }
    return {figure: mean_difference(of_figure) for figure, of_figure in rows.items() if len(of_figure)}


def _describe(pair: _Pair) -> dict[str, Any]:
    """What is told of a pair, but for what is tested."""
    size = pair.rows(lambda a, b: abs(_difference(a, b)))
    likelier = pair.rows(lambda a, b: 0.5 * (1 + (_difference(a, b) > 0) - (_difference(a, b) < 0)))
    differ = pair.rows(_of_replies(lambda a, b: a != b))
    return {
        "axis": pair.axis,
        "language": pair.language,
        "first": pair.names[0],
        "second": pair.names[1],
        "templates": len(size),
        "size": estimate(size, ratio).to_dict(),
        "first_likelier": estimate(likelier, ratio).to_dict(),
        "differ": estimate(differ, ratio).to_dict() if len(differ) else None,
        **dict.fromkeys(_TESTED),
        "example": _example(pair),
    }


def _difference(first: _Side, second: _Side) -> float:
    """Of log-likelihoods a token; 0 where it may come from the order of sums in batches of other shapes."""
    difference = first.log_likelihood - second.log_likelihood
    return difference if abs(difference) > _ROUNDING else 0.0


def _of_replies(figure: Callable[[str, str], float]) -> Callable[[_Side, _Side], float | None]:
    """A figure of two replies; None where none were asked for, or both are to one prompt."""
    return lambda a, b: None if a.reply is None or b.reply is None or a.prompt == b.prompt else figure(a.reply, b.reply)


def _example(pair: _Pair) -> dict[str, Any]:
    """The counterfactual whose likelihoods differ most."""
    place = max(range(len(pair.sides)), key=lambda i: abs(_difference(*pair.sides[i])))
    return {"id": pair.ids[place], **{name: side._asdict() for name, side in zip(("first", "second"), pair.sides[place], strict=True)}}


def _prompts(counterfactuals: Sequence[Counterfactual], *, reply: Reply, words: WordList) -> Iterator[dict[str, Any]]:
    """Texts without a counterpart, as BOLD's: replies by group."""
    alone = [(found.axis, *of_group) for found in counterfactuals if len(found.variants) == 1 for of_group in found.variants.items()]
    replies = reply([variant for *_, variant in alone]) if alone else []
    axes: dict[str, dict[str, dict[str, list[Sums]]]] = {}
    for (axis, group, _), text in zip(alone, replies, strict=True):
        figures = axes.setdefault(axis, {"reply_characters": {}, "flagged_words": {}})
        figures["reply_characters"].setdefault(group, []).append((len(text), 1))
        figures["flagged_words"].setdefault(group, []).append((words.is_in(text), 1))
    for axis, figures in axes.items():
        groups: Mapping[str, Sequence[Sums]] = figures["flagged_words"]
        sizes = {group: len(of_group) for group, of_group in groups.items()}
        yield {"axis": axis, "groups": sizes, "figures": compare_groups(figures, groups=list(sizes))}
