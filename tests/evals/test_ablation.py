"""Arms, intervals, tables and charts of an ablation, by hand and by numbers drawn."""

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from thyme.evals.ablation.arms import arms_of
from thyme.evals.ablation.chart import draw_chart
from thyme.evals.ablation.figures import Estimate, compared, last_value
from thyme.evals.ablation.table import to_markdown


def test_arms_are_every_combination() -> None:
    arms = arms_of(["rl.greedy-tokens=raw,exclude", "a.b+c=0+x,0.6+y"])
    assert [arm.values for arm in arms] == [
        (("rl.greedy_tokens", greedy), ("a.b", b), ("c", c))
        for greedy in ("raw", "exclude")
        for b, c in (("0", "x"), ("0.6", "y"))
    ]
    assert arms[3].name == "greedy_tokens exclude, b 0.6, c y" and arms[3].slug == "exclude_0.6_y"
    odd = arms_of(["data.train=a/b,a b"])
    assert [arm.slug for arm in odd] == ["a_b", "a_b_1"]


@pytest.mark.parametrize(
    ("varied", "message"),
    [
        ([], "nothing is varied"),
        (["rl.steps"], "expected KEY=V1,V2"),
        (["=1"], "expected KEY=V1,V2"),
        (["rl.steps=1,,2"], "expected KEY=V1,V2"),
        (["a+b=1+2,3"], "'3' has 1 values for 2 keys"),
        (["a=1", "b+a=2+3"], "a is varied twice"),
        (["a=1,1"], "occurs twice"),
    ],
)
def test_what_says_no_arms_is_refused(varied: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("+", r"\+")):
        arms_of(varied)


def student_tail(t: float, freedom: int) -> float:
    """P(|T| < t) by the trapezoid rule on the density."""
    x = np.linspace(-t, t, 200_001)
    log_norm = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(freedom * math.pi)
    return float(np.trapezoid(np.exp(log_norm - (freedom + 1) / 2 * np.log1p(x * x / freedom)), x))


@pytest.mark.parametrize("n", [2, 3, 4, 5, 10, 21, 31])
def test_the_interval_is_students(n: int) -> None:
    values = np.random.default_rng(n).standard_normal(n).tolist()
    found = Estimate.of(values)
    assert found is not None and found.half_width is not None and found.n == n
    assert found.mean == pytest.approx(np.mean(values))
    quantile = found.half_width / (np.std(values, ddof=1) / math.sqrt(n))
    assert student_tail(quantile, n - 1) == pytest.approx(0.95, abs=1e-4)


def test_an_interval_of_many_errs_on_the_wide_side() -> None:
    values = np.random.default_rng(0).standard_normal(100).tolist()
    found = Estimate.of(values)
    assert found is not None and found.half_width is not None
    assert 0.95 < student_tail(found.half_width / (np.std(values, ddof=1) / 10), 99) < 0.96


def test_ninety_five_of_a_hundred_intervals_hold_the_truth() -> None:
    draw = np.random.default_rng(1)
    held = 0
    for _ in range(2000):
        found = Estimate.of((3 + draw.standard_normal(5)).tolist())
        assert found is not None and found.half_width is not None
        held += abs(found.mean - 3) <= found.half_width
    assert 0.93 < held / 2000 < 0.97


def test_differences_are_taken_within_each_seed() -> None:
    first, second = compared({"a": [0.1, 0.5, 0.9, None], "b": [0.2, 0.6, None, 0.3]})
    assert first.difference is None and first.estimate is not None and first.estimate.n == 3
    assert second.estimate is not None and second.estimate.mean == pytest.approx(1.1 / 3)
    assert second.difference is not None and second.difference.n == 2
    assert second.difference.mean == pytest.approx(0.1) and second.difference.half_width == pytest.approx(0.0, abs=1e-9)
    alone, none = compared({"a": [0.5], "b": [None]})
    assert alone.estimate == Estimate(mean=0.5, half_width=None, n=1)
    assert none.estimate is None and none.difference is None


def test_a_runs_figure_is_of_its_last_steps() -> None:
    rows = [{"x": 9.0, "y": 1.0}, {"x": 1.0}, {"x": 2.0, "z": 5}, {"x": 6.0}]
    assert last_value(rows, "x", 3) == 3.0
    assert last_value(rows, "x", 10) == 4.5
    assert last_value(rows, "z", 3) == 5.0
    assert last_value(rows, "y", 3) is None


def test_the_table_says_every_figure() -> None:
    figures = compared({"tau 0 | x": [0.25, 0.35], "tau 1": [0.5, None], "none": [None, None]})
    text = to_markdown("Ablation t", ["start: x"], (0, 7), {"eval/accuracy": figures})
    assert text.splitlines() == [
        "# Ablation t",
        "",
        "- start: x",
        "",
        "## eval/accuracy",
        "",
        "| arm | mean [95 % interval] | seed 0 | seed 7 | difference [95 % interval] |",
        "| --- | --- | --- | --- | --- |",
        "| tau 0 \\| x | 0.3 [-0.335, 0.935] | 0.25 | 0.35 | - |",
        "| tau 1 | 0.5 (one run) | 0.5 | - | +0.25 (one run) |",
        "| none | - | - | - | - |",
    ]


def test_the_chart_shows_what_there_is(tmp_path: Path) -> None:
    figures = compared({"a": [0.2, 0.4, 0.3], "b": [0.8, 0.9, None], "c": [None, None, None]})
    draw_chart(tmp_path / "x" / "c.png", "t", {"m": figures, "gone": compared({"a": [None]})})
    with Image.open(tmp_path / "x" / "c.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    dots = np.argwhere((pixels == (140, 170, 210)).all(-1))
    assert 250 < len(dots) < 500  # five dots of 49 to 60 pixels, less what lines cross
    lines = np.argwhere((pixels == (27, 94, 166)).all(-1))
    assert lines[:, 1].min() >= 330  # right of the names
    with pytest.raises(ValueError, match="no run has any of m"):
        draw_chart(tmp_path / "d.png", "t", {"m": compared({"a": [None]})})
    draw_chart(tmp_path / "same.png", "t", {"m": compared({"a": [1.0, 1.0]})})
