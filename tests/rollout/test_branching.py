"""Branches of rollouts: on the same KV, in a session that has what the parent's had, and recorded as what they are."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.by_heart import by_heart
from tests.rollout.test_journal import Killed, alike, sampled
from tests.rollout.test_records import rollout as rollout_record
from thyme.data.rows import Demonstration
from thyme.engine import Engine, EngineConfig
from thyme.model import Model, Processor
from thyme.rollout import RolloutConfig, RolloutLoop, read_rollouts, write_rollouts
from thyme.rollout.branching import failed_round, places, prefix_of, start_of
from thyme.rollout.trajectory import COLUMNS
from thyme.rollout.tree import TreeConfig
from thyme.rollout.types import Parent, Rollout, RolloutStatus
from thyme.sandbox import Sandbox, Status
from thyme.toy.scenarios import demonstrations

CONFIG = RolloutConfig(
    prompt_style="short", max_tokens_per_round=72, max_tokens=200, max_rounds=3, code_temperature=0.5
)


@pytest.fixture(scope="module")
def rows() -> list[Demonstration]:
    return [demonstrations(0, 1, {scenario: 1.0})[0] for scenario in ("zoom", "arithmetic")]


@pytest.fixture(scope="module")
def model(rows: list[Demonstration]) -> Model:
    return by_heart(rows)


def make_loop(model: Model, sandbox: Sandbox, config: RolloutConfig = CONFIG, **engine: int) -> RolloutLoop:
    assert model.processor is not None
    sizes = {"max_sequences": 16, "num_blocks": 256} | engine
    return RolloutLoop(
        Engine(model, EngineConfig(deterministic=True, quiet=True, **sizes)), sandbox, model.processor, config
    )


def same_tokens(one: Rollout, other: Rollout) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in COLUMNS)


def outputs(rollout: Rollout) -> list[tuple[str | None, str]]:
    return [(turn.code, turn.output_text) for turn in rollout.turns]


@pytest.fixture(scope="module")
def trunk(model: Model, sandbox: Sandbox, rows: list[Demonstration]) -> Rollout:
    """A crop of a crop: the second block cuts what the first one left in the session."""
    return make_loop(model, sandbox).run(
        [rows[0].question], CONFIG.sampling(n=1, temperature=0.0, code_temperature=0.0)
    )[0][0]


def test_a_branch_costs_no_recomputed_token_and_finds_the_variables(
    model: Model, sandbox: Sandbox, rows: list[Demonstration]
) -> None:
    loop = make_loop(model, sandbox)
    greedy = CONFIG.sampling(n=1, temperature=0.0, code_temperature=0.0)
    with loop.keeping():
        ((trunk,),) = loop.run([rows[0].question], greedy)
        assert trunk.num_code == 2 and trunk.code_ok
        for round in range(3):
            before = loop.engine.stats()
            (branch,) = loop.fork(trunk, round, 1, greedy)
            after = loop.engine.stats()
            # What the tools of its own rounds returned is prefilled, and nothing else.
            given = (~branch.sampled) & (branch.rounds >= round)
            given[: start_of(trunk, round)] = False
            assert after["prefilled_tokens"] - before["prefilled_tokens"] == given.sum()
            assert after["recomputed_tokens"] == before["recomputed_tokens"]
            assert branch.parent == Parent(trunk.index, round, trunk.seed) and branch.index == 1
            assert same_tokens(branch, trunk) and outputs(branch) == outputs(trunk)
            assert branch.answer == trunk.answer and branch.status is RolloutStatus.ANSWERED
    assert loop.engine.stats()["blocks_used"] == 0


@pytest.mark.soak
def test_branches_have_the_bits_of_a_replay_from_the_start(model: Model, sandbox: Sandbox, trunk: Rollout) -> None:
    """With KV held, without, and from a branch of a branch; in whatever company."""
    loop, plain = make_loop(model, sandbox), make_loop(model, sandbox)
    drawn = CONFIG.sampling(temperature=1.5, code_temperature=1.0, seed=5)
    with loop.keeping():
        ((kept,),) = loop.run([trunk.question], CONFIG.sampling(n=1, temperature=0.0, code_temperature=0.0))
        for round in range(3):
            branches = loop.fork(kept, round, 3, drawn)
            assert len({tuple(branch.token_ids) for branch in branches}) > 1
            again = plain.fork(trunk, round, 3, drawn)  # its KV was never here: the prefix is a prompt
            for one, other in zip(branches, again, strict=True):
                assert same_tokens(one, other) and outputs(one) == outputs(other)
                assert one.turns[:round] == kept.turns[:round]
        deeper = max(loop.fork(kept, 1, 4, drawn), key=lambda branch: len(branch.turns))
        last = len(deeper.turns) - 1
        (one,), (other,) = loop.fork(deeper, last, 1, drawn), plain.fork(deeper, last, 1, drawn)
        assert same_tokens(one, other) and one.parent == Parent(deeper.index, last, kept.seed)


def test_kv_of_other_weights_is_not_gone_on_from(model: Model, sandbox: Sandbox, trunk: Rollout) -> None:
    loop = make_loop(model, sandbox)
    greedy = CONFIG.sampling(n=1, temperature=0.0, code_temperature=0.0)
    with loop.keeping():
        ((kept,),) = loop.run([trunk.question], greedy)
        loop.engine.weights_updated()
        loop.engine.runner.kv_cache.fill_(float("nan"))
        (branch,) = loop.fork(kept, 2, 1, greedy)
        assert branch.token_ids.tolist() == trunk.token_ids.tolist()
        own = branch.sampled & (branch.rounds >= 2)
        assert set(branch.weight_versions[own].tolist()) == {1}


def test_a_failed_call_is_drawn_again_from_its_round(model: Model, sandbox: Sandbox, trunk: Rollout) -> None:
    loop = make_loop(model, sandbox)
    assert failed_round(trunk) is None and loop.retry_each([trunk])[0] is trunk
    result = trunk.turns[1].result
    assert result is not None
    failed = replace(
        trunk, turns=[trunk.turns[0], replace(trunk.turns[1], result=replace(result, status=Status.ERROR))]
    )
    assert failed_round(failed) == 1
    (_, mended) = loop.retry_each([trunk, failed], 2, CONFIG.sampling(n=1, temperature=0.0, code_temperature=0.0))
    assert mended.parent == Parent(0, 1, trunk.seed) and failed_round(mended) is None
    assert mended.answer == trunk.answer


def test_code_that_gives_something_else_ends_the_branch(
    model: Model, sandbox: Sandbox, trunk: Rollout, caplog: pytest.LogCaptureFixture
) -> None:
    result = trunk.turns[0].result
    assert result is not None
    other = replace(trunk, turns=[replace(trunk.turns[0], result=replace(result, stdout="!")), *trunk.turns[1:]])
    greedy = CONFIG.sampling(n=1, temperature=0.0, code_temperature=0.0)
    (branch,) = make_loop(model, sandbox).fork(other, 1, 1, greedy)
    assert branch.status is RolloutStatus.ABORTED and "gave something else" in caplog.text


TREE = replace(CONFIG, group_size=6, temperature=1.3, tree=TreeConfig(trunks=2, branches=2, window=4))


def run_tree(loop: RolloutLoop, rows: Sequence[Demonstration]) -> list[list[Rollout]]:
    return loop.run([row.question for row in rows], TREE.sampling(seed=3, tree=TREE.tree))


def test_a_tree_branches_where_entropy_is_highest(model: Model, sandbox: Sandbox, rows: list[Demonstration]) -> None:
    loop = make_loop(model, sandbox, TREE)
    groups = run_tree(loop, rows)
    assert loop.timing is not None
    assert loop.timing.sampled_tokens == sum(r.num_drawn for group in groups for r in group)
    for group in groups:
        assert [r.index for r in group] == list(range(6)) and len({r.seed for r in group}) == 6
        trunks, branches = group[:2], group[2:]
        assert all(r.parent is None for r in trunks)
        for (index, round), branch in zip(places(trunks, 4, TREE.tree), branches, strict=True):
            assert branch.parent == Parent(index, round, trunks[index].seed)
            length = start_of(trunks[index], round)
            assert branch.token_ids[:length].tolist() == trunks[index].token_ids[:length].tolist()
            assert outputs(branch)[:round] == outputs(trunks[index])[:round]
    assert any(r.parent is not None and r.parent.round > 0 for group in groups for r in group)
    stats = loop.engine.stats()
    assert stats["recomputed_tokens"] == 0 and stats["blocks_used"] == 0
    # Alone in the engine, and from trunks without their KV, the same is drawn.
    for row, group in zip(rows, groups, strict=True):
        assert alike([[replace(r, group=0) for r in group]], run_tree(make_loop(model, sandbox, TREE), [row]))


def test_places_go_by_the_entropy_at_the_start_of_later_rounds(processor: Processor) -> None:
    def trunk(entropies: list[list[float]]) -> Rollout:
        rounds = np.array([r for r, part in enumerate(entropies) for _ in part], dtype=np.int16)
        drawn = np.ones(len(rounds), dtype=bool)
        flat = np.array([x for part in entropies for x in part], dtype=np.float32)
        return replace(rollout_record(processor), rounds=rounds, sampled=drawn, entropies=flat)

    trunks = [trunk([[9.0, 9.0], [1.0, 1.0, 9.0], [0.5, 0.5]]), trunk([[9.0], [2.0, 1.0]])]
    config = TreeConfig(trunks=2, branches=2, window=2)
    assert places(trunks, 7, config) == [(1, 1), (1, 1), (0, 1), (0, 1), (0, 2), (0, 2), (1, 1)]
    assert places([trunk([[9.0]]), trunk([[8.0]])], 2, config) == [(0, 0), (0, 0)]
    with pytest.raises(ValueError, match="drew nothing in round 3: it has rounds 0 to 2"):
        start_of(trunks[0], 3)
    with pytest.raises(ValueError, match="trunks: 4 must be fewer than group_size"):
        RolloutConfig(group_size=4, tree=TreeConfig(trunks=4))


@pytest.mark.parametrize(
    ("ends", "rounds"),
    [(3, 1000), *(pytest.param(*each, marks=pytest.mark.soak) for each in ((1, 1000), (5, 1000), (1000, 4)))],
)
def test_an_interrupted_tree_comes_out_the_same(
    model: Model, sandbox: Sandbox, rows: list[Demonstration], tmp_path: Path, ends: int, rounds: int
) -> None:
    config = replace(TREE, tree=TreeConfig())
    sampling = TREE.sampling(seed=3, tree=TREE.tree)

    class Treed(RolloutLoop):
        def run(self, questions, _, **options):  # type: ignore[no-untyped-def]
            return super().run(questions, sampling, **options)

    def opened() -> RolloutLoop:
        loop = make_loop(model, sandbox, config)
        return Treed(loop.engine, sandbox, loop.processor, config)

    asked = [rows[0].question]
    expected, _, _ = sampled(opened(), asked, tmp_path / "rollouts" / ".whole.jsonl")
    path = tmp_path / "rollouts" / ".step_0.jsonl"
    with pytest.raises(Killed):
        sampled(opened(), asked, path, ends_after=ends, rounds=rounds)
    groups, _, _ = sampled(opened(), asked, path)
    assert alike(groups, expected)
    assert sampled(opened(), asked, path)[1:] == (6, 0)


def test_records_know_the_parent(model: Model, sandbox: Sandbox, trunk: Rollout, tmp_path: Path) -> None:
    branches = make_loop(model, sandbox).fork(trunk, 1, 2, CONFIG.sampling(temperature=1.2))
    path = tmp_path / "rollouts" / "step_0.jsonl"
    write_rollouts(path, [trunk, *branches])
    back = [rollout for rollout, _ in read_rollouts(path, processor=model.processor)]
    assert [r.parent for r in back] == [None, *(b.parent for b in branches)]
    assert [(r.first_round, r.session_seed) for r in back] == [(0, trunk.seed), (1, trunk.seed), (1, trunk.seed)]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    del rows[0]["parent"]  # as it was written before there were branches
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert next(read_rollouts(path))[0].parent is None
    (again,) = make_loop(model, sandbox).fork(back[1], 1, 1, CONFIG.sampling(temperature=1.2))
    assert again.token_ids[: start_of(trunk, 1)].tolist() == trunk.token_ids[: start_of(trunk, 1)].tolist()
    assert prefix_of(back[0], 1).turns == back[0].turns[:1]
