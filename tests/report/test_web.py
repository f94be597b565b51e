"""The server: who may ask, what it answers to nonsense, and that it ends well."""

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.report.conftest import Serve
from thyme.report.view_app import view_app
from thyme.report.web import serve as serve_until_told
from thyme.verbs.spelling import open_run

ROOT = Path(__file__).parents[2]


def asked(address: str, **headers: str) -> tuple[int, str, dict[str, str]]:
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=30) as answer:
            return answer.status, answer.read().decode(errors="replace"), dict(answer.headers)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode(errors="replace"), dict(error.headers)


def test_another_name_for_this_machine_is_refused(serve: Serve, small: Path) -> None:
    address = serve(view_app({"a": open_run(small)}))
    assert asked(address)[0] == 200
    assert asked(address, Host="evil.example")[0] == 400
    assert asked(f"{address}api/runs", Host="evil.example:80")[0] == 400


def test_every_answer_forbids_foreign_scripts(serve: Serve, small: Path) -> None:
    address = serve(view_app({"a": open_run(small)}))
    for path in ("", "api/runs", "static/view.js", "picture/a/x"):
        headers = asked(address + path)[2]
        assert "script-src 'self'" in headers["content-security-policy"], path
        assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("api/c/metrics", 404, "there is no c"),
        ("api/a/table/step_77", 404, "there is no step_77"),
        ("api/a/table/..%2F..%2Fetc%2Fpasswd", 404, ""),
        ("api/a/rollout/step_0/99", 404, "there is no 99"),
        ("api/a/rollout/step_0/x", 404, ""),
        ("picture/a/..%2F..%2Fconfig.toml", 404, ""),
        ("picture/a/config", 400, "64 hexadecimal digits"),
        (f"picture/a/{'0' * 64}", 404, "is missing"),
        ("picture/a/config?size=7", 400, "one of 160, 480"),
        ("picture/a/config?size=x", 400, ""),
        ("static/../page.py", 404, ""),
        ("static/page.py", 404, ""),
        ("nothing", 404, ""),
    ],
)
def test_nonsense_is_answered(path: str, status: int, words: str, serve: Serve, small: Path) -> None:
    answer = asked(serve(view_app({"a": open_run(small)})) + path)
    assert answer[0] == status and words in answer[1], answer


def test_pictures_are_small_where_small_ones_are_asked_for(serve: Serve, small: Path) -> None:
    address = serve(view_app({"a": open_run(small)}))
    row = json.loads(asked(f"{address}api/a/rollout/step_0/1")[1])
    name = row["question"]["pictures"][0]["name"]
    whole, thumb = (urllib.request.urlopen(f"{address}picture/a/{name}{end}") for end in ("", "?size=160"))
    with whole, thumb:
        from PIL import Image

        assert Image.open(whole).size == (320, 200) and Image.open(thumb).size == (160, 100)


def test_a_port_that_is_taken_is_said(small: Path, serve: Serve) -> None:
    app = view_app({"a": open_run(small)})
    port = int(serve(app).rstrip("/").rpartition(":")[2])
    with pytest.raises(ValueError, match=rf"port {port} of 127.0.0.1 cannot be taken .*--port 0 takes a free one"):
        serve_until_told(app, "it", host="127.0.0.1", port=port, opens_browser=False)


def test_the_verb_serves_and_ends_at_ctrl_c(small: Path) -> None:
    command = [sys.executable, "-m", "thyme", "view", str(small), "--port", "0", "--browser", "false"]
    environment = {**{n: v for n, v in os.environ.items() if not n.startswith("PYTEST")}, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        try:
            address = said.split(": ")[1].split()[0]
            assert "thyme view" in asked(address)[1]
            assert json.loads(asked(f"{address}api/runs")[1])["a"]["name"] == "small"
        finally:
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and errors == "", errors
