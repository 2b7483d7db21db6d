"""The loss: against transformers' own, and against a plain float64 loop on real conversations."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from lightning_chatgpt import CausalLMModule, ChatDataModule
from lightning_chatgpt.chat.encoding import Encoder, Example
from lightning_chatgpt.data.collate import collate
from lightning_chatgpt.errors import ModelError
from lightning_chatgpt.models import loss
from lightning_chatgpt.models.loss import check_head, token_losses
from tests.conftest import ARCHITECTURE, trainer


def network(vocab_size: int = 600) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**ARCHITECTURE, vocab_size=vocab_size, bos_token_id=0, eos_token_id=0)).eval()


def test_equals_transformers_own_loss(chats: list, tokenizer: PreTrainedTokenizerFast) -> None:
    examples = [chat.examples for chat in Encoder(tokenizer, max_length=128).encode(chats[:9])]
    batch = collate(examples, pad_token_id=tokenizer.pad_token_id)
    model = network()
    ours = token_losses(model, batch)
    theirs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"])
    assert ours.mean().item() == pytest.approx(theirs.loss.item(), rel=1e-6)
    shifted = batch["labels"][:, 1:]
    right = theirs.logits[:, :-1].argmax(-1) == shifted
    assert ours.is_correct.sum() == right[shifted != -100].sum()
    assert ours.targets.tolist() == shifted[shifted != -100].tolist()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_padding_changes_nothing(family: str) -> None:
    """Any causal model of transformers will do, and right padding is never looked at."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = network() if family == "gpt2" else LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=600)).eval()
    short, long = Example([5, 6, 7, 8], [0.0, 1.0, 1.0, 1.0]), Example(list(range(10, 50)), [1.0] * 40)
    alone = token_losses(model, collate([[short]], pad_token_id=0))
    together = token_losses(model, collate([[short], [long]], pad_token_id=0))
    assert torch.allclose(alone.nll, together.nll[:3], rtol=1e-5)


def test_weights_multiply_and_the_first_token_is_never_scored() -> None:
    batch = collate([[Example([5, 6, 7], [1.0, 2.0, 0.5])]], pad_token_id=0)
    losses = token_losses(network(), batch)
    assert losses.targets.tolist() == [6, 7]
    assert losses.weights.tolist() == [2.0, 0.5]
    a, b = losses.nll.tolist()
    assert losses.mean().item() == pytest.approx((2 * a + 0.5 * b) / 2.5, rel=1e-6)


def test_nothing_supervised_gives_zero_not_nan() -> None:
    batch = collate([[Example([5, 6, 7], [1.0, 0.0, 0.0])]], pad_token_id=0)
    model = network()
    loss = token_losses(model, batch).mean()
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("with_bias", [False, True])
def test_chunks_have_the_gradients_of_the_whole(with_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "LOGITS_MIB", 8 * 300 * 7 / 2**20)  # seven rows of logits at a time
    torch.manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((50, 16), (300, 16), (300,)))
    token_ids, weights = torch.randint(0, 300, (50,)), torch.rand(50, dtype=torch.float64)
    total, nll, is_correct = loss._HeadLoss.apply(hidden, weight, bias if with_bias else None, token_ids, weights, True)
    (3 * total).backward()
    leaves = [hidden, weight, *([bias] if with_bias else [])]
    ours = [leaf.grad.clone() for leaf in leaves]
    logits = torch.nn.functional.linear(hidden, weight, bias if with_bias else None)
    expected = torch.nn.functional.cross_entropy(logits, token_ids, reduction="none")
    theirs = torch.autograd.grad(3 * (expected * weights).sum(), leaves)
    torch.testing.assert_close(nll, expected.detach(), rtol=1e-12, atol=1e-12)
    assert torch.equal(is_correct, logits.argmax(-1) == token_ids)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("training", [True, False])
def test_logits_take_no_more_than_their_share(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured: every tensor that an operator makes is looked at."""
    monkeypatch.setattr(loss, "LOGITS_MIB", 1)
    sizes: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            found = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor) and t.ndim == 2 and t.size(1) == 600]
            sizes.extend(t.numel() * t.element_size() for t in found)
            return result

    model = network()
    rows = [[(np.arange(1, 121, dtype=np.int32), np.ones(120, dtype=np.float32))]] * 64
    with Sizes(), torch.set_grad_enabled(training):
        losses = token_losses(model, collate(rows, pad_token_id=0))
        if training:
            losses.total.backward()
    assert len(losses.nll) * 600 * 4 > 16 * 2**20  # whole, they would take this much
    assert 0.9 * 2**20 < max(sizes) <= 2**20


def test_evaluation_takes_no_gradient_of_the_head() -> None:
    """Guards against one taken in vain: weights that are trained ask for it, whether it is recorded or not."""
    names: list[str] = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.shape == (600, 32):
                names.append(str(func))
            return result

    rows = [[(np.arange(1, 121, dtype=np.int32), np.ones(120, dtype=np.float32))]]
    model, batch = network(), collate(rows, pad_token_id=0)
    with Names(), torch.no_grad():
        losses = token_losses(model, batch)
    assert names == []
    assert losses.nll.dtype == torch.float64
    with Names():
        torch.testing.assert_close(token_losses(model, batch).nll.double(), losses.nll, rtol=1e-6, atol=1e-6)
    assert names != []


def test_a_network_with_other_logits_is_refused() -> None:
    """Guards against a loss that is silently another than the network's: some cap or scale their logits after the head."""
    check_head(network())
    settings = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
                "head_dim": 16, "vocab_size": 100, "final_logit_softcapping": 0.5, "initializer_range": 0.5}  # fmt: skip
    with pytest.raises(ModelError, match="Gemma2ForCausalLM: its logits are not its hidden states times its head"):
        check_head(Gemma2ForCausalLM(Gemma2Config(**settings)))


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_val_loss_equals_a_float64_loop_on_50_real_conversations(
    batch_size: int, chats: list, tokenizer: PreTrainedTokenizerFast, plain_gpt2: Path, tmp_path: Path
) -> None:
    source = tmp_path / "chats.jsonl"
    chosen = [c for c in chats if sum(len(m.content) for m in c.messages) < 200][:50]
    source.write_text("".join(json.dumps(c.to_dict()) + "\n" for c in chosen))
    module = CausalLMModule(pretrained=str(plain_gpt2))
    data = ChatDataModule(validation=str(source), batch_size=batch_size)
    (logged,) = trainer(tmp_path).validate(module, data, verbose=False)

    assert data.tokenizer is not None
    model = copy.deepcopy(module.network).double().eval()
    nll, n_tokens, n_bytes = 0.0, 0, 0
    for conversation in chosen:
        # The text is tokenized by transformers' own template; the mask is found by looking for the markers.
        messages = conversation.to_dict()["messages"]
        ids = data.tokenizer.apply_chat_template(messages, return_dict=False)
        header = data.tokenizer("assistant\n")["input_ids"]
        start, end = data.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
        with torch.no_grad():
            log_probabilities = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        is_learnt = False
        for t in range(1, len(ids)):
            if is_learnt:
                nll -= log_probabilities[t - 1, ids[t]].item()
                n_tokens += 1
            if ids[t] == end:
                is_learnt = False
            elif ids[max(0, t - len(header)) : t + 1] == [start, *header]:
                is_learnt = True
        n_bytes += sum(len(m.content.encode()) for m in conversation.messages if m.role == "assistant")
    assert n_tokens > 300
    assert logged["val_loss"] == pytest.approx(nll / n_tokens, rel=1e-6)
    assert logged["val_perplexity"] == pytest.approx(math.exp(nll / n_tokens), rel=1e-5)
    assert logged["val_bits_per_byte"] == pytest.approx(nll / math.log(2) / n_bytes, rel=1e-6)
