"""Checks of a machine, `ernie-train doctor --selftest`: what runs right there, and how fast.

Every check compares two ways to the same result on the device at hand. What needs a GPU is skipped
without one, with the reason.
"""
