"""Evaluation on held-out problems, and the gates between stages that read it."""

from ernie_train.eval.evaluation import (
    EvalConfig,
    Evaluation,
    TaskResult,
    evaluate,
    load_problems,
    require_verifiers,
)
from ernie_train.eval.gates import check_gate, known_metrics, measured
from ernie_train.eval.prompts import completion_text, encode_prompt, problem_row

__all__ = [
    "EvalConfig",
    "Evaluation",
    "TaskResult",
    "check_gate",
    "completion_text",
    "encode_prompt",
    "evaluate",
    "known_metrics",
    "load_problems",
    "measured",
    "problem_row",
    "require_verifiers",
]
