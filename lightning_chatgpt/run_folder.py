"""A run's folder: what is written there, what an earlier run left, and which of its checkpoints is meant."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Collection
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_chatgpt.checkpoints.file import read_plain, replace_file
from lightning_chatgpt.checkpoints.folder import best_checkpoint, newest_checkpoint
from lightning_chatgpt.data.serving import ServingDataModule
from lightning_chatgpt.errors import ConfigError
from lightning_chatgpt.finders import FLAGS
from lightning_chatgpt.versions import installed_versions

_RUN_FILES = (
    "config.yaml",
    "run.json",
    "metrics.csv",
    "metrics.*.csv",
    "metrics.json",
    "samples.jsonl",
    "samples.*.jsonl",
    "predictions.jsonl*",
    "checkpoints",
    "hf",
    "tensorboard",
    "plots",
    ".search-*",
)


class RunFolder(SaveConfigCallback):
    """Keeps a run's folder: writes ``config.yaml`` and ``run.json``, and clears what an earlier run left, unless it is gone on with.

    ``run.json`` tells what the run can be repeated with: for each time it was started the command, the versions, the data's digests and
    the git commit of the working folder.

    Args:
        parser: The parser of the verb.
        config: What was parsed.
        keep: Files that this start has made already.
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace, keep: Collection[Path] = ()) -> None:
        folder = Path(config["trainer"]["default_root_dir"])
        # With neither resuming nor overwriting asked for, these are left from a start that failed before training.
        self.to_remove = [] if config["ckpt_path"] else [path for path in run_files(folder) if path not in keep]
        config = config.clone()
        # The saved config serves every verb, and must not remove what it made, search again, or go on with it, when it is run again.
        for flag in ("overwrite", *FLAGS):
            del config[flag]
        config["ckpt_path"] = None
        super().__init__(parser, config, overwrite=True, save_to_log_dir=False)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write both files, on the first process only, once the data was read and found good."""
        folder = Path(trainer.default_root_dir)
        for path in self.to_remove:  # listed before this run's loggers made files of their own
            path.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / self.config_filename, [self.parser.dump(self.config, skip_none=False)])
        path = folder / "run.json"
        starts = _earlier_starts(path)
        starts.append(_start_of(trainer, seed=self.config["seed_everything"]))
        replace_file(path, [json.dumps({"starts": starts}, indent=1, ensure_ascii=False), "\n"])


def run_files(folder: Path) -> list[Path]:
    """The files that an earlier run left in a folder."""
    found = [path for name in _RUN_FILES for path in folder.glob(name)]
    return [path for entry in found for path in (entry, *entry.rglob("*")) if path.is_file()]


def find_checkpoint(name: str, checkpoints: Path) -> Path | None:
    """The checkpoint file that a name stands for.

    Args:
        name: A file; or ``last``, ``best`` or ``auto``, which are looked for in the run folder, and of which the last may be none.
        checkpoints: The folder of the run's checkpoints.

    Raises:
        ConfigError: There is none, or ``auto`` would begin anew over files that cannot be read.
        ModelError: It is damaged, or no plain data.
    """
    if name not in ("last", "auto", "best"):
        read_plain(name)
        return Path(name)
    found = best_checkpoint(checkpoints) if name == "best" else newest_checkpoint(checkpoints)
    if found is None and name == "auto" and not any(checkpoints.glob("*.ckpt")):
        rank_zero_info(f"ckpt_path auto: there is no checkpoint in {checkpoints}; starting anew")
    elif found is None:
        raise ConfigError(
            f"ckpt_path {name}: there is no whole checkpoint in {checkpoints}; name a .ckpt file, or leave it out to start anew"
        )
    elif name != "best":
        rank_zero_info(f"ckpt_path {name}: going on from {found}")
    return found


def _earlier_starts(path: Path) -> list[Any]:
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))["starts"])
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError):
        rank_zero_warn(f"{path}: cannot be read, and is begun anew")
        return []


def _start_of(trainer: Trainer, *, seed: Any) -> dict[str, Any]:
    """What a start is made of; ``data`` holds a digest of what was read from each source, by part."""
    data: Any = getattr(trainer, "datamodule", None)
    datasets = data.datasets if isinstance(data, ServingDataModule) else {}
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": ["lightning_chatgpt", *sys.argv[1:]],
        "seed": seed,
        "goes_on_from": str(trainer.ckpt_path) if trainer.ckpt_path is not None else None,
        "processes": trainer.world_size,
        "precision": str(trainer.precision),
        "git": _git_commit(),
        "data": {part: {source.name: source.table.about["digest"] for source in data.sources} for part, data in datasets.items()},
        "versions": installed_versions(),
    }


def _git_commit() -> dict[str, Any] | None:
    """The commit of the working folder, and whether files that git knows of were changed since; None outside a repository."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "is_changed": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None
