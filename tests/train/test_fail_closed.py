"""Trainer and engine give every trained token the same bits, whatever happens in a rollout; where they do not, the run
ends before the update and says on which token."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.by_heart import by_heart
from tests.train.rl_material import hand_rollout
from thyme.data.rows import Demonstration
from thyme.data.streams import endless
from thyme.engine import Engine, EngineConfig
from thyme.model import Model, Processor
from thyme.model.packed import ShortView
from thyme.rewards import Reward, RuleScorer
from thyme.rollout import RolloutConfig, RolloutLoop
from thyme.rollout.tree import TreeConfig
from thyme.rollout.types import Rollout
from thyme.sandbox import Sandbox
from thyme.toy.scenarios import demonstrations
from thyme.train.config import MismatchConfig, RlConfig
from thyme.train.mismatch import MismatchError, Worst, worst_token
from thyme.train.packing import pack
from thyme.train.policy_samples import rollout_sample
from thyme.train.rl import train_rl

EXACT = MismatchConfig(on_mismatch="abort", max_kl=0.0, max_token=0.0)
RL = RlConfig(steps=1, batch_size=2, learning_rate=1e-3, record_steps=0, kl_coef=0.0, mismatch=EXACT, credit="branch")
ROLLOUT = RolloutConfig(
    prompt_style="short",
    group_size=6,
    max_tokens_per_round=72,
    max_tokens=200,
    max_rounds=3,
    temperature=1.3,
    code_temperature=0.5,
    tree=TreeConfig(trunks=2, branches=2),
)


@pytest.fixture(scope="module")
def rows() -> list[Demonstration]:
    """A crop of a crop, so that pictures are appended, and a product."""
    return [demonstrations(0, 1, {scenario: 1.0})[0] for scenario in ("zoom", "arithmetic")]


@pytest.fixture(scope="module")
def taught(rows: list[Demonstration]) -> Model:
    return by_heart(rows)


def make_loop(model: Model, sandbox: Sandbox, num_blocks: int = 20) -> RolloutLoop:
    """So few blocks that rollouts are preempted."""
    assert model.processor is not None
    config = EngineConfig(
        num_blocks=num_blocks, max_sequences=8, max_batch_tokens=64, max_context=320, deterministic=True, quiet=True
    )
    return RolloutLoop(Engine(model, config), sandbox, model.processor, ROLLOUT)


def by_place(rollout: Rollout) -> Reward:
    """Every branch point has a spread."""
    return Reward(total=float(rollout.index % 4), result=0.0, consistency=0.0, formatting=0.0)


def step(model: Model, loop: RolloutLoop, rows: Sequence[Demonstration], config: RlConfig = RL) -> dict[str, float]:
    assert model.processor is not None
    questions = endless([row.question for row in rows])
    return train_rl(model, model.processor, loop, questions, config, scorer=RuleScorer(by_place))[-1]


def num_trained(loop: RolloutLoop) -> Callable[[], int]:
    """Counts what `run` draws."""
    drawn: list[int] = []
    run = loop.run

    def counted(*args: Any, **options: Any) -> list[list[Rollout]]:
        groups = run(*args, **options)
        drawn.extend(r.num_drawn for group in groups for r in group)
        return groups

    loop.run = counted  # type: ignore[method-assign]
    return lambda: sum(drawn)


def test_a_step_with_everything_on_has_no_mismatch(taught: Model, sandbox: Sandbox, rows: list[Demonstration]) -> None:
    model = copy.deepcopy(taught)
    loop = make_loop(model, sandbox)
    metrics = step(model, loop, rows)
    assert metrics["mismatch/kl"] == 0.0 and metrics["optim/updates"] == 1.0
    stats = loop.engine.stats()
    assert stats["preemptions"] + stats["evictions"] > 0


@pytest.mark.soak
@pytest.mark.parametrize("credit", ["group", "branch"])
def test_ten_thousand_trained_tokens_have_no_mismatch(
    credit: Any, taught: Model, sandbox: Sandbox, rows: list[Demonstration]
) -> None:
    """Over steps of training, each of which changes the weights."""
    model = copy.deepcopy(taught)
    loop = make_loop(model, sandbox)
    trained, steps = num_trained(loop), 0
    config = replace(RL, steps=200, credit=credit, learning_rate=1e-4)
    assert model.processor is not None

    def on_step(metrics: dict[str, float]) -> bool:
        nonlocal steps
        assert metrics["mismatch/kl"] == 0.0
        steps += 1
        return trained() >= 10_000

    questions = endless([row.question for row in rows])
    train_rl(model, model.processor, loop, questions, config, scorer=RuleScorer(by_place), on_step=on_step)
    assert trained() >= 10_000
    stats = loop.engine.stats()
    print(f"{credit}: {trained()} tokens in {steps} steps, {stats}")
    assert stats["preemptions"] > 0 and stats["evictions"] > 0 and stats["images_encoded"] > 0


def flipped_weight(loop: RolloutLoop, model: Model) -> Iterator[None]:
    """The engine runs a copy of the weights in which one bit of one of them differs, the lowest of the mantissa."""
    other = copy.deepcopy(model)
    weight = other.decoder.layers[0].self_attn.qkv.weight
    with torch.no_grad():
        flat = weight.view(-1).view(torch.int32)
        flat[flat.abs().argmax()] ^= 1 << 12
    loop.engine.runner.view = ShortView(other)
    yield


def stale_prefix(loop: RolloutLoop, model: Model) -> Iterator[None]:
    """Prefixes of earlier weights are found again."""
    loop.run([row.question for row in _rows()], loop.config.sampling(seed=9))
    with torch.no_grad():
        model.decoder.layers[0].self_attn.qkv.weight.mul_(1.01)
    loop.engine.weight_version += 1  # and nothing is forgotten
    yield


def shifted_position(loop: RolloutLoop, model: Model) -> Iterator[None]:
    """What is appended after a tool's call begins one position too late."""
    tokens = loop.engine.reader.tokens

    def shifted(prompt: Any, verb: str, start: int = 0) -> Any:
        return tokens(prompt, verb, start=start + (verb == "append"))

    loop.engine.reader.tokens = shifted  # type: ignore[method-assign]
    yield


def stale_branch(loop: RolloutLoop, model: Model) -> Iterator[None]:
    """A branch writes to the block that it shares with its parent."""
    loop.engine.scheduler.blocks.must_copy = lambda block: False  # type: ignore[method-assign]
    yield


def wrong_hidden(loop: RolloutLoop, model: Model) -> Iterator[None]:
    """A branch begins with the hidden state of another round."""
    branch = loop.engine.branch

    def from_the_first(sequence: Any, round: int, *args: Any, **options: Any) -> Any:
        sequence.starts[round].hidden = sequence.starts[0].hidden
        return branch(sequence, round, *args, **options)

    loop.engine.branch = from_the_first  # type: ignore[method-assign]
    yield


def _rows() -> list[Demonstration]:
    return [demonstrations(0, 1, {scenario: 1.0})[0] for scenario in ("zoom", "arithmetic")]


@pytest.mark.parametrize("plant", [flipped_weight, stale_prefix, shifted_position, stale_branch, wrong_hidden])
def test_what_is_planted_is_caught_before_the_update(
    plant: Callable[[RolloutLoop, Model], Iterator[None]], taught: Model, sandbox: Sandbox, rows: list[Demonstration]
) -> None:
    model = copy.deepcopy(taught)
    loop = make_loop(model, sandbox, num_blocks=200)
    next(plant(loop, model))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        MismatchError,
        match=r"differ most on rollout \S+/\d, token \d+ \(id \d+, in (text|code)\): log-prob -?\d\S* in the trainer, "
        r"-?\d\S* in the engine\. Nothing was updated",
    ):
        step(model, loop, rows)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_worst_token_is_named(processor: Processor) -> None:
    rollouts = [hand_rollout((1.0, 0.0), index=i) for i in range(2)]
    samples = [rollout_sample(processor, rollout, 1.0) for rollout in rollouts]
    (batch,) = pack(samples, image_token_id=processor.image_token_id)
    assert batch.rollout_logprobs is not None
    for row, rollout, place in ((1, 0, 3), (2, 1, 2)):
        logprobs = batch.rollout_logprobs.clone()
        logprobs[row] += 0.25
        found = worst_token(replace(batch, old_logprobs=logprobs), {})
        assert found == Worst(
            rollout=f"{rollouts[rollout].question.id}/{rollout}",
            token=place,
            token_id=5 + place,
            phase=("text", "code")[row % 2],
            trainer=float(logprobs[row]),
            engine=float(batch.rollout_logprobs[row]),
        )
        assert batch.phases is not None
        number = worst_token(replace(batch, old_logprobs=logprobs), {int(batch.phases[row]): "number"})
        assert number is not None and number.phase == "number"
        logprobs[0] = float("nan")
        broken = worst_token(replace(batch, old_logprobs=logprobs), {})
        assert broken is not None and broken.token == 2 and broken.difference == np.inf


def test_one_token_is_enough_to_refuse(taught: Model, sandbox: Sandbox, rows: list[Demonstration]) -> None:
    """A mean over hundreds of tokens hides it."""
    model = copy.deepcopy(taught)
    loop = make_loop(model, sandbox, num_blocks=200)
    run = loop.run

    def lying(*args: Any, **options: Any) -> list[list[Rollout]]:
        groups = run(*args, **options)
        rollout = groups[0][1]
        place = np.flatnonzero(rollout.sampled & (rollout.temperatures > 0))[3]
        rollout.logprobs[place] = np.nextafter(rollout.logprobs[place], np.float32(-np.inf))
        return groups

    loop.run = lying  # type: ignore[method-assign]
    loose = replace(RL, mismatch=replace(EXACT, max_kl=0.1))
    with pytest.raises(MismatchError, match=rf"nats on a token.*max_token \(0.0\).*{rows[0].question.id}/1, token"):
        step(model, loop, rows, loose)
