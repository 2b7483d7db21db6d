"""Records, as they stand in files, to conversations: which schema a record follows, and what it says.

A schema is one function: a record in, its messages out, in OpenAI's format, or None where the record does not follow it.
A user's own is named by its dotted path, or registered as an entry point in the group ``lightning_chatgpt.schemas``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from lightning_chatgpt.chat.conversation import Conversation
from lightning_chatgpt.chat.faults import Faults, SkipRecord
from lightning_chatgpt.chat.plugins import find_function, plugin_names
from lightning_chatgpt.chat.validation import KNOWN_KEYS, check_characters, check_each, check_order
from lightning_chatgpt.errors import ConfigError, DataError, nearest

Schema = Callable[[Any], Any]

ENTRY_POINTS = "lightning_chatgpt.schemas"
_FIELDS = ("messages", "role", "content", "system", "user", "assistant", "weight", "name", "id")
_MESSAGE_FIELDS = ("role", "content", "weight", "name")
_MAX_LABEL_CHARS = 200
_PAIRS = (("question", "answer"), ("user", "assistant"), ("input", "output"), ("human", "gpt"), ("q", "a"))


def _said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _turns(value: Any, role: str) -> list[Any]:
    """Messages where a dataset has either a text or a list of messages."""
    return list(value) if isinstance(value, list) else [_said(role, value)]


def _context(record: Mapping[str, Any], *names: str) -> str:
    return "\n\n".join(str(record[name]) for name in names if record.get(name) not in (None, ""))


def _system(record: Mapping[str, Any]) -> list[Any]:
    return [_said("system", record["system"])] if record.get("system") else []


def _history(record: Mapping[str, Any]) -> list[Any]:
    """Earlier questions, each with its answer."""
    return [_said(role, text) for pair in record.get("history") or [] for role, text in zip(("user", "assistant"), pair, strict=True)]


def openai(record: Any) -> Any:
    """``{"messages": [{"role", "content", "weight", "name", "tool_calls"}, …]}``."""
    if "messages" not in record:
        return None
    messages = record["messages"]
    # A table has no lists of objects in a text column: there they stand as JSON.
    return json.loads(messages) if isinstance(messages, str) and messages.lstrip().startswith("[") else messages


def sharegpt(record: Any) -> Any:
    """``{"conversations": [{"from", "value"}, …], "system"}``."""
    turns = next((record[key] for key in ("conversations", "conversation") if key in record), None)
    if not isinstance(turns, list):
        return turns
    names = {"from": "role", "value": "content"}
    renamed = [{names.get(k, k): v for k, v in turn.items()} if isinstance(turn, Mapping) else turn for turn in turns]
    return [*_system(record), *renamed]


def preference(record: Any) -> Any:
    """``{"prompt", "chosen", "rejected"}``: chosen is what is learnt; rejected is kept for preference tuning."""
    if "chosen" not in record or "rejected" not in record:
        return None
    chosen, rejected = _turns(record["chosen"], "assistant"), _turns(record["rejected"], "assistant")
    # Some data sets repeat the prompt in both.
    repeats_prompt = isinstance(chosen[0], Mapping) and chosen[0].get("role") != "assistant" if chosen else False
    shared = [a == b for a, b in zip(chosen, rejected, strict=False)] if repeats_prompt else []
    n_shared = shared.index(False) if False in shared else len(shared)
    prompt = [] if repeats_prompt or "prompt" not in record else _turns(record["prompt"], "user")
    return {**record, "messages": [*_system(record), *prompt, *chosen], "rejected": rejected[n_shared:]}


def alpaca(record: Any) -> Any:
    """``{"instruction", "input", "output", "history": [[question, answer], …], "system"}``."""
    if "instruction" not in record or "output" not in record:
        return None
    question = _said("user", _context(record, "instruction", "input"))
    return [*_system(record), *_history(record), question, _said("assistant", record["output"])]


def dolly(record: Any) -> Any:
    """``{"instruction", "context", "response"}``."""
    if "instruction" not in record or "response" not in record:
        return None
    return [*_system(record), _said("user", _context(record, "instruction", "context")), _said("assistant", record["response"])]


def prompt_completion(record: Any) -> Any:
    """``{"prompt", "completion", "context", "history"}`` (or ``response``): texts, or lists of messages."""
    answer = next((key for key in ("completion", "response") if key in record), None)
    if "prompt" not in record or answer is None:
        return None
    prompt = record["prompt"] if isinstance(record["prompt"], list) else _context(record, "context", "prompt")
    return [*_system(record), *_history(record), *_turns(prompt, "user"), *_turns(record[answer], "assistant")]


def question_answer(record: Any) -> Any:
    """``{"question", "answer", "context", "history"}``, also as user and assistant, input and output, human and gpt, or q and a."""
    found = next((pair for pair in _PAIRS if pair[0] in record and pair[1] in record), None)
    if found is None:
        return None
    return [*_system(record), *_history(record), _said("user", _context(record, "context", found[0])), _said("assistant", record[found[1]])]


def lines(record: Any) -> Any:
    """A list of texts (as in ChatterBot's YAML), or ``{"dialog": [text, …]}``: user and assistant by turns."""
    said = record if isinstance(record, list) else next((record[key] for key in ("dialog", "dialogue", "lines") if key in record), None)
    if not isinstance(said, list):
        return None
    if said and all(isinstance(line, Mapping) for line in said):
        return sharegpt({"conversations": said})  # messages without a key before them
    return [_said(("user", "assistant")[i % 2], text) for i, text in enumerate(said)]


SCHEMAS: dict[str, Schema] = {
    "preference": preference,
    "openai": openai,
    "sharegpt": sharegpt,
    "alpaca": alpaca,
    "dolly": dolly,
    "prompt_completion": prompt_completion,
    "question_answer": question_answer,
    "lines": lines,
}
# What tells a table's header from its first row.
COLUMNS = frozenset(
    "messages conversations conversation instruction input output history context response prompt completion question answer "
    "chosen rejected system dialog dialogue lines user assistant human gpt q a".split()
)


class RecordParser:
    """Turns records into conversations.

    Args:
        faults: Decides what is done about records that cannot be used.
        schema: The schema that all records follow: one of :data:`SCHEMAS`, an entry point, or a function's dotted path. None
            finds out for each record.
        fields: Where a record in no known schema has what: ``user``, ``assistant`` and ``system``, or ``messages`` with ``role`` and
            ``content`` in each; also ``id``, ``weight``, ``name``. Values are names of fields, with dots for nested ones.
        roles: The user's own names for roles, each with the role it stands for.
        split_by: A field whose value keeps conversations in one split; None takes the record's ``id``, or else its content.
        needs_reply: Whether a conversation in which the assistant says nothing is a fault.

    Attributes:
        counts: How many records followed which schema.

    Raises:
        ConfigError: A setting names something that is not there, or two contradict each other.
    """

    def __init__(
        self,
        *,
        faults: Faults,
        schema: str | None = None,
        fields: Mapping[str, str] | None = None,
        roles: Mapping[str, str] | None = None,
        split_by: str | None = None,
        needs_reply: bool = True,
    ) -> None:
        if schema is not None and fields:
            raise ConfigError(f"data.schema {schema!r} and data.fields contradict each other; leave one out")
        for field in fields or {}:
            if field not in _FIELDS:
                raise ConfigError(f"data.fields: {field!r} is unknown; {nearest(field, _FIELDS)}")
        if fields and not ("messages" in fields or {"user", "assistant"} <= fields.keys()):
            raise ConfigError("data.fields must say where messages is, or where user and assistant are")
        for field in ("role", "content", "name"):
            if fields and field in fields and "messages" not in fields:
                raise ConfigError(f"data.fields: {field} is said of each of several messages; say where messages is, or leave it out")
        for name, role in (roles or {}).items():
            if role not in ("system", "user", "assistant", "tool"):
                raise ConfigError(f"data.roles: {name!r} is mapped to {role!r}; map it to system, user, assistant or tool")
        self.faults = faults
        self.schema = find_schema(schema) if schema is not None else None
        self.schema_name = schema or ("fields" if fields else "")
        self.fields = dict(fields or {})
        self.roles = dict(roles or {})
        self.split_by = split_by
        self.needs_reply = needs_reply
        self.counts: Counter[str] = Counter()

    def parse(self, record: Any, *, default_id: str) -> Conversation:
        """Turn one record into a conversation.

        Args:
            record: The parsed value.
            default_id: The conversation's id where the record has none of its own.

        Raises:
            DataError: A fault that is an error.
            SkipRecord: A fault for which the record is left out.
        """
        name, found = self._apply_schema(record)
        self.counts[name] += 1
        if isinstance(found, Conversation):
            return self.regrouped(found)
        if isinstance(found, Mapping) and "messages" in found:
            record, found = found, found["messages"]
        if not isinstance(found, list):
            self.faults.refuse("wrong_type", f"the messages ({name}) must be a list, found {type(found).__name__}; write them as a list")
        messages = check_order(check_each(found, faults=self.faults, roles=self.roles), faults=self.faults, needs_reply=self.needs_reply)
        about: Mapping[str, Any] = record if isinstance(record, Mapping) else {}
        own_id = _look_up(about, self.fields.get("id", "id"))
        rejected = about["rejected"] if name == "preference" else []
        return Conversation(
            messages,
            id=default_id if own_id in (None, "") else check_characters(str(own_id), "id", self.faults),
            group=self._group(about, own_id),
            labels={key: check_characters(value, f"label {key!r}", self.faults) for key, value in _labels(about).items()},
            rejected=check_each(rejected, faults=self.faults, roles=self.roles) if rejected else (),
        )

    def regrouped(self, conversation: Conversation) -> Conversation:
        """A conversation that a user's function made, kept together as ``split_by`` says by its labels.

        Raises:
            DataError: It has no such label, and that is an error.
            SkipRecord: It is left out for that.
        """
        return conversation if self.split_by is None else replace(conversation, group=self._group(conversation.labels, conversation.id))

    def _apply_schema(self, record: Any) -> tuple[str, Any]:
        if self.fields:
            return self.schema_name, self._from_fields(record)
        if not isinstance(record, (Mapping, list)):
            known: dict[str, Schema] = {}
        elif self.schema is not None:
            known = {self.schema_name: self.schema}
        else:
            known = SCHEMAS if isinstance(record, Mapping) else {"lines": lines}
        for name, schema in known.items():
            try:
                found = schema(record)
            except (DataError, SkipRecord):
                raise
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                self.faults.refuse("wrong_type", f"the record cannot be read as {name} ({error}); mend it, or set data.on_fault to skip")
            if found is not None:
                return name, found
        if self.schema is not None:
            self.faults.refuse("unknown_schema", f"the record does not follow data.schema {self.schema_name!r} ({_describe(record)})")
        remedy = 'write it as {"messages": [...]}, or say where things are with data.fields'
        self.faults.refuse("unknown_schema", f"no schema fits the record ({_describe(record)}); {remedy}")

    def _from_fields(self, record: Any) -> Any:
        if not isinstance(record, Mapping):
            self.faults.refuse("unknown_schema", f"data.fields needs records that are objects ({_describe(record)})")
        found = {field: _look_up(record, path) for field, path in self.fields.items()}
        for field in ("messages", "user", "assistant"):
            if field in found and found[field] is None:
                self.faults.refuse(
                    "unknown_schema", f"data.fields looks for {field} {self.fields[field]!r}, which is not there ({_describe(record)})"
                )
        system = [_said("system", found["system"])] if found.get("system") else []
        if "messages" not in found:
            return [*system, _said("user", found["user"]), {**_said("assistant", found["assistant"]), "weight": found.get("weight")}]
        if not isinstance(found["messages"], list):
            return found["messages"]  # told of by the caller
        return [*system, *map(self._renamed, found["messages"])]

    def _renamed(self, message: Any) -> Any:
        if not isinstance(message, Mapping):
            return message
        paths = {field: self.fields[field] for field in _MESSAGE_FIELDS if field in self.fields}
        taken = {*paths, *(path.partition(".")[0] for path in paths.values())}
        # Who says where things are knows of the rest, such as a time stamp: it is no fault.
        rest = {key: value for key, value in message.items() if key in KNOWN_KEYS - taken}
        return {**rest, **{field: value for field, path in paths.items() if (value := _look_up(message, path)) is not None}}

    def _group(self, record: Mapping[str, Any], own_id: Any) -> str:
        if self.split_by is None:
            return "" if own_id in (None, "") else f"id:{own_id}"
        value = _look_up(record, self.split_by)
        if value is None:
            self.faults.refuse("unknown_schema", f"data.split_by looks for {self.split_by!r}, which is not there ({_describe(record)})")
        return f"{self.split_by}:{value}"


def find_schema(name: str) -> Schema:
    """The schema of a name: one of ours, an entry point's, or a user's function by its dotted path.

    Raises:
        ConfigError: There is none.
    """
    if name in SCHEMAS:
        return SCHEMAS[name]
    known = [*SCHEMAS, *plugin_names(ENTRY_POINTS)]
    if "." not in name and name not in known:
        raise ConfigError(f"data.schema {name!r} is unknown; {nearest(name, known)}")
    return find_function(name, setting="data.schema", group=ENTRY_POINTS)


def _look_up(record: Mapping[str, Any], path: str) -> Any:
    if path in record:
        return record[path]
    value: Any = record
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _labels(record: Mapping[str, Any]) -> dict[str, str]:
    """What a record says of itself beside its messages: short texts, numbers and flags."""
    return {
        str(key): str(value)
        for key, value in record.items()
        if key not in COLUMNS and key != "id" and isinstance(value, (str, int, float)) and len(str(value)) <= _MAX_LABEL_CHARS
    }


def _describe(record: Any) -> str:
    if isinstance(record, Mapping):
        return f"found {', '.join(map(repr, list(record)[:6])) or 'no keys'}"
    return f"found {type(record).__name__}, not an object"
