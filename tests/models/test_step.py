"""An optimizer step: nothing is learnt from nothing, half precision does not overflow, and a subclass may have a loss of its own."""

from __future__ import annotations

from pathlib import Path
from shutil import which
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils.data import DataLoader

from lightning_chatgpt import CausalLMModule, SampleGeneration
from lightning_chatgpt.data.collate import Batch, collate
from lightning_chatgpt.errors import ConfigError
from lightning_chatgpt.models.loss import token_losses
from lightning_chatgpt.models.step import SCALE
from tests.conftest import trainer

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

pytestmark = pytest.mark.filterwarnings("ignore:You defined a .validation_step.")


def batch(n_supervised: int, *, seed: int = 0) -> Batch:
    """Two rows of 40 tokens, some of them supervised."""
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(2):
        weights = np.zeros(40, dtype=np.float32)
        weights[1 : 1 + n_supervised] = 1
        rows.append([(generator.integers(0, 500, 40, dtype=np.int32), weights)])
    return collate(rows, pad_token_id=0)


class Weights(Callback):
    """Keeps all weights after each optimizer step."""

    def __init__(self) -> None:
        self.after: list[torch.Tensor] = []
        self.losses: list[float] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.after.append(torch.nn.utils.parameters_to_vector(pl_module.parameters()).detach().clone())

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.step_loss.made:
            self.after.append(torch.nn.utils.parameters_to_vector(pl_module.parameters()).detach().clone())
            self.losses.append(float(pl_module.step_loss.made["train_loss"]))


def fit(module: CausalLMModule, batches: list[Batch], folder: Path, **settings: Any) -> Weights:
    weights = Weights()
    run = trainer(folder, max_epochs=1, callbacks=[weights], gradient_clip_val=1.0, **settings)
    run.fit(module, DataLoader(batches, batch_size=None))
    return weights


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_with_nothing_supervised_changes_nothing(accumulate: int, plain_gpt2: Path, tmp_path: Path) -> None:
    """Guards against NaN from 0 / 0, and against weights that decay or follow momentum where nothing was learnt."""
    batches = [batch(n) for n in (5, 0, 7) for _ in range(accumulate)]
    module = CausalLMModule(pretrained=str(plain_gpt2), learning_rate=1e-2, weight_decay=0.5, schedule="constant")
    found = fit(module, batches, tmp_path, accumulate_grad_batches=accumulate)
    before, first, second, third = found.after
    assert not torch.equal(before, first) and not torch.equal(second, third)
    assert torch.equal(first, second)
    assert third.isfinite().all()


def test_a_micro_batch_with_nothing_supervised_weighs_nothing(plain_gpt2: Path, tmp_path: Path) -> None:
    found = []
    for batches in ([batch(5)], [batch(0), batch(5)]):
        seed_everything(0, verbose=False)
        module = CausalLMModule(pretrained=str(plain_gpt2), architecture=NO_DROPOUT)
        found += fit(module, batches, tmp_path, accumulate_grad_batches=len(batches)).losses
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_a_subclass_may_say_what_its_loss_is(plain_gpt2: Path, tmp_path: Path) -> None:
    """What its training_step returns is back-propagated as it is."""

    class Own(CausalLMModule):
        def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
            return token_losses(self.network, batch).mean()

    class Norms(Callback):
        norms: ClassVar[list[float]] = []

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            gradients = [p.grad for p in pl_module.parameters()]
            self.norms.append(torch.stack([g.norm() for g in gradients]).norm().item())

    for kind in (Own, CausalLMModule):
        seed_everything(0, verbose=False)
        module = kind(pretrained=str(plain_gpt2), architecture=NO_DROPOUT)
        trainer(tmp_path, max_epochs=1, callbacks=[Norms()]).fit(module, DataLoader([batch(5)], batch_size=None))
    assert Norms.norms[0] == pytest.approx(Norms.norms[1], rel=1e-5)


def test_float16_does_not_overflow(plain_gpt2: Path) -> None:
    """Guards against summed losses in float16: scaled as Lightning's 16-mixed scales, 32,000 supervised tokens stay finite."""
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(plain_gpt2).eval()
    ids = np.random.default_rng(0).integers(0, 500, 128, dtype=np.int32)
    large = collate([[(ids, np.ones(128, dtype=np.float32))]] * 250, pad_token_id=0)
    gradients = []
    for dtype in (torch.float32, torch.float16):
        model.zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            losses = token_losses(model, large)
        assert losses.total.dtype == torch.float32 and len(losses.nll) > 30_000
        scale = 2.0**16 if dtype == torch.float16 else 1.0
        (losses.total / SCALE * scale).backward()
        gradients.append(torch.nn.utils.parameters_to_vector([p.grad for p in model.parameters()]) / scale)
    assert gradients[1].isfinite().all()
    assert (gradients[1] - gradients[0]).norm() < 0.02 * gradients[0].norm()


class Held(Callback):
    """Keeps how many parameters have gradients when a micro-batch begins, and when the optimizer is about to step."""

    def __init__(self) -> None:
        self.before_batch: list[int] = []
        self.before_step: list[int] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.before_batch.append(sum(p.grad is not None for p in pl_module.parameters()))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.before_step.append(sum(p.grad is not None for p in pl_module.parameters()))


def test_gradients_are_freed_when_they_were_used(plain_gpt2: Path, tmp_path: Path) -> None:
    """Guards against a copy of the network's size that is held while the next batch is at its largest."""
    held = Held()
    module = CausalLMModule(pretrained=str(plain_gpt2))
    run = trainer(tmp_path, max_epochs=1, accumulate_grad_batches=2, callbacks=[held])
    run.fit(module, DataLoader([batch(3, seed=i) for i in range(4)], batch_size=None))
    n = len(list(module.parameters()))
    assert held.before_batch == [0, n, 0, n] and held.before_step == [n, n]


class HiddenGradients(SingleDeviceStrategy):
    """Accumulates by itself, as Lightning's DeepSpeed does, and tells nothing of it."""

    @property
    def handles_gradient_accumulation(self) -> bool:
        return True


def test_a_strategy_that_hides_its_gradients_is_refused(plain_gpt2: Path, tmp_path: Path) -> None:
    """Guards against gradients that nobody divides by the step's tokens."""
    run = trainer(tmp_path, max_epochs=1, strategy=HiddenGradients())
    with pytest.raises(ConfigError, match="HiddenGradients hides its gradients; take ZeroStrategy"):
        run.fit(CausalLMModule(pretrained=str(plain_gpt2)), DataLoader([batch(1)], batch_size=None))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch.compile about itself
@pytest.mark.skipif(which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_blocks_are_compiled_once_and_learn_the_same(plain_gpt2: Path, tmp_path: Path) -> None:
    """Guards against a compilation for every length of a sample's reply."""
    from torch._dynamo.utils import counters

    def losses(*, compile: bool) -> list[float]:
        seed_everything(0)
        module = CausalLMModule(pretrained=str(plain_gpt2), architecture=NO_DROPOUT, compile=compile, learning_rate=1e-2)
        samples = SampleGeneration(prompts=["Hello"], every_n_steps=1, max_new_tokens=8)
        weights = Weights()
        run = trainer(tmp_path, max_epochs=1, callbacks=[weights, samples])
        run.fit(module, DataLoader([batch(3, seed=i) for i in range(3)], batch_size=None))
        return weights.losses

    torch._dynamo.reset()
    counters.clear()
    compiled = losses(compile=True)
    assert counters["stats"]["unique_graphs"] == 1
    assert compiled == pytest.approx(losses(compile=False), rel=1e-5) and len(compiled) == 3
