"""Metrics of generated replies, each with what tells how sure it is.

What the field has an implementation of is taken from there: BLEU and chrF from sacrebleu, ROUGE from rouge-score, BERTScore and the edit
distance from torchmetrics. Shapes: N replies, S sums of a metric, R resamples.
"""

from __future__ import annotations

import re
import unicodedata
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_chatgpt.errors import ConfigError
from lightning_chatgpt.metrics.bootstrap import Resampled, resample, resampled_counts
from lightning_chatgpt.metrics.sums import Ratio, SumMetric

_LOOP_ORDER, _LOOP_COUNT = 4, 3

# Characters of scripts that put no space between words count as a word each: kana, Chinese characters, Hangul.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"


@cache
def _word() -> re.Pattern[str]:
    marks = "".join(c for c in map(chr, range(0x300, 0x10000)) if unicodedata.category(c)[0] == "M")  # vowel signs, accents
    return re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}][{marks}]*(?:[^\W{_UNSPACED}][{marks}]*)*|[^\w\s]")


def words_of(text: str) -> list[str]:
    """Words and punctuation marks of a text, in lower case; of Chinese, Japanese and Korean each character."""
    return _word().findall(unicodedata.normalize("NFC", text.lower()))


def is_ascii(texts: Iterable[str]) -> bool:
    """Whether most letters of texts are those from a to z."""
    letters = [character for text in texts for character in text if character.isalpha()]
    return 2 * sum(letter.isascii() for letter in letters) >= len(letters)


def is_unspaced(texts: Iterable[str]) -> bool:
    """Whether most letters of texts are of scripts that put no space between words."""
    letters = [character for text in texts for character in text if character.isalpha()]
    return 2 * sum(bool(re.match(f"[{_UNSPACED}]", letter)) for letter in letters) > len(letters)


class ReplyMetric(SumMetric):
    """A figure of replies, where there is one held against their references.

    Attributes:
        needs_reference: Whether it holds a reply against a reference.
        higher_is_better: Whether more of it is better; None where neither is.
    """

    needs_reference = True

    @abstractmethod
    def rows(self, replies: Sequence[str], references: Sequence[str]) -> Tensor:
        """What each reply adds to the sums; (N, S). References of metrics that need none are not looked at."""

    def update(self, replies: Sequence[str], references: Sequence[str] = ()) -> None:
        """Add replies, and the reference of each."""
        if replies:
            self.add_rows(self.rows(replies, references))

    def resampled(self, replies: Sequence[str], references: Sequence[str] = (), *, seed: int = 0) -> Resampled:
        """The figure, and what it is in each resample of the replies."""
        rows = self.rows(replies, references) if replies else torch.zeros(0, self.n_sums)
        return resample(rows, self.of_sums, seed=seed)


class _Sacrebleu(ReplyMetric):
    """A score of sacrebleu, which is made of what each reply adds to corpus-wide counts."""

    higher_is_better = True
    scorer: Any

    def rows(self, replies: Sequence[str], references: Sequence[str]) -> Tensor:
        """Counts of each reply; (N, S)."""
        return torch.tensor(self.scorer._extract_corpus_statistics(list(replies), [list(references)]), dtype=torch.float64)

    def of_sums(self, sums: Tensor) -> Tensor:
        """The score, 0 to 100; (..., S) -> (...)."""
        scores = [self.scorer._aggregate_and_compute([[int(n) for n in row]]).score for row in sums.reshape(-1, self.n_sums).tolist()]
        return torch.tensor(scores, dtype=torch.float64).reshape(sums.shape[:-1])

    @property
    def signature(self) -> str:
        """Settings and version, in the form in which the field cites them."""
        self.rows([""], [""])  # it tells how many references there are of each reply
        return str(self.scorer.get_signature())


class Bleu(_Sacrebleu):
    """Corpus BLEU, 0 to 100. Source: Papineni et al. 2002; Post 2018.

    Args:
        tokenize: sacrebleu's: 13a, or zh for Chinese.

    Raises:
        ConfigError: sacrebleu is not installed.
    """

    n_sums = 10

    def __init__(self, tokenize: str = "13a") -> None:
        super().__init__()
        # Chats hold lines that end in " ."; sacrebleu would warn that they look tokenized.
        self.scorer = _import("sacrebleu").metrics.BLEU(tokenize=tokenize, force=True)


class Chrf(_Sacrebleu):
    """Corpus chrF, 0 to 100: n-grams of characters, which needs no words. Source: Popović 2015.

    Raises:
        ConfigError: sacrebleu is not installed.
    """

    n_sums = 18

    def __init__(self) -> None:
        super().__init__()
        self.scorer = _import("sacrebleu").metrics.CHRF()


class ReplyMean(ReplyMetric, Ratio):
    """A mean over replies, or over what they consist of."""

    @abstractmethod
    def of_reply(self, reply: str, reference: str) -> tuple[float, float]:
        """What a reply adds to the sum above and to the one below."""

    def rows(self, replies: Sequence[str], references: Sequence[str]) -> Tensor:
        """Both addends of each reply; (N, 2)."""
        pairs = zip(replies, references if self.needs_reference else [""] * len(replies), strict=True)
        return torch.tensor([self.of_reply(*pair) for pair in pairs], dtype=torch.float64)


class Rouge(ReplyMean):
    """Mean F1 of ROUGE, 0 to 1. Source: Lin 2004.

    Args:
        kind: rouge1, rouge2 or rougeL.
        by_words: Whether words are those of :func:`words_of`; rouge-score itself knows those of a to z and digits alone.

    Raises:
        ConfigError: rouge-score is not installed.
    """

    higher_is_better = True

    def __init__(self, kind: str, *, by_words: bool = False) -> None:
        super().__init__()
        self.kind = kind
        tokenizer = SimpleNamespace(tokenize=lambda text: [word for word in words_of(text) if word[0].isalnum()]) if by_words else None
        self.scorer = _import("rouge_score.rouge_scorer").RougeScorer([kind], use_stemmer=False, tokenizer=tokenizer)

    def of_reply(self, reply: str, reference: str) -> tuple[float, float]:
        """The F1 of a reply, and 1."""
        return self.scorer.score(reference, reply)[self.kind].fmeasure, 1.0


class ExactMatch(ReplyMean):
    """How often the reply is the reference, white space at its ends aside."""

    higher_is_better = True

    def of_reply(self, reply: str, reference: str) -> tuple[float, float]:
        """Whether it is, and 1."""
        return float(reply.strip() == reference.strip()), 1.0


class EditDistance(ReplyMean):
    """Characters to insert, delete or replace, for each character of the references. Source: Levenshtein 1966."""

    higher_is_better = False

    def of_reply(self, reply: str, reference: str) -> tuple[float, float]:
        """Edits of a reply, and the characters of its reference."""
        from torchmetrics.functional.text import edit_distance

        return float(edit_distance(reply, reference, reduction="sum")), float(len(reference))


class LengthRatio(ReplyMean):
    """Words of the replies for each word of the references."""

    def of_reply(self, reply: str, reference: str) -> tuple[float, float]:
        """Words of a reply, and of its reference."""
        return float(len(words_of(reply))), float(len(words_of(reference)))


class LoopRate(ReplyMean):
    """How often a reply loops: some four words in a row stand in it three times or more."""

    needs_reference = False
    higher_is_better = False

    def of_reply(self, reply: str, reference: str) -> tuple[float, float]:
        """Whether it does, and 1."""
        grams = _ngrams(words_of(reply), _LOOP_ORDER)
        return float(any(grams.count(gram) >= _LOOP_COUNT for gram in set(grams))), 1.0


class BertScore(ReplyMetric, Ratio):
    """Mean F1 of BERTScore, as torchmetrics computes it, without baseline rescaling. Source: Zhang et al. 2020.

    Args:
        folder: A local transformers folder with an encoder and its tokenizer; nothing is downloaded.

    Raises:
        ConfigError: It is not there.
    """

    higher_is_better = True

    def __init__(self, folder: str) -> None:
        super().__init__()
        if not (Path(folder) / "config.json").is_file():
            raise ConfigError(f"bertscore {folder}: no such folder, or no config.json in it; name a transformers folder with an encoder")
        self.folder = folder

    def rows(self, replies: Sequence[str], references: Sequence[str]) -> Tensor:
        """The F1 of each reply, and 1; (N, 2). What is longer than the encoder's positions is cut."""
        from torchmetrics.functional.text import bert_score
        from transformers import AutoModel, AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        model = AutoModel.from_pretrained(self.folder, local_files_only=True).eval()
        n_positions = min(512, int(getattr(model.config, "max_position_embeddings", 512)))

        score: Any = bert_score
        # One pair at a time: of several, torchmetrics 1.9 holds replies against each other's references where their lengths differ.
        settings: Any = {"model": model, "user_tokenizer": tokenizer, "max_length": n_positions, "truncation": True}
        pairs = zip(replies, references, strict=True)
        scores = [float(score([reply], [reference], **settings)["f1"]) for reply, reference in pairs]
        return torch.tensor([[found, 1.0] for found in scores], dtype=torch.float64)


class Distinct(Metric):
    """Different n-grams of all replies for each n-gram there is: 1 where none comes twice. Source: Li et al. 2016.

    It falls with the number of replies, so it compares models on the same prompts only.

    Args:
        order: n.
    """

    full_state_update = False
    needs_reference = False
    higher_is_better = True
    seen: list[Tensor]

    def __init__(self, order: int) -> None:
        super().__init__()
        self.order = order
        # No sum tells how many of two processes' n-grams are the same: 64 bits of each are kept.
        self.add_state("seen", [], dist_reduce_fx="cat")

    def update(self, replies: Sequence[str], references: Sequence[str] = ()) -> None:
        """Add replies."""
        self.seen.extend(self._hashes(replies))

    def compute(self) -> Tensor:
        """The share; shape ()."""
        return torch.tensor(_share_different(torch.cat(list(self.seen)) if len(self.seen) else torch.zeros(0)))

    def resampled(self, replies: Sequence[str], references: Sequence[str] = (), *, seed: int = 0) -> Resampled:
        """The figure, and what it is in each resample of the replies.

        A reply that is drawn twice adds no different n-gram, so resamples have fewer than samples have: they are moved by as much as
        their mean is off.
        """
        hashes = self._hashes(replies)
        whole = torch.cat(hashes) if hashes else torch.zeros(0, dtype=torch.int64)
        value = _share_different(whole)
        if len(hashes) < 2:
            return Resampled(value, torch.zeros(0, dtype=torch.float64), len(hashes))
        numbers = torch.unique(whole, return_inverse=True)[1]
        lengths = torch.tensor([len(h) for h in hashes])
        owners = torch.arange(len(hashes)).repeat_interleave(lengths)
        figures = []
        for counts in resampled_counts(len(hashes), seed=seed):
            n_different = [int((numbers[(row > 0)[owners]].bincount() > 0).sum()) for row in counts]
            figures.append(torch.tensor(n_different, dtype=torch.float64) / (counts @ lengths.double()))
        found = torch.cat(figures)
        return Resampled(value, (found + (value - found.nanmean())).clamp(0, 1), len(hashes))

    def _hashes(self, replies: Sequence[str]) -> list[Tensor]:
        import xxhash

        return [
            torch.tensor(
                [xxhash.xxh64_intdigest("\0".join(gram).encode()) - 2**63 for gram in _ngrams(words_of(reply), self.order)],
                dtype=torch.int64,
            )
            for reply in replies
        ]


def _share_different(hashes: Tensor) -> float:
    return len(torch.unique(hashes)) / len(hashes) if len(hashes) else float("nan")


def _ngrams(words: Sequence[str], order: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[i:] for i in range(order)), strict=False))


def _import(module: str) -> Any:
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"replies are scored with sacrebleu and rouge-score, which cannot be imported ({error}): "
            "pip install 'lightning-chatgpt[evaluate]'"
        ) from None
