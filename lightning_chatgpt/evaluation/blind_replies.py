"""What two models answer to the same prompts, greedily, kept in a file: generation that was broken off is gone on with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_chatgpt.chat.conversation import Conversation
from lightning_chatgpt.checkpoints.file import check_checkpoint, replace_file, whole_lines, written_at
from lightning_chatgpt.data.sources import read_conversations
from lightning_chatgpt.errors import ConfigError, DataError
from lightning_chatgpt.evaluation.votes import MODELS, VOTES_FILE, Pair
from lightning_chatgpt.models.build import find_pretrained

REPLIES_FILE = "replies.jsonl"

_READ_AT_ONCE = 1 << 22


def read_prompts(source: str) -> list[Conversation]:
    """The prompts of a source; a conversation that ends with the assistant is a prompt up to there.

    Raises:
        DataError: There is no such source, nothing in it, or two prompts have one id.
    """
    prompts = [chat.prompt_and_reference()[0] for chat in read_conversations(source, needs_reply=False)]
    if not prompts:
        raise DataError(f"{source}: nothing to read in there")
    ids = set()
    for prompt in prompts:
        if prompt.id in ids:
            raise DataError(f"{source}: two prompts have the id {prompt.id!r}, by which votes are told apart; give each its own")
        ids.add(prompt.id)
    return prompts


def identity(model: str) -> str:
    """What tells a model from others, wherever it lies: when a checkpoint was written, or what a folder's files hold.

    Raises:
        ModelError: There is no such model.
    """
    import xxhash

    if model.endswith(".ckpt"):
        check_checkpoint(model)
        return str(written_at(model))
    digest = xxhash.xxh3_128()
    for path in sorted(path for path in find_pretrained(model).iterdir() if path.is_file() and path.name != "README.md"):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while data := file.read(_READ_AT_ONCE):
                digest.update(data)
    return digest.hexdigest()


def answer(
    prompts: Sequence[Conversation],
    *,
    models: Sequence[str],
    identities: Sequence[str],
    output: Path,
    max_new_tokens: int,
    batch_size: int,
) -> list[Pair]:
    """Answer each prompt with both models; what ``output/replies.jsonl`` holds already is not generated anew.

    Args:
        prompts: What to answer.
        models: Names of two models, as :func:`~lightning_chatgpt.models.build.load_model` takes them.
        identities: The :func:`identity` of each.
        output: A folder.
        max_new_tokens: Tokens a reply may have.
        batch_size: Prompts that are answered at once.

    Returns: a pair for each prompt, in order.

    Raises:
        ConfigError: The folder holds votes on other replies, or a model has no room for replies that long.
        DataError: The file of replies is no such file.
        ModelError: A model cannot be loaded.
        SaveError: The file could not be written.
    """
    path = output / REPLIES_FILE
    wanted = [[_key(model, prompt, max_new_tokens=max_new_tokens) for prompt in prompts] for model in identities]
    there = _read(path)
    known = {key: record for key, record in there.items() if any(key in keys for keys in wanted)}
    if len(known) < len(there) and (output / VOTES_FILE).exists():
        raise ConfigError(f"{output}: holds votes on replies of other models, to other prompts or of another length; name another folder")
    replace_file(path, map(_line, known.values()))
    for model, keys in zip(models, wanted, strict=True):
        missing = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in known}
        with path.open("a", encoding="utf-8") as file:
            for key, reply in _generate(
                model, missing, n_known=len(keys) - len(missing), max_new_tokens=max_new_tokens, batch_size=batch_size
            ):
                known[key] = {"key": key, "model": model, **reply}
                file.write(_line(known[key]))
                file.flush()
    pairs = []
    for prompt, *keys in zip(prompts, *wanted, strict=True):
        found = {model: known[key] for model, key in zip(MODELS, keys, strict=True)}
        cut = frozenset(model for model, record in found.items() if record["finish_reason"] == "length")
        pairs.append(Pair(prompt.id, prompt.messages, {model: record["reply"] for model, record in found.items()}, cut))
    return pairs


def _key(model: str, prompt: Conversation, *, max_new_tokens: int) -> str:
    """What a reply depends on."""
    text = json.dumps([model, [message.to_dict() for message in prompt.messages], max_new_tokens])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        records = map(json.loads, whole_lines(path) if path.exists() else ())
        return {record["key"]: record for record in records if record["reply"] is not None and record["finish_reason"]}
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path}: holds something else than replies; remove it, and they are generated anew") from None


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def _generate(
    model: str, prompts: Mapping[str, Conversation], *, n_known: int, max_new_tokens: int, batch_size: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Replies as they come; the model is not loaded where there is nothing to answer."""
    if not prompts:
        return
    import torch
    from tqdm import tqdm
    from transformers.utils import logging

    from lightning_chatgpt.chat.encoding import Encoder
    from lightning_chatgpt.generation.generate import generate_replies, max_positions
    from lightning_chatgpt.models.build import load_model

    logging.disable_progress_bar()
    network, tokenizer = load_model(model)
    network.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    room = max_positions(network) - max_new_tokens
    if room < 1:
        raise ConfigError(
            f"max_new_tokens {max_new_tokens} leaves no room for a prompt in the {max_positions(network)} positions of {model}"
        )
    encoder = Encoder(tokenizer, max_length=room)
    keys = list(prompts)
    with tqdm(desc=f"Replies of {model}", total=n_known + len(keys), initial=n_known, unit=" replies") as bar:
        for start in range(0, len(keys), batch_size):
            batch = keys[start : start + batch_size]
            prompt_ids = [encoder.encode_prompt(prompts[key]) for key in batch]
            for key, reply in zip(batch, generate_replies(network, tokenizer, prompt_ids, max_new_tokens=max_new_tokens), strict=True):
                yield key, {"reply": reply.text, "finish_reason": reply.finish_reason}
            bar.update(len(batch))
