"""Synthetic data: reproducible to the bit, disjoint splits, honest demonstrations, the sizes the toy is built on."""

import hashlib
import json
import os
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image

from thyme.rollout.prompts import build_prompt, extract_answer, extract_code
from thyme.toy import glyphs
from thyme.toy.captions import captions
from thyme.toy.config import CAPTION_KINDS, SCENARIOS, VIEW, CaptionMix, Mix, ToyConfig
from thyme.toy.model import tiny_config, tiny_processor
from thyme.toy.pictures import SIDE, ZOOM_SIDE, Painter
from thyme.toy.scenarios import demonstration, demonstrations, questions

CODED = tuple(name for name in SCENARIOS if name != "direct")
EVEN = dict.fromkeys(SCENARIOS, 1.0)


def _digest(seed: int, split: str = "train") -> str:
    hasher = hashlib.sha256()
    for caption in captions(seed, 12, split=split):  # type: ignore[arg-type]
        hasher.update(caption.image.tobytes() + f"{caption.prompt}{caption.text}".encode())
    for row in demonstrations(seed, 12, EVEN, no_code=0.3, box_noise=0.3, split=split):  # type: ignore[arg-type]
        for image in row.images:
            hasher.update(image.tobytes())
        hasher.update(f"{row.prompt}{row.response}".encode())
    for question in questions(seed, 12, EVEN, split):  # type: ignore[arg-type]
        hasher.update(b"" if question.image is None else question.image.tobytes())
        hasher.update(f"{question.id}{question.question}{question.solution}{json.dumps(question.meta)}".encode())
    return hasher.hexdigest()


def test_a_seed_gives_the_same_bits_here_and_in_another_process() -> None:
    first = _digest(3)
    assert first == _digest(3)
    assert len({first, _digest(4), _digest(3, "heldout")}) == 3
    script = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('again', {__file__!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(module._digest(3))\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "PYTHONHASHSEED": "77"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.strip() == first


def test_an_item_depends_on_its_index_only() -> None:
    many = questions(0, 9, EVEN)
    assert [q.id for q in questions(0, 4, EVEN, start=5)] == [q.id for q in many[5:]]
    rows, tail = demonstrations(0, 9, EVEN, box_noise=0.5), demonstrations(0, 4, EVEN, box_noise=0.5, start=5)
    assert [row.response for row in tail] == [row.response for row in rows[5:]]
    assert captions(0, 1, start=3)[0].image.tobytes() == captions(0, 4)[3].image.tobytes()


def test_drawn_glyphs_differ_between_splits() -> None:
    masks = {
        split: {glyphs.glyph(7, k, 22, "glyphs", split).tobytes() for k in range(glyphs.INSTANCES)}  # type: ignore[arg-type]
        for split in ("train", "heldout")
    }
    assert all(len(found) == glyphs.INSTANCES for found in masks.values())
    assert not masks["train"] & masks["heldout"]


def test_handwritten_digits_differ_between_splits() -> None:
    masks = {
        split: {glyphs.glyph(3, k, 22, "digits", split).tobytes() for k in range(300)}  # type: ignore[arg-type]
        for split in ("train", "heldout")
    }
    # scikit-learn ships 183 scans of a three.
    assert {split: len(found) for split, found in masks.items()} == {"train": 92, "heldout": 91}
    assert not masks["train"] & masks["heldout"]


def test_photographs_differ_between_splits() -> None:
    photos = {split: [glyphs.photograph(k, split) for k in range(12)] for split in ("train", "heldout")}  # type: ignore[arg-type]
    digests = {split: {hashlib.sha256(p.tobytes()).digest() for p in found} for split, found in photos.items()}
    assert len(digests["train"]) == 6 and len(digests["heldout"]) == 3
    assert not digests["train"] & digests["heldout"]


@pytest.mark.parametrize("material", ["digits", "photos"])
def test_other_materials_draw_every_scenario(material: Any) -> None:
    plain = questions(0, 12, EVEN)
    for question, other in zip(plain, questions(0, 12, EVEN, material=material), strict=True):
        assert other.scenario == question.scenario
        if question.image is not None and other.image is not None:
            assert other.image.size == question.image.size
            # Three flat grays leave no room for a photograph.
            if material == "digits" or other.scenario != "contrast":
                assert other.image.tobytes() != question.image.tobytes()


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_rows_are_well_formed(scenario: str) -> None:
    for row in demonstrations(1, 20, {scenario: 1.0}, box_noise=0.2):
        assert row.scenario == row.question.scenario == scenario
        assert (row.prompt + row.response).count("<image>") == len(row.images)
        assert re.fullmatch(r"<think>.*</think>\n<answer>\d+</answer>", row.response, re.DOTALL)
        assert extract_answer(row.response) == row.question.solution
        assert row.response.count("<code>") == {"direct": 0, "zoom": 2}.get(scenario, 1)
        json.dumps(row.question.meta)


@pytest.mark.parametrize("scenario", ["crop", "zoom"])
def test_what_the_code_cuts_was_said_before(scenario: str) -> None:
    for row in demonstrations(2, 20, {scenario: 1.0}, box_noise=0.5):
        said = re.findall(r"column (\d), row (\d)\.<code>", row.response)
        assert said == re.findall(r"x, y = (\d)\*s, (\d)\*s", row.response)
        assert len(said) == {"crop": 1, "zoom": 2}[scenario]


def test_a_cell_that_is_not_said_stands_in_the_code_alone() -> None:
    mix = {"zoom": 0.3, "crop": 0.3, "rotate": 0.4}
    said, silent = (demonstrations(2, 20, mix, box_noise=0.5, says_cells=says) for says in (True, False))
    for one, other in zip(said, silent, strict=True):
        assert not re.search(r"column|row", other.response)
        assert re.sub(r" sign is (small|tiny): column \d, row \d\.", " sign.", one.response) == other.response
        assert [image.tobytes() for image in one.images] == [image.tobytes() for image in other.images]


def test_a_cell_is_cut_by_its_corner_or_by_its_box() -> None:
    corner, box = (demonstrations(2, 20, {"zoom": 0.5, "crop": 0.5}, cut_by=by) for by in ("corner", "box"))
    for one, other in zip(corner, box, strict=True):
        assert [image.tobytes() for image in one.images] == [image.tobytes() for image in other.images]
        corners = re.findall(r"x, y = (\d)\*s, (\d)\*s", one.response)
        edges = re.findall(r"\(\((\d)\*s, (\d)\*s, (\d)\*s, (\d)\*s\)\)", other.response)
        assert [(x, y, str(int(x) + 1), str(int(y) + 1)) for x, y in corners] == edges


def test_box_noise_moves_one_cell_by_one_step() -> None:
    clean, noisy = (demonstrations(2, 30, {"zoom": 0.5, "crop": 0.5}, box_noise=noise) for noise in (0.0, 1.0))
    for a, b in zip(clean, noisy, strict=True):
        cells = [np.array(re.findall(r"column (\d), row (\d)", row.response), int) for row in (a, b)]
        assert np.abs(cells[0] - cells[1]).sum() == 1
        assert a.images[-1].tobytes() != b.images[-1].tobytes()


def test_box_noise_is_a_share_of_the_rows() -> None:
    clean, noisy = (demonstrations(0, 200, {"crop": 1.0}, box_noise=noise) for noise in (0.0, 0.1))
    moved = [a.response != b.response for a, b in zip(clean, noisy, strict=True)]
    assert 0.05 < np.mean(moved) < 0.17


def test_no_code_makes_a_share_answer_at_once() -> None:
    rows = demonstrations(0, 200, {"crop": 0.5, "rotate": 0.5}, no_code=0.65)
    crops = [row for row in rows if row.scenario == "crop"]
    at_once = [row for row in crops if "<code>" not in row.response]
    assert 0.55 < len(at_once) / len(crops) < 0.75
    assert all("<code>" in row.response for row in rows if row.scenario == "rotate")
    assert all(extract_answer(row.response) == row.question.solution for row in at_once)


def test_a_random_answer_is_right_by_luck_only() -> None:
    rows = demonstrations(0, 200, {"crop": 1.0}, no_code=1.0, no_code_answer="random")
    right = np.mean([extract_answer(row.response) == row.question.solution for row in rows])
    assert all("<code>" not in row.response for row in rows)
    assert 0.05 < right < 0.16


@pytest.mark.parametrize("scenario", CODED)
def test_every_scenario_can_be_answered_at_once(scenario: str) -> None:
    question = questions(0, 1, {scenario: 1.0})[0]
    row = demonstration(question, with_code=False)
    assert "<code>" not in row.response and extract_answer(row.response) == question.solution


def _ink(image: Image.Image, box: list[int] | None = None) -> int:
    pixels = np.asarray(image.crop(box) if box else image)  # type: ignore[arg-type]
    return int((pixels.max(axis=-1) < 40).sum())


@pytest.mark.parametrize(("scenario", "inner"), [("crop", 1 / 6), ("zoom", 1 / 18)])
def test_the_box_holds_the_sign_and_its_digit_is_tiny(scenario: str, inner: float) -> None:
    for question in questions(0, 20, {scenario: 1.0}, "heldout"):
        assert question.image is not None
        left, _, right, _ = question.meta["box"]
        assert (right - left) == round(question.image.width * inner)
        # Plates have more red or green than any ground.
        bright = np.argwhere(np.asarray(question.image)[..., :2].max(axis=-1) > 200)
        low, high = bright.min(axis=0)[::-1], bright.max(axis=0)[::-1] + 1
        x0, y0, x1, y1 = question.meta["box"]
        assert x0 <= low[0] and y0 <= low[1] and high[0] <= x1 and high[1] <= y1
        inset = [x0 + (x1 - x0) // 8, y0 + (y1 - y0) // 8, x1 - (x1 - x0) // 8, y1 - (y1 - y0) // 8]
        assert 0 < _ink(question.image, inset) < 0.001 * question.image.width**2


def test_low_contrast_is_three_neighboring_levels() -> None:
    row = demonstrations(0, 1, {"contrast": 1.0})[0]
    before, after = (np.unique(np.asarray(image)).tolist() for image in row.images)
    assert before[0] == 100 and before[-1] == 103
    assert after[0] == 0 and after[-1] == 255


def test_rotation_undoes_the_turn() -> None:
    for row in demonstrations(0, 20, {"rotate": 1.0}):
        foot = np.asarray(row.images[1])[-6:]
        assert (foot == 255).all() and not (np.asarray(row.images[0])[-6:] == 255).all()


# Tokens of a whole sequence, image tokens included: what a step of SFT costs.
LENGTHS = {
    "direct": {30},
    "crop": {90},
    "rotate": {73, 75},
    "contrast": {70},
    "arithmetic": {54, 57},
    "zoom": {142},
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_token_lengths(scenario: str, processor: Any) -> None:
    for row in demonstrations(0, 10, {scenario: 1.0}):
        text = processor.chat(row.prompt) + row.response.replace("<image>", processor.IMAGE_TEXT) + "<|im_end|>"
        images = [processor.preprocess(image) for image in row.images]
        ids = processor.expand(processor.encode(text), images)
        assert all(image.num_tokens == 9 for image in images)
        assert len(ids) in LENGTHS[scenario]


@pytest.mark.parametrize("side", [SIDE, SIDE // 2, 2 * SIDE, SIDE // 6, SIDE // 3, 2 * SIDE // 3, SIDE // 9, VIEW])
def test_every_square_picture_is_seen_as_nine_tokens(side: int, processor: Any) -> None:
    image = processor.preprocess(Image.new("RGB", (side, side)))
    assert image.grid == (1, 6, 6) and image.num_tokens == 9


def test_a_caption_looks_like_a_downscaled_picture(processor: Any) -> None:
    def view(image: Image.Image) -> np.ndarray:
        return np.asarray(image.resize((VIEW, VIEW), Image.Resampling.BICUBIC), np.float32)

    for seed in range(4):
        small, large = (Painter(np.random.default_rng(seed), "glyphs", "train") for _ in range(2))
        signs = [("red", 3, (1, 4)), ("white", 8, (5, 0))]
        difference = np.abs(view(small.small_signs(VIEW, signs)) - view(large.small_signs(SIDE, signs)))
        assert difference.mean() < 1.0 and np.quantile(difference, 0.99) < 40
        small, large = (Painter(np.random.default_rng(seed), "glyphs", "train") for _ in range(2))
        tiny = [
            painter.tiny_sign(side, "green", 3, (seed % 3, 1), (5, seed))
            for painter, side in ((small, VIEW), (large, ZOOM_SIDE))
        ]
        difference = np.abs(view(tiny[0]) - view(tiny[1]))
        # A ramp of 28 pixels starts two levels below the mean of twelve times as many.
        assert difference.mean() < 2.0 and np.quantile(difference, 0.99) < 40
        small, large = (Painter(np.random.default_rng(seed), "glyphs", "train") for _ in range(2))
        difference = np.abs(view(small.large_sign(VIEW, "red", 5)) - view(large.large_sign(SIDE, "red", 5)))
        assert difference.mean() < 2.0 and np.quantile(difference, 0.98) < 40


def test_captions_use_the_words_of_the_demonstrations() -> None:
    made = captions(0, 80)
    assert {caption.kind for caption in made} == set(CAPTION_KINDS)
    patterns = {
        "ocr": r"The digits are \d{9}\.",
        "one": r"The digit is \d\.",
        "ground": r"The \w+ sign is small: column [0-5], row [0-5]\.",
        "ground4": r"(The (red|green|yellow|white) sign is small: column [0-5], row [0-5]\.\n?){4}",
        "tiny": r"The \w+ sign is tiny: column [0-2], row [0-2]\.",
        "cut": r"The \w+ sign is (small|tiny): column (\d), row (\d)\.\ns = image\.width // [36]\n"
        r"x, y = \2\*s, \3\*s\nimage = image\.crop\(\(x, y, x \+ s, y \+ s\)\)\n",
    }
    for caption in made:
        assert caption.image.size == (VIEW, VIEW) and caption.prompt.startswith("<image>")
        assert re.fullmatch(patterns[caption.kind], caption.text)


def test_questions_become_prompts(processor: Any) -> None:
    for question in questions(0, 6, EVEN, "heldout"):
        prompt = build_prompt(question, "short", processor)
        text = processor.decode(list(prompt.token_ids))
        shown = "" if question.image is None else processor.IMAGE_TEXT
        assert text == f"<|im_start|>user\n{shown}{question.question}<|im_end|>\n<|im_start|>assistant\n"


def test_shares_are_kept() -> None:
    made = questions(0, 300, {"crop": 3.0, "arithmetic": 1.0})
    assert 0.68 < np.mean([question.scenario == "crop" for question in made]) < 0.82


@pytest.mark.parametrize("mix", [{"cropp": 1.0}, {}, {"crop": -1.0, "zoom": 2.0}])
def test_a_bad_mix_is_named(mix: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="mix"):
        questions(0, 1, mix)


def test_a_bad_config_is_named() -> None:
    with pytest.raises(ValueError, match=r"Mix\.crop"):
        Mix(crop=-0.1)
    with pytest.raises(ValueError, match="all shares are 0"):
        CaptionMix(ocr=0, one=0, ground=0, ground4=0, tiny=0, cut=0)
    with pytest.raises(ValueError, match=r"no_code_scenarios: 'cropp'"):
        ToyConfig(no_code_scenarios=("cropp",))
    with pytest.raises(ValueError, match=r"ToyConfig\.box_noise"):
        ToyConfig(box_noise=1.5)
    with pytest.raises(ValueError, match="seed"):
        questions(-1, 1)


def test_the_toy_has_as_many_parameters_as_it_says() -> None:
    from thyme.model.model import Model

    config = tiny_config()
    assert sum(p.numel() for p in Model(config).parameters()) == 1_709_184
    assert config.text.vocab_size > tiny_processor().vocab_size


def _blocks(row: Any) -> list[str]:
    codes = [extract_code(block) for block in re.findall(r"<code>.*?</code>", row.response, re.DOTALL)]
    return [code for code in codes if code is not None]


@pytest.mark.parametrize(
    ("scenario", "cut_by"), [*((name, "corner") for name in CODED), ("crop", "box"), ("zoom", "box")]
)
def test_the_sandbox_returns_what_the_demonstration_shows(scenario: str, cut_by: Any, sandbox: Any) -> None:
    for row in demonstrations(5, 2, {scenario: 1.0}, cut_by=cut_by):
        session = sandbox.session(row.question.image, row.question.image_path or None)
        results = [session.run(code) for code in _blocks(row)]
        session.close()
        assert [result.status.name for result in results] == ["OK"] * len(results), results
        assert [result.fixes for result in results] == [()] * len(results)
        if scenario == "arithmetic":
            assert results[0].stdout.strip() == row.question.solution
            continue
        returned = [image for result in results for image in result.images]
        assert [image.tobytes() for image in returned] == [image.tobytes() for image in row.images[1:]]
