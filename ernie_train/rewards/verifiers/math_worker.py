"""Run math-verify for `math_process`: read [gold, answer, fresh] and write a verdict per line.

Verdicts are "equal", "different" and "gold" (the gold answer holds no expression). `fresh` begins
a new completion; its comparisons together get `CPU_S` seconds of processor time, after which the
kernel ends the process. The first line written is "ready".
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
    """Answer one request per line until the input ends."""
    # Prints of libraries go to standard error, not between the verdicts.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    # The time-outs of math-verify are switched off, and it would warn about that.
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
    """Return math-verify's `parse` for LaTeX alone, without dropping units: 2m is not 2.

    Its parser of plain expressions would take the last number of any text.
    """
    plain = library.LatexExtractionConfig()
    rules = dataclasses.replace(plain.normalization_config, units=False)
    config = dataclasses.replace(plain, normalization_config=rules)
    return functools.partial(library.parse, extraction_config=[config], parsing_timeout=None)


def _verdict(library: Any, read: Callable[[str], list[Any]], gold: str, answer: str) -> str:
    try:
        parsed_gold = read(f"\\boxed{{{gold}}}")
        # math-verify returns text alone if it could read no expression.
        if all(isinstance(item, str) for item in parsed_gold):
            return "gold"
        parsed = read(f"\\boxed{{{answer}}}")
        equal = library.verify(
            parsed_gold, parsed, float_rounding=DECIMAL_PLACES, timeout_seconds=None
        )
    except (RecursionError, MemoryError):
        return "different"
    return "equal" if equal and not _tiny_difference(parsed_gold, parsed) else "different"


def _tiny_difference(gold: list[Any], answer: list[Any]) -> bool:
    """Return True for numbers that differ by more than rounding: places alone equate tiny ones."""
    one, two = gold[0], answer[0]
    if not (getattr(one, "is_number", False) and getattr(two, "is_number", False)):
        return False
    try:
        difference = abs((one - two).evalf(DECIMAL_PLACES + 8))
        return bool(difference > abs(one.evalf(DECIMAL_PLACES + 8)) * 10**-DECIMAL_PLACES)
    except (TypeError, ValueError, ArithmeticError):
        return False


if __name__ == "__main__":
    main()
