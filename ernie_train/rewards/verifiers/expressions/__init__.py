"""Read mathematical answers: where they stand, one notation, exact arithmetic, real sets."""

from ernie_train.rewards.verifiers.expressions.arithmetic import (
    Expression,
    TooLargeError,
    is_final,
    read_expression,
    read_small,
)
from ernie_train.rewards.verifiers.expressions.notation import compact, normalize, symbols
from ernie_train.rewards.verifiers.expressions.real_sets import RealSet, read_real_set
from ernie_train.rewards.verifiers.expressions.stated import (
    MAX_ANSWER_CHARACTERS,
    answer_of,
    spellings,
    split_choice,
)
from ernie_train.rewards.verifiers.expressions.structure import (
    bracketed,
    elements_of,
    matrix_rows,
    members_of,
    name_and_value,
    tuple_members,
    turned_alike,
)

__all__ = [
    "MAX_ANSWER_CHARACTERS",
    "Expression",
    "RealSet",
    "TooLargeError",
    "answer_of",
    "bracketed",
    "compact",
    "elements_of",
    "is_final",
    "matrix_rows",
    "members_of",
    "name_and_value",
    "normalize",
    "read_expression",
    "read_real_set",
    "read_small",
    "spellings",
    "split_choice",
    "symbols",
    "tuple_members",
    "turned_alike",
]
