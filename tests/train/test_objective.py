"""The objective: normalizations by hand, micro-batches add up, what the model did not write has no gradient."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from thyme.kernels.grpo_loss import GrpoLossConfig
from thyme.kernels.linear_grpo_loss import linear_grpo_loss
from thyme.model import ImageInputs, Model, Processor
from thyme.rollout import RolloutConfig
from thyme.train import objective
from thyme.train.objective import (
    AllowedIds,
    normalize,
    reference_logprobs,
    rollout_loss,
    supervised_loss,
    trained_logits,
    trained_logprobs,
)
from thyme.train.packing import Sample, pack
from thyme.train.tokenization import supervised_sample

Picture = Callable[[int], ImageInputs]
OUT = "<sandbox_output><image></sandbox_output>"


def demonstration(processor: Processor, picture: Picture, number: int) -> Sample:
    prompt = processor.encode(processor.chat("<image>What digit is on the red sign?"))
    response = f"<think>{'The red ' * number}<code>x{number}</code>{OUT}The digit is {number}.<answer>{number}</answer>"
    return supervised_sample(processor, prompt, response, [picture(number), picture(number + 50)])


def gradients(model: Model) -> dict[str, torch.Tensor]:
    out = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return out


def weights_of(counts: list[list[int]], normalization: str, constant: int | None = None) -> list[list[float]]:
    """The weight of a trained token of each sample, for groups of samples with so many trained tokens."""
    groups = [
        [
            Sample(
                token_ids=np.arange(6),
                positions=np.zeros((3, 6), dtype=np.int64),
                weights=np.asarray([0.0] * (6 - count) + [1.0] * count, dtype=np.float32),
            )
            for count in group
        ]
        for group in counts
    ]
    samples = normalize(groups, normalization, constant=constant)  # type: ignore[arg-type]
    flat = iter(float(sample.weights.max()) for sample in samples)
    return [[next(flat) for _ in group] for group in counts]


def test_normalizations_by_hand() -> None:
    counts = [[1, 3], [2, 2]]
    np.testing.assert_allclose(weights_of(counts, "group_tokens"), [[1 / 8, 1 / 8], [1 / 8, 1 / 8]])
    np.testing.assert_allclose(weights_of([[1, 1], [4, 4]], "group_tokens"), [[1 / 4, 1 / 4], [1 / 16, 1 / 16]])
    np.testing.assert_allclose(weights_of([[1, 1], [4, 4]], "batch_tokens"), [[1 / 10, 1 / 10], [1 / 10, 1 / 10]])
    np.testing.assert_allclose(weights_of(counts, "sequence_mean"), [[1 / 4, 1 / 12], [1 / 8, 1 / 8]])
    np.testing.assert_allclose(weights_of(counts, "constant", constant=5), [[1 / 20] * 2] * 2)
    # A rollout without a trained token weighs nothing and breaks nothing.
    np.testing.assert_allclose(weights_of([[0, 2], [0, 0]], "group_tokens"), [[0, 1 / 4], [0, 0]])
    np.testing.assert_allclose(weights_of([[0, 2]], "sequence_mean"), [[0, 1 / 4]])
    with pytest.raises(ValueError, match="number of tokens"):
        weights_of(counts, "constant")
    with pytest.raises(ValueError, match="batch_tokens"):
        weights_of(counts, "tokens")


def test_one_batch_of_8_equals_4_of_2(model: Model, processor: Processor, picture: Picture) -> None:
    allowed = AllowedIds.of(processor)
    samples = normalize([[demonstration(processor, picture, n) for n in range(1, 9)]], "batch_tokens")
    losses, grads = [], []
    for max_tokens in (None, 2 * max(len(sample.token_ids) for sample in samples)):
        batches = pack(samples, image_token_id=processor.image_token_id, max_tokens=max_tokens)
        assert len(batches) == (1 if max_tokens is None else 4)
        total = 0.0
        for batch in batches:
            loss = supervised_loss(model, batch, allowed)
            loss.backward()
            total += float(loss.detach())
        losses.append(total)
        grads.append(gradients(model))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], atol=2e-6, rtol=1e-4)


def test_packing_equals_one_sequence_at_a_time(model: Model, processor: Processor, picture: Picture) -> None:
    samples = [demonstration(processor, picture, n) for n in (1, 2, 5)]
    with torch.no_grad():
        together = trained_logits(model, pack(samples, image_token_id=processor.image_token_id)[0])
        alone = [trained_logits(model, pack([s], image_token_id=processor.image_token_id)[0]) for s in samples]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_what_the_model_did_not_write_has_exactly_zero_gradient(
    model: Model, processor: Processor, picture: Picture
) -> None:
    """Sandbox tags, their content, image tokens, prompt: the state that would predict them gets no gradient at all."""
    sample = demonstration(processor, picture, 3)
    (batch,) = pack([sample], image_token_id=processor.image_token_id)
    states: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, args: object, hidden: torch.Tensor) -> None:
        hidden.retain_grad()
        states.append(hidden)

    handle = model.register_forward_hook(keep)
    supervised_loss(model, batch, AllowedIds.of(processor)).backward()
    handle.remove()
    gradient = states[0].grad
    assert gradient is not None
    predicts_trained = torch.from_numpy(np.append(sample.weights[1:] > 0, False))
    kinds = {processor.decode([token]) for token in sample.token_ids[sample.weights == 0].tolist()}
    assert {"<sandbox_output>", "</sandbox_output>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>"} <= kinds
    assert torch.count_nonzero(gradient[~predicts_trained]) == 0
    assert (gradient[predicts_trained] != 0).any(dim=1).all()


def test_the_fused_head_refuses_truncated_rollouts(model: Model, processor: Processor, picture: Picture) -> None:
    allowed = AllowedIds.of(processor, RolloutConfig(top_k=5))
    (batch,) = pack([demonstration(processor, picture, 1)], image_token_id=processor.image_token_id)
    assert allowed.cuts(batch) == {"top_k": 5}
    assert AllowedIds.of(processor, RolloutConfig(top_k=0, top_p=1.0)) == AllowedIds.of(processor)
    with pytest.raises(ValueError, match="no logits to truncate by"):
        trained_logprobs(model, batch, allowed, fused_head=True)
    whole = trained_logprobs(model, batch, AllowedIds.of(processor), fused_head=False)
    assert (trained_logprobs(model, batch, allowed, fused_head=False) >= whole - 1e-6).all()


def test_never_sampled_ids_have_probability_zero(model: Model, processor: Processor, picture: Picture) -> None:
    allowed = AllowedIds.of(processor)
    assert processor.image_token_id in allowed.banned_ids
    (batch,) = pack([demonstration(processor, picture, 1)], image_token_id=processor.image_token_id)
    expected = supervised_loss(model, batch, allowed).detach()
    with torch.no_grad():  # the embedding is tied or not: raise what a banned id would score, by its bias-free row
        assert model.lm_head is not None
        model.lm_head.weight[list(allowed.banned_ids)] *= 100
        model.lm_head.weight[allowed.size :] *= 100
    assert torch.equal(supervised_loss(model, batch, allowed).detach(), expected)


def rollout_like(sample: Sample, advantage: float) -> Sample:
    length = len(sample.token_ids)
    return replace(
        sample,
        advantages=np.full(length, advantage, dtype=np.float32),
        temperatures=np.ones(length, dtype=np.float32),
        rollout_logprobs=np.zeros(length, dtype=np.float32),
        segments=np.zeros(length, dtype=np.uint8),
    )


def test_on_policy_ratio_is_exactly_1_and_the_loss_is_minus_the_advantage(
    model: Model, processor: Processor, picture: Picture
) -> None:
    samples = [rollout_like(demonstration(processor, picture, n), a) for n, a in ((1, 2.0), (2, -1.0))]
    (batch,) = pack(normalize([samples], "sequence_mean"), image_token_id=processor.image_token_id)
    loss, metrics = rollout_loss(model, batch, AllowedIds.of(processor), GrpoLossConfig())
    values = metrics.as_dict()
    assert values["ratio"] == values["ratio_max"] == 1.0
    assert float(loss.detach()) == pytest.approx(-(2.0 - 1.0) / 2, abs=1e-6)


def test_on_policy_gradient_is_the_policy_gradient(model: Model, processor: Processor, picture: Picture) -> None:
    """-A grad log pi: twice the advantage of a supervised sample gives twice minus its supervised gradient."""
    plain = demonstration(processor, picture, 4)
    (supervised,) = pack(normalize([[plain]], "batch_tokens"), image_token_id=processor.image_token_id)
    supervised_loss(model, supervised, AllowedIds.of(processor)).backward()
    expected = gradients(model)
    samples = normalize([[rollout_like(plain, -2.0)]], "batch_tokens")
    (batch,) = pack(samples, image_token_id=processor.image_token_id)
    rollout_loss(model, batch, AllowedIds.of(processor), GrpoLossConfig())[0].backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, -2 * expected[name], atol=1e-6, rtol=1e-4)


def test_supervised_tokens_multiply_the_fused_head_three_times(
    model: Model, processor: Processor, picture: Picture
) -> None:
    """Forward, and back to hidden states and weights, as with stored logits: their gradient is known before."""
    (batch,) = pack([demonstration(processor, picture, 4)], image_token_id=processor.image_token_id)

    def flops(fused_head: bool) -> int:
        with FlopCounterMode(display=False) as counter:
            supervised_loss(model, batch, AllowedIds.of(processor), fused_head=fused_head).backward()
        return counter.get_total_flops()

    assert flops(fused_head=True) <= flops(fused_head=False)


def test_the_fused_head_gives_the_same_losses_and_gradients(
    model: Model, processor: Processor, picture: Picture
) -> None:
    from thyme.model import build
    from thyme.toy.model import tiny_config

    allowed, other = AllowedIds.of(processor), build(tiny_config(), processor, seed=1)
    samples = [rollout_like(demonstration(processor, picture, n), a) for n, a in ((1, 2.0), (2, -1.0))]
    samples[0].temperatures[::3] = 0.0
    samples[1].temperatures[::2] = 0.7
    (batch,) = pack(normalize([samples], "sequence_mean"), image_token_id=processor.image_token_id)

    def both(fused_head: bool) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
        losses = [
            supervised_loss(model, batch, allowed, fused_head=fused_head),
            rollout_loss(model, batch, allowed, GrpoLossConfig(), reference=other, fused_head=fused_head)[0],
        ]
        grads = []
        for loss in losses:
            model.zero_grad()
            loss.backward()
            grads.append(gradients(model))
        return [loss.detach() for loss in losses], grads

    expected, expected_grads = both(False)
    fused, fused_grads = both(True)
    torch.testing.assert_close(fused, expected, atol=1e-5, rtol=1e-5)
    for fused_grad, expected_grad in zip(fused_grads, expected_grads, strict=True):
        torch.testing.assert_close(fused_grad, expected_grad, atol=1e-5, rtol=1e-3)


def test_the_fused_loss_is_told_what_the_host_knows(
    model: Model, processor: Processor, picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many rows count, so that it asks nobody, and whether there is a temperature to compute; and its gradients
    cost three products with the head, not four."""
    told: list[tuple[int | None, bool]] = []

    def loss_of(*args: Any, num_counted: int | None, tempered: bool, **more: Any) -> Any:
        told.append((num_counted, tempered))
        return linear_grpo_loss(*args, num_counted=num_counted, tempered=tempered, **more)

    monkeypatch.setattr(objective, "linear_grpo_loss", loss_of)
    vocab, products = AllowedIds.of(processor).size, []
    for temperature in (0.0, 0.7):
        samples = [rollout_like(demonstration(processor, picture, 1), 2.0)]
        samples[0].temperatures[::3] = temperature
        (batch,) = pack(normalize([samples], "sequence_mean"), image_token_id=processor.image_token_id)
        with FlopCounterMode(display=False) as counter:
            hidden = torch.zeros(len(batch.rows), model.config.text.hidden_size, requires_grad=True)
            monkeypatch.setattr(objective, "trained_hidden", lambda model, batch, hidden=hidden: hidden)
            rollout_loss(model, batch, AllowedIds.of(processor), GrpoLossConfig(), fused_head=True)[0].backward()
        products.append(counter.get_total_flops() / (2 * hidden.numel() * vocab))
        assert told[-1] == (len(batch.rows), temperature == 0.7)
    assert products == pytest.approx([3, 3], abs=0.1)  # and the metrics', which are few


def test_kl_to_itself_is_zero_and_to_another_is_not(model: Model, processor: Processor, picture: Picture) -> None:
    allowed = AllowedIds.of(processor)
    (batch,) = pack(
        normalize([[rollout_like(demonstration(processor, picture, 2), 1.0)]], "batch_tokens"),
        image_token_id=processor.image_token_id,
    )
    _, metrics = rollout_loss(model, batch, allowed, GrpoLossConfig(), reference=model)
    assert metrics.as_dict()["kl_ref"] == 0.0
    assert not reference_logprobs(model, batch, allowed).requires_grad
    from thyme.model import build
    from thyme.toy.model import tiny_config

    _, metrics = rollout_loss(
        model, batch, allowed, GrpoLossConfig(), reference=build(tiny_config(), processor, seed=1)
    )
    assert metrics.as_dict()["kl_ref"] > 0.01
