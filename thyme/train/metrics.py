"""Where a training run's numbers go: metrics.jsonl always, a progress line where somebody looks."""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from thyme.train.durable import write_text

Metrics = dict[str, float]
OnStep = Callable[[Metrics], bool | None]
"""Told every step's numbers; returning True ends the stage after this step."""


class MetricsLog:
    """Appends one JSON object per step to a file that the stages of a run share.

    Each line has `stage`, `step` (from 0), `time/wall_s` and `time/cpu_s` (of this process), both since the stage
    began: a resumed one counts on from its last line that is kept. A number that is not finite is written as null: JSON
    has no NaN, and no reader should take it for a value.

    Args:
        path: the file; None writes nothing.
        stage: its lines from `first_step` on are dropped first, since they are about to be written again.
        first_step: where the stage starts or resumes.
    """

    def __init__(self, path: Path | None, stage: str, first_step: int = 0) -> None:
        self._stage = stage
        self._file = None
        spent = (0.0, 0.0)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
            kept = [line for line in lines if not self._is_rewritten(line, first_step)]
            if len(kept) < len(lines):
                write_text(path, "".join(kept))
            spent = self._spent(kept)
            self._file = path.open("a", encoding="utf-8")
        self._started = (time.perf_counter() - spent[0], time.process_time() - spent[1])

    def log(self, step: int, values: Mapping[str, float]) -> Metrics:
        """Writes one line; returns its numbers."""
        wall, cpu = self._started
        metrics: Metrics = {
            "step": step,
            **values,
            "time/wall_s": time.perf_counter() - wall,
            "time/cpu_s": time.process_time() - cpu,
        }
        if self._file is not None:
            finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
            self._file.write(json.dumps({"stage": self._stage, **finite}, allow_nan=False) + "\n")
            self._file.flush()
        return metrics

    def sync(self) -> None:
        """Returns when every line is on disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _spent(self, lines: Sequence[str]) -> tuple[float, float]:
        """Wall and CPU seconds of the stage as its last line says."""
        own = (entry for entry in map(json.loads, reversed(lines)) if entry.get("stage") == self._stage)
        last: Metrics = next(own, {})
        return last.get("time/wall_s", 0.0), last.get("time/cpu_s", 0.0)

    def _is_rewritten(self, line: str, first_step: int) -> bool:
        try:
            entry = json.loads(line)
        except ValueError:  # the last line of a run that was killed while writing it
            return True
        return entry.get("stage") == self._stage and entry.get("step", 0) >= first_step


class ProgressLine:
    """One rich progress line with a few chosen metrics; give it to a stage as `on_step`, inside `with`.

    Args:
        total: steps at which the line is full.
        label: name of the stage.
        shown: metric name -> short name; a metric that a step lacks keeps its last value.
    """

    def __init__(self, total: int, label: str, shown: Mapping[str, str]) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        numbers = TextColumn("{task.fields[numbers]}")
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), numbers
        )
        self._task = self._progress.add_task(label, total=total, numbers="")
        self._total = total
        self._shown = shown
        self._latest: Metrics = {}

    def __call__(self, metrics: Metrics) -> None:
        self._latest.update({self._shown[name]: value for name, value in metrics.items() if name in self._shown})
        numbers = "  ".join(f"{name} {value:.3g}" for name, value in self._latest.items())
        done = int(metrics["step"]) + 1
        self._progress.update(self._task, completed=done, total=max(self._total, done), numbers=numbers)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


@contextmanager
def progress(
    total: int, label: str | None, shown: Mapping[str, str], *, then: OnStep | None = None
) -> Iterator[OnStep | None]:
    """A progress line to give to a stage as `on_step`; none where there is no label.

    Args:
        total: steps at which the line is full.
        label: name of the stage.
        shown: metric name -> short name.
        then: is told every step too, and decides whether the stage ends.
    """
    if label is None:
        yield then
        return
    with ProgressLine(total, label, shown) as line:

        def on_step(metrics: Metrics) -> bool | None:
            line(metrics)
            return then(metrics) if then is not None else None

        yield on_step
