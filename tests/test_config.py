"""Recipes: strict reading, exact round trip, one clear line for every mistake."""

import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from thyme.cli import main
from thyme.config import from_dict, keys_of, load_recipe, part_of, shipped_recipes, to_toml
from thyme.demo import verb as demo
from thyme.engine.phases import PhaseSampling
from thyme.help import help_text
from thyme.options import keys, parse
from thyme.verbs import ask, eval, rl, rollout, sft
from thyme.verbs.recipe import Recipe
from thyme.verbs.table import RECIPE_VERBS, VERBS

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "thyme" / "recipes").glob("*.toml"))


def thyme(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "thyme", *args], cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_resolved_config_is_a_recipe_that_repeats_the_run() -> None:
    config = from_dict(Recipe, {"name": "x", "seed": 3, "rollout": {"max_rounds": 2}, "sandbox": {"timeout_s": 3}})
    assert config.rollout.max_rounds == 2
    assert config.sandbox.timeout_s == 3.0
    assert from_dict(Recipe, tomllib.loads(to_toml(config))) == config


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_shipped_recipe_loads(path: Path) -> None:
    assert "name" not in load_recipe(path, Recipe)  # or every verb with this recipe would write into one folder
    assert load_recipe(path.stem, Recipe) == load_recipe(path, Recipe)


def test_there_are_recipes() -> None:
    assert [path.stem for path in RECIPES] == shipped_recipes() != []


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"sed": 1}, ["unknown key sed", "did you mean seed"]),
        ({"rl": {"lr": 1}}, ["unknown key rl.lr", "did you mean rl.learning_rate"]),
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
        from_dict(Recipe, raw)
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


@pytest.mark.parametrize(
    ("rollout_keys", "rl_keys", "named"),
    [
        ({"group_size": 1}, {}, "rollout.group_size: 1 must be at least 2"),
        ({"temperature": 0.0}, {}, "rollout.temperature: 0 draws the same"),
        ({"temperature": 0.0, "adaptive": False, "code_temperature": 1.0}, {}, "rollout.temperature: 0 draws the same"),
        ({}, {"greedy_tokens": "soft"}, "rollout.code_temperature: 0, but rl.greedy_tokens is 'soft'"),
        (
            {"temperature": 0.0, "code_temperature": 0.5},
            {"greedy_tokens": "soft"},
            "rollout.temperature: 0, but rl.greedy_tokens is 'soft'",
        ),
        (
            {"temperatures": {"code": 0.6, "number": 0.0}},
            {"greedy_tokens": "soft"},
            "rollout.temperatures.number: 0, but rl.greedy_tokens is 'soft'",
        ),
        ({"temperature": 0.0, "temperatures": {"number": 0.0}}, {}, "rollout.temperature: 0 draws the same"),
        ({}, {"optimizer_state": "8bit", "optimizer": "muon"}, "optimizer_state"),
        ({}, {"optimizer_state": "bf16", "optimizer_offload": True}, "optimizer_offload is on"),
    ],
)
def test_what_cannot_train_is_refused_before_anything_is_loaded(rollout_keys: dict, rl_keys: dict, named: str) -> None:
    raw = {"rollout": rollout_keys, "rl": rl_keys}
    for config in (rl.Config, demo.Config):
        with pytest.raises(ValueError, match=re.escape(named)):
            from_dict(config, raw)
    if not rl_keys:
        from_dict(rollout.Config, {"rollout": rollout_keys})  # what rl refuses another verb may take
        from_dict(Recipe, raw)


def test_soft_greedy_tokens_go_with_a_temperature_in_code() -> None:
    keys = {"rollout": {"code_temperature": 0.3}, "rl": {"greedy_tokens": "soft"}}
    assert from_dict(rl.Config, keys).rl.greedy_tokens == "soft"
    keys = {"rollout": {"adaptive": False}, "rl": {"greedy_tokens": "soft"}}  # then code is drawn as text is
    assert from_dict(rl.Config, keys).rollout.code_temperature == 0


PHASES = """
[rollout.temperatures]
text = 0.9
code = 0.1
number = 0.6
think = 0.8
[rollout.phases.think]
start = "<think>"
end = "</think>"
top_p = 0.95
[rollout.phases.code]
top_k = 20
"""


def test_phases_are_read_written_and_said(tmp_path: Path) -> None:
    config = from_dict(rl.Config, tomllib.loads(PHASES))
    assert (config.rollout.temperature, config.rollout.code_temperature) == (0.9, 0.1)  # said in one place only
    assert config.rollout.temperatures == {"number": 0.6, "think": 0.8}
    assert from_dict(rl.Config, tomllib.loads(to_toml(config))) == config
    recipe = tmp_path / "r.toml"
    recipe.write_text(PHASES)
    said = ["--rollout.temperatures.number", "0.7", "--rollout.phases.think.top-p", "0.5", "--rollout.temperatures.x=1"]
    tags = ["--rollout.phases.x.start", "[[", "--rollout.phases.x.end", "]]"]
    config = parse(rl.Config, [str(recipe), *said, *tags], recipes=Recipe)
    assert config.rollout.temperatures == {"number": 0.7, "think": 0.8, "x": 1.0}
    assert config.rollout.known_phases.names[5:] == ("think", "x")
    assert config.rollout.sampling().phases["think"] == PhaseSampling(temperature=0.8, top_p=0.5)
    for said, message in (
        (["--rollout.temperatures", "1"], "is a table: say one of its keys, such as --rollout.temperatures.NAME"),
        (["--rollout.phases.think", "1"], "is a table: say one of its keys, such as --rollout.phases.think.start"),
        (["--rollout.phases.think.topp", "1"], "did you mean"),
    ):
        with pytest.raises(ValueError, match=message):
            parse(rl.Config, [str(recipe), *said], recipes=Recipe)


@pytest.mark.parametrize(
    ("rollout_keys", "named"),
    [
        ({"temperatures": {"think": 1.0}}, "rollout.phases.think with its start and end declares one"),
        ({"temperatures": {"number": -1.0}}, "temperatures.number: -1.0 must be finite and at least 0"),
        ({"temperature": 0.4, "temperatures": {"text": 0.5}}, "they are the same, say one of them"),
        ({"phases": {"think": {"start": "<think>"}}}, "phases.think: start and end, its tags, are missing"),
        ({"phases": {"code": {"start": "<c>", "end": "</c>"}}}, "phases.code: a built-in phase has its own tags"),
        ({"phases": {"text": {"top_k": 3}}}, "phases.text: what holds for text stands in rollout.top_k"),
        ({"phases": {"a": {"start": "<a>", "end": "</a>", "top_p": 2.0}}}, "rollout.phases.a: top_p must lie in"),
        ({"phases": {"a": {"start": "<code>", "end": "</a>"}}}, "a tag of our own"),
    ],
)
def test_phases_that_say_nothing_sensible_are_refused(rollout_keys: dict, named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)):
        from_dict(rl.Config, {"rollout": rollout_keys})


def test_evaluation_is_greedy_in_every_phase() -> None:
    config = from_dict(rl.Config, tomllib.loads(PHASES))
    assert config.rollout.sampling(**config.eval.drawn()).phases == {}
    assert config.rollout.sampling().greedy().phases == {}


@pytest.mark.parametrize("verb", ["rl", "demo"])
def test_the_command_line_refuses_a_group_of_one(verb: str) -> None:
    result = thyme(verb, "--dry-run", "--rollout.group-size", "1")
    assert result.returncode == 2 and "rollout.group_size: 1 must be at least 2" in result.stderr
    assert thyme("rollout", "--dry-run", "--rollout.group-size", "1").returncode == 0


def test_dry_run_prints_the_resolved_config() -> None:
    result = thyme("rl", "--dry-run", "--seed", "7", "--rl.steps", "2")
    assert result.returncode == 0, result.stderr
    config = from_dict(rl.Config, tomllib.loads(result.stdout))
    assert (config.seed, config.rl.steps) == (7, 2)


def test_a_verb_has_only_what_it_uses() -> None:
    tables = {key.partition(".")[0] for key, _ in keys(eval.Config) if "." in key}
    assert tables == {"data", "toy", "engine", "sandbox", "rollout", "reward", "judge", "eval"}
    assert "rl" not in {key.partition(".")[0] for key, _ in keys(sft.Config) if "." in key}
    assert "count" in {key for key, _ in keys(rollout.Config)}


def test_a_verb_takes_its_part_of_a_recipe_and_every_mistake_in_the_rest_is_named(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text("seed = 4\n[rl]\nsteps = 3\n[sft]\nsteps = 9\n")
    config = parse(sft.Config, [str(path)], recipes=Recipe)
    assert (config.seed, config.sft.steps) == (4, 9)
    assert set(part_of(load_recipe(path, Recipe), rl.Config)) == {"seed", "rl"}
    path.write_text("[rl]\nstep = 3\n")
    with pytest.raises(ValueError, match=r"r\.toml: unknown key rl\.step: did you mean rl\.steps"):
        parse(sft.Config, [str(path)], recipes=Recipe)


def test_the_command_line_wins_over_the_recipe_and_both_are_remembered() -> None:
    config = parse(rl.Config, ["demo", "--rl.steps", "2", "--seed=5"], recipes=Recipe)
    assert (config.rl.steps, config.seed, config.rollout.group_size) == (2, 5, 8)
    assert config.origins["rl.steps"] == "the command line"
    assert config.origins["rollout.group_size"] == "recipe demo"
    assert "rl.learning_rate" not in config.origins


@pytest.mark.parametrize(
    ("args", "key", "value"),
    [
        (["--rl.freeze-vision"], "rl.freeze_vision", True),
        (["--rl.freeze_vision", "false"], "rl.freeze_vision", False),
        (["--rl.fused-head", "--seed", "3"], "rl.fused_head", True),
        (["--toy.no-code-scenarios", "crop", "rotate"], "toy.no_code_scenarios", ("crop", "rotate")),
        (["--toy.no-code-scenarios", '["zoom"]'], "toy.no_code_scenarios", ("zoom",)),
        (["--toy.no-code-scenarios"], "toy.no_code_scenarios", ()),
        (["demo", "--engine.num-blocks", "none"], "engine.num_blocks", None),
        (["--engine.num-blocks", "7"], "engine.num_blocks", 7),
        (["--rollout.top-p", "0.5"], "rollout.top_p", 0.5),
        (["--rollout.temperature", "1"], "rollout.temperature", 1.0),
        (["--rl.kl-coef", "1e-3"], "rl.kl_coef", 1e-3),
        (["--model", "5"], "model", "5"),
        (["--name=a=b"], "name", "a=b"),
        (["--toy.mix.crop", "0.25"], "toy.mix.crop", 0.25),
    ],
)
def test_what_the_command_line_can_say(args: list[str], key: str, value: object) -> None:
    found: object = parse(rl.Config, args, recipes=Recipe)
    for name in key.split("."):
        found = getattr(found, name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--rl.step", "2"], ["--rl.step:", "did you mean --rl.steps"]),
        (["--rl.lr", "1"], ["--rl.lr:", "did you mean --rl.learning-rate"]),
        (["--steps", "2"], ["did you mean --rl.steps"]),
        (["--seeds", "2"], ["did you mean --seed?"]),
        (["--rollout", "2"], ["--rollout is a table", "--rollout."]),
        (["--rl.steps.x", "2"], ["unknown option --rl.steps.x"]),
        (["--rl.steps"], ["--rl.steps needs a value"]),
        (["--rl.steps", "--seed", "1"], ["--rl.steps needs a value"]),
        (["--rl.steps", "two"], ["rl.steps", "expected int", "'two'"]),
        (["--rl.steps", "2.5"], ["rl.steps", "expected int", "2.5"]),
        (["--rl.steps", "0"], ["steps", "0", "at least 1"]),
        (["--rl.greedy-tokens", "row"], ["greedy_tokens", "'row'"]),
        (["demo", "more"], ["unexpected argument 'more'"]),
        (["demmo"], ["'demmo'", "did you mean 'demo'"]),
        (["--origins", "x"], ["unknown option --origins"]),
    ],
)
def test_a_mistake_on_the_command_line_is_named(args: list[str], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        parse(rl.Config, args, recipes=Recipe)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("verb", ["base", "sft", "rl", "rollout", "eval"])
def test_a_verb_writes_into_a_folder_of_its_own(verb: str) -> None:
    config = import_module(VERBS[verb]).Config
    assert parse(config, [], recipes=Recipe).name == parse(config, ["demo"], recipes=Recipe).name == verb
    assert parse(config, ["demo", "--name", "mine"], recipes=Recipe).name == "mine"


def test_arguments_by_place() -> None:
    config = parse(ask.Config, ["m", "--seed", "2", "i.png", "why?"])
    assert (config.model, config.image, config.question, config.seed) == ("m", "i.png", "why?", 2)
    assert parse(ask.Config, ["m", "i.png", "--", "--help me"]).question == "--help me"
    with pytest.raises(ValueError, match="IMAGE and QUESTION missing"):
        parse(ask.Config, ["m"])


def test_every_setting_explains_itself_and_help_fits_two_screens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for verb, module in VERBS.items():
        cls = import_module(module).Config
        takes_recipe = verb in RECIPE_VERBS
        short, full = (
            help_text(verb, cls, "What it does.", defaults=None, takes_recipe=takes_recipe, everything=everything)
            for everything in (False, True)
        )
        assert len(short.splitlines()) <= 48, verb
        lines = full.splitlines()
        for key, _ in keys(cls):
            named = [i for i, line in enumerate(lines) if line.startswith(f"  --{key.replace('_', '-')} [")]
            if named:
                assert lines[named[0] + 1].startswith("      "), f"{verb}: {key} has no docstring"
            else:
                assert f"  {key.upper()}" in lines, f"{verb}: {key}"


def test_the_keys_of_a_table() -> None:
    assert list(keys_of({"a": 1, "b": {"c": 2, "d": {"e": 3}}})) == ["a", "b.c", "b.d.e"]


def test_the_first_word_of_two_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    for word, seconds in (("data", "build | compose | synth | check"), ("sandbox", "run")):
        with pytest.raises(SystemExit) as ended:
            main([word, "--help"])
        assert ended.value.code == 0
        assert f"thyme {word} {seconds}" in capsys.readouterr().out
        with pytest.raises(SystemExit) as ended:
            main([word])
        assert ended.value.code == 2
        assert f"thyme {word} needs one of" in capsys.readouterr().err
