"""Runs the snippets of one session, one after the other, in one namespace."""

from __future__ import annotations
import __future__

import ast
import builtins
import functools
import linecache
import operator
import re
import resource
import sys
import time
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

from PIL import Image

from thyme.sandbox import paths, shims
from thyme.sandbox.config import SandboxConfig
from thyme.sandbox.released_dialect import rewrite
from thyme.sandbox.repair import Repaired, repair
from thyme.sandbox.result import Fix, SnippetError
from thyme.sandbox.result_images import ResultImages, Seen
from thyme.sandbox.snippet_error import is_full, line_of, memory_error, runtime_error, syntax_error, text_of
from thyme.sandbox.source import num_lines
from thyme.sandbox.stdout import new_stdout, num_printed

_FUTURE_FLAGS = functools.reduce(
    operator.or_, (getattr(__future__, n).compiler_flag for n in __future__.all_feature_names)
)
_MOST_FIXES = 40
_SHOWS_SOURCE = re.compile(r"\b(?:inspect|traceback|logging|linecache|pdb)\b")
"""Modules that look up the lines of a program."""
_image_open = Image.open  # before the shims: the image is not the snippet's here
_process_time = time.process_time  # the snippet can replace it where it comes from


class Job(NamedTuple):
    """What a child is to work on, in the terms of its own file system."""

    places: Mapping[str, str]
    """The folders of the scratch as the snippet knows them -> where they are."""
    image_path: str
    """The path of the input image as the model was told it."""
    image_file: str | None
    """Where the image lies; None without one."""
    image_format: str | None
    """What the image was before it was stored ("JPEG"); None where that is not known."""
    seed: int
    more_images: Mapping[str, str] = {}
    """Further images: the path the model was told -> where the image lies."""


_End = tuple[str, SnippetError | None]
"""How the run of a snippet ended: status by the names of the answer to the client, error."""


class Interpreter:
    """One namespace over the rounds of a rollout.

    Args:
        job: image, paths and seed.
        config: the limits, and the dialect.
    """

    def __init__(self, job: Job, config: SandboxConfig) -> None:
        self.config = config
        self.round = 0
        self.cpu_before = _process_time()
        self.map = paths.PathMap(job.places, job.image_path, job.image_file, job.image_format, job.more_images)
        self.image_size: tuple[int, int] | None = None
        if job.image_file and config.compat == "released":  # only its rewriting asks before the code runs
            with _image_open(job.image_file) as image:
                self.image_size = image.size
        paths.use(self.map)
        module = sys.modules["__main__"] = types.ModuleType("__main__")
        self.names = module.__dict__
        self.names.update(
            __builtins__=builtins, image_path=job.image_path, temp_output_dir=paths.HOME, display=_display
        )
        self.images = ResultImages(self.map, config)

    def run(self, code: str) -> dict[str, Any]:
        """Repairs and runs one snippet. Returns the answer to the client; see untrusted_result.read_result."""
        self.round += 1
        notes = shims.start_round()
        previous_path = self.names.get("processed_path")
        stdout = new_stdout(self.config.max_stdout_bytes)
        stdout.install()
        fixes: list[Fix] = []
        sizes: list[tuple[int, int]] = []
        try:
            repaired = self._repair(code)
            fixes = list(repaired.fixes)
            for statement, fix in repaired.imports:
                try:
                    exec(statement, self.names)
                except (ImportError, OSError):  # not installed; no input image
                    fixes.remove(fix)
            status, error = self._execute(repaired, code)
            if status in ("ok", "error"):
                printed, path = stdout.text(), self.names.get("processed_path")
                found = self.images.find(printed, None if path is previous_path else path, shims.notes.saved)
                sizes, excess = self.images.hand_over(found)
                if excess and status == "ok":
                    status, error = "output_limit", SnippetError("OutputLimit", excess, None)
        except MemoryError:
            status, error = "memory", memory_error(self.config)
        except BaseException as problem:
            status, error = "error", SnippetError(type(problem).__name__, text_of(problem), None)
        return {
            "status": status,
            "stdout": stdout.finish(),
            "error": None if error is None else self._shortened(error, num_lines(code)),
            "images": sizes,
            "fixes": [(f.kind, f.line, f.message[:300]) for f in (*fixes, *notes.fixes)][:_MOST_FIXES],
            "cpu_s": round(self.cpu_used(), 4),
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }

    def cpu_used(self) -> float:
        """CPU seconds of the session so far."""
        return _process_time() - self.cpu_before

    def moved(self, seen: Seen, cpu_s: float) -> None:
        """The process is another one by now, which has used nothing yet, with a scratch of its own.

        Args:
            seen: what was known of the scratch before.
            cpu_s: CPU seconds used before.
        """
        self.images.moved(seen)
        self.cpu_before = _process_time() - cpu_s

    def _repair(self, code: str) -> Repaired:
        notes: tuple[Fix, ...] = ()
        if self.config.compat == "released":
            code, notes = rewrite(code, image_path=self.map.image_path, image_size=self.image_size)
        repaired = repair(code, image_path=self.map.image_path, image_size=self.image_size, defined=set(self.names))
        return Repaired(repaired.code, (*notes, *repaired.fixes), repaired.imports) if notes else repaired

    def _execute(self, repaired: Repaired, original: str) -> _End:
        filename = f"{shims.SNIPPET} {self.round}>"
        try:
            body, last, last_line = _compiled(repaired.code, filename)
            if _SHOWS_SOURCE.search(code := repaired.code):  # any other snippet would pay a dozen pages for nothing
                linecache.cache[filename] = (len(code), None, code.splitlines(keepends=True), filename)
        except (SyntaxError, ValueError, RecursionError) as problem:
            return "error", syntax_error(problem, original)
        try:
            exec(body, self.names)
            if last is not None:
                _show_last(eval(last, self.names), last_line)
        except SystemExit as stop:
            if stop.code in (None, 0):
                return "ok", None
            said = f"exit status {stop.code}" if isinstance(stop.code, int) else text_of(stop)
            return "error", SnippetError("SystemExit", said, line_of(stop, filename))
        except MemoryError as problem:
            return "memory", memory_error(self.config, text_of(problem), line_of(problem, filename))
        except BaseException as problem:
            error = runtime_error(problem, filename, self.config, self.map.image_path)
            return "output_limit" if is_full(problem) else "error", error
        finally:
            # `contextlib.suppress` would cost each child six pages.
            try:  # noqa: SIM105
                sys.stdout.flush()
            except BaseException:  # a snippet may leave anything in sys.stdout
                pass
        return "ok", None

    def _shortened(self, error: SnippetError, last_line: int) -> SnippetError:
        line = error.line and min(error.line, last_line)  # escaped line ends were made real ones
        message = self.map.shown(error.message).encode("utf-8", "replace")[: self.config.max_error_bytes]
        return SnippetError(str(error.type)[:100], message.decode("utf-8", "ignore"), line)


def _compiled(code: str, filename: str) -> tuple[types.CodeType, types.CodeType | None, int]:
    """The program, and apart from it the last expression with its line, where it ends in one that could be shown."""
    tree: ast.Module = compile(code, filename, "exec", ast.PyCF_ONLY_AST, dont_inherit=True)  # type: ignore[assignment]
    last = tree.body[-1] if tree.body else None
    if not isinstance(last, ast.Expr) or _is_docstring(tree):
        return compile(tree, filename, "exec"), None, 0
    tree.body.pop()
    body: types.CodeType = compile(tree, filename, "exec")
    flags = body.co_flags & _FUTURE_FLAGS
    return body, compile(ast.Expression(last.value), filename, "eval", flags), last.lineno


def _is_docstring(tree: ast.Module) -> bool:
    last = tree.body[-1]
    return (
        len(tree.body) == 1
        and isinstance(last, ast.Expr)
        and isinstance(last.value, ast.Constant)
        and isinstance(last.value.value, str)
    )


def _show_last(value: Any, line: int) -> None:
    """A bare last expression is shown, as in a notebook, when nothing else was."""
    if value is None or num_printed() or shims.notes.saved or _is_module_like(value):
        return
    if isinstance(value, Image.Image):
        _display(value)
    else:
        print(value if isinstance(value, str) else repr(value))
        shims.notes.fixes.append(Fix("show", line, "nothing was printed: the last expression is shown"))


def _display(*values: Any) -> None:
    """`display(...)` of a notebook."""
    for value in values:
        if isinstance(value, Image.Image):
            shims.show(value)
        else:
            print(value)


def _is_module_like(value: Any) -> bool:
    return isinstance(value, (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type))
