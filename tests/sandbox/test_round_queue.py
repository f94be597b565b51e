"""Which snippet starts next, with a fork-server that only writes down what it is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import pytest

from thyme.sandbox import SandboxConfig
from thyme.sandbox.protocol import Order
from thyme.sandbox.round_queue import RoundQueue
from thyme.sandbox.session_state import Round, SessionState

CONFIG = SandboxConfig(workers=2, memory_mib=256, max_sessions=2, max_pixels=16)


class Server:
    """Takes orders until `room` is used up."""

    def __init__(self, room: int = 100) -> None:
        self.room = room
        self.orders: list[Order] = []

    def fork(self, order: Order, descriptors: list[int]) -> None:
        assert len(descriptors) == 4
        if len(self.orders) == self.room:
            raise BlockingIOError
        self.orders.append(order)


class Queue(RoundQueue):
    """With what a test wants to do often."""

    def __init__(self) -> None:
        self.born: list[SessionState] = []
        super().__init__(CONFIG, self.born.append)

    def add(self, session: SessionState, code: str = "") -> Round:
        round_ = Round(session, code.encode())
        self.waiting.append(round_)
        return round_

    def start(self, server: Server) -> list[tuple[Round, str]]:
        return self.start_waiting(cast("Any", server))


def session(name: str = "image.png", *, one_shot: bool = False) -> SessionState:
    return SessionState(image=None, image_path=name, seed=0, one_shot=one_shot)


@pytest.fixture
def queue() -> Iterator[Queue]:
    queue = Queue()
    yield queue
    for state in list(queue.live.values()):
        child = queue.forget(state)
        assert child is not None
        child.close()


def test_first_come_first_served_up_to_the_workers(queue: Queue) -> None:
    server, rounds = Server(), [queue.add(session(f"{i}.png", one_shot=True)) for i in range(3)]
    assert queue.has_work()
    assert queue.start(server) == []
    assert [order["image_path"] for order in server.orders] == ["0.png", "1.png"]
    assert list(queue.waiting) == rounds[2:] and not queue.has_work()
    assert [state.round for state in queue.born] == rounds[:2] and queue.num_running == 2
    queue.end_round(rounds[0].session)
    assert queue.start(server) == []
    assert queue.num_running == 2 and not queue.waiting and len(server.orders) == 3


def test_a_busy_session_lets_others_pass_and_keeps_its_order(queue: Queue) -> None:
    server, busy, other = Server(), session("busy.png"), session("other.png")
    first, second, third, passing = queue.add(busy), queue.add(busy), queue.add(busy), queue.add(other)
    queue.start(server)
    assert (busy.round, other.round, list(queue.waiting)) == (first, passing, [second, third])
    queue.end_round(busy)
    queue.start(server)
    assert (busy.round, list(queue.waiting)) == (second, [third])
    assert len(server.orders) == 2  # the process is kept


def test_no_more_sessions_than_allowed_but_one_shots_pass(queue: Queue) -> None:
    server, sessions = Server(), [session() for _ in range(3)]
    for state in sessions[:2]:
        queue.add(state)
    queue.start(server)
    for state in sessions[:2]:
        queue.end_round(state)
    kept_out, one_shot = queue.add(sessions[2]), session(one_shot=True)
    passing = queue.add(one_shot)
    queue.start(server)
    assert (one_shot.round, list(queue.waiting)) == (passing, [kept_out])
    child = queue.forget(sessions[0])
    assert child is not None and sessions[0].child is None
    child.close()
    queue.start(server)
    assert sessions[2].round is kept_out


def test_an_order_that_is_not_taken_waits_in_front(queue: Queue) -> None:
    server = Server(room=1)
    first, second, third = (queue.add(session(one_shot=True)) for _ in range(3))
    assert queue.start(server) == []
    assert list(queue.waiting) == [second, third] and second.session.child is None and second.tries == 0
    assert first.tries == 1 and queue.num_running == 1


def test_who_cannot_be_started_is_named(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object) -> None:
        raise OSError(12, "no memory")

    monkeypatch.setattr("thyme.sandbox.round_queue.ChildHandle", no_memory)
    round_ = queue.add(session())
    assert queue.start(Server()) == [(round_, "the sandbox is out of resources: [Errno 12] no memory")]
    assert not queue.waiting and queue.num_running == 0


def test_a_session_that_starts_afresh_is_told(queue: Queue) -> None:
    server, state = Server(), session()
    first = queue.add(state)
    queue.start(server)
    child = queue.forget(state)
    assert child is not None and queue.num_running == 0 and queue.forget(state) is None
    child.close()
    second = queue.add(state)
    queue.start(server)
    assert (first.restarted, second.restarted) == (False, True)
    assert [order["id"] for order in server.orders] == ["1", "2"]


def test_taking_back(queue: Queue) -> None:
    one, other = session(), session()
    a, b, c = queue.add(one), queue.add(other), queue.add(one)
    assert queue.take_back(b) and not queue.take_back(b)
    assert queue.take_back_all(other) == []
    assert queue.take_back_all(one) == [a, c] and not queue.waiting
    d = queue.add(other)
    assert queue.take_back_all() == [d] and not queue.waiting


def test_deadlines(queue: Queue) -> None:
    """A running round's own; a look at idle ones; soon where something waits that may run."""
    now, state = 1000.0, session()
    assert queue.next_deadline(now) > now + 1000
    round_ = queue.add(state)
    assert queue.next_deadline(now) == now + 0.01
    queue.start(Server())
    round_.deadline = now + 5
    assert queue.next_deadline(now) == now + 5
    queue.end_round(state)
    assert state.child is not None
    state.child.idle_since = now
    assert queue.next_deadline(now) == now + 1.0
    state.child.idle_since = now - CONFIG.idle_s + 0.5
    assert queue.next_deadline(now) == now + 0.5
