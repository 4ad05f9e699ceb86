"""Exit statuses and messages of the errors that users see."""

import pickle

import pytest

from ernie_train.core import errors

STATUS = {
    errors.ErnieTrainError: 1,
    errors.StorageError: 1,
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
