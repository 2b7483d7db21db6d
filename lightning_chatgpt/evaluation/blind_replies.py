"""What two models answer to the same prompts; measured as ``evaluate`` does it, and gone on with where it was broken off."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_chatgpt.chat.conversation import Conversation, Message
from lightning_chatgpt.chat.faults import Faults
from lightning_chatgpt.data.readers import SPOKEN, read_text
from lightning_chatgpt.errors import ConfigError, DataError
from lightning_chatgpt.evaluation.items import read_items
from lightning_chatgpt.evaluation.records import Item, Measuring, measure, measuring_trainer, network_digest
from lightning_chatgpt.evaluation.votes import MODELS, Pair
from lightning_chatgpt.models.build import load_model


def read_prompts(source: str) -> list[Item]:
    """The conversations of a source; what the assistant says last in one is asked anew.

    A text file whose first line names no speaker holds a prompt a line.

    Raises:
        DataError: There is no such source, nothing in it, or two conversations have one id.
    """
    path = Path(source).expanduser()
    text = read_text(path, faults=Faults("error")) if path.suffix == ".txt" and path.is_file() else ""
    prompts = [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    if prompts and not SPOKEN.fullmatch(prompts[0][1]):
        return [Item(Conversation((Message("user", line),)), f"{path.name}:{number}", source) for number, line in prompts]
    items = read_items(source)
    ids = set()
    for item in items:
        if item.id in ids:
            raise DataError(f"{source}: two conversations have the id {item.id!r}, by which votes are told apart; give each its own")
        ids.add(item.id)
    return items


def answer(
    items: Sequence[Item], *, models: Sequence[str], folder: Path, max_new_tokens: int, batch_size: int, accelerator: str = "auto"
) -> tuple[list[Pair], list[str]]:
    """Answer each prompt with both models, greedily; what was answered before is not answered again.

    Args:
        items: Conversations.
        models: Two models, as :func:`~lightning_chatgpt.models.build.load_model` takes them.
        folder: Where records of what they answered are kept.
        max_new_tokens: Tokens a reply may have.
        batch_size: Prompts that are answered at once.
        accelerator: Where they are answered.

    Returns: a pair for each prompt, in order; and what tells each model from all others.

    Raises:
        ConfigError: Both are the same model, or one has no room for replies that long.
        ModelError: A model cannot be loaded.
    """
    loaded = [load_model(model) for model in models]
    digests = [network_digest(model) for model in loaded]
    if digests[0] == digests[1]:
        raise ConfigError(f"{models[0]} and {models[1]} are the same model; name two that differ")
    trainer = measuring_trainer(folder, accelerator=accelerator)
    settings = Measuring(batch_size=batch_size, max_new_tokens=max_new_tokens, stride=None)
    both = [
        measure(model, items, trainer=trainer, name=name, digest=digest, settings=settings)
        for name, model, digest in zip(models, loaded, digests, strict=True)
    ]
    pairs = []
    for item, *records in zip(items, *both, strict=True):
        assert isinstance(item.content, Conversation)
        found = dict(zip(MODELS, records, strict=True))
        cut = frozenset(model for model, record in found.items() if record["finish_reason"] == "length")
        replies = {model: record["reply"] for model, record in found.items()}
        pairs.append(Pair(item.id, item.content.prompt_and_reference()[0].messages, replies, cut))
    return pairs, digests
