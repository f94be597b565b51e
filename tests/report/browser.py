"""Headless Chromium over the DevTools protocol: open a page, ask it, type, click, photograph; and its errors."""

import base64
import itertools
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from websockets.sync.client import ClientConnection, connect

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
MISSING = "no chromium on PATH: apt-get install chromium (make test does, where it may)"
DEADLINE_S = 60
"""For a page to come to what is waited for: says only when a test gives up."""


class Browser:
    """One Chromium with one page. Use as a context manager.

    `errors` holds every uncaught exception, console error and refused or failed request of the pages so far.
    """

    def __init__(self, width: int = 1400, height: int = 900) -> None:
        assert CHROMIUM is not None
        self.errors: list[str] = []
        self._size = width, height
        self._numbers = itertools.count(1)

    def __enter__(self) -> Self:
        assert CHROMIUM is not None
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        width, height = self._size
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        flags += ["--disable-background-networking", "--disable-component-update", "--disable-extensions"]
        flags += [
            "--remote-debugging-port=0",
            f"--user-data-dir={self._profile.name}",
            f"--window-size={width},{height}",
        ]
        self._log = (Path(self._profile.name) / "log").open("w+")
        self._process = subprocess.Popen(
            [CHROMIUM, *flags, "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=self._log,
            start_new_session=True,
            env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST")},
        )
        self._stack = ExitStack()
        try:
            self._socket = self._stack.enter_context(self._connected())
            for domain in ("Page", "Runtime", "Log", "Network"):
                self._call(f"{domain}.enable")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def open(self, address: str) -> None:
        """Loads a page and waits until it has drawn itself."""
        self._call("Page.navigate", url=address)
        self.wait("document.readyState === 'complete' && document.querySelector('#app')?.childElementCount > 0")

    def appear(self, *, dark: bool = False, size: tuple[int, int] | None = None) -> None:
        """Prefers dark colours or light ones, in a window of `size`; None: as it was opened."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])
        if size is None:
            self._call("Emulation.clearDeviceMetricsOverride")
            return
        width, height = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", **metrics)

    def open_blank(self) -> None:
        """Leaves the page, so that nothing of it asks on."""
        self._call("Page.navigate", url="about:blank")
        self.wait("location.href === 'about:blank'")

    def run(self, script: str) -> Any:
        """The value of an expression in the page; a promise is awaited."""
        said = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in said:
            raise AssertionError(f"{script}: {said['exceptionDetails']}")
        return said["result"].get("value")

    def wait(self, condition: str) -> None:
        """Waits until an expression is true; one that throws is not."""
        until = time.monotonic() + DEADLINE_S
        while not self.run(f"(() => {{ try {{ return Boolean({condition}); }} catch {{ return false; }} }})()"):
            assert time.monotonic() < until, f"never true: {condition}; {self.errors}; {self.text()[:1500]}"
            time.sleep(0.05)

    def text(self, selector: str = "body") -> str:
        """What a reader sees of an element, "" where there is none."""
        return str(self.run(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''"))

    def count(self, selector: str) -> int:
        return int(self.run(f"document.querySelectorAll({json.dumps(selector)}).length"))

    def click(self, selector: str) -> None:
        """A click of the mouse in the middle of an element."""
        name = json.dumps(selector)
        self.wait(f"document.querySelector({name}) !== null")
        x, y = self.run(
            f"(() => {{ const e = document.querySelector({name}); e.scrollIntoView({{block: 'nearest'}});"
            "const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str) -> None:
        """A key, as a person presses it."""
        text = {"text": key} if len(key) == 1 else {}
        self._call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self._call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def type(self, text: str) -> None:
        """Text into what has the focus."""
        self._call("Input.insertText", text=text)

    def photograph(self) -> bytes:
        """The page as PNG."""
        return base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"])

    def _connected(self) -> AbstractContextManager[ClientConnection]:
        log = Path(self._log.name)
        until = time.monotonic() + DEADLINE_S
        while not (found := re.search(r"ws://127\.0\.0\.1:(\d+)/\S+", log.read_text(errors="replace"))):
            assert self._process.poll() is None, log.read_text(errors="replace")[-2000:]
            assert time.monotonic() < until, f"chromium does not answer: {log.read_text(errors='replace')[-2000:]}"
            time.sleep(0.05)
        with connect(found[0], max_size=None, compression=None) as browser:
            browser.send(json.dumps({"id": 1, "method": "Target.getTargets"}))
            while "result" not in (said := json.loads(browser.recv())):
                pass
        pages = [target for target in said["result"]["targetInfos"] if target["type"] == "page"]
        address = f"ws://127.0.0.1:{found[1]}/devtools/page/{pages[0]['targetId']}"
        return connect(address, max_size=None, compression=None)

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            said = json.loads(self._socket.recv(timeout=DEADLINE_S))
            if said.get("id") == number:
                assert "error" not in said, f"{method}: {said['error']}"
                return dict(said["result"])
            self._heard(said)

    def _heard(self, event: dict[str, Any]) -> None:
        told = event.get("params", {})
        hear: dict[str, Callable[[], str | None]] = {
            "Runtime.exceptionThrown": lambda: json.dumps(told["exceptionDetails"])[:600],
            "Runtime.consoleAPICalled": lambda: (
                json.dumps(told["args"]) if told["type"] in ("error", "assert") else None
            ),
            "Log.entryAdded": lambda: json.dumps(told["entry"])[:600] if told["entry"]["level"] == "error" else None,
            "Page.javascriptDialogOpening": lambda: f"a dialog: {told.get('message')}",
        }
        error = hear.get(event.get("method", ""), lambda: None)()
        if error is not None:
            self.errors.append(error)
            if event["method"] == "Page.javascriptDialogOpening":
                self._socket.send(
                    json.dumps({"id": 0, "method": "Page.handleJavaScriptDialog", "params": {"accept": True}})
                )

    def _end(self) -> None:
        self._stack.close()
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, 9)
            self._process.wait()
        self._log.close()
        self._profile.cleanup()
