"""The process behind `math_process`: reads [gold, answer, fresh] a line, writes the verdict a line.

Verdicts are "equal", "different" and "gold" (nothing can be read in the gold answer). With `fresh`
a new completion begins; its comparisons together get `CPU_S` seconds of processor time, after
which the kernel ends the process. The first line written says that it is ready.
"""

import dataclasses
import functools
import json
import logging
import os
import resource
import sys
from collections.abc import Callable
from typing import Any

CPU_S = 2
MEMORY_BYTES = 1 << 30
# Decimals agree to this many places with roots and multiples of pi; six would take 0.333333 for
# a third.
DECIMAL_PLACES = 12


def main() -> None:
    """Answer a request a line until the input ends."""
    # Whatever a library prints goes to the terminal, not between the verdicts.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    # Its own time-outs are switched off, and it would warn about that.
    logging.disable(logging.CRITICAL)
    import math_verify

    read = _reader(math_verify)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    replies.write(json.dumps("ready") + "\n")
    for line in sys.stdin:
        gold, answer, fresh = json.loads(line)
        if fresh:
            used = resource.getrusage(resource.RUSAGE_SELF)
            # Whole seconds; one more, because the first is partly used.
            limit = int(used.ru_utime + used.ru_stime) + CPU_S + 1
            soft = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
            resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))
        replies.write(json.dumps(_verdict(math_verify, read, gold, answer)) + "\n")


def _reader(library: Any) -> Callable[[str], list[Any]]:
    """math-verify's `parse` for LaTeX alone and with no unit taken for none: 2m is not 2.

    Its reader of plain expressions would take the last number of any text.
    """
    plain = library.LatexExtractionConfig()
    rules = dataclasses.replace(plain.normalization_config, units=False)
    config = dataclasses.replace(plain, normalization_config=rules)
    return functools.partial(library.parse, extraction_config=[config], parsing_timeout=None)


def _verdict(library: Any, read: Callable[[str], list[Any]], gold: str, answer: str) -> str:
    try:
        parsed_gold = read(f"\\boxed{{{gold}}}")
        # A text alone is what math-verify gives where it could read no expression.
        if all(isinstance(item, str) for item in parsed_gold):
            return "gold"
        parsed = read(f"\\boxed{{{answer}}}")
        equal = library.verify(
            parsed_gold, parsed, float_rounding=DECIMAL_PLACES, timeout_seconds=None
        )
    except (RecursionError, MemoryError):
        return "different"
    return "equal" if equal else "different"


if __name__ == "__main__":
    main()
