"""A root that a child has left as it was made, for the next child: entering one costs a system call, where making one
and taking it down cost a tenth of a snippet, and a wait for every processor.

Nothing in a root can be changed but its scratch: all else is read-only, and a snippet can set no rights, owners, times
or attributes (syscalls.py). Whatever is made, removed or renamed leaves its time on the folder. A new root's scratch
has the time 0; as long as it has, nothing ever had a name there. A file without a name uses up a number, and the next
number is known. So nothing that a child could choose reaches the next.
"""

from __future__ import annotations

import os

from thyme.sandbox import paths
from thyme.sandbox.plan import JailPlan
from thyme.sandbox.root import SCRATCH, BaseRoot


class KeptRoot:
    """The root of a child that has ended. `namespace` is the descriptor of its mount namespace, `ruleset` that of
    Landlock's rules with the scratch of this root, -1 without Landlock."""

    def __init__(self, namespace: int, num_inodes: int) -> None:
        self.namespace = namespace
        self.ruleset = self._folder = -1
        self._num_inodes = num_inodes
        """That were made in it so far."""

    @classmethod
    def of(cls, root: BaseRoot, plan: JailPlan, namespace: int) -> KeptRoot | None:
        """The root that a child leaves for the first time; None where it is not as it was made.

        Args:
            root: what it was made from.
            plan: the jail of the child.
            namespace: descriptor of its mount namespace, which the root has from then on.

        Raises:
            OSError: no descriptor is left.
        """
        kept = cls(namespace, root.num_inodes)
        try:
            with root.inside(namespace):
                kept._folder = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
                if kept.is_untouched():
                    kept.ruleset = plan.ruleset()
                    for folder in (paths.DATA, paths.TMP):
                        plan.allow(kept.ruleset, folder, writable=True)
                    return kept
        except OSError:
            kept.close()
            raise
        kept.close()
        return None

    def is_untouched(self) -> bool:
        """Whether nothing was ever made, removed or renamed in it. To be asked when no process is in it any more.

        Raises:
            OSError: no descriptor is left.
        """
        if self._folder < 0 or any(
            os.stat(folder.lstrip("/"), dir_fd=self._folder, follow_symlinks=False).st_mtime_ns for folder in SCRATCH
        ):
            return False
        self._num_inodes += 1
        nameless = os.open(paths.TMP.lstrip("/"), os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, dir_fd=self._folder)
        try:
            return os.fstat(nameless).st_ino == self._num_inodes
        finally:
            os.close(nameless)

    def close(self) -> None:
        """Lets go of it; it ends with the process that is in it, if there is one. Twice is fine."""
        for fd in (self.namespace, self.ruleset, self._folder):
            if fd >= 0:
                os.close(fd)
        self.namespace = self.ruleset = self._folder = -1
