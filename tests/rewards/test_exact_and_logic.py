import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie_train.data.completion_format import format_completion
from ernie_train.rewards import REWARDS


def graded(reward, row, response):
    return REWARDS[reward](row, format_completion("because", response))


@pytest.mark.parametrize("reward", ["exact", "logic", "math"])
@pytest.mark.parametrize("response", ["12", " 12", "12\n"])
def test_the_answer_counts_whatever_space_is_around_it(reward, response):
    assert graded(reward, {"answer": "12"}, response).status == "correct"


@pytest.mark.parametrize("reward", ["exact", "logic", "math"])
@pytest.mark.parametrize("response", ["", "13", "12 13", "12 or 13", "the answer", "-12", "112"])
def test_anything_else_is_wrong(reward, response):
    result = graded(reward, {"answer": "12"}, response)
    assert (result.status, result.value) == ("wrong", 0.0)


def test_capitals_count_for_exact_and_not_for_logic():
    assert graded("exact", {"answer": "5 mV"}, "5 MV").status == "wrong"
    assert graded("logic", {"answer": "Yes"}, "yes").status == "correct"


@pytest.mark.parametrize("reward", sorted(REWARDS))
@pytest.mark.parametrize(
    "completion",
    [
        "",
        "12",
        "still thinking about 12",
        "<think>12",
        "<response>\n12\n</response>",
        "a</think>12",
    ],
)
def test_an_answer_outside_of_the_response_part_earns_nothing(reward, completion):
    tests = [[[1], 12]]
    row = {"answer": "12", "tests": tests, "entry_point": "f", "expected_calls": [
        {"name": "f", "arguments": {}}]}  # fmt: skip
    assert REWARDS[reward](row, completion).status == "wrong"


def test_without_thinking_the_whole_text_is_the_response():
    row = {"answer": "12", "completion_format": {"thinking": False}}
    assert REWARDS["exact"](row, "12</s>").status == "correct"


@pytest.mark.parametrize("reward", ["exact", "logic", "math"])
@pytest.mark.parametrize("row", [{}, {"answer": None}, {"answer": ""}, {"answer": 12}])
def test_a_row_without_an_answer_is_bad_gold_and_not_a_wrong_completion(reward, row):
    assert graded(reward, row, "12").status == "bad_gold"


@given(st.text())
def test_any_text_gets_a_score(completion):
    for reward in ("exact", "logic", "tool_call"):
        row = {"answer": '{"name": "f", "arguments": {}}'}
        assert REWARDS[reward](row, completion).status == "wrong"


@given(st.text(), st.text(alphabet="abcXYZ 01", min_size=1).filter(str.strip))
def test_a_response_is_right_exactly_if_its_words_are_the_answers(response, answer):
    blocks = ("<response>", "</response>", "</think>", "<tool_call>", "<|", "</s>")
    if any(tag in response for tag in blocks):
        return
    equal = response.split() == answer.split()
    assert (graded("exact", {"answer": answer}, response).status == "correct") == equal


def entry(question, answer):
    return {"question": question, "answer": answer, "metadata": {}}


def test_a_reasoning_gym_entry_is_graded_by_its_scorer_but_without_part_credit():
    row = {"answer": "17", "rg_task": "chain_sum", "rg_entry": entry("42 - 25 =", "17")}
    assert graded("logic", row, "+17.0").status == "correct"
    assert graded("logic", row, "17 or 18").status == "wrong"  # the scorer gives 0.25


def test_scorers_that_execute_answers_are_never_called(monkeypatch):
    import reasoning_gym

    def refuse(name):
        raise AssertionError(f"the scorer of {name} was asked for")

    monkeypatch.setattr(reasoning_gym, "get_score_answer_fn", refuse)
    for task in ("countdown", "puzzle24", "n_queens", "game_of_life_halting"):
        row = {"answer": "1 + 2", "rg_task": task, "rg_entry": entry("?", "1 + 2")}
        assert graded("logic", row, "__import__('os')").status == "wrong"
        assert graded("logic", row, "1 + 2").status == "correct"


def test_an_unknown_reasoning_gym_task_is_bad_gold():
    row = {"answer": "1", "rg_task": "no_such_task", "rg_entry": entry("?", "1")}
    assert graded("logic", row, "2").status == "bad_gold"


KNIGHTS = {"answer": "(1) Zoey is a knight\n(2) Ethan is a knave"}
ASSIGNED = {"assignment": {"Zoey": True, "Ethan": False}}
LABEL = {"answer": "Uncertain", "choices": ["True", "False", "Unknown"]}
CHOICE = {"answer": "B", "choices": ["A) 21", "B) 21.5", "C) a long way"]}


@pytest.mark.parametrize(
    "row", [KNIGHTS, ASSIGNED, {"assignment": {"Ethan": "knave", "Zoey": "knight"}}]
)
@pytest.mark.parametrize(
    ("response", "status"),
    [
        ("(1) Zoey is a knight\n(2) Ethan is a knave", "correct"),
        ("Ethan is a knave, and Zoey is a knight.", "correct"),
        ("**Zoey**: knight\n**Ethan**: knave", "correct"),
        ("Answer:\n1. Zoey is a knight\n2. Ethan is a knave", "correct"),
        (r"\boxed{Zoey is a knight, Ethan is a knave}", "correct"),
        ("<answer>(1) Zoey is a knight (2) Ethan is a knave</answer>", "correct"),
        ("Zoey is a knave and Ethan is a knight.", "wrong"),
        ("Zoey and Ethan are knights.", "wrong"),
        ("Zoey is a knight.", "wrong"),
        ("Zoey is a knight. Ethan is a knave. Zoey is a knave.", "wrong"),
        ("Zoey is a knight. Ethan is a knave. Ethan is a knave.", "wrong"),
        ("Zoey is a knight or Ethan is a knave.", "wrong"),
        ("If Zoey is a knight, Ethan is a knave.", "wrong"),
        ("Zoey is a knight. Ethan is a knave. Bob is a knave.", "wrong"),
        ("Zoey is a knight. Ethan is not a knight.", "wrong"),
        ("", "wrong"),
    ],
)
def test_an_assignment_names_each_person_once(row, response, status):
    assert graded("logic", row, response).status == status


@pytest.mark.parametrize(
    ("row", "response", "status"),
    [
        (LABEL, "Unknown", "correct"),
        (LABEL, "The answer is **uncertain**.", "correct"),
        (LABEL, r"\boxed{\text{Uncertain}}", "correct"),
        (LABEL, "The conclusion is uncertain.", "correct"),
        (LABEL, "True", "wrong"),
        (LABEL, "certain", "wrong"),
        (LABEL, "uncertain or true", "wrong"),
        (LABEL, "It isn't uncertain", "wrong"),
        (LABEL, "uncertain, false", "wrong"),
        (LABEL, "```python\nUnknown\n```", "wrong"),
        ({"answer": "True"}, "The statement is true.", "correct"),
        ({"answer": "True"}, "untrue", "wrong"),
        (CHOICE, "B", "correct"),
        (CHOICE, "(B)", "correct"),
        (CHOICE, "b) 21.5", "wrong"),
        (CHOICE, "B) 21.5", "correct"),
        (CHOICE, "21.5", "correct"),
        (CHOICE, "The answer is B.", "correct"),
        (CHOICE, r"$\boxed{\text{B}}$", "correct"),
        (CHOICE, "So option B is right.", "correct"),
        (CHOICE, "B) 21", "wrong"),
        (CHOICE, "A", "wrong"),
        (CHOICE, "21", "wrong"),
        (CHOICE, "option A or option B", "wrong"),
        (CHOICE, r"\boxed{A} \boxed{B}", "wrong"),
        (CHOICE, "A long way", "wrong"),
        ({**CHOICE, "answer": "a long way"}, "C", "correct"),
        ({**CHOICE, "answer": "a long way"}, "A long way", "correct"),
    ],
)
def test_one_label_of_a_few(row, response, status):
    assert graded("logic", row, response).status == status


@pytest.mark.parametrize(
    "row",
    [
        {"answer": "F", "choices": ["a", "b"]},
        {"answer": "A", "choices": ["same", "Same"]},
        {"answer": "A", "choices": "ab"},
        {"answer": "maybe", "choices": ["True", "False"]},
        {"assignment": {}},
        {"assignment": {"Zoey": 1}},
        {"assignment": ["Zoey"]},
    ],
)
def test_choices_and_assignments_that_make_no_sense_are_bad_gold(row):
    assert graded("logic", row, "A").status == "bad_gold"


PRICES = {"answer": "B", "choices": ["A)$15.50", "B)$17.00", "C)$20", "D)None of these"]}


@pytest.mark.parametrize(
    "response",
    ["b", "$17.00", "17.00", "B - $17.00", "The correct option is B.", "The answer is B because "
     "it is not C.", "<answer>B</answer>"],
)  # fmt: skip
def test_ways_to_name_a_choice(response):
    assert graded("logic", PRICES, response).status == "correct"


@pytest.mark.parametrize(
    "response",
    ["Option B is wrong", "(B) is incorrect", "Option (B) is false.", "I would rule out option B",
     "Every option except option B", "Is it option B?", "The correct option is B or C"],
)  # fmt: skip
def test_a_choice_that_is_denied_is_not_named(response):
    assert graded("logic", PRICES, response).status == "wrong"


@pytest.mark.parametrize(
    "response",
    ["It is hardly true", "The opposite of true", "never true", "true is incorrect", "true?"],
)
def test_a_label_that_is_denied_is_not_named(response):
    assert graded("logic", {"answer": "True"}, response).status == "wrong"


@pytest.mark.parametrize(
    "response",
    ["I refuse to say True", "Somebody said True", "He claims that it is true.", "It is said to be "
     "true", "Some say the statement is true", "True or whatever", "I was told that it is true.",
     "If it is true", "\u4e0d\u662f\u771f", "\u6709\u4eba\u8bf4\u662f\u771f\u7684", "a true story",
     "It cannot be false. It is true or so.", "true \\boxed{}",
     "The statement is false. It is true."],
)  # fmt: skip
def test_talk_about_a_label_is_no_answer(response):
    assert graded("logic", {"answer": "True"}, response).status == "wrong"


@pytest.mark.parametrize(
    ("gold", "response"),
    [
        ("True", "Therefore, the statement is true."),
        ("True", "Every cat is an animal. Tom is a cat. So the conclusion is **True**."),
        ("False", "Thus the conclusion must be false."),
        ("False", "It is false."),
        ("Unknown", "Hence, the claim is uncertain."),
        ("True", "\u7b54\u6848\u662f\uff1a\u771f"),
        ("False", "\u6240\u4ee5\u8fd9\u4e2a\u7ed3\u8bba\u662f\u9519\u8bef\u7684\u3002"),
        ("Unknown", "\u65e0\u6cd5\u786e\u5b9a"),
        ("True", "`True`"),
        ("True", "Label: True"),
        ("False", "**Verdict:** False"),
    ],
)
def test_sentences_that_state_a_label(gold, response):
    assert graded("logic", {"answer": gold}, response).status == "correct"


FOUR = {"answer": "D", "choices": ["thermal", "classical", "mixed", "quantum"]}


@pytest.mark.parametrize(
    "response",
    [
        "D", "(D)", "D.", "D) quantum", "**Answer: D**", "Answer: D. quantum", "quantum",
        r"It is \boxed{a \ll b}.\n\n**Answer: D**".replace(r"\n", "\n"), r"\boxed{\text{D}}",
        "I choose D.", "So D is correct.", "D is the best answer",
        "The right choice is (D) quantum.",
        "\u9009D", "\u6545\u9009\uff1aD\u3002", "\u7b54\u6848\u9009D", "\u7b54\u6848\u662fD\u3002",
        "D\u9009\u9879\u6b63\u786e", "\u6b63\u786e\u7b54\u6848\uff1aD\u3001quantum",
        "D (quantum)", "The answer is D, quantum.", "The answer is **D (quantum)**.",
        "The answer is D, because A is thermal.", "\u672c\u9898\u9009D\u3002",
        "\u3010\u7b54\u6848\u3011D", "\u6545\u9009D\u9879", "D\u9009\u9879",
        "(D) quantum is the correct answer.", "So option D) quantum is right.",
        "**(D) quantum** is the best choice.", "Quantum is the correct answer.",
    ],
)  # fmt: skip
def test_choices_in_the_styles_of_models(response):
    assert graded("logic", FOUR, response).status == "correct"


@pytest.mark.parametrize(
    "response",
    [
        "I refuse to say option D", "Somebody said option D", "Option D or option A",
        "\u4e0d\u9009D", r"\boxed{D} \boxed{A}", "I choose A. Not D.", "D is wrong",
        "Option D is thermal", r"\boxed{D} \boxed{}",
        "D (mixed)", "D, thermal", "A (quantum)", "D (or quantum)", "D (not quantum)", "D, A",
        "He says D is correct", "The correct option is D or A", "\u9009D\u6216A",
        "\u9009D\u662f\u9519\u7684", "\u4e0d\u9009D\u9879",
        "D\u9009\u9879\u9519\u8bef", "D might be right",
        r"\boxed{A}.\n\n**Answer: D**".replace(r"\n", "\n"), "The answer is not D.",
        "(D) thermal is the correct answer.", "(A) quantum is the correct answer.",
        "(A) thermal or (D) quantum is the correct answer.", "(D) quantum is the wrong answer.",
        "(A) thermal and (D) quantum is the correct answer.", "(D) quantum is the answer key.",
        "(D) quantum is not the correct answer.", "He says (D) quantum is the correct answer.",
        "(D) quantum is the correct answer?", "(A) thermal is the correct answer.",
    ],
)  # fmt: skip
def test_choices_that_are_denied_doubled_or_quoted(response):
    assert graded("logic", FOUR, response).status == "wrong"


def test_a_label_may_be_followed_by_its_reason():
    said = "The answer is True because it cannot be false."
    assert graded("logic", {"answer": "True"}, said).status == "correct"
    assert graded("logic", {"answer": "False"}, said).status == "wrong"


PAIR = {"Zoey": "knight", "Ethan": "knave"}


@pytest.mark.parametrize(
    ("people", "response"),
    [
        (PAIR, '{"Zoey": "knight", "Ethan": "knave"}'),
        (PAIR, "Zoey is the knight. Ethan is the knave."),
        (PAIR, "| Zoey | knight |\n| Ethan | knave |"),
        (PAIR, "Zoey -> knight, Ethan -> knave"),
        (PAIR, "Therefore, Zoey is a knight, and Ethan is a knave."),
        (PAIR, "Zoey must be a knight, Ethan must be a knave."),
        (PAIR, "Knights: Zoey\nKnaves: Ethan"),
        (PAIR, "1. Zoey - knight\n2. Ethan - knave"),
        (PAIR, "Zoey (knight), Ethan (knave)"),
        (PAIR, "The knight is Zoey, and the knave is Ethan."),
        ({**PAIR, "Bo": "knight"}, "Knights: Zoey, Bo. Knaves: Ethan."),
        ({**PAIR, "Bo": "knight"}, "The knights are Zoey and Bo, and the knave is Ethan."),
        (
            {**PAIR, "Bo": "knight"},
            "The answer is:\n- **Knights:** Bo and Zoey\n- **Knaves:** Ethan",
        ),
        ({"House 1": "red", "House 2": "green"}, "House 1: red\nHouse 2: green"),
        ({"Al": "doctor", "Bo": "software engineer"}, "Al is a doctor, Bo is a software engineer"),
        ({"Mary Ann": "knight", "O'Neil": "knave"}, "Mary Ann is a knight, O'Neil is a knave."),
        ({"red": "1", "green": "2"}, "red: 1, green: 2"),
    ],
)
def test_ways_to_write_an_assignment(people, response):
    assert graded("logic", {"assignment": people}, response).status == "correct"


@pytest.mark.parametrize(
    "response",
    [
        "It is false that Zoey is a knight, Ethan is a knave",
        "Nobody thinks Zoey is a knight, Ethan is a knave.",
        "zoey is a knave. Zoey is a knight, Ethan is a knave.",
        "Zoey is a knight, Ethan is a knave, he is a knight",
        "Zoey said Zoey is a knight and Ethan is a knave",
        'Bo told me: "Zoey is a knight, Ethan is a knave."',
        "Zoey is a knight? Ethan is a knave?",
        "Zoey is a knight!? no. Ethan is a knave",
        "Zoey (knight or knave), Ethan (knave)",
        "Zoey is a knight/knave, Ethan is a knave",
        "Zoey is a knight-knave, Ethan is a knave",
        "Zoey Ann is a knight, Ethan is a software knave",
        "Knights: Zoey, Ethan. Knaves: Ethan",
        "Knights: Ethan. Knaves: Zoey",
        "Knights: Zoey or Bo. Knaves: Ethan",
        "Knights: Zoey. Knaves: Ethan. Knights: Bo",
    ],
)
def test_an_assignment_that_says_more_is_wrong(response):
    assert graded("logic", {"assignment": PAIR}, response).status == "wrong"


def test_a_text_may_be_announced():
    assert graded("logic", {"answer": "no"}, "The answer is no.").status == "correct"
    assert (
        graded("logic", {"answer": "no"}, "The answer is no. The answer is yes.").status == "wrong"
    )
