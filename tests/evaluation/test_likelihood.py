"""Scores of tokens: each once, and those of a plain float64 loop over transformers."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from lightning_chatgpt.chat.conversation import Conversation
from lightning_chatgpt.chat.encoding import Encoder
from lightning_chatgpt.data.collate import collate, find_targets
from lightning_chatgpt.errors import ConfigError
from lightning_chatgpt.evaluation.likelihood import MARKERS, Text, score_texts, text_of_chat, windows
from lightning_chatgpt.metrics.perplexity import Perplexity
from lightning_chatgpt.models.build import network_from_scratch
from lightning_chatgpt.models.loss import token_losses
from tests.conftest import ARCHITECTURE, chat


@pytest.fixture(scope="module")
def network(tokenizer: Any) -> Any:
    torch.manual_seed(0)
    return network_from_scratch({**ARCHITECTURE, "n_positions": 32, "initializer_range": 0.3}, tokenizer=tokenizer).eval()


@pytest.fixture(scope="module")
def texts(chats: list[Conversation], tokenizer: Any) -> list[Text]:
    """Real chats, some of them longer than the 32 positions."""
    encoder = Encoder(tokenizer, max_length=32, supervise="all")
    found = [text_of_chat(encoder, conversation) for conversation in chats[:8]]
    assert min(len(text.ids) for text in found) < 32 < max(len(text.ids) for text in found)
    return found


def nll_of(network: Any, text: Text, *, capacity: int, stride: int) -> list[float]:
    """The definition: each token's loss in float64, from what the window before it shows."""
    exact, found = copy.deepcopy(network).double(), []
    end = 0
    for t in range(1, len(text.ids)):
        if t >= end:  # the next window
            end = min(len(text.ids), (capacity + 1) if end == 0 else end + stride)
            start = max(0, end - 1 - capacity)
        with torch.no_grad():
            logits = exact(torch.tensor([text.ids[start:t]])).logits[0, -1]
        found.append(-float(logits.log_softmax(-1)[text.ids[t]]))
    return found


@pytest.mark.parametrize(
    ("n_tokens", "capacity", "stride"), [(0, 4, 2), (1, 4, 2), (5, 4, 2), (6, 4, 2), (23, 4, 4), (23, 8, 1), (9, 8, 3)]
)
def test_every_token_but_the_first_is_scored_once(n_tokens: int, capacity: int, stride: int) -> None:
    found = windows(n_tokens, capacity=capacity, stride=stride)
    assert [t for window in found for t in range(window.first, window.end)] == list(range(1, n_tokens))
    for number, window in enumerate(found):
        assert window.end - 1 - window.start <= capacity
        assert window.first > window.start
        assert number == 0 or window.first - window.start >= min(capacity, window.end - 1) - stride + 1


@pytest.mark.parametrize("stride", [1, 16, 32])
def test_scores_are_those_of_a_plain_loop(network: Any, texts: list[Text], tokenizer: Any, stride: int) -> None:
    found = score_texts(network, texts, pad_token_id=tokenizer.pad_token_id, batch_size=3, stride=stride)
    for text, scores in zip(texts, found, strict=True):
        expected = nll_of(network, text, capacity=32, stride=stride)
        for part, score in scores.items():
            own = [nll for nll, owner in zip(expected, text.parts[1:], strict=True) if owner == part]
            assert score.tokens == len(own)
            assert score.nll == pytest.approx(sum(own), rel=1e-5)


def test_batches_do_not_matter(network: Any, texts: list[Text], tokenizer: Any) -> None:
    def total(batch_size: int) -> float:
        found = score_texts(network, texts, pad_token_id=tokenizer.pad_token_id, batch_size=batch_size)
        return sum(score.nll for scores in found for score in scores.values())

    assert total(1) == pytest.approx(total(3), rel=1e-6) == pytest.approx(total(8), rel=1e-6)


def test_parts_are_messages_and_what_is_learnt_with_them(tokenizer: Any) -> None:
    encoder = Encoder(tokenizer, max_length=32, supervise="all")
    text = text_of_chat(encoder, chat("Hello", "Hi", "Bye", "So long", system="Be nice."))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for number, content in enumerate(["Be nice.", "Hello", "Hi", "Bye", "So long"]):
        ids = [i for i, part in zip(text.ids, text.parts, strict=True) if part == number]
        assert tokenizer.decode(ids[:-1]) == content and ids[-1] == end
    assert text.parts[0] == MARKERS


def test_a_uniform_model_has_exactly_the_perplexity_of_its_vocabulary(texts: list[Text], tokenizer: Any) -> None:
    uniform = network_from_scratch(ARCHITECTURE, tokenizer=tokenizer).eval()
    torch.nn.init.zeros_(uniform.get_output_embeddings().weight)
    found = score_texts(uniform, texts, pad_token_id=tokenizer.pad_token_id, batch_size=4)
    sums = [[score.nll, score.tokens] for scores in found for score in scores.values()]
    perplexity = Perplexity().of_sums(torch.tensor(sums, dtype=torch.float64).sum(0))
    assert perplexity.item() == pytest.approx(len(tokenizer), rel=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_finite_where_torchmetrics_overflows(tokenizer: Any, texts: list[Text], dtype: torch.dtype) -> None:
    from torchmetrics.functional.text import perplexity

    torch.manual_seed(0)
    sure = (
        network_from_scratch({**ARCHITECTURE, "initializer_range": 8.0, "tie_word_embeddings": False}, tokenizer=tokenizer).eval().to(dtype)
    )
    ids = torch.tensor([texts[0].ids[:20]])
    with torch.no_grad():
        assert perplexity(sure(ids).logits[:, :-1], ids[:, 1:]).isinf()
    (scores,) = score_texts(sure, [texts[0]], pad_token_id=tokenizer.pad_token_id, batch_size=1)
    assert all(math.isfinite(score.nll) for score in scores.values())
    assert sum(score.nll for score in scores.values()) / sum(score.tokens for score in scores.values()) > 16


@pytest.mark.parametrize("side", ["right", "left", "packed"])
@pytest.mark.parametrize("attention", ["stretches", "sdpa", "eager"])
def test_padding_on_either_side_and_packing_change_nothing(
    network: Any, texts: list[Text], tokenizer: Any, side: str, attention: Any
) -> None:
    import numpy as np

    from lightning_chatgpt.models.attention import set_attention

    own = copy.deepcopy(network)
    set_attention(own, attention)
    lengths = (9, 14, 6)
    examples = [(np.array(text.ids[:n], np.int32), np.ones(n, np.float32)) for text, n in zip(texts, lengths, strict=False)]
    if side == "packed":
        batch = collate([examples], pad_token_id=tokenizer.pad_token_id, width=32)
    elif side == "right":
        batch = collate([[example] for example in examples], pad_token_id=tokenizer.pad_token_id, width=32)
    else:  # the padding stands first, as an example of its own
        padding = [(np.full(32 - n, tokenizer.pad_token_id, np.int32), np.zeros(32 - n, np.float32)) for n in lengths]
        batch = collate([[pad, example] for pad, example in zip(padding, examples, strict=True)], pad_token_id=tokenizer.pad_token_id)
        for row, n in enumerate(lengths):
            batch["attention_mask"][row, : 32 - n] = 0
    assert len(find_targets(batch).token_ids) == sum(lengths) - 3
    with torch.no_grad():
        losses = token_losses(own, batch)
    expected = [
        nll for text, n in zip(texts, lengths, strict=False) for nll in nll_of(network, Text(text.ids[:n], []), capacity=32, stride=1)
    ]
    assert losses.nll.tolist() == pytest.approx(expected, rel=1e-5)
    assert losses.nll.sum().item() == pytest.approx(sum(expected), rel=1e-6)


def test_a_stride_beyond_the_positions_is_refused(network: Any, texts: list[Text]) -> None:
    with pytest.raises(ConfigError, match="stride is a number of tokens, 1 to the model's 32 positions, not 33"):
        score_texts(network, texts, pad_token_id=0, batch_size=1, stride=33)
