"""One loss whatever the lay-out: gradients and losses of 20 optimizer steps through the CLI, against a float64 loop over transformers.

An optimizer step reads the same eight chats in one batch of eight, four of two, eight of one, and in two processes with two batches of
two: so losses, gradients and clipping must be the same, and those of one float64 batch. A mean of means is out by 4 % a step.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch import Callback
from transformers import GPT2LMHeadModel

from lightning_chatgpt.chat.tokenizer import train_tokenizer
from tests.conftest import ARCHITECTURE
from tests.test_cli import run

pytestmark = pytest.mark.slow

N_STEPS = 20
N_CHATS = 61  # not a multiple of eight: the last step of an epoch is a short one
CLIP = 0.5
SETTINGS = {"learning_rate": 1e-3, "weight_decay": 0.1, "schedule": "constant"}
LAYOUTS = {"1x8": (1, 8, 1), "4x2": (1, 2, 4), "8x1": (1, 1, 8), "2 ranks x 2 x 2": (2, 2, 2)}  # processes, rows, micro-batches
DATA: dict[str, dict[str, Any]] = {"padded": {}, "grouped": {"group_by_length": True}, "packed": {"packing": True}}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


class Step(NamedTuple):
    """What an optimizer step was made of.

    Attributes:
        examples: Ids and loss weights of each chat it read, in no order.
        loss: The logged train_loss.
        gradients: By parameter, before clipping.
        weights: By parameter, after the step.
    """

    examples: list[tuple[tuple[int, ...], tuple[float, ...]]]
    loss: float
    gradients: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]


class Recorder(Callback):
    """Writes each step's examples, loss, gradients and weights to the run folder, one file a process."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.examples: list[Any] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        for ids, weights, positions, mask in zip(
            batch["input_ids"], batch["loss_weights"], batch["position_ids"], batch["attention_mask"], strict=True
        ):
            starts = [i for i in range(int(mask.sum())) if positions[i] == 0]
            for start, end in zip(starts, [*starts, int(mask.sum())][1:], strict=True):
                self.examples.append((tuple(ids[start:end].tolist()), tuple(weights[start:end].tolist())))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        gradients = {name: p.grad.clone() for name, p in pl_module.network.named_parameters()}
        self.steps.append({"examples": self.examples, "gradients": gradients})
        self.examples = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.step_loss.made:
            weights = {name: p.detach().clone() for name, p in pl_module.network.named_parameters()}
            self.steps[-1] |= {"weights": weights, "loss": pl_module.step_loss.made["train_loss"].item()}

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        torch.save(self.steps, f"{trainer.default_root_dir}/steps.{trainer.global_rank}.pt")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chats of very different lengths and weights, and a small model that starts from weights of its own."""
    folder = tmp_path_factory.mktemp("equivalence")
    texts = [f"question {i} " * (1 + i % 5) for i in range(N_CHATS)]
    answers = [f"answer {i} " * (1 + 7 * (i % 4 == 0)) for i in range(N_CHATS)]
    with (folder / "chats.jsonl").open("w") as lines:
        for i, (text, answer) in enumerate(zip(texts, answers, strict=True)):
            messages = [{"role": "user", "content": text}, {"role": "assistant", "content": answer, "weight": (1, 0.3)[i % 3 == 0]}]
            lines.write(json.dumps({"messages": messages}) + "\n")
    tokenizer = train_tokenizer(texts + answers, vocab_size=320)
    tokenizer.save_pretrained(folder / "start")
    torch.manual_seed(0)
    from transformers import GPT2Config

    config = GPT2Config(**ARCHITECTURE, **NO_DROPOUT, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, initializer_range=0.2)
    GPT2LMHeadModel(config).save_pretrained(folder / "start")
    return folder


def train(project: Path, kind: str, layout: str) -> list[Step]:
    n_processes, batch_size, n_micro_batches = LAYOUTS[layout]
    name = f"{kind} {layout}".replace(" ", "-")
    config = {
        "trainer": {
            "default_root_dir": f"runs/{name}", "accelerator": "cpu", "devices": n_processes, "max_steps": N_STEPS, "max_epochs": -1,
            "accumulate_grad_batches": n_micro_batches, "gradient_clip_val": CLIP, "enable_progress_bar": False, "log_every_n_steps": 1,
            "strategy": "ddp" if n_processes > 1 else "auto", "callbacks": [{"class_path": "tests.test_equivalence.Recorder"}],
        },
        "model": {"pretrained": "start", **SETTINGS},
        "data": {"train": "chats.jsonl", "validation": None, "batch_size": batch_size, "max_length": 128, **DATA[kind]},
        "samples": {"prompts": []},
    }  # fmt: skip
    (project / f"{name}.yaml").write_text(yaml.safe_dump(config))
    run("fit", "-c", f"{name}.yaml", cwd=project)
    ranks = [torch.load(project / f"runs/{name}/steps.{rank}.pt") for rank in range(n_processes)]
    assert [len(steps) for steps in ranks] == [N_STEPS] * n_processes
    found = []
    for parts in zip(*ranks, strict=True):
        examples = [example for part in parts for example in part["examples"]]
        assert len({part["loss"] for part in parts}) == 1  # each process logs the loss of all
        found.append(Step(examples, parts[0]["loss"], parts[0]["gradients"], parts[0]["weights"]))
    return found


@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.faults if name == "grouped" else ()) for name in DATA])
def runs(request: pytest.FixtureRequest, project: Path) -> dict[str, list[Step]]:
    """The same 20 steps in every lay-out."""
    return {layout: train(project, request.param, layout) for layout in LAYOUTS}


def in_float64(project: Path, steps: list[Step]) -> list[Step]:
    """The same steps by a plain loop: each chat alone, transformers' own logits, torch's own optimizer and clipping."""
    model = GPT2LMHeadModel.from_pretrained(project / "start").double().train()
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": SETTINGS["weight_decay"]}, {"params": vectors, "weight_decay": 0.0}],
        lr=SETTINGS["learning_rate"],
        betas=(0.9, 0.95),
    )
    found = []
    for step in steps:
        optimizer.zero_grad()
        weight = sum(sum(weights[1:]) for _, weights in step.examples)
        loss = torch.zeros((), dtype=torch.float64)
        for ids, weights in step.examples:
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
            nll = F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
            loss = loss + (nll * torch.tensor(weights[1:], dtype=torch.float64)).sum() / weight
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        found.append(Step(step.examples, loss.item(), gradients, {n: p.detach().clone() for n, p in model.named_parameters()}))
    return found


def distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Relative distance of all parameters together."""
    difference = sum((ours[name].double() - theirs[name].double()).square().sum().item() for name in theirs)
    return (difference / sum(tensor.double().square().sum().item() for tensor in theirs.values())) ** 0.5


def test_a_step_reads_the_same_chats_in_every_layout(runs: dict[str, list[Step]]) -> None:
    whole = runs["1x8"]
    assert sorted(len(step.examples) for step in whole)[0] < sorted(len(step.examples) for step in whole)[-1]  # the last one of an epoch
    for steps in runs.values():
        assert [sorted(step.examples) for step in steps] == [sorted(step.examples) for step in whole]
    assert len({weights for step in whole for _, weights in step.examples}) > 10


def test_losses_and_gradients_are_those_of_one_float64_batch(runs: dict[str, list[Step]], project: Path) -> None:
    reference = in_float64(project, runs["1x8"])
    norms = [sum(g.square().sum() for g in step.gradients.values()).sqrt().item() for step in reference]
    assert min(norms) > CLIP  # clipping is at work in every step
    for layout, steps in runs.items():
        first = distance(steps[0].gradients, reference[0].gradients)
        assert first < 1e-6, layout
        losses = [(ours.loss - theirs.loss) / theirs.loss for ours, theirs in zip(steps, reference, strict=True)]
        # Rounding grows along a trajectory, as the weights part; a wrong weight of a batch is out by 1e-2 in the first step.
        assert max(map(abs, losses)) < 5e-6, layout
        assert abs(sum(losses)) / N_STEPS < 1e-6, layout  # a drift to one side
        gradients = [distance(ours.gradients, theirs.gradients) for ours, theirs in zip(steps, reference, strict=True)]
        assert max(gradients) < 1e-4, layout
        # Adam makes whole steps of gradients that are nothing but rounding, such as those of the keys' biases.
        assert distance(steps[-1].weights, reference[-1].weights) < 1e-4, layout


def test_the_loss_of_each_step_is_logged(runs: dict[str, list[Step]], project: Path) -> None:
    kind = next(kind for kind in reversed(DATA) if (project / f"runs/{kind}-1x8").is_dir())
    for layout, steps in runs.items():
        with (project / f"runs/{kind} {layout}".replace(" ", "-") / "metrics.csv").open() as file:
            logged = [float(row["train_loss"]) for row in csv.DictReader(file) if row["train_loss"]]
        assert logged == pytest.approx([step.loss for step in steps], rel=1e-6)
