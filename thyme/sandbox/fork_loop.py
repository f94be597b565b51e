"""What the fork-server does all day: has a child forked for each order, reports it, and reports its end.

When there is nothing to do it forks the next child ahead of its order: forking, jailing and the first touch of some
hundred pages cost more than most snippets. Such a child is parked until an order comes, and serves that one session.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from thyme.sandbox.birth import Requests
from thyme.sandbox.paths import place_of
from thyme.sandbox.plan import JailPlan
from thyme.sandbox.protocol import GOODBYE, MESSAGE_BYTES, Order, Setup
from thyme.sandbox.root import BaseRoot, Image, put_image
from thyme.sandbox.slots import Place, Slots
from thyme.sandbox.template import Template

_POLL_S = 0.02
"""How often scratch folders without a quota are looked at."""
_LAST_CLEANING_S = 2.0
_READY_S = 4.0
"""How long a child may take to make its root."""


class _Child(NamedTuple):
    """A forked child. Channel and ruleset are of use until it has got its order."""

    pid: int
    pidfd: int
    place: Place
    channel: socket.socket
    ruleset: int

    def close(self) -> None:
        """Closes what hands an order over."""
        self.channel.close()
        if self.ruleset >= 0:
            os.close(self.ruleset)


class ForkLoop:
    """Owns the children: those that work, and one that is parked, forked ahead of the order it will get.

    Args:
        control: the socket to the client.
        setup: the client's wishes.
        plan: the jail that every child is put into.
        slots: where children live.
        template: the process that forks.
    """

    def __init__(self, control: socket.socket, setup: Setup, plan: JailPlan, slots: Slots, template: Template) -> None:
        self.slots = slots
        self._control, self._config, self._plan, self._template = control, setup.config, plan, template
        self._requests = Requests(plan, setup.config)
        self._working: dict[int, tuple[str, _Child]] = {}  # by pidfd; with the id of the order
        self._over_quota: set[int] = set()  # pidfds of children killed for their scratch
        self._poll = select.poll()
        self._parked: _Child | None = None
        self._parks = "parking" not in setup.off
        self._may_park = True

    def run(self) -> bool:
        """Serves until the client hangs up. Returns whether it did so without a goodbye."""
        self._poll.register(self._control, select.POLLIN)
        self._poll.register(self._template, select.POLLIN)
        while True:
            events = self._poll.poll(self._patience_ms())
            ready = {fd for fd, _ in events}
            if self._template.fileno() in ready:  # it speaks when it is asked
                raise RuntimeError("the template process has ended")
            for fd in ready & self._working.keys():
                self._reap(fd)
            if self._parked is not None and self._parked.pidfd in ready:
                self._bury(self._parked)
                self._parked = None
            if self._control.fileno() in ready:  # last: a new child may get the number of a descriptor closed above
                message, descriptors = self._receive()
                if message in (b"", GOODBYE):
                    self._kill_all()
                    return not message
                self._serve(message, descriptors)
            if self._working and not self._plan.rooted:
                self._watch_scratch()
            self.slots.clean_a_little()
            if not events and self._wants_to_park():
                self._park()

    def _patience_ms(self) -> int | None:
        """How long to wait for events: not at all while there is something to do meanwhile."""
        if self.slots.need_cleaning or self._wants_to_park():
            return 0
        return round(_POLL_S * 1000) if self._working and not self._plan.rooted else None

    # --- the client --------------------------------------------------------------------------------------------------

    def _send(self, message: dict[str, Any], descriptors: list[int] | None = None) -> None:
        data = json.dumps(message).encode()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client is gone: its end of file is next
            if descriptors:
                socket.send_fds(self._control, [data], descriptors)
            else:
                self._control.send(data)

    def _receive(self) -> tuple[bytes, list[int]]:
        try:
            return socket.recv_fds(self._control, MESSAGE_BYTES, 4)[:2]
        except ConnectionResetError:  # it ended without having read all that it was told
            return b"", []

    def _serve(self, message: bytes, descriptors: list[int]) -> None:
        """Hands an order to the child that is parked, or to one forked for it."""
        order: Order = json.loads(message)
        images = self._images(order)
        child: _Child | None = None
        try:
            child = self._unpark(images) or self._furnished(self._spawn(images, early=False), images)
            self._working[child.pidfd] = order["id"], child
            more = [child.ruleset] if child.ruleset >= 0 else []
            for stored in images if self._plan.root is None else ():
                self._plan.allow(child.ruleset, f"{self._plan.images}/{stored.file}")
            # Before it can answer: whose result the client has, that it can kill, also when this process is stopped.
            self._send({"forked": order["id"]}, [child.pidfd])
            socket.send_fds(child.channel, [message], [*descriptors, *more])
        except OSError as error:
            self._send({"exited": order["id"], "failed": str(error)})
        finally:
            for fd in descriptors:
                os.close(fd)
            if child is not None:
                child.close()  # without an order it leaves
        self._may_park = True

    # --- children ----------------------------------------------------------------------------------------------------

    def _images(self, order: Order) -> list[Image]:
        """The input image of an order, and further ones."""
        if order["image_file"] is None:
            return []
        told = [(order["image_path"], order["image_file"]), *order["more_images"]]
        folder_of = self._plan.folder_of_image
        return [Image(file=file, path=place_of(path), folder=folder_of(path)) for path, file in told]

    def _spawn(self, images: Sequence[Image] = (), *, early: bool) -> _Child:
        """Forks a child that puts half of its jail on, in a root with room for `images`, and waits for its order."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        place: Place | None = None
        ruleset = -1
        try:
            with theirs:
                place = self.slots.take()
                ruleset = self._plan.ruleset()
                if place.scratch is not None:
                    self._plan.allow(ruleset, place.scratch, writable=True)
                given = [theirs.fileno()] if ruleset < 0 else [theirs.fileno(), ruleset]
                pid, pidfd = self._template.fork(self._requests.encode(place, images, early=early), given)
        except OSError:
            ours.close()
            if ruleset >= 0:
                os.close(ruleset)
            if place is not None:
                self.slots.release(place)
            raise
        self._poll.register(pidfd, select.POLLIN)
        return _Child(pid, pidfd, place, ours, ruleset)

    def _wants_to_park(self) -> bool:
        return self._parks and self._may_park and self._parked is None

    def _park(self) -> None:
        """Forks the next child while nobody waits for it. One that cannot be had or does not last is not tried again
        before the next order."""
        self._may_park = False
        with contextlib.suppress(OSError):
            self._parked = self._spawn(early=True)

    def _unpark(self, images: Sequence[Image]) -> _Child | None:
        """The child that was forked ahead, if there is one, it lives, and the images have room in its root."""
        root, parked = self._plan.root, self._parked
        if parked is None or (root is not None and not all(map(root.has_room_for, images))):
            return None
        self._parked = None
        try:
            if select.select([parked.pidfd], [], [], 0)[0]:
                self._bury(parked)
                return None
            return self._furnished(parked, images)
        except OSError:
            return None

    def _furnished(self, child: _Child, images: Sequence[Image]) -> _Child:
        """The child, which has seen nothing of a snippet yet, with the images in its root.

        Raises:
            OSError: that cannot be; the child is gone.
        """
        if images and self._plan.root is not None:
            try:
                self._furnish(self._plan.root, child, images)
            except OSError:
                _kill(child.pidfd)
                self._bury(child)
                raise
        return child

    def _furnish(self, root: BaseRoot, child: _Child, images: Sequence[Image]) -> None:
        child.channel.settimeout(_READY_S)
        _, descriptors, _, _ = socket.recv_fds(child.channel, MESSAGE_BYTES, 1)
        if not descriptors:
            raise ChildProcessError("it has ended")
        uid, mounts = self._plan.uid_of(child.place.slot), []
        try:
            mounts += [root.detached(image) for image in images]
            with root.inside(descriptors[0]):
                for image, mount_fd in zip(images, mounts, strict=True):
                    put_image(mount_fd, image, self._config, uid, is_first=image is images[0])
                    self._plan.allow_image(child.ruleset, image)
        finally:
            for fd in (*mounts, descriptors[0]):
                os.close(fd)

    def _bury(self, child: _Child) -> None:
        """A child that ended before it got an order."""
        self._poll.unregister(child.pidfd)
        child.close()
        os.close(child.pidfd)
        self._template.reap(child.pid)
        self.slots.release(child.place)

    def _reap(self, pidfd: int) -> None:
        """A child that ended after its order."""
        id_, ended = self._working.pop(pidfd)
        self._poll.unregister(pidfd)
        os.close(pidfd)
        status, cpu_s = self._template.reap(ended.pid)
        self.slots.release(ended.place)
        over_quota = pidfd in self._over_quota
        self._over_quota.discard(pidfd)
        self._send({"exited": id_, "status": status, "cpu_s": cpu_s, "scratch": over_quota})

    def _watch_scratch(self) -> None:
        for pidfd, (_, child) in self._working.items():
            if self.slots.is_over_quota(child.place):
                self._over_quota.add(pidfd)
                _kill(pidfd)

    def _kill_all(self) -> None:
        for pidfd in self._working:
            _kill(pidfd)
        for _, child in self._working.values():
            self._template.reap(child.pid)
            self.slots.release(child.place)
        if self._parked is not None:
            _kill(self._parked.pidfd)
            self._bury(self._parked)
        until = time.monotonic() + _LAST_CLEANING_S
        while self.slots.need_cleaning and time.monotonic() < until:
            self.slots.clean_a_little()


def _kill(pidfd: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
