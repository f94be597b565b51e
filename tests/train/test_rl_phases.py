"""RL on rollouts whose phases are drawn each in its own way: the trainer means what the sampler did."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.train.rl_material import ROLLOUT, by_index, hand_rollout
from thyme.data.streams import endless
from thyme.engine import Engine, EngineConfig
from thyme.engine.phases import CODE, NUMBER, TEXT
from thyme.kernels.grpo_loss import GrpoLossConfig, grpo_loss
from thyme.model import Model, Processor
from thyme.rewards import RuleScorer
from thyme.rollout import RolloutLoop
from thyme.rollout.phases import PhaseConfig
from thyme.rollout.types import Question
from thyme.sandbox import Sandbox
from thyme.train.config import RlConfig
from thyme.train.objective import AllowedIds, trained_logprobs
from thyme.train.packing import Sample, pack
from thyme.train.policy_samples import rollout_sample
from thyme.train.rl import train_rl
from thyme.train.rl_metrics import phase_metrics

PHASED = replace(
    ROLLOUT,
    temperatures={"code": 0.3, "number": 2.0, "think": 0.8},
    phases={
        "think": PhaseConfig(start="<think>", end="</think>", top_p=0.95),
        "number": PhaseConfig(top_k=6),
        "code": PhaseConfig(min_p=0.01),
    },
)


def make_loop(model: Model, sandbox: Sandbox) -> RolloutLoop:
    assert model.processor is not None
    config = EngineConfig(num_blocks=64, max_sequences=8, max_batch_tokens=512, deterministic=True, quiet=True)
    return RolloutLoop(Engine(model, config, phases=PHASED.known_phases), sandbox, model.processor, PHASED)


def test_the_trainer_computes_the_bits_that_the_engine_recorded(
    taught: Model, processor: Processor, sandbox: Sandbox, asked: list[Question]
) -> None:
    groups = make_loop(taught, sandbox).run(asked, PHASED.sampling(seed=1))
    samples = [rollout_sample(processor, rollout, 1.0) for group in groups for rollout in group]
    (batch,) = pack(samples, image_token_id=processor.image_token_id)
    batch = replace(batch, same_bits=True)
    assert batch.phases is not None and batch.temperatures is not None and batch.rollout_logprobs is not None
    assert {TEXT, CODE, NUMBER, 5} <= set(batch.phases.tolist())
    warmth = torch.tensor([1.0, 0.3, 2.0, 0.3, 1.0, 0.8])
    assert torch.equal(batch.temperatures, warmth[batch.phases.long()])
    with torch.no_grad():
        found, plain = (
            trained_logprobs(taught, batch, allowed, batch.temperatures, fused_head=False)
            for allowed in (AllowedIds.of(processor, PHASED), AllowedIds.of(processor))
        )
    assert torch.equal(found, batch.rollout_logprobs)
    assert (plain != found)[batch.phases == NUMBER].any()  # the numbers' top_k counts


def test_a_run_whose_phases_differ_is_on_policy_to_the_bit(
    taught: Model, processor: Processor, sandbox: Sandbox, asked: list[Question]
) -> None:
    model = copy.deepcopy(taught)
    config = RlConfig(steps=2, batch_size=2, learning_rate=1e-3, kl_coef=0.0, greedy_tokens="soft", record_steps=0)
    loop = make_loop(model, sandbox)
    for metrics in train_rl(model, processor, loop, endless(asked), config, scorer=RuleScorer(by_index)):
        assert metrics["mismatch/kl"] == 0.0 and metrics["mismatch/ess"] == 1.0
        shares = [metrics[f"phase/{name}/share"] for name in ("text", "code", "number", "think", "string", "answer")]
        assert min(shares[:4]) > 0 and sum(shares) == pytest.approx(1.0)
        assert metrics["phase/number/greedy_frac"] == 0.0
        assert metrics["phase/number/entropy"] >= 0 >= metrics["phase/number/logprob"]


def test_gradients_are_those_of_each_phases_own_distribution() -> None:
    """In float64, against a softmax of the kept ids that is written out row by row."""
    draw = np.random.default_rng(0)
    limits = AllowedIds(size=11, banned_ids=(), limits=PHASED.limits_by_phase())
    phases = np.array([TEXT, CODE, NUMBER, 5, NUMBER, CODE, 5, TEXT], dtype=np.uint8)
    tau = torch.tensor([1.0, 0.3, 2.0, 0.3, 1.0, 0.8], dtype=torch.float32)
    logits = torch.from_numpy(draw.standard_normal((8, 11)) * 2).requires_grad_()
    advantages = torch.from_numpy(draw.standard_normal(8)).float()
    weights = torch.from_numpy(draw.uniform(0.1, 1.0, 8)).float()
    targets = logits.detach().argmax(-1)
    (batch,) = pack([sample_of(phases, targets)], image_token_id=None)
    cuts = limits.cuts(batch)
    assert all(isinstance(cut, torch.Tensor) for cut in cuts.values()) and set(cuts) == {"top_k", "top_p", "min_p"}
    config = GrpoLossConfig(kl_coef=0.0)
    temperature = tau[torch.from_numpy(phases).long()]
    loss, _ = grpo_loss(logits, targets, advantages, weights, temperature=temperature, config=config, **cuts)
    (found,) = torch.autograd.grad(loss, logits)

    total = torch.zeros((), dtype=torch.float64)
    for row, phase in enumerate(phases.tolist()):
        top_k, top_p, min_p = limits.limits[phase]
        p = (logits[row].detach() / float(tau[phase])).softmax(-1)
        order = p.argsort(descending=True)[: top_k or 11]
        before = (p[order] / p[order].sum()).cumsum(0) - p[order] / p[order].sum()
        pairs = zip(order.tolist(), before.tolist(), strict=True)
        kept = [i for i, b in pairs if b < top_p and p[i] >= min_p * p.max()]
        logprob = (logits[row, kept] / float(tau[phase])).log_softmax(-1)[kept.index(int(targets[row]))]
        total = total - weights[row].double() * advantages[row].double() * (logprob - logprob.detach()).exp()
    (expected,) = torch.autograd.grad(total, logits)
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(loss.double(), total.detach(), atol=1e-6, rtol=1e-6)
    assert (found[2] == 0).sum() == 5  # outside of the six that a number is drawn among


def sample_of(phases: NDArray[np.uint8], targets: torch.Tensor) -> Sample:
    n = len(phases) + 1
    return Sample(
        token_ids=np.concatenate([[0], targets.numpy()]),
        positions=np.zeros((3, n), dtype=np.int64),
        weights=np.array([0.0] + [1.0] * (n - 1), dtype=np.float32),
        phases=np.concatenate([[0], phases]).astype(np.uint8),
    )


def test_one_limit_for_all_phases_stays_one_number() -> None:
    (batch,) = pack([sample_of(np.zeros(2, np.uint8), torch.tensor([1, 2]))], image_token_id=None)
    config = replace(ROLLOUT, top_p=0.9, temperatures={"number": 0.6})
    assert AllowedIds(size=9, banned_ids=(), limits=config.limits_by_phase()).cuts(batch) == {"top_p": 0.9}
    assert AllowedIds(size=9, banned_ids=()).cuts(batch) == {}
    off = replace(config, phases={"think": PhaseConfig(start="<think>", end="</think>", top_p=1.0)})
    assert off.limits_by_phase()[5] == (0, 1.0, 0.0)
    assert replace(off, adaptive=False).limits_by_phase()[5] == (0, 0.9, 0.0)


def test_phase_metrics_by_hand() -> None:
    phases = np.array([0, 0, 0, 1, 2, 2], dtype=np.uint8)
    rollout = hand_rollout(
        (1.0, 0.0, 0.6, 0.6),
        phases=phases,
        entropies=np.array([0, 0, 0.5, 1.0, 2.0, 4.0], dtype=np.float32),
        logprobs_raw=np.array([0, 0, -1.0, -2.0, -3.0, -4.0], dtype=np.float32),
    )
    metrics = phase_metrics([[rollout]], {0: "text", 1: "code", 2: "number", 5: "think"})
    assert metrics == {
        "phase/text/share": 0.25,
        "phase/text/entropy": 0.5,
        "phase/text/logprob": -1.0,
        "phase/text/greedy_frac": 0.0,
        "phase/code/share": 0.25,
        "phase/code/entropy": 1.0,
        "phase/code/logprob": -2.0,
        "phase/code/greedy_frac": 1.0,
        "phase/number/share": 0.5,
        "phase/number/entropy": 3.0,
        "phase/number/logprob": -3.5,
        "phase/number/greedy_frac": 0.0,
        "phase/think/share": 0.0,
    }
