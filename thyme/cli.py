"""The command `thyme`: a verb, then its arguments. Nothing heavy is imported before a verb is known.

Errors of the user (a missing file, a broken image, an unknown key) are one line on stderr and exit code 2.
"""

import errno
import os
import select
import signal
import sys
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

from thyme.any_text import printable
from thyme.verbs.table import JSON_VERBS, RECIPE_VERBS, VERBS

HELP = """usage: thyme VERB [arguments]        (thyme VERB --help tells more)

  demo                        learn to write code that crops, rotates and computes: SFT, then GRPO-ATS, in minutes
  ask MODEL IMAGE QUESTION    answer one question, showing thoughts, code and sandbox output as they come
  sft | anneal | rl [RECIPE]  train one stage; RECIPE is a TOML file or the name of a shipped one, and every key may
                              be overridden: thyme rl demo --rl.steps 5
  base             [RECIPE]   train the embedded toy's stand-in for pre-training
  resume RUN                  go on with a training run that was stopped, from its newest intact checkpoint
  rollout | eval   [RECIPE]   sample rollouts to disk | held-out accuracy with intervals
  ablate           [RECIPE]   RL or SFT with settings varied, over seeds, and compared: thyme ablate R --vary KEY=V1,V2
  plan             [RECIPE]   memory by phase and GPU before anything is loaded: thyme plan R --gpu-gib 80 --gpus 8
  export ADAPTER OUT          merge a LoRA adapter (PEFT's format) into its base and write a Hugging Face folder
  serve MODEL                 an OpenAI-compatible server whose chats run the model's code (docs/serve.md)
  data build       [RECIPE]   demonstrations, or hard questions, of raw rows: written, run, judged, counted, resumable
  data compose FOLDER         hard high-resolution questions with known boxes, made on real photographs
  data synth | check | convert  write synthetic rows | find bad rows | write rows in another layout
  data dedup | stats          rows that repeat or leak from a benchmark | tokens, pictures, tags, scenarios
  data review ROWS            look at rows, run their code again; accept, reject or edit; second reviewers
  profile rollout | train     where the time of rollouts, RL or SFT goes: a trace for Perfetto, ops, how far from
                              the machine's roof, the largest gaps; takes a RECIPE (docs/profile.md)
  view RUN                    look at a run in the browser, also while it is under way; --against RUN shows two
  report RUN                  the same as one HTML file
  bench [GROUP]               benchmarks of a checkout beside the machine's ceilings; --compare FILE; --list
  sandbox run FILE            run one snippet in the sandbox and show what came back
  doctor                      what this machine lacks, tried and not guessed: packages, GPU, kernels, parity, sandbox
  completion bash | zsh | fish  what a shell needs to complete verbs, settings, recipes and files

With --json a verb prints its result for programs: JSON alone on stdout, all else on stderr.
"""

LEAST_ROOM = 1 << 20
"""Bytes; a disk that has no more is full."""
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
"""A disk that is full or not ours to write is the user's to mend, wherever it is met."""

HELP_FLAGS = {"-h", "--help", "--help-all"}


def main(argv: list[str] | None = None) -> None:
    """Runs one verb; exits with 2 and one line on a user's error, with 141 where nobody reads its output any more."""
    printable(sys.stdout)
    try:
        try:
            _main(argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        raise SystemExit(128 + signal.SIGPIPE) from None


def _reader_is_gone() -> bool:
    """Whether stdout leads nowhere (`thyme ... | head`); what is still to be written to it is dropped then."""
    out = select.poll()
    out.register(sys.stdout, 0)
    if not out.poll(0):  # the end of another pipe or socket has gone
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _main(argv: list[str] | None) -> None:
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in {"-h", "--help"}:
        print(HELP, end="")
        raise SystemExit(0)
    if args[0] == "--version":
        import thyme

        print(thyme.__version__)
        raise SystemExit(0)
    from thyme import interrupt

    try:
        with interrupt.raised():
            verb, rest = _verb(args)
            code = _run(verb, rest)
    except (ValueError, FileNotFoundError, FloatingPointError, RuntimeError) as error:
        if os.environ.get("THYME_TRACEBACK") == "1" or not _is_of_the_user(error):
            raise
        _fail(str(error))
    except OSError as error:
        if os.environ.get("THYME_TRACEBACK") == "1" or error.errno not in NO_ROOM:
            raise
        _fail(f"{error}{_full()}" if error.filename is None else str(error))
    except KeyboardInterrupt as error:
        _fail("; ".join(["interrupted", *getattr(error, "__notes__", ())]), interrupt.exit_code(error))
    if code:
        raise SystemExit(code)


def _verb(args: list[str]) -> tuple[str, list[str]]:
    """The verb, of one word or two, and what follows it."""
    for words in (2, 1):
        verb = " ".join(args[:words])
        if verb in VERBS:
            return verb, args[words:]
    seconds = [verb.split()[1] for verb in VERBS if verb.startswith(f"{args[0]} ")]
    if seconds and args[1:2] and args[1] in HELP_FLAGS:
        print(f"usage: thyme {args[0]} {' | '.join(seconds)}        (thyme {args[0]} {seconds[0]} --help tells more)")
        raise SystemExit(0)
    if seconds:
        raise ValueError(f"thyme {args[0]} needs one of: {', '.join(seconds)}")
    from thyme.config import nearest

    near = nearest(args[0], {verb.split()[0] for verb in VERBS})
    raise ValueError(f"unknown verb {args[0]!r}: did you mean {near!r}? (thyme --help lists them)")


def _run(verb: str, args: list[str]) -> int:
    """Help, a dry run, or the verb itself."""
    from thyme.config import settings, to_toml
    from thyme.help import help_text
    from thyme.options import parse

    module: Any = import_module(VERBS[verb])
    args = module.spoken(args) if hasattr(module, "spoken") else args  # short words for settings
    takes_recipe = verb in RECIPE_VERBS
    recipes = import_module("thyme.verbs.recipe").Recipe if takes_recipe else None
    default_recipe = module.default_recipe(args) if hasattr(module, "default_recipe") else None
    if HELP_FLAGS & set(args):
        needs_more = any(f.metadata.get("positional") for f in settings(module.Config))
        defaults = None if needs_more else parse(module.Config, [], recipes=recipes, default_recipe=default_recipe)
        summary, everything = (module.__doc__ or "").partition("\n\n")[0], "--help-all" in args
        options: dict[str, Any] = {"defaults": defaults, "takes_recipe": takes_recipe, "everything": everything}
        options["has_json"] = verb in JSON_VERBS
        print(help_text(verb, module.Config, summary, **options), end="")
        return 0
    is_dry, args = _said("--dry-run", args, takes_recipe)
    as_json, args = _said("--json", args, verb in JSON_VERBS)
    if hasattr(module, "parse"):  # its settings are another verb's
        return _ended(module, module.parse(args), as_json)
    config = parse(module.Config, args, recipes=recipes, default_recipe=default_recipe)
    if is_dry:
        print(to_toml(config), end="")
        for line in module.described(config) if hasattr(module, "described") else ():
            print(f"# {line}")
        return 0
    return _ended(module, config, as_json)


def _said(word: str, args: list[str], is_known: bool) -> tuple[bool, list[str]]:
    """Whether the word stands before any `--`, and the arguments without it."""
    own = args[: args.index("--")] if "--" in args else args
    if not is_known or word not in own:
        return False, args
    return True, [arg for arg in own if arg != word] + args[len(own) :]


def _ended(module: Any, config: Any, as_json: bool) -> int:
    """Runs the verb; its exit code. As JSON its result alone goes to stdout, what it says meanwhile to stderr."""
    from thyme.result import Result
    from thyme.verbs.notes import is_first_rank

    with redirect_stdout(sys.stderr if as_json else sys.stdout):
        ended = module.run(config)
    if not isinstance(ended, Result):
        ended = Result(None, ended or 0)
    if as_json and is_first_rank():
        print(ended.to_json())
    return ended.code


def _is_of_the_user(error: Exception) -> bool:
    """A RuntimeError is a bug of ours, but for a machine that lacks what the sandbox stands on."""
    from thyme.sandbox import SandboxUnavailable

    return isinstance(error, SandboxUnavailable) or not isinstance(error, RuntimeError)


def _full() -> str:
    """Where there is no room, of the places that verbs write to: a write that fails does not say what to."""
    import shutil
    import tempfile

    places = [place for place in (Path.cwd(), Path("runs"), Path(tempfile.gettempdir())) if place.is_dir()]
    full = [str(place) for place in places if shutil.disk_usage(place).free < LEAST_ROOM]
    return f": {', '.join(dict.fromkeys(full))} is full: make room there" if full else ""


def _fail(message: str, code: int = 2) -> None:
    print(f"thyme: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)
