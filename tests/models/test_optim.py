"""Optimizers, decay groups and schedules, against torch's, transformers' own and closed forms."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp._common_utils import FSDP_WRAPPED_MODULE
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_wsd_schedule,
)
from transformers.trainer_pt_utils import get_parameter_names

from lightning_chatgpt.errors import ConfigError
from lightning_chatgpt.models.optim import (
    build_optimizer,
    build_schedule,
    check_optimization,
    clean_name,
    decay_groups,
    learning_rate_factor,
    matrix_names,
)
from tests.conftest import ARCHITECTURE

OPTIMIZERS = [
    name for name, cls in vars(torch.optim).items() if isinstance(cls, type) and issubclass(cls, Optimizer) and cls is not Optimizer
]
VALID = {"optimizer": "adamw", "learning_rate": 1e-3, "weight_decay": 0.1, "schedule": "cosine", "warmup_steps": 0, "decay_steps": None}


class Stepper(Optimizer):
    """A user's own: each parameter goes ``size`` times the learning rate against its gradient's sign."""

    def __init__(self, params: Any, lr: float, size: float = 1.0, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "size": size, "weight_decay": weight_decay})

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data -= group["lr"] * group["size"] * parameter.grad.sign()
        return loss


class Unguided(Stepper):
    """Knows no learning rate."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, 0.1)


@pytest.fixture
def network() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**ARCHITECTURE, vocab_size=300, bos_token_id=0, eos_token_id=0))


# Which parameters decay.


def test_matrices_decay_and_vectors_do_not(network: GPT2LMHeadModel) -> None:
    decaying, others = decay_groups(network, weight_decay=0.1)
    # transformers' Trainer: all but biases and layer norms.
    names = [n for n in get_parameter_names(network, [torch.nn.LayerNorm]) if not n.endswith("bias")]
    expected = {id(dict(network.named_parameters(remove_duplicate=False))[n]) for n in names}
    assert {id(p) for p in decaying["params"]} == expected
    assert decaying["weight_decay"] == 0.1 and others["weight_decay"] == 0.0
    assert len(decaying["params"]) + len(others["params"]) == len(list(network.parameters()))
    network.transformer.wpe.weight.requires_grad_(False)
    assert all(p is not network.transformer.wpe.weight for g in decay_groups(network, weight_decay=1) for p in g["params"])


def test_flat_shards_decay_as_the_matrices_they_are_cut_from(network: GPT2LMHeadModel) -> None:
    # FSDP gives pieces without dimensions: every weight would be taken for a bias, and nothing would decay.
    matrices = matrix_names(network)
    assert {"transformer.wte.weight", "lm_head.weight", "transformer.h.1.mlp.c_fc.weight"} <= matrices
    shards = [
        (name.replace("transformer.h.", f"{FSDP_WRAPPED_MODULE}.transformer.h."), nn.Parameter(p.detach().flatten()[:2]))
        for name, p in network.named_parameters()
    ]
    assert all(p.ndim == 1 for _, p in shards)
    decaying, others = decay_groups(shards, weight_decay=0.1, matrices=matrices)
    whole = [p.ndim == 2 for p in network.parameters()]
    assert [id(p) for p in decaying["params"]] == [id(p) for (_, p), is_matrix in zip(shards, whole, strict=True) if is_matrix]
    assert [id(p) for p in others["params"]] == [id(p) for (_, p), is_matrix in zip(shards, whole, strict=True) if not is_matrix]


def test_names_are_those_of_the_network_whatever_wraps_it(network: GPT2LMHeadModel) -> None:
    names = [name for name, _ in network.named_parameters()]
    network.transformer.h[0] = checkpoint_wrapper(network.transformer.h[0])
    wrapped = [name for name, _ in torch.compile(network).named_parameters()]
    assert wrapped != names
    assert [clean_name(name) for name in wrapped] == names


def test_a_kind_of_parameter_that_is_missing_has_no_group() -> None:
    # DeepSpeed flattens each group, and cannot flatten nothing.
    assert [group["weight_decay"] for group in decay_groups(nn.Linear(2, 2, bias=False), weight_decay=0.1)] == [0.1]
    with pytest.raises(ConfigError, match="nothing to train"):
        build_optimizer(nn.Linear(2, 2).requires_grad_(False), learning_rate=0.1, weight_decay=0.1)


# Which optimizer.


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_of_torch_learns_or_says_why_not(name: str) -> None:
    torch.manual_seed(0)
    module = nn.Linear(4, 4, bias=False)  # a matrix only: Muon's kind
    inputs, targets = torch.randn(16, 4), torch.randn(16, 4)
    weight_decay = 0.0 if name == "Rprop" else 0.01
    try:
        optimizer = build_optimizer(module, optimizer=name.lower(), learning_rate=0.01, weight_decay=weight_decay)
    except ConfigError as error:
        assert name in {"LBFGS", "SparseAdam"} and f"model.optimizer {name}" in str(error)
        return
    assert type(optimizer) is getattr(torch.optim, name)
    losses = []
    for _ in range(20):
        loss = (module(inputs) - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_adamw_is_fused_and_takes_the_step_of_its_formula(network: GPT2LMHeadModel) -> None:
    # After one step the bias-corrected moments are g and g², so that g / √g² is a sign; Loshchilov and Hutter 2019, algorithm 2.
    optimizer = build_optimizer(network, learning_rate=1e-2, weight_decay=0.1)
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["fused"] is True
    assert optimizer.defaults["betas"] == (0.9, 0.95)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    for p in network.parameters():
        p.grad = torch.randn_like(p).sign()  # of a size beside which epsilon is nothing
    optimizer.step()
    for name, p in network.named_parameters():
        decay = 0.1 if p.ndim == 2 else 0.0
        torch.testing.assert_close(p.detach(), before[name] * (1 - 1e-2 * decay) - 1e-2 * p.grad.sign(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", {"class_path": "torch.optim.SGD", "init_args": {"fused": True}}])
def test_scaled_gradients_are_clipped_as_plain_ones_are(optimizer: Any) -> None:
    # Lightning refused to clip for a fused optimizer in mixed precision: it would undo the scale after clipping.
    def weights(scale: float | None) -> torch.Tensor:
        torch.manual_seed(0)
        module = nn.Linear(4, 4)
        built = build_optimizer(module, optimizer=optimizer, learning_rate=0.1, weight_decay=0.1)
        assert built.defaults["fused"] is True
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        plugin = MixedPrecision("bf16-mixed", "cpu")
        for _ in range(3):
            built.zero_grad()
            scaler.scale(module(torch.ones(2, 4)).square().sum()).backward()
            scaler.unscale_(built)
            plugin.clip_gradients(built, 0.5)
            scaler.step(built)
            scaler.update()
        return module.weight.detach()

    torch.testing.assert_close(weights(1024.0), weights(None))


def test_what_is_asked_for_is_what_the_optimizer_has(network: GPT2LMHeadModel) -> None:
    settings = {"class_path": "torch.optim.AdamW", "init_args": {"betas": [0.8, 0.9], "eps": 1e-6, "foreach": True}}
    optimizer = build_optimizer(network, optimizer=settings, learning_rate=0.5, weight_decay=0.2)
    assert [*optimizer.defaults["betas"]] == [0.8, 0.9] and optimizer.defaults["eps"] == 1e-6 and optimizer.defaults["lr"] == 0.5
    assert optimizer.defaults["foreach"] is True and not optimizer.defaults["fused"]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]
    assert settings["init_args"] == {"betas": [0.8, 0.9], "eps": 1e-6, "foreach": True}  # hyper-parameters stay as they were given
    # The command line's setting stands beside the config's init_args, and counts.
    given = {"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.5, "nesterov": True}, "momentum": 0.9}
    optimizer = build_optimizer(network, optimizer=given, learning_rate=0.5, weight_decay=0.2)
    assert optimizer.defaults["momentum"] == 0.9 and optimizer.defaults["nesterov"] is True
    assert build_optimizer(network, optimizer="Adam", learning_rate=1, weight_decay=0).defaults["betas"] == (0.9, 0.999)


def test_a_users_own_optimizer_is_used() -> None:
    module = nn.Linear(2, 2)
    own = {"class_path": f"{__name__}.Stepper", "init_args": {"size": 3.0}}
    optimizer = build_optimizer(module, optimizer=own, learning_rate=0.1, weight_decay=0.0)
    before = module.weight.detach().clone()
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(module.weight.detach(), before - 0.3)


def test_muon_refuses_what_is_no_matrix(network: GPT2LMHeadModel) -> None:
    with pytest.raises(ConfigError, match=r"Muon trains whole matrices only, and transformer.h.0.ln_1.weight and 17 more are none"):
        build_optimizer(network, optimizer="muon", learning_rate=0.1, weight_decay=0)


# Settings that cannot be used are refused before anything is built.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": -1.0}, "model.learning_rate must be"),
        ({"learning_rate": math.nan}, "model.learning_rate must be"),
        ({"weight_decay": math.inf}, "model.weight_decay must be"),
        ({"optimizer": "adamv"}, r"model.optimizer adamv is none of torch.optim; did you mean adam"),
        ({"optimizer": "optimizer"}, "is no subclass of"),
        ({"optimizer": "rprop"}, r"model.weight_decay 0.1: Rprop has no weight decay; set it to 0"),
        ({"optimizer": "lbfgs"}, "LBFGS runs the model several times a step"),
        ({"optimizer": "sparseadam", "weight_decay": 0.0}, "SparseAdam takes sparse gradients"),
        ({"optimizer": "nowhere.Lion"}, r"nowhere.Lion: cannot be imported \(No module named 'nowhere'\)"),
        ({"optimizer": "torch.optim.SDG"}, r"torch.optim.SDG: cannot be imported"),
        ({"optimizer": "torch.nn.Linear"}, "torch.nn.Linear: is no subclass of torch.optim.optimizer.Optimizer"),
        ({"optimizer": "math.pi"}, "math.pi: is no subclass"),
        ({"optimizer": f"{__name__}.Unguided"}, "Unguided takes no lr"),
        ({"optimizer": torch.optim.SGD}, "takes a name, or class_path and init_args"),
        ({"optimizer": {"init_args": {}}}, "takes a name, or class_path and init_args"),
        (
            {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"momentun": 1}}},
            r"init_args.momentun: SGD .* did you mean momentum",
        ),
        ({"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 1}}}, r"init_args.lr 1: set model.learning_rate"),
        ({"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"weight_decay": 1}}}, r"set model.weight_decay"),
        ({"schedule": "cosin"}, "model.schedule cosin is unknown; did you mean cosine"),
        ({"schedule": "torch.optim.lr_scheduler.ReduceLROnPlateau"}, "waits for a metric"),
        ({"schedule": {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step": 1}}}, r"init_args.step: StepLR .* step_size"),
        ({"schedule": "torch.optim.lr_scheduler.StepLR", "warmup_steps": 5}, "model.warmup_steps 5 is for .* not for a StepLR"),
        ({"schedule": "linear", "decay_steps": 5}, "model.decay_steps 5 is for model.schedule wsd"),
        *(
            ({"warmup_steps": steps}, "model.warmup_steps takes a whole number")
            for steps in (-1, 1.0, 20.0, -0.5, math.nan, True, None, "2")
        ),
        *(({"schedule": "wsd", "decay_steps": steps}, "model.decay_steps takes a whole number") for steps in (-1, 1.0, math.inf, False)),
    ],
)
def test_what_cannot_be_used_is_refused_with_a_remedy(settings: dict[str, Any], message: str) -> None:
    check_optimization(**VALID)
    with pytest.raises(ConfigError, match=message) as caught:
        check_optimization(**{**VALID, **settings})
    assert "\n" not in str(caught.value)


def test_values_that_only_the_class_can_judge_are_refused_in_one_line() -> None:
    betas = {"class_path": "torch.optim.AdamW", "init_args": {"betas": [2, 3]}}
    with pytest.raises(ConfigError, match="model.optimizer AdamW: Invalid beta parameter"):
        build_optimizer(nn.Linear(2, 2), optimizer=betas, learning_rate=0.1, weight_decay=0)
    optimizer = build_optimizer(nn.Linear(2, 2), learning_rate=0.1, weight_decay=0)
    with pytest.raises(ConfigError, match="model.schedule OneCycleLR: You must define either total_steps"):
        build_schedule(optimizer, schedule={"class_path": "torch.optim.lr_scheduler.OneCycleLR", "init_args": {"max_lr": 1}}, total_steps=9)


# Schedules.


def rates(make: Callable[[Optimizer], LRScheduler], *, steps: int = 100) -> list[float]:
    """The learning rate of each step, as a training loop would take it."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = make(optimizer)
    out = []
    for _ in range(steps):
        out.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return out


@pytest.mark.parametrize("warmup_steps", [0, 10, 0.1])
@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("cosine", lambda o, warmup: get_cosine_schedule_with_warmup(o, warmup, 100)),
        ("linear", lambda o, warmup: get_linear_schedule_with_warmup(o, warmup, 100)),
        ("constant", lambda o, warmup: get_constant_schedule_with_warmup(o, warmup)),
        ("wsd", lambda o, warmup: get_wsd_schedule(o, warmup, 20, num_training_steps=100, decay_type="1-sqrt")),
    ],
)
def test_schedules_equal_transformers_after_warmup(name: str, theirs: Any, warmup_steps: float) -> None:
    warmup = 10 if warmup_steps else 0
    ours = rates(lambda o: build_schedule(o, schedule=name, warmup_steps=warmup_steps, total_steps=100))
    assert ours[warmup:] == pytest.approx(rates(lambda o: theirs(o, warmup))[warmup:])
    # Ours does not waste its first step on a rate of 0.
    assert ours[:warmup] == pytest.approx([(i + 1) / 10 for i in range(warmup)])


@pytest.mark.parametrize("decay_steps", [40, 0.4])
def test_wsd_falls_over_its_last_steps(decay_steps: float) -> None:
    factors = rates(lambda o: build_schedule(o, schedule="wsd", warmup_steps=4, decay_steps=decay_steps, total_steps=100))
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4:61] == [1.0] * 57
    # 1 - √x at a quarter and nine sixteenths of the fall is a half and a quarter: places that can be told without the formula's code.
    assert factors[70] == pytest.approx(0.5)
    assert learning_rate_factor(82, schedule="wsd", warmup_steps=4, decay_steps=32, total_steps=96) == pytest.approx(0.25)
    assert learning_rate_factor(100, schedule="wsd", warmup_steps=4, decay_steps=40, total_steps=100) == 0.0
    assert learning_rate_factor(130, schedule="wsd", warmup_steps=4, decay_steps=40, total_steps=100) == 0.0  # past the end it stays there


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_rates_never_leave_their_range(name: str) -> None:
    for warmup, decay, total in [(0, 0, 1), (3, 2, 5), (5, 5, 5), (9, 1, 5), (0, 9, 5), (0, 0, 7)]:
        for step in range(12):
            factor = learning_rate_factor(step, schedule=name, warmup_steps=warmup, decay_steps=decay, total_steps=total)
            assert 0.0 <= factor <= 1.0


def test_a_class_of_schedule_is_stepped_as_torch_steps_it() -> None:
    settings = {"max_lr": 2.0, "total_steps": 101}
    ours = rates(
        lambda o: build_schedule(
            o, schedule={"class_path": "torch.optim.lr_scheduler.OneCycleLR", "init_args": settings}, total_steps=math.inf
        )
    )
    assert ours == rates(lambda o: OneCycleLR(o, **settings))


def test_a_run_without_end_cannot_decay_or_be_shared_out() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    for name in ("cosine", "linear", "wsd"):
        with pytest.raises(ConfigError, match=f"model.schedule {name} needs an end"):
            build_schedule(optimizer, schedule=name, total_steps=math.inf)
    with pytest.raises(ConfigError, match="model.warmup_steps 0.1 needs an end"):
        build_schedule(optimizer, schedule="constant", warmup_steps=0.1, total_steps=math.inf)
    build_schedule(optimizer, schedule="constant", warmup_steps=5, total_steps=math.inf)


def test_warmup_that_takes_the_whole_run_is_warned_of() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.warns(UserWarning, match="model.warmup_steps 300 .* the run's 5 optimizer steps"):
        build_schedule(optimizer, schedule="cosine", warmup_steps=300, total_steps=5)
    with pytest.warns(UserWarning, match="model.warmup_steps 3 and model.decay_steps 2 .* the run's 5 optimizer steps"):
        build_schedule(optimizer, schedule="wsd", warmup_steps=3, decay_steps=0.4, total_steps=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_schedule(optimizer, schedule="wsd", warmup_steps=2, decay_steps=0.4, total_steps=5)
        build_schedule(optimizer, schedule="cosine", warmup_steps=4, total_steps=5)
