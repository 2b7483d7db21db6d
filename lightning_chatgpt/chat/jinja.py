"""Any Jinja chat template as a :class:`~lightning_chatgpt.chat.template.Template`.

transformers encodes what a Jinja template renders in one piece, so that a user who types a control token gets one. Here the
template is rendered with a mark in place of each content; what stands around the marks is the template's own and may hold
control tokens, and the contents are put back as plain text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_chatgpt.chat.conversation import Message
from lightning_chatgpt.chat.deadline import TookTooLong, within
from lightning_chatgpt.chat.template import Segment, Template, Turn, framed_template
from lightning_chatgpt.errors import ConfigError, DataError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SECONDS = 2  # any real one takes less than a thousandth of it
_MARK = re.compile("\ue0f0(\\d+)\ue0f1")
TOKEN_IN_TEMPLATE = re.compile(r"<\|[\w.-]+\|>")  # how nearly all templates write their control tokens
STOP_PROBE = (Message("user", "Hello"), Message("assistant", "Hi"))


def template_of(tokenizer: PreTrainedTokenizerFast) -> Template:
    """The template that a tokenizer carries.

    Raises:
        ConfigError: It carries none, or one that cannot be used.
    """
    jinja: Any = tokenizer.chat_template
    if isinstance(jinja, dict):
        jinja = jinja.get("default") or next(iter(jinja.values()))
    if not jinja:
        raise ConfigError("the tokenizer carries no chat template; set data.template to chatml or plain")
    eos_token: Any = tokenizer.eos_token
    return framed_template(jinja, eos_token) or JinjaTemplate(jinja, tokenizer)


def read_template(path: str) -> str:
    """A user's template file.

    Raises:
        ConfigError: There is no such file.
    """
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        hint = nearest(path, ["chatml", "plain", "tokenizer"])
        raise ConfigError(f"data.template {path}: cannot be read ({reason}); {hint}, or name a Jinja file") from None


class JinjaTemplate(Template):
    """A Jinja template, taken apart.

    Args:
        jinja: The template's text.
        tokenizer: Knows which pieces of text are control tokens.

    Raises:
        ConfigError: Its assistant messages end with no control token, or it cannot be rendered at all.
    """

    name = "the Jinja template"
    is_additive = False

    def __init__(self, jinja: str, tokenizer: PreTrainedTokenizerFast) -> None:
        self.jinja = jinja
        self.variables = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
        control = sorted({str(token) for token in tokenizer.all_special_tokens}, key=len, reverse=True)
        self._control = re.compile("(" + "|".join(map(re.escape, control)) + ")") if control else re.compile("(?!)()")
        self._says_what_is_learnt = re.search(r"{%-?\s*generation\s*-?%}", jinja) is not None
        try:
            *_, last = self.write(STOP_PROBE)
        except DataError as error:
            raise ConfigError(f"data.template: {error}") from None
        stops = [segment.text for segment in last.after if segment.is_control and segment.is_learnt]
        if not stops:
            after = "".join(segment.text for segment in last.after)
            raise ConfigError(
                f"data.template: no control token that is learnt ends a reply (after it comes {after!r}), so the model would never stop; "
                "end assistant messages with eos_token or a <|token|>, inside {% generation %} where there is one"
            )
        self.stop_token = stops[0]

    def write(self, messages: Sequence[Message]) -> list[Turn]:
        """Write messages down, one turn each.

        Raises:
            DataError: The template refuses, leaves out, repeats or changes a message.
        """
        turns, tail = self._write(messages, is_prompt=False)
        *rest, last = turns
        return [*rest, last._replace(after=last.after + tail)]

    def write_prompt(self, messages: Sequence[Message]) -> tuple[list[Turn], tuple[Segment, ...]]:
        """Write messages down, and what stands before the assistant's reply to them."""
        return self._write(messages, is_prompt=True)

    def _write(self, messages: Sequence[Message], *, is_prompt: bool) -> tuple[list[Turn], tuple[Segment, ...]]:
        for i, message in enumerate(messages):
            if message.name and self._control.search(message.name):
                raise DataError(f"message {i + 1}: the name {message.name!r} spells a control token; take another name")
        marked = [{**message.to_dict(), "content": f"\ue0f0{i}\ue0f1"} for i, message in enumerate(messages)]
        text, learnt = self._render(marked, is_prompt=is_prompt, wants_spans=self._says_what_is_learnt)
        places = [(int(found[1]), found.span()) for found in _MARK.finditer(text)]
        for i, message in enumerate(messages):
            n_found = sum(number == i for number, _ in places)
            if n_found != 1:
                how = "leaves out" if not n_found else "repeats"
                raise DataError(f"the template {how} message {i + 1} ({message.role}: {message.content[:40]!r}); take another template")
        if [number for number, _ in places] != list(range(len(messages))):
            raise DataError("the template changes the order of the messages; take another template")
        spans = [span for _, span in places]
        contents = self._contents_as_rendered(messages, text, spans, is_prompt=is_prompt)
        if not self._says_what_is_learnt:
            learnt = self._learnt_by_difference(messages, marked, text, spans)
        # Between two contents, the first control token, or what is learnt together with the content, closes the one; the rest opens
        # the other.
        turns: list[Turn] = []
        edges = [0]
        for i, (start, end) in enumerate(spans):
            following = spans[i + 1][0] if i + 1 < len(spans) else len(text)
            closing = self._control.search(text, end, following)
            learnt_until = max((b for a, b in learnt if a <= start and end <= b <= following), default=end)
            edges += [start, end, max(learnt_until, closing.end() if closing else end)]
        for i, message in enumerate(messages):
            before = self._segments(text, edges[3 * i], edges[3 * i + 1], learnt)
            after = self._segments(text, edges[3 * i + 2], edges[3 * i + 3], learnt)
            turns.append(Turn(message.role, before, contents[i], after))
        return turns, self._segments(text, edges[-1], len(text), [])

    def _render(
        self, messages: Sequence[dict[str, Any]], *, is_prompt: bool, wants_spans: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        function: Any = render_jinja_template
        render = partial(
            function,
            conversations=[list(messages)],
            chat_template=self.jinja,
            return_assistant_tokens_mask=wants_spans,
            add_generation_prompt=is_prompt,
            **self.variables,
        )
        try:
            rendered, spans = within(_SECONDS, render)
        except TookTooLong:
            raise DataError(
                f"the template takes more than {_SECONDS} s to write a conversation of {len(messages)} messages; take another template"
            ) from None
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError) as error:
            line = getattr(error, "lineno", None)
            place = f" (line {line})" if line else ""
            raise DataError(f"the template cannot write this conversation{place}: {' '.join(str(error).split())}") from None
        return rendered[0], list(spans[0]) if wants_spans else []

    def _contents_as_rendered(
        self, messages: Sequence[Message], text: str, spans: Sequence[tuple[int, int]], *, is_prompt: bool
    ) -> list[str]:
        """The contents as the template writes them: as they are, or with blanks stripped where it strips them."""
        real, _ = self._render([message.to_dict() for message in messages], is_prompt=is_prompt)
        pieces = [text[a:b] for a, b in zip([0, *(end for _, end in spans)], [*(start for start, _ in spans), len(text)], strict=True)]
        as_written = [message.content for message in messages]
        for contents in (as_written, [content.strip() for content in as_written]):
            if real == "".join(piece + content for piece, content in zip(pieces, [*contents, ""], strict=True)):
                return contents
        # One by one: some templates strip only some roles, or the last message.
        contents = []
        rest = real
        for i, content in enumerate(as_written):
            rest = rest.removeprefix(pieces[i])
            begins = pieces[i + 1][:1]
            ways = (content, content.lstrip(), content.rstrip(), content.strip())
            taken = next((way for way in ways if rest.startswith(way + begins)), None)
            if taken is None:
                raise DataError(f"the template changes what message {i + 1} says ({content[:40]!r}); take one that does not")
            contents.append(taken)
            rest = rest[len(taken) :]
        if rest != pieces[-1]:
            raise DataError("the template writes something else, depending on what a message says; take one that does not")
        return contents

    def _learnt_by_difference(
        self, messages: Sequence[Message], marked: Sequence[dict[str, Any]], text: str, spans: Sequence[tuple[int, int]]
    ) -> list[tuple[int, int]]:
        """What the assistant has to write: from where its prompt ends to the control token that ends its reply."""
        learnt = []
        for i, message in enumerate(messages):
            start, end = spans[i]
            if message.role == "assistant":
                prompt, _ = self._render(marked[:i], is_prompt=True) if i else ("", [])
                if not text.startswith(prompt):
                    raise DataError(
                        f"the template's prompt is not how its full text begins: {difference(prompt, text)}; "
                        "mark what is learnt with {% generation %}, or take another template"
                    )
                start = len(prompt) if i and len(prompt) <= start else start
            following = spans[i + 1][0] if i + 1 < len(spans) else len(text)
            closing = self._control.search(text, end, following)
            learnt.append((start, closing.end() if closing else end))
        return learnt

    def _segments(self, text: str, start: int, end: int, learnt: Sequence[tuple[int, int]]) -> tuple[Segment, ...]:
        cuts = sorted({start, end, *(cut for span in learnt for cut in span if start < cut < end)})
        segments = []
        for a, b in pairwise(cuts):
            is_learnt = any(first <= a and b <= last for first, last in learnt)
            for piece in self._control.split(text[a:b]):
                if piece:
                    segments.append(Segment(piece, is_control=self._control.fullmatch(piece) is not None, is_learnt=is_learnt))
        return tuple(segments)


def difference(prompt: str, full: str) -> str:
    """Where two texts part, for a message."""
    prompt, full = _MARK.sub("…", prompt), _MARK.sub("…", full)
    place = next((i for i, (a, b) in enumerate(zip(prompt, full, strict=False)) if a != b), min(len(prompt), len(full)))
    return f"{prompt[max(0, place - 20) : place + 20]!r} against {full[max(0, place - 20) : place + 20]!r}"
