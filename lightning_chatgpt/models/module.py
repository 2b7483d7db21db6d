"""ShardableModule: a LightningModule whose network may be cut among devices."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from lightning_chatgpt.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer
    from transformers import PreTrainedModel

Result = TypeVar("Result")


class ShardableModule(LightningModule):
    """Does what a strategy that cuts networks asks of a module. Where nothing is cut, it does what any module does.

    Attributes:
        network: A causal language model of transformers.
    """

    network: PreTrainedModel

    def __init__(self) -> None:
        super().__init__()
        self._evaluation = ExitStack()
        self._is_gathered = False

    # What is cut brings imports of its own, which take their time: they wait until they are needed.

    @property
    def is_sharded(self) -> bool:
        """Whether the Trainer's strategy cuts the network."""
        return self._trainer is not None and isinstance(self.trainer.strategy, ModelParallelStrategy | FSDPStrategy | DeepSpeedStrategy)

    def shard(self) -> None:
        """Cut the network, where that is the module's own affair (FSDP2), and unless it is cut already."""
        if self.device_mesh is not None:
            from lightning_chatgpt.models.sharding import is_cut, shard

            if not is_cut(self.network):
                shard(self.network, self.device_mesh)

    def run(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Call ``function(network, *arguments)``, which may use parameters outside the network's own forward."""
        if self.device_mesh is None:
            return function(self.network, *arguments)
        from lightning_chatgpt.models.sharding import run

        return run(self.network, function, *arguments)

    def gathered(self) -> AbstractContextManager[None]:
        """A context in which each process has the whole network, and runs it without the others. All of them enter and leave it."""
        if not self.is_sharded:
            return nullcontext()
        from lightning_chatgpt.models.sharding import gathered

        return gathered(self._wrapped)

    def whole_state(self) -> dict[str, Tensor]:
        """The network's weights, whole, in the first process, and nothing in the others. All of them take part."""
        from lightning_chatgpt.models.sharding import whole_state

        return whole_state(self.network, wrapped=self._wrapped)

    @property
    def _wrapped(self) -> Any:
        return self.trainer.strategy.model

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip the gradients, cut among devices or not. Called by Lightning."""
        is_cut = isinstance(self.trainer.strategy, ModelParallelStrategy | FSDPStrategy)  # DeepSpeed's engine clips by itself
        if not is_cut or not gradient_clip_val or gradient_clip_algorithm == "value":
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        from lightning_chatgpt.models.sharding import clip_gradients

        clip_gradients(list(self.parameters()), gradient_clip_val, wrapped=self._wrapped)

    def on_validation_epoch_start(self) -> None:
        """Hold a sharded network whole: processes may have other numbers of batches. Called by Lightning."""
        self._evaluation.enter_context(self.gathered())
        self._is_gathered = True

    def on_validation_epoch_end(self) -> None:
        """Cut it again. Called by Lightning."""
        self.release()

    def release(self) -> None:
        """Cut a sharded network again that an evaluation holds whole."""
        self._evaluation.close()
        self._is_gathered = False

    on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_predict_epoch_end = on_validation_epoch_end

    def check_gathered(self, expected: bool) -> None:
        """Make sure that a sharded network is whole where it is to be, and nowhere else.

        Raises:
            ConfigError: A subclass has kept the hooks above from being called, and processes would wait for each other for ever.
        """
        if self.is_sharded and self._is_gathered is not expected:
            name = type(self).__name__
            raise ConfigError(f"{name} overrides an on_…_epoch_start or on_…_epoch_end of evaluation; call super()'s in there, too")
