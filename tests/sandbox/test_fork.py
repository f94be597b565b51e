"""A session that is forked: the fork is what a session would be in which all was run again, and from then on nothing of
one reaches the other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.sandbox.forks import STORIES, Story, differences
from thyme.sandbox import Sandbox, SandboxConfig

_FIGURE = "import matplotlib.pyplot as plt\nfig, ax = plt.subplots(figsize=(2, 2)); ax.plot([1, 2], [3, 4])"


@pytest.fixture(scope="module")
def again() -> Iterator[Sandbox]:
    """Runs code again in place of copying."""
    with Sandbox(SandboxConfig(workers=2, timeout_s=20.0, memory_mib=512), _off=frozenset({"fork"})) as sandbox:
        yield sandbox


@pytest.mark.parametrize("story", STORIES, ids=[story.name for story in STORIES])
def test_a_fork_gives_what_a_replay_gives(story: Story, sandbox: Sandbox, again: Sandbox, image) -> None:
    assert list(differences(story, sandbox, again, image)) == []
    assert sandbox._client.restarts == 0


FIGURES = [
    Story("a figure", (_FIGURE,), ("ax.set_title('later'); fig.savefig('f.png')", "plt.show()")),
    Story("a figure that was drawn", (_FIGURE, "fig.savefig('a.png')"), ("ax.plot([3, 1]); fig.savefig('f.png')",)),
]


@pytest.mark.soak
def test_figures(image) -> None:
    pytest.importorskip("matplotlib")
    config = SandboxConfig(workers=2, timeout_s=20.0, memory_mib=512, preload=("matplotlib",))
    with Sandbox(config) as live, Sandbox(config, _off=frozenset({"fork"})) as again:
        for story in FIGURES:
            assert list(differences(story, live, again, image)) == []
