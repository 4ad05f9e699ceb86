"""Read mathematical notation: one spelling of signs, exact arithmetic, sets of real numbers."""

from ernie_train.rewards.verifiers.expressions.arithmetic import (
    Expression,
    TooLargeError,
    is_final,
    read_expression,
)
from ernie_train.rewards.verifiers.expressions.notation import compact, normalize
from ernie_train.rewards.verifiers.expressions.real_sets import RealSet, read_real_set

__all__ = [
    "Expression",
    "RealSet",
    "TooLargeError",
    "compact",
    "is_final",
    "normalize",
    "read_expression",
    "read_real_set",
]
