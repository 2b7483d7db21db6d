"""A network cut among devices: FSDP2, tensor parallelism inside its layers where it is asked for; and cut gradients.

Shapes: B rows, T tokens, D the width of the network, t the devices of a tensor-parallel group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from math import prod
from types import MethodType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed import all_reduce, get_rank, get_world_size, is_initialized
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from lightning_chatgpt.errors import ConfigError
from lightning_chatgpt.models.kernels import blocks_of
from lightning_chatgpt.models.optim import clean_name
from lightning_chatgpt.models.step import scale_gradients

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel

Result = TypeVar("Result")

_MARK = "_is_fsdp_managed_module"  # by which transformers knows a sharded network


def shard(network: PreTrainedModel, device_mesh: DeviceMesh) -> None:
    """Cut a network's parameters, gradients and optimizer states among devices, in place.

    Every process has built the whole network, with the same weights. Functions that use its parameters outside its own forward go
    through :func:`run`.

    Args:
        network: A causal language model of transformers; for tensor parallelism a GPT-2.
        device_mesh: With dimensions ``data_parallel`` and ``tensor_parallel``, as Lightning's ``ModelParallelStrategy`` makes it.

    Raises:
        ConfigError: Tensor parallelism of that size does not fit the network.

    Source: Rajbhandari et al. 2020, section 5 (stage 3: all is cut); Shoeybi et al. 2019, section 3 (tensor parallelism).
    """
    data, tensor = device_mesh["data_parallel"], device_mesh["tensor_parallel"]
    blocks = blocks_of(network)
    if tensor.size() > 1:
        _split_layers(network, blocks, tensor)

    def placement(parameter: nn.Parameter) -> Shard | None:
        # Where tensor parallelism has dealt out the rows, FSDP deals out the columns: what is cut twice along one dimension is slow to
        # gather, and torch cannot load it where the pieces are uneven.
        has_rows = parameter.ndim == 2 and isinstance(parameter, DTensor) and parameter.placements == (Shard(0),)
        return Shard(1) if has_rows and parameter.size(1) % data.size() == 0 else None

    for module in (*blocks, network):
        fully_shard(module, mesh=data, shard_placement_fn=placement)
    network._run = MethodType(lambda whole, function, *arguments: function(whole, *arguments), network)  # type: ignore[assignment]
    register_fsdp_forward_method(network, "_run")


def is_cut(network: nn.Module) -> bool:
    """Whether :func:`shard` has been here."""
    return isinstance(network, FSDPModule)


def run(network: PreTrainedModel, function: Callable[..., Result], *arguments: Any) -> Result:
    """Call ``function(network, *arguments)`` as if it were the network's forward.

    With FSDP2 embeddings, head and the last layer norm are whole only while the network's forward runs, and a loss that multiplies by
    the head's weight takes the place of it.
    """
    if isinstance(network, FSDPModule):
        result: Result = network._run(function, *arguments)  # type: ignore[operator]
        return result
    return function(network, *arguments)


# Tensor parallelism. transformers' GPT-2 has Conv1D layers, whose weights are (in, out): the transpose of nn.Linear's.


def _split_layers(network: PreTrainedModel, blocks: Sequence[Any], mesh: DeviceMesh) -> None:
    from transformers.pytorch_utils import Conv1D

    if network.config.model_type != "gpt2":
        raise ConfigError(f"tensor_parallel_size {mesh.size()}: {network.config.model_type} cannot be split, only gpt2; set it to 1")
    if network.config.n_head % mesh.size():
        raise ConfigError(
            f"tensor_parallel_size {mesh.size()} does not divide the model's {network.config.n_head} heads; take one that does"
        )
    for block in blocks:
        attention, mlp = block.attn, block.mlp
        if any(type(layer) is not Conv1D for layer in (attention.c_attn, attention.c_proj, mlp.c_fc, mlp.c_proj)):
            raise ConfigError(
                f"tensor_parallel_size {mesh.size()} splits plain layers, and these have adapters; set it to 1, or leave them out"
            )
        _split_heads(attention, mesh)
        _split_rows(attention.c_proj, mesh)
        _split_columns(mlp.c_fc, mesh)
        _split_rows(mlp.c_proj, mesh)


def _split_columns(layer: Any, mesh: DeviceMesh) -> None:
    """Each device makes its own outputs: (B, T, in) -> (B, T, out / t)."""
    layer.weight = _distributed(layer.weight, mesh, Shard(1))
    layer.bias = _distributed(layer.bias, mesh, Replicate())
    layer.register_forward_pre_hook(lambda _, inputs: (DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False),))
    layer.register_forward_hook(lambda _, __, output: output.to_local())


def _split_rows(layer: Any, mesh: DeviceMesh) -> None:
    """Each device takes its own inputs, and what they make of them is summed: (B, T, in / t) -> (B, T, out)."""
    layer.weight = _distributed(layer.weight, mesh, Shard(0))
    layer.bias = _distributed(layer.bias, mesh, Replicate())
    layer.register_forward_pre_hook(lambda _, inputs: (DTensor.from_local(inputs[0], mesh, [Shard(2)], run_check=False),))
    layer.register_forward_hook(lambda _, __, output: output.redistribute(placements=[Replicate()]).to_local())


def _split_heads(attention: Any, mesh: DeviceMesh) -> None:
    """Each device attends with its own heads: (B, T, D) -> (B, T, 3 · D / t).

    Queries, keys and values stand side by side in one weight (D, 3 · D), so that an even cut of it parts no heads. It lies cut evenly
    all the same, as checkpoints and FSDP need it; to compute, it is gathered and a device takes the columns of its heads.
    """
    layer, width = attention.c_attn, attention.embed_dim
    share = width // mesh.size()
    start = mesh.get_local_rank() * share
    columns = torch.cat([torch.arange(start, start + share) + part * width for part in range(3)])
    layer.weight = _distributed(layer.weight, mesh, Shard(1))
    layer.bias = _distributed(layer.bias, mesh, Replicate())
    attention.split_size = share

    def forward(hidden: Tensor) -> Tensor:
        own = columns.to(hidden.device)
        weight, bias = _whole(layer.weight)[:, own], _whole(layer.bias)[own]
        hidden = DTensor.from_local(hidden, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])
        return nn.functional.linear(hidden, weight.T, bias)

    layer.forward = forward


def _distributed(parameter: Tensor, mesh: DeviceMesh, placement: Placement) -> nn.Parameter:
    return nn.Parameter(distribute_tensor(parameter.detach(), mesh, [placement]), requires_grad=parameter.requires_grad)


def _whole(parameter: DTensor) -> Tensor:
    """All of a parameter; each device's gradient is a part of its gradient's sum."""
    return parameter.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])


# Evaluation and generation.


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Hold a sharded network whole in every process, while nothing is learnt.

    Inside, a process runs the network without waiting for the others, which may have fewer batches or shorter replies. All of them enter
    and leave together. What is not sharded is left as it is.

    Args:
        module: What the Trainer's strategy has made of the LightningModule: ``trainer.strategy.model``.
    """
    parts = list(module.modules())
    if any(isinstance(part, FullyShardedDataParallel) for part in parts):
        context = _gathered_fsdp1(module)
    elif (offload := _zero3_offload(module)) is not None:
        context = _gathered_zero3(offload)
    else:
        context = _gathered_fsdp2(module)
    marked: list[Any] = [part for part in parts if getattr(part, _MARK, False) and hasattr(part, "generate")]
    with context:
        for network in marked:
            setattr(network, _MARK, False)  # or its generation goes on until the longest reply of all processes ends
        try:
            yield
        finally:
            for network in marked:
                setattr(network, _MARK, True)


@contextmanager
def _gathered_fsdp2(module: nn.Module) -> Iterator[None]:
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    with torch.inference_mode(False):  # what is gathered here is learnt with later
        for part in parts:
            part.unshard()
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(not hasattr(part, "_run"), recurse=False)  # torch's default: not at the root
            part.reshard()


@contextmanager
def _gathered_fsdp1(module: nn.Module) -> Iterator[None]:
    parts = FullyShardedDataParallel.fsdp_modules(module)
    with FullyShardedDataParallel.summon_full_params(module, writeback=False):
        for part in parts:
            part.forward = part.module.__call__  # type: ignore[method-assign]  # its own would gather, and free, once more
        try:
            yield
        finally:
            for part in parts:
                del part.forward


def _zero3_offload(engine: Any) -> Any:
    """What gathers and frees parameters in a DeepSpeed engine of stage 3; None elsewhere."""
    optimizer = getattr(engine, "optimizer", None)
    offload = getattr(optimizer, "parameter_offload", optimizer)  # an engine that does not learn has nothing else for an optimizer
    return offload if hasattr(offload, "forward_hooks") else None


@contextmanager
def _gathered_zero3(offload: Any) -> Iterator[None]:
    zero: Any = import_module("deepspeed").zero
    with zero.GatheredParameters(list(offload.module.parameters())):
        offload._remove_module_hooks()  # they would gather, and free, once more
        offload.forward_hooks, offload.backward_hooks = [], []
        try:
            yield
        finally:
            offload.setup_zero_stage3_hooks()


def whole_state(network: nn.Module, *, wrapped: nn.Module) -> dict[str, Tensor]:
    """A network's weights, whole and in main memory, by the names that it has for them alone. All processes take part.

    Args:
        network: Sharded or not.
        wrapped: What holds it, as :func:`gathered` takes it.

    Returns: the weights in the first process, and nothing in the others.
    """
    is_first = not is_initialized() or get_rank() == 0
    state = {}
    with gathered(wrapped), torch.no_grad():
        for name, parameter in network.named_parameters(remove_duplicate=False):
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            if is_first:
                state[clean_name(name)] = whole.to("cpu", copy=True)
    return state


# Gradients.


def gradient_norm(parameters: Iterable[nn.Parameter], *, wrapped: nn.Module | None = None) -> Tensor:
    """The Euclidean norm of all gradients together, each counted once however it is cut; shape (). All processes take part.

    Args:
        parameters: Sharded or not.
        wrapped: ``trainer.strategy.model``; FSDP's first version does not mark the gradients it has cut, and only its root can tell.
    """
    if isinstance(wrapped, FullyShardedDataParallel):
        norm: Tensor = wrapped.clip_grad_norm_(float("inf"))
        return norm
    pieces: dict[int, list[Tensor]] = {}  # by how many different ones a gradient is cut into
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for gradient in gradients:
        n_pieces, piece = 1, gradient
        if isinstance(gradient, DTensor):
            piece = gradient.to_local()
            sizes = zip(gradient.device_mesh.shape, gradient.placements, strict=True)
            n_pieces = prod(size for size, placement in sizes if placement != Replicate())
        pieces.setdefault(n_pieces, []).append(piece)
    norms = {n_pieces: nn.utils.get_total_norm(tensors) for n_pieces, tensors in pieces.items()}
    if not any(isinstance(gradient, DTensor) for gradient in gradients):
        return norms[1] if norms else torch.zeros(())
    # Each different piece is in equally many processes.
    square = torch.stack([norm**2 * n_pieces / get_world_size() for n_pieces, norm in norms.items()]).sum()
    all_reduce(square)
    return square.sqrt()


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float, *, wrapped: nn.Module | None = None) -> Tensor:
    """Scale gradients down to a norm where theirs is larger, as :func:`torch.nn.utils.clip_grad_norm_` does.

    Args:
        parameters: Sharded or not.
        max_norm: The largest norm that is left as it is.
        wrapped: As :func:`gradient_norm` takes it.

    Returns: the norm before; shape ().
    """
    norm = gradient_norm(parameters, wrapped=wrapped)
    scale_gradients(parameters, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
