"""Build the completion that gives a row's own answer, which every verifier must accept."""

from typing import Any

from ernie_train.data.completion_format import format_completion, response_block
from ernie_train.rewards.score import completion_parts
from ernie_train.rewards.verifiers import tool_call

_REASONING = "This is the reference answer."


def build_reference_completion(reward: str, row: dict[str, Any]) -> str | None:
    """Build the completion whose answer is the row's, for verifier `reward`; None without answer.

    Programs come from `solution`, the assistant's message or `answer`; tool calls from
    `expected_calls` or `answer`; anything else from `assignment` or `answer`.
    """
    if reward == "tool_call":
        calls = tool_call.reference_calls(row)
        if calls == []:
            return with_response(row, "None of the tools fits.")
        return None if calls is None else format_completion(_REASONING, None, calls)
    if reward == "code":
        program = row.get("solution") or _assistant_text(row) or row.get("answer")
        response = _fenced(program) if isinstance(program, str) else None
    elif isinstance(row.get("assignment"), dict):
        response = _sentences(row["assignment"])
    else:
        answer = row.get("answer")
        response = answer if isinstance(answer, str) and answer.strip() else None
    if response is None:
        return None
    return with_response(row, response)


def with_response(row: dict[str, Any], response: str) -> str:
    """Return a completion with this response, of the parts that the row's completions have."""
    thinking, tagged = completion_parts(row)
    if tagged:
        response = response_block(response)
    return format_completion(_REASONING) + response if thinking else response


def _fenced(program: str) -> str:
    return program if "```" in program else f"```python\n{program}\n```"


def _assistant_text(row: dict[str, Any]) -> str | None:
    messages = row.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    if not isinstance(last, dict) or last.get("role") != "assistant":
        return None
    content = last.get("content")
    return content if isinstance(content, str) else None


def _sentences(assignment: dict[str, Any]) -> str:
    roles = {True: "knight", False: "knave"}
    told = [
        f"({i}) {name} is a {roles[role] if isinstance(role, bool) else role}"
        for i, (name, role) in enumerate(assignment.items(), start=1)
    ]
    return "\n".join(told)
