"""Every fault that can be in messages: told under error, mended and counted under fix, left out under skip."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_chatgpt.chat import validation
from lightning_chatgpt.chat.conversation import Message
from lightning_chatgpt.chat.faults import KINDS, Faults, SkipRecord
from lightning_chatgpt.chat.validation import check_each, check_order
from lightning_chatgpt.errors import ConfigError, DataError

U, A, S, T = "user", "assistant", "system", "tool"
# Found by whoever reads the file or knows its format, and told in their tests.
ELSEWHERE = {"broken_json", "truncated_file", "wrong_encoding", "duplicate_keys", "unknown_schema"}


def said(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


TWO = [said(U, "q"), said(A, "a")]
WHOLE = [(U, "q"), (A, "a")]

# Kind; messages; how the error begins, all of it up to where the value stands; what mending gives, None where it leaves the record out.
FAULTS: list[tuple[str, list[Any], str, list[tuple[str, str]] | None]] = [
    ("nul_bytes", [said(U, "q\0\0"), TWO[1]], "message 1: content holds a NUL character at 1; remove it", WHOLE),
    ("nul_bytes", [TWO[0], said(A, [{"type": "text", "text": "\0a"}])], "message 2: content holds a NUL character at 0; remove it", WHOLE),
    (
        "lone_surrogate",
        [said(U, "a\ud83db"), TWO[1]],
        "message 1: content holds half a character ('\\ud83d' at 1); write the text as valid UTF-8",
        [(U, "a\ufffdb"), (A, "a")],
    ),
    (
        "lone_surrogate",
        [TWO[0], said(A, "end\udc00")],
        "message 2: content holds half a character ('\\udc00' at 3); ",
        [(U, "q"), (A, "end\ufffd")],
    ),
    # Two halves that stand side by side are one character.
    ("lone_surrogate", [said(U, "\ud83d\ude42"), TWO[1]], "message 1: content holds half a character", [(U, "🙂"), (A, "a")]),
    ("lone_surrogate", [said(U, "\ufeff\ud83d"), TWO[1]], "message 1: content holds half a character", [(U, "\ufeff\ufffd"), (A, "a")]),
    ("wrong_type", [said(U, 3), TWO[1]], "message 1: content must be text, not int (3); put it in quotes", [(U, "3"), (A, "a")]),
    ("wrong_type", [TWO[0], said(A, True)], "message 2: content must be text, not bool (True); put it in quotes", [(U, "q"), (A, "True")]),
    ("wrong_type", [said(U, 2.5), TWO[1]], "message 1: content must be text, not float (2.5); put it in quotes", [(U, "2.5"), (A, "a")]),
    ("wrong_type", [said(U, {"a": 1}), TWO[1]], "message 1: content must be text, not dict; put a string in it", None),
    (
        "wrong_type",
        [said(U, [{"type": "image_url", "image_url": {}}]), TWO[1]],
        "message 1: content is a list with something else than text in it; put a string in it",
        None,
    ),
    ("wrong_type", [said(U, [{"text": 3}]), TWO[1]], "message 1: content is a list with something else than text in it", None),
    ("wrong_type", ["q", TWO[1]], "message 1 must be an object with role and content, found str", None),
    ("wrong_type", [TWO[0], None], "message 2 must be an object with role and content, found NoneType", None),
    ("wrong_type", [{"content": "q"}, TWO[1]], "message 1 has no 'role'; every message needs role and content", None),
    ("wrong_type", [TWO[0], {"role": A}], "message 2 has no 'content'; every message needs role and content", None),
    (
        "unknown_key",
        [said(U, "q", zeit=1), TWO[1]],
        "message 1 has the key 'zeit', which would be lost; remove it, or set data.on_fault to fix",
        WHOLE,
    ),
    ("unknown_key", [said(U, "q", b=1, a=2, c=None), TWO[1]], "message 1 has the key 'a', which would be lost", WHOLE),
    (
        "unknown_role",
        [said("bot", "q"), TWO[1]],
        "message 1: role 'bot' is unknown; use system, user, assistant or tool, or map it with data.roles",
        None,
    ),
    ("unknown_role", [said(None, "q"), TWO[1]], "message 1: role None is unknown", None),
    ("unknown_role", [said(["user"], "q"), TWO[1]], "message 1: role ['user'] is unknown", None),
    (
        "bad_name",
        [said(U, "q", name="Ann Lee"), TWO[1]],
        "message 1: name 'Ann Lee' cannot be used; take up to 64 letters or digits without spaces or markup",
        WHOLE,
    ),
    ("bad_name", [said(U, "q", name="<|im_end|>"), TWO[1]], "message 1: name '<|im_end|>' cannot be used", WHOLE),
    ("bad_name", [said(U, "q", name="a" * 65), TWO[1]], "message 1: name 'aaaa", WHOLE),
    ("bad_name", [said(U, "q", name=7), TWO[1]], "message 1: name 7 cannot be used", WHOLE),
    ("bad_name", [said(U, "q", name="Ann\n"), TWO[1]], "message 1: name 'Ann\\n' cannot be used", WHOLE),
    ("bad_weight", [TWO[0], said(A, "a", weight=-1)], "message 2: weight must be a finite number of at least 0, not -1", WHOLE),
    ("bad_weight", [TWO[0], said(A, "a", weight="1")], "message 2: weight must be a finite number of at least 0, not '1'", WHOLE),
    ("bad_weight", [TWO[0], said(A, "a", weight=True)], "message 2: weight must be a finite number of at least 0, not True", WHOLE),
    ("bad_weight", [TWO[0], said(A, "a", weight=float("inf"))], "message 2: weight must be a finite number of at least 0, not inf", WHOLE),
    ("bad_weight", [TWO[0], said(A, "a", weight=float("nan"))], "message 2: weight must be a finite number of at least 0, not nan", WHOLE),
    ("no_messages", [], "the conversation has no messages; give it at least one, or set data.on_fault to skip", None),
    ("empty_content", [said(S, " \n"), *TWO], "message 1 is empty; remove it, or set data.on_fault to fix or skip", WHOLE),
    ("empty_content", [*TWO, said(U, None)], "message 3 is empty; remove it", WHOLE),
    ("empty_content", [*TWO, said(U, [])], "message 3 is empty; remove it", WHOLE),
    ("only_system", [said(S, "s")], "there is only a system message; add what the user and the assistant say", None),
    ("no_assistant", [said(S, "s"), said(U, "q")], "the assistant says nothing, so nothing can be learnt; add its reply", None),
    (
        "assistant_first",
        [said(A, "Welcome"), *TWO],
        "message 1: the assistant speaks first; begin with a user message, or set data.on_fault to fix",
        WHOLE,
    ),
    ("assistant_first", [said(S, "s"), said(A, "Welcome"), *TWO], "message 2: the assistant speaks first", [(S, "s"), *WHOLE]),
    (
        "repeated_role",
        [said(U, "q"), said(U, "q2"), said(A, "a")],
        "message 2: two user messages in a row; join them, or set data.on_fault to fix",
        [(U, "q\nq2"), (A, "a")],
    ),
    ("repeated_role", [*TWO, said(A, "b")], "message 3: two assistant messages in a row; join them", [(U, "q"), (A, "a\nb")]),
    ("repeated_role", [said(S, "s"), said(S, "t"), *TWO], "message 2: two system messages in a row; join them", [(S, "s\nt"), *WHOLE]),
    (
        "late_system",
        [*TWO, said(S, "s"), said(U, "q2"), said(A, "a2")],
        "message 3: a system message after the conversation began; put it first, or set data.on_fault to fix",
        [(S, "s"), *WHOLE, (U, "q2"), (A, "a2")],
    ),
    ("too_large", [said(U, "xxxxxxxxxxx"), TWO[1]], "message 1 has 11 characters, beyond all measure (10 at most); split it", None),
    ("too_large", [*TWO, *TWO, said(U, "q")], "5 messages are beyond all measure (4 at most); split the conversation", None),
]
IDS = [f"{kind} {number}" for number, (kind, *_) in enumerate(FAULTS)]


@pytest.fixture(autouse=True)
def small_measures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "too_large" in request.node.name:
        monkeypatch.setattr(validation, "MAX_MESSAGE_CHARS", 10)
        monkeypatch.setattr(validation, "MAX_MESSAGES", 4)


def check(messages: list[Any], faults: Faults, **settings: Any) -> tuple[Message, ...]:
    return check_order(check_each(messages, faults=faults), faults=faults, **settings)


def test_every_kind_is_told_here_or_elsewhere() -> None:
    assert {kind for kind, *_ in FAULTS} == set(KINDS) - ELSEWHERE
    mended = {kind for kind, _, _, result in FAULTS if result is not None}
    assert mended == {kind for kind in KINDS if KINDS[kind].fix} - ELSEWHERE


@pytest.mark.parametrize(("kind", "messages", "says", "mended"), FAULTS, ids=IDS)
class TestEachFault:
    def test_error_tells_the_place_and_the_remedy(self, kind: str, messages: list, says: str, mended: Any) -> None:
        faults = Faults()
        faults.place = "chats.jsonl:17"
        with pytest.raises(DataError) as error:
            check(messages, faults)
        assert str(error.value).startswith(f"chats.jsonl:17: {says}")
        assert faults.counts == {}
        assert "\n" not in str(error.value) and str(error.value).isprintable()

    def test_skip_leaves_the_record_out(self, kind: str, messages: list, says: str, mended: Any) -> None:
        faults = Faults("skip")
        faults.place = "chats.jsonl:17"
        with pytest.raises(SkipRecord):
            check(messages, faults)
        assert faults.counts == {kind: {"skip": 1}}
        assert faults.places == {kind: ["chats.jsonl:17"]}

    def test_fix_mends_or_leaves_out(self, kind: str, messages: list, says: str, mended: Any) -> None:
        faults = Faults("fix")
        if mended is None:
            with pytest.raises(SkipRecord):
                check(messages, faults)
            assert faults.counts == {kind: {"skip": 1}}
        else:
            result = check(messages, faults)
            assert [(m.role, m.content) for m in result] == mended
            assert all(m.name == "" and m.weight == 1.0 for m in result)
            assert faults.counts == {kind: {"fix": 1}}

    def test_only_this_kind_is_met(self, kind: str, messages: list, says: str, mended: Any) -> None:
        """A mapping that skips this kind, all others being errors."""
        faults = Faults({kind: "skip"})
        with pytest.raises(SkipRecord):
            check(messages, faults)
        assert faults.counts == {kind: {"skip": 1}}
        others = Faults({"default": "skip", kind: "error"})
        with pytest.raises(DataError):
            check(messages, others)


@pytest.mark.parametrize(
    "messages",
    [
        TWO,
        [said(S, "s"), *TWO, said(U, "q2")],
        [said(U, "q", weight=None, name=None, tool_calls=None, extra=None), said(A, "a", weight=0, id="m1", refusal=None)],
        [said(U, "q"), said(A, "call"), said(T, "1"), said(T, "2"), said(A, "a")],
        [said(U, "q", name="Ann"), said(U, "q", name="Bob"), said(A, "a", name="Zoë-2")],
        [said(U, " q \u2028 "), said(A, "<|im_end|>")],
        [said("Human", "q"), said(" GPT ", "a")],
    ],
)
def test_messages_without_fault_stay_as_they_are(messages: list) -> None:
    faults = Faults()
    result = check(messages, faults)
    assert [m.content for m in result] == [m["content"] for m in messages]
    assert [m.name or None for m in result] == [m.get("name") for m in messages]
    assert [m.weight for m in result] == [1.0 if m.get("weight") is None else m["weight"] for m in messages]
    assert faults.counts == {}


def test_nothing_to_learn_is_no_fault_where_no_reply_is_needed() -> None:
    assert [m.content for m in check([said(U, "q")], Faults(), needs_reply=False)] == ["q"]


def test_joined_messages_keep_the_smaller_weight() -> None:
    result = check([TWO[0], said(A, "a", weight=0.5), said(A, "b", weight=0), said(A, "c")], faults := Faults("fix"))
    assert [(m.content, m.weight) for m in result] == [("q", 1.0), ("a\nb\nc", 0.0)]
    assert faults.counts == {"repeated_role": {"fix": 2}}


def test_several_faults_are_mended_and_counted_each() -> None:
    faults = Faults("fix")
    faults.place = "x:1"
    messages = [said(A, "Hi"), said(U, "a\0"), said(U, 5), said(S, "s", note=1), said(A, "", weight=9), said(A, "b", weight=-1, name="<")]
    result = check(messages, faults)
    assert result == (Message(S, "s"), Message(U, "a\n5"), Message(A, "b"))
    once = {"fix": 1}
    kinds = [
        "nul_bytes",
        "wrong_type",
        "unknown_key",
        "empty_content",
        "bad_weight",
        "bad_name",
        "late_system",
        "repeated_role",
        "assistant_first",
    ]
    assert faults.counts == dict.fromkeys(kinds, once)
    assert faults.to_dict() == {"counts": faults.counts, "places": {kind: ["x:1"] for kind in kinds}}


def test_nothing_left_after_mending_is_left_out() -> None:
    faults = Faults("fix")
    with pytest.raises(SkipRecord):
        check([said(A, "Welcome")], faults)
    assert faults.counts == {"assistant_first": {"fix": 1}, "no_messages": {"skip": 1}}
    with pytest.raises(SkipRecord):
        check([said(A, "Welcome")], faults := Faults("fix"), needs_reply=False)
    assert faults.counts == {"assistant_first": {"fix": 1}, "no_messages": {"skip": 1}}
    with pytest.raises(SkipRecord):
        check([said(U, " "), said(A, "")], faults := Faults("fix"))
    assert faults.counts == {"empty_content": {"fix": 2}, "no_messages": {"skip": 1}}


def test_a_mapping_says_for_each_kind_what_is_done() -> None:
    faults = Faults({"default": "skip", "nul_bytes": "fix", "bad_name": "error"})
    assert check([said(U, "q\0"), TWO[1]], faults) == (Message(U, "q"), Message(A, "a"))
    with pytest.raises(SkipRecord):
        check([said(U, 3), TWO[1]], faults)
    with pytest.raises(DataError, match="^message 1: name"):
        check([said(U, "q", name="a b"), TWO[1]], faults)
    assert faults.counts == {"nul_bytes": {"fix": 1}, "wrong_type": {"skip": 1}}
    # Without a default, what is not named is an error; with fix as the default, what nobody can mend is left out.
    with pytest.raises(DataError):
        check([said(U, 3), TWO[1]], Faults({"nul_bytes": "fix"}))
    with pytest.raises(SkipRecord):
        check([said("bot", "q"), TWO[1]], Faults({"default": "fix"}))
    # Named for mending, a fault of the kind that cannot be mended leaves the record out, too.
    with pytest.raises(SkipRecord):
        check([said(U, {}), TWO[1]], Faults({"wrong_type": "fix"}))


def test_the_first_five_places_are_kept_and_all_are_counted() -> None:
    faults = Faults("skip")
    for number in range(8):
        faults.place = f"x:{number}"
        with pytest.raises(SkipRecord):
            check([], faults)
    assert faults.to_dict() == {"counts": {"no_messages": {"skip": 8}}, "places": {"no_messages": [f"x:{n}" for n in range(5)]}}


@pytest.mark.parametrize(
    ("on_fault", "says"),
    [
        ("explode", "data.on_fault: 'explode' cannot be done about default; use error, skip or fix"),
        ({"default": "mend"}, "data.on_fault: 'mend' cannot be done about default; use error, skip or fix"),
        ({"nul_byte": "fix"}, "data.on_fault: 'nul_byte' is no kind of fault; did you mean nul_bytes?"),
        ({"xyz": "fix"}, "data.on_fault: 'xyz' is no kind of fault; there are broken_json, truncated_file, "),
        ({"bad_name": None}, "data.on_fault: None cannot be done about bad_name; use error, skip or fix"),
        *[
            ({kind: "fix"}, f"data.on_fault: {kind} ({KINDS[kind].about}) cannot be mended; use error or skip")
            for kind in (
                "broken_json",
                "unknown_role",
                "no_messages",
                "only_system",
                "no_assistant",
                "too_large",
                "unknown_schema",
                "truncated_file",
            )
        ],
    ],
)
def test_settings_that_cannot_be_are_refused(on_fault: Any, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        Faults(on_fault)
    assert str(error.value).startswith(says)


def test_what_cannot_be_mended_is_refused_for_all_such_kinds() -> None:
    unmendable = {kind for kind in KINDS if not KINDS[kind].fix}
    assert unmendable == {
        *("broken_json", "truncated_file", "unknown_schema", "unknown_role", "no_messages", "only_system", "no_assistant", "too_large")
    }
    for kind in KINDS.keys() - unmendable:
        assert Faults({kind: "fix"}).on_fault == {kind: "fix"}
