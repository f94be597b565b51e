"""Many at once, those who leave, and those who are slow: nothing is lost, nothing stays behind, memory is flat."""

import gc
import json
import os
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.sandbox.host import eventually
from tests.serve.served import Served, asked
from thyme.data.rows import Demonstration
from thyme.engine import Engine, EngineConfig, SamplingParams
from thyme.model import ImageInputs, Model
from thyme.sandbox import Sandbox
from thyme.serve.chat import Message, question_of
from thyme.serve.config import ServeConfig
from thyme.serve.requests import Asked
from thyme.serve.ticket import Ticket

COMPLETE = "/v1/completions"
EVERYONE = 200
SECONDS = 120.0
"""Of the soak."""


def test_two_hundred_at_once_each_get_their_own(toy: Model) -> None:
    """As many tokens as their number says, drawn from their seed; half of them as streams."""

    def one(number: int) -> tuple[int, list[int], str]:
        said = {"prompt": [4 + number % 50, 5], "max_tokens": 1 + number % 4, "seed": number, "return_token_ids": True}
        if number % 2:
            status, answer = served.ask("POST", COMPLETE, said)
            return status, answer["choices"][0]["token_ids"], answer["choices"][0]["text"]
        status, text = served.ask("POST", COMPLETE, said | {"stream": True})
        events = [line.removeprefix("data: ") for line in text.splitlines() if line]
        assert events.pop() == "[DONE]"
        choices = [json.loads(event)["choices"][0] for event in events]
        return status, [i for c in choices for i in c["token_ids"]], "".join(c["text"] for c in choices)

    sizes = EngineConfig(max_sequences=64, num_blocks=256, max_context=64, quiet=True)
    with Served(toy, engine=sizes) as served, ThreadPoolExecutor(EVERYONE) as pool:
        answers = list(pool.map(one, range(EVERYONE)))
        assert eventually(served.idle)
        stats = served.engine.stats()
    assert {status for status, _, _ in answers} == {200}
    assert stats["steps"] < stats["sampled_tokens"] / 2, "they were not decoded together"
    engine = Engine(toy, sizes)
    fixed: dict[str, Any] = {"adaptive": False, "stop_at_tags": False, "repetition": None}
    prompts = [[4 + number % 50, 5] for number in range(EVERYONE)]
    params = [SamplingParams(max_tokens=1 + number % 4, seed=number, **fixed) for number in range(EVERYONE)]
    for (_, ids, text), completion in zip(answers, engine.generate(prompts, params), strict=True):
        assert ids == completion.token_ids
        assert text == b"".join(map(engine.reader.token_bytes, ids)).decode(errors="replace")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_midway_frees_its_place(served: Served, stream: bool) -> None:
    before = served.server.metrics.disconnects
    said = {"prompt": "a", "max_tokens": 1900, "stream": stream, "n": 4, "ignore_eos": True}
    with served.start(COMPLETE, said) as opened:
        if stream:
            assert opened.recv(200).startswith(b"HTTP/1.1 200")
        assert eventually(lambda: served.engine.stats()["running"] == 4)
    assert eventually(served.idle, 20), "its sequences go on"
    assert served.server.metrics.disconnects == before + 1
    assert served.engine.stats()["blocks_used"] == 0


def test_a_slow_reader_holds_nobody_up_and_gets_everything(served: Served) -> None:
    said = {"prompt": "a", "max_tokens": 60, "stream": True, "seed": 1, "ignore_eos": True, "return_token_ids": True}
    whole = served.ask("POST", COMPLETE, said | {"stream": False})[1]["choices"][0]["token_ids"]
    with served.start(COMPLETE, said) as slow:
        slow.recv(10)
        for _ in range(3):
            assert served.ask("POST", COMPLETE, {"prompt": "b", "max_tokens": 2})[0] == 200
        assert eventually(lambda: not served.thread.num_open, 60), "it is decoded whether it reads or not"
        received = bytearray()
        while chunk := slow.recv(512):
            received += chunk
            if received.endswith(b"0\r\n\r\n"):
                break
    events = [line[6:] for line in received.decode().splitlines() if line.startswith("data: {")]
    assert [token for event in events for token in json.loads(event)["choices"][0]["token_ids"]] == whole


def test_a_reader_that_takes_nothing_is_left(toy: Model) -> None:
    made = Served(toy, limits=ServeConfig(stall_timeout_s=0.3))
    made._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # its connections' too
    with made as served:
        opened = socket.socket()
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        opened.connect(("127.0.0.1", served.port))
        said = {"prompt": "a", "max_tokens": 1900, "n": 8, "stream": True, "ignore_eos": True, "logprobs": 0}
        raw = json.dumps(said | {"return_token_ids": True}).encode()
        opened.sendall(f"POST {COMPLETE} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(raw)}\r\n\r\n".encode() + raw)
        assert eventually(lambda: served.engine.stats()["running"] > 0)
        assert eventually(served.idle, 60)
        assert served.server.metrics.disconnects == 1 and served.engine.stats()["sampled_tokens"] < 8 * 1900
        opened.close()


def test_a_request_that_is_over_is_kept_by_nobody(tooled: Served, row: Demonstration) -> None:
    """Not even until the collector of circles runs: a request may hold tens of MiB of pictures."""
    assert row.question.image is not None
    messages = asked(row.question.question, row.question.image)
    chat: dict[str, Any] = {"messages": messages, "temperature": 0, "max_tokens": 8}
    gc.collect()
    gc.disable()
    try:
        assert tooled.ask("POST", "/v1/chat/completions", chat)[0] == 200
        assert tooled.ask("POST", "/v1/chat/completions", chat | {"stream": True})[0] == 200
        assert tooled.ask("POST", "/v1/chat/completions", chat | {"messages": asked("a" * 9000)})[0] == 400
        with tooled.start("/v1/chat/completions", chat | {"max_tokens": 150, "stream": True}) as opened:
            opened.recv(50)
        assert eventually(tooled.idle)
        assert eventually(lambda: not [x for x in gc.get_objects() if type(x) in (Asked, Ticket, ImageInputs)], 3)
    finally:
        gc.enable()


@pytest.mark.soak
def test_sixty_four_clients_for_two_minutes(taught: Model, sandbox: Sandbox, row: Demonstration) -> None:
    """Chats with pictures and code, completions, streams, some of which leave midway: every answer is the right one,
    and once it is warm the process holds no more memory at the end than in the middle."""
    assert row.question.image is not None
    question = question_of([Message("user", (row.question.image, row.question.question))], "q")
    messages = asked(question.question, row.question.image)
    pictures = [Image.new("RGB", (84, 84), (i, 0, 0)) for i in range(4)]
    counts: Counter[str] = Counter()
    wrong: list[Any] = []
    lock = threading.Lock()
    sizes = EngineConfig(max_sequences=32, num_blocks=512, max_context=512, image_cache_bytes=8 << 20, quiet=True)
    with Served(taught, sandbox, engine=sizes) as served:

        def one(number: int, turn: int) -> tuple[str, bool]:
            kind = ("chat", "stream", "ids", "picture", "leave")[(number + turn) % 5]
            if kind == "chat":
                status, answer = served.ask("POST", "/v1/chat/completions", {"messages": messages, "temperature": 0})
                return kind, status == 200 and answer["choices"][0]["message"]["content"] == row.question.solution
            if kind == "ids":
                said = {"prompt": [5, 6], "max_tokens": 8, "seed": number, "return_token_ids": True, "n": 2}
                status, answer = served.ask("POST", COMPLETE, said)
                return kind, status == 200 and answer["usage"]["completion_tokens"] >= 2 and len(answer["choices"]) == 2
            if kind == "picture":
                said = {"messages": asked("a", pictures[turn % 4]), "max_tokens": 8, "run_code": False, "stream": True}
                status, text = served.ask("POST", "/v1/chat/completions", said)
                return kind, status == 200 and text.endswith("data: [DONE]\n\n")
            said = {"prompt": "a", "max_tokens": 60, "stream": True, "seed": number, "ignore_eos": True}
            if kind == "leave":
                with served.start(COMPLETE, said) as opened:
                    return kind, opened.recv(50).startswith(b"HTTP/1.1 200")
            status, text = served.ask("POST", COMPLETE, said)
            events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
            return kind, status == 200 and events[-1]["choices"][0]["finish_reason"] == "length"

        def client(number: int) -> None:
            turn = 0
            while time.monotonic() < until:
                kind, is_right = one(number, turn)
                turn += 1
                with lock:
                    counts[kind] += 1
                    if not is_right:
                        wrong.append((number, turn, kind))

        memory: list[int] = []
        until = time.monotonic() + SECONDS
        with ThreadPoolExecutor(64) as pool:
            clients = [pool.submit(client, number) for number in range(64)]
            while time.monotonic() < until:
                time.sleep(SECONDS / 24)
                memory.append(_resident())
            for each in clients:
                each.result()
        assert eventually(served.idle, 30)
        stats = served.engine.stats()
        sessions = served.thread._executor._sessions  # type: ignore[union-attr]
    gc.collect()
    print(f"\n{dict(counts)}, {sum(counts.values())} requests, {stats['sampled_tokens']} tokens; MiB: {memory}")
    assert not wrong and not sessions and stats["blocks_used"] == 0
    assert set(counts) == {"chat", "stream", "ids", "picture", "leave"} and sum(counts.values()) > 300
    third = len(memory) // 3
    assert max(memory[2 * third :]) < 1.1 * max(memory[third : 2 * third]), "it grows"


def _resident() -> int:
    """Of this process, in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20
