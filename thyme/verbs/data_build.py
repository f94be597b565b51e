"""Build rows of raw ones: demonstrations by scenario, or with --rl hard questions; goes on where it was stopped.

A writer behind [writer] url, or this project's own engine, writes thought and code; the sandbox runs it; rules, a judge
and the evidence check drop what is not good enough. Every stage is counted (docs/build_data.md).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thyme.build.config import BuildConfig, EndpointConfig
from thyme.data.config import DataConfig
from thyme.interrupt import goes_on_with, left_to_asyncio
from thyme.progress import progress
from thyme.result import Result
from thyme.rewards.config import JudgeConfig
from thyme.shard import Shard
from thyme.verbs.config import LoopConfig

if TYPE_CHECKING:
    from thyme.build.chat import Chat
    from thyme.build.draft import Writer
    from thyme.build.outcome import Outcome
    from thyme.build.plan import Plan
    from thyme.build.raw import RawRows
    from thyme.build.run import Line
    from thyme.build.store import Store


@dataclass(frozen=True, kw_only=True)
class Config(LoopConfig):
    """What is built of the raw rows of `data.train`, and by whom."""

    name: str = "build"
    shard: str = ""
    """This machine's part of the work, such as 2/8, in a folder that all share; empty: all of it."""
    data: DataConfig = field(default_factory=DataConfig)
    build: BuildConfig = field(default_factory=BuildConfig)
    writer: EndpointConfig = field(default_factory=EndpointConfig)
    checker: EndpointConfig = field(default_factory=lambda: EndpointConfig(temperature=0.0, max_tokens=256))
    judge: JudgeConfig = field(default_factory=JudgeConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        Shard.read(self.shard)
        if self.build.ray_workers and self.shard:
            raise ValueError("shard: with build.ray_workers the work is one: leave shard out, or Ray")


def spoken(args: Sequence[str]) -> list[str]:
    """The arguments with `--rl` in full."""
    return [word for arg in args for word in (("--build.rows", "rl") if arg == "--rl" else (arg,))]


def run(config: Config) -> Result:
    """Builds what is not built yet, prints the funnel, and writes it to funnel.json.

    Returns:
        The funnel; the exit code is 1 where rows have no end yet, since a model did not answer: the same command
        tries them again.

    Raises:
        ValueError: nothing to read, or the folder is of another build.
    """
    from thyme.build.evidence import load_check
    from thyme.build.plan import Plan
    from thyme.build.raw import RawRows
    from thyme.build.store import Store
    from thyme.verbs.folders import RUNS

    if not config.data.train:
        raise ValueError(
            "data.train: nothing to build from: name files of raw rows (docs/build_data.md says how they look)"
        )
    load_check(config.build.evidence)
    raw = RawRows(config.data.train, layout=config.data.format, images=config.data.images)
    plan, shard = Plan(raw, config.build), Shard.read(config.shard)
    folder = RUNS / config.name
    with (
        goes_on_with("rows that have ended are kept; the same command goes on"),
        Store(folder, shard, _identity(config, plan)) as store,
    ):
        _write_recipe(config, folder)
        todo = [number for number in plan.of(shard) if number not in store.done]
        print(f"{len(raw)} raw rows, {len(plan)} items; {len(plan.of(shard)) - len(todo)} are done, {len(todo)} to do")
        unanswered = _run(config, raw, plan, todo, store) if todo else 0
    funnel = _report(config, folder, dict(raw.left_out))
    if unanswered:
        print(f"{unanswered} rows have no end yet, a model did not answer: the same command tries them again")
    return Result(funnel | {"unanswered": unanswered, "rows": folder / "rows"}, int(unanswered > 0))


@asynccontextmanager
async def open_line(config: Config, raw: RawRows | None = None) -> AsyncIterator[Line]:
    """What makes rows: writer, sandbox, judge and checker of a recipe, closed at the end.

    Args:
        config: the recipe.
        raw: its rows; None: they are opened here, as a worker on another machine does.
    """
    from thyme.build.checks import Checks
    from thyme.build.demonstrations import Demonstrations
    from thyme.build.evidence import load_check
    from thyme.build.questions import HardQuestions
    from thyme.build.raw import RawRows
    from thyme.rewards.judge_http import HttpJudge
    from thyme.verbs.folders import RUNS

    cache = RUNS / config.name / "cache"
    raw = raw or RawRows(config.data.train, layout=config.data.format, images=config.data.images)
    async with AsyncExitStack() as stack:
        judge = None
        if config.judge.url is not None:
            judge = HttpJudge(replace(config.judge, cache=config.judge.cache or str(cache / "judge")))
            stack.push_async_callback(judge.close)
        checker = await _chat(stack, config.checker, cache, "checker")
        checks = Checks(judge, checker, consistency=config.build.consistency)
        writer = await _writer(stack, config, cache)
        if config.build.rows == "rl":
            yield HardQuestions(raw, config.build, writer, checks, checker)
        else:
            yield Demonstrations(raw, config.build, writer, checks, load_check(config.build.evidence))


def _run(config: Config, raw: RawRows, plan: Plan, todo: Sequence[int], store: Store) -> int:
    build = config.build
    if build.ray_workers:
        from thyme.build.ray_workers import run_on_ray

        with _shown(len(todo)) as on_end:
            return run_on_ray(partial(open_line, config), plan, todo, store, build, on_end)
    with left_to_asyncio():
        return asyncio.run(_alone(config, raw, plan, todo, store))


async def _alone(config: Config, raw: RawRows, plan: Plan, todo: Sequence[int], store: Store) -> int:
    from thyme.build.run import run_items

    async with open_line(config, raw) as line:
        with _shown(len(todo)) as on_end:
            return await run_items(line, plan, todo, store, config.build.concurrency, on_end)


@contextmanager
def _shown(items: int) -> Iterator[Callable[[Outcome | None], None]]:
    """The line of a build; yields what is to be told of each item's end."""
    kept = 0
    with progress(items, "build", "item") as line:

        def on_end(ended: Outcome | None) -> None:
            nonlocal kept
            kept += ended is not None and ended.row is not None
            line.advance(numbers={"kept": kept})

        yield on_end


async def _chat(stack: AsyncExitStack, endpoint: EndpointConfig, cache: Path, table: str) -> Chat | None:
    from thyme.build.chat import Chat

    if endpoint.url is None:
        return None
    chat = Chat(endpoint, cache / table, table)
    stack.push_async_callback(chat.close)
    return chat


async def _writer(stack: AsyncExitStack, config: Config, cache: Path) -> Writer:
    """The model behind `writer.url` with a sandbox of its own, or the engine on `model`."""
    bare = config.build.prompt == "question"
    chat = await _chat(stack, config.writer, cache, "writer")
    if chat is not None:
        from thyme.build.http_writer import HttpWriter
        from thyme.sandbox import Sandbox

        sandbox = stack.enter_context(Sandbox(replace(config.sandbox, compat=config.rollout.compat)))
        return HttpWriter(chat, sandbox, bare=bare)
    from thyme.build.engine_writer import EngineWriter
    from thyme.verbs.opening import open_loop, open_model

    loop = stack.enter_context(open_loop(config, await asyncio.to_thread(open_model, config)))
    writer = EngineWriter(
        loop,
        bare=bare,
        temperature=config.rollout.temperature,
        seed=config.seed,
        most=config.build.concurrency,
    )
    stack.push_async_callback(writer.close)
    return writer


def _identity(config: Config, plan: Plan) -> dict[str, object]:
    writer = config.writer.model or config.model
    who = {"writer": writer, "checker": config.checker.model, "judge": config.judge.model}
    return plan.identity(**who, temperature=config.writer.temperature, seed=config.seed)


def _write_recipe(config: Config, folder: Path) -> None:
    """The resolved recipe beside the rows; of several shards each writes the same, but for its place."""
    from thyme.config import to_toml

    (folder / "config.toml").write_text(to_toml(replace(config, shard="")))


def _report(config: Config, folder: Path, left_out: dict[str, int]) -> dict[str, Any]:
    from thyme.build.funnel import Funnel
    from thyme.build.review import apply_decisions
    from thyme.build.store import journaled

    funnel = Funnel.of(config.build.rows, journaled(folder))
    for line in funnel.lines():
        print(line)
    if left_out:
        print(f"not sampled: {', '.join(f'{count} {reason}' for reason, count in left_out.items())}")
    reviewed = apply_decisions(folder)
    if funnel.review:
        told = f"{reviewed.kept} kept, {reviewed.rejected} rejected, {reviewed.waiting} waiting"
        print(f"review: {told} (decisions: {folder / 'review' / 'decisions.jsonl'})")
    data = funnel.to_json() | {"not_sampled": left_out}
    (folder / "funnel.json").write_text(json.dumps(data, indent=2) + "\n")
    print(f"rows: {folder / 'rows'}")
    return data
