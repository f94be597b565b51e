"""Every verb as a user runs it, on a checkpoint of the demo and on a Hugging Face folder; and whose word counts."""

import dataclasses
import json
import shutil
from importlib import import_module
from pathlib import Path

import pytest
from PIL import Image

from thyme.cli import main
from thyme.options import parse
from thyme.rollout.dialect import Dialect, read_dialect, write_dialect
from thyme.sandbox import SandboxConfig
from thyme.verbs.config import LoopConfig
from thyme.verbs.opening import open_loop, open_model
from thyme.verbs.table import RECIPE_VERBS, VERBS

SMALL = (
    *("--threads", "1", "--engine.num-blocks", "200", "--engine.max-sequences", "8", "--engine.max-context", "1400"),
    *("--rollout.max-tokens", "6", "--rollout.max-tokens-per-round", "6", "--rollout.group-size", "2"),
    *("--sandbox.workers", "1", "--sandbox.memory-mib", "256"),
)
ARGUMENTS = {
    "base": ("--base.steps", "1", "--base.max-steps", "1", "--base.batch-size", "2", "--base.gate-captions", "40"),
    "sft": ("--threads", "1", "--sft.steps", "1", "--sft.batch-size", "2", "--sft.save-steps", "1"),
    "anneal": ("--threads", "1", "--anneal.steps", "1", "--anneal.batch-size", "3"),
    "rl": (*SMALL, "--rl.steps", "1", "--rl.batch-size", "2"),
    "rollout": (*SMALL, "--count", "2"),
    "eval": (*SMALL, "--eval.num-questions", "3"),
}


@pytest.fixture(params=["demo_checkpoint", "hub_folder"])
def model(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def thyme(*args: str | Path) -> None:
    main([str(arg) for arg in args])


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sft.jsonl, rl.jsonl and heldout.jsonl in the layouts of the released sets."""
    folder = tmp_path_factory.mktemp("rows")
    thyme("data", "synth", folder, "--sft", "6", "--rl", "5", "--heldout", "3")
    return folder


def reads(verb: str, rows: Path) -> tuple[str | Path, ...]:
    """What a verb is told to read where the model is not the embedded one."""
    train = rows / ("sft.jsonl" if verb in ("sft", "anneal") else "rl.jsonl")
    return ("--data.heldout", rows / "heldout.jsonl") if verb == "eval" else ("--data.train", train)


@pytest.mark.parametrize("verb", sorted(ARGUMENTS))
def test_a_verb_runs_on_any_model(verb: str, model: Path, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    is_toy = model.name == "rl"
    if verb == "base" and not is_toy:
        with pytest.raises(SystemExit):
            thyme(verb, "--model", model, *ARGUMENTS[verb])
        assert "only the embedded model has a base stage" in capsys.readouterr().err
        return
    thyme(verb, "--model", model, "--name", "x", *ARGUMENTS[verb], *(() if is_toy else reads(verb, rows)))
    run = Path("runs/x")
    out = capsys.readouterr().out
    assert (run / "config.toml").is_file()
    said = read_dialect(model) or Dialect()
    if verb in ("base", "sft", "anneal", "rl"):
        saved = run / "checkpoints" / verb
        assert f"checkpoint: {saved}" in out
        assert read_dialect(saved) == said
        stages = {json.loads(line)["stage"] for line in (run / "metrics.jsonl").read_text().splitlines()}
        assert verb in stages
        held = () if is_toy else reads("eval", rows)
        thyme("eval", "--model", saved, "--name", "y", *ARGUMENTS["eval"], *held)  # a model to every verb
        assert json.loads(Path("runs/y/eval.json").read_text())["overall"]["n"] == 3
    elif verb == "rollout":
        rows = [json.loads(line) for line in (run / "rollouts" / "step_0.jsonl").read_text().splitlines()]
        assert len(rows) == 4 and "4 rollouts of 2 questions" in out
        drawn = sum(sum(row["tokens"]["sampled"]) for row in rows)
        assert f"\n{drawn} tokens in " in out and "0 code blocks ran for 0.0 s, decoding waited 0.0 s; 1." in out
    else:
        assert json.loads((run / "eval.json").read_text())["overall"]["n"] == 3
        assert "all          n    3" in out


def test_a_rollout_in_fp8_says_what_it_costs(demo_checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    said = "mismatch of the engine with the model as it is trained: kl "
    thyme("rollout", "--model", demo_checkpoint, "--name", "plain", *ARGUMENTS["rollout"])
    assert said not in capfd.readouterr().out
    thyme("rollout", "--model", demo_checkpoint, "--name", "x", *ARGUMENTS["rollout"], "--engine.weight-dtype", "fp8")
    out = capfd.readouterr().out.partition(said)[2]
    kl, tokens = float(out.split()[0]), int(out.rpartition(" tokens")[0].split()[-1])
    rows = [json.loads(line) for line in Path("runs/x/rollouts/step_0.jsonl").read_text().splitlines()]
    assert 1e-9 < kl < 0.1 and 0 < tokens <= 6 * len(rows)


def test_a_checkpoint_inside_of_training_is_a_model_too(demo_checkpoint: Path) -> None:
    thyme("sft", "--model", demo_checkpoint, "--name", "x", *ARGUMENTS["sft"])
    inner = Path("runs/x/checkpoints/sft_1")
    assert (inner / "trainer" / "state.pt").is_file() and (inner / "config.json").is_file()
    opened = open_model(LoopConfig(model=str(inner), threads=1))
    assert opened.dialect == Dialect(prompt_style="short")
    thyme("eval", "--model", inner, "--name", "y", *ARGUMENTS["eval"])


def test_ask_runs_on_any_model(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (84, 84), "red").save("sign.png")
    thyme("ask", model, "sign.png", "What digit is on the red sign?", "--max-tokens", "3", "--threads", "1")
    out = capsys.readouterr().out
    assert "No answer: length." in out and "3 tokens, 1 rounds" in out


def test_the_other_verbs_run(capsys: pytest.CaptureFixture[str]) -> None:
    thyme("data", "synth", "rows", "--sft", "2", "--rl", "1", "--heldout", "0", "--toy.seed", "1")
    thyme("data", "check", "rows/sft.jsonl")
    thyme("data", "convert", "rows/rl.jsonl", "rows/sft.jsonl", "all.jsonl", "--to", "verl")
    Path("snippet.py").write_text("print(6 * 7)")
    thyme("sandbox", "run", "snippet.py", "--sandbox.memory-mib", "256", "--sandbox.workers", "1")
    with pytest.raises(SystemExit) as ended:
        Path("snippet.py").write_text("1 / 0")
        thyme("sandbox", "run", "snippet.py", "--sandbox.workers", "1")
    assert ended.value.code == 1
    thyme("doctor", "--kernels", "false", "--parity", "false")
    out = capsys.readouterr().out
    for part in ("2 SFT rows, 0 RL rows", "all.jsonl: 3 rows", "42", "ZeroDivisionError", "seccomp"):
        assert part in out


SANDBOX_KEYS = (
    *("--sandbox.workers", "1", "--sandbox.timeout-s", "20", "--sandbox.memory-mib", "300", "--sandbox.idle-s", "9"),
    *("--sandbox.session-timeouts", "9", "--sandbox.max-sessions", "3", "--sandbox.isolation", "auto"),
    *("--sandbox.scratch-mib", "40", "--sandbox.max-files", "50", "--sandbox.max-code-bytes", "9000"),
    *("--sandbox.max-stdout-bytes", "300", "--sandbox.max-error-bytes", "99", "--sandbox.max-images", "3"),
    *("--sandbox.max-pixels", "5000", "--sandbox.max-aspect", "9", "--sandbox.preload", "turtle", "this"),
    *("--sandbox.compat", "none"),
)


def test_rollouts_tell_what_came_of_guessed_tokens(demo_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("rollout", "--model", demo_checkpoint, *ARGUMENTS["rollout"], "--rollout.max-tokens-per-round", "40")
    words = (*words, "--rollout.max-tokens", "40", "--rollout.temperature", "0.01", "--engine.deterministic", "true")
    thyme(*words)
    assert "guessed" not in capsys.readouterr().out
    thyme(*words, "--engine.speculation", "all", "--json")
    found = capsys.readouterr()
    timing = json.loads(found.out)["timing"]
    verified, drafted, drawn = (timing[name] for name in ("verifications", "drafted_tokens", "accepted_tokens"))
    assert 0 < drawn <= drafted and 0 < verified <= drafted
    said = f"{verified:,} drafts verified, {drawn:,} of {drafted:,} guessed tokens were drawn"
    assert said in found.err


@pytest.mark.parametrize("verb", ["ask", "rollout", "sandbox run"])
def test_every_key_of_the_sandbox_can_be_said(verb: str) -> None:
    module = import_module(VERBS[verb])
    places = {"ask": ["model", "a.png", "what?"], "sandbox run": ["a.py"]}.get(verb, [])
    said = parse(module.Config, [*places, *SANDBOX_KEYS]).sandbox
    names = {f.name for f in dataclasses.fields(SandboxConfig)}
    assert {key.removeprefix("--sandbox.").replace("-", "_") for key in SANDBOX_KEYS if key[:2] == "--"} == names
    assert (said.timeout_s, said.preload, said.max_pixels) == (20.0, ("turtle", "this"), 5000)
    plain = SandboxConfig()
    assert {name for name in names if getattr(said, name) == getattr(plain, name)} == {"isolation", "compat"}


def test_a_snippet_is_run_under_the_limits_said(capsys: pytest.CaptureFixture[str]) -> None:
    Path("snippet.py").write_text("from PIL import Image\nImage.new('RGB', (60, 51)).save('a.png')\nprint('x' * 999)")
    with pytest.raises(SystemExit):
        thyme("sandbox", "run", "snippet.py", "--sandbox.max-pixels", "3059", "--sandbox.max-stdout-bytes", "256")
    out = capsys.readouterr().out
    assert "over the limit of 3059 pixels" in out and "[output cut here]" in out
    thyme("sandbox", "run", "snippet.py", "--sandbox.max-pixels", "3060", "--sandbox.workers", "1")
    assert "60x51" in capsys.readouterr().out


def test_tables_that_contradict_each_other_are_refused(capfd: pytest.CaptureFixture[str]) -> None:
    for said, words in (
        (("--sandbox.max-images", "20", "--sandbox.max-files", "9"), ("max_images=20", "max_files=9")),
        (("--rollout.max-in-flight", "9", "--sandbox.max-sessions", "8"), ("max_in_flight: 9", "max_sessions = 8")),
        (("--rollout.max-rounds", "21"), ("max_rounds: 21", "session_timeouts = 20")),
        (("--rollout.max-tokens", "9", "--rollout.max-tokens-per-round", "10"), ("max_tokens_per_round: 10", "= 9")),
        (("--engine.max-context", "161", "--engine.num-blocks", "10"), ("max_context (161)", "num_blocks")),
        (("--engine.prefill-chunk", "4097", "--engine.max-batch-tokens", "4096"), ("prefill_chunk (4097)", "(4096)")),
    ):
        with pytest.raises(SystemExit) as ended:
            thyme("rollout", *said)
        err = capfd.readouterr().err
        assert ended.value.code == 2 and err.count("\n") == 1 and all(word in err for word in words), err
    assert not Path("runs").exists()
    parse(import_module(VERBS["rollout"]).Config, ["--engine.max-context", "160", "--engine.num-blocks", "10"])
    assert (
        parse(import_module(VERBS["rollout"]).Config, ["--rollout.max-tokens", "9"]).rollout.max_tokens_per_round == 9
    )


def test_no_verb_is_left_out() -> None:
    tried = {*ARGUMENTS, "resume", "ask", "data synth", "data check", "data convert", "sandbox run", "doctor"}
    # tests/demo tells the whole story in a few steps, tests/report looks at runs and rows; the others have a file here,
    # those that build data in tests/build and tests/data.
    elsewhere = {"demo", "plan", "export", "serve", "view", "report", "data review", "ablate", "bench"}
    elsewhere |= {"data build", "data compose", "data dedup", "data stats", "completion"}
    elsewhere |= {"profile rollout", "profile train"}
    assert set(VERBS) - tried == elsewhere
    recipes = {"demo", "plan", "data build", "ablate", "profile rollout", "profile train"}
    assert set(ARGUMENTS) | recipes == RECIPE_VERBS


def test_a_checkpoint_wins_over_a_recipe_and_the_command_line_over_both(
    demo_checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def opened(**origins: str) -> Dialect:
        full = {"rollout.prompt_style": origins["origin"]} if origins else {}
        return open_model(LoopConfig(model=str(demo_checkpoint), threads=1, origins=full)).dialect

    assert opened().prompt_style == "short"  # nobody said anything: the checkpoint knows
    assert capfd.readouterr().err == ""
    assert opened(origin="recipe r").prompt_style == "short"
    line = capfd.readouterr().err
    assert "recipe r says rollout.prompt_style = 'thyme'" in line and "following 'short'" in line
    assert opened(origin="the command line").prompt_style == "thyme"
    assert "following 'thyme'" in capfd.readouterr().err


def test_a_folder_without_thyme_json_is_run_as_the_config_says(hub_folder: Path) -> None:
    assert open_model(LoopConfig(model=str(hub_folder), threads=1)).dialect == Dialect()


CARD = "---\nbase_model:\n- Qwen/Qwen2.5-VL-7B-Instruct\ndatasets:\n- Kwai-Keye/Thyme-SFT\n- Kwai-Keye/Thyme-RL\n---\n"


@pytest.mark.parametrize(
    ("place", "card", "compat"),
    [
        ("Thyme-RL", None, "released"),
        ("Kwai-Keye/thyme-sft", None, "released"),
        ("models--Kwai-Keye--Thyme-RL/snapshots/4fd9aa21", None, "released"),
        ("anything", CARD, "released"),
        ("thyme-rl/Qwen2.5-VL-7B-Instruct", None, "none"),
        ("Qwen2.5-VL-7B-Instruct", "Compared with Kwai-Keye/Thyme-RL it ...", "none"),
    ],
)
def test_a_released_checkpoint_is_run_as_it_was_trained(
    place: str, card: str | None, compat: str, hub_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / place
    shutil.copytree(hub_folder, folder)
    if card:
        (folder / "README.md").write_text(card)
    opened = open_model(LoopConfig(model=str(folder), threads=1))
    assert opened.dialect == Dialect(compat=compat)
    assert ("a released Thyme checkpoint" in capfd.readouterr().err) == (compat == "released")
    with open_loop(LoopConfig(model=str(folder), threads=1), opened) as loop:
        assert (loop.config.compat, loop.sandbox.config.compat) == (compat, compat)
    write_dialect(folder, Dialect())  # what the folder itself says goes first
    assert open_model(LoopConfig(model=str(folder), threads=1)).dialect == Dialect()


def test_one_field_decides_wording_and_rewriting(demo_checkpoint: Path, tmp_path: Path) -> None:
    opened = open_model(LoopConfig(model=str(demo_checkpoint), threads=1))
    write_dialect(demo_checkpoint, Dialect(prompt_style="short", compat="released"))
    try:
        config = LoopConfig(model=str(demo_checkpoint), threads=1)
        released = open_model(config)
    finally:
        write_dialect(demo_checkpoint, opened.dialect)
    with open_loop(config, released) as loop:
        assert (loop.config.compat, loop.sandbox.config.compat) == ("released", "released")
        assert loop.config.prompt_style == "short"


def test_what_is_no_model_is_said_in_one_line_and_leaves_no_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    for folder, words in (("nowhere", "no such folder"), ("empty", "config.json is missing")):
        for verb in ARGUMENTS:
            with pytest.raises(SystemExit) as ended:
                thyme(verb, "--model", folder)
            assert ended.value.code == 2
            err = capfd.readouterr().err
            assert err.count("\n") == 1 and words in err
    assert not Path("runs").exists()
