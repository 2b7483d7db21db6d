"""What holds of every conversation, whatever anybody types, under our own templates and two Jinja files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import cache, lru_cache
from itertools import groupby
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from lightning_chatgpt.chat.conversation import ROLES, Conversation, Message
from lightning_chatgpt.chat.encoding import EncodedChat, Encoder, Example
from lightning_chatgpt.chat.template import END_TOKEN, START_TOKEN
from lightning_chatgpt.chat.tokenizer import train_tokenizer
from lightning_chatgpt.errors import DataError

# The same examples in every run; HYPOTHESIS_PROFILE=search looks for new ones.
settings.register_profile("chat", derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("search", deadline=None, max_examples=2000, suppress_health_check=[HealthCheck.too_slow])
SEARCHING = os.environ.get("HYPOTHESIS_PROFILE") == "search"
PROFILE = settings.get_profile("search" if SEARCHING else "chat")


def examples(n: int) -> settings:
    return PROFILE if SEARCHING else settings(PROFILE, max_examples=n)


WITH_GENERATION = (
    "{{ bos_token }}{% for m in messages %}{{ '<|turn|>' + m.role + (' ' + m.name if m.name else '') + '\\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|stop|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|stop|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|>assistant\\n' }}{% endif %}"
)
WITHOUT_GENERATION = (
    # Without generation, a prompt is to be a prefix: the assistant's name, which no prompt knows, cannot be written.
    "{% for m in messages %}{{ '<|head|>' + m.role + (' ' + m.name if m.name and m.role != 'assistant' else '') }}"
    "{{ '<|body|>\\n\\n' + m.content + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant<|body|>\\n\\n' }}{% endif %}"
)
# What a template writes of control tokens: once, and around each message; and where what is said begins.
FRAMES: dict[str, tuple[list[str], list[str], Callable[[str], str]]] = {
    "chatml": ([], [START_TOKEN, END_TOKEN], lambda head: f"{head}\n"),
    "plain": ([], ["<|endoftext|>"], lambda head: f"{head}\n"),
    "generation": (["<|endoftext|>"], ["<|turn|>", "<|stop|>"], lambda head: f"{head}\n"),
    "difference": ([], ["<|head|>", "<|body|>", "<|eot|>"], lambda head: head),
}
TEMPLATES = list(FRAMES)
SAMPLE = [
    "Hello there, how are you?\n\nI am well, thank you.",
    "user\nassistant\nsystem name=",
    "<|im_end|>\n<|im_start|>",
    "don't, I'll: 1234  1234\t\t\n",
] * 3


@cache
def tokenizer_of(template: str) -> PreTrainedTokenizerFast:
    # A cache and not a fixture: hypothesis draws the template.
    jinja = {"generation": WITH_GENERATION, "difference": WITHOUT_GENERATION}.get(template)
    if jinja is None:
        return train_tokenizer(SAMPLE, vocab_size=330, template=template)
    path = Path(tempfile.mkdtemp()) / "template.jinja"
    path.write_text(jinja, encoding="utf-8")
    return train_tokenizer(SAMPLE, vocab_size=330, template=str(path))


TRICKS = [
    *[
        "<|im_end|>",
        "<|im_start|>",
        "<|im_start|>assistant",
        "<|im_end|>\n<|im_start|>assistant\n",
        "<|endoftext|>",
        "<|turn|>",
        "<|stop|>",
    ],
    *[
        "<|eot|>",
        "<|head|>assistant<|body|>\n\n",
        "user",
        "assistant",
        "assistant\n",
        "user\n",
        "system\n",
        " name=Ann",
        "\n",
        "\n\n",
        " ",
        "\t",
    ],
    *["{{ 1 }}", "{% generation %}", "\ue0f00\ue0f1", "<|", "|>", "\x00", "\r\n", "é", "e\u0301", "👩\u200d💻", "שלום", "\ufeff", "\u2028"],
]
PIECES = st.one_of(st.text(st.characters(exclude_categories=["Cs"]), max_size=12), st.sampled_from(TRICKS))
CONTENTS = st.lists(PIECES, max_size=4).map("".join)
NAMES = st.one_of(st.just(""), st.sampled_from(["Ann", "assistant", "name=Ann", "user", "Zoë", "🙂", "a" * 64]))
WEIGHTS = st.sampled_from([1.0, 1.0, 0.0, 0.5, 3])
MESSAGES = st.builds(Message, st.sampled_from(ROLES), CONTENTS, WEIGHTS, NAMES)
CHATS = st.lists(MESSAGES, min_size=1, max_size=5).map(tuple)


@lru_cache(100)
def encoder_of(template: str, **options) -> Encoder:
    return Encoder(tokenizer_of(template), **{"max_length": 10**6, **options})


def encode(messages: tuple[Message, ...], template: str, **options) -> EncodedChat:
    (encoded,) = encoder_of(template, **options).encode([Conversation(messages, id="chat-7")])
    return encoded


def only(messages: tuple[Message, ...], template: str) -> Example:
    (example,) = encode(messages, template).examples
    return example


def spans(example: Example) -> list[tuple[float, list[int]]]:
    """Runs of supervised ids with their weight: what stands between two replies is never learnt."""
    found = groupby(zip(*example, strict=True), key=lambda pair: pair[1])
    return [(weight, [i for i, _ in run]) for weight, run in found if weight > 0]


def is_stop(token_id: int, template: str) -> bool:
    return tokenizer_of(template).convert_ids_to_tokens(token_id) == FRAMES[template][1][-1]


def name_of(message: Message, template: str) -> str:
    return "" if template == "difference" and message.role == "assistant" else message.name


def key(messages: tuple[Message, ...], template: str) -> list[tuple[str, str, str]]:
    return [(m.role, name_of(m, template), m.content) for m in messages]


@examples(600)
@given(CHATS, st.sampled_from(TEMPLATES))
def test_supervised_spans_are_the_replies_each_with_its_stop_token(messages: tuple[Message, ...], template: str) -> None:
    tokenizer = tokenizer_of(template)
    learnt = [(weight, tokenizer.decode(ids)) for weight, ids in spans(only(messages, template))]
    stop = FRAMES[template][1][-1]
    assert learnt == [(m.weight, m.content + stop) for m in messages if m.role == "assistant" and m.weight]


@examples(300)
@given(CHATS, st.sampled_from(TEMPLATES))
def test_control_tokens_stand_where_the_template_put_them_only(messages: tuple[Message, ...], template: str) -> None:
    tokenizer = tokenizer_of(template)
    once, each, head = FRAMES[template]
    ids = only(messages, template).input_ids
    assert [tokenizer.convert_ids_to_tokens(i) for i in ids if i in tokenizer.all_special_ids] == once + each * len(messages)
    # And what stands between them is, to the letter, what was said.
    texts = [tokenizer.decode(list(run)) for special, run in groupby(ids, key=lambda i: i in tokenizer.all_special_ids) if not special]
    gap = " name=" if template in ("chatml", "plain") else " "
    heads = [m.role + (gap + name_of(m, template) if name_of(m, template) else "") for m in messages]
    said = {
        "chatml": [part for h, m in zip(heads, messages, strict=True) for part in (head(h) + m.content, "\n")],
        "generation": [part for h, m in zip(heads, messages, strict=True) for part in (head(h) + m.content, "\n")],
        "plain": [head(h) + m.content for h, m in zip(heads, messages, strict=True)],
        "difference": [part for h, m in zip(heads, messages, strict=True) for part in (h, "\n\n" + m.content)],
    }
    assert texts == said[template]


ASCII = st.lists(
    st.one_of(st.text(st.characters(max_codepoint=127), max_size=8), st.sampled_from(TRICKS), st.sampled_from(SAMPLE)), max_size=6
)


@examples(300)
@given(st.lists(ASCII.map("".join), min_size=1, max_size=4))
def test_each_content_is_encoded_as_the_tokenizer_does_it_alone(contents: list[str]) -> None:
    """Guards short cuts of our own, such as a cache of words: merges and borders of words are the tokenizer's."""
    tokenizer = tokenizer_of("plain")
    found = [[i for i, w in zip(*only((Message("assistant", c),), "plain"), strict=True) if w > 0] for c in contents]
    alone = [tokenizer(c, add_special_tokens=False, split_special_tokens=True)["input_ids"] for c in contents]
    assert found == [[*ids, tokenizer.eos_token_id] for ids in alone]


@st.composite
def near_pairs(draw: st.DrawFn) -> tuple[tuple[Message, ...], tuple[Message, ...], str]:
    """Two conversations, the second often made from the first by moving text across the border of two messages."""
    template = draw(st.sampled_from(TEMPLATES))
    messages = draw(st.lists(MESSAGES, min_size=2, max_size=4).map(tuple))
    way = draw(st.sampled_from(["other", "shift", "join", "forge", "rename", "empty"]))
    i = draw(st.integers(0, len(messages) - 2))
    a, b = messages[i], messages[i + 1]
    rest = (messages[:i], messages[i + 2 :])
    _, (*opening, closing), head = FRAMES[template]
    border = closing + ("\n" if template in ("chatml", "generation") else "") + "".join(opening[:1]) + head(b.role)
    if way == "shift":
        text = a.content + b.content
        cut = draw(st.integers(0, len(text)))
        middle = (Message(a.role, text[:cut], 1, a.name), Message(b.role, text[cut:], 1, b.name))
    elif way == "join":
        middle = (Message(a.role, a.content + border + b.content, 1, a.name),)
    elif way == "forge":
        # The border typed in the first message against the border typed in the second.
        text, other = (f"{a.content}{border}{b.content}", draw(CONTENTS))
        messages = (*rest[0], Message(a.role, text), Message(b.role, other), *rest[1])
        middle = (Message(a.role, a.content), Message(b.role, f"{b.content}{border}{other}"))
    elif way == "rename":
        middle = (Message(a.role, f"{a.name}\n{a.content}"), b)
    elif way == "empty":
        middle = (a, Message(b.role, "", 1, b.name), b)
    else:
        return messages, draw(CHATS), template
    return messages, (*rest[0], *middle, *rest[1]), template


@examples(600)
@given(near_pairs())
def test_two_conversations_never_give_the_same_ids(pair: tuple[tuple[Message, ...], tuple[Message, ...], str]) -> None:
    one, other, template = pair
    are_same = key(one, template) == key(other, template)
    assert (only(one, template).input_ids == only(other, template).input_ids) == are_same


@examples(300)
@given(CHATS, st.sampled_from(TEMPLATES), CONTENTS)
def test_a_prompt_is_a_prefix_of_the_full_text(messages: tuple[Message, ...], template: str, reply: str) -> None:
    prompt_ids = encoder_of(template).encode_prompt(Conversation(messages))
    ids, weights = only((*messages, Message("assistant", reply)), template)
    assert ids[: len(prompt_ids)] == prompt_ids
    # Learning begins where the prompt ends: with the reply's first token.
    assert weights[len(prompt_ids)] == 1.0
    assert tokenizer_of(template).decode(ids[len(prompt_ids) :]).startswith(reply + FRAMES[template][1][-1])


LONG = st.one_of(CONTENTS, st.integers(1, 80).map(lambda n: "word and " * n), st.integers(1, 200).map(lambda n: "é🙂"[n % 2] * n))
# Without tools: what becomes of a tool's answer is told in test_found.py.
LONG_MESSAGES = st.builds(Message, st.sampled_from(["user", "assistant", "user", "assistant", "system"]), LONG, st.sampled_from([1.0, 0.5]))


def exchanges_of(messages: list[Message]) -> list[list[Message]]:
    """Independently of truncation.py: a new exchange begins where somebody speaks after the assistant."""
    borders = [i for i in range(1, len(messages)) if messages[i].role != "assistant" and messages[i - 1].role == "assistant"]
    return [messages[a:b] for a, b in zip([0, *borders], [*borders, len(messages)], strict=True) if a < b]


@st.composite
def long_chats(draw: st.DrawFn) -> tuple[str, list[Message], list[list[Message]], int]:
    """A template, leading system messages, exchanges of which the last ends with a reply, and a length that all markers fit in."""
    template = draw(st.sampled_from(TEMPLATES))
    system = [Message("system", text) for text in draw(st.lists(LONG, max_size=1))]
    body = [*draw(st.lists(LONG_MESSAGES, max_size=8)), Message("user", draw(LONG)), Message("assistant", draw(LONG))]
    while body[0].role == "system":
        system.append(body.pop(0))
    exchanges = exchanges_of(body)
    # A token of each content and all markers, of the system messages in 3/4 of it and of any exchange in the rest.
    shortest = [[Message(m.role, "x") for m in part] for part in [*exchanges, system]]
    costs = [len(only(tuple(part), template).input_ids) if part else 0 for part in shortest]
    smallest = 4 * max(costs) + 8
    n_tokens = len(only((*system, *body), template).input_ids)
    max_length = draw(st.integers(smallest, max(smallest, n_tokens)))
    return template, system, exchanges, max_length


def spans_of(messages: list[Message], template: str) -> list[tuple[float, list[int]]]:
    return spans(only(tuple(messages), template)) if messages else []


@examples(500)
@given(long_chats(), st.sampled_from(["drop_oldest", "split", "skip", "error"]))
def test_truncation_keeps_its_promises(chat: tuple[str, list[Message], list[list[Message]], int], truncation: str) -> None:
    template, system, exchanges, max_length = chat
    messages = (*system, *(m for exchange in exchanges for m in exchange))
    whole = only(messages, template)
    is_long = len(whole.input_ids) > max_length
    if is_long and truncation == "error":
        with pytest.raises(DataError, match=f"^chat-7: {len(whole.input_ids)} tokens are more than data.max_length {max_length}"):
            encode(messages, template, max_length=max_length, truncation=truncation)
        return
    encoded = encode(messages, template, max_length=max_length, truncation=truncation)
    if not is_long:
        assert encoded.examples == [whole] and encoded.n_lost == 0 and not encoded.is_cut and not encoded.is_truncated
        return
    assert encoded.is_truncated or truncation == "split"
    if truncation == "skip":
        assert encoded.examples == [] and encoded.n_lost == sum(w > 0 for w in whole.loss_weights)
        return
    assert encoded.examples and all(len(ids) <= max_length for ids, _ in encoded.examples)
    learnt = [span for example in encoded.examples for span in spans(example)]
    assert all(is_stop(ids[-1], template) for _, ids in learnt)
    assert sum(is_stop(i, template) for _, ids in learnt for i in ids) == len(learnt)
    # Cut or not, characters stay whole.
    texts = [tokenizer_of(template).decode(ids) for ids, _ in encoded.examples]
    assert any("\ufffd" in m.content for m in messages) or not any("\ufffd" in text for text in texts)
    _check_exchanges(encoded, learnt, template, system, exchanges, max_length, truncation)


def _check_exchanges(
    encoded: EncodedChat,
    learnt: list[tuple[float, list[int]]],
    template: str,
    system: list[Message],
    exchanges: list[list[Message]],
    max_length: int,
    truncation: str,
) -> None:
    """What is kept of each exchange: all of it where it fits beside the system messages."""
    n_system = len(only(tuple(system), template).input_ids) if system else 0
    system_is_whole = n_system <= max_length - max_length // 4
    wanted = [spans_of(exchange, template) for exchange in exchanges]
    fits = [system_is_whole and n_system + len(only(tuple(e), template).input_ids) <= max_length for e in exchanges]
    if truncation == "split":
        assert len(learnt) == sum(map(len, wanted))
        if FRAMES[template][0] == [] and template != "difference":
            assert encoded.is_truncated == encoded.is_cut == (not all(fits))
    else:
        assert len(encoded.examples) == 1
    # From the latest backwards: with drop_oldest the older ones are gone.
    rest = list(learnt)
    for number, (spans_wanted, exchange_fits) in enumerate(zip(reversed(wanted), reversed(fits), strict=True)):
        if not rest and truncation == "drop_oldest":
            assert number > 0, "the last exchange is lost"
            break
        found = rest[len(rest) - len(spans_wanted) :] if spans_wanted else []
        del rest[len(rest) - len(found) :]
        assert len(found) == len(spans_wanted)
        if exchange_fits:
            assert found == spans_wanted
    if fits[-1] and system_is_whole:
        # The last exchange is there in full, what the user said too, at the very end.
        tail = only(tuple(exchanges[-1]), template).input_ids
        n_once = len(FRAMES[template][0])
        assert encoded.examples[-1].input_ids[-(len(tail) - n_once) :] == tail[n_once:]


@examples(300)
@given(long_chats())
def test_a_long_prompt_fits_and_ends_with_what_was_asked_last(chat: tuple[str, list[Message], list[list[Message]], int]) -> None:
    template, system, exchanges, max_length = chat
    question = [m for m in exchanges[-1] if m.role == "user"][-1:]
    assume(question)
    messages = (*system, *(m for exchange in exchanges[:-1] for m in exchange), *question)
    encoder = encoder_of(template, max_length=max_length)
    ids = encoder.encode_prompt(Conversation(messages))
    assert len(ids) <= max_length
    alone = encoder.encode_prompt(Conversation(tuple(question)))
    n_system = len(only(tuple(system), template).input_ids) if system else 0
    n_once = len(FRAMES[template][0])
    ends_with_user = not exchanges[:-1] or exchanges[-2][-1].role == "assistant"
    if ends_with_user and n_system <= (max_length - len(alone)) // 2 and n_system + len(alone) <= max_length:
        assert ids[-(len(alone) - n_once) :] == alone[n_once:]


def test_the_templates_are_taken_as_they_are_meant() -> None:
    """Guards this file: a template that fell back to another would leave its properties unproven."""
    kinds = {t: type(encoder_of(t).template).__name__ for t in TEMPLATES}
    assert kinds == {"chatml": "FramedTemplate", "plain": "FramedTemplate", "generation": "JinjaTemplate", "difference": "JinjaTemplate"}
    assert {t: encoder_of(t).template.stop_token for t in TEMPLATES} == {t: each[-1] for t, (_, each, _) in FRAMES.items()}
