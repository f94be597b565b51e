"""Recipes: strict reading, exact round trip, one clear line for every mistake."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from thyme.config import RunConfig, from_dict, load_recipe, to_toml

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "thyme" / "recipes").glob("*.toml"))


def thyme(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "thyme", *args], cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_resolved_config_is_a_recipe_that_repeats_the_run() -> None:
    config = from_dict(RunConfig, {"name": "x", "seed": 3, "rollout": {"max_rounds": 2}, "sandbox": {"timeout_s": 3}})
    assert config.rollout.max_rounds == 2
    assert config.sandbox.timeout_s == 3.0
    assert from_dict(RunConfig, tomllib.loads(to_toml(config))) == config


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_shipped_recipe_loads(path: Path) -> None:
    assert load_recipe(path).name


def test_there_are_recipes() -> None:
    assert RECIPES


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"sed": 1}, ["unknown key sed", "did you mean seed"]),
        ({"rollout": {"max_round": 1}}, ["unknown key rollout.max_round", "rollout.max_rounds"]),
        ({"seed": "0"}, ["seed", "expected int", "'0'"]),
        ({"rollout": 3}, ["rollout", "expected a table"]),
        ({"sandbox": {"isolation": "no"}}, ["isolation", "'no'"]),
        ({"threads": 0}, ["threads", "0"]),
        ({"name": "a/b"}, ["name", "'a/b'"]),
    ],
)
def test_a_mistake_is_named(raw: dict, words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        from_dict(RunConfig, raw)
    for word in words:
        assert word in str(caught.value)


def test_the_command_line_prints_one_line_and_exits_2(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text("[rl]\nstep = 3\n")
    for args in (["rl", str(recipe)], ["rl", str(tmp_path / "none.toml")], ["dmo"]):
        result = thyme(*args)
        assert result.returncode == 2, args
        assert result.stderr.startswith("thyme: ")
        assert len(result.stderr.strip().splitlines()) == 1
        assert "Traceback" not in result.stderr


def test_dry_run_prints_the_resolved_config() -> None:
    result = thyme("rl", "--dry-run", "--seed", "7", "--rl.steps", "2")
    assert result.returncode == 0, result.stderr
    config = from_dict(RunConfig, tomllib.loads(result.stdout))
    assert (config.seed, config.rl.steps) == (7, 2)


def test_an_unknown_flag_names_the_nearest() -> None:
    result = thyme("rl", "--rl.step", "2")
    assert result.returncode == 2
    assert "--rl.steps" in result.stderr + result.stdout
