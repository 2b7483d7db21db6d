"""Augmented copies differ in what the user says, by as much as was asked for, and in nothing else."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lightning_chatgpt.chat.conversation import ROLES, Conversation, Message
from lightning_chatgpt.data.augmentation import build_augmentation, mistype
from lightning_chatgpt.errors import ConfigError, DataError
from tests.conftest import chat

RUN = {"deadline": None, "derandomize": True, "database": None}
TEXT = st.text(alphabet=st.sampled_from("abcé ÄZ\n\t.!?12_你好ね👍م"), max_size=30)
MESSAGES = st.lists(st.builds(Message, st.sampled_from(ROLES), TEXT, st.sampled_from([0.0, 1.0])), min_size=1, max_size=6)
PROBABILITY = st.sampled_from([0, 0.3, 1])
LONG = " ".join(f"w{i}" for i in range(10_000))  # so that rates can be told


def augmented(text: str, seed: int = 0, **options: Any) -> str:
    [copy] = build_augmentation(options).copies_of(chat(text, "answer"), seed=seed)
    return copy.messages[0].content


def upper(text: str) -> str:
    return text.upper()


def draw(text: str, rng: random.Random) -> str:
    return f"{text} {rng.random()}"


def translate(text: str, target: str = "de") -> str:
    return f"{target}: {text}"


def silent(text: str) -> str:
    return " "


def forgetful(text: str) -> None:
    return None


@given(messages=MESSAGES, rejected=MESSAGES, mask=PROBABILITY, dropout=PROBABILITY, swap=PROBABILITY, typos=PROBABILITY)
@settings(max_examples=300, **RUN)
def test_only_what_the_user_says_changes(messages: Any, rejected: Any, mask: float, dropout: float, swap: float, typos: float) -> None:
    conversation = Conversation(tuple(messages), id="x", labels={"topic": "t"}, rejected=tuple(rejected))
    assume(any((mask, dropout, swap, typos)))
    augmentation = build_augmentation({"copies": 2, "mask": mask, "dropout": dropout, "swap": swap, "typos": typos})
    copies = augmentation.copies_of(conversation, seed=3)
    assert len(copies) == (2 if any(m.role == "user" for m in messages) else 0)
    for copy in copies:
        assert copy.rejected == conversation.rejected and copy.labels == conversation.labels
        for before, after in zip(conversation.messages, copy.messages, strict=True):
            assert (before.role, before.weight, before.name) == (after.role, after.weight, after.name)
            if before.role != "user":
                assert after.content == before.content
            assert bool(after.content.strip()) == bool(before.content.strip())
            assert after.content.count("\n") <= before.content.count("\n")
            if not dropout:
                assert re.findall(r"\s+", after.content) == re.findall(r"\s+", before.content)


def test_the_expected_number_of_words_is_masked() -> None:
    words = augmented(LONG, mask=0.2).split(" ")
    assert len(words) == 10_000 and 1850 < words.count("_") < 2150  # 2000, give or take 4 standard deviations
    assert all(word in ("_", f"w{i}") for i, word in enumerate(words))
    assert augmented("a b\nc", mask=1, mask_text="[MASK]", typos=1) == "[MASK] [MASK]\n[MASK]"
    assert augmented("你好 ok", mask=1) == "__ _"


def test_the_expected_number_of_words_drops_out() -> None:
    words = augmented(LONG, dropout=0.3).split(" ")
    assert 6800 < len(words) < 7200
    assert [int(w[1:]) for w in words] == sorted({int(w[1:]) for w in words})
    assert augmented("just these", dropout=1) in ("just", "these")


def test_dropout_keeps_line_breaks_and_both_ends() -> None:
    seen = {augmented("  a b\nc d\n", seed=seed, dropout=0.4) for seed in range(300)}
    for text in ("  a b\nc d\n", "  b\nc d\n", "  a\nc d\n", "  a b\nd\n", "  a b\nc\n", "  a\nd\n"):
        assert text in seen
    assert all(text.startswith("  ") and text.endswith("\n") and not re.search(" $| \n", text) for text in seen)
    assert all("  " not in text.strip() for text in seen)


def test_swap_moves_each_word_by_one_place_at_most() -> None:
    assert augmented("a b c d e", swap=1) == "b a d c e"
    assert augmented("a  b\nc d", swap=1) == "b  a\nd c"
    words = augmented(LONG, swap=0.1).split(" ")
    moved = [abs(int(word[1:]) - i) for i, word in enumerate(words)]
    assert set(moved) == {0, 1} and sorted(words) == sorted(LONG.split(" "))
    assert 1650 < sum(moved) < 2000  # two words a swap, 0.1 / 1.1 of the places being swaps


def test_typos_are_of_the_four_kinds() -> None:
    ways: Counter[str] = Counter()
    for i in range(4000):
        typed = mistype("Gh", probability=1 if i % 2 else 0.3, rng=random.Random(i))
        ways[typed] += 1
    # G lies between F and H, under T and Y, above V and B.
    around_g = {key for key in ways if len(key) == 2 and key[1] == "h" and key[0].isupper() and key != "Gh"}
    assert around_g == {"Fh", "Hh", "Th", "Yh", "Vh", "Bh"}
    assert {"hG", "h", "G", "GGh", "Ghh"} <= set(ways)
    assert not {"", "hGh"} & set(ways)  # what was transposed is not typed again


def test_typos_are_as_many_as_asked_for() -> None:
    # Digits show where a letter stood: each word is one letter between two digits.
    words = ["1k2"] * 10_000
    typed = augmented(" ".join(words), typos=0.1).split(" ")
    assert 880 < sum(word != "1k2" for word in typed) < 1120
    assert all(word[0] == "1" and word[-1] == "2" for word in typed)
    assert augmented("12:30 !? 你好", typos=1) == "12:30 !? 你好"
    assert augmented("سلام", typos=1) != "سلام"  # no QWERTY keys, yet letters


def test_copies_are_named_and_stay_with_the_original() -> None:
    original = Conversation(chat("what is this now", "a test").messages, id="chats.jsonl:17")
    copies = build_augmentation({"copies": 3, "swap": 0.5}).copies_of(original, seed=0)
    assert [copy.id for copy in copies] == [f"chats.jsonl:17#{n}" for n in (1, 2, 3)]
    assert {copy.split_key for copy in copies} == {original.split_key}
    grouped = Conversation(original.messages, group="family")
    assert build_augmentation({"swap": 0.5}).copies_of(grouped, seed=0)[0].group == "family"


def test_copies_differ_and_come_out_the_same_again() -> None:
    conversation = chat("the quick brown fox jumps over the lazy dog", "indeed")
    augmentation = build_augmentation({"copies": 3, "mask": 0.3, "typos": 0.1})
    copies = augmentation.copies_of(conversation, seed=1)
    assert len({copy.messages for copy in copies}) == 3
    random.seed(99)
    augmentation.copies_of(chat("another one in between", "yes"), seed=1)
    assert augmentation.copies_of(conversation, seed=1) == copies
    assert build_augmentation({"copies": 1, "mask": 0.3, "typos": 0.1}).copies_of(conversation, seed=1) == copies[:1]
    assert augmentation.copies_of(conversation, seed=2)[0].messages != copies[0].messages


def test_the_same_in_another_process() -> None:
    code = (
        "from lightning_chatgpt.chat.conversation import Conversation as C, Message as M;"
        "from lightning_chatgpt.data.augmentation import build_augmentation as b;"
        "[copy] = b({'typos': 0.2, 'swap': 0.3}).copies_of(C((M('user', 'one two three four five'),)), seed=5);"
        "print(copy.messages[0].content)"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout.strip()
        for seed in ("1", "2")
    }
    conversation = Conversation((Message("user", "one two three four five"),))
    [here] = build_augmentation({"typos": 0.2, "swap": 0.3}).copies_of(conversation, seed=5)
    assert outputs == {here.messages[0].content}


def test_paraphrase() -> None:
    assert augmented("hello there", paraphrase=f"{__name__}.upper") == "HELLO THERE"
    assert augmented("hello there", paraphrase=f"{__name__}.translate") == "de: hello there"
    first, again, other = (augmented("hi", seed=seed, paraphrase=f"{__name__}.draw") for seed in (1, 1, 2))
    assert first == again != other and first.startswith("hi 0.")
    assert augmented("hi there", paraphrase=f"{__name__}.upper", swap=1) == "THERE HI"
    for name, message in (("silent", "silent returned nothing for 'hi'"), ("forgetful", "forgetful returned a NoneType for 'hi'")):
        with pytest.raises(DataError, match=message):
            augmented("hi", paraphrase=f"{__name__}.{name}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "data.augmentation: nothing would be augmented"),
        ({"copies": 2, "mask": 0}, "nothing would be augmented"),
        ({"mask": 1.5}, "data.augmentation.mask is a probability and must be from 0 to 1, not 1.5"),
        ({"typos": -0.1}, "data.augmentation.typos is a probability"),
        ({"mask": "a lot"}, "data.augmentation.mask takes a number, not 'a lot'"),
        ({"mask": float("nan")}, "data.augmentation.mask takes a number"),
        ({"copies": 0, "mask": 0.1}, "data.augmentation.copies must be at least 1, not 0"),
        ({"copies": 1.5, "mask": 0.1}, "copies takes a whole number"),
        ({"swaps": 0.1}, "data.augmentation.swaps is no setting; did you mean swap"),
        ({"mask": 0.1, "mask_text": " "}, "mask_text is blank"),
        ({"swap": 0.1, "mask_text": "?"}, "mask_text '[?]' is never used; set data.augmentation.mask"),
        ({"paraphrase": "no_such_package.f"}, "data.augmentation.paraphrase no_such_package.f: cannot be imported"),
        ({"paraphrase": "random.Random"}, "is a type, not a function"),
        ({"paraphrase": "shutil.copyfileobj.nothing"}, "cannot be imported"),
        ({"paraphrase": "re.sub"}, "re.sub needs 3 arguments"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_augmentation(options)
