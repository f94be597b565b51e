"""A judge behind an OpenAI-compatible server (vLLM, SGLang, a vendor's), asked by the `openai` client.

The client waits and tries again by itself: after time-outs, lost connections, 408, 409, 429 and 5xx, as long as
`Retry-After` says. Here is what it does not do: a bound on open requests, a deadline over all tries, answers that are
no verdict, a cache, one request where the same is asked twice at a time, and counting.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from thyme import trace
from thyme.rewards.config import JudgeConfig
from thyme.rewards.judge import JudgeUnavailable
from thyme.rewards.judge_prompts import (
    consistency_prompt,
    correctness_prompt,
    read_consistency,
    read_correctness,
)
from thyme.rewards.scorer import ScorerError
from thyme.rewards.verdict_cache import VerdictCache

if TYPE_CHECKING:
    import openai

T = TypeVar("T")

_LONGEST_WAIT = 8.0
"""Seconds between two tries, where the server does not ask for more: the client's."""


class HttpJudge:
    """An `AsyncJudge`; use it on one event loop, and `close` it there.

    Args:
        config: with a url.

    Raises:
        ValueError: the `openai` package is not installed; the cache is no folder that can be written to.
    """

    def __init__(self, config: JudgeConfig) -> None:
        self._config = config
        self._client = _client(config, self._on_request)
        self._cache = None if config.cache is None else VerdictCache(Path(config.cache))
        self._slots = asyncio.Semaphore(config.concurrency)
        self._asking: dict[tuple[str, Callable[[str], Any]], asyncio.Task[Any]] = {}
        self._has_answered = False
        self._lock = threading.Lock()  # the loop's thread counts, another one reads
        self._counts: Counter[str] = Counter()
        self._seconds: list[float] = []

    async def correct(self, question: str, answer: str, solution: str) -> bool:
        return await self.ask(correctness_prompt(question, answer, solution), read_correctness)

    async def consistent(self, thinking: str, answer: str) -> bool:
        return await self.ask(consistency_prompt(thinking, answer), read_consistency)

    async def ask(self, prompt: str, read: Callable[[str], T | None]) -> T:
        """`AsyncJudge.ask`, from the cache or the server; what is being asked is not asked again.

        Raises:
            JudgeUnavailable: no answer that `read` takes, after all tries.
            ScorerError: the server refuses, and never answered.
        """
        config = self._config
        key = VerdictCache.key(
            model=config.model, prompt=prompt, temperature=config.temperature, max_tokens=config.max_tokens
        )
        if self._cache is not None and (said := self._cache.get(key)) is not None and (kept := read(said)) is not None:
            self._count("cache_hits")
            return kept
        asked = (key, read)
        task = self._asking.get(asked)
        if task is None:
            task = self._asking[asked] = asyncio.create_task(self._answer(prompt, read, key))
            task.add_done_callback(lambda _: self._asking.pop(asked))
        answer: T = await asyncio.shield(task)
        return answer

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.close()

    def metrics(self) -> dict[str, float]:
        """Since the last call: verdicts asked of the server, hits of the cache, further tries, failures, and seconds
        that a verdict took with all its tries, without the wait for a free slot."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
            seconds, self._seconds = sorted(self._seconds), []
        found = {f"judge/{name}": float(counts[name]) for name in ("calls", "cache_hits", "retries", "failures")}
        if seconds:
            found |= {
                f"judge/call_s_p{percent}": seconds[min(len(seconds) * percent // 100, len(seconds) - 1)]
                for percent in (50, 95)
            }
        return found

    async def _answer(self, prompt: str, read: Callable[[str], T | None], key: str) -> T:
        import openai

        async with self._slots:
            self._count("calls")
            started = time.monotonic()
            try:
                with trace.span("judge", "ask", asyncio.current_task()):
                    said, answer = await self._said(prompt, read)
            except (openai.OpenAIError, TimeoutError, _NoVerdict) as error:
                self._count("failures")
                raise self._failure(error) from error
            with self._lock:
                self._seconds.append(time.monotonic() - started)
        self._has_answered = True
        if self._cache is not None:
            self._cache.put(key, said)
        return answer

    async def _said(self, prompt: str, read: Callable[[str], T | None]) -> tuple[str, T]:
        """Words that `read` takes and what it makes of them, within the tries and the time there are."""
        config = self._config
        deadline = (config.retries + 1) * config.timeout_s + config.retries * _LONGEST_WAIT
        left = config.retries
        async with asyncio.timeout(deadline):
            while True:
                response = await self._client.with_options(max_retries=left).chat.completions.with_raw_response.create(
                    model=config.model or "",
                    messages=[{"role": "user", "content": prompt}],
                    temperature=config.temperature,
                    max_completion_tokens=config.max_tokens,
                )
                said, ended = _words(response)
                if (answer := read(said)) is not None:
                    return said, answer
                left -= response.retries_taken + 1
                if left < 0:
                    hint = "; raise judge.max_tokens" if ended == "length" else ""
                    raise _NoVerdict(f"its answer is no verdict: {said[:200]!r} (ended by {ended}{hint})")
                self._count("retries")

    def _failure(self, error: Exception) -> Exception:
        """What to raise for a request that failed for good."""
        import openai

        where = f"judge {self._config.model!r} at {self._config.url}"
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        if isinstance(error, TimeoutError):
            what = "no answer in time, tries and waits together"
        elif isinstance(error, openai.APITimeoutError):
            what = f"no answer within judge.timeout_s = {self._config.timeout_s:g}"
        elif isinstance(error, _NoVerdict):
            what = str(error)
        elif isinstance(error, openai.APIConnectionError):
            what = f"no connection: {error.__cause__ or error}"
        elif isinstance(error, openai.APIStatusError):
            what = f"HTTP {error.status_code}: {' '.join(error.message.split())[:200]}"
            if not self._has_answered and error.status_code in (401, 403, 404, 405):
                key = f"; the key is that of ${self._config.api_key_env}" if error.status_code in (401, 403) else ""
                return ScorerError(f"{where} refuses its first request: {what}{key}")
        return JudgeUnavailable(f"{where}: {what} (judge.retries = {self._config.retries})")

    async def _on_request(self, request: Any) -> None:
        """Called by the client for each request that it sends."""
        if request.headers.get("x-stainless-retry-count", "0") != "0":
            self._count("retries")

    def _count(self, what: str) -> None:
        with self._lock:
            self._counts[what] += 1


class _NoVerdict(Exception):
    """The judge answered, and it was no verdict."""


def _client(config: JudgeConfig, on_request: Any) -> openai.AsyncOpenAI:
    try:
        import openai
    except ModuleNotFoundError as error:
        raise ValueError("judge.url: a judge needs the openai package: pip install 'thyme[judge]'") from error
    http = openai.DefaultAsyncHttpxClient(event_hooks={"request": [on_request]})
    return openai.AsyncOpenAI(
        base_url=config.url,
        api_key=os.environ.get(config.api_key_env) or "none",
        timeout=config.timeout_s,
        max_retries=config.retries,
        http_client=http,
    )


def _words(answer: Any) -> tuple[str, str]:
    """What a response says, and why it ended; no words where it is no chat completion."""
    try:
        choice = answer.parse().choices[0]
        content, ended = choice.message.content, str(choice.finish_reason)
    except (ValueError, AttributeError, IndexError, TypeError):
        return "", "no chat completion"
    return content if isinstance(content, str) else "", ended
