"""Composed questions: boxes are exact, targets are small and seen, draws are fixed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.progress_line import watched
from thyme.build import compose as composing
from thyme.build.compose import compose
from thyme.build.config import CATEGORIES
from thyme.build.photographs import HELDOUT, TRAIN, Photographs
from thyme.build.props import COLORS, SHAPES, ball, gauge, plate, shape, sign, visible
from thyme.cli import main
from thyme.verbs import data_compose

KINDS = 7


@pytest.fixture(scope="module")
def photographs() -> Photographs:
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    return Photographs()


@pytest.fixture()
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of a size that a test can afford; places and boxes are drawn alike."""
    monkeypatch.setattr(composing, "SIDES", (700, 900))


def test_the_box_is_what_was_composited(photographs: Photographs, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pasted: list[tuple[Image.Image, tuple[int, int]]] = []
    paste = Image.Image.paste

    def spy(self: Image.Image, thing: Image.Image, at: tuple[int, int], mask: Image.Image | None = None) -> None:
        if mask is not None:
            pasted.append((thing, at))
        paste(self, thing, at, mask)

    for index in range(KINDS):
        pasted.clear()
        with monkeypatch.context() as patched:
            patched.setattr(Image.Image, "paste", spy)
            made = compose(photographs, 0, index)
        thing, at = pasted[0]
        left, top, right, bottom = visible(thing)
        assert (at[0] + left, at[1] + top, at[0] + right, at[1] + bottom) == made.box
        assert made.category in CATEGORIES and made.answer and made.question.endswith("?")
        assert not any(made.box.overlap(type(made.box)(*other)) for other in made.facts["others"])
        assert made.box.inside(made.image.size, slack=0)


def test_only_the_things_change_the_photograph(photographs: Photographs, quick: None) -> None:
    made = compose(photographs, 0, 1)  # a plate alone
    name, photo = next(found for index in range(20) if (found := photographs.get(index))[0] == made.photo)
    assert name == made.photo
    plain = photo.resize(made.image.size, Image.Resampling.LANCZOS)
    changed = np.abs(np.asarray(made.image, dtype=int) - np.asarray(plain, dtype=int)).max(axis=2) > 0
    rows, columns = np.nonzero(changed)
    x1, y1, x2, y2 = made.box
    assert (columns.min() >= x1 - 1, rows.min() >= y1 - 1, columns.max() < x2 + 1, rows.max() < y2 + 1) == (True,) * 4
    assert changed[int(y1) : int(y2), int(x1) : int(x2)].mean() > 0.5


def test_an_item_depends_on_seed_and_index_alone(photographs: Photographs, quick: None) -> None:
    first, again, other = compose(photographs, 3, 4), compose(photographs, 3, 4), compose(photographs, 4, 4)
    assert np.array_equal(np.asarray(first.image), np.asarray(again.image)) and first.box == again.box
    assert (first.box, first.answer) != (other.box, other.answer)


def test_splits_share_no_photograph(photographs: Photographs) -> None:
    heldout = Photographs(split="heldout")
    assert {photographs.get(i)[0] for i in range(12)} == set(TRAIN)
    assert {heldout.get(i)[0] for i in range(12)} == set(HELDOUT)
    assert not set(TRAIN) & set(HELDOUT)


def test_targets_fit_the_papers_gates(photographs: Photographs) -> None:
    for index in (5,):
        made = compose(photographs, 1, index)
        assert max(made.image.size) > 2048
        assert made.box.area / (made.image.width * made.image.height) <= 0.05


def test_things_are_cut_to_what_is_seen() -> None:
    rng = np.random.default_rng(0)
    things = [sign("HARBOR", "red", 40, rng), plate("AB 1234", 40, rng), gauge(30, 90), ball("blue", 50)]
    things += [shape(name, "green", 50) for name in SHAPES]
    for thing in things:
        assert visible(thing) == (0, 0, *thing.size) and thing.mode == "RGBA"
    assert len({shape(name, "green", 50).tobytes() for name in SHAPES}) == len(SHAPES)


@pytest.mark.parametrize("value", [10, 50, 90])
def test_the_needle_points_at_its_value(value: int) -> None:
    pixels = np.asarray(gauge(value, 200)).astype(int)
    red = (pixels[..., 0] > 150) & (pixels[..., 1] < 90) & (pixels[..., 3] > 200)
    rows, columns = np.nonzero(red)
    far = np.argmax(np.hypot(rows - 100, columns - 100))
    angle = np.degrees(np.arctan2(100 - rows[far], columns[far] - 100))
    said = (225 - angle) % 360 / 2.7
    assert abs(said - value) < 2


def test_ctrl_c_keeps_the_rows_that_are_written(
    tmp_path: Path,
    photographs: Photographs,
    quick: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = ["data", "compose", str(tmp_path / "x"), "--count", "4"]
    main([*asked[:2], str(tmp_path / "whole"), *asked[3:]])
    with monkeypatch.context() as patched:
        signalled = iter([False, False, True])

        def interrupted(*args: Any) -> Any:
            if next(signalled):
                signal.raise_signal(signal.SIGTERM)
            return compose(*args)

        patched.setattr(composing, "compose", interrupted)
        with pytest.raises(SystemExit) as ended:
            main(asked)
    assert ended.value.code == 143
    said = "thyme: interrupted; rows that are written are kept; the same command goes on\n"
    assert capsys.readouterr().err == said
    rows = tmp_path / "x" / "rows.jsonl"
    assert rows.read_bytes().count(b"\n") == 2
    main(asked)
    assert rows.read_bytes() == (tmp_path / "whole" / "rows.jsonl").read_bytes()


def test_the_verb_writes_raw_rows_and_goes_on(
    tmp_path: Path,
    photographs: Photographs,
    quick: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown = watched(monkeypatch, data_compose)
    rows = tmp_path / "set" / "rows.jsonl"
    main(["data", "compose", str(tmp_path / "set"), "--count", "2"])
    first = rows.read_bytes()
    rows.write_bytes(first + b'{"image": "half')  # what a kill leaves
    main(["data", "compose", str(tmp_path / "set"), "--count", "3"])
    assert rows.read_bytes().startswith(first) and "3 rows, 2 of them were there" in capsys.readouterr().out
    assert shown == ["compose 0/2", "compose 1/2", "compose 2/2", "compose 2/3", "compose 3/3"]
    read = [json.loads(line) for line in rows.read_text().splitlines()]
    assert len(read) == 3 and all((rows.parent / row["image"]).is_file() for row in read)
    foreign = ("hello", '{"image": "a.jpg"', "hello\n", '{"a": 1}\n', "[1]\n", '{"id": 1}\n')
    for there, settings in ((text, kept) for kept in (True, False) for text in foreign):
        rows.write_text(there)
        if not settings:
            rows.with_name("composed.toml").unlink(missing_ok=True)
        with pytest.raises(SystemExit):
            main(["data", "compose", str(tmp_path / "set")])
        said = "holds other rows than composed ones" if settings else "which says how its rows were made, is missing"
        assert said in capsys.readouterr().err and rows.read_text() == there
    with pytest.raises(SystemExit):
        main(["data", "compose", str(tmp_path / "b"), "--photos", str(tmp_path / "none")])
    assert "no such folder" in capsys.readouterr().err
    Image.new("RGB", (80, 60), next(iter(COLORS.values()))).save(tmp_path / "own.png")
    main(["data", "compose", str(tmp_path / "own"), "--photos", str(tmp_path), "--count", "1"])


def test_rows_go_on_under_the_settings_they_were_begun_with_alone(
    tmp_path: Path, photographs: Photographs, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, out = tmp_path / "photos", tmp_path / "set"
    photos.mkdir()
    for name, color in (("one.png", "red"), ("two.png", "blue")):
        Image.new("RGB", (80, 60), color).save(photos / name)
    Image.new("RGB", (80, 60), "green").save(os.fsencode(photos) + b"/caf\xe9.png")  # no UTF-8
    asked = ["data", "compose", str(out), "--photos", str(photos)]
    main([*asked, "--count", "1"])
    rows = (out / "rows.jsonl").read_bytes()
    more = [*asked, "--count", "2"]
    for changed, name in (
        ([*more, "--quality", "50"], "quality"),
        ([*more, "--seed", "9"], "seed"),
        ([*more, "--split", "heldout"], "split"),
        ([*more[:3], "--count", "2"], "photographs"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(changed)
        assert ended.value.code == 2 and f"made with other {name}: " in capsys.readouterr().err
    Image.new("RGB", (80, 60), "white").save(photos / "three.png")
    with pytest.raises(SystemExit):
        main(more)
    assert "made with other photographs" in capsys.readouterr().err and (out / "rows.jsonl").read_bytes() == rows
    (photos / "three.png").unlink()
    photos.rename(tmp_path / "moved")  # the same pictures elsewhere
    main(["data", "compose", str(out), "--photos", str(tmp_path / "moved"), "--count", "2"])
    assert (out / "rows.jsonl").read_bytes().startswith(rows)
    (out / "rows.jsonl").write_text("")  # nothing was made yet: they may be others
    main([*asked[:3], "--count", "1", "--seed", "9"])


def test_one_process_composes_into_a_folder(tmp_path: Path, photographs: Photographs, quick: None) -> None:
    held = "import sys; from pathlib import Path; from thyme.verbs.folders import held\nwith held(Path(sys.argv[1])):"
    command = [sys.executable, "-c", f"{held} print(flush=True); sys.stdin.read()", str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"\n"
        with pytest.raises(SystemExit) as ended:
            main(["data", "compose", str(tmp_path), "--count", "1"])
        other.communicate()
    assert ended.value.code == 2 and not (tmp_path / "rows.jsonl").exists()
    main(["data", "compose", str(tmp_path), "--count", "1"])
