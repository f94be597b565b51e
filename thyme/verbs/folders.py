"""Where a run writes, and where in a folder the model is. Loads no torch: a wrong path is said at once.

A run writes runs/<name>/: config.toml (a recipe that repeats it), metrics.jsonl, rollouts/, images/, checkpoints/.
"""

from pathlib import Path

from thyme.config import to_toml
from thyme.verbs.config import EMBEDDED, RunConfig

RUNS = Path("runs")


def run_dir(config: RunConfig) -> Path:
    """Makes runs/<name>/ and writes the resolved config into it.

    Raises:
        FileNotFoundError, ValueError: the model is no folder of a model; then nothing is written.
    """
    if config.model != EMBEDDED:
        model_folder(Path(config.model))
    folder = RUNS / config.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(to_toml(config))
    return folder


def model_folder(path: Path) -> Path:
    """The Hugging Face folder at `path`, or inside of the training checkpoint at `path`.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a folder without a model.
    """
    if not path.is_dir():
        raise FileNotFoundError(
            f"model {path}: no such folder: give a Hugging Face Qwen2.5-VL folder, or run `thyme demo` and give "
            "runs/demo/checkpoints/rl"
        )
    for folder in (path, path / "model"):  # `model` is where training checkpoints keep it
        if (folder / "config.json").is_file():
            return folder
    raise ValueError(f"model {path}: no model folder: config.json is missing (weights and tokenizer belong beside it)")
