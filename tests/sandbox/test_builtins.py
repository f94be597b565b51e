"""The builtins that `site` gives to plain Python, and several code fences in one block."""

from __future__ import annotations

import builtins

import pytest

from thyme.sandbox import Sandbox, Status

OF_SITE = ("exit", "quit", "copyright", "credits", "license", "help")
SAVE = "from PIL import Image\nImage.new('RGB', (4, 3)).save('a.png')\n"


def test_nothing_of_plain_python_is_missing(sandbox: Sandbox) -> None:
    names = sandbox.run("import builtins\nprint(*dir(builtins))").stdout.split()
    assert set(OF_SITE) <= set(names)
    assert not {name for name in dir(builtins) if not name.startswith("_")} - set(names)


@pytest.mark.parametrize(
    ("end", "status", "message"),
    [
        ("exit()", Status.OK, None),
        ("quit()", Status.OK, None),
        ("exit(0)", Status.OK, None),
        ("quit(None)", Status.OK, None),
        ("raise SystemExit", Status.OK, None),
        ("exit(1)", Status.ERROR, "exit status 1"),
        ("import sys; sys.exit(2)", Status.ERROR, "exit status 2"),
        ("quit('no text found')", Status.ERROR, "no text found"),
    ],
)
def test_leaving_early_returns_what_was_saved(sandbox: Sandbox, end: str, status: Status, message: str | None) -> None:
    result = sandbox.run(f"print('before')\n{SAVE}{end}\nprint('after')")
    assert (result.status, result.stdout) == (status, "before\n")
    assert result.error == (None if message is None else ("SystemExit", message, 4))
    assert [image.size for image in result.images] == [(4, 3)]


def test_a_session_goes_on_after_an_exit(sandbox: Sandbox) -> None:
    with sandbox.session() as session:
        session.run("x = 1\nexit()")
        after = session.run("print(x, input.__name__)")
        assert (after.stdout, after.restarted) == ("1 input\n", False)


def test_help_and_the_notices_print(sandbox: Sandbox) -> None:
    assert "Return the number of items in a container" in sandbox.run("help(len)").stdout
    assert sandbox.run("help()").status is Status.OK
    for name in ("copyright", "credits"):
        assert "Python" in sandbox.run(f"print({name})").stdout
    assert sandbox.run("license").stdout


@pytest.mark.parametrize(
    ("code", "stdout", "left_out"),
    [
        ("a = 1\nprint(a)\n```\n\n```python\nb = 2\nprint(b)", "1\n2\n", None),
        ("```python\na = 1\nprint(a)\n```\n```python\nprint(a + 1)\n```", "1\n2\n", None),
        ("a = 1\nprint(a)\n```\nNow the second step:\n```python\nprint(a + 1)", "1\n2\n", 4),
        ("```\nprint(1)\n```\nThis prints one.\n```py\nprint(2)\n```\nAnd this two.", "1\n2\n", 4),
        ("x = 5\n```python\nprint(x)\n```", "5\n", None),
        ("import math\nx = 4\n```python\nprint(math.sqrt(x))", "2.0\n", None),
    ],
)
def test_every_fence_runs_in_order(sandbox: Sandbox, code: str, stdout: str, left_out: int | None) -> None:
    result = sandbox.run(code)
    assert (result.status, result.stdout) == (Status.OK, stdout), result
    prose = [fix.line for fix in result.fixes if "left out" in fix.message]
    assert prose[:1] == ([] if left_out is None else [left_out]), result.fixes


@pytest.mark.parametrize(
    ("made", "shown"),
    [
        ("np.full((4, 6), 0.5)", (128, 128, 128)),
        ("np.full((4, 6, 3), (1.0, 0.5, 0.0), np.float32)", (0, 128, 255)),
        ("np.full((4, 6, 3), (-1.0, 2.0, np.nan))", (0, 255, 0)),
        ("np.full((4, 6), 0x8000, np.uint16)", (128, 128, 128)),
        ("np.full((4, 6, 1), 7, np.uint8)", (7, 7, 7)),
        ("np.full((4, 6, 3), (1, 2, 3), np.uint8)", (3, 2, 1)),
        ("np.full((4, 6, 4), (1, 2, 3, 255), np.uint8)", (3, 2, 1)),
        ("np.ones((4, 6), bool)", (255, 255, 255)),
    ],
)
def test_imshow_scales_as_opencv_does(made: str, shown: tuple[int, int, int], sandbox: Sandbox) -> None:
    pytest.importorskip("cv2", reason="OpenCV is in the extra 'demo'")
    result = sandbox.run(f"import numpy as np, cv2\ncv2.imshow('a', {made})\ncv2.waitKey(0)")
    assert [image.size for image in result.images] == [(6, 4)], result
    assert result.images[0].getpixel((2, 2)) == shown
