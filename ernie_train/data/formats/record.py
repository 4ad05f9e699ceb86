"""Put the parts of a row together to a record, with what stands beside its messages."""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Literal

from ernie_train.data.formats.messages import (
    REASONING_KEYS,
    read_messages,
    read_tool,
    trained_flag,
    unread_keys,
)
from ernie_train.data.formats.values import (
    Message,
    Row,
    RowError,
    answer_text,
    kind_of,
    list_of,
    parse_json,
    text_at,
)

Kind = Literal["chat", "text", "prompt", "preference"]
MESSAGE_LISTS = ("messages", "conversations", "conversation", "prompt", "completion")
TOOLS = ("tools", "functions", "function")
SYSTEM = ("system", "system_prompt")
NOT_TRAINABLE = ("images", "image", "videos", "audios")


@dataclass(frozen=True)
class Record:
    """Hold one row, independent of its format.

    kind: "chat" for messages with an assistant turn; "prompt" for messages without one; "text"; or
        "preference", where `chosen` and `rejected` are the messages that may follow `messages`.
    tools: the tools offered to the model, as JSON-schema dicts.
    fields: all other keys of the row: domain, task, answer and others that a verifier needs.
    source: "file:line".
    unread: keys of messages that nothing reads, such as `messages.rating`.
    """

    kind: Kind
    messages: list[Message] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    text: str | None = None
    chosen: list[Message] | None = None
    rejected: list[Message] | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    unread: frozenset[str] = frozenset()

    @property
    def prompt_key(self) -> bytes:
        """Return a hash that rows share which ask the same: the text up to the first answer.

        System texts do not count, nor do what the assistant opens with and how text is spaced.
        """
        asked = [["text", " ".join(str(self.text).split())]] if self.kind == "text" else []
        for message in self.messages:
            if message["role"] not in ("system", "assistant"):
                asked.append([message["role"], " ".join(str(message["content"]).split())])
            elif message["role"] == "assistant" and asked:
                break
        return hashlib.sha256(json.dumps(asked).encode()).digest()[:16]

    @property
    def prompt_messages(self) -> list[Message]:
        """Return the messages without the assistant turns at the end."""
        end = len(self.messages)
        while end and self.messages[end - 1]["role"] == "assistant":
            end -= 1
        return self.messages[:end]


def make_record(row: Row, messages: list[Message], used: set[str]) -> Record:
    """Return the record of a row whose keys `used` were read to `messages`.

    Reads system text, tools, labels, flags, and the pair of a preference.

    Raises:
        RowError: one of them cannot be used, or the row asks for what cannot be trained.
    """
    if beyond := [key for key in NOT_TRAINABLE if row.get(key)]:
        raise RowError(f"{beyond[0]} cannot be trained here, only text")
    messages = _with_system(messages, row)
    if not messages:
        raise RowError("it has no messages")
    tools = read_tools(row)
    used = used | {*TOOLS, *SYSTEM, "chosen", "rejected"}
    unread = {name for key in MESSAGE_LISTS for name in unread_keys(row.get(key), key)}
    unused = {key: value for key, value in row.items() if key not in used}
    fields = verifier_names(row) | unused | ({"tools": tools} if tools else {})
    facts: dict[str, Any] = {"tools": tools, "fields": fields, "unread": frozenset(unread)}
    if "chosen" in row or "rejected" in row:
        facts |= {key: _completion(row, key) for key in ("chosen", "rejected")}
        return Record("preference", messages, **facts)
    if not any(message["role"] == "assistant" for message in messages):
        return Record("prompt", messages, **facts)
    for key in _apply_labels(row, messages):
        fields.pop(key, None)
    return Record("chat", messages, **facts)


def turns_at(row: Row, key: str, role: str) -> list[Message]:
    """Return the messages at `key`: a text (one turn of `role`), a message or a list of them.

    Raises:
        RowError: it is none of them, or empty.
    """
    value = row.get(key)
    if isinstance(value, str):
        return [{"role": role, "content": text_at(row, key)}]
    value = [value] if isinstance(value, dict) else value
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], list):
        value = value[0]  # one conversation in a list of conversations
    if not isinstance(value, list):
        raise RowError(f"{key} must be text or a list of messages, not {kind_of(value)}")
    return read_messages(list_of({key: value}, key))


def answer_at(row: Row, key: str) -> Message:
    """Return the answer at `key` as a message, with the row's reasoning.

    Raises:
        RowError: it is no text, or empty.
        BlankAnswer: it is white space.
    """
    if not isinstance(row.get(key), str) or row[key] == "":
        text_at(row, key)
    (message,) = read_messages([{"role": "assistant", "content": row[key], **reasoning_of(row)}])
    return message


def reasoning_of(row: Row) -> dict[str, str]:
    """Return what an answer of the row has as its reasoning, by key: the same in all of them."""
    return {name: row[name] for name in REASONING_KEYS if isinstance(row.get(name), str)}


def _completion(row: Row, key: str) -> list[Message]:
    """Return the turns at `key` of a preference: an answer, or several with what was between them.

    Raises:
        RowError: they do not begin and end with the assistant.
    """
    turns = (
        [answer_at({key: row[key]}, key)]
        if isinstance(row.get(key), str)
        else turns_at(row, key, "")
    )
    roles = [turn["role"] for turn in turns]
    if {roles[0], roles[-1]} != {"assistant"}:
        raise RowError(
            f"{key} must begin and end with an answer of the assistant; it has the turns "
            f"{', '.join(roles)}"
        )
    return turns


def _with_system(messages: list[Message], row: Row) -> list[Message]:
    system = next((row[key] for key in SYSTEM if row.get(key)), None)
    if system is None:
        return messages
    if not isinstance(system, str):
        raise RowError("system must be text")
    if messages and messages[0]["role"] == "system":
        if messages[0]["content"] == system:
            return messages
        raise RowError("it has two system messages")
    return [{"role": "system", "content": system}, *messages]


def read_tools(row: Row) -> list[dict[str, Any]] | None:
    """Return the tools that a row offers, a list or its JSON text, without nulls.

    Raises:
        RowError: they are no list of objects.
    """
    tools = next((row[key] for key in TOOLS if row.get(key)), None)
    if isinstance(tools, str):
        tools = parse_json(tools, "tools") if tools.strip() else None
    if not tools:
        return None
    return [read_tool(tool) for tool in (tools if isinstance(tools, list) else [None])]


def verifier_names(row: Row) -> dict[str, Any]:
    """Return answer, task and domain of a row that has them under the names of verl or TRL."""
    model = row.get("reward_model")  # verl
    names = {"answer": model.get("ground_truth") if isinstance(model, dict) else None}
    names["answer"] = names["answer"] if names["answer"] is not None else row.get("ground_truth")
    if names["answer"] is None and "tests" not in row:  # beside tests it is a program
        names["answer"] = row.get("solution")  # TRL
    names["answer"] = answer_text(names["answer"], row.get("choices"))
    names |= {"task": row.get("data_source"), "domain": row.get("ability")}
    return {name: value for name, value in names.items() if value is not None}


def _apply_labels(row: Row, messages: list[Message]) -> list[str]:
    """Mark the answers that a row's `label`, `weight` or `loss` leaves out; return what was read.

    A label that is a word or a number says something about the row and is left to it.
    """
    answers = [message for message in messages if message["role"] == "assistant"]
    if isinstance(row.get("label", row.get("kto_tag")), bool):
        raise RowError(
            "label true or false marks an answer as good or bad (KTO), which no stage trains; "
            "keep the good rows only and leave the label out"
        )
    labels = row.get("label")
    if isinstance(labels, str) and labels.lstrip().startswith("["):
        labels = parse_json(labels, "label")
    if isinstance(labels, list):
        if len(labels) != len(answers):
            raise RowError(f"label has {len(labels)} entries for {len(answers)} answers")
        for message, label in zip(answers, labels, strict=True):
            _mark(message, trained_flag(label, "a label"))
    flags = [key for key in ("weight", "loss") if key in row]
    for key in flags:
        flag = trained_flag(row[key], key)
        for message in answers:
            message.setdefault("weight", flag)
    return flags + (["label"] if isinstance(labels, list) else [])


def _mark(message: Message, weight: int) -> None:
    if message.setdefault("weight", weight) != weight:
        raise RowError("label and the flags of the messages contradict each other")
