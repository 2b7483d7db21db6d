"""What went wrong once in the chat room, each with its guard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lightning_chatgpt.chat.conversation import Conversation, Message
from lightning_chatgpt.chat.encoding import Encoder, Example
from lightning_chatgpt.chat.faults import Faults, SkipRecord
from lightning_chatgpt.chat.schemas import RecordParser
from lightning_chatgpt.chat.template import CHATML_JINJA, supervised_roles
from lightning_chatgpt.chat.tokenizer import set_template, train_tokenizer
from lightning_chatgpt.chat.validation import check_order
from lightning_chatgpt.errors import ConfigError, DataError
from tests.conftest import chat

SAID = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
TURN = "{% for m in messages %}{{ '<|turn|>' + m.role + '\\n' + m.content + '<|stop|>\\n' }}{% endfor %}"
PROMPT = "{% if add_generation_prompt %}{{ '<|turn|>assistant\\n' }}{% endif %}"


def parse(record: Any, *, on_fault: Any = "error", **settings: Any) -> Conversation:
    return RecordParser(faults=Faults(on_fault), **settings).parse(record, default_id="x")


def encode_one(conversation: Conversation, tokenizer: PreTrainedTokenizerFast, **settings: Any) -> Example:
    ((example,),) = [c.examples for c in Encoder(tokenizer, **{"max_length": 10**6, **settings}).encode([conversation])]
    return example


def with_template(jinja: str, folder: Path) -> PreTrainedTokenizerFast:
    (folder / "t.jinja").write_text(jinja, encoding="utf-8")
    return train_tokenizer([], vocab_size=300, template=str(folder / "t.jinja"))


# Records


def test_broken_json_in_a_messages_column_is_a_fault() -> None:
    """Guards against: schemas.openai: json.loads is not guarded; JSONDecodeError under every on_fault."""
    with pytest.raises(SkipRecord):
        parse({"messages": "[{oops"}, on_fault="skip")


@pytest.mark.parametrize("history", [[["q"]], [["q", "a", "x"]], "text", [None]])
def test_a_history_that_is_no_pairs_is_a_fault(history: Any) -> None:
    """Guards against: schemas.alpaca: zip(strict=True) over whatever stands in history."""
    with pytest.raises(SkipRecord):
        parse({"instruction": "q", "output": "a", "history": history}, on_fault="skip")


@pytest.mark.parametrize("line", ["messages", "conversation", "conversations"])
def test_a_line_may_be_a_word_that_is_a_key_elsewhere(line: str) -> None:
    """Guards against: schemas: `key in record` also finds a line of a list, and then indexes the list with it."""
    assert [m.content for m in parse([line, "a"]).messages] == [line, "a"]


def test_fields_obey_system_beside_messages() -> None:
    """Guards against: schemas._from_fields: system is read beside user and assistant only; beside messages it is silently lost."""
    assert parse({"turns": SAID, "rules": "S"}, fields={"messages": "turns", "system": "rules"}).messages[0] == Message("system", "S")


def test_fields_obey_weight_beside_user_and_assistant() -> None:
    """Guards against: schemas._from_fields: weight beside user and assistant is silently lost."""
    assert parse({"q": "q", "a": "a", "w": 0}, fields={"user": "q", "assistant": "a", "weight": "w"}).messages[1].weight == 0


def test_fields_keep_what_messages_say_in_the_usual_keys() -> None:
    """Guards against:
    schemas._from_fields: keys of a message other than role and content are dropped unless named, unknown ones unseen.
    """
    messages = parse({"turns": [{**SAID[0], "name": "Ann"}, {**SAID[1], "weight": 0}]}, fields={"messages": "turns"}).messages
    assert [(m.name, m.weight) for m in messages] == [("Ann", 1.0), ("", 0.0)]


def test_fields_keep_tool_calls() -> None:
    """Guards against: schemas._from_fields drops tool_calls, so that a call without content 'has no content'."""
    called = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    assert "f" in parse({"turns": [SAID[0], called]}, fields={"messages": "turns"}).messages[1].content


@pytest.mark.parametrize("rejected", [SAID, SAID[:1]])
def test_a_prompt_that_both_answers_repeat_is_read_once(rejected: list) -> None:
    """Guards against: schemas.preference: no differing pair gives n_shared 0, so that the prompt is doubled."""
    assert [m.content for m in parse({"prompt": "q", "chosen": SAID, "rejected": rejected}).messages] == ["q", "a"]


def test_labels_keep_numbers() -> None:
    """Guards against: schemas._labels: its docstring says numbers, but floats are dropped."""
    assert parse({"question": "q", "answer": "a", "score": 0.5}).labels == {"score": "0.5"}


def test_half_a_character_in_a_tool_call_is_a_fault() -> None:
    """Guards against: validation: tool calls are joined to the content after it was checked for half characters."""
    called = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"x": "\\ud83d"}'}}]}
    with pytest.raises(SkipRecord):
        parse({"messages": [SAID[0], called]}, on_fault="skip")


def test_half_a_character_in_a_name_is_refused(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    """Guards against: conversation.NAME: [^...] takes half a character; tokenizers then raise TypeError."""
    with pytest.raises(DataError):
        encode_one(Conversation((Message("user", "q", name="\ud83d"), Message("assistant", "a"))), byte_tokenizer)


def test_only_a_system_message_left_is_a_fault() -> None:
    """Guards against: validation.check_order: only_system is checked before the assistant's opening is left out, not after."""
    messages = [Message("system", "s"), Message("assistant", "Welcome")]
    try:
        left = check_order(messages, faults=Faults("fix"), needs_reply=False)
    except SkipRecord:
        return
    assert {m.role for m in left} != {"system"}


def test_the_assistant_first_is_seen_after_two_system_messages() -> None:
    """Guards against: validation.check_order takes one leading system message for granted; two of different names are not joined."""
    messages = [
        Message("system", "s", name="a"),
        Message("system", "t", name="b"),
        Message("assistant", "x"),
        Message("user", "q"),
        Message("assistant", "a"),
    ]
    assert [m.role for m in check_order(messages, faults=Faults("fix"))] == ["system", "system", "user", "assistant"]


# Truncation


def markers_only() -> Conversation:
    tools = [Message("tool", str(i)) for i in range(9)]
    return Conversation(
        (Message("user", "q"), Message("assistant", "a"), *tools, *chat("b", "q", "a").messages[1:], *chat("q2", "a2").messages),
        id="chat-7",
    )


def test_an_old_exchange_of_many_short_messages_is_dropped(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    """Guards against:
    truncation.fit shortens every exchange first, those to be dropped as well, and fails on the markers of an old one.
    """
    ids = encode_one(markers_only(), byte_tokenizer, max_length=64).input_ids
    assert byte_tokenizer.decode(ids).endswith("user\nq2<|im_end|>\n<|im_start|>assistant\na2<|im_end|>\n")


def test_no_room_names_the_conversation(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    """Guards against: encoding._windows: only 'error' names the conversation; 'too short' does not."""
    with pytest.raises(DataError) as error:
        encode_one(Conversation(chat("Hi", "Yo").messages, id="chat-7"), byte_tokenizer, max_length=12)
    assert str(error.value).startswith("chat-7: ")


@pytest.mark.parametrize("truncation", ["drop_oldest", "split"])
def test_a_tools_answer_stays_with_its_question(byte_tokenizer: PreTrainedTokenizerFast, truncation: Any) -> None:
    """Guards against: truncation._exchanges: a tool's answer begins an exchange, and is kept without the question and the call."""
    messages = (*chat("What is six by seven?", "<tool_call>").messages, Message("tool", "42"), Message("assistant", "42."))
    (encoded,) = Encoder(byte_tokenizer, max_length=75, truncation=truncation).encode([Conversation(messages)])
    assert all(not byte_tokenizer.decode(ids).startswith("<|im_start|>tool") for ids, _ in encoded.examples)


# Templates


@pytest.mark.parametrize(
    "broken",
    [
        "{{ 1 // 0 }}",
        "{% for i in range(1000000) %}{% endfor %}",
        "{{ '{2}'.format(1) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_that_cannot_be_rendered_is_refused(broken: str, tmp_path: Path) -> None:
    """Guards against:
    jinja._render: ZeroDivisionError, OverflowError (the sandbox's own limit), IndexError and RecursionError come through.
    """
    with pytest.raises(ConfigError, match="^data.template: "):
        with_template(broken + TURN + PROMPT, tmp_path)


def test_a_template_that_leaves_out_later_messages_is_refused_as_a_setting(tmp_path: Path) -> None:
    """Guards against:
    template_check.check_template promises ConfigError, but what goes wrong from the third message on is a bare DataError.
    """
    with pytest.raises(ConfigError, match="^data.template: "):
        with_template(TURN.replace("in messages", "in messages[:2]") + PROMPT, tmp_path)


def test_a_name_never_becomes_a_control_token(tmp_path: Path) -> None:
    """Guards against: jinja: a name may spell a control token of another style, and becomes one where the template writes names."""
    tokenizer = with_template(TURN.replace("m.role", "m.role + (' ' + m.name if m.name else '')") + PROMPT, tmp_path)
    tokenizer.add_special_tokens({"extra_special_tokens": ["[INST]"]}, replace_extra_special_tokens=False)
    conversation = Conversation((Message("user", "q", name="[INST]"), Message("assistant", "a")))
    with pytest.raises(DataError, match="the name '\\[INST\\]' spells a control token"):
        encode_one(conversation, tokenizer)


@pytest.mark.parametrize("after", ["'<|stop|>\\n'", "'<|stop|>' + eos_token"])
def test_generation_may_go_on_after_the_first_control_token(after: str, tmp_path: Path) -> None:
    """Guards against:
    jinja._write: what generation marks after the first control token counts to the next message, and check_template then says that
    generation stands around what others say; most training templates of TRL are refused, and LFM2.5's own.
    """
    jinja = (
        "{% for m in messages %}{{ '<|turn|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content + AFTER }}{% endgeneration %}{% else %}{{ m.content + AFTER }}{% endif %}{% endfor %}"
    ).replace("AFTER", after)
    tokenizer = with_template(jinja + PROMPT, tmp_path)
    assert "Hi<|stop|>" in tokenizer.decode([i for i, w in zip(*encode_one(chat("Hello", "Hi"), tokenizer), strict=True) if w])


def test_a_template_that_refuses_forged_messages_is_safe(tmp_path: Path) -> None:
    """Guards against:
    template_check._check_unforgeable: a template that refuses the forged message is itself refused (Qwen3, GLM-4, gpt-oss).
    """
    said = "('<think></think>' + m.content.split('</think>')[-1] if m.role == 'assistant' else m.content)"
    tokenizer = with_template(TURN.replace("m.content", said) + PROMPT, tmp_path)
    assert tokenizer.decode(encode_one(chat("Hello", "Hi"), tokenizer).input_ids) == (
        "<|turn|>user\nHello<|stop|>\n<|turn|>assistant\n<think></think>Hi<|stop|>\n"
    )


def own_chatml(byte_tokenizer: PreTrainedTokenizerFast, *, has_tokens: bool) -> PreTrainedTokenizerFast:
    """A GPT-2 whose tokenizer carries our ChatML, as ours do, without its tokens being marked as special."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast as Fast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([], vocab_size=257, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer = Fast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>")
    if has_tokens:
        tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = CHATML_JINJA
    return set_template(tokenizer, "tokenizer")


def test_chatml_without_its_tokens_gets_them_or_is_refused(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    """Guards against: tokenizer.set_template: ChatML that is carried already is not asked for its tokens, so that ids are None."""
    try:
        tokenizer = own_chatml(byte_tokenizer, has_tokens=False)
    except ConfigError:
        return
    assert None not in encode_one(chat("q", "a"), tokenizer).input_ids


def test_chatml_tokens_that_are_not_special_cannot_be_typed(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    """Guards against: tokenizer.set_template: tokens of a carried ChatML that are not marked as special can be typed by users."""
    tokenizer = own_chatml(byte_tokenizer, has_tokens=True)
    ids = encode_one(chat("<|im_end|>", "a"), tokenizer).input_ids
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2


@pytest.mark.parametrize("role", ["last", "all"])
def test_a_remedy_is_another_word(role: str) -> None:
    """Guards against: template.supervised_roles: 'last' cannot be used; did you mean last?."""
    with pytest.raises(ConfigError) as error:
        supervised_roles([role])
    assert f"did you mean {role}?" not in str(error.value)


def test_a_template_that_hides_who_speaks_is_refused(tmp_path: Path) -> None:
    """Guards against conversations that differ in their roles alone being written the same."""
    with pytest.raises(ConfigError, match="is written the same; write each message's role"):
        with_template("{% for m in messages %}{{ m.content + '<|stop|>' }}{% endfor %}", tmp_path)
