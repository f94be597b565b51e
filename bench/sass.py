"""What a compiled kernel issues: the machine code of its working loop, counted, without a GPU.

    python bench/sass.py sample_blocks _stats_kernel [--what truncation] [--print] [--target sm_90]

Of each configuration in bench/shipped that matches: the innermost loop that does the work (the one with exponentials,
else with products, else with wide loads, else with any; the straight line of the program where no loop has its share),
and on the way through it instructions, also per element where the configuration says how many a thread handles,
opcodes, loads of 16 and 8 bits, votes, shuffles and barriers. A loop has several ways: a branch for a temperature of 1,
one for the last, masked block of a row. `least` and `most` are the shortest and the longest of those that work and load
narrow least, to the end of the program where it is a straight line; loops inside of what is counted are not counted.
"""

import argparse
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# What tells the working loop, in this order: a kernel without exponentials is judged by its products, and so on.
WORK = (r"MUFU\.EX2$", r"(HGMMA|HMMA|IMMA|QGMMA)", r"(LDG\.E\.(128|64)|LDGSTS|UBLKCP|UTMALDG|STG\.E\.(128|64))", "LDG")
NARROW = re.compile(r"LDG\.E\.[US](16|8)")
# ex2.approx without flush to zero scales its operand where it lies below 2^-126: a comparison and two products an exp.
DENORMAL = re.compile(r"FSETP\S* .*, -126,")
LOOP_SHARE = 0.25
"""A loop is the working one if it has this share of what the straight line has."""

REGISTERS, THREADS, PROGRAMS, SHARED = 65_536, 2_048, 32, 233_472
"""Of one multiprocessor of sm_90."""


@dataclass(frozen=True, slots=True)
class Instruction:
    address: int
    opcode: str
    text: str
    """With predicate and operands."""

    @property
    def denormal(self) -> bool:
        return bool(DENORMAL.search(self.text))


@dataclass(slots=True)
class Block:
    """Instructions that are issued one after another, and the indices of the blocks that may follow."""

    instructions: list[Instruction] = field(default_factory=list)
    follows: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    where: str
    least: int
    most: int
    """Instructions a thread issues on the shortest and the longest way through the region."""
    opcodes: dict[str, int]
    """On the longest way, most frequent first."""
    exps: int
    narrow: int
    wide: int
    """Loads of at most 16 bits, and of 128."""
    votes: int
    shuffles: int
    barriers: int
    denormal: int
    """Comparisons with 2^-126 anywhere in the region."""


def disassembled(cubin: bytes) -> str:
    """What nvdisasm prints for the code of a cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-c", "-ndf", file.name], capture_output=True, text=True, check=True).stdout


def blocks(sass: str) -> list[Block]:
    """The control flow graph; block 0 is where the kernel begins."""
    line = re.compile(r"^(\.L\w+):|/\*([0-9a-f]+)\*/\s+((?:@!?U?P\w+ +)?([\w.]+)[^;]*);")
    found, labels, jumps = [Block()], {}, {}
    for match in filter(None, map(line.search, sass.splitlines())):
        label, address, text, opcode = match.groups()
        if label is not None:
            if found[-1].instructions:
                found.append(Block())
            labels[label] = len(found) - 1
            continue
        found[-1].instructions.append(Instruction(int(address, 16), opcode, text.strip()))
        if re.match(r"BRA|EXIT|RET|BRX|JMP", opcode):
            jumps[len(found) - 1] = found[-1].instructions[-1]
            found.append(Block())
    if not found[-1].instructions:
        found.pop()
    for index, block in enumerate(found):
        jump = jumps.get(index)
        target = re.search(r"`\((\.L\w+)\)", jump.text) if jump is not None else None
        # Without a predicate, and without a modifier that reads one, the next block is not reached.
        always = jump is not None and re.fullmatch(r"(BRA `\S+|EXIT|RET\.\S+ .*|BRX .*|JMP .*)", jump.text)
        after = [] if always else [index + 1]
        after += [labels[target.group(1)]] if target is not None else []
        block.follows = [other for other in dict.fromkeys(after) if other < len(found)]
    return found


def _dominators(graph: list[Block]) -> list[set[int]]:
    before: list[list[int]] = [[] for _ in graph]
    for index, block in enumerate(graph):
        for other in block.follows:
            before[other].append(index)
    everything = set(range(len(graph)))
    found = [{0}, *(set(everything) for _ in graph[1:])]
    changed = True
    while changed:
        changed = False
        for index in range(1, len(graph)):
            reached = [found[other] for other in before[index]]
            new = {index} | (set.intersection(*reached) if reached else set())
            changed |= new != found[index]
            found[index] = new
    return found


def loops(graph: list[Block]) -> dict[int, set[int]]:
    """The blocks of each loop, by the one that it begins with."""
    dominators = _dominators(graph)
    before: dict[int, list[int]] = {}
    for index, block in enumerate(graph):
        for other in block.follows:
            before.setdefault(other, []).append(index)
    found: dict[int, set[int]] = {}
    for index, block in enumerate(graph):
        for head in block.follows:
            if head in dominators[index]:
                body, waiting = {head}, [index]
                while waiting:
                    one = waiting.pop()
                    if one not in body:
                        body.add(one)
                        waiting += before.get(one, [])
                found.setdefault(head, set()).update(body)
    return found


@dataclass(frozen=True, slots=True)
class Region:
    """A loop, or the whole program."""

    start: int
    """The block that it begins with."""
    loop: bool
    body: set[int]
    counted: set[int]
    """Blocks of the body that are in no loop inside of it."""


def regions(graph: list[Block]) -> Iterator[Region]:
    """The program, then its loops."""
    bodies = loops(graph)
    everything = set(range(len(graph)))
    yield Region(0, False, everything, everything - set().union(*bodies.values()))
    for head, body in sorted(bodies.items()):
        inner = [other for at, other in bodies.items() if at != head and other < body]
        yield Region(head, True, body, body - set().union(*inner))


def count(sass: str) -> Counts:
    """What the working region of a kernel issues.

    Raises:
        ValueError: nothing in it works, or no way leads through what does.
    """
    graph = blocks(sass)
    work = next((found for found in (_work(graph, kind) for kind in WORK) if any(found)), [])
    if not work:
        raise ValueError("the kernel has neither exponentials nor products, and loads nothing")

    def amount(region: Region) -> int:
        return sum(work[index] for index in region.counted)

    region, *others = regions(graph)
    best = max(others, key=amount, default=region)
    if amount(best) >= LOOP_SHARE * amount(region):
        region = best
    enough = max(work[index] for index in region.counted) / 2
    working = {index for index in region.body if work[index] >= enough}
    least, most = (_way(graph, region, working, sign) for sign in (1, -1))
    opcodes = Counter(one.opcode for one in most)

    def opcode(pattern: str) -> int:
        return sum(times for name, times in opcodes.items() if re.match(pattern, name))

    return Counts(
        where=f"loop at {graph[region.start].instructions[0].address:#x}" if region.loop else "straight line",
        least=len(least),
        most=len(most),
        opcodes=dict(opcodes.most_common()),
        exps=opcode(r"MUFU\.EX2"),
        narrow=opcode(NARROW.pattern),
        wide=opcode(r"LDG\.E\.128"),
        votes=opcode(r"VOTE|POPC"),
        shuffles=opcode(r"SHFL"),
        barriers=opcode(r"BAR"),
        denormal=sum(one.denormal for index in region.counted for one in graph[index].instructions),
    )


def _work(graph: list[Block], kind: str) -> list[int]:
    return [sum(bool(re.match(kind, one.opcode)) for one in block.instructions) for block in graph]


def _way(graph: list[Block], region: Region, working: set[int], sign: int) -> list[Instruction]:
    """The best way through a region that works: fewest narrow loads, then fewest instructions (`sign` 1) or most (-1).
    A loop's way ends where it jumps back, the program's where it ends."""

    def cost(index: int) -> tuple[int, int]:
        opcodes = [one.opcode for one in graph[index].instructions] if index in region.counted else []
        return sum(bool(NARROW.match(opcode)) for opcode in opcodes), sign * len(opcodes)

    forward = _forward(graph, region)
    best = {(region.start, region.start in working): (cost(region.start), [region.start])}
    ended = []
    for index in _in_order(forward, region.start):
        for worked in (False, True):
            if (index, worked) not in best:
                continue
            so_far, way = best[index, worked]
            ends = region.start in graph[index].follows if region.loop else not graph[index].follows
            if ends and worked:
                ended.append((so_far, way))
            for other in forward[index]:
                more = so_far[0] + cost(other)[0], so_far[1] + cost(other)[1]
                at = other, worked or other in working
                if at not in best or more < best[at][0]:
                    best[at] = more, [*way, other]
    if not ended:
        raise ValueError("no way leads through the working block of the kernel")
    return [one for index in min(ended)[1] if index in region.counted for one in graph[index].instructions]


def _forward(graph: list[Block], region: Region) -> dict[int, list[int]]:
    """What may follow each block of a region, without the jumps back of its loops."""
    bodies = loops(graph)
    back = {(index, head) for head, body in bodies.items() for index in body}
    return {
        index: [other for other in graph[index].follows if other in region.body and (index, other) not in back]
        for index in region.body
    }


def _in_order(forward: dict[int, list[int]], start: int) -> list[int]:
    """Blocks, each after all that lead to it."""
    seen, order, stack = {start}, [], [(start, iter(forward[start]))]
    while stack:
        index, rest = stack[-1]
        other = next((one for one in rest if one not in seen), None)
        if other is None:
            order.append(index)
            stack.pop()
        else:
            seen.add(other)
            stack.append((other, iter(forward[other])))
    return order[::-1]


def programs_an_sm(registers: int, threads: int, shared: int) -> int:
    """How many programs of a kernel fit one multiprocessor of sm_90 at a time."""
    warps = math.ceil(threads / 32)
    by_registers = 4 * (REGISTERS // 4 // (32 * math.ceil(registers / 8) * 8)) // warps
    return min(by_registers, THREADS // (32 * warps), PROGRAMS, SHARED // (shared + 1_024))


def waits(ttgir: str) -> list[int]:
    """How many groups of asynchronous copies may be under way after each wait of a loop."""
    inside = [line for line in ttgir.splitlines() if "ttg.async_wait" in line and re.search(r"async_wait %", line)]
    return [int(found.group(1)) for found in map(re.compile(r"num = (\d+)").search, inside) if found is not None]


def described(name: str, result: dict[str, Any], counts: Counts, elements: int) -> Iterator[str]:
    """`result` is what gate.compiled says."""
    registers, threads, shared, stack = (result[name] for name in ("registers", "threads", "shared", "stack"))
    least, most = counts.least / (elements or 1), counts.most / (elements or 1)
    yield name
    yield f"  {counts.where}: {counts.least} to {counts.most} instructions" + (
        f"; {least:.1f} to {most:.1f} for each of {elements} elements" if elements else ""
    )
    yield (
        f"  {registers} registers, {threads} threads, {shared} B shared, {stack} B stack: "
        f"{programs_an_sm(registers, threads, shared)} programs an SM; "
        f"copies in flight at the waits: {result['waits'] or 'none'}"
    )
    yield (
        f"  exp2 {counts.exps}, denormal repairs {counts.denormal}, narrow loads {counts.narrow}, 128-bit loads "
        f"{counts.wide}, votes {counts.votes}, shuffles {counts.shuffles}, barriers {counts.barriers}"
    )
    yield "  " + ", ".join(f"{opcode} {times}" for opcode, times in list(counts.opcodes.items())[:24])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("module", help="a file of kernels/, without .py")
    parser.add_argument("kernel", nargs="?", default="", help="part of the name of its jit function; all, if left out")
    parser.add_argument("--what", default="", help="only configurations whose description holds this")
    parser.add_argument("--target", default="sm_90")
    parser.add_argument("--print", action="store_true", help="the machine code too")
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    os.environ.pop("TRITON_INTERPRET", None)
    import configurations
    import gate

    chosen = [
        one
        for one in configurations.configurations()
        if one.module == options.module and options.kernel in one.kernel and options.what in one.what
    ]
    if not chosen:
        parser.error(f"bench/shipped lists no {options.module}.{options.kernel or '*'} with '{options.what}'")
    for one in chosen:
        made = configurations.built(one, int(options.target.removeprefix("sm_")))
        sass = disassembled(made.asm["cubin"])
        name = f"{one.module}.{one.kernel} ({one.op}: {one.what})"
        print(*described(name, gate.inspected(made, one, 90), count(sass), one.elements), sep="\n")
        if options.print:
            print(sass)
    return 0


if __name__ == "__main__":
    sys.exit(main())
