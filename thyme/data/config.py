"""Which files are trained on and how they are read. Standard library only."""

from dataclasses import dataclass
from typing import Literal, get_args

Layout = Literal["thyme", "messages", "openai", "verl", "sharegpt"]
Format = Literal["auto", "thyme", "messages", "openai", "verl", "sharegpt"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Own rows: parquet or JSON lines, in one of the layouts of the field."""

    train: tuple[str, ...] = ()
    """Files, folders of *.parquet, *.jsonl and *.json, or patterns such as data/2round-*.parquet; none: the toy world's
    rows."""
    heldout: tuple[str, ...] = ()
    """The same for rows that are never trained on."""
    format: Format = "auto"
    """How rows are laid out: "thyme" (the released sets), "messages" (ms-swift, LLaMA-Factory), "openai" (content in
    parts), "verl" (DeepEyes too), "sharegpt"; "auto" tells by each file's keys."""
    images: str | None = None
    """The folder that relative paths of pictures start from; none: the folder of the file that names them."""
    seed: int = 0
    """Draws the order of the rows in each epoch."""
    workers: int = 2
    """Threads that decode and prepare the rows of coming steps; 0: every step prepares its own."""
    ahead_steps: int = 2
    """Steps whose rows are prepared before they are asked for; 0: threads share the rows of the step that is."""
    ahead_mib: int = 2048
    """What is prepared ahead takes no more than this; the next step's rows are always prepared, whatever they take."""

    def __post_init__(self) -> None:
        if self.format not in get_args(Format):
            raise ValueError(f"format: {self.format!r} must be one of {', '.join(map(repr, get_args(Format)))}")
        for name in ("train", "heldout"):
            if "" in getattr(self, name):
                raise ValueError(f"{name}: an empty path: name a file or a folder")
        both = sorted(set(self.train) & set(self.heldout))
        if both:
            raise ValueError(f"heldout: {both[0]!r} is in train too: hold out rows that are not trained on")
        for name in ("seed", "workers", "ahead_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)} must be at least 0")
        if self.ahead_mib < 1:
            raise ValueError(f"ahead_mib: {self.ahead_mib} must be at least 1")
