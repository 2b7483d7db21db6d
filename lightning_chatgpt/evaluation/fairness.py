"""Whether a model does as well by one group as by another: by a label of the data, and what the training data say of groups.

Counterfactuals, one text with its terms swapped, are in :mod:`lightning_chatgpt.evaluation.counterfactual`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from lightning_chatgpt.chat.conversation import Conversation
from lightning_chatgpt.data.words import word_entries
from lightning_chatgpt.errors import ConfigError, DataError, nearest
from lightning_chatgpt.evaluation.counterfactual_files import read_counterfactuals
from lightning_chatgpt.evaluation.words import BUILTIN, WordList, read_words
from lightning_chatgpt.metrics.bootstrap import estimate
from lightning_chatgpt.metrics.fairness import MIN_RECORDS, Gap, holm, largest_gap, ratio
from lightning_chatgpt.metrics.perplexity import Perplexity
from lightning_chatgpt.settings import check_settings

LIMITS = (
    "A model is not shown to be fair by this: what no group, term or word list stands for was not looked at, and a difference too small "
    "for the number of records is not found.",
    "A gap is not by itself unfair, and its cause is not told: groups may differ in what they ask about, in language, in length, or in how "
    "much of it the model was trained on.",
    "Perplexities of groups that write differently, in two languages above all, measure how predictable the texts are before they measure "
    "the model.",
    "Listed words are counted, not understood: a reply that denies or quotes one counts, and harm in other words does not.",
    "Terms differ in how common they are and in what else they mean; some difference in likelihood comes from that.",
    "Likelihoods are of a few sentences that somebody wrote; they tell little of what the model will say to people. The shipped set is "
    "small, in English and Chinese, and its pairs stand for no group as a whole.",
    "StereoSet and CrowS-Pairs hold pairs that are faulty, and stereotypes of the United States alone (Blodgett et al. 2021).",
    "Groups of fewer than 10 records are shown and not compared. Intervals and tests take records for independent: several of one person, "
    "or copies of one text, make them too sure. Where all records of a group agree, as in a share of 100 %, its interval is a point.",
    "Each interval holds the truth with 95 % by itself. A difference is called found where its interval lies apart from 0 and its p, "
    "corrected for all gaps of a table, or all pairs of a column, is below 5 %.",
    "Found says that a difference is there, not that it matters: 0.01 nats a token make each token 1 % likelier. In a language that the "
    "model hardly knows, tiny differences are found that mean nothing.",
)

_MOST_GROUPS = 50
_YES, _NO = ("yes", "true", "1", "1.0"), ("no", "false", "0", "0.0")

# What is told of a group: its name, what it is, and whether it is a share.
_FIGURES = {
    "perplexity": ("perplexity", "of what the assistant is to say, in the data", False),
    "accuracy": ("accuracy", "share of its tokens that the model holds the likeliest", True),
    "reply_length": ("reply length", "mean tokens of the model's reply", False),
    "reply_characters": ("reply length", "mean characters of the model's reply", False),
    "flagged_words": ("listed words", "share of replies that hold a listed word", True),
    "precision": ("precision", "of replies that hold a listed word, the share that are flagged in the data", True),
    "recall": ("recall", "of those flagged in the data, the share of replies that hold a listed word", True),
}

Sums = tuple[float, float]  # what a record adds to a numerator and a denominator


@dataclass(frozen=True, kw_only=True)
class FairnessSettings:
    """What is looked at.

    Args:
        group: The label of the data by which groups are told apart, such as ``dialect``; None compares no groups.
        flag: The label of the data that says, by yes or no, which replies are right to hold a listed word; None for none.
        words: A UTF-8 file of the words that are looked for, one a line; ``builtin`` for a few mildly unkind English and Chinese ones.
        counterfactual: A file, folder or glob of templates and terms (docs/fairness.md), or of StereoSet, CrowS-Pairs or BOLD;
            ``builtin`` for the shipped set, None for none.

    Raises:
        ConfigError: ``flag`` is set and ``group`` is not.
    """

    group: str | None = None
    flag: str | None = None
    words: str = BUILTIN
    counterfactual: str | None = BUILTIN

    def __post_init__(self) -> None:
        if self.flag is not None and self.group is None:
            raise ConfigError(f"fairness.flag {self.flag!r} is only told by group; set fairness.group to the label that names the groups")

    @classmethod
    def of(cls, settings: Mapping[str, Any] | None) -> FairnessSettings:
        """Read ``fairness``.

        Raises:
            ConfigError: A setting is unknown, or of the wrong type.
        """
        return cls(**check_settings("fairness", settings or {}, cls))


def group_report(records: Sequence[Mapping[str, Any]], *, settings: FairnessSettings) -> dict[str, Any]:
    """Compare groups of evaluated conversations.

    Args:
        records: As the evaluation wrote them: labels, scores of messages, the reply.
        settings: ``group`` has to be set.

    Returns: ``group`` and ``flag``; ``groups``, the records of each; ``figures``, each with what it is, its estimate for each group
        and its gap (null where fewer than two groups have enough records); ``notes``, a line each.

    Raises:
        ConfigError: No record has the label, or it names too many groups.
        DataError: A flag is neither yes nor no.
    """
    assert settings.group is not None
    words = read_words(settings.words)
    for name in filter(None, (settings.group, settings.flag)):
        check_label(name, [record["labels"] for record in records])
    of_group: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        if settings.group in record["labels"]:
            of_group.setdefault(record["labels"][settings.group], []).append(record)
    of_group = dict(sorted(of_group.items(), key=lambda group: (-len(group[1]), group[0])))
    if len(of_group) > _MOST_GROUPS:
        _refuse_groups(settings.group, len(of_group))
    sums: dict[str, dict[str, list[Sums]]] = {}
    for group, members in of_group.items():
        for record in members:
            for figure, pair in _sums(record, words=words, flag=settings.flag).items():
                sums.setdefault(figure, {}).setdefault(group, []).append(pair)
    return {
        "group": settings.group,
        "flag": settings.flag,
        "groups": {group: len(members) for group, members in of_group.items()},
        "figures": compare_groups(sums, groups=list(of_group)),
        "notes": list(_notes(records, of_group, settings)),
    }


def compare_groups(sums: Mapping[str, Mapping[str, Sequence[Sums]]], *, groups: Sequence[str]) -> dict[str, Any]:
    """Estimate figures for each group, and their gaps.

    Args:
        sums: For each figure and group what each record adds; one that adds nothing to a denominator does not count.
        groups: All groups, in order.
    """
    figures: dict[str, Any] = {}
    gaps: dict[str, Gap] = {}
    for name in (name for name in _FIGURES if name in sums):
        rows = {group: torch.tensor(sums[name].get(group, ()), dtype=torch.float64).reshape(-1, 2) for group in groups}
        rows = {group: row[row[:, 1] > 0] for group, row in rows.items()}
        statistic = Perplexity().of_sums if name == "perplexity" else ratio
        title, about, is_share = _FIGURES[name]
        estimates = {group: estimate(row, statistic).to_dict() for group, row in rows.items()}
        figures[name] = {"name": title, "about": about, "is_share": is_share, "groups": estimates, "gap": None}
        if (gap := largest_gap(rows, statistic)) is not None:
            gaps[name] = gap
    for (name, gap), p_adjusted in zip(gaps.items(), holm([gap.tested.p_value for gap in gaps.values()]), strict=True):
        figures[name]["gap"] = {"highest": gap.highest, "lowest": gap.lowest, **gap.tested.to_dict(p_adjusted=p_adjusted)}
    return figures


def audit(conversations: Iterable[Conversation], *, settings: FairnessSettings) -> dict[str, Any]:
    """Count how groups and listed words are distributed in training data.

    Args:
        conversations: Read once.
        settings: Which label, which words, and which terms: those of ``counterfactual``.

    Returns: ``conversations``, how many; ``groups`` and ``roles``, of each how many conversations, messages and characters, and messages
        with a listed word (``flagged``); ``words`` and ``terms``, of each that occurs how often (``occurrences``), in how many messages, in
        how many of them with a listed word (``flagged``, terms alone), and by role and group; ``n_words`` and ``n_terms`` looked for.

    Raises:
        ConfigError: The label names too many groups.
    """
    words = read_words(settings.words)
    axes = _terms(settings)
    terms = WordList(axes) if axes else None
    groups: dict[str, Counter[str]] = {}
    roles: dict[str, Counter[str]] = {}
    found: dict[str, dict[str, Any]] = {"words": {}, "terms": {}}
    n = n_without = 0
    for conversation in tqdm(conversations, desc="Fairness audit", unit=" chats", disable=None, leave=False):
        n += 1
        group = conversation.labels.get(settings.group) if settings.group else None
        n_without += group is None
        counts = groups.setdefault(group, Counter()) if group is not None else Counter[str]()
        counts["conversations"] += 1
        for role in {message.role for message in conversation.messages}:
            roles.setdefault(role, Counter())["conversations"] += 1
        if len(groups) > _MOST_GROUPS:
            _refuse_groups(settings.group, len(groups))
        for message in conversation.messages:
            in_words = words.find(message.content)
            in_terms = terms.find(message.content) if terms else []
            for place in (counts, roles[message.role]):
                place.update(messages=1, characters=len(message.content), flagged=bool(in_words))
            _tally(found["words"], in_words, role=message.role, group=group)
            _tally(found["terms"], in_terms, role=message.role, group=group, flagged=bool(in_words))
    shown = {kind: dict(sorted(of_kind.items(), key=lambda item: -item[1]["occurrences"])) for kind, of_kind in found.items()}
    return {
        "conversations": n,
        "group": settings.group,
        "without_label": n_without if settings.group else 0,
        "groups": {name: dict(counts) for name, counts in sorted(groups.items(), key=lambda item: -item[1]["conversations"])},
        "roles": {role: dict(counts) for role, counts in roles.items()},
        "n_words": len(words.entries),
        "n_terms": len(axes),
        "words": shown["words"],
        "terms": {entry: {"axis": axes[entry], **about} for entry, about in shown["terms"].items()},
    }


def _sums(record: Mapping[str, Any], *, words: WordList, flag: str | None) -> dict[str, Sums]:
    learnt = [score for score in record["scores"] if score["role"] == "assistant" and score["weight"] > 0]
    is_found = words.is_in(record["reply"])
    sums: dict[str, Sums] = {
        "perplexity": (sum(s["weight"] * s["nll"] for s in learnt), sum(s["weight"] * s["tokens"] for s in learnt)),
        "accuracy": (sum(s["correct"] for s in learnt), sum(s["tokens"] for s in learnt)),
        "reply_length": (record["completion_tokens"], 1),
        "flagged_words": (is_found, 1),
    }
    if flag is not None and flag in record["labels"]:
        is_true = _is_yes(record, flag)
        sums["precision"] = (is_true and is_found, is_found)
        sums["recall"] = (is_true and is_found, is_true)
    return sums


def _is_yes(record: Mapping[str, Any], flag: str) -> bool:
    value = record["labels"][flag]
    if value.strip().casefold() not in (*_YES, *_NO):
        raise DataError(
            f"{record['id']}: the label {flag} is {value!r}, neither yes nor no; write yes or no, or name another fairness.flag"
        )
    return value.strip().casefold() in _YES


def _notes(records: Sequence[Mapping[str, Any]], of_group: Mapping[str, Sequence[Any]], settings: FairnessSettings) -> Iterable[str]:
    for label, lost in ((settings.group, "are left out"), (settings.flag, "count in neither precision nor recall")):
        if label is not None and (n := sum(label not in record["labels"] for record in records)):
            yield f"{n:,} of {len(records):,} records have no label {label} and {lost}."
    if small := [group for group, members in of_group.items() if len(members) < MIN_RECORDS]:
        yield f"Fewer than {MIN_RECORDS} records, shown and not compared: {', '.join(small)}."
    if n := sum(record["finish_reason"] == "length" for record in records):
        yield f"{n:,} of {len(records):,} replies were cut off at the most tokens a reply may have, so lengths are too short."


def _terms(settings: FairnessSettings) -> dict[str, str]:
    """The axis of each term that the counterfactuals swap."""
    if settings.counterfactual is None:
        return {}
    return {text: found.axis for found in read_counterfactuals(settings.counterfactual) for text in word_entries(found.terms.values())}


def _refuse_groups(name: str | None, n: int) -> NoReturn:
    raise ConfigError(f"fairness.group {name!r} has {n} values or more; name a label of at most {_MOST_GROUPS}, or join some of them")


def check_label(name: str, labels: Sequence[Mapping[str, str]]) -> None:
    """Make sure that some of the conversations have a label.

    Raises:
        ConfigError: None has it.
    """
    if not any(name in of_record for of_record in labels):
        _refuse_label(name, Counter(key for of_record in labels for key in of_record))


def _refuse_label(name: str, known: Mapping[str, int]) -> NoReturn:
    remedy = nearest(name, known) if known else "the data have no labels; give each record one beside its messages"
    raise ConfigError(f"fairness: no conversation has the label {name!r}; {remedy}")


def _tally(found: dict[str, Any], entries: Sequence[str], *, role: str, group: str | None, **flagged: bool) -> None:
    """Count what a message holds."""
    for entry, times in Counter(entries).items():
        about = found.setdefault(entry, {"occurrences": 0, "messages": 0, **dict.fromkeys(flagged, 0), "roles": {}, "groups": {}})
        for key, n in {"occurrences": times, "messages": 1, **flagged}.items():
            about[key] += n
        for key, name in (("roles", role), ("groups", group)):
            if name is not None:
                about[key][name] = about[key].get(name, 0) + 1
