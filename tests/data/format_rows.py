"""Rows of every known format, and the conversations that they hold."""

import json
from typing import Any


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def calls(*made: dict[str, Any], text: str = "", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more, "tool_calls": list(made)}


def result(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text}


SYSTEM = {"role": "system", "content": "be brief"}
TIDE = {"type": "function", "function": {"name": "tide", "parameters": {"type": "object"}}}
ASK, ANSWER = user("high tide at Emden?"), said("at noon")
TIDED = calls(call("tide", {"port": "Emden"}))


def tool_row(arguments: Any, content: Any) -> dict[str, Any]:
    made = {"type": "function", "id": "c1", "function": {"name": "tide", "arguments": arguments}}
    said_nothing = {"role": "assistant", "content": None, "tool_calls": [made]}
    tool = {"role": "tool", "tool_call_id": "c1", "content": content}
    return {"messages": [ASK, said_nothing, tool, ANSWER], "tools": [TIDE]}


# name -> (row, messages)
CHATS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "sharegpt of messages": ({"conversations": [ASK, ANSWER]}, [ASK, ANSWER]),
    "messages of from and value": (
        {"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        [user("q"), said("a")],
    ),
    "capitals": (
        {"messages": [{"role": "User", "content": "q"}, {"role": "Assistant", "content": "a"}]},
        [user("q"), said("a")],
    ),
    "an empty system turn": (
        {"conversations": [{"from": "system", "value": ""}, ASK, ANSWER]},
        [ASK, ANSWER],
    ),
    "system beside": ({"messages": [ASK, ANSWER], "system": "be brief"}, [SYSTEM, ASK, ANSWER]),
    "the same system twice": (
        {"messages": [SYSTEM, ASK, ANSWER], "system_prompt": "be brief"},
        [SYSTEM, ASK, ANSWER],
    ),
    "calls of ms-swift": (
        {
            "messages": [
                ASK,
                {
                    "role": "tool_call",
                    "content": '{"name": "tide", "arguments": {"port": "Emden"}}',
                },
                {"role": "tool_call", "content": '{"name": "wind", "arguments": "{}"}'},
                {"role": "tool_response", "content": '{"at": "12:00"}'},
                {"role": "tool_response", "content": "calm"},
                ANSWER,
            ],
            "tools": json.dumps([TIDE]),
        },
        [
            ASK,
            calls(call("tide", {"port": "Emden"}), call("wind", {})),
            result('{"at": "12:00"}'),
            result("calm"),
            ANSWER,
        ],
    ),
    "parallel calls": (
        {
            "messages": [
                ASK,
                said("both", tool_calls=[call("tide", {"port": "Emden"}), {"name": "wind"}]),
                result("noon"),
                result("calm"),
                ANSWER,
            ]
        },
        [
            ASK,
            calls(call("tide", {"port": "Emden"}), call("wind", {}), text="both"),
            result("noon"),
            result("calm"),
            ANSWER,
        ],
    ),
    "arguments as text": (
        tool_row('{"port": "Emden"}', "noon"),
        [ASK, TIDED, result("noon"), ANSWER],
    ),
    "arguments with nulls": (
        tool_row({"port": "Emden", "day": None, "at": {"hour": None}}, "noon"),
        [ASK, calls(call("tide", {"port": "Emden", "at": {}})), result("noon"), ANSWER],
    ),
    "arguments as text with nulls": (
        tool_row('{"port": "Emden", "day": null, "on": [null]}', "noon"),
        [ASK, calls(call("tide", {"port": "Emden", "on": [None]})), result("noon"), ANSWER],
    ),
    **{
        f"arguments {arguments!r}": (
            tool_row(arguments, "noon"),
            [ASK, calls(call("tide", {})), result("noon"), ANSWER],
        )
        for arguments in (None, "", {}, "{}")
    },
    **{
        f"a tool's {content!r}": (
            tool_row({"port": "Emden"}, content),
            [ASK, TIDED, result(text), ANSWER],
        )
        for content, text in [
            ("", ""),
            (None, ""),
            ({"at": 12}, '{"at": 12}'),
            ([{"type": "text", "text": "noon"}], "noon"),
            ([{"type": "text", "text": "noon"}, {"type": "text", "text": "or so"}], "noon\nor so"),
            (
                [{"name": "tide", "content": {"at": 12}}],
                '[{"name": "tide", "content": {"at": 12}}]',
            ),
            ([], ""),
            (12, "12"),
        ]
    },
    "parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "q1"}, "q2"]},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "hm"},
                        {"type": "text", "text": "a", "cache": True},
                    ],
                },
            ]
        },
        [user("q1\nq2"), said("a", reasoning_content="hm")],
    ),
    **{
        f"{key} of a turn": (
            {"messages": [ASK, said("at noon", **{key: "the table says so"})]},
            [ASK, said("at noon", reasoning_content="the table says so")],
        )
        for key in ("reasoning_content", "reasoning", "thinking", "thoughts")
    },
    "the same reasoning twice": (
        {"messages": [ASK, said("at noon", reasoning="r", reasoning_content="r")]},
        [ASK, said("at noon", reasoning_content="r")],
    ),
    "blank reasoning": ({"messages": [ASK, said("at noon", reasoning=" \n")]}, [ASK, ANSWER]),
    "every key as null": (
        {
            "messages": [
                {**ASK, "weight": None, "tool_calls": None, "name": None},
                {**ANSWER, "weight": None, "loss": None, "tool_calls": None, "reasoning": None},
            ],
            "tools": None,
            "label": None,
            "system": None,
        },
        [ASK, ANSWER],
    ),
    "label": (
        {"messages": [ASK, ANSWER, user("and low?"), said("at six")], "label": [0, 1]},
        [ASK, said("at noon", weight=0), user("and low?"), said("at six", weight=1)],
    ),
    "loss of the row": (
        {"messages": [ASK, ANSWER], "loss": True},
        [ASK, said("at noon", weight=1)],
    ),
    **{
        f"{key} of a turn": (
            {"messages": [ASK, said("at noon", **{key: flag}), ASK, ANSWER]},
            [ASK, said("at noon", weight=0), ASK, ANSWER],
        )
        for key, flag in [("weight", 0), ("weight", 0.0), ("loss", False), ("train", False)]
    },
    "erniekit": (
        {"system": "be brief", "src": ["high?", "low?"], "tgt": ["noon", "six"], "label": [0, 1]},
        [SYSTEM, user("high?"), said("noon", weight=0), user("low?"), said("six", weight=1)],
    ),
    "erniekit of texts": ({"src": "high?", "tgt": "noon"}, [user("high?"), said("noon")]),
    "erniekit with the system first": (
        {"src": ["be brief", "high?"], "tgt": ["", "noon"], "is_system": 1},
        [SYSTEM, user("high?"), said("noon")],
    ),
    "alpaca with history": (
        {
            "instruction": "and low?",
            "input": "Emden",
            "output": "at six",
            "history": [["high?", "noon"]],
            "system": "be brief",
        },
        [SYSTEM, user("high?"), said("noon"), user("and low?\nEmden"), said("at six")],
    ),
    "alpaca of an input alone": (
        {"instruction": "", "input": "high?", "output": "noon"},
        [user("high?"), said("noon")],
    ),
    "alpaca with reasoning": (
        {"instruction": "high?", "output": "noon", "reasoning": "r"},
        [user("high?"), said("noon", reasoning_content="r")],
    ),
    "dolly": (
        {"instruction": "high?", "context": "Emden", "response": "noon", "category": "qa"},
        [user("high?\nEmden"), said("noon")],
    ),
    "swift": (
        {"query": "low?", "response": "six", "history": [["high?", "noon"]]},
        [user("high?"), said("noon"), user("low?"), said("six")],
    ),
    "openorca": (
        {"system_prompt": "be brief", "question": "high?", "response": "noon"},
        [SYSTEM, user("high?"), said("noon")],
    ),
    "gsm8k": (
        {"question": "2 of 3?", "answer": "2 * 3 = 6\n#### 6"},
        [user("2 of 3?"), said("2 * 3 = 6\n#### 6")],
    ),
    "math": (
        {"problem": "2 of 3?", "solution": "So 6.", "answer": "6"},
        [user("2 of 3?"), said("So 6.")],
    ),
    "trl prompt and completion": (
        {"prompt": [ASK], "completion": [ANSWER]},
        [ASK, ANSWER],
    ),
}
