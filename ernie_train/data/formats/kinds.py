"""Convert rows of each known format to records; RowError says why a row cannot be converted."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ernie_train.data.formats.messages import read_messages
from ernie_train.data.formats.record import (
    Record,
    answer_at,
    make_record,
    reasoning_of,
    turns_at,
)
from ernie_train.data.formats.values import (
    ANSWER_KEYS,
    Message,
    Row,
    RowError,
    list_of,
    parse_json,
    shown,
    text_at,
)

# ---- conversations -------------------------------------------------------------------------------


def from_messages(row: Row) -> Record:
    """Convert a row of `messages` or `conversations`, each with role and content (or from, value).

    `tools` and `system` may stand beside them, and `chosen` and `rejected` answers.
    """
    key = _present(row, "messages", "conversations", "conversation")
    return make_record(row, read_messages(list_of(row, key)), {key})


def from_alpaca(row: Row) -> Record:
    """Convert an Alpaca row: instruction, input and output, or chosen and rejected.

    It may also have `system` and `history`, a list of [question, answer].
    """
    messages = _instructed(row, "instruction", "input")
    used = {"instruction", "input", "output", "history"}
    if "chosen" not in row:
        messages.append(answer_at(row, "output"))
        used |= reasoning_of(row).keys()
    return make_record(row, messages, used)


def _instructed(row: Row, *keys: str) -> list[Message]:
    asked = [text_at(row, key) for key in keys if not _is_blank(row, key)]
    asked = asked or [text_at(row, "instruction")]
    return [*_history(row.get("history")), _user("\n".join(asked))]


def from_prompt_completion(row: Row) -> Record:
    """Convert a row of `prompt` and `completion`, each a text or a list of messages."""
    key = "completion"
    used = {"prompt", key}
    asked = turns_at(row, "prompt", "user")
    if not isinstance(row[key], str):
        return make_record(row, asked + turns_at(row, key, "assistant"), used)
    return make_record(row, [*asked, answer_at(row, key)], used | reasoning_of(row).keys())


def from_question_answer(row: Row) -> Record:
    """Convert a row of a question and its answer, which is also a field for a verifier.

    The question is `question`, `problem`, `query` or `instruction`, the answer `response`,
    `solution` or `answer`; `context` (Dolly) follows the question, `history` (ms-swift) precedes.
    """
    question = _present(row, *_QUESTIONS, "instruction", "prompt")
    answer = _present(row, *_ANSWERS)
    used = {question, "context", "history"} | ({answer} - {"answer", "solution"})
    asked = turns_at(row, question, "user")
    if row.get("context"):
        asked[-1]["content"] += "\n" + text_at(row, "context")
    messages = [*_history(row.get("history")), *asked]
    if isinstance(row[answer], str):
        messages.append(answer_at(row, answer))
        used |= reasoning_of(row).keys()
    return make_record(row, messages, used)


def from_prompt(row: Row) -> Record:
    """Convert a row of `prompt` or `question`; other keys are fields for the verifier.

    `reward_model.ground_truth`, `data_source` and `ability` (verl) and `solution` (TRL) are answer,
    task and domain where a row does not name these.
    """
    key = _present(row, "prompt", "question", "problem")
    return make_record(row, turns_at(row, key, "user"), {key})


def from_text(row: Row) -> Record:
    """Convert a row of plain `text` for pre-training."""
    fields = {k: v for k, v in row.items() if k != "text"}
    return Record(kind="text", text=text_at(row, "text"), fields=fields)


def _present(row: Row, *keys: str) -> str:
    return next(key for key in keys if key in row)


def _is_blank(row: Row, key: str) -> bool:
    value = row.get(key, "")
    return isinstance(value, str) and not value.strip()


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _history(history: Any) -> list[Message]:
    if isinstance(history, str) and history.strip():
        history = parse_json(history, "history")
    messages: list[Message] = []
    for pair in history if isinstance(history, list) else [history] if history else []:
        if not (
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(t, str) for t in pair)
        ):
            raise RowError("history must be a list of [question, answer]")
        messages += [_user(pair[0]), {"role": "assistant", "content": pair[1]}]
    return messages


# ---- preferences ---------------------------------------------------------------------------------


def from_preference(row: Row) -> Record:
    """Convert a row of `prompt` (or `messages`), `chosen` and `rejected`, texts or messages.

    Where `chosen` and `rejected` are whole conversations, the prompt is what they share.
    """
    row = {_RESPONSES.get(key, key): value for key, value in row.items()}
    if "chosen" not in row:
        return _preferred_to_another(row)
    chosen = turns_at(row, "chosen", "assistant")
    if chosen[0]["role"] != "assistant" or not row.keys() & {"messages", "prompt", "question"}:
        return _preference_of_conversations(row)
    key = _present(row, "messages", "prompt", "question")
    if key == "messages":
        return make_record(row, read_messages(list_of(row, key)), {key})
    return make_record(row, turns_at(row, key, "user"), {key})


# Names of the two answers in PaddleFormers and ms-swift.
_RESPONSES = {"chosen_response": "chosen", "rejected_response": "rejected"}


def _preferred_to_another(row: Row) -> Record:
    """Convert a row of ms-swift: the answer that ends `messages` is preferred to another one."""
    messages = read_messages(list_of(row, "messages"))
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise RowError("beside a rejected response, messages must end with the preferred answer")
    return make_record({**row, "chosen": messages[-1:]}, messages[:-1], {"messages"})


def _preference_of_conversations(row: Row) -> Record:
    chosen, rejected = turns_at(row, "chosen", "assistant"), turns_at(row, "rejected", "assistant")
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if not shared or shared in (len(chosen), len(rejected)):
        raise RowError("chosen and rejected need a prompt, or must begin alike and end differently")
    pair = {**row, "chosen": chosen[shared:], "rejected": rejected[shared:]}
    return make_record(pair, chosen[:shared], {"prompt", "messages", "question"})


# ---- ERNIEKit ------------------------------------------------------------------------------------


def from_erniekit(row: Row) -> Record:
    """Convert an ERNIEKit row: `src` and `tgt`, with `label` for the answers that are trained.

    With `response`, two answers, and `sort` it is a preference: the higher sort is chosen.
    """
    questions, answers = _texts(row, "src"), _texts(row, "tgt")
    used = {"src", "tgt", "is_system", "label", "response", "sort"}
    row = dict(row)
    if row.get("is_system") and "system" not in row and questions:
        row["system"], questions = questions[0], questions[1:]
        if len(answers) > len(questions):
            if answers[0].strip():
                raise RowError("is_system: the first src is the system message, but has an answer")
            answers = answers[1:]
    pair = "response" in row
    if len(answers) != len(questions) - pair:
        raise RowError(f"{len(questions)} src and {len(answers)} tgt do not make a conversation")
    turns: list[Message] = []
    for at, question in enumerate(questions):
        turns.append({"role": "user", "content": question})
        turns += [{"role": "assistant", "content": a} for a in answers[at : at + 1]]
    messages = read_messages(turns)
    if pair:
        row["chosen"], row["rejected"] = _sorted_responses(row)
        row.pop("label", None)
    return make_record(row, messages, used)


def _texts(row: Row, key: str) -> list[str]:
    value = row.get(key, [])
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise RowError(f"{key} must be a text or a list of texts")
    return value


def _sorted_responses(row: Row) -> list[Any]:
    """Return the preferred response and the other one."""
    responses, order = row["response"], row.get("sort")
    if not isinstance(responses, list) or len(responses) != 2:
        raise RowError("response must hold two answers")
    order = order if isinstance(order, list) else []
    if len(order) != 2 or not all(isinstance(at, int | float) for at in order) or len({*order}) < 2:
        raise RowError(f"sort must hold two different numbers, not {shown(order)}")
    texts = [_texts({"response": response}, "response") for response in responses]
    if any(len(text) != 1 for text in texts):
        raise RowError("a response must be one answer, not several turns")
    (first,), (second,) = texts
    return [first, second] if order[0] > order[1] else [second, first]


# ---- the formats ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """Define a format: `read` converts a row; a row has all keys of one of the sets `marks`."""

    marks: tuple[frozenset[str], ...]
    read: Callable[[Row], Record]


def _marks(*sets: str) -> tuple[frozenset[str], ...]:
    return tuple(frozenset(keys.split()) for keys in sets)


_QUESTIONS, _ANSWERS = ("question", "problem", "query"), ("response", "solution", "answer")

# Detection tries the formats in this order.
FORMATS: dict[str, Format] = {
    "sharegpt": Format(_marks("conversations", "conversation"), from_messages),
    "erniekit": Format(_marks("src tgt", "src response"), from_erniekit),
    "alpaca": Format(_marks("instruction output", "instruction chosen rejected"), from_alpaca),
    "preference": Format(
        _marks(
            "chosen rejected", "chosen_response rejected_response", "messages rejected_response"
        ),
        from_preference,
    ),
    "messages": Format(_marks("messages"), from_messages),
    "prompt_completion": Format(_marks("prompt completion"), from_prompt_completion),
    "question_answer": Format(
        _marks(
            *(f"{question} {answer}" for question in _QUESTIONS for answer in _ANSWERS),
            "instruction response",
            "prompt response",
        ),
        from_question_answer,
    ),
    "prompt": Format(_marks("prompt", "question", "problem"), from_prompt),
    "text": Format(_marks("text"), from_text),
}


def detect_format(row: Row) -> str | None:
    """Return the first format whose keys the row has; None if there is none."""
    fitting = (n for n, f in FORMATS.items() if any(marks <= row.keys() for marks in f.marks))
    return next(fitting, None)


def as_prompt(row: Row) -> Row:
    """Return a row without its blank answers, and an instruction without an answer as messages.

    Raises:
        RowError: what is asked cannot be read.
    """
    row = {k: v for k, v in row.items() if k not in ANSWER_KEYS or not _is_blank(row, k)}
    if "instruction" not in row or detect_format(row) is not None:
        return row
    asked = ("instruction", "input", "context")
    rest = {key: value for key, value in row.items() if key not in (*asked, "history")}
    return {**rest, "messages": _instructed(row, *asked)}


def missing_keys(format_name: str, row: Row) -> str | None:
    """Return a text that names the fewest keys that the row lacks for the format; None if none."""
    lacking = [sorted(keys - row.keys()) for keys in FORMATS[format_name].marks]
    fewest = min(map(len, lacking))
    if not fewest:
        return None
    wanted = " or ".join(" + ".join(keys) for keys in lacking if len(keys) == fewest)
    return f"it lacks {wanted}, which the format {format_name} needs"
