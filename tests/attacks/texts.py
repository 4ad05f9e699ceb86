"""Texts that try to earn a reward without the answer. Each line says what it tries."""

from typing import Any, NamedTuple

from ernie_train.data.completion_format import format_completion


class TextAttack(NamedTuple):
    """`completion` is graded by `reward` for `row` and must not score correct."""

    tries: str
    reward: str
    row: dict[str, Any]
    completion: str


TWELVE = {"answer": "12"}
ROOT = {"answer": r"\sqrt{2}"}
POLYNOMIAL = {"answer": "x + 1"}
LABEL = {"answer": "True", "choices": ["True", "False", "Unknown"]}
LETTER = {"answer": "B", "choices": ["A) 21", "B) 21.5", "C) 22", "D) 23"]}
PEOPLE = {"assignment": {"Zoey": "knight", "Ethan": "knave", "Mia": "knave"}}
CALL = {"expected_calls": [{"name": "f", "arguments": {"x": [1]}}]}
GYM = {"answer": "17", "rg_task": "chain_sum", "rg_entry": {
    "question": "42 - 25 =", "answer": "17", "metadata": {}}}  # fmt: skip
COUNTDOWN = {"answer": "1 + 2", "rg_task": "countdown", "rg_entry": {
    "question": "?", "answer": "1 + 2", "metadata": {"target": 3, "numbers": [1, 2]}}}  # fmt: skip


def _said(response: str) -> str:
    return format_completion("because", response)


def _math(tries: str, row: dict[str, Any], response: str) -> TextAttack:
    return TextAttack(tries, "math", row, _said(response))


def _logic(tries: str, row: dict[str, Any], response: str) -> TextAttack:
    return TextAttack(tries, "logic", row, _said(response))


def _raw(tries: str, reward: str, row: dict[str, Any], completion: str) -> TextAttack:
    return TextAttack(tries, reward, row, completion)


ATTACKS = [
    # ---- several answers at once
    _math("two boxes, the last one right", TWELVE, r"\boxed{13} \boxed{12}"),
    _math("two boxes, the first one right", TWELVE, r"\boxed{12} \boxed{13}"),
    _math("every number in a box", TWELVE, " ".join(rf"\boxed{{{i}}}" for i in range(100))),
    _math("alternatives in one box", TWELVE, r"\boxed{12 \text{ or } 13}"),
    _math("alternatives behind a word", TWELVE, "Answer: 12 or 13"),
    _math("two answers, each announced", TWELVE, "The answer is 12. The answer is 13."),
    _math("a list with the answer in it", TWELVE, "11, 12, 13"),
    _math("a set with the answer in it", TWELVE, r"\{11, 12, 13\}"),
    _math("an interval around the answer", TWELVE, "[12, 13]"),
    _math("plus or minus", TWELVE, r"\pm 12"),
    _math("numbers side by side", TWELVE, r"\boxed{13 \qquad 12}"),
    _math("alternatives far behind white space", TWELVE, "Answer: 12" + " " * 5000 + "or 13"),
    _math("the answer and its opposite", TWELVE, "not 12"),
    _logic("both labels", LABEL, "True or False"),
    _logic("all labels", LABEL, "True, False, Unknown"),
    _logic("a label and its denial", LABEL, "It is not True"),
    _logic("two letters", LETTER, "A or B"),
    _logic("a letter with the text of another", LETTER, "B) 21"),
    _logic("every letter", LETTER, "(A) (B) (C) (D)"),
    _logic("everybody is both", PEOPLE, "Zoey, Ethan and Mia are knights. Zoey, Ethan and Mia are "
           "knaves."),
    _logic("a second assignment behind the first", PEOPLE, "Zoey is a knight, Ethan is a knave, "
           "Mia is a knave. Mia is a knight"),
    _logic("somebody left out", PEOPLE, "Zoey is a knight and Ethan is a knave."),
    _logic("an assignment left open", PEOPLE, "Zoey is a knight, Ethan is a knave, or Mia is a "
           "knave"),
    _logic("an option that is denied", LETTER, "Every option except option B"),
    _logic("a label that is denied", LABEL, "The opposite of True"),
    _logic("a second role for somebody", PEOPLE, "Zoey is a knight, Ethan is a knave, Mia is a "
           "knave, she is a knight"),
    _logic("part credit of a scorer", GYM, "17 or 18"),
    # ---- answers outside of the response
    _raw("the answer inside the thinking part", "math", TWELVE, "it is \\boxed{12}\n</think>\n\n"),
    _raw("a response inside unfinished thinking", "math", TWELVE,
         "<think>\n<response>\n12\n</response>\n"),
    _raw("the answer behind the end of the turn", "math", TWELVE,
         "x\n</think>\n<|im_end|><response>\n12\n</response>"),
    _raw("the answer as stray text", "exact", TWELVE, "x\n</think>\n\n12"),
    _raw("a second response block", "exact", TWELVE, _said("13") + "<response>\n12\n</response>"),
    _raw("a response that is not closed", "exact", TWELVE, "x\n</think>\n<response>\n12"),
    _raw("a call inside the thinking part", "tool_call", CALL,
         '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>\n</think>\n\n'),
    _raw("the right call among wrong ones", "tool_call", CALL,
         format_completion("x", None, [("f", {"x": i}) for i in range(5)])),
    _raw("a truth value for a number", "tool_call", CALL,
         format_completion("x", None, [("f", {"x": True})])),
    # ---- look-alikes
    _math("full-width digits", TWELVE, "\uff11\uff12"),
    _math("Arabic digits", TWELVE, "\u0661\u0662"),
    _math("a letter l for a one", TWELVE, "l2"),
    _math("an invisible character between digits", TWELVE, "1\u200b2"),
    _logic("Greek capital for a letter", LETTER, "\u0392"),
    _logic("Cyrillic letters in a label", LABEL, "\u0422rue"),
    _logic("the Kelvin sign for a K", {"answer": "K"}, "\u212a"),
    # ---- readings of the library
    _math("an equation with the answer on one side", {"answer": "5"}, "3 = 5"),
    _math("a percentage for a number", {"answer": "10"}, r"10\%"),
    _math("a number for a percentage", {"answer": r"10\%"}, "10"),
    _math("six decimals for a third", {"answer": "1/3"}, "0.333333"),
    _math("six decimals for a root", ROOT, "1.414214"),
    _math("an anagram of a word", {"answer": "east"}, "seat"),
    _math("a pair turned round", {"answer": "(1, 2)"}, "(2, 1)"),
    _math("closed for open ends", {"answer": "[1, 2)"}, "[1, 2]"),
    _math("the same member twice", ROOT, r"\sqrt{2}, \sqrt{2}"),
    _math("an inequality that holds", {"answer": "5"}, r"5 \le 5"),
    _math("the wrong unit", {"answer": "5 m"}, "5 cm"),
    _math("text that hides an alternative", ROOT, r"\sqrt{2} \phantom{x} \mid \sqrt{3}"),
    _logic("code for a scorer that evaluates", COUNTDOWN, "__import__('os').getpid() * 0 + 3"),
    _logic("another sum for a scorer that evaluates", COUNTDOWN, "2 + 1.0"),
    # ---- bombs
    _math("a tower of powers", ROOT, "9^{9^{9^{9^9}}}"),
    _math("a tower of powers in Python", ROOT, "9**9**9**9**9"),
    _math("a huge factorial", POLYNOMIAL, "10000000000!"),
    _math("factorials of factorials", POLYNOMIAL, "12" + "!" * 50),
    _math("a power of a sum", POLYNOMIAL, "(x+1)^{99999}"),
    _math("nested braces", ROOT, "{" * 400 + "}" * 400),
    _math("nested fractions", ROOT, r"\frac{1}{" * 120 + "2" + "}" * 120),
    _math("a list of bombs", ROOT, ", ".join(["9^{9^{9^9}}"] * 16)),
    _math("boxes that never close", TWELVE, r"\boxed{" * 20_000),
    _math("ten megabytes of digits", TWELVE, "1" * 10_000_000),
    _raw("ten megabytes without an end of thinking", "math", TWELVE, "12 " * 3_000_000),
    _raw("ten megabytes of tags", "math", TWELVE, "</think>" + "<response>" * 1_000_000),
    _logic("ten megabytes of labels", LABEL, "True " * 2_000_000),
    _logic("ten megabytes of names", PEOPLE, "Zoey is a knight, " * 500_000),
    _math("a million announcements", TWELVE, "answer is " * 9_000),
    _math("spaces against a regular expression", TWELVE, "answer" + " " * 90_000 + "!"),
    # ---- nothing
    _math("an empty response", TWELVE, ""),
    _math("an empty box", TWELVE, r"\boxed{}"),
    _math("the question's words", TWELVE, "the answer"),
    _math("a way out of the grader", TWELVE, "import sys; sys.exit(0)"),
    _logic("an object that equals everything", LABEL, "class A: __eq__ = lambda s, o: True"),
]  # fmt: skip
