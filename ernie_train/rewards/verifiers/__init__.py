"""Verify completions, a module each: `score(row, completion) -> Score`; see rewards/registry.py."""
