"""The chapter "Train your model": its recipes on files of the released layout, from a Hugging Face folder to one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from tests.data.rows import write_released_sets
from thyme.cli import main
from thyme.engine import Engine, EngineConfig, SamplingParams
from thyme.model import load

pytest.importorskip("pyarrow")

SMALL = (
    *("--threads", "1", "--rollout.max-tokens", "8", "--rollout.max-tokens-per-round", "8"),
    *("--engine.num-blocks", "400", "--engine.max-context", "1600", "--engine.max-sequences", "8"),
    *("--sandbox.workers", "1", "--sandbox.memory-mib", "300"),
)


def sizes(stage: str) -> tuple[str, ...]:
    """A step or two of a recipe that counts in epochs."""
    return (*SMALL, f"--{stage}.epochs", "0", f"--{stage}.steps", "2", f"--{stage}.batch-size", "2")


@pytest.fixture
def place(hub_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with what the recipes name."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(hub_folder, "Qwen2.5-VL-7B-Instruct")
    write_released_sets(Path())


@pytest.mark.usefixtures("place")
def test_the_chapter_from_first_to_last(capsys: pytest.CaptureFixture[str]) -> None:
    main(["data", "check", "Thyme-SFT/data", "Thyme-RL/data"])
    main(["sft", "sft_7b_stage1", "--dry-run"])
    said = capsys.readouterr().out
    assert "# rows: 8 rows of 2 files" in said and "# steps: 1 of 128" in said and "# tokens: row mean" in said
    main(["sft", "sft_7b_stage1", *sizes("sft"), "--data.heldout", "held.jsonl", "--eval.every-steps", "2"])
    main(["anneal", "sft_7b_anneal", *sizes("anneal")])
    main(["rl", "grpo_ats_7b", *sizes("rl"), "--rl.save-steps", "1", "--track.to", "tensorboard"])
    main(["rl", "grpo_ats_7b_lora_1gpu", *sizes("rl"), "--name", "lora"])
    main(["resume", "runs/rl", "--rl.steps", "3"])
    main(["eval", "--model", "runs/rl/checkpoints/rl", *SMALL, "--data.heldout", "held.jsonl"])
    assert "n    3" in capsys.readouterr().out
    lines = [json.loads(line) for line in Path("runs/sft/metrics.jsonl").read_text().splitlines()]
    assert "eval/accuracy" not in lines[0] and 0 <= lines[1]["eval/accuracy"] <= 1
    assert len(Path("runs/rl/metrics.jsonl").read_text().splitlines()) == 3 and list(
        Path("runs/rl/tensorboard").iterdir()
    )

    for folder in ("runs/rl/checkpoints/rl", "runs/lora/checkpoints/rl"):
        model, processor = load(folder)
        assert processor is not None
        prompt = processor.encode(processor.chat("What is 6 * 7?"))
        params = SamplingParams(max_tokens=6, temperature=0.0, adaptive=False, banned_ids=(), ignore_eos=True)
        (ours,) = Engine(model, EngineConfig(num_blocks=64, quiet=True)).generate([prompt], params)
        reference = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
        options = {
            "max_new_tokens": 6,
            "min_new_tokens": 6,
            "do_sample": False,
            "eos_token_id": None,
            "pad_token_id": 0,
        }
        theirs = reference.generate(
            input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), **options
        )
        assert list(ours.token_ids) == theirs[0, len(prompt) :].tolist()


@pytest.mark.soak
@pytest.mark.parametrize("layout", ["thyme", "messages", "openai", "verl", "sharegpt"])
@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
@pytest.mark.usefixtures("place")
def test_every_layout_is_trained_on(layout: str, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Converted from the released layout. A step on all rows of a file has the loss that they have as released."""
    model, whole = ("--model", "Qwen2.5-VL-7B-Instruct"), "Thyme-SFT/data/2round-00000-of-00001.parquet"
    demonstrations, questions = f"sft.{suffix}", f"rl.{suffix}"
    if layout != "verl":  # its rows are questions
        main(["data", "convert", whole, demonstrations, "--to", layout])
        for name, path in (("sft", demonstrations), ("released", whole)):
            steps = (*SMALL, "--sft.steps", "1", "--sft.batch-size", "4", "--name", name)
            main(["sft", *model, *steps, "--data.train", path])
        losses = [json.loads(Path(f"runs/{name}/metrics.jsonl").read_text())["loss"] for name in ("sft", "released")]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    if layout == "sharegpt":  # its rows are demonstrations, which are questions too
        questions = demonstrations
    else:
        main(["data", "convert", "Thyme-RL/data", questions, "--to", layout])
    main(["rollout", *model, *SMALL, "--count", "2", "--rollout.group-size", "1", "--data.train", questions])
    main(["rl", *model, *sizes("rl"), "--data.train", questions])
    assert "left out" not in capsys.readouterr().err
