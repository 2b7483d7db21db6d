"""Explanations against plain float64 arithmetic: probabilities from the logits, attributions by scaling embeddings a little."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lightning_chatgpt.chat.conversation import Conversation, Message
from lightning_chatgpt.chat.encoding import Encoder
from lightning_chatgpt.errors import ConfigError
from lightning_chatgpt.evaluation.explain import explain_ids, explain_reply, gradient_x_input
from tests.conftest import ARCHITECTURE, chat

IDS = [1, 40, 300, 7, 2, 1, 90, 40, 2]  # four of them a prompt
QUESTION = chat("What is AI?")


def gpt2(n_rows: int = 600, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = GPT2Config(**ARCHITECTURE, vocab_size=n_rows, bos_token_id=0, eos_token_id=0, initializer_range=0.3, **settings)
    return GPT2LMHeadModel(config).eval()


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, vocab_size=600, max_position_embeddings=128, initializer_range=0.3, bos_token_id=0, eos_token_id=0)
    return LlamaForCausalLM(config).eval()


def log_probabilities(network: Any, embeddings: Tensor, *, n_reply: int) -> Tensor:
    """Of the last tokens of IDS, read as embeddings."""
    with torch.no_grad():
        rows = network(inputs_embeds=embeddings).logits[0].log_softmax(-1)
    return torch.stack([rows[place - 1, IDS[place]] for place in range(len(IDS) - n_reply, len(IDS))])


# Llama's norms and rotations count in 32 bits whatever the weights are, so that a small step would be lost in rounding.
@pytest.mark.parametrize(("build", "step", "tolerance"), [(gpt2, 1e-5, 1e-8), (llama, 3e-3, 1e-3)])
def test_attributions_are_the_slope_by_which_an_embedding_is_scaled(build: Callable[[], Any], step: float, tolerance: float) -> None:
    network = build().double()
    found = gradient_x_input(network, torch.tensor([IDS]), n_reply=5)
    embeddings = network.get_input_embeddings().weight.detach()[IDS][None]
    slopes = torch.zeros(5, len(IDS), dtype=torch.float64)
    for place in range(len(IDS)):
        scale = torch.zeros(1, len(IDS), 1, dtype=torch.float64)
        scale[0, place] = step
        up, down = (log_probabilities(network, embeddings * (1 + sign * scale), n_reply=5) for sign in (1, -1))
        slopes[:, place] = (up - down) / (2 * step)
    assert found.abs().max() > 0.1
    assert torch.allclose(found, slopes, rtol=1e-6, atol=tolerance)
    later = torch.ones(5, len(IDS)).triu(len(IDS) - 5).bool()
    assert (found[later] == 0).all() and (found[~later] != 0).all()


def test_the_embedding_of_the_place_is_not_scaled() -> None:
    """Added to the token's, it would be scaled too if the layer after both were taken."""
    network = gpt2().double()
    found = gradient_x_input(network, torch.tensor([IDS]), n_reply=5)
    tokens = network.get_input_embeddings().weight.detach()[IDS][None]
    places = network.transformer.wpe.weight.detach()[: len(IDS)][None]
    step = torch.zeros(1, len(IDS), 1, dtype=torch.float64)
    step[0, 1] = 1e-5
    both = [log_probabilities(network, tokens + sign * step * (tokens + places), n_reply=5) for sign in (1, -1)]
    slope = (both[0] - both[1]) / 2e-5
    assert not torch.allclose(found[:, 1], slope, rtol=0.1)


def test_numbers_are_those_of_the_logits(tokenizer: PreTrainedTokenizerFast) -> None:
    network = gpt2()
    explanation = explain_ids(network, tokenizer, IDS[:4], IDS[4:])
    with torch.no_grad():
        logits = network(torch.tensor([IDS])).logits[0].tolist()
    assert (len(explanation.prompt), len(explanation.reply), explanation.vocabulary) == (4, 5, 600)
    for place, token in enumerate(explanation.reply, start=4):
        row = logits[place - 1]
        total = math.log(math.fsum(math.exp(value) for value in row))
        log_p = [value - total for value in row]
        assert token.id == IDS[place]
        assert token.log_probability == pytest.approx(log_p[token.id], abs=1e-5)
        assert token.probability == pytest.approx(math.exp(log_p[token.id]), rel=1e-5)
        by_rank = sorted(range(600), key=lambda i: -log_p[i])
        assert by_rank.index(token.id) + 1 == token.rank
        assert token.entropy == pytest.approx(-math.fsum(p * math.exp(p) for p in log_p), rel=1e-5)
        assert [one.id for one in token.alternatives] == by_rank[:5]
        assert [one.probability for one in token.alternatives] == pytest.approx([math.exp(log_p[i]) for i in by_rank[:5]], rel=1e-5)
        assert [one.text for one in token.alternatives] == [tokenizer.decode([i]) for i in by_rank[:5]]


def test_the_network_is_left_as_it_was(tokenizer: PreTrainedTokenizerFast) -> None:
    network = gpt2(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    expected = explain_reply(network, tokenizer, QUESTION, max_new_tokens=4)
    network.train()
    network.lm_head.eval()
    network.transformer.wpe.weight.grad = torch.ones(128, 32)
    for parameter in network.transformer.h.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        assert explain_reply(network, tokenizer, QUESTION, max_new_tokens=4) == expected
    assert network.training and network.transformer.drop.training and not network.lm_head.training
    assert {name for name, parameter in network.named_parameters() if parameter.grad is not None} == {"transformer.wpe.weight"}
    assert (network.transformer.wpe.weight.grad == 1).all()
    assert not any(parameter.requires_grad for parameter in network.transformer.h.parameters())
    assert network.transformer.wte.weight.requires_grad
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_a_frozen_network_in_16_bits(tokenizer: PreTrainedTokenizerFast) -> None:
    network = gpt2()
    exact = explain_ids(network, tokenizer, IDS[:4], IDS[4:])
    rounded = explain_ids(network.to(torch.bfloat16).requires_grad_(False), tokenizer, IDS[:4], IDS[4:])
    difference = torch.tensor(exact.attributions) - torch.tensor(rounded.attributions)
    assert 0 < difference.norm() < 0.1 * torch.tensor(exact.attributions).norm()
    assert [t.log_probability for t in rounded.reply] == pytest.approx([t.log_probability for t in exact.reply], abs=0.3)


def test_the_models_own_reply_is_the_most_likely_token_each_time(tokenizer: PreTrainedTokenizerFast) -> None:
    network = gpt2()
    explanation = explain_reply(network, tokenizer, QUESTION, max_new_tokens=6)
    ids = Encoder(tokenizer, max_length=100).encode_prompt(QUESTION)
    assert [token.id for token in explanation.prompt] == ids
    for token in explanation.reply:
        with torch.no_grad():
            ids.append(int(network(torch.tensor([ids])).logits[0, -1].argmax()))
        assert (token.id, token.rank, token.alternatives[0].id) == (ids[-1], 1, ids[-1])
        assert token.is_end == (ids[-1] in (0, 2))
    assert len(explanation.reply) == 6 or explanation.reply[-1].is_end


def test_a_given_reply_is_what_the_template_writes(tokenizer: PreTrainedTokenizerFast) -> None:
    conversation = Conversation((Message("system", "Be kind."), *QUESTION.messages))
    explanation = explain_reply(gpt2(), tokenizer, conversation, reply="It is <|im_end|> 🦘.")
    texts = ["".join(token.text for token in tokens) for tokens in (explanation.prompt, explanation.reply)]
    assert texts == [
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nWhat is AI?<|im_end|>\n<|im_start|>assistant\n",
        "It is <|im_end|> 🦘.<|im_end|>",
    ]
    assert [token.text for token in explanation.prompt if token.is_control] == ["<|im_start|>", "<|im_end|>"] * 2 + ["<|im_start|>"]
    assert [token.is_control for token in explanation.reply] == [token.is_end for token in explanation.reply]
    assert [token.is_end for token in explanation.reply].index(True) == len(explanation.reply) - 1
    # A kangaroo is four bytes and no merges: the last has the character.
    place = [token.text for token in explanation.reply].index("🦘")
    assert [token.text for token in explanation.reply[place - 3 : place]] == [""] * 3


def test_saying_nothing_is_a_reply(tokenizer: PreTrainedTokenizerFast) -> None:
    (token,) = explain_reply(gpt2(), tokenizer, QUESTION, reply="").reply
    assert token.text == "<|im_end|>" and token.is_end


def test_rows_that_no_token_has(tokenizer: PreTrainedTokenizerFast) -> None:
    """Some weights have more rows than their tokenizer has entries; here only these are likely."""
    network = gpt2(608)
    network.lm_head = torch.nn.Linear(32, 608)
    network.lm_head.bias.data[603] = 100
    explanation = explain_reply(network, tokenizer, QUESTION, max_new_tokens=2)
    assert [(t.id, t.text, t.alternatives[0].id, t.alternatives[0].text) for t in explanation.reply] == [(603, "", 603, "")] * 2
    assert explanation.vocabulary == 608


def test_plain_data(tokenizer: PreTrainedTokenizerFast) -> None:
    explanation = explain_ids(gpt2(), tokenizer, IDS[:4], IDS[4:])
    data = json.loads(json.dumps(explanation.to_dict(), allow_nan=False))
    assert data == explanation.to_dict()
    assert [len(row) for row in data["attributions"]] == [9] * 5
    assert data["reply"][0]["alternatives"][0].keys() == {"text", "id", "probability"}


def test_what_does_not_fit_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    network = gpt2()
    assert len(explain_ids(network, tokenizer, [1] * 127, [2]).reply) == 1
    with pytest.raises(ConfigError, match=r"^a prompt of 127 tokens and a reply of 2 are more than the model's 128 positions; shorten one"):
        explain_ids(network, tokenizer, [1] * 127, [2, 2])
    with pytest.raises(ConfigError, match="leaves no room for a reply in 128 positions"):
        explain_reply(network, tokenizer, chat("x " * 200))


def test_missing_captum_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ["captum.attr", *(name for name in sys.modules if name.partition(".")[0] == "captum")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"pip install 'lightning-chatgpt\[explain\]'"):
        gradient_x_input(gpt2(), torch.tensor([IDS]), n_reply=5)
