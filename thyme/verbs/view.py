"""Look at a run, or two side by side, in the browser: curves, rollouts with their pictures, tokens in colours."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from thyme.config import POSITIONAL


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which run, and where the page is served. A run may be under way: the page follows it."""

    run: Path = field(metadata=POSITIONAL)
    """Its folder, such as runs/demo."""
    against: Path | None = None
    """Another run: its curves in the same axes, its rollouts of the same question side by side."""
    model: Path | None = None
    """Whose tokenizer spells the tokens; none: a checkpoint of the run, else the model that its config names."""
    host: str = "127.0.0.1"
    """Where the page is served; others than this machine can read along under any other address."""
    port: int = 8717
    """Its port; 0 takes a free one."""
    browser: bool = True
    """Whether a browser is opened."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port: {self.port} must be in [0, 65535]")


def run(config: Config) -> None:
    """Serves until Ctrl-C.

    Raises:
        FileNotFoundError, ValueError: no such run, or the port is taken.
    """
    from thyme.report.view_app import view_app
    from thyme.report.web import serve
    from thyme.verbs.spelling import open_run

    runs = {"a": open_run(config.run, config.model)}
    if config.against is not None:
        runs["b"] = open_run(config.against, config.model)
    what = " and ".join(str(run.folder) for run in runs.values())
    serve(view_app(runs, config.host), what, host=config.host, port=config.port, opens_browser=config.browser)
