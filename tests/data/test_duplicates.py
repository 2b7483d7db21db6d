"""Near duplicates against exact Jaccard similarities, leaks against sets of tuples."""

from __future__ import annotations

import re
import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lightning_chatgpt.chat.conversation import Conversation
from lightning_chatgpt.data import duplicates
from lightning_chatgpt.data.duplicates import LeakCheck, NearDuplicates

# Few words, so that n-grams repeat; some spelt in two ways, one of two CJK characters.
WORDS = ["a", "b", "B", "Straße", "STRASSE", "x_1", "42", "你好", "ね"]
SENTENCE = st.lists(st.sampled_from(WORDS), max_size=40).map(" ".join)
CONVERSATIONS = st.lists(st.lists(SENTENCE, min_size=1, max_size=3), max_size=6)
RUN = {"deadline": None, "derandomize": True, "database": None}


def naive_words(contents: list[str]) -> list[str]:
    text = " ".join(contents).casefold()
    return re.findall(r"[你好ね]|[^\W你好ね]+", text)


def naive_shares(held_out: list[list[str]], training: list[list[str]]) -> list[float]:
    shares = []
    for contents in held_out:
        words = naive_words(contents)
        n = 13 if len(words) >= 50 else 8
        if len(words) < 8:
            shares.append(float(bool(words) and words in [naive_words(other) for other in training]))
            continue
        seen = {tuple(w[i : i + n]) for w in map(naive_words, training) for i in range(len(w) - n + 1)}
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        shares.append(sum(gram in seen for gram in grams) / len(grams))
    return shares


def measured(held_out: list[list[str]], training: list[list[str]]) -> list[float]:
    check = LeakCheck(held_out)
    for contents in training:
        check.see(contents)
    return list(check.shares())


@given(held_out=CONVERSATIONS, training=CONVERSATIONS, own=st.booleans())
@settings(max_examples=150, **RUN)
@example(held_out=[["a b"], [""], ["a " * 7], ["a " * 8], ["a " * 49], ["a " * 50]], training=[["A", "b"], ["a " * 12]], own=False)
def test_leaks_as_sets_of_tuples_tell(held_out: list[list[str]], training: list[list[str]], own: bool) -> None:
    if own:  # parts of what is held out, so that something leaks
        training = [*training, *(contents[:2] for contents in held_out[::2])]
    assert measured(held_out, training) == pytest.approx(naive_shares(held_out, training))


def test_leaks_within_real_chats(chats: list[Conversation], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "_BUFFER_CHARS", 2000)  # many buffers
    contents = [[m.content for m in chat.messages] for chat in chats]
    held_out, training = contents[::5] + contents[1::50], [c for i, c in enumerate(contents) if i % 5]
    shares = measured(held_out, training)
    assert shares == pytest.approx(naive_shares(held_out, training))
    assert min(shares[len(contents[::5]) :]) == 1 and np.mean(shares) < 0.5


def test_grams_run_over_messages_but_not_over_conversations() -> None:
    words = [f"w{i}" for i in range(20)]
    held_out = [[" ".join(words[:10]), " ".join(words[10:])]]
    assert measured(held_out, [[" ".join(words[:5]), " ".join(words[5:])]]) == [1]
    assert measured(held_out, [[" ".join(words[:5])], [" ".join(words[5:])]]) == [pytest.approx((13 - 4 - 1) / 13)]


def test_a_short_one_leaks_only_as_a_whole() -> None:
    held_out = [["How are you?", "Fine."]]
    assert measured(held_out, [["how ARE you", "fine!"]]) == [1]
    assert measured(held_out, [["How are you?", "Fine, thanks."]]) == [0]
    assert measured(held_out, [["Fine.", "How are you?"]]) == [0]


def test_shares_may_be_asked_for_at_any_time() -> None:
    check = LeakCheck([["one two three"], ["four five"]])
    assert list(check.shares()) == [0, 0]
    check.see(["four five"])
    assert list(check.shares()) == [0, 1]
    check.see(["one two", "three"])
    assert list(check.shares()) == [1, 1]
    assert list(LeakCheck([]).shares()) == []


def test_a_million_words_in_bounded_time_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    vocabulary = np.array([f"word{i}" for i in range(20_000)])
    training = [[" ".join(vocabulary[row])] for row in rng.zipf(1.3, (10_000, 100)) % 20_000]
    check = LeakCheck(training[:200])
    started = time.perf_counter()
    for contents in training:
        check.see(contents)
    assert check.shares().min() == 1
    assert time.perf_counter() - started < 3  # 0.4 s on a machine with two cores
    # However many words there are, no more of them are remembered than this and a buffer's.
    monkeypatch.setattr(duplicates, "_WORDS_KEPT", 1000)
    monkeypatch.setattr(duplicates, "_BUFFER_CHARS", 5000)
    check = LeakCheck(training[:1])
    for i in range(2000):
        check.see([f"n{i}x{j}" for j in range(20)])
        assert len(check._hashes) <= 1000 + 5000 // 4 and len(check._buffer) <= 5000 // 80 + 1


def jaccard(first: str, second: str) -> float:
    """Exact, over 5 words in a row; both texts have at least that many."""
    sets = []
    for text in (first, second):
        words = re.findall(r"\w+", text.lower())
        sets.append({tuple(words[i : i + 5]) for i in range(len(words) - 4)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_near_duplicates_as_exact_similarity_tells(chats: list[Conversation]) -> None:
    contents = ["\n".join(m.content for m in chat.messages) for chat in chats]
    texts = [text for text in contents if len(re.findall(r"\w+", text)) >= 24][:300]
    altered = [re.sub(r"\w+\W*$", "something", text) for text in texts[::2]]  # the last word is another
    halves = [" ".join(text.split()[: len(text.split()) // 2]) for text in texts[1::2]]
    kept: dict[int, str] = {}
    finder = NearDuplicates(0.8, 128)
    n_near = n_far = 0
    for key, text in enumerate([*texts, *altered, *halves]):
        best = max((jaccard(text, other) for other in kept.values()), default=0.0)
        found = finder.first_like(key, text)
        if found is None:
            kept[key] = text
            # 128 permutations estimate 0.8 to within 0.035, a standard error.
            assert best < 0.92, text
            n_far += 1
        else:
            assert jaccard(text, kept[found]) > 0.68, text
            n_near += 1
    assert n_near >= 80 and n_far >= 200


@pytest.mark.parametrize(
    ("first", "second", "near"),
    [
        ("Hello there, how are you today?", "hello THERE how are you today", True),
        ("Hello there, how are you today?", "Goodbye then, where were we yesterday?", False),
        ("Thank you so much!", "thank you so much!", True),  # four words: by characters
        ("Thank you so much!", "Thank him very little!", False),
        ("ok", "OK", True),
        ("ok", "no", False),
        ("今天天气很好我们去公园吧", "今天天气很好我们去公园吧!", True),
        ("今天天气很好我们去公园吧", "明天我要去北京看我的朋友", False),
        ("", "", True),
    ],
)
def test_near_duplicates(first: str, second: str, near: bool) -> None:
    finder = NearDuplicates(0.8, 128)
    assert finder.first_like(7, first) is None
    assert finder.first_like(8, second) == (7 if near else None)


def test_the_first_of_several_is_named_and_a_duplicate_is_not_remembered() -> None:
    words = [f"w{i}" for i in range(60)]
    chain = [" ".join(words[i : i + 40]) for i in range(0, 20, 3)]
    finder = NearDuplicates(0.8, 256)
    found = [finder.first_like(10 + i, text) for i, text in enumerate(chain)]
    # 36 shingles each; 3 words further, 33 of 39 are shared (0.85), 6 words further 30 of 42 (0.71).
    assert found == [None, 10, None, 12, None, 14, None]
    assert finder.first_like(99, chain[0]) == 10
    again = NearDuplicates(0.8, 256)
    assert [again.first_like(10 + i, text) for i, text in enumerate(chain)] == found
