"""Tool calls: the arguments of one tool, and the choice among three."""

import json
import random
from typing import Any

from .base import Item, held_out

_CITIES = ["Paris", "London", "Berlin", "Madrid", "Rome", "Oslo", "Tokyo", "Delhi", "Cairo", "Lima"]
_DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
_PEOPLE = ["Mary", "Linda", "Susan", "Emma", "James", "John", "David", "Peter"]
_COINS = ["euro", "dollar", "pound", "yen", "franc", "rupee"]
_LANGUAGES = ["French", "German", "Spanish", "Italian", "Hindi", "Arabic", "Korean"]
_WORDS = ["water", "bread", "house", "friend", "music", "garden", "river", "winter"]
_DISHES = ["pizza", "soup", "salad", "curry", "pasta", "rice", "cake"]
_ROOMS = ["kitchen", "bedroom", "garage", "office", "hall", "attic"]


def _pick(values: list[str]) -> Any:
    return lambda rng: rng.choice(values)


def _between(low: int, high: int) -> Any:
    return lambda rng: rng.randint(low, high)


# Slots: possible parameter names, JSON type, and how a value is drawn. A tool's name and its
# parameters' names vary from row to row, so a call has to be read off the signature in the prompt.
_SLOTS: dict[str, tuple[list[str], str, Any]] = {
    "city": (["city", "place"], "string", _pick(_CITIES)),
    "goal": (["to", "goal"], "string", _pick(_CITIES)),
    "day": (["day", "date"], "string", _pick(_DAYS)),
    "person": (["person", "name"], "string", _pick(_PEOPLE)),
    "amount": (["amount", "sum"], "integer", _between(2, 9)),
    "coin": (["currency", "unit"], "string", _pick(_COINS)),
    "language": (["language", "into"], "string", _pick(_LANGUAGES)),
    "word": (["word", "text"], "string", _pick(_WORDS)),
    "dish": (["dish", "food"], "string", _pick(_DISHES)),
    "count": (["count", "portions"], "integer", _between(2, 9)),
    "room": (["room", "zone"], "string", _pick(_ROOMS)),
    "level": (["level", "heat"], "integer", _between(2, 9)),
}

# Tools: possible names, slots in the order of the signature, and wordings of a request.
_TOOLS: dict[str, tuple[list[str], list[str], list[str]]] = {
    "weather": (["get_weather", "forecast"], ["city", "day"],
                ["What is the weather in {city} on {day}?", "Will it rain in {city} on {day}?"]),
    "trip": (["book_trip", "find_train"], ["city", "goal"],
             ["I want to go from {city} to {goal}.", "How do I get from {city} to {goal}?"]),
    "meeting": (["add_meeting", "schedule"], ["person", "day"],
                ["I want to meet {person} on {day}.", "Plan lunch with {person} on {day}."]),
    "pay": (["send_money", "transfer"], ["person", "amount", "coin"],
            ["Give {person} {amount} {coin}.", "I owe {person} {amount} {coin}."]),
    "translate": (["translate", "dictionary"], ["word", "language"],
                  ["What is {word} in {language}?", "How do I say {word} in {language}?"]),
    "order": (["order_food", "buy_food"], ["dish", "count"],
              ["I want {dish} for {count} people.", "Order {dish} for {count} people."]),
    "heating": (["set_heating", "warm_room"], ["room", "level"],
                ["Heat the {room} to level {level}.", "Make the {room} warm, level {level}."]),
}  # fmt: skip


# Values that no demonstration has, for the third level.
_NEW: dict[str, list[str]] = {
    "city": ["Vienna", "Prague", "Lisbon", "Dublin", "Athens"],
    "person": ["Karen", "Nancy", "Robert", "Thomas", "Daniel"],
    "word": ["summer", "window", "letter", "bridge", "forest"],
    "dish": ["toast", "stew", "noodles", "fish", "beans"],
    "room": ["cellar", "studio", "library", "bathroom", "lobby"],
}


def _signature(rng: random.Random, kind: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Return a tool of that kind in short form, and the parameter name that each slot got."""
    names, slots, _ = _TOOLS[kind]
    chosen = {slot: rng.choice(_SLOTS[slot][0]) for slot in slots}
    parameters = {chosen[slot]: _SLOTS[slot][1] for slot in slots}
    return {"name": rng.choice(names), "parameters": parameters}, chosen


def _values(rng: random.Random, kind: str) -> dict[str, Any]:
    """Return a value for each slot of a tool."""
    return {slot: _SLOTS[slot][2](rng) for slot in _TOOLS[kind][1]}


def _item(
    rng: random.Random,
    wanted: str,
    values: dict[str, Any],
    signatures: dict[str, tuple[dict[str, Any], dict[str, str]]],
) -> Item | None:
    """Return a request for the wanted one of some tools; the worked part: its name, each value."""
    if values.get("city", "") == values.get("goal"):
        return None
    prompt = rng.choice(_TOOLS[wanted][2]).format(**values)
    tool, chosen = signatures[wanted]
    slot_of = {name: slot for slot, name in chosen.items()}
    arguments = {name: values[slot_of[name]] for name in tool["parameters"]}
    call = {"name": tool["name"], "arguments": arguments}
    return Item(
        key=f"{prompt} {json.dumps(call)}",
        prompt=prompt,
        think="\n".join([tool["name"], *(f"{name}: {value}" for name, value in arguments.items())]),
        answer=json.dumps(call),
        reward="tool_call",
        tools=[_as_offered(signature) for signature, _ in signatures.values()],
        calls=[call],
    )


def _as_offered(tool: dict[str, Any]) -> dict[str, Any]:
    """Return a tool as clients of a server offer it: wrapped, its parameters as a JSON schema."""
    properties = {name: {"type": kind} for name, kind in tool["parameters"].items()}
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": tool["name"], "parameters": schema}}


def tool_arguments(rng: random.Random, level: int) -> Item | None:
    """Offer one tool: read the arguments off the request, under the names of the signature.

    At the second level the first argument is one that no demonstration of this task gives to the
    tool, at the third one that none of any task gives to any.
    """
    kind = rng.choice(list(_TOOLS))
    values, first = _values(rng, kind), _TOOLS[kind][1][0]
    if level == 3:
        values[first] = rng.choice(_NEW[first])
    elif held_out(kind, values[first]) != (level == 2):
        return None
    return _item(rng, kind, values, {kind: _signature(rng, kind)})


def tool_choice(rng: random.Random, level: int) -> Item | None:
    """Offer `level` + 1 tools: find the one that the request needs, then fill it in."""
    kinds = rng.sample(list(_TOOLS), level + 1)
    kind = rng.choice(kinds)
    return _item(rng, kind, _values(rng, kind), {one: _signature(rng, one) for one in kinds})
