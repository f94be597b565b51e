"""`thyme plan` as a user runs it: from a folder that has config.json alone, a published size, a recipe."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from thyme.cli import main
from thyme.model import load_model
from thyme.model.hf import model_config_to_hf
from thyme.model.lora import is_adapter
from thyme.model.sizes import SIZES


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def planned(capsys: pytest.CaptureFixture[str], *args: str, code: int = 0) -> str:
    if code:
        with pytest.raises(SystemExit) as ended:
            main(["plan", *args])
        assert ended.value.code == code
    else:
        main(["plan", *args])
    assert not Path("runs").exists()
    return capsys.readouterr().out


def totals(table: str) -> dict[str, float]:
    """Of the first table: GiB by phase."""
    lines = table.splitlines()
    head = next(line for line in lines if line.startswith("GiB of a GPU"))
    total = next(line for line in lines if line.startswith("total"))
    return dict(zip(head.split()[4:], map(float, total.split()[1:]), strict=True))


def test_a_folder_needs_config_json_alone(capsys: pytest.CaptureFixture[str]) -> None:
    Path("seven").mkdir()
    Path("seven/config.json").write_text(json.dumps(model_config_to_hf(SIZES["qwen2.5-vl-7b"])))
    by_folder = planned(capsys, "--model", "seven")
    by_name = planned(capsys, "--model", "Qwen2.5-VL-7B")
    assert by_folder.splitlines()[1:] == by_name.splitlines()[1:]
    assert "rl of seven: 8.292 B parameters, all trained, bfloat16, 1 GPU of 80 GiB" in by_folder
    assert totals(by_folder)["backward"] == pytest.approx(267.2, abs=0.1)
    assert "backward: rollout, reference, backward, step do not fit" in by_folder
    second = by_folder.split("It fits with these changes:")[1]
    assert "rl.activation_checkpointing = true\n  rl.optimizer_offload = true" in second
    assert "Peak 61.5 of 76.0 GiB, in backward: it fits" in second and "Host memory" in second


def test_what_it_says_can_be_done(capsys: pytest.CaptureFixture[str]) -> None:
    """A recipe with the changes it names fits as it is."""
    for stage, machine in (("rl", ["--gpus", "8", "--kv-gib", "40"]), ("sft", [])):
        args = ["--model", "qwen2.5-vl-7b", "--stage", stage, *machine]
        said = planned(capsys, *args).split("these changes:\n\n")[1].split("\n\n")[0]
        keys = [line.strip().split(" = ") for line in said.splitlines()]
        again = planned(capsys, *args, *(word for key, value in keys for word in (f"--{key}", value.strip('"'))))
        assert ": it fits" in again and "these changes" not in again


def test_a_recipe_says_the_stage_and_the_cache(capsys: pytest.CaptureFixture[str]) -> None:
    Path("r.toml").write_text(
        'model = "qwen2.5-vl-3b"\n[engine]\nkv_bytes = 5368709120\nmax_context = 20000\n'
        "[rl]\nkl_coef = 0.0\n[lora]\nrank = 8\n"
    )
    out = planned(capsys, "r.toml", "--gpu-gib", "141")
    assert "micro-batches of 20,000 tokens" in out and "reference" not in out
    assert " 0.015 B trained" in out
    cache = next(line for line in out.splitlines() if line.startswith("KV cache"))
    assert cache.split() == ["KV", "cache", "5.0"] and "`thyme rl` takes" not in out


@pytest.mark.parametrize(
    ("recipe", "stage"), [("grpo_ats_7b", "rl"), ("sft_7b_stage1", "sft"), ("sft_7b_anneal", "anneal")]
)
def test_the_paper_s_recipes_fit_one_node_as_they_are(
    recipe: str, stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = planned(capsys, recipe, "--stage", stage, "--model", "qwen2.5-vl-7b", "--gpus", "8")
    assert ": it fits" in out and "these changes" not in out and " 7.6" in out.splitlines()[0]


def test_adapters_and_the_full_policy_each_fit_one_card(capsys: pytest.CaptureFixture[str]) -> None:
    card = ("--model", "Qwen/Qwen2.5-VL-7B-Instruct", "--gpu-gib", "80")
    adapted = planned(capsys, "grpo_ats_7b_lora_1gpu", *card)
    assert ": it fits" in adapted and "these changes" not in adapted
    full = planned(capsys, "grpo_ats_7b", *card, "--rl.optimizer-offload")
    assert ": it fits" in full and "these changes" not in full


def test_where_nothing_helps_it_says_so_and_exits_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    out = planned(capsys, "--model", "qwen2.5-vl-72b", code=1)
    assert "No change that was tried makes it fit" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "nope"], "no published size: before there is a folder, say --model and one of qwen2.5-vl-3b"),
        (["--gpus", "0"], "gpus: 0 must be at least 1"),
        (["--reserve-gib", "80"], "reserve_gib: 80.0 must lie in [0, gpu_gib = 80.0)"),
        (["--image-share", "1.5"], "image_share: 1.5 in [0, 1]"),
        (["--stage", "dpo"], "'dpo' is not one of 'rl', 'sft', 'anneal'"),
    ],
)
def test_bad_input_is_one_line(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", *args])
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.count("\n") == 1 and message in err


def test_its_help_loads_no_torch() -> None:
    code = (
        "import sys\nfrom thyme.cli import main\ntry:\n    main(['plan', '--help'])\nexcept SystemExit as e:\n"
        "    assert e.code in (0, None)\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_adapters_are_trained_and_saved_by_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    main(["sft", "--threads", "1", "--lora.rank", "4", "--sft.steps", "1", "--sft.batch-size", "2"])
    saved = Path("runs/sft/checkpoints/sft")
    assert json.loads((saved / "adapter" / "adapter_config.json").read_text())["r"] == 4
    assert not any(is_adapter(name) for name, _ in load_model(saved).named_parameters())
    with pytest.raises(SystemExit) as ended:
        main(["demo", "--lora.rank", "4"])
    assert ended.value.code == 2 and "the demo begins at random weights" in capsys.readouterr().err
