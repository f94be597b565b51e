"""A root that a child has left as it was made, for the next child: entering one costs a system call, where making one
and taking it down cost a tenth of a snippet, and a wait for every processor.

Nothing in a root can be changed but its scratch: all else is read-only, and a snippet can set no rights, owners, times
or attributes (syscalls.py). Whatever is made, removed or renamed leaves its time on the folder. A new root's scratch
has the time 0; as long as it has, nothing was ever there, and the next child cannot tell that there was another.
"""

from __future__ import annotations

import os

from thyme.sandbox import paths
from thyme.sandbox.plan import JailPlan
from thyme.sandbox.root import SCRATCH, BaseRoot


class KeptRoot:
    """The root of a child that has ended.

    Args:
        root: what it was made from.
        plan: the jail of the child.
        namespace: descriptor of its mount namespace, which is the object's from then on.

    Raises:
        OSError: no descriptor is left.
    """

    def __init__(self, root: BaseRoot, plan: JailPlan, namespace: int) -> None:
        self.namespace = namespace
        self.ruleset = self._folder = -1
        """Landlock's, with the scratch of this root; -1 without Landlock."""
        self._plan = plan
        try:
            with root.inside(namespace):
                self._folder = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
                if self.is_untouched():
                    self.ruleset = plan.ruleset()
                    for folder in (paths.DATA, paths.TMP):
                        plan.allow(self.ruleset, folder, writable=True)
        except OSError:
            self.close()
            raise

    def is_untouched(self) -> bool:
        """Whether nothing was ever made, removed or renamed in it. To be asked when no process is in it any more."""
        return self._folder >= 0 and not any(
            os.stat(folder.lstrip("/"), dir_fd=self._folder, follow_symlinks=False).st_mtime_ns for folder in SCRATCH
        )

    def close(self) -> None:
        """Lets go of it; it ends with the process that is in it, if there is one. Twice is fine."""
        for fd in (self.namespace, self.ruleset, self._folder):
            if fd >= 0:
                os.close(fd)
        self.namespace = self.ruleset = self._folder = -1
