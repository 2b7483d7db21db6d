"""Lightning's strategies as this package uses them: FSDP2 with tensor parallelism, and DeepSpeed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from lightning_chatgpt.checkpoints.file import read_plain
from lightning_chatgpt.errors import ConfigError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from torch.optim import Optimizer


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's ``ModelParallelStrategy`` as this package uses it: FSDP2, and tensor parallelism where it is asked for.

    The data-parallel size is what the tensor-parallel size leaves of all devices, on any number of nodes. Checkpoints are single files
    that load anywhere, as those of one device are.

    Args:
        tensor_parallel_size: Devices that share each layer's work on the same rows. They wait for each other several times a layer: keep
            them in one node.

    Raises:
        ConfigError: The size does not divide the number of devices, or their processes would draw other random numbers.
    """

    def __init__(self, tensor_parallel_size: int = 1) -> None:
        super().__init__(tensor_parallel_size=tensor_parallel_size, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Lay the devices out as a mesh, data-parallel by tensor-parallel."""
        n_devices, size = self.num_nodes * self.num_processes, int(self._tensor_parallel_size)
        if size < 1 or n_devices % size:
            raise ConfigError(f"tensor_parallel_size {size} does not divide the {n_devices} devices; take one that does")
        if size > 1 and "PL_GLOBAL_SEED" not in os.environ:
            raise ConfigError(f"tensor_parallel_size {size} needs one seed in all processes, for weights and dropout; set seed_everything")
        self._data_parallel_size = n_devices // size  # Lightning's "auto" is the number of nodes
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """Move the module's shards to their devices.

        Raises:
            ConfigError: The module has parameters that are not cut, whose copies would part.
        """
        assert self.model is not None
        if not any(isinstance(part, FSDPModule) for part in self.model.modules()):
            name = type(self.lightning_module).__name__
            raise ConfigError(f"{name}.configure_model leaves the network whole; call super().configure_model(), or models.sharding.shard")
        whole = [name for name, p in self.model.named_parameters() if p.requires_grad and not isinstance(p, DTensor)]
        if whole:
            raise ConfigError(f"{whole[0]} is trained and not cut with the network: its copies would part; freeze it, or take strategy ddp")
        super().setup(trainer)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Whether Lightning calls :meth:`load_optimizer_state_dict`."""
        return True

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint of plain data, and load the network's shards."""
        read_plain(checkpoint_path)  # whole, and without code
        optimizers, self.optimizers = self.optimizers, []  # Lightning takes their states for one group's, whoever saved them
        try:
            return super().load_checkpoint(checkpoint_path, True)
        finally:
            self.optimizers = optimizers

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the optimizers' shards from states that are whole, as every strategy with single files saves them."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            ids = [i for group in saved["param_groups"] for i in group["params"]]
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            state = {i: _like(parameter, saved["state"].get(i, {})) for i, parameter in zip(ids, parameters, strict=True)}
            optimizer.load_state_dict({**saved, "state": state})


class ZeroStrategy(DeepSpeedStrategy):
    """Lightning's ``DeepSpeedStrategy``, with a loss that is exact over accumulated micro-batches too.

    Args:
        stage: What is cut among the devices: 1 optimizer states, 2 gradients too, 3 parameters too.

    Raises:
        ConfigError: There is no deepspeed.
    """

    def __init__(self, stage: Literal[1, 2, 3] = 2) -> None:
        if find_spec("deepspeed") is None:
            raise ConfigError("trainer.strategy ZeroStrategy needs the package deepspeed; pip install deepspeed")
        super().__init__(stage=stage)

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Let the network be built whole: DeepSpeed would cut each layer before its weights are loaded. The engine cuts it later."""
        yield

    def setup(self, trainer: Trainer) -> None:
        """Make the engine.

        Raises:
            ConfigError: Losses would be scaled by float16's own rule, too.
        """
        if str(self.precision_plugin.precision).startswith("16"):
            raise ConfigError(f"trainer.precision {self.precision_plugin.precision} and ZeroStrategy exclude each other; take bf16-mixed")
        super().setup(trainer)

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Back-propagate. Lightning has divided the loss by the step's micro-batches; the engine is not to do so once more."""
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    @property
    def is_last_of_step(self) -> bool:
        """Whether the engine steps after the micro-batch whose gradients were just taken."""
        return bool(self.deepspeed_engine.is_gradient_accumulation_boundary())

    def scale_gradients(self, factor: Tensor) -> None:
        """Multiply the gradients of the step that is about to be made, which the engine holds, before it clips them; shape ()."""
        self.deepspeed_engine.optimizer.override_loss_scale(1.0 / factor.item())

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Run a micro-batch and, after the last one, step."""
        result = super().optimizer_step(optimizer, closure, model, **kwargs)
        self.deepspeed_engine.optimizer.override_loss_scale(1.0)  # or the next losses would be scaled
        return result


def _like(parameter: DTensor, state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state of a parameter, cut as the parameter is; what has another shape, such as a step count, stays whole."""
    return {
        name: distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        if isinstance(value, Tensor) and value.shape == parameter.shape
        else value
        for name, value in state.items()
    }
