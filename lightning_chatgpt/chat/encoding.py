"""Segments to token ids and loss weights.

Ids and weights are built together, piece by piece, so that they cannot disagree: a control token's id is inserted by us,
and text is encoded with every special token switched off, so nothing a user types becomes a control token.

Shapes: an Example's lists all have length T, at most ``max_length``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lightning_chatgpt.chat.conversation import Conversation
from lightning_chatgpt.chat.template import Segment, Supervise, message_segments, reply_segments
from lightning_chatgpt.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Truncation = Literal["drop_oldest", "split"]

_CHATS_AT_ONCE = 1000  # bounds memory while encoding; the tokenizer's threads are busy from some hundreds on


class Example(NamedTuple):
    """One training example: token ids and, of equal length, the loss weight of each (0: read, not learnt)."""

    input_ids: list[int]
    loss_weights: list[float]


@dataclass(slots=True)
class _Piece:
    ids: list[int]
    weight: float
    is_content: bool


@dataclass(slots=True)
class _Turn:
    """One encoded message."""

    role: str
    pieces: list[_Piece]

    def __len__(self) -> int:
        return sum(len(piece.ids) for piece in self.pieces)

    @property
    def is_learnt(self) -> bool:
        """Whether any of its tokens counts in the loss."""
        return any(piece.weight for piece in self.pieces)


def encode_conversations(
    conversations: Sequence[Conversation],
    *,
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
    truncation: Truncation = "drop_oldest",
    supervise: Supervise = "assistant",
) -> Iterator[list[Example]]:
    """Encode conversations for training.

    Args:
        conversations: What to encode.
        tokenizer: Has the chat's control tokens (``chat.tokenizer.add_chat_tokens``).
        max_length: Tokens an example may have at the most.
        truncation: What happens to a longer conversation. ``drop_oldest`` keeps the system message and the latest whole
            exchanges; ``split`` makes several examples of it, each with the system message. Only an exchange that is by
            itself too long is cut, from the middle of its longest message; the end token is never lost.
        supervise: Whose words are learnt.

    Yields: for each conversation its examples, in order: one, or with ``split`` one or more.
    """
    for start in range(0, len(conversations), _CHATS_AT_ONCE):
        chats = conversations[start : start + _CHATS_AT_ONCE]
        written = [(message.role, message_segments(message, supervise=supervise)) for chat in chats for message in chat.messages]
        turns = iter(_encode_turns(written, tokenizer))
        for chat in chats:
            chat_turns = [next(turns) for _ in chat.messages]
            # What comes after the last word that is learnt teaches nothing, and would push out what does.
            while len(chat_turns) > 1 and not chat_turns[-1].is_learnt and sum(map(len, chat_turns)) > max_length:
                chat_turns.pop()
            windows = _fit(chat_turns, max_length=max_length, truncation=truncation)
            yield [_to_example(window) for window in windows]


def encode_prompt(conversation: Conversation, *, tokenizer: PreTrainedTokenizerFast, max_length: int) -> list[int]:
    """Encode a conversation up to where the assistant is about to speak.

    The ids are a prefix of what :func:`encode_conversations` gives for the conversation with any reply added.

    Args:
        conversation: What was said so far.
        tokenizer: Has the chat's control tokens.
        max_length: Tokens the prompt may have at the most; the oldest exchanges are left out to fit.
    """
    written = [(message.role, message_segments(message)) for message in conversation.messages]
    *turns, opening = _encode_turns([*written, ("assistant", reply_segments())], tokenizer)
    (window,) = _fit(turns, max_length=max_length - len(opening), truncation="drop_oldest")
    return _to_example([*window, opening]).input_ids


def _encode_turns(written: Sequence[tuple[str, list[Segment]]], tokenizer: PreTrainedTokenizerFast) -> list[_Turn]:
    texts = list({s.text: None for _, segments in written for s in segments if not s.is_control and s.text})
    encoded = (
        tokenizer(texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False)["input_ids"] if texts else []
    )
    ids_of_text = dict(zip(texts, encoded, strict=True))
    ids_of_text[""] = []

    def piece(segment: Segment) -> _Piece:
        ids: Any = tokenizer.convert_tokens_to_ids([segment.text]) if segment.is_control else ids_of_text[segment.text]
        return _Piece(ids, segment.weight, segment.is_content)

    return [_Turn(role, [piece(segment) for segment in segments]) for role, segments in written]


def _fit(turns: list[_Turn], *, max_length: int, truncation: Truncation) -> list[list[_Turn]]:
    """Cut a conversation's turns into windows of at most ``max_length`` tokens, between whole exchanges."""
    if sum(map(len, turns)) <= max_length:
        return [turns]
    n_system = next((i for i, turn in enumerate(turns) if turn.role != "system"), len(turns))
    system = _shorten(turns[:n_system], max_length=max_length - max_length // 4)  # leaves the exchanges some room
    room = max_length - sum(map(len, system))
    exchanges = [_shorten(exchange, max_length=room) for exchange in _exchanges(turns[n_system:])]
    windows: list[list[_Turn]] = []
    n_free = 0
    # From the latest backwards, so that with either policy the newest exchanges share a full window.
    for exchange in reversed(exchanges):
        length = sum(map(len, exchange))
        if windows and length <= n_free:
            windows[-1] = exchange + windows[-1]
        elif windows and truncation == "drop_oldest":
            break
        else:
            windows.append(exchange)
            n_free = room
        n_free -= length
    return [system + window for window in reversed(windows)] or [system]


def _exchanges(turns: list[_Turn]) -> list[list[_Turn]]:
    """Group turns into exchanges: what is said to the assistant, and its answer."""
    exchanges: list[list[_Turn]] = []
    for turn in turns:
        starts = turn.role != "assistant" and (not exchanges or exchanges[-1][-1].role == "assistant")
        if starts or not exchanges:
            exchanges.append([])
        exchanges[-1].append(turn)
    return exchanges


def _shorten(turns: list[_Turn], *, max_length: int) -> list[_Turn]:
    """Cut the middle out of the longest contents until the turns fit."""
    excess = sum(map(len, turns)) - max_length
    while excess > 0:
        pieces = (piece for turn in turns for piece in turn.pieces if piece.is_content)
        longest = max(pieces, key=lambda piece: len(piece.ids), default=None)
        if longest is None or len(longest.ids) < 2:
            raise DataError(f"max_length is too short by {excess} tokens for a message's own markers and the system message; raise it")
        n_kept = max(len(longest.ids) - excess, len(longest.ids) // 2)
        excess -= len(longest.ids) - n_kept
        n_head = (n_kept + 1) // 2
        longest.ids = longest.ids[:n_head] + longest.ids[len(longest.ids) - (n_kept - n_head) :]
    return turns


def _to_example(turns: list[_Turn]) -> Example:
    pieces = [piece for turn in turns for piece in turn.pieces]
    return Example(
        list(chain.from_iterable(piece.ids for piece in pieces)),
        list(chain.from_iterable([piece.weight] * len(piece.ids) for piece in pieces)),
    )
