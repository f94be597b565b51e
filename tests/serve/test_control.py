"""What training loops do with a running server: pause, sleep, new weights."""

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.sandbox.host import eventually
from tests.serve.served import Served
from thyme.engine import Engine, EngineConfig, SamplingParams
from thyme.model import Model, Processor, build, save
from thyme.toy.model import tiny_config

COMPLETE = "/v1/completions"
SAID: dict[str, Any] = {"prompt": [5, 6, 7], "max_tokens": 20, "temperature": 0, "return_token_ids": True}


@pytest.fixture(scope="module")
def weights(processor: Processor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another toy's."""
    folder = tmp_path_factory.mktemp("weights") / "other"
    save(build(tiny_config(), processor, seed=1), processor, folder)
    return folder


def greedy(model: Model) -> list[int]:
    params = SamplingParams(
        max_tokens=20, temperature=0, adaptive=False, stop_at_tags=False, repetition=None, ignore_eos=True
    )
    return (
        Engine(model, EngineConfig(num_blocks=64, max_sequences=4, quiet=True)).generate([5, 6, 7], params)[0].token_ids
    )


@contextmanager
def midway(served: Served, said: dict[str, Any], **pause: Any) -> Iterator[socket.socket]:
    """A request that is paused after its tenth token, whatever the machine does meanwhile."""
    real, gate, steps = served.engine.step, threading.Event(), 0

    def step() -> Any:
        nonlocal steps
        steps += 1
        if steps == 10:
            assert gate.wait(30)
        return real()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(served.engine, "step", step)  # before there is anything to decode
        with served.start(COMPLETE, said) as opened, ThreadPoolExecutor(1) as pool:
            assert eventually(lambda: steps == 10)
            paused = pool.submit(served.ask, "POST", "/pause", pause)
            assert eventually(lambda: not served.thread._inbox.empty())
            gate.set()
            status, state = paused.result()
            assert status == 200 and state["is_paused"]
            yield opened


def answer_of(opened: socket.socket) -> Any:
    """The whole answer, in however many pieces it comes."""
    with http.client.HTTPResponse(opened) as response:
        response.begin()
        return json.load(response)


def test_what_is_paused_goes_on_where_it_was(served: Served, toy: Model) -> None:
    said = SAID | {"ignore_eos": True, "max_tokens": 40}
    whole = served.ask("POST", COMPLETE, said)[1]["choices"][0]["token_ids"]
    with midway(served, said) as opened:
        assert not served.idle()
        assert served.ask("GET", "/is_paused")[1] == {"is_paused": True}
        steps = served.engine.stats()["steps"]
        assert served.ask("POST", "/sleep?level=1")[1]["is_sleeping"]
        assert served.engine.stats()["kv_bytes"] == 0
        status, refused = served.ask("POST", COMPLETE, said)
        assert status == 503 and "POST /wake_up" in refused["error"]["message"]
        status, refused = served.ask("POST", "/resume")
        assert status == 400 and "wake it first" in refused["error"]["message"]
        status, refused = served.ask("POST", "/wake_up?tags=cache")
        assert status == 422 and "tags: 'cache' must be one of kv_cache, weights" in refused["error"]["message"]
        assert served.ask("POST", "/wake_up?tags=weights")[1]["is_sleeping"]
        assert served.ask("POST", "/wake_up?tags=kv_cache&tags=weights")[1]["is_sleeping"] is False
        assert served.ask("GET", "/is_sleeping")[1] == {"is_sleeping": False}
        assert served.engine.stats()["steps"] == steps
        assert served.ask("POST", "/resume")[1]["is_paused"] is False
        assert answer_of(opened)["choices"][0]["token_ids"] == whole


def test_requests_that_come_while_it_is_paused_wait(served: Served) -> None:
    assert served.ask("POST", "/pause", {"mode": "wait"})[0] == 200
    with served.start(COMPLETE, SAID) as opened:
        assert eventually(lambda: served.thread.num_open == 1)
        assert served.ask("POST", "/resume")[0] == 200
        assert opened.recv(100).startswith(b"HTTP/1.1 200")


def test_a_pause_waits_for_what_is_under_way_or_ends_it(served: Served) -> None:
    said = SAID | {"ignore_eos": True, "max_tokens": 40}
    with midway(served, said, mode="wait") as opened:
        assert served.thread.num_open == 0, "it did not wait"
        assert answer_of(opened)["usage"]["completion_tokens"] == 40
    served.ask("POST", "/resume")
    with midway(served, said, mode="abort") as opened:
        partial = answer_of(opened)
        assert partial["choices"][0]["finish_reason"] == "abort" and partial["usage"]["completion_tokens"] == 10
    served.ask("POST", "/resume")


def test_new_weights_are_used_at_once_and_their_tokens_say_so(processor: Processor, weights: Path) -> None:
    model = build(tiny_config(), processor, seed=0)
    with Served(model) as served:
        said = SAID | {"ignore_eos": True}
        before = served.ask("POST", COMPLETE, said)[1]["choices"][0]
        status, state = served.ask("POST", "/update_weights", {"model": str(weights)})
        assert (status, state["weight_version"]) == (200, 1)
        after = served.ask("POST", COMPLETE, said)[1]["choices"][0]
    other = build(tiny_config(), processor, seed=1)
    assert after["token_ids"] == greedy(other) != before["token_ids"]
    assert set(before["token_records"]["weight_versions"]) == {0}
    assert set(after["token_records"]["weight_versions"]) == {1}
    assert torch.equal(model.lm_head_weight, other.lm_head_weight)


def test_weights_of_another_model_change_nothing(served: Served, toy: Model, weights: Path, tmp_path: Path) -> None:
    before = toy.lm_head_weight.clone()
    config = json.loads((weights / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text((weights / "config.json").read_text())
    (tmp_path / "damaged" / "generation_config.json").write_text((weights / "generation_config.json").read_text())
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"12345678{")
    for body, status, words in (
        ({"model": str(tmp_path / "nowhere")}, 400, "no model folder"),
        ({"model": str(tmp_path)}, 400, "is another model"),
        ({"model": str(tmp_path / "damaged")}, 400, "damaged safetensors"),
        ({"model": 3}, 422, "expected a string"),
        ({"folder": "x"}, 422, "folder: unknown field"),
        ({}, 422, "model: missing"),
    ):
        got, answer = served.ask("POST", "/update_weights", body)
        assert got == status and words in answer["error"]["message"], answer
    assert torch.equal(toy.lm_head_weight, before) and served.engine.weight_version == 0
    for path, body in (("/pause", {"mode": "softly"}), ("/sleep", {"level": 2}), ("/resume", {"now": True})):
        assert served.ask("POST", path, body)[0] == 422
    assert served.ask("POST", "/sleep?level=2")[0] == 422
    assert not served.engine.is_paused and not served.engine.is_asleep


def test_beyond_this_machine_and_without_a_key_nobody_controls_it(toy: Model) -> None:
    with Served(toy, control=False) as served:
        for method, path in (("POST", "/pause"), ("POST", "/update_weights"), ("GET", "/is_paused")):
            status, answer = served.ask(method, path, {"model": "x"} if method == "POST" else None)
            assert status == 403 and "THYME_API_KEY" in answer["error"]["message"]
        assert served.ask("POST", COMPLETE, SAID)[0] == 200
