"""A reward function of one's own, from a Python file: a group of rollouts in, a reward for each out.

    def reward(rollouts):            # or: async def reward(rollouts), or: async def reward(rollouts, judge)
        return [float(rollout.answer == rollout.question.solution) for rollout in rollouts]

A reward is a number, a `Reward`, or a dict of parts. Of a dict, "result", "consistency" and "formatting" are the parts
of that name, others are kept under their names, and "total" is what is learned from: if absent, the sum of the parts.

A plain function runs on a thread of its own, one group at a time, while decoding goes on. An async one runs on an event
loop of its own, for several groups at once; if it takes a `judge`, it gets the run's `thyme.rewards.judge.AsyncJudge`,
whose `ask` takes any question.

Whatever goes wrong before a first group was scored ends the run, as it will be the function's fault. Later, a group or
rollout that the function fails on earns 0, with `Reward.error` set, in the log and counted: one rollout must not cost
the step that all the others were sampled for. A plain function that does not come back ends the run at any time.
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import logging
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import replace
from math import isfinite
from numbers import Real
from pathlib import Path
from typing import Any

from thyme.rewards.judge import JudgeUnavailable
from thyme.rewards.judge_http import HttpJudge
from thyme.rewards.reward import NOTHING, Reward
from thyme.rewards.scorer import ScorerError
from thyme.rewards.threads import LoopThread, WorkThread
from thyme.rollout.types import Rollout

_log = logging.getLogger(__name__)

RewardFunction = Callable[..., Any]
_NAMED_PARTS = ("result", "consistency", "formatting")


def load_function(spec: str) -> RewardFunction:
    """The function that "file.py:name" names. The file's folder is put at the end of `sys.path`, for its imports.

    Raises:
        ValueError: no such file, it raises as it is imported, no such name, no function, other arguments than it gets.
    """
    file, _, name = spec.rpartition(":")
    path = Path(file).resolve()
    if not path.is_file():
        raise ValueError(f"reward.function {spec!r}: no file {file!r} in {Path.cwd()}")
    module_name = f"thyme_reward_{path.stem}"
    found = importlib.util.spec_from_file_location(module_name, path)
    assert found is not None and found.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(found)
    sys.modules[module_name] = module
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    try:
        found.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"reward.function {spec!r}: importing it raised {_told(error, path)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        what = "no function" if hasattr(module, name) else "not there"
        raise ValueError(f"reward.function {spec!r}: {name!r} is {what} in {path.name}")
    try:
        signature = inspect.signature(function)
    except ValueError:  # what is written in C may not tell
        return function
    try:
        signature.bind(None, **{key: None for key in signature.parameters if key == "judge"})
    except TypeError as error:
        raise ValueError(
            f"reward.function {spec!r}: takes {signature}, but it is called with one list of rollouts"
        ) from error
    return function


class FunctionScorer:
    """Scores groups by a function of one's own.

    Args:
        function: as the module says.
        name: what errors call it.
        loop: runs an async function, and waits for a plain one.
        timeout_s: seconds that the function may take for a group.
        judge: given to a function that takes one.

    Raises:
        ValueError: a judge that the function does not take, or the other way round.
    """

    def __init__(
        self,
        function: RewardFunction,
        name: str,
        *,
        loop: LoopThread,
        timeout_s: float = 600.0,
        judge: HttpJudge | None = None,
    ) -> None:
        called = function if inspect.isroutine(function) else type(function).__call__
        self._is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(called)
        _check_judge(function, name, judge, is_async=self._is_async)
        self._function, self._name, self._loop, self._judge = function, name, loop, judge
        self._path = Path(name.rpartition(":")[0]).resolve()
        self._arguments = {} if judge is None else {"judge": judge}
        self._timeout_s = timeout_s
        self._thread = None if self._is_async else WorkThread("reward function")
        self._turn = nullcontext() if self._is_async else asyncio.Lock()
        self._has_worked = False
        self._broken: str | None = None

    def submit(self, group: Sequence[Rollout]) -> Future[list[Reward]]:
        if self._broken is not None:
            raise ScorerError(self._broken)
        return self._loop.submit(self._score(list(group)))

    def metrics(self) -> dict[str, float]:
        return {} if self._judge is None else self._judge.metrics()

    def close(self) -> None:
        """Ends the thread of a plain function; a group that is being scored is finished."""
        if self._thread is not None:
            self._thread.close()

    async def _score(self, group: list[Rollout]) -> list[Reward]:
        try:
            async with self._turn, asyncio.timeout(self._timeout_s) as patience:
                given = await self._call(list(group))
        except (JudgeUnavailable, ScorerError):
            raise
        except Exception as error:
            if not patience.expired():
                return self._failed(group, f"raised {_told(error, self._path)}")
            what = f"has not come back in reward.function_timeout_s = {self._timeout_s:g}"
            if self._thread is None:
                return self._failed(group, what)
            self._broken = f"reward function {self._name}: {what} (question {group[0].question.id!r})"
            raise ScorerError(self._broken) from error
        return self._rewards(group, given)

    async def _call(self, group: list[Rollout]) -> Any:
        if self._thread is None:
            return await self._function(group, **self._arguments)
        if self._broken is not None:  # while this group waited for its turn
            raise ScorerError(self._broken)
        return await asyncio.wrap_future(self._thread.submit(lambda: self._function(group)))

    def _rewards(self, group: list[Rollout], given: Any) -> list[Reward]:
        """What the function gave, as rewards."""
        given = given.tolist() if hasattr(given, "tolist") else given  # of NumPy or torch
        if not isinstance(given, Sequence) or isinstance(given, str):
            hint = " (declare it with async def)" if inspect.iscoroutine(given) else ""
            if inspect.iscoroutine(given):
                given.close()
            return self._failed(group, f"gave a {type(given).__name__}, not a list of rewards{hint}")
        if len(given) != len(group):
            return self._failed(group, f"gave {len(given)} rewards for {len(group)} rollouts")
        rewards = []
        for rollout, item in zip(group, given, strict=True):
            try:
                rewards.append(_reward(item))
            except ValueError as error:
                rewards += self._failed([rollout], str(error))
        self._has_worked = True
        return rewards

    def _failed(self, rollouts: list[Rollout], what: str) -> list[Reward]:
        """Rewards of 0 that say why; an end to the run if no group has been scored."""
        which = f"question {rollouts[0].question.id!r}"
        if len(rollouts) == 1:
            which += f", rollout {rollouts[0].index}"
        if not self._has_worked:
            self._broken = f"reward function {self._name} failed on its first group ({which}): {what}"
            raise ScorerError(self._broken)
        _log.warning("reward function %s: %s earns 0: %s", self._name, which, what)
        return [replace(NOTHING, error=f"function: {what}")] * len(rollouts)


def _check_judge(function: RewardFunction, name: str, judge: HttpJudge | None, *, is_async: bool) -> None:
    """Raises where a judge would go unasked, or be missed."""
    try:
        takes = inspect.signature(function).parameters.get("judge")
    except ValueError:
        takes = None
    if takes is None and judge is not None:
        raise ValueError(f"judge.url is set, but reward function {name} takes no argument `judge`: it would go unasked")
    if takes is not None and judge is None and takes.default is inspect.Parameter.empty:
        raise ValueError(f"reward function {name} takes a judge: set judge.url and judge.model")
    if judge is not None and not is_async:
        raise ValueError(f"reward function {name} takes a judge, which is awaited: declare it with async def")


def _reward(item: Any) -> Reward:
    """One reward of those that a function gave.

    Raises:
        ValueError: neither a number nor a Reward nor a dict of numbers, or not finite.
    """
    if isinstance(item, Reward):
        _number(item.total, "total")
        return item
    if isinstance(item, Mapping):
        parts = {str(key): _number(value, repr(key)) for key, value in item.items()}
        if not parts:
            raise ValueError("gave an empty dict: name at least a 'total'")
        total = parts.pop("total") if "total" in parts else sum(parts.values())
        right, agrees, neat = (parts.pop(key, 0.0) for key in _NAMED_PARTS)
        return Reward(total=total, result=right, consistency=agrees, formatting=neat, parts=parts)
    return Reward(total=_number(item, "a reward"))


def _number(value: Any, what: str) -> float:
    if hasattr(value, "item"):  # of NumPy or torch
        value = value.item()
    if not isinstance(value, Real):
        raise ValueError(f"gave {value!r} for {what}: neither a number nor a Reward nor a dict of numbers"[:300])
    if not isfinite(value):
        raise ValueError(f"gave {float(value)} for {what}: not finite")
    return float(value)


def _told(error: BaseException, path: Path) -> str:
    """Type and message of an exception in one line, and the last line of the file that it came through."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path]
    where = f" ({path.name}, line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{where}"
