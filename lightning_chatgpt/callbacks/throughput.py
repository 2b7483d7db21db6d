"""TokenThroughput: Lightning's ThroughputMonitor, counting real tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import ThroughputMonitor
from lightning.pytorch.trainer.states import RunningStage

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


def _n_rows(batch: Any) -> int:
    return int(batch["input_ids"].size(0))


def _n_tokens(batch: Any) -> int:
    return int(batch["attention_mask"].sum())


class TokenThroughput(ThroughputMonitor):
    """Logs ``tokens_per_second`` of all devices over the last batches; padding and validation are left out.

    Args:
        window_size: Batches the speed is averaged over.
    """

    def __init__(self, window_size: int = 20) -> None:
        super().__init__(batch_size_fn=_n_rows, length_fn=_n_tokens, window_size=window_size)
        self._module_has_flops = False  # or Lightning warns that it cannot count them

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Count for the processes that read rows of their own: those that split a model's layers read the same."""
        super().setup(trainer, pl_module, stage)
        shares = trainer.distributed_sampler_kwargs
        for throughput in self._throughputs.values():
            throughput.world_size = shares["num_replicas"] if shares else 1

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any) -> None:
        """Count a batch and log the speed once the window is full."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, *args)
        if trainer.is_global_zero:
            figures = self._throughputs[RunningStage.TRAINING].compute()
            speed = figures.get("items_per_sec", figures.get("device/items_per_sec"))
            if speed is not None:
                pl_module.log("tokens_per_second", speed, prog_bar=True, rank_zero_only=True)

    def _compute(self, trainer: Trainer, iter_num: int | None = None) -> None:
        """Lightning's own log of a dozen figures with slashes in their names is left out."""

    def on_predict_batch_end(self, *args: Any) -> None:
        """Prompts are no token batches; their speed is not counted."""
