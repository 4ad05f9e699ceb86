"""Exit statuses and messages of the errors that users see."""

import pickle

import pytest

from ernie_train.core import errors

STATUS = {
    errors.ErnieTrainError: 1,
    errors.StorageError: 1,
    errors.EngineError: 1,
    errors.ToolFailure: 1,
    errors.FailedElsewhere: 1,  # of an instance: that of the rank that failed
    errors.UserError: 2,
    errors.ConfigError: 2,
    errors.DataError: 2,
    errors.WeightsError: 2,
    errors.CheckpointError: 2,
    errors.Interrupted: 3,
    errors.NonFiniteError: 4,
    errors.GateError: 5,
}


def test_every_error_has_its_exit_status() -> None:
    defined = {
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, errors.ErnieTrainError)
    }
    assert defined == set(STATUS)
    assert {kind: kind.exit_status for kind in defined} == STATUS


def test_one_problem_is_one_line_with_its_source() -> None:
    error = errors.ConfigError("stages.0.optim.lr: must be > 0", "tiny.yaml")
    assert str(error) == "tiny.yaml: stages.0.optim.lr: must be > 0"
    assert str(errors.ConfigError(["name: missing"])) == "name: missing"


def test_several_problems_are_counted_and_listed() -> None:
    error = errors.ConfigError(["a: missing", "b: unknown key"], "tiny.yaml")
    assert str(error) == "tiny.yaml: 2 problems\n  - a: missing\n  - b: unknown key"
    assert error.problems == ["a: missing", "b: unknown key"]


@pytest.mark.parametrize("problems", ["a: missing", ["a: missing", "b: unknown key"]])
def test_a_config_error_survives_a_process_boundary(problems: str | list[str]) -> None:
    error = errors.ConfigError(problems, "tiny.yaml")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is errors.ConfigError
    assert (str(again), again.problems, again.source) == (
        str(error),
        error.problems,
        "tiny.yaml",
    )


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("stpes", "; did you mean 'steps'?"),
        ("learning-rate", "; did you mean 'lr'?"),
        ("zzz", "; known are lr, steps"),
    ],
)
def test_the_nearest_of_the_known_words(word: str, hint: str) -> None:
    assert errors.did_you_mean(word, ["lr", "steps", "lr"]) == hint


def test_a_warning_is_printed_when_something_begins_and_when_it_gets_worse() -> None:
    printed: list[str] = []
    warnings = errors.WarnOnce(printed.append)
    for layer, wrong, worse in [(1, True, False), (1, True, False), (2, True, False)]:
        warnings.check(layer, wrong, f"layer {layer}", worse=worse)
    assert printed == ["warning: layer 1", "warning: layer 2"]
    warnings.check(1, True, "layer 1 again", worse=True)
    warnings.check(2, False, "never printed")
    warnings.check(2, True, "layer 2 once more")
    assert printed[2:] == ["warning: layer 1 again", "warning: layer 2 once more"]
