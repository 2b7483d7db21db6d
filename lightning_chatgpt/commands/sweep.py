"""``sweep``: search for the best settings with Optuna; each try is a ``fit`` in a run folder of its own."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning_chatgpt.errors import ConfigError, UserError

if TYPE_CHECKING:
    from lightning_chatgpt.trials import Sweep

_FAILURES_IN_SUCCESSION = 3
_UNPRUNED = 4  # trials that the median is taken of at the least


def sweep(
    fit: str | list[str] | None = None,
    space: dict[str, Any] | None = None,
    trials: int = 20,
    monitor: str = "val_loss",
    direction: Literal["minimize", "maximize"] = "minimize",
    pruner: Literal["median", "none"] = "median",
    seed: int = 0,
    folder: str = "runs/sweep",
) -> None:
    """Search for the settings of a config that train best. The same command goes on with a sweep that was broken off.

    Args:
        fit: The config that each trial trains, as fit -c takes it, or a list of them.
        space: Settings of it, each with what is tried: {low, high} and log or step for numbers, or {choices}; a value by itself is
            set in all trials.
        trials: How many are made in all.
        monitor: The logged number that tells the best; a trial's is the best of its validations.
        direction: Whether it is to be low or high.
        pruner: median stops a trial that at a validation is worse than the median of those before it; none lets all of them finish.
        seed: Chooses what is tried; the runs have the seed of their config.
        folder: Where the study and the trials' run folders are.
    """
    if fit is None or not space:
        raise ConfigError("a sweep needs fit, the config to train, and space, the settings to try; see -c configs/sweep.yaml")
    if trials < 1:
        raise ConfigError(f"trials must be at least 1, not {trials}")
    try:
        import optuna
    except ImportError as error:
        raise ConfigError(f"sweep needs optuna, which cannot be imported ({error}): pip install 'lightning-chatgpt[sweep]'") from None

    from lightning_chatgpt.configuration import resolve_config
    from lightning_chatgpt.plots import check_matplotlib
    from lightning_chatgpt.processes import alone_in
    from lightning_chatgpt.trials import Sweep, read_space

    check_matplotlib("sweep", extra="sweep")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    configs = [resolve_config(name) for name in ([fit] if isinstance(fit, str) else fit)]
    place = Path(folder)
    wanted = Sweep(configs, *read_space(space), monitor=monitor, direction=direction, folder=place)
    is_new = not (place / "study.db").is_file()
    if is_new and any(place.glob("trial-*")):
        raise ConfigError(f"{folder} holds trials, but no study.db that tells what they are; name another folder")
    if is_new:
        _check_first(wanted)
    with alone_in(place, at_work="another sweep is at work there"):
        _run(wanted, trials=trials, pruner=pruner, seed=seed)


def _check_first(wanted: Sweep) -> None:
    """Make sure, before the first trial, that ``fit`` takes all that is varied.

    Raises:
        ConfigError: There is nothing to vary, or a key is no setting, or its first value none that it takes.
    """
    import subprocess

    from lightning_chatgpt.trials import fit_command

    if not wanted.distributions:
        raise ConfigError("space varies nothing: give a key low and high, or choices")
    first = {key: getattr(one, "low", None) if not hasattr(one, "choices") else one.choices[0] for key, one in wanted.distributions.items()}
    done = subprocess.run(
        fit_command(wanted.configs, wanted.settings(first), "--print_config"), capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        said = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[-1] if lines else "fit failed")
        raise ConfigError(f"space: {said.removeprefix('command line: ')}")


class _Signals:
    """Notes SIGINT and SIGTERM; a second SIGINT leaves at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def note(self, number: int, frame: Any) -> None:
        if self.received is not None and number == signal.SIGINT:
            os._exit(130)  # the running trial ends with this process
        self.received = self.received or signal.Signals(number)
        os.write(2, b"\nstopping: the running trial saves itself; press Ctrl-C again to leave at once\n")

    @contextmanager
    def heard(self) -> Iterator[None]:
        before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _run(wanted: Sweep, *, trials: int, pruner: str, seed: int) -> None:
    import numpy as np
    from optuna import create_study
    from optuna.pruners import BasePruner, MedianPruner, NopPruner
    from optuna.samplers import TPESampler
    from optuna.storages import RDBStorage
    from optuna.trial import TrialState

    storage = RDBStorage(f"sqlite:///{(wanted.folder / 'study.db').as_posix()}")
    chosen: BasePruner = MedianPruner(n_startup_trials=_UNPRUNED) if pruner == "median" else NopPruner()
    study = create_study(storage=storage, study_name="sweep", direction=wanted.direction, load_if_exists=True, pruner=chosen)
    before = study.user_attrs.get("identity")
    for name, value in wanted.identity().items():
        if before is not None and before.get(name) != value:
            raise ConfigError(f"{wanted.folder} holds a sweep with another {name}; keep it as it was, or name another folder")
    study.set_user_attr("identity", wanted.identity())
    study_id = storage.get_study_id_from_name("sweep")
    for stale in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):  # of a sweep that was killed
        storage.set_trial_state_values(storage.get_trial_id_from_study_id_trial_number(study_id, stale.number), TrialState.WAITING)
    signals = _Signals()
    n_failed = 0
    ended = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
    if len(study.get_trials(deepcopy=False, states=ended)) >= trials:
        print(f"{wanted.folder}: its {trials} trials are made; raise trials to go on")
    else:
        print(f"{trials} trials in {wanted.folder}; what each one says is in its output.txt there", flush=True)
    with signals.heard():
        while (n_ended := len(study.get_trials(deepcopy=False, states=ended))) < trials:
            # A function of seed and number, so that a sweep that goes on tries what it would have tried.
            study.sampler = TPESampler(seed=int(np.random.SeedSequence([seed, n_ended]).generate_state(1)[0]))
            trial = study.ask(fixed_distributions=wanted.distributions)
            state = _run_trial(study, trial, wanted, signals)
            if state == TrialState.WAITING:
                storage.set_trial_state_values(storage.get_trial_id_from_study_id_trial_number(study_id, trial.number), state)
                print(f"stopped; the same command goes on with {wanted.run_folder(trial.number).name}", file=sys.stderr)
                raise SystemExit(128 + int(signals.received or signal.SIGTERM))
            _write_best(study, wanted)
            n_failed = n_failed + 1 if state == TrialState.FAIL else 0
            if n_failed == _FAILURES_IN_SUCCESSION:
                error = study.trials[trial.number].user_attrs["error"]
                raise UserError(
                    f"{n_failed} trials in succession failed, the last of them: {error}; mend that, and the same command goes on"
                )
            if signals.received is not None:
                raise SystemExit(128 + int(signals.received))
    _tell(study, wanted)


def _run_trial(study: Any, trial: Any, wanted: Sweep, signals: _Signals) -> Any:
    """Train; returns the state that the trial ended in, which the study was told but for ``WAITING``."""
    from optuna.trial import TrialState

    from lightning_chatgpt.trials import fit_command, last_error, logged, shown, start, watch

    folder = wanted.run_folder(trial.number)
    folder.mkdir(parents=True, exist_ok=True)
    settings = wanted.settings(trial.params)
    goes_on = ["--ckpt_path=auto"] if trial.user_attrs.get("started") else []
    trial.set_user_attr("started", True)
    is_hopeless = False

    def judge(values: Sequence[float]) -> bool:
        nonlocal is_hopeless
        for step in range(len(trial.study.trials[trial.number].intermediate_values), len(values)):
            trial.report(values[step], step)
        is_hopeless = bool(trial.should_prune())
        return is_hopeless

    metrics, output = folder / "metrics.csv", folder / "output.txt"
    begin = time.monotonic()
    with output.open("a", encoding="utf-8") as said:
        process = start(fit_command(wanted.configs, {**settings, "trainer.default_root_dir": str(folder)}, *goes_on), said)
        code = watch(process, metrics, wanted.monitor, is_hopeless=judge, is_stopped=lambda: signals.received is not None)
    values = [value for value in logged(metrics, wanted.monitor) if math.isfinite(value)]
    about = (
        f"{time.monotonic() - begin:.0f} s; {', '.join(f'{key} {shown(value)}' for key, value in settings.items() if key in trial.params)}"
    )
    if code == 0 and values:
        value = (min if wanted.direction == "minimize" else max)(values)
        study.tell(trial, value)
        best = ", the best so far" if study.best_trial.number == trial.number else ""
        print(f"{folder.name}: {wanted.monitor} {value:.4f}{best}; {about}", flush=True)
        return TrialState.COMPLETE
    if code == 143 and is_hopeless:
        study.tell(trial, state=TrialState.PRUNED)
        print(f"{folder.name}: {wanted.monitor} {values[-1]:.4f}, pruned after {len(values)} validation(s); {about}", flush=True)
        return TrialState.PRUNED
    if signals.received is not None and code in (143, -signal.SIGTERM):
        return TrialState.WAITING
    error = (
        last_error(output, code)
        if code
        else f"it logged no {wanted.monitor} that is finite, which is what tells the best; set monitor, or data.validation"
    )
    trial.set_user_attr("error", error)
    study.tell(trial, state=TrialState.FAIL)
    print(f"{folder.name}: failed: {error} (all it said: {output}); {about}", flush=True)
    return TrialState.FAIL


def _write_best(study: Any, wanted: Sweep) -> None:
    """Write the config of the best trial, with a run folder of its own, and a plot of all."""
    import yaml
    from optuna.trial import TrialState

    from lightning_chatgpt.checkpoints.file import replace_file
    from lightning_chatgpt.plots import COLOURS, LIMIT_COLOUR, plot

    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not done:
        return
    best = study.best_trial
    made = wanted.run_folder(best.number) / "config.yaml"
    if not made.is_file():
        raise ConfigError(f"{made}: the best trial's config is gone; put its folder back, or sweep into another folder")
    config = yaml.safe_load(made.read_text(encoding="utf-8"))
    config["trainer"]["default_root_dir"] = str(wanted.folder / "best")
    head = f"# The best of {len(study.trials)} trials in {wanted.folder}: {wanted.monitor} {best.value:.4f} in trial-{best.number:04}.\n"
    path = wanted.folder / "best.yaml"
    replace_file(path, [head, "#\n", f"#   python -m lightning_chatgpt fit -c {path}\n", yaml.safe_dump(config, sort_keys=False)])
    sign = 1 if wanted.direction == "minimize" else -1
    with plot(wanted.folder / "plots" / "history.png", title=f"{wanted.monitor} of {len(done)} trials") as axes:
        axes.set(xlabel="trial", ylabel=wanted.monitor)
        axes.plot([trial.number for trial in done], [trial.value for trial in done], "o", color=COLOURS[0], label="trial")
        so_far = [sign * min(sign * trial.value for trial in done[: i + 1]) for i in range(len(done))]
        axes.step([trial.number for trial in done], so_far, where="post", color=LIMIT_COLOUR, label="best so far")
        axes.legend(frameon=False)


def _tell(study: Any, wanted: Sweep) -> None:
    """Print all trials, the best first, and where that is."""
    from optuna.trial import TrialState
    from rich.console import Console
    from rich.table import Table

    from lightning_chatgpt.trials import shown

    sign = 1 if wanted.direction == "minimize" else -1
    table = Table(title=f"Trials in {wanted.folder}", title_justify="left")
    names = [key.rpartition(".")[2] for key in wanted.distributions]
    for column in ("trial", wanted.monitor, "", *(names if len(set(names)) == len(names) else wanted.distributions)):
        table.add_column(column, overflow="fold")
    states = {TrialState.COMPLETE: "", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
    made = [trial for trial in study.trials if trial.state in states]
    order = list(states)
    for trial in sorted(made, key=lambda t: (order.index(t.state), sign * (t.value or 0.0))):
        value = f"{trial.value:.4f}" if trial.value is not None else ""
        varied = [shown(wanted.settings(trial.params).get(key)) for key in wanted.distributions]
        table.add_row(f"{trial.number:04}", value, states[trial.state], *varied)
    Console(highlight=False).print(table)
    if not (wanted.folder / "best.yaml").is_file():
        raise UserError(f"{wanted.folder}: no trial was trained to its end; see what they said in its trial-…/output.txt")
    print(
        f"the best is in {wanted.run_folder(study.best_trial.number)}; its config trains again: "
        f"python -m lightning_chatgpt fit -c {wanted.folder / 'best.yaml'}"
    )
