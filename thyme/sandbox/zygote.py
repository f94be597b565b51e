"""The fork-server: a small single-threaded process with warm imports that forks a jailed child per session.

Started by exec with an empty environment, so that it holds no secret of the trainer. It never reads code, images or
anything a child says; it forks, reaps, watches scratch folders that have no quota, and tells the client. It ends when
the client's end of the control socket closes, and takes every child with it.

Here is how it comes to be, in an order that matters: namespaces, imports, the plan of the jail, a rehearsal, a probe,
the template, a trial.
What it does then is in fork_loop.py.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import socket
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

from thyme.sandbox import jail
from thyme.sandbox.fork_loop import ForkLoop
from thyme.sandbox.needed_pages import ranges_of
from thyme.sandbox.plan import enter_namespace, enter_namespaces, make_plan
from thyme.sandbox.preload import preload, readable_paths
from thyme.sandbox.protocol import MESSAGE_BYTES, Setup
from thyme.sandbox.result import Layer, holds
from thyme.sandbox.run_folder import remove_run_folder
from thyme.sandbox.slots import Slots
from thyme.sandbox.template import Template
from thyme.sandbox.template_memory import end_gathering

_ORPHANED = 3
"""Exit status of a fork-server whose client ended without a goodbye."""


def main(control_fd: int) -> None:
    """Entry of the exec-ed process. Never returns.

    Args:
        control_fd: the socket to the client, on which the Setup comes first.
    """
    control = socket.socket(fileno=control_fd)
    setup = Setup.decode(control.recv(MESSAGE_BYTES))
    os.umask(0o077)
    jail.set_name("thyme-zygote")
    with contextlib.suppress(OSError):  # children are the first to go when memory runs out
        Path("/proc/self/oom_score_adj").write_text("1000")
    leftovers = _Leftovers(os.getppid(), setup.run_dir, setup.groups)
    isolated = setup.config.isolation == "auto"
    layers = enter_namespaces(setup.off) if isolated else []
    is_inner = holds(layers, "pid namespace")
    if is_inner:
        inner = os.fork()
        if inner:
            _stand_by(control, inner, leftovers)
        jail.die_with_parent()
    if isolated and "namespaces" not in setup.off:
        # Last, and not for the process that stands by: it could not leave its control group any more, and pivot_root
        # moves everybody in the mount namespace.
        layers += [enter_namespace(name, setup.off) for name in ("cgroup", "mount")]
    loop, template = _warm_up(control, setup, layers)
    orphaned = False
    try:
        orphaned = loop.run()
    finally:
        template.stop()
        if not is_inner:
            leftovers.clean_up(orphaned)
        os._exit(_ORPHANED if orphaned else 0)


def _stand_by(control: socket.socket, inner: int, leftovers: _Leftovers) -> None:
    """What stays outside the pid namespace: waits for the fork-server and cleans up after a client that was killed."""
    control.close()
    code = os.waitstatus_to_exitcode(os.waitpid(inner, 0)[1])
    leftovers.clean_up(code == _ORPHANED)
    os._exit(code & 0xFF)


class _Leftovers(NamedTuple):
    """What a client that was killed leaves on the machine."""

    client: int
    run_dir: Path
    groups: tuple[Path, ...]

    def clean_up(self, orphaned: bool) -> None:
        """A client that lives cleans up itself (and may be about to start the next fork-server). One that was killed
        hangs up before it is gone, so its process tells only where the fork-server did not hear it."""
        if not orphaned and os.getppid() == self.client:
            return
        from thyme.sandbox import cgroup  # at the top it would load libuuid, which `preload` leaves out

        remove_run_folder(self.run_dir)
        cgroup.leave(self.groups)


def _warm_up(control: socket.socket, setup: Setup, layers: list[Layer]) -> tuple[ForkLoop, Template]:
    """Loads what snippets use, plans the jail, rehearses and probes, and reports to the client."""
    missing = preload(list(setup.config.preload))
    # Only now: they load Pillow, and the child patches what it loads.
    from thyme.sandbox import child, paths, shims
    from thyme.sandbox.probe import probe

    child.set_up()
    readable = readable_paths()
    stdlib = Path(os.__file__).parent
    sys.path[:] = [p for p in sys.path if Path(p) in (stdlib, stdlib / "lib-dynload")]
    threads = sum(1 for _ in Path("/proc/self/task").iterdir())
    if threads != 1:
        raise RuntimeError(f"the fork-server must have one thread, has {threads}: a preloaded module started others")
    proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)  # before the root is another
    end_gathering()
    plan = make_plan(setup, layers, readable, proc)
    slots = Slots(plan, setup.config)
    sys.path_importer_cache.clear()
    if not plan.rooted:
        paths.install()
    shims.install()
    warm = slots.take()
    child.warm_up(warm.scratch, plan, setup.config)
    gc.collect()
    gc.freeze()  # collected objects would be written to, and so copied, in every child
    slots.release(warm)
    if setup.config.isolation == "auto":
        layers += probe(slots, plan, setup.config, setup.run_dir / "canary")
    ranges = ranges_of(proc)
    template = Template(
        partial(child.live, plan=plan, config=setup.config),
        leave=[control.fileno()],
        proc=proc,
        memory_bytes=None if "limits" in setup.off else setup.config.memory_mib << 20,
    )
    loop = ForkLoop(control, setup, plan, slots, template)
    with contextlib.suppress(OSError):  # without, they are made one by one
        loop.learn(ranges, proc)
    own = os.pidfd_open(os.getpid())
    hello = json.dumps({"hello": os.getpid(), "layers": layers, "missing": missing}).encode()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client is gone: the loop will see
        socket.send_fds(control, [hello], [own, template.pidfd])
    os.close(own)
    os.close(template.pidfd)
    return loop, template
