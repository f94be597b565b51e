"""Repairs: each slip runs after it, what compiles is never touched, what is ambiguous is left alone."""

from __future__ import annotations

import ast
import keyword
import warnings
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.sandbox.slips import NOT_REPAIRED, REPAIRED, Slip
from thyme.sandbox import Sandbox, Status
from thyme.sandbox.released_dialect import MIN_CROP, grow_box, rewrite
from thyme.sandbox.repair import KNOWN_NAMES, repair
from thyme.sandbox.shims import clamp_box

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
    assert len({s.code for s in REPAIRED}) == len(REPAIRED) >= 100
    assert len({code for _, code in NOT_REPAIRED}) == len({name for name, _ in NOT_REPAIRED}) == len(NOT_REPAIRED) >= 40
