"""Run programs that a model wrote in a sandbox, and return their results as plain values.

The modules of `guest` run inside; they are sent there as text. docs/rewards.md describes the
isolation.
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
