"""CausalLMModule: a causal language model that learns to chat."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from lightning_chatgpt.chat.tokenizer import check_same_template, load_tokenizer, token_byte_lengths, tokenizer_from_state, tokenizer_state
from lightning_chatgpt.checkpoints.file import read_plain
from lightning_chatgpt.errors import ConfigError, ModelError
from lightning_chatgpt.generation.generate import generate_replies
from lightning_chatgpt.metrics.perplexity import BitsPerByte, MeanLoss, Perplexity, TokenAccuracy
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
from lightning_chatgpt.models.attention import Attention, set_attention
from lightning_chatgpt.models.kernels import blocks_of, use_fast_kernels
from lightning_chatgpt.models.loss import TokenLosses, check_head, token_losses
from lightning_chatgpt.models.module import ShardableModule
from lightning_chatgpt.models.optim import (
    build_optimizer,
    build_schedule,
    check_optimization,
    check_saved_classes,
    matrix_names,
    optimizer_class,
    set_optimization,
)
from lightning_chatgpt.models.step import StepLoss

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from lightning_chatgpt.data.collate import Batch, PromptBatch

Stage = Literal["val", "test"]
_OPTIMIZATION = ("learning_rate", "weight_decay", "optimizer", "warmup_steps", "schedule", "decay_steps")


class CausalLMModule(ShardableModule):
    """Wraps a causal language model of transformers: loss, metrics, optimizer, replies, checkpoints.

    Logs ``train_loss``, ``learning_rate``, ``val_loss`` (mean negative log-likelihood over supervised tokens, in nats), ``val_perplexity``,
    ``val_token_accuracy`` and, for byte-level tokenizers, ``val_bits_per_byte``; the same with ``test_`` when testing.

    The network is built when a Trainer has found the tokenizer (:meth:`configure_model`), or when a checkpoint is loaded.
    A subclass changes how by overriding :meth:`build_network`, :meth:`build_optimizer` or :meth:`build_metrics`.

    Args:
        pretrained: Weights to start from: a hub name such as ``gpt2``, a transformers folder, a run folder, or
            ``builtin:smalltalk``. null starts from scratch.
        architecture: A GPT-2 to start from scratch with, as settings of transformers' ``GPT2Config`` (n_layer, n_head, n_embd,
            n_positions, …). With ``pretrained``, only dropout (resid_pdrop, embd_pdrop, attn_pdrop) may be set.
        learning_rate: The highest learning rate.
        weight_decay: How much matrices decay; biases and layer norms do not.
        optimizer: The name of one of ``torch.optim``, or ``class_path`` and ``init_args`` of any.
        warmup_steps: Optimizer steps over which the learning rate grows to its highest; below 1, their share of the run.
        schedule: How the learning rate goes on from there to the end of the run: cosine or linear down to 0, constant, or wsd
            (constant, then down to 0 over the last ``decay_steps``); or ``class_path`` and ``init_args`` of one of torch's kind.
        decay_steps: Optimizer steps over which wsd falls, or their share of the run; null for a fifth of it.
        attention: How tokens attend: ``stretches`` (only within each example, which costs least), ``sdpa``, ``eager``,
            ``flash_attention_2`` (a GPU, and flash-attn), or ``auto``, which takes the fastest there is. Packed examples never see each
            other with any of them.
        gradient_checkpointing: Whether activations are computed again in the backward pass in place of being kept: less memory, a third
            more work.
        lora: Trains an adapter beside the frozen weights of ``pretrained`` (extra ``lora``): rank, alpha, dropout, targets, variant (lora,
            dora or rslora), quantize (4bit), save_base; {} takes the defaults.
        compile: Whether ``torch.compile`` makes kernels of each block, for GPUs; best with data.packing, where all batches have one shape.

    Raises:
        ConfigError: A setting is out of range, or there is nothing to start from.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        architecture: dict[str, Any] | None = None,
        learning_rate: float = 5e-5,
        weight_decay: float = 0.01,
        optimizer: str | dict[str, Any] = "adamw",
        warmup_steps: int | float = 0,
        schedule: str | dict[str, Any] = "cosine",
        decay_steps: int | float | None = None,
        attention: Attention = "auto",
        gradient_checkpointing: bool = False,
        compile: bool = False,
        lora: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if pretrained is None and architecture is None:
            raise ConfigError(
                "there is no model to start from; set model.pretrained (a hub name, a folder or builtin:smalltalk), "
                "or model.architecture to start from scratch"
            )
        check_optimization(
            optimizer=optimizer,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            schedule=schedule,
            warmup_steps=warmup_steps,
            decay_steps=decay_steps,
        )
        if lora is not None and pretrained is None:
            raise ConfigError("model.lora adapts weights that are there; set model.pretrained, or leave model.lora out")
        if compile and attention == "stretches":
            raise ConfigError("model.attention stretches differ in every batch, and model.compile would compile for each; leave one out")
        self.save_hyperparameters()
        self.pretrained = pretrained
        self.architecture = architecture
        self.lora = LoraSettings.of(lora) if lora is not None else None
        self._was_restored = False
        self._is_changed = False  # whether the run was begun with other optimization
        self._adapter: dict[str, Any] = {}  # what a checkpoint tells of the adapter
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.optimizer = optimizer
        self.warmup_steps = warmup_steps
        self.schedule = schedule
        self.decay_steps = decay_steps
        self.attention: Attention = attention
        self.gradient_checkpointing = gradient_checkpointing
        self.compiles = compile
        self.step_loss = StepLoss(self)
        self.tokenizer: PreTrainedTokenizerFast | None = None
        self.network: PreTrainedModel
        self.metrics = nn.ModuleDict()
        self._matrices: frozenset[str] = frozenset()  # of the network as it is before it is cut among devices

    # What a subclass may say in its own way.

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

    def build_optimizer(self) -> Optimizer:
        """Build the optimizer of what is trained, matrices decaying and vectors not."""
        return build_optimizer(
            self,
            optimizer=self.optimizer,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            matrices=self._matrices,
        )

    def build_metrics(self, tokenizer: PreTrainedTokenizerFast) -> nn.ModuleDict:
        """Build the metrics of one stage, by the name they are logged under."""
        metrics = {"loss": MeanLoss(), "perplexity": Perplexity(), "token_accuracy": TokenAccuracy()}
        byte_lengths = token_byte_lengths(tokenizer)
        if byte_lengths is not None:
            metrics["bits_per_byte"] = BitsPerByte(byte_lengths)
        return nn.ModuleDict(metrics)

    # Tokenizer and network.

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
        self._install(self.build_network(tokenizer), tokenizer)

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

    def _description(self) -> dict[str, Any]:
        """What the network is, its weights aside."""
        assert self.tokenizer is not None
        return {
            "architecture": json.dumps(json.loads(self.network.config.to_json_string(use_diff=False))),
            "tokenizer": tokenizer_state(self.tokenizer),
            **({"adapter": self._adapter} if self._adapter else {}),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build the network that the checkpoint's weights fit.

        Raises:
            ModelError: The network is built already, for another tokenizer.
        """
        saved = checkpoint[build.CHECKPOINT_KEY]
        self._was_restored = self._trainer is not None and self.trainer.state.fn == "fit"
        self._is_changed = self._was_restored and self._compare_optimization(checkpoint.get("hyper_parameters", {}))
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

    def _compare_optimization(self, saved: Mapping[str, Any]) -> bool:
        """Whether a checkpoint was made with other optimization than this module is to go on with.

        Raises:
            ConfigError: It was made with an optimizer whose state another cannot take over.
        """
        check_saved_classes(saved)
        then, now = (optimizer_class(optimizer) for optimizer in (saved.get("optimizer", self.optimizer), self.optimizer))
        if then is not now:
            raise ConfigError(
                f"model.optimizer {now.__name__} cannot go on with the state of the checkpoint's {then.__name__}; keep that, "
                "or begin a new run from its weights (model.pretrained)"
            )
        return any(saved.get(name, getattr(self, name)) != getattr(self, name) for name in _OPTIMIZATION)

    def _build_from_checkpoint(self, saved: dict[str, Any]) -> None:
        tokenizer = tokenizer_from_state(saved["tokenizer"])
        self._adapter = saved.get("adapter", {})
        self._install(build.network_from_checkpoint(saved, tokenizer=tokenizer), tokenizer)

    def _install(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
        check_head(network)
        self.tokenizer = tokenizer
        self.network = network.train()  # from_pretrained leaves it in evaluation mode, with dropout off
        self._matrices = matrix_names(self)
        chosen = set_attention(network, "sdpa" if self.compiles and self.attention == "auto" else self.attention)
        use_fast_kernels(network)
        if self.gradient_checkpointing:
            network.gradient_checkpointing_enable({"use_reentrant": False})
        if self.compiles:
            for block in blocks_of(network):
                block.compile()
        self.shard()
        if self._trainer is not None and self._trainer.state.fn == "fit":
            rank_zero_info(chosen)
        self.metrics = nn.ModuleDict({stage: self.build_metrics(tokenizer) for stage in ("val", "test")})

    def _checkpoint_to_come(self) -> dict[str, Any] | None:
        path = getattr(self._trainer, "ckpt_path", None)
        if path is None:
            return None
        saved: dict[str, Any] = build.read_checkpoint(path)[build.CHECKPOINT_KEY]
        return saved

    # Training and evaluation: one step for all.

    def score(self, batch: Batch) -> TokenLosses:
        """Run the network over a batch and score its supervised tokens."""
        return self.run(token_losses, batch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Score a micro-batch.

        Returns: what is to be back-propagated: its share of the optimizer step's loss, up to a factor that :meth:`optimizer_step` sets
        right when all shares are known.
        """
        self.check_gathered(False)
        return self.step_loss.add(self.score(batch))

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None) -> None:
        """Make the gradients those of the mean over the whole step's supervised tokens, clip, step, and free them. Called by Lightning."""
        assert optimizer_closure is not None
        super().optimizer_step(epoch, batch_idx, optimizer, partial(self.step_loss.closure, optimizer_closure))
        if not self.trainer.strategy.handles_gradient_accumulation:
            optimizer.zero_grad()  # Lightning keeps them through the next forward pass, where memory is at its peak

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log ``train_loss``, in nats, and the learning rate of the optimizer step that was just made."""
        for name, value in self.step_loss.made.items():
            self.log(name, value, prog_bar=name == "train_loss")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Score a batch into the validation metrics."""
        self._evaluation_step(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Score a batch into the test metrics."""
        self._evaluation_step(batch, "test")

    def _evaluation_step(self, batch: Batch, stage: Stage) -> None:
        self.check_gathered(True)
        losses = self.score(batch)
        metrics: Any = self.metrics[stage]
        for name, metric in metrics.items():
            if isinstance(metric, MeanLoss):
                metric.update(losses.nll, losses.weights)
            elif isinstance(metric, BitsPerByte):
                metric.update(losses.nll, losses.targets)
            else:
                metric.update(losses.is_correct)
            shown = name in ("loss", "perplexity")
            self.log(f"{stage}_{name}", metric, prog_bar=shown, on_step=False, on_epoch=True, batch_size=1)

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Answer a batch of prompts greedily.

        Returns: for each conversation its id, prompt messages, reply, reference, token counts and finish reason.
        """
        assert self.tokenizer is not None
        self.check_gathered(True)
        replies = generate_replies(self.network, self.tokenizer, batch["prompt_ids"], max_new_tokens=batch["max_new_tokens"])
        return [
            {
                "id": chat["id"],
                "prompt": chat["prompt"],
                "reply": reply.text,
                "reference": chat["reference"],
                "prompt_tokens": len(prompt_ids),
                "completion_tokens": reply.n_tokens,
                "finish_reason": reply.finish_reason,
            }
            for chat, prompt_ids, reply in zip(batch["conversations"], batch["prompt_ids"], replies, strict=True)
        ]

    def configure_optimizers(self) -> Any:
        """The optimizer, and the schedule stepped after each of its steps. Called by Lightning."""
        optimizer = self.build_optimizer()
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self._build_schedule(optimizer), "interval": "step"}}

    def _build_schedule(self, optimizer: Optimizer) -> LRScheduler:
        return build_schedule(
            optimizer,
            schedule=self.schedule,
            warmup_steps=self.warmup_steps,
            decay_steps=self.decay_steps,
            total_steps=self.trainer.estimated_stepping_batches,
        )

    def on_train_start(self) -> None:
        """Let this module's own optimization hold where a run goes on that was begun with another. Called by Lightning."""
        is_own = type(self).configure_optimizers is CausalLMModule.configure_optimizers
        if self._was_restored and is_own and not self.trainer.strategy.handles_gradient_accumulation:
            fresh = self.build_optimizer()
            schedule: Any = self.lr_schedulers()
            fresh_schedule = self._build_schedule(fresh)
            # A schedule of another's making is not stepped through anew without need.
            if self._is_changed or isinstance(fresh_schedule, LambdaLR):
                set_optimization(self.trainer.optimizers[0], schedule, fresh=fresh, fresh_schedule=fresh_schedule)
        self._was_restored = False

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
