"""The command `thyme`: a verb, then its arguments. Nothing heavy is imported before a verb is known.

Errors of the user (a missing file, a broken image, an unknown key) are one line on stderr and exit code 2.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

Material = Literal["glyphs", "digits", "photos"]

HELP = """usage: thyme VERB [arguments]        (thyme VERB --help tells more)

  demo                        learn to write code that crops, rotates and computes: SFT, then GRPO-ATS, in minutes
  ask MODEL IMAGE QUESTION    answer one question, showing thoughts, code and sandbox output as they come
  base | sft | rl  [RECIPE]   train one stage; RECIPE is a TOML file, every key may be overridden: --rl.steps 5
  rollout | eval   [RECIPE]   sample rollouts to disk | held-out accuracy with intervals
  data synth | check          write synthetic rows in the released formats | find bad rows
  sandbox run FILE            run one snippet in the sandbox and show what came back
  doctor                      what isolates the sandbox on this machine, tried and not guessed
"""


class UsageError(Exception):
    """The user asked for something that can't be done; the message says what, where and what to do."""


def main(argv: list[str] | None = None) -> None:
    """Runs one verb; exits with 2 and one line on a user's error."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in {"-h", "--help"}:
        print(HELP, end="")
        raise SystemExit(0)
    if args[0] == "--version":
        import thyme

        print(thyme.__version__)
        raise SystemExit(0)
    verb, rest = args[0], args[1:]
    if verb not in VERBS:
        import difflib

        near = difflib.get_close_matches(verb, VERBS, n=1, cutoff=0.0)[0]
        _fail(f"unknown verb {verb!r}: did you mean {near!r}? (thyme --help lists them)")
    try:
        VERBS[verb](rest)
    except (UsageError, ValueError, FileNotFoundError, RuntimeError) as error:
        if os.environ.get("THYME_TRACEBACK") == "1" or not _is_of_the_user(error):
            raise
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted")


def _is_of_the_user(error: Exception) -> bool:
    """A RuntimeError is a bug of ours, but for a machine that lacks what the sandbox stands on."""
    from thyme.sandbox import SandboxUnavailable

    return isinstance(error, SandboxUnavailable) or not isinstance(error, RuntimeError)


def _fail(message: str) -> None:
    print(f"thyme: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def _call(function: Callable[..., Any], verb: str, args: list[str]) -> Any:
    import tyro

    return tyro.cli(function, prog=f"thyme {verb}", args=args)


def _run_config(verb: str, args: list[str]) -> Any:
    """RunConfig from `[RECIPE] [--key value ...]`, or None after `--dry-run` printed it."""
    import tyro

    from thyme.config import RunConfig, load_recipe, to_toml

    default = RunConfig(name=verb)
    if args and not args[0].startswith("-"):
        default = load_recipe(Path(args[0]))
        args = args[1:]
    dry_run = "--dry-run" in args
    config = tyro.cli(
        RunConfig, prog=f"thyme {verb} [RECIPE.toml]", default=default, args=[a for a in args if a != "--dry-run"]
    )
    if dry_run:
        print(to_toml(config), end="")
        return None
    return config


def _demo(args: list[str]) -> None:
    def demo(seed: int = 0, compare: bool = False, material: Material = "glyphs", threads: int = 1) -> None:
        """Train a small Qwen2.5-VL from random weights: base stage, weak SFT cold start, GRPO-ATS, evaluation.

        Args:
            seed: seeds weights, data and sampling.
            compare: instead of the main curve, run the fragile cold start twice: ATS, and temperature 1 everywhere.
            material: what is on the signs and behind them: glyphs (drawn), digits (handwritten), photos.
            threads: torch threads of the base stage; a second one gains little, and on a busy machine loses much.
        """
        from thyme.demo.compare import run_compare
        from thyme.demo.story import run_demo

        (run_compare if compare else run_demo)(seed=seed, material=material, threads=threads)

    _call(demo, "demo", args)


def _ask(args: list[str]) -> None:
    def ask(
        model: str,
        image: str,
        question: str,
        /,
        temperature: float = 0.0,
        max_tokens: int = 2048,
        seed: int = 0,
    ) -> None:
        """Answer one question about an image.

        Args:
            model: a Hugging Face Qwen2.5-VL folder, or a checkpoint of the demo (runs/demo/checkpoints/rl).
            image: the picture.
            question: the question.
            temperature: of the text; code is always greedy.
            max_tokens: at most this many tokens in all.
            seed: of the sampler.
        """
        from thyme.ask import ask as run

        run(model, image, question, temperature=temperature, max_tokens=max_tokens, seed=seed)

    _call(ask, "ask", args)


def _stage(verb: str) -> Callable[[list[str]], None]:
    def run(args: list[str]) -> None:
        config = _run_config(verb, args)
        if config is not None:
            from thyme.stages import VERBS as STAGES

            STAGES[verb](config)

    return run


def _data(args: list[str]) -> None:
    def synth(
        folder: Path,
        /,
        seed: int = 0,
        material: Material = "glyphs",
        sft: int = 1000,
        rl: int = 1000,
        heldout: int = 200,
    ) -> None:
        """Write synthetic rows as JSONL in the released formats.

        Args:
            folder: where sft.jsonl, rl.jsonl and heldout.jsonl go.
            seed: of every draw.
            material: what signs and ground are made of.
            sft: rows of demonstrations.
            rl: training questions.
            heldout: held-out questions.
        """
        from thyme.data.config import DataConfig
        from thyme.data.formats import write_synthetic

        config = DataConfig(seed=seed, material=material)
        for path, rows in write_synthetic(folder, config, sft=sft, rl=rl, heldout=heldout).items():
            print(f"{path}: {rows} rows")

    def check(path: Path, /) -> None:
        """Name every bad row of a JSONL file: tags, image counts, broken pictures.

        Args:
            path: rows in a released format.
        """
        from thyme.data.check import check_file

        report = check_file(path)
        for problem in report.problems:
            print(problem)
        print(f"{path}: {report.sft_rows} SFT rows, {report.rl_rows} RL rows, {report.images} images")
        if report.problems:
            raise UsageError(f"{path}: {report.bad_rows} bad rows, named above: mend or drop them")

    _subverb("data", {"synth": synth, "check": check}, args)


def _sandbox(args: list[str]) -> None:
    def run(file: Path, /, image: Path | None = None) -> None:
        """Run one snippet in the sandbox: repairs, output, images, limits, isolation.

        Args:
            file: Python as a model would write it.
            image: the input picture, which the snippet opens as `image_path`.
        """
        from thyme.sandbox.doctor import run_file

        raise SystemExit(run_file(file, image))

    _subverb("sandbox", {"run": run}, args)


def _doctor(args: list[str]) -> None:
    def doctor() -> None:
        """Say what isolates the sandbox on this machine, tried and not guessed."""
        from rich.console import Console
        from rich.table import Table

        from thyme.sandbox.doctor import report

        table = Table("layer", "holds", "needed", "what was tried")
        layers = report()
        for layer in layers:
            table.add_row(layer.name, "yes" if layer.ok else "NO", "core" if layer.core else "", layer.detail)
        Console(highlight=False).print(table)
        raise SystemExit(0 if layers[-1].ok else 2)

    _call(doctor, "doctor", args)


def _subverb(verb: str, functions: dict[str, Callable[..., Any]], args: list[str]) -> None:
    if args and args[0] in {"-h", "--help"}:
        print(f"usage: thyme {verb} {' | '.join(functions)} [arguments]        (thyme {verb} ... --help tells more)")
        raise SystemExit(0)
    if not args or args[0] not in functions:
        raise UsageError(f"thyme {verb} needs one of: {', '.join(functions)}")
    _call(functions[args[0]], f"{verb} {args[0]}", args[1:])


VERBS: dict[str, Callable[[list[str]], None]] = {
    "demo": _demo,
    "ask": _ask,
    **{verb: _stage(verb) for verb in ("base", "sft", "rl", "rollout", "eval")},
    "data": _data,
    "sandbox": _sandbox,
    "doctor": _doctor,
}
