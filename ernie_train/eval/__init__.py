"""Evaluation on held-out problems, and the gates between stages that read it."""

from ernie_train.eval.evaluation import (
    EvalConfig,
    Evaluation,
    TaskResult,
    evaluate,
    load_problems,
    require_verifiers,
)
from ernie_train.eval.gates import check_gate, evaluation_metrics, known_metrics
from ernie_train.eval.prompts import completion_text, encode_prompt, problem_row, user_prompt

__all__ = [
    "EvalConfig",
    "Evaluation",
    "TaskResult",
    "check_gate",
    "completion_text",
    "encode_prompt",
    "evaluate",
    "evaluation_metrics",
    "known_metrics",
    "load_problems",
    "problem_row",
    "require_verifiers",
    "user_prompt",
]
