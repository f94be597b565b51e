"""What the sandbox's fork-server needs of C++ (csrc/fork_calls.hpp, fork_service.hpp, fork_restore.hpp,
arena_region.hpp, shared_pages.hpp), in a module without a C++ runtime, as every sandbox process has it. The public
faces are thyme.sandbox.call_list, template, template_memory, memory_plan and checkpoint."""

def serve(socket: int, /) -> tuple[bytes, bytes] | None: ...
def make_calls(calls: bytearray, descriptors: tuple[int, ...], parameter: int, /) -> tuple[int, int]: ...
def hold(socket: int, ready: bytes, /) -> bool | None: ...
def open_descriptors(first: int, /) -> list[int]: ...
def gather_arenas(size: int) -> None: ...
def close_region() -> None: ...
def share_pages(ranges: bytes) -> int: ...
def system_call(number: int, /, *arguments: int | bytes | None) -> int: ...

MOST_CALLS: int
MOST_PAGES_BYTES: int
SEND_DESCRIPTORS: int
SERVICE: tuple[int, int]
CLOSE_FROM: int
SYS_capget: int
SYS_capset: int
SYS_chdir: int
SYS_chroot: int
SYS_close: int
SYS_dup: int
SYS_dup3: int
SYS_fchownat: int
SYS_mkdirat: int
SYS_mount: int
SYS_openat: int
SYS_pivot_root: int
SYS_prctl: int
SYS_prlimit64: int
SYS_setgroups: int
SYS_setns: int
SYS_setresgid: int
SYS_setresuid: int
SYS_umask: int
SYS_umount2: int
SYS_unshare: int
SYS_utimensat: int
SYS_write: int
