"""CausalLMModule: a causal language model that learns to chat."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from lightning_chatgpt.chat.tokenizer import token_byte_lengths
from lightning_chatgpt.errors import ConfigError
from lightning_chatgpt.generation.generate import generate_replies
from lightning_chatgpt.metrics.perplexity import BitsPerByte, MeanLoss, Perplexity, TokenAccuracy
from lightning_chatgpt.models.attention import Attention, set_attention
from lightning_chatgpt.models.kernels import blocks_of, use_fast_kernels
from lightning_chatgpt.models.loss import TokenLosses, token_losses
from lightning_chatgpt.models.optim import (
    build_optimizer,
    build_schedule,
    check_optimization,
    check_saved_classes,
    matrix_names,
    optimizer_class,
    set_optimization,
)
from lightning_chatgpt.models.standalone import StandaloneModule
from lightning_chatgpt.models.step import StepLoss

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from lightning_chatgpt.data.collate import Batch, PromptBatch

Stage = Literal["val", "test"]
_OPTIMIZATION = ("learning_rate", "weight_decay", "optimizer", "warmup_steps", "schedule", "decay_steps")


class CausalLMModule(StandaloneModule):
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
        super().__init__(pretrained, architecture, lora)
        check_optimization(
            optimizer=optimizer,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            schedule=schedule,
            warmup_steps=warmup_steps,
            decay_steps=decay_steps,
        )
        if compile and attention == "stretches":
            raise ConfigError("model.attention stretches differ in every batch, and model.compile would compile for each; leave one out")
        self.save_hyperparameters()
        self._was_restored = False
        self._is_changed = False  # whether the run was begun with other optimization
        self._total_steps: float = 0  # of the run
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
        self.metrics = nn.ModuleDict()
        self._matrices: frozenset[str] = frozenset()  # of the network as it is before it is cut among devices

    # What a subclass may say in its own way.

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

    def install(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
        """Take a network that was built, and make it ready to be trained."""
        super().install(network.train(), tokenizer)  # from_pretrained leaves it in evaluation mode, with dropout off
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
        self._total_steps = self.trainer.estimated_stepping_batches
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self._build_schedule(optimizer), "interval": "step"}}

    def _build_schedule(self, optimizer: Optimizer) -> LRScheduler:
        return build_schedule(
            optimizer,
            schedule=self.schedule,
            warmup_steps=self.warmup_steps,
            decay_steps=self.decay_steps,
            total_steps=self._total_steps,
        )

    # A run that goes on: Lightning restores the optimizer with the settings it was saved with.

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over the checkpoint's network; see whether the run was begun with other optimization. Called by Lightning."""
        super().on_load_checkpoint(checkpoint)
        if self._trainer is None or self.trainer.state.fn != "fit":
            return
        if type(self).configure_optimizers is CausalLMModule.configure_optimizers:
            self._is_changed = self._compare_optimization(checkpoint.get("hyper_parameters", {}))
            self._was_restored = not self.trainer.strategy.handles_gradient_accumulation
        if not self._was_restored:
            self.kept_settings = self.kept_settings | {"learning_rate", "weight_decay"}

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

    def on_train_start(self) -> None:
        """Let this module's own optimization hold where a run goes on that was begun with another. Called by Lightning."""
        if self._was_restored:
            fresh = self.build_optimizer()
            schedule: Any = self.lr_schedulers()
            fresh_schedule = self._build_schedule(fresh)
            # A schedule of another's making is not stepped through anew without need.
            if self._is_changed or isinstance(fresh_schedule, LambdaLR):
                set_optimization(self.trainer.optimizers[0], schedule, fresh=fresh, fresh_schedule=fresh_schedule)
        self._was_restored = False
