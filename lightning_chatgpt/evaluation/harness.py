"""A model in EleutherAI's lm-evaluation-harness, on local files or on any of its own tasks."""

from __future__ import annotations

import difflib
import importlib.util
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from lightning_chatgpt.errors import ConfigError, ModelError, UserError
from lightning_chatgpt.hub import hub_problem
from lightning_chatgpt.models.build import find_pretrained, load_model
from lightning_chatgpt.models.export import export_folder

if TYPE_CHECKING:
    from lightning_chatgpt.evaluation.harness_model import ScoringModel

TASKS_FOLDER = Path(__file__).parent / "harness_tasks"
LOCAL_TASKS = tuple(sorted(path.stem for path in TASKS_FOLDER.glob("*.yaml")))

_FEW_SHOT_SEED = 1234  # what lm_eval on the command line chooses examples with


def run_harness(
    model_folder: Path,
    *,
    task: str,
    data: str | Path | None = None,
    batch_size: int = 8,
    limit: int | None = None,
    apply_chat_template: bool = False,
    device: str | None = None,
) -> dict[str, Any]:
    """Score a transformers folder with lm-eval.

    Args:
        model_folder: The model; :func:`harness_folder` gives it for whatever names a model.
        task: One of ``LOCAL_TASKS``, a task, group or tag that lm-eval knows, or a task file (``.yaml``) of one's own. A task file may
            run code.
        data: What a local task reads: documents, questions or chats.
        batch_size: How many requests are scored at once.
        limit: Only so many records of each task, from the first on; None for all.
        apply_chat_template: Whether a question is put as a user's message, as the model's chat template writes it.
        device: Where the model runs; None for the GPU where there is one.

    Returns: plain data: ``task``, ``lm_eval`` (its version), ``limit``, ``apply_chat_template`` and, under ``results``, for each task by
        name ``n`` records and ``metrics``: by name their ``value``, ``stderr`` (None where lm-eval gives none) and ``higher_is_better``.

    Raises:
        ConfigError: lm-eval is not installed, there is no such task, or a setting does not fit it.
        DataError: The data cannot be used (``file:line: what``).
        ModelError: The model cannot be used.
    """
    if any(importlib.util.find_spec(name) is None for name in ("lm_eval", "accelerate")):
        raise ConfigError("harness needs the packages lm-eval and accelerate, not both installed: pip install 'lightning-chatgpt[harness]'")
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, not {batch_size}")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1, not {limit}; leave it out for all records")
    if task in LOCAL_TASKS and data is None:
        raise ConfigError(f"harness task {task} needs a file of its own; name it with data (on the command line --harness_data)")
    if task not in LOCAL_TASKS and data is not None:
        near = difflib.get_close_matches(task, LOCAL_TASKS, n=1)
        hint = f"did you mean {near[0]}?" if near else "leave it out, as other tasks say themselves what they read"
        raise ConfigError(f"harness task {task} takes no data, which is for {', '.join(LOCAL_TASKS)}; {hint}")
    if apply_chat_template and task in ("local_chats", "local_perplexity"):
        raise ConfigError(f"harness task {task} has no questions to write with the chat template; leave out apply_chat_template")
    with _quiet():
        import torch
        from lm_eval.evaluator import evaluate

        from lightning_chatgpt.evaluation.harness_model import ScoringModel

        loaded = _load_tasks(task, metadata={"data": str(data or ""), "pretrained": str(model_folder)})
        model = ScoringModel(model_folder, batch_size=batch_size, device=device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if apply_chat_template and not model.tokenizer.chat_template:
            raise ModelError(f"{model_folder}: its tokenizer carries no chat template; leave out apply_chat_template, or name a chat model")
        found = evaluate(
            lm=model,
            task_dict=loaded,
            limit=limit,
            log_samples=False,
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=apply_chat_template,
        )
    _warn(model)
    return {
        "task": task,
        "lm_eval": version("lm_eval"),
        "limit": limit,
        "apply_chat_template": apply_chat_template,
        "results": {name: _result(found, name) for name in found["results"]},
    }


@contextmanager
def harness_folder(source: str | Path) -> Iterator[Path]:
    """The transformers folder of a model; a checkpoint is exported to a temporary one.

    Args:
        source: A run folder, a ``.ckpt``, a transformers folder, ``builtin:NAME``, or a hub name.

    Raises:
        ModelError: There is no such model, or it cannot be loaded.
    """
    if not str(source).endswith(".ckpt"):
        yield find_pretrained(str(source))
        return
    with TemporaryDirectory(prefix="lightning_chatgpt-") as folder:
        yield export_folder(*load_model(source), Path(folder) / "model")


def _load_tasks(task: str, *, metadata: dict[str, str]) -> dict[str, Any]:
    """What lm-eval makes of a task's name or file, with its data read."""
    from lm_eval.tasks import TaskManager

    is_local, file = task in LOCAL_TASKS, Path(task)
    # Finding lm-eval's own thousands takes seconds; only their names, and a group that a file makes of them, ask for it.
    is_single = is_local or (file.is_file() and not re.search(r"^group:", file.read_text(encoding="utf-8", errors="replace"), re.MULTILINE))
    manager = TaskManager(include_path=str(TASKS_FOLDER), include_defaults=not is_single, metadata=metadata)
    if task not in manager.task_index and not file.is_file():
        near = difflib.get_close_matches(task, manager.all_tasks, n=1)
        ours = ", ".join(LOCAL_TASKS)
        hint = f"did you mean {near[0]}?" if near else f"there are {ours}, those of `lm_eval ls tasks`, and task files of your own"
        raise ConfigError(f"harness task {task!r} is unknown; {hint}")
    problem = None if is_local else hub_problem()
    try:
        with _offline(problem is not None):
            loaded: dict[str, Any] = manager.load([task])
    except UserError:
        raise
    except Exception as error:  # whatever a task file makes lm-eval, datasets or the task's own code raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        remedy = "mend the task or its data"
        if problem is not None and isinstance(error, OSError):
            remedy = f"the hub cannot be reached ({problem}); its data must be on this machine"
        raise ConfigError(f"harness task {task}: cannot be loaded ({reason}); {remedy}") from None
    for name, one in loaded["tasks"].items():
        if getattr(one, "UNSAFE_CODE", False):
            raise ConfigError(f"harness task {name} runs code that the model writes; run it with lm_eval itself, within a sandbox")
        if one.get_config("num_fewshot") is None:
            one.set_config(key="num_fewshot", value=0)
        one.set_fewshot_seed(seed=_FEW_SHOT_SEED)
    return loaded


def _result(found: Any, name: str) -> dict[str, Any]:
    values, better = found["results"][name], found["higher_is_better"].get(name, {})
    metrics = {}
    for key, value in values.items():
        metric, comma, way = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            stderr = values.get(f"{metric}_stderr,{way}")
            metrics[metric if way == "none" else key] = {
                "value": float(value),
                "stderr": None if stderr is None or isinstance(stderr, str) else float(stderr),
                "higher_is_better": better.get(metric),
            }
    return {"n": found["n-samples"].get(name, {}).get("effective"), "metrics": dict(sorted(metrics.items()))}


def _warn(model: ScoringModel) -> None:
    if model.n_cut:
        warnings.warn(
            f"harness: {model.n_cut} of {model.n_requests} requests were longer than the model's {model.max_length} positions; "
            "lm-eval left out their beginning",
            stacklevel=3,
        )
    if model.n_spelt:
        warnings.warn(
            f"harness: {model.n_spelt} documents spell a control token, such as {model.tokenizer.all_special_tokens[0]}; "
            "lm-eval takes it for one, and our own evaluation for text",
            stacklevel=3,
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what lm-eval and transformers log on the way; what a user should know is said by us."""
    from transformers.utils import logging as transformers_logging

    logger, level = logging.getLogger("lm_eval"), transformers_logging.get_verbosity()
    own_level, had_bar = logger.level, transformers_logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(own_level)
        transformers_logging.set_verbosity(level)
        if had_bar:
            transformers_logging.enable_progress_bar()


@contextmanager
def _offline(is_offline: bool) -> Iterator[None]:
    """With what asks the hub told that it cannot be reached, or it would try again and again."""
    import datasets.config
    import huggingface_hub.constants

    places: Any = (datasets.config, huggingface_hub.constants)
    before = [place.HF_HUB_OFFLINE for place in places]
    try:
        for place in places:
            place.HF_HUB_OFFLINE = place.HF_HUB_OFFLINE or is_offline
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value
