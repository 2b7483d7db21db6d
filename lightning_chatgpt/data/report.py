"""What is in the data and what the model will be fed, as plain data: for people to look at and for scripts to judge."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_chatgpt.chat.conversation import Conversation
from lightning_chatgpt.chat.encoding import EncodedChat, Encoder
from lightning_chatgpt.chat.jinja import template_of
from lightning_chatgpt.chat.tokenizer import token_texts
from lightning_chatgpt.chat.truncation import Truncation
from lightning_chatgpt.data.examples import ExampleDataset
from lightning_chatgpt.data.packing import pack, padding_share
from lightning_chatgpt.data.sampler import EpochSampler

if TYPE_CHECKING:
    from lightning_chatgpt.data.chat import ChatDataModule

_SHORTEST_BIN = 8
_POLICIES: tuple[Truncation, ...] = ("drop_oldest", "split", "skip")


def describe(data: ChatDataModule, *, n_examples: int, max_truncated: float) -> dict[str, Any]:
    """Describe the chats of a data module.

    Args:
        data: After ``setup("fit")``.
        n_examples: How many examples are shown token by token.
        max_truncated: The fraction of conversations that truncation may shorten before it is called a surprise.

    Returns: what reading, cleaning, splitting and encoding found (``sources``, ``duplicates``, ``leaks``); ``mixture``, ``settings``; for
        each of ``parts`` its counts and distributions; ``examples`` with the text, loss weight and kind of each token; ``surprises``, a
        line each.
    """
    assert data.tokenizer is not None
    report: dict[str, Any] = {
        "settings": {
            "template": template_of(data.tokenizer).name,
            "tokenizer entries": len(data.tokenizer),
            "max_length": data.max_length,
            "truncation": data.truncation,
            "supervise": data.supervise,
            "packing": data.packing,
        },
        **data.report,
        "parts": {part: {**data.report["parts"][part], **_describe_part(data, part)} for part in data.datasets},
        "mixture": _mixture(data),
        "examples": _examples(data, n_examples),
    }
    report["surprises"] = list(_surprises(report, data, max_truncated=max_truncated))
    return report


def _mixture(data: ChatDataModule) -> dict[str, dict[str, int]]:
    """What of each group an epoch of training reads; empty where all is read once."""
    draws = data.train_sampler(data.datasets["train"]).draws
    if draws is None:
        return {}
    return {
        name: {"items": n, "tokens": n_tokens, "rows": draws.n_all_rows[name], "rows_per_epoch": draws.n_rows[name]}
        for name, (n, n_tokens) in draws.sizes.items()
    }


def _describe_part(data: ChatDataModule, part: str) -> dict[str, Any]:
    dataset = data.datasets[part]
    turns: Counter[int] = Counter()
    roles: dict[str, Counter[str]] = {}
    lengths: list[int] = []
    policies: dict[str, Counter[str]] = {policy: Counter(lost=0, examples=0) for policy in _POLICIES}
    for conversation, found in _encoded(data, part):
        turns[len(conversation.messages)] += 1
        for message in conversation.messages:
            roles.setdefault(message.role, Counter()).update(messages=1, characters=len(message.content))
        lengths.append(found["skip"].n_tokens)
        for policy, chat in found.items():
            policies[policy].update(lost=chat.n_lost, examples=len(chat.examples))
    return {
        "examples": len(dataset),
        "longer": sum(length > (data.max_length or 0) for length in lengths),
        "lengths": _histogram(lengths),
        "turns": {str(n): count for n, count in sorted(turns.items())},
        "roles": {role: dict(counts) for role, counts in roles.items()},
        "sources": {source.name: len(source.rows) for source in dataset.sources},
        "policies": {policy: dict(counts) for policy, counts in policies.items()},
        "padding": _padding(data, dataset),
    }


def _encoded(data: ChatDataModule, part: str) -> Iterator[tuple[Conversation, dict[str, EncodedChat]]]:
    """Each conversation, and what each way of truncation would make of it."""
    assert data.tokenizer is not None and data.max_length is not None
    encoder = Encoder(data.tokenizer, max_length=data.max_length, supervise=data.supervise)
    waiting: deque[Conversation] = deque()

    def chats() -> Iterator[Conversation]:
        for source in data.datasets[part].sources:
            for content in source.table.column("content", source.rows):
                waiting.append(data.load(content))
                yield waiting[-1]

    for found in encoder.compare(chats(), _POLICIES):
        yield waiting.popleft(), found


def _histogram(lengths: list[int]) -> list[list[int]]:
    """From, to and count of bins, two for each doubling: chats range from a few tokens to tens of thousands."""
    if not lengths:
        return []
    n_bins = 2 + int(2 * np.log2(max(1, max(lengths) / _SHORTEST_BIN)))
    edges = [0, *(round(_SHORTEST_BIN * 2 ** (i / 2)) for i in range(n_bins))]
    counts, _ = np.histogram(lengths, bins=edges)
    bins = [[start, end, int(count)] for start, end, count in zip(edges[:-1], edges[1:], counts, strict=True)]
    filled = [i for i, (_, _, count) in enumerate(bins) if count]
    return bins[filled[0] : filled[-1] + 1]


def _padding(data: ChatDataModule, dataset: ExampleDataset) -> dict[str, float]:
    """The share of padding in an epoch's batches: shuffled, grouped by length, and packed."""
    assert data.max_length is not None
    found = {}
    for name, grouped in (("shuffled", False), ("grouped by length", True)):
        sampler = EpochSampler(dataset.lengths, step_size=data.batch_size, seed=data.seed, group_by_length=grouped)
        order = dataset.lengths[[i for (i,) in sampler.epoch_rows(0)]] if len(dataset) else dataset.lengths
        batches = [order[i : i + data.batch_size] for i in range(0, len(order), data.batch_size)]
        places = sum(int(batch.max()) * len(batch) for batch in batches)
        found[name] = 1 - int(order.sum()) / places if places else 0.0
    rows = pack(dataset.lengths, capacity=data.max_length)
    return {**found, "packed": padding_share(dataset.lengths, rows, capacity=data.max_length)}


def _examples(data: ChatDataModule, n_examples: int) -> list[dict[str, Any]]:
    assert data.tokenizer is not None
    dataset = data.datasets["train"]
    special = set(data.tokenizer.all_special_ids)
    shown = []
    for index in range(min(n_examples, len(dataset))):
        ids, weights = dataset.example(index)
        texts = token_texts(data.tokenizer, ids.tolist())
        tokens = [[text, float(weight), token in special] for text, weight, token in zip(texts, weights, ids.tolist(), strict=True)]
        shown.append({"id": data.load(dataset.content_of(index)).id, "part": "train", "tokens": tokens})
    return shown


def _surprises(report: dict[str, Any], data: ChatDataModule, *, max_truncated: float) -> Iterator[str]:
    for part, leaks in report.get("leaks", {}).items():
        if data.max_leak is not None and leaks["share"] > data.max_leak:
            yield (
                f"{part}: {leaks['overlapping']} of {leaks['n']} conversations stand in train too ({leaks['exact']} word for word); "
                "set data.split_by or clean duplicates"
            )
    for part, counts in report["parts"].items():
        if not counts.get("supervised"):
            yield f"{part}: no token is supervised, so nothing can be learnt; are there assistant messages with a weight above 0?"
        elif counts.get("unsupervised"):
            yield f"{part}: {counts['unsupervised']} of {counts['items']} conversations have no supervised token and are left out"
        share = counts.get("truncated", 0) / max(1, counts["items"])
        if share > max_truncated:
            yield (
                f"{part}: {counts['truncated']} of {counts['items']} conversations ({share:.0%}) are cut to {data.max_length} tokens, "
                f"and {counts['lost']} supervised tokens are lost by that; raise data.max_length, or set data.truncation to split"
            )
    for name, source in report.get("sources", {}).items():
        n_left_out = sum(counts.get("skip", 0) for counts in source.get("faults", {}).get("counts", {}).values())
        if n_left_out > 0.1 * max(1, source.get("records", 0)):
            yield f"{name}: {n_left_out} of {source['records']} records are left out for their faults"
