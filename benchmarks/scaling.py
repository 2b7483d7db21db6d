"""Estimates of memory and tokens per second for GPT-2, 124M to 1.5B, on 1 to 1,024 GPUs; nothing of it was measured on one.

    python benchmarks/scaling.py               # the tables of docs/distributed.md
    python benchmarks/scaling.py --gpu a100

Each number comes from the formulas and constants below; each of them names its source, or says that it is assumed. Change a constant
to what you measure, and the tables follow.

Shapes: P parameters, L layers, D width, V vocabulary, T tokens of a row, n GPUs, t GPUs of a tensor-parallel group.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from math import ceil, floor, log2, log10
from typing import NamedTuple

GIB, MIB = 1 << 30, 1 << 20

# The model and its batch.
VOCABULARY, POSITIONS = 50257, 1024  # Radford et al. 2019
ROWS = 8  # data.batch_size of a GPU, all of POSITIONS tokens, all of them supervised. Assumed
LOGITS_MIB = 128  # models/loss.py

# Bytes for each token and D that a layer keeps for its backward pass, in bf16-mixed, with attention that keeps no T × T matrix. The
# terms are those of Korthikanti et al. 2022, eq. 1 and 2 (34, or 10 + 24 / t, without 5 a s / h); autocast keeps the residual stream in
# float32, which adds 4. Counted over the tensors that autograd saves of transformers' GPT-2 (tests/models/test_sharding.py): 40 on a
# CPU, whose two dropout masks take 2 bytes in place of 1.
WHOLE_BYTES = 4 + 4 + 2 + 2 + 1 + 1  # both layer norms' inputs and outputs, both dropout masks
SPLIT_BYTES = 6 + 2 + 8 + 8  # queries, keys, values; what attention makes of them; before and after GELU
CHECKPOINT_BYTES = 4  # a layer's input alone, float32

# Bytes for each parameter. Weights, gradients and AdamW's two moments are float32. Source: Rajbhandari et al. 2020, section 3.1, who have
# 16 too, as 2 + 2 + 12: DeepSpeed's way.
STATE_BYTES = 4 + 4 + 8
BUCKET_BYTES = 4  # DDP's copy of gradients. Source: torch's DistributedDataParallel, on gradient_as_bucket_view
CAST_BYTES = 2  # of a layer's matrices: autocast's copies, which autograd keeps; counted as above
UPDATE_BYTES = 8 + 4 + 8 + 28  # read and written to scale gradients, take their norm, clip them, and step (fused AdamW)

# How fast. A step's matrix products reach this share of the peak where nothing is waited for. Assumed; Korthikanti et al. 2022 report .54
# for 530B on A100s, with kernels of their own, and narrow models do worse.
UTILISATION = 0.35
BANDWIDTH_SHARE = 0.7  # of a link's peak that a collective reaches. Assumed
GPUS_OF_A_NODE = 8
NODE_HOP_SECONDS, NETWORK_HOP_SECONDS = 2e-6, 10e-6  # latency of one step of a ring. Assumed
BUCKET_MIB = 25  # what DDP reduces at once. Source: torch's DistributedDataParallel, bucket_cap_mb


class Gpu(NamedTuple):
    """A GPU in a node of eight.

    Attributes:
        flops: Peak of dense bfloat16 products a second.
        memory_gib: What it has.
        memory_bandwidth: Bytes a second.
        node_bandwidth: Bytes a second to GPUs of its node, in each direction.
        network_bandwidth: Bytes a second to other nodes, in each direction.
    """

    name: str
    flops: float
    memory_gib: int
    memory_bandwidth: float
    node_bandwidth: float
    network_bandwidth: float


GPUS = {
    # Source: NVIDIA's H100 data sheet (SXM: 1,979 TFLOP/s with sparsity, 3.35 TB/s, NVLink 900 GB/s both ways) and DGX H100 user guide
    # (8 network cards of 400 Gb/s).
    "h100": Gpu("H100 SXM", 989e12, 80, 3.35e12, 450e9, 50e9),
    # Source: NVIDIA's A100 data sheet (SXM, 80 GB: 312 TFLOP/s, 2.04 TB/s, NVLink 600 GB/s both ways) and DGX A100 user guide (8 network
    # cards of 200 Gb/s).
    "a100": Gpu("A100 SXM", 312e12, 80, 2.04e12, 300e9, 25e9),
}


class Model(NamedTuple):
    """A GPT-2. Source of the sizes: Radford et al. 2019, table 2, as their code has them."""

    name: str
    n_layer: int
    width: int

    @property
    def block(self) -> int:
        """Parameters of a layer."""
        return 12 * self.width**2 + 13 * self.width

    @property
    def root(self) -> int:
        """Parameters outside the layers; the head is the embedding."""
        return (VOCABULARY + POSITIONS) * self.width + 2 * self.width

    @property
    def n_parameters(self) -> int:
        """All of them."""
        return self.n_layer * self.block + self.root


MODELS = [Model("124M", 12, 768), Model("355M", 24, 1024), Model("774M", 36, 1280), Model("1.5B", 48, 1600)]


# Memory.


def activation_bytes(model: Model, *, tensor: int = 1, checkpointing: bool = False) -> float:
    """What the backward pass needs of the forward pass, for ROWS rows; with checkpointing, inputs of layers and one layer's own."""
    tokens = ROWS * POSITIONS
    layer = tokens * model.width * (WHOLE_BYTES + SPLIT_BYTES / tensor) + CAST_BYTES * 12 * model.width**2 / tensor
    if checkpointing:
        return model.n_layer * tokens * model.width * CHECKPOINT_BYTES + layer
    return model.n_layer * layer


def head_bytes(model: Model) -> float:
    """The chunked loss: bf16 and float32 logits and bf16 errors of a chunk; a bf16 copy and the float32 gradient of the head."""
    return 2 * LOGITS_MIB * MIB + (2 + 4) * VOCABULARY * model.width


def whole_logits_bytes() -> float:
    """What logits in one piece would take: bf16, float32, and their gradient."""
    return ROWS * POSITIONS * VOCABULARY * (2.0 + 4 + 4)


def ddp_bytes(model: Model, n: int) -> float:
    """Weights, gradients and moments with every GPU having all of them."""
    return model.n_parameters * (STATE_BYTES + (BUCKET_BYTES if n > 1 else 0))


def zero2_bytes(model: Model, n: int) -> float:
    """DeepSpeed, stage 2. Source: Rajbhandari et al. 2020, figure 1."""
    return model.n_parameters * (2 + 14 / n)


def fsdp_bytes(model: Model, n: int, *, tensor: int = 1) -> float:
    """All cut into n, and what is whole for a while: the root with its gradient, two layers, one layer's gradient."""
    if n == 1:
        return ddp_bytes(model, 1)
    vectors = model.n_layer * 13 * model.width + model.root  # tensor parallelism leaves them
    state = STATE_BYTES * ((model.n_parameters - vectors) / n + vectors / (n / tensor))
    gathered = 4 * 3 * model.width**2 if tensor > 1 else 0  # queries', keys' and values' weight
    return state + (8 * model.root + 12 * model.block / tensor + gathered if n > tensor else 0)


# Time.


def collective_seconds(size: float, n: int, gpu: Gpu) -> float:
    """An all-gather or a reduce-scatter of ``size`` bytes in all, in rings over n GPUs.

    Each GPU passes on (n - 1) / n of them. Between nodes all network cards of a node work at once, each on a ring of its own.
    """
    if n == 1:
        return 0.0
    n_nodes = ceil(n / GPUS_OF_A_NODE)
    bandwidth = gpu.node_bandwidth if n_nodes == 1 else min(gpu.node_bandwidth, GPUS_OF_A_NODE * gpu.network_bandwidth)
    hops = NETWORK_HOP_SECONDS * (n_nodes if n_nodes > 1 else 0) + NODE_HOP_SECONDS * (n - n_nodes)
    return size * (n - 1) / n / (bandwidth * BANDWIDTH_SHARE) + hops


def all_reduce_seconds(size: float, n: int, gpu: Gpu) -> float:
    """Twice the bytes of an all-gather; its latency is that of a tree between nodes."""
    if n == 1:
        return 0.0
    n_nodes = ceil(n / GPUS_OF_A_NODE)
    ring = collective_seconds(size, n, gpu) - collective_seconds(0, n, gpu)
    hops = NETWORK_HOP_SECONDS * log2(n_nodes) + NODE_HOP_SECONDS * min(n, GPUS_OF_A_NODE)
    return 2 * (ring + hops)


def forward_seconds(model: Model, gpu: Gpu, *, tensor: int = 1) -> float:
    """Source: Kaplan et al. 2020, table 1: 2 N + 2 L T D for each token, N the layers' matrices; and 2 V D for the head."""
    layers = model.n_layer * (2 * 12 * model.width**2 + 2 * POSITIONS * model.width)
    flops = layers / tensor + 2 * VOCABULARY * model.width
    return ROWS * POSITIONS * flops / (gpu.flops * UTILISATION)


def update_seconds(parameters: float, gpu: Gpu) -> float:
    """Set gradients right, clip and step; bound by memory."""
    return UPDATE_BYTES * parameters / gpu.memory_bandwidth


def ddp_seconds(model: Model, n: int, gpu: Gpu) -> float:
    """A step. The backward pass takes twice the forward pass (Kaplan et al. 2020, section 2.1), and hides the reduction if it is longer."""
    forward = forward_seconds(model, gpu)
    size = 4 * model.n_parameters
    n_buckets = max(1, round(size / (BUCKET_MIB * MIB)))
    reduction = n_buckets * all_reduce_seconds(size / n_buckets, n, gpu)
    return forward + max(2 * forward, reduction) + update_seconds(model.n_parameters, gpu)


def fsdp_seconds(model: Model, n: int, gpu: Gpu, *, tensor: int = 1) -> float:
    """A step. Layers are gathered twice and their gradients reduced once while others compute; tensor-parallel sums are waited for."""
    data = n // tensor
    forward = forward_seconds(model, gpu, tensor=tensor)
    layer = collective_seconds(4 * model.block / tensor, data, gpu)
    root = collective_seconds(4 * model.root, data, gpu)
    waited = 0.0
    if tensor > 1:
        sums = 4 * all_reduce_seconds(2 * ROWS * POSITIONS * model.width, tensor, gpu)  # bf16; two in each direction
        waited = model.n_layer * (sums + 2 * collective_seconds(4 * 3 * model.width**2, tensor, gpu))
    hidden = max(forward, model.n_layer * layer) + max(2 * forward, 2 * model.n_layer * layer)
    return hidden + 2 * root + waited + update_seconds(model.n_parameters / n, gpu)


# Tables.


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def parts_table() -> str:
    """What one GPU's memory is for."""

    def gib(size: float) -> str:
        return f"{size / GIB:.1f}"

    rows = []
    for model in MODELS:
        p = model.n_parameters
        row = [model.name, f"{p:,}", gib(4 * p), gib(4 * p), gib(8 * p), gib(activation_bytes(model))]
        row += [gib(activation_bytes(model, checkpointing=True)), gib(head_bytes(model)), gib(whole_logits_bytes())]
        rows.append(row)
    head = ["GiB", "parameters", "weights", "gradients", "moments", "activations", "checkpointed", "loss", "loss in one piece"]
    return table(head, rows)


def memory_table(gpu: Gpu) -> str:
    """All of it, by strategy and number of GPUs; what does not fit is in brackets."""

    def cell(model: Model, state: float, *, tensor: int = 1) -> str:
        sizes = [state + head_bytes(model) + activation_bytes(model, tensor=tensor, checkpointing=c) for c in (False, True)]
        return " / ".join(f"{size / GIB:.0f}" if size / GIB < gpu.memory_gib else f"({size / GIB:.0f})" for size in sizes)

    rows = []
    for model in MODELS:
        states = [ddp_bytes(model, 1), ddp_bytes(model, 8), zero2_bytes(model, 8), fsdp_bytes(model, 8), fsdp_bytes(model, 64)]
        pair = cell(model, fsdp_bytes(model, 8, tensor=2), tensor=2)
        rows.append([model.name, *(cell(model, state) for state in states), pair])
    return table(["GiB", "1 GPU", "ddp, 8", "DeepSpeed 2, 8", "fsdp2, 8", "fsdp2, 64", "fsdp2, 8, pairs"], rows)


def speed_table(gpu: Gpu) -> str:
    """Tokens per second of all GPUs, and of the speed that as many lone GPUs had."""
    strategies: list[tuple[str, int, Callable[[Model, int], float]]] = [
        ("ddp", 1, lambda model, n: ddp_seconds(model, n, gpu)),
        ("fsdp2", 1, lambda model, n: fsdp_seconds(model, n, gpu)),
        ("fsdp2, pairs", 2, lambda model, n: fsdp_seconds(model, n, gpu, tensor=2)),
    ]

    def cell(model: Model, n: int, tensor: int, seconds: Callable[[Model, int], float]) -> str:
        speed = n / tensor * ROWS * POSITIONS / seconds(model, n)
        share = speed / n / (ROWS * POSITIONS / ddp_seconds(model, 1, gpu))
        return f"{round(speed, 2 - floor(log10(speed))):,.0f} ({share:.0%})"  # three digits: an estimate has no more

    rows = []
    for model in MODELS:
        for name, tensor, seconds in strategies:
            lone = cell(model, 1, 1, seconds) if name == "ddp" else "–"
            rows.append([f"{model.name}, {name}", lone, *(cell(model, n, tensor, seconds) for n in (8, 64, 256, 1024))])
    return table(["tokens/s", "1 GPU", "8 GPUs", "64 GPUs", "256 GPUs", "1,024 GPUs"], rows)


def tables(gpu: Gpu) -> str:
    """All tables, one below the other."""
    return "\n\n".join([parts_table(), memory_table(gpu), speed_table(gpu)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Estimates of memory and tokens per second on many GPUs.")
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h100", help="in nodes of eight; default h100")
    print(tables(GPUS[parser.parse_args().gpu]))
