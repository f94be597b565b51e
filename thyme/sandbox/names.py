"""Names a snippet reads and nothing defines, with the statement that defines each where it is plain what is meant.

A statement runs before the snippet, in its namespace; the snippet's text is never changed by it. What a name means is
taken from its use: `string.digits` means the module, `string.upper()` does not. Whatever could be two things is left
undefined, so that the error reaches the model.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import importlib.util
import re
import sys
import types
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

from thyme.sandbox.input_image import IMAGE_ATTRIBUTES, binding, is_input_name
from thyme.sandbox.result import Fix
from thyme.sandbox.source import without_strings
from thyme.sandbox.uses import Use, is_guarded, parents_of, uses_of, words

# Modules under the name that everybody gives them: any attribute will do.
_MODULES = {
    **{name: f"import {name}" for name in ("cv2", "numpy", "scipy", "skimage", "torch", "sympy", "pytesseract")},
    **{
        name: f"from PIL import {name}"
        for name in words(
            "Image ImageDraw ImageFont ImageOps ImageEnhance ImageFilter ImageChops ImageStat ImageColor "
            "ImageMath ImageMorph ImageSequence ImageFile ImagePalette"
        )
    },
    "PIL": "import PIL, PIL.Image",
    "np": "import numpy as np",
    "cv": "import cv2 as cv",
    "plt": "import matplotlib.pyplot as plt",
    "pd": "import pandas as pd",
    "mpimg": "import matplotlib.image as mpimg",
    "ndimage": "from scipy import ndimage",
    "sns": "import seaborn as sns",
}
# Functions and classes that go by one name in one module. Called or used as a decorator; a class also by an attribute.
_FROM = {
    "math": "sqrt ceil floor sin cos tan atan2 atan radians degrees hypot log log2 log10 exp gcd isclose factorial "
    "asin acos fabs trunc comb isnan isinf",
    "collections": "Counter defaultdict deque OrderedDict namedtuple ChainMap",
    "itertools": "combinations permutations chain groupby accumulate islice zip_longest",
    "functools": "reduce partial lru_cache wraps cmp_to_key cached_property",
    "io": "BytesIO StringIO",
    "pathlib": "Path PurePath",
    "copy": "deepcopy copy",
    "fractions": "Fraction",
    "decimal": "Decimal",
    "dataclasses": "dataclass",
    "datetime": "datetime timedelta date",
    "time": "sleep perf_counter",
    "glob": "glob",
    "pprint": "pprint",
    "contextlib": "suppress contextmanager redirect_stdout",
    "enum": "Enum",
    "abc": "ABC abstractmethod",
    "textwrap": "dedent",
    "operator": "itemgetter attrgetter",
    "heapq": "heappush heappop heapify",
    "bisect": "bisect_left bisect_right",
    "base64": "b64encode b64decode",
    "uuid": "uuid4",
    "types": "SimpleNamespace",
    "os": "listdir makedirs getcwd",
    "os.path": "basename dirname splitext isfile isdir",
    "random": "randrange",
    "shutil": "copyfile rmtree",
    "urllib.parse": "urlparse",
    "PIL": "UnidentifiedImageError",
}
_FUNCTIONS = {name: f"from {module} import {name}" for module, names in _FROM.items() for name in names.split()}
# Plain values and names of types.
_VALUES = {
    **{name: f"from math import {name}" for name in ("pi", "inf", "nan")},
    **{name: f"from string import {name}" for name in ("ascii_lowercase", "ascii_uppercase", "ascii_letters")},
    **{
        name: f"from typing import {name}"
        for name in words("Any Callable Dict Iterable Iterator List NamedTuple Optional Sequence Set Tuple Union")
    },
    "UnidentifiedImageError": "from PIL import UnidentifiedImageError",
    "true": "true = True",
    "false": "false = False",
    "null": "null = None",
}
KNOWN_NAMES: dict[str, str] = {**_FUNCTIONS, **_MODULES, **_VALUES}
"""Name -> the statement that defines it, where its use fits."""
# Modules whose import does something, or whose name and attributes are everyday words for other things.
_NO_MODULES = words("this antigravity test idlelib turtledemo lib2to3 tkinter turtle site profile trace code cmd")
PACKAGES = {
    **dict.fromkeys(("opencv", "opencv2", "opencv_python", "OpenCV", "cv", "cv3", "cv4", "CV2", "Cv2"), "cv2"),
    **dict.fromkeys(("pillow", "Pillow", "pil", "Pil"), "PIL"),
    **{name: f"PIL.{name}" for name in words("Image ImageDraw ImageFont ImageOps ImageEnhance ImageFilter")},
    **dict.fromkeys(("scikit_image", "Skimage"), "skimage"),
    **dict.fromkeys(("scikit_learn", "Sklearn"), "sklearn"),
    **dict.fromkeys(("np", "Numpy", "NumPy"), "numpy"),
    "plt": "matplotlib.pyplot",
    "pd": "pandas",
}
"""What some call a module that does not exist under that name -> the module."""
_IN_ITSELF = {
    ("cv2", "cv2"): "cv2",
    ("numpy", "np"): "numpy",
    ("numpy", "numpy"): "numpy",
    ("pandas", "pd"): "pandas",
    ("matplotlib", "plt"): "matplotlib.pyplot",
}
"""(module, name imported from it) -> the module that is meant."""
# What `symtable` wraps, without its wrappers: of each snippet's cost those were a tenth.
_symtable = importlib.import_module("_symtable")
_BOUND = _symtable.DEF_LOCAL | _symtable.DEF_IMPORT
_GLOBAL = (_symtable.GLOBAL_IMPLICIT, _symtable.GLOBAL_EXPLICIT)
_HIDES_NAMES = frozenset(("exec", "globals", "locals"))
_TAKE_FUNCTIONS = words("map filter sorted reduce functools.reduce min max isinstance issubclass defaultdict")
_GENERIC = words("Counter defaultdict deque OrderedDict")


class Import(NamedTuple):
    """A statement that defines a missing name, and the note about it (also among `Repaired.fixes`)."""

    statement: str
    fix: Fix


def missing(text: str, unbound: set[str], image_path: str, defined: Collection[str]) -> tuple[Import, ...]:
    """What to run before a snippet that compiles, in the order in which it is needed.

    Args:
        text: the snippet.
        unbound: its `unbound_names`.
        image_path: the path of the input image, "" without.
        defined: names that exist already.
    """
    unclear = {name for name in unbound if _may_be_known(name)}
    imports = "import" in text
    renamed = imports and _RENAMED.search(text) is not None
    early = (imports or "=" in text) and _may_be_read_early(text, defined)
    if not unclear and not renamed and not early:
        return ()
    found: list[Import] = []
    try:
        tree = ast.parse(text)
        if renamed:
            found += _renamed_modules(tree)
        if early:
            found += _read_too_early(tree, image_path, defined)
        if unclear:
            found += _undefined(tree, unclear, image_path)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ()
    return tuple(sorted(found, key=lambda i: i.fix.line))


def _may_be_known(name: str) -> bool:
    return name in KNOWN_NAMES or name in sys.stdlib_module_names or is_input_name(name)


def is_known_word(word: str) -> bool:
    """Whether it is a name, or an attribute of images, arrays and plain values, that is whole as it is."""
    values = (str, list, dict, tuple, int, float)
    known = hasattr(builtins, word) or word in KNOWN_NAMES or word in IMAGE_ATTRIBUTES or is_input_name(word)
    return known or any(hasattr(kind, word) for kind in values)


def unbound_names(text: str, defined: Collection[str]) -> set[str]:
    """Names a snippet that compiles reads globally, and neither it nor Python nor `defined` binds."""
    try:
        read, bound = _read_and_bound(_symtable.symtable(text, "<snippet>", "exec"))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return set()
    return {name for name in read - bound - set(defined) if not hasattr(builtins, name)}


def _read_and_bound(top: Any) -> tuple[set[str], set[str]]:
    """Global names that are read somewhere, and those that are bound somewhere, by the flags of `_symtable`."""
    bound = {name for name, flags in top.symbols.items() if flags & _BOUND}
    read: set[str] = set()
    tables = [top]
    while tables:
        table = tables.pop()
        tables += table.children
        for name, flags in table.symbols.items():
            scope = flags >> _symtable.SCOPE_OFF & _symtable.SCOPE_MASK
            is_global = scope in _GLOBAL or (table is top and flags & _symtable.DEF_BOUND)
            if not flags & _symtable.USE and not is_global:
                continue
            if scope == _symtable.GLOBAL_EXPLICIT and flags & _symtable.DEF_LOCAL:
                bound.add(name)
            if table is top or is_global:
                read.add(name)
    return read, bound


# --- names that nothing binds ----------------------------------------------------------------------------------------


def _undefined(tree: ast.Module, names: set[str], image_path: str) -> Iterator[Import]:
    hidden = uses_of(tree, _HIDES_NAMES)  # names may be bound where it cannot be seen: only modules are defined then
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            public = _public_names(node.module) if node.level == 0 and node.module else None
            if public is None:
                return
            names = names - public
    for name, uses in uses_of(tree, names).items():
        if any(use.is_guarded for use in uses):
            continue
        line = uses[0].line
        if statement := _import_of(name, uses):
            yield Import(statement, Fix("import", line, f"{statement!r} was missing"))
        elif not hidden and (statement := binding(name, tree, image_path)):
            yield Import(statement, _note_of_input(name, line))


def _note_of_input(name: str, line: int) -> Fix:
    return Fix("name", line, f"{name!r} was not defined: taken for the input image")


def _import_of(name: str, uses: list[Use]) -> str | None:
    """The statement that defines `name`, if all its uses fit what it defines."""
    attributes = {use.attribute for use in uses if use.attribute is not None}
    plain = [use for use in uses if use.attribute is None]
    called = any(use.is_called or use.is_indexed or use.is_decorator or use.is_base_class for use in plain)
    if name in _MODULES:
        return _MODULES[name] if attributes and not called else None
    if name in _VALUES and not attributes and not any(use.is_called for use in plain):
        return _VALUES[name]
    if attributes and not plain and (statement := _import_of_module(name, {use.path for use in uses})):
        return statement
    if name in _FUNCTIONS:
        handed_on = any(use.call is not None and use.call[0] in _TAKE_FUNCTIONS for use in plain)
        fits = called or handed_on or (attributes and not plain)
        if fits and not any(use.is_indexed and name not in _GENERIC for use in plain) and _has(name, attributes):
            return _FUNCTIONS[name]
    return None


def _has(function: str, attributes: Collection[str]) -> bool:
    """Whether what `function` names is a class with all `attributes` (nothing else is asked for attributes)."""
    if not attributes:
        return True
    _, module, _, name, *_ = _FUNCTIONS[function].split()
    value = getattr(_module(module), name, None)
    return isinstance(value, type) and all(hasattr(value, attribute) for attribute in attributes)


def _import_of_module(name: str, paths: Collection[tuple[str, ...]]) -> str | None:
    """`import name` if that is a module of the standard library which has all attributes that `paths` begin with, or
    submodules of the name (`xml.etree.ElementTree`), which are then imported too."""
    if name not in sys.stdlib_module_names or name in _NO_MODULES or name.startswith("_"):
        return None
    module = _module(name)
    if module is None:
        return None
    submodules = {_submodule(name, module, path) for path in paths}
    return None if None in submodules else "import " + ", ".join(sorted({name, *filter(None, submodules)}))


def _submodule(name: str, module: Any, path: Sequence[str]) -> str | None:
    """The module to import before `name.path`: `name` itself, or a part of it; None where there is none such."""
    needed = name
    for part in path:
        if part in vars(module):
            module = vars(module)[part]
        elif hasattr(module, "__path__") and _exists(f"{name}.{part}"):
            module, needed = _module(f"{name}.{part}"), f"{name}.{part}"
        else:
            return None if needed == name else needed
        if not isinstance(module, types.ModuleType):
            break
        name = f"{name}.{part}"
    return needed


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception:  # not of this platform, or not for this process
        return None


def _exists(module: str) -> bool:
    if module in sys.modules:
        return sys.modules[module] is not None
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError, OSError):
        return False


def _public_names(module: str) -> set[str] | None:
    """What `from module import *` binds; None where that is not known."""
    found = sys.modules.get(module) or (_module(module) if module in sys.stdlib_module_names else None)
    if found is None:
        return None
    return set(getattr(found, "__all__", None) or (name for name in vars(found) if not name.startswith("_")))


# --- modules under another name --------------------------------------------------------------------------------------


def _renamed_modules(tree: ast.Module) -> Iterator[Import]:
    """Modules imported under the name of their package, or of what everybody calls them: the real ones are put where
    the import looks for them."""
    wanted: dict[str, tuple[str, ast.stmt]] = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for name, real in _renamed_in(node):
                wanted.setdefault(name, (real, node))
    parents = parents_of(tree) if wanted else {}
    for name, (real, node) in wanted.items():
        if name not in sys.modules and not is_guarded(node, parents, ("ImportError", "ModuleNotFoundError")):
            put = f"__import__('sys').modules[{name!r}] = __import__('importlib').import_module({real!r})"
            yield Import(put, Fix("import", node.lineno, f"the module {name!r} is called {real!r}"))


def _renamed_in(node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, str]]:
    """(name, real name) of each module in an import statement that does not exist under the name."""
    if isinstance(node, ast.Import):
        imported = [alias.name for alias in node.names]
        for name in imported:
            module, _, last = name.rpartition(".")
            if real := _IN_ITSELF.get((module, last)):  # import cv2.cv2
                yield name, real
    elif node.module and not node.level:
        imported = [node.module]
        for alias in node.names:
            real = _IN_ITSELF.get((node.module, alias.name))
            if real is not None and not hasattr(sys.modules.get(node.module), alias.name):
                yield f"{node.module}.{alias.name}", real
            elif node.module in PACKAGES and PACKAGES[node.module] == alias.name:  # from opencv import cv2
                yield f"{alias.name}.{alias.name}", alias.name
    else:
        return
    for name in imported:
        top, *rest = name.split(".")
        if top in PACKAGES and not _is_real(top):
            for end in range(len(rest) + 1):
                yield ".".join((top, *rest[:end])), ".".join((PACKAGES[top], *rest[:end]))


def _is_real(top: str) -> bool:
    """Whether there is a module of that name, other than by `_renamed_modules`."""
    return sys.modules[top].__name__ == top if sys.modules.get(top) else _exists(top)


_RENAMED = re.compile(
    rf"(?:^|[;:])[ \t]*(?:import[ \t][^\n]*?(?<!as )\b(?:{'|'.join(PACKAGES)}|cv2\.cv2)\b"
    rf"|from[ \t]+(?:{'|'.join([*PACKAGES, *(module for module, _ in _IN_ITSELF)])})\b)",
    re.MULTILINE,
)
"""Whether there may be such an import, told without parsing."""


# --- names that are bound too late -----------------------------------------------------------------------------------


_BOUND_LATE = re.compile(r"^[ \t]*(?:import|from)\b.*|^[ \t]*([^\W\d]\w*)[ \t]*=(?!=)", re.MULTILINE)


def _may_be_read_early(text: str, defined: Collection[str]) -> bool:
    """Whether there may be a name for `_read_too_early`, told without parsing: one that is written before the line that
    imports it or, for the input, that assigns it; or in that assignment."""
    plain = without_strings(text)
    for match in _BOUND_LATE.finditer(plain):
        names = [match[1]] if match[1] else re.findall(r"[^\W\d]\w*(?=[ \t]*(?:,|$|\)))", match[0])
        for name in names:
            if name in defined or (match[1] and not is_input_name(name)):
                continue
            first = re.search(rf"\b{name}\b", plain)
            assert first is not None  # where it is bound
            end = plain.find("\n", match.end())
            again = match[1] and re.search(rf"\b{name}\b", plain[match.end() : end if end >= 0 else None])
            if first.start() < match.start() or (again and first.start() == match.start(1)):
                return True
    return False


def _read_too_early(tree: ast.Module, image_path: str, defined: Collection[str]) -> Iterator[Import]:
    """Names that the top level reads for certain before it binds them, where the binding says what they are: an import
    further down, or `img = img.crop(...)`."""
    bound, early = set(defined), dict[str, ast.stmt]()
    for statement in tree.body:
        for name in _names_read_first(statement) - bound:
            if not hasattr(builtins, name):
                early.setdefault(name, statement)
        bound |= set(_names_bound(statement))
    if not early:
        return
    every = [name for statement in tree.body for name in _names_bound(statement)]
    for name, statement in early.items():
        if name not in every:
            continue  # bound nowhere at all
        if every.count(name) == 1 and (source := _later_import(tree, name)):
            yield Import(source, Fix("import", statement.lineno, f"{source!r} comes too late"))
        elif is_input_name(name) and _assigns(statement, name):
            source = binding(name, tree, image_path, within=statement)
            if source:
                yield Import(source, _note_of_input(name, statement.lineno))


def _assigns(statement: ast.stmt, name: str) -> bool:
    """Whether it is `name = ...`."""
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    return any(isinstance(target, ast.Name) and target.id == name for target in targets)


def _later_import(tree: ast.Module, name: str) -> str | None:
    for statement in tree.body:
        if isinstance(statement, ast.Import) or (isinstance(statement, ast.ImportFrom) and not statement.level):
            for alias in statement.names:
                if (alias.asname or alias.name) == name:
                    if isinstance(statement, ast.ImportFrom):
                        return ast.unparse(ast.ImportFrom(statement.module, [alias], 0))
                    return ast.unparse(ast.Import([alias]))
    return None


def _names_read_first(statement: ast.stmt) -> set[str]:
    """Names that a statement reads whatever happens, before it binds any; fewer where that is hard to tell."""
    if isinstance(statement, (ast.Assign, ast.AnnAssign, ast.Expr)):
        parts = [statement.value]
    elif isinstance(statement, (ast.If, ast.While, ast.Assert)):
        parts = [statement.test]
    elif isinstance(statement, (ast.For, ast.AsyncFor)):
        parts = [statement.iter]
    elif isinstance(statement, ast.With):
        parts = [statement.items[0].context_expr]
    else:
        return set()
    found: set[str] = set()
    pending: list[ast.AST] = [part for part in parts if part is not None]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            found.add(node.id)
        if isinstance(node, ast.NamedExpr):
            return set()
        if not isinstance(node, (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
            pending += ast.iter_child_nodes(node)
    return found


def _names_bound(statement: ast.stmt) -> Iterator[str]:
    """Every name bound anywhere within, in inner scopes too."""
    for node in ast.walk(statement):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            yield node.id
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.alias):
            yield (node.asname or node.name).split(".")[0]
        elif isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) and node.name:
            yield node.name
        elif isinstance(node, (ast.Global, ast.Nonlocal)):
            yield from node.names
