"""Verifiers, one module each: `score(row, completion) -> Score`; `rewards.registry` names them."""
