"""What `thyme profile rollout` and `thyme profile train` share: which step is watched by what, and what is written."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from thyme.config import RARE
from thyme.options import flag
from thyme.result import Result

if TYPE_CHECKING:
    from thyme.engine import Engine
    from thyme.engine.step_record import StepRecord
    from thyme.model import Model
    from thyme.profile.parts import Training
    from thyme.verbs.config import RunConfig

Pass = Literal["warm-up", "timed", "ops", "torch"]


@dataclass(frozen=True, kw_only=True)
class ProfileKeys:
    """What is watched, and by what."""

    steps: int = 2
    """Steps that count: they are traced and summed."""
    warmup: int = 1
    """Steps before them, which do not."""
    ops: bool = True
    """Afterwards watch one more step op by op."""
    torch_profiler: bool = field(default=False, metadata=RARE)
    """Afterwards run one more step under torch.profiler and write its trace beside."""
    memory_snapshot: bool = field(default=False, metadata=RARE)
    """Write what PyTorch allocated during the steps that count, for pytorch.org/memory_viz. Needs a GPU."""
    nvtx: bool = field(default=False, metadata=RARE)
    """Mark the spans as NVTX ranges too, for nsys. Needs a GPU."""

    def check(self) -> None:
        """Raises ValueError where the keys say nothing that can be watched."""
        if self.steps < 1:
            raise ValueError(f"steps: {self.steps} must be at least 1")
        if self.warmup < 0:
            raise ValueError(f"warmup: {self.warmup} must be at least 0")

    def passes(self) -> list[Pass]:
        """What watches each step."""
        more: list[Pass] = [*(["ops"] if self.ops else []), *(["torch"] if self.torch_profiler else [])]  # type: ignore[list-item]
        return [*(["warm-up"] * self.warmup), *(["timed"] * self.steps), *more]  # type: ignore[list-item]


def refuse_without_gpu(keys: ProfileKeys) -> None:
    """Refuses, before a model is loaded, what only a GPU has.

    Raises:
        ValueError: a memory snapshot or NVTX ranges without one.
    """
    import torch

    asked = next((name for name in ("memory_snapshot", "nvtx") if getattr(keys, name)), None)
    if asked is not None and not torch.cuda.is_available():
        what = "PyTorch records allocations" if asked == "memory_snapshot" else "NVTX has ranges"
        raise ValueError(f"{asked}: {what} on a CUDA device only, and there is none here: leave it out")


class Profiler:
    """Watches the steps of a run one after the other; use it as a context manager, and `advance` after each step.

    Args:
        keys: what is watched.
        model: that is run.
        folder: of the run; gets trace/.
        engine: that runs it; None: it is trained, and nothing is drawn from it.
        tell: is given each engine step of the passes without ops.
    """

    def __init__(
        self,
        keys: ProfileKeys,
        model: Model,
        folder: Path,
        engine: Engine | None = None,
        tell: Callable[[StepRecord], object] | None = None,
    ) -> None:
        from thyme.engine.step_cost import StepCost
        from thyme.engine.step_record import StepRecorder
        from thyme.profile.ceilings import measured_ceilings
        from thyme.profile.ops import OpTable
        from thyme.trace import Trace

        self.folder, self._keys, self.engine = folder / "trace", keys, engine
        self._on_gpu = model.device.type == "cuda"
        self.ceilings = measured_ceilings(model.device, model.dtype)
        self.cost = (
            StepCost(model, block_size=1)
            if engine is None
            else StepCost(model, engine.config.block_size, shares_prefixes=engine.runner.shares_prefixes)
        )
        self.trace, self.ops = Trace(**_ranges() if keys.nvtx else {}), OpTable(model.device)
        self.records: list[StepRecord] = []
        self._recorder = None if engine is None else StepRecorder(engine, self.ceilings, tell)
        if self._recorder is not None:
            self._recorder.close()
        self._passes, self._at = keys.passes(), 0
        self._watching = ExitStack()

    def __enter__(self) -> Profiler:
        self._watch()
        return self

    def __exit__(self, *error: Any) -> None:
        self._watching.close()

    def advance(self, _: object = None) -> bool:
        """A step has ended; returns whether it was the last."""
        before = self._passes[self._at]
        self._at += 1
        is_over = self._at == len(self._passes)
        if is_over or self._passes[self._at] != before:
            self._watching.close()
            if not is_over:
                self._watch()
        return is_over

    @property
    def num_steps(self) -> int:
        """Of all passes."""
        return len(self._passes)

    def _watch(self) -> None:
        watching: dict[Pass, Callable[[], AbstractContextManager[object]]] = {
            "warm-up": self._recorded,
            "timed": self._timed,
            "ops": self._by_op,
            "torch": self._by_torch,
        }
        self._watching = ExitStack()
        self._watching.enter_context(watching[self._passes[self._at]]())

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        if self._recorder is None:
            yield
            return
        self._recorder.open()
        try:
            yield
        finally:
            self._recorder.close()

    @contextmanager
    def _timed(self) -> Iterator[None]:
        from thyme.trace import tracing

        if self._recorder is not None:
            self._recorder.records.clear()
        with self._snapshot(), self._recorded(), tracing(self.trace):
            yield
        if self._recorder is not None:
            self.records = list(self._recorder.records)

    @contextmanager
    def _by_op(self) -> Iterator[None]:
        if self.engine is None:
            with self.ops:
                yield
            return
        runner = self.engine.runner
        graphs, runner.graphs = runner.graphs, None  # a replay shows no ops
        try:
            with self.ops:
                yield
        finally:
            runner.graphs = graphs

    @contextmanager
    def _by_torch(self) -> Iterator[None]:
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])]
        with profile(activities=activities, record_shapes=True) as found:
            yield
        self.folder.mkdir(parents=True, exist_ok=True)
        found.export_chrome_trace(str(self.folder / "torch.json.gz"))

    def _snapshot(self) -> AbstractContextManager[object]:
        return _memory_history(self.folder / "memory.pickle") if self._keys.memory_snapshot else nullcontext()

    def write(self, title: str, frame: dict[str, str], training: Training | None = None) -> str:
        """Writes trace.json, steps.jsonl (of an engine), ops.json and verdict.md; returns the verdict.

        Args:
            title: of the page.
            frame: what it was measured with.
            training: what the steps train.
        """
        from thyme.profile.parts import Training, parts_of
        from thyme.profile.verdict import Profile, verdict

        found = Profile(
            title=title,
            frame=frame,
            ceilings=self.ceilings,
            spans=self.trace.spans,
            records=self.records,
            parts=parts_of(self.trace.spans, self.ceilings, self.cost, training or Training(0)),
            trains=training is not None,
            ops=self.ops.rows(),
            ops_wall_s=self.ops.wall_s,
        )
        page = verdict(found)
        self.trace.write(self.folder / "trace.json")
        if self.engine is not None:
            lines = [json.dumps(record.as_dict()) for record in self.records]
            (self.folder / "steps.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        if found.ops:
            ops = [asdict(row) | {"of_ceiling": row.of_ceiling(self.ceilings)} for row in found.ops]
            (self.folder / "ops.json").write_text(json.dumps(ops, indent=1), encoding="utf-8")
        (self.folder / "verdict.md").write_text(page, encoding="utf-8")
        return page

    def result(self) -> Result:
        """Where everything was written, and the steps' sums."""
        names = ("trace.json", "steps.jsonl", "ops.json", "verdict.md", "torch.json.gz", "memory.pickle")
        return Result(
            {
                "files": [self.folder / name for name in names if (self.folder / name).exists()],
                "engine_steps": len(self.records),
                "sampled_tokens": sum(record.samples for record in self.records),
                "ceilings": self.ceilings,
            }
        )


def frame_of(what: str, config: RunConfig, model: Model, engine: Engine | None = None) -> dict[str, str]:
    """What a profile was measured with."""
    import torch

    attention = "" if engine is None else f"; attention: {engine.runner.attention.name}"
    on_gpu = model.device.type == "cuda"
    machine = torch.cuda.get_device_name(model.device) if on_gpu else _processor()
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    return {
        "machine": machine,
        "versions": f"Python {sys.version.split()[0]}, torch {torch.__version__}",
        "model": f"{config.model}, {millions:,.1f} M parameters, {str(model.dtype).removeprefix('torch.')}",
        "threads": f"{torch.get_num_threads()} of torch{attention}",
        "command": f"`{_command(what, config)}`",
    }


def _command(what: str, config: RunConfig) -> str:
    """As it was said."""
    words = ["thyme", *what.split()]
    recipe = next((origin for origin in config.origins.values() if origin.startswith("recipe ")), "")
    words += recipe.split()[1:]
    for key, origin in config.origins.items():
        if origin == "the command line":
            value: Any = config
            for name in key.split("."):
                value = value[name] if isinstance(value, dict) else getattr(value, name)
            values = value if isinstance(value, tuple) else (value,)
            words += [
                flag(key),
                *(str(each).lower() if isinstance(each, bool | None) else str(each) for each in values),
            ]
    return " ".join(words)


def _processor() -> str:
    """Its name and the vector instructions that matter here."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in said.get("flags", "").split()]
    cores = sum(line.startswith("processor") for line in lines)
    return f"{said.get('model name', 'a CPU')}, {cores} cores, {' '.join(flags)}"


def _ranges() -> dict[str, Any]:
    import torch

    return {"enter": torch.cuda.nvtx.range_push, "leave": torch.cuda.nvtx.range_pop}


@contextmanager
def _memory_history(path: Path) -> Iterator[None]:
    import torch

    torch.cuda.memory._record_memory_history(max_entries=200_000)
    try:
        yield
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(path))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
