"""Pictures are prepared while others decode, each once, and nothing waits for more than it needs."""

import threading
from typing import Any

import pytest
from PIL import Image

from tests.rollout.test_rollout import ANSWER, SOME_CODE, Processor, loop, nothing_leaked, question
from thyme.rollout.pictures_ahead import PicturesAhead
from thyme.rollout.sampling import Sampling
from thyme.rollout.types import RolloutStatus

LONG = 10  # seconds; what comes sooner or never


def pictures(count: int) -> list[Any]:
    return [question(f"q{i}", Image.new("RGB", (20 + i, 10))) for i in range(count)]


class Gated(Processor):
    """Every picture but the first is ready only once `gate` is set."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.prepared: list[int] = []
        self.was_open = True

    def preprocess(self, image: Image.Image) -> Any:
        if image.width > 20 and self.was_open:
            self.was_open = self.gate.wait(LONG)
        self.prepared.append(image.width)
        return super().preprocess(image)


def test_decoding_starts_when_the_first_of_64_pictures_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    it = loop([ANSWER])
    it.processor = processor = Gated()
    step = it.engine.step

    def stepped() -> Any:
        processor.gate.set()
        return step()

    monkeypatch.setattr(it.engine, "step", stepped)
    groups = it.run(pictures(64), Sampling())
    assert processor.was_open, "a step waited for a picture that it did not need"
    assert [[rollout.images[0].size[0] for rollout in group] for group in groups] == [[20 + i] for i in range(64)]
    assert sorted(processor.prepared) == [20 + i for i in range(64)] and nothing_leaked(it)


@pytest.mark.parametrize("deterministic", [False, True])
def test_all_are_asked_whatever_comes_first(deterministic: bool) -> None:
    it = loop([SOME_CODE, ANSWER], deterministic=deterministic, sessions=3)
    it.processor = processor = Gated()
    processor.gate.set()
    groups = it.run(pictures(9), Sampling(n=2))
    assert {rollout.status for group in groups for rollout in group} == {RolloutStatus.ANSWERED}
    assert len(groups) == 9 and nothing_leaked(it)


def test_a_deterministic_run_waits_for_every_picture_before_its_first_step() -> None:
    """Which sequences a step sees must not depend on a thread."""
    it = loop([ANSWER], deterministic=True)
    it.processor = processor = Gated()
    processor.gate.set()
    added: list[int] = []
    step = it.engine.step
    it.engine.step = lambda: (added.append(len(it.engine.sequences)), step())[1]
    it.run(pictures(12), Sampling())
    assert added[0] == 12


def test_a_picture_is_prepared_once_for_all_that_wait_for_it() -> None:
    processor = Gated()
    processor.gate.set()
    ahead = PicturesAhead(processor)  # type: ignore[arg-type]
    shared = Image.new("RGB", (30, 10))
    one, other = question("a", shared), question("b", shared)
    ahead.want([one, other])
    assert ahead.take(one) == ahead.take(other)
    assert processor.prepared == [30]
    ahead.want([])
    ahead.take(one)  # nobody wanted it any more
    assert processor.prepared == [30, 30]
    ahead.close()


def test_a_picture_that_cannot_be_used_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    it = loop([ANSWER])

    def refuses(image: Image.Image) -> Any:
        raise ValueError("image of 0 pixels")

    monkeypatch.setattr(it.processor, "preprocess", refuses)
    with pytest.raises(ValueError, match="image of 0 pixels"):
        it.run(pictures(3), Sampling())
    assert nothing_leaked(it)
