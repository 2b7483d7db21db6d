"""Metrics of replies: against the packages that define them, on real pairs, and against hand-made lists."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF

from lightning_chatgpt.data.sources import read_conversations
from lightning_chatgpt.errors import ConfigError
from lightning_chatgpt.metrics.text import (
    BertScore,
    Bleu,
    Chrf,
    Distinct,
    EditDistance,
    ExactMatch,
    LengthRatio,
    LoopRate,
    ReplyMetric,
    Rouge,
    is_unspaced,
    words_of,
)


@pytest.fixture(scope="module")
def pairs() -> tuple[list[str], list[str]]:
    """100 real replies and what might have been said in their place: the next chat's reply, or its own with a word lost."""
    chats = list(read_conversations("corpus:chatterbot/english"))[:100]
    references = [chat.messages[-1].content for chat in chats]
    generator = random.Random(0)
    replies = []
    for i, reference in enumerate(references):
        words = reference.split()
        if i % 3 and len(words) > 2:
            words.pop(generator.randrange(len(words)))
        replies.append(references[(i + 1) % 100] if i % 3 == 0 else " ".join(words))
    return replies, references


def updated(metric: ReplyMetric, replies: list[str], references: list[str], *, batch_size: int) -> float:
    for i in range(0, len(replies), batch_size):
        metric.update(replies[i : i + batch_size], references[i : i + batch_size])
    return float(metric.compute())


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_bleu_and_chrf_are_sacrebleu_s(pairs: tuple[list[str], list[str]], batch_size: int) -> None:
    replies, references = pairs
    assert updated(Bleu(), replies, references, batch_size=batch_size) == BLEU(force=True).corpus_score(replies, [references]).score > 10
    assert updated(Chrf(), replies, references, batch_size=batch_size) == CHRF().corpus_score(replies, [references]).score > 10


@pytest.mark.parametrize("kind", ["rouge1", "rouge2", "rougeL"])
def test_rouge_is_rouge_score_s(pairs: tuple[list[str], list[str]], kind: str) -> None:
    replies, references = pairs
    scorer = RougeScorer([kind])
    expected = sum(scorer.score(b, a)[kind].fmeasure for a, b in zip(replies, references, strict=True)) / 100
    assert updated(Rouge(kind), replies, references, batch_size=7) == pytest.approx(expected, rel=1e-12)


def test_resampled_bleu_is_that_of_the_drawn_replies(pairs: tuple[list[str], list[str]]) -> None:
    """Guards against a mean of sentence scores: what is resampled are the corpus's counts."""
    from lightning_chatgpt.metrics.bootstrap import resampled_counts

    replies, references = (side[:30] for side in pairs)
    found = Bleu().resampled(replies, references)
    counts = next(resampled_counts(30))
    for r in range(3):
        drawn = [i for i, n in enumerate(counts[r].tolist()) for _ in range(int(n))]
        expected = BLEU(force=True).corpus_score([replies[i] for i in drawn], [[references[i] for i in drawn]]).score
        assert float(found.figures[r]) == pytest.approx(expected, rel=1e-9)
    assert found.estimate().low < found.value < found.estimate().high


def test_signature_tells_the_tokenizer() -> None:
    assert "tok:zh" in Bleu("zh").signature and "tok:13a" in Bleu().signature


def test_by_hand() -> None:
    replies = ["yes", " Yes ", "no way at all", ""]
    references = ["Yes", "Yes", "no", "no"]
    assert updated(ExactMatch(), replies, references, batch_size=2) == 0.25
    # y for Y; two spaces... of " Yes "; eleven letters too many; two missing. By 3 + 3 + 2 + 2 characters.
    assert updated(EditDistance(), replies, references, batch_size=2) == (1 + 2 + 11 + 2) / 10
    assert updated(LengthRatio(), replies, references, batch_size=4) == (1 + 1 + 4 + 0) / 4


@pytest.mark.parametrize(
    ("reply", "loops"),
    [
        ("I like cats. " * 3, True),  # "i like cats ." three times
        ("I like cats. " * 2, False),
        ("no no no no no no", True),
        ("no no no no no", False),
        ("", False),
    ],
)
def test_loops(reply: str, loops: bool) -> None:
    assert updated(LoopRate(), [reply], [], batch_size=1) == loops


def test_distinct_counts_over_all_replies_and_processes() -> None:
    metric, other = Distinct(1), Distinct(1)
    metric.update(["a b a"])
    other.update(["b c"])
    both = Distinct(1)
    both.update(["a b a", "b c"])
    assert float(both.compute()) == pytest.approx(3 / 5)
    metric._reduce_states({"seen": list(other.seen)})
    assert float(metric.compute()) == pytest.approx(3 / 5)
    bigrams = Distinct(2)
    bigrams.update(["a b a b", "x"])
    assert float(bigrams.compute()) == pytest.approx(2 / 3)


def test_resamples_of_distinct_are_not_biased(pairs: tuple[list[str], list[str]]) -> None:
    """Guards against an interval that lies below the figure, as duplicates in a resample have it."""
    found = Distinct(2).resampled(pairs[0])
    assert found.estimate().low < found.value < found.estimate().high
    assert float(found.figures.mean()) == pytest.approx(found.value)
    assert Distinct(2).resampled(["a b"]).value == 1.0


def test_words_of_languages_without_spaces() -> None:
    assert words_of("Don't stop, 你好吗?") == ["don", "'", "t", "stop", ",", "你", "好", "吗", "?"]
    assert is_unspaced(["你好吗", "ok"]) and not is_unspaced(["hello there", "你好"]) and not is_unspaced([])


def test_nothing_to_score() -> None:
    metric = Bleu()
    metric.update([], [])
    assert metric.resampled([], []).n == 0
    assert torch.isnan(torch.tensor(LoopRate().resampled([]).value))


def test_bertscore_is_torchmetrics_s_with_an_encoder_of_a_folder(tmp_path: Path) -> None:
    from torchmetrics.functional.text import bert_score
    from transformers import BertConfig, BertModel, BertTokenizerFast

    torch.manual_seed(0)
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "yes", "no", "maybe", "not"]))
    BertTokenizerFast(vocab_file=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 9}
    BertModel(BertConfig(**sizes)).save_pretrained(tmp_path)
    replies, references = ["yes yes", "no", "maybe not", "no " * 600], ["yes yes", "maybe no not", "not", "yes"]
    found = BertScore(str(tmp_path)).rows(replies, references)[:, 0].tolist()
    # One by one: of several, torchmetrics holds replies against others' references.
    for one, pair in zip(found, list(zip(replies, references, strict=True))[:3], strict=False):
        assert one == pytest.approx(float(bert_score([pair[0]], [pair[1]], model_name_or_path=str(tmp_path))["f1"]), rel=1e-6)
    assert BertScore(str(tmp_path)).rows(replies[:1], references[:1])[0, 0] == pytest.approx(1.0)
    with pytest.raises(ConfigError, match=r"bertscore .*none: no such folder, or no config.json in it"):
        BertScore(str(tmp_path / "none"))


def test_rouge_of_other_scripts_is_of_their_words() -> None:
    """Guards against a score of 0 for equal replies: rouge-score knows a to z."""
    assert updated(Rouge("rouge1"), ["привет мир"], ["привет мир"], batch_size=1) == 0
    assert updated(Rouge("rouge1", by_words=True), ["привет мир!"], ["привет мир"], batch_size=1) == 1
    assert words_of("हिन्दी में") == ["हिन्दी", "में"]
