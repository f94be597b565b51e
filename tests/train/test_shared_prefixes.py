"""Training with shared prefixes: the losses and gradients of every rollout by itself, each token computed once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.train.rl_material import ROLLOUT, by_index, group_of, make_loop
from tests.train.sft_material import train_rows
from thyme.data.rows import Demonstration
from thyme.data.streams import endless
from thyme.engine import Engine, EngineConfig
from thyme.model import ImageInputs, LoraConfig, Model, Processor, add_adapters, build
from thyme.model.prefix_tree import PrefixTree
from thyme.rewards import RuleScorer
from thyme.rollout import RolloutConfig, RolloutLoop
from thyme.rollout.types import Question, Rollout
from thyme.sandbox import Sandbox
from thyme.toy.model import tiny_config
from thyme.toy.scenarios import demonstrations
from thyme.train import policy_update
from thyme.train.config import MismatchConfig, RlConfig, SftConfig
from thyme.train.mismatch import MismatchError
from thyme.train.objective import AllowedIds, reference_logprobs, rollout_loss, trained_hidden, trained_logprobs
from thyme.train.packing import Sample, TrainBatch, pack
from thyme.train.policy_samples import policy_samples
from thyme.train.policy_update import loss_of, packed_batches
from thyme.train.rl import train_rl
from thyme.train.sharding import TrainedModel
from thyme.train.tokenization import positions
from thyme.train.trainable import trainable

Picture = Callable[[int], ImageInputs]
RL = RlConfig(batch_size=2, learning_rate=3e-3, warmup_steps=0, record_steps=0)


@pytest.fixture(scope="module")
def samples(processor: Processor, picture: Picture) -> list[Sample]:
    """Two questions on pictures and one without, four rollouts each. Two of a group agree for long, beyond a picture of
    the sandbox's; one is what another begins with. Every token has a weight, a temperature and an advantage of its own.
    """
    draw, pad = np.random.default_rng(0), processor.image_token_id
    assert pad is not None
    made: list[Sample] = []

    def words(n: int) -> list[int]:
        return draw.integers(10, 90, n).tolist()

    system = words(6)
    for group in range(3):
        prompt = [*system, *([pad] if group < 2 else []), *words(5)]
        crop, said = [*words(3), pad, *words(2)], words(7)
        tails = [words(11), [*crop, *said, *words(5)], [*crop, *said, *words(9)], [*crop, *said]]
        for tail in tails:
            shown = [picture(group)] * (group < 2) + [picture(10 + group)] * (pad in tail)
            ids = np.asarray(processor.expand([*prompt, *tail], shown))
            count = len(ids)
            trained = (np.arange(count) >= len(processor.expand(prompt, shown[:1] * (group < 2)))) & (ids != pad)
            temperatures = draw.choice([0.0, 0.5, 1.0], count).astype(np.float32)
            made.append(
                Sample(
                    token_ids=ids,
                    positions=positions(processor, ids, shown),
                    weights=(trained * draw.uniform(0.01, 0.1, count)).astype(np.float32),
                    images=tuple(shown),
                    advantages=draw.standard_normal(count).astype(np.float32),
                    temperatures=temperatures,
                    rollout_logprobs=-draw.uniform(1, 3, count).astype(np.float32),
                    segments=(temperatures == 0).astype(np.uint8),
                    group=group,
                )
            )
    return made


def packed(samples: Sequence[Sample], processor: Processor, *, share: bool, limit: int | None = None) -> Any:
    return pack(samples, image_token_id=processor.image_token_id, max_tokens=limit, share_prefixes=share)


def stepped(
    model: Model, processor: Processor, batches: Sequence[TrainBatch], config: RlConfig, reference: Model | None
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the micro-batches together."""
    total = 0.0
    with trainable(model, config):
        for batch in batches:
            fused = bool(config.fused_head)
            allowed = AllowedIds.of(processor)
            loss, _ = rollout_loss(model, batch, allowed, loss_of(config), reference=reference, fused_head=fused)
            loss.backward()
            total += float(loss.detach())
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return total, found


SAID: list[dict[str, Any]] = [
    {},
    {"fused_head": True},
    {"activation_checkpointing": True, "kl_coef": 0.1},
    {"fused_head": True, "activation_checkpointing": True, "freeze_vision": True, "greedy_tokens": "exclude"},
    {"lora": True},
]
WAYS = [(said, limit, same_bits) for said in SAID for limit in (None, 130) for same_bits in (False, True)]
QUICK = [WAYS[1], WAYS[6], WAYS[8], WAYS[14], WAYS[19]]


@pytest.mark.parametrize(
    ("said", "limit", "same_bits"),
    [pytest.param(*way, marks=() if way in QUICK else pytest.mark.soak) for way in WAYS],
    ids=lambda value: ("_".join(value) or "plain") if isinstance(value, dict) else str(value),
)
def test_gradients_are_those_of_every_rollout_by_itself(
    said: dict[str, Any], limit: int | None, same_bits: bool, samples: list[Sample], processor: Processor
) -> None:
    model = build(tiny_config(), processor, seed=0)
    if said.get("lora"):
        add_adapters(model, LoraConfig(rank=4, alpha=8.0))
        for name, p in model.named_parameters():
            if name.endswith("lora_b"):
                torch.nn.init.normal_(p, std=0.02)
    reference = build(tiny_config(), processor, seed=1) if "kl_coef" in said else None
    config = replace(RL, kl_coef=0.0, fused_head=False)
    config = replace(config, **{key: value for key, value in said.items() if key != "lora"})
    alone, shared = (
        [replace(batch, same_bits=same_bits) for batch in packed(samples, processor, share=share, limit=limit)]
        for share in (False, True)
    )
    assert len(shared) == (1 if limit is None else 2)
    expected, wanted = stepped(model, processor, alone, config, reference)
    loss, found = stepped(model, processor, shared, config, reference)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert found.keys() == wanted.keys() and found
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-5 * float(grad.abs().max()), msg=name)


def test_hidden_states_and_gradients_in_float64(samples: list[Sample], processor: Processor) -> None:
    """To twelve digits, through pictures and all: what is left in float32 is rounding."""
    model = build(tiny_config(), processor, seed=0).double()

    def run(share: bool) -> tuple[Tensor, dict[str, Tensor]]:
        (batch,) = packed(samples, processor, share=share)
        hidden = trained_hidden(model, replace(batch, pixel_values=batch.pixel_values.double()))
        rows = [*hidden.split(batch.cu_seqlens.diff().tolist())]
        if not share:  # there samples lie by length
            order = sorted(range(len(samples)), key=lambda i: len(samples[i].token_ids))
            rows = [rows[order.index(i)] for i in range(len(samples))]
        hidden = torch.cat(rows)
        weight = torch.linspace(-9, 9, hidden.numel(), dtype=torch.float64).sin().view_as(hidden)
        (hidden * weight).sum().backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return hidden.detach(), found

    (expected, wanted), (hidden, found) = run(False), run(True)
    torch.testing.assert_close(hidden, expected, rtol=1e-12, atol=1e-12)
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-11, atol=1e-12 * float(grad.abs().max()), msg=name)


@contextmanager
def counted(model: Model) -> Iterator[dict[str, int]]:
    """Tokens that the first layer, and patches that the first block of the tower, has run over, both ways."""
    found = {"forward": 0, "backward": 0, "patches": 0, "patches_backward": 0}
    assert model.visual is not None

    def watch(name: str) -> Callable[..., None]:
        def before(module: Any, args: Any, out: Any) -> None:
            tensor = out[-1] if isinstance(out, tuple) else out
            found[name] += len(tensor)
            if tensor.requires_grad:
                back = "backward" if name == "forward" else "patches_backward"
                tensor.register_hook(lambda grad: found.__setitem__(back, found[back] + len(grad)))

        return before

    hooks = [
        model.decoder.layers[0].register_forward_hook(watch("forward")),
        model.visual.blocks[0].register_forward_hook(watch("patches")),
    ]
    yield found
    for hook in hooks:
        hook.remove()


def test_each_token_and_each_picture_is_computed_once(samples: list[Sample], processor: Processor) -> None:
    """Counted in the model: forward and backward over the distinct prefixes, and over each picture's patches."""
    distinct = set()
    for sample in samples:
        shown = np.zeros(len(sample.token_ids), dtype=np.int64)
        at = sample.token_ids == processor.image_token_id
        shown[at] = np.concatenate([[hash(i.digest)] * i.num_tokens for i in sample.images] or [[]])
        keys = list(zip(sample.token_ids, *sample.positions, shown, strict=True))
        distinct |= {tuple(keys[: n + 1]) for n in range(len(keys))}
    pictures = {i.digest: len(i.pixel_values) for sample in samples for i in sample.images}
    model = build(tiny_config(), processor, seed=0)
    for share in (True, False):
        with counted(model) as found:
            stepped(model, processor, packed(samples, processor, share=share), replace(RL, kl_coef=0.0), None)
        tokens = len(distinct) if share else sum(len(sample.token_ids) for sample in samples)
        assert found["forward"] == found["backward"] == tokens
        assert found["patches"] == found["patches_backward"] == sum(pictures.values())
    assert 2 * len(distinct) < sum(len(sample.token_ids) for sample in samples)


def test_log_probs_before_the_update_and_of_the_reference_are_those_of_every_rollout(
    samples: list[Sample], processor: Processor
) -> None:
    """The same bits, where they have to be those of the engine."""
    model, allowed = build(tiny_config(), processor, seed=0), AllowedIds.of(processor)
    found = []
    for share in (False, True):
        (batch,) = packed(samples, processor, share=share)
        batch = replace(batch, same_bits=True)
        with torch.no_grad():
            rows = trained_logprobs(model, batch, allowed, batch.temperatures, fused_head=False)
        assert torch.equal(rows, reference_logprobs(model, batch, allowed))
        found.append(sorted(part.tolist() for part in rows.split(batch.cu_seqlens.diff().tolist())))
    assert found[0] == found[1]


ABORT = replace(RL, mismatch=MismatchConfig(on_mismatch="abort", max_kl=0.0))


def shifted(batch: TrainBatch, tree: PrefixTree, node: int) -> TrainBatch:
    """The node is one position later than it should be."""
    start = tree.starts[node]
    moved = batch.positions.clone()
    moved[:, start : start + tree.lengths[node]] += 1
    return replace(batch, positions=moved)


def stale(batch: TrainBatch, tree: PrefixTree, node: int) -> TrainBatch:
    """What the node continues ends in another token: the prefix of something else."""
    parent = tree.parents[node]
    last = tree.starts[parent] + tree.lengths[parent] - 1
    ids = batch.input_ids.clone()
    ids[last] = (ids[last] + 1) % 100
    return replace(batch, input_ids=ids)


def rootless(batch: TrainBatch, tree: PrefixTree, node: int) -> TrainBatch:
    """The node, with all below it, continues nothing."""
    numbers = range(len(tree.lengths))
    below = [tree.starts[node] <= tree.starts[n] < tree.ends[node] for n in numbers]
    order = sorted(numbers, key=lambda n: (below[n], n))
    parents = [-1 if n == node or tree.parents[n] < 0 else order.index(tree.parents[n]) for n in order]
    moved = PrefixTree(tuple(tree.lengths[n] for n in order), tuple(parents))
    tokens = torch.cat([torch.arange(tree.starts[n], tree.starts[n] + tree.lengths[n]) for n in order])
    place = tokens.argsort()
    assert batch.image_positions is not None
    return replace(
        batch,
        input_ids=batch.input_ids[tokens],
        positions=batch.positions[:, tokens],
        lengths=moved.lengths,
        tree=moved,
        rows=place[batch.rows],
        image_positions=place[batch.image_positions],
    )


Plant = Callable[[TrainBatch, PrefixTree, int], TrainBatch]


def caught(
    planted: Plant, model: Model, groups: Sequence[Sequence[Rollout]], patch: pytest.MonkeyPatch, most: int
) -> int:
    """At how many nodes of the groups' tree it was planted and seen, each time; the batch as it is passes."""
    processor = model.processor
    assert processor is not None
    scored = [group_of(*group, totals=tuple(map(float, range(len(group))))) for group in groups]
    samples = policy_samples(processor, scored, ABORT)
    (honest,) = packed(samples, processor, share=True)

    def update(batch: TrainBatch) -> None:
        patch.setattr(policy_update, "pack", lambda *_, **__: [batch])
        packed_batches(TrainedModel(model), processor, [samples], ABORT, reference=None, same_bits=True)

    update(honest)
    tree = honest.tree
    assert tree is not None
    trained, found = honest.rows.tolist(), 0
    for node, parent in enumerate(tree.parents):
        if parent >= 0 and any(tree.starts[node] <= row < tree.ends[node] for row in trained) and found < most:
            with pytest.raises(MismatchError, match="Nothing was updated"):
                update(planted(honest, tree, node))
            found += 1
    return found


@pytest.mark.parametrize("planted", [shifted, stale, rootless])
def test_a_prefix_that_is_not_the_rollouts_own_ends_the_run_before_the_update(
    planted: Plant, taught: Model, asked: list[Question], sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted at one node after another, each time caught."""
    sampling = replace(ROLLOUT, group_size=4).sampling(seed=1)
    groups = make_loop(taught, sandbox).run(asked, sampling)
    assert caught(planted, taught, groups, monkeypatch, most=4) == 4


@pytest.fixture(scope="module")
def rows() -> list[Demonstration]:
    return [demonstrations(0, 1, {scenario: 1.0})[0] for scenario in ("zoom", "arithmetic")]


@pytest.fixture(scope="module")
def learned(processor: Processor, rows: list[Demonstration]) -> Model:
    """Knows two demonstrations well enough to run code and look at what comes back, and still strays."""
    model = build(tiny_config(), processor, seed=0)
    config = SftConfig(steps=34, batch_size=2, optimizer="adamw", learning_rate=2e-3, loss_rule="all")
    train_rows(model, processor, endless(rows), config)
    return model


def loop_of(model: Model, sandbox: Sandbox) -> RolloutLoop:
    """Small chunks and few blocks: prompts in parts, rounds appended, sequences preempted."""
    assert model.processor is not None
    engine = EngineConfig(
        deterministic=True, max_sequences=8, num_blocks=70, max_batch_tokens=96, block_size=16, quiet=True
    )
    rollout = RolloutConfig(
        prompt_style="short", group_size=6, max_tokens_per_round=72, max_tokens=160, max_rounds=2, temperature=1.3
    )
    return RolloutLoop(Engine(model, engine), sandbox, model.processor, rollout)


@pytest.fixture(scope="module")
def groups(learned: Model, sandbox: Sandbox, rows: list[Demonstration]) -> list[list[Rollout]]:
    loop = loop_of(learned, sandbox)
    return loop.run([row.question for row in rows], loop.config.sampling(seed=3))


@pytest.mark.soak
def test_rollouts_share_rounds_that_they_agree_on_and_have_the_bits_of_the_engine(
    groups: list[list[Rollout]], learned: Model, processor: Processor
) -> None:
    """Pictures, code, rounds appended in chunks, preemption: the divergence is exactly 0, and no token is computed
    twice."""
    scored = [group_of(*group, totals=tuple(map(float, range(len(group))))) for group in groups]
    samples = policy_samples(processor, scored, ABORT)
    assert any(len(rollout.images) > 1 for group in groups for rollout in group)
    assert any(rollout.num_code > 0 for group in groups for rollout in group)
    batches, metrics = packed_batches(
        TrainedModel(learned), processor, [samples], ABORT, reference=None, same_bits=True
    )
    assert metrics["batch/computed_per_unique"] == metrics["batch/encoded_per_picture"] == 1.0
    assert metrics["batch/shared_frac"] > 0.3
    (batch,) = batches[0]
    assert batch.tree is not None and batch.old_logprobs is not None
    assert torch.equal(batch.old_logprobs, batch.rollout_logprobs)
    # Beyond the prompts: some node below the root of a question has children of its own.
    assert max(batch.tree.depths) >= 2


@pytest.mark.soak
@pytest.mark.parametrize("share", [True, False], ids=["shared", "apart"])
def test_a_run_with_and_without(
    share: bool, learned: Model, processor: Processor, sandbox: Sandbox, rows: list[Demonstration]
) -> None:
    """Two steps, the KL term and two updates a batch on; they differ by rounding alone."""
    model = copy.deepcopy(learned)
    config = replace(ABORT, steps=2, kl_coef=0.01, updates_per_batch=2, share_prefixes=share)
    questions = endless([row.question for row in rows])
    history = train_rl(model, processor, loop_of(model, sandbox), questions, config, scorer=RuleScorer(by_index))
    for metrics in history:
        assert metrics["mismatch/kl"] == 0.0 and metrics["optim/skipped"] == 0.0
        assert (metrics["batch/computed_per_unique"] == 1.0) == share
        assert (metrics["batch/shared_frac"] > 0) == share
        assert metrics["batch/tokens"] >= metrics["batch/unique_tokens"] > 0


@pytest.mark.soak
@pytest.mark.parametrize("planted", [shifted, stale, rootless])
def test_a_plant_below_pictures_and_rounds_is_caught(
    planted: Plant, learned: Model, groups: list[list[Rollout]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert caught(planted, learned, groups, monkeypatch, most=1000) >= 10


@pytest.mark.soak
def test_a_prefix_that_the_engine_kept_from_older_weights_ends_the_run(
    learned: Model, processor: Processor, sandbox: Sandbox, rows: list[Demonstration]
) -> None:
    """The second step's rollouts begin with keys and values of the first one's weights."""
    model = copy.deepcopy(learned)
    loop = loop_of(model, sandbox)
    for forgets, name in ((loop.engine.blocks, "forget_prefixes"), (loop.engine, "sleep")):
        setattr(forgets, name, lambda: None)
    config, scorer = replace(ABORT, steps=2, batch_size=1), RuleScorer(by_index)
    with pytest.raises(MismatchError, match="trainer and engine differ"):
        train_rl(model, processor, loop, endless([rows[0].question]), config, scorer=scorer)
    assert loop.engine.weight_version == 1  # the first step went through
