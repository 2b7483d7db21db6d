"""TextDataModule: plain text to blocks, for pretraining."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from lightning_chatgpt.chat.encoding import Example
from lightning_chatgpt.data.base import TokenDataModule
from lightning_chatgpt.data.sources import read_documents
from lightning_chatgpt.errors import ConfigError

_DOCUMENTS_AT_ONCE = 1000


class TextDataModule(TokenDataModule[str]):
    """Builds blocks of plain text. Documents are joined by the end-of-text token and cut into blocks of ``max_length``.

    Blocks overlap by one token, so that every token but the very first is predicted exactly once.

    Args:
        train: Where documents come from: text files (one document each), JSONL files (``{"text": …}``), folders or globs of
            them, or a ``corpus:``; one or a list.
        validation: A source of its own, or the fraction of ``train`` that is held out; null for none.
        test: A source of its own, or the fraction of ``train`` that is held out; null for none.
        tokenizer: A folder with the tokenizer for a model from scratch; null trains one on the training split. Weights
            bring their own.
        vocab_size: Entries of a tokenizer that is trained.
        batch_size: Blocks in a batch, in each process.
        max_length: Tokens of a block; null means as many as the model has positions.
        group_by_length: Whether blocks of about one length share a batch; only the last block differs.
        num_workers: Processes that prepare batches; 0 does so in the main one.
        seed: Chooses the order of training blocks.
    """

    def read(self, source: str) -> Iterator[str]:
        """Read one source; override it to bring a format of your own."""
        return read_documents(source)

    def split_key(self, item: str) -> str:
        """A digest of the document."""
        return hashlib.blake2b(item.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()

    def texts(self, items: Sequence[str]) -> Sequence[str]:
        """The documents."""
        return items

    def encode(self, items: Sequence[str]) -> Iterator[Example]:
        """Join documents and cut them into blocks."""
        assert self.tokenizer is not None and self.max_length is not None
        if self.max_length < 2:
            raise ConfigError(f"data.max_length {self.max_length} is too short for text; a block needs at least 2 tokens")
        end_id = self.tokenizer.eos_token_id
        if end_id is None:
            raise ConfigError("the tokenizer has no end-of-text token to join documents with; give it an eos_token")
        pending = [end_id]  # each document begins after an end, so that its first token is predicted too
        for start in range(0, len(items), _DOCUMENTS_AT_ONCE):
            encoded = self.tokenizer(
                list(items[start : start + _DOCUMENTS_AT_ONCE]),
                add_special_tokens=False,
                split_special_tokens=True,
                return_attention_mask=False,
            )["input_ids"]
            for ids in encoded:
                pending += [*ids, end_id]
                cut = 0
                while len(pending) - cut >= self.max_length:
                    yield _block(pending[cut : cut + self.max_length])
                    cut += self.max_length - 1
                del pending[:cut]
        if len(pending) > 1:
            yield _block(pending)


def _block(ids: list[int]) -> Example:
    # The first token stands for context only: the block before predicted it.
    return Example(list(ids), [0.0] + [1.0] * (len(ids) - 1))
