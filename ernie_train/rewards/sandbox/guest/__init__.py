"""Run inside the sandbox, in the system's Python.

The modules are sent there as text, so they import only the standard library and one another, and
keep to Python 3.9.
"""
