"""GRPO-ATS on several ranks is GRPO-ATS on one process: the same rollouts, losses and weights."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.train.ranks import torchrun
from tests.train.rl_material import ROLLOUT
from thyme.model import Model, Processor, save
from thyme.rollout import RolloutLoop
from thyme.toy.scenarios import questions
from thyme.train.distributed import World
from thyme.train.group_exchange import exchanged, own_questions

LOSS, WEIGHT = 1e-4, 1e-4
"""Relative, of a loss and a gradient norm; absolute, of a weight. Only the order of float32 sums differs."""
TIMES = ("time/", "perf/", "sandbox/exec_ms")
PACKED = {f"batch/{name}" for name in ("tokens", "unique_tokens", "computed_per_unique", "shared_frac")}
"""What questions on different ranks have in common, such as how their prompts begin, each rank computes for itself."""


@pytest.mark.parametrize(
    ("ranks", "updates"),
    [
        (2, 1),
        pytest.param(2, 3, marks=pytest.mark.soak),  # mini-batches of one question: the other rank has none of it
        pytest.param(4, 1, marks=pytest.mark.soak),  # more ranks than questions
    ],
)
def test_rl_on_ranks_is_rl_on_one_process(
    ranks: int, updates: int, taught: Model, processor: Processor, tmp_path: Path
) -> None:
    save(taught, processor, tmp_path / "model")
    done = torchrun(ranks, "-m", "tests.train.rl_on_ranks", str(tmp_path / "model"), str(tmp_path), str(updates))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["history"]) == 2
    for ours, expected in zip(found["history"], found["expected"], strict=True):
        assert ours.keys() == expected.keys()
        for name in expected:
            if name in PACKED:
                assert ours[name] > 0
            elif not name.startswith(TIMES):
                assert ours[name] == pytest.approx(expected[name], rel=LOSS, abs=1e-6), name
        assert ours["optim/grad_norm"] > 0 and ours["batch/trained_tokens"] > 0
    assert found["weights"] < WEIGHT
    assert found["same_on_all"]
    for step in range(2):
        assert rows(tmp_path / "ranks", step) == rows(tmp_path / "alone", step)
    assert not list((tmp_path / "ranks" / "rollouts").glob(".*"))
    written = [{path.name for path in (tmp_path / run / "images").iterdir()} for run in ("ranks", "alone")]
    assert written[0] == written[1]
    assert len((tmp_path / "ranks" / "metrics.jsonl").read_text().splitlines()) == 2  # by one rank only


def rows(folder: Path, step: int) -> list[dict[str, Any]]:
    """The recorded rollouts but for times and for log-probs, whose last bits follow the weights'."""
    out = []
    for line in (folder / "rollouts" / f"step_{step}.jsonl").read_text().splitlines():
        row = json.loads(line)
        out.append(
            {name: row[name] for name in ("question", "group", "index", "seed", "status", "text", "rewards")}
            | {"ids": row["tokens"]["token_ids"], "images": row["image_digests"]}
        )
    return out


class Four(World):
    size = 4

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank


def test_questions_are_dealt_once_each_and_a_repeated_one_stays_together(processor: Processor) -> None:
    loop = cast(RolloutLoop, SimpleNamespace(processor=processor, config=ROLLOUT))
    first, *others = questions(0, 6, {"direct": 1.0})
    asked = [first, *others, first]
    parts = [own_questions(loop, asked, Four(rank)) for rank in range(4)]
    assert sorted(index for part in parts for index in part) == list(range(7))
    assert any({0, 6} <= set(part) for part in parts)  # its second draw counts on from its first
    assert own_questions(loop, asked, World()) == list(range(7))


def test_one_process_exchanges_nothing() -> None:
    assert exchanged([], [], World()) == []
