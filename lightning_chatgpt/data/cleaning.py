"""Cleaning: steps that each take a conversation and give it back changed, labelled, or not at all.

Which steps, in which order and with which settings is plain data (``data.cleaning``), checked before the first conversation.
"""

from __future__ import annotations

import re
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, Literal, cast

from lightning_chatgpt.chat.conversation import Conversation, Message
from lightning_chatgpt.chat.plugins import check_arguments, find_function
from lightning_chatgpt.data.duplicates import DuplicateSettings
from lightning_chatgpt.data.normalisation import decode_entities, drop_control, drop_zero_width, tidy_spaces
from lightning_chatgpt.data.redaction import KINDS, Kind, clean_package, redact
from lightning_chatgpt.data.words import read_word_lines, word_entries, words_pattern
from lightning_chatgpt.errors import ConfigError, DataError, nearest
from lightning_chatgpt.settings import check_settings

_CANNOT = r"\bi(?:'m| am)? (?:can't|cannot|can not|won't|will not|unable to|not able to) "
_REFUSALS = (
    r"\bas an? (?:ai|artificial intelligence) language model\b",
    r"\bas an? (?:large )?(?:ai|artificial intelligence|language model)(?: (?:model|assistant|chatbot|system))?"
    r"(?: (?:trained|developed|created|made) by [\w ]{1,30})?, i\b",
    rf"\bsorry,? (?:but )?(?:as an ai,? )?{_CANNOT}(?:assist\b|help(?: you)? with (?:that|this|such|your)\b|comply\b|fulfil)",
    rf"\bsorry,? (?:but )?(?:as an ai,? )?{_CANNOT}(?:provide|generate|create|write|produce|engage in|support|promote) "
    r"(?:that|this|such|any|content|information|instructions|guidance)\b",
    rf"{_CANNOT}(?:assist|help)(?: you)? with (?:that|this|your) request\b",
    rf"{_CANNOT}(?:comply with|fulfill?) (?:that|this|your) request\b",
    r"\b(?:goes|is|it's|that's) against my (?:ethical )?(?:guidelines|programming|principles)\b",
)


class CleaningStep(ABC):
    """One step; a subclass overrides :meth:`clean`, its ``__init__`` takes the step's settings as plain data.

    A conversation is dropped too where a step leaves a message blank that was not, or no assistant message of those there
    were; that is counted as ``emptied`` besides.

    Attributes:
        name: The step's name in the config.
        counts: What it did, in conversations: ``changed`` and ``dropped``, and what else the step counts.
    """

    name: str

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def __call__(self, conversation: Conversation) -> Conversation | None:
        """Clean a conversation.

        Returns: the conversation, itself where nothing changed; None where it is to be left out.
        """
        cleaned = self.clean(conversation)
        if cleaned is not None and _is_emptied(conversation, cleaned):
            self.counts["emptied"] += 1
            cleaned = None
        if cleaned is None:
            self.counts["dropped"] += 1
        elif cleaned != conversation:
            self.counts["changed"] += 1
        return cleaned

    @abstractmethod
    def clean(self, conversation: Conversation) -> Conversation | None:
        """What the step does; id, group, labels, weights, names and roles are to be kept."""


class Normalise(CleaningStep):
    """Text as people would have typed it: one way to write a character, nothing invisible, no stray spaces.

    Line ends of any kind become line breaks. Joiners (U+200C, U+200D) stay between emoji, within Arabic, Persian and Indic
    words and after a virama, as in RFC 5892, appendix A.

    Args:
        unicode: The normal form of Unicode's annex 15: NFC keeps every meaning, NFKC takes ligatures, full-width letters
            and the like for the plain ones, none leaves all as it is.
        html: HTML entities become the characters they stand for.
        control: Control characters go, but for line breaks and tabs.
        zero_width: Zero-width spaces, byte-order marks, soft hyphens and joiners that join nothing go.
        whitespace: Runs of spaces within a line become one space, those at its end go, those at its beginning stay (code is
            indented by them); more than two line breaks in a row become two.
        strip: Whitespace at both ends of a message goes.
        lowercase: All becomes lower case.
    """

    name = "normalise"

    def __init__(
        self,
        *,
        unicode: Literal["NFC", "NFKC", "none"] = "NFC",
        html: bool = True,
        control: bool = True,
        zero_width: bool = True,
        whitespace: bool = True,
        strip: bool = True,
        lowercase: bool = False,
    ) -> None:
        super().__init__()
        self.unicode: Literal["NFC", "NFKC", "none"] = unicode
        self.html = html
        self.control = control
        self.zero_width = zero_width
        self.whitespace = whitespace
        self.strip = strip
        self.lowercase = lowercase

    def clean(self, conversation: Conversation) -> Conversation:
        """Normalise every message."""
        return _map_contents(conversation, self.normalise)

    def normalise(self, text: str) -> str:
        """One text, normalised."""
        if self.html:
            text = decode_entities(text)
        if self.control:
            text = drop_control(text)
        if self.zero_width:
            text = drop_zero_width(text)
        if self.unicode != "none":
            text = unicodedata.normalize(self.unicode, text)
        if self.lowercase:
            text = text.lower() if self.unicode == "none" else unicodedata.normalize(self.unicode, text.lower())
        if self.whitespace:
            text = tidy_spaces(text)
        return text.strip() if self.strip else text


class Redact(CleaningStep):
    """Personal data becomes placeholders such as ``<EMAIL>``; counted by kind.

    Args:
        kinds: What to look for: email, phone, card, iban, ip and key; null for all.
        country: Whose phone numbers may stand without a country code: two letters, such as GB; null for US.

    Raises:
        ConfigError: The country is unknown or of no use, or a package is missing.
    """

    name = "redact"

    def __init__(self, *, kinds: list[Kind] | None = None, country: str | None = None) -> None:
        super().__init__()
        self.kinds: Collection[Kind] = KINDS if kinds is None else kinds
        self.country = country or "US"
        if not self.kinds:
            raise ConfigError("data.cleaning: redact.kinds is empty; name some kinds, or leave the step out")
        if "phone" not in self.kinds and country is not None:
            raise ConfigError("data.cleaning: redact.country is for phone numbers only; add phone to redact.kinds, or leave country out")
        if "phone" in self.kinds and self.country not in clean_package("phonenumbers").SUPPORTED_REGIONS:
            raise ConfigError(f"data.cleaning: redact.country {country!r} is unknown; use two capital letters, such as GB")

    def clean(self, conversation: Conversation) -> Conversation:
        """Redact every message, and what the record says beside them."""
        labels = {name: self._redact(value) for name, value in conversation.labels.items()}
        return replace(_map_contents(conversation, self._redact), labels=labels)

    def _redact(self, text: str) -> str:
        text, counts = redact(text, kinds=self.kinds, country=self.country)
        self.counts.update(counts)
        return text


class Words(CleaningStep):
    """Words of the user's own list: whole words in any case; in scripts without spaces (and Hangul) anywhere.

    Args:
        words: Words or phrases.
        file: A UTF-8 file of more of them, one a line.
        action: ``drop`` the conversation, ``mask`` the word by ``***``, or ``flag``: the label ``flagged`` holds the first
            word found. Rejected messages are masked too, but neither dropped nor flagged for: they are bad on purpose.

    Raises:
        ConfigError: There are no words, or the file cannot be read.
    """

    name = "words"

    def __init__(
        self, *, words: list[str] | None = None, file: str | None = None, action: Literal["drop", "mask", "flag"] = "drop"
    ) -> None:
        super().__init__()
        self.action = action
        entries = word_entries([*(words or []), *(read_word_lines(file, setting="data.cleaning: words.file") if file else [])])
        if not entries:
            raise ConfigError("data.cleaning: words has no words to look for; give it words: [..] or file: PATH")
        self._pattern = words_pattern(entries)

    def clean(self, conversation: Conversation) -> Conversation | None:
        """Mask the words, or look for the first one."""
        if self.action == "mask":
            return _map_contents(conversation, self._mask)
        found = next((match for m in conversation.messages if (match := self._pattern.search(m.content))), None)
        if found is None:
            return conversation
        return None if self.action == "drop" else _label(self, conversation, "flagged", " ".join(found[0].lower().split()))

    def _mask(self, text: str) -> str:
        text, n = self._pattern.subn("***", text)
        if n:
            self.counts["masked"] += n
        return text


class Language(CleaningStep):
    """Keeps conversations in the languages asked for, and labels them with their ``language``.

    Source: Lui and Baldwin 2012, langid.py, in the version of py3langid.

    Args:
        keep: Codes of languages, such as en.
        min_probability: How sure it must be, of 1; below, the conversation is dropped.
        min_chars: What user and assistant must have said, in characters, for a language to be told; shorter conversations
            are kept without a label.

    Raises:
        ConfigError: A language is unknown, the probability is not in [0, 1], or py3langid is not installed.
    """

    name = "language"

    def __init__(self, *, keep: list[str], min_probability: float = 0.8, min_chars: int = 20) -> None:
        super().__init__()
        self.keep = frozenset(keep)
        self.min_probability = min_probability
        self.min_chars = min_chars
        if not keep:
            raise ConfigError("data.cleaning: language.keep is empty; name the languages to keep, such as [en]")
        if not 0 <= min_probability <= 1:
            raise ConfigError(f"data.cleaning: language.min_probability must be from 0 to 1, not {min_probability}")
        for code in keep:
            if code not in _identifier().labels:
                raise ConfigError(f"data.cleaning: language.keep {code!r} is no language; {nearest(code, sorted(_identifier().labels))}")

    def clean(self, conversation: Conversation) -> Conversation | None:
        """Tell the language of what user and assistant say."""
        text = "\n".join(m.content for m in conversation.messages if m.role in ("user", "assistant"))
        if len(text) < self.min_chars:
            self.counts["too_short_to_tell"] += 1
            return conversation
        code, probability = _identifier().classify(text)
        if code not in self.keep or probability < self.min_probability:
            return None
        return replace(conversation, labels={**conversation.labels, "language": code})


class Length(CleaningStep):
    """Drops conversations that are too short or too long.

    Args:
        min_chars: The fewest characters of all messages together; null for no bound, as for the others.
        max_chars: The most.
        min_turns: The fewest messages of user and assistant together.
        max_turns: The most.

    Raises:
        ConfigError: No bound is given, or no length is within them.
    """

    name = "length"

    def __init__(
        self,
        *,
        min_chars: int | None = None,
        max_chars: int | None = None,
        min_turns: int | None = None,
        max_turns: int | None = None,
    ) -> None:
        super().__init__()
        self._bounds = {"chars": (min_chars, max_chars), "turns": (min_turns, max_turns)}
        if not any(bound is not None for bounds in self._bounds.values() for bound in bounds):
            raise ConfigError("data.cleaning: length has no bound; give it min_chars, max_chars, min_turns or max_turns")
        for unit, (low, high) in self._bounds.items():
            if high is not None and high < max(low or 0, 1):
                raise ConfigError(f"data.cleaning: length.max_{unit} {high} keeps nothing; raise it above length.min_{unit} ({low or 0})")

    def clean(self, conversation: Conversation) -> Conversation | None:
        """Measure the conversation."""
        turns = sum(m.role in ("user", "assistant") for m in conversation.messages)
        for unit, length in (("chars", sum(len(m.content) for m in conversation.messages)), ("turns", turns)):
            low, high = self._bounds[unit]
            if (low is not None and length < low) or (high is not None and length > high):
                return None
        return conversation


class Refusals(CleaningStep):
    """Finds conversations in which the assistant refuses with a formula, in English; rejected messages may.

    Args:
        patterns: More regular expressions to look for in what the assistant says, in any case, apostrophes being straight.
        action: ``drop`` the conversation, or ``flag`` it: the label ``refusal`` holds the formula.

    Raises:
        ConfigError: A pattern is no regular expression.
    """

    name = "refusals"

    def __init__(self, *, patterns: list[str] | None = None, action: Literal["drop", "flag"] = "drop") -> None:
        super().__init__()
        self.action = action
        for pattern in patterns or []:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"data.cleaning: refusals.patterns: {pattern!r} is no regular expression ({error}); mend it") from None
        self._patterns = [re.compile(pattern, re.IGNORECASE) for pattern in (*_REFUSALS, *(patterns or []))]

    def clean(self, conversation: Conversation) -> Conversation | None:
        """Look for a formula in what the assistant says."""
        for message in conversation.messages:
            if message.role != "assistant":
                continue
            text = re.sub("[\u2018\u2019\u02bc]", "'", message.content)
            found = next((match for pattern in self._patterns if (match := pattern.search(text))), None)
            if found is not None:
                return None if self.action == "drop" else _label(self, conversation, "refusal", found[0])
        return conversation


class Function(CleaningStep):
    """A user's own function ``(conversation, **init_args) -> Conversation | None``.

    Args:
        class_path: Its dotted path.
        init_args: What else it is given.

    Raises:
        ConfigError: There is no such function, or it does not take these arguments.
    """

    def __init__(self, *, class_path: str, init_args: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.name = class_path
        self._function = find_function(class_path, setting="data.cleaning")
        self._arguments = dict(init_args or {})
        check_arguments(self._function, None, setting=f"data.cleaning: {class_path}", **self._arguments)

    def clean(self, conversation: Conversation) -> Conversation | None:
        """Call the function.

        Raises:
            DataError: It returns something else than a conversation or None.
        """
        cleaned = self._function(conversation, **self._arguments)
        if cleaned is not None and not isinstance(cleaned, Conversation):
            raise DataError(f"data.cleaning: {self.name} returned a {type(cleaned).__name__}; return a Conversation, or None to drop it")
        return cleaned


_STEPS: dict[str, type[CleaningStep]] = {step.name: step for step in (Normalise, Redact, Words, Language, Length, Refusals)}
_DUPLICATES = "duplicates"
_FUNCTION = "class_path"


def build_cleaning(steps: Sequence[str | Mapping[str, Any]]) -> list[CleaningStep]:
    """Build the steps that ``data.cleaning`` names.

    Args:
        steps: Names, or mappings of one name to its settings: ``["normalise", {"length": {"max_chars": 4000}}]``; a user's own
            function as ``{"class_path": "my_package.function", "init_args": {...}}``. Without ``duplicates``; see
            :func:`split_duplicates`.

    Returns: the steps, in the order given.

    Raises:
        ConfigError: A step or setting is unknown or cannot be used, or a package is not installed.
    """
    built: list[CleaningStep] = []
    for name, settings in map(_name_and_settings, steps):
        if name == _DUPLICATES:
            raise ConfigError("data.cleaning: duplicates compares conversations with each other and cannot be a step here; leave it out")
        step = Function if name == _FUNCTION else _STEPS[name]
        built.append(step(**check_settings(f"data.cleaning: {name}", settings, step)))
    return built


def split_duplicates(steps: Sequence[str | Mapping[str, Any]]) -> tuple[list[str | Mapping[str, Any]], DuplicateSettings | None]:
    """Take ``duplicates`` out of the steps: it compares conversations with each other, which no step can.

    Returns: the other steps, and how duplicates are found; None where they stay.

    Raises:
        ConfigError: It is not the last step, or its settings cannot be used.
    """
    places = [i for i, step in enumerate(steps) if _name_and_settings(step)[0] == _DUPLICATES]
    if not places:
        return list(steps), None
    if places != [len(steps) - 1]:
        raise ConfigError(
            f"data.cleaning: duplicates is step {places[0] + 1} of {len(steps)}; "
            "name it once and last, so that conversations are compared as they will be trained on"
        )
    settings = _name_and_settings(steps[-1])[1]
    return list(steps[:-1]), DuplicateSettings(**check_settings("data.cleaning: duplicates", settings, DuplicateSettings))


def _name_and_settings(step: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    if isinstance(step, Mapping) and _FUNCTION in step:
        return _FUNCTION, dict(step)
    if isinstance(step, Mapping) and len(step) == 1:
        [(name, settings)] = step.items()
    else:
        name, settings = cast(str, step), None
    if not isinstance(name, str):
        raise ConfigError(f"data.cleaning: {step!r} is no step; write a name, or a mapping of one name to its settings")
    if name not in _STEPS and name != _DUPLICATES:
        raise ConfigError(f"data.cleaning: {name!r} is no step; {nearest(name, [*_STEPS, _DUPLICATES, _FUNCTION])}")
    if settings is not None and not isinstance(settings, Mapping):
        raise ConfigError(f"data.cleaning: {name} takes settings by name, not {settings!r}; write {name}: {{setting: value}}")
    return name, dict(settings or {})


def _is_emptied(before: Conversation, after: Conversation) -> bool:
    blank = [Counter(m for m in (*c.messages, *c.rejected) if not m.content.strip()) for c in (before, after)]
    spoke = [any(m.role == "assistant" for m in c.messages) for c in (before, after)]
    return bool(blank[1] - blank[0]) or (spoke[0] and not spoke[1])


def _map_contents(conversation: Conversation, function: Callable[[str], str]) -> Conversation:
    def mapped(messages: tuple[Message, ...]) -> tuple[Message, ...]:
        return tuple(replace(m, content=function(m.content)) for m in messages)

    return replace(conversation, messages=mapped(conversation.messages), rejected=mapped(conversation.rejected))


def _label(step: CleaningStep, conversation: Conversation, name: str, value: str) -> Conversation:
    step.counts["flagged"] += 1
    return replace(conversation, labels={**conversation.labels, name: value})


@cache
def _identifier() -> Any:
    langid = clean_package("py3langid.langid")
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
