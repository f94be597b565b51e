"""Items prepared ahead: the same items in the same order, no more of them than allowed, and threads that end."""

import threading
from collections.abc import Sequence

import pytest
from PIL import Image

from thyme.data.ahead import Ahead, demonstration_bytes, question_bytes
from thyme.data.config import DataConfig
from thyme.data.rows import Demonstration, Question

WAIT_S = 20.0


class Counted:
    """A stream of numbers that notes what it was asked for, and may hold its callers back."""

    def __init__(self, *, open_gate: bool = True) -> None:
        self.asked: list[int] = []
        self.gate = threading.Event()
        self.changed = threading.Condition()
        if open_gate:
            self.gate.set()

    def __call__(self, start: int, n: int) -> Sequence[int]:
        with self.changed:
            self.asked += range(start, start + n)
            self.changed.notify_all()
        assert self.gate.wait(WAIT_S)
        if start == 93:
            raise ValueError("row x:93 cannot be prepared")
        return list(range(100 * start, 100 * (start + n), 100))

    def until(self, count: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.asked) >= count, WAIT_S)


def _until_held(ahead: Ahead[int], count: int) -> None:
    with ahead._change:
        assert ahead._change.wait_for(lambda: len(ahead._ready) >= count, WAIT_S)


def _alive() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("thyme-ahead")]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_items_are_the_streams_wherever_one_begins(workers: int) -> None:
    with Ahead(Counted(), DataConfig(workers=workers), lambda item: 1) as ahead:
        assert [list(ahead(start, 4)) for start in (0, 4, 8)] == [
            [100 * i for i in range(start, start + 4)] for start in (0, 4, 8)
        ]
        assert list(ahead(40, 2)) == [4000, 4100] and list(ahead(1, 3)) == [100, 200, 300] and list(ahead(4, 0)) == []
    assert not _alive()


def test_no_more_steps_are_prepared_than_asked_for() -> None:
    stream = Counted()
    with Ahead(stream, DataConfig(workers=2, ahead_steps=2), lambda item: 1) as ahead:
        ahead(0, 5)
        _until_held(ahead, 10)
        assert sorted(stream.asked) == list(range(15)) and ahead.held == (10, 10)
        ahead(5, 5)
        _until_held(ahead, 10)
        assert sorted(stream.asked) == list(range(20))


def test_no_more_bytes_are_prepared_than_allowed_but_what_is_needed_is() -> None:
    stream = Counted()
    with Ahead(stream, DataConfig(workers=1, ahead_steps=9, ahead_mib=4), lambda item: 3 * 2**19) as ahead:
        assert list(ahead(0, 6)) == [0, 100, 200, 300, 400, 500]  # nine MiB, all of it needed
        _until_held(ahead, 2)
        ahead(6, 0)  # the worker has looked at the bounds again before this call ends or waits
        assert ahead.held == (2, 3 * 2**20) and len(stream.asked) == 8
        assert list(ahead(6, 3)) == [600, 700, 800]
    assert not _alive()


def test_the_next_step_is_prepared_while_the_caller_is_away() -> None:
    stream = Counted()
    with Ahead(stream, DataConfig(workers=2, ahead_steps=1), lambda item: 1) as ahead:
        ahead(0, 2)
        stream.until(4)
        _until_held(ahead, 2)
        stream.gate.clear()
        assert list(ahead(2, 2)) == [200, 300]  # nothing of it waits for the stream any more
        stream.gate.set()


def test_what_was_being_prepared_when_the_caller_jumped_is_forgotten() -> None:
    stream = Counted()
    with Ahead(stream, DataConfig(workers=1, ahead_steps=1), lambda item: 1) as ahead:
        ahead(0, 1)
        _until_held(ahead, 1)
        stream.gate.clear()
        ahead(1, 1)
        stream.until(3)
        waiting = threading.Thread(target=lambda: ahead(50, 1))  # item 2 is being prepared
        waiting.start()
        with ahead._change:
            assert ahead._change.wait_for(lambda: ahead._needed == 51, WAIT_S)
        stream.gate.set()
        waiting.join(WAIT_S)
        _until_held(ahead, 1)
        assert sorted(ahead._ready) == [51]


def test_an_error_is_raised_where_its_row_is_asked_for_and_not_before() -> None:
    with Ahead(Counted(), DataConfig(workers=2, ahead_steps=3), lambda item: 1) as ahead:
        assert list(ahead(88, 4)) == [8800, 8900, 9000, 9100]
        _until_held(ahead, 12)
        with pytest.raises(ValueError, match="row x:93 cannot be prepared"):
            ahead(92, 4)
        assert list(ahead(96, 4)) == [9600, 9700, 9800, 9900]


def test_leaving_ends_the_threads_also_by_an_error_and_in_the_middle_of_an_item() -> None:
    stream = Counted()
    with pytest.raises(KeyError), Ahead(stream, DataConfig(workers=3), lambda item: 1) as ahead:
        ahead(0, 3)
        raise KeyError("step")
    assert not _alive() and ahead.held == (0, 0)
    with pytest.raises(ValueError, match="was closed"):
        ahead(3, 3)
    stream = Counted(open_gate=False)
    ahead = Ahead(stream, DataConfig(workers=1), lambda item: 1)
    raised: list[BaseException] = []

    def ask() -> None:
        try:
            ahead(0, 2)
        except ValueError as error:
            raised.append(error)

    caller = threading.Thread(target=ask)
    caller.start()
    stream.until(1)
    closer = threading.Thread(target=ahead.close)
    closer.start()
    caller.join(WAIT_S)
    stream.gate.set()
    closer.join(WAIT_S)
    assert "closed while" in str(raised[0]) and not _alive()


def test_items_are_as_large_as_their_pictures() -> None:
    image = Image.new("RGB", (10, 20))
    question = Question(id="a", image=image, image_path="a.png", question="q", solution="s")
    several = Question(
        id="a", image=image, image_path="a.png", question="q", solution="s", more_images=(("b.png", image),)
    )
    text = Question(id="a", image=None, image_path="", question="q", solution="s")
    assert [question_bytes(q) for q in (question, several, text)] == [600, 1200, 0]
    assert demonstration_bytes(Demonstration([image, image], "", "", "", question)) == 1200
