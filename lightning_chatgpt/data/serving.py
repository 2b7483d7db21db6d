"""Batches of encoded examples, as a Trainer asks for them: in which order, by which process, from where."""

from __future__ import annotations

import json
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader

from lightning_chatgpt.data.collate import collate
from lightning_chatgpt.data.examples import ExampleDataset
from lightning_chatgpt.data.mixture import Draws, Mixture
from lightning_chatgpt.data.packing import pack
from lightning_chatgpt.data.sampler import EpochSampler, ShardSampler, TrainLoader
from lightning_chatgpt.errors import ConfigError, DataError, nearest
from lightning_chatgpt.processes import shield_from_signals

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def share_of(trainer: Trainer | None) -> dict[str, int]:
    """Which share of the rows a process reads, and how many there are, as samplers take it; without a Trainer all."""
    shares = trainer.distributed_sampler_kwargs if trainer is not None else None
    return {"rank": shares["rank"], "world_size": shares["num_replicas"]} if shares else {"rank": 0, "world_size": 1}


class ServingDataModule(LightningDataModule):
    """Serves the examples in ``datasets``, which a subclass fills in ``setup``.

    Args:
        batch_size: Rows in a batch, in each process.
        max_length: Tokens of a row; null until ``setup`` knows the model's positions.
        packing: Whether examples share rows.
        group_by_length: Whether rows of about one length share an optimizer step.
        mixture: How much of what an epoch reads.
        num_workers: Processes that prepare batches; 0 does so in the main one.
        seed: Chooses the order of training rows.

    Attributes:
        tokenizer: What encoded; known after ``setup``.
        datasets: The examples of each part (``train``, ``validation``, ``test``), after ``setup``.
        kept_settings: Names of settings whose values in a checkpoint stay where a run goes on from it, whatever they are now.

    Raises:
        ConfigError: A setting is out of range, or contradicts another.
    """

    kept_settings = frozenset({"tokenizer", "vocab_size"})

    def __init__(
        self,
        *,
        batch_size: int,
        max_length: int | None,
        packing: bool,
        group_by_length: bool,
        mixture: dict[str, Any] | None,
        num_workers: int,
        seed: int,
    ) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("max_length", max_length)):
            if value is not None and value < 1:
                raise ConfigError(f"data.{name} must be at least 1, not {value}")
        if num_workers < 0:
            raise ConfigError(f"data.num_workers must be at least 0, not {num_workers}")
        if packing and group_by_length:
            raise ConfigError("data.packing fills every row, so data.group_by_length has nothing to do; leave one out")
        self.batch_size = batch_size
        self.max_length = max_length
        self.packing = packing
        self.group_by_length = group_by_length
        self.mixture = Mixture.of(mixture)
        self.num_workers = num_workers
        self.seed = seed
        self.tokenizer: PreTrainedTokenizerFast | None = None
        self.datasets: dict[str, ExampleDataset] = {}
        self._epoch = 0  # that is being read
        self._left_off: dict[str, Any] | None = None

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches of the training split; in an epoch that an earlier run began, those that it left."""
        dataset = self._dataset("train")
        return self._loader(dataset, self.train_sampler(dataset), TrainLoader, begin=self._begin_epoch)

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

    def train_sampler(self, dataset: ExampleDataset) -> EpochSampler:
        """What an epoch of training reads, in which order."""
        ranks = self._ranks()
        return EpochSampler(
            dataset.lengths,
            step_size=self.batch_size * ranks["world_size"] * (self.trainer.accumulate_grad_batches if self.trainer is not None else 1),
            seed=self.seed,
            draws=self._draws(dataset),
            capacity=self.max_length if self.packing else None,
            group_by_length=self.group_by_length,
            **ranks,
        )

    def _draws(self, dataset: ExampleDataset) -> Draws | None:
        if self.mixture == Mixture():
            return None
        groups: list[str] = []
        known: set[str] = set()
        for source in dataset.sources:
            if self.mixture.label is None:
                groups += [source.name] * len(source.rows)
                continue
            for text in source.table.column("labels", source.rows):
                labels = json.loads(text) if text else {}
                known |= labels.keys()
                groups.append(labels.get(self.mixture.label, ""))
        if self.mixture.label is not None and not any(groups):
            raise ConfigError(
                f"data.mixture.label {self.mixture.label!r} is said of no record; {nearest(self.mixture.label, sorted(known))}"
            )
        return Draws(
            self.mixture,
            lengths=dataset.lengths,
            conversations=dataset.conversations,
            groups=groups,
            places=np.concatenate([source.table.places[source.rows] for source in dataset.sources]),
            seed=self.seed,
            capacity=self.max_length if self.packing else None,
        )

    def _dataset(self, part: str) -> ExampleDataset:
        if part not in self.datasets:
            raise DataError(f"data.{part} holds nothing; call setup, or name a source that is not empty")
        return self.datasets[part]

    def _ranks(self) -> dict[str, int]:
        """Whose share of the rows is read here, and how many shares there are; processes that split a model's layers read one share."""
        return share_of(self.trainer)

    def _check_shares(self, name: str, n_rows: int) -> None:
        n_processes = self._ranks()["world_size"]
        if n_rows < n_processes:
            raise DataError(f"{name} holds {n_rows} row(s), too few for {n_processes} processes; add more, or use fewer")

    def _evaluation_loader(self, part: str) -> DataLoader[Any]:
        dataset = self._dataset(part)
        assert self.max_length is not None
        rows = pack(dataset.lengths, capacity=self.max_length) if self.packing else [[i] for i in range(len(dataset))]
        self._check_shares(f"data.{part}", len(rows))
        return self._loader(dataset, ShardSampler(rows, **self._ranks()))

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to go on within an epoch. Called by Lightning."""
        accumulated = self.trainer.accumulate_grad_batches if self.trainer is not None else 1
        return {"epoch": self._epoch, "rows": self._rows_at_once, "step": self._rows_at_once * accumulated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember where a run left off. Called by Lightning."""
        self._left_off = state_dict
        self._epoch = state_dict["epoch"]
        # Lightning does not see that the loader goes on where it was; where a checkpoint knows nothing of that, its warning is right.
        warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch ended")

    def count_batches(self, n_batches: int, *, is_epoch: bool = False) -> int:
        """How many batches of this run are as many as an earlier run had read of an epoch, which this run goes on with.

        Args:
            n_batches: That an earlier run had read; its batches may have been of another size.
            is_epoch: Whether these were all of the epoch.

        Raises:
            ConfigError: These rows do not end where an optimizer step of this run does.
        """
        assert self.trainer is not None
        if self._left_off is None:
            return n_batches
        at_once = self._rows_at_once
        n_rows = n_batches * int(self._left_off["rows"])
        step = at_once * self.trainer.accumulate_grad_batches
        self._check_same_order(self._left_off, step)
        self._left_off = {**self._left_off, "rows": at_once}
        if n_rows % step and not is_epoch:
            processes = self._ranks()["world_size"]
            sizes = sorted((size for size in range(1, n_rows + 1) if n_rows % size == 0), key=lambda size: abs(size - step))[:6]
            raise ConfigError(
                f"the run was left after {n_rows} rows of the epoch, which optimizer steps of {step} rows do not divide (data.batch_size "
                f"{self.batch_size}, {processes} process(es), trainer.accumulate_grad_batches {self.trainer.accumulate_grad_batches}); "
                f"let them come to {', '.join(map(str, sorted(sizes)))}"
            )
        return -(-n_rows // at_once)

    def _check_same_order(self, left_off: dict[str, Any], step: int) -> None:
        if self.group_by_length and left_off.get("step", step) != step:
            raise ConfigError(
                f"data.group_by_length orders an epoch by its optimizer steps of {left_off['step']} rows, not {step}; "
                "keep data.batch_size times the processes times trainer.accumulate_grad_batches"
            )

    @property
    def _rows_at_once(self) -> int:
        return int(self.batch_size * self._ranks()["world_size"])

    def _begin_epoch(self, epoch: int) -> tuple[int, int]:
        """The epoch that is really begun, or gone on with, and how many of its batches are done."""
        left_off, self._left_off = self._left_off, None
        self._epoch = epoch
        if left_off is None or self.trainer is None:
            return epoch, 0
        n_batches = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if n_batches:
            self._epoch = left_off["epoch"]  # Lightning takes an epoch that max_steps broke off for a whole one
            if left_off["rows"] != self._rows_at_once:
                raise ConfigError(
                    f"the epoch was begun with {left_off['rows']} rows in the batches of all processes, and cannot go on with "
                    f"{self._rows_at_once}; add the callback ExactResume, which finds the place"
                )
        return self._epoch, n_batches

    def _loader(
        self, dataset: ExampleDataset, sampler: EpochSampler | ShardSampler, kind: type[DataLoader[Any]] = DataLoader, **settings: Any
    ) -> DataLoader[Any]:
        assert self.tokenizer is not None
        width = self.max_length if self.packing else None
        return kind(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            worker_init_fn=shield_from_signals,
            persistent_workers=self.num_workers > 0,
            collate_fn=partial(collate, pad_token_id=self.tokenizer.pad_token_id, width=width),
            **settings,
        )
