"""Modules that run inside the sandbox.

They are sent there as text, so they import the standard library and one another alone, and keep to
what Python 3.9 knows.
"""
