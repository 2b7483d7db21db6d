"""``tokenizer``: train a tokenizer on any data, and see how well it packs text beside others."""

from __future__ import annotations

import json as json_format
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lightning_chatgpt.chat.faults import OnFault
from lightning_chatgpt.errors import ConfigError, DataError, ModelError

Tokenizer = Any  # a PreTrainedTokenizerFast: jsonargparse imports what stands under TYPE_CHECKING, and --help would take seconds

_HELD_OUT = 0.05  # data.validation where nothing is set: a run on the same sources validates on the very same documents
_COST = 110  # bytes that training takes for each byte of the text's different words: at most 105 were measured, in Chinese
_GPT2 = ("gpt2", "openai-community/gpt2")  # one model, two names on the hub
_PIECES_AT_ONCE = 100
_LONGEST_SHOWN = 8


class _Documents(NamedTuple):
    """Chats or documents of one source: some rows of an ItemTable, and the data module that stored them there."""

    name: str
    kind: str
    module: Any
    table: Any
    rows: Any


def tokenizer(
    train: str | dict[str, Any] | list[str | dict[str, Any]],
    output: str,
    vocab_size: int = 8192,
    special_tokens: str | list[str] | None = None,
    template: str | None = None,
    kind: Literal["chats", "text"] | None = None,
    schema: str | None = None,
    on_fault: OnFault = "error",
    max_memory: float = 1.0,
    compare: str | list[str] | None = None,
    json: str | None = None,
    overwrite: bool = False,
) -> None:
    """Train a byte-level BPE tokenizer, and tell how well it packs text that it was not trained on.

    Args:
        train: What to train on: a source as data.train names it, or a list of them.
        output: The folder to write; data.tokenizer takes it for a model from scratch.
        vocab_size: Entries at the most: the 256 bytes, control tokens, and the merges that are learnt.
        special_tokens: Control tokens beside the template's; one, or a list: '["<|tool|>"]'. An id each; what a user types is never one.
        template: The chat template that the tokenizer carries: chatml, plain, or a Jinja file; null is chatml.
        kind: Whether the sources hold chats or plain text; null finds out for each.
        schema: What records of chats look like, as data.schema; null finds out for each.
        on_fault: What is done about a record that cannot be used: error, skip or fix.
        max_memory: Gigabytes that training may take, beside the program itself. Where the different words of the text need more, an
            even sample of the text is trained on.
        compare: A tokenizer to compare with, or a list: builtin:NAME, a folder, or a hub name that is in the hub's cache. null takes
            GPT-2's, where it is there, and builtin:smalltalk's.
        json: A file to write the report to for scripts; - for standard output, and nothing else there.
        overwrite: Whether a folder that is not empty is written into all the same.
    """
    if not max_memory >= 0.1:
        raise ConfigError(f"max_memory must be at least 0.1 (gigabytes), not {max_memory}")
    folder = _make_folder(output, overwrite=overwrite)
    from lightning_chatgpt.chat.tokenizer import train_tokenizer

    settings: dict[str, Any] = {"vocab_size": vocab_size, "template": template, "special_tokens": _listed(special_tokens)}
    train_tokenizer([], **settings)  # what cannot be used is told before anything is read
    others = _find_others(None if compare is None else _listed(compare))
    documents = _read(_listed(train), kind=kind, schema=schema, on_fault=on_fault)
    trained_on, held_out = _hold_out(documents)
    share = fitting_share(_pieces(trained_on, "counting words"), limit=int(max_memory * 1e9 / _COST))
    print(f"Training a tokenizer of {vocab_size:,} entries", file=sys.stderr)
    new = train_tokenizer((piece for place, piece in placed(_pieces(trained_on, "reading words")) if place < share), **settings)
    with _writing(output):
        new.save_pretrained(folder)
    looked_at = held_out or trained_on  # one document alone cannot be held out
    report = {
        "sources": [{"source": part.name, "kind": part.kind, "documents": len(part.rows)} for part in documents],
        "trained_on": _count(trained_on),
        "share": share,
        "held_out": _count(held_out),
        "tokenizers": [
            {"name": name, **measure(one, _pieces(looked_at, f"encoding by {name}"))} for name, one in [(output, new), *others.items()]
        ],
        "longest": _longest(new),
    }
    if json == "-":
        print(json_format.dumps(report, ensure_ascii=False))
    else:
        _print(report)
        print(f"{output} is written; a model from scratch takes it: --data.tokenizer {output}")
    if compare is None and not any(name in others for name in _GPT2):
        print("GPT-2's tokenizer is not in the hub's cache, so it is not compared with; --compare takes a folder", file=sys.stderr)
    if len(new) < vocab_size:
        print(f"warning: the text is too small for {vocab_size} entries; there are {len(new)}", file=sys.stderr)
    if json is not None and json != "-":
        with _writing(json):
            Path(json).write_text(json_format.dumps(report, ensure_ascii=False, indent=1), encoding="utf-8")
        print(f"report written to {json}", file=sys.stderr)


def _listed(given: Any) -> list[Any]:
    return given if isinstance(given, list) else [given] if given is not None else []


def fitting_share(pieces: Iterable[str], *, limit: int) -> float:
    """How much of a text to take so that there are no more than ``limit`` bytes of different words in it.

    Training holds each different word once, however long the text is. Words are here what stands between white space: about what a
    tokenizer merges bytes in, and found faster. Those of the text that may still be taken are all that is held.

    Args:
        pieces: The text; a piece is taken if its place, as :func:`placed` says, is below the share.
        limit: Bytes, as UTF-8.

    Returns: 1, or the largest of 1/2, 1/4, 1/8, … that will do.
    """
    share, size = 1.0, 0
    lowest: dict[str, float] = {}  # each word with the lowest place of a piece that it stands in
    for place, piece in placed(pieces):
        for word in set(piece.split()) if place < share else ():
            known = lowest.get(word)
            if known is None:
                size += len(word.encode())
            if known is None or place < known:
                lowest[word] = place
        while size > limit:
            share /= 2
            lowest = {word: place for word, place in lowest.items() if place < share}
            size = sum(len(word.encode()) for word in lowest)
    return share


def placed(pieces: Iterable[str]) -> Iterator[tuple[float, str]]:
    """Pieces, each with a place in [0, 1) that its number decides, uniform over the pieces."""
    from lightning_chatgpt.data.splits import position

    return ((position(str(number)), piece) for number, piece in enumerate(pieces))


def measure(tokenizer: Tokenizer, pieces: Iterable[str]) -> dict[str, Any]:
    """How well a tokenizer packs a text.

    Returns: ``vocabulary`` (entries, control tokens among them), ``bytes`` of the text as UTF-8, ``tokens`` it is encoded in,
        ``bytes_per_token``, and ``used``, the share of the vocabulary without control tokens that stands in it.
    """
    import numpy as np

    from lightning_chatgpt.chat.text_encoding import TextEncoder

    encoder = TextEncoder(tokenizer)
    n_control = sum(token.special for token in tokenizer.backend_tokenizer.get_added_tokens_decoder().values())
    seen = np.zeros(len(tokenizer), dtype=bool)
    n_bytes = n_tokens = 0
    rest = iter(pieces)
    while some := list(islice(rest, _PIECES_AT_ONCE)):
        for ids in encoder.encode(some):
            n_tokens += len(ids)
            seen[ids] = True
        n_bytes += sum(len(piece.encode()) for piece in some)
    return {
        "vocabulary": len(tokenizer),
        "bytes": n_bytes,
        "tokens": n_tokens,
        "bytes_per_token": n_bytes / max(1, n_tokens),
        "used": float(seen.sum()) / (len(tokenizer) - n_control),
    }


def _make_folder(output: str, *, overwrite: bool) -> Path:
    folder = Path(output).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not overwrite:
        raise ConfigError(f"{output}: is not empty; name another folder, or add --overwrite true")
    with _writing(output):
        folder.mkdir(parents=True, exist_ok=True)  # a place that cannot be written to is told of before the work
    return folder


@contextmanager
def _writing(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{name}: cannot be written ({error.strerror}); name another place") from None


def _find_others(compare: Sequence[str] | None) -> dict[str, Tokenizer]:
    """The tokenizers to compare with, by name."""
    from transformers import PreTrainedTokenizerFast

    folders = {name: _find_folder(name) for name in compare or (*_GPT2, "builtin:smalltalk")}
    found = {}
    for name, folder in folders.items():
        if folder is None and compare is not None:
            raise ModelError(f"compare: {name} is no folder with a tokenizer.json, and not in the hub's cache; there is builtin:smalltalk")
        if folder is None or (name == _GPT2[1] and _GPT2[0] in found):
            continue
        try:
            # As it lies there: load_tokenizer would add what its chat template needs.
            found[name] = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        except Exception as error:  # tokenizers raises nothing narrower
            raise ModelError(f"compare: {folder / 'tokenizer.json'}: cannot be read ({str(error).splitlines()[0]})") from None
    return found


def _find_folder(name: str) -> Path | None:
    """The folder on this machine that holds a tokenizer; the network is not asked."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    from lightning_chatgpt.models.build import BUILTIN_PREFIX, find_pretrained

    if name.startswith(BUILTIN_PREFIX):
        return find_pretrained(name)
    path = Path(name).expanduser()
    for folder in (path, path / "hf"):
        if (folder / "tokenizer.json").is_file():
            return folder
    try:
        cached = try_to_load_from_cache(name, "tokenizer.json")
    except HFValidationError:
        return None  # no name the hub could know
    return Path(cached).parent if isinstance(cached, str) else None


def _read(sources: Sequence[str | dict[str, Any]], *, kind: str | None, schema: str | None, on_fault: OnFault) -> list[_Documents]:
    import numpy as np

    from lightning_chatgpt.data.chat import ChatDataModule
    from lightning_chatgpt.data.text import TextDataModule

    if schema is not None and kind == "text":
        raise ConfigError(f"schema {schema!r} is for chats; remove it, or set kind to chats")
    modules: dict[str, Any] = {
        "chats": ChatDataModule(schema=schema, on_fault=on_fault),
        "text": TextDataModule(on_fault=on_fault),
    }
    of_kind: dict[str, list[str | dict[str, Any]]] = {}
    for source in sources:
        of_kind.setdefault(kind or ("chats" if schema else _kind_of(source)), []).append(source)
    return [
        _Documents(name, kind, modules[kind], table, np.arange(len(table)))
        for kind, some in of_kind.items()
        for name, table in modules[kind].prepare_all(some if len(some) > 1 else some[0])
    ]


def _kind_of(source: str | dict[str, Any]) -> str:
    """Chats where the first record is one, text where it is that; chats where it is neither, as their error tells more."""
    from lightning_chatgpt.data.sources import read_conversations, read_documents

    try:
        next(read_conversations(source), None)
        return "chats"
    except DataError:
        pass  # it may be text
    try:
        next(read_documents(source), None)
        return "text"
    except DataError:
        return "chats"


def _hold_out(documents: Sequence[_Documents]) -> tuple[list[_Documents], list[_Documents]]:
    """Part documents in those to train on and those to measure on; the latter are none where there is one document only."""
    from lightning_chatgpt.data.selection import split_parts

    if len({place for part in documents for place in part.table.places[:2].tolist()}) < 2:
        return list(documents), []
    parts = split_parts({"train": [(part.name, part.table) for part in documents]}, validation=_HELD_OUT, test=0.0)
    train, held_out = (
        [part._replace(rows=chosen.rows) for part, chosen in zip(documents, parts[name], strict=True)] for name in ("train", "validation")
    )
    return train, held_out


def _pieces(documents: Sequence[_Documents], doing: str) -> Iterator[str]:
    """What is said in documents, cut where it is long, with a progress bar."""
    from lightning_chatgpt.chat.tokenizer import cut_text
    from lightning_chatgpt.data.preparation import progress

    with progress(doing, total=_count(documents)) as bar:
        for part in documents:
            for content in part.table.column("content", part.rows):
                for text in part.module.texts(part.module.load(content)):
                    yield from cut_text(text)
                bar.update()


def _count(documents: Sequence[_Documents]) -> int:
    return sum(len(part.rows) for part in documents)


def _longest(tokenizer: Tokenizer) -> list[str]:
    """The longest entries of a byte-level vocabulary as text, the longest first."""
    from lightning_chatgpt.chat.tokenizer import token_byte_lengths

    lengths = token_byte_lengths(tokenizer)
    assert lengths is not None
    ids = sorted(range(len(lengths)), key=lambda token_id: -lengths[token_id])[:_LONGEST_SHOWN]
    return [str(tokenizer.decode([token_id])) for token_id in ids]


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    for source in report["sources"]:
        print(f"{source['source']}: {source['documents']:,} read as {'chats' if source['kind'] == 'chats' else 'plain text'}")
    if report["share"] < 1:
        print(f"Trained on 1/{1 / report['share']:.0f} of the text, as its different words must fit; a higher --max_memory takes more")
    first, *_ = measured = report["tokenizers"]
    what = f"{report['held_out']:,} held out" if report["held_out"] else "the text it was trained on, as one document cannot be held out"
    print(f"Measured on {what}, {first['bytes']:,} bytes:")
    table = Table("")
    for found in measured:
        table.add_column(found["name"], overflow="fold", justify="right")
    table.add_row("vocabulary", *(f"{found['vocabulary']:,}" for found in measured))
    table.add_row("of it used here", *(f"{found['used']:.0%}" for found in measured))
    table.add_row("tokens", *(f"{found['tokens']:,}" for found in measured))
    table.add_row("difference", "", *(f"{found['tokens'] / max(1, first['tokens']) - 1:+.1%}" for found in measured[1:]))
    table.add_row("bytes per token", *(f"{found['bytes_per_token']:.3f}" for found in measured))
    Console(highlight=False).print(table)
    print("longest entries:", " ".join(json_format.dumps(text, ensure_ascii=False) for text in report["longest"]))
