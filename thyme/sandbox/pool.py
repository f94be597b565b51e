"""What callers hold: a Sandbox, which runs one-shot snippets, and its sessions, which keep their variables."""

from __future__ import annotations

import asyncio
import os
import sys
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from thyme.sandbox.client import Client
from thyme.sandbox.config import SandboxConfig
from thyme.sandbox.past import Past, digest
from thyme.sandbox.result import Layer, SandboxResult, SandboxUnavailable, SnippetError, Status
from thyme.sandbox.session_state import Fork, SessionState

if TYPE_CHECKING:
    from PIL import Image


class SandboxSession:
    """The snippets of one rollout: one process, whose variables live from round to round. Made by Sandbox.session."""

    def __init__(self, owner: Sandbox, client: Client, state: SessionState, history: Sequence[Past] = ()) -> None:
        self._owner = owner  # a sandbox is closed when nobody holds it or a session of it
        self._client, self._state = client, state
        self._past = list(history)
        """What was run since its variables were last lost."""
        self._due: list[Past] = []
        """Of that, what its process has not run yet."""
        self.fork_detail = ""
        """Of a fork: "" where it has its parent's memory, else why the code is run again."""

    @property
    def image_path(self) -> str:
        """The path of the input image as snippets know it."""
        return self._state.image_path

    @property
    def seed(self) -> int:
        """What `random` and `numpy.random` were seeded with."""
        return self._state.seed

    def run(self, code: str) -> SandboxResult:
        """Runs one snippet and waits for it. Never raises because of the snippet; see SandboxResult.status.

        In a fork whose parent's code has to be run again first, it is; where that gives something else than it gave,
        the snippet is REFUSED.
        """
        while self._due:
            if refused := self._repeated(self._waited(self._due[0].code)):
                return refused
        return self._noted(code, self._waited(code))

    async def arun(self, code: str) -> SandboxResult:
        """`run` for asyncio. A cancelled await kills the snippet."""
        while self._due:
            again = await asyncio.wrap_future(self._client.submit(self._state, self._due[0].code).future)
            if refused := self._repeated(again):
                return refused
        return self._noted(code, await asyncio.wrap_future(self._client.submit(self._state, code).future))

    def fork(self, n: int = 1) -> list[SandboxSession]:
        """Sessions that go on from here: with this one's variables, files and random state, and from then on apart.

        Where the layer "live fork" holds (Sandbox.layers) each gets this one's memory and files as they are, in a jail
        of its own. Elsewhere, and where something cannot be copied (a mapped file, one that is open and deleted, no
        room among max_sessions), the code that was run here is run again before the first snippet of the fork, under
        the same seed; `fork_detail` says why.

        Args:
            n: how many.

        Raises:
            ValueError: n below 1; the session is closed, or runs something.
        """
        return self._forked(self._begin_fork(n).future.result(), n)

    async def afork(self, n: int = 1) -> list[SandboxSession]:
        """`fork` for asyncio."""
        return self._forked(await asyncio.wrap_future(self._begin_fork(n).future), n)

    def close(self) -> None:
        """Ends the process and deletes its scratch. Further runs are REFUSED."""
        self._client.close_session(self._state)

    def _waited(self, code: str) -> SandboxResult:
        round_ = self._client.submit(self._state, code)
        try:
            result: SandboxResult = round_.future.result()
        except BaseException:
            round_.future.cancel()
            raise
        return result

    def _noted(self, code: str, result: SandboxResult) -> SandboxResult:
        """Keeps in mind what has to be run again to come to the same variables."""
        if result.restarted:
            self._past.clear()
        if result.status is not Status.REFUSED:
            self._past.append(Past(code, digest(result)))
        if self._state.child is None:
            self._past.clear()
        return result

    def _repeated(self, result: SandboxResult) -> SandboxResult | None:
        """Goes on with what is due, None, where a snippet gave what it gave before; else what the caller gets."""
        expected = self._due.pop(0).digest
        if result.status is Status.REFUSED:
            return result
        if digest(result) == expected:
            return None
        self._due.clear()
        self.close()
        reason = "code that was run again gave something else than in the session that was forked"
        return replace(
            result, status=Status.REFUSED, stdout="", images=(), error=SnippetError("Diverged", reason, None)
        )

    def _begin_fork(self, n: int) -> Fork:
        if n < 1:
            raise ValueError(f"fork: n must be at least 1, got {n}")
        return self._client.fork(self._state, n)

    def _forked(self, outcome: list[SessionState] | SandboxResult, n: int) -> list[SandboxSession]:
        if isinstance(outcome, list):
            made = [SandboxSession(self._owner, self._client, state, self._past) for state in outcome]
            for session in made:
                session._due = list(self._due)
            return made
        made = [
            SandboxSession(self._owner, self._client, self._client.reopen(self._state), self._past) for _ in range(n)
        ]
        for session in made:
            session._due = list(self._past)
            session.fork_detail = outcome.error.message if outcome.error is not None else outcome.status.value
        return made

    def __enter__(self) -> SandboxSession:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Sandbox:
    """Runs model-written Python in jailed processes. Use as a context manager, or call close().

    Args:
        config: the limits; the default SandboxConfig() where None.

    Raises:
        SandboxUnavailable: the machine lacks the layers that isolation needs (config.isolation="auto").
    """

    def __init__(self, config: SandboxConfig | None = None, *, _off: frozenset[str] = frozenset()) -> None:
        # _off switches single layers off, so that tests can show that each of them is needed.
        self.config = config if config is not None else SandboxConfig()
        if sys.platform != "linux":
            raise SandboxUnavailable(f"the sandbox needs Linux, this is {sys.platform}")
        if self.config.isolation == "none":
            warnings.warn(
                "sandbox isolation is 'none': model-written code can do whatever this user can",
                RuntimeWarning,
                stacklevel=2,
            )
        self._client = Client(self.config, _off)
        self._finalizer = weakref.finalize(self, self._client.close)

    def session(
        self,
        image: Image.Image | str | os.PathLike[str] | None = None,
        image_path: str | None = None,
        *,
        seed: int = 0,
        more_images: Sequence[tuple[str, Image.Image | str | os.PathLike[str]]] = (),
    ) -> SandboxSession:
        """A session for one rollout. Its process is forked at its first snippet.

        Args:
            image: the input image, a path to it, or None. A PIL image must not be changed while sessions use it.
            image_path: the path the model was told; defaults to the path given, else "image.png".
            seed: of `random` and `numpy.random` in the session.
            more_images: further images, each behind the path the model was told. With any, a path that is not there is
                never taken for the input image.

        Raises:
            ValueError: an image cannot be read; further ones without a first, too many, or two under one path.
        """
        return self._session(image, image_path, seed, one_shot=False, more_images=more_images)

    def run(
        self,
        code: str,
        image: Image.Image | str | os.PathLike[str] | None = None,
        image_path: str | None = None,
        *,
        seed: int = 0,
    ) -> SandboxResult:
        """Runs one snippet in a process of its own and waits for it.

        Args:
            code: Python as the model wrote it.
            image: as for `session`.
            image_path: as for `session`.
            seed: as for `session`.

        Returns:
            What the snippet did. Nothing a snippet does raises.

        Raises:
            ValueError: the image cannot be read.
        """
        with self._session(image, image_path, seed, one_shot=True) as session:
            return session.run(code)

    async def arun(
        self,
        code: str,
        image: Image.Image | str | os.PathLike[str] | None = None,
        image_path: str | None = None,
        *,
        seed: int = 0,
    ) -> SandboxResult:
        """`run` for asyncio. A cancelled await kills the snippet.

        Args:
            code: Python as the model wrote it.
            image: as for `session`.
            image_path: as for `session`.
            seed: as for `session`.
        """
        with self._session(image, image_path, seed, one_shot=True) as session:
            return await session.arun(code)

    def layers(self) -> tuple[Layer, ...]:
        """What isolates here, layer by layer, and what the probe child was refused."""
        return self._client.layers

    @property
    def isolation(self) -> str:
        """ "full", "strong", "namespaces" or "none"."""
        return self._client.isolation

    def close(self) -> None:
        """Kills what runs, ends the fork-server, deletes every scratch folder."""
        self._finalizer()

    def _session(
        self, image: Any, image_path: str | None, seed: int, *, one_shot: bool, more_images: Sequence[Any] = ()
    ) -> SandboxSession:
        if image_path is None:
            image_path = os.fspath(image) if isinstance(image, (str, os.PathLike)) else "image.png"
        state = self._client.open_session(image, image_path, seed, one_shot=one_shot, more_images=more_images)
        return SandboxSession(self, self._client, state)

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
