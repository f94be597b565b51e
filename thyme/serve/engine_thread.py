"""The one thread that has the engine: requests go in between two steps, all that is open is decoded together."""

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from functools import partial
from typing import TypeVar

from thyme.engine import Engine
from thyme.model.processor import Processor
from thyme.rollout.config import RolloutConfig
from thyme.rollout.executor import Executor
from thyme.sandbox import Sandbox
from thyme.serve.deltas import Event, Failed
from thyme.serve.errors import ApiError
from thyme.serve.generation import Generation
from thyme.serve.requests import Asked
from thyme.serve.tool_loop import ToolLoop

_log = logging.getLogger(__name__)
T = TypeVar("T")
Job = Generation | ToolLoop


class EngineThread:
    """Runs requests. Use as a context manager, once; the other methods may be called from any thread.

    Args:
        engine: nothing else may use it meanwhile.
        processor: of its model.
        sandbox: runs code, a session per choice; None: no request has tools.
        rollout: how results are shown to the model.
    """

    def __init__(
        self, engine: Engine, processor: Processor, sandbox: Sandbox | None, rollout: RolloutConfig | None
    ) -> None:
        self.engine, self.processor = engine, processor
        self.failure: str | None = None
        """Why the last step failed; None when one has succeeded since."""
        self._executor = None if sandbox is None else Executor(sandbox, processor, rollout or RolloutConfig())
        self._sessions = 0 if sandbox is None else sandbox.config.max_sessions
        self._inbox: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._jobs: dict[int, Job] = {}  # by sequence
        self._open: set[Job] = set()
        self._waiting: deque[Job] = deque()  # for sessions, or for the engine to wake
        self._pausing: Future[None] | None = None
        self._is_over = False
        self._thread = threading.Thread(target=self._serve, name="thyme-engine", daemon=True)

    def __enter__(self) -> "EngineThread":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._inbox.put(self._leave)
        self._thread.join()

    def submit(self, asked: Asked, tell: Callable[[Event], None]) -> Job:
        """Queues a request. `tell` is given its events, on the engine's thread: Begun, then Deltas until each choice
        has had its End; or Failed, which is the last."""
        if asked.tools is None:
            job: Job = Generation(asked, tell)
        else:
            assert self._executor is not None
            job = ToolLoop(asked, tell, executor=self._executor, processor=self.processor, wake=self._wake)
        self._inbox.put(partial(self._enqueue, job))
        return job

    def cancel(self, job: Job) -> None:
        """Ends a request; nothing happens to one that is over."""
        self._inbox.put(partial(self._end, job))

    def call(self, do: Callable[[Engine], T]) -> "Future[T]":
        """Does something with the engine between two steps."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(do(self.engine))
            except Exception as error:
                future.set_exception(error)

        self._inbox.put(run)
        return future

    def pause(self, mode: str) -> "Future[None]":
        """Stops decoding. Requests under way keep their place ("keep"), are ended with what they have ("abort"), or
        end first, while new ones wait ("wait")."""
        future: Future[None] = Future()

        def begin() -> None:
            if mode == "abort":
                for job in list(self._open):
                    self._end(job)
            if mode == "wait" and self._open - set(self._waiting):
                if self._pausing is not None:
                    self._pausing.add_done_callback(lambda _: future.set_result(None))
                else:
                    self._pausing = future
                return
            self.engine.pause()
            future.set_result(None)

        self._inbox.put(begin)
        return future

    def resume(self) -> "Future[None]":
        """Goes on after `pause`, also where that still waits."""

        def end(engine: Engine) -> None:
            engine.resume()
            pausing, self._pausing = self._pausing, None
            if pausing is not None:
                pausing.set_result(None)

        return self.call(end)

    @property
    def num_open(self) -> int:
        """Requests that run or wait."""
        return len(self._open)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a sandbox session or for the engine to wake."""
        return len(self._waiting)

    # On the thread.

    def _serve(self) -> None:
        with ExitStack() as stack:
            if self._executor is not None:
                stack.enter_context(self._executor)
            while not self._is_over:
                self._read_inbox(wait=not self._can_step())
                self._admit()
                if self._can_step() and not self._is_over:
                    self._step()
                self._pause_when_drained()
            self._read_inbox(wait=False)

    def _read_inbox(self, *, wait: bool) -> None:
        while wait or not self._inbox.empty():
            wait = False
            try:
                self._inbox.get()()
            except Exception:
                _log.exception("the engine's thread could not do what it was told")

    def _can_step(self) -> bool:
        return not self.engine.is_paused and not self.engine.is_asleep and self.engine.has_unfinished()

    def _step(self) -> None:
        try:
            completions = self.engine.step()
            self.failure = None
            for completion in completions:
                job = self._jobs.pop(completion.sequence.id)
                job.round_ended(self.engine, completion)
                if isinstance(job, ToolLoop) and not job.is_over:
                    self._jobs[completion.sequence.id] = job
            for job in list(self._open):
                if job.is_over and job not in self._waiting:
                    self._forget(job)
                else:
                    job.after_step(self.engine)
        except Exception as error:
            _log.exception("a step of the engine failed; every open request is answered 500")
            self.failure = f"{type(error).__name__}: {error}"
            for job in list(self._open):
                self._fail(job, ApiError(500, f"the engine failed: {self.failure}", code="engine_failed"))

    def _enqueue(self, job: Job) -> None:
        if self._is_over:
            job.tell(Failed(ApiError(503, "the server is on its way down", code="shutting_down")))
            return
        self._open.add(job)
        self._waiting.append(job)

    def _admit(self) -> None:
        """Begins what waits, in order, but for what needs more sandbox sessions than are free."""
        if not self._waiting or self.engine.is_asleep or self._pausing is not None:
            return
        used = sum(job.places for job in self._open - set(self._waiting))
        stay: deque[Job] = deque()
        while self._waiting:
            job = self._waiting.popleft()
            # A later request with tools does not overtake one that waits for sessions; one without may.
            if job.places and (used + job.places > self._sessions or any(other.places for other in stay)):
                stay.append(job)
                continue
            try:
                self._jobs |= dict.fromkeys(job.begin(self.engine), job)
                used += job.places
            except ValueError as error:
                self._open.discard(job)
                code = "context_length_exceeded" if "must fit into" in str(error) else None
                job.tell(Failed(ApiError(400, str(error), code=code)))
            except Exception as error:
                _log.exception("a request could not begin")
                self._fail(job, ApiError(500, f"the engine failed: {type(error).__name__}: {error}"))
        self._waiting = stay

    def _wake(self, job: ToolLoop) -> None:
        """A code block of the request has ended; from any thread."""
        self._inbox.put(partial(self._code_ended, job))

    def _code_ended(self, job: ToolLoop) -> None:
        if job in self._open:
            try:
                job.code_ended(self.engine)
            except Exception as error:
                _log.exception("a request's tools failed")
                self._fail(job, ApiError(500, f"the tools failed: {type(error).__name__}: {error}"))
            if job.is_over:
                self._forget(job)

    def _end(self, job: Job) -> None:
        if job in self._open:
            job.abort(self.engine)
            if job in self._waiting:
                self._waiting.remove(job)
                job.tell(Failed(ApiError(503, "the request was ended before it began", code="aborted")))
            self._forget(job)

    def _fail(self, job: Job, error: ApiError) -> None:
        job.tell(Failed(error))
        try:
            job.abort(self.engine)
        except Exception:
            _log.exception("a failed request could not be taken out of the engine")
        if job in self._waiting:
            self._waiting.remove(job)
        self._forget(job)

    def _forget(self, job: Job) -> None:
        self._open.discard(job)
        self._jobs = {number: other for number, other in self._jobs.items() if other is not job}

    def _pause_when_drained(self) -> None:
        if self._pausing is not None and not self._open - set(self._waiting):
            pausing, self._pausing = self._pausing, None
            self.engine.pause()
            pausing.set_result(None)

    def _leave(self) -> None:
        for job in list(self._open):
            self._fail(job, ApiError(503, "the server is on its way down", code="shutting_down"))
        self._is_over = True
