"""Code blocks of many rollouts at once, on one thread: an asyncio task for each, which awaits `SandboxSession.arun`.

No thread waits for a snippet, so what runs at once is the sandbox's to decide, and decoding competes with one thread
for the interpreter, not with one per snippet. That thread also does what is CPU work around a snippet: it opens the
session (which stores the image) and renders the result (which tokenises text and preprocesses images). Meanwhile the
snippets of others go on, and what waits for the thread would have waited for it anyway, to be rendered.

Only this thread touches the sessions. When the executor is left it cancels its tasks, and a cancelled `arun` kills its
snippet; then it closes the sessions.
"""

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from types import TracebackType

from thyme import trace
from thyme.model.processor import Processor
from thyme.rollout.config import RolloutConfig
from thyme.rollout.output import Output, render
from thyme.rollout.same_result import is_same
from thyme.rollout.snapshots import Key, Snapshots, past_of
from thyme.rollout.types import Question, Turn
from thyme.sandbox import Sandbox, SandboxResult, SandboxSession, Status
from thyme.sandbox.past import Past, digest


class Diverged(RuntimeError):
    """The session of a branch is not what the model was told: code that was run again gave something else."""


class Executor:
    """Runs the code of one run's rollouts, each in a session of its own. Use as a context manager, once.

    Args:
        sandbox, processor, config: of the run.
        show_results: False withholds from the model what its code returned.
        snapshots: where sessions are kept as they stand after each code block, for branches; None: they are not. It
            outlives the executor.
    """

    def __init__(
        self,
        sandbox: Sandbox,
        processor: Processor,
        config: RolloutConfig,
        *,
        show_results: bool = True,
        snapshots: Snapshots | None = None,
    ) -> None:
        self._sandbox, self._processor, self._config = sandbox, processor, config
        self._show_results = show_results
        self._sessions: dict[int, SandboxSession] = {}
        self._snapshots = snapshots
        self._ran: dict[int, tuple[Past, ...] | None] = {}
        """What each session has run, None where its variables were lost."""
        self._forking: dict[Key, asyncio.Lock] = {}
        """A session is forked for one at a time."""
        self._keeping: dict[int, asyncio.Task[None]] = {}
        """Sessions that are being forked to be kept."""
        # Daemonic: a program may end with a run suspended for ever, its iterator neither exhausted nor closed.
        self._thread = threading.Thread(target=self._serve, name="thyme-rollout", daemon=True)

    def __enter__(self) -> "Executor":
        self._loop = asyncio.new_event_loop()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._leave)
        self._thread.join()

    def run(
        self, rollout: int, question: Question, seed: int, code: str, before: Sequence[Turn] = ()
    ) -> Future[tuple[SandboxResult, Output]]:
        """Runs a code block and renders its result. Does not block.

        Args:
            rollout: any number that names the rollout; its session is opened with its first code block.
            question: whose image and image path the session sees.
            seed: of the session's random generators.
            code: the snippet.
            before: turns of the rollout that this one branched off. A session that is opened is a fork of one that was
                kept after them; where there is none it runs their code first.

        Returns:
            A future of what the sandbox returned, and of the same as the model is shown it. It raises Diverged where
            that earlier code gives something else than it gave.
        """
        return asyncio.run_coroutine_threadsafe(self._run(rollout, question, seed, code, before), self._loop)

    def end(self, rollout: int) -> Future[None]:
        """Closes the session of `rollout`, if it has one. Does not block."""
        return asyncio.run_coroutine_threadsafe(self._end(rollout), self._loop)

    async def _run(
        self, rollout: int, question: Question, seed: int, code: str, before: Sequence[Turn]
    ) -> tuple[SandboxResult, Output]:
        if rollout not in self._sessions:
            with trace.span("sandbox", "open session", rollout):
                await self._open(rollout, question, seed, before)
        if rollout in self._keeping:
            with trace.span("sandbox", "keep session", rollout):
                await self._keeping.pop(rollout)
        with trace.span("sandbox", "run", rollout):
            result = await self._sessions[rollout].arun(code)
        self._note(rollout, question, seed, code, result)
        with trace.span("sandbox", "render", rollout):
            output = render(
                result if self._show_results else SandboxResult(status=Status.OK),
                self._processor,
                image_path=question.image_path,
                compat=self._config.compat,
                max_chars=self._config.max_output_chars,
                timeout_s=self._sandbox.config.timeout_s,
            )
        return result, output

    async def _open(self, rollout: int, question: Question, seed: int, before: Sequence[Turn]) -> None:
        """Brings the rollout's session to where it was after `before`: by a fork of one that is kept from there or from
        some rounds earlier, and by running the rest again."""
        turns = [turn for turn in before if turn.code is not None]
        session, done = None, len(turns)
        past = past_of(turns)
        if self._snapshots is not None and past is not None:
            while done and session is None:
                key = question.id, seed, past[:done]
                async with self._forking.setdefault(key, asyncio.Lock()):
                    session = await self._snapshots.fork(key)
                done -= session is None
        if session is None:
            session, done = self._new_session(question, seed), 0
        self._sessions[rollout], self._ran[rollout] = session, past
        await asyncio.sleep(0)  # the executor may have been left meanwhile: then nothing starts any more
        for turn in turns[done:]:
            assert turn.code is not None
            if not is_same(await session.arun(turn.code), turn):
                raise Diverged(f"question {question.id!r}: code that was run again gave something else")

    def _new_session(self, question: Question, seed: int) -> SandboxSession:
        return self._sandbox.session(
            question.image, question.image_path or None, seed=seed, more_images=question.more_images
        )

    def _note(self, rollout: int, question: Question, seed: int, code: str, result: SandboxResult) -> None:
        """Has the session be kept as it stands, while the model goes on."""
        past = None if result.restarted else self._ran.get(rollout)
        past = self._ran[rollout] = None if past is None else (*past, Past(code, digest(result)))
        if self._snapshots is None or past is None or not self._snapshots.wants((question.id, seed, past)):
            return
        self._keeping[rollout] = asyncio.create_task(self._keep(self._snapshots, rollout, (question.id, seed, past)))

    async def _keep(self, snapshots: Snapshots, rollout: int, key: Key) -> None:
        (kept,) = await self._sessions[rollout].afork()
        if kept.fork_detail or not snapshots.wants(key):
            kept.close()
        else:
            snapshots.add(key, kept)

    async def _end(self, rollout: int) -> None:
        if keeping := self._keeping.pop(rollout, None):
            await keeping
        if session := self._sessions.pop(rollout, None):
            session.close()

    def _leave(self) -> None:
        # At once, and not in a task: whatever is about to go on is to find itself cancelled.
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.stop()

    def _serve(self) -> None:
        try:
            self._loop.run_forever()
            self._loop.run_until_complete(_all_others())
        finally:
            for session in self._sessions.values():
                session.close()
            self._loop.close()


async def _all_others() -> None:
    """Waits for the ends of all tasks of this loop but the one that waits."""
    await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()}, return_exceptions=True)
