"""Cleaning steps change what they are for, and nothing else; false positives are as much of a bug as misses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_chatgpt.chat.conversation import Conversation, Message
from lightning_chatgpt.data.cleaning import build_cleaning, split_duplicates
from lightning_chatgpt.data.duplicates import DuplicateSettings
from lightning_chatgpt.data.redaction import redact
from lightning_chatgpt.errors import ConfigError, DataError
from tests.conftest import chat

REFUSAL = "I'm sorry, but I can't assist with that request."


def clean(conversation: Conversation, *steps: Any) -> Conversation | None:
    cleaned: Conversation | None = conversation
    for step in build_cleaning(steps):
        cleaned = cleaned and step(cleaned)
    return cleaned


def clean_text(text: str, *steps: Any) -> str | None:
    cleaned = clean(chat("hello", text), *steps)
    return cleaned.messages[1].content if cleaned else None


# What the examples write as escapes cannot be seen in an editor.
NORMALISED = {
    "entities": ("Tom &amp; Jerry &lt;3 &#8364;5 &#x1F600; caf&eacute;", "Tom & Jerry <3 €5 😀 café"),
    "no entities": ("AT&T, http://x.org/?a=1&copy=2&lang=en, R&D; &copyleft;", "AT&T, http://x.org/?a=1&copy=2&lang=en, R&D; &copyleft;"),
    "entities once": ("write &amp;lt; for <", "write &lt; for <"),
    "composed": ("cafe\u0301", "caf\u00e9"),
    "controls": ("a\x00b\x1b[0m\x7f c\x9d", "ab[0m c"),
    "line ends": ("a\r\nb\rc\u2028d\te", "a\nb\nc\nd\te"),
    "spaces": ("  a  b\u00a0\u3000c  ", "a b c"),
    "indentation": ("if x:\n    y  =  1  \n\n    \n\tz", "if x:\n    y = 1\n\n\tz"),
    "line breaks": ("a \n\n \n\nb\n\nc\nd", "a\n\nb\n\nc\nd"),
    "zero width": ("\ufeffzero\u200bwidth \u2060co\u00adoperate", "zerowidth cooperate"),
    "Persian": ("می\u200cخواهم", "می\u200cخواهم"),
    "Persian, twice": ("می\u200c\u200cخواهم", "می\u200cخواهم"),
    "Hindi": ("क्\u200dष क्\u200cष", "क्\u200dष क्\u200cष"),
    "Malayalam, at the end of a word": ("അവന്\u200d വന്നു", "അവന്\u200d വന്നു"),
    "Latin joins nothing": ("in\u200cvis\u200dible", "invisible"),
    "family": ("👨\u200d👩\u200d👧 ok", "👨\u200d👩\u200d👧 ok"),
    "skin tone": ("👩🏽\u200d🚀", "👩🏽\u200d🚀"),
    "burning heart": ("❤\ufe0f\u200d🔥", "❤\ufe0f\u200d🔥"),
    "nodding": ("🙂\u200d↕\ufe0f", "🙂\u200d↕\ufe0f"),
    "emoji joined to nothing": ("👍\u200d yes", "👍 yes"),
    "case": ("Ünï CODE", "Ünï CODE"),
}


@pytest.mark.parametrize("name", NORMALISED)
def test_normalise(name: str) -> None:
    text, expected = NORMALISED[name]
    assert clean_text(text, "normalise") == expected
    if "entit" not in name:  # those that were written twice over are read once
        assert clean_text(expected, "normalise") == expected


@pytest.mark.parametrize(
    ("settings", "text", "expected"),
    [
        ({"html": False}, "a &amp; b", "a &amp; b"),
        ({"control": False}, "a\x07b\r\nc", "a\x07b\r\nc"),
        ({"zero_width": False}, "a\u200bb", "a\u200bb"),
        ({"whitespace": False}, "a   b\n\n\n\nc", "a   b\n\n\n\nc"),
        ({"strip": False}, " a ", " a "),
        ({"unicode": "NFKC"}, "ﬁne ２０ ℌ", "fine 20 H"),
        ({"unicode": "NFC"}, "ﬁne ２０", "ﬁne ２０"),
        ({"unicode": "none"}, "cafe\u0301", "cafe\u0301"),
        ({"lowercase": True}, "ÄRGER Über ΣΟΦΟΣ", "ärger über σοφος"),
        ({"lowercase": True, "unicode": "NFKC"}, "ℌi", "hi"),
    ],
)
def test_normalise_settings(settings: dict[str, Any], text: str, expected: str) -> None:
    assert clean_text(text, {"normalise": settings}) == expected


def test_all_but_the_contents_is_kept() -> None:
    messages = (Message("system", "s "), Message("user", "hi  there ", name="Ann"), Message("assistant", "a  b", weight=0.5))
    before = Conversation(messages, id="x:1", group="g", labels={"topic": "t"}, rejected=(Message("assistant", "no  no", weight=2.0),))
    after = clean(before, "normalise")
    assert after is not None
    assert after.messages == (Message("system", "s"), Message("user", "hi there", name="Ann"), Message("assistant", "a b", weight=0.5))
    assert after.rejected == (Message("assistant", "no no", weight=2.0),)
    assert (after.id, after.group, after.labels) == ("x:1", "g", {"topic": "t"})


REDACTED = [
    ("write to jane.doe+news@mail.example.co.uk.", "write to <EMAIL>."),
    ("Mail: jörg@müller.de, <anna_b@example.org>", "Mail: <EMAIL>, <<EMAIL>>"),
    ("请发邮件到foo@example.com谢谢", "请发邮件到<EMAIL>谢谢"),
    ("call (415) 555-2671 or 415.555.2671", "call <PHONE> or <PHONE>"),
    ("+44 20 7946 0018, +49 30 901820, +33 1 42 68 53 00", "<PHONE>, <PHONE>, <PHONE>"),
    ("+81 3-3580-3311; +91 98765 43210; +86 138 0013 8000", "<PHONE>; <PHONE>; <PHONE>"),
    # Numbers that card makers publish for tests: Visa, Mastercard, American Express, Discover, Diners, and of 19 digits.
    ("Visa 4111 1111 1111 1111 exp 12/26", "Visa <CARD> exp 12/26"),
    ("5500-0000-0000-0004 and 378282246310005", "<CARD> and <CARD>"),
    ("3782 822463 10005, 6011000990139424, 30569309025904", "<CARD>, <CARD>, <CARD>"),
    ("卡号4111111111111111。", "卡号<CARD>。"),
    ("6304000000000000000", "<CARD>"),
    # The examples of the SWIFT IBAN registry.
    ("IBAN DE89 3704 0044 0532 0130 00 bitte bis Montag", "IBAN <IBAN> bitte bis Montag"),
    ("GB29NWBK60161331926819, FR14 2004 1010 0505 0001 3M02 606", "<IBAN>, <IBAN>"),
    ("DE90 8461 2664 9320 1778 01", "<IBAN>"),  # its digits pass for a card
    ("gb29 nwbk 6016 1331 9268 19 BIC NWBKGB2L", "<IBAN> BIC NWBKGB2L"),
    ("ping 192.168.1.20:8080, http://8.8.8.8/dns and 10.0.0.1-10.0.0.9", "ping <IP>:8080, http://<IP>/dns and <IP>-<IP>"),
    ("2001:db8::8a2e:370:7334, IP:2001:db8::1. fe80::1%eth0", "<IP>, IP:<IP>. <IP>%eth0"),
    ("::ffff:192.0.2.1 2001:0db8:85a3:0000:0000:8a2e:0370:7334", "<IP> <IP>"),
    ("sk-proj-abcdEFGH1234567890abcdEFGH", "<KEY>"),
    ("token=ghp_" + "a1B2" * 9 + "!", "token=<KEY>!"),
    ("AKIAIOSFODNN7EXAMPLE and AIza" + "Sy0-_" * 7, "<KEY> and <KEY>"),
    ("xoxb-123456789012-abcDEF", "<KEY>"),
    ("Bearer eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dBjftJeZ4CVP-mB92K", "Bearer <KEY>"),
    ("a\n-----BEGIN RSA PRIVATE KEY-----\nMIIEow\n+/=\n-----END RSA PRIVATE KEY-----\nb", "a\n<KEY>\nb"),
]

NOT_REDACTED = [
    "In 1969, 2001 and 2024; the years 2002 2003 2004 2005 and 2023 2024 2025 2026",  # they pass Luhn, as the next do
    "$1,299.99 or 1.299,00 €, 12 500 000 people, 3.14159265358979",
    "order 1029384756, invoice 2023-00017, ticket #0000001029384763, ISBN 978-3-16-148410-0",
    "at 12:30:45 on 2023-10-15, 15.10.2023 or 10/15/2023, from 9-5",
    "since 1700000000 (1700000000004 ms)",
    "Python 3.11.7, v1.2.3, v1.2.3.4, version 10.2.3.4, Chrome/120.0.0.0 and OID 1.3.6.1.4.1.311",
    "localhost is 127.0.0.1 or ::1; 256.1.1.1 and 1.2.3 are no addresses",
    "x[1::2], a[::-1], std::vector, dead::beef, 00:1B:44:11:3A:B7",
    "4111 1111 1111 1112 and 4111111111111112 fail Luhn",
    "DE88 3704 0044 0532 0130 00 and GB29NWBK60161331926818 fail mod 97",
    "@user, foo@localhost, logo@2x.png, react@18.2.0, git@github.com:a/b.git, me at example dot com",
    "sk-estimator-doc-link-fitted-state is a class, task-1234567890123456789012 a task",
    "550e8400-e29b-41d4-a716-446655440000",
    "-----BEGIN PUBLIC KEY-----\nMIIB\n-----END PUBLIC KEY-----",
    "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16",
]


@pytest.mark.parametrize(("text", "expected"), REDACTED)
def test_redact(text: str, expected: str) -> None:
    assert clean_text(text, "redact") == expected


@pytest.mark.parametrize("text", NOT_REDACTED)
def test_redact_leaves_alone(text: str) -> None:
    assert clean_text(text, "redact") == text


@pytest.mark.parametrize(
    ("country", "number"), [("GB", "020 7946 0018"), ("DE", "0151 23456789"), ("FR", "01 42 68 53 00"), ("IN", "098765 43210")]
)
def test_redact_takes_phone_numbers_as_a_country_writes_them(country: str, number: str) -> None:
    assert clean_text(f"call {number} now", {"redact": {"country": country}}) == "call <PHONE> now"
    assert clean_text(f"call {number} now", {"redact": {"country": "US"}}) == f"call {number} now"


def test_redact_counts_by_kind_in_every_message() -> None:
    messages = (Message("system", "a@b.org"), Message("user", "c@d.org e@f.org 8.8.8.8"), Message("assistant", "ok"))
    [step] = build_cleaning(["redact"])
    cleaned = step(Conversation(messages, rejected=(Message("assistant", "g@h.org"),)))
    assert cleaned is not None and [m.content for m in cleaned.messages] == ["<EMAIL>", "<EMAIL> <EMAIL> <IP>", "ok"]
    assert cleaned.rejected[0].content == "<EMAIL>"
    assert step(chat("nothing", "here")) == chat("nothing", "here")
    assert step.counts == {"email": 4, "ip": 1, "changed": 1}


def test_redact_only_the_kinds_asked_for() -> None:
    text = "a@b.org 4111 1111 1111 1111 8.8.8.8 +44 20 7946 0018"
    for kinds, expected in (
        (["ip"], "a@b.org 4111 1111 1111 1111 <IP> +44 20 7946 0018"),
        (["phone"], "a@b.org 4111 1111 1111 1111 8.8.8.8 <PHONE>"),
        (["card", "email"], "<EMAIL> <CARD> 8.8.8.8 +44 20 7946 0018"),
    ):
        assert clean_text(text, {"redact": {"kinds": kinds}}) == expected
    # This card passes for a phone number in Germany.
    card = "4599 7187 6560 1691"
    assert clean_text(card, {"redact": {"country": "DE"}}) == "<CARD>"
    assert clean_text(card, {"redact": {"kinds": ["phone"], "country": "DE"}}) == card


def test_redact_agrees_with_the_check_digits_of_every_card() -> None:
    # Of ten numbers that differ in the last digit, exactly one passes Luhn.
    for stem in ("411111111111111", "555555555555444", "37828224631000"):
        found = [digit for digit in "0123456789" if redact(f"{stem}{digit}", kinds=["card"])[1]]
        # Every second digit from the right doubled; 9 taken off where that makes two digits.
        doubled = [2 * int(d) - 9 * (int(d) > 4) if i % 2 == 0 else int(d) for i, d in enumerate(reversed(stem))]
        assert found == [str(-sum(doubled) % 10)]


@pytest.mark.parametrize(
    ("words", "text", "expected"),
    [
        (["darn"], "Darn it, DARN! darning undarn", "*** it, ***! darning undarn"),
        (["straße"], "STRAßE Straßen", "*** Straßen"),
        (["bad word"], "a Bad\n word, badword", "a ***, badword"),
        (["bad", "bad word"], "bad word bad", "*** ***"),
        (["c++"], "C++ and objc++, c+", "*** and objc++, c+"),
        (["笨蛋"], "你是笨蛋吗", "你是***吗"),
        (["lazy"], "他很lazy的, lazyish", "他很***的, lazyish"),
        (["バカ"], "バカだな", "***だな"),
        (["โง่"], "คนโง่มาก", "คน***มาก"),
        (["바보"], "바보야", "***야"),
        (["कम"], "कम कमी", "*** कमी"),
        (["caf\u00e9"], "cafe\u0301 cafe", "*** cafe"),
        (["дурак"], "Дурак, дураки", "***, дураки"),
    ],
)
def test_words_are_masked(words: list[str], text: str, expected: str) -> None:
    assert clean_text(text, {"words": {"words": words, "action": "mask"}}) == expected


def test_words_drop_flag_and_file(tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    file.write_text("\ufeffdarn\n\nbad word \n", encoding="utf-8")
    bad, good = chat("hi", "Darn, a bad  word"), chat("hi", "darning")
    assert clean(bad, {"words": {"file": str(file)}}) is None
    assert clean(good, {"words": {"file": str(file)}}) == good
    [step] = build_cleaning([{"words": {"file": str(file), "words": ["hi"], "action": "flag"}}])
    flagged = step(bad)
    assert flagged == bad and flagged is not None and flagged.labels == {"flagged": "hi"}
    assert step.counts == {"flagged": 1}
    # A rejected answer is bad on purpose.
    preference = Conversation(good.messages, rejected=(Message("assistant", "darn"),))
    assert clean(preference, {"words": {"file": str(file)}}) == preference


def test_language() -> None:
    english = chat("Could you tell me how to get to the station?", "Of course, it is just around the corner.")
    german = chat("Können Sie mir sagen, wie ich zum Bahnhof komme?", "Natürlich, er ist gleich um die Ecke.")
    code = chat("?" * 15, "0x1f 0x2e 0x3d")
    [step] = build_cleaning([{"language": {"keep": ["de"]}}])
    kept = step(german)
    assert kept == german and kept is not None and kept.labels == {"language": "de"}
    assert step(english) is None and step(code) is None
    assert step(chat("ok", "Thanks")) == chat("ok", "Thanks")
    assert step.counts == {"dropped": 2, "too_short_to_tell": 1}
    # Only user and assistant count: the system prompt may be in another language.
    prompted = chat("Können Sie mir sagen, wie ich zum Bahnhof komme?", "Nein.", system="You are a helpful assistant. " * 20)
    assert clean(prompted, {"language": {"keep": ["de"]}}) == prompted
    assert clean(german, {"language": {"keep": ["de"], "min_probability": 1}}) is None


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"min_chars": 10}, True),
        ({"min_chars": 11}, False),
        ({"max_chars": 10}, True),
        ({"max_chars": 9}, False),
        ({"min_turns": 2, "max_turns": 2}, True),
        ({"min_turns": 3}, False),
        ({"max_turns": 1}, False),
    ],
)
def test_length(settings: dict[str, Any], kept: bool) -> None:
    conversation = chat("12345", "678", system="90")  # 10 characters, 2 turns
    assert clean(conversation, {"length": settings}) == (conversation if kept else None)


@pytest.mark.parametrize(
    "reply",
    [
        "As an AI language model, I don't have feelings.",
        "I cannot do that. As an artificial intelligence, I have no body.",
        "As a large language model trained by OpenAI, I cannot browse.",
        "I’m sorry, but I can’t assist with that.",
        REFUSAL,
        "I am sorry, I cannot help you with that.",
        "I'm sorry but I am unable to provide information about weapons.",
        "I cannot fulfill your request.",
        "I’m not able to help with that request.",
        "Sorry, it is against my programming.",
    ],
)
def test_refusals(reply: str) -> None:
    assert clean(chat("do it", reply), "refusals") is None
    assert clean(chat(reply, "fine"), "refusals") is not None  # what the user says is not looked at


@pytest.mark.parametrize(
    "reply",
    [
        "I'm sorry to hear that. Can I help you with anything else?",
        "I can't help laughing when I see it.",
        "I'm sorry, but I can't make it to dinner tonight.",
        "BERT works as a language model with a masked objective.",
        "As an aide to the senator, I wrote speeches.",
        "You can use an AI assistant if you like.",
        "Sorry, but I can write faster than you think: that, for one.",
    ],
)
def test_no_refusals(reply: str) -> None:
    assert clean(chat("do it", reply), "refusals") is not None


def test_refusals_settings() -> None:
    conversation = chat("hi", "No way, José.")
    assert clean(conversation, "refusals") == conversation
    assert clean(conversation, {"refusals": {"patterns": [r"^no way\b"]}}) is None
    flagged = clean(chat("hi", f"Well. {REFUSAL}"), {"refusals": {"action": "flag"}})
    assert flagged is not None and flagged.labels["refusal"] == "sorry, but I can't assist"


def test_what_is_emptied_is_dropped() -> None:
    [step] = build_cleaning(["normalise"])
    assert step(chat("\u200b \x00", "an answer to nothing")) is None
    assert step(Conversation(chat("a", "b").messages, rejected=(Message("assistant", "\u200b"),))) is None
    # What was empty before is not this step's doing.
    assert step(chat("", "an answer")) == chat("", "an answer")
    assert step.counts == {"emptied": 2, "dropped": 2}


def test_steps_run_in_the_order_given() -> None:
    text = "mail a&#64;b.org"
    assert clean_text(text, "normalise", "redact") == "mail <EMAIL>"
    assert clean_text(text, "redact", "normalise") == "mail a@b.org"


def shorten(conversation: Conversation, keep: int = 1) -> Conversation | None:
    return Conversation(conversation.messages[:keep], conversation.id) if keep else None


def broken(conversation: Conversation) -> str:
    return "done"


def test_a_users_own_function() -> None:
    path = f"{__name__}.shorten"
    [step] = build_cleaning([{"class_path": path, "init_args": {"keep": 2}}])
    assert step.name == path
    assert step(chat("a", "b", "c", "d")) == chat("a", "b") and step.counts == {"changed": 1}
    [dropping] = build_cleaning([{"class_path": path, "init_args": {"keep": 0}}])
    assert dropping(chat("a", "b")) is None and dropping.counts == {"dropped": 1}
    # Without an answer there is nothing to learn.
    [muting] = build_cleaning([{"class_path": path}])
    assert muting(chat("a", "b")) is None and muting.counts == {"dropped": 1, "emptied": 1}
    with pytest.raises(DataError, match=r"test_cleaning.broken returned a str; return a Conversation, or None"):
        clean(chat("a", "b"), {"class_path": f"{__name__}.broken"})


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("normalize", "data.cleaning: 'normalize' is no step; did you mean normalise"),
        ("xyz", "there are normalise, redact, words"),
        ({"redact": {"kind": ["email"]}}, "data.cleaning: redact.kind is no setting; did you mean kinds"),
        ({"redact": {"kinds": ["fone"]}}, "redact.kinds cannot be 'fone'; did you mean phone"),
        ({"redact": {"kinds": "email"}}, r"redact.kinds takes a list such as \[a, b\], not 'email'"),
        ({"redact": {"kinds": []}}, "redact.kinds is empty"),
        ({"redact": {"country": "UK"}}, "redact.country 'UK' is unknown"),
        ({"redact": {"country": False}}, "redact.country takes text, not False; put it in quotes"),  # NO in YAML 1.1
        ({"redact": {"kinds": ["email"], "country": "GB"}}, "redact.country is for phone numbers only"),
        ({"normalise": {"unicode": "NFD"}}, "normalise.unicode cannot be 'NFD'"),
        ({"normalise": {"html": "maybe"}}, "normalise.html takes true or false, not 'maybe'"),
        ({"normalise": True}, "normalise takes settings by name, not True"),
        ({"words": {"action": "mask"}}, "words has no words"),
        ({"words": {"file": "/no/such/file"}}, "words.file /no/such/file cannot be read"),
        ({"language": {}}, "language.keep is missing"),
        ({"language": {"keep": ["english"]}}, "language.keep 'english' is no language"),
        ({"language": {"keep": ["en"], "min_probability": 80}}, "min_probability must be from 0 to 1, not 80"),
        ("length", "length has no bound"),
        ({"length": {"max_chars": "many"}}, "length.max_chars takes a whole number of at least 0, not 'many'"),
        ({"length": {"min_turns": 4, "max_turns": 2}}, "length.max_turns 2 keeps nothing"),
        ({"refusals": {"patterns": ["(no"]}}, r"'\(no' is no regular expression"),
        ({"normalise": {}, "redact": {}}, "is no step; write a name, or a mapping of one name"),
        (17, "17 is no step"),
        ({"class_path": "no_such_package.f"}, "no_such_package.f: cannot be imported"),
        ({"class_path": f"{__name__}.nothing"}, "cannot be imported"),
        ({"class_path": "collections.Counter"}, "is a type, not a function"),
        ({"class_path": f"{__name__}.shorten", "init_args": {"kept": 2}}, "does not take these init_args"),
        ({"class_path": f"{__name__}.shorten", "args": {}}, "class_path.args is no setting; did you mean init_args"),
        ("duplicates", "duplicates compares conversations with each other"),
    ],
)
def test_refused(step: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        build_cleaning([step])
    assert str(error.value).startswith("data.cleaning") and "\n" not in str(error.value)


def test_duplicates_are_no_step() -> None:
    assert split_duplicates(["normalise"]) == (["normalise"], None)
    assert split_duplicates(["normalise", "duplicates"]) == (["normalise"], DuplicateSettings())
    near = {"duplicates": {"near": True, "threshold": 0.7}}
    assert split_duplicates([near]) == ([], DuplicateSettings(near=True, threshold=0.7))
    for steps, message in (
        (["duplicates", "normalise"], "duplicates is step 1 of 2; name it once and last"),
        (["duplicates", "duplicates"], "name it once and last"),
        ([{"duplicates": {"treshold": 0.7}}], "did you mean threshold"),
        ([{"duplicates": {"threshold": 0.7}}], "add near: true"),
        ([{"duplicates": {"near": True, "threshold": 1.5}}], "must be between 0 and 1, not 1.5"),
    ):
        with pytest.raises(ConfigError, match=message):
            split_duplicates(steps)


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for package, step in (("phonenumbers", "redact"), ("py3langid.langid", {"language": {"keep": ["en"]}})):
        monkeypatch.setitem(sys.modules, package, None)
        from lightning_chatgpt.data import cleaning

        cleaning._identifier.cache_clear()
        with pytest.raises(ConfigError, match=r"pip install 'lightning-chatgpt\[clean\]'"):
            build_cleaning([step])


def test_nothing_heavy_is_imported() -> None:
    modules = "cleaning, lightning_chatgpt.data.duplicates, lightning_chatgpt.data.augmentation"
    heavy = "{'torch', 'lightning', 'transformers', 'phonenumbers', 'stdnum', 'py3langid', 'datasketch'}"
    code = f"import sys, lightning_chatgpt.data.{modules}; print({heavy} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
