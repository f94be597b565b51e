"""manifest.json of a checkpoint: which stage and step it is, what the run started from, and every file's digest.

Standard library only: a damaged file is said before torch is loaded.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import thyme

FILE = "manifest.json"
FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What a run was started from. Digests are SHA-256; "" says nothing."""

    config: str = ""
    """Digest of the run's config.toml as it was at the start."""
    model: str = ""
    """Path of the start model, of which RL's KL term is measured."""
    model_digest: str = ""
    """Of its weights, config and tokenizer (`folder_digest`)."""
    data_digest: str = ""
    """Of the data files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a checkpoint says of itself."""

    stage: str
    step: int
    """The next step to run, which is the number of steps done."""
    origin: Origin
    score: float | None = None
    """Mean of the stage's `best_metric` since the checkpoint before; None where there was none."""
    version: str = field(default_factory=lambda: thyme.__version__)
    """Of thyme, when it was written."""
    files: dict[str, tuple[int, str]]
    """By path inside the folder: bytes and SHA-256 of every file but the manifest."""


class Damaged(ValueError):
    """A checkpoint lacks a file, or a file is not what the manifest says."""


def list_files(folder: Path) -> dict[str, tuple[int, str]]:
    """What `Manifest.files` says of the folder as it is."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.relative_to(folder).as_posix() != FILE)
    return {p.relative_to(folder).as_posix(): (p.stat().st_size, file_digest(p)) for p in paths}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes manifest.json into the folder."""
    content = {"format": FORMAT, **asdict(manifest)}
    content["files"] = {name: {"bytes": n, "sha256": digest} for name, (n, digest) in manifest.files.items()}
    (folder / FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        Damaged: there is none, or it cannot be read.
    """
    path = folder / FILE
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            raise ValueError("another format")
        files = {name: (facts["bytes"], facts["sha256"]) for name, facts in content.pop("files").items()}
        return Manifest(**content | {"origin": Origin(**content["origin"]), "files": files})
    except FileNotFoundError:
        raise Damaged(f"{folder} is no checkpoint: it has no {FILE}") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise Damaged(f"{path} cannot be read: {error!r}") from None


def verify(folder: Path, manifest: Manifest, *, digests: bool, names: Iterable[str] | None = None) -> None:
    """Compares files with what the manifest says of them.

    Args:
        digests: True reads every byte, False compares sizes alone.
        names: of the files that are looked at; None: all of the manifest.

    Raises:
        Damaged: names the first file that is missing or different.
    """
    for name in manifest.files if names is None else names:
        path, (size, digest) = folder / name, manifest.files[name]
        if not path.is_file():
            raise Damaged(f"{path} is missing, although {FILE} lists it")
        if path.stat().st_size != size:
            raise Damaged(f"{path} is damaged: {path.stat().st_size} bytes, not {size} as {FILE} says")
        if digests and file_digest(path) != digest:
            raise Damaged(f"{path} is damaged: its SHA-256 is not the one in {FILE}")


def folder_digest(folder: Path) -> str:
    """One digest of a model folder's weights, config and tokenizer; what a model is run by beyond them is not in it."""
    names = ("config.json", "tokenizer.json", "preprocessor_config.json")
    paths = [*sorted(folder.glob("*.safetensors")), *(folder / n for n in names if (folder / n).is_file())]
    return text_digest("".join(f"{path.name} {file_digest(path)}\n" for path in paths))


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_digest(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()
