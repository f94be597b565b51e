"""A browser for all tests of pages, and servers that end with their test."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvicorn
from starlette.applications import Starlette

from tests.report import runs
from tests.report.browser import CHROMIUM, DEADLINE_S, MISSING, Browser

Serve = Callable[[Starlette], str]


@contextmanager
def served(app: Starlette) -> Iterator[str]:
    """The address of a server that runs in a thread."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    until = time.monotonic() + DEADLINE_S
    while not server.started:
        assert thread.is_alive() and time.monotonic() < until
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Serves an application until the test ends."""
    from contextlib import ExitStack

    with ExitStack() as stack:
        yield lambda app: stack.enter_context(served(app))


@pytest.fixture(scope="session")
def one_browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip(MISSING)
    with Browser() as browser:
        yield browser


@pytest.fixture
def browser(one_browser: Browser) -> Iterator[Browser]:
    """The browser; whatever a test does in it, no page of its may have had an error."""
    one_browser.errors.clear()
    one_browser.appear()
    yield one_browser
    one_browser.open_blank()
    assert one_browser.errors == []


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return runs.small_run(tmp_path / "small")
