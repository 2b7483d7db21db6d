"""A sweep: what is tried, that it goes on however it ended, what it writes; most of it with a stand-in for ``fit``."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_chatgpt import trials
from lightning_chatgpt.__main__ import main
from lightning_chatgpt.errors import ConfigError
from tests.conftest import ARCHITECTURE, chat
from tests.test_cli import refused, run

# Its val_loss falls to (x - 0.3)² in three validations. What else it does depends on x, and is noted in its folder.
STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path

given = dict(word[2:].split("=", 1) for word in sys.argv[1:] if "=" in word)
if "--print_config" in sys.argv:
    sys.exit("error: command line: model.y is no setting; did you mean model.x?" if "model.y" in given else 0)
rules = json.loads(Path("rules.json").read_text())
folder = Path(given["trainer.default_root_dir"])
number = int(folder.name[-4:])
with (folder / "starts").open("a") as starts:
    starts.write(json.dumps(given) + "\\n")
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
if number in rules.get("fails", []):
    print("Seed set to 0", flush=True)
    sys.exit("error: data.train is broken; mend it")
(folder / "config.yaml").write_text(json.dumps({"trainer": {"default_root_dir": str(folder)}, "model": {"x": float(given["model.x"])}}))
rows = ["step,val_loss"]
for step in range(3):
    worst = 9 if number in rules.get("hopeless", []) else 0
    rows.append(f"{step},{(float(given['model.x']) - 0.3) ** 2 + 2 - step + worst!r}")
    (folder / "metrics.csv").write_text("\\n".join(rows) + "\\n")
    if worst or number in rules.get("waits", []) and "ckpt_path" not in given:
        if number in rules.get("interrupts", []):
            os.kill(os.getppid(), signal.SIGINT)
        (folder / "waiting").touch()
        time.sleep(30)
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A folder with a sweep's config, where the stand-in trains."""

    def build(**rules: list[int]) -> Path:
        Path("rules.json").write_text(json.dumps(rules))
        return tmp_path

    monkeypatch.chdir(tmp_path)
    Path("fit.py").write_text(STAND_IN)
    Path("base.yaml").write_text("model: {x: 0.5}\n")
    space = {"model.x": {"low": 0.0, "high": 1.0}, "data.kind": {"choices": ["a", None, 3]}, "trainer": {"max_epochs": 2}}
    Path("sweep.yaml").write_text(yaml.safe_dump({"fit": "base.yaml", "space": space, "trials": 3, "folder": "sweep"}))
    real = trials.fit_command
    monkeypatch.setattr(trials, "_POLL_SECONDS", 0.02)
    monkeypatch.setattr(trials, "fit_command", lambda *given: [sys.executable, "fit.py", *real(*given)[4:]])
    return build


def starts(folder: str = "sweep") -> list[list[dict[str, str]]]:
    """What each trial was started with, each time."""
    return [[json.loads(line) for line in path.read_text().splitlines()] for path in sorted(Path(folder).glob("trial-*/starts"))]


def states(folder: str = "sweep") -> list[str]:
    import optuna

    return [trial.state.name for trial in optuna.load_study(study_name="sweep", storage=f"sqlite:///{folder}/study.db").trials]


def test_the_best_is_found_and_written(project: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    project()
    main(["sweep", "-c", "sweep.yaml"])
    said = capsys.readouterr().out
    given = [only for (only,) in starts()]
    assert len(given) == 3 and {g["trainer.max_epochs"] for g in given} == {"2"} and len({g["model.x"] for g in given}) == 3
    assert {g["data.kind"] for g in given} <= {"a", "null", "3"}
    values = [(float(g["model.x"]) - 0.3) ** 2 for g in given]
    best = values.index(min(values))
    for number, value in enumerate(values):
        assert f"trial-{number:04}: val_loss {value:.4f}" in said
    assert f"the best is in sweep/trial-{best:04}" in said and "python -m lightning_chatgpt fit -c sweep/best.yaml" in said
    written = Path("sweep/best.yaml").read_text()
    assert yaml.safe_load(written) == {"trainer": {"default_root_dir": "sweep/best"}, "model": {"x": float(given[best]["model.x"])}}
    assert f"val_loss {min(values):.4f} in trial-{best:04}" in written.splitlines()[0]
    assert Path("sweep/plots/history.png").read_bytes().startswith(b"\x89PNG")

    main(["sweep", "-c", "sweep.yaml"])
    assert "sweep: its 3 trials are made; raise trials to go on" in capsys.readouterr().out
    main(["sweep", "-c", "sweep.yaml", "--trials", "4"])
    main(["sweep", "-c", "sweep.yaml", "--trials", "4", "--folder", "other"])
    same = [[{k: v for k, v in g.items() if k != "trainer.default_root_dir"} for g in trial] for trial in starts()]
    assert len(same) == 4 and same == [
        [{k: v for k, v in g.items() if k != "trainer.default_root_dir"} for g in trial] for trial in starts("other")
    ]


def test_a_trial_that_fails_is_recorded_and_three_in_succession_end_it(
    project: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    project(fails=[0, 2, 3, 4])
    message = refused("sweep", "-c", "sweep.yaml", "--trials", "9", capsys=capsys)
    assert message.startswith("error: 3 trials in succession failed, the last of them: data.train is broken; mend it; ")
    assert states() == ["FAIL", "COMPLETE", "FAIL", "FAIL", "FAIL"]
    project()
    main(["sweep", "-c", "sweep.yaml", "--trials", "6"])
    assert "trial-0005: val_loss" in capsys.readouterr().out and states()[5:] == ["COMPLETE"]


def test_a_hopeless_trial_is_stopped(project: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    project(hopeless=[4])
    main(["sweep", "-c", "sweep.yaml", "--trials", "6"])
    assert "trial-0004: val_loss 1" in (said := capsys.readouterr().out) and "pruned after 1 validation(s)" in said
    assert states() == ["COMPLETE"] * 4 + ["PRUNED", "COMPLETE"]


def test_ctrl_c_stops_the_trial_and_the_sweep_goes_on_with_it(project: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    project(waits=[1], interrupts=[1])
    with pytest.raises(SystemExit) as left:
        main(["sweep", "-c", "sweep.yaml"])
    assert left.value.code == 130 and "goes on with trial-0001" in capsys.readouterr().err
    assert states() == ["COMPLETE", "WAITING"]
    main(["sweep", "-c", "sweep.yaml"])
    assert states() == ["COMPLETE"] * 3
    (first, again) = starts()[1]
    assert again == {**first, "ckpt_path": "auto"}


def test_a_killed_sweep_is_taken_up(project: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against a trial that is running for ever, as far as the study knows."""
    folder = project(waits=[1])
    script = (
        "import sys\nfrom lightning_chatgpt import trials\nreal = trials.fit_command\n"
        "trials.fit_command = lambda *given: [sys.executable, 'fit.py', *real(*given)[4:]]\n"
        "from lightning_chatgpt.__main__ import main\nmain(['sweep', '-c', 'sweep.yaml'])"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=folder, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not Path("sweep/trial-0001/waiting").exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    assert "another sweep is at work there" in refused("sweep", "-c", "sweep.yaml", capsys=capsys)
    process.kill()
    process.wait()
    assert states() == ["COMPLETE", "RUNNING"]
    main(["sweep", "-c", "sweep.yaml"])
    assert states() == ["COMPLETE"] * 3
    (first, again) = starts()[1]
    assert again == {**first, "ckpt_path": "auto"}


def test_a_process_ends_with_the_one_that_started_it() -> None:
    """Guards against a trial that trains on, unseen, while the sweep that was killed is taken up."""
    child = (
        "import time; from lightning_chatgpt.processes import end_with_parent; end_with_parent(); print('up', flush=True); time.sleep(60)"
    )
    parent = f"import sys, time; from lightning_chatgpt.trials import start; start([sys.executable, '-c', {child!r}], None); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    process.kill()
    assert process.communicate(timeout=30)[0] == ""  # the pipe is closed when the last who holds it is gone


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["sweep"], "a sweep needs fit, the config to train, and space"),
        (["sweep", "-c", "nope.yaml"], "nope.yaml: no such config file"),
        (["sweep", "-c", "sweep.yaml", "--fit", "nope.yaml"], "nope.yaml: no such config file"),
        (["sweep", "-c", "sweep.yaml", "--trails", "3"], "--trails is no option; did you mean --trials?"),
        (["sweep", "-c", "typo.yaml"], "trails is no option; did you mean trials?"),
        (["sweep", "-c", "sweep.yaml", "--trials", "0"], "trials must be at least 1, not 0"),
        (["sweep", "-c", "sweep.yaml", "--space", '{"model.y": {"choices": [1]}}'], "model.y is no setting; did you mean model.x?"),
        (["sweep", "-c", "sweep.yaml", "--space", '{"model.x": 1}'], "space varies nothing"),
        (["sweep", "-c", "sweep.yaml", "--space", '{"ckpt_path": "last"}'], "space.ckpt_path is what a sweep sets by itself"),
        (["sweep", "-c", "sweep.yaml", "--folder", "lost"], "lost holds trials, but no study.db"),
    ],
)  # fmt: skip
def test_what_cannot_be_tried_is_refused_before_the_first_trial(
    arguments: list[str], says: str, project: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    project()
    Path("typo.yaml").write_text("trails: 3\n")
    Path("lost/trial-0000").mkdir(parents=True)
    if len(arguments) > 3 and "nope" not in says and "option" not in says:
        assert says in refused(*arguments, capsys=capsys)
    else:
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert left.value.code == 2 and says in capsys.readouterr().err
    assert not Path("sweep").exists()


def test_another_search_in_the_same_folder_is_refused(project: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    project()
    main(["sweep", "-c", "sweep.yaml", "--trials", "1"])
    for arguments, name in ((["--space.model.x.high", "2"], "space"), (["--monitor", "val_perplexity"], "monitor")):
        assert f"sweep holds a sweep with another {name}" in refused("sweep", "-c", "sweep.yaml", *arguments, capsys=capsys)
    Path("base.yaml").write_text("model: {x: 0.6}\n")
    assert "sweep holds a sweep with another fit" in refused("sweep", "-c", "sweep.yaml", capsys=capsys)


def test_optuna_that_is_missing_is_told(
    project: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    project()
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert "pip install 'lightning-chatgpt[sweep]'" in refused("sweep", "-c", "sweep.yaml", capsys=capsys)


def test_the_space_is_read() -> None:
    varied, fixed = trials.read_space(
        {
            "model": {"learning_rate": {"low": 1e-5, "high": 1e-2, "log": True}, "schedule": "wsd"},
            "data": {"max_length": {"low": 4, "high": 16, "step": 4}, "batch_size": {"choices": [1, 2]}},
            "data.batch_size": 8,  # once more, as the command line says it
            "model.lora": {"choices": [None, {"rank": 8}]},
            "samples.prompts": [],
            "data.mixture": {},
        }
    )
    assert fixed == {"model.schedule": "wsd", "data.batch_size": 8, "samples.prompts": [], "data.mixture": {}}
    assert varied.keys() == {"model.learning_rate", "data.max_length", "model.lora"}
    rate, size, lora = (varied[key] for key in ("model.learning_rate", "data.max_length", "model.lora"))
    assert (rate.low, rate.high, rate.log) == (1e-5, 1e-2, True)
    assert (size.low, size.high, size.step, type(size).__name__) == (4, 16, 4, "IntDistribution")
    assert [json.loads(choice) for choice in lora.choices] == [None, {"rank": 8}]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"low": 1}, "space.k takes low and high, two numbers"),
        ({"low": "a", "high": 2}, "space.k takes low and high, two numbers"),
        ({"low": 1, "high": 2, "steps": 1}, "space.k.steps is no setting; did you mean step?"),
        ({"low": 0.0, "high": 2.0, "log": True}, "space.k: "),
        ({"low": 3, "high": 2}, "space.k: "),
        ({"choices": []}, "space.k takes choices, a list"),
        ({"choices": [1], "low": 1}, "space.k takes choices, a list"),
    ],
)
def test_a_distribution_that_cannot_be_is_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match="^[^\n]*$") as error:
        trials.read_space({"k": given})
    assert str(error.value).startswith(says)


def test_a_row_that_is_being_written_is_not_read(tmp_path: Path) -> None:
    """Guards against taking 3.7 for 3.71234."""
    path = tmp_path / "metrics.csv"
    assert trials.logged(path, "val_loss") == []
    path.write_text("step,val_loss,train_loss\n1,,4.5\n2,3.5,\n3,3.7")
    assert trials.logged(path, "val_loss") == [3.5] and trials.logged(path, "other") == []


def test_the_error_of_a_command_is_found(tmp_path: Path) -> None:
    path = tmp_path / "output.txt"
    path.write_text("Seed set to 0\n 10%\r 20%\nerror: first\nerror: data.train is not set\nbye\n")
    assert trials.last_error(path, 2) == "data.train is not set"
    assert "SIGKILL" in trials.last_error(path, -9)
    path.write_text("Traceback\nKeyError: 'x'\n\n")
    assert trials.last_error(path, 1) == "KeyError: 'x'"


@pytest.mark.slow
def test_the_best_config_trains_what_its_trial_trained(tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat(f"Hello {i}", "Hi there!").to_dict()) + "\n" for i in range(24)))
    config = {
        "trainer": {"accelerator": "cpu", "devices": 1, "max_epochs": 2},
        "model": {"architecture": ARCHITECTURE},
        "data": {"train": "chats.jsonl", "validation": "chats.jsonl", "max_leak": None, "vocab_size": 300, "batch_size": 8},
        "samples": {"prompts": []},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    space = {"model.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"fit": "mine.yaml", "space": space, "trials": 2}))
    refusal = run("sweep", "-c", "sweep.yaml", "--space", '{"model.learning_rat": {"choices": [1]}}', cwd=tmp_path, code=2)
    assert "error: space: model.learning_rat is no setting; did you mean model.learning_rate?" in refusal.stderr
    said = run("sweep", "-c", "sweep.yaml", cwd=tmp_path).stdout
    assert "trial-0001: val_loss" in said

    def losses(folder: Path) -> list[str]:
        return [row["val_loss"] for row in csv.DictReader((folder / "metrics.csv").read_text().splitlines()) if row["val_loss"]]

    run("fit", "-c", "runs/sweep/best.yaml", cwd=tmp_path)
    best = min((tmp_path / f"runs/sweep/trial-000{i}" for i in range(2)), key=lambda folder: min(map(float, losses(folder))))
    assert len(losses(best)) == 2 and losses(tmp_path / "runs/sweep/best") == losses(best)
