"""How a contender is asked: a process of its own that does a workload for each line it reads and answers in JSON.

Only one contender works at a time; the others wait for a line.
"""

import json
import sys
import time
from collections.abc import Callable

Outputs = list[list[int]]


def serve(run: Callable[[str], Outputs]) -> None:
    """Answers lines until input ends: a workload's name -> {"wall_s", "cpu_s", "ids"}, ids by sequence, in order."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        ids = run(line.strip())
        answer = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu, "ids": ids}
        print(json.dumps(answer), file=answers, flush=True)
