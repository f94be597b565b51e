"""The race of bench/engine_peers: what is asked of the contenders, and that ours does it."""

import io
import json
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests import tiny
from thyme.engine import Engine, EngineConfig, SamplingParams
from thyme.model import ModelConfig, build, save

PEERS = Path(__file__).parent.parent / "bench" / "engine_peers"
sys.path.insert(0, str(PEERS))
import races  # noqa: E402
import requirements_of  # noqa: E402
import serve  # noqa: E402
import thyme_peer  # noqa: E402
from races import Session, Workload  # noqa: E402

TURNS = Workload((Session([5, 6, 7], (3, 4), ([8, 9],)), Session([10, 11], (5, 2), ([12],))))


@pytest.fixture
def peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> thyme_peer.Peer:
    model = build(ModelConfig(model_type="qwen2", text=tiny.text_config(vocab_size=512)), seed=1)
    save(model, None, tmp_path / "model")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    groups = Workload((Session([5, 6, 7], (4,)),), temperature=1.0, n=3)
    loop = Workload(TURNS.sessions, temperature=1.0, tool_ms=1.0, adaptive=True)
    table = {"turns": lambda: TURNS, "groups": lambda: groups, "loop": lambda: loop}
    monkeypatch.setattr(thyme_peer, "WORKLOADS", table)
    return thyme_peer.Peer(str(tmp_path / "model"), "float32", "packed")


def test_the_workloads_are_the_same_each_time_and_fit_the_model() -> None:
    for name, make in races.WORKLOADS.items():
        work = make()
        assert make() == work, name
        for session in work.sessions:
            assert len(session.appended) == len(session.lengths) - 1
            whole = len(session.prompt) + sum(session.lengths) + sum(map(len, session.appended))
            assert whole <= races.SHAPE["max_position_embeddings"]


def test_turns_continue_what_was_sampled(peer: thyme_peer.Peer) -> None:
    """Greedy: the second turn is what a fresh engine says to all that came before it."""
    options = dict(temperature=0.0, adaptive=False, banned_ids=(), ignore_eos=True, repetition=None)
    engine = Engine(peer.model, EngineConfig(num_blocks=64, max_sequences=4, max_batch_tokens=64, quiet=True))
    for session, ids in zip(TURNS.sessions, peer.run("turns"), strict=True):
        first = engine.generate(session.prompt, SamplingParams(max_tokens=session.lengths[0], **options))[0].token_ids
        history = [*session.prompt, *first, *session.appended[0]]
        second = engine.generate(history, SamplingParams(max_tokens=session.lengths[1], **options))[0].token_ids
        assert ids == [*first, *second]


def test_samples_of_a_group_and_the_loop_have_their_lengths(peer: thyme_peer.Peer) -> None:
    assert [len(ids) for ids in peer.run("groups")] == [4, 4, 4]
    assert [len(ids) for ids in peer.run("loop")] == [7, 7]
    assert peer.run("ceiling turns") == []


def test_a_contender_answers_in_json_whatever_libraries_print(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = io.StringIO()
    monkeypatch.setattr(sys, "stdin", io.StringIO("plain\nturns\n"))
    monkeypatch.setattr(sys, "stdout", answers)
    monkeypatch.setattr(sys, "stderr", io.StringIO())

    def run(name: str) -> list[list[int]]:
        print("a library's greeting")
        return [[len(name)]]

    serve.serve(run)
    found = [json.loads(line) for line in answers.getvalue().splitlines()]
    assert found[0] == {"ready": True}
    assert [answer["ids"] for answer in found[1:]] == [[[5]], [[5]]]


def test_what_a_wheel_declares(tmp_path: Path) -> None:
    lines = ["Name: x", "Requires-Dist: torch==2.13.0+cpu", "Requires-Dist: torchvision", "Requires-Dist: a[c,b]>=1"]
    lines += ['Requires-Dist: b; extra == "bench"', 'Requires-Dist: c<2; python_version > "3"']
    with ZipFile(tmp_path / "x.whl", "w") as wheel:
        wheel.writestr("x.dist-info/METADATA", "\n".join(lines))
    assert requirements_of.requirements(tmp_path / "x.whl") == ["torch==2.13.0", "a[b,c]>=1", "c<2"]
