"""The command line as a user meets it: verbs, run folders, messages, overlays, subclasses from outside."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from lightning_chatgpt.__main__ import main
from lightning_chatgpt.arguments import fill_switches
from tests.conftest import ARCHITECTURE, chat

CONFIGS = Path(__file__).parent.parent / "configs"
PAIRS = [("Hello", "Hi there!"), ("What is your name?", "I am GPT."), ("Bye", "See you.")]


def run(*arguments: str, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does, in a process of its own."""
    command = [sys.executable, "-m", "lightning_chatgpt", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=300, stdin=subprocess.DEVNULL)
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def refused(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that is refused; returns its one line."""
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    assert left.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with chats, a config, and the run that came of them."""
    folder = tmp_path_factory.mktemp("project")
    chats = [chat(*pair) for pair in PAIRS] * 8
    (folder / "chats.jsonl").write_text("".join(json.dumps(c.to_dict()) + "\n" for c in chats))
    config = {
        "trainer": {"default_root_dir": "runs/mine", "max_epochs": 2, "accelerator": "cpu", "log_every_n_steps": 1},
        "model": {"architecture": ARCHITECTURE, "learning_rate": 1e-2},
        "data": {"train": "chats.jsonl", "validation": "chats.jsonl", "max_leak": None, "vocab_size": 300, "batch_size": 4},
        "samples": {"prompts": ["Hello", "[b]Bye[/b]"], "max_new_tokens": 8},
        "throughput": {"window_size": 2},
    }
    (folder / "mine.yaml").write_text(yaml.safe_dump(config))
    done = run("fit", "-c", "mine.yaml", cwd=folder)
    assert "[b]Bye[/b]" in done.stdout  # a prompt that looks like markup is shown as it is
    assert "Traceback" not in done.stderr
    return folder


def test_the_run_folder_holds_what_was_promised(finished: Path) -> None:
    folder = finished / "runs" / "mine"
    names = {p.name for p in folder.iterdir()}
    assert {"config.yaml", "metrics.csv", "samples.jsonl", "checkpoints", "hf", "tensorboard"} <= names
    assert (folder / "checkpoints" / "last.ckpt").is_file()
    assert len(list((folder / "checkpoints").glob("epoch=*val_loss=*.ckpt"))) == 1
    hf = {p.name for p in (folder / "hf").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= hf
    assert list((folder / "tensorboard").glob("events.*"))


def test_its_checkpoint_loads_in_python(finished: Path, tmp_path: Path) -> None:
    from lightning_chatgpt import CausalLMModule

    shutil.copy(finished / "runs/mine/checkpoints/last.ckpt", tmp_path / "last.ckpt")
    module = CausalLMModule.load_from_checkpoint(tmp_path / "last.ckpt")
    assert module.learning_rate == 1e-2 and module.is_built


def test_what_is_logged(finished: Path) -> None:
    rows = list(csv.DictReader((finished / "runs/mine/metrics.csv").read_text().splitlines()))
    assert len([r for r in rows if r["train_loss"]]) == 12
    assert len([r for r in rows if r["val_loss"]]) == 2
    for name in ("learning_rate", "tokens_per_second", "val_perplexity", "val_token_accuracy", "val_bits_per_byte"):
        values = [float(r[name]) for r in rows if r[name]]
        assert values and min(values) >= 0, name
    assert not any("/" in name for name in rows[0])


def test_samples_are_taken_before_and_after_each_epoch(finished: Path) -> None:
    records = [json.loads(line) for line in (finished / "runs/mine/samples.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [0, 0, 6, 6, 12, 12]
    assert {r["prompt"] for r in records} == {"Hello", "[b]Bye[/b]"}
    assert all(set(r) == {"step", "prompt", "reply", "n_tokens", "finish_reason"} for r in records)


def test_a_finished_run_is_not_run_over(finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished)
    before = {p: p.stat().st_mtime_ns for p in (finished / "runs").rglob("*")}
    message = refused("fit", "-c", "mine.yaml", capsys=capsys)
    assert "runs/mine holds an earlier run" in message and "--overwrite true" in message and "--ckpt_path last" in message
    assert before == {p: p.stat().st_mtime_ns for p in (finished / "runs").rglob("*")}


def test_resume_and_overwrite(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "copy")
    folder = tmp_path / "copy"
    run("fit", "-c", "mine.yaml", "--ckpt_path", "last", "--trainer.max_epochs", "3", cwd=folder)
    mine = folder / "runs" / "mine"
    steps = [json.loads(line)["step"] for line in (mine / "samples.jsonl").read_text().splitlines()]
    assert max(steps) == 18
    earlier, rows = ((f / "metrics.csv").read_text().splitlines() for f in (finished / "runs/mine", mine))
    assert rows[: len(earlier)] == earlier and len(rows) == len(earlier) * 3 // 2  # one file, however often a run is taken up
    run("fit", "-c", "mine.yaml", "--overwrite", "true", "--trainer.max_epochs", "1", cwd=folder)
    assert max(json.loads(line)["step"] for line in (mine / "samples.jsonl").read_text().splitlines()) == 6
    assert not list(mine.glob("checkpoints/*step=1[28]*"))
    assert len(list((mine / "tensorboard").glob("events.*"))) == 1


def test_the_saved_config_serves_every_verb(finished: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished)
    config = ["-c", "runs/mine/config.yaml", "--ckpt_path", "best"]
    before = (finished / "runs/mine/metrics.csv").read_bytes(), (finished / "runs/mine/config.yaml").read_bytes()
    main(["validate", *config])
    assert "val_perplexity" in capfd.readouterr().out
    main(["test", *config, "--data.test", "chats.jsonl"])
    assert "test_perplexity" in capfd.readouterr().out
    main(["predict", *config, "--data.predict", "chats.jsonl", "--data.max_new_tokens", "8"])
    lines = [json.loads(line) for line in (finished / "runs/mine/predictions.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [f"chats.jsonl:{i}" for i in range(1, 25)]
    assert set(lines[0]) == {
        "id", "prompt", "reply", "reference", "prompt_tokens", "completion_tokens", "finish_reason",
    }  # fmt: skip
    assert not list((finished / "runs/mine").glob("*.part*"))
    assert before == ((finished / "runs/mine/metrics.csv").read_bytes(), (finished / "runs/mine/config.yaml").read_bytes())


def test_print_config_runs_again(finished: Path, tmp_path: Path) -> None:
    printed = run("fit", "-c", "mine.yaml", "--model.weight_decay", "0.3", "--print_config", cwd=finished).stdout
    settings = yaml.safe_load(printed)
    assert settings["model"]["init_args"]["weight_decay"] == 0.3
    (tmp_path / "again.yaml").write_text(printed)
    shutil.copy(finished / "chats.jsonl", tmp_path)
    run("fit", "-c", "again.yaml", "--trainer.max_steps", "1", cwd=tmp_path)
    assert (tmp_path / "runs/mine/checkpoints/last.ckpt").is_file()  # also where training ends amid an epoch


def test_chat_answers_from_every_kind_of_model(finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished)
    best = next((finished / "runs/mine/checkpoints").glob("epoch*.ckpt"))
    main(["export", str(best), "exported"])
    capsys.readouterr()
    replies = []
    for model in ("runs/mine", "runs/mine/hf", str(best), "exported"):
        main(["chat", model, "--prompt", "Hello", "--max_new_tokens", "8"])
        replies.append(capsys.readouterr().out)
    assert len(set(replies)) == 1
    assert "is not empty" in refused("export", "runs/mine", "exported", capsys=capsys)


def test_chat_takes_lines_from_a_pipe(finished: Path) -> None:
    command = [sys.executable, "-m", "lightning_chatgpt", "chat", "runs/mine", "--max_new_tokens", "4"]
    done = subprocess.run(command, cwd=finished, input="Hello\n\nBye\n", capture_output=True, text=True, check=True)
    assert "\x1b" not in done.stdout and "you>" not in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["fti"], "'fti' is no verb; did you mean fit?"),
        (["fit", "-c", "nope.yaml"], "nope.yaml: no such config file"),
        (["fit", "-c", "lightning_chatgpt:nope"], "no such shipped config; there are averaging, base, chitchat"),
        (["fit", "-c", "mine.yaml", "--model.learning_rat", "1"], "model.learning_rat is no setting; did you mean model.learning_rate?"),
        (["fit", "-c", "mine.yaml", "--model.learning_rate", "fast"], "learning_rate: 'fast' cannot be used; it takes float"),
        (["fit", "-c", "fresh.yaml", "--model.schedule", "cosin"], "model.schedule cosin is unknown; did you mean cosine"),
        (["fit", "-c", "fresh.yaml", "--model.optimizer", "adamww"], "model.optimizer adamww is none of torch.optim; did you mean adamw"),
        (["fit", "-c", "fresh.yaml", "--model.warmup_steps", "1.5"], "model.warmup_steps takes a whole number of optimizer steps"),
        (["fit", "-c", "fresh.yaml", "--trainer.precision", "bf"], "trainer.precision bf is unknown"),
        (["fit", "-c", "fresh.yaml", "--model.lora.rank", "1"], "model.lora adapts weights that are there; set model.pretrained"),
        (["fit", "-c", "fresh.yaml", "--model.pretrained", "start", "--model.lora.rank", "0"], "model.lora.rank must be at least 1, not 0"),
        (["fit", "-c", "mine.yaml", "--trainer.max_epochs", "many"], "trainer.max_epochs: 'many' cannot be used; it takes int or null"),
        (["fit", "-c", "typo.yaml"], "typo.yaml:3: data.batchsize is no setting; did you mean data.batch_size?"),
        (["fit", "-c", "group.yaml"], "group.yaml:1: modell is no setting; did you mean model?"),
        (["fit", "-c", "broken.yaml"], "broken.yaml:3: broken YAML"),
        (["fit", "-c", "list.yaml"], "list.yaml: expected 'key: value' lines"),
        (["fit", "-c", "mine.yaml", "--model.class_path", "no.Such"], "class_path no.Such: cannot be imported"),
        (["fit", "-c", "fresh.yaml", "--data.train", "nofile.jsonl"], "nofile.jsonl: no such file or folder"),
        (["fit", "-c", "fresh.yaml", "--data.train", "bad.jsonl"], "bad.jsonl:2: message 1: role 'bot' is unknown"),
        (["fit", "-c", "fresh.yaml", "--data.train", "cut.jsonl"], "cut.jsonl:2: the file ends at byte"),
        (["fit", "-c", "fresh.yaml", "--data.max_length", "4096"], "data.max_length 4096 is more than the model's 128 positions"),
        (["fit", "-c", "fresh.yaml", "--model.architecture", "null", "--model.pretrained", "gpt2"], "gpt2: no such folder here"),
        (["fit", "-c", "mine.yaml", "--ckpt_path", "last", "--overwrite", "true"], "overwrite and ckpt_path exclude each other"),
        (["fit", "-c", "fresh.yaml", "--model.architecture.n_layer", "four"], "n_layer must be a whole number of at least 1, not 'four'"),
        (["fit", "-c", "fresh.yaml", "--ckpt_path", "last"], "ckpt_path last: there is no whole checkpoint in runs/fresh/checkpoints"),
        (["chat", "runs/nothing"], "runs/nothing: no such folder"),
        (["chat", "runs/mine", "--temperature", "-1"], "temperature must be at least 0, not -1.0"),
        (["chat", "runs/mine", "--top_k", "5"], "only matter when sampling"),
        (["chat", "runs/mine", "--promt", "Hi"], "--promt is no option; did you mean --prompt?"),
        (["chat", "runs/mine", "--max-new-tokens", "5"], "--max-new-tokens is no option; did you mean --max_new_tokens?"),
        (["chat", "runs/mine", "--top_k", "many"], "top_k: 'many' cannot be used; it takes int"),
        (["chat"], "the following arguments are required: model; see lightning-chatgpt chat --help"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_line_and_exit_code_2(
    arguments: list[str], says: str, finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished)
    good = (finished / "chats.jsonl").read_text().splitlines()[0]
    (finished / "typo.yaml").write_text("data:\n  train: chats.jsonl\n  batchsize: 3\n")
    (finished / "group.yaml").write_text("modell: {pretrained: gpt2}\n")
    (finished / "broken.yaml").write_text("data:\n  train: [a\n")
    (finished / "list.yaml").write_text("- a\n- b\n")
    (finished / "bad.jsonl").write_text(f'{good}\n{{"messages": [{{"role": "bot", "content": "x"}}]}}\n')
    (finished / "cut.jsonl").write_text(f'{good}\n{{"messages": [')
    fresh = yaml.safe_load((finished / "mine.yaml").read_text())
    fresh["trainer"]["default_root_dir"] = "runs/fresh"
    (finished / "fresh.yaml").write_text(yaml.safe_dump(fresh))
    message = refused(*arguments, capsys=capsys)
    assert says in message, message
    assert len(message) < 400


OUTSIDE = """
from torch.optim import SGD

from lightning_chatgpt import CausalLMModule, ChatDataModule, Conversation, Message


class MyModel(CausalLMModule):
    def __init__(self, momentum: float = 0.5, **kwargs):
        super().__init__(**kwargs)
        self.momentum = momentum

    def build_optimizer(self):
        return SGD(self.parameters(), lr=self.learning_rate, momentum=self.momentum)


class MyData(ChatDataModule):
    def read(self, source):
        for i in range(20):
            yield Conversation((Message("user", f"{source} {i}?"), Message("assistant", f"{i}!")), id=f"{source}:{i}")
"""

OUTSIDE_CONFIG = """
trainer: {default_root_dir: runs/outside, max_steps: 3, accelerator: cpu}
model:
  class_path: my_package.MyModel
  init_args: {architecture: {n_layer: 1, n_head: 2, n_embd: 16, n_positions: 64}, momentum: 0.9, learning_rate: 0.1}
data:
  class_path: my_package.MyData
  init_args: {train: number, validation: 0.2, vocab_size: 300}
samples: {prompts: []}
"""

TEN_LINES = """
from lightning.pytorch import Trainer
from my_package import MyData, MyModel

model = MyModel(architecture={"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 64}, momentum=0.9)
data = MyData(train="number", validation=0.2, vocab_size=300)
trainer = Trainer(max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False)
trainer.fit(model, data)
print(type(trainer.optimizers[0]).__name__, trainer.global_step, float(trainer.callback_metrics["train_loss"]) > 0)
"""


def test_a_package_outside_subclasses_model_and_data(tmp_path: Path) -> None:
    (tmp_path / "my_package.py").write_text(OUTSIDE)
    (tmp_path / "outside.yaml").write_text(OUTSIDE_CONFIG)
    run("fit", "-c", "outside.yaml", cwd=tmp_path)
    import torch

    saved = torch.load(tmp_path / "runs/outside/checkpoints/last.ckpt", weights_only=True)
    assert saved["hyper_parameters"]["momentum"] == 0.9
    assert saved["optimizer_states"][0]["param_groups"][0]["momentum"] == 0.9
    run("chat", "runs/outside", "--prompt", "number 3?", "--max_new_tokens", "4", cwd=tmp_path)
    run("validate", "-c", "runs/outside/config.yaml", "--ckpt_path", "last", cwd=tmp_path)
    typo = run("fit", "-c", "outside.yaml", "--model.momentun", "1", cwd=tmp_path, code=2)
    assert "model.momentun is no setting; did you mean model.momentum?" in typo.stderr
    done = subprocess.run([sys.executable, "-c", TEN_LINES], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "SGD 3 True"


SHORT = ["--trainer.max_steps", "2", "--trainer.limit_val_batches", "2", "--trainer.accelerator", "cpu"]


IN_DOCS = ("quickstart", "chitchat", "pretrain", "finetune", "gpt2", "base", "lora")  # which test_docs runs
SELDOM = [pytest.param(name, marks=pytest.mark.faults) for name in (*IN_DOCS, "sweep") if name != "finetune"]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(p.stem for p in CONFIGS.glob("*.yaml") if p.stem not in (*IN_DOCS, "sweep")) + SELDOM)
def test_every_shipped_config_runs(name: str, tmp_path: Path, plain_gpt2: Path, write_chats: Callable[..., Path]) -> None:
    """Shortened to two steps; gpt2.yaml with a small GPT-2 in place of the hub's, the pretraining config with its second stage."""
    extra: list[str] = []
    if name in ("base", "chitchat", "pretrain"):
        extra = ["--data.train", "corpus:chatterbot/english"]  # read in a moment; nothing else about them changes
    if name == "gpt2":
        extra = ["--model.pretrained", str(plain_gpt2), "--data.train", "corpus:chatterbot/english", "--data.max_length", "128"]
    if name == "sweep":  # trains another config, in as many runs as it has trials
        short = ["--space.trainer.max_steps=2", "--space.trainer.val_check_interval=2", "--space.trainer.limit_val_batches=1"]
        run("sweep", "-c", "lightning_chatgpt:sweep", "--trials", "1", *short, cwd=tmp_path)
        assert (tmp_path / "runs/sweep/trial-0000/hf/model.safetensors").is_file()
        assert yaml.safe_load((tmp_path / "runs/sweep/best.yaml").read_text())["trainer"]["default_root_dir"] == "runs/sweep/best"
        return
    run("fit", "-c", f"lightning_chatgpt:{name}", *SHORT, *extra, cwd=tmp_path)
    assert (tmp_path / f"runs/{name}/hf/model.safetensors").is_file()
    if name == "pretrain":
        run("fit", "-c", str(CONFIGS / "finetune.yaml"), *SHORT, cwd=tmp_path)
        assert (tmp_path / "runs/finetune/checkpoints/last.ckpt").is_file()


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "fsdp", "deepspeed"])
def test_overlays_change_where_and_nothing_else(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU strategies are parsed, not run: this machine may have none."""
    from lightning_chatgpt.cli import ChatCLI

    class Parsed(ChatCLI):
        def instantiate_classes(self) -> None:
            """Stop after parsing."""

        def _run_subcommand(self, subcommand: str) -> None:
            """Stop after parsing."""

    monkeypatch.chdir(tmp_path)
    plain = Parsed(["fit", "-c", "lightning_chatgpt:quickstart"]).config["fit"]
    overlaid = Parsed(["fit", "-c", "lightning_chatgpt:quickstart", "-c", f"lightning_chatgpt:strategy/{name}"]).config["fit"]
    for key in ("model", "data", "samples", "checkpoint", "seed_everything"):
        assert plain[key] == overlaid[key]
    changed = {k for k, v in vars(plain["trainer"]).items() if vars(overlaid["trainer"])[k] != v}
    assert "strategy" in changed and changed <= {"strategy", "accelerator", "devices"}


def test_half_precision_with_clipping_learns_the_same(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against Lightning's refusal to clip for a fused optimizer in mixed precision."""
    monkeypatch.chdir(finished)
    losses = {}
    for precision in ("32-true", "bf16-mixed", "bf16-true"):
        settings = ["--trainer.precision", precision, "--trainer.gradient_clip_val", "0.5", "--trainer.log_every_n_steps", "1"]
        main(["fit", "-c", "mine.yaml", *settings, "--trainer.max_epochs", "1", "--trainer.default_root_dir", f"runs/{precision}"])
        with (finished / f"runs/{precision}/metrics.csv").open() as rows:
            losses[precision] = [float(row["train_loss"]) for row in csv.DictReader(rows) if row["train_loss"]]
    assert len(losses["32-true"]) == 6
    for precision, tolerance in (("bf16-mixed", 2e-2), ("bf16-true", 6e-2)):  # the second keeps its weights in three digits
        assert losses[precision] == pytest.approx(losses["32-true"], rel=tolerance) and losses[precision] != losses["32-true"]


def test_a_strategy_that_cannot_be_says_so_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against jsonargparse's page about the types a strategy may have, and Lightning's traceback."""
    monkeypatch.chdir(tmp_path)
    on_top = ["fit", "-c", "lightning_chatgpt:quickstart", "--trainer.accelerator", "cpu", "-c"]
    if find_spec("deepspeed") is None:
        said = refused(*on_top, "lightning_chatgpt:strategy/deepspeed", capsys=capsys)
        assert said == "error: trainer.strategy ZeroStrategy needs the package deepspeed; pip install deepspeed"
    said = refused(*on_top, "lightning_chatgpt:strategy/fsdp", "--trainer.accelerator", "cpu", capsys=capsys)
    assert said.startswith("error: trainer: The strategy `fsdp` requires a GPU accelerator")


def test_a_switch_alone_is_true() -> None:
    switches = {"--overwrite", "--blind"}
    assert fill_switches(["fit", "--overwrite", "-c", "x.yaml", "--blind"], switches) == [
        "fit",
        "--overwrite=true",
        "-c",
        "x.yaml",
        "--blind=true",
    ]
    for given in ([], ["--overwrite", "True"], ["--overwrite=false", "--batch", "1"], ["--blind", "no", "a"]):
        assert fill_switches(given, switches) == given


def test_help_of_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("fit", "validate", "test", "predict", "chat", "evaluate", "explain", "sweep", "export", "tokenizer"):
        with pytest.raises(SystemExit) as left:
            main([verb, "--help"])
        assert left.value.code == 0
        assert "--" in capsys.readouterr().out
    main(["--help"])
    overview = capsys.readouterr().out
    assert all(
        f"  {verb} " in overview
        for verb in ("fit", "validate", "test", "predict", "chat", "evaluate", "explain", "sweep", "export", "tokenizer")
    )
