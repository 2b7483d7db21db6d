"""What a model makes of each item of the data: a record of plain data, from which every figure is taken.

A conversation's record holds ``id``, ``source``, ``labels``, ``prompt`` (messages), ``reference``, ``reply``, ``finish_reason``,
``completion_tokens`` and ``scores``: for each message, and for the markers that the template writes around them, its ``role``,
``weight``, ``tokens``, ``nll`` (nats, summed), ``correct`` and ``bytes`` (of its content, in UTF-8). A document's holds no reply.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import xxhash
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule
from lightning_utilities.core.rank_zero import rank_zero_info
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from lightning_chatgpt import __version__
from lightning_chatgpt.callbacks.predictions import PredictionWriter
from lightning_chatgpt.chat.conversation import Conversation
from lightning_chatgpt.chat.encoding import Encoder
from lightning_chatgpt.chat.text_encoding import TextEncoder
from lightning_chatgpt.chat.tokenizer import stop_token_ids
from lightning_chatgpt.checkpoints.file import whole_lines
from lightning_chatgpt.data.sampler import ShardSampler
from lightning_chatgpt.data.serving import share_of
from lightning_chatgpt.errors import ConfigError
from lightning_chatgpt.evaluation.likelihood import MARKERS, Score, Text, score_texts, text_of_chat
from lightning_chatgpt.generation.generate import Reply, generate_replies, max_positions
from lightning_chatgpt.models.attention import set_attention
from lightning_chatgpt.precision import ChatTrainer

if TYPE_CHECKING:
    from lightning_chatgpt.models.build import LoadedModel

Record = dict[str, Any]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Item:
    """What a record is made of.

    Attributes:
        content: A conversation, or a document.
        id: Names it.
        source: Where it came from.
    """

    content: Conversation | str
    id: str
    source: str

    @property
    def text(self) -> str:
        """All there is to know of it, written down."""
        return self.content if isinstance(self.content, str) else json.dumps(self.content.to_record())


@dataclass(frozen=True)
class Measuring:
    """How items are measured.

    Attributes:
        batch_size: Items at once.
        max_new_tokens: Tokens a reply may have; 0 for no replies.
        stride: Tokens of a long text that a window scores anew; None for half of the model's positions.
    """

    batch_size: int
    max_new_tokens: int
    stride: int | None


def items_digest(items: Sequence[Item]) -> str:
    """The same for the same items in the same order."""
    return xxhash.xxh3_128_hexdigest(json.dumps([(item.id, item.source, item.text) for item in items]).encode())


def network_digest(model: LoadedModel) -> str:
    """The same for the same network, weights and tokenizer."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(model.network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    tokenizer = model.tokenizer
    config = json.loads(model.network.config.to_json_string(use_diff=False))
    config = {key: value for key, value in config.items() if key[0] != "_" and key != "transformers_version"}  # such as where it lay
    rest = [config, tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template]
    digest.update(json.dumps([*rest, tokenizer.bos_token_id, stop_token_ids(tokenizer)]).encode())
    return digest.hexdigest()


class Measurer:
    """Makes records of items.

    Args:
        model: A network in evaluation mode, and its tokenizer.
        settings: How it is measured.

    Raises:
        ConfigError: A setting does not fit the model.
    """

    def __init__(self, model: LoadedModel, settings: Measuring) -> None:
        self.network, self.tokenizer = model
        self.settings = settings
        positions = max_positions(self.network)
        if settings.max_new_tokens >= positions:
            raise ConfigError(f"max_new_tokens {settings.max_new_tokens} leaves no room for a prompt in the model's {positions} positions")
        self._encoder = Encoder(self.tokenizer, max_length=positions - settings.max_new_tokens, supervise="all")
        self._texts = TextEncoder(self.tokenizer)

    def records(self, items: Sequence[Item]) -> list[Record]:
        """Score and answer items together."""
        records = [_record(item, found) for item, found in zip(items, self._scores([self._text_of(item) for item in items]), strict=True)]
        asked = [item.content for item in items if isinstance(item.content, Conversation)]
        if asked and self.settings.max_new_tokens:
            replies = iter(self._answer(asked))
            for record in records:
                if "prompt" in record:
                    reply = next(replies)
                    record.update(reply=reply.text, finish_reason=reply.finish_reason, completion_tokens=reply.n_tokens)
        return records

    def message_scores(self, chats: Sequence[Conversation], *, title: str) -> list[list[Score]]:
        """The score of each message of each conversation, in order; a bar is called by the title."""

        def scores(batch: Sequence[Conversation]) -> list[list[Score]]:
            found = self._scores([text_of_chat(self._encoder, chat) for chat in batch])
            return [[score[number] for number in range(len(chat.messages))] for score, chat in zip(found, batch, strict=True)]

        return self._in_batches(chats, scores, title)

    def replies(self, chats: Sequence[Conversation], *, title: str) -> list[Reply]:
        """The reply to each conversation, in place of its last message where that is the assistant's; a bar is called by the title."""
        return self._in_batches(chats, self._answer, title)

    def _in_batches(
        self, chats: Sequence[Conversation], function: Callable[[list[Conversation]], list[Result]], title: str
    ) -> list[Result]:
        """What a function makes of conversations, those of about one length together."""
        order = sorted(range(len(chats)), key=lambda i: sum(len(message.content) for message in chats[i].messages))
        found: dict[int, Result] = {}
        for start in tqdm(range(0, len(order), self.settings.batch_size), desc=title, leave=False, disable=None):
            here = order[start : start + self.settings.batch_size]
            found.update(zip(here, function([chats[i] for i in here]), strict=True))
        return [found[i] for i in range(len(chats))]

    def _scores(self, texts: Sequence[Text]) -> list[dict[int, Score]]:
        pad_id, settings = self.tokenizer.pad_token_id, self.settings
        return score_texts(self.network, texts, pad_token_id=pad_id, batch_size=settings.batch_size, stride=settings.stride)

    def _answer(self, chats: Sequence[Conversation]) -> list[Reply]:
        prompts = [self._encoder.encode_prompt(chat.prompt_and_reference()[0]) for chat in chats]
        return generate_replies(self.network, self.tokenizer, prompts, max_new_tokens=self.settings.max_new_tokens)

    def _text_of(self, item: Item) -> Text:
        if isinstance(item.content, Conversation):
            return text_of_chat(self._encoder, item.content)
        (ids,) = self._texts.encode([item.content])
        before = self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.tokenizer.eos_token_id
        if before is None:
            raise ConfigError("the tokenizer has no token for a document to begin after (bos_token or eos_token); evaluate on chats")
        return Text([before, *ids], [MARKERS, *[0] * len(ids)])


def measuring_trainer(folder: Path, *, accelerator: str = "auto", devices: int = 1) -> ChatTrainer:
    """A Trainer for :func:`measure`, with nothing but what that needs.

    Args:
        folder: Where records are kept.
        accelerator: Lightning's.
        devices: Processes that share the items.

    Raises:
        ConfigError: The machine has no such accelerator, or not as many devices.
    """
    try:
        return _trainer(folder, accelerator, devices)
    except (ValueError, MisconfigurationException) as error:
        raise ConfigError(f"accelerator {accelerator}, devices {devices}: {' '.join(str(error).split())}") from None


def _trainer(folder: Path, accelerator: str, devices: int) -> ChatTrainer:
    return ChatTrainer(
        accelerator=accelerator,
        devices=devices,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )


def measure(
    model: LoadedModel, items: Sequence[Item], *, trainer: ChatTrainer, name: str, digest: str, settings: Measuring
) -> list[Record]:
    """Score and answer every item, each once over all processes; what was broken off is gone on with.

    Args:
        model: The network, and its tokenizer.
        items: The data.
        trainer: Whose ``default_root_dir`` the records are written to, one line of JSON each.
        name: The model's; with what its records depend on it makes the file's.
        digest: The model's, by :func:`network_digest`.
        settings: How.

    Returns: the records, in the order of the items; on other processes than the first none.

    Raises:
        ConfigError: A setting does not fit the model.
    """
    # As it is trained, but for FlashAttention, which takes half precision only.
    set_attention(model.network, "stretches" if model.network._supports_attention_backend else "sdpa")
    if len(items) < trainer.num_devices * trainer.num_nodes:
        raise ConfigError(f"{len(items)} item(s) are too few for {trainer.num_devices * trainer.num_nodes} processes; use fewer devices")
    data = _Items(items, batch_size=settings.batch_size)
    module = _MeasuredModel(Measurer(model, settings))
    module.prediction_key = f"{__version__} {digest} {settings}"
    key = xxhash.xxh3_64_hexdigest(f"{module.prediction_key} {data.prediction_key}".encode())
    folder = Path(trainer.default_root_dir)
    slug = re.sub(r"[^\w.-]+", "-", name).strip("-")[-80:]
    path = next(iter(sorted(folder.glob(f"*-{key}.jsonl"))), folder / f"{slug}-{key}.jsonl")
    if path.is_file():
        rank_zero_info(f"{name}: measured before ({path})")
    else:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        callbacks[:] = [callback for callback in callbacks if not isinstance(callback, PredictionWriter)] + [PredictionWriter(path.name)]
        trainer.predict(module, datamodule=data, return_predictions=False)
    if not trainer.is_global_zero:
        return []
    records = [json.loads(line) for line in whole_lines(path)]
    return [record for _, record in sorted(zip(data.order, records, strict=True), key=lambda pair: pair[0])]


class _Items(LightningDataModule):
    """Serves items, those of about one length together, each once over all processes."""

    def __init__(self, items: Sequence[Item], *, batch_size: int) -> None:
        super().__init__()
        lengths = [len(item.text) for item in items]
        self.order = sorted(range(len(items)), key=lengths.__getitem__)
        self.prompts = [items[i] for i in self.order]
        self.batch_size = batch_size
        self.n_predicted = 0
        self.prediction_key = items_digest(self.prompts)

    def predict_dataloader(self) -> DataLoader[Any]:
        sampler = ShardSampler(range(len(self.prompts)), n_read=self.n_predicted, **share_of(self.trainer))
        return DataLoader(self.prompts, batch_size=self.batch_size, sampler=sampler, collate_fn=list)  # type: ignore[arg-type]

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch  # text; what is made of it is moved where it is made


class _MeasuredModel(LightningModule):
    """Makes records of items, on the Trainer's device."""

    def __init__(self, measurer: Measurer) -> None:
        super().__init__()
        self.network = measurer.network
        self.measurer = measurer
        self.prediction_key = ""

    def predict_step(self, batch: list[Item], batch_idx: int) -> list[Record]:
        return self.measurer.records(batch)


def _record(item: Item, scores: dict[int, Score]) -> Record:
    def score(part: int, role: str, weight: float, text: str) -> Record:
        return {"role": role, "weight": weight, "bytes": len(text.encode()), **scores.get(part, Score(0, 0.0, 0))._asdict()}

    if isinstance(item.content, str):
        return {"id": item.id, "source": item.source, "labels": {}, "scores": [score(0, "text", 1.0, item.content)]}
    prompt, reference = item.content.prompt_and_reference()
    spoken = [score(number, message.role, message.weight, message.content) for number, message in enumerate(item.content.messages)]
    return {
        "id": item.id,
        "source": item.source,
        "labels": dict(item.content.labels),
        "prompt": prompt.to_dict()["messages"],
        "reference": reference,
        "scores": [*spoken, score(MARKERS, "markers", 0.0, "")],
    }
