"""Reads a JSON document record by record in bounded memory: an array of any length, or an object that holds one.

Knows neither files nor faults: bytes come from a function, and what is wrong is said by :class:`JsonFault` or left to the
caller as the record's own bytes. Offsets are in bytes; ``at`` counts characters of the text that is held.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

# Arrays of records are found under these keys of a top-level object.
CONTAINERS = frozenset({"data", "conversations", "dialogs", "dialogues", "chats", "items", "records", "rows", "examples", "train"})

_CHUNK = 1 << 20
_LOOK_AHEAD = 1 << 20  # how much is read to learn what a document is, before its records are read one by one
_SPACE = re.compile(r"[ \t\n\r]*")
# What is left of a literal, a number or an escape where the text ends within it.
_CUT = re.compile(r"|-|-?I\w*|N|Na|t|tr|tru|f|fa|fal|fals|n|nu|nul|\.|[eE][-+]?|u[0-9a-fA-F]{0,4}")
_CUT_LENGTH = 16  # no such rest is longer


class JsonFault(Exception):
    """A document that cannot be read on.

    Attributes:
        kind: A kind of :data:`~lightning_chatgpt.chat.faults.KINDS`.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Item(NamedTuple):
    """A record of a JSON document.

    Attributes:
        number: Which record it is, from 1.
        byte: Where it begins.
        key: Its key where records are the values of an object.
        value: Its value, unless ``raw`` is there.
        raw: Its bytes, where they hold what needs a second look: bytes that are not UTF-8, NUL characters, NaN, a key
            twice, or a number beyond all measure.
    """

    number: int
    byte: int
    key: str | None
    value: Any
    raw: bytes | None


class Decoder:
    """Python's JSON decoder, which also tells what is no JSON and what would get lost.

    Attributes:
        repeated: Keys that an object has twice, since :meth:`clear`.
        constants: NaN and infinities, since :meth:`clear`.
        strict: Decodes JSON.
        lenient: Decodes control characters and integers of any length too, to find where a record ends.
    """

    def __init__(self) -> None:
        self.repeated: list[str] = []
        self.constants: list[str] = []
        self.strict = json.JSONDecoder(object_pairs_hook=self._pairs, parse_constant=self.constants.append)
        self.lenient = json.JSONDecoder(strict=False, parse_int=len, parse_constant=self.constants.append)

    def clear(self) -> None:
        """Forget what was told."""
        self.repeated.clear()
        self.constants.clear()

    def _pairs(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            keys = [key for key, _ in pairs]
            self.repeated += [key for key in made if keys.count(key) > 1]
        return made


def ends_early(error: json.JSONDecodeError) -> bool:
    """Whether a text is broken JSON only in that it ends too early."""
    return error.msg.startswith("Unterminated string") or _CUT.fullmatch(error.doc[error.pos :].strip()) is not None


def holds_records(key: object, first: object) -> bool:
    """Whether an array is one of records, by its key and its first element; an array of messages is not."""
    if isinstance(first, dict):
        return key in CONTAINERS and not first.keys() & {"role", "from", "speaker"}
    return key in CONTAINERS and isinstance(first, list)


class JsonStream:
    """The records of a JSON document.

    A top-level array holds records; so does an object whose values are all objects, and one with an array of records
    under one of :data:`CONTAINERS`. Any other value is one record.

    Args:
        read: Gives up to so many bytes, none at the end.
        start: The offset of the first byte it gives.
        limit: How many characters a record may have.
        unit: What offsets count, put behind them in messages, such as ``" of the uncompressed text"``.

    Attributes:
        number: Which record is at hand, from 1.
        begin: The byte where it begins.
    """

    def __init__(self, read: Callable[[int], bytes], *, start: int, limit: int, unit: str = "") -> None:
        self.number = 0
        self.begin = start
        self._read = read
        self._limit = limit
        self._unit = unit
        # Bytes that are not UTF-8 are kept as they are, so that the record they are in can be told, and offsets stay right.
        self._utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._decoder = Decoder()
        self._text = ""
        self._at = 0
        self._byte = start
        self._ended = False
        self._kept = False

    def is_lines(self) -> bool:
        """Whether the document is JSONL in truth: one value on a line, and another behind it on a new line."""
        with self._look_ahead(_LOOK_AHEAD):
            try:
                if not self._peek():
                    return False
                start = self._at
                self._value()
                end = self._at
                return bool(self._peek()) and "\n" in self._text[end : self._at] and "\n" not in self._text[start:end]
            except JsonFault:
                return False

    def records(self) -> Iterator[Item]:
        """Read the records, in order.

        Raises:
            JsonFault: The document is broken or ends too early; the records before that were yielded.
        """
        opening = self._peek()
        if not opening:
            return
        shape = self._shape() if opening == "{" else "record"
        if opening == "[":
            yield from self._elements()
        elif shape == "record":
            self._next()
            yield self._item(None)
        else:
            yield from self._members(shape)
        if self._peek():
            self._next()
            raise self._fault("broken_json", f"more follows behind the end of the JSON, at byte {self._byte}{self._unit}")

    def _elements(self) -> Iterator[Item]:
        self._step()
        if self._peek() == "]":
            return self._step()
        going = True
        while going:
            self._next()
            yield self._item(None)
            going = self._goes_on("]")

    def _members(self, shape: Literal["mapping", "containers"]) -> Iterator[Item]:
        self._step()
        going = True
        while going:
            if shape == "mapping":
                self._next()
            key = self._key()
            if shape == "mapping":
                yield self._item(key)
            elif self._is_container(key):
                yield from self._elements()
            else:
                self._value()
            going = self._goes_on("}")

    def _shape(self) -> Literal["record", "mapping", "containers"]:
        """What the object at hand is, learnt without going on."""
        mapping = True
        with self._look_ahead(self._limit):
            start = self._at
            self._step()
            if self._peek() == "}":
                return "record"
            try:
                going = True
                while going and not (mapping and self._at - start > _LOOK_AHEAD) and self._at - start <= self._limit:
                    key = self._key()
                    mapping = self._peek() in ("{", "") and mapping
                    if self._is_container(key):
                        return "containers"
                    self._value()
                    going = self._goes_on("}")
            except JsonFault:
                pass  # told again when the records are read
        return "mapping" if mapping else "record"

    def _is_container(self, key: str) -> bool:
        if key not in CONTAINERS or self._peek() != "[":
            return False
        with self._look_ahead(self._limit):
            self._step()
            opening = self._peek()
            if opening != "{":
                return opening == "["
            try:
                return holds_records(key, self._value()[0])
            except JsonFault:
                return True  # a record that is cut or broken: told again when it is read

    @contextmanager
    def _look_ahead(self, limit: int) -> Iterator[None]:
        """Come back afterwards to where it was; nothing that is read within is given up."""
        if not self._kept:
            self._text, self._at = self._text[self._at :], 0
        before = self._at, self._byte, self.number, self.begin, self._limit, self._kept
        self._kept, self._limit = True, limit
        try:
            yield
        finally:
            self._at, self._byte, self.number, self.begin, self._limit, self._kept = before

    def _fill(self) -> bool:
        """Read on; False where the end was known already."""
        if self._ended:
            return False
        if not self._kept:
            self._text, self._at = self._text[self._at :], 0
        data = self._read(max(_CHUNK, len(self._text)))  # doubled, so that a long record is not scanned again and again
        self._ended = not data
        self._text += self._utf8.decode(data, final=self._ended)
        return True

    def _peek(self) -> str:
        """The next character that is no white space, which is passed; empty at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            assert space is not None
            self._byte += space.end() - self._at
            self._at = space.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._fill():
                return ""

    def _step(self) -> None:
        self._at += 1
        self._byte += 1

    def _item(self, key: str | None) -> Item:
        self._peek()
        self.begin = self._byte
        return Item(self.number, self.begin, key, *self._value())

    def _next(self) -> None:
        """What comes is another record, or would be."""
        self._peek()
        self.number, self.begin = self.number + 1, self._byte

    def _key(self) -> str:
        if self._peek() not in ('"', ""):
            raise self._fault("broken_json", f"broken JSON at byte {self._byte}{self._unit} (a key in double quotes is expected)")
        key, raw = self._value()
        if self._peek() == ":":
            self._step()
            self._peek()
        elif self._peek():
            raise self._fault("broken_json", f"broken JSON at byte {self._byte}{self._unit} (Expecting ':' delimiter)")
        return str(key) if raw is None else raw.decode("cp1252", errors="replace").strip('"')

    def _goes_on(self, closing: str) -> bool:
        """Pass a comma or what closes the array or object; whether it was a comma."""
        found = self._peek()
        if found in (",", closing) and found:
            self._step()
            return found == ","
        self._next()
        if found:
            expected = f"Expecting ',' or '{closing}'"
            raise self._fault("broken_json", f"broken JSON at byte {self._byte}{self._unit} ({expected})")
        raise JsonFault("truncated_file", f"the file ends at byte {self._byte}{self._unit}, before {closing!r}")

    def _value(self) -> tuple[Any, bytes | None]:
        """The value at hand, or its bytes where they need a second look; goes on behind it."""
        again = False
        try:
            try:
                value, end = self._scan(self._decoder.strict)
            except ValueError as error:
                if isinstance(error, json.JSONDecodeError) and error.doc[error.pos : error.pos + 1] != "\0":
                    raise
                again = True  # a NUL, or an integer that is too long for Python
                value, end = self._scan(self._decoder.lenient)
        except json.JSONDecodeError as error:
            raise self._broken(error) from None
        except RecursionError:
            raise self._fault("broken_json", f"the JSON from byte {self._byte}{self._unit} on is nested too deeply") from None
        text = self._text[self._at : end]
        self._at = end
        again = again or bool(self._decoder.repeated or self._decoder.constants)
        if text.isascii() and not again:
            self._byte += len(text)
            return value, None
        raw = text.encode("utf-8", "surrogateescape")
        self._byte += len(raw)
        return value, raw if again or not _is_utf8(text) else None

    def _scan(self, decoder: json.JSONDecoder) -> tuple[Any, int]:
        while True:
            self._decoder.clear()
            try:
                value, end = decoder.raw_decode(self._text, self._at)
                if end - self._at > self._limit:
                    raise self._too_large()
                # A number may go on in what is not read yet: 1, 12, 1.5, 1e-5.
                if self._ended or not isinstance(value, (int, float)) or len(self._text) - end > _CUT_LENGTH:
                    return value, end
            except json.JSONDecodeError as error:
                near = error.pos > len(self._text) - _CUT_LENGTH or error.msg.startswith("Unterminated string")
                if self._ended or not near:
                    raise
            if len(self._text) - self._at > self._limit:
                raise self._too_large()
            self._fill()

    def _too_large(self) -> JsonFault:
        return self._fault("too_large", f"what begins at byte {self._byte}{self._unit} is longer than {self._limit} characters")

    def _broken(self, error: json.JSONDecodeError) -> JsonFault:
        if self._ended and ends_early(error):
            end = self._byte + _size(self._text[self._at :])
            return JsonFault(
                "truncated_file", f"the file ends at byte {end}{self._unit}, in the middle of what begins at byte {self._byte}"
            )
        byte = self._byte + _size(self._text[self._at : error.pos])
        return self._fault("broken_json", f"broken JSON at byte {byte}{self._unit} ({error.msg})")

    def _fault(self, kind: str, message: str) -> JsonFault:
        return JsonFault(kind, f"{message}; mend it there, for nothing behind it can be read (data.on_fault skip leaves that out)")


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogateescape"))


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a byte that was kept as it was
        return False
    return True
