"""Python in the sandbox that grades programs, with variables that last for one episode.

Every call runs in a fresh process of the sandbox, with all its walls. The process first runs the
earlier cells of the episode again, without their output, within the time of the call; so no process
lives between two turns, a cell that hangs or ends its process costs none of the variables, and a
repeated episode sees the same values.
"""

from __future__ import annotations

import json
import math
from typing import Any

from ernie_train.environments.tool import Signature, ToolContext, ToolError
from ernie_train.rewards.sandbox import Limits, SandboxUnavailable, layer_in_force, run_script

_MEMORY = "python"
_SLACK_BYTES = 4096
_WALL = 2.0  # seconds of a call for each of processor time
_TOO_LONG = "of processor time"
# Output is bounded where it is written: what prints 100 MB still answers with its beginning.
_DRIVER = """
import ast, io, json, sys

class _Bounded(io.TextIOBase):
    def __init__(self, room):
        self.parts, self.room = [], room
    def writable(self):
        return True
    def write(self, text):
        if self.room > 0:
            self.parts.append(text[:self.room])
            self.room -= len(self.parts[-1])
        return len(text)

def _run(cell, space, out):
    sys.stdout = sys.stderr = out
    try:
        tree = ast.parse(cell, "cell")
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "cell", "exec"), space)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), space)
            if value is not None:
                out.write(repr(value) + "\\n")
        return ""
    except SystemExit:
        return ""
    except BaseException as error:
        line = getattr(error, "lineno", None)
        trace = error.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code.co_filename == "cell":
                line = trace.tb_lineno
            trace = trace.tb_next
        where = f"line {line}: " if line else ""
        return f"{where}{type(error).__name__}: {str(error)[:300]}"

def _main(cells, room):
    stdout, space = sys.stdout, {"__name__": "__main__"}
    for cell in cells[:-1]:
        _run(cell, space, _Bounded(0))
    out = _Bounded(room)
    failure = _run(cells[-1], space, out)
    stdout.write(json.dumps(["".join(out.parts), failure]))
    stdout.flush()

"""


def python(code: str) -> str:
    """Run Python code and return what it prints, and the value of its last line.

    Variables are kept for later calls.

    Args:
        code: the program
    """
    raise NotImplementedError(f"{code}: it runs in the sandbox")


class PythonCells:
    """Runs the cells of the tool `python`.

    Raises `SandboxUnavailable` where no sandbox works, at once, or where it fails.
    """

    signature = Signature.of(python)
    schema = signature.schema

    def __init__(self) -> None:
        layer_in_force()

    def call(self, arguments: dict[str, Any], context: ToolContext) -> str:
        code = self.signature.check(arguments)["code"]
        cells: list[str] = context.memory.setdefault(_MEMORY, [])
        room = context.max_characters
        # Processor time is the limit: a busy machine must not change what an episode sees.
        limits = Limits(
            cpu_s=math.ceil(context.limit_s),
            wall_s=_WALL * context.limit_s,
            output_bytes=12 * room + _SLACK_BYTES,
        )
        program = f"{_DRIVER}_main(json.loads({json.dumps([*cells, code])!r}), {room})\n"
        found = run_script(program, "", limits, more_time=False)
        if found.kind == "timeout" or _TOO_LONG in found.detail:
            spent = f"{limits.cpu_s:g} s of processor time or {limits.wall_s:g} s in all"
            raise ToolError(f"not finished after {spent}")
        if found.kind == "infrastructure":
            raise SandboxUnavailable(f"the sandbox failed: {found.detail}")
        if found.kind != "returned":
            raise ToolError(found.detail or "the program gave no result")
        try:
            output, failure = json.loads(found.values[0])
            output, failure = str(output), str(failure)
        except (ValueError, TypeError, RecursionError):
            raise ToolError("the program ended itself, or wrote past print") from None
        cells.append(code)
        if failure:
            raise ToolError("\n".join(filter(None, (output.rstrip("\n"), failure))))
        return output.rstrip("\n")
