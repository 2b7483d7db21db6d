"""What a sweep tries, and a try: a ``fit`` in a process of its own, which is watched by what it logs and told to stop as a user would.

A process of its own, so that a trial that runs out of memory takes no other with it, and begins with nothing of the one before.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from lightning_chatgpt.errors import ConfigError, nearest
from lightning_chatgpt.processes import PARENT

_OWN = ("trainer.default_root_dir", "ckpt_path", "overwrite")
_DISTRIBUTION = ("low", "high", "log", "step", "choices")
_POLL_SECONDS = 0.2


class Sweep(NamedTuple):
    """What is tried, and where.

    Attributes:
        configs: Config files of each trial.
        distributions: Optuna's, of the keys that vary.
        fixed: The keys that do not, and their values.
        monitor: What tells the best.
        direction: minimize or maximize.
        folder: Of the study.
    """

    configs: list[str]
    distributions: dict[str, Any]
    fixed: dict[str, Any]
    monitor: str
    direction: Literal["minimize", "maximize"]
    folder: Path

    def settings(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """What a trial of these parameters sets."""
        return {**self.fixed, **{key: json.loads(value) if isinstance(value, str) else value for key, value in parameters.items()}}

    def identity(self) -> dict[str, Any]:
        """What may not change while a study goes on, by the name of its setting, as text."""
        from optuna.distributions import distribution_to_json

        space = {**self.fixed, **{key: distribution_to_json(value) for key, value in self.distributions.items()}}
        texts = [Path(config).read_text(encoding="utf-8") if Path(config).is_file() else config for config in self.configs]
        values = {"fit": texts, "space": space, "monitor": self.monitor, "direction": self.direction}
        return {name: json.dumps(value, sort_keys=True) for name, value in values.items()}

    def run_folder(self, number: int) -> Path:
        """Where a trial trains."""
        return self.folder / f"trial-{number:04}"


def read_space(space: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read what a sweep tries.

    Args:
        space: Keys, dotted or nested, and distributions or values; of a key that stands twice the latter, as the command line's does.

    Returns: Optuna's distribution of each key that varies, choices as JSON; and the value of each one that does not.

    Raises:
        ConfigError: One of them cannot be used.
    """
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

    distributions: dict[str, BaseDistribution] = {}
    fixed: dict[str, Any] = {}
    for key, value in dict(_flat(space)).items():
        if key in _OWN:
            raise ConfigError(f"space.{key} is what a sweep sets by itself; leave it out")
        if not _is_distribution(value):
            fixed[key] = value
            continue
        for part in value:
            if part not in _DISTRIBUTION:
                raise ConfigError(f"space.{key}.{part} is no setting; {nearest(str(part), _DISTRIBUTION)}")
        if "choices" in value:
            choices = value["choices"]
            if len(value) > 1 or not isinstance(choices, list) or not choices:
                raise ConfigError(f"space.{key} takes choices, a list, or low and high, not {dict(value)}")
            distributions[key] = CategoricalDistribution([json.dumps(choice) for choice in choices])
            continue
        low, high, log, step = value.get("low"), value.get("high"), value.get("log", False), value.get("step")
        numbers = [number for number in (low, high, step) if number is not None]
        if (
            None in (low, high)
            or not all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers)
            or not isinstance(log, bool | None)
        ):
            raise ConfigError(f"space.{key} takes low and high, two numbers, and log (true or false) or step, not {dict(value)}")
        try:
            if all(isinstance(number, int) for number in numbers):
                distributions[key] = IntDistribution(numbers[0], numbers[1], log=log or False, step=step or 1)
            else:
                distributions[key] = FloatDistribution(numbers[0], numbers[1], log=log or False, step=step)
        except ValueError as error:
            raise ConfigError(f"space.{key}: {' '.join(str(error).split())}") from None
    return distributions, fixed


def shown(value: Any) -> str:
    """A setting's value, in short."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _flat(space: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in space.items():
        if isinstance(value, Mapping) and value and not _is_distribution(value):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _is_distribution(value: Any) -> bool:
    return isinstance(value, Mapping) and not {"low", "high", "choices"}.isdisjoint(value)


def fit_command(configs: Sequence[str], settings: Mapping[str, Any], *arguments: str) -> list[str]:
    """The command line of a ``fit``.

    Args:
        configs: Config files.
        settings: Dotted keys and values that hold in place of theirs.
        *arguments: What stands at its end.
    """
    files = [word for config in configs for word in ("-c", config)]
    given = [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in settings.items()]
    return [sys.executable, "-m", "lightning_chatgpt", "fit", *files, *given, *arguments]


def start(command: Sequence[str], output: IO[str] | int) -> subprocess.Popen[str]:
    """Start a command that ends with this process, and that the terminal's Ctrl-C does not reach.

    Args:
        command: A verb that trains.
        output: Where what it says goes.
    """
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, PARENT: str(os.getpid())},
        start_new_session=True,
    )


def watch(
    process: subprocess.Popen[str],
    metrics: Path,
    name: str,
    *,
    is_hopeless: Callable[[Sequence[float]], bool],
    is_stopped: Callable[[], bool],
) -> int:
    """Wait for a run's end, and stop it early if it is to be: by SIGTERM, on which it saves itself.

    Args:
        process: The run's.
        metrics: Its ``metrics.csv``.
        name: The logged number that is watched.
        is_hopeless: Asked with all its values so far whenever there are more.
        is_stopped: Asked time and again.

    Returns: its exit code.
    """
    n_seen, was_told, state = 0, False, None
    while True:
        code = process.poll()
        should_stop = is_stopped()
        found = metrics.stat() if metrics.exists() else None
        if found is not None and state != (state := (found.st_mtime_ns, found.st_size)):
            values = logged(metrics, name)
            if len(values) > n_seen:
                n_seen = len(values)
                should_stop |= is_hopeless(values)
        if code is not None:
            return code
        if should_stop and not was_told:
            was_told = True
            process.send_signal(signal.SIGTERM)
        time.sleep(_POLL_SECONDS)


def logged(metrics: Path, name: str) -> list[float]:
    """The values of a number in a ``metrics.csv`` that may be being written, in order."""
    try:
        text = metrics.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    whole = text[: text.rfind("\n") + 1]  # of the last row a part may be missing
    return [float(row[name]) for row in csv.DictReader(whole.splitlines()) if row.get(name)]


def last_error(output: Path, code: int) -> str:
    """What a command that failed said in the end: its error, or else its last line; or the signal that ended it."""
    if code < 0:
        return f"it was ended by {signal.Signals(-code).name}, as the system does where memory runs out"
    lines = [line.strip() for line in output.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it said nothing"])[-1]
