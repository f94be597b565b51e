"""What a caller relies on: statuses, sessions, limits, cancelling, results, and a client that nothing can hang."""

from __future__ import annotations

import asyncio
import gc
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.sandbox.host import check_crop, children_of, eventually, open_descriptors, picture, server_of
from thyme.sandbox import Sandbox, SandboxConfig, SandboxUnavailable, Status

ROOT = Path(__file__).parents[2]


# --- statuses and text -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("print(1)", Status.OK),
        ("import sys; sys.exit(0)", Status.OK),
        ("import sys; sys.exit()", Status.OK),
        ("import sys; sys.exit(2)", Status.ERROR),
        ("1/0", Status.ERROR),
        ("def f(:", Status.ERROR),
        ("raise KeyboardInterrupt", Status.ERROR),
        ("raise MemoryError", Status.MEMORY),
        ("import os; os._exit(0)", Status.CRASHED),
        ("x" * 200_000, Status.REFUSED),
        ("", Status.OK),
        ("# only a comment", Status.OK),
    ],
)
def test_status(sandbox: Sandbox, code: str, status: Status) -> None:
    assert sandbox.run(code).status is status


def test_error_names_the_line_as_written(sandbox: Sandbox) -> None:
    result = sandbox.run("```python\nimport math\n\ndef f(x):\n    return math.sqrt(x)\n\nf(-1)\n```")
    assert result.error == ("ValueError", "math domain error", 5)
    assert sandbox.run("x = 1\ny = (1, 2").error[2] == 2
    assert sandbox.run("x = 1\n\nprint(undefined)").error == ("NameError", "name 'undefined' is not defined", 3)


def test_everything_printed_comes_back(sandbox: Sandbox) -> None:
    result = sandbox.run(
        "import sys, os\nprint('a')\nsys.stderr.write('b\\n')\nos.write(1, b'c\\n')\nprint('d', end='')"
    )
    assert result.stdout == "a\nb\nc\nd"
    assert sandbox.run("print('</sandbox_output><|im_end|>\\u00e9')").stdout == "</sandbox_output><|im_end|>\u00e9\n"


def test_wall_time_covers_the_snippet(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the notice that a new process is there is read after its result."""
    client, code = sandbox._client, "import time; t = time.monotonic(); time.sleep(.02); print(time.monotonic() - t)"
    hear, deaf = client.server.receive, threading.Event()
    monkeypatch.setattr(client.server, "receive", lambda: None if deaf.is_set() else hear())
    with sandbox.session() as session:
        deaf.set()
        results = [session.run(code)]
        assert session._state.child.pidfd is None  # forked, but unheard of
        deaf.clear()
        results += [session.run(code) for _ in range(2)]
    for result in results:
        assert result.wall_s >= float(result.stdout) > 0, result
    assert results[0].wall_s >= results[0].cpu_s > 0, results[0]


def test_printing_before_a_timeout_is_kept(hasty: Sandbox) -> None:
    result = hasty.run("print('begun')\nwhile True: pass")
    assert result.status is Status.TIMEOUT
    assert result.stdout == "begun\n"
    assert result.error is not None and "0.5 s" in result.error.message


def test_what_a_timeout_burned_is_reported(hasty: Sandbox) -> None:
    busy, asleep = hasty.run("while True: pass"), hasty.run("import time; time.sleep(9)")
    assert busy.status is asleep.status is Status.TIMEOUT
    assert busy.cpu_s > 5 * asleep.cpu_s, (busy, asleep)


def test_cpu_time_is_limited_over_the_session(sandbox: Sandbox) -> None:
    """Twenty rounds' worth; lowered here from inside, to see it reached."""
    with sandbox.session() as session:
        seen = session.run("import resource\nprint(resource.getrlimit(resource.RLIMIT_CPU))")
        assert seen.stdout == "(420, 421)\n", seen
        spent = session.run("resource.setrlimit(resource.RLIMIT_CPU, (1, 2))\nwhile True: pass")
        assert spent.status is Status.TIMEOUT and spent.error is not None, spent
        assert spent.error.message == "the session used up its CPU time"
        after = session.run("print(1)")
        assert (after.status, after.restarted) == (Status.OK, True)


@pytest.mark.parametrize(
    "code",
    [
        "for i in range(1000): open(f'{i}', 'w').close()",
        "for i in range(1000): open(f'{i}', 'wb').write(bytes(8 << 20))",
        "open('big', 'wb', buffering=0).write(bytes(192 << 20)); open('more', 'wb', buffering=0).write(b'x')",
    ],
    ids=["files", "space", "one file"],
)
def test_a_full_scratch_is_a_limit_and_says_which(sandbox: Sandbox, code: str) -> None:
    result = sandbox.run("print('before')\n" + code)
    assert result.status is Status.OUTPUT_LIMIT and result.stdout == "before\n", result
    assert result.error is not None
    if sandbox.isolation == "full":
        assert (result.error.type, result.error.line) == ("OSError", 2)
        assert result.error.message.endswith("(at most 192 MiB and 256 files and folders)")


@pytest.mark.parametrize(
    "code",
    [
        "import urllib.request as r; r.urlopen('http://example.com')",
        "import socket; socket.getaddrinfo('example.com', 80)",
    ],
)
def test_who_asks_for_the_network_is_told(sandbox: Sandbox, code: str) -> None:
    error = sandbox.run(code).error
    assert error is not None and "no network" in error.message, error


def test_long_text_is_cut_with_a_marker(sandbox: Sandbox) -> None:
    result = sandbox.run("print('x' * 1_000_000)")
    assert result.status is Status.OK
    assert len(result.stdout) == sandbox.config.max_stdout_bytes
    assert result.stdout.endswith("[output cut here]\n")


def test_what_a_snippet_sees(sandbox: Sandbox, image: Image.Image) -> None:
    code = (
        "print(image_path); print(temp_output_dir); print(os.getcwd()); print(__name__)\n"
        "def size(): return Image.open(image_path).size\n"
        "print(size(), [size() for _ in range(1)][0], sorted(__builtins__.__dict__)[:1])"
    )
    lines = sandbox.run(code, image, "/data/my photo.jpg").stdout.splitlines()
    assert lines[0] == "/data/my photo.jpg"
    assert lines[1].rstrip("/") == lines[2]
    assert lines[3] == "__main__"
    assert lines[4].startswith("(120, 80) (120, 80)")


def test_input_image_is_the_same_through_every_door(sandbox: Sandbox, image: Image.Image) -> None:
    code = (
        "import cv2, numpy as np, io, shutil, os, pathlib\n"
        "a = np.asarray(Image.open(image_path))\n"
        "b = cv2.imread(image_path)[:, :, ::-1]\n"
        "c = np.asarray(Image.open(io.BytesIO(open(image_path, 'rb').read())))\n"
        "shutil.copy(image_path, 'copy.png'); d = np.asarray(Image.open('copy.png'))\n"
        "e = np.asarray(Image.open(pathlib.Path(image_path)))\n"
        "print(all((a == x).all() for x in (b, c, d, e)), os.path.exists(image_path), os.path.getsize(image_path) > 0)"
    )
    assert sandbox.run(code, image, "/data/photo.jpg").stdout == "True True True\n"


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "LA", "CMYK", "I;16"])
def test_input_modes(sandbox: Sandbox, mode: str) -> None:
    source = (
        picture(30, 20).convert("L").convert("I").convert("I;16") if mode == "I;16" else picture(30, 20).convert(mode)
    )
    result = sandbox.run(
        "im = Image.open(image_path)\nprint(im.size, im.mode)\nim.convert('RGB').save('a.png')", source
    )
    assert result.status is Status.OK, result
    assert result.images[0].size == (30, 20)


def test_path_as_image(sandbox: Sandbox, image: Image.Image, tmp_path: Path) -> None:
    image.save(tmp_path / "in.jpg", quality=95)
    result = sandbox.run("im = Image.open(image_path)\nprint(im.size, im.format)", tmp_path / "in.jpg")
    assert result.stdout == "(120, 80) JPEG\n"
    with pytest.raises(ValueError, match="cannot be read"):
        sandbox.run("print(1)", tmp_path / "missing.jpg")
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match="cannot be read"):
        sandbox.run("print(1)", tmp_path / "broken.jpg")


def test_sessions_that_open_a_new_image_at_once(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever stores the image last must not replace the file a jailed process has the right to read."""
    rename, storing, others_ran = Path.rename, threading.Event(), threading.Event()

    def hesitate(part: Path, target: Path) -> Path:
        if not storing.is_set():
            storing.set()
            others_ran.wait(0.5)
        return rename(part, target)

    monkeypatch.setattr(Path, "rename", hesitate)
    image = picture(37, 23)  # of a content no other test stored
    slow = threading.Thread(target=lambda: sandbox.session(image).close())
    slow.start()
    assert storing.wait(10)
    with sandbox.session(image) as session:
        first = session.run("print(Image.open(image_path).size)")
        others_ran.set()
        slow.join()
        second = session.run("print(Image.open(image_path).size)")
    assert [first.stdout, second.stdout] == ["(37, 23)\n"] * 2, (first, second)


def test_an_image_is_not_evicted_while_it_is_acquired(image: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thyme.sandbox.image_store._KEPT_BYTES", 0)
    with Sandbox(SandboxConfig(workers=1, memory_mib=256)) as sandbox:
        store = sandbox._client.images
        keep, evicting = store._store, []

        def evict_now(given: Image.Image) -> object:
            stored = keep(given)
            if not evicting:  # the last user of the same content leaves in this very moment
                evicting.append(threading.Thread(target=before.close))
                evicting[0].start()
                evicting[0].join(0.3)
            return stored

        before = sandbox.session(image)
        monkeypatch.setattr(store, "_store", evict_now)
        with sandbox.session(image.copy()) as session:
            evicting[0].join()
            assert session.run("print(Image.open(image_path).size)").stdout == "(120, 80)\n"


# --- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "folder", ["", "temp_output_dir + ", "'/mnt/data/' + ", "'/tmp/' + ", "'/mnt/data/new/folder/' + "]
)
def test_saved_images_come_back(sandbox: Sandbox, image: Image.Image, folder: str) -> None:
    result = sandbox.run(f"Image.open(image_path).crop((0, 0, 7, 5)).save({folder}'a.png')", image)
    assert [i.size for i in result.images] == [(7, 5)], result
    assert result.images[0].mode == "RGB"


def test_order_and_choice_of_images(sandbox: Sandbox) -> None:
    saves = "for i, n in enumerate('cab'): Image.new('RGB', (i + 1, 9)).save(n + '.png')\n"
    assert [i.width for i in sandbox.run(saves).images] == [1, 2, 3]  # as saved
    assert [i.width for i in sandbox.run(saves + "print('b.png'); print('x', temp_output_dir + 'c.png')").images] == [
        3,
        1,
    ]  # as printed
    assert [i.width for i in sandbox.run(saves + "processed_path = 'a.png'").images] == [2]
    cv = "import cv2\ncv2.imwrite('/mnt/data/one.jpg', np.zeros((8, 4, 3), 'u1'))"
    assert [i.size for i in sandbox.run(cv).images] == [(4, 8)]
    assert sandbox.run("print(image_path)", picture()).images == ()  # the input is no result


def test_pixels_are_exact(sandbox: Sandbox, image: Image.Image) -> None:
    result = sandbox.run("Image.open(image_path).save('a.png')", image)
    assert np.array_equal(np.asarray(result.images[0]), np.asarray(image))


def test_shown_images_and_last_expression(sandbox: Sandbox, image: Image.Image) -> None:
    assert sandbox.run("Image.open(image_path).show()", image).images[0].size == (120, 80)
    assert sandbox.run("im = Image.open(image_path)\nim.resize((6, 4))", image).images[0].size == (6, 4)
    assert sandbox.run("x = 6\nx * 7").stdout == "42\n"
    assert sandbox.run("print(1)\n2").stdout == "1\n"
    assert sandbox.run("None").stdout == ""


# --- sessions --------------------------------------------------------------------------------------------------------


def test_variables_live_across_rounds(sandbox: Sandbox, image: Image.Image) -> None:
    with sandbox.session(image, "/data/photo.jpg") as session:
        assert session.run("im = Image.open(image_path)\ndef half(): return im.resize((60, 40))").status is Status.OK
        second = session.run("half().save('half.png')")
        assert second.images[0].size == (60, 40)
        third = session.run("print(sorted(os.listdir('.')))")
        assert third.stdout == "['half.png']\n" and not third.restarted
        assert third.images == ()  # returned in its own round only
        assert session.run("Image.open('half.png').crop((0, 0, 5, 5)).save('half.png')").images[0].size == (5, 5)


def test_sessions_do_not_see_each_other(sandbox: Sandbox) -> None:
    with sandbox.session() as one, sandbox.session() as other:
        one.run("import math\nmath.pi = 3\nopen('mine.txt', 'w').write('x')\nx = 1\nrandom.seed(5)")
        assert (
            other.run("import os, math\nprint(os.listdir('.'), math.pi > 3.1, 'x' in globals())").stdout
            == "[] True False\n"
        )
        assert one.run("print(math.pi, x)").stdout == "3 1\n"


@pytest.mark.parametrize("end", ["while True: pass", "import os; os._exit(1)", "raise MemoryError"])
def test_restart_after_a_bad_end(hasty: Sandbox, end: str) -> None:
    with hasty.session() as session:
        assert session.run("x = 1").status is Status.OK
        assert session.run(end).status in (Status.TIMEOUT, Status.CRASHED, Status.MEMORY)
        after = session.run("print('x' in globals())")
        assert (after.stdout, after.restarted) == ("False\n", True)
        assert not session.run("print(1)").restarted


def test_an_ordinary_error_keeps_the_session(sandbox: Sandbox) -> None:
    with sandbox.session() as session:
        session.run("x = 1\n1/0")
        result = session.run("print(x)")
        assert (result.stdout, result.restarted) == ("1\n", False)


def test_idle_session_is_ended_and_starts_afresh() -> None:
    with Sandbox(SandboxConfig(workers=1, memory_mib=256, idle_s=0.1)) as sandbox, sandbox.session() as session:
        session.run("x = 1")
        assert eventually(lambda: session._state.child is None)
        result = session.run("print('x' in globals())")
        assert (result.stdout, result.restarted) == ("False\n", True)


def test_a_session_that_goes_on_after_its_round_is_killed(sandbox: Sandbox) -> None:
    """A forged answer frees the round, not the process: it burns CPU while it should be idle."""
    forged = '{"status":"ok","stdout":0,"error":null,"images":[],"fixes":[],"cpu_s":0,"peak_mib":0}'
    with sandbox.session() as session:
        result = session.run(f"import os\nos.write(3, {forged!r}.encode())\nwhile True: pass")
        assert result.status is Status.OK
        assert eventually(lambda: session._state.child is None)


def test_closed_session_refuses(sandbox: Sandbox) -> None:
    session = sandbox.session()
    session.run("1")
    session.close()
    result = session.run("print(1)")
    assert result.status is Status.REFUSED and "closed" in result.error.message


def test_full_house_queues() -> None:
    with Sandbox(SandboxConfig(workers=2, memory_mib=256, max_sessions=1)) as sandbox:
        first, second = sandbox.session(), sandbox.session()
        first.run("x = 1")
        later = threading.Timer(0.2, first.close)
        later.start()
        begun = time.monotonic()
        assert second.run("print(1)").stdout == "1\n"
        assert time.monotonic() - begun >= 0.15
        later.join()


def test_same_seed_same_numbers(sandbox: Sandbox) -> None:
    draw = "print(random.random(), np.random.rand(), hash('x'), list({'a', 'b', 'c'}))"
    assert sandbox.run(draw).stdout == sandbox.run(draw).stdout
    assert sandbox.run(draw, seed=1).stdout == sandbox.run(draw, seed=1).stdout != sandbox.run(draw).stdout


# --- concurrency -----------------------------------------------------------------------------------------------------


def test_at_most_workers_run_at_once(tmp_path: Path) -> None:
    with Sandbox(SandboxConfig(workers=2, memory_mib=256)) as sandbox:
        seen = 0

        async def many() -> list[str]:
            nonlocal seen
            tasks = [asyncio.ensure_future(sandbox.arun(f"import time; time.sleep(.05); print({i})")) for i in range(8)]
            while not all(t.done() for t in tasks):
                seen = max(seen, sandbox._client.rounds.num_running)
                await asyncio.sleep(0.005)
            return [t.result().stdout.strip() for t in tasks]

        assert asyncio.run(many()) == [str(i) for i in range(8)]
        assert seen == 2


def test_cancelled_await_kills_the_snippet(sandbox: Sandbox, image: Image.Image) -> None:
    async def scenario() -> None:
        with sandbox.session(image) as session:
            await session.arun("x = 1")
            child = session._state.child
            assert child.pidfd is not None
            process = os.dup(child.pidfd)
            task = asyncio.ensure_future(session.arun("while True: pass"))
            await asyncio.sleep(0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert session._state.child is None
            assert select.select([process], [], [], 10)[0], "the process has not ended"
            os.close(process)
            after = await session.arun("print('x' in globals())")
            assert (after.stdout, after.restarted) == ("False\n", True)

    asyncio.run(scenario())
    assert sandbox._client.rounds.num_running == 0
    check_crop(sandbox, image)


def test_neighbours_of_a_hang_are_served(sandbox: Sandbox, image: Image.Image) -> None:
    async def scenario() -> None:
        hang = asyncio.ensure_future(sandbox.arun("while True: pass"))
        results = [await sandbox.arun("Image.open(image_path).save('a.png')", image) for _ in range(5)]
        assert all(r.status is Status.OK and len(r.images) == 1 for r in results)
        assert not hang.done()
        hang.cancel()

    asyncio.run(scenario())


# --- the fork-server -------------------------------------------------------------------------------------------------


def test_killed_server_is_replaced(image: Image.Image) -> None:
    with Sandbox(SandboxConfig(workers=2, memory_mib=256)) as sandbox:
        with sandbox.session(image) as session:
            session.run("x = 1")
            os.kill(server_of(sandbox), signal.SIGKILL)
            assert eventually(lambda: sandbox._client.restarts == 1)
            result = session.run("print('x' in globals())")
            assert (result.stdout, result.restarted) == ("False\n", True)
        check_crop(sandbox, image)


def test_killed_server_while_code_runs(image: Image.Image) -> None:
    with Sandbox(SandboxConfig(workers=2, memory_mib=256)) as sandbox:
        threading.Timer(0.3, lambda: os.kill(server_of(sandbox), signal.SIGKILL)).start()
        result = sandbox.run("import time; time.sleep(8)")
        assert result.status is Status.CRASHED
        check_crop(sandbox, image)


def test_stopped_server_is_replaced(image: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thyme.sandbox.round_queue._FORK_S", 0.5)
    with Sandbox(SandboxConfig(workers=2, memory_mib=256)) as sandbox:
        sandbox.run("1")
        os.kill(server_of(sandbox), signal.SIGSTOP)
        assert sandbox.run("print(1)").stdout == "1\n"  # queued again, nothing lost
        assert sandbox._client.restarts == 1
        check_crop(sandbox, image)


def test_close_leaves_nothing() -> None:
    sandbox = Sandbox(SandboxConfig(workers=2, memory_mib=256))
    folder, server = sandbox._client.run_dir, sandbox._client.server.process.pid
    pids = {server, *children_of(server)}
    session = sandbox.session()
    session.run("x = 1")
    sandbox.close()
    assert not folder.exists()
    assert eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    assert sandbox.run("print(1)").status is Status.REFUSED
    session.close()
    sandbox.close()  # twice is fine


def test_a_sandbox_nobody_holds_is_closed() -> None:
    """Also one whose last session was not closed and has a process: what the client keeps of it does not hold it."""
    sandbox = Sandbox(SandboxConfig(workers=1, memory_mib=256))
    client, session = sandbox._client, sandbox.session()
    assert session.run("print(1)").stdout == "1\n"
    del sandbox
    assert session.run("print(2)").stdout == "2\n"
    del session
    gc.collect()
    assert client.closed
    assert not client.run_dir.exists()


def test_killed_client_leaves_no_orphan() -> None:
    code = (
        "import sys, time\nfrom thyme.sandbox import Sandbox, SandboxConfig\n"
        "s = Sandbox(SandboxConfig(workers=2, memory_mib=256)); k = s.session(); k.run('x = 1')\n"
        "import threading; threading.Thread(target=s.run, args=('while True: pass',), daemon=True).start()\n"
        "time.sleep(.3); print(s._client.run_dir, flush=True); time.sleep(60)"
    )
    client = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    with client:
        folder = Path(client.stdout.readline().strip())
        family = children_of(client.pid)
        assert len(family) >= 3  # server, idle session, running snippet
        client.kill()
    assert eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in family))
    assert eventually(lambda: not folder.exists())


def test_no_descriptors_leak(sandbox: Sandbox, image: Image.Image) -> None:
    check_crop(sandbox, image)
    before = open_descriptors()
    for i in range(20):
        with sandbox.session(image) as session:
            session.run("x = 1")
            session.run("import os; os._exit(1)" if i % 2 else "x")
    assert eventually(lambda: open_descriptors() == before)
    assert threading.active_count() < 20


# --- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad", [{"workers": 0}, {"timeout_s": -1.0}, {"isolation": "some"}, {"compat": "old"}, {"workers": 10**6}]
)
def test_bad_configuration(bad: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        SandboxConfig(**bad)


def test_unknown_preload_is_named() -> None:
    with pytest.raises(SandboxUnavailable, match="no_such_module_here"):
        Sandbox(SandboxConfig(workers=1, memory_mib=256, preload=("no_such_module_here",)))


def test_doctor_reports(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from thyme.sandbox.doctor import report, run_file

    layers = report()
    assert layers[-1].name == "sandbox" and layers[-1].ok
    assert any(layer.name == "probe: open a network socket" and layer.ok for layer in layers)
    (tmp_path / "snippet.py").write_text("```\nprint('hello')\nImage.new('RGB', (9, 9)).save('a.png')\n```")
    assert run_file(tmp_path / "snippet.py")["status"] == "ok"
    shown = capsys.readouterr().out
    assert "hello" in shown and "fence" in shown and (tmp_path / "snippet.out1.png").exists()
    with pytest.raises(ValueError, match="cannot be read"):
        run_file(tmp_path / "none.py")


def test_released_compatibility() -> None:
    with Sandbox(SandboxConfig(workers=1, memory_mib=256, compat="released")) as sandbox:
        code = "x1, y1, x2, y2 = 100, 70, 110, 90\nImage.open(image_path).crop((x1, y1, x2, y2)).save('a.png')"
        result = sandbox.run(code, picture())
        assert result.images[0].size == (64, 64)
        assert sandbox.run("v = 1 / 3\nprint(f'{v:.2f}')").stdout == "0.33333333\n"
        with sandbox.session(picture(), "/data/photo.jpg") as session:  # a path that exists by now is not replaced
            session.run("image_path = '/no/such.jpg'\nImage.open(image_path).resize((9, 9)).save('/mnt/data/a.png')")
            small = session.run("image_path = '/mnt/data/a.png'\nprint(Image.open(image_path).size)")
            assert small.stdout == "(9, 9)\n", small
        failed = sandbox.run("# one\nbox = (0,\n 0, 5, 5)\n# two\n1/0", picture())
        assert failed.error is not None and failed.error.line == 5  # of the snippet as it was written


def test_a_session_keeps_its_sandbox() -> None:
    session = Sandbox(SandboxConfig(workers=1, memory_mib=256)).session()
    assert session.run("print(1)").stdout == "1\n"
    session._owner.close()


def test_a_fork_of_the_caller_leaves_the_sandbox_alone(sandbox: Sandbox, image: Image.Image) -> None:
    code = (
        "import os\nfrom thyme.sandbox import Sandbox, SandboxConfig\n"
        "with Sandbox(SandboxConfig(workers=1, memory_mib=256)) as s, s.session() as k:\n"
        "    k.run('x = 1')\n"
        "    pid = os.fork()\n"
        "    if pid == 0:\n        raise SystemExit(k.run('x').status.name != 'REFUSED')\n"
        "    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), k.run('print(x)').stdout.strip())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout == "0 1\n", done
