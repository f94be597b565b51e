"""Checkpoints: whole and verified, or not there; pruned only behind a newer one; one clear line where none fits."""

import errno
import json
import logging
import os
import resource
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from tests.train.sft_material import train_rows
from thyme.data.rows import Demonstration
from thyme.data.streams import endless
from thyme.model import Model, Processor, build, load
from thyme.toy.model import tiny_config
from thyme.toy.scenarios import demonstrations
from thyme.train import checkpoint, durable, retention
from thyme.train.config import SftConfig
from thyme.train.manifest import Damaged, Origin, file_digest, read_manifest, verify
from thyme.train.metrics import Metrics
from thyme.train.optim import build_optimizer


def row_stream(start: int, n: int) -> Sequence[Demonstration]:
    return demonstrations(0, n, {"arithmetic": 1.0}, start=start)


Train = Callable[..., list[Metrics]]


@pytest.fixture
def train(processor: Processor, tmp_path: Path) -> Train:
    """Six small steps of SFT into tmp_path, as the keywords change them."""

    def run(resume_from: Path | None = None, final: str | None = None, **changes: object) -> list[Metrics]:
        config = SftConfig(**{"steps": 6, "batch_size": 1, "save_steps": 1} | changes)  # type: ignore[arg-type]
        options = {"run_dir": tmp_path, "resume_from": resume_from, "final": final}
        return train_rows(
            build(tiny_config(), processor, seed=0),
            processor,
            row_stream,
            config,
            **options,
        )  # type: ignore[arg-type]

    return run


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def test_a_checkpoint_is_a_model_folder_that_says_what_it_is(
    model: Model, processor: Processor, tmp_path: Path
) -> None:
    config, origin = SftConfig(steps=1, batch_size=1, save_steps=1), Origin(model="tiny", data_digest="d")
    train_rows(
        model,
        processor,
        row_stream,
        config,
        run_dir=tmp_path,
        origin=origin,
        final="sft",
    )
    for name in ("sft_1", "sft"):
        folder = tmp_path / "checkpoints" / name
        loaded, found = load(folder)
        assert found is not None and all(
            torch.equal(p, q) for p, q in zip(model.parameters(), loaded.parameters(), strict=True)
        )
        manifest = read_manifest(folder)
        assert (manifest.stage, manifest.step, manifest.origin) == ("sft", 1, origin)
        on_disk = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        assert set(manifest.files) == on_disk - {"manifest.json"} and "trainer/state.pt" in on_disk
        for path, (size, digest) in manifest.files.items():
            assert ((folder / path).stat().st_size, file_digest(folder / path)) == (size, digest)
    assert names(tmp_path) == ["sft", "sft_1"]  # and nothing temporary


@pytest.mark.parametrize(
    ("file", "spoil", "words"),
    [
        ("model.safetensors", cut, "model.safetensors is damaged: "),
        ("model.safetensors", flip, "model.safetensors is damaged: its SHA-256"),
        ("trainer/state.pt", flip, "state.pt is damaged: its SHA-256"),
        ("config.json", Path.unlink, "config.json is missing"),
        ("manifest.json", cut, "manifest.json cannot be read"),
        ("manifest.json", Path.unlink, "has no manifest.json"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    file: str,
    spoil: Callable[[Path], None],
    words: str,
    train: Train,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    train(steps=2)
    folder = tmp_path / "checkpoints"
    spoil(folder / "sft_2" / file)
    found = retention.newest_intact(folder, "sft")
    assert found is not None and (found[0].name, found[1].step) == ("sft_1", 1)
    (record,) = caplog.records
    assert words in record.getMessage() and "sft_2" in record.getMessage()
    with pytest.raises(ValueError, match=words.replace(".", r"\.")):
        train(resume_from=folder / "sft_2")
    shutil.rmtree(folder / "sft_1")
    assert retention.newest_intact(folder, "sft") is None


def test_sizes_alone_are_compared_without_reading(train: Train, tmp_path: Path) -> None:
    train(steps=1)
    folder = tmp_path / "checkpoints" / "sft_1"
    manifest = read_manifest(folder)
    flip(folder / "model.safetensors")
    verify(folder, manifest, digests=False)
    cut(folder / "model.safetensors")
    with pytest.raises(Damaged, match="bytes, not"):
        verify(folder, manifest, digests=False)


def test_a_checkpoint_of_another_stage_is_refused(train: Train, tmp_path: Path, model: Model) -> None:
    train(steps=1)
    optimizer = build_optimizer(model, SftConfig())
    with pytest.raises(ValueError, match="a checkpoint of stage 'sft', not of 'anneal'"):
        checkpoint.read(tmp_path / "checkpoints" / "sft_1", model, optimizer, stage="anneal")


def test_the_newest_stay_and_damaged_ones_count_for_nothing(train: Train, tmp_path: Path) -> None:
    train(steps=6, keep_checkpoints=2)
    assert names(tmp_path) == ["sft_5", "sft_6"]
    cut(tmp_path / "checkpoints" / "sft_6" / "model.safetensors")
    (tmp_path / "checkpoints" / "sft_6").rename(tmp_path / "checkpoints" / "sft_8")
    train(resume_from=tmp_path / "checkpoints" / "sft_5", steps=7, keep_checkpoints=1, best_metric="loss")
    assert names(tmp_path) == ["best.json", "sft_6", "sft_7", "sft_8"]
    found = retention.newest_intact(tmp_path / "checkpoints", "sft")
    assert found is not None and found[0].name == "sft_7"


def test_the_best_checkpoint_is_kept_and_named(train: Train, tmp_path: Path) -> None:
    history = train(steps=6, save_steps=2, keep_checkpoints=1, best_metric="loss", best_mode="max")
    means = [(history[i]["loss"] + history[i + 1]["loss"]) / 2 for i in (0, 2, 4)]
    assert max(means) == means[0]  # it learns: the highest loss is the first
    assert names(tmp_path) == ["best.json", "sft_2", "sft_6"]
    best = json.loads((tmp_path / "checkpoints" / "best.json").read_text())
    assert best == {"sft": {"checkpoint": "sft_2", "metric": "loss", "step": 2, "value": means[0]}}
    assert read_manifest(tmp_path / "checkpoints" / "sft_2").score == means[0]


def test_the_lowest_may_be_the_best_and_a_lost_best_json_comes_back(train: Train, tmp_path: Path) -> None:
    train(steps=3, best_metric="loss", best_mode="min")
    path = tmp_path / "checkpoints" / "best.json"
    said = path.read_text()
    path.unlink()
    assert retention.name_best(path.parent, "sft", "loss", "min", step=3) is not None
    assert path.read_text() == said


def test_a_metric_that_no_step_has_is_said(train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(steps=1, best_metric="reward/mena")
    assert "no reward/mena to choose the best checkpoint by" in caplog.text
    assert names(tmp_path) == ["sft_1"]


def full_disk_from(monkeypatch: pytest.MonkeyPatch, step: int, saved: Callable[..., None]) -> None:
    """From the checkpoint of that step on, the optimizer's state finds no room."""

    def save(folder: Path, *args: object, **kwargs: object) -> None:
        if kwargs["step"] >= step:  # type: ignore[operator]
            (folder.parent / "half").write_bytes(b"x" * 100)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        saved(folder, *args, **kwargs)

    monkeypatch.setattr(checkpoint, "save_state", save)


def test_a_full_disk_ends_the_run_in_one_line_and_leaves_the_last_good_checkpoint(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_disk_from(monkeypatch, 3, checkpoint.save_state)
    with pytest.raises(checkpoint.SaveError, match=r"sft_3 could not be written: No space left.*MiB are free") as ended:
        train(keep_checkpoints=1)
    assert "\n" not in str(ended.value)
    assert names(tmp_path) == ["sft_2"]  # pruning waits for a newer one
    verify(tmp_path / "checkpoints" / "sft_2", read_manifest(tmp_path / "checkpoints" / "sft_2"), digests=True)


def test_or_training_goes_on_where_the_config_says_so(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    full_disk_from(monkeypatch, 3, checkpoint.save_state)
    assert len(train(on_save_error="continue", keep_checkpoints=1)) == 6
    assert names(tmp_path) == ["sft_2"]
    assert caplog.text.count("could not be written") == 4 and "training goes on" in caplog.text


def test_what_was_to_be_the_result_must_be_written(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_disk_from(monkeypatch, 2, checkpoint.save_state)
    with pytest.raises(checkpoint.SaveError, match="sft could not be written"):
        train(steps=2, save_steps=0, final="sft", on_save_error="continue")


def test_a_write_that_the_system_refuses(train: Train, tmp_path: Path) -> None:
    """No file may grow beyond a megabyte, and the weights are larger."""
    train(steps=2)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(checkpoint.SaveError, match="sft_3 could not be written") as ended:
            train(resume_from=tmp_path / "checkpoints" / "sft_2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert "\n" not in str(ended.value)
    assert names(tmp_path) == ["sft_1", "sft_2"]
    train(resume_from=tmp_path / "checkpoints" / "sft_2", steps=3)
    assert names(tmp_path) == ["sft_1", "sft_2", "sft_3"]


def test_a_name_never_points_at_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder takes another's place in one call; where the file system has none, a crash in between is mended."""

    def folder(name: str, content: str) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(content)
        return tmp_path / name

    target = folder("rl", "old")
    renamed: list[str] = []
    rename = Path.rename

    def rename_and_tell(path: Path, to: Path) -> Path:
        renamed.append(path.name)
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", rename_and_tell)
    durable.put_folder(folder(".rl.1.new", "new"), target)
    assert (target / "manifest.json").read_text() == "new"
    assert "rl" not in renamed and [p.name for p in tmp_path.iterdir()] == ["rl"]
    monkeypatch.setattr(durable, "_exchange", lambda one, other: False)
    durable.put_folder(folder(".rl.1.new", "newer"), target)
    assert (target / "manifest.json").read_text() == "newer" and [p.name for p in tmp_path.iterdir()] == ["rl"]
    target.rename(tmp_path / ".rl.77.old")  # killed between the two renames
    folder(".rl.77.new", "half")
    (tmp_path / ".best.json.77.new").write_text("half")
    durable.recover(tmp_path)
    assert (target / "manifest.json").read_text() == "newer" and [p.name for p in tmp_path.iterdir()] == ["rl"]


def test_everything_is_synced_before_it_takes_its_name(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[str] = set()
    sync, exists = durable._sync, tmp_path / "checkpoints" / "sft_1"

    def note(path: Path) -> None:
        if not exists.exists():
            synced.add(path.relative_to(tmp_path).as_posix())
        elif path == tmp_path / "checkpoints":
            synced.add("the parent, after")
        sync(path)

    monkeypatch.setattr(durable, "_sync", note)
    train(steps=1)
    fresh = f"checkpoints/.sft_1.{os.getpid()}.new"
    files = [*read_manifest(exists).files, "manifest.json"]
    assert synced >= {fresh, f"{fresh}/trainer", "the parent, after"} | {f"{fresh}/{name}" for name in files}


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_run_resumed_before_at_and_after_the_end_of_an_epoch(step: int, processor: Processor, tmp_path: Path) -> None:
    """Four rows, two a step: an epoch ends with the second step."""
    rows = endless(demonstrations(0, 4, {"arithmetic": 1.0}), seed=3)
    config = SftConfig(steps=4, batch_size=2, save_steps=1)
    whole = build(tiny_config(), processor, seed=0)
    expected = train_rows(whole, processor, rows, config, run_dir=tmp_path)
    resumed = build(tiny_config(), processor, seed=1)
    folder = tmp_path / "checkpoints" / f"sft_{step}"
    history = train_rows(resumed, processor, rows, config, run_dir=tmp_path, resume_from=folder)
    assert [entry["loss"] for entry in history] == [entry["loss"] for entry in expected[step:]]
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_log_lines_of_a_stage_count_on(train: Train, tmp_path: Path) -> None:
    train(steps=4)
    path = tmp_path / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    late = [line | {"time/wall_s": line["time/wall_s"] + 1000} for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in late))
    train(resume_from=tmp_path / "checkpoints" / "sft_2", steps=4)
    walls = [json.loads(line)["time/wall_s"] for line in path.read_text().splitlines()]
    assert len(walls) == 4 and walls == sorted(walls) and walls[:2] == [line["time/wall_s"] for line in late[:2]]
    assert walls[2] > 1000


def test_nothing_is_logged_by_a_run_that_goes_well(train: Train, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        train(steps=2, keep_checkpoints=1, best_metric="loss")
    assert not caplog.records
