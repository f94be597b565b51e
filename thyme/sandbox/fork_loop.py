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
from typing import Any

from thyme.sandbox.birth import Requests
from thyme.sandbox.errand import Errand
from thyme.sandbox.forked_child import READY_S, ForkedChild
from thyme.sandbox.kept_root import KeptRoot
from thyme.sandbox.memory_plan import TO_BE_COPY, Baseline, plan_of
from thyme.sandbox.needed_pages import pages_needed, pages_of
from thyme.sandbox.paths import place_of
from thyme.sandbox.plan import JailPlan
from thyme.sandbox.protocol import GOODBYE, MESSAGE_BYTES, Held, Order, Setup
from thyme.sandbox.root import BaseRoot, Image, put_image
from thyme.sandbox.slots import Place, Slots
from thyme.sandbox.template import Template

_POLL_S = 0.02
"""How often scratch folders without a quota are looked at."""
_LAST_CLEANING_S = 2.0
_MOST_ENDED = 64
"""Of which the client is told at once."""
_BACK_TO_USUAL = 4
"""Orders for new sessions in a row after which the next is not expected to be for a copy."""


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
        self._working: dict[int, tuple[str, ForkedChild]] = {}  # by pidfd; with the id of the order
        self._over_quota: set[int] = set()  # pidfds of children killed for their scratch
        self._poll = select.poll()
        self._ended: list[dict[str, Any]] = []
        """What the client is to be told of children that ended; see `_tell`."""
        self._parked: ForkedChild | None = None
        self._parks = "parking" not in setup.off
        self._may_park = True
        self._baseline: Baseline | None = None
        """What is mapped in a child without an order; known once one was forked from another."""
        self._usual = b""
        """Pages that any child needs."""
        self._num_forks = self._since_fork = 0
        """Processes that were copied in a row; orders for new sessions since the last of them."""

    def learn(self, ranges: Sequence[tuple[int, int]], proc: int) -> None:
        """Finds out which pages children need, and has those that are parked get them beforehand.

        Args:
            ranges: where to look; see needed_pages.ranges_of.
            proc: descriptor of /proc.

        Raises:
            OSError: a child did not come to its end.
        """
        if self._parks:
            self._usual = pages_needed(ranges, proc, self._template, self._requests, self.slots, self._plan)
            self._template.expect(self._usual)

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
                self._hear(json.loads(message), descriptors)
            if self._working and not self._plan.rooted:
                self._watch_scratch()
            self.slots.clean_a_little()
            if not events:
                self._tell()
                if self._wants_to_park():
                    self._park()

    def _patience_ms(self) -> int | None:
        """How long to wait for events: not at all while there is something to do meanwhile."""
        if self._ended or self.slots.need_cleaning or self._wants_to_park():
            return 0
        return round(_POLL_S * 1000) if self._working and not self._plan.rooted else None

    # --- the client --------------------------------------------------------------------------------------------------

    def _tell(self, message: dict[str, Any] | None = None, descriptors: list[int] | None = None) -> None:
        """Sends a message, and with it, or where there is nothing else to do by itself, which children ended: each
        message wakes the client, and most children that end are of no interest to it any more."""
        told, self._ended = self._ended, []
        if not told and message is None:
            return
        data = json.dumps({**(message or {}), "ended": told}).encode()
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

    def _hear(self, message: Order | Held, descriptors: list[int]) -> None:
        if "held" in message:
            self._copy(message["held"])
        else:
            self._serve(message, descriptors)

    def _serve(self, order: Order, descriptors: list[int]) -> None:
        """Hands an order to the child that is parked, or to one forked for it."""
        images = self._images(order)
        child: ForkedChild | None = None
        ordered = False
        try:
            original = None if order["fork_of"] is None else self._child_of(order["fork_of"])
            child = self._unpark(images) or self._furnished(self._spawn(images, early=False), images)
            self._working[child.pidfd] = order["id"], child
            more = [child.ruleset] if child.ruleset >= 0 else []
            for stored in images if self._plan.root is None else ():
                self._plan.allow(child.ruleset, f"{self._plan.images}/{stored.file}")
            # Before it can answer: whose result the client has, that it can kill, also when this process is stopped.
            self._tell({"forked": order["id"]}, [child.pidfd])
            if original is None:
                socket.send_fds(child.channel, [_errand(order, images).encode()], [*descriptors, *more])
            else:
                _, pagemap, mem = original.read_through()
                self._as_born(child)
                socket.send_fds(child.channel, [TO_BE_COPY], [*descriptors, *more, mem, pagemap])
                child.copy_of = order["fork_of"]
            ordered = True
        except OSError as error:
            self._ended.append({"id": order["id"], "failed": str(error)})
        finally:
            for fd in descriptors:
                os.close(fd)
            if child is not None:
                child.ordered() if ordered else child.close()
        if order["fork_of"] is None:
            self._expect(None)
            self._may_park = True  # else once the copy is under way: it may be any moment, and parking takes a while

    def _copy(self, id_: str) -> None:
        """Has the children that wait to become copies of another one do so, which holds still by now. One that cannot
        is ended."""
        self._may_park, baseline = True, self._baseline
        copies = {id_of: child for id_of, child in self._working.values() if child.copy_of == id_}
        if not copies or baseline is None:
            return
        for child in copies.values():
            child.copy_of = None
        try:
            original = self._child_of(id_)
            for child in copies.values():  # takes them longest, and is the same whatever the original has mapped
                child.channel.send(baseline.plan)
            plan = plan_of(original.read_through()[0], baseline)
            for child in copies.values():
                child.channel.send(plan)
            self._expect(original)
        except OSError as error:
            for id_of, child in copies.items():
                self._ended.append({"id": id_of, "failed": str(error)})
                _kill(child.pidfd)

    # --- children ----------------------------------------------------------------------------------------------------

    def _as_born(self, child: ForkedChild) -> Baseline:
        if self._baseline is None:
            self._baseline = Baseline(child.read_through()[0])
        return self._baseline

    def _expect(self, original: ForkedChild | None) -> None:
        """Has children that are forked ahead get the pages that they will probably need, after copies of `original`, or
        an order for a new session: forks come in rows, and copies need all that the original wrote to."""
        if original is None:
            self._since_fork += 1
            if self._num_forks and self._since_fork == _BACK_TO_USUAL:
                self._template.expect(self._usual)
            return
        is_row = self._num_forks and self._since_fork < _BACK_TO_USUAL
        self._num_forks, self._since_fork = self._num_forks + 1 if is_row else 1, 0
        if self._parks and self._baseline is not None and self._num_forks & (self._num_forks - 1) == 0:
            self._template.expect(pages_of(original.read_through()[1], self._baseline.writable))

    def _child_of(self, id_: str) -> ForkedChild:
        """The child that has got the order of this id.

        Raises:
            OSError: there is none any more.
        """
        for found, child in self._working.values():
            if found == id_:
                return child
        raise ChildProcessError("the process to be copied has ended")

    def _images(self, order: Order) -> list[Image]:
        """The input image of an order, and further ones."""
        if order["image_file"] is None:
            return []
        told = [(order["image_path"], order["image_file"]), *order["more_images"]]
        folder_of = self._plan.folder_of_image
        return [Image(file=file, path=place_of(path), folder=folder_of(path)) for path, file in told]

    def _spawn(self, images: Sequence[Image] = (), *, early: bool) -> ForkedChild:
        """Forks a child that puts half of its jail on, in a root with room for `images`, and waits for its order."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        place: Place | None = None
        ruleset = -1
        try:
            with theirs:
                place = self.slots.take(kept=self._has_room_for(images))
                if place.root is not None:
                    ruleset = os.dup(place.root.ruleset) if place.root.ruleset >= 0 else -1
                    given = [theirs.fileno(), place.root.namespace]
                else:
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
                self.slots.release(place, place.root)
            raise
        self._poll.register(pidfd, select.POLLIN)
        return ForkedChild(pid, pidfd, place, ours, ruleset, furnished=place.root is not None)

    def _has_room_for(self, images: Sequence[Image]) -> bool:
        """Whether images can be put into a root that was made without knowing of them."""
        return self._plan.root is None or all(map(self._plan.root.has_room_for, images))

    def _wants_to_park(self) -> bool:
        return self._parks and self._may_park and self._parked is None

    def _park(self) -> None:
        """Forks the next child while nobody waits for it. One that cannot be had or does not last is not tried again
        before the next order."""
        self._may_park = False
        with contextlib.suppress(OSError):
            self._parked = self._spawn(early=True)

    def _unpark(self, images: Sequence[Image]) -> ForkedChild | None:
        """The child that was forked ahead, if there is one, it lives, and the images have room in its root."""
        parked = self._parked
        if parked is None or not self._has_room_for(images):
            return None
        self._parked = None
        try:
            if select.select([parked.pidfd], [], [], 0)[0]:
                self._bury(parked)
                return None
            return self._furnished(parked, images)
        except OSError:
            return None

    def _furnished(self, child: ForkedChild, images: Sequence[Image]) -> ForkedChild:
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

    def _furnish(self, root: BaseRoot, child: ForkedChild, images: Sequence[Image]) -> None:
        kept = child.place.root
        namespace = child.namespace(READY_S) if kept is None else os.dup(kept.namespace)
        uid, mounts = self._plan.uid_of(child.place.slot), []
        try:
            mounts += [root.detached(image) for image in images]
            with root.inside(namespace):
                for image, mount_fd in zip(images, mounts, strict=True):
                    put_image(mount_fd, image, self._config, uid, is_first=image is images[0])
                    self._plan.allow_image(child.ruleset, image)
        finally:
            for fd in (*mounts, namespace):
                os.close(fd)
            if kept is not None:  # no other child's any more, and to be taken down by this one: that takes a while
                kept.close()

    def _bury(self, child: ForkedChild) -> None:
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
        root = self._left_by(ended) if os.waitstatus_to_exitcode(status) <= 0 else None  # as if it could not enter it
        ended.close()
        self.slots.release(ended.place, root)
        over_quota = pidfd in self._over_quota
        self._over_quota.discard(pidfd)
        self._ended.append({"id": id_, "status": status, "cpu_s": cpu_s, "scratch": over_quota})
        if len(self._ended) >= _MOST_ENDED:
            self._tell()

    def _left_by(self, child: ForkedChild) -> KeptRoot | None:
        """The root of a child that has ended, where the next one can have it."""
        if self._plan.root is None or self._plan.seccomp is None:  # without, the child could hide what it did
            return None
        root = child.place.root
        with contextlib.suppress(OSError):
            if root is None and not child.furnished:
                return KeptRoot.of(self._plan.root, self._plan, child.namespace(0.0))
            if root is not None and root.is_untouched():
                return root
        return None

    def _watch_scratch(self) -> None:
        for pidfd, (_, child) in self._working.items():
            if self.slots.is_over_quota(child.place):
                self._over_quota.add(pidfd)
                _kill(pidfd)

    def _kill_all(self) -> None:
        for pidfd in self._working:
            _kill(pidfd)
        for _, child in self._working.values():
            child.close()
            self._template.reap(child.pid)
            self.slots.release(child.place)
        if self._parked is not None:
            _kill(self._parked.pidfd)
            self._bury(self._parked)
        until = time.monotonic() + _LAST_CLEANING_S
        while self.slots.need_cleaning and time.monotonic() < until:
            self.slots.clean_a_little()


def _errand(order: Order, images: Sequence[Image]) -> Errand:
    errand = Errand(image_path=order["image_path"], seed=order["seed"])
    if not images:
        return errand
    first, *rest = images
    told = (path for path, _ in order["more_images"])
    return errand._replace(
        place=first.path,
        folder=first.folder,
        file=first.file,
        format=order["image_format"],
        more_images=tuple((path, image.path, image.file) for path, image in zip(told, rest, strict=True)),
    )


def _kill(pidfd: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
