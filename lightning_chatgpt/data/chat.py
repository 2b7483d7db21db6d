"""ChatDataModule: conversations to batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader

from lightning_chatgpt.chat.conversation import Conversation
from lightning_chatgpt.chat.encoding import Example, Truncation, encode_conversations, encode_prompt
from lightning_chatgpt.chat.template import Supervise
from lightning_chatgpt.data.base import Sources, TokenDataModule
from lightning_chatgpt.data.collate import collate_prompts
from lightning_chatgpt.data.sampler import ShardSampler
from lightning_chatgpt.data.sources import read_conversations
from lightning_chatgpt.errors import ConfigError


class ChatDataModule(TokenDataModule[Conversation]):
    """Builds batches of chats. A subclass brings its own source by overriding :meth:`read`.

    Args:
        train: Where training conversations come from: JSONL files in OpenAI's fine-tuning format, folders or globs of them,
            ``corpus:chatterbot/LANGUAGE`` or ``corpus:chitchat``; one or a list.
        validation: A source of its own, or the fraction of ``train`` that is held out; null for none.
        test: A source of its own, or the fraction of ``train`` that is held out; null for none.
        predict: Whose last assistant message is to be written anew; null takes the test split, or else the validation
            split.
        tokenizer: A folder with the tokenizer for a model from scratch; null trains one on the training split. Weights
            bring their own.
        vocab_size: Entries of a tokenizer that is trained.
        batch_size: Conversations in a batch, in each process.
        max_length: Tokens an example may have; null means as many as the model has positions.
        truncation: ``drop_oldest`` keeps the system message and the latest whole exchanges of a longer conversation,
            ``split`` makes several examples of it. The end token is never cut.
        supervise: Whose messages are learnt: ``assistant``, or ``all`` (for a base model).
        max_new_tokens: Tokens kept free for the reply when predicting.
        group_by_length: Whether conversations of about one length share a training batch; less padding, faster.
        num_workers: Processes that prepare batches; 0 does so in the main one.
        seed: Chooses the order of training examples.

    Raises:
        ConfigError: A setting is out of range.
    """

    def __init__(
        self,
        train: Sources | None = None,
        validation: float | Sources | None = 0.05,
        test: float | Sources | None = None,
        predict: Sources | None = None,
        tokenizer: str | None = None,
        vocab_size: int = 8192,
        batch_size: int = 8,
        max_length: int | None = None,
        truncation: Truncation = "drop_oldest",
        supervise: Supervise = "assistant",
        max_new_tokens: int = 64,
        group_by_length: bool = False,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            train=train,
            validation=validation,
            test=test,
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            batch_size=batch_size,
            max_length=max_length,
            group_by_length=group_by_length,
            num_workers=num_workers,
            seed=seed,
        )
        self.predict = predict
        self.truncation = truncation
        self.supervise = supervise
        self.max_new_tokens = max_new_tokens
        self.prompts: list[Conversation] = []

    def read(self, source: str) -> Iterator[Conversation]:
        """Read one source; override it to bring a format of your own."""
        return read_conversations(source)

    def split_key(self, item: Conversation) -> str:
        """A conversation's own content, or its group."""
        return item.split_key

    def texts(self, items: Sequence[Conversation]) -> Iterable[str]:
        """Every message's content."""
        return (message.content for item in items for message in item.messages)

    def encode(self, items: Sequence[Conversation]) -> Iterator[Example]:
        """Encode conversations; a longer one is cut as ``truncation`` says."""
        assert self.tokenizer is not None and self.max_length is not None
        for examples in encode_conversations(
            items,
            tokenizer=self.tokenizer,
            max_length=self.max_length,
            truncation=self.truncation,
            supervise=self.supervise,
        ):
            # A window in which nobody speaks whose words are learnt teaches nothing and would give a loss of 0 / 0.
            yield from (example for example in examples if any(example.loss_weights))

    def setup(self, stage: str) -> None:
        """Read, split and encode what the stage needs."""
        super().setup(stage)
        if stage == "predict":
            self.prompts = self._load_prompts()

    def predict_dataloader(self) -> DataLoader[Any]:
        """Batches of prompts, in order, each once over all processes."""
        assert self.tokenizer is not None and self.max_length is not None
        room = self.max_length - self.max_new_tokens
        if room < 1:
            raise ConfigError(f"data.max_new_tokens {self.max_new_tokens} leaves no room for a prompt in max_length {self.max_length}")
        self._check_shares("data.predict", len(self.prompts))
        tokenizer = self.tokenizer

        def collate_numbered(numbers: list[int]) -> Any:
            chats = [self.prompts[number] for number in numbers]
            prompts = [encode_prompt(c.prompt_and_reference()[0], tokenizer=tokenizer, max_length=room) for c in chats]
            return collate_prompts(list(zip(chats, prompts, strict=True)), max_new_tokens=self.max_new_tokens)

        return DataLoader(
            range(len(self.prompts)),  # type: ignore[arg-type]
            batch_size=self.batch_size,
            sampler=ShardSampler(len(self.prompts), **self._ranks()),
            collate_fn=collate_numbered,
        )

    def _load_prompts(self) -> list[Conversation]:
        if self.predict is not None:
            return self.read_all(self.predict)
        part = "test" if self.test else "validation"
        if not getattr(self, part):
            raise ConfigError("there is nothing to predict; set data.predict, data.test or data.validation")
        return self.load_items("test" if part == "test" else "validate")[part]
