"""Several ranks on one machine train as one process does: losses, gradients, weights."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.train.ranks import torchrun
from thyme.train.config import DistributedConfig
from thyme.train.distributed import World, open_world

LOSS, GRADIENT, WEIGHT = 1e-6, 1e-4, 1e-4
"""Of a loss and of a tensor's largest gradient; of a weight, absolute. Only the order of float32 sums differs: seen are
1e-7, 1.4e-5 and 1.5e-5 (an Adam step divides a small gradient by itself, whatever its rounding)."""


@pytest.mark.parametrize(
    ("ranks", "shard_ranks"),
    [
        (2, 0),
        pytest.param(3, 0, marks=pytest.mark.soak),
        pytest.param(4, 0, marks=pytest.mark.soak),
        pytest.param(4, 2, marks=pytest.mark.soak),  # two copies of two shards
    ],
)
def test_sft_on_ranks_is_sft_on_one_process(ranks: int, shard_ranks: int, tmp_path: Path) -> None:
    """With pictures on some ranks only, unequal lengths and counts of micro-batches, and a rank without a row."""
    done = torchrun(ranks, "-m", "tests.train.sft_on_ranks", str(tmp_path / "out.json"), str(shard_ranks))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert set(found) == {"muon", "adamw"}
    for entry in found.values():
        check_same(entry)


@pytest.mark.soak
def test_what_is_frozen_recomputed_adapted_or_in_bfloat16_is_so_on_ranks(tmp_path: Path) -> None:
    done = torchrun(2, "-m", "tests.train.sft_on_ranks", str(tmp_path / "out.json"), "0", "more")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    check_same(found["spared"])
    check_same(found["lora"])
    # Steps too small for bfloat16 itself; its gradients are rounded micro-batch by micro-batch, and there are others.
    masters = found["masters"]
    assert masters["cosine"] > 0.98 and masters["longer"] == pytest.approx(1, abs=0.02)
    assert masters["rounds"]


def check_same(entry: dict[str, Any]) -> None:
    assert entry["losses"] == pytest.approx(entry["expected"], rel=LOSS)
    assert len(entry["gradients"]) == len(entry["losses"]) == 3
    assert max(entry["gradients"]) < GRADIENT and entry["weights"] < WEIGHT
    assert entry["tokens"]


def test_one_process_is_a_world_of_its_own() -> None:
    with open_world() as world:
        assert (world.rank, world.size, world.is_main) == (0, 1, True)
        assert world.gather("x") == ["x"] and world.from_main(3) == 3 and world.sum([1, 2.5]) == [1.0, 2.5]
        with world.phase("update"):
            pass
    assert World().device.type == "cpu"


def test_ranks_that_do_not_divide_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "6")
    with (
        pytest.raises(ValueError, match=r"distributed\.shard_ranks: 4 does not divide the 6 ranks"),
        open_world(DistributedConfig(shard_ranks=4)),
    ):
        pass
