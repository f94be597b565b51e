"""The demo's table, words, curve and gates from made-up figures; the whole story in a few steps in the long form."""

import io
import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from rich.console import Console

import thyme.demo.compare as compare
import thyme.demo.story as story
from thyme.demo.curve import Line, draw_curve
from thyme.demo.rivals import RivalResult
from thyme.demo.show import scenario_table
from thyme.demo.summary import Story
from thyme.demo.verb import Config, default_recipe, settled
from thyme.evals import EvalResult, NoCodeControl, Summary, wilson
from thyme.options import parse
from thyme.rollout import RolloutConfig
from thyme.verbs.recipe import Recipe


def summary(right: int, n: int, code_share: float, code_ok: float | None) -> Summary:
    low, high = wilson(right / n, n)
    rest = {"code_share": code_share, "code_ok": code_ok, "mean_rounds": 1.5, "statuses": {}}
    return Summary(n=n, accuracy=right / n, low=low, high=high, **rest)  # type: ignore[arg-type]


def result(crop: int, code_share: float, code_ok: float | None) -> EvalResult:
    return EvalResult(
        overall=summary(crop + 100, 200, code_share / 2, code_ok),
        scenarios={"direct": summary(100, 100, 0.0, None), "crop": summary(crop, 100, code_share, code_ok)},
        temperature=0.0,
        code_temperature=0.0,
        wall_s=1.0,
        rollouts=[],
        verdicts=[],
    )


@pytest.fixture
def told() -> Story:
    forbidden = summary(9, 100, 0.0, None)
    return Story(
        config=Recipe(name="demo"),
        base={"gate/ground": 0.99, "gate/one": 0.85},
        anneal={},
        before=result(10, 0.0, None),
        after=result(80, 1.0, 0.97),
        full=RivalResult(result=result(90, 1.0, 1.0), extra_steps=50, extra_cpu_s=30.0),
        control=NoCodeControl(overall=forbidden, scenarios={"crop": forbidden}, chance={"crop": 0.1}),
        history=[{"step": 0, "reward/result/mean": 0.5, "rollout/code_share": 0.2}] * 3,
        cold_start_cpu_s=90.0,
        rl_cpu_s=45.0,
        wall_s=500.0,
        cpu_s=600.0,
    )


def test_the_summary_says_what_was_measured(told: Story) -> None:
    figures = json.loads(json.dumps(told.to_json()))
    assert figures["accuracy_sft"] == 0.55
    assert figures["accuracy_rl"] == 0.9
    assert figures["accuracy_sft_full"] == 0.95
    assert figures["accuracy_rl_ci"] == list(wilson(0.9, 200))
    assert figures["n_eval"] == 200
    assert (figures["code_ok_sft"], figures["code_ok_rl"]) == (None, 0.97)
    assert figures["no_code_control"]["scenarios"]["crop"]["chance"] == 0.1
    met = {name: gate["met"] for name, gate in figures["gates"].items()}
    assert met == {
        "base_locate": True,
        "base_read": False,
        "anneal_arithmetic": True,
        "accuracy_gain": True,
        "code_ok_rl": True,
        "wall_s": False,
    }
    assert told.gate_lines().count("MISSED") == 2
    assert "crop 0% -> 100%" in told.in_words()


def test_the_table_fits_a_terminal_of_80_columns(told: Story) -> None:
    out = io.StringIO()
    columns = {"cold start": told.before, "GRPO-ATS": told.after, "SFT, all code": told.full.result}
    Console(file=out, width=80).print(scenario_table(columns, told.control))
    text = out.getvalue()
    assert "…" not in text
    crop = next(line for line in text.splitlines() if line.strip().startswith("crop"))
    assert "10 [6-17]" in crop
    assert "80 [71-87]" in crop
    assert "100/97" in crop
    assert "9 (10)" in crop


def test_the_curve_is_drawn_where_the_values_are(tmp_path: Path) -> None:
    path = tmp_path / "curve.png"
    draw_curve(path, "t", [Line("a", [0, 10], [0.0, 1.0]), Line("b", [0, 10], [0.5, 0.5], dashed=True)], "step")
    with Image.open(path) as image:
        assert image.size == (960, 540)
        pixels = image.convert("RGB")
        assert pixels.getpixel((70, 480)) == (27, 94, 166)
        assert pixels.getpixel((930, 60)) == (27, 94, 166)
        middle = [pixels.getpixel((x, 270)) for x in range(100, 450)]
        share = sum(p == (200, 80, 40) for p in middle) / len(middle)
        assert 0.3 < share < 0.8  # dashed
    with pytest.raises(ValueError, match="no point"):
        draw_curve(path, "t", [], "step")


def test_a_verdict_follows_from_the_figures() -> None:
    def arm(name: str, shares: tuple[float, float]) -> compare.Arm:
        history = [{"step": float(i), "rollout/code_share": share} for i, share in enumerate(shares)]
        return compare.Arm(name=name, before=summary(1, 2, 0, None), after=summary(1, 2, 0, None), history=history)

    def words(ats: tuple[float, float], uniform: tuple[float, float]) -> str:
        return compare.verdict([arm("ATS", ats), arm("1", uniform)])

    assert words((0.3, 0.9), (0.3, 0.02)).startswith("Without adaptive temperature code was abandoned; with it")
    assert "30% -> 2% without" in words((0.3, 0.9), (0.3, 0.02))
    assert "was not abandoned without" in words((0.3, 0.9), (0.3, 0.8))
    assert "nothing to abandon" in words((0.02, 0.02), (0.05, 0.02))
    assert "abandoned both ways" in words((0.3, 0.0), (0.3, 0.02))
    assert "abandoned with adaptive temperature and not without" in words((0.3, 0.0), (0.3, 0.3))


def test_the_fragile_start_ends_when_greedy_code_works(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = iter([(0.05, 1.0), (0.3, 0.6), (0.0, None), (0.2, 0.97)])
    ended = [replace(result(0, 0.0, None), overall=summary(1, 2, *check)) for check in checks]
    monkeypatch.setattr(compare, "open_loop", lambda *_: nullcontext(SimpleNamespace(config=RolloutConfig())))
    monkeypatch.setattr(compare, "evaluate", lambda *_, **__: ended.pop(0))
    found = compare.WorkingCode(recipe("--compare"), None)  # type: ignore[arg-type]
    steps = next(step for step in range(1, 100) if found({"loss": 0.0}))
    assert steps == 70
    assert found.in_words() == "70 steps: code in 20% of the rollouts with ATS, of it runs 97%"


def recipe(*args: str) -> Recipe:
    """What `thyme demo` with these arguments runs."""
    return settled(parse(Config, list(args), recipes=Recipe, default_recipe=default_recipe(list(args))))


def test_the_seed_goes_wherever_something_is_drawn() -> None:
    assert (recipe("--seed", "3").seed, recipe("--seed", "3").toy.seed) == (3, 3)
    assert recipe("--seed", "3", "--toy.seed", "4").toy.seed == 4
    assert recipe("--material", "digits").toy.material == "digits"
    assert (recipe().name, recipe("--compare").name, recipe("--compare", "--name", "x").name) == (
        "demo",
        "compare",
        "x",
    )


SHORT = (
    *("--base.steps", "3", "--base.max-steps", "3", "--sft.steps", "2", "--anneal.steps", "1", "--rl.steps", "2"),
    *("--rl.batch-size", "2", "--eval.num-questions", "12", "--seed", "3"),
)


@pytest.mark.soak
@pytest.mark.parametrize("which", ["demo", "compare"])
def test_the_whole_story_in_a_few_steps(which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tell, more = (story.run_demo, ()) if which == "demo" else (compare.run_compare, ("--compare",))
    figures = tell(recipe(*more, *SHORT))
    folder = tmp_path / "runs" / which
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(figures))
    stages = [json.loads(line)["stage"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert stages.count("base") == 3
    assert (folder / "curve.png").exists()
    if which == "demo":
        assert stages.count("rl") == 2
        for name in ("base", "sft", "rl", "sft_full"):
            assert (folder / "checkpoints" / name / "model.safetensors").exists()
    else:
        assert [arm["name"] for arm in figures["arms"]] == list(compare.ARMS)
