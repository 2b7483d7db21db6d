"""TextDataModule: plain text to blocks, for pretraining."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from lightning_chatgpt.chat.encoding import Example
from lightning_chatgpt.chat.faults import Faults, OnFault
from lightning_chatgpt.chat.text_encoding import TextEncoder
from lightning_chatgpt.data.base import Fractional, Sources, TokenDataModule
from lightning_chatgpt.data.cache import key_of
from lightning_chatgpt.data.sources import Source, SourceReport, read_documents, source_fingerprint
from lightning_chatgpt.errors import ConfigError

_DOCUMENTS_AT_ONCE = 1000


class TextDataModule(TokenDataModule[str]):
    """Builds blocks of plain text. Documents are joined by the end-of-text token and cut into blocks of ``max_length``.

    Blocks overlap by one token, so that every token but the very first is predicted exactly once.

    Args:
        train: Where documents come from: text files (one document each), files of records with a ``text`` each (JSONL, JSON, CSV, Parquet,
            …), folders or globs of them, or a ``corpus:``; one or a list.
        validation: A source of its own, or the fraction of ``train`` that is held out; null for none.
        test: A source of its own, or the fraction of ``train`` that is held out; null for none.
        on_fault: What is done about a record that cannot be used: error, skip or fix, or a mapping from kinds of fault to these.
        max_leak: The fraction of held-out documents that may stand in training too, at least half of them, before it is an error;
            null does not look.
        tokenizer: A folder with the tokenizer for a model from scratch; null trains one on the training split. Weights
            bring their own.
        vocab_size: Entries of a tokenizer that is trained.
        batch_size: Blocks in a batch, in each process.
        max_length: Tokens of a block; null means as many as the model has positions.
        group_by_length: Whether blocks of about one length share a batch; only the last block differs.
        mixture: How much of what an epoch reads: label, weights, epochs, caps, unit, temperature.
        cache_dir: Where what was read and encoded is kept; null takes the environment's LIGHTNING_CHATGPT_CACHE, or
            ~/.cache/lightning_chatgpt.
        num_workers: Processes that prepare batches; 0 does so in the main one.
        seed: Chooses the order of training blocks.
    """

    def __init__(
        self,
        train: Sources | None = None,
        validation: Fractional = 0.05,
        test: Fractional = None,
        on_fault: OnFault | dict[str, OnFault] = "error",
        max_leak: float | None = None,
        tokenizer: str | None = None,
        vocab_size: int = 8192,
        batch_size: int = 8,
        max_length: int | None = None,
        group_by_length: bool = False,
        mixture: dict[str, Any] | None = None,
        cache_dir: str | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        self.save_hyperparameters(logger=False)
        super().__init__(
            train=train,
            validation=validation,
            test=test,
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            batch_size=batch_size,
            max_length=max_length,
            group_by_length=group_by_length,
            mixture=mixture,
            on_fault=on_fault,
            max_leak=max_leak,
            cache_dir=cache_dir,
            num_workers=num_workers,
            seed=seed,
        )
        self._reading = SourceReport()

    def read(self, source: Source) -> Iterator[str]:
        """Read one source; override it to bring a format of your own."""
        return read_documents(source, report=self._reading)

    def items(self, source: Source, about: dict[str, Any]) -> Iterator[str]:
        """Read one source; ``about`` takes what the report is to say of it."""
        self._reading = SourceReport(Faults(self.on_fault))
        yield from self.read(source)
        about.update(self._reading.to_dict())

    def fingerprint(self, source: Source) -> str | None:
        """A digest of the source's content."""
        found = source_fingerprint(source) if type(self).read is TextDataModule.read else None
        return None if found is None else key_of(source, found, self.on_fault)

    def split_key(self, item: str) -> str:
        """A digest of the document."""
        return self.digest(item).hex()

    def digest(self, item: str) -> bytes:
        """A digest of the document."""
        return hashlib.blake2b(item.encode("utf-8", "surrogatepass"), digest_size=16).digest()

    def dump(self, item: str) -> str:
        """The document."""
        return item

    def load(self, content: str) -> str:
        """The document."""
        return content

    def texts(self, item: str) -> list[str]:
        """The document."""
        return [item]

    def encoding_settings(self, part: str) -> Mapping[str, Any]:
        """Nothing beside tokenizer and ``max_length``."""
        return {}

    def encode(self, items: Iterable[str], *, counts: Counter[str], part: str) -> Iterator[list[Example]]:
        """Join documents and cut them into blocks; a block is told of with the document that fills it."""
        assert self.tokenizer is not None and self.max_length is not None
        if self.max_length < 2:
            raise ConfigError(f"data.max_length {self.max_length} is too short for text; a block needs at least 2 tokens")
        end_id = self.tokenizer.eos_token_id
        if end_id is None:
            raise ConfigError("the tokenizer has no end-of-text token to join documents with; give it an eos_token")
        pending = [end_id]  # each document begins after an end, so that its first token is predicted too
        encoder = TextEncoder(self.tokenizer)
        rest = iter(items)
        while documents := list(islice(rest, _DOCUMENTS_AT_ONCE)):
            for ids in encoder.encode(documents):
                pending += [*ids, end_id]
                cut = 0
                blocks = []
                while len(pending) - cut >= self.max_length:
                    blocks.append(_block(pending[cut : cut + self.max_length]))
                    cut += self.max_length - 1
                del pending[:cut]
                yield blocks
        if len(pending) > 1:
            yield [_block(pending)]


def _block(ids: list[int]) -> Example:
    # The first token stands for context only: the block before predicted it.
    return Example(list(ids), [0.0] + [1.0] * (len(ids) - 1))
