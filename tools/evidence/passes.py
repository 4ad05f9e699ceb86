"""What share of problems a policy solves at temperature 1, problem by problem."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ernie_train.data import Record, Tokenizer
from ernie_train.eval.estimates import pass_at_k
from ernie_train.eval.evaluation import EvalConfig, evaluate
from ernie_train.model import Ernie4_5_MoeForCausalLM


def solve(
    model: Ernie4_5_MoeForCausalLM,
    tokenizer: Tokenizer,
    problems: Sequence[Record],
    config: EvalConfig,
) -> dict[str, list[float]]:
    """Return pass@k and the mean tokens of each problem; also `pass@1/TASK` for those of a task."""
    rows = evaluate(model, tokenizer, problems, config).samples
    n = config.samples
    groups = [rows[at : at + n] for at in range(0, len(rows), n)]
    correct = [sum(row["status"] == "correct" for row in group) for group in groups]
    values = {f"pass@{k}": [pass_at_k(n, right, k) for right in correct] for k in config.ks}
    values["length"] = [float(np.mean([row["tokens"] for row in group])) for group in groups]
    for task in dict.fromkeys(str(problem.fields["task"]) for problem in problems):
        mine = [at for at, problem in enumerate(problems) if problem.fields["task"] == task]
        values[f"pass@1/{task}"] = [values["pass@1"][at] for at in mine]
    return values
