"""What chats and plain text share: reading and encoding through the cache, and the tokenizer."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_chatgpt.chat.encoding import Example
from lightning_chatgpt.chat.faults import OnFault
from lightning_chatgpt.chat.tokenizer import load_tokenizer, tokenizer_from_state, tokenizer_state, train_tokenizer
from lightning_chatgpt.data import preparation
from lightning_chatgpt.data.cache import build_once, cache_folder, key_of
from lightning_chatgpt.data.duplicates import DuplicateSettings
from lightning_chatgpt.data.examples import ExampleDataset
from lightning_chatgpt.data.selection import Parts, SourceRows, drop_duplicates, find_leaks, key_of_parts, load_rows, save_rows, split_parts
from lightning_chatgpt.data.serving import ServingDataModule
from lightning_chatgpt.data.sources import Source, SourceSettings
from lightning_chatgpt.data.tables import ItemTable, TokenTable
from lightning_chatgpt.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Item = TypeVar("Item")

Sources = Source | list[Source]
Fractional = float | Sources | None

_PARTS_OF_STAGE = {"fit": ("train", "validation", "test"), "validate": ("validation",), "test": ("test",)}


class TokenDataModule(ServingDataModule, Generic[Item]):
    """Reads items from sources, splits them, encodes them, and serves batches.

    A subclass says how items are read (``read``), stored (``dump`` and ``load``), told apart (``split_key``, ``digest``), what is said in
    them (``texts``) and how they become examples (``encode``).

    In a Trainer the tokenizer is that of the model's weights; a model from scratch gets ``tokenizer``, or one trained on
    the training split.

    Attributes:
        report: What was found in the data, as plain data, after ``setup``.
        is_strict: Whether leaks and a lack of supervised tokens are errors; set to False to look at the report all the same.
    """

    def __init__(
        self,
        train: Sources | None = None,
        validation: Fractional = 0.05,
        test: Fractional = None,
        tokenizer: str | None = None,
        vocab_size: int = 8192,
        batch_size: int = 8,
        max_length: int | None = None,
        packing: bool = False,
        group_by_length: bool = False,
        mixture: dict[str, Any] | None = None,
        on_fault: OnFault | dict[str, OnFault] = "error",
        max_leak: float | None = 0.1,
        cache_dir: str | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            max_length=max_length,
            packing=packing,
            group_by_length=group_by_length,
            mixture=mixture,
            num_workers=num_workers,
            seed=seed,
        )
        if max_leak is not None and not 0 <= max_leak <= 1:
            raise ConfigError(f"data.max_leak is a fraction of the held-out items: 0 to 1, or null for no check, not {max_leak}")
        self.train = train
        self.validation = validation
        self.test = test
        self.tokenizer_name = tokenizer
        self.vocab_size = vocab_size
        self.on_fault = on_fault
        self.max_leak = max_leak
        self.cache = cache_folder(cache_dir)
        self.report: dict[str, Any] = {}
        self.is_strict = True

    # What a subclass says.

    @abstractmethod
    def read(self, source: Source) -> Iterable[Item]:
        """Read one source."""

    @abstractmethod
    def split_key(self, item: Item) -> str:
        """What decides an item's split; items with one key stay together."""

    @abstractmethod
    def digest(self, item: Item) -> bytes:
        """16 bytes that are equal for items that say the same."""

    @abstractmethod
    def dump(self, item: Item) -> str:
        """An item as text, as it lies in the cache."""

    @abstractmethod
    def load(self, content: str) -> Item:
        """The item that :meth:`dump` wrote down."""

    def name_of(self, item: Item) -> str:
        """What a message calls an item; its first words, where it has no name."""
        text = " ".join(self.texts(item)[0].split()) if self.texts(item) else ""
        return repr(text if len(text) <= 40 else f"{text[:40]}…")

    @abstractmethod
    def texts(self, item: Item) -> list[str]:
        """What is said in an item; a tokenizer is trained on it, and duplicates and leaks are found by it."""

    @abstractmethod
    def encode(self, items: Iterable[Item], *, counts: Counter[str], part: str) -> Iterator[list[Example]]:
        """Encode items of a part for training, with ``self.tokenizer`` and ``self.max_length``.

        Yields: the examples of each item, in order; one list more where something is left at the end.
        """

    @abstractmethod
    def encoding_settings(self, part: str) -> Mapping[str, Any]:
        """The settings that :meth:`encode` depends on, beside tokenizer and ``max_length``, as plain data."""

    def fingerprint(self, source: Source) -> str | None:
        """What reading a source depends on, settings included; None where only reading tells whether it changed."""
        return None

    def labels(self, item: Item) -> Mapping[str, str]:
        """What a mixture can tell an item by, beside its source."""
        return {}

    def items(self, source: Source, about: dict[str, Any]) -> Iterable[Item]:
        """Read and clean one source; ``about`` takes what the report is to say of it."""
        yield from self.read(source)

    @property
    def duplicates(self) -> DuplicateSettings | None:
        """Which items are left out as duplicates; None for none."""
        return None

    # What Lightning calls.

    def setup(self, stage: str) -> None:
        """Read, split and encode what the stage needs. Each process does so for itself, or finds it in the cache."""
        self.max_length = self._check_max_length()
        of_model = self._model_tokenizer() if self.tokenizer is not None else None
        if of_model is not None and self.tokenizer is not None and of_model.get_vocab() != self.tokenizer.get_vocab():
            raise ConfigError("the data was encoded with another model's tokenizer; make a new data module for this model")
        parts = self.load_parts(stage)
        if self.tokenizer is None:
            self.tokenizer = self.build_tokenizer(parts.get("train", []))
        for part, sources in parts.items():
            if part not in self.datasets and not (part == "test" and stage == "fit"):
                self.datasets[part] = self._encode_part(part, sources)

    def records_of_batch(self, batch_idx: int) -> list[str]:
        """The names of what this process reads in a training batch of the epoch that is being read.

        Args:
            batch_idx: The batch, from 0.
        """
        dataset = self._dataset("train")
        sampler = self.train_sampler(dataset)
        sampler.set_epoch(self._epoch)
        rows = list(sampler)[batch_idx * self.batch_size : (batch_idx + 1) * self.batch_size]
        return list(dict.fromkeys(self.name_of(self.load(dataset.content_of(index))) for row in rows for index in row))

    # How it is done.

    def load_parts(self, stage: str) -> Parts:
        """Read the sources a stage needs, split them, and leave out duplicates.

        Args:
            stage: Lightning's fit, validate, test or predict.

        Returns: the parts ``train``, ``validation`` and ``test``, as far as the stage needs them.

        Raises:
            ConfigError: A source that is needed is not set.
            DataError: There is nothing in them, or more leaks from training into what is held out than ``max_leak``.
        """
        wanted = _PARTS_OF_STAGE.get(stage, ())
        settings = {"validation": self.validation, "test": self.test}
        fractions = {part: float(value) for part, value in settings.items() if isinstance(value, (int, float))}
        for part in wanted if stage != "fit" else ():
            if not settings[part]:
                raise ConfigError(f"data.{part} is not set; name a source, or a fraction of data.train")
        needs_train = "train" in wanted or any(fractions.get(part) for part in wanted)
        if needs_train and self.train is None:
            raise ConfigError("data.train is not set; name a file, a folder, a glob or corpus:chatterbot/english")
        tables = {"train": self.prepare_all(self.train)} if needs_train and self.train is not None else {}
        for part, value in settings.items():
            if isinstance(value, (str, dict, list)) and (part in wanted or self.duplicates is not None):
                tables[part] = self.prepare_all(value)
        parts = split_parts(tables, validation=fractions.get("validation", 0.0), test=fractions.get("test", 0.0))
        if self.duplicates is not None:
            parts, self.report["duplicates"] = self._drop_duplicates(parts, self.duplicates)
        if stage == "fit" and self.max_leak is not None:
            self.report["leaks"] = self._check_leaks(parts)
        for part, sources in parts.items():
            self.report.setdefault("parts", {}).setdefault(part, {})["items"] = sum(len(source.rows) for source in sources)
        return {part: parts[part] for part in wanted if sum(len(source.rows) for source in parts.get(part, []))}

    def prepare_all(self, sources: Sources) -> list[tuple[str, ItemTable]]:
        """Read sources, or find what was read of them.

        Raises:
            DataError: They hold nothing.
        """
        found: list[tuple[str, ItemTable]] = []
        for source in sources if isinstance(sources, list) else [sources]:
            table = preparation.prepare(self, source)
            name = SourceSettings.of(source).name
            told = self.report.setdefault("sources", {}).setdefault(name, {**table.about, "items": len(table)})
            if name in [other for other, _ in found] or told["digest"] != table.about["digest"]:
                raise ConfigError(
                    f"data: two sources are called {name!r}; give each a name of its own, or list it once (data.mixture repeats)"
                )
            preparation.tell_faults(name, table.about)
            found.append((name, table))
        if not sum(len(table) for _, table in found):
            raise DataError(f"{sources}: nothing to read in there{preparation.why_nothing(table.about for _, table in found)}")
        return found

    def build_tokenizer(self, train: Sequence[SourceRows]) -> PreTrainedTokenizerFast:
        """Find the tokenizer: the model's, the one named, or one trained on the training split.

        Raises:
            ConfigError: There is none, or two that contradict each other.
        """
        of_model = self._model_tokenizer()
        if of_model is not None:
            # A model from scratch that goes on from a checkpoint has its tokenizer from there, as data.tokenizer had it.
            module = self.trainer.lightning_module if self.trainer is not None else None
            if self.tokenizer_name is not None and getattr(module, "pretrained", None) is not None:
                raise ConfigError(
                    f"data.tokenizer {self.tokenizer_name!r} contradicts the model's weights, which bring their own; remove it"
                )
            return of_model
        if self.tokenizer_name is not None:
            return load_tokenizer(self.tokenizer_name, template=self.template_name)
        if not train:
            raise ConfigError("there is no tokenizer: set model.pretrained, data.tokenizer or --ckpt_path")
        state = None
        if self.trainer is None or self.trainer.is_global_zero:
            rank_zero_info(f"Training a tokenizer of {self.vocab_size} entries on the training split")
            contents = (content for source in train for content in source.table.column("content", source.rows))
            texts = (text for content in contents for text in self._texts_of(content))
            state = tokenizer_state(train_tokenizer(texts, vocab_size=self.vocab_size, template=self.template_name))
        if self.trainer is not None:
            state = self.trainer.strategy.broadcast(state)
        assert state is not None
        return tokenizer_from_state(state)

    @property
    def template_name(self) -> str | None:
        """The chat template that the tokenizer is to carry; None for its own, or ChatML."""
        return None

    def _texts_of(self, content: str) -> list[str]:
        return self.texts(self.load(content))

    def _drop_duplicates(self, parts: Parts, settings: DuplicateSettings) -> tuple[Parts, dict[str, dict[str, int]]]:
        def write(path: Path) -> None:
            save_rows(path, *drop_duplicates(parts, settings, texts=self._texts_of))

        key = key_of_parts(parts, asdict(settings), preparation.code_of(self, "load", "texts"))
        return load_rows(build_once(self.cache / f"{key}.rows.npz", write), parts)

    def _check_leaks(self, parts: Parts) -> dict[str, dict[str, Any]]:
        def write(path: Path) -> None:
            path.write_text(json.dumps(find_leaks(parts, texts=self._texts_of)))

        key = key_of_parts(parts, "leaks", preparation.code_of(self, "load", "texts"))
        leaks: dict[str, dict[str, Any]] = json.loads(build_once(self.cache / f"{key}.leaks.json", write).read_text())
        for part, found in leaks.items():
            if self.is_strict and self.max_leak is not None and found["share"] > self.max_leak:
                raise DataError(
                    f"data.{part}: {found['overlapping']} of {found['n']} items ({found['share']:.0%}) stand in data.train too, "
                    f"{found['exact']} of them word for word; set data.split_by, clean duplicates, or raise data.max_leak ({self.max_leak})"
                )
        return leaks

    def _check_max_length(self) -> int:
        positions = self._ask_model("max_positions")
        if self.max_length is None and positions is None:
            raise ConfigError("data.max_length is not set, and no model says how many positions it has; set it")
        if self.max_length is not None and positions is not None and self.max_length > positions:
            raise ConfigError(
                f"data.max_length {self.max_length} is more than the model's {positions} positions; set it to {positions} or less"
            )
        length = self.max_length if self.max_length is not None else positions
        assert length is not None
        return length

    def _model_tokenizer(self) -> PreTrainedTokenizerFast | None:
        tokenizer: PreTrainedTokenizerFast | None = self._ask_model("load_tokenizer", template=self.template_name)
        return tokenizer

    def _ask_model(self, method: str, **arguments: Any) -> Any:
        """What a method of the Trainer's model says; None without a Trainer, or of a model that has no such method."""
        module: Any = self.trainer.lightning_module if self.trainer is not None else None
        return getattr(module, method)(**arguments) if hasattr(module, method) else None

    def _encode_part(self, part: str, sources: Sequence[SourceRows]) -> ExampleDataset:
        assert self.tokenizer is not None
        tokenizer = key_of(tokenizer_state(self.tokenizer))
        settings = [tokenizer, self.max_length, preparation.code_of(self, "encode"), self.encoding_settings(part)]
        tables = []
        for source in sources:
            key = key_of("tokens", source.table.about["digest"], blake2b(source.rows.tobytes()).hexdigest(), settings)
            path = build_once(self.cache / f"{key}.tokens.arrow", partial(self._write_tokens, part, source))
            tables.append(TokenTable(path))
        dataset = ExampleDataset(sources, tables)
        counts = dataset.counts
        if not counts["supervised"] and self.is_strict:
            raise DataError(f"data.{part}: none of its tokens is supervised; it needs assistant messages with a weight above 0")
        rank_zero_info(
            f"{part}: {counts['items']} read, {len(dataset)} examples, {counts['tokens']} tokens, {counts['supervised']} of them supervised"
        )
        if counts["unsupervised"]:
            rank_zero_info(
                f"{part}: {counts['unsupervised']} of {counts['items']} have no supervised token and are left out; "
                "inspect shows what is learnt (data.supervise, and the weights of messages)"
            )
        if counts["truncated"]:
            rank_zero_info(
                f"{part}: {counts['truncated']} shortened to {self.max_length} tokens, {counts['lost']} supervised tokens lost by that"
            )
        self.report["parts"][part].update(counts)
        return dataset

    def _write_tokens(self, part: str, source: SourceRows, path: Path) -> None:
        counts: Counter[str] = Counter(items=len(source.rows))
        items = (self.load(content) for content in source.table.column("content", source.rows))

        def numbered() -> Iterator[tuple[int, list[Example]]]:
            bar = preparation.progress(f"encoding {part}", total=len(source.rows))
            with bar:
                for number, examples in enumerate(self.encode(items, counts=counts, part=part)):
                    counts["tokens"] += sum(len(example.input_ids) for example in examples)
                    counts["supervised"] += sum(len(example.loss_weights) - example.loss_weights.count(0.0) for example in examples)
                    yield min(number, len(source.rows) - 1), examples
                    bar.update()

        TokenTable.write(path, numbered(), lambda: {"counts": dict(counts)})
