"""StandaloneModule: a LightningModule whose checkpoints need nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_chatgpt.chat.tokenizer import check_same_template, load_tokenizer, tokenizer_from_state, tokenizer_state
from lightning_chatgpt.checkpoints.file import read_plain
from lightning_chatgpt.errors import ConfigError, ModelError
from lightning_chatgpt.models import build
from lightning_chatgpt.models.adapters import (
    LoraSettings,
    adapter_state,
    add_adapter,
    find_new_tokens,
    has_adapter,
    load_adapter_state,
    merge_adapter,
    weights_digest,
)
from lightning_chatgpt.models.loss import check_head
from lightning_chatgpt.models.module import ShardableModule
from lightning_chatgpt.models.optim import check_saved_classes
from lightning_chatgpt.models.step import StepLoss

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


class StandaloneModule(ShardableModule):
    """Has a causal language model and its tokenizer: from weights, from scratch, or from a checkpoint, which holds both; and exports them.

    Args:
        pretrained: Weights to start from; None from scratch.
        architecture: The network to start from scratch with, or what differs from the weights'.
        lora: The adapter to train.

    Attributes:
        network: The causal language model of transformers, once it is built.
        tokenizer: Its tokenizer; None until then.
        kept_settings: Names of settings whose values in a checkpoint stay where a run goes on from it, whatever they are now.

    Raises:
        ConfigError: There is nothing to start from.
    """

    kept_settings = frozenset({"pretrained", "architecture", "lora"})

    def __init__(self, pretrained: str | None, architecture: dict[str, Any] | None, lora: dict[str, Any] | None) -> None:
        super().__init__()
        if pretrained is None and architecture is None:
            raise ConfigError(
                "there is no model to start from; set model.pretrained (a hub name, a folder or builtin:smalltalk), "
                "or model.architecture to start from scratch"
            )
        if lora is not None and pretrained is None:
            raise ConfigError("model.lora adapts weights that are there; set model.pretrained, or leave model.lora out")
        self.pretrained = pretrained
        self.architecture = architecture
        self.lora = LoraSettings.of(lora) if lora is not None else None
        self.tokenizer: PreTrainedTokenizerFast | None = None
        self._adapter: dict[str, Any] = {}  # what a checkpoint tells of the adapter

    def build_network(self, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
        """Build the network for a tokenizer: from weights, or from scratch."""
        if self.pretrained is None:
            return build.network_from_scratch(self.architecture or {}, tokenizer=tokenizer)
        folder = build.find_pretrained(self.pretrained)
        quantized = self.lora is not None and self.lora.quantize is not None
        network = build.build_network(folder, tokenizer=tokenizer, architecture=self.architecture, quantized=quantized)
        if self.lora is not None:
            new = find_new_tokens(folder, tokenizer=tokenizer)
            self._adapter = {"base": self.pretrained, "digest": weights_digest(folder), "new_token_ids": new, "settings": asdict(self.lora)}
            add_adapter(network, self.lora, new_token_ids=new)
        return network

    @property
    def is_built(self) -> bool:
        """Whether the network is there."""
        return self.tokenizer is not None

    def load_tokenizer(self, *, template: str | None = None) -> PreTrainedTokenizerFast | None:
        """The tokenizer of the weights, before the network is built.

        Args:
            template: The chat template it is to carry, as ``chat.tokenizer.set_template`` takes it.

        Returns: that of the network, of the checkpoint the Trainer is about to load, or of the pretrained weights; None
            for a model from scratch, which takes whatever tokenizer the data has.
        """
        checkpoint = self._checkpoint_to_come()
        if self.tokenizer is not None or checkpoint is not None:
            tokenizer = self.tokenizer or tokenizer_from_state(checkpoint["tokenizer"] if checkpoint else {})
            check_same_template(tokenizer, template)
            return tokenizer
        return load_tokenizer(build.find_pretrained(self.pretrained), template=template) if self.pretrained is not None else None

    def max_positions(self) -> int:
        """How many tokens an example may have at the most."""
        if self.is_built:
            config = self.network.config
        elif (checkpoint := self._checkpoint_to_come()) is not None:
            architecture = json.loads(checkpoint["architecture"])
            return int(architecture.get("n_positions") or architecture["max_position_embeddings"])
        elif self.pretrained is not None:
            config = build.read_config(build.find_pretrained(self.pretrained))
        else:
            config = build.scratch_config(self.architecture or {})
        return int(config.max_position_embeddings)

    def configure_model(self) -> None:
        """Build the network, once the Trainer's data module has its tokenizer. Called by Lightning."""
        if self._trainer is None:
            return  # this is load_from_checkpoint, which brings its own in on_load_checkpoint
        StepLoss.check(self.trainer.strategy)
        if self.is_built:
            self.shard()
            return
        checkpoint = self._checkpoint_to_come()
        if checkpoint is not None and self.device_mesh is not None and build.holds_adapter_only(checkpoint):
            raise ConfigError(
                "a sharded network cannot be filled from an adapter alone; train it with model.lora.save_base true, or use strategy ddp"
            )
        if checkpoint is not None:
            self._build_from_checkpoint(checkpoint)
            return
        tokenizer = getattr(getattr(self.trainer, "datamodule", None), "tokenizer", None) or self.load_tokenizer()
        if tokenizer is None:
            raise ConfigError("a model from scratch needs a tokenizer; train with a ChatDataModule or a TextDataModule")
        self.install(self.build_network(tokenizer), tokenizer)

    def install(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
        """Take a network that was built.

        Raises:
            ConfigError: It is of no kind that can be trained here.
        """
        check_head(network)
        self.network, self.tokenizer = network, tokenizer

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *arguments: Any, **settings: Any) -> Any:
        """Load a module from a checkpoint file of plain data; that never runs code.

        Args:
            checkpoint_path: The file.
            *arguments: As Lightning's own takes them.
            **settings: Likewise, and settings of this class that are to be others than the checkpoint's. A class that its own name is
                one of a module that is imported already.

        Raises:
            ModelError: It is not there, damaged, holds more than plain data, or names a class of a module that is not imported.
        """
        check_saved_classes({**read_plain(checkpoint_path).get(cls.CHECKPOINT_HYPER_PARAMS_KEY, {}), **settings})
        return super().load_from_checkpoint(checkpoint_path, *arguments, **{**settings, "weights_only": True})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what a checkpoint needs to stand alone: architecture and tokenizer, as plain text."""
        checkpoint[build.CHECKPOINT_KEY] = self._description()
        if build.holds_adapter_only(checkpoint[build.CHECKPOINT_KEY]):
            kept = {f"{build.NETWORK_PREFIX}{name}" for name in adapter_state(self.network)}
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {k: v for k, v in state.items() if k in kept or not k.startswith(build.NETWORK_PREFIX)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build the network that the checkpoint's weights fit.

        Raises:
            ModelError: The network is built already, for another tokenizer.
        """
        saved = checkpoint[build.CHECKPOINT_KEY]
        if self.tokenizer is None:
            self._build_from_checkpoint(saved)
        elif tokenizer_from_state(saved["tokenizer"]).get_vocab() != self.tokenizer.get_vocab():
            raise ModelError(
                "the checkpoint's tokenizer is not the data's; load the model by load_from_checkpoint first, "
                "or set trainer.ckpt_path before fit, validate or predict"
            )
        if self._adapter.get("digest") != saved.get("adapter", {}).get("digest"):
            raise ModelError("the checkpoint's adapter was trained on other weights; set model.pretrained and model.lora as it was trained")
        if build.holds_adapter_only(saved):
            load_adapter_state(self.network, build.network_state(checkpoint))
            # The base's weights are there already; what Lightning loads strictly is to be whole.
            checkpoint["state_dict"] = {**self.state_dict(), **checkpoint["state_dict"]}

    def export(self, folder: str | Path, *, checkpoint: str | Path | None = None, facts: Mapping[str, object] | None = None) -> Path:
        """Write the network as a plain transformers folder.

        While a Trainer has it cut among devices, all processes call this without ``checkpoint``, and the first writes.

        Args:
            folder: Where to.
            checkpoint: Weights to take in place of the current ones, such as the best of the run.
            facts: What the model card tells besides, such as the validation loss.

        Raises:
            ModelError: The checkpoint cannot be read.
        """
        from lightning_chatgpt.models.export import export_folder

        assert self.tokenizer is not None
        network = build.load_model(checkpoint).network if checkpoint is not None else self.network
        if checkpoint is None and self.is_sharded:
            state = self.whole_state()
            if not self.trainer.is_global_zero:
                return Path(folder)
            network = build.network_from_checkpoint(self._description(), tokenizer=self.tokenizer)
            network.load_state_dict(state)
        if has_adapter(network):
            network = merge_adapter(network)
        told = {"Started from": self.pretrained or "scratch", **(facts or {})}
        return export_folder(network, self.tokenizer, folder, facts=told)

    def _description(self) -> dict[str, Any]:
        """What the network is, its weights aside."""
        assert self.tokenizer is not None
        return {
            "architecture": json.dumps(json.loads(self.network.config.to_json_string(use_diff=False))),
            "tokenizer": tokenizer_state(self.tokenizer),
            **({"adapter": self._adapter} if self._adapter else {}),
        }

    def _build_from_checkpoint(self, saved: dict[str, Any]) -> None:
        tokenizer = tokenizer_from_state(saved["tokenizer"])
        self._adapter = saved.get("adapter", {})
        self.install(build.network_from_checkpoint(saved, tokenizer=tokenizer), tokenizer)

    def _checkpoint_to_come(self) -> dict[str, Any] | None:
        path = getattr(self._trainer, "ckpt_path", None)
        if path is None:
            return None
        saved: dict[str, Any] = build.read_checkpoint(path)[build.CHECKPOINT_KEY]
        return saved
