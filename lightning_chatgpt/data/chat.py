"""ChatDataModule: conversations to batches."""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from torch.utils.data import DataLoader

from lightning_chatgpt.chat.conversation import Conversation
from lightning_chatgpt.chat.encoding import EncodedChat, Encoder, Example
from lightning_chatgpt.chat.faults import Faults, OnFault
from lightning_chatgpt.chat.plugins import find_function, source_of
from lightning_chatgpt.chat.template import Supervise, supervised_roles
from lightning_chatgpt.chat.truncation import Truncation
from lightning_chatgpt.data.augmentation import build_augmentation
from lightning_chatgpt.data.base import Fractional, Sources, TokenDataModule
from lightning_chatgpt.data.cache import key_of
from lightning_chatgpt.data.cleaning import build_cleaning, split_duplicates
from lightning_chatgpt.data.collate import PromptBatch, collate_prompts
from lightning_chatgpt.data.duplicates import DuplicateSettings
from lightning_chatgpt.data.preparation import tell_faults
from lightning_chatgpt.data.sampler import ShardSampler
from lightning_chatgpt.data.sources import Source, SourceReport, SourceSettings, read_conversations, source_fingerprint
from lightning_chatgpt.errors import ConfigError, DataError, nearest
from lightning_chatgpt.processes import shield_from_signals

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class ChatDataModule(TokenDataModule[Conversation]):
    """Builds batches of chats. A subclass brings its own source by overriding :meth:`read`.

    What is read and encoded lies in a cache and is found there again, until the text or a setting that matters changes.

    Args:
        train: Where training conversations come from: files (JSONL, JSON, CSV, TSV, Parquet, Arrow, YAML, text, also .gz and .zst), folders
            or globs of them, ``hub:ORG/NAME?split=train``, ``corpus:chatterbot/LANGUAGE`` or ``corpus:chitchat``; one or a list. A mapping
            in place of a name says more: source (or class_path and init_args of your own function), name, schema, fields, roles.
        validation: A source of its own, or the fraction of ``train`` that is held out; null for none.
        test: A source of its own, or the fraction of ``train`` that is held out; null for none.
        predict: Whose last assistant message is to be written anew; null takes the test split, or else the validation
            split.
        schema: What records look like: openai, sharegpt, preference, alpaca, dolly, prompt_completion, question_answer, lines, or the
            dotted path of your own function; null finds out for each record.
        fields: Where records of no known schema have what: user and assistant (and system), or messages with role and content in each;
            also id, weight, name.
        roles: Your own names for roles, each with the role it stands for, such as ``{agent: assistant}``.
        split_by: A field of the record, such as customer: all chats with one value fall in one split. null takes the record's id, or
            else its content.
        on_fault: What is done about a record that cannot be used: error stops, skip leaves it out, fix mends what can be mended and
            leaves out the rest. Or a mapping from kinds of fault to these (docs/data.md lists the kinds).
        cleaning: Steps in order: normalise, redact, words, language, length, refusals, duplicates; each a name, or a mapping from the
            name to its settings.
        augmentation: Altered copies of training chats: copies, mask, dropout, swap, typos, paraphrase. Assistant text is never altered.
        max_leak: The fraction of held-out conversations that may stand in training too, at least half of them, before it is an error;
            null does not look.
        tokenizer: A folder with the tokenizer for a model from scratch; null trains one on the training split. Weights
            bring their own.
        vocab_size: Entries of a tokenizer that is trained.
        template: How chats are written down: chatml, plain (no new tokens), tokenizer (its own Jinja template), or a Jinja file. null takes
            the tokenizer's own, and chatml where it has none.
        batch_size: Rows of a batch, in each process: conversations, or packed rows of several.
        max_length: Tokens a row may have; null means as many as the model has positions.
        truncation: What happens to a longer conversation: drop_oldest keeps the system message and the latest whole exchanges, split
            makes several examples of it, skip leaves it out, error stops. The end token is never cut.
        supervise: Whose messages are learnt: assistant, last (the assistant's last one), all (for a base model), or a list of roles.
        max_new_tokens: Tokens kept free for the reply when predicting.
        packing: Whether several conversations share a row of max_length, without seeing each other; no padding, faster.
        group_by_length: Whether conversations of about one length share a training batch; less padding, faster.
        mixture: How much of what an epoch reads: label (source, or a label of the records), weights, epochs, caps, unit, temperature.
        cache_dir: Where what was read and encoded is kept; null takes the environment's LIGHTNING_CHATGPT_CACHE, or
            ~/.cache/lightning_chatgpt.
        num_workers: Processes that prepare batches; 0 does so in the main one.
        seed: Chooses the order of training examples, what a mixture draws, and augmentation.

    Raises:
        ConfigError: A setting is out of range.
    """

    def __init__(
        self,
        train: Sources | None = None,
        validation: Fractional = 0.05,
        test: Fractional = None,
        predict: Sources | None = None,
        schema: str | None = None,
        fields: dict[str, str] | None = None,
        roles: dict[str, str] | None = None,
        split_by: str | None = None,
        on_fault: OnFault | dict[str, OnFault] = "error",
        cleaning: list[str | dict[str, Any]] | None = None,
        augmentation: dict[str, Any] | None = None,
        max_leak: float | None = 0.1,
        tokenizer: str | None = None,
        vocab_size: int = 8192,
        template: str | None = None,
        batch_size: int = 8,
        max_length: int | None = None,
        truncation: Truncation = "drop_oldest",
        supervise: Supervise = "assistant",
        max_new_tokens: int = 64,
        packing: bool = False,
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
            packing=packing,
            group_by_length=group_by_length,
            mixture=mixture,
            on_fault=on_fault,
            max_leak=max_leak,
            cache_dir=cache_dir,
            num_workers=num_workers,
            seed=seed,
        )
        supervised_roles(supervise)
        if truncation not in get_args(Truncation):
            raise ConfigError(f"data.truncation {truncation!r} cannot be used; {nearest(str(truncation), get_args(Truncation))}")
        Faults(on_fault)  # refuses what it does not know
        self.predict = predict
        self.schema = schema
        self.fields = fields
        self.roles = roles
        self.split_by = split_by
        self.cleaning, self._duplicates = split_duplicates(cleaning or [])
        build_cleaning(self.cleaning)  # likewise
        self.augmentation = build_augmentation(augmentation) if augmentation is not None else None
        self._augmentation_settings = augmentation
        self.template = template
        self.truncation: Truncation = truncation
        self.supervise = supervise
        self.max_new_tokens = max_new_tokens
        self.prompts: list[Conversation] = []
        self.n_predicted = 0  # of this process's prompts, by an earlier predict that was broken off
        self._reading = SourceReport()

    # What the base asks.

    def read(self, source: Source) -> Iterator[Conversation]:
        """Read one source; override it to bring a format of your own."""
        return self._read(source, needs_reply=True)

    def items(self, source: Source, about: dict[str, Any]) -> Iterator[Conversation]:
        """Read and clean one source; ``about`` takes what the report is to say of it."""
        self._reading = SourceReport(Faults(self.on_fault))
        steps = build_cleaning(self.cleaning)
        for conversation in self.read(source):
            cleaned: Conversation | None = conversation
            for step in steps:
                cleaned = step(cleaned) if cleaned is not None else None
            if cleaned is not None:
                yield cleaned
        about.update(self._reading.to_dict(), cleaning=[{"step": step.name, **step.counts} for step in steps])

    def fingerprint(self, source: Source) -> str | None:
        """A digest of the source's content and of the settings it is read and cleaned with."""
        is_own = type(self).read is ChatDataModule.read
        found = source_fingerprint(source, schema=self.schema) if is_own else None
        if found is None or any(isinstance(step, dict) and "class_path" in step for step in self.cleaning):
            return None  # what a user's own code does may change without a sign
        settings = [self.schema, self.fields, self.roles, self.split_by, self.on_fault, self.cleaning]
        return key_of(source, found, settings, self._listed_files())

    def split_key(self, item: Conversation) -> str:
        """A conversation's own content, or its group."""
        return item.split_key

    def digest(self, item: Conversation) -> bytes:
        """A digest of roles and contents."""
        return item.digest

    def dump(self, item: Conversation) -> str:
        """A conversation as JSON."""
        return json.dumps(item.to_record(), ensure_ascii=False)

    def load(self, content: str) -> Conversation:
        """The conversation that :meth:`dump` wrote down."""
        return Conversation.from_record(json.loads(content))

    def labels(self, item: Conversation) -> Mapping[str, str]:
        """What the record said of the conversation, and the group it is kept together with."""
        return {"group": item.group, **item.labels} if item.group else item.labels

    def name_of(self, item: Conversation) -> str:
        """Where it came from, such as ``chats.jsonl:17``."""
        return item.id

    def texts(self, item: Conversation) -> list[str]:
        """Every message's content but the system's, which many chats share."""
        return [message.content for message in item.messages if message.role != "system"]

    def encode(self, items: Iterable[Conversation], *, counts: Counter[str], part: str) -> Iterator[list[Example]]:
        """Encode conversations; a longer one is cut as ``truncation`` says."""
        for examples, conversation_counts in self._encode(items, part=part):
            counts.update(conversation_counts)
            yield examples

    def encoding_settings(self, part: str) -> Mapping[str, Any]:
        """What the ids depend on, beside tokenizer and ``max_length``."""
        augmentation: list[Any] = []
        if part == "train" and self.augmentation is not None:
            paraphrase = self.augmentation.paraphrase
            own = source_of(find_function(paraphrase, setting="data.augmentation.paraphrase")) if paraphrase else ""
            augmentation = [self._augmentation_settings, self.seed, own]
        return {"truncation": self.truncation, "supervise": self.supervise, "augmentation": augmentation}

    @property
    def duplicates(self) -> DuplicateSettings | None:
        """Which conversations are left out as duplicates; None for none."""
        return self._duplicates

    @property
    def template_name(self) -> str | None:
        """The chat template that the tokenizer is to carry; None for its own, or ChatML."""
        return self.template

    # What Lightning calls, beside the base's.

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
        return DataLoader(
            self.prompts,  # type: ignore[arg-type]
            batch_size=self.batch_size,
            sampler=ShardSampler(range(len(self.prompts)), n_read=self.n_predicted, **self._ranks()),
            num_workers=self.num_workers,
            worker_init_fn=shield_from_signals,
            collate_fn=partial(_collate_chats, tokenizer=self.tokenizer, max_length=room, max_new_tokens=self.max_new_tokens),
        )

    @property
    def prediction_key(self) -> str:
        """What the answers to the prompts depend on, beside the model."""
        return key_of([chat.digest.hex() for chat in self.prompts], self.max_length, self.max_new_tokens)

    # How it is done.

    def _read(self, source: Source, *, needs_reply: bool) -> Iterator[Conversation]:
        return read_conversations(
            source,
            report=self._reading,
            schema=self.schema,
            fields=self.fields,
            roles=self.roles,
            split_by=self.split_by,
            needs_reply=needs_reply,
        )

    def _encode(self, items: Iterable[Conversation], *, part: str) -> Iterator[tuple[list[Example], Counter[str]]]:
        assert self.tokenizer is not None and self.max_length is not None
        encoder = Encoder(self.tokenizer, max_length=self.max_length, truncation=self.truncation, supervise=self.supervise)
        n_copies: deque[int] = deque()

        def with_copies() -> Iterator[Conversation]:
            for item in items:
                copies = self.augmentation.copies_of(item, seed=self.seed) if self.augmentation and part == "train" else []
                n_copies.append(len(copies))
                yield from (item, *copies)

        encoded = encoder.encode(with_copies())
        for chat in encoded:
            examples, counts = list(chat.examples), _counts(chat)
            for copy in islice(encoded, n_copies.popleft()):
                examples += copy.examples
                counts["augmented"] += 1
            # A window in which nobody speaks whose words are learnt teaches nothing and would give a loss of 0 / 0.
            taught = [example for example in examples if any(example.loss_weights)]
            counts["unsupervised"] = int(not taught and bool(examples))
            yield taught, counts

    def _load_prompts(self) -> list[Conversation]:
        if self.predict is not None:
            prompts: list[Conversation] = []
            for source in self.predict if isinstance(self.predict, list) else [self.predict]:
                self._reading = SourceReport(Faults(self.on_fault))
                is_own = type(self).read is ChatDataModule.read
                # A question without an answer is no fault here.
                prompts += self._read(source, needs_reply=False) if is_own else self.read(source)
                tell_faults(SourceSettings.of(source).name, self._reading.to_dict())
            if not prompts:
                raise DataError(f"{self.predict}: nothing to read in there")
            return prompts
        part = "test" if self.test else "validation"
        if not getattr(self, part):
            raise ConfigError("there is nothing to predict; set data.predict, data.test or data.validation")
        sources = self.load_parts("test" if part == "test" else "validate")[part]
        return [self.load(content) for source in sources for content in source.table.column("content", source.rows)]

    def _listed_files(self) -> list[str]:
        """What stands in files that cleaning steps name."""
        named = [settings for step in self.cleaning if isinstance(step, dict) for settings in step.values() if isinstance(settings, dict)]
        return [Path(settings["file"]).expanduser().read_text(encoding="utf-8") for settings in named if settings.get("file")]


def _collate_chats(chats: list[Conversation], *, tokenizer: PreTrainedTokenizerFast, max_length: int, max_new_tokens: int) -> PromptBatch:
    encoder = Encoder(tokenizer, max_length=max_length)
    prompts = [encoder.encode_prompt(chat.prompt_and_reference()[0]) for chat in chats]
    return collate_prompts(list(zip(chats, prompts, strict=True)), max_new_tokens=max_new_tokens)


def _counts(chat: EncodedChat) -> Counter[str]:
    return Counter(
        truncated=int(chat.is_truncated), lost=chat.n_lost, cut=int(chat.is_cut), skipped=int(not chat.examples), whole_tokens=chat.n_tokens
    )
