"""Ids and loss weights against ``tests/golden/chats.json``, which was written by hand.

A case there gives its ids as numbers, or as pieces ``[kind, what, weight]``: ``control`` names a control token, ``text`` is ASCII as it
stands, ``bytes`` is UTF-8 in hexadecimal, as the Unicode tables have it. A tokenizer without merges makes each byte one id: the
control tokens come first, then the bytes in the order of GPT-2's alphabet, which is rebuilt here from the rule in its paper's code.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from lightning_chatgpt.chat.encoding import Encoder
from lightning_chatgpt.chat.faults import Faults
from lightning_chatgpt.chat.schemas import RecordParser
from lightning_chatgpt.chat.tokenizer import train_tokenizer

CASES = json.loads((Path(__file__).parents[1] / "golden" / "chats.json").read_text(encoding="utf-8"))
CONTROL = {"chatml": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "plain": ["<|endoftext|>"]}


def byte_rank(byte: int) -> int:
    """Where a byte stands in GPT-2's alphabet: those that print keep their character, the others are moved to U+0100 and on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return (printable + others).index(byte)


def expected(case: dict) -> tuple[list[int], list[float]]:
    if "ids" in case:
        return case["ids"], case["weights"]
    control = CONTROL[case.get("template", "chatml")]
    ids: list[int] = []
    weights: list[float] = []
    for kind, what, weight in case["pieces"]:
        if kind == "control":
            piece = [control.index(what)]
        else:
            text = what.encode("ascii") if kind == "text" else bytes.fromhex(what)
            piece = [len(control) + byte_rank(byte) for byte in text]
        ids += piece
        weights += [weight] * len(piece)
    return ids, weights


@pytest.fixture(scope="module")
def plain_byte_tokenizer() -> PreTrainedTokenizerFast:
    """As byte_tokenizer, with the plain template's one control token: the bytes begin at id 1."""
    return train_tokenizer([], vocab_size=257, template="plain")


def test_alphabet_by_hand() -> None:
    # '!' is first, 'A' is 32 places after it, '~' the 94th; then come 12 and 82 of Latin-1, then NUL; LF is 10 after that.
    assert [byte_rank(b) for b in (0x21, 0x41, 0x7E, 0xA1, 0xAE, 0xFF, 0x00, 0x0A, 0x20, 0x7F, 0xAD)] == [
        *[0, 32, 93, 94, 106, 187, 188, 198, 220, 221, 255]
    ]


def encoder_of(case: dict, byte_tokenizer: PreTrainedTokenizerFast, plain_byte_tokenizer: PreTrainedTokenizerFast) -> Encoder:
    tokenizer = plain_byte_tokenizer if case.get("template") == "plain" else byte_tokenizer
    return Encoder(tokenizer, max_length=10**6, supervise=case.get("supervise", "assistant"))


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_golden_ids_and_weights(case: dict, byte_tokenizer: PreTrainedTokenizerFast, plain_byte_tokenizer: PreTrainedTokenizerFast) -> None:
    conversation = RecordParser(faults=Faults(), schema="openai").parse({"messages": case["messages"]}, default_id="golden")
    encoder = encoder_of(case, byte_tokenizer, plain_byte_tokenizer)
    ((example,),) = [chat.examples for chat in encoder.encode([conversation])]
    ids, weights = expected(case)
    assert example.input_ids == ids
    assert example.loss_weights == weights


def test_the_file_covers_what_it_should() -> None:
    assert len(CASES) >= 10 and len({case["name"] for case in CASES}) == len(CASES)
    assert sum("ids" in case for case in CASES) >= 3
    assert {str(case.get("supervise", "assistant")) for case in CASES} == {"assistant", "last", "all", "['user', 'tool']"}
