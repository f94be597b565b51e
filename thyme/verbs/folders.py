"""Where a run writes, and where in a folder the model is. Loads no torch: a wrong path is said at once.

A run writes runs/<name>/: config.toml (a recipe that repeats it), metrics.jsonl, rollouts/, images/, checkpoints/; a
training run also run.json (`thyme.verbs.training_run`).
"""

import errno
import fcntl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from thyme.config import to_toml
from thyme.train.manifest import FILE, Damaged, read_manifest, verify
from thyme.verbs.config import EMBEDDED, RunConfig

RUNS = Path("runs")
RUN_FILE = "run.json"


@contextmanager
def run_dir(config: RunConfig, part: str = "") -> Iterator[Path]:
    """Makes runs/<name>/, holds it for this process and writes the resolved config into it, for a verb that trains
    nothing.

    Args:
        config: of the run.
        part: of the work, where several processes share the folder, which is held for this part alone; "": all of it.

    Raises:
        FileNotFoundError, ValueError: the model is no folder of a model, another process is at work in runs/<name>/,
            or it is a training run, whose config must stay; then nothing is written.
    """
    if config.model != EMBEDDED:
        model_folder(Path(config.model))
    folder = RUNS / config.name
    if (folder / RUN_FILE).is_file():
        raise ValueError(f"{folder} is a training run: --name gives this one another folder")
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder, part):
        (folder / "config.toml").write_text(to_toml(config))
        yield folder


@contextmanager
def held(folder: Path, part: str = "") -> Iterator[None]:
    """Holds a folder, or a part of the work in it, for this process; the kernel lets go of it however the process ends.

    Raises:
        ValueError: another process has it.
    """
    locks = [(".lock", fcntl.LOCK_SH), (f".lock.{part}", fcntl.LOCK_EX)] if part else [(".lock", fcntl.LOCK_EX)]
    with ExitStack() as files:
        for name, how in locks:
            file = files.enter_context((folder / name).open("a+"))
            try:
                fcntl.lockf(file, how | fcntl.LOCK_NB)  # of the process: no forked child inherits it
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):  # else the file system has no locks
                    raise ValueError(f"{folder} is in use by another process of thyme: wait, or name another") from None
        yield


def model_folder(path: Path) -> Path:
    """The Hugging Face folder at `path`, which may be a checkpoint of ours.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a folder without a model, or a checkpoint whose weights have not the size its manifest says.
    """
    if not path.is_dir():
        raise FileNotFoundError(
            f"model {path}: no such folder: give a Hugging Face Qwen2.5-VL folder, or run `thyme demo` and give "
            "runs/demo/checkpoints/rl"
        )
    if (path / "config.json").is_file():
        if (path / FILE).is_file():
            manifest = read_manifest(path)
            try:
                verify(path, manifest, digests=False, names=[n for n in manifest.files if n.endswith(".safetensors")])
            except Damaged as error:
                raise ValueError(f"model {path}: {error}") from None
        return path
    raise ValueError(f"model {path}: no model folder: config.json is missing (weights and tokenizer belong beside it)")
