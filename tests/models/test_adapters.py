"""Adapters: against formulas worked out by hand, the plain network's own gradients, and plain transformers."""

from __future__ import annotations

import copy
import math
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM

from lightning_chatgpt import CausalLMModule, ChatDataModule
from lightning_chatgpt.chat.encoding import Encoder
from lightning_chatgpt.chat.tokenizer import load_tokenizer
from lightning_chatgpt.data.collate import collate
from lightning_chatgpt.errors import ConfigError, ModelError
from lightning_chatgpt.generation.generate import generate_replies
from lightning_chatgpt.models import build
from lightning_chatgpt.models.adapters import (
    LoraSettings,
    adapter_state,
    add_adapter,
    find_new_tokens,
    has_adapter,
    load_adapter_state,
    merge_adapter,
    quantization_config,
    weights_digest,
)
from tests.conftest import ARCHITECTURE, chat, trainer

VARIANTS = ["lora", "dora", "rslora"]
NEW = [500, 501]
IDS = torch.tensor([[3, 500, 17, 250, 501, 499, 8]])
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
PAIRS = [("Hello", "Hi there!"), ("What is your name?", "I am GPT."), ("Bye", "See you."), ("How are you?", "I am fine, thank you.")]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The networks are tiny: threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def gpt2(**settings: Any) -> GPT2LMHeadModel:
    """A GPT-2 with random weights, grown by two tokens; larger weights than usual, so that no logit is near 0 by chance."""
    torch.manual_seed(0)
    sizes = {**ARCHITECTURE, **NO_DROPOUT, "vocab_size": 500, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.2}
    network = GPT2LMHeadModel(GPT2Config(**{**sizes, **settings}))
    network.resize_token_embeddings(502)
    return network.eval()


def llama() -> LlamaForCausalLM:
    """An untied network of Linear layers that lie the other way round than GPT-2's."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
    network = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=500, initializer_range=0.2))
    network.resize_token_embeddings(502)
    return network.eval()


def adapted(network: Any, **settings: Any) -> Any:
    """With an adapter that does something: B is random, as are the new rows and DoRA's lengths."""
    add_adapter(network, LoraSettings.of({"rank": 4, "alpha": 6.0, "dropout": 0.0, **settings}), new_token_ids=NEW)
    torch.manual_seed(1)
    for name, parameter in network.named_parameters():
        if "lora_B" in name or "tokens_delta" in name or "magnitude" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return network


def merged_by_hand(layer: Any, *, variant: str) -> Tensor:
    """The weight that a layer amounts to, (D_in, D_out) as Conv1D has it, from the formulas of the papers."""
    weight = layer.base_layer.weight.detach()  # (D_in, D_out)
    a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()  # (r, D_in), (D_out, r)
    scale = 6.0 / math.sqrt(4) if variant == "rslora" else 6.0 / 4
    changed = weight + scale * (b @ a).T
    if variant != "dora":
        return changed
    lengths = torch.tensor([math.sqrt(sum(x * x for x in column)) for column in changed.T.tolist()])
    return layer.lora_magnitude_vector["default"].weight.detach() * changed / lengths


@pytest.mark.parametrize("variant", VARIANTS)
def test_layers_follow_the_papers_on_conv1d(variant: str) -> None:
    """Guards against the wrong way round: Conv1D stores (D_in, D_out)."""
    network = adapted(gpt2(), variant=variant)
    merged = merge_adapter(network)
    for block, plain in zip(network.transformer.h, merged.transformer.h, strict=True):
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            layer = block.get_submodule(name)
            weight = merged_by_hand(layer, variant=variant)
            x = torch.randn(3, weight.shape[0])
            expected = x @ weight + layer.base_layer.bias
            assert torch.allclose(layer(x), expected, atol=1e-4)
            assert (layer(x) - layer.base_layer(x)).abs().max() > 0.1  # it does something
            assert torch.allclose(plain.get_submodule(name).weight, weight, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_new_adapter_changes_nothing(variant: str) -> None:
    network = gpt2()
    expected = network(IDS).logits
    add_adapter(network, LoraSettings.of({"variant": variant}), new_token_ids=NEW)
    assert not any(module.training for module in network.modules())  # peft's dropout would be on
    assert torch.allclose(network(IDS).logits, expected, atol=1e-4)


def test_new_rows_begin_as_the_mean_of_the_others() -> None:
    network = add_adapter(gpt2(), LoraSettings(), new_token_ids=NEW)
    head = network.get_output_embeddings().weight
    assert torch.allclose(head[500:], head[:500].mean(0), atol=1e-3)
    assert head[:500].std(0).min() > 0.1  # the others are far from their mean


def test_only_the_adapter_and_the_new_rows_learn() -> None:
    network = adapted(gpt2(), variant="dora")
    before = {name: p.clone() for name, p in network.named_parameters()}
    rows = network.get_output_embeddings().weight.detach().clone()
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    network.train()(IDS, labels=IDS).loss.backward()
    optimizer.step()
    changed = {name for name, p in network.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(adapter_state(network))
    assert all(".lora_" in name or "tokens_delta" in name for name in changed)
    assert len(changed) == 2 * 4 * 3 + 1  # two layers of four, A and B and lengths each; the rows
    now = network.get_output_embeddings().weight
    assert torch.equal(now[:500], rows[:500])
    assert not torch.isclose(now[500:], rows[500:]).any()


def test_a_tied_head_sees_the_rows_and_gives_them_the_gradients_of_both() -> None:
    """Against the whole matrix, trained in the plain network: its gradients in the new rows are the rows' own."""
    plain = gpt2()
    plain(IDS, labels=IDS).loss.backward()
    network = add_adapter(gpt2(), LoraSettings(dropout=0.0), new_token_ids=NEW)
    network(IDS, labels=IDS).loss.backward()
    (rows,) = [p for name, p in network.named_parameters() if "tokens_delta" in name]
    assert torch.allclose(rows.grad, plain.transformer.wte.weight.grad[500:], atol=1e-6)

    rows.data += 1.0
    head = network.get_output_embeddings().weight
    assert torch.equal(head, network.get_input_embeddings().weight)
    # The loss takes hidden states times this weight.
    hidden = network.base_model(IDS).last_hidden_state
    assert torch.allclose(hidden @ head.T, network(IDS).logits, atol=1e-4)
    head.sum().backward()
    assert rows.grad is not None


def test_an_untied_head_gets_rows_of_its_own() -> None:
    """Guards against an end token that can be read and never said."""
    network = add_adapter(llama(), LoraSettings(), new_token_ids=NEW)
    network(IDS, labels=IDS).loss.backward()
    rows = {name: p.grad for name, p in network.named_parameters() if "tokens_delta" in name}
    assert [name.split(".token_adapter")[0] for name in rows] == ["model.embed_tokens", "lm_head"]
    assert all(grad.abs().min() > 0 for grad in rows.values())


@pytest.mark.parametrize("make", [gpt2, lambda: gpt2(tie_word_embeddings=False), llama], ids=["gpt2", "untied", "llama"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_merged_folder_answers_the_same_in_plain_transformers(make: Any, variant: str, tmp_path: Path) -> None:
    names = set(make().state_dict())
    network = adapted(make(), variant=variant).train()
    state = copy.deepcopy(network.state_dict())
    merge_adapter(network).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    merged = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert set(merged.state_dict()) == names
    assert not has_adapter(merged)
    assert torch.allclose(merged(IDS).logits, network.eval()(IDS).logits, atol=1e-3)
    # What was merged is a copy: the network trains on.
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert has_adapter(network)
    assert merged.config.tie_word_embeddings == (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight)


def test_a_merge_that_goes_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    network = adapted(gpt2())
    monkeypatch.setattr("peft.tuners.lora.layer.Linear.merge", lambda layer: None)
    with pytest.raises(ModelError, match="the adapter cannot be merged: logits differ by"):
        merge_adapter(network)
    monkeypatch.undo()
    network.transformer.h[0].mlp.c_fc.lora_B["default"].weight.data[0, 0] = torch.nan
    with pytest.raises(ModelError, match="logits differ by nan"):
        merge_adapter(network)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_saved_is_small_and_enough(variant: str, tmp_path: Path) -> None:
    network = adapted(gpt2(), variant=variant)
    torch.save(adapter_state(network), tmp_path / "adapter.pt")
    saved = torch.load(tmp_path / "adapter.pt", weights_only=True)
    # Two blocks of c_attn (32, 96), c_proj (32, 32), c_fc (32, 128), c_proj (128, 32) at rank 4; lengths for DoRA; two rows of 32.
    lengths = 96 + 32 + 128 + 32 if variant == "dora" else 0
    assert sum(value.numel() for value in saved.values()) == 2 * (4 * (128 + 64 + 160 + 160) + lengths) + 2 * 32
    assert (tmp_path / "adapter.pt").stat().st_size < 0.4 * sum(p.numel() * p.element_size() for p in gpt2().parameters())

    again = add_adapter(gpt2(), LoraSettings.of({"rank": 4, "alpha": 6.0, "variant": variant}), new_token_ids=NEW)
    # Rows that were grown anew are replaced whatever they were.
    again.get_input_embeddings().token_adapter.base_layer.weight.data[500:] = 7.0
    load_adapter_state(again, saved)
    assert torch.equal(again(IDS).logits, network(IDS).logits)


@pytest.mark.parametrize(
    ("settings", "new", "says"),
    [
        ({"rank": 8}, NEW, r"lora_[AB].default.weight is \(.*4.*\) in it and \(.*8.*\) here"),
        ({"variant": "dora"}, NEW, "lora_magnitude_vector.default.weight is absent in it"),
        ({"targets": ["c_attn"]}, NEW, "here"),
        ({}, [], "trainable_tokens_delta.default is .* and absent here"),
        ({}, [501], r"trainable_tokens_delta.default is \(2, 32\) in it and \(1, 32\) here"),
    ],
)
def test_another_adapters_state_is_refused(settings: dict, new: list[int], says: str) -> None:
    state = adapter_state(adapted(gpt2()))
    other = add_adapter(gpt2(), LoraSettings.of({"rank": 4, "alpha": 6.0, **settings}), new_token_ids=new)
    with pytest.raises(ModelError, match=f"the saved adapter does not fit: .*{says}.*; set model.lora as it was trained"):
        load_adapter_state(other, state)


def test_targets_choose_layers() -> None:
    network = add_adapter(gpt2(), LoraSettings.of({"targets": ["attn.c_proj", "c_fc"]}))
    touched = {name.split(".lora_")[0].removeprefix("transformer.") for name in adapter_state(network)}
    assert touched == {"h.0.attn.c_proj", "h.0.mlp.c_fc", "h.1.attn.c_proj", "h.1.mlp.c_fc"}


@pytest.mark.parametrize(
    ("target", "says"), [("c_atn", "did you mean c_attn"), ("lm_head", "can be adapted; there are c_attn, c_fc, c_proj")]
)
def test_targets_that_are_not_there_are_refused(target: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        add_adapter(gpt2(), LoraSettings.of({"targets": ["c_fc", target]}))


def test_new_tokens_of_a_head_with_a_bias_are_refused() -> None:
    """Guards against logits without the bias, which peft leaves out."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 502}
    with pytest.raises(ModelError, match="PhiForCausalLM: its head has a bias"):
        add_adapter(PhiForCausalLM(PhiConfig(**sizes)), LoraSettings(), new_token_ids=NEW)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"rnak": 4}, "model.lora.rnak is no setting; did you mean rank?"),
        ({"rank": 0}, "model.lora.rank must be at least 1, not 0"),
        ({"rank": 1.5}, "model.lora.rank takes a whole number"),
        ({"alpha": 0}, "model.lora.alpha must be above 0, not 0"),
        ({"dropout": 1.0}, "model.lora.dropout must be at least 0 and below 1, not 1.0"),
        ({"targets": "c_attn"}, "model.lora.targets takes a list"),
        ({"targets": []}, "model.lora.targets names no layer"),
        ({"variant": "dorra"}, "model.lora.variant cannot be 'dorra'; did you mean dora?"),
        ({"quantize": "8bit"}, "model.lora.quantize cannot be '8bit'"),
        ({"quantize": "4bit", "save_base": True}, "model.lora: quantize rounds the base"),
    ],
)
def test_settings_are_refused(settings: dict, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        LoraSettings.of(settings)
    assert says in str(error.value)


def test_without_peft_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"peft, which is not installed: pip install 'lightning-chatgpt\[lora\]'"):
        LoraSettings.of({})


def test_four_bits_say_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available: None)
    with pytest.raises(ConfigError, match="quantize 4bit needs a GPU, and there is none on this machine"):
        quantization_config()
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match="quantize 4bit needs the package bitsandbytes.*: pip install bitsandbytes"):
        quantization_config()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="bitsandbytes wants a GPU")
@pytest.mark.parametrize("variant", VARIANTS)
def test_four_bits_train_and_merge(variant: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    gpt2(n_embd=64).save_pretrained(tmp_path)
    network = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization_config(), dtype=torch.float32)
    assert network.transformer.h[0].attn.c_attn.weight.dtype == torch.uint8
    network = adapted(network, variant=variant)
    ids = IDS.to(network.device)
    network.train()(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad)
    merged = merge_adapter(network)
    assert set(merged.state_dict()) == set(gpt2().state_dict())
    assert torch.allclose(merged(IDS).logits, network.eval()(ids).logits.cpu(), atol=1e-3)


def test_new_tokens_are_those_the_weights_never_saw(plain_gpt2: Path) -> None:
    assert find_new_tokens(plain_gpt2, tokenizer=load_tokenizer(plain_gpt2)) == NEW
    assert find_new_tokens(plain_gpt2, tokenizer=load_tokenizer(plain_gpt2, template="plain")) == []
    smalltalk = build.find_pretrained("builtin:smalltalk")
    assert find_new_tokens(smalltalk, tokenizer=load_tokenizer(smalltalk)) == []


def test_a_digest_tells_weights_apart(plain_gpt2: Path, tmp_path: Path) -> None:
    network = AutoModelForCausalLM.from_pretrained(plain_gpt2)
    network.save_pretrained(tmp_path / "same")
    network.transformer.ln_f.bias.data[0] += 1e-6
    network.save_pretrained(tmp_path / "other", max_shard_size="20KB")
    assert len(list((tmp_path / "other").glob("*.safetensors"))) > 1
    digests = [weights_digest(folder) for folder in (plain_gpt2, tmp_path / "same", tmp_path / "other")]
    assert digests[0] == digests[1] != digests[2]


def test_an_end_token_is_learnt_from_200_chats(plain_gpt2: Path) -> None:
    """The base has read the sentences as plain text and never saw a role or an end; an adapter and two rows teach it both."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(plain_gpt2)
    encoder = Encoder(tokenizer, max_length=64)
    network = build.build_network(plain_gpt2, tokenizer=tokenizer, architecture=NO_DROPOUT).train()

    def train(batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-2)
        for ids, labels in batches:
            network(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def replies(model: Any) -> list[tuple[str, str]]:
        prompts = [encoder.encode_prompt(chat(question)) for question, _ in PAIRS]
        return [(reply.text, reply.finish_reason) for reply in generate_replies(model.eval(), tokenizer, prompts, max_new_tokens=20)]

    sentences = [sentence for i in torch.randint(len(PAIRS), (2000,)).tolist() for sentence in PAIRS[i]]
    text = torch.tensor(tokenizer("\n".join(sentences))["input_ids"][: 80 * 4 * 64]).view(80, 4, 64)
    train(zip(text, text, strict=True))
    add_adapter(network, LoraSettings(), new_token_ids=find_new_tokens(plain_gpt2, tokenizer=tokenizer))
    assert [finish_reason for _, finish_reason in replies(network)] == ["length"] * 4

    examples = [encoded.examples for encoded in encoder.encode([chat(*PAIRS[i % 4]) for i in range(200)])]
    batches = [collate(examples[i : i + 10], pad_token_id=tokenizer.pad_token_id) for i in range(0, 200, 10)] * 2
    network.train()
    train((batch["input_ids"], batch["labels"]) for batch in batches)
    expected = [(answer, "stop") for _, answer in PAIRS]
    assert replies(network) == expected
    assert replies(merge_adapter(network)) == expected


@pytest.fixture
def base(plain_gpt2: Path, tmp_path: Path) -> Path:
    """A copy of the base that a test may change."""
    return Path(shutil.copytree(plain_gpt2, tmp_path / "base"))


def fitted(base: Path, folder: Path, **lora: Any) -> tuple[CausalLMModule, Path]:
    """A module after three steps, and its checkpoint."""
    module = CausalLMModule(pretrained=str(base), lora={"rank": 4, **lora}, learning_rate=1e-2)
    run = trainer(folder, max_steps=3)
    run.fit(module, ChatDataModule(train="corpus:chatterbot/german", validation=None, max_length=64, batch_size=4))
    run.save_checkpoint(folder / "x.ckpt")
    return module.eval(), folder / "x.ckpt"


def test_a_checkpoint_holds_the_adapter_and_asks_for_its_base(base: Path, tmp_path: Path) -> None:
    module, path = fitted(base, tmp_path)
    expected = module.network(IDS).logits
    saved = torch.load(path, weights_only=True)
    assert {name.removeprefix("network.") for name in saved["state_dict"]} == set(adapter_state(module.network))
    assert torch.equal(CausalLMModule.load_from_checkpoint(path).eval().network(IDS).logits, expected)
    assert torch.allclose(build.load_model(path).network(IDS).logits, expected, atol=1e-4)

    folder = module.export(tmp_path / "hf")
    assert torch.allclose(AutoModelForCausalLM.from_pretrained(folder).eval()(IDS).logits, expected, atol=1e-4)
    assert has_adapter(module.network)

    weights = AutoModelForCausalLM.from_pretrained(base)
    weights.transformer.ln_f.bias.data += 0.1
    weights.save_pretrained(base)
    for load in (CausalLMModule.load_from_checkpoint, build.load_model):
        with pytest.raises(ModelError, match="has other weights than those that the checkpoint's adapter was trained on"):
            load(path)
    shutil.rmtree(base)
    with pytest.raises(ModelError, match="no such folder"):
        build.load_model(path)


def test_a_checkpoint_with_its_base_stands_alone(base: Path, tmp_path: Path) -> None:
    module, path = fitted(base, tmp_path, save_base=True, variant="dora")
    expected = module.network(IDS).logits
    shutil.rmtree(base)
    assert torch.equal(CausalLMModule.load_from_checkpoint(path).eval().network(IDS).logits, expected)
    assert torch.allclose(build.load_model(path).network(IDS).logits, expected, atol=1e-4)


def test_training_goes_on_where_it_stopped(base: Path, tmp_path: Path) -> None:
    data = {"train": "corpus:chatterbot/german", "validation": None, "max_length": 64, "batch_size": 32}
    settings: Any = {"pretrained": str(base), "lora": {"rank": 4, "dropout": 0.0}, "architecture": NO_DROPOUT, "schedule": "constant"}
    seed_everything(0, verbose=False)
    whole = CausalLMModule(**settings)
    trainer(tmp_path, max_epochs=2).fit(whole, ChatDataModule(**data))
    seed_everything(0, verbose=False)
    half = trainer(tmp_path, max_epochs=1)
    half.fit(CausalLMModule(**settings), ChatDataModule(**data))
    half.save_checkpoint(tmp_path / "x.ckpt")
    seed_everything(1, verbose=False)
    again = CausalLMModule(**settings)
    trainer(tmp_path, max_epochs=2).fit(again, ChatDataModule(**data), ckpt_path=tmp_path / "x.ckpt")
    there, here = adapter_state(whole.network), adapter_state(again.network)
    assert all(torch.equal(value, here[name]) for name, value in there.items())


def test_from_scratch_there_is_nothing_to_adapt() -> None:
    with pytest.raises(ConfigError, match="model.lora adapts weights that are there; set model.pretrained"):
        CausalLMModule(architecture=ARCHITECTURE, lora={})
