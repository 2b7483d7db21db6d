"""``fit --batch_size_find true`` and ``fit --lr_find true``: Lightning's finders, run before the run that takes what they found.

A search has a Trainer, a model and data of its own, without loggers and callbacks, and all of them are thrown away. The run is then built
of its config with the found value in it, as if it had been set by hand: it is that run, to the last bit.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.tuner.tuning import Tuner
from lightning.pytorch.utilities.memory import garbage_collection_cuda
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_chatgpt.checkpoints.plugin import DurableCheckpointIO
from lightning_chatgpt.data.serving import ServingDataModule
from lightning_chatgpt.errors import ConfigError
from lightning_chatgpt.memory import give_freed_memory_back, limited_memory
from lightning_chatgpt.models.step import StepLoss
from lightning_chatgpt.plots import COLOURS, LIMIT_COLOUR, check_matplotlib, plot
from lightning_chatgpt.precision import ChatTrainer

if TYPE_CHECKING:
    from jsonargparse import Namespace
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

FLAGS = {
    "batch_size_find": "Find the largest data.batch_size that memory has room for, by doubling it; the run takes it.",
    "lr_find": "Find model.learning_rate by a range test, whose plot is saved in the run folder; the run takes it.",
}
_FOUND = {"batch_size_find": ("data", "batch_size"), "lr_find": ("model", "learning_rate")}

_LOWEST_RATE, _HIGHEST_RATE, _STEPS = 1e-6, 1.0, 100
_BELOW_LOWEST = 10  # Source: Howard and Gugger 2020 (fastai), section 4: a tenth of the rate at the lowest loss
_DECAY = 0.8  # of a step's weight in the mean at another one, for each step between them
_CERTAIN = 3.0  # standard errors that the loss has to fall by
_LARGEST_BATCH = 8192  # rows; Lightning's own bound
_FEW_STEPS = 10  # an epoch

# A search makes as many steps as it wants, and nothing else.
_SEARCHING: dict[str, Any] = {
    "logger": False,
    "callbacks": None,
    "profiler": None,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
    "num_sanity_val_steps": 0,
    "val_check_interval": None,
    "check_val_every_n_epoch": 10**9,
    "max_epochs": -1,
    "max_steps": 10**9,
    "min_epochs": None,
    "min_steps": None,
    "max_time": None,
}


class Suggestion(NamedTuple):
    """What a range test comes to.

    Attributes:
        rate: The learning rate to take.
        smoothed: (N,) the loss of each step among its neighbours, in nats.
        lowest: The step where that is lowest.
    """

    rate: float
    smoothed: Floats
    lowest: int


def asked_searches(settings: Namespace) -> list[str]:
    """The searches that a config of ``fit`` asks for, in the order in which they are made: the learning rate depends on the batch size.

    Raises:
        ConfigError: They cannot be made.
    """
    asked = [flag for flag in FLAGS if settings.get(flag)]
    for flag in asked:
        group, name = _FOUND[flag]
        chosen = settings[group]
        if settings["ckpt_path"] is not None:
            raise ConfigError(f"{flag} is for a new run, and ckpt_path {settings['ckpt_path']} goes on with one; leave one out")
        if settings["trainer"]["fast_dev_run"]:
            raise ConfigError(f"{flag} takes more steps than trainer.fast_dev_run lets it; leave one out")
        if name not in chosen.get("init_args", {}):
            raise ConfigError(f"{flag}: {chosen['class_path']} has no setting {name}, which could be found; leave {flag} out")
    if "lr_find" in asked:
        check_matplotlib("lr_find")
    return asked


def search(flag: str, settings: Namespace, *, build: Callable[[], Any]) -> list[Path]:
    """Make a search, and put what it found into the settings.

    Args:
        flag: One of ``FLAGS``.
        settings: The config of ``fit``.
        build: Makes model, data and the Trainer's settings of it anew.

    Returns: the files that were written.

    Raises:
        ConfigError: It cannot be made with these settings, or found nothing.
    """
    group, name = _FOUND[flag]
    folder = Path(settings["trainer"]["default_root_dir"])
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"trainer.default_root_dir {folder}: cannot be made ({error.strerror or error}); name another") from None
    files: list[Path] = []
    try:
        # Beside the run's own: it holds a checkpoint, for which a folder for temporary files may have no room.
        with tempfile.TemporaryDirectory(prefix=".search-", dir=folder) as place, _quiet():
            built = build()
            trainer = _searching_trainer(flag, vars(built["trainer"]), place)
            if flag == "lr_find":
                files.append(folder / "plots" / "lr_find.png")
                found: float = _find_rate(trainer, built["model"], built["data"], picture=files[0])
            else:
                found = _find_batch_size(trainer, built["model"], built["data"])
            del built, trainer
    finally:
        garbage_collection_cuda()
        give_freed_memory_back()
        if is_new and not any(folder.iterdir()):
            folder.rmdir()
    settings[group]["init_args"][name] = found
    return files


def suggest(rates: Floats, losses: Floats) -> Suggestion:
    """The learning rate that a range test suggests: a tenth of the one at which the loss was lowest.

    Lightning's own suggestion is where the loss falls most for each unit of the rate. That is nearly always among the lowest rates, where
    a unit is a billion of steps and all that falls is noise: for the quickstart it is 2e-7.

    Args:
        rates: (N,) ascending.
        losses: (N,) of the steps made with them, in nats; those that are not finite are left out.

    Raises:
        ConfigError: The loss did not fall, or was not finite.
    """
    finite = np.flatnonzero(np.isfinite(losses))
    if len(finite) < 3:
        raise ConfigError(
            f"lr_find: {len(finite)} of {len(losses)} losses are finite, and nothing can be suggested; set model.learning_rate"
        )
    # Two-sided means of logarithms: a diverging loss shall not outweigh the steps before it.
    logs = np.log(np.maximum(losses[finite], np.finfo(np.float64).tiny))
    kernel = _DECAY ** np.abs(np.subtract.outer(finite, finite))
    kernel /= kernel.sum(axis=1, keepdims=True)
    smoothed = kernel @ logs
    lowest = int(smoothed.argmin())
    # Beside its neighbours a step tells the noise; what is left of it in the means tells what may be a fall by chance.
    noise = float(np.median(np.abs(np.diff(logs)))) / 0.954  # of a normal variable's differences: √2 · 0.6745
    error = noise * float(np.sqrt((kernel[0] ** 2).sum() + (kernel[lowest] ** 2).sum()))
    if not smoothed[0] - smoothed[lowest] > _CERTAIN * error:
        raise ConfigError(
            f"lr_find: the loss fell from {np.exp(smoothed[0]):.3f} to {np.exp(smoothed[lowest]):.3f} at the most, no more than its noise "
            f"would, from rate {rates[0]:.0e} to {rates[-1]:.0e}; set model.learning_rate, or raise data.batch_size"
        )
    whole = np.full(len(losses), np.nan)
    whole[finite] = np.exp(smoothed)
    return Suggestion(float(f"{rates[finite[lowest]] / _BELOW_LOWEST:.2g}"), whole, int(finite[lowest]))


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what Lightning says of each trial's end and of its own checkpoint; which sizes were tried stays."""
    names = ("utilities.rank_zero", "trainer.connectors.checkpoint_connector", "tuner.batch_size_scaling")
    loggers = [logging.getLogger(f"lightning.pytorch.{name}") for name in names]
    left_out = ("`Trainer.fit` stopped", "Restor", "`weights_only`", "GPU available", "TPU available", "Finished batch size finder")

    def is_news(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(left_out)

    for logger in loggers:
        logger.addFilter(is_news)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_news)


def _searching_trainer(flag: str, settings: dict[str, Any], folder: str) -> ChatTrainer:
    plugins = settings["plugins"] or []
    plugins = [*plugins] if isinstance(plugins, list) else [plugins]
    if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
        plugins.append(DurableCheckpointIO())
    trainer = ChatTrainer(**{**settings, **_SEARCHING, "plugins": plugins, "default_root_dir": folder})
    if not isinstance(trainer.strategy, SingleDeviceStrategy) or trainer.world_size > 1:
        raise ConfigError(
            f"{flag} searches on one device, and trainer.strategy {type(trainer.strategy).__name__} has {trainer.world_size} process(es); "
            "search with --trainer.devices 1 --trainer.strategy auto, and set what it finds by hand"
        )
    return trainer


def _find_rate(trainer: ChatTrainer, module: LightningModule, data: LightningDataModule, *, picture: Path) -> float:
    losses: list[float] = []
    with _recorded(module, losses):
        # Lightning would tell divergence by what training_step returns, which is no mean.
        found = Tuner(trainer).lr_find(
            module,
            datamodule=data,
            min_lr=_LOWEST_RATE,
            max_lr=_HIGHEST_RATE,
            num_training=_STEPS,
            early_stop_threshold=None,
            update_attr=False,
        )
    if not losses:
        raise ConfigError(
            f"lr_find: trainer.accumulate_grad_batches {trainer.accumulate_grad_batches} is more than the batches of an epoch, "
            "so that no step is whole; lower it, or data.batch_size"
        )
    assert found is not None and len(found.results["lr"]) == len(losses)
    rates, values = np.array(found.results["lr"]), np.array(losses)
    try:
        suggestion = suggest(rates, values)
    except ConfigError as error:
        _draw(picture, rates, values, None)
        raise ConfigError(f"{error}; {picture} shows it") from None
    _draw(picture, rates, values, suggestion)
    print(
        f"lr_find: model.learning_rate {suggestion.rate:g}, a tenth of {rates[suggestion.lowest]:.2g}, where the loss was lowest "
        f"({suggestion.smoothed[suggestion.lowest]:.3f}); {picture} shows it"
    )
    return suggestion.rate


@contextmanager
def _recorded(module: LightningModule, losses: list[float]) -> Iterator[None]:
    """Write down the loss of each optimizer step, for which Lightning's finder takes its last micro-batch's."""
    hook = module.on_train_batch_end

    def on_train_batch_end(outputs: Any, batch: Any, batch_idx: int) -> None:
        hook(outputs, batch, batch_idx)
        if (batch_idx + 1) % module.trainer.accumulate_grad_batches:
            return  # the finder counts no others; an epoch's last step may be shorter
        step_loss = getattr(module, "step_loss", None)
        made = step_loss.made if isinstance(step_loss, StepLoss) else {}
        losses.append(float(made.get("train_loss", (outputs or {}).get("loss", float("nan")))))

    module.on_train_batch_end = on_train_batch_end  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.on_train_batch_end


def _draw(picture: Path, rates: Floats, losses: Floats, suggestion: Suggestion | None) -> None:
    with plot(picture, title="Learning-rate range test") as axes:
        axes.set(xlabel="learning rate", ylabel="train_loss", xscale="log")
        axes.plot(rates, losses, ".", color=COLOURS[0], alpha=0.4, label="step")
        if suggestion is not None:
            axes.plot(rates, suggestion.smoothed, color=COLOURS[0], label="smoothed")
            axes.axvline(suggestion.rate, color=LIMIT_COLOUR, label=f"suggested: {suggestion.rate:g}")
            start = suggestion.smoothed[np.isfinite(suggestion.smoothed)][0]
            axes.set_ylim(0.9 * suggestion.smoothed[suggestion.lowest], 1.3 * start)  # what diverges would flatten the rest
            axes.legend(frameon=False)


def _find_batch_size(trainer: ChatTrainer, module: LightningModule, data: LightningDataModule) -> int:
    on_cpu = trainer.strategy.root_device.type == "cpu"
    if isinstance(data, ServingDataModule):
        _longest_first(data)
        trainer.callbacks.append(_RowsBound())  # type: ignore[attr-defined]
    try:
        with limited_memory() if on_cpu else nullcontext():
            # One past the bound: Lightning returns the bound without having tried it.
            found = Tuner(trainer).scale_batch_size(module, datamodule=data, init_val=1, max_val=2 * _LARGEST_BATCH)
    except ValueError:
        if getattr(data, "batch_size", None) != 0:
            raise
        raise ConfigError(
            "batch_size_find: there is no memory for a batch of one row; lower data.max_length or model.architecture"
        ) from None
    assert found is not None
    n_rows = _count_rows(data) if isinstance(data, ServingDataModule) else None
    size = min(found, _largest_batch(n_rows))
    limit = "that fits" if size == found else f"up to {_LARGEST_BATCH}" if size == _LARGEST_BATCH else "that the training split fills"
    print(f"batch_size_find: data.batch_size {size}, the largest power of two {limit}")
    n_steps = -(-n_rows // (size * trainer.accumulate_grad_batches)) if n_rows is not None else _FEW_STEPS
    if n_steps < _FEW_STEPS:
        rank_zero_warn(
            f"batch_size_find: with data.batch_size {size} an epoch is {n_steps} optimizer step(s), too few to learn much; "
            "what memory has room for need not be what learns best: raise trainer.max_epochs, or set a smaller one"
        )
    return size


class _RowsBound(Callback):
    """Tells Lightning's finder how many rows there are, once the data are read: it counts examples, of which packed rows hold several."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, BatchSizeFinder):
                callback._max_val = 2 * _largest_batch(_count_rows(data))


def _largest_batch(n_rows: int | None) -> int:
    """The largest batch that is tried, a power of two: more rows than there are is no more."""
    return _LARGEST_BATCH if n_rows is None else min(_LARGEST_BATCH, 1 << (n_rows.bit_length() - 1))


def _count_rows(data: ServingDataModule) -> int:
    return len(data.train_sampler(data.datasets["train"]))


def _longest_first(data: ServingDataModule) -> None:
    """Have a search read the rows that take most memory; others would let it find a size that they end a run with."""
    build = data.train_sampler

    def train_sampler(dataset: Any) -> Any:
        sampler = build(dataset)
        rows = sampler.epoch_rows
        sampler.epoch_rows = lambda epoch: sorted(rows(epoch), key=lambda row: -int(sampler.lengths[list(row)].sum()))  # type: ignore[method-assign]
        return sampler

    data.train_sampler = train_sampler  # type: ignore[method-assign]
