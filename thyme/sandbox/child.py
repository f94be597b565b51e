"""The process a snippet runs in: puts the jail on, then reads code, repairs it, runs it, hands pixels and text back.

It is forked from the zygote, lives as long as its session, and is never used for another. Everything after
`put_on_jail` is untrusted: the client believes nothing of what this process says about itself beyond its own snippet.
"""

# Paths here are the snippet's strings, or descriptors.
# ruff: noqa: PTH102, PTH106, PTH119
from __future__ import annotations
import __future__

import ast
import builtins
import contextlib
import errno
import functools
import io
import json
import operator
import os
import random
import re
import resource
import select
import signal
import socket
import stat
import sys
import types
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from thyme.sandbox import jail, paths, shims
from thyme.sandbox.config import SandboxConfig
from thyme.sandbox.preload import is_left_out
from thyme.sandbox.released import rewrite
from thyme.sandbox.repair import Repaired, repair
from thyme.sandbox.result import Fix
from thyme.sandbox.source import num_lines

STDOUT, SOCKET, PIXELS, CODE = 1, 3, 4, 5
CHANNEL = 3
_INPUT = "/mnt/input"
FRAME_BYTES = 24 * 1024
ORDER_BYTES = 64 * 1024
CUT = b"\n[output cut here]\n"
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
_FUTURE_FLAGS = functools.reduce(
    operator.or_, (getattr(__future__, n).compiler_flag for n in __future__.all_feature_names)
)
_REHEARSALS = 20
"""The interpreter specialises a function at its eighth call, and what that calls in turn some calls later."""

# The epilogue must not depend on names the snippet can replace by accident (`os._exit = ...` and the like).
_exit, _read, _write, _pread, _pwrite, _lseek = os._exit, os.read, os.write, os.pread, os.pwrite, os.lseek
_stat, _lstat, _scandir = os.stat, os.lstat, os.scandir
_join, _abspath, _isfile = os.path.join, os.path.abspath, os.path.isfile
_image_open = Image.open
_dumps = json.dumps
_PRINTED_IMAGE = re.compile(r"[^\s'\"<>|,;()\[\]{}]+\.(?:png|jpe?g|bmp|webp)\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class JailPlan:
    """What the zygote found possible; the same for every child."""

    abi: int
    """Landlock ABI, 0 without."""
    readable: tuple[bytes, ...]
    """Landlock rules for what every child may read."""
    null: int
    """/dev/null."""
    seccomp: jail.SeccompFilter | None
    """None without."""
    private_mounts: bool
    """Each child gets a mount namespace with a tmpfs of its own at /mnt/data. Only where Landlock does not keep the
    slots apart: taking mounts down waits for the kernel's RCU, about 10 ms a snippet."""
    drop: bool
    """Capabilities are emptied."""
    uid_base: int
    """The child becomes uid_base + slot; 0 keeps the identity."""
    limits: tuple[jail.Limit, ...]
    images: str
    """The folder where the stored images lie."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a child lives: known before there is work for it."""

    slot: int
    scratch: str
    image_file: str | None = None
    """Only with private mounts, which must show it before the right to mount is given up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a child is to work on, in the terms of its own file system."""

    scratch: str
    image_path: str
    image_file: str | None
    image_format: str | None
    seed: int


def prepare(place: Place, plan: JailPlan, config: SandboxConfig, kept: Sequence[int]) -> None:
    """The layers that need no order, so that a child may put them on while it waits for one. Raises OSError where one
    fails.

    Args:
        kept: descriptors that stay, as 3, 4, ...; 0, 1 and 2 become /dev/null, all others are closed.
    """
    jail.set_name("thyme-parked")
    uid = plan.uid_base and plan.uid_base + place.slot
    if plan.private_mounts:
        jail.unshare(jail.CLONE_NEWNS)
        jail.mount_scratch(paths.DATA, config.scratch_mib, config.max_files, uid)
        if place.image_file:
            jail.mount(place.image_file, _INPUT, None, jail.MS_BIND)
        jail.unmount("/images")
    # first out of the way, then into place: a source may sit where another belongs
    sources = [os.dup(fd) for fd in (plan.null, plan.null, plan.null, *kept)]
    for number, source in enumerate(sources):
        os.dup2(source, number, inheritable=False)
    os.closerange(3 + len(kept), 1 << 16)
    jail.limit(plan.limits)
    if uid:
        jail.become(uid)
    jail.die_with_parent()
    jail.no_new_privs()
    jail.not_dumpable()
    if plan.drop:
        jail.drop_capabilities()
    for folder in (place.scratch + paths.HOME[len(paths.DATA) :], place.scratch + "/tmp"):
        os.mkdir(folder, 0o700)
    os.chdir(place.scratch + paths.HOME[len(paths.DATA) :])


def confine(plan: JailPlan, ruleset: int) -> None:
    """The layers that come last: which files (-1: without Landlock), then which system calls."""
    if ruleset >= 0:
        jail.landlock_restrict(ruleset)
    if plan.seccomp is not None:
        plan.seccomp.install()


def live(place: Place, plan: JailPlan, config: SandboxConfig, channel: int, *, early: bool) -> None:
    """A child's life: half of the jail, the wait for an order, the other half, the snippets. Never returns.

    Nothing untrusted is read before `confine`: up to the order the child has seen only what the zygote made, and the
    order, which the zygote hands on, brings the first descriptor that leads to code.

    Args:
        channel: socket to the zygote. One message comes: the client's order, with stdout, session socket, pixels, code
            and, where there is one, the Landlock ruleset. Its end without a message is the zygote's.
        early: forked ahead of the order, so that there is time to rehearse.
    """
    prepare(place, plan, config, [channel])
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, CHANNEL) as zygote:
        if early and not select.select([zygote], [], [], 0)[0]:
            rehearse(place.scratch, config)
        message, descriptors, _, _ = socket.recv_fds(zygote, ORDER_BYTES, 5)
    if len(descriptors) < 4:
        _exit(0)
    jail.set_name("thyme-snippet")
    confine(plan, descriptors[4] if len(descriptors) > 4 else -1)
    for number, source in zip((STDOUT, SOCKET, PIXELS, CODE), descriptors[:4], strict=True):
        os.dup2(source, number, inheritable=False)
    os.closerange(CODE + 1, 1 << 16)
    serve(_job(json.loads(message), place, plan), config)


def _job(order: dict[str, Any], place: Place, plan: JailPlan) -> Job:
    file = order["image_file"] and (_INPUT if plan.private_mounts else f"{plan.images}/{order['image_file']}")
    return Job(
        scratch=place.scratch, image_path=order["image_path"], image_file=file, image_format=order["image_format"],
        seed=order["seed"],
    )  # fmt: skip


def rehearse(scratch: str, config: SandboxConfig) -> None:
    """Runs a snippet of ours as if it had been ordered, in a namespace and with an output that are thrown away. In a
    parked child the pages it writes to are copied now and not while somebody waits. Leaves nothing behind that a
    snippet could tell."""
    names = ("stdin", "stdout", "stderr", "__stdout__", "__stderr__")
    streams, main = [getattr(sys, name) for name in names], sys.modules["__main__"]
    job = Job(scratch=scratch, image_path="image.png", image_file=None, image_format=None, seed=0)
    frame = Session(job, config).run("print(1)")
    _dumps(frame, ensure_ascii=False)
    paths.use(None)
    sys.modules["__main__"] = main
    for name, stream in zip(names, streams, strict=True):
        setattr(sys, name, stream)
    assert frame["status"] == "ok", frame


def serve(job: Job, config: SandboxConfig) -> None:
    """Runs snippets until the client hangs up. Never returns."""
    code = 0
    try:
        if job.seed:
            seed(job.seed)
        session = Session(job, config)
        while order := _read(SOCKET, 32):
            frame = session.run(_pread(CODE, int(order), 0).decode("utf-8", "replace"))
            sent = _dumps(frame, ensure_ascii=False).encode("utf-8", "replace")
            if len(sent) > FRAME_BYTES:
                frame["fixes"] = []
                sent = _dumps(frame, ensure_ascii=False).encode("utf-8", "replace")
            _write(SOCKET, sent)
    except BaseException as problem:  # what is left of a process whose snippet broke the machinery
        code = 3
        _write(STDOUT, f"[the sandbox process failed: {problem!r:.500}]".encode())
    finally:
        _exit(code)


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def seed(number: int) -> None:
    """Seeds what snippets draw from."""
    random.seed(number)
    np.random.seed(number & 0xFFFFFFFF)


class _Capture(io.RawIOBase):
    """Text printed so far, straight into the shared memory; what does not fit is counted and dropped."""

    def __init__(self, limit: int) -> None:
        self.limit = limit - len(CUT)
        self.cut = False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return STDOUT

    def write(self, data: Any) -> int:
        data = bytes(data)
        room = self.limit - _lseek(STDOUT, 0, os.SEEK_CUR)
        if len(data) > room:
            self.cut = True
        if room > 0 and data:
            _write(STDOUT, data[:room])
        return len(data)


class Session:
    """One namespace over the rounds of a rollout."""

    def __init__(self, job: Job, config: SandboxConfig) -> None:
        self.config = config
        self.round = 0
        self.cpu_before = _cpu_s()
        self.map = paths.PathMap(job.scratch, job.image_path, job.image_file, job.image_format)
        self.image_size: tuple[int, int] | None = None
        if job.image_file and config.compat == "released":  # only its rewriting asks before the code runs
            with _image_open(job.image_file) as image:
                self.image_size = image.size
        paths.use(self.map)
        self.module = types.ModuleType("__main__")
        sys.modules["__main__"] = self.module
        self.names = self.module.__dict__
        self.names.update(
            __builtins__=builtins, image_path=job.image_path, temp_output_dir=paths.HOME, display=_display
        )
        self.before: dict[str, tuple[int, int]] = {}
        self.folders = tuple(job.scratch + name for name in ("", "/tmp", paths.HOME[len(paths.DATA) : -1]))
        self.touched = self._touched()

    def run(self, code: str) -> dict[str, Any]:
        """Repairs and runs one snippet; the frame for the client."""
        self.round += 1
        notes = shims.start_round()
        previous_path = self.names.get("processed_path")
        _lseek(STDOUT, 0, os.SEEK_SET)
        capture = _Capture(self.config.max_stdout_bytes)
        out = io.TextIOWrapper(capture, "utf-8", "backslashreplace", write_through=True)  # type: ignore[type-var]
        for name in ("stdout", "stderr", "__stdout__", "__stderr__"):
            setattr(sys, name, out)
        sys.stdin = io.TextIOWrapper(io.BytesIO(), "utf-8")
        status, error = "ok", None
        fixes: list[Fix] = []
        images: list[tuple[int, int]] = []
        try:
            repaired = self._repair(code)
            fixes = list(repaired.fixes)
            for statement, fix in repaired.imports:
                try:
                    exec(statement, self.names)
                except (ImportError, OSError):  # not installed; no input image
                    fixes.remove(fix)
            status, error = self._execute(repaired, code)
            if status in ("ok", "error"):
                printed = self._printed()
                found = self._results(printed, self.names.get("processed_path"), previous_path)
                images, problem = self._hand_over(found)
                if problem and status == "ok":
                    status, error = "output_limit", ("OutputLimit", problem, None)
        except MemoryError:
            status, error = "memory", ("MemoryError", self._memory_message(), None)
        except BaseException as problem:
            status, error = "error", (type(problem).__name__, _text_of(problem), None)
        length = _lseek(STDOUT, 0, os.SEEK_CUR)
        if capture.cut:
            length = min(length, self.config.max_stdout_bytes - len(CUT))
            _pwrite(STDOUT, CUT, length)
            length += len(CUT)
        if error is not None:
            kind, message, line = error
            line = line and min(line, num_lines(code))  # escaped line ends were made real ones
            limit = self.config.max_error_bytes
            message = self.map.shown(message).encode("utf-8", "replace")[:limit].decode("utf-8", "ignore")
            error = (str(kind)[:100], message, line)
        return {
            "status": status,
            "stdout": length,
            "error": error,
            "images": images,
            "fixes": [(f.kind, f.line, f.message[:300]) for f in (*fixes, *notes.fixes)][:40],
            "cpu_s": round(_cpu_s() - self.cpu_before, 4),
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }

    def _repair(self, code: str) -> Repaired:
        if self.config.compat == "released":
            code, notes = rewrite(code, image_path=self.map.image_path, image_size=self.image_size)
            repaired = repair(code, image_path=self.map.image_path, image_size=self.image_size, defined=set(self.names))
            return Repaired(repaired.code, (*notes, *repaired.fixes), repaired.imports)
        return repair(code, image_path=self.map.image_path, image_size=self.image_size, defined=set(self.names))

    def _execute(self, repaired: Repaired, original: str) -> tuple[str, tuple[str, str, int | None] | None]:
        filename = f"{shims.SNIPPET} {self.round}>"
        try:
            tree = ast.parse(repaired.code, filename)
            last = tree.body[-1] if tree.body else None
            if isinstance(last, ast.Expr) and not _is_docstring(tree):
                tree.body.pop()
            else:
                last = None
            program: types.CodeType = compile(tree, filename, "exec")
            shown: types.CodeType | None = None
            if last is not None:
                future = program.co_flags & _FUTURE_FLAGS
                shown = compile(ast.Expression(last.value), filename, "eval", future)
        except (SyntaxError, ValueError, RecursionError) as problem:
            return "error", _syntax_error(problem, original)
        try:
            exec(program, self.names)
            if shown is not None and last is not None:
                value = eval(shown, self.names)
                self._show_last(value, last.lineno)
        except SystemExit as stop:
            if stop.code in (None, 0):
                return "ok", None
            return "error", ("SystemExit", _text_of(stop), _line_of(stop, filename))
        except MemoryError as problem:
            return "memory", ("MemoryError", self._memory_message(_text_of(problem)), _line_of(problem, filename))
        except BaseException as problem:
            status = "output_limit" if _is_full(problem) else "error"
            return status, (_name_of(problem), self._explain(problem), _line_of(problem, filename))
        finally:
            with contextlib.suppress(BaseException):  # a snippet may leave anything in sys.stdout
                sys.stdout.flush()
        return "ok", None

    def _show_last(self, value: Any, line: int) -> None:
        """A bare last expression is shown, as in a notebook, when nothing else was."""
        if value is None or _lseek(STDOUT, 0, os.SEEK_CUR) or shims.notes.saved or _is_module_like(value):
            return
        if isinstance(value, Image.Image):
            _display(value)
        else:
            print(value if isinstance(value, str) else repr(value))
            shims.notes.fixes.append(Fix("show", line, "nothing was printed: the last expression is shown"))

    def _memory_message(self, detail: str = "") -> str:
        return f"the snippet used more than {self.config.memory_mib} MiB" + (f" ({detail})" if detail else "")

    def _explain(self, problem: BaseException) -> str:
        message = _text_of(problem)
        if isinstance(problem, ImportError):
            available = ", ".join(("numpy", "PIL", "cv2", *self.config.preload))
            if is_left_out(problem.name):
                return f"{problem.name!r} is not in the sandbox (available: {available}, most of the standard library)"
            return f"{message} (available: {available} and the standard library)"
        if _is_full(problem):
            file_mib = resource.getrlimit(resource.RLIMIT_FSIZE)[0] >> 20
            return (
                f"{message} (at most {self.config.scratch_mib} MiB in all, {file_mib} MiB a file, "
                f"{self.config.max_files} files and folders)"
            )
        cause = getattr(problem, "reason", problem) if isinstance(problem, OSError) else problem  # of a URLError
        if isinstance(cause, socket.gaierror):
            return f"{message} (there is no network)"
        if isinstance(cause, PermissionError):
            return f"{message} (allowed: reading {self.map.image_path!r}, writing below {paths.HOME!r}; no network)"
        if isinstance(problem, RuntimeError) and "start new thread" in message:
            return f"{message} (threads and processes are not available)"
        return message

    # --- results -----------------------------------------------------------------------------------------------------

    def _printed(self) -> str:
        length = min(_lseek(STDOUT, 0, os.SEEK_CUR), self.config.max_stdout_bytes)
        return _pread(STDOUT, length, 0).decode("utf-8", "replace")

    def _touched(self) -> list[int]:
        """When entries were last made or deleted: cheaper than looking at them all."""
        return [_stat(folder).st_mtime_ns for folder in self.folders]

    def _files(self) -> dict[str, tuple[int, int]]:
        """Regular files below the scratch -> (mtime in ns, bytes); symbolic links are not followed."""
        found: dict[str, tuple[int, int]] = {}
        pending = [self.map.scratch]
        while pending and len(found) < 4 * self.config.max_files:
            folder = pending.pop()
            try:
                with _scandir(folder) as entries:
                    for entry in entries:
                        path = _join(folder, entry.name)
                        facts = entry.stat(follow_symlinks=False)
                        if stat.S_ISDIR(facts.st_mode):
                            pending.append(path)
                        elif stat.S_ISREG(facts.st_mode):
                            found[path] = (facts.st_mtime_ns, facts.st_size)
            except OSError:
                continue
        return found

    def _results(self, printed: str, processed_path: Any, previous_path: Any) -> list[str]:
        """Which files are the result: `processed_path` if set now, then printed paths; else every new image."""
        named: list[str] = []
        if isinstance(processed_path, (str, os.PathLike)) and processed_path is not previous_path:
            named.append(os.fspath(processed_path))
        for line in printed.splitlines():
            if len(line) > 4096:
                continue
            stripped = line.strip()
            named += [stripped] if stripped.lower().endswith(paths.IMAGE_SUFFIXES) else []
            named += [path for path in _PRINTED_IMAGE.findall(line) if "/" in path]
        chosen: list[str] = []
        for name in named[:256]:
            real = self.map.real(name)
            if not isinstance(real, str) or real == self.map.image_file or "\0" in real:
                continue
            path = _abspath(
                real if real.startswith("/") else _join(self.map.scratch + paths.HOME[len(paths.DATA) :], real)
            )
            if path.startswith(self.map.scratch + "/") and path not in chosen and _isfile(path):
                chosen.append(path)
        touched = self._touched()
        if not chosen and not self.before and not shims.notes.saved and touched == self.touched:
            return []
        before, after = self.before, self._files()
        self.before, self.touched = after, touched
        if chosen:
            return chosen
        new = {p for p, facts in after.items() if before.get(p) != facts and p.lower().endswith(paths.IMAGE_SUFFIXES)}
        in_order = [self._real(p) for p in shims.notes.saved]
        ordered = [p for p in in_order if p in new]
        return ordered + sorted(new - set(ordered), key=lambda p: (after[p][0], p))

    def _real(self, path: str) -> str:
        real = self.map.real(path)
        return real if isinstance(real, str) else path

    def _hand_over(self, files: list[str]) -> tuple[list[tuple[int, int]], str]:
        """Writes RGB pixels of `files` to the shared memory. Returns (width, height) of each and what was too much."""
        sizes: list[tuple[int, int]] = []
        offset = 0
        for path in files:
            name = os.path.basename(path)[:80]
            try:
                if not stat.S_ISREG(_lstat(path).st_mode):
                    continue
                image = _image_open(path, formats=_FORMATS)
            except (OSError, ValueError, SyntaxError):
                continue
            width, height = image.size
            if len(sizes) >= self.config.max_images:
                return sizes, f"more than {self.config.max_images} images: return fewer"
            if width * height * 3 + offset > self.config.max_pixels * 3:
                return (
                    sizes,
                    f"{name} ({width}x{height}) is over the limit of {self.config.max_pixels} pixels: make it smaller",
                )
            if max(width, height) > self.config.max_aspect * min(width, height):
                return sizes, f"{name} ({width}x{height}) has a side {self.config.max_aspect:g} times the other or more"
            try:
                raw = (image if image.mode == "RGB" else image.convert("RGB")).tobytes()
            except (OSError, ValueError, SyntaxError):
                continue
            view = memoryview(raw)
            while view:
                done = _pwrite(PIXELS, view, offset)
                view, offset = view[done:], offset + done
            sizes.append((width, height))
        return sizes, ""


def _display(*values: Any) -> None:
    """`display(...)` of a notebook."""
    for value in values:
        if isinstance(value, Image.Image):
            shims.show(value)
        else:
            print(value)


def _is_docstring(tree: ast.Module) -> bool:
    last = tree.body[-1]
    return (
        len(tree.body) == 1
        and isinstance(last, ast.Expr)
        and isinstance(last.value, ast.Constant)
        and isinstance(last.value.value, str)
    )


def _is_full(problem: BaseException) -> bool:
    """Whether the scratch had no room for what was to be written."""
    return isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, errno.EFBIG)


def _is_module_like(value: Any) -> bool:
    return isinstance(value, (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type))


def _name_of(problem: BaseException) -> str:
    return str(getattr(type(problem), "__name__", "Exception"))


def _text_of(problem: BaseException) -> str:
    try:
        return str(problem)
    except BaseException:  # the snippet's own __str__
        return "(no message)"


def _line_of(problem: BaseException, filename: str) -> int | None:
    line, trace = None, problem.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == filename:
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def _syntax_error(problem: BaseException, original: str) -> tuple[str, str, int | None]:
    """The error of the snippet as it was written, not of a half-repaired one."""
    try:
        compile(original, "<snippet>", "exec")
    except SyntaxError as first:
        problem = first
    except (ValueError, RecursionError):
        pass
    if isinstance(problem, SyntaxError):
        return type(problem).__name__, problem.msg or "invalid syntax", problem.lineno
    return type(problem).__name__, _text_of(problem), None


def set_up() -> None:
    """Sets up in the zygote what every snippet starts from, and loads what the first would otherwise pay for."""
    repair("if True:\nprint(np.zeros(3))", image_path="image.png", image_size=(8, 8))
    sys.argv = ["snippet.py"]
    warnings.resetwarnings()
    warnings.simplefilter("ignore")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    seed(0)


def warm_up(folder: str, config: SandboxConfig) -> None:
    """Rehearses in the zygote until the interpreter has specialised the code around a snippet and filled its free
    lists: every child is born with that, instead of doing it over on pages copied for the purpose. `folder` is made and
    deleted."""
    folders = (folder, folder + "/tmp", folder + paths.HOME[len(paths.DATA) :])
    for name in folders:
        os.mkdir(name)
    for _ in range(_REHEARSALS):
        rehearse(folder, config)
    for name in reversed(folders):
        os.rmdir(name)
