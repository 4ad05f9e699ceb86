"""Run programs that a model wrote where they can do no harm, and bring back plain values.

`guest` is what runs inside; it is sent there as text. docs/rewards.md describes the walls.
"""

from ernie_train.rewards.sandbox.api import (
    Limits,
    ProgramResult,
    SandboxUnavailable,
    Tests,
    current_layer,
    layer_in_force,
    run_calls,
    run_script,
    run_tests,
)

__all__ = [
    "Limits",
    "ProgramResult",
    "SandboxUnavailable",
    "Tests",
    "current_layer",
    "layer_in_force",
    "run_calls",
    "run_script",
    "run_tests",
]
