"""`thyme serve` as a process: it says where it listens, answers, and ends with a signal, leaving nothing behind."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from thyme.cli import main

SMALL = (
    *("--threads", "1", "--engine.num-blocks", "100", "--engine.max-sequences", "4", "--engine.max-context", "1400"),
    *("--sandbox.workers", "1", "--sandbox.memory-mib", "256", "--engine.quiet"),
)


@pytest.fixture(params=["demo_checkpoint", pytest.param("hub_folder", marks=pytest.mark.soak)])
def model(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def post(url: str, body: Any, key: str) -> Any:
    headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=60) as answer:
        return json.load(answer)


def test_it_serves_any_model_until_a_signal(model: Path, tmp_path: Path) -> None:
    stop = signal.SIGINT if model.name == "rl" else signal.SIGTERM
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    server = subprocess.Popen(
        [sys.executable, "-m", "thyme", "serve", model, "--port", "0", *SMALL],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(Path(__file__).parents[2]), "THYME_API_KEY": "k"},
        start_new_session=True,
    )
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        assert line.startswith(f"serving {model.name}: http://127.0.0.1:"), server.communicate()[1]
        url = line.split()[-1]
        said = {"model": model.name, "messages": [{"role": "user", "content": "What digit?"}], "max_tokens": 3}
        answer = post(f"{url}/chat/completions", said, "k")
        assert answer["usage"]["completion_tokens"] >= 1 and answer["choices"][0]["trace"]["rounds"]
        server.send_signal(stop)
        out, err = server.communicate(timeout=30)
    finally:
        server.kill()
    assert err == "" and out == ("stopped\n" if stop is signal.SIGINT else "") and server.returncode == 0
    assert not list(tmp_path.iterdir()), "it writes nothing where it is run"
    with pytest.raises(ProcessLookupError):
        os.killpg(server.pid, 0)  # its sandbox is gone too


def test_what_is_wrong_is_said_in_one_line(demo_checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for args, words in (
        (("nowhere",), "no such folder"),
        ((str(demo_checkpoint), "--port", "70000"), "port: 70000"),
        ((str(demo_checkpoint), "--host", "nowhere.invalid"), "cannot be listened on"),
        ((str(demo_checkpoint), "--serve.max-pictures", "99"), "max_pictures: 99 must be at most 32"),
        ((str(demo_checkpoint), "--serve.max-requests", "0"), "max_requests: 0"),
        ((), "MODEL missing"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["serve", *args])
        err = capfd.readouterr().err
        assert ended.value.code == 2 and err.count("\n") == 1 and words in err, err
