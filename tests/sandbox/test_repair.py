"""Repairs: each slip runs after it, what compiles is never touched, what is ambiguous is left alone."""

from __future__ import annotations

import ast
import html
import keyword
import re
import signal
import sys
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.material import MISSING
from tests.sandbox.mutations import mutated, published_snippets, slips
from tests.sandbox.slips import NOT_REPAIRED, REPAIRED, RIGHT, UNDEFINED, Slip
from thyme.sandbox import Sandbox, Status
from thyme.sandbox.names import KNOWN_NAMES, unbound_names
from thyme.sandbox.released_dialect import MIN_CROP, grow_box, rewrite
from thyme.sandbox.repair import Repaired, repair
from thyme.sandbox.shims import clamp_box
from thyme.sandbox.source import num_lines
from thyme.sandbox.tidy import MAX_CHARACTERS, tidied

IMAGE_PATH = "/data/photo.jpg"


def fixed(code: str):
    return repair(code, image_path=IMAGE_PATH, image_size=(120, 80))


@pytest.mark.parametrize("slip", REPAIRED, ids=[f"{s.kind}-{i}" for i, s in enumerate(REPAIRED)])
def test_slip_runs(slip: Slip, sandbox: Sandbox, image) -> None:
    result = sandbox.run(slip.code, image, IMAGE_PATH)
    assert result.status is Status.OK, result
    assert result.stdout.strip() == slip.stdout
    assert tuple(i.size for i in result.images) == slip.sizes
    assert slip.kind in {fix.kind for fix in result.fixes}, result.fixes
    assert all(0 <= fix.line <= slip.code.count("\n") + 1 and str(fix) for fix in result.fixes)


@pytest.mark.parametrize(("name", "code"), NOT_REPAIRED, ids=[n for n, _ in NOT_REPAIRED])
def test_left_alone(name: str, code: str, sandbox: Sandbox, image) -> None:
    assert fixed(code).code == code
    result = sandbox.run(code, image, IMAGE_PATH)
    assert result.status is Status.ERROR, result


def test_repair_does_not_need_the_sandbox() -> None:
    """The pure function alone makes every slip compile that is one of syntax."""
    for slip in REPAIRED:
        compile(fixed(slip.code).code, "<test>", "exec")


_SOURCES = sorted(Path(ast.__file__).parent.glob("[a-h]*.py"))


@pytest.mark.parametrize("path", _SOURCES, ids=[p.name for p in _SOURCES])
def test_code_that_compiles_is_unchanged(path: Path) -> None:
    code = path.read_text("utf-8", "replace")
    repaired = fixed(code)
    assert repaired.code == code
    assert all(fix.kind == "import" for fix in repaired.fixes)


_NAMES = st.sampled_from(["x", "im", "np", "Image", "math", "print", "y1"])
_EXPRESSIONS = st.recursive(
    st.one_of(_NAMES, st.integers(0, 99).map(str), st.sampled_from(["'a'", '"b # c"', "f'{x}'", "None"])),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "==", "and", "@"]), inner).map(" ".join),
        inner.map(lambda e: f"({e},)"),
        inner.map(lambda e: f"f({e})[{e}]"),
        inner.map(lambda e: f"lambda: {e}").map("({})".format),
    ),
    max_leaves=6,
)
_LINES = st.one_of(
    _EXPRESSIONS,
    st.tuples(_NAMES, _EXPRESSIONS).map(" = ".join),
    _EXPRESSIONS.map("if {}:\n    pass".format),
    _EXPRESSIONS.map("def g():\n  return {}".format),
    st.sampled_from(
        ["# ```", "'''\n```\n'''", "%matplotlib inline", "```", "x = (", "    y", "\tz", "print 1", "else:"]
    ),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(_LINES, max_size=8).map("\n".join))
@example("```\n# ```")
@example("\n\n`x = 1`\n")
def test_property_compiling_is_unchanged_and_repaired_compiles(code: str) -> None:
    repaired = fixed(code)
    try:
        compile(code, "<test>", "exec")
    except SyntaxError:
        if repaired.code != code:
            compile(repaired.code, "<test>", "exec")
            assert repaired.fixes
        else:
            assert not repaired.fixes
        assert repaired.code.count("\n") == code.count("\n") or "\\n" in code
    else:
        assert repaired.code == code


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet=st.sampled_from("()[]{}:,.'\"#\\\n\t =+`>%xif1\u201c\u00a0"), max_size=60))
@example('\u201c\\:"')  # an escape Python warns of, repaired or not
def test_any_text_is_survived(code: str) -> None:
    repaired = fixed(code)  # under filters that make errors of warnings
    if repaired.code != code:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(repaired.code, "<test>", "exec")


def test_an_odd_escape_is_no_error_whatever_the_filters_say() -> None:
    """Python warns of it, and here warnings are errors: the block is indented all the same."""
    assert fixed("x = 1\nif x:\ny = '\\:'\n").code == "x = 1\nif x:\n    y = '\\:'\n"


def test_names_come_from_the_symbol_table() -> None:
    assert not fixed("np = 3\nprint(np)").imports
    assert not fixed("def f(np): return np").imports
    assert not fixed("import numpy as np\nprint(np)").imports
    assert not fixed("print('np math')").imports
    assert not fixed("x.np.math").imports
    assert not repair("print(np)", image_path="", image_size=None, defined={"np"}).imports
    found = fixed("def f():\n    return np.array(math.pi)").imports
    assert {i.statement for i in found} == {"import numpy as np", "import math"} and found[0].fix.line == 2
    assert not any(keyword.iskeyword(name) for name in KNOWN_NAMES)


def test_line_numbers_survive() -> None:
    repaired = fixed("Sure:\n```python\nx = 1\nfor i in range(2)\n    print(i)\n```")
    assert repaired.code.split("\n")[3] == "for i in range(2):"
    assert {fix.line for fix in repaired.fixes} >= {2, 4, 6}


@given(st.tuples(*[st.integers(-200, 300)] * 4), st.integers(1, 200), st.integers(1, 200))
def test_clamped_boxes_lie_inside(box, width: int, height: int) -> None:
    try:
        (x0, y0, x1, y1), done = clamp_box(box, width, height)
    except ValueError:
        return
    assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
    assert bool(done) == ((x0, y0, x1, y1) != box)


def test_released_boxes() -> None:
    assert grow_box((100, 70, 110, 90), 120, 80) == (56, 16, 120, 80)
    assert grow_box((10, 10, 20, 20), 500, 500) == (10, 10, 74, 74)
    assert grow_box((30, 30, 10, 10), 40, 40) == (0, 0, 40, 40)
    assert grow_box((30, 30, 30, 30), 500, 500) == (
        29,
        29,
        93,
        93,
    )  # no width: one to the left, then right
    assert grow_box((600, 700, 900, 800), 500, 300) == (436, 236, 500, 300)


@given(st.tuples(*[st.floats(-200, 900)] * 4), st.integers(1, 600), st.integers(1, 600))
def test_released_boxes_have_64_pixels_inside_the_image(box, width: int, height: int) -> None:
    x1, y1, x2, y2 = grow_box(box, width, height)
    assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height
    assert x2 - x1 >= min(MIN_CROP, width) - 1 and y2 - y1 >= min(MIN_CROP, height) - 1  # less what rounding takes


# what the released sandbox runs, and what comes of it with a 500x400 image at /data/photo.jpg
RELEASED = [
    ("x1, y1, x2, y2 = 10, 10, 20, 500", "x1, y1, x2, y2 = (10, 10, 74, 400)", "crop"),
    ("left, top, right, bottom = (90, 20, 30, 200)", "left, top, right, bottom = (30, 20, 94, 200)", "crop"),
    ("X1, a, b, c = 0, 0, 5, 5", "X1, a, b, c = (0, 0, 64, 64)", "crop"),
    ("crop_box = (0, 0, 5, 5)  # small", "crop_box = (0, 0, 64, 64)  # small", "crop"),
    ("bbox = (0.2, 0, 600.7, 100)", "bbox = (0, 0, 500, 100)", "crop"),
    ("box = (1,\n 2,\n 3, 4)\n1/0", "box = ((1, 2, 65, 66)\n\n)\n1/0", "crop"),
    ("image_path = '/wrong.jpg'", "image_path = '/data/photo.jpg'", "path"),
    ("image_path = __file__ and 'no suffix'", None, ""),
    ("print(f'{x:.2f} {y:.3f}')", "print(f'{x:.8f} {y:.8f}')", "decimals"),
    ("print('{:.2f}'.format(x))", "print('{:.8f}'.format(x))", "decimals"),
    ("im = cv.imread(p)\ncv4.dnn.x(CV.y)", "im = cv2.imread(p)\ncv2.dnn.x(cv2.y)", "opencv"),
    ("\u00e9 = 1; box = (0, 0, 9, 9)", "\u00e9 = 1; box = (0, 0, 64, 64)", "crop"),
    # what it leaves alone
    ("box = (10, 10, 90, 90)", None, ""),
    ("box = (-10, 10, 20, 20)", None, ""),  # a minus sign is an expression
    ("box = [1, 2, 3, 4]", None, ""),
    ("box = other = (1, 2, 3, 4)", None, ""),
    ("sign_box = (1, 2, 3, 4)", None, ""),
    ("a, b, c, d = 1, 2, 3, 4", None, ""),
    ("x1, y1 = 1, 2", None, ""),
    ("x1, y1, x2, y2 = p, 2, 3, 4", None, ""),
    ("box = (1, 2, 3, 1e999)", None, ""),
    ("im.crop((1, 2, 3, 4))", None, ""),
    ("crop = image[1:2, 3:4]", None, ""),
    ("img_path = '/wrong.jpg'", None, ""),
    ("cv = 3\nprint(cv)", None, ""),
    ("print(f'{x:.10f} {y:.2e} {z:5.1f}')", None, ""),
    ("box = (1, 2, 3, 4", None, ""),
]


@pytest.mark.parametrize(("code", "expected", "kind"), RELEASED)
def test_released_rewriting(code: str, expected: str | None, kind: str) -> None:
    text, fixes = rewrite(code, image_path=IMAGE_PATH, image_size=(500, 400))
    assert text == (code if expected is None else expected)
    assert {fix.kind for fix in fixes} == ({kind} if kind else set())
    assert text.count("\n") == code.count("\n")


def test_released_rewriting_leaves_an_existing_image_path(tmp_path: Path) -> None:
    for name, kept in (("a.png", True), ("a.txt", False)):
        (tmp_path / name).touch()
        code = f"image_path = {str(tmp_path / name)!r}"
        assert (rewrite(code, image_path=IMAGE_PATH, image_size=(9, 9))[0] == code) is kept


def test_lists_are_what_they_claim() -> None:
    assert len({s.code for s in REPAIRED}) == len(REPAIRED) >= 300
    assert (
        len({code for _, code in NOT_REPAIRED}) == len({name for name, _ in NOT_REPAIRED}) == len(NOT_REPAIRED) >= 150
    )


@pytest.mark.parametrize("code", UNDEFINED)
def test_names_that_could_be_anything_stay_undefined(code: str, sandbox: Sandbox, image) -> None:
    result = sandbox.run(code, image, IMAGE_PATH)
    assert result.error is not None and result.error.type == "NameError" and not result.fixes, result


@pytest.mark.parametrize("code", RIGHT)
def test_what_is_right_is_left_alone(code: str, sandbox: Sandbox, image) -> None:
    assert repair(code, image_path=IMAGE_PATH, image_size=None, defined={"image_path"}) == Repaired(code)
    result = sandbox.run(code, image, IMAGE_PATH)
    assert result.status is Status.OK and not result.fixes, result


# snippet, line of its error as it was written
ERRORS = [
    ("Sure:\n```python\nx = 1\nprint(x / 0)\n```", 4),
    ("a=1\n```\nThen:\n```python\n1 / 0", 5),
    (">>> x = 1\n>>> x / 0", 2),
    ("In [1]: x = 1\n\nIn [2]: x / 0", 3),
    ("1. x = 1\n2. y = 2\n3. 1 / 0", 3),
    ("    x = 1\n    1 / 0", 2),
    ("x = 1\\ny = 2\\n1 / 0", 1),
    ("\n\nx = 1\\n1 / 0\n", 3),
    ("import opencv as cv2\nimage_size = img.size\n1 / 0", 3),
    ("if True\n    1 / 0", 2),
    ("x = 3\nif x = 3:\n    pass", 2),
    ("```python\nx = 1\nif x = 3:\n    pass\n```", 1),
]


@pytest.mark.parametrize(("code", "line"), ERRORS)
def test_errors_have_the_lines_of_the_snippet_as_it_was_written(code: str, line: int, sandbox: Sandbox, image) -> None:
    result = sandbox.run(code, image, IMAGE_PATH)
    assert result.error is not None and result.error.line == line, result
    assert all(fix.line <= code.count("\n") + 1 for fix in result.fixes)


def test_what_cannot_be_put_right_has_the_error_of_pillow(sandbox: Sandbox, image) -> None:
    result = sandbox.run("from PIL import Image\nImage.new('RGB', 100)", image, IMAGE_PATH)
    assert result.error is not None and "ize must be a list or tuple" in result.error.message and not result.fixes


def test_names_of_the_input_without_an_input(sandbox: Sandbox) -> None:
    for code in ("print(img.size)", "import cv2\nprint(cv2.flip(img, 0))"):
        result = sandbox.run(code)
        assert result.error is not None and result.error.type == "NameError" and not result.fixes, result


def test_names_of_earlier_rounds_are_not_the_input(sandbox: Sandbox, image) -> None:
    with sandbox.session(image, IMAGE_PATH) as session:
        assert session.run("img = 'a'\nimport pillow").fixes[0].kind == "import"
        result = session.run("print(img.upper())\nimport pillow.Image as I\nfrom PIL import Image\nprint(I is Image)")
        assert result.stdout == "A\nTrue\n", result
        result = session.run("img = img.lower()\nprint(img)")
        assert result.stdout == "a\n" and not result.fixes


def test_exit_ends_the_snippet_as_its_status_says(sandbox: Sandbox) -> None:
    for code, status in (("exit()", Status.OK), ("quit(1)", Status.ERROR), ("import sys\nsys.exit(0)", Status.OK)):
        assert sandbox.run(code).status is status, code


# --- mutated snippets ------------------------------------------------------------------------------------------------

_HANG_S = 2.0
"""CPU seconds no snippet comes near (the slowest takes hundredths of one): only a hang uses them up."""
_WORD = re.compile(r"[A-Za-z_]\w+")
_OF_REPAIRS = {"pass", "as", "elif", "except", "print", "cv2", "skimage", "sklearn", "and"}


def test_mutated_snippets() -> None:
    check_mutations(slips(), 3_000, seed=1)


@pytest.mark.soak
def test_mutated_snippets_long() -> None:
    check_mutations(slips(), 50_000, seed=2)


@pytest.mark.soak
def test_mutated_published_snippets() -> None:
    published = published_snippets()
    if not published:
        pytest.skip(MISSING)
    check_mutations(published, 50_000, seed=3)


def check_mutations(sources: list[str], count: int, seed: int) -> None:
    """Nothing raises, nothing hangs, nothing that is right is touched, lines stay where they are."""
    changed = 0
    for code in mutated(sources, count, seed):
        with no_hang(code):
            repaired = repair(code, image_path=IMAGE_PATH, image_size=None, defined={"image_path"})
        changed += repaired.code != code
        check_repaired(code, repaired)
    assert count / 10 < changed < count / 2  # the mutations are neither harmless nor hopeless


@contextmanager
def no_hang(code: str) -> Iterator[None]:
    def stop(signum: int, frame: object) -> None:
        raise AssertionError(f"repair() hangs on {code!r}")

    previous = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, _HANG_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)


def check_repaired(code: str, repaired: Repaired) -> None:
    if is_python(code) and not unbound_names(code, {"image_path"}):
        assert repaired.code == code, code
        assert all("comes too late" in fix.message or fix.kind in ("import", "name") for fix in repaired.fixes), code
    if repaired.code == code:
        assert repaired.fixes == tuple(needed.fix for needed in repaired.imports), code
        return
    assert is_python(repaired.code) and repaired.fixes, code
    assert all(0 <= fix.line <= num_lines(code) for fix in repaired.fixes), code
    again = repair(repaired.code, image_path=IMAGE_PATH, image_size=None, defined={"image_path"})
    assert again.code == repaired.code, code
    if "escaped line ends" not in " ".join(fix.message for fix in repaired.fixes):
        check_lines(code, repaired.code)


def check_lines(code: str, repaired: str) -> None:
    """Every word of a line was in that line before."""
    before, after = re.split("\r\n|\r|\n", code), re.split("\r\n|\r|\n", repaired)
    assert len(before) == len(after), code
    for old, new in zip(before, after, strict=True):
        plain = unicodedata.normalize("NFKC", old.translate(dict.fromkeys(map(ord, "\u200b\u00ad"))))
        known = _WORD.findall(f"{old} {plain} {html.unescape(plain)}")
        assert {*_WORD.findall(new)} <= {*known} | _OF_REPAIRS, (code, repaired)


def is_python(code: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            compile(code, "<test>", "exec")
        except (SyntaxError, ValueError):
            return False
    return True


def test_autopep8_is_asked_last_and_under_a_bound() -> None:
    crooked = "if True:\n  x = 1\n"
    assert tidied(crooked) == "if True:\n    x = 1\n"
    assert tidied("x = 1\n\\\n\n  y = 2\n") is None  # a stray backslash line makes autopep8 loop for ever
    assert tidied(crooked + "#" * MAX_CHARACTERS) is None
    assert tidied("x\n    y\nx = (\n'''\n```\n'''") is None  # an IndexError inside of autopep8
    assert sys.gettrace() is None or "tidy" not in repr(sys.gettrace())
