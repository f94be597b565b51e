"""The process that math-verify runs in: a pair of formulas a line in, a verdict a line out, each under hard limits.

It is started as a file (`thyme.rewards.formulas` does it), so it imports nothing of thyme. What takes more processor
time or memory than allowed cannot be talked out of it: the kernel ends the process, and the parent starts another.
"""

import json
import logging
import os
import resource
import signal
import sys


def main(cpu_s: float, memory_bytes: int) -> None:
    """Answers each line [formula, reference] with true, false or a string that says what went wrong.

    Args:
        cpu_s: processor time for a pair.
        memory_bytes: address space of the process.
    """
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig  # type: ignore[import-untyped,import-not-found]
    from math_verify import LatexExtractionConfig, parse, verify  # type: ignore[import-untyped,import-not-found]

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not be taken for a verdict
    logging.disable(logging.CRITICAL)  # it warns that its own time limit is off: ours is the kernel's
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    # What it may take for units or slips is off: a formula is what is written.
    written = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="none", equations=False
    )
    config = [LatexExtractionConfig(boxed_match_priority=-1, normalization_config=written)]

    def read(formula: str) -> list[object]:
        return parse(f"${formula}$", config, fallback_mode="no_fallback", parsing_timeout=0)

    verify(read("x^2"), read("x^2"), timeout_seconds=0)  # what is imported late is imported now
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        formula, reference = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        try:
            read_formula, read_reference = read(formula), read(reference)
            verdict: object = bool(read_formula and read_reference) and verify(
                read_reference, read_formula, timeout_seconds=0
            )
        except Exception as error:
            verdict = f"{type(error).__name__}: {error}"[:200]
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(verdict), file=out, flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
