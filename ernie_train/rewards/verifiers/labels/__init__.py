"""Grade labels: one of a few, by letter or by text, and one for each of several people."""

from ernie_train.rewards.verifiers.labels.assignments import (
    assignment_said,
    grade_assignment,
    parse_assignment,
)
from ernie_train.rewards.verifiers.labels.choices import (
    chosen_label,
    grade_choice,
    grade_truth,
    truth_label,
)

__all__ = [
    "assignment_said",
    "chosen_label",
    "grade_assignment",
    "grade_choice",
    "grade_truth",
    "parse_assignment",
    "truth_label",
]
