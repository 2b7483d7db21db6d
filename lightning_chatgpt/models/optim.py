"""The optimizer, and how its learning rate goes over a run."""

from __future__ import annotations

import inspect
import math
import sys
import warnings
from collections.abc import Collection, Iterable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn
from torch.optim import LBFGS, AdamW, Muon, Optimizer, SparseAdam
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from lightning_chatgpt.errors import ConfigError, ModelError, nearest

if TYPE_CHECKING:
    from types import ModuleType

Schedule = Literal["cosine", "linear", "constant", "wsd"]

_SCHEDULES = get_args(Schedule)
_DECAY_SHARE = 0.2  # of a run under wsd. Source: Hägele et al. 2024, section 3.

# What FSDP, torch.compile and torch's activation checkpointing put into the names of the parameters they wrap.
_WRAPPERS = frozenset({"_fsdp_wrapped_module", "_orig_mod", "_forward_module", "_checkpoint_wrapped_module"})
_FUSED_DEVICES = frozenset({"cpu", "cuda"})
_OWN_SETTINGS = {"lr": "learning_rate", "weight_decay": "weight_decay"}
_UNUSABLE: dict[type, str] = {
    LBFGS: "runs the model several times a step and knows no parameter groups",
    SparseAdam: "takes sparse gradients, and a network's are dense",
}

NamedParameters = Iterable[tuple[str, nn.Parameter]]


def check_optimization(
    *,
    optimizer: str | Mapping[str, Any],
    learning_rate: float,
    weight_decay: float,
    schedule: str | Mapping[str, Any],
    warmup_steps: int | float,
    decay_steps: int | float | None,
) -> None:
    """Refuse what :func:`build_optimizer` or :func:`build_schedule` could not use, before data are read or a network is built.

    Raises:
        ConfigError: A setting is unknown, out of range, or contradicts another.
    """
    for name, value in (("learning_rate", learning_rate), ("weight_decay", weight_decay)):
        if not (math.isfinite(value) and value >= 0):
            raise ConfigError(f"model.{name} must be a finite number of at least 0, not {value}")
    _optimizer_class(optimizer, weight_decay=weight_decay)
    _check_steps("warmup_steps", warmup_steps)
    if decay_steps is not None:
        _check_steps("decay_steps", decay_steps)
        if schedule != "wsd":
            raise ConfigError(f"model.decay_steps {decay_steps} is for model.schedule wsd; leave it out, or take wsd")
    if _is_named(schedule):
        return
    cls, _ = _scheduler_class(schedule)
    if warmup_steps:
        raise ConfigError(f"model.warmup_steps {warmup_steps} is for {', '.join(_SCHEDULES)}, not for a {cls.__name__}; set it to 0")


def matrix_names(module: nn.Module) -> frozenset[str]:
    """The names of a module's matrices: linear layers, embeddings, adapters.

    FSDP cuts parameters into flat pieces, which tell no more what they are pieces of: ask before it does, and keep the names.
    """
    return frozenset(clean_name(name) for name, p in module.named_parameters(remove_duplicate=False) if p.ndim >= 2)


def clean_name(name: str) -> str:
    """A parameter's name without what FSDP, ``torch.compile`` and activation checkpointing add to it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def decay_groups(
    parameters: nn.Module | NamedParameters, *, weight_decay: float, matrices: Collection[str] = frozenset()
) -> list[dict[str, Any]]:
    """Split the trainable parameters: matrices decay, vectors (biases and layer norms) do not.

    Args:
        parameters: A module, or names and parameters.
        weight_decay: What matrices decay by.
        matrices: Names of parameters that are matrices even where their shards are flat, from :func:`matrix_names`.

    Returns: one group for an optimizer for each kind there is, matrices first; a tied parameter stands in one of them, once.
    """
    named = parameters.named_parameters() if isinstance(parameters, nn.Module) else parameters
    trained = [(clean_name(name) in matrices or p.ndim >= 2, p) for name, p in named if p.requires_grad]
    groups = [
        {"params": [p for is_matrix, p in trained if is_matrix], "weight_decay": weight_decay},
        {"params": [p for is_matrix, p in trained if not is_matrix], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    parameters: nn.Module | NamedParameters,
    *,
    optimizer: str | Mapping[str, Any] = "adamw",
    learning_rate: float,
    weight_decay: float,
    matrices: Collection[str] = frozenset(),
) -> Optimizer:
    """The optimizer of a network's trainable parameters, whose matrices decay.

    Torch's fused kernels are used where the optimizer has them: one pass over a parameter in place of a dozen. AdamW's betas are
    (0.9, 0.95) where none are given. Source: Brown et al. 2020, appendix B.

    Args:
        parameters: A module, or names and parameters.
        optimizer: The name of one of ``torch.optim``, in any case; the path of a class; or ``class_path`` and ``init_args``.
        learning_rate: The highest learning rate.
        weight_decay: What matrices decay by.
        matrices: As :func:`decay_groups` takes them.

    Raises:
        ConfigError: There is no such optimizer, it does not take these settings, or it cannot train these parameters.
    """
    named = list(parameters.named_parameters() if isinstance(parameters, nn.Module) else parameters)
    cls, settings = _optimizer_class(optimizer, weight_decay=weight_decay)
    trained = [(name, p) for name, p in named if p.requires_grad]
    if not trained:
        raise ConfigError("there is nothing to train: every parameter is frozen; leave some of them trainable")
    others = [name for name, p in trained if p.ndim != 2]
    if issubclass(cls, Muon) and others:
        raise ConfigError(
            f"model.optimizer {cls.__name__} trains whole matrices only, and {clean_name(others[0])} and {len(others) - 1} more are none; "
            "take adamw, or a class_path of your own that does both"
        )
    if cls is AdamW:
        settings.setdefault("betas", (0.9, 0.95))
    is_torchs = cls.__module__.partition(".")[0] == "torch"
    if is_torchs and "fused" in _parameters(cls) and settings.keys().isdisjoint({"fused", "foreach", "differentiable"}):
        settings["fused"] = all(p.device.type in _FUSED_DEVICES for _, p in trained)
    groups = decay_groups(trained, weight_decay=weight_decay, matrices=matrices)
    built: Optimizer = _construct("model.optimizer", cls, groups, lr=learning_rate, **settings)
    # A fused optimizer would undo the scale of 16-mixed in its kernel, after clipping, which Lightning refuses (in bf16-mixed, too).
    # Told that it cannot, the gradient scaler does it before.
    built._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    return built


def learning_rate_factor(step: int, *, schedule: str, warmup_steps: float, decay_steps: float = 0, total_steps: float) -> float:
    """What the learning rate is multiplied by in an optimizer step.

    It grows linearly over ``warmup_steps``, then follows half a cosine or a line down to 0 at ``total_steps``, or stays (constant), or
    stays and falls as 1 - √x over the last ``decay_steps`` (wsd: warmup, stable, decay).

    Args:
        step: The optimizer step, from 0.
        schedule: cosine, linear, constant or wsd.
        warmup_steps: Steps until the full rate.
        decay_steps: Steps over which wsd falls to 0.
        total_steps: Steps of the whole run.

    Source: Loshchilov and Hutter 2017, eq. 5, with no restarts and a final rate of 0 (cosine); Hu et al. 2024 (MiniCPM), section 4
        (wsd); Hägele et al. 2024, section 3 (its fall).
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    start = max(warmup_steps, total_steps - decay_steps) if schedule == "wsd" else warmup_steps
    progress = min(1.0, max(0.0, (step - start) / max(1.0, total_steps - start)))
    if schedule == "wsd":
        return 1.0 - math.sqrt(progress)
    return 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def optimizer_class(optimizer: str | Mapping[str, Any]) -> type:
    """The class that ``model.optimizer`` names."""
    return _choice("model.optimizer", optimizer, torch.optim, Optimizer)[0]


def check_saved_classes(settings: Mapping[str, Any]) -> None:
    """Make sure that settings out of a checkpoint name no class whose module would have to be imported, which would run its code.

    Args:
        settings: The hyper-parameters it was saved with.

    Raises:
        ModelError: They do.
    """
    for name in ("optimizer", "schedule"):
        choice = settings.get(name)
        path = choice.get("class_path") if isinstance(choice, Mapping) else choice
        module_name = path.rpartition(".")[0] if isinstance(path, str) else ""
        if module_name and module_name not in sys.modules:
            raise ModelError(
                f"the checkpoint's model.{name} is {path}, of a module that is not imported, and loading a checkpoint runs no code; "
                f"import {module_name} first if you trust it"
            )


def build_schedule(
    optimizer: Optimizer,
    *,
    schedule: str | Mapping[str, Any],
    warmup_steps: int | float = 0,
    decay_steps: int | float | None = None,
    total_steps: float,
) -> LRScheduler:
    """The learning-rate schedule, stepped once an optimizer step.

    Args:
        optimizer: Whose learning rate it is.
        schedule: cosine, linear, constant or wsd; the path of a class of torch's kind; or ``class_path`` and ``init_args``. It too is
            stepped once an optimizer step.
        warmup_steps: Steps until the full rate; below 1, the share of the run that they are.
        decay_steps: Steps over which wsd falls, or their share of the run; None for a fifth of it.
        total_steps: Optimizer steps of the whole run; infinite where it has no end.

    Raises:
        ConfigError: There is no such schedule, it does not take these settings, or the run has no end for it to fall to.
    """
    if not _is_named(schedule):
        cls, init_args = _scheduler_class(schedule)
        built: LRScheduler = _construct("model.schedule", cls, optimizer, **init_args)
        return built
    name = str(schedule)
    decay = (_DECAY_SHARE if decay_steps is None else decay_steps) if name == "wsd" else 0
    needy = f"schedule {name}" if name != "constant" else f"warmup_steps {warmup_steps}" if 0 < warmup_steps < 1 else None
    if needy and math.isinf(total_steps):
        raise ConfigError(
            f"model.{needy} needs an end; set trainer.max_epochs or trainer.max_steps, or take constant with warmup in whole steps"
        )
    warmup, decay = (round(steps * total_steps) if 0 < steps < 1 else steps for steps in (warmup_steps, decay))
    if warmup and warmup + decay >= total_steps:
        falling = f" and model.decay_steps {decay}" if decay else ""
        rank_zero_warn(
            f"model.warmup_steps {warmup}{falling} leave nothing of the run's {total_steps} optimizer steps: "
            "the full learning rate is never held; lower them"
        )
    return LambdaLR(
        optimizer,
        lambda step: learning_rate_factor(step, schedule=name, warmup_steps=warmup, decay_steps=decay, total_steps=total_steps),
    )


def set_optimization(optimizer: Optimizer, schedule: LRScheduler, *, fresh: Optimizer, fresh_schedule: LRScheduler) -> None:
    """Give an optimizer that was restored the settings of a new one, and its schedule that one's course, from the step where it stands.

    Args:
        optimizer: With the state it was saved with, and the settings too.
        schedule: Its own.
        fresh: Built of the settings that are to hold.
        fresh_schedule: Its schedule, at step 0.
    """
    n_steps = schedule.last_epoch
    if isinstance(fresh_schedule, LambdaLR) and n_steps > 0:
        fresh_schedule.last_epoch = n_steps - 1  # what the rate is depends on the step alone
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")  # the other optimizer made the steps
        while fresh_schedule.last_epoch < n_steps:
            fresh_schedule.step()
    for group, wanted in zip(optimizer.param_groups, fresh.param_groups, strict=True):
        group.update({name: value for name, value in wanted.items() if name != "params"})
    schedule.load_state_dict({**fresh_schedule.state_dict(), "_step_count": schedule._step_count})


def _check_steps(name: str, value: Any) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    # 1.0 could be one step or the whole run.
    if not is_number or value < 0 or (isinstance(value, float) and value >= 1):
        raise ConfigError(f"model.{name} takes a whole number of optimizer steps, such as 20, or a share of the run below 1, not {value!r}")


def _is_named(schedule: str | Mapping[str, Any]) -> bool:
    """Whether a schedule is one of ours.

    Raises:
        ConfigError: It is a name of nothing.
    """
    if not isinstance(schedule, str) or "." in schedule:
        return False
    if schedule not in _SCHEDULES:
        raise ConfigError(f"model.schedule {schedule} is unknown; {nearest(schedule, _SCHEDULES)}, or give a class_path")
    return True


def _optimizer_class(optimizer: str | Mapping[str, Any], *, weight_decay: float) -> tuple[type, dict[str, Any]]:
    cls, init_args = _choice("model.optimizer", optimizer, torch.optim, Optimizer)
    for unusable, reason in _UNUSABLE.items():
        if issubclass(cls, unusable):
            raise ConfigError(f"model.optimizer {cls.__name__} {reason}; take adamw, or another of torch.optim")
    takes = _parameters(cls)
    for name, setting in _OWN_SETTINGS.items():
        if name in init_args:
            raise ConfigError(f"model.optimizer.init_args.{name} {init_args[name]}: set model.{setting} in its place")
    if "lr" not in takes and "**" not in takes:
        raise ConfigError(f"model.optimizer {cls.__name__} takes no lr, so model.learning_rate would do nothing; take another")
    if weight_decay and "weight_decay" not in takes and "**" not in takes:
        raise ConfigError(f"model.weight_decay {weight_decay}: {cls.__name__} has no weight decay; set it to 0")
    return cls, init_args


def _scheduler_class(schedule: str | Mapping[str, Any]) -> tuple[type, dict[str, Any]]:
    cls, init_args = _choice("model.schedule", schedule, torch.optim.lr_scheduler, LRScheduler)
    if issubclass(cls, ReduceLROnPlateau):
        raise ConfigError(f"model.schedule {cls.__name__} waits for a metric, and a schedule is stepped each optimizer step; take another")
    return cls, init_args


def _choice(setting: str, choice: str | Mapping[str, Any], home: ModuleType, base: type) -> tuple[type, dict[str, Any]]:
    """The class that a setting names, and its init_args, checked by name against what it takes."""
    given: dict[str, Any] = {"class_path": choice} if isinstance(choice, str) else dict(choice) if isinstance(choice, Mapping) else {}
    path, init_args = given.pop("class_path", None), given.pop("init_args", None) or {}
    if not isinstance(path, str) or not isinstance(init_args, Mapping):
        raise ConfigError(f"{setting} takes a name, or class_path and init_args, not {choice!r}")
    init_args = {**init_args, **given}  # jsonargparse leaves init_args out of --model.optimizer.init_args.momentum 0.9
    module_name, _, name = path.rpartition(".")
    if module_name:
        try:
            cls = getattr(import_module(module_name), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(f"{setting} {path}: cannot be imported ({error}); is it on the path, and spelt right?") from None
    else:
        known = {n.lower(): c for n, c in vars(home).items() if isinstance(c, type) and issubclass(c, base) and not n.startswith("_")}
        if path.lower() not in known:
            raise ConfigError(f"{setting} {path} is none of {home.__name__}; {nearest(path.lower(), sorted(known))}")
        cls = known[path.lower()]
    if not (isinstance(cls, type) and issubclass(cls, base)) or cls is base:
        raise ConfigError(f"{setting} {path}: is no subclass of {base.__module__}.{base.__name__}; give the path of one")
    takes = _parameters(cls)
    for unknown in sorted(init_args.keys() - takes) if "**" not in takes else ():
        raise ConfigError(f"{setting}.init_args.{unknown}: {cls.__name__} takes no such setting; {nearest(unknown, sorted(takes))}")
    return cls, init_args


def _parameters(cls: type) -> set[str]:
    """What a class takes after its first argument, by name; ``**`` where it takes anything."""
    parameters = list(inspect.signature(cls).parameters.values())[1:]
    return {"**" if p.kind is p.VAR_KEYWORD else p.name for p in parameters if p.kind is not p.VAR_POSITIONAL}


def _construct(setting: str, cls: type, *arguments: Any, **settings: Any) -> Any:
    try:
        return cls(*arguments, **settings)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{setting} {cls.__name__}: {' '.join(str(error).split())}; mend its init_args") from error
