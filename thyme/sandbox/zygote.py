"""The fork-server: a small single-threaded process with warm imports that forks a jailed child per session.

Started by exec with an empty environment, so that it holds no secret of the trainer. It never reads code, images or
anything a child says; it forks, reaps, watches scratch folders that have no quota, and tells the client. It ends when
the client's end of the control socket closes, and takes every child with it.

When it has nothing to do it forks the next child ahead of its order: forking, jailing and the first touch of some
hundred pages cost more than most snippets. Such a child is parked until an order comes, and serves that one session.

Messages on the control socket (SOCK_SEQPACKET, JSON): the first configures, then {"fork": id, ...} with four
descriptors (stdout, session socket, pixels, code), and last GOODBYE from a client that tidies up itself. Answers:
{"hello": ...}, {"forked": id} with a pidfd, and {"exited": id, ...}.
"""

# Paths here are the snippet's strings, or descriptors.
# ruff: noqa: PTH102, PTH208
from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from thyme.sandbox import jail
from thyme.sandbox.config import SandboxConfig
from thyme.sandbox.preload import anybody_may_read, preload, readable_paths
from thyme.sandbox.result import Layer
from thyme.sandbox.scratch import usage, wipe

MESSAGE_BYTES = 64 * 1024
GOODBYE = b"{}"
UID_BASE = 1_900_000_000
POLL_S = 0.02
SESSION_CPU_ROUNDS = 20
_OPEN_FILES = 64
_FILE_MIB = 16
_ORPHANED = 3
"""Exit status of a fork-server whose client ended without a goodbye."""
_DEVICES = (Path("/dev/null"), Path("/dev/zero"), Path("/dev/urandom"))


def main(control_fd: int) -> None:
    """Entry of the exec-ed process."""
    control = socket.socket(fileno=control_fd)
    setup = json.loads(control.recv(MESSAGE_BYTES))
    os.umask(0o077)
    jail.set_name("thyme-zygote")
    with contextlib.suppress(OSError):  # children are the first to go when memory runs out
        Path("/proc/self/oom_score_adj").write_text("1000")
    leftovers = _Leftovers(os.getppid(), Path(setup["run_dir"]), [Path(name) for name in setup["groups"]])
    off = frozenset(setup["off"])
    isolated = setup["config"]["isolation"] == "auto"
    layers = _enter_namespaces(off) if isolated else []
    if any(layer.name == "pid namespace" and layer.ok for layer in layers):
        inner = os.fork()
        if inner:
            _stand_by(control, inner, leftovers)
        jail.die_with_parent()
    if isolated and "namespaces" not in off:
        # Last, and not for the process that stands by: it could not leave its control group any more, and pivot_root
        # moves everybody in the mount namespace.
        layers += [_enter(name, off) for name in ("cgroup", "mount")]
    zygote = Zygote(control, setup, layers)
    orphaned = False
    try:
        orphaned = zygote.loop()
    finally:
        if not any(layer.name == "pid namespace" and layer.ok for layer in layers):
            leftovers.clean_up(orphaned)
        os._exit(_ORPHANED if orphaned else 0)


def _stand_by(control: socket.socket, inner: int, leftovers: _Leftovers) -> None:
    """What stays outside the pid namespace: waits for the zygote and tidies up after a client that was killed."""
    control.close()
    code = os.waitstatus_to_exitcode(os.waitpid(inner, 0)[1])
    leftovers.clean_up(code == _ORPHANED)
    os._exit(code & 0xFF)


class _Leftovers(NamedTuple):
    """What a client that was killed leaves on the machine."""

    client: int
    run_dir: Path
    groups: list[Path]

    def clean_up(self, orphaned: bool) -> None:
        """A client that lives cleans up itself (and may be about to start the next zygote). One that was killed hangs
        up before it is gone, so its process tells only where the zygote did not hear it."""
        if not orphaned and os.getppid() == self.client:
            return
        # At the top these would load what `preload` leaves out: compressors, libuuid.
        import shutil

        from thyme.sandbox import cgroup

        with contextlib.suppress(OSError):
            for slot in (self.run_dir / "slots").iterdir():
                for _ in wipe(str(slot)):
                    pass
        shutil.rmtree(self.run_dir, ignore_errors=True)
        cgroup.leave(self.groups)


def _enter_namespaces(off: frozenset[str]) -> list[Layer]:
    """Every namespace the machine gives, once, for all children."""
    layers: list[Layer] = []
    if "namespaces" in off:
        return [Layer("namespaces", False, False, "switched off")]
    if not jail.capabilities() >> 21 & 1:  # CAP_SYS_ADMIN
        try:
            jail.enter_user_namespace()
        except OSError as error:
            return [Layer("namespaces", False, False, f"{error}; allow unprivileged user namespaces to have them")]
        layers.append(Layer("user namespace", True, False, "keeps the caller's id"))
    return [*layers, *(_enter(name, off) for name in ("pid", "net", "ipc", "uts"))]


def _enter(name: str, off: frozenset[str]) -> Layer:
    if name in off:
        return Layer(f"{name} namespace", False, False, "switched off")
    try:
        jail.unshare(jail.NAMESPACES[name])
    except OSError as error:
        return Layer(f"{name} namespace", False, False, str(error))
    return Layer(f"{name} namespace", True, False, "entered")


class _Child(NamedTuple):
    """A child that waits for its order."""

    pid: int
    pidfd: int
    slot: int
    channel: socket.socket
    ruleset: int

    def close(self) -> None:
        self.channel.close()
        if self.ruleset >= 0:
            os.close(self.ruleset)


class Zygote:
    """Owns the children: pidfd -> (id, pid, slot), and one that is parked, forked ahead of the order it will get."""

    def __init__(self, control: socket.socket, setup: dict[str, Any], layers: list[Layer]) -> None:
        self.control = control
        self.config = SandboxConfig(**{**setup["config"], "preload": tuple(setup["config"]["preload"])})
        self.off = frozenset(setup["off"])
        self.run_dir = Path(setup["run_dir"])
        self.layers = layers
        self.isolated = self.config.isolation == "auto"
        self.children: dict[int, tuple[str, int, int]] = {}  # pidfd -> (id, pid, slot)
        self.over: set[int] = set()  # pidfds killed for their scratch
        self.poll = select.poll()
        self.parked: _Child | None = None
        self.may_park = True
        self.slots: set[int] = set()
        self.folders: set[int] = set()  # slots that have a folder
        self.wiping: list[tuple[int, Iterator[None]]] = []
        missing = preload(list(self.config.preload))
        # Only now: they load Pillow, and child.py patches what it loads.
        from thyme.sandbox import child, shims

        self.child = child
        child.set_up()
        readable = readable_paths()
        stdlib = Path(os.__file__).parent
        sys.path[:] = [p for p in sys.path if Path(p) in (stdlib, stdlib / "lib-dynload")]
        threads = len(os.listdir("/proc/self/task"))
        if threads != 1:
            raise RuntimeError(
                f"the fork-server must have one thread, has {threads}: a preloaded module started others"
            )
        jail.collapse_heap()
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        self.plan = self._plan(readable, pages * os.sysconf("SC_PAGE_SIZE"))
        sys.path_importer_cache.clear()
        shims.install()
        child.warm_up(f"{self.slot_root}/warm", self.config)
        gc.collect()
        gc.freeze()  # collected objects would be written to, and so copied, in every child
        if self.isolated:
            self._probe()
        own = os.pidfd_open(os.getpid())
        self._send({"hello": os.getpid(), "layers": self.layers, "missing": missing}, [own])
        os.close(own)

    # --- the jail of this machine ------------------------------------------------------------------------------------

    def _note(self, name: str, ok: bool, core: bool, detail: str) -> bool:
        self.layers.append(Layer(name, ok, core, detail))
        return ok

    def _plan(self, readable: list[Path], mapped: int) -> Any:
        config, root = self.config, self.run_dir / "root"
        rooted = False
        if any(layer.name == "mount namespace" and layer.ok for layer in self.layers):
            before = os.umask(0o022)
            try:
                jail.change_root(root, readable, [(self.run_dir / "images", "/images")])
                rooted = True
            except OSError as error:
                self._note("private root", False, False, str(error))
            finally:
                os.umask(before)
            if rooted:
                self._note(
                    "private root", True, False, "read-only root without /proc, /etc or homes; scratch in memory"
                )
        abi = 0
        if self.isolated and "landlock" not in self.off:
            try:
                abi = jail.landlock_abi()
            except OSError as error:
                self._note("landlock", False, not rooted, f"{error}; needs Linux 5.13 with landlock among CONFIG_LSM")
            else:
                self._note("landlock", True, True, f"ABI {abi}")
        program = None
        if self.isolated and "seccomp" not in self.off:
            try:
                program = jail.SeccompFilter()
                self._note("seccomp", True, True, f"allow-list of {program.num_instructions} instructions")
            except ValueError as error:
                self._note("seccomp", False, True, str(error))
        uid_base = 0
        if self.isolated and os.geteuid() == 0 and "uid" not in self.off:
            may_change = jail.capabilities() >> 6 & 3 == 3  # CAP_SETGID, CAP_SETUID
            reachable = all(anybody_may_read(p) for p in readable) and (rooted or anybody_may_read(self.run_dir))
            if any(layer.name == "user namespace" for layer in self.layers):
                self._note("own user id", False, False, "inside a user namespace of its own")
            elif may_change and reachable:
                uid_base = UID_BASE
                self._note("own user id", True, False, f"from {UID_BASE}")
            else:
                self._note("own user id", False, False, "no right to change it" if reachable else "Python lies in a "
                           "folder other users cannot enter: the id is kept, without capabilities")  # fmt: skip
        self.slot_root = "/slots" if rooted else str(self.run_dir / "slots")
        if not rooted:
            slots = Path(self.slot_root)
            slots.mkdir(exist_ok=True)
            slots.chmod(0o711)
            for left in slots.iterdir():  # by children of a fork-server that was killed
                self.slots.add(int(left.name))
                self.folders.add(int(left.name))
                self.wiping.append((int(left.name), wipe(str(left), keep=True)))
        self.rooted, self.private = rooted, rooted and not abi
        return self.child.JailPlan(
            abi=abi,
            readable=tuple(jail.landlock_rule(p, abi) for p in (*readable, *_DEVICES)) if abi else (),
            null=os.open("/dev/null", os.O_RDWR),
            seccomp=program,
            private_mounts=self.private,
            drop=self.isolated and "capabilities" not in self.off,
            uid_base=uid_base,
            limits=jail.limits(
                address_space=resource.RLIM_INFINITY if "limits" in self.off else mapped + (config.memory_mib << 20),
                cpu_s=max(1, round(config.timeout_s + 1) * SESSION_CPU_ROUNDS),
                file_bytes=_FILE_MIB << 20,
                open_files=_OPEN_FILES,
            ),
            images="/images" if rooted else str(self.run_dir / "images"),
        )  # fmt: skip

    def _probe(self) -> None:
        """Jails a child of our own and lets it try what snippets must not be able to do."""
        read_end, write_end = os.pipe()
        slot = self._take_slot()
        place = self.child.Place(slot=slot, scratch=self._scratch(slot))
        ruleset = self._ruleset(place.scratch)
        kept = [write_end] if ruleset < 0 else [write_end, ruleset]
        pid = jail.fork()
        if pid == 0:
            report: Any = ""
            try:
                self.child.prepare(place, self.plan, self.config, kept)
                self.child.confine(self.plan, -1 if ruleset < 0 else 4)
                report = jail.attempt_escapes(self.run_dir / "canary")
            except OSError as error:
                report = f"{error}"
            finally:
                for fd in (write_end, 3):  # where it was and where `prepare` puts it
                    with contextlib.suppress(OSError):
                        os.write(fd, json.dumps(report).encode())
                        break
                os._exit(0)
        os.close(write_end)
        if ruleset >= 0:
            os.close(ruleset)
        ready, _, _ = select.select([read_end], [], [], 10)
        answer = os.read(read_end, MESSAGE_BYTES) if ready else b""
        os.close(read_end)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        self._release_slot(slot)
        report = json.loads(answer) if answer else "the probe died before it could report"
        if isinstance(report, str):
            self._note("putting on the jail", False, True, report)
            return
        for attempt, code in report:
            refused = code != 0
            detail = f"refused ({os.strerror(code)})" if refused else "NOT refused"
            self._note(f"probe: {attempt}", refused, True, detail)

    # --- slots -------------------------------------------------------------------------------------------------------

    def _scratch(self, slot: int) -> str:
        return "/mnt/data" if self.private else f"{self.slot_root}/{slot}"

    def _take_slot(self) -> int:
        slot = next(i for i in range(1, 1 << 20) if i not in self.slots)
        self.slots.add(slot)
        if self.private or slot in self.folders:
            return slot
        folder = self._scratch(slot)
        uid = self.plan.uid_base and self.plan.uid_base + slot
        os.mkdir(folder, 0o700)
        if self.rooted:
            jail.mount_scratch(folder, self.config.scratch_mib, self.config.max_files, uid)
        elif uid:
            os.chown(folder, uid, uid)
        self.folders.add(slot)
        return slot

    def _release_slot(self, slot: int) -> None:
        if self.private:
            self.slots.discard(slot)  # its mount went with its mount namespace
        else:
            self.wiping.append((slot, wipe(self._scratch(slot), keep=True)))

    def _wipe_a_little(self) -> None:
        """Two milliseconds of cleaning; a folder that resists is abandoned, and its number with it."""
        until = time.monotonic() + 0.002
        while self.wiping and time.monotonic() < until:
            slot, steps = self.wiping[0]
            try:
                next(steps)
            except StopIteration:
                self.wiping.pop(0)
                self.slots.discard(slot)
            except OSError:
                self.wiping.pop(0)

    # --- the loop ----------------------------------------------------------------------------------------------------

    def _send(self, message: dict[str, Any], descriptors: list[int] | None = None) -> None:
        data = json.dumps(message).encode()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client is gone: its end of file is next
            if descriptors:
                socket.send_fds(self.control, [data], descriptors)
            else:
                self.control.send(data)

    def _receive(self) -> tuple[bytes, list[int]]:
        try:
            return socket.recv_fds(self.control, MESSAGE_BYTES, 4)[:2]
        except ConnectionResetError:  # it ended without having read all that it was told
            return b"", []

    def loop(self) -> bool:
        """Serves until the client hangs up; whether it did so without a goodbye."""
        self.poll.register(self.control, select.POLLIN)
        own = os.getpid()
        while os.getpid() == own:
            events = self.poll.poll(self._patience_ms())
            ready = {fd for fd, _ in events}
            for fd in ready & self.children.keys():
                self._reap(fd)
            if self.parked is not None and self.parked.pidfd in ready:
                self._bury(self.parked)
                self.parked = None
            if self.control.fileno() in ready:  # last: a new child may get the number of a descriptor closed above
                message, descriptors = self._receive()
                if message in (b"", GOODBYE):
                    self._kill_all()
                    return not message
                self._serve(message, descriptors)
            if self.children and not self.rooted:
                self._watch_scratch()
            self._wipe_a_little()
            if not events and self._wants_to_park():
                self._park()
        return False

    def _wants_to_park(self) -> bool:
        # With private mounts the image must be known before the fork.
        return self.parked is None and self.may_park and not self.private and "parking" not in self.off

    def _patience_ms(self) -> int | None:
        """How long to wait for events: not at all while there is something to do meanwhile."""
        if self.wiping or self._wants_to_park():
            return 0
        return round(POLL_S * 1000) if self.children and not self.rooted else None

    def _serve(self, message: bytes, descriptors: list[int]) -> None:
        """Hands an order to the child that is parked, or to one forked for it."""
        order = json.loads(message)
        image_file = order["image_file"] and f"{self.plan.images}/{order['image_file']}"
        child: _Child | None = None
        try:
            child = self._unpark() or self._spawn(image_file, early=False)
            self.children[child.pidfd] = (order["fork"], child.pid, child.slot)
            if child.ruleset >= 0 and image_file:
                self._allow(child.ruleset, image_file)
            more = [child.ruleset] if child.ruleset >= 0 else []
            # Before it can answer: whose result the client has, that it can kill, also when this process is stopped.
            self._send({"forked": order["fork"]}, [child.pidfd])
            socket.send_fds(child.channel, [message], [*descriptors, *more])
        except OSError as error:
            self._send({"exited": order["fork"], "failed": str(error)})
        finally:
            for fd in descriptors:
                os.close(fd)
            if child is not None:
                child.close()  # without an order it leaves
        self.may_park = True

    def _spawn(self, image_file: str | None, *, early: bool) -> _Child:
        """Forks a child that puts half of its jail on and waits for its order."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        slot, ruleset, pid = 0, -1, 0
        try:
            with theirs:
                slot = self._take_slot()
                place = self.child.Place(slot=slot, scratch=self._scratch(slot), image_file=image_file)
                ruleset = self._ruleset(place.scratch)
                pid = jail.fork()
                if pid == 0:
                    self._become_child(place, theirs.fileno(), early)
            pidfd = os.pidfd_open(pid)
        except OSError:
            _Child(pid, -1, slot, ours, ruleset).close()
            if pid:  # it leaves, as nobody can send it an order any more
                os.waitpid(pid, 0)
            if slot:
                self._release_slot(slot)
            raise
        self.poll.register(pidfd, select.POLLIN)
        return _Child(pid, pidfd, slot, ours, ruleset)

    def _park(self) -> None:
        """Forks the next child while nobody waits for it. One that cannot be had or does not last is not tried again
        before the next order."""
        self.may_park = False
        with contextlib.suppress(OSError):
            self.parked = self._spawn(None, early=True)

    def _unpark(self) -> _Child | None:
        """The child that was forked ahead, if there is one and it lives."""
        child, self.parked = self.parked, None
        if child is not None and select.select([child.pidfd], [], [], 0)[0]:
            self._bury(child)
            return None
        return child

    def _bury(self, child: _Child) -> None:
        """A parked child that ended before it got an order."""
        self.poll.unregister(child.pidfd)
        child.close()
        os.close(child.pidfd)
        os.waitpid(child.pid, 0)
        self._release_slot(child.slot)

    def _ruleset(self, scratch: str) -> int:
        """The Landlock ruleset of one child: what all may read, and its scratch. -1 without Landlock."""
        if not self.plan.abi:
            return -1
        own = jail.landlock_rule(scratch, self.plan.abi, writable=True)
        try:
            return jail.landlock_ruleset(self.plan.abi, (*self.plan.readable, own))
        finally:
            jail.landlock_close(own)

    def _allow(self, ruleset: int, file: str) -> None:
        """Lets a child read one file more: its image."""
        rule = jail.landlock_rule(file, self.plan.abi)
        try:
            jail.landlock_add(ruleset, rule)
        finally:
            jail.landlock_close(rule)

    def _become_child(self, place: Any, channel: int, early: bool) -> None:
        """The forked side. Never returns, whatever happens."""
        leave = os._exit
        try:
            live = self.child.live
            self.control.detach()
            live(place, self.plan, self.config, channel, early=early)
        except BaseException as error:
            with contextlib.suppress(BaseException):
                os.write(2, f"{error}\n".encode())
        finally:
            leave(3)

    def _reap(self, pidfd: int) -> None:
        id_, pid, slot = self.children.pop(pidfd)
        self.poll.unregister(pidfd)
        os.close(pidfd)
        _, status, usage_ = os.wait4(pid, 0)
        self._release_slot(slot)
        self._send({"exited": id_, "status": status, "cpu_s": usage_.ru_utime + usage_.ru_stime,
                    "scratch": pidfd in self.over})  # fmt: skip
        self.over.discard(pidfd)

    def _watch_scratch(self) -> None:
        for pidfd, (_, _, slot) in self.children.items():
            used, files = usage(self._scratch(slot), self.config.max_files)
            if used > self.config.scratch_mib << 20 or files > self.config.max_files:
                self.over.add(pidfd)
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)

    def _kill_all(self) -> None:
        for pidfd in self.children:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        for _, pid, slot in self.children.values():
            os.waitpid(pid, 0)
            self._release_slot(slot)
        if self.parked is not None:
            signal.pidfd_send_signal(self.parked.pidfd, signal.SIGKILL)
            self._bury(self.parked)
        until = time.monotonic() + 2
        while self.wiping and time.monotonic() < until:
            self._wipe_a_little()


def setup_message(config: SandboxConfig, run_dir: Path, off: frozenset[str], groups: Sequence[Path]) -> bytes:
    """The first message to a zygote, which was put into the control groups at `groups`."""
    return json.dumps(
        {"config": asdict(config), "run_dir": str(run_dir), "off": sorted(off), "groups": [str(g) for g in groups]}
    ).encode()


if ctypes.sizeof(ctypes.c_void_p) != 8:
    raise ImportError("the sandbox needs a 64-bit system")
