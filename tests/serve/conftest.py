"""A toy that knows one demonstration by heart, and a server of it that all tests of a file share."""

from collections.abc import Iterator

import pytest

from tests.by_heart import by_heart
from tests.serve.served import Served
from thyme.data.rows import Demonstration
from thyme.model import Model, Processor, build
from thyme.sandbox import Sandbox
from thyme.toy.model import tiny_config
from thyme.toy.scenarios import demonstrations


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="session")
def row() -> Demonstration:
    """A crop of a crop: the second code block needs what the first one left."""
    return demonstrations(0, 1, {"zoom": 1.0})[0]


@pytest.fixture(scope="session")
def taught(row: Demonstration) -> Model:
    """Answers the demonstration's question as it was shown."""
    return by_heart([row], steps=24, learning_rate=3e-3)


@pytest.fixture(scope="session")
def toy(processor: Processor) -> Model:
    """Random weights: it goes on until its tokens are used up."""
    return build(tiny_config(), processor, seed=0)


@pytest.fixture(scope="module")
def served(toy: Model) -> Iterator[Served]:
    """A server of the untrained toy, without tools."""
    with Served(toy) as opened:
        yield opened


@pytest.fixture(scope="module")
def tooled(taught: Model, sandbox: Sandbox) -> Iterator[Served]:
    """A server of the taught toy, with tools."""
    with Served(taught, sandbox) as opened:
        yield opened
