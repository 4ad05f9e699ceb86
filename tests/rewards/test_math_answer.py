from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie_train.data.completion_format import format_completion
from ernie_train.rewards.verifiers import math_answer, math_process
from ernie_train.rewards.verifiers.math_process import TOO_MUCH, MathProcess
from ernie_train.rewards.verifiers.quantities import parse_quantity


def graded(gold, response):
    return math_answer.score({"answer": gold}, format_completion("because", response))


EQUAL_WITHOUT_THE_LIBRARY = [
    ("12", "12.0"),
    ("12", "+12"),
    ("1000", "1,000"),
    ("1000", "1{,}000"),
    ("1/2", "0.5"),
    ("0.5", r"\frac{1}{2}"),
    ("0.5", r"\dfrac12"),
    (r"1\frac{4}{5}", "9/5"),
    ("-3", r"\boxed{-3}"),
    ("-3", "\u22123"),
    (r"\boxed{7}", "7"),
    ("7", r"first \boxed{7}, so \boxed{7.0}"),
    ("7", "$7$"),
    ("0.0001", r"1 \times 10^{-4}"),
    ("She has 48+24.\n#### 72", "72"),
    ("72", "She has 48.\n\nThen 24 more.\n#### 72"),
    ("72", "There are 72 clips in all."),
    ("72", "She sold $48 + 24 = 72$ clips. The answer is 72."),
    ("72", "**Answer:** $72$"),
    ("72", "The final answer is: 72 clips"),
    (r"10\%", "10%"),
    ("10%", "0.1"),
    ("5 m", "500 cm"),
    ("5 m", "5"),
    ("5", r"5\text{ apples}"),
    ("36 km/h", "10 m/s"),
    ("12 inches", "1 foot"),
    (r"90^\circ", "90 degrees"),
    (r"\$18.90", "18.9"),
    ("x = 5", "5"),
    ("5", "$x = 5$"),
    ("1, -2", "-2, 1"),
    ("1, -2", "x = 1 or x = -2"),
    ("1, -2", r"\boxed{1} and \boxed{-2}"),
    ("(1, 1/2)", r"\left(1, \frac{2}{4}\right)"),
    ("[1, 2)", "[1,2)"),
    (r"\{1, 2\}", r"\{2, 1\}"),
    (r"(-\infty, 2) \cup [3, \infty)", "$[3,\u221e)\u222a(-\u221e,2)$"),
    (r"\text{Evelyn}", "Evelyn"),
    (r"\text{(C)}", "C"),
    (r"x \in [-2, 7]", "[-2,7]"),
    ("17", "Final Answer: The final answer is $17$. I hope it is correct."),
    ("(3, 4)", r"\boxed{(x, y) = (3, 4)}"),
    ("4210_{5}", r"\boxed{4210_5}"),
    (r"\{1, 2, 3\}", r"\boxed{3, 2, 1}"),
    ("1, 2, 3", r"\boxed{\{1, 2, 3\}}"),
    (r"\varnothing", r"\boxed{\emptyset}"),
]

EQUAL_BY_THE_LIBRARY = [
    (r"\sqrt{2}", r"\frac{2}{\sqrt{2}}"),
    ("x^2 + 2x + 1", "(x+1)^2"),
    ("6 - 5i", "-5i + 6"),
    ("1 < x < 2", "(1, 2)"),
    ("x^2 + y^2 = 1", "2x^2 + 2y^2 = 2"),
    (r"\frac{\pi}{2}, \sqrt{8}", r"2\sqrt{2} and \pi/2"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    ("y = 2x + 3", "3 + 2x"),
    ("2516_8", "2516"),
    (r"12\pi\text{ cm}^3", r"12\pi"),
    (r"12\pi", r"12 \pi \text{ square meters}"),
    ("17", "The answer is 8 + 9 = 17."),
]

DIFFERENT = [
    ("12", "12.01"),
    ("1/3", "0.333333"),
    ("5", "3=5"),
    ("5", "4 + 1 = 5 = 6"),
    ("5", "5 ="),
    ("1, 2, 3", r"\{1, 2\}"),
    ("17", "The final answer is 16. The final answer is 17."),
    ("12", "12 12"),
    ("1", "1/0"),
    ("2", "\u00b2"),
    ("7", r"first \boxed{6}, no, \boxed{7}"),
    ("1, 2", "1, 2, 2"),
    ("1, 2, 2", "1, 2, 1"),
    ("(1, 2)", "1, 2"),
    (r"\{1, 2\}", "[1, 2]"),
    ("5 m", "5 kg"),
    ("36 km/h", "36 m/s"),
    ("2x", "2"),
    ("2m", "2"),
    (r"12\pi\text{ cm}", r"12\pi\text{ km}"),
    ("x = 5", "y = 5"),
    ("x^2 + y^2 = 1", "1"),
    ("1101_2", "1101_3"),
    ("13", "She has 12 and he has 13 of them"),
    ("12", "It is either 12 of them, who knows"),
    ("C", "(D)"),
]


@pytest.mark.parametrize(("gold", "response"), EQUAL_WITHOUT_THE_LIBRARY)
def test_structure_and_numbers_are_compared_without_the_library(gold, response, monkeypatch):
    def refuse(self):
        raise AssertionError("math-verify was asked")

    monkeypatch.setattr(MathProcess, "_started", refuse)
    assert graded(gold, response).status == "correct"


@pytest.mark.parametrize(("gold", "response"), EQUAL_BY_THE_LIBRARY)
def test_expressions_are_compared_by_math_verify(gold, response):
    assert graded(gold, response).status == "correct"


@pytest.mark.parametrize(("gold", "response"), DIFFERENT)
def test_near_misses_and_hedging_are_wrong(gold, response):
    assert graded(gold, response).status == "wrong"


def parse_number(text):
    """The value of a number without a unit, None for other texts."""
    quantity = parse_quantity(text)
    return quantity.value if quantity is not None and quantity.unit is None else None


@given(st.fractions())
def test_any_fraction_equals_itself_and_no_neighbour(number):
    text = f"{number.numerator}/{number.denominator}"
    assert parse_number(text) == number
    assert graded(text, str(number)).status == "correct"
    assert graded(text, str(number + Fraction(1, 10**6))).status == "wrong"


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3), st.integers(-5, 5))
def test_decimals_powers_of_ten_and_percentages_keep_their_value(number, power):
    value = Fraction(number)
    assert parse_number(f"{number:f}") == value
    assert parse_number(f"{number:f} \\times 10^{{{power}}}") == value * Fraction(10) ** power
    assert parse_number(f"{number:f}%") == value / 100


@given(st.integers(0, 10**15))
def test_commas_between_thousands_change_nothing(number):
    assert parse_number(f"{number:,}") == number


@pytest.mark.parametrize(
    "text", ["", "x", "e5", "0x10", "1_000", "nan", "inf", "1 2", "--1", "٣٤x", "12,34", "5m"]
)
def test_what_is_no_plain_number_is_left_to_the_library(text):
    assert parse_number(text) is None


@given(st.text())
def test_any_text_is_a_quantity_or_none(text):
    quantity = parse_quantity(text)
    assert quantity is None or isinstance(quantity.value, Fraction)


def test_a_gold_answer_that_cannot_be_read_is_told():
    assert graded(r"\frac{1}{", "12").status == "bad_gold"
    assert graded("$$", "12").status == "bad_gold"
    assert graded("{" * 1500 + "}" * 1500, r"\sqrt{2}").status == "bad_gold"


def test_a_response_that_takes_forever_is_wrong_and_the_next_one_is_graded():
    assert graded(r"\sqrt{2}", "9^{9^{9^{9^9}}}") is TOO_MUCH
    assert graded(r"\sqrt{2}", r"\frac{2}{\sqrt{2}}").status == "correct"


def verify(process, gold, answer):
    with process.session() as compare:
        return compare(gold, answer)


@pytest.fixture
def script(monkeypatch, tmp_path):
    """Puts another program in the place of the worker."""

    def put(source):
        (tmp_path / "math_worker.py").write_text(source)
        monkeypatch.setattr(math_process, "__file__", str(tmp_path / "math_process.py"))
        monkeypatch.setattr(math_process, "_ANSWER_S", 0.5)
        return MathProcess()

    return put


READY = "import json, sys, time\nprint('\"ready\"', flush=True)\nfor line in sys.stdin:\n"


def test_a_process_that_gets_no_time_is_no_wrong_answer(script):
    process = script(READY + "    time.sleep(60)\n")
    assert verify(process, "x", "y").status == "timeout"
    assert process._process is None


def test_an_answer_that_hangs_alone_is_wrong(script):
    hang = (
        "    gold, answer, fresh = json.loads(line)\n    time.sleep(0 if gold == answer else 60)\n"
    )
    process = script(READY + hang + "    print('\"equal\"', flush=True)\n")
    assert verify(process, "x", "y") is TOO_MUCH
    assert verify(process, "x", "x").status == "correct"
    process.stop()


def test_a_process_that_cannot_start_is_no_wrong_answer(script):
    assert verify(script("raise SystemExit(1)\n"), "x", "y").status == "infrastructure"


def test_the_comparisons_of_one_completion_share_their_time():
    process = MathProcess()
    bomb = "9^{9^{9^9}}"
    with process.session() as compare:
        first = compare(r"\sqrt{2}", bomb)
    assert first is TOO_MUCH
    members = ", ".join([bomb] * 16)
    assert graded(", ".join([r"\sqrt{2}"] * 16), members) is TOO_MUCH
    process.stop()
