"""Which items are trained on and which are held out: splits, duplicates, leaks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from lightning_chatgpt.data.cache import key_of
from lightning_chatgpt.data.duplicates import DuplicateSettings, LeakCheck, NearDuplicates
from lightning_chatgpt.data.splits import Ints, split
from lightning_chatgpt.data.tables import ItemTable

# Where one item is in two parts, the held-out one keeps it.
_PARTS = ("test", "validation", "train")
_LEAK_SHARE = 0.5  # of a held-out chat's n-grams, found in training: more than greetings and set phrases explain


@dataclass(frozen=True)
class SourceRows:
    """Items of one source.

    Attributes:
        name: The source's.
        table: Where they lie.
        rows: Which of them, in ascending order.
    """

    name: str
    table: ItemTable
    rows: Ints


Parts = dict[str, list[SourceRows]]


def split_parts(sources: Mapping[str, Sequence[tuple[str, ItemTable]]], *, validation: float, test: float) -> Parts:
    """Split the training sources, and put those that are held out by themselves beside them.

    Args:
        sources: For ``train``, ``validation`` and ``test`` their sources, each with its name.
        validation: The fraction of ``train`` to validate on; 0 where there is none, or ``validation`` has sources.
        test: Likewise.
    """
    parts: Parts = {part: [SourceRows(name, table, np.arange(len(table))) for name, table in of] for part, of in sources.items()}
    train = sources.get("train", [])
    if not train:
        return parts
    chosen = split(np.concatenate([table.places for _, table in train]), validation=validation, test=test)
    ends = np.cumsum([0, *(len(table) for _, table in train)])
    for part, rows in chosen.items():
        if part == "train" or len(rows):
            cut = np.searchsorted(rows, ends)
            parts[part] = [SourceRows(name, table, rows[cut[i] : cut[i + 1]] - ends[i]) for i, (name, table) in enumerate(train)]
    return parts


def drop_duplicates(
    parts: Parts, settings: DuplicateSettings, *, texts: Callable[[str], Sequence[str]]
) -> tuple[Parts, dict[str, dict[str, int]]]:
    """Keep one of each set of duplicates: a held-out one where there is one.

    Args:
        parts: What is looked through.
        settings: What counts as a duplicate.
        texts: What is said in an item, as it is stored.

    Returns: the parts without duplicates; and for each part how many were left out as ``exact`` and ``near`` ones.
    """
    seen: set[bytes] = set()
    near = NearDuplicates(settings.threshold, settings.n_permutations) if settings.near else None
    n_looked_at = 0
    kept: Parts = {}
    counts: dict[str, dict[str, int]] = {}
    for part in (part for part in _PARTS if part in parts):
        counts[part] = {"exact": 0, "near": 0}
        kept[part] = []
        for source in parts[part]:
            keep = np.ones(len(source.rows), dtype=bool)
            for i, digest in enumerate(source.table.digests[source.rows].tolist()):
                keep[i] = digest not in seen
                seen.add(digest)
            counts[part]["exact"] += int((~keep).sum())
            rows = source.rows[keep]
            if near is not None:
                keep = np.ones(len(rows), dtype=bool)
                for i, content in enumerate(source.table.column("content", rows)):
                    keep[i] = near.first_like(n_looked_at, "\n".join(texts(content))) is None
                    n_looked_at += 1
                counts[part]["near"] += int((~keep).sum())
                rows = rows[keep]
            kept[part].append(SourceRows(source.name, source.table, rows))
    return {part: kept[part] for part in parts}, counts


def key_of_parts(parts: Parts, *settings: Any) -> str:
    """A key that is equal for equal items in equal parts."""
    held = {part: [[of.table.about["digest"], blake2b(of.rows.tobytes()).hexdigest()] for of in sources] for part, sources in parts.items()}
    return key_of(held, *settings)


def save_rows(path: Path, parts: Parts, counts: dict[str, dict[str, int]]) -> None:
    """Write down which rows are left of each part."""
    rows = {f"{part}/{i}": source.rows for part, sources in parts.items() for i, source in enumerate(sources)}
    with path.open("wb") as file:
        np.savez(file, counts=np.array(json.dumps(counts)), **rows)  # type: ignore[arg-type]  # numpy takes names for settings


def load_rows(path: Path, parts: Parts) -> tuple[Parts, dict[str, dict[str, int]]]:
    """The parts with only the rows that :func:`save_rows` wrote down, and its counts."""
    with np.load(path) as saved:
        left = {
            part: [SourceRows(source.name, source.table, saved[f"{part}/{i}"]) for i, source in enumerate(sources)]
            for part, sources in parts.items()
        }
        return left, json.loads(str(saved["counts"]))


def find_leaks(parts: Parts, *, texts: Callable[[str], Sequence[str]]) -> dict[str, dict[str, Any]]:
    """Look for held-out items in the training ones.

    An item leaks where training holds it word for word, or at least half of its n-grams: of 13 words, of 8 in an item of fewer than
    50 words; an item of fewer than 8 words is compared as a whole. Source: the 13-grams of Brown et al. 2020, appendix C.

    Args:
        parts: With ``train``.
        texts: What is said in an item, as it is stored, system messages left out.

    Returns: for each held-out part its number of items ``n``, those found ``exact``, those with at least half of their n-grams in training
        (``overlapping``, the exact ones among them), those with ``any`` n-gram there, and ``share``: overlapping / n.
    """
    found: dict[str, dict[str, Any]] = {}
    train = parts.get("train", [])
    trained_on = {digest for source in train for digest in source.table.digests[source.rows].tolist()}
    checks: dict[str, tuple[LeakCheck, np.ndarray[Any, Any]]] = {}
    for part in ("validation", "test"):
        held_out = (content for source in parts.get(part, []) for content in source.table.column("content", source.rows))
        digests = [digest for source in parts.get(part, []) for digest in source.table.digests[source.rows].tolist()]
        if digests and train:
            exact = np.array([digest in trained_on for digest in digests])
            checks[part] = LeakCheck(texts(content) for content in held_out), exact
    if checks:
        for source in train:
            for content in source.table.column("content", source.rows):
                said = texts(content)
                for check, _ in checks.values():
                    check.see(said)
    for part, (check, exact) in checks.items():
        shares = check.shares()
        leaks = exact | (shares >= _LEAK_SHARE)
        found[part] = {
            "n": len(leaks),
            "exact": int(exact.sum()),
            "overlapping": int(leaks.sum()),
            "any": int((exact | (shares > 0)).sum()),
            "share": float(leaks.mean()),
        }
    return found
