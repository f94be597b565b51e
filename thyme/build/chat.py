"""A model behind an OpenAI-compatible server: messages in, words out, nothing asked twice.

Answers are kept in a folder by all that they depend on, so that a run that is killed goes on without asking again for
what it was told already. Waits and further tries are the client's, as for a judge (`thyme.rewards.judge_http`).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thyme.build.config import EndpointConfig
from thyme.rewards.judge import JudgeUnavailable
from thyme.rewards.scorer import ScorerError
from thyme.rewards.verdict_cache import VerdictCache

if TYPE_CHECKING:
    import openai

_LONGEST_WAIT = 8.0
"""Seconds between two tries, where the server does not ask for more: the client's."""


class Chat:
    """Use it on one event loop, and `close` it there.

    Args:
        config: with a url.
        cache: the folder that keeps answers.
        table: what errors call it, such as "writer".

    Raises:
        ValueError: the `openai` package is not installed; the folder cannot be written to.
    """

    def __init__(self, config: EndpointConfig, cache: Path, table: str) -> None:
        self._config, self._table = config, table
        self._client = _client(config, table)
        self._cache = VerdictCache(cache)
        self._slots = asyncio.Semaphore(config.concurrency)
        self._has_answered = False
        self.counts: Counter[str] = Counter()
        """`calls` and `cache_hits` so far."""

    async def say(self, messages: list[dict[str, Any]], *, sample: int = 0, stop: str | None = None) -> str:
        """The model's answer.

        Args:
            messages: as the API takes them, pictures as data URIs.
            sample: tells samples of one question apart; the first sample of a temperature of 0 is the only one.
            stop: ends the answer; servers leave it out of what they return.

        Raises:
            JudgeUnavailable: no answer after all tries.
            ScorerError: the server refuses, and never answered.
        """
        import openai

        config = self._config
        said = hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).hexdigest()
        key = VerdictCache.key(
            url=config.url,
            model=config.model,
            messages=said,
            temperature=config.temperature,
            max_tokens=config.max_tokens,
            sample=sample,
            stop=stop,
        )
        if (kept := self._cache.get(key)) is not None:
            self.counts["cache_hits"] += 1
            return kept
        async with self._slots:
            self.counts["calls"] += 1
            deadline = (config.retries + 1) * config.timeout_s + config.retries * _LONGEST_WAIT
            try:
                async with asyncio.timeout(deadline):
                    answer = await self._client.chat.completions.create(
                        model=config.model or "",
                        messages=messages,  # type: ignore[arg-type]
                        temperature=config.temperature,
                        max_completion_tokens=config.max_tokens,
                        seed=sample,
                        stop=stop,
                    )
                words = answer.choices[0].message.content
            except (openai.OpenAIError, TimeoutError) as error:
                raise self._failure(error) from error
            except (AttributeError, IndexError, TypeError, ValueError) as error:
                raise JudgeUnavailable(f"{self._where()}: its answer is no chat completion") from error
        self._has_answered = True
        self._cache.put(key, words or "")
        return words or ""

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.close()

    def _where(self) -> str:
        return f"{self._table} {self._config.model!r} at {self._config.url}"

    def _failure(self, error: Exception) -> Exception:
        import openai

        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        if isinstance(error, openai.APIStatusError):
            what = f"HTTP {error.status_code}: {' '.join(error.message.split())[:200]}"
            if not self._has_answered and error.status_code in (400, 401, 403, 404, 405, 422):
                key = f"; the key is that of ${self._config.api_key_env}" if error.status_code in (401, 403) else ""
                return ScorerError(f"{self._where()} refuses its first request: {what}{key}")
        elif isinstance(error, openai.APITimeoutError | TimeoutError):
            what = f"no answer within {self._table}.timeout_s = {self._config.timeout_s:g}"
        elif isinstance(error, openai.APIConnectionError):
            what = f"no connection: {error.__cause__ or error}"
        return JudgeUnavailable(f"{self._where()}: {what} ({self._table}.retries = {self._config.retries})")


def _client(config: EndpointConfig, table: str) -> openai.AsyncOpenAI:
    try:
        import openai
    except ModuleNotFoundError as error:
        raise ValueError(f"{table}.url: an endpoint needs the openai package: pip install 'thyme[judge]'") from error
    return openai.AsyncOpenAI(
        base_url=config.url,
        api_key=os.environ.get(config.api_key_env) or "none",
        timeout=config.timeout_s,
        max_retries=config.retries,
    )
