"""What chats and plain text share: settings, splits, the tokenizer, and the data loaders."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from lightning.pytorch import LightningDataModule
from lightning_utilities.core.rank_zero import rank_zero_info
from torch.utils.data import DataLoader

from lightning_chatgpt.chat.encoding import Example
from lightning_chatgpt.chat.tokenizer import load_tokenizer, tokenizer_from_state, tokenizer_state, train_tokenizer
from lightning_chatgpt.data.collate import collate
from lightning_chatgpt.data.sampler import EpochSampler, ShardSampler
from lightning_chatgpt.data.splits import split
from lightning_chatgpt.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

Item = TypeVar("Item")

Sources = str | list[str]


class TokenDataModule(LightningDataModule, Generic[Item]):
    """Reads items from sources, splits them, encodes them, and serves batches.

    A subclass says how items are read (``read``), what keeps them together in a split (``split_key``), what text a tokenizer
    may learn from (``texts``) and how they become examples (``encode``).

    In a Trainer the tokenizer is that of the model's weights; a model from scratch gets ``tokenizer``, or one trained on
    the training split.
    """

    tokenizer: PreTrainedTokenizerFast | None
    max_length: int | None

    def __init__(
        self,
        train: Sources | None = None,
        validation: float | Sources | None = 0.05,
        test: float | Sources | None = None,
        tokenizer: str | None = None,
        vocab_size: int = 8192,
        batch_size: int = 8,
        max_length: int | None = None,
        group_by_length: bool = False,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("max_length", max_length)):
            if value is not None and value < 1:
                raise ConfigError(f"data.{name} must be at least 1, not {value}")
        self.train = train
        self.validation = validation
        self.test = test
        self.tokenizer_name = tokenizer
        self.vocab_size = vocab_size
        self.batch_size = batch_size
        self.max_length = max_length
        self.group_by_length = group_by_length
        self.num_workers = num_workers
        self.seed = seed
        self.tokenizer = None
        self.datasets: dict[str, Dataset] = {}

    # What a subclass says.

    @abstractmethod
    def read(self, source: str) -> Iterable[Item]:
        """Read one source."""

    @abstractmethod
    def split_key(self, item: Item) -> str:
        """What decides an item's split; items with one key stay together."""

    @abstractmethod
    def texts(self, items: Sequence[Item]) -> Iterable[str]:
        """What a tokenizer may be trained on."""

    @abstractmethod
    def encode(self, items: Sequence[Item]) -> Iterable[Example]:
        """Encode items for training, with ``self.tokenizer`` and ``self.max_length``."""

    # What Lightning calls.

    def setup(self, stage: str) -> None:
        """Read, split and encode what the stage needs. Each process does so for itself and comes to the same."""
        self.max_length = self._check_max_length()
        of_model = self._ask_model("load_tokenizer") if self.tokenizer is not None else None
        if of_model is not None and self.tokenizer is not None and of_model.get_vocab() != self.tokenizer.get_vocab():
            raise ConfigError("the data was encoded with another model's tokenizer; make a new data module for this model")
        parts = self.load_items(stage)
        if self.tokenizer is None:
            self.tokenizer = self.build_tokenizer(parts.get("train", []))
        for part, items in parts.items():
            if part not in self.datasets:
                self.datasets[part] = self._to_dataset(part, items)

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches of the training split."""
        dataset = self._dataset("train")
        sampler = EpochSampler(
            dataset["n_tokens"][:],
            batch_size=self.batch_size,
            seed=self.seed,
            group_by_length=self.group_by_length,
            **self._ranks(),
        )
        return self._loader(dataset, sampler)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Batches of the validation split, each example once over all processes; nothing if there is no such split."""
        if "validation" in self.datasets:
            return self._evaluation_loader("validation")
        # Lightning asks whether that is meant; data.validation says so.
        warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
        return []

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches of the test split, each example once over all processes."""
        return self._evaluation_loader("test")

    # How it is done.

    def load_items(self, stage: str) -> dict[str, list[Item]]:
        """Read the sources a stage needs and split them.

        Args:
            stage: Lightning's fit, validate, test or predict.

        Returns: items of the parts ``train``, ``validation`` and ``test``, as far as the stage needs them.
        """
        wanted = {"fit": ["train", "validation"], "validate": ["validation"], "test": ["test"]}.get(stage, [])
        settings: dict[str, float | Sources | None] = {"validation": self.validation, "test": self.test}
        fractions = {part: value for part, value in settings.items() if isinstance(value, (int, float))}
        parts: dict[str, list[Item]] = {}
        if "train" in wanted or any(fractions.get(part) for part in wanted):
            if self.train is None:
                raise ConfigError("data.train is not set; name a JSONL file, a folder, a glob or corpus:chatterbot/english")
            items = self.read_all(self.train)
            split_items = split(
                items,
                [self.split_key(item) for item in items],
                validation=fractions.get("validation", 0.0),
                test=fractions.get("test", 0.0),
            )
            parts = dict(zip(("train", "validation", "test"), split_items, strict=True))
        for part in ("validation", "test"):
            value = settings[part]
            if part in wanted and isinstance(value, (str, list)):
                parts[part] = self.read_all(value)
        for part in set(wanted) - {"train"}:
            if stage != "fit" and not settings[part]:
                raise ConfigError(f"data.{part} is not set; name a source, or a fraction of data.train")
        return {part: parts[part] for part in wanted if parts.get(part)}

    def read_all(self, sources: Sources) -> list[Item]:
        """Read sources one after another.

        Raises:
            DataError: They hold nothing.
        """
        items = [item for source in ([sources] if isinstance(sources, str) else sources) for item in self.read(source)]
        if not items:
            raise DataError(f"{sources}: nothing to read in there")
        return items

    def build_tokenizer(self, train_items: Sequence[Item]) -> PreTrainedTokenizerFast:
        """Find the tokenizer: the model's, the one named, or one trained on the training split.

        Raises:
            ConfigError: There is none, or two that contradict each other.
        """
        of_model = self._ask_model("load_tokenizer")
        if of_model is not None:
            # A model from scratch that goes on from a checkpoint has its tokenizer from there, as data.tokenizer had it.
            module = self.trainer.lightning_module if self.trainer is not None else None
            if self.tokenizer_name is not None and getattr(module, "pretrained", None) is not None:
                raise ConfigError(
                    f"data.tokenizer {self.tokenizer_name!r} contradicts the model's weights, which bring their own; remove it"
                )
            tokenizer: PreTrainedTokenizerFast = of_model
            return tokenizer
        if self.tokenizer_name is not None:
            return load_tokenizer(self.tokenizer_name)
        if not train_items:
            raise ConfigError("there is no tokenizer: set model.pretrained, data.tokenizer or --ckpt_path")
        state = None
        if self.trainer is None or self.trainer.is_global_zero:
            rank_zero_info(f"Training a tokenizer of {self.vocab_size} entries on the training split")
            state = tokenizer_state(train_tokenizer(self.texts(train_items), vocab_size=self.vocab_size))
        if self.trainer is not None:
            state = self.trainer.strategy.broadcast(state)
        assert state is not None
        return tokenizer_from_state(state)

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

    def _ask_model(self, method: str) -> Any:
        """What a method of the Trainer's model says; None without a Trainer, or of a model that has no such method."""
        module: Any = self.trainer.lightning_module if self.trainer is not None else None
        return getattr(module, method)() if hasattr(module, method) else None

    def _to_dataset(self, part: str, items: Sequence[Item]) -> Dataset:
        from datasets import Dataset, Features, Sequence, Value

        columns: dict[str, list[Any]] = {"input_ids": [], "loss_weights": [], "n_tokens": []}
        for example in self.encode(items):
            columns["input_ids"].append(example.input_ids)
            columns["loss_weights"].append(example.loss_weights)
            columns["n_tokens"].append(len(example.input_ids))
        n_supervised = sum(weight > 0 for weights in columns["loss_weights"] for weight in weights)
        if not n_supervised:
            raise DataError(f"data.{part}: none of its tokens is supervised; it needs assistant messages with a weight above 0")
        rank_zero_info(
            f"{part}: {len(items)} read, {len(columns['n_tokens'])} examples, {sum(columns['n_tokens'])} tokens, "
            f"{n_supervised} of them supervised"
        )
        features = Features({"input_ids": Sequence(Value("int32")), "loss_weights": Sequence(Value("float32")), "n_tokens": Value("int32")})
        return Dataset.from_dict(columns, features=features)  # Arrow: compact, and shared with workers uncopied

    def _dataset(self, part: str) -> Dataset:
        if part not in self.datasets:
            raise DataError(f"data.{part} holds nothing; call setup, or name a source that is not empty")
        return self.datasets[part]

    def _ranks(self) -> dict[str, int]:
        if self.trainer is None:
            return {"rank": 0, "world_size": 1}
        return {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}

    def _check_shares(self, name: str, n_examples: int) -> None:
        n_processes = self._ranks()["world_size"]
        if n_examples < n_processes:
            raise DataError(f"{name} holds {n_examples} example(s), too few for {n_processes} processes; add more, or use fewer")

    def _evaluation_loader(self, part: str) -> DataLoader[Any]:
        dataset = self._dataset(part)
        self._check_shares(f"data.{part}", len(dataset))
        return self._loader(dataset, ShardSampler(len(dataset), **self._ranks()))

    def _loader(self, dataset: Dataset, sampler: EpochSampler | ShardSampler) -> DataLoader[Any]:
        assert self.tokenizer is not None
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=partial(_collate_rows, pad_token_id=self.tokenizer.pad_token_id),
        )


def _collate_rows(rows: list[dict[str, Any]], *, pad_token_id: int) -> Any:
    return collate([Example(row["input_ids"], row["loss_weights"]) for row in rows], pad_token_id=pad_token_id)
