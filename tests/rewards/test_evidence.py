"""Whether what tools returned holds what an answer says: each rule, and the text reader on real lines."""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance

from tests.rewards.evidence_pictures import made_calls
from tests.rewards.rollouts import question, rollout
from tests.unfollowable import CODES
from thyme.rewards import JudgeConfig, RewardConfig, RuleJudge, open_scorer, score
from thyme.rewards.evidence import (
    Call,
    Line,
    TextReader,
    Verdict,
    default_reader,
    evidence,
    holds_evidence,
    rollout_evidence,
)
from thyme.rewards.evidence import reader as reader_module
from thyme.rewards.evidence.claims import claim_of
from thyme.rewards.evidence.code_boxes import boxes_in
from thyme.rewards.evidence.places import covered, place_of
from thyme.rewards.evidence.spelled import slips
from thyme.rewards.evidence.values import holding_number, printed_numbers
from thyme.rewards.judge_scorer import score_by
from thyme.rollout.types import Rollout, Turn
from thyme.sandbox import SandboxResult, SnippetError, Status

HELD, ABSENT, UNREADABLE = Verdict.HELD, Verdict.ABSENT, Verdict.UNREADABLE
needs_reader = pytest.mark.skipif(
    not reader_module.is_available(), reason="rapidocr-onnxruntime is not installed (Python up to 3.12)"
)
BLANK = Image.new("RGB", (120, 60), "white")


class Lines:
    """Reads what it was told, one list of lines after the other."""

    def __init__(self, *passes: Sequence[tuple[str, float]]) -> None:
        self._passes, self.asked = passes, 0

    def passes(self, picture: Image.Image) -> Iterator[Sequence[Line]]:
        for lines in self._passes:
            self.asked += 1
            yield [Line(*line) for line in lines]


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture no part of which is like another."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 6 + 1, width // 6 + 1, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def of_text(answer: str, asked: str, *passes: Sequence[tuple[str, float]]) -> Any:
    return evidence(answer, asked, [Call(images=(BLANK,))], reader=Lines(*passes))


# What an answer claims.


@pytest.mark.parametrize(
    ("answer", "asked", "kind", "parts"),
    [
        ("B", "What street is it?\nA. Main\nB. Oak", "text", ("Oak",)),
        ("D. MICHIGAN", "Which?\nA. MACHIGAN\nD. MICHIGAN", "text", ("MICHIGAN",)),
        ("1.68, 0.45", "Determine a and b", "number", ("1.68", "0.45")),
        ("a = 1.68 and b = 0.45", "Determine a and b", "number", ("1.68", "0.45")),
        ("1,250", "What is the total?", "number", ("1,250",)),
        ("43", "How many boats are there?", "count", ("43",)),
        ("The color is dark red.", "What color is it?", "color", ("red",)),
        ("blue and white", "What colors?", "color", ("blue", "white")),
        ("Yes", "Is there a dog?", "word", ("yes",)),
        ("on the left side", "Where is it?", "nothing", ()),
        ("The image does not feature boats", "How many boats?", "nothing", ()),
        ("I cannot tell", "What is written?", "nothing", ()),
        ("C", "Which one?", "nothing", ()),
        ("", "Which one?", "nothing", ()),
        ("a red bus", "What is it?", "text", ("a red bus",)),
    ],
)
def test_what_an_answer_claims(answer: str, asked: str, kind: str, parts: tuple[str, ...]) -> None:
    claim = claim_of(answer, asked)
    assert (claim.kind, claim.parts) == (kind, parts)
    assert bool(claim.why) == (kind == "nothing")


# Values.


@pytest.mark.parametrize(
    ("claimed", "printed", "number"),
    [
        ("0.45", "0.44745897697122117", "0.44745897697122117"),
        ("0.46", "0.44745897697122117", None),
        ("12", "area: 12 and 13", "12"),
        ("12", "112 or 120, v12", None),
        ("2", "2.4", "2.4"),
        ("3", "2.4", None),
        ("45%", "0.4521", "0.4521"),
        ("-3", "x = -3.0", "-3.0"),
        ("3", "x = -3", None),
        ("1,250", "1250", "1250"),
        ("1e3", "1000", "1000"),
        ("5", "", None),
    ],
)
def test_a_printed_number_is_held_as_the_answer_rounds_it(claimed: str, printed: str, number: str | None) -> None:
    assert holding_number(claimed, printed) == number


def test_numbers_of_a_long_output_are_read_in_time() -> None:
    assert len(printed_numbers("7 " * 100_000)) == 2_000


def test_parts_of_an_answer_may_come_from_several_calls() -> None:
    calls = [Call(printed="0.44745"), Call(printed="1.67736")]
    found = evidence("1.68, 0.45", "Determine a and b", calls)
    assert found.verdict is HELD and [one.parts for one in found.calls] == [{1}, {0}]
    assert [one.by for one in found.calls] == ["value", "value"]
    half = evidence("1.68, 0.45", "Determine a and b", [calls[0], Call(printed="2.5")])
    assert half.verdict is ABSENT and "1 of 2 parts are held" in half.reason


@pytest.mark.parametrize(
    ("call", "verdict", "reason"),
    [
        (Call(error="NameError"), ABSENT, "its code failed (NameError)"),
        (Call(printed=""), ABSENT, "it returned nothing"),
        (Call(printed="The sum is 41"), ABSENT, 'prints "The sum is 41", not "42"'),
        (Call(printed="42 boats"), HELD, "prints 42"),
        (Call(images=(BLANK,)), UNREADABLE, "the answer is a number of things, which no picture spells"),
    ],
)
def test_a_count_is_held_by_what_is_printed(call: Call, verdict: Verdict, reason: str) -> None:
    found = evidence("42", "How many boats are there?", [call])
    assert (found.verdict, found.reason) == (verdict, reason)


def test_without_a_call_there_is_no_verdict() -> None:
    assert evidence("42", "How many?", []).verdict is None


# Text, with a reader that was told what it reads.


@pytest.mark.parametrize(
    ("answer", "asked", "read", "verdict"),
    [
        ("Michigan", "What street is it?", [("N MICHIGAN AV", 0.95)], HELD),
        ("Michigan", "What street is it?", [("N MICHlGAN AV", 0.95)], HELD),
        ("Michigan", "What street is it?", [("S WABASH AV", 0.95)], ABSENT),
        ("Michigan", "What street is it?", [("S WABASH AV", 0.5)], UNREADABLE),
        ("Michigan", "What street is it?", [("MCHIAAN", 0.95)], UNREADABLE),
        ("Michigan", "What street is it?", [], ABSENT),
        ("dog", "What animal is it?", [], UNREADABLE),
        ("dog", "What animal is it?", [("HOT DOG", 0.9)], HELD),
        ("dog", "What is written?", [("DOGMA", 0.9)], ABSENT),
        ("206 441 5000", "What is the phone number?", [("206", 1.0), ("441", 1.0), ("5000", 1.0)], HELD),
        ("206 441 5000", "What is the phone number?", [("Tel 206-441-5000", 1.0)], HELD),
        ("206 441 5000", "What is the phone number?", [("1206 441 50001", 1.0)], UNREADABLE),
        ("206 441 5000", "What is the phone number?", [("206 441 5001", 1.0)], UNREADABLE),
        ("206 441 5000", "What is the phone number?", [("415 993 2718", 1.0)], ABSENT),
        ("12.50", "What is the price?", [("$12.50", 0.9)], HELD),
        ("12.50", "What is the price?", [("1250", 0.9)], UNREADABLE),
        (r"$$0.\overline{642857}$$", "Write the expression", [("0642857", 0.9)], HELD),
    ],
)
def test_text_that_was_read(answer: str, asked: str, read: list[tuple[str, float]], verdict: Verdict) -> None:
    assert of_text(answer, asked, read).verdict is verdict


def test_the_option_that_is_read_more_exactly_wins() -> None:
    asked = "What street is it?\nA. MACHIGAN\nB. MICHIGUN\nC. MICHIGAN"
    sign = [("N MICHIGAN AV", 0.95)]
    assert [of_text(letter, asked, sign).verdict for letter in "ABC"] == [ABSENT, ABSENT, HELD]
    assert of_text("B", asked, sign).reason == 'reads "MICHIGAN", which is another option'


def test_it_is_read_again_until_it_is_found() -> None:
    reader = Lines([], [("communities", 0.9)], [("never asked for", 0.9)])
    found = evidence("communities", "What is written?", [Call(images=(BLANK,))], reader=reader)
    assert found.verdict is HELD and reader.asked == 2


def test_a_reader_that_raises_is_no_verdict(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def passes(self, picture: Image.Image) -> Iterator[Sequence[Line]]:
            raise RuntimeError("onnx")

    found = evidence("stop", "What is written?", [Call(images=(BLANK,))], reader=Broken())
    assert (found.verdict, found.reason) == (UNREADABLE, "reading it raised RuntimeError")
    assert "RuntimeError: onnx" in caplog.text


def test_numbers_are_read_to_the_digit_and_words_up_to_a_slip() -> None:
    assert slips("4821", [Line("4821", 0.9)]) == 0
    assert slips("4821", [Line("48215", 0.9)]) == 1
    assert slips("orchard", [Line("0RCHARD", 0.9)]) == 1
    assert slips("cat", [Line("concatenate", 0.9)]) == 3


# Without the extra.


def test_without_a_reader_text_is_unreadable_and_paying_for_it_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "_NEEDED", ("rapidocr_onnxruntime", "no_such_package"))
    default_reader.cache_clear()
    try:
        found = evidence("stop", "What is written?", [Call(images=(BLANK,))])
        assert (found.verdict, found.reason) == (UNREADABLE, "text is not read: pip install 'thyme[evidence]'")
        with pytest.raises(ValueError, match=r"needs rapidocr-onnxruntime.*pip install 'thyme\[evidence\]'"):
            TextReader()
        with (
            pytest.raises(ValueError, match="rapidocr-onnxruntime"),
            open_scorer(RewardConfig(evidence=0.5), JudgeConfig()),
        ):
            pass
    finally:
        default_reader.cache_clear()


# Places.


@pytest.mark.parametrize(
    ("code", "box"),
    [
        ("x1, y1, x2, y2 = 10, 20, 110, 70\nimage.crop((x1, y1, x2, y2))", (10, 20, 110, 70)),
        ("box = (10, 20, 110, 70)\nout = image.crop(box)", (10, 20, 110, 70)),
        ("image.crop(box=(10, 20, 10 + 100, 20 + 50)).save(path)", (10, 20, 110, 70)),
        ("crop = image[20:70, 10:110]", (10, 20, 110, 70)),
        ("crop = image[:70, 10:]", (10, 0, 400, 70)),
        ("w, h = image.size\nimage.crop((0, h // 2, w // 2, h))", (0, 150, 200, 300)),
        ("h, w = image.shape[:2]\nimage.crop((int(w * 0.5), 0, w, h / 2))", (200, 0, 400, 150)),
        ("if True:\n    b = [1, 2, 30, 40]\n    image.crop(tuple(b))", (1, 2, 30, 40)),
        ("image.crop((max(0, -5), 0, min(9000, image.width), 50))", (0, 0, 400, 50)),
    ],
)
def test_boxes_of_code(code: str, box: tuple[int, ...]) -> None:
    assert boxes_in([code], (400, 300)) == [box]


@pytest.mark.parametrize(
    "code",
    [
        "image.crop(find())",
        "image.crop((1, 2, 3))",
        "image.crop((9, 9, 1, 1))",
        "image.crop((1 / 0, 0, 5, 5))",
        "image.crop((10 ** 9, 0, 5, 5))",
        "x = 'a' * 10",
        "def (",
        "image.crop()",
        "n = 9" * 1 + "".join(f"\nn = n * {10**6}" for _ in range(50)) + "\nimage.crop((0, 0, n, n))",
    ],
)
def test_code_whose_boxes_are_not_known(code: str) -> None:
    assert boxes_in([code], (400, 300)) == []


def test_names_live_on_in_the_next_snippet() -> None:
    assert boxes_in(["box = (1, 2, 30, 40)\nimage.crop((0, 0, 9, 9))", "image.crop(box)"], (99, 99)) == [(1, 2, 30, 40)]


def test_a_cut_is_found_by_its_pixels_alone() -> None:
    source = noise(900, 600)
    for zoom in (1, 2, 3):
        cut = source.crop((300, 200, 460, 320)).resize((160 * zoom, 120 * zoom), Image.Resampling.BICUBIC)
        for shown in (cut, ImageEnhance.Contrast(cut).enhance(1.5), ImageEnhance.Brightness(cut).enhance(0.6)):
            place = place_of(shown, [], source, [])
            assert place is not None and not place.whole
            assert place.box == pytest.approx((300, 200, 460, 320), abs=2)
    assert place_of(noise(160, 120, seed=1), [], source, []) is None


def test_a_box_of_the_code_counts_only_if_the_pixels_are_those() -> None:
    source = noise(900, 600)
    cut = source.crop((300, 200, 460, 320))
    place = place_of(cut, [(0.0, 0.0, 160.0, 120.0), (300.0, 200.0, 460.0, 320.0)], source, [])
    assert place is not None and place.box == (300, 200, 460, 320)


def test_all_of_a_picture_is_whole_however_it_is_turned() -> None:
    source = noise(900, 600)
    for shown in (source, source.transpose(Image.Transpose.ROTATE_90), source.resize((450, 300))):
        place = place_of(shown, [], source, [])
        assert place is not None and place.whole


def test_the_share_of_a_target_that_is_shown() -> None:
    assert covered((0, 0, 10, 10), (5, 0, 20, 20)) == 0.5
    assert covered((0, 0, 10, 10), (10, 0, 20, 20)) == 0.0


def test_a_second_cut_is_placed_in_the_first() -> None:
    source = noise(900, 600)
    first = source.crop((300, 200, 600, 400))
    second = first.crop((100, 50, 200, 150))
    calls = [
        Call(code="image = image.crop((300, 200, 600, 400))", images=(first,)),
        Call(code="image = image.crop((100, 50, 200, 150))", images=(second,)),
    ]
    inside, outside = (420.0, 270.0, 480.0, 330.0), (310.0, 210.0, 340.0, 240.0)
    found = evidence("7", "Which digit?", calls, picture=source, boxes=[inside])
    assert [one.verdict for one in found.calls] == [HELD, HELD]
    found = evidence("7", "Which digit?", calls, picture=source, boxes=[outside])
    assert [one.verdict for one in found.calls] == [HELD, ABSENT] and found.verdict is HELD
    both = evidence("7", "Which digit?", calls[1:], picture=source, boxes=[inside, outside])
    assert both.verdict is ABSENT and both.reason == "1 of 2 parts are held; 100% of the target's box lies in it"
    turned = Call(images=(source.transpose(Image.Transpose.ROTATE_90),))
    whole = evidence("7", "Which digit?", [turned], picture=source, boxes=[outside])
    assert (whole.verdict, whole.reason) == (HELD, "it shows the whole picture")


def test_a_value_holds_an_answer_where_there_are_boxes_too() -> None:
    found = evidence("3, 4", "a and b?", [Call(printed="3 4")], picture=BLANK, boxes=[(0, 0, 9, 9)])
    assert found.verdict is HELD
    found = evidence("3, 4", "a and b?", [Call(printed="3 5")], picture=BLANK, boxes=[(0, 0, 9, 9)])
    assert found.verdict is ABSENT


# Colours.


def test_a_color_is_held_where_the_middle_shows_it() -> None:
    picture = Image.new("RGB", (100, 100), (128, 128, 128))
    ImageDraw.Draw(picture).ellipse((30, 30, 70, 70), fill=(210, 30, 30))
    asked = "What color is the ball?"
    assert evidence("red", asked, [Call(images=(picture,))]).verdict is HELD
    assert evidence("blue", asked, [Call(images=(picture,))]).verdict is ABSENT
    assert evidence("red", asked, [Call(images=(Image.new("RGB", (50, 50), "red"),))]).verdict is UNREADABLE
    assert evidence("B", asked + "\nA. red\nB. gray", [Call(images=(picture,))]).verdict is UNREADABLE


# Rollouts, filter and reward.


def ran(picture: Image.Image | None = None, printed: str = "", status: Status = Status.OK) -> Turn:
    shown = "<image>" if picture is not None else printed
    error = None if status is Status.OK else SnippetError("NameError", "x", 1)
    result = SandboxResult(status=status, stdout=printed, images=() if picture is None else (picture,), error=error)
    text = f"<sandbox_output>{shown}</sandbox_output>"
    return Turn(text="", code="", result=result, output_text=text, num_images=int(picture is not None))


def answered_with(*turns: Turn, answer: str = "42") -> Rollout:
    done = rollout(
        question(text="What is 6 x 7?", solution="42"), f"<think>It is 42.</think>\n<answer>{answer}</answer>"
    )
    return replace(done, turns=list(turns))


def test_a_filter_drops_what_is_absent_and_a_strict_one_what_is_not_held() -> None:
    held, absent, none = answered_with(ran(printed="42")), answered_with(ran(printed="41")), answered_with()
    assert [holds_evidence(one) for one in (held, absent, none)] == [True, False, True]
    assert [holds_evidence(one, strict=True) for one in (held, absent, none)] == [True, False, False]


def test_results_that_were_withheld_hold_nothing() -> None:
    withheld = replace(ran(printed="42"), output_text="<sandbox_output>No output captured.</sandbox_output>")
    assert rollout_evidence(answered_with(withheld)).verdict is ABSENT
    assert rollout_evidence(answered_with(ran(status=Status.ERROR))).reason == "its code failed (NameError)"


@pytest.mark.parametrize("meta", [{"box": [40, 40, 60, 60]}, {"bbox": [40, 40, 60, 60]}, {"boxes": [[40, 40, 60, 60]]}])
def test_boxes_come_with_the_question(meta: dict[str, Any]) -> None:
    source = noise(200, 200)
    asked = replace(question(text="Which digit?", solution="7"), image=source, image_path="a.png", meta=meta)
    on_it, beside = (ran(source.crop(box)) for box in ((30, 30, 100, 100), (100, 100, 180, 180)))
    done = rollout(asked, "<answer>7</answer>")
    assert rollout_evidence(replace(done, turns=[on_it])).verdict is HELD
    assert rollout_evidence(replace(done, turns=[beside])).verdict is ABSENT


@needs_reader
def test_the_reward_pays_evidence_on_right_answers_alone() -> None:
    config = RewardConfig(evidence=0.5)
    held, absent = answered_with(ran(printed="42")), answered_with(ran(printed="41"))
    wrong = answered_with(ran(printed="41"), answer="41")
    with open_scorer(config) as scorer:
        given = scorer.submit([held, absent, wrong]).result()
    assert [reward.parts for reward in given] == [{"evidence": 0.5}, {"evidence": 0.0}, {"evidence": 0.0}]
    plain = [score(one, RuleJudge()).total for one in (held, absent, wrong)]
    assert [reward.total - before for reward, before in zip(given, plain, strict=True)] == [0.5, 0.0, 0.0]


# The text reader itself.


@needs_reader
def test_signs_in_photographs_are_read() -> None:
    """A short form of the error rates that test_evidence_rates.py counts."""
    wrong = []
    for made in made_calls(3, 2, ("word", "phone")):
        if made.cut != "half of it":
            found = evidence(made.answer, made.question, [made.call], picture=made.picture)
            if found.verdict is not made.truth and (made.truth is HELD or found.verdict is HELD):
                wrong.append((made.answer, made.cut, found))
    assert not wrong


def test_evidence_pays_an_answer_that_a_judge_found_right_too() -> None:
    class Accepts:
        async def correct(self, asked: str, answer: str, solution: str) -> bool:
            return True

        async def consistent(self, thinking: str, answer: str) -> bool:
            return False

    def paid(printed: str) -> Any:
        done, config = answered_with(ran(printed=printed), answer="43"), RewardConfig(evidence=0.5)
        return asyncio.run(score_by(Accepts(), done, None, None, config))  # type: ignore[arg-type]

    assert paid("43").parts == {"evidence": 0.5} and paid("42").parts == {"evidence": 0.0}


@pytest.mark.parametrize("code", CODES, ids=range(len(CODES)))
def test_code_that_cannot_be_followed_is_passed_by(code: str) -> None:
    behind = f"{code}\nimg.crop((1, 2, 30, 40))"
    assert boxes_in([code, behind], (100, 100))[-1] == (1, 2, 30, 40), "what stands behind it is read"
