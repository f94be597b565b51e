"""What the engine computes: greedy tokens of transformers, log-probs of the training path, whatever the schedule."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from tests import tiny
from thyme.engine import Engine, Prompt, SamplingParams
from thyme.kernels.token_logprobs import token_logprobs
from thyme.kernels.truncated_logprobs import truncated_logprobs
from thyme.model import ImageInputs, Model, ModelConfig, build

NEW = 24
GREEDY = SamplingParams(
    max_tokens=NEW, temperature=0.0, adaptive=False, banned_ids=(), ignore_eos=True, repetition=None
)
RANDOM = SamplingParams(max_tokens=NEW, seed=1, banned_ids=(), ignore_eos=True, repetition=None)


def transformers_greedy(
    reference: PreTrainedModel, ids: list[int], images: list[ImageInputs], image_id: int | None, new: int = NEW
) -> list[int]:
    row = torch.tensor([ids])
    extra: dict[str, Any] = {}
    if images:
        extra = dict(
            pixel_values=torch.from_numpy(np.concatenate([image.pixel_values for image in images])),
            image_grid_thw=torch.tensor([image.grid for image in images]),
            mm_token_type_ids=(row == image_id).int(),
        )
    options = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=None)
    out = reference.generate(input_ids=row, attention_mask=torch.ones_like(row), **options, **extra)
    return out[0, len(ids) :].tolist()


@pytest.fixture(scope="module")
def text_cases(text_model: Model, twin: Callable[..., PreTrainedModel]) -> list[tuple[list[int], list[int]]]:
    draw = np.random.default_rng(1)
    reference = twin(text_model)
    prompts = [draw.integers(3, 60, n).tolist() for n in (1, 3, 4, 7, 16, 17, 40)]
    return [(ids, transformers_greedy(reference, ids, [], None)) for ids in prompts]


@pytest.fixture(scope="module")
def image_cases(
    vision_model: Model, twin: Callable[..., PreTrainedModel], make_image: Any, shown: Any
) -> list[tuple[list[int], list[ImageInputs], list[int]]]:
    draw = np.random.default_rng(2)
    reference = twin(vision_model)
    cases = []
    for grids in ([(4, 4)], [(2, 6), (6, 4)], [(4, 4), (4, 4), (2, 2)], []):
        images = [make_image(rows, columns, i) for i, (rows, columns) in enumerate(grids)]
        ids = draw.integers(3, 59, 3).tolist()
        for image in images:
            ids += shown(image) + draw.integers(3, 59, int(draw.integers(0, 6))).tolist()
        ids += draw.integers(3, 59, 2).tolist()
        image_id = vision_model.config.image_token_id
        cases.append((ids, images, transformers_greedy(reference, ids, images, image_id)))
    return cases


# Chunks of 1 and 7 cut through blocks and images; 400 takes prompts whole; a small budget mixes decode and prefill.
@pytest.mark.parametrize(("chunk", "budget"), [(1, 32), (7, 33), (16, 400), (None, 400)])
def test_greedy_text_equals_transformers(
    text_model: Model, text_cases: list[tuple[list[int], list[int]]], make_engine: Any, chunk: int | None, budget: int
) -> None:
    engine = make_engine(text_model, prefill_chunk=chunk, max_batch_tokens=budget)
    completions = engine.generate([ids for ids, _ in text_cases], GREEDY)
    assert [completion.token_ids for completion in completions] == [expected for _, expected in text_cases]


@pytest.mark.parametrize(("chunk", "budget"), [(1, 32), (7, 33), (None, 400)])
def test_greedy_with_images_equals_transformers(
    vision_model: Model, image_cases: list[Any], make_engine: Any, chunk: int | None, budget: int
) -> None:
    engine = make_engine(vision_model, prefill_chunk=chunk, max_batch_tokens=budget)
    prompts = [Prompt(ids, images) for ids, images, _ in image_cases]
    completions = engine.generate(prompts, GREEDY)
    assert [completion.token_ids for completion in completions] == [expected for _, _, expected in image_cases]
    pictures = {image.digest for _, images, _ in image_cases for image in images}
    # A picture that is still shown by somebody is not encoded again; one that nobody shows any more may be.
    assert len(pictures) <= engine.stats()["images_encoded"] <= sum(len(images) for _, images, _ in image_cases)


@pytest.fixture(scope="module")
def many_cases(
    text_model: Model, twin: Callable[..., PreTrainedModel], score: Any
) -> list[tuple[list[int], list[int]]]:
    draw = np.random.default_rng(7)
    reference = twin(text_model)
    prompts = [draw.integers(3, 60, int(draw.integers(1, 120))).tolist() for _ in range(200)]
    return [(ids, transformers_greedy(reference, ids, [], None, new=128)) for ids in prompts]


@pytest.mark.soak
@pytest.mark.parametrize("chunk", [1, 7, 16, 64, None])
def test_greedy_equals_transformers_on_many_prompts(
    text_model: Model, many_cases: list[tuple[list[int], list[int]]], make_engine: Any, score: Any, chunk: int | None
) -> None:
    """200 prompts x 128 tokens. Where two tokens tie within rounding either is right, and ends the comparison."""
    params = SamplingParams(**{**_fields(GREEDY), "max_tokens": 128})
    engine = make_engine(text_model, prefill_chunk=chunk, num_blocks=3000)
    ties = 0
    for (ids, expected), completion in zip(
        many_cases, engine.generate([ids for ids, _ in many_cases], params), strict=True
    ):
        found = completion.token_ids
        at = next((i for i in range(128) if found[i] != expected[i]), None)
        if at is not None:
            logits = score(text_model, ids + found[:at])[-1]
            assert abs(float(logits[found[at]] - logits[expected[at]])) < 2e-5
            ties += 1
    assert ties <= 4


def _fields(params: SamplingParams) -> dict[str, Any]:
    return {name: getattr(params, name) for name in params.__dataclass_fields__}


# Few blocks force preemption, and recomputation with and without the prefix cache.
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_preemption_changes_nothing(
    text_model: Model, text_cases: list[tuple[list[int], list[int]]], make_engine: Any, prefix_cache: bool
) -> None:
    engine = make_engine(text_model, num_blocks=24, prefix_cache=prefix_cache)
    completions = engine.generate([ids for ids, _ in text_cases], GREEDY)
    assert [completion.token_ids for completion in completions] == [expected for _, expected in text_cases]
    stats = engine.stats()
    assert stats["preemptions"] > 0
    assert stats["recomputed_tokens"] > 0


def test_preemption_with_images_changes_nothing(vision_model: Model, image_cases: list[Any], make_engine: Any) -> None:
    engine = make_engine(vision_model, num_blocks=20)
    completions = engine.generate([Prompt(ids, images) for ids, images, _ in image_cases], GREEDY)
    assert [completion.token_ids for completion in completions] == [expected for _, _, expected in image_cases]
    assert engine.stats()["preemptions"] > 0


def test_a_prefix_found_again_changes_nothing(
    text_model: Model, text_cases: list[tuple[list[int], list[int]]], make_engine: Any
) -> None:
    engine = make_engine(text_model)
    prompts, expected = [ids for ids, _ in text_cases], [tokens for _, tokens in text_cases]
    for _ in range(2):
        assert [completion.token_ids for completion in engine.generate(prompts, GREEDY)] == expected
    # All full blocks but the one with the last token are found the second time.
    assert engine.stats()["cached_tokens"] == sum((len(ids) - 1) // 4 * 4 for ids in prompts)


def test_no_prefix_is_shared_between_different_images(
    vision_model: Model, make_engine: Any, make_image: Any, shown: Any, score: Any
) -> None:
    engine = make_engine(vision_model)
    first, second = make_image(4, 4, 1), make_image(4, 4, 2)
    for images in ([first], [second], [first], [second]):
        ids = [5, *shown(images[0]), 7, 8, 9]
        completion = engine.generate(Prompt(ids, images), GREEDY)[0]
        expected = score(vision_model, ids + completion.token_ids, images)[len(ids) - 1 : -1].argmax(-1)
        assert completion.token_ids == expected.tolist()
    assert engine.stats()["cached_tokens"] == 2 * 8  # the second time each is seen


def test_new_weights_are_not_answered_from_old_keys(text_model: Model, make_engine: Any, score: Any) -> None:
    engine = make_engine(text_model)
    ids = list(range(3, 40))
    before = engine.generate([ids], GREEDY)[0]
    weight = text_model.decoder.layers[0].self_attn.qkv.weight
    saved = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.mul_(-1.5)
        engine.weights_updated()
        after = engine.generate([ids], GREEDY)[0]
        assert after.token_ids == score(text_model, ids + after.token_ids)[len(ids) - 1 : -1].argmax(-1).tolist()
    finally:
        with torch.no_grad():
            weight.copy_(saved)
    assert after.token_ids != before.token_ids
    assert (set(before.weight_version.tolist()), set(after.weight_version.tolist())) == ({0}, {1})


def test_logprobs_are_those_of_the_training_path(
    vision_model: Model, make_engine: Any, make_image: Any, shown: Any, score: Any, tolerances: Any, prompts: Any
) -> None:
    image = make_image(4, 6, 1)
    cases: list[Prompt] = [Prompt(ids) for ids in prompts] + [Prompt([4, *shown(image), 5, 6], (image,))]
    banned = (60, 61, 62, 63)  # else random text would now and then show a picture
    params = SamplingParams(**{**_fields(RANDOM), "temperature": 0.7, "banned_ids": banned})
    for completion in make_engine(vision_model, prefill_chunk=5).generate(cases, params):
        sequence = completion.sequence
        assert sequence.token_ids[sequence.prompt_len :] == completion.token_ids
        logits = score(vision_model, sequence.token_ids, sequence.images)[sequence.prompt_len - 1 : -1]
        logits = logits[:, :60]
        drawn = torch.tensor(completion.token_ids)[:, None]
        raw = logits.log_softmax(-1)
        atol, rtol = tolerances["logprob", torch.float32]
        expected = {
            "logprobs_raw": raw.gather(1, drawn)[:, 0],
            "logprobs": (logits / 0.7).log_softmax(-1).gather(1, drawn)[:, 0],
            "entropies": -(raw.exp() * raw).sum(-1),
        }
        for name, values in expected.items():
            np.testing.assert_allclose(getattr(completion, name), values.numpy(), atol=atol, rtol=rtol, err_msg=name)
        assert completion.temperatures.tolist() == [np.float32(0.7)] * NEW


@pytest.mark.parametrize(
    ("family", "switches"), [("qwen3", dict(qk_norm=True, qkv_bias=False)), ("llama", dict(qkv_bias=False))]
)
@pytest.mark.parametrize("deterministic", [False, True])
def test_other_families_write_the_keys_they_are_trained_with(
    make_engine: Any,
    score: Any,
    tolerances: Any,
    prompts: Any,
    family: str,
    switches: dict[str, bool],
    deterministic: bool,
) -> None:
    """Norms of heads come before the rotation, which is in the engine's attention; few rows are padded."""
    model = build(ModelConfig(model_type=family, text=tiny.text_config(**switches)), seed=6)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.uniform_(0.5, 2.0)
    engine = make_engine(model, prefill_chunk=5, deterministic=deterministic)
    for completion in engine.generate(prompts[:6], RANDOM):
        raw = score(model, completion.sequence.token_ids)[completion.sequence.prompt_len - 1 : -1].log_softmax(-1)
        expected = raw.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0].numpy()
        np.testing.assert_allclose(completion.logprobs_raw, expected, atol=tolerances["logprob", torch.float32][0])


def test_banned_ids_leave_the_distribution(text_model: Model, make_engine: Any, score: Any) -> None:
    banned = tuple(range(0, 64, 2))
    params = SamplingParams(max_tokens=40, seed=3, banned_ids=banned, ignore_eos=True, repetition=None)
    free = SamplingParams(max_tokens=40, seed=3, banned_ids=(), ignore_eos=True, repetition=None)
    some, other = make_engine(text_model).generate([[5, 6, 7]] * 2, [params, free])  # both kinds in one batch
    assert not set(some.token_ids) & set(banned)
    assert set(other.token_ids) & set(banned)
    logits = score(text_model, some.sequence.token_ids)[2:-1]
    logits[:, list(banned)] = -torch.inf
    expected = logits.log_softmax(-1).gather(1, torch.tensor(some.token_ids)[:, None])[:, 0]
    np.testing.assert_allclose(some.logprobs, expected.numpy(), atol=2e-5)


def test_repetition_penalty_equals_transformers(
    text_model: Model, twin: Callable[..., PreTrainedModel], make_engine: Any
) -> None:
    reference = twin(text_model)
    ids = [5, 9, 11, 30]
    params = SamplingParams(**{**_fields(GREEDY), "repetition_penalty": 1.3})
    out = reference.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, 4, dtype=torch.int64),
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        repetition_penalty=1.3,
        pad_token_id=0,
        eos_token_id=None,
    )
    plain, penalized = make_engine(text_model).generate([ids, ids], [GREEDY, params])
    assert penalized.token_ids == out[0, 4:].tolist()
    assert penalized.token_ids != plain.token_ids


def test_truncation_keeps_to_what_it_keeps(text_model: Model, make_engine: Any, score: Any) -> None:
    limits = [dict(top_k=2), dict(top_p=0.5), dict(min_p=0.6), {}]
    params = [SamplingParams(**{**_fields(RANDOM), **limit}) for limit in limits]
    completions = make_engine(text_model).generate([[7, 8, 9]] * 4, params)
    ranks = []
    for completion, limit in zip(completions, limits, strict=True):
        logits = score(text_model, completion.sequence.token_ids)[2:-1]
        drawn = torch.tensor(completion.token_ids)[:, None]
        ranks.append((logits > logits.gather(1, drawn)).sum(-1))
        of_kept = token_logprobs if not limit else partial(truncated_logprobs, **limit)
        expected = of_kept(logits.float(), drawn[:, 0])[0]
        np.testing.assert_allclose(completion.logprobs, expected.numpy(), atol=2e-5)
        whole = logits.log_softmax(-1).gather(1, drawn)[:, 0].numpy()
        np.testing.assert_allclose(completion.logprobs_raw, whole, atol=2e-5)
    assert ranks[0].max() == 1
    probs = score(text_model, completions[2].sequence.token_ids)[2:-1].softmax(-1)
    chosen = probs.gather(1, torch.tensor(completions[2].token_ids)[:, None])[:, 0]
    assert (chosen >= 0.6 * probs.max(-1).values - 1e-6).all()
    assert ranks[3].max() > 2


def test_training_goes_on_after_generating(make_engine: Any, vision_model: Model, make_image: Any, shown: Any) -> None:
    """The engine leaves nothing in the shared module that autograd refuses, and does not change its mode."""
    image = make_image(4, 4, 9)
    ids = [3, *shown(image), 8]
    engine: Engine = make_engine(vision_model)
    engine.generate(Prompt(ids, (image,)), GREEDY)
    from thyme.model import PackedAttention, mrope_positions

    positions, _ = mrope_positions(ids, [image.grid], image_token_id=60, spatial_merge_size=2)
    for _ in range(2):
        features = vision_model.encode_images(torch.from_numpy(image.pixel_values), [image.grid])
        row = torch.tensor(ids)
        hidden = vision_model(
            row,
            torch.from_numpy(positions),
            PackedAttention([len(ids)]),
            image_features=features,
            image_positions=(row == 60).nonzero()[:, 0],
        )
        vision_model.logits(hidden).square().mean().backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in vision_model.parameters())
        vision_model.zero_grad()
        engine.generate(Prompt(ids, (image,)), GREEDY)
    assert vision_model.training == Model(vision_model.config).training
