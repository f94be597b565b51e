"""deterministic=True: the same bits for a sequence, whatever batch, chunk, cache or threads it shares."""

from typing import Any

import numpy as np
import pytest
import torch

from tests import tiny
from tests.interpreter import fix_order_of_products
from thyme.engine import Completion, Prompt, SamplingParams
from thyme.model import Model, ModelConfig, PackedAttention, TextConfig, build
from thyme.model.rope import mrope_positions

PARAMS = SamplingParams(max_tokens=16, temperature=0.8, seed=9, banned_ids=(60, 61, 62, 63), ignore_eos=True)


def assert_same_bits(one: Completion, other: Completion) -> None:
    assert one.token_ids == other.token_ids
    for name in ("logprobs", "logprobs_raw", "entropies", "temperatures"):
        a, b = getattr(one, name), getattr(other, name)
        assert np.array_equal(a.view(np.int32), b.view(np.int32)), name


SCHEDULES: list[dict[str, Any]] = [
    dict(prefill_chunk=1, max_batch_tokens=32),
    dict(prefill_chunk=7),
    dict(max_batch_tokens=33),
    dict(max_sequences=2, max_batch_tokens=19),
    dict(num_blocks=32),  # preempts
    dict(block_size=16),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: ",".join(f"{k}={v}" for k, v in schedule.items()))
def test_bits_do_not_depend_on_the_schedule(
    vision_model: Model, make_engine: Any, make_image: Any, shown: Any, prompts: Any, schedule: dict[str, Any]
) -> None:
    images = [make_image(4, 6, 1), make_image(2, 2, 2)]
    cases = [Prompt(ids) for ids in prompts] + [Prompt([4, *shown(image), 5, 6], (image,)) for image in images]
    alone = make_engine(vision_model, deterministic=True, prefix_cache=False)
    together = make_engine(vision_model, deterministic=True, **schedule)
    completions = together.generate(cases, PARAMS)
    again = together.generate(cases[::-1], PARAMS)[::-1]  # other neighbors, and prefixes found
    for case, completion, second in zip(cases, completions, again, strict=True):
        single = alone.generate(case, PARAMS)[0]
        assert_same_bits(single, completion)
        assert_same_bits(single, second)


# The widths are those of the toy and of models up to 1 B: BLAS chooses its paths by shape.
@pytest.mark.parametrize(
    ("hidden", "intermediate", "heads", "vocab"),
    [
        (48, 80, 4, 64),
        (128, 384, 4, 160),
        pytest.param(512, 1408, 8, 4096, marks=pytest.mark.soak),
        pytest.param(896, 4864, 14, 8192, marks=pytest.mark.soak),
    ],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_bits_do_not_depend_on_the_number_of_rows(
    make_engine: Any, hidden: int, intermediate: int, heads: int, vocab: int, threads: int
) -> None:
    text = TextConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=2,
        head_dim=hidden // heads,
        initializer_range=0.05,
    )
    model = build(ModelConfig(model_type="qwen2", text=text), seed=1)
    draw = np.random.default_rng(0)
    cases = [draw.integers(0, vocab, n).tolist() for n in (1, 2, 9, 31, 64)]
    params = SamplingParams(max_tokens=4, seed=3, repetition=None)
    torch.set_num_threads(threads)
    try:
        engine = make_engine(model, deterministic=True, prefix_cache=False, max_sequences=256, num_blocks=4000)
        alone = [engine.generate([case], params)[0] for case in cases]
        for copies in (2, 16):
            completions = engine.generate(cases * copies, params)
            for i, completion in enumerate(completions):
                assert_same_bits(alone[i % len(cases)], completion)
    finally:
        torch.set_num_threads(1)


def test_no_projection_has_fewer_than_16_rows(
    text_model: Model, make_engine: Any, prompts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BLAS may sum a product of a few rows in another order; without the flag a decode step of one sequence is one.

    Every projection is looked at, the LM head's product included: one a layer for qkv, o, gate_up, down, one a step.
    """
    rows: list[int] = []
    linear = torch.nn.functional.linear

    def watched(x: torch.Tensor, *args: Any) -> torch.Tensor:
        rows.append(len(x))
        return linear(x, *args)

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    fewest = {}
    for deterministic in (True, False):
        rows.clear()
        make_engine(text_model, deterministic=deterministic, pack_weights=False).generate(prompts[0], PARAMS)
        assert len(rows) == PARAMS.max_tokens * (2 * 4 + 1)
        fewest[deterministic] = min(rows)
    assert fewest == {True: 16, False: 1}


@torch.no_grad()
@pytest.mark.parametrize("threads", [1, 2])
def test_a_picture_encoded_alone_has_the_bits_it_has_among_others(model: Model, make_image: Any, threads: int) -> None:
    """As engine and trainer encode it. On two threads BLAS has other paths for 5, 6, 7, 9, 10 and 11 rows."""
    images = [make_image(*side, seed) for side in ((2, 2), (2, 6), (4, 4), (6, 6), (4, 10), (8, 8)) for seed in (1, 2)]

    def encoded(group: list[Any]) -> torch.Tensor:
        pixels = torch.from_numpy(np.concatenate([image.pixel_values for image in group]))
        return model.encode_images(pixels, [image.grid for image in group])

    together = encoded(images).split([image.num_tokens for image in images])
    torch.set_num_threads(threads)
    try:
        for image, expected in zip(images, together, strict=True):
            assert torch.equal(encoded([image]), expected), image.grid
    finally:
        torch.set_num_threads(1)


@torch.no_grad()
def test_rescoring_by_the_training_path_stays_within_the_tolerance(
    text_model: Model, make_engine: Any, prompts: Any, tolerances: Any
) -> None:
    """All rollouts of a batch packed into one forward, as the trainer does it."""
    params = SamplingParams(max_tokens=16, seed=9, banned_ids=(), ignore_eos=True, repetition=None)
    completions = make_engine(text_model, deterministic=True).generate(prompts, params)
    sequences = [completion.sequence.token_ids for completion in completions]
    positions = [mrope_positions(ids, [], image_token_id=None, spatial_merge_size=1)[0] for ids in sequences]
    flat = torch.tensor([token for ids in sequences for token in ids])
    attention = PackedAttention([len(ids) for ids in sequences])
    hidden = text_model(flat, torch.from_numpy(np.concatenate(positions, axis=1)), attention)
    logprobs = text_model.logits(hidden).log_softmax(-1)
    start = 0
    for completion, ids in zip(completions, sequences, strict=True):
        first = start + len(ids) - 16
        rows = logprobs[first - 1 : first + 15]
        expected = rows.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0].numpy()
        np.testing.assert_allclose(completion.logprobs_raw, expected, atol=tolerances["logprob", torch.float32][0])
        start += len(ids)


# Of more than a split of 512 keys, and one token beyond a number of whole blocks.
LONG = np.random.default_rng(4).integers(3, 60, 577).tolist()


@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
def test_triton_attention_does_not_depend_on_the_schedule(make_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole, as 576 and one, and found in the prefix cache but for one token: the last is prefilled, or decoded."""
    fix_order_of_products(monkeypatch)
    text = tiny.text_config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
    )
    model = build(ModelConfig(model_type="qwen2", text=text), seed=3)
    params = SamplingParams(max_tokens=2, temperature=0.8, seed=9, banned_ids=(), ignore_eos=True, repetition=None)
    config = dict(deterministic=True, attention="triton", block_size=16, num_blocks=80, max_batch_tokens=1024)
    whole = make_engine(model, **config).generate(LONG, params)[0]
    chunked = make_engine(model, prefill_chunk=576, **config)
    assert_same_bits(chunked.generate(LONG, params)[0], whole)
    assert_same_bits(chunked.generate(LONG, params)[0], whole)  # 576 tokens are found
    assert chunked.stats()["prefilled_tokens"] == 577 + 1
