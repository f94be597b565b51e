"""What the sandbox's fork-server needs of C++ (csrc/fork_service.hpp, arena_region.hpp, shared_pages.hpp), in a module
without a C++ runtime, as every sandbox process has it. The public faces are thyme.sandbox.template and
thyme.sandbox.template_memory."""

def serve(socket: int) -> tuple[bytes, tuple[int, ...]] | None: ...
def gather_arenas(size: int) -> None: ...
def close_region() -> None: ...
def share_pages(ranges: bytes) -> int: ...
def system_call(number: int, /, *arguments: int | bytes | None) -> int: ...

SYS_capget: int
SYS_capset: int
SYS_mount: int
SYS_pivot_root: int
SYS_prctl: int
SYS_setns: int
SYS_umount2: int
SYS_unshare: int
