"""ChatCLI: LightningCLI with our model, our data and our callbacks, and a run folder that is never overwritten unasked."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import CheckpointIO
from lightning_utilities.core.rank_zero import rank_zero_only, rank_zero_warn

from lightning_chatgpt.arguments import OneLineParser, fill_switches, union_reason
from lightning_chatgpt.callbacks.checkpoint import RunCheckpoint
from lightning_chatgpt.callbacks.export import HuggingFaceExport
from lightning_chatgpt.callbacks.nonfinite import NonFiniteGuard
from lightning_chatgpt.callbacks.predictions import PredictionWriter
from lightning_chatgpt.callbacks.records import MetricsFile
from lightning_chatgpt.callbacks.resume import ExactResume
from lightning_chatgpt.callbacks.samples import SampleGeneration
from lightning_chatgpt.callbacks.stopping import GracefulStop, ProcessWatch
from lightning_chatgpt.callbacks.throughput import TokenThroughput
from lightning_chatgpt.checkpoints.file import read_plain
from lightning_chatgpt.checkpoints.plugin import DurableCheckpointIO
from lightning_chatgpt.commands.inspect import InspectTrainer
from lightning_chatgpt.configuration import check_keys, resolve_arguments
from lightning_chatgpt.data.chat import ChatDataModule
from lightning_chatgpt.errors import ConfigError, UserError
from lightning_chatgpt.evaluation.on_test import TestMetrics
from lightning_chatgpt.finders import FLAGS, asked_searches, search
from lightning_chatgpt.memory import keep_freed_memory
from lightning_chatgpt.models.build import read_checkpoint
from lightning_chatgpt.models.causal_lm import CausalLMModule
from lightning_chatgpt.precision import ChatTrainer
from lightning_chatgpt.quiet import quieten
from lightning_chatgpt.run_folder import RunFolder, find_checkpoint, run_files

_LEFT_BY_A_START = {"config.yaml", "run.json", "samples.jsonl", "lr_find.png"}  # which may have failed before it trained
_CLASSES = {"model": CausalLMModule, "data": ChatDataModule}


class ChatArgumentParser(OneLineParser, LightningArgumentParser):
    """Lightning's, whose errors are one line."""


class ChatCLI(LightningCLI):
    """fit, validate, test and predict from config files.

    The model is a :class:`CausalLMModule` and the data a :class:`ChatDataModule`, whose settings are flat keys
    (``model: {learning_rate: 1e-4}``), unless a ``class_path`` names another. Callbacks stand in groups of their own:
    checkpoint, samples, predictions, export, throughput.

    Args:
        arguments: The command line, from the verb on.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self.arguments, self.configs = resolve_arguments(fill_switches(arguments, {f"--{name}" for name in ("overwrite", *FLAGS)}))
        self.searches: list[str] = []
        self.made: list[Path] = []  # files of this start, before its run
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=RunFolder if self.arguments[:1] == ["fit"] else None,
            save_config_kwargs={"keep": self.made},
            trainer_class=InspectTrainer if self.arguments[:1] == ["inspect"] else ChatTrainer,
            trainer_defaults={
                "default_root_dir": "runs/default",
                "use_distributed_sampler": False,
                "callbacks": [GracefulStop(), ProcessWatch()],
            },
            seed_everything_default=0,
            parser_class=ChatArgumentParser,
            auto_configure_optimizers=False,
            args=self.arguments,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # Lightning's is static, and called on self
        """The verb that was asked for, and what of its Trainer method is no setting; a parser for each of them would take its time."""
        known = {**super().subcommands(), "inspect": {"model", "datamodule"}}
        return {verb: known[verb] for verb in self.arguments[:1]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the callback groups and our defaults."""
        for cls, name in (
            (RunCheckpoint, "checkpoint"),
            (ExactResume, "resume"),
            (NonFiniteGuard, "nonfinite"),
            (SampleGeneration, "samples"),
            (PredictionWriter, "predictions"),
            (HuggingFaceExport, "export"),
            (TokenThroughput, "throughput"),
            (TestMetrics, "test_metrics"),
        ):
            parser.add_lightning_class_args(cls, name)
        parser.set_defaults({name: {"class_path": f"lightning_chatgpt.{cls.__name__}"} for name, cls in _CLASSES.items()})

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "fit":
            help_text = "Remove what an earlier run left in trainer.default_root_dir; --ckpt_path last goes on with it."
            parser.add_argument("--overwrite", type=bool, default=False, help=help_text)
            for flag, about in FLAGS.items():
                parser.add_argument(f"--{flag}", type=bool, default=False, help=about)
        if subcommand == "predict":
            parser.set_defaults({"return_predictions": False})  # they are written as they come, not kept
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Check every key, then parse."""
        verb, *rest = self.arguments
        actions = self._subcommand_parsers[verb]._actions
        known = {action.dest for action in actions if not action.dest.endswith(".help")} | {
            "help",
            "print_config",
            "model.help",
            "data.help",
        }
        check_keys(rest, self.configs, known=known - set(_CLASSES), classes=dict(_CLASSES))
        with warnings.catch_warnings():
            # LightningCLI thinks that whoever hands it arguments forgot about sys.argv; these are sys.argv's own.
            warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
            super().parse_arguments(parser, args)

    def _parse_ckpt_path(self) -> None:
        """Leave the settings as they were given: Lightning would let a checkpoint's beat the command line, unsaid."""

    def before_instantiate_classes(self) -> None:
        """Find the checkpoint, and refuse a run folder that holds a run, before anything else is done."""
        config = self.config[self.subcommand]
        asked = config["ckpt_path"]
        folder = Path(config["trainer"]["default_root_dir"])
        if config.get("weights_only") is False:
            raise ConfigError("weights_only false would let a checkpoint run code; checkpoints here are plain data: leave it out")
        if self.subcommand == "fit":
            self.searches = asked_searches(config)
        if config["ckpt_path"] is not None:
            found = find_checkpoint(config["ckpt_path"], Path(config["checkpoint"]["dirpath"] or folder / "checkpoints"))
            if found is not None and self.subcommand == "fit" and "optimizer_states" not in read_checkpoint(found):
                raise ConfigError(
                    f"{found}: holds weights alone, and a run cannot go on from it; export it, and begin anew with model.pretrained"
                )
            config["ckpt_path"] = str(found) if found is not None else None
        taken = [path for path in run_files(folder) if path.name not in _LEFT_BY_A_START and path.parent.name != "tensorboard"]
        if config.get("overwrite") and config["ckpt_path"] is not None:
            raise ConfigError("overwrite and ckpt_path exclude each other: a run is removed or gone on with; leave one out")
        if self.subcommand not in ("fit", "inspect") and taken and config["ckpt_path"] is None:
            rank_zero_warn(f"{self.subcommand} takes the model before training; for what {folder} learnt add --ckpt_path best")
        if self.subcommand != "fit" or not taken or config["overwrite"] or getattr(rank_zero_only, "rank", 0):
            return
        if config["ckpt_path"] is None and asked != "auto":
            raise ConfigError(
                f"{folder} holds an earlier run ({taken[0].name}); go on with it by --ckpt_path last, "
                "remove it by --overwrite true, or name another trainer.default_root_dir"
            )

    def instantiate_classes(self) -> None:
        """Search first, where that was asked for; then build the run of what was found."""
        settings = self.config[self.subcommand]
        for flag in self.searches:
            self.made += search(flag, settings, build=lambda: self.parser.instantiate_classes(self.config)[self.subcommand])
            # What was drawn in a search is drawn again, and checkpoints tell of the settings as they are now.
            self._set_seed()
            del self.config_dump
        super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the run folder's loggers."""
        config = self._get(self.config_init, "trainer")
        folder = config["default_root_dir"]
        if config["logger"] in (None, True):
            # Other verbs than fit would write over the run's own curves.
            kwargs["logger"] = self._loggers(folder) if self.subcommand == "fit" else False
        plugins = config["plugins"] or []
        kwargs["plugins"] = plugins = [*plugins] if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(DurableCheckpointIO())
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except ValueError as error:
            raise ConfigError(f"trainer: {' '.join(str(error).split())}") from None
        # Known before the data is set up, so that model and data take tokenizer and architecture from the checkpoint.
        settings = self.config_init[self.subcommand]
        trainer.ckpt_path, settings["ckpt_path"] = settings["ckpt_path"], None
        return trainer

    def _loggers(self, folder: str) -> list[Any]:
        path = self.config_init[self.subcommand]["ckpt_path"]
        # What was drawn after the checkpoint is drawn again.
        saved = read_plain(path).get("callbacks", {}).get("ExactResume") if path is not None else None
        purged = {"purge_step": saved["n_steps"]} if saved is not None else {}
        return [MetricsFile(folder), TensorBoardLogger(folder, name="tensorboard", version="", **purged)]


def run_trainer_verb(arguments: Sequence[str]) -> None:
    """Run fit, validate, test, predict or inspect.

    Args:
        arguments: The command line, from the verb on.

    Raises:
        UserError: Something the user gave cannot be used.
    """
    # A class_path in the working folder is found by `python -m`; by the console script only with this.
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    quieten()
    if os.environ.get("LIGHTNING_CHATGPT_KEEP_MEMORY", "1") != "0":
        keep_freed_memory()
    try:
        ChatCLI(arguments)
    except MisconfigurationException as error:
        raise ConfigError(" ".join(str(error).split())) from None
    except ValueError as error:
        # jsonargparse wraps what a class says of its own settings into a page about types.
        said: BaseException | None = error
        while said is not None and not isinstance(said, UserError):
            said = said.__cause__
        if said is None and (reason := union_reason(str(error))):
            raise ConfigError(reason) from None
        raise (said or error) from None
