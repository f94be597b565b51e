"""What is written to disk reads back equal, and each image is stored once."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from thyme.model.processor import Processor
from thyme.rollout.image_folder import ImageFolder
from thyme.rollout.records import read_rollouts, write_rollouts
from thyme.rollout.trajectory import COLUMNS
from thyme.rollout.types import Question, Rollout, RolloutStatus, Turn
from thyme.sandbox import Fix, SandboxResult, SnippetError, Status


def noise(seed: int, mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def rollout(processor: Processor, index: int = 0, image: Image.Image | None = None) -> Rollout:
    rng = np.random.default_rng(index)
    image = image or noise(1)
    crop = noise(2, size=(30, 30))
    count = 17
    columns: dict[str, Any] = {}
    for name, dtype in COLUMNS.items():
        scale = 10.0 ** rng.integers(-9, 4, count) if dtype is np.float32 else 10.0
        columns[name] = (rng.uniform(0, 2, count) * scale).astype(dtype)
    done = SandboxResult(
        status=Status.OK,
        stdout="caf\u00e9 \u56fe\n",
        images=(crop,),
        fixes=(Fix("import", 2, "added import math"),),
        wall_s=0.1,
        isolation="full",
    )
    failed = SandboxResult(status=Status.ERROR, error=SnippetError("ValueError", "no", None), restarted=True)
    return Rollout(
        question=Question(
            id="q1",
            image=image,
            image_path="a.png",
            question="what?",
            solution="7",
            scenario="crop",
            meta={"box": [1, 2, 3, 4]},
        ),
        group=3,
        index=index,
        seed=2**55 + index,
        **columns,
        images=[processor.preprocess(image), processor.preprocess(crop)],
        turns=[
            Turn(text="a<code>x</code>", code="x", result=done, output_text="<sandbox_output>..", num_images=1),
            Turn(text="b<code></code>", code="", result=failed, output_text="", num_images=0),
            Turn(text="c", code=None, result=None, output_text="", num_images=0),
        ],
        text="abc",
        answer=None,
        status=RolloutStatus.MAX_IMAGES,
        wall_s=1.25,
        sandbox_s=0.1,
    )


def same(a: Any, b: Any) -> bool:
    """Field by field; images by pixels, arrays by dtype and bits."""
    if dataclasses.is_dataclass(a):
        return type(a) is type(b) and all(
            same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a) if f.compare
        )
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.tobytes() == b.tobytes()
    if isinstance(a, Image.Image):
        return (a.mode, a.size, a.tobytes()) == (b.mode, b.size, b.tobytes())
    return type(a) is type(b) and a == b


def test_what_was_written_reads_back_equal(processor: Processor, tmp_path: Path) -> None:
    path = tmp_path / "rollouts" / "step_0.jsonl"
    written = [rollout(processor, 0), rollout(processor, 1)]
    rewards = [{"total": 1.5, "result": 1.0}, {"total": 0.0, "result": 0.0}]
    write_rollouts(path, written, rewards)
    read = list(read_rollouts(path, processor=processor))
    assert len(read) == 2
    for (back, reward), original, expected in zip(read, written, rewards, strict=True):
        assert reward == expected
        for f in dataclasses.fields(Rollout):
            assert same(getattr(original, f.name), getattr(back, f.name)), f.name


def test_all_pictures_of_a_question_read_back(processor: Processor, tmp_path: Path) -> None:
    written = rollout(processor)
    more = (("b.png", noise(5)), ("c.png", noise(6, "L")))
    written.question = dataclasses.replace(written.question, more_images=more)
    write_rollouts(tmp_path / "rollouts" / "step_0.jsonl", [written])
    [(back, _)] = read_rollouts(tmp_path / "rollouts" / "step_0.jsonl", processor=processor)
    assert same(back.question.more_images, more) and len(back.images) == 4


def test_without_a_processor_the_pictures_are_there_and_the_model_s_view_is_not(
    processor: Processor, tmp_path: Path
) -> None:
    path = tmp_path / "rollouts" / "step_0.jsonl"
    write_rollouts(path, [rollout(processor)])
    [(back, rewards)] = read_rollouts(path)
    assert back.images == [] and rewards is None
    assert back.question.image is not None and back.turns[0].result is not None
    assert same(back.turns[0].result.images[0], noise(2, size=(30, 30)))


def test_an_image_is_stored_once_beside_the_rollouts(processor: Processor, tmp_path: Path) -> None:
    rollouts = [rollout(processor, i, noise(i // 2)) for i in range(4)]  # two pictures, equal crops
    write_rollouts(tmp_path / "rollouts" / "step_0.jsonl", rollouts)
    files = sorted((tmp_path / "images").iterdir())
    assert len(files) == 2 + 1
    assert {len(f.stem) for f in files} == {64} and {f.suffix for f in files} == {".png"}
    before = {f: f.stat().st_mtime_ns for f in files}
    write_rollouts(tmp_path / "rollouts" / "step_1.jsonl", [rollout(processor, 0, noise(0))])
    assert all(f.stat().st_mtime_ns == mtime for f, mtime in before.items())


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1"])
def test_the_store_keeps_mode_and_pixels(mode: str, tmp_path: Path) -> None:
    image = Image.radial_gradient("L").convert(mode)
    name = ImageFolder(tmp_path).add(image)
    assert same(ImageFolder(tmp_path).get(name), image) or mode == "P"
    assert ImageFolder(tmp_path).get(name).convert("RGB").tobytes() == image.convert("RGB").tobytes()


def test_equal_pixels_under_other_shapes_palettes_or_modes_are_other_images(tmp_path: Path) -> None:
    store = ImageFolder(tmp_path)
    gray = Image.new("L", (6, 4), 7)
    palette = gray.copy()
    palette.putpalette(list(range(255, -1, -1)) * 3)
    other_palette = gray.copy()
    other_palette.putpalette(list(range(256)) * 3)
    assert len({store.add(i) for i in (gray, Image.new("L", (4, 6), 7), palette, other_palette)}) == 4


def test_a_write_that_fails_leaves_the_old_file(processor: Processor, tmp_path: Path) -> None:
    path = tmp_path / "rollouts" / "step_0.jsonl"
    write_rollouts(path, [rollout(processor)])
    before = path.read_bytes()
    broken = rollout(processor)
    broken.question.meta["mask"] = object()
    with pytest.raises(TypeError):
        write_rollouts(path, [broken])
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["step_0.jsonl"]


def test_errors_name_file_and_line(processor: Processor, tmp_path: Path) -> None:
    path = tmp_path / "rollouts" / "step_0.jsonl"
    with pytest.raises(ValueError, match="1 rewards for 2 rollouts"):
        write_rollouts(path, [rollout(processor)] * 2, [{"total": 1.0}])
    write_rollouts(path, [rollout(processor)])
    good = json.loads(path.read_text())
    for bad in ("{", json.dumps(good | {"status": "tired"}), json.dumps(good | {"turns": [{}]})):
        path.write_text(json.dumps(good) + "\n" + bad + "\n")
        with pytest.raises(ValueError, match=r"step_0.jsonl, line 2: not a rollout record"):
            list(read_rollouts(path))
