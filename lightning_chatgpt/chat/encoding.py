"""Conversations to token ids and loss weights.

Ids and weights are built together, piece by piece, so that they cannot disagree: a control token's id is inserted by us,
and text is encoded with every special token switched off, so nothing a user types becomes a control token.

Shapes: an Example's lists all have length T, at most ``max_length``.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_chatgpt.chat.conversation import Conversation, Message
from lightning_chatgpt.chat.jinja import template_of
from lightning_chatgpt.chat.template import Segment, Supervise, Turn, is_learnt, supervised_roles
from lightning_chatgpt.chat.text_encoding import TextEncoder
from lightning_chatgpt.chat.tokenizer import continuation_ids
from lightning_chatgpt.chat.truncation import EncodedTurn, Frame, Truncation, drop_unlearnt_end, fit, total_length
from lightning_chatgpt.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_CHATS_AT_ONCE = 1000  # bounds memory while encoding; the tokenizer's threads are busy from some hundreds on


class Example(NamedTuple):
    """One training example: token ids and, of equal length, the loss weight of each (0: read, not learnt)."""

    input_ids: list[int]
    loss_weights: list[float]


@dataclass(frozen=True, slots=True)
class EncodedChat:
    """What became of one conversation.

    Attributes:
        examples: Its examples, in order: one; with ``split`` one or more; with ``skip`` none where it was too long.
        n_tokens: Tokens of the whole conversation.
        n_supervised: Tokens of it that were to be learnt.
        n_lost: How many of those truncation took away.
        is_cut: Whether a single message lost its middle.
    """

    examples: list[Example]
    n_tokens: int
    n_supervised: int
    n_lost: int
    is_cut: bool

    @property
    def is_truncated(self) -> bool:
        """Whether truncation took something away; a conversation that ``split`` spread over several examples is whole."""
        has_less = len(self.examples) < 2 and sum(len(example.input_ids) for example in self.examples) < self.n_tokens
        return has_less or self.is_cut or self.n_lost > 0


class Encoder:
    """Turns conversations into examples, many at a time.

    Args:
        tokenizer: Carries the template (``chat.tokenizer.set_template``).
        max_length: Tokens an example may have at the most.
        truncation: What happens to a longer conversation. ``drop_oldest`` keeps the system message and the latest whole
            exchanges; ``split`` makes several examples of it, each with the system message; ``skip`` leaves it out; ``error``
            refuses it. With the first two, an exchange that is by itself too long is cut, from the middle of its longest message;
            the end token is never lost.
        supervise: Whose words are learnt: ``assistant``, ``last`` (the assistant's last message), ``all``, or a list of roles.

    Raises:
        ConfigError: ``supervise`` names no role.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        *,
        max_length: int,
        truncation: Truncation = "drop_oldest",
        supervise: Supervise = "assistant",
    ) -> None:
        supervised_roles(supervise)
        self.tokenizer = tokenizer
        self.template = template_of(tokenizer)
        self.max_length = max_length
        self.truncation: Truncation = truncation
        self.supervise = supervise
        self._continuations = continuation_ids(tokenizer)
        self._texts = TextEncoder(tokenizer)
        self._frames: dict[tuple[Segment, ...], Frame] = {}

    def encode(self, conversations: Iterable[Conversation]) -> Iterator[EncodedChat]:
        """Encode conversations for training.

        Yields: what became of each.

        Raises:
            DataError: The template cannot write one of them, one is too long under ``error``, or ``max_length`` leaves no room.
        """
        for (chat,) in self._encode_ways(conversations, [self.truncation]):
            yield chat

    def compare(self, conversations: Iterable[Conversation], policies: Sequence[Truncation]) -> Iterator[dict[str, EncodedChat]]:
        """What each way of truncation would make of each conversation."""
        for chats in self._encode_ways(conversations, policies):
            yield dict(zip(policies, chats, strict=True))

    def turns(self, conversation: Conversation) -> list[EncodedTurn]:
        """A conversation's messages as token ids, however long it is."""
        written = self._write(conversation)
        return self._encode_turns(conversation.messages, written, self._encode_texts(turn.content for turn in written))

    def encode_prompt(self, conversation: Conversation) -> list[int]:
        """Encode a conversation up to where the assistant is about to speak; the oldest exchanges are left out to fit.

        The ids are a prefix of what :meth:`encode` gives for the conversation with any reply added.
        """
        messages = conversation.messages
        written, opening = self.template.write_prompt(messages)
        turns = self._encode_turns(messages, written, self._encode_texts(turn.content for turn in written))
        opening_ids = self._frame(opening).ids

        def rewrite(window: list[EncodedTurn]) -> list[EncodedTurn]:
            chosen = [messages[turn.number] for turn in window]
            return self._with_contents(self.template.write_prompt(chosen)[0], window)

        (window,) = self._windows(turns, max_length=self.max_length - len(opening_ids), truncation="drop_oldest", rewrite=rewrite)
        return [*chain.from_iterable(turn.ids() for turn in window), *opening_ids]

    def _encode_ways(self, conversations: Iterable[Conversation], ways: Sequence[Truncation]) -> Iterator[list[EncodedChat]]:
        rest = iter(conversations)
        while chats := list(islice(rest, _CHATS_AT_ONCE)):
            with _garbage_kept():
                written = [self._write(chat) for chat in chats]
                ids_of = self._encode_texts(turn.content for turns in written for turn in turns)
                encoded = []
                for chat, turns in zip(chats, written, strict=True):
                    encoded_turns = self._encode_turns(chat.messages, turns, ids_of)
                    encoded.append([self._encode_chat(chat, encoded_turns, way) for way in ways])
            yield from encoded

    def _encode_chat(self, chat: Conversation, turns: list[EncodedTurn], truncation: Truncation) -> EncodedChat:
        n_tokens = total_length(turns)
        n_supervised = sum(turn.n_supervised for turn in turns)
        if n_tokens <= self.max_length:
            windows = [turns]
        elif truncation == "error":
            raise DataError(
                f"{chat.id}: {n_tokens} tokens are more than data.max_length {self.max_length}; raise it, or set data.truncation to "
                "drop_oldest, split or skip"
            )
        elif truncation == "skip":
            windows = []
        else:

            def rewrite(window: list[EncodedTurn]) -> list[EncodedTurn]:
                chosen = [chat.messages[turn.number] for turn in window]
                return self._with_contents(self.template.write(chosen), window)

            turns = drop_unlearnt_end(turns, max_length=self.max_length)
            try:
                windows = self._windows(turns, max_length=self.max_length, truncation=truncation, rewrite=rewrite)
            except DataError as error:
                raise DataError(f"{chat.id}: {error}") from None
        is_whole = len(windows) == 1 and windows[0] is turns
        n_kept = n_supervised if is_whole else sum(turn.n_supervised for window in windows for turn in window)
        return EncodedChat(
            [_to_example(window) for window in windows],
            n_tokens=n_tokens,
            n_supervised=n_supervised,
            n_lost=max(0, n_supervised - n_kept),
            is_cut=not is_whole and any(turn.is_cut for window in windows for turn in window),
        )

    def _windows(self, turns: list[EncodedTurn], *, max_length: int, truncation: Truncation, rewrite: Any) -> list[list[EncodedTurn]]:
        room = max_length
        while True:
            windows = fit(turns, max_length=room, truncation=truncation, continuations=self._continuations)
            if self.template.is_additive or windows[0] is turns:
                return windows
            # A template may write what is left differently, such as a default system message in place of the first.
            windows = [rewrite(window) for window in windows]
            excess = max(map(total_length, windows)) - max_length
            if excess <= 0:
                return windows
            room -= excess

    def _write(self, chat: Conversation) -> list[Turn]:
        try:
            return self.template.write(chat.messages)
        except DataError as error:
            raise DataError(f"{chat.id}: {error}") from None

    def _encode_texts(self, texts: Iterable[str]) -> dict[str, list[int]]:
        distinct = [text for text in dict.fromkeys(texts) if text]
        return {"": [], **dict(zip(distinct, self._texts.encode(distinct), strict=True))}

    def _encode_turns(self, messages: Sequence[Message], turns: list[Turn], ids_of: dict[str, list[int]]) -> list[EncodedTurn]:
        learnt = is_learnt(messages, self.supervise)
        frames = self._frames
        encoded = []
        for number, (message, turn, learns) in enumerate(zip(messages, turns, learnt, strict=True)):
            before = frames.get(turn.before) or self._frame(turn.before)
            after = frames.get(turn.after) or self._frame(turn.after)
            weight = float(message.weight) if learns else 0.0
            encoded.append(EncodedTurn(turn.role, number, weight, ids_of[turn.content], before, after))
        return encoded

    def _with_contents(self, written: list[Turn], window: list[EncodedTurn]) -> list[EncodedTurn]:
        """New markers around contents that are encoded already and may have been cut."""
        pairs = zip(written, window, strict=True)
        return [replace(old, before=self._frame(turn.before), after=self._frame(turn.after)) for turn, old in pairs]

    def _frame(self, segments: tuple[Segment, ...]) -> Frame:
        """What stands on one side of a content, encoded."""
        if segments not in self._frames:
            texts = self._encode_texts(segment.text for segment in segments if not segment.is_control)
            ids: list[int] = []
            weights: list[float] = []
            for segment in segments:
                piece: Any = self.tokenizer.convert_tokens_to_ids([segment.text]) if segment.is_control else texts[segment.text]
                ids += piece
                weights += [float(segment.is_learnt)] * len(piece)
            self._frames[segments] = Frame(ids, weights, int(sum(weights)))
        return self._frames[segments]


@contextmanager
def _garbage_kept() -> Iterator[None]:
    """Without the search for cycles: there are none among millions of small lists, and looking took a third of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _to_example(turns: list[EncodedTurn]) -> Example:
    ids: list[int] = []
    weights: list[float] = []
    for turn in turns:
        ids += turn.before.ids
        ids += turn.content
        ids += turn.after.ids
        weights += turn.weights()
    return Example(ids, weights)
