"""`thyme export` as a user runs it: PEFT's adapter in, a folder that transformers and every verb read out."""

import json
from pathlib import Path

import peft
import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from thyme.cli import main
from thyme.model import load_model
from thyme.rollout.dialect import Dialect, read_dialect


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def adapter(hub_folder: Path, tmp_path: Path) -> Path:
    """What PEFT writes of an adapter that changes something."""
    reference = Qwen2_5_VLForConditionalGeneration.from_pretrained(hub_folder)
    targets = r".*language_model.*\.(q_proj|v_proj|down_proj)"
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    peft.get_peft_model(reference, config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_merged_folder_is_what_peft_merges(adapter: Path, hub_folder: Path) -> None:
    main(["export", str(adapter), "merged", "--dtype", "float32"])
    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(hub_folder)
    merged = peft.PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict()
    ours = Qwen2_5_VLForConditionalGeneration.from_pretrained("merged").state_dict()
    assert merged.keys() == ours.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-6, rtol=1e-5)
    plain = load_model(hub_folder).decoder.layers[0].mlp.down.weight
    assert not torch.allclose(load_model("merged").decoder.layers[0].mlp.down.weight, plain)


def test_a_trained_adapter_is_exported_over_its_base(demo_checkpoint: Path) -> None:
    small = ["--threads", "1", "--sft.steps", "1", "--sft.batch-size", "2"]
    main(["sft", "--model", str(demo_checkpoint), "--lora.rank", "4", *small])
    saved = Path("runs/sft/checkpoints/sft")
    main(["export", str(saved / "adapter"), "merged", "--dtype", "float32"])
    ours, theirs = load_model("merged").state_dict(), load_model(saved).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert read_dialect(Path("merged")) == Dialect(prompt_style="short")


def test_what_cannot_be_exported_is_said_in_one_line(
    adapter: Path, hub_folder: Path, demo_checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = adapter / "adapter_config.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps(said | {"base_model_name_or_path": "someone/model"}))
    Path("there").mkdir()
    for args, words in (
        ((str(adapter), "there"), "there exists already"),
        ((str(adapter), "out"), "names the base 'someone/model', which is no folder here: say --base FOLDER"),
        (("nowhere", "out", "--base", str(hub_folder)), "nowhere is no model folder"),
        ((str(adapter), "out", "--base", str(demo_checkpoint)), "the adapter misses model.layers.2"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["export", *args])
        err = capfd.readouterr().err.splitlines()[-1]
        assert ended.value.code == 2 and words in err
    assert not Path("out").exists()
