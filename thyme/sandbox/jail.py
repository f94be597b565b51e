"""The layers around a snippet, each a thin wrapper of what the kernel offers: Landlock, seccomp, limits, capabilities,
identity, namespaces. Every failure is an OSError with its errno.

What a child puts on is made by C before it runs any Python: such a function takes `make`, which makes a call at once
or is the `add` of a list (call_list.py).

Not here: which layers are used (plan.py) and when they are put on (birth.py).
"""

# Paths here are the snippet's strings, or descriptors.
# ruff: noqa: PTH112
from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from thyme import _fork
from thyme.sandbox import syscalls
from thyme.sandbox.call_list import Argument, CallList, Data, Parameter

if ctypes.sizeof(ctypes.c_void_p) != 8:
    raise ImportError("the sandbox needs a 64-bit system")

_libc = ctypes.CDLL(None, use_errno=True)
# These three have one number on every processor.
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_LANDLOCK_PATH_BENEATH = 1
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _REMOVE_DIR, _REMOVE_FILE = (1 << i for i in range(6))
_MAKE_DIR, _MAKE_REG = 1 << 7, 1 << 8
_REFER, _TRUNCATE = 1 << 13, 1 << 14
_READ = _READ_FILE | _READ_DIR
_SCRATCH = _READ | _WRITE_FILE | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_REG
# Rights of the file system by ABI: 13 at first, then REFER (2), TRUNCATE (3), IOCTL_DEV (5).
_FS_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NAME, _PR_SET_SECCOMP = 1, 4, 15, 22
_PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 38, 47
_SECCOMP_MODE_FILTER = 2
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_OWN_CAPS = struct.pack("=Ii", 0x20080522, 0)  # version 3, of the calling process

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
NAMESPACES = {
    "mount": CLONE_NEWNS,
    "pid": CLONE_NEWPID,
    "net": CLONE_NEWNET,
    "ipc": CLONE_NEWIPC,
    "uts": CLONE_NEWUTS,
    "cgroup": CLONE_NEWCGROUP,
}
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_NOATIME, MS_BIND, MS_MOVE, MS_REC, MS_PRIVATE = 1 << 10, 1 << 12, 1 << 13, 1 << 14, 1 << 18
_MNT_DETACH = 2
# These two have one number on every processor, too.
_OPEN_TREE, _MOVE_MOUNT = 428, 429
_OPEN_TREE_CLONE, _MOVE_MOUNT_F_EMPTY_PATH = 1, 4

AT_FDCWD = -100
_ALL_BITS = (1 << 64) - 1

DEVICES = (Path("/dev/null"), Path("/dev/zero"), Path("/dev/urandom"))
"""The devices that a snippet has."""

Limit = tuple[int, tuple[int, int]]
"""A resource and its (soft, hard) limit."""


class Make(Protocol):
    """Makes a system call with at most five arguments; those not given are 0."""

    def __call__(self, what: str, number: int, *arguments: Argument, may_fail: bool = False) -> object: ...


def _syscall(what: str, number: int, *arguments: Argument, may_fail: bool = False) -> int:
    result = _fork.system_call(number, *arguments)  # type: ignore[arg-type]
    if result < 0 and not may_fail:
        raise OSError(-result, f"{what}: {os.strerror(-result)}")
    return result


_quick_fork = ctypes.PyDLL(None).fork


def fork() -> int:
    """fork(2) without the interpreter's after-fork hooks, which cost a child a millisecond of page copies. Sound only
    in a process with one thread: there is no lock to release, no thread to forget, and nothing to reseed on purpose."""
    pid = int(_quick_fork())
    if pid < 0:
        raise OSError("fork failed: no process or no memory left")
    return pid


# --- Landlock: which files -------------------------------------------------------------------------------------------


def landlock_abi() -> int:
    """The kernel's Landlock ABI, 1 or more."""
    return _syscall("landlock", _LANDLOCK_CREATE, None, 0, 1)


def landlock_rule(path: str | Path, abi: int, *, writable: bool = False) -> bytes:
    """A rule for one file or folder to read, or for a `writable` folder: all but links, sockets, devices, execution.
    (REFER is for links as well as for moves between folders; seccomp refuses links.) It holds an O_PATH descriptor that
    stays open as long as rulesets are made of it."""
    rights = _READ
    if writable:
        rights = _writable_rights(abi)
    if not writable and not os.path.isdir(path):
        rights &= _READ_FILE
    return struct.pack("=Qi", rights, os.open(path, os.O_PATH))


def landlock_allow_own(calls: CallList, ruleset: Argument, path: str, abi: int) -> None:
    """Has the list let its process write to a folder that is not there before."""
    rights = _writable_rights(abi)
    folder = calls.add(f"open {path}", _fork.SYS_openat, AT_FDCWD, os.fsencode(path), os.O_PATH | os.O_CLOEXEC)
    rule = Data(struct.pack("=Qi", rights, 0), folder, 8)
    calls.add("landlock_add_rule", _LANDLOCK_ADD, ruleset, _LANDLOCK_PATH_BENEATH, rule, 0)
    calls.add("close", _fork.SYS_close, folder)


def _writable_rights(abi: int) -> int:
    return _SCRATCH | (_REFER if abi >= 2 else 0) | (_TRUNCATE if abi >= 3 else 0)


def landlock_close(rule: bytes) -> None:
    """Closes the descriptor that a rule holds."""
    os.close(struct.unpack("=Qi", rule)[1])


def landlock_ruleset(abi: int, rules: Iterable[bytes]) -> int:
    """A ruleset (file descriptor) that grants what `rules` say and nothing else; TCP, abstract sockets and signals to
    the outside are granted to nobody."""
    handled_fs = (1 << _FS_RIGHTS[min(abi, 5)]) - 1
    handled_net = 3 if abi >= 4 else 0
    scoped = 3 if abi >= 6 else 0
    attr = struct.pack("=QQQ", handled_fs, handled_net, scoped)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = _syscall("landlock_create_ruleset", _LANDLOCK_CREATE, attr, len(attr), 0)
    for rule in rules:  # some thirty for every child
        _syscall("landlock_add_rule", _LANDLOCK_ADD, ruleset, _LANDLOCK_PATH_BENEATH, rule)
    return ruleset


def landlock_add(ruleset: int, rule: bytes) -> None:
    """Grants one more path, as long as nobody is bound by `ruleset` yet."""
    _syscall("landlock_add_rule", _LANDLOCK_ADD, ruleset, _LANDLOCK_PATH_BENEATH, rule, 0)


def landlock_restrict(ruleset: Argument, make: Make = _syscall) -> None:
    """Binds the process for good. Needs no_new_privs."""
    make("landlock_restrict_self", _LANDLOCK_RESTRICT, ruleset, 0)


# --- seccomp: which system calls -------------------------------------------------------------------------------------


class SeccompFilter:
    """The filter for this processor, assembled once and loaded by each child. ValueError on an unknown processor."""

    def __init__(self) -> None:
        code = syscalls.assemble(platform.machine())
        self.num_instructions = len(code) // 8
        self._code = ctypes.create_string_buffer(code, len(code))
        self._program = ctypes.create_string_buffer(
            struct.pack("@HP", self.num_instructions, ctypes.addressof(self._code)), struct.calcsize("@HP")
        )

    def install(self, make: Make = _syscall) -> None:
        """Binds the process, this one or one forked from it, for good. Needs no_new_privs."""
        make("seccomp", _fork.SYS_prctl, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(self._program))


# --- privileges ------------------------------------------------------------------------------------------------------


def map_executable_memory() -> None:
    """Maps a page to read, write and execute: what a finished jail refuses with an OSError."""
    _libc.mmap.restype = ctypes.c_void_p
    address = _libc.mmap(None, ctypes.c_size_t(4096), 7, 0x22, -1, ctypes.c_long(0))
    if address == ctypes.c_void_p(-1).value:
        code = ctypes.get_errno()
        raise OSError(code, f"mmap: {os.strerror(code)}")


def no_new_privs(make: Make = _syscall) -> None:
    """Nothing the process executes can gain rights any more."""
    make("no_new_privs", _fork.SYS_prctl, _PR_SET_NO_NEW_PRIVS, 1)


def die_with_parent(make: Make = _syscall) -> None:
    """SIGKILL when the parent ends. Only sound where the parent has one thread, and after the last setuid."""
    make("pdeathsig", _fork.SYS_prctl, _PR_SET_PDEATHSIG, 9)


def set_name(name: str, make: Make = _syscall) -> None:
    """What `ps` and `top` show of the process: at most 15 characters."""
    make("name", _fork.SYS_prctl, _PR_SET_NAME, name.encode())


def first_to_end(calls: CallList, proc: int) -> None:
    """Has a list of calls let the kernel end its process before others when memory runs out.

    Args:
        calls: the list.
        proc: descriptor of /proc.
    """
    file = calls.add("open oom_score_adj", _fork.SYS_openat, proc, b"self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
    calls.add("oom_score_adj", _fork.SYS_write, file, b"1000", 4, may_fail=True)
    calls.add("close", _fork.SYS_close, file)


def not_dumpable(make: Make = _syscall) -> None:
    """Other processes of the same user cannot look into it."""
    make("dumpable", _fork.SYS_prctl, _PR_SET_DUMPABLE, 0)


def drop_capabilities(make: Make = _syscall) -> None:
    """Empties every set, also those a user namespace hands out."""
    # a kernel may have no ambient set
    make("ambient", _fork.SYS_prctl, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, may_fail=True)
    make("capset", _fork.SYS_capset, _OWN_CAPS, bytes(24))


def capabilities() -> int:
    """The effective set as a mask."""
    data = ctypes.create_string_buffer(24)
    _syscall("capget", _fork.SYS_capget, _OWN_CAPS, ctypes.addressof(data))
    low, _, _, high, _, _ = struct.unpack("=6I", data.raw)
    return low | high << 32


def become(uid: int | Parameter, make: Make = _syscall) -> None:
    """Gives up root for a user id nobody has."""
    make("setgroups", _fork.SYS_setgroups, 0, None)
    make("setresgid", _fork.SYS_setresgid, uid, uid, uid)
    make("setresuid", _fork.SYS_setresuid, uid, uid, uid)


def limits(*, cpu_s: int, file_bytes: int, open_files: int) -> tuple[Limit, ...]:
    """Resource limits for a child, none above what holds here already; `address_space` is one more.

    Args:
        cpu_s: CPU seconds; SIGXCPU ends it then, SIGKILL a second later.
        file_bytes: the largest file it may write, in bytes.
        open_files: descriptors it may hold.
    """
    return (
        _at_most(resource.RLIMIT_CPU, cpu_s, cpu_s + 1),
        _at_most(resource.RLIMIT_FSIZE, file_bytes, file_bytes),
        _at_most(resource.RLIMIT_NOFILE, open_files, open_files),
        _at_most(resource.RLIMIT_CORE, 0, 0),
        _at_most(resource.RLIMIT_MEMLOCK, 0, 0),
        _at_most(resource.RLIMIT_MSGQUEUE, 0, 0),
        _at_most(resource.RLIMIT_STACK, 8 << 20, 16 << 20),
    )


def address_space(size: int) -> Limit:
    """The limit of `size` bytes that a process may map, not above what holds here already."""
    return _at_most(resource.RLIMIT_AS, size, size)


def _at_most(which: int, soft: int, hard: int) -> Limit:
    ceiling = resource.getrlimit(which)[1]
    if ceiling != resource.RLIM_INFINITY:
        soft, hard = min(soft, ceiling), min(hard, ceiling)
    return which, (soft, hard)


def limit(limits: Iterable[Limit], make: Make = _syscall) -> None:
    """Puts `limits` on the process."""
    for which, pair in limits:
        values = struct.pack("=QQ", *(value & _ALL_BITS for value in pair))  # RLIM_INFINITY is -1
        make("limit", _fork.SYS_prlimit64, 0, which, values, None)


# --- namespaces ------------------------------------------------------------------------------------------------------


def unshare(flags: int, make: Make = _syscall) -> None:
    """unshare(2), with CLONE_* of this module."""
    make("unshare", _fork.SYS_unshare, flags)


def enter_user_namespace() -> None:
    """A user namespace in which the caller keeps its id; it gives ordinary users the other namespaces."""
    uid, gid = os.getuid(), os.getgid()
    unshare(CLONE_NEWUSER)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")


def mount(
    source: str, target: str | Path, kind: str | None, flags: int, data: str | None = None, make: Make = _syscall
) -> None:
    """mount(2).

    Args:
        source: what is mounted.
        target: an existing file or folder.
        kind: the file system; None where the flags need none.
        flags: MS_* of this module.
        data: options of the file system.
        make: see above.
    """
    kind_, data_ = kind.encode() if kind else None, data.encode() if data else None
    make(f"mount {target}", _fork.SYS_mount, source.encode(), os.fsencode(target), kind_, flags, data_)


def unmount(target: str | Path) -> None:
    """Takes a mount away, also where it is in use."""
    _syscall(f"umount {target}", _fork.SYS_umount2, os.fsencode(target), _MNT_DETACH)


def _locked_flags(path: Path) -> int:
    """Mount flags a user namespace may not clear when it mounts something again read-only."""
    flags = os.statvfs(path).f_flag
    pairs = (
        (os.ST_NOSUID, MS_NOSUID),
        (os.ST_NODEV, MS_NODEV),
        (os.ST_NOEXEC, MS_NOEXEC),
        (os.ST_NOATIME, 1024),
        (os.ST_NODIRATIME, 2048),
        (os.ST_RELATIME, 1 << 21),
    )
    return sum(ours for theirs, ours in pairs if flags & theirs)


def bind(source: Path, target: Path, *, read_only: bool = True) -> None:
    """Shows `source` at `target`, making the mount point."""
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    mount(str(source), target, None, MS_BIND | MS_REC)
    if read_only:
        mount("none", target, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | _locked_flags(target))


def detached(path: str | Path) -> int:
    """A mount of `path`, which is absolute, that is nowhere yet (a descriptor), with the flags of the mount it lies
    on."""
    return _syscall("open_tree", _OPEN_TREE, None, os.fsencode(path), _OPEN_TREE_CLONE | os.O_CLOEXEC)


def attach(mount_fd: int, target: str | Path) -> None:
    """Puts what `detached` gave at `target`, the absolute path of a file or folder; a symbolic link there is not
    followed."""
    _syscall("move_mount", _MOVE_MOUNT, mount_fd, b"", None, os.fsencode(target), _MOVE_MOUNT_F_EMPTY_PATH)


def enter_mount_namespace(fd: int) -> None:
    """setns(2): the process is in that mount namespace, at its root."""
    _syscall("setns", _fork.SYS_setns, fd, CLONE_NEWNS)


def change_root(
    root: Path, readable: Sequence[Path], binds: Sequence[tuple[Path, str]], folders: Sequence[str], tops: Sequence[str]
) -> None:
    """Makes `root` a small read-only file system and moves the process there. Needs a mount namespace of its own.

    Args:
        root: an empty folder.
        readable: files and folders it shows at their own paths.
        binds: others, with the paths they get.
        folders: empty folders it has.
        tops: folders right below `root` that are mounts of their own, so that all in them can be moved at once.
    """
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    options = "size=1m,nr_inodes=4096,mode=755"
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, options)
    for top in tops:
        (root / top.lstrip("/")).mkdir()
        mount("tmpfs", root / top.lstrip("/"), "tmpfs", MS_NOSUID | MS_NODEV, options)
    for path in readable:
        bind(path, root / path.relative_to("/"))
    for source, place in binds:
        bind(source, root / place.lstrip("/"))
    for device in DEVICES:
        bind(device, root / device.relative_to("/"), read_only=False)
    for folder in (*folders, "old"):
        (root / folder.lstrip("/")).mkdir(parents=True, exist_ok=True)
    os.chdir(root)
    _syscall("pivot_root", _fork.SYS_pivot_root, b".", b"old")
    os.chdir("/")
    unmount("/old")
    os.rmdir("/old")  # noqa: PTH106
    for place in ("/", *tops):
        mount("none", place, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID)


def mount_memory(target: str, *, mib: int, inodes: int, mode: int, again: bool = False, make: Make = _syscall) -> None:
    """Mounts a file system in memory, which does not note when something is read.

    Args:
        target: the folder it appears at.
        mib: how much it holds, in MiB.
        inodes: how many files and folders it holds, its root included.
        mode: who may do what with its root.
        again: it is there already and only gets these limits.
        make: see above.
    """
    flags = MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_NOATIME | (MS_REMOUNT if again else 0)
    mount("tmpfs", target, "tmpfs", flags, f"size={mib}m,nr_inodes={inodes},mode={mode:o}", make)
