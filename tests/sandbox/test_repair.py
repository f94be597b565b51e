"""Repairs: each slip runs after it, what compiles is never touched, what is ambiguous is left alone."""

from __future__ import annotations

import ast
import keyword
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sandbox.slips import NOT_REPAIRED, REPAIRED, Slip
from thyme.sandbox import Sandbox, Status
from thyme.sandbox.released import grow_box, rewrite
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
def test_any_text_is_survived(code: str) -> None:
    repaired = fixed(code)
    if repaired.code != code:
        compile(repaired.code, "<test>", "exec")


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


def test_released_rewriting() -> None:
    assert grow_box((100, 70, 110, 90), 120, 80) == (56, 16, 120, 80)
    assert grow_box((10, 10, 20, 20), 500, 500) == (10, 10, 74, 74)
    assert grow_box((30, 30, 10, 10), 40, 40) == (0, 0, 40, 40)
    code, fixes = rewrite(
        "box = (0, 0, 5, 5)\nprint(f'{x:.1f}')\ncv.imread(p)", image_path="a.png", image_size=(90, 90)
    )
    assert "(0, 0, 64, 64)" in code and ":.8f" in code and "cv2.imread" in code
    assert {f.kind for f in fixes} == {"crop", "decimals"}
