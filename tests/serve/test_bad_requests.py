"""Every bad request is answered with a status and a reason, and the server goes on."""

import http.client
import json
import socket
import struct
import zlib
from base64 import b64encode
from typing import Any

import openai
import pytest
from PIL import Image

from tests.sandbox.host import eventually
from tests.serve.served import NAME, Served, asked, data_uri
from thyme.model import Model
from thyme.serve.config import ServeConfig
from thyme.serve.server import is_loopback, open_socket

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
SMALL = ServeConfig(
    max_requests=2,
    max_body_mib=1,
    max_pictures=2,
    max_picture_pixels=10_000,
    max_request_pixels=15_000,
    body_timeout_s=0.5,
)


@pytest.fixture(scope="module")
def guarded(toy: Model) -> Any:
    """A server with small limits and a key."""
    with Served(toy, limits=SMALL, api_key="secret") as opened:
        yield opened


KEY = {"authorization": "Bearer secret"}


def chat(**changes: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1} | changes


def content(*parts: Any) -> dict[str, Any]:
    return chat(messages=[{"role": "user", "content": list(parts)}])


def image(url: Any) -> dict[str, Any]:
    return content({"type": "image_url", "image_url": url})


def huge_png(width: int, height: int) -> str:
    """A file of some bytes that says it is a picture of many pixels."""
    file = b"\x89PNG\r\n\x1a\n"
    for chunk in (b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b"\0" * 9)):
        file += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return f"data:image/png;base64,{b64encode(file).decode()}"


BAD: list[tuple[str, Any, int, str]] = [
    (CHAT, b"", 400, "not JSON"),
    (CHAT, b"{", 400, "not JSON"),
    (CHAT, b"\xff\xfe", 400, "not JSON"),
    (CHAT, b'{"temperature": NaN}', 400, "NaN"),
    (CHAT, b"[" * 100_000, 400, "nested too deeply"),
    (CHAT, b"[]", 400, "JSON object, it is a list"),
    (CHAT, b'{"seed": ' + b"9" * 5000 + b"}", 400, "not JSON"),
    (CHAT, {}, 422, "messages: the last one must be the user's"),
    (CHAT, chat(messages="a"), 422, "messages: expected a list of objects, got a string"),
    (CHAT, chat(messages=["a"]), 422, "messages[0]: expected objects, got a string"),
    (CHAT, chat(messages=[{"role": "king", "content": "a"}]), 422, "messages[0].role: 'king' must be one of"),
    (CHAT, chat(messages=[{"role": "user"}]), 422, "messages[0].content: expected a string or a list"),
    (CHAT, chat(messages=[{"role": "user", "content": "a", "colour": 1}]), 422, "messages[0].colour: unknown field"),
    (CHAT, chat(messages=[{"role": "user", "content": "a", "tool_calls": [{}]}]), 422, "tool_calls: not supported"),
    (CHAT, chat(messages=[{"role": "assistant", "content": "a"}]), 422, "last one must be the user's"),
    (CHAT, content({"type": "text"}), 422, "messages[0].content[0].text: missing"),
    (CHAT, content({"type": "text", "text": 1}), 422, "content[0].text: expected a string, got an integer"),
    (CHAT, content({"type": "text", "text": "a", "weight": 2}), 422, "content[0].weight: unknown field"),
    (CHAT, content({"type": "input_audio"}), 422, "'input_audio' is not supported"),
    (CHAT, content(3), 422, "content[0]: expected an object, got an integer"),
    (CHAT, image({"url": "", "max_pixels": 9}), 422, "content[0].image_url.max_pixels: unknown field"),
    (CHAT, image(None), 422, "image_url: expected"),
    (CHAT, image({"url": "https://example.com/a.png"}), 400, "nothing is fetched"),
    (CHAT, image({"url": "file:///etc/passwd"}), 400, "no file is read"),
    (CHAT, image({"url": "data:image/png;base64,***"}), 400, "not base64"),
    (CHAT, image({"url": "data:image/png;base64,aGVsbG8="}), 400, "no picture that pillow reads"),
    (CHAT, image({"url": data_uri(Image.effect_noise((90, 90), 9))[:4022]}), 400, "give an intact picture"),
    (CHAT, image({"url": data_uri(Image.new("L", (9999, 1)))}), 400, "aspect"),
    (CHAT, image({"url": huge_png(101, 100)}), 413, "101x100 is 10100 pixels, at most 10000"),
    (CHAT, image({"url": huge_png(60_000, 60_000)}), 413, "pixels"),
    (CHAT, content(*[{"type": "image_url", "image_url": data_uri(Image.new("L", (30, 30)))}] * 3), 413, "more than 2"),
    (
        CHAT,
        content(*[{"type": "image_url", "image_url": data_uri(Image.new("L", (90, 90)))}] * 2),
        413,
        "content[1].image_url: 90x90 with those before it is 16200 pixels, at most 15000",
    ),
    (CHAT, chat(model="gpt"), 404, "'gpt' is not here: 'toy' is"),
    (CHAT, chat(model=7), 422, "model: expected a string, got an integer"),
    (CHAT, chat(temperature="hot"), 422, "temperature: expected a number, got a string"),
    (CHAT, chat(temperature=True), 422, "temperature: expected a number, got a boolean"),
    (CHAT, chat(temperature=-1), 422, "temperature: -1 must lie in 0..100"),
    (CHAT, chat(temperature=10**400), 422, "temperature"),
    (CHAT, chat(top_p=0), 422, "top_p: 0 leaves no token"),
    (CHAT, chat(max_tokens=0), 422, "max_tokens: 0 must be >= 1"),
    (CHAT, chat(max_tokens=1.5), 422, "max_tokens: expected an integer, got a number"),
    (CHAT, chat(n=9), 422, "n: 9 choices, at most 8"),
    (CHAT, chat(seed=1 << 70), 422, "seed"),
    (CHAT, chat(stop=[""]), 422, "stop: at most 16 texts, none empty"),
    (CHAT, chat(stop=[1]), 422, "stop[0]: expected strings"),
    (CHAT, chat(stream="yes"), 422, "stream: expected true or false"),
    (CHAT, chat(stream_options=[1]), 422, "stream_options: expected an object"),
    *((CHAT, chat(stream_options=said), 422, "stream_options: expected an object") for said in (0, "", False, [])),
    (CHAT, chat(stream_options={"chunks": 1}), 422, "stream_options.chunks: unknown field"),
    (CHAT, chat(top_logprobs=5), 422, "top_logprobs: only the log-prob of the drawn token"),
    (CHAT, chat(reasoning_effort="high"), 422, "reasoning_effort: not supported here"),
    (CHAT, chat(presence_penalty=1), 422, "presence_penalty: not supported here"),
    (CHAT, chat(response_format={"type": "json_object"}), 422, "response_format: not supported here"),
    (CHAT, chat(tools=[{"type": "function"}]), 422, "tools: not supported here"),
    (CHAT, chat(run_code=True), 422, "run_code: this server opens no sandbox"),
    (CHAT, chat(max_token=3), 422, "max_token: unknown field: did you mean 'max_tokens'?"),
    (CHAT, chat(messages=[{"role": "user", "content": "a" * 9000}]), 400, "must fit into"),
    (COMPLETE, {}, 422, "prompt: expected a string"),
    (COMPLETE, {"prompt": []}, 422, "prompt: expected a string"),
    (COMPLETE, {"prompt": [[]]}, 422, "prompt[0]: expected text or token ids, and not empty"),
    (COMPLETE, {"prompt": [1, "a"]}, 422, "prompt[0]: token ids are integers"),
    (COMPLETE, {"prompt": [1, 10**6]}, 422, "token ids are integers in 0.."),
    (COMPLETE, {"prompt": ["a"] * 257}, 422, "257 prompts"),
    (COMPLETE, {"prompt": ["a"] * 200, "n": 6}, 422, "n: 6 choices for each of 200 prompts"),
    (COMPLETE, {"prompt": "\ud800"}, 400, "surrogates not allowed"),
    (COMPLETE, {"prompt": "<|image_pad|>"}, 400, "image ids"),
    (COMPLETE, {"prompt": "a", "images": ["x"]}, 400, "images[0]"),
    (COMPLETE, {"prompt": ["a", "b"], "images": ["x"]}, 422, "pictures go with one prompt"),
    (COMPLETE, {"prompt": "a", "echo": True}, 422, "echo: not supported here"),
    (COMPLETE, {"prompt": "a", "logprobs": 5}, 422, "logprobs: 5: only"),
    (COMPLETE, {"prompt": "a", "stop_token_ids": [-1]}, 422, "stop_token_ids"),
    ("/v1/nothing", {}, 404, "no such path"),
]


def test_each_is_told_what_is_wrong_and_the_server_goes_on(guarded: Served) -> None:
    told = []
    for path, body, status, words in BAD:
        got, answer = guarded.ask("POST", path, body, KEY)
        error = answer.get("error", {}) if isinstance(answer, dict) else {}
        fine = got == status and words in error.get("message", "") and error.get("type")
        told += [] if fine else [(path, body if len(str(body)) < 200 else "...", status, words, got, answer)]
    assert not told
    assert guarded.ask("POST", CHAT, chat(), KEY)[0] == 200
    assert eventually(guarded.idle)


def test_methods_and_foreign_pages_are_refused(guarded: Served) -> None:
    status, answer = guarded.ask("GET", CHAT, None, KEY)
    assert status == 405 and "GET is not for" in answer["error"]["message"]
    status, answer = guarded.ask("POST", CHAT, chat(), KEY | {"origin": "https://evil.example"})
    assert status == 403 and "evil.example" in answer["error"]["message"]
    assert guarded.ask("POST", CHAT, chat(), KEY | {"origin": "http://[::1"})[0] == 403
    here = {"origin": f"http://127.0.0.1:{guarded.port}"}
    assert guarded.ask("POST", CHAT, chat(), KEY | here)[0] == 200


def test_a_name_that_another_site_lets_lead_here_is_refused_where_no_key_is_asked_for(
    guarded: Served, served: Served
) -> None:
    evil = {"origin": "http://evil.example:80", "host": "evil.example:80"}
    assert guarded.ask("POST", CHAT, chat(), KEY | evil)[0] == 200, "it has the key: a name of its owner's"
    status, answer = served.ask("POST", "/pause", {"mode": "keep"}, evil)
    assert status == 403 and "evil.example" in answer["error"]["message"] and not served.engine.is_paused
    for host in (f"localhost:{served.port}", f"[::1]:{served.port}"):
        assert served.ask("POST", CHAT, chat(), {"origin": f"http://{host}", "host": host})[0] == 200


def test_a_key_is_asked_for_everywhere_but_at_health(guarded: Served) -> None:
    for path in ("/v1/models", "/metrics", "/is_paused", CHAT, "/nothing"):
        status, answer = guarded.ask("GET", path)
        assert status == 401 and "Authorization: Bearer" in answer["error"]["message"]
    assert guarded.ask("GET", "/v1/models", None, {"authorization": "Bearer wrong"})[0] == 401
    assert guarded.ask("GET", "/v1/models", None, {"authorization": "Bearer s\xe9cret"})[0] == 401
    assert guarded.ask("GET", "/health")[0] == 200
    with pytest.raises(openai.AuthenticationError):
        guarded.client("wrong").models.list()
    assert [model.id for model in guarded.client("secret").models.list()] == [NAME]


def test_the_clients_own_errors_are_raised(guarded: Served) -> None:
    client = guarded.client("secret")
    with pytest.raises(openai.NotFoundError, match="'gpt' is not here"):
        client.chat.completions.create(model="gpt", messages=asked("a"))
    with pytest.raises(openai.UnprocessableEntityError, match="n: 99"):
        client.chat.completions.create(model=NAME, messages=asked("a"), n=99)
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=NAME, messages=asked("a" * 9000))
    assert refused.value.code == "context_length_exceeded"


def test_a_long_body_is_cut_off_as_announced_and_as_it_comes(guarded: Served) -> None:
    status, answer = guarded.ask("POST", CHAT, b" " * ((1 << 20) + 1), KEY)
    assert status == 413 and answer["error"]["code"] == "body_too_large"
    connection = http.client.HTTPConnection("127.0.0.1", guarded.port, timeout=30)
    chunks = (b" " * 65536 for _ in range(17))
    connection.request("POST", CHAT, chunks, KEY, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


def test_a_body_that_does_not_come_is_not_waited_for(guarded: Served) -> None:
    with socket.create_connection(("127.0.0.1", guarded.port), timeout=30) as opened:
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer secret\r\ncontent-length: 100\r\n\r\n"
        opened.sendall(head.encode() + b"{")
        assert opened.recv(100).startswith(b"HTTP/1.1 408")
    assert eventually(guarded.idle)


def test_more_requests_than_there_is_room_for_are_told_to_come_again(guarded: Served) -> None:
    guarded.thread.pause("keep").result(10)
    try:
        opened = [guarded.start(CHAT, chat(), KEY) for _ in range(2)]
        assert eventually(lambda: guarded.thread.num_open == 2)
        connection = http.client.HTTPConnection("127.0.0.1", guarded.port, timeout=30)
        connection.request("POST", CHAT, json.dumps(chat()).encode(), KEY)
        refused = connection.getresponse()
        assert refused.status == 429 and refused.headers["retry-after"] == "1"
        connection.close()
    finally:
        guarded.thread.resume().result(10)
    for one in opened:
        assert one.recv(100).startswith(b"HTTP/1.1 200")
        one.close()
    assert eventually(guarded.idle) and guarded.ask("POST", CHAT, chat(), KEY)[0] == 200


def test_a_step_that_fails_costs_its_requests_and_no_others(toy: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with Served(toy) as served:
        launch = served.engine.runner.launch
        monkeypatch.setattr(served.engine.runner, "launch", lambda *_: 1 / 0)
        status, answer = served.ask("POST", CHAT, chat())
        assert status == 500 and "ZeroDivisionError" in answer["error"]["message"]
        status, answer = served.ask("GET", "/health")
        assert status == 503 and "ZeroDivisionError" in answer["error"]["message"]
        monkeypatch.setattr(served.engine.runner, "launch", launch)
        assert served.ask("POST", CHAT, chat())[0] == 200 and served.ask("GET", "/health")[0] == 200
        assert eventually(served.idle)


def test_on_its_way_down_it_says_so_and_ends_what_is_open(toy: Model) -> None:
    with Served(toy, limits=ServeConfig(drain_timeout_s=1.0)) as served:
        served.thread.pause("keep").result(10)
        opened = served.start(CHAT, chat())
        assert eventually(lambda: served.thread.num_open == 1)
        served.server.is_leaving = True
        assert served.ask("POST", CHAT, chat())[0] == 503 and served.ask("GET", "/health")[0] == 503
    with opened:
        assert b" 200 " not in opened.recv(100)
    assert not served.thread._thread.is_alive()
    with pytest.raises(ConnectionRefusedError):
        served.ask("GET", "/health")


def test_a_port_that_is_taken_is_said_in_one_line() -> None:
    with open_socket("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(ValueError, match=r"cannot be listened on .*choose another --port"):
            open_socket("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(ValueError, match=r"nowhere\.invalid"):
        open_socket("nowhere.invalid", 80)
    assert [is_loopback(h) for h in ("127.0.0.1", "localhost", "::1", "0.0.0.0", "10.0.0.1")] == [1, 1, 1, 0, 0]
