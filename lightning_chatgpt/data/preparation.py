"""From a source to its table in the cache: read, cleaned, each item with its place and digest."""

from __future__ import annotations

import hashlib
import inspect
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_only
from tqdm import tqdm

from lightning_chatgpt.chat.faults import KINDS
from lightning_chatgpt.data.cache import build_once, key_of, make_folder, publish, unfinished_path
from lightning_chatgpt.data.sources import Source, SourceSettings
from lightning_chatgpt.data.splits import position
from lightning_chatgpt.data.tables import ItemRow, ItemTable

if TYPE_CHECKING:
    from lightning_chatgpt.data.base import TokenDataModule

_QUIET_SECONDS = 2.0  # work that is done by then needs no progress bar


def prepare(module: TokenDataModule[Any], source: Source) -> ItemTable:
    """Read a source through a data module, or find what was read of it.

    Args:
        module: Says how the source is read, cleaned and stored.
        source: As it stands in the config.
    """
    fingerprint = module.fingerprint(source)
    if fingerprint is not None:
        key = key_of("items", fingerprint, code_of(module, "read", "split_key", "digest", "dump", "labels", "items"))
        return ItemTable(build_once(module.cache / f"{key}.items.arrow", partial(_write, module, source)))
    # Only reading tells what is in it; what was encoded of the same content is found by its digest all the same.
    make_folder(module.cache)
    unfinished = unfinished_path(module.cache)
    try:
        _write(module, source, unfinished)
        table = ItemTable(unfinished)
        path = module.cache / f"{key_of('items', table.about)}.items.arrow"
        publish(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return ItemTable(path)


def _write(module: TokenDataModule[Any], source: Source, path: Path) -> None:
    about: dict[str, Any] = {}
    of_all = hashlib.blake2b(digest_size=16)

    def rows() -> Iterator[ItemRow]:
        with progress(f"reading {SourceSettings.of(source).name}") as bar:
            for item in module.items(source, about):
                bar.update()
                content = module.dump(item)
                of_all.update(content.encode("utf-8", "surrogatepass") + b"\0")
                n_chars = sum(map(len, module.texts(item)))
                yield ItemRow(content, position(module.split_key(item)), module.digest(item), dict(module.labels(item)), n_chars)

    ItemTable.write(path, rows(), lambda: {**about, "digest": of_all.hexdigest()})


def progress(what: str, total: int | None = None) -> Any:
    """A progress bar, on the first process, for work that takes its time."""
    is_first = getattr(rank_zero_only, "rank", 0) == 0
    return tqdm(desc=what, total=total, unit=" items", delay=_QUIET_SECONDS, leave=False, disable=not is_first)


def code_of(module: object, *methods: str) -> str:
    """Tells apart classes that do something of their own: their names and code; empty for the package's own.

    What is cached is found again only by the code that wrote it.
    """
    own = [
        cls
        for cls in type(module).__mro__
        if not cls.__module__.startswith(("lightning_chatgpt.", "lightning.")) and any(method in vars(cls) for method in methods)
    ]
    try:
        return "".join(inspect.getsource(cls) for cls in own)
    except (OSError, TypeError):
        return uuid.uuid4().hex + str(os.getpid())  # typed at a prompt: there is no code to compare


def tell_faults(name: str, about: Mapping[str, Any]) -> None:
    """Tell what was left out or mended, and where."""
    for kind, counts in about.get("faults", {}).get("counts", {}).items():
        done = " and ".join(f"{n} {'left out' if action == 'skip' else 'mended'}" for action, n in counts.items())
        places = ", ".join(about["faults"]["places"][kind])
        rank_zero_info(f"{name}: {done} for {KINDS[kind].about} ({kind}), the first at {places}")


def why_nothing(abouts: Iterable[Mapping[str, Any]]) -> str:
    """Why sources came out empty, for the end of a message."""
    kinds = sorted({kind for about in abouts for kind in about.get("faults", {}).get("counts", {})})
    return f" (left out: {', '.join(kinds)})" if kinds else ""
