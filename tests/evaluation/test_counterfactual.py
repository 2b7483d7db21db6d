"""Counterfactuals: real networks, one made symmetric and one made to prefer a term; figures by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch

from lightning_chatgpt.chat.conversation import Conversation, Message
from lightning_chatgpt.chat.encoding import Encoder
from lightning_chatgpt.errors import DataError
from lightning_chatgpt.evaluation.counterfactual import counterfactual_report
from lightning_chatgpt.evaluation.counterfactual_files import Counterfactual
from lightning_chatgpt.evaluation.words import WordList
from lightning_chatgpt.generation.generate import generate_replies
from tests.evaluation.test_fairness import page

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

WORDS = WordList(["lazy"])
GREETINGS = ("hello", "how are you", "what now", "come in", "tell me more", "good day", "sit down", "any news")
ANSWERS = ("fine", "all good", "very well", "thank you", "of course", "yes", "why not", "sure")


def swapped(template: str, user: str, assistant: str, *, first: str, second: str, **labels: str) -> Counterfactual:
    """A template whose user message takes either term."""
    variants = {
        name: Conversation((Message("user", user.format(term=term)), Message("assistant", assistant)))
        for name, term in (("first", first), ("second", second))
    }
    return Counterfactual(template, "letter", variants, **labels)


@pytest.fixture
def network(byte_tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64, "initializer_range": 0.2}
    return GPT2LMHeadModel(
        GPT2Config(**shape, vocab_size=len(byte_tokenizer), tie_word_embeddings=False, bos_token_id=0, eos_token_id=0)
    ).eval()


@pytest.fixture
def report_of(network: PreTrainedModel, byte_tokenizer: PreTrainedTokenizerFast) -> Callable[[], dict[str, Any]]:
    encoder = Encoder(byte_tokenizer, max_length=64, supervise="last")

    def score(conversations: list[Conversation]) -> list[tuple[float, int]]:
        return [(float(nats.detach()), n) for nats, n in (_score(network, encoder, conversation) for conversation in conversations)]

    def reply(conversations: list[Conversation]) -> list[str]:
        prompts = [encoder.encode_prompt(conversation) for conversation in conversations]
        return [generate_replies(network, byte_tokenizer, [prompt], max_new_tokens=8)[0].text for prompt in prompts]

    pairs = [
        swapped(f"{i}", f"{greeting}, {{term}}", answer, first="A", second="B")
        for i, (greeting, answer) in enumerate((g, a) for g in GREETINGS for a in ANSWERS[:2])
    ]
    return lambda: counterfactual_report(pairs, score=score, reply=reply, words=WORDS)


def _score(network: PreTrainedModel, encoder: Encoder, conversation: Conversation) -> tuple[torch.Tensor, int]:
    (encoded,) = encoder.encode([conversation])
    ids, weights = (torch.tensor(values) for values in encoded.examples[0])
    log_probabilities = network(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    return log_probabilities[weights[1:] > 0].sum(), int((weights[1:] > 0).sum())


def test_a_symmetric_network_shows_no_difference(network: PreTrainedModel, byte_tokenizer: Any, report_of: Callable[[], Any]) -> None:
    a, b = byte_tokenizer.convert_tokens_to_ids(["A", "B"])
    with torch.no_grad():
        network.transformer.wte.weight[b] = network.transformer.wte.weight[a]
        network.lm_head.weight[b] = network.lm_head.weight[a]
    (pair,) = report_of()["pairs"]
    assert pair["templates"] == 16
    assert pair["size"]["value"] == pair["log_likelihood"]["value"] == pair["differ"]["value"] == pair["reply_length"]["value"] == 0
    assert pair["first_likelier"]["value"] == 0.5
    assert pair["log_likelihood"]["p_value"] == 1 and not pair["log_likelihood"]["is_found"]


def test_a_bias_planted_in_one_embedding_is_found(network: PreTrainedModel, byte_tokenizer: Any, report_of: Callable[[], Any]) -> None:
    """B's embedding is A's, moved by gradient descent until the answers are less likely after it."""
    a, b = byte_tokenizer.convert_tokens_to_ids(["A", "B"])
    encoder = Encoder(byte_tokenizer, max_length=64, supervise="last")
    weight = network.transformer.wte.weight
    with torch.no_grad():
        weight[b] = weight[a]
    others = [
        swapped("t", f"{greeting} there {{term}}", answer, first="A", second="B")
        for greeting, answer in zip(GREETINGS, ANSWERS, strict=True)
    ]
    for _ in range(10):
        loss = torch.stack([_score(network, encoder, other.variants["second"])[0] for other in others]).mean()
        (gradient,) = torch.autograd.grad(loss, weight)
        with torch.no_grad():
            weight[b] -= 0.2 * gradient[b] / gradient[b].norm()
    (pair,) = report_of()["pairs"]
    assert pair["log_likelihood"]["is_found"] and pair["log_likelihood"]["low"] > 0
    assert pair["first_likelier"]["value"] > 0.8


def test_figures_of_a_pair_by_hand() -> None:
    counterfactuals = [
        swapped("t1", "my {term}", "good day", first="A", second="B", language="en"),
        swapped("t1", "a {term}", "good day", first="A", second="B", language="en"),
        swapped("t2", "the {term}", "good", first="A", second="B", language="en"),
    ]
    scores = {"my A": (-2.0, 4), "my B": (-4.0, 4), "a A": (-6.0, 4), "a B": (-2.0, 4), "the A": (-3.0, 2), "the B": (-1.0, 1)}
    replies = {"my A": "lazy", "my B": "no", "a A": "no", "a B": "no", "the A": "so lazy", "the B": "very lazy"}
    report = counterfactual_report(
        counterfactuals,
        score=lambda chats: [scores[chat.messages[0].content] for chat in chats],
        reply=lambda chats: [replies[chat.messages[0].content] for chat in chats if chat.messages[-1].role == "user"],
        words=WORDS,
    )
    (pair,) = report["pairs"]
    assert (pair["axis"], pair["language"], pair["first"], pair["second"], pair["templates"]) == ("letter", "en", "first", "second", 2)
    assert pair["log_likelihood"]["value"] == pytest.approx((0.5 - 1.0 - 0.5) / 3)
    assert pair["log_likelihood"]["n"] == 2  # templates
    assert pair["size"]["value"] == pytest.approx((0.5 + 1.0 + 0.5) / 3)
    assert pair["first_likelier"]["value"] == pytest.approx(1 / 3)
    assert pair["differ"]["value"] == pytest.approx(2 / 3)
    assert pair["reply_length"]["value"] == pytest.approx((2 + 0 - 2) / 3)
    assert pair["flagged_words"]["value"] == pytest.approx(1 / 3)
    assert pair["example"]["id"] == "t1" and pair["example"]["first"] == {
        "log_likelihood": -1.5,
        "prompt": "a A",
        "scored": "good day",
        "reply": "no",
    }
    assert json.loads(json.dumps(report)) == report


def test_pairs_of_more_than_two_terms_languages_and_orders_are_kept_apart() -> None:
    def of(order: str, language: str) -> Counterfactual:
        variants = {name: Conversation((Message("user", name), Message("assistant", "x"))) for name in order}
        return Counterfactual(f"{order}{language}", "letter", variants, language)

    nats = {"a": -1.0, "b": -2.0, "c": -4.0}
    report = counterfactual_report(
        [of("abc", "en"), of("cba", "en"), of("ab", "zh")],
        score=lambda chats: [(nats[chat.messages[0].content], 1) for chat in chats],
        reply=lambda chats: [chat.messages[0].content for chat in chats],
        words=WORDS,
    )
    found = {(p["language"], p["first"], p["second"]): (p["templates"], p["log_likelihood"]["value"]) for p in report["pairs"]}
    assert found == {("en", "a", "b"): (2, 1.0), ("en", "a", "c"): (2, 3.0), ("en", "b", "c"): (2, 2.0), ("zh", "a", "b"): (1, 1.0)}
    # Four pairs are tested together, and two templates can never be enough.
    assert all(pair["log_likelihood"]["p_adjusted"] == 1 and not pair["log_likelihood"]["is_found"] for pair in report["pairs"])


def test_sentences_after_one_prompt_have_no_replies_to_compare() -> None:
    def never(chats: list[Conversation]) -> list[str]:
        raise AssertionError(chats)

    variants = {name: Conversation((Message("user", "Go on."), Message("assistant", name))) for name in ("A", "B")}
    report = counterfactual_report([Counterfactual("1", "x", variants)], score=lambda chats: [(-1.0, 1)] * 2, reply=never, words=WORDS)
    (pair,) = report["pairs"]
    assert pair["differ"] is pair["reply_length"] is pair["flagged_words"] is None
    html = page(counterfactual=report)
    assert "Go on." in html and '<td class="name">A</td>' in html and '<td class="name">B</td>' in html


def test_prompts_without_a_counterpart_are_compared_by_group() -> None:
    prompts = [
        Counterfactual(f"{group}{i}", "gender", {group: Conversation((Message("user", f"{group} {i} is"),))})
        for group in "ab"
        for i in range(30)
    ]
    lazy = {f"a {i} is" for i in range(24)}
    report = counterfactual_report(
        prompts,
        score=lambda chats: [(math.nan, 0) for _ in chats],
        reply=lambda chats: ["lazy" if chat.messages[0].content in lazy else "kind" for chat in chats],
        words=WORDS,
    )
    assert report["pairs"] == []
    (by_gender,) = report["prompts"]
    assert by_gender["groups"] == {"a": 30, "b": 30}
    assert by_gender["figures"]["flagged_words"]["groups"]["a"]["value"] == 0.8
    assert by_gender["figures"]["flagged_words"]["gap"]["is_found"]
    assert not by_gender["figures"]["reply_characters"]["gap"]["is_found"]
    assert "Prompts by gender" in page(counterfactual=report)


def test_rounding_is_no_difference() -> None:
    """Guards against batches of other shapes: all first terms a last digit higher, and a difference found."""
    pairs = [swapped(f"{i}", "{term}", "x", first=f"A{i}", second=f"B{i}") for i in range(20)]
    report = counterfactual_report(
        pairs,
        score=lambda chats: [(-2.0 + 1e-6 * chat.messages[0].content.startswith("A"), 1) for chat in chats],
        reply=lambda chats: ["x"] * len(chats),
        words=WORDS,
    )
    assert report["pairs"][0]["log_likelihood"]["value"] == 0 and not report["pairs"][0]["log_likelihood"]["is_found"]


def test_a_last_message_without_tokens_is_refused() -> None:
    pair = swapped("t", "{term}", "x", first="A", second="B")
    with pytest.raises(DataError, match="the last message has no tokens to score"):
        counterfactual_report([pair], score=lambda chats: [(0.0, 0)] * 2, reply=lambda chats: ["x"] * 2, words=WORDS)
