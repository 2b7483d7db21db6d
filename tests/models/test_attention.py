"""Attention and kernels of our own: the same numbers as transformers' and torch's, and no example sees another."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lightning_chatgpt.data.collate import Batch, Tokens, collate
from lightning_chatgpt.errors import ConfigError
from lightning_chatgpt.models.attention import NAME, attention_settings, set_attention
from lightning_chatgpt.models.kernels import Dropout, StretchAttention, blocks_of, dropout_factors, use_fast_kernels
from lightning_chatgpt.models.loss import token_losses
from tests.conftest import ARCHITECTURE

VOCABULARY = 100
LENGTHS = [[20, 30, 14], [64], [1, 2, 7, 40], [33]]


def network(family: str, **settings: float) -> PreTrainedModel:
    torch.manual_seed(0)
    if family == "llama":  # fewer heads for keys and values than for queries
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=VOCABULARY, initializer_range=0.3, attention_dropout=0.0))
    dropout = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, **settings}
    return GPT2LMHeadModel(
        GPT2Config(**ARCHITECTURE, **dropout, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, initializer_range=0.3)
    )


def batch() -> Batch:
    generator = np.random.default_rng(0)

    def example(n: int) -> Tokens:
        return generator.integers(0, VOCABULARY, n, dtype=np.int32), generator.random(n, dtype=np.float32)

    return collate([[example(n) for n in row] for row in LENGTHS], pad_token_id=0, width=64)


def hidden_states(model: PreTrainedModel, packed: Batch) -> torch.Tensor:
    body = model.base_model
    settings = attention_settings(model, packed["stretches"])
    return body(input_ids=packed["input_ids"], position_ids=packed["position_ids"], use_cache=False, **settings).last_hidden_state


def test_stretches_of_a_batch_by_hand() -> None:
    stretches = batch()["stretches"]
    assert stretches.lengths == [20, 30, 14, 64, 1, 2, 7, 40, 14, 33, 31]  # the padding of a row is a stretch of its own
    assert stretches.ends.tolist() == [0, 20, 50, 64, 128, 129, 131, 138, 178, 192, 225, 256]
    assert stretches.ends.dtype == torch.int32 and stretches.longest == 64


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("chosen", ["stretches", "sdpa", "eager"])
def test_packed_states_are_those_of_each_example_alone(family: str, chosen: str) -> None:
    """Guards against packed chats that read each other, at every position."""
    model = network(family).eval()
    packed = batch()
    model.set_attn_implementation("eager")
    alone = []
    for r, row in enumerate(LENGTHS):
        starts = np.cumsum([0, *row])
        rows_of = [packed["input_ids"][r, start:end][None] for start, end in itertools.pairwise(starts)]
        alone += [model.base_model(input_ids=ids).last_hidden_state[0] for ids in rows_of]
    set_attention(model, chosen)
    found = hidden_states(model, packed)
    rows = torch.cat([found[r, : sum(row)] for r, row in enumerate(LENGTHS)])
    torch.testing.assert_close(rows, torch.cat(alone), rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_gradients_are_those_of_masked_attention(family: str) -> None:
    model = network(family).train()
    gradients = []
    for chosen in ("sdpa", "stretches"):
        set_attention(model, chosen)
        model.zero_grad()
        token_losses(model, batch()).total.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item(), msg=name)


def test_replies_are_those_of_transformers_own_attention() -> None:
    """Left padding and a cache go through the same attention when a reply is generated."""
    model = network("gpt2").eval()
    ids = torch.randint(1, VOCABULARY, (2, 9))
    mask = torch.tensor([[0] * 4 + [1] * 5, [1] * 9])
    expected, found = [], []
    for replies, chosen in ((expected, "sdpa"), (found, "stretches")):
        set_attention(model, chosen)
        replies += model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0).tolist()
    assert model.config._attn_implementation == NAME
    assert found == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_attention_with_dropout_by_autograd(dtype: torch.dtype) -> None:
    """The gradients written by hand are those that autograd finds, with the same elements dropped."""
    lengths, n_heads, width, dropout = [3, 1, 8], 2, 4, 0.4
    torch.manual_seed(0)
    ours = [torch.randn(12, n_heads, width, dtype=dtype, requires_grad=True) for _ in range(3)]
    theirs = [tensor.detach().clone().requires_grad_() for tensor in ours]
    weights = torch.randn(12, n_heads, width, dtype=dtype)
    torch.manual_seed(1)
    found = StretchAttention.apply(*ours, lengths, dropout, 0.5)
    (found * weights).sum().backward()
    torch.manual_seed(1)
    pieces, start = [], 0
    for n in lengths:
        q, k, v = (tensor[start : start + n].transpose(0, 1) for tensor in theirs)
        scores = (q @ k.transpose(1, 2) * 0.5).masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf)
        probabilities = scores.softmax(-1)
        pieces.append((probabilities * dropout_factors(probabilities, dropout=dropout) @ v).transpose(0, 1))
        start += n
    expected = torch.cat(pieces)
    (expected * weights).sum().backward()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our.grad, their.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9])
def test_dropout_drops_what_it_is_told_to(dropout: float) -> None:
    torch.manual_seed(0)
    factors = dropout_factors(torch.empty(500, 401), dropout=dropout)  # not a multiple of four
    assert factors.shape == (500, 401)
    deviation = math.sqrt(dropout * (1 - dropout) / factors.numel())
    assert abs((factors == 0).double().mean().item() - dropout) < 5 * deviation
    assert factors.unique().tolist() == pytest.approx([0.0, 1 / (1 - dropout)], rel=1e-4)
    # Neighbours come from one random number, and must not go together.
    dropped = (factors == 0).double().flatten() - dropout
    for distance in (1, 2, 3, 4, 401):
        correlation = (dropped[:-distance] * dropped[distance:]).mean().item() / (dropout * (1 - dropout))
        assert abs(correlation) < 5 / math.sqrt(len(dropped))


def test_dropout_is_off_in_evaluation_and_changes_with_the_seed() -> None:
    layer = Dropout(0.5)
    ones = torch.ones(1000)
    torch.manual_seed(0)
    first = layer(ones)
    assert not torch.equal(first, layer(ones))
    torch.manual_seed(0)
    assert torch.equal(first, layer(ones))
    assert torch.equal(layer.eval()(ones), ones)


def test_fast_kernels_change_no_number() -> None:
    model = network("gpt2", resid_pdrop=0.1).eval()
    ids = torch.randint(0, VOCABULARY, (2, 20))
    expected = model(input_ids=ids).logits
    use_fast_kernels(model)
    kinds = {type(module) for module in model.modules()}
    assert Dropout in kinds and torch.nn.Dropout not in kinds and torch.nn.GELU in kinds
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=1e-5)
    assert len(blocks_of(model)) == ARCHITECTURE["n_layer"]


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="flash_attention_2 needs a GPU and flash-attn"):
        set_attention(network("gpt2"), "flash_attention_2")


def test_a_saved_folder_does_not_know_our_attention(tmp_path: Path) -> None:
    """Guards against a config.json that names an attention which only this package has."""
    model = network("gpt2")
    set_attention(model, "stretches")
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    assert NAME not in model.config.to_json_string(use_diff=False)
    assert GPT2LMHeadModel.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
