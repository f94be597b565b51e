"""What an engine in fp8 costs: what is said of it, against log-probs computed one rollout at a time."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.train.rl_material import ROLLOUT as COLD
from tests.train.rl_material import hand_rollout
from thyme.engine import Engine, EngineConfig
from thyme.model import Model, PackedAttention, Processor
from thyme.rollout import RolloutLoop
from thyme.rollout.types import Question, Rollout
from thyme.sandbox import Sandbox
from thyme.train.engine_mismatch import EngineMismatch, engine_mismatch
from thyme.train.tokenization import positions

ROLLOUT = replace(COLD, temperature=0.7)


def drawn(model: Model, sandbox: Sandbox, asked: list[Question], **config: Any) -> list[Rollout]:
    assert model.processor is not None
    engine = Engine(model, EngineConfig(num_blocks=64, max_sequences=8, max_batch_tokens=512, quiet=True, **config))
    loop = RolloutLoop(engine, sandbox, model.processor, ROLLOUT)
    return [rollout for group in loop.run(asked, loop.config.sampling(seed=0)) for rollout in group]


@torch.no_grad()
def by_hand(model: Model, processor: Processor, rollout: Rollout) -> np.ndarray:
    """Trainer's minus engine's log-prob of each token that was drawn, at its temperature, 1 where greedy."""
    ids = torch.from_numpy(rollout.token_ids)
    extra: dict[str, Any] = {}
    if rollout.images:
        pixels = torch.from_numpy(np.concatenate([image.pixel_values for image in rollout.images]))
        extra["image_features"] = model.encode_images(pixels, [image.grid for image in rollout.images])
        extra["image_positions"] = (ids == processor.image_token_id).nonzero()[:, 0]
    places = torch.from_numpy(positions(processor, rollout.token_ids, rollout.images))
    logits = model.logits(model(ids, places, PackedAttention([len(ids)]), **extra)).double()[:-1]
    logits[:, list(processor.never_sampled_ids)] = -torch.inf
    logits[:, processor.vocab_size :] = -torch.inf
    warm = torch.from_numpy(rollout.temperatures)[1:].double()
    logits /= torch.where(warm == 0, 1.0, warm)[:, None]
    ours = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0].numpy()
    engines = np.where(rollout.temperatures == 0, rollout.logprobs_raw, rollout.logprobs)[1:]
    return (ours - engines)[rollout.sampled[1:]]


@pytest.mark.parametrize("more", [{"weight_dtype": "fp8"}, {"kv_dtype": "fp8"}], ids=["weights", "cache"])
def test_it_is_what_a_training_step_would_find(
    more: dict[str, Any], taught: Model, processor: Processor, sandbox: Sandbox, asked: list[Question]
) -> None:
    rollouts = drawn(taught, sandbox, asked, **more)
    found = engine_mismatch(taught, processor, rollouts, ROLLOUT)
    ratios = np.concatenate([by_hand(taught, processor, rollout) for rollout in rollouts])
    assert found is not None and found.tokens == len(ratios) > 40
    assert found.kl == pytest.approx(np.mean(np.expm1(ratios) - ratios), rel=1e-2, abs=1e-7)
    assert found.mean == pytest.approx(np.abs(ratios).mean(), rel=1e-3, abs=1e-5)
    assert found.largest == pytest.approx(np.abs(ratios).max(), rel=1e-3, abs=1e-5)
    assert found.largest > 1e-4


def test_without_fp8_there_is_rounding_alone(
    taught: Model, processor: Processor, sandbox: Sandbox, asked: list[Question]
) -> None:
    found = engine_mismatch(taught, processor, drawn(taught, sandbox, asked), ROLLOUT)
    assert found is not None and found.largest < 1e-4 and found.kl < 1e-8


def test_of_nothing_drawn_nothing_is_said(taught: Model, processor: Processor) -> None:
    assert engine_mismatch(taught, processor, []) is None
    assert engine_mismatch(taught, processor, [hand_rollout(())]) is None


def test_in_words() -> None:
    assert str(EngineMismatch(tokens=1234, kl=0.00123456, mean=0.01, largest=0.5)) == (
        "mismatch of the engine with the model as it is trained: kl 0.00123 nats a token, |dlogp| mean 0.01, largest "
        "0.5, over 1,234 tokens"
    )
