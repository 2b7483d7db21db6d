"""A network cut between two processes learns what a whole one learns, answers, is saved and goes on like it.

Gradients, norms and steps are held against transformers' own logits in one process; runs of the command line against a run of one.
"""

from __future__ import annotations

import csv
import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
import yaml
from lightning.pytorch import Trainer

from lightning_chatgpt import CausalLMModule, ShardedStrategy
from lightning_chatgpt.chat.encoding import Encoder
from lightning_chatgpt.data.collate import collate
from lightning_chatgpt.errors import ConfigError
from lightning_chatgpt.generation.generate import generate_replies
from lightning_chatgpt.models.build import load_model
from lightning_chatgpt.models.kernels import use_fast_kernels
from lightning_chatgpt.models.loss import token_losses
from lightning_chatgpt.models.sharding import (
    clip_gradients,
    gathered,
    gradient_norm,
    run,
    shard,
    whole_state,
)
from lightning_chatgpt.models.step import scale_gradients
from tests.conftest import ARCHITECTURE, chat
from tests.test_cli import run as run_cli

pytestmark = pytest.mark.slow

VOCABULARY = 301
MAX_NORM = 0.01
CUTS = {"fsdp": ("gpt2", 1), "tensor": ("gpt2", 2), "llama": ("llama", 1)}  # the network, and the size of a tensor-parallel group


def build(kind: str, **settings: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if kind == "gpt2":
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        own = {**ARCHITECTURE, **dropout, "vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, **settings}
        return GPT2LMHeadModel(GPT2Config(**own)).train()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=VOCABULARY, max_position_embeddings=128)).train()


def batch_of(rank: int) -> Any:
    """A batch whose share of supervised tokens, and whose weights, depend on the process."""
    generator = torch.Generator().manual_seed(rank)
    rows = []
    for length in (11 + 9 * rank, 17):
        weights = torch.rand(length, generator=generator) * (torch.arange(length) > 3 + 5 * rank)
        ids = torch.randint(VOCABULARY, (length,), generator=generator)
        rows.append([(ids.int().numpy(), weights.numpy())])
    return collate(rows, pad_token_id=0)


def reference_loss(network: Any, rank: int) -> torch.Tensor:
    """Σ weight · nll from transformers' own logits."""
    batch = batch_of(rank)
    logits = network(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
    nll = F.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten(), reduction="none")
    return (nll * batch["loss_weights"][:, 1:].flatten()).sum()


def learn_in_two(rank: int, folder: Path) -> None:
    """What each of two processes does: learn, clip, step, answer, and leave what came of it in ``folder``."""
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for cut, (kind, tensor_parallel) in CUTS.items():
        mesh = init_device_mesh("cpu", (2 // tensor_parallel, tensor_parallel), mesh_dim_names=("data_parallel", "tensor_parallel"))
        network = build(kind)
        shard(network, mesh)
        found: dict[str, Any] = {"before": whole_state(network, wrapped=network)}
        # Lightning evaluates in inference mode; what is gathered there must serve training afterwards.
        with torch.inference_mode(), gathered(network):
            n_tokens = 3 if tensor_parallel > 1 else 3 + 4 * rank  # processes with replies of other lengths do not wait for each other
            ids = torch.tensor([[5, 6, 7]])
            found["reply"] = network.eval().generate(ids, max_new_tokens=n_tokens, min_new_tokens=n_tokens, do_sample=False)
        network.train()
        losses = run(network, token_losses, batch_of(mesh["data_parallel"].get_local_rank()))
        losses.total.backward()
        parameters = list(network.parameters())
        scale_gradients(parameters, torch.tensor(float(mesh["data_parallel"].size())))  # sums, in place of means
        found["shares"] = {name: p.to_local().numel() / p.numel() for name, p in network.named_parameters()}
        found["gradients"] = {name: p.grad.full_tensor().clone() for name, p in network.named_parameters()}
        found["norm"] = gradient_norm(parameters)
        clip_gradients(parameters, MAX_NORM)
        found["clipped"] = gradient_norm(parameters)
        torch.optim.AdamW(parameters, lr=1e-2, fused=True).step()
        found["after"] = whole_state(network, wrapped=network)
        torch.save(found, folder / f"{cut}.{rank}.pt")
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data_parallel", "tensor_parallel"))
    refused = []
    adapted = build("gpt2")
    adapted.transformer.h[1].mlp.c_fc = torch.nn.Sequential(adapted.transformer.h[1].mlp.c_fc)  # wrapped, as adapters do
    for network in (build("gpt2", n_head=1), build("llama"), adapted):
        with pytest.raises(ConfigError) as error:
            shard(network, mesh)
        refused.append(str(error.value))
    torch.save(refused, folder / f"refused.{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("learnt")
    torch.multiprocessing.spawn(learn_in_two, args=(folder,), nprocs=2)
    return folder


@pytest.mark.parametrize("cut", CUTS)
def test_gradients_clipping_and_a_step_are_those_of_one_process(learnt: Path, cut: str) -> None:
    kind, tensor_parallel = CUTS[cut]
    network = build(kind)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    for rank in range(2 // tensor_parallel):
        reference_loss(network, rank).backward()
    gradients = {name: p.grad.clone() for name, p in network.named_parameters()}
    norm = torch.nn.utils.clip_grad_norm_(network.parameters(), MAX_NORM)
    assert norm > MAX_NORM
    torch.optim.AdamW(network.parameters(), lr=1e-2).step()
    for rank in range(2):
        found = torch.load(learnt / f"{cut}.{rank}.pt")
        assert set(found["gradients"]) == set(gradients)
        for name, gradient in gradients.items():
            assert (found["gradients"][name] - gradient).norm() <= 1e-6 * gradient.norm() + 1e-9, name
        assert found["norm"].item() == pytest.approx(norm.item(), rel=1e-6)
        assert found["clipped"].item() == pytest.approx(MAX_NORM, rel=1e-3)
    first, second = (torch.load(learnt / f"{cut}.{rank}.pt") for rank in range(2))
    assert first["before"].keys() == before.keys() and not second["before"]
    assert all(torch.equal(first["before"][name], value) for name, value in before.items())
    for name, value in network.state_dict().items():
        assert (first["after"][name] - value).abs().max() < 2e-5, name  # of steps of 1e-2


@pytest.mark.parametrize("cut", CUTS)
def test_each_process_holds_its_share(learnt: Path, cut: str) -> None:
    shares = [torch.load(learnt / f"{cut}.{rank}.pt")["shares"] for rank in range(2)]
    if cut != "tensor":
        assert all(sum(share[name] for share in shares) == pytest.approx(1) and share[name] < 0.6 for share in shares for name in share)
        return
    halves = {name.split(".", 3)[3] for name, share in shares[0].items() if share == 0.5}
    assert halves == {"attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"}


@pytest.mark.parametrize("cut", CUTS)
def test_a_gathered_network_answers_in_each_process(learnt: Path, cut: str) -> None:
    network = build(CUTS[cut][0]).eval()
    for rank in range(2):
        reply = torch.load(learnt / f"{cut}.{rank}.pt")["reply"]
        n_tokens = reply.size(1) - 3
        assert n_tokens == (3 if cut == "tensor" else 3 + 4 * rank)
        expected = network.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=n_tokens, min_new_tokens=n_tokens, do_sample=False)
        assert torch.equal(reply, expected)


def test_what_tensor_parallelism_cannot_split_is_refused(learnt: Path) -> None:
    for rank in range(2):
        assert torch.load(learnt / f"refused.{rank}.pt") == [
            "tensor_parallel_size 2 does not divide the model's 1 heads; take one that does",
            "tensor_parallel_size 2: llama cannot be split, only gpt2; set it to 1",
            "tensor_parallel_size 2 splits plain layers, and these have adapters; set it to 1, or leave them out",
        ]


def test_what_is_not_sharded_is_left_as_it_is() -> None:
    network = build("gpt2")
    with gathered(network):
        assert torch.equal(run(network, token_losses, batch_of(0)).nll, token_losses(network, batch_of(0)).nll)
    assert whole_state(network, wrapped=network).keys() == network.state_dict().keys()
    assert gradient_norm(network.parameters()) == 0
    reference_loss(network, 0).backward()
    expected = torch.nn.utils.get_total_norm([p.grad for p in network.parameters()])
    assert clip_gradients(list(network.parameters()), 1e9) == expected == gradient_norm(network.parameters())


# The command line.


CPU = ["--trainer.accelerator", "cpu", "--trainer.devices"]
ONE = [*CPU, "1", "--data.batch_size", "4"]
TWO = ["-c", "lightning_chatgpt:strategy/fsdp2", *CPU, "2", "--data.batch_size", "2"]
TENSOR = [*TWO[:-1], "4", "--trainer.strategy.init_args.tensor_parallel_size", "2"]


def in_folder(name: str) -> list[str]:
    return ["--trainer.default_root_dir", f"runs/{name}"]


def column(project: Path, name: str, column: str) -> list[float]:
    with (project / f"runs/{name}/metrics.csv").open() as rows:
        return [float(row[column]) for row in csv.DictReader(rows) if row[column]]


def second_epoch(project: Path, name: str) -> str:
    return str(next((project / f"runs/{name}/checkpoints").glob("epoch=1-*.ckpt")))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs of four optimizer steps, in one process and in two."""
    folder = tmp_path_factory.mktemp("sharded")
    for name, n in (("train.jsonl", 16), ("five.jsonl", 5)):
        chats = [chat(f"question {i}", f"answer {i} " * (i + 1)) for i in range(n)]
        (folder / name).write_text("".join(json.dumps(c.to_dict()) + "\n" for c in chats))
    model = {"architecture": {**ARCHITECTURE, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}}
    data = {"train": "train.jsonl", "validation": "five.jsonl", "predict": "five.jsonl", "max_leak": None, "vocab_size": 300}
    config = {
        "trainer": {"max_epochs": 3, "gradient_clip_val": 0.5, "log_every_n_steps": 1, "enable_progress_bar": False},
        "model": {**model, "learning_rate": 1e-2, "schedule": "constant"},
        "data": {**data, "max_new_tokens": 8},
        "samples": {"prompts": ["question 1"], "max_new_tokens": 4},
        "checkpoint": {"save_top_k": -1},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    run_cli("fit", "-c", "run.yaml", *ONE, *in_folder("one"), cwd=folder)
    run_cli("fit", "-c", "run.yaml", *TWO, *in_folder("two"), cwd=folder)
    return folder


def test_a_sharded_run_learns_what_one_process_does(project: Path) -> None:
    one, two = (column(project, name, "train_loss") for name in ("one", "two"))
    assert len(one) == 12 and one[-1] < one[0] - 1
    assert two == pytest.approx(one, rel=1e-5)
    samples = [json.loads(line) for line in (project / "runs/two/samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [0, 4, 8, 12]


def test_its_checkpoint_is_one_file_that_stands_alone(project: Path) -> None:
    from transformers import AutoModelForCausalLM

    one, two = (load_model(project / f"runs/{name}/checkpoints/last.ckpt").network.state_dict() for name in ("one", "two"))
    assert all((two[name] - value).abs().max() < 1e-4 for name, value in one.items())
    saved = torch.load(project / "runs/two/checkpoints/last.ckpt", weights_only=True)
    best = next(state["best_model_path"] for state in saved["callbacks"].values() if state.get("best_model_path"))
    exported = AutoModelForCausalLM.from_pretrained(project / "runs/two/hf").state_dict()
    assert all(torch.equal(exported[name], value) for name, value in load_model(project / best).network.state_dict().items())


def test_without_checkpoints_all_processes_export_what_they_hold(project: Path) -> None:
    no_files = ["--checkpoint.save_top_k", "0", "--checkpoint.save_last", "false", "--trainer.max_epochs", "2"]
    run_cli("fit", "-c", "run.yaml", *TWO, *in_folder("unsaved"), *no_files, cwd=project)
    assert not list((project / "runs/unsaved").rglob("*.ckpt"))
    exported = load_model(project / "runs/unsaved").network.state_dict()
    saved = load_model(second_epoch(project, "two")).network.state_dict()
    assert all(torch.equal(exported[name], value) for name, value in saved.items())


@pytest.mark.parametrize(("earlier", "where"), [("one", TWO), ("two", ONE), ("one", TENSOR)], ids=["one-two", "two-one", "one-tensor"])
def test_a_checkpoint_goes_on_where_it_was_not_made(project: Path, earlier: str, where: list[str]) -> None:
    """Guards against optimizer states that Lightning gave to other parameters than they were of."""
    name = f"{earlier}-{len(where)}"
    run_cli("fit", "-c", "run.yaml", *where, *in_folder(name), "--ckpt_path", second_epoch(project, earlier), cwd=project)
    assert column(project, name, "train_loss") == pytest.approx(column(project, "one", "train_loss")[8:], rel=1e-5)


def test_processes_with_fewer_conversations_hold_up_none(project: Path) -> None:
    """Five conversations in two processes: one has a batch, and longer replies, that the other has not."""
    one, two = (column(project, name, "val_loss") for name in ("one", "two"))
    assert len(one) == 3 and two == pytest.approx(one, rel=1e-5)
    run_cli("predict", "-c", "run.yaml", *TWO, *in_folder("two"), "--ckpt_path", "last", cwd=project)
    said = [json.loads(line) for line in (project / "runs/two/predictions.jsonl").read_text().splitlines()]
    network, tokenizer = load_model(project / "runs/two/checkpoints/last.ckpt")
    encoder = Encoder(tokenizer, max_length=99)
    for i, line in enumerate(said):
        prompt = encoder.encode_prompt(chat(f"question {i}"))
        (reply,) = generate_replies(network, tokenizer, [prompt], max_new_tokens=8)
        assert (line["id"], line["reply"], line["completion_tokens"]) == (f"five.jsonl:{i + 1}", reply.text, reply.n_tokens)
    assert len(said) == 5


def test_no_clipping_is_no_clipping(project: Path) -> None:
    """Guards against a clip value of 0 that scales sharded gradients to nothing."""
    for name, where in (("one-free", ONE), ("two-free", TWO)):
        settings = ["--trainer.gradient_clip_val", "0", "--trainer.max_epochs", "1", "--checkpoint.save_top_k", "0"]
        run_cli("fit", "-c", "run.yaml", *where, *in_folder(name), *settings, cwd=project)
    one = column(project, "one-free", "train_loss")
    assert column(project, "two-free", "train_loss") == pytest.approx(one, rel=1e-5) and one[-1] < one[0] - 0.1


OWN = """
from lightning.pytorch import Trainer
from torch import nn
from lightning_chatgpt import CausalLMModule, ChatDataModule, ShardedStrategy


class Careless(CausalLMModule):
    def on_validation_epoch_start(self):
        pass


class WithHead(CausalLMModule):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.value_head = nn.Linear(32, 1)


if __name__ == "__main__":
    module = CausalLMModule.load_from_checkpoint("runs/one/checkpoints/last.ckpt")
    strategy = ShardedStrategy()
    trainer = Trainer(strategy=strategy, devices=2, accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False)
    trainer.fit(module, ChatDataModule(train="train.jsonl", validation="five.jsonl", max_leak=None, batch_size=2))
    print("learnt", trainer.global_step, float(trainer.callback_metrics["train_loss"]) < 3)
"""


def test_a_module_from_a_checkpoint_is_cut_too(project: Path) -> None:
    (project / "own.py").write_text(OWN)
    done = subprocess.run([sys.executable, "own.py"], cwd=project, capture_output=True, text=True, check=True, timeout=300)
    assert "learnt 2 True" in done.stdout


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Careless", "Careless overrides an on_…_epoch_start or on_…_epoch_end of evaluation; call super()'s in there, too"),
        ("WithHead", "value_head.weight is trained and not cut with the network"),
    ],
)
def test_a_subclass_that_would_hang_or_part_is_refused(name: str, says: str, project: Path) -> None:
    (project / "own.py").write_text(OWN)
    done = run_cli("fit", "-c", "run.yaml", *TWO, *in_folder(name), "--model", f"own.{name}", cwd=project, code=2)
    assert says in done.stderr


def test_one_process_inspects_for_all(project: Path) -> None:
    done = run_cli("inspect", "-c", "run.yaml", *TWO, cwd=project)
    assert "train.jsonl" in done.stdout


def test_a_module_that_cuts_nothing_is_refused() -> None:
    strategy = ShardedStrategy()
    strategy.model = CausalLMModule(architecture=ARCHITECTURE)
    with pytest.raises(ConfigError, match="configure_model leaves the network whole"):
        strategy.setup(Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False))


def test_devices_that_share_layers_need_a_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    strategy = ShardedStrategy(tensor_parallel_size=2)
    strategy.parallel_devices = [torch.device("cpu")] * 2
    with pytest.raises(ConfigError, match="tensor_parallel_size 2 needs one seed in all processes"):
        strategy.setup_environment()


def test_devices_that_make_no_mesh_are_refused() -> None:
    strategy = ShardedStrategy(tensor_parallel_size=3)
    strategy.parallel_devices = [torch.device("cpu")] * 2
    with pytest.raises(ConfigError, match="tensor_parallel_size 3 does not divide the 2 devices; take one that does"):
        strategy.setup_environment()


# The arithmetic of docs/distributed.md.

ROOT = Path(__file__).parent.parent.parent
SCALING = runpy.run_path(str(ROOT / "benchmarks" / "scaling.py"))


def test_the_tables_of_the_docs_are_the_calculators() -> None:
    page = (ROOT / "docs" / "distributed.md").read_text()
    for table in SCALING["tables"](SCALING["GPUS"]["h100"]).split("\n\n"):
        assert table in page


def test_it_counts_the_parameters_that_transformers_makes() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    for model in SCALING["MODELS"]:
        with torch.device("meta"):
            network = GPT2LMHeadModel(GPT2Config(n_layer=model.n_layer, n_embd=model.width, n_head=model.width // 64))
        assert model.n_parameters == network.num_parameters()


def test_it_counts_the_bytes_that_autograd_keeps_of_a_layer() -> None:
    rows, length, width = 4, 512, 256

    def kept(n_layer: int) -> int:
        network = build("gpt2", n_layer=n_layer, n_embd=width, n_head=4, n_positions=length, resid_pdrop=0.1)
        use_fast_kernels(network)  # GELU in one operator
        weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
        storages: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in weights:
                storages[tensor.untyped_storage().data_ptr()] = tensor  # kept alive, or another takes its place
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
        ):
            network.base_model(input_ids=torch.zeros((rows, length), dtype=torch.long), use_cache=False)
        return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())

    of_a_layer = (kept(4) - kept(2)) / 2
    counted = SCALING["WHOLE_BYTES"] + SCALING["SPLIT_BYTES"] + 2  # each of two dropout masks takes 2 bytes on a CPU, and 1 on a GPU
    casts = SCALING["CAST_BYTES"] * 12 * width**2
    assert (of_a_layer - casts) / (rows * length * width) == pytest.approx(counted, abs=0.2)
