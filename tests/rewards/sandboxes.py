"""What the tests of the sandbox share: the layers that work here, and programs that look around."""

import shutil
import subprocess

from ernie_train.rewards.sandbox import api, backends
from ernie_train.rewards.sandbox.api import run_calls

RIGHT = "def f(x):\n    return x + 1"


def _working_layers():
    found = {}
    for layer in backends.possible_layers()[0]:
        if layer.name not in found and not api.trial(layer):
            found[layer.name] = layer
    return found


# The best interpreter of each layer that works on this machine.
LAYERS = _working_layers()


def probe(expression):
    """What an expression gives inside: ["value", v], or ["error", text] where it raises."""
    outcome = run_calls(f"import os, socket\ndef f():\n    return {expression}", "f", [[]])
    assert outcome.kind == "returned", outcome
    return outcome.values[0]


def descendants(root):
    """The process and all below it."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True).stdout
    pairs = [tuple(map(int, line.split())) for line in listed.splitlines()[1:]]
    found, grown = {root}, True
    while grown:
        more = {pid for pid, parent in pairs if parent in found} - found
        found, grown = found | more, bool(more)
    return found


def which_without(*missing):
    """shutil.which on a machine that lacks some commands."""
    real = shutil.which
    return lambda name: None if name in missing else real(name)
