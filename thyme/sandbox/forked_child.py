"""A child as the fork-server holds it, from its birth to its end."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from thyme.sandbox.slots import Place

READY_S = 4.0
"""How long a child may take to make its root, and to say what it is reached through."""
_MESSAGE_BYTES = 16


@dataclass(slots=True, eq=False)
class ForkedChild:
    """A forked child. The ruleset is of use until it has got its order; over the channel it has sent, beside its mount
    namespace, what its memory is read through."""

    pid: int
    pidfd: int
    place: Place
    channel: socket.socket
    ruleset: int
    furnished: bool = False
    """Whether its mount namespace was taken from the channel, or is not sent: the child is in a root that was kept."""
    copy_of: str | None = None
    """The order of the child that it is to become a copy of; None where it is not to, or has been told how."""
    memory: tuple[int, ...] = ()
    """Descriptors of its /proc/self/maps, pagemap and mem, once somebody asked."""

    def ordered(self) -> None:
        """It has its order."""
        if self.ruleset >= 0:
            os.close(self.ruleset)
        self.ruleset = -1

    def namespace(self, timeout_s: float) -> int:
        """Descriptor of the mount namespace of the root that it has made, which is the caller's; to be asked once.

        Raises:
            OSError: it has not sent it by then.
        """
        self.channel.settimeout(timeout_s)
        _, descriptors, _, _ = socket.recv_fds(self.channel, _MESSAGE_BYTES, 1)
        if not descriptors:
            raise ChildProcessError("it has ended")
        self.furnished = True
        return descriptors[0]

    def close(self) -> None:
        """Closes whatever leads to it but the pidfd: without an order it leaves."""
        self.ordered()
        self.channel.close()
        for fd in self.memory:
            os.close(fd)
        self.memory = ()

    def read_through(self) -> tuple[int, int, int]:
        """Descriptors of its /proc/self/maps, pagemap and mem.

        Raises:
            OSError: it has not sent them.
        """
        if not self.memory:
            if not self.furnished:
                os.close(self.namespace(READY_S))
            self.channel.settimeout(READY_S)
            self.memory = tuple(socket.recv_fds(self.channel, _MESSAGE_BYTES, 3)[1])
        if len(self.memory) != 3:
            raise OSError("the process cannot be looked into")
        maps, pagemap, mem = self.memory
        return maps, pagemap, mem
