"""The seccomp program, interpreted: what it answers on both processors, and that it is the table and nothing else."""

from __future__ import annotations

import errno
import functools
import random
import struct
from collections.abc import Sequence

import pytest

from thyme.sandbox.syscalls import ALLOW, ANSWER, MACHINES, Instruction, _checks, assemble

KILL, ERRNO, PASS = 0x80000000, 0x00050000, 0x7FFF0000


@functools.cache
def program_of(machine: str) -> list[Instruction]:
    code = assemble(machine)
    return [struct.unpack_from("=HBBI", code, at) for at in range(0, len(code), 8)]


@functools.cache
def linear(machine: str) -> list[Instruction]:
    """The same policy, one number after the other: what the program is a faster form of."""
    column, arch = MACHINES[machine]
    program = [(0x20, 0, 0, 4), (0x15, 1, 0, arch), (0x06, 0, 0, KILL), (0x20, 0, 0, 0)]
    if machine == "x86_64":
        program += [(0x35, 0, 1, 0x40000000), (0x06, 0, 0, KILL)]
    bodies = [(n[column], _checks().get(name, [(0x06, 0, 0, PASS)])) for name, n in ALLOW.items()]
    bodies += [(n[column], [(0x06, 0, 0, ERRNO | code)]) for n, code in ANSWER.values()]
    for number, body in bodies:
        if number is not None:
            program += [(0x15, 0, len(body), number), *body]
    return [*program, (0x06, 0, 0, ERRNO | errno.EPERM)]


def walk(program: list[Instruction], number: int, args: Sequence[int], arch: int) -> tuple[int, int]:
    """What the kernel would return for a call, and after how many steps: an interpreter of classic BPF."""
    data = struct.pack("=IIQ6Q", number, arch, 0, *(a & (1 << 64) - 1 for a in (*args, *[0] * (6 - len(args)))))
    register = at = steps = 0
    while True:
        code, if_true, if_false, k = program[at]
        at, steps = at + 1, steps + 1
        if code == 0x20:
            register = struct.unpack_from("=I", data, k)[0]
        elif code == 0x54:
            register &= k
        elif code == 0x05:
            at += k
        elif code == 0x06:
            return k, steps
        else:
            taken = {0x15: register == k, 0x35: register >= k, 0x45: bool(register & k)}[code]
            at += if_true if taken else if_false


def answer(machine: str, number: int, *args: int, arch: int | None = None) -> int:
    return walk(program_of(machine), number, args, MACHINES[machine][1] if arch is None else arch)[0]


@pytest.mark.parametrize("machine", MACHINES)
def test_search_by_halves_is_the_list(machine: str) -> None:
    """Every number there is, with arguments on both sides of every check, on every architecture; and it is short."""
    rng, own = random.Random(0), MACHINES[machine][1]
    edges = [0, 1, 2, 3, 4, 5, 6, 7, 1030, 1032, 1034, 0o1000, 0o1001, 0x5401, 0x541B, 0x5450, 0x5451, 1 << 32]
    odd = [0x3FFFFFFF, 0x40000000, 0x40000000 + 59, 1 << 31, (1 << 32) - 1]
    for number in (*range(600), *odd):
        for arch in (own, own, own, own, own, own, *(a for _, a in MACHINES.values()), 0x40000003):
            args = [rng.choice(edges) for _ in range(6)]
            short, steps = walk(program_of(machine), number, args, arch)
            assert short == walk(linear(machine), number, args, arch)[0], (number, args, hex(arch))
            assert steps <= 24
    assert not {n for n, *_ in ALLOW.values()} & {n for (n, _), _ in ANSWER.values()} - {None}


@pytest.mark.parametrize("machine", MACHINES)
def test_table_is_the_policy(machine: str) -> None:
    column = MACHINES[machine][0]
    allowed = {n[column] for n in ALLOW.values()} - {None}
    answered = {n[column]: code for n, code in ANSWER.values() if n[column] is not None}
    harmless = (0, 0, 0, 0, 0, 0)
    for number in range(600):
        if number in answered:
            assert answer(machine, number, *harmless) == ERRNO | answered[number]
        elif number not in allowed:
            assert answer(machine, number, *harmless) == ERRNO | errno.EPERM, number
        elif number not in (ALLOW["ioctl"][column],):
            assert answer(machine, number, *harmless) == PASS, number


@pytest.mark.parametrize("machine", MACHINES)
def test_arguments_are_checked(machine: str) -> None:
    column = MACHINES[machine][0]
    refused = ERRNO | errno.EPERM

    def call(name: str, *args: int) -> int:
        number = ALLOW[name][column]
        assert number is not None
        return answer(machine, number, *args)

    assert call("mmap", 0, 4096, 3) == PASS and call("mmap", 0, 4096, 5) == refused
    assert call("mprotect", 0, 4096, 1) == PASS and call("mprotect", 0, 4096, 7) == refused
    assert call("ioctl", 0, 0x5401) == PASS and call("ioctl", 0, 0x5412) == refused
    assert call("fcntl", 0, 3) == PASS and call("fcntl", 0, 6) == refused and call("fcntl", 0, 8) == refused
    assert call("prlimit64", 0, 7) == PASS and call("prlimit64", 1, 7) == refused
    assert call("prlimit64", 1 << 32, 7) == refused  # the upper half counts
    assert call("openat", 0, 0, 0o1001) == PASS and call("openat", 0, 0, 0o1000) == refused


@pytest.mark.parametrize("machine", MACHINES)
def test_foreign_calls_kill(machine: str) -> None:
    others = {a for m, (_, a) in MACHINES.items() if m != machine} | {0x40000003}
    assert all(answer(machine, 0, arch=arch) == KILL for arch in others)
    if machine == "x86_64":
        assert answer(machine, 0x40000000) == answer(machine, 0x40000000 + 59) == KILL


def test_dangerous_calls_are_not_in_the_table() -> None:
    names = set(ALLOW)
    assert not names & {
        "clone",
        "fork",
        "vfork",
        "execve",
        "execveat",
        "socket",
        "connect",
        "sendmsg",
        "sendto",
        "kill",
        "tgkill",
        "ptrace",
        "unshare",
        "setns",
        "mount",
        "chroot",
        "link",
        "symlink",
        "mknod",
        "memfd_create",
        "bpf",
        "keyctl",
        "io_uring_setup",
        "userfaultfd",
        "perf_event_open",
        "truncate",
        "prctl",
        "seccomp",
        "setrlimit",
        "setitimer",
    }
    with pytest.raises(ValueError, match="riscv64"):
        assemble("riscv64")
