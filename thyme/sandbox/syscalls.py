"""The system calls a snippet may make: one table per processor, assembled into a seccomp program by hand.

Everything absent from ALLOW answers EPERM; the few in ANSWER get the answer that makes libraries fall back quietly
(glibc tries clone3 first and `clone`, which a filter can read, only on ENOSYS; shutil.copy calls chmod and xattr).
A call of a foreign architecture, x32 included, kills the process. Arguments are checked where a number alone says
too little: no executable mappings, no terminal ioctls, no locks or signals by fcntl, no limits of other processes.
"""

from __future__ import annotations

import errno
import struct

# Tables of numbers: one call a line would be two hundred lines.
# fmt: off
# name -> (x86_64, aarch64); None where the processor does not have it
ALLOW: dict[str, tuple[int | None, int | None]] = {
    # files and folders: Landlock or the mount namespace decides which
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "lseek": (8, 62), "pread64": (17, 67), "pwrite64": (18, 68),
    "readv": (19, 65), "writev": (20, 66), "preadv": (295, 69), "pwritev": (296, 70), "preadv2": (327, 286),
    "pwritev2": (328, 287), "openat": (257, 56), "open": (2, None), "creat": (85, None), "close_range": (436, 436),
    "stat": (4, None), "lstat": (6, None), "fstat": (5, 80), "newfstatat": (262, 79), "statx": (332, 291),
    "statfs": (137, 43), "fstatfs": (138, 44), "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439),
    "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24), "getcwd": (79, 17), "chdir": (80, 49), "fchdir": (81, 50),
    "mkdir": (83, None), "mkdirat": (258, 34), "rmdir": (84, None), "unlink": (87, None), "unlinkat": (263, 35),
    "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276), "readlink": (89, None),
    "readlinkat": (267, 78), "getdents": (78, None), "getdents64": (217, 61), "ftruncate": (77, 46),
    "fallocate": (285, 47), "fsync": (74, 82), "fdatasync": (75, 83), "fadvise64": (221, 223), "sendfile": (40, 71),
    "copy_file_range": (326, 285), "umask": (95, 166), "fcntl": (72, 25), "ioctl": (16, 29), "poll": (7, None),
    "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72),
    # memory
    "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214), "mremap": (25, 216),
    "madvise": (28, 233), "membarrier": (324, 283),
    # signals of one's own (there is no way to send one)
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "rt_sigpending": (127, 136),
    "sigaltstack": (131, 132),
    # time and facts about oneself
    "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "gettimeofday": (96, 169), "time": (201, None), "times": (100, 153), "getrusage": (98, 165), "getrlimit": (97, 163),
    "prlimit64": (302, 261), "sched_yield": (24, 124), "sched_getaffinity": (204, 123), "getcpu": (309, 168),
    "sysinfo": (99, 179), "uname": (63, 160), "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178),
    "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177), "getgroups": (115, 158),
    "getresuid": (118, 148), "getresgid": (120, 150), "getpgrp": (111, None), "getpgid": (121, 155),
    "getsid": (124, 156), "getpriority": (140, 141), "capget": (125, 90), "getrandom": (318, 278),
    # the interpreter itself
    "futex": (202, 98), "set_robust_list": (273, 99), "get_robust_list": (274, 100), "set_tid_address": (218, 96),
    "rseq": (334, 293), "restart_syscall": (219, 128), "exit": (60, 93), "exit_group": (231, 94),
}

# name -> ((x86_64, aarch64), errno); errno 0 pretends success
ANSWER: dict[str, tuple[tuple[int | None, int | None], int]] = {
    "clone3": ((435, 435), errno.ENOSYS),
    "openat2": ((437, 437), errno.ENOSYS),
    "chmod": ((90, None), 0), "fchmod": ((91, 52), 0), "fchmodat": ((268, 53), 0), "fchmodat2": ((452, 452), 0),
    "utime": ((132, None), 0), "utimes": ((235, None), 0), "utimensat": ((280, 88), 0), "futimesat": ((261, None), 0),
    "listxattr": ((194, 11), errno.ENOTSUP), "llistxattr": ((195, 12), errno.ENOTSUP),
    "flistxattr": ((196, 13), errno.ENOTSUP), "getxattr": ((191, 8), errno.ENOTSUP),
    "lgetxattr": ((192, 9), errno.ENOTSUP), "fgetxattr": ((193, 10), errno.ENOTSUP),
}
# fmt: on

# machine -> (column above, AUDIT_ARCH_*)
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

_LD, _JA, _JEQ, _JGE, _JSET, _RET, _AND = 0x20, 0x05, 0x15, 0x35, 0x45, 0x06, 0x54
_REACH = 255  # instructions a conditional jump can skip
_KILL, _ERRNO, _PASS = 0x80000000, 0x00050000, 0x7FFF0000
_X32_BIT = 0x40000000
_PROT_EXEC = 4
_TCGETS, _FIONREAD, _FIONCLEX, _FIOCLEX = 0x5401, 0x541B, 0x5450, 0x5451
# F_DUPFD F_GETFD F_SETFD F_GETFL F_SETFL F_DUPFD_CLOEXEC F_GETPIPE_SZ F_GET_SEALS
_FCNTL = (0, 1, 2, 3, 4, 1030, 1032, 1034)
_O_TRUNC, _O_ACCMODE = 0o1000, 0o3

Instruction = tuple[int, int, int, int]


def _argument(index: int, high: bool = False) -> int:
    """Offset of half an argument in struct seccomp_data (both processors are little-endian)."""
    return 16 + 8 * index + (4 if high else 0)


def _deny(code: int = errno.EPERM) -> Instruction:
    return (_RET, 0, 0, _ERRNO | code)


def _allow_values(index: int, values: tuple[int, ...]) -> list[Instruction]:
    tests = [(_JEQ, len(values) - i, 0, value) for i, value in enumerate(values)]
    return [(_LD, 0, 0, _argument(index)), *tests, _deny(), (_RET, 0, 0, _PASS)]


def _deny_bits(index: int, bits: int) -> list[Instruction]:
    return [(_LD, 0, 0, _argument(index)), (_JSET, 0, 1, bits), _deny(), (_RET, 0, 0, _PASS)]


def _deny_quiet_truncation(index: int) -> list[Instruction]:
    """O_TRUNC with O_RDONLY truncates without the write access that early Landlock checks for."""
    return [
        (_LD, 0, 0, _argument(index)),
        (_AND, 0, 0, _O_TRUNC | _O_ACCMODE),
        (_JEQ, 0, 1, _O_TRUNC),
        _deny(),
        (_RET, 0, 0, _PASS),
    ]


def _checks() -> dict[str, list[Instruction]]:
    own_process = [
        (_LD, 0, 0, _argument(0)),
        (_JEQ, 0, 3, 0),
        (_LD, 0, 0, _argument(0, high=True)),
        (_JEQ, 0, 1, 0),
        (_RET, 0, 0, _PASS),
        _deny(),
    ]
    return {
        "mmap": _deny_bits(2, _PROT_EXEC),
        "mprotect": _deny_bits(2, _PROT_EXEC),
        "ioctl": _allow_values(1, (_TCGETS, _FIONREAD, _FIONCLEX, _FIOCLEX)),
        "fcntl": _allow_values(1, _FCNTL),
        "prlimit64": own_process,
        "open": _deny_quiet_truncation(1),
        "openat": _deny_quiet_truncation(2),
    }


def _intervals(column: int) -> list[tuple[int, list[Instruction]]]:
    """(first number, what happens to it and to those after it), from 0 up to the last interval, which has no end."""
    checks, refuse = _checks(), [_deny()]
    bodies = {numbers[column]: checks.get(name, [(_RET, 0, 0, _PASS)]) for name, numbers in ALLOW.items()}
    bodies |= {numbers[column]: [_deny(answer)] for numbers, answer in ANSWER.values()}
    last = max(number for number in bodies if number is not None)
    found = [(0, bodies.get(0, refuse))]
    for number in range(1, last + 2):
        body = bodies.get(number, refuse)
        if body != found[-1][1]:
            found.append((number, body))
    return found


def _search(intervals: list[tuple[int, list[Instruction]]]) -> list[Instruction]:
    """Finds the interval of a number by halves: seven comparisons instead of two hundred, for every call that is not
    plainly allowed and, at installation, for every number there is (the kernel notes which are)."""
    if len(intervals) == 1:
        return intervals[0][1]
    middle = len(intervals) // 2
    low, high = _search(intervals[:middle]), _search(intervals[middle:])
    pivot = intervals[middle][0]
    if len(low) <= _REACH:
        return [(_JGE, len(low), 0, pivot), *low, *high]
    return [(_JGE, 0, 1, pivot), (_JA, 0, 0, len(low)), *low, *high]


def assemble(machine: str) -> bytes:
    """The filter for `machine` as an array of struct sock_filter.

    Raises:
        ValueError: no table for this processor.
    """
    if machine not in MACHINES:
        raise ValueError(f"no system call table for {machine!r}: the sandbox knows {', '.join(MACHINES)}")
    column, arch = MACHINES[machine]
    program: list[Instruction] = [(_LD, 0, 0, 4), (_JEQ, 1, 0, arch), (_RET, 0, 0, _KILL), (_LD, 0, 0, 0)]
    if machine == "x86_64":
        program += [(_JGE, 0, 1, _X32_BIT), (_RET, 0, 0, _KILL)]
    program += _search(_intervals(column))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
