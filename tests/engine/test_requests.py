"""Requests: what is refused, in words that help; generate, stream; the size of the cache."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests import tiny
from thyme.engine import Engine, EngineConfig, Prompt, SamplingParams
from thyme.model import Model, ModelConfig, Processor, build, load_model, save

PARAMS = SamplingParams(max_tokens=6, seed=1, banned_ids=(), ignore_eos=True, repetition=None)


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("n", 0, "n must be at least 1"),
        ("max_tokens", 0, "max_tokens must be at least 1"),
        ("temperature", -0.1, "temperature must be finite and at least 0, got -0.1"),
        ("temperature", float("nan"), "temperature must be finite"),
        ("code_temperature", float("inf"), "code_temperature must be finite"),
        ("top_k", -1, "top_k must be at least 0"),
        ("top_p", 0.0, r"top_p must lie in \(0, 1\]"),
        ("min_p", 1.5, r"min_p must lie in \[0, 1\]"),
        ("repetition_penalty", 0.0, "repetition_penalty must be positive"),
        ("seed", 1 << 63, "seed"),
        ("stop", "</code>", "stop must be a tuple of texts"),
        ("stop", ("",), "none empty"),
        ("banned_ids", "none", "banned_ids must be 'default' or a tuple"),
        ("repetition", "strict", "repetition must be 'default' or None"),
    ],
)
def test_sampling_params_are_checked(field: str, value: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        SamplingParams(**{field: value})


def test_limits_beyond_what_the_sampler_takes_draw_what_they_say() -> None:
    """The sampler refuses them, in a step that all requests share."""
    config = ModelConfig(model_type="qwen2", text=tiny.text_config(initializer_range=0.2))
    engine = Engine(build(config, seed=2), EngineConfig(num_blocks=40, quiet=True))

    def drawn(**limits: Any) -> list[int]:
        return engine.generate([[3, 4]], replace(PARAMS, **limits))[0].token_ids

    assert drawn(top_k=1 << 40) == drawn() and drawn(top_p=1e-300) == drawn(top_k=1) != drawn()


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        (dict(block_size=0), "block_size must be at least 1"),
        (dict(num_blocks=0), "num_blocks must be at least 1 or absent"),
        (dict(num_blocks=5, kv_bytes=5), "not both"),
        (dict(memory_fraction=0.0), "memory_fraction"),
        (dict(attention="flash"), "attention must be one of auto, triton, flash_attn, reference, got 'flash'"),
        (dict(prefill_chunk=2049), r"prefill_chunk \(2049\) cannot be reached .* max_batch_tokens \(2048\)"),
        (dict(max_context=161, num_blocks=10), r"max_context \(161\) does not fit into 10 blocks of 16 tokens \(160\)"),
        (dict(max_sequences=64, max_batch_tokens=32), r"max_batch_tokens \(32\) must be at least max_sequences \(64\)"),
    ],
)
def test_engine_config_is_checked(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        EngineConfig(**fields)


def test_biased_logprobs_are_known() -> None:
    for option in (dict(top_k=0, top_p=1.0, min_p=0.0), dict(top_k=5), dict(top_p=0.9), dict(min_p=0.1)):
        assert not SamplingParams(**option).biases_logprobs
    assert SamplingParams(repetition_penalty=1.1).biases_logprobs


@pytest.mark.parametrize(
    ("prompt", "params", "match"),
    [
        ([], {}, "the prompt is empty"),
        ([3, 64], {}, "token id 64 is outside the model's vocabulary of 64"),
        ([3] * 40, {}, r"40 tokens, and one more must fit into 40: shorten it, or raise max_context or the KV cache"),
        ("text", {}, "no tokenizer"),
        (Prompt([3], (Image.new("RGB", (20, 20)),)), {}, "a picture needs a processor"),
        ([3], dict(n=2), "use add_group"),
        ([3], dict(stop=("x",)), "stop texts need a tokenizer"),
        ([3], dict(stop_token_ids=(64,)), "stop_token_ids has 64"),
        ([3], dict(banned_ids=(-1,)), "banned_ids has -1"),
        ([3], dict(banned_ids=tuple(range(64))), "leaves none of the 64 ids"),
    ],
)
def test_requests_are_checked(
    text_model: Model, make_engine: Any, prompt: Any, params: dict[str, Any], match: str
) -> None:
    engine = make_engine(text_model, num_blocks=10)
    for _ in range(2):  # a refusal is not remembered as served
        with pytest.raises(ValueError, match=f"^add: .*{match}"):
            engine.add(prompt, SamplingParams(**params))
    assert not engine.has_unfinished()


def test_pictures_must_match_the_ids(
    text_model: Model, vision_model: Model, make_engine: Any, make_image: Any, shown: Any
) -> None:
    image = make_image(4, 4, 1)
    engine = make_engine(vision_model)
    for ids, images in (([3], (image,)), (shown(image), ()), (shown(image)[:-2], (image,))):
        with pytest.raises(ValueError, match="image"):
            engine.add(Prompt(ids, images))
    with pytest.raises(ValueError, match="1 pictures for a qwen2 model"):
        make_engine(text_model).add(Prompt([3], (image,)))
    assert not len(engine.runner.images)


def test_image_features_go_with_the_last_sequence_that_shows_them(
    vision_model: Model, make_engine: Any, make_image: Any, shown: Any
) -> None:
    engine = make_engine(vision_model, image_cache_bytes=0)
    image = make_image(4, 4, 1)
    held = engine.add(Prompt([3, *shown(image), 4], (image,)), PARAMS, hold=True)
    while engine.has_unfinished():
        engine.step()
    for _ in range(2):
        engine.generate(Prompt([5, *shown(image), 4], (image,)), PARAMS)
    assert engine.stats()["images_encoded"] == 1
    engine.abort(held)
    assert not len(engine.runner.images)


def test_generate_keeps_the_order_of_prompts(text_model: Model, make_engine: Any, prompts: Any) -> None:
    engine = make_engine(text_model, max_sequences=3)
    lengths = np.random.default_rng(0).integers(1, 9, len(prompts)).tolist()
    params = [SamplingParams(max_tokens=n, seed=n, banned_ids=(), ignore_eos=True, n=1 + n % 3) for n in lengths]
    completions = engine.generate(prompts, params)
    expected = [(ids, i, n) for ids, n in zip(prompts, lengths, strict=True) for i in range(1 + n % 3)]
    found = [(c.sequence.token_ids[: c.sequence.prompt_len], c.index, len(c.token_ids)) for c in completions]
    assert found == expected
    assert engine.stats()["sampled_tokens"] == sum(len(c.token_ids) for c in completions)


def test_generate_refuses_what_it_would_lose(text_model: Model, make_engine: Any) -> None:
    engine = make_engine(text_model)
    sequence = engine.add([3], PARAMS)
    with pytest.raises(ValueError, match="unfinished"):
        engine.generate([[3]], PARAMS)
    engine.abort(sequence)
    with pytest.raises(ValueError, match="2 params for 1 prompts"):
        engine.generate([[3]], [PARAMS] * 2)
    with pytest.raises(ValueError, match="token id 99"):
        engine.generate([[3], [99]], PARAMS)
    assert not engine.has_unfinished()


def test_a_failing_model_leaves_nothing_behind(text_model: Model, make_engine: Any, monkeypatch: Any) -> None:
    engine = make_engine(text_model, pack_weights=False)  # its own modules, one of which will fail
    expected = engine.generate([[3, 4, 5]], PARAMS)[0].token_ids
    calls: list[int] = []

    def break_down(hidden: torch.Tensor, **options: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return Model.logits(text_model, hidden, **options)

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner.model, "logits", break_down)
        with pytest.raises(KeyboardInterrupt):
            engine.generate([[3, 4, 5], [6]], PARAMS)
    assert not engine.has_unfinished()
    assert engine.generate([[3, 4, 5]], PARAMS)[0].token_ids == expected


def test_stream_yields_what_generate_returns(text_model: Model, make_engine: Any, fragments: Any) -> None:
    text = tiny.text_config(vocab_size=fragments.vocab_size, max_position_embeddings=32768, initializer_range=0.2)
    model = build(ModelConfig(model_type="qwen2", text=text), seed=5)
    engine = make_engine(model, processor=fragments)
    params = SamplingParams(max_tokens=30, seed=1, n=3)
    expected = engine.generate("xy", params)
    ids: dict[int, list[int]] = {}
    texts: dict[int, str] = {}
    ended: dict[int, Any] = {}
    for delta in engine.stream("xy", params):
        index = delta.sequence.index
        assert index not in ended
        ids.setdefault(index, []).extend(delta.token_ids)
        texts[index] = texts.get(index, "") + delta.text
        if delta.completion is not None:
            ended[index] = delta.completion
    assert [ids[i] for i in range(3)] == [c.token_ids for c in expected] == [ended[i].token_ids for i in range(3)]
    for i in range(3):
        assert texts[i] == b"".join(fragments.token_bytes(t) for t in ids[i]).decode()


def test_a_closed_stream_aborts(text_model: Model, make_engine: Any) -> None:
    engine = make_engine(text_model)
    stream = engine.stream([[3], [4]], PARAMS)
    next(stream)
    stream.close()
    assert not engine.has_unfinished()


def test_cache_size_from_bytes_and_from_memory(text_model: Model, caplog: Any, make_engine: Any) -> None:
    per_block = 2 * 2 * 2 * 12 * 4 * 16  # k and v, layers, heads, dim, bytes, tokens
    engine = Engine(text_model, EngineConfig(kv_bytes=10 * per_block + 1, quiet=True))
    assert engine.blocks.num_blocks == 10
    with caplog.at_level(logging.INFO, logger="thyme.engine"):
        free = Engine(text_model, EngineConfig(max_sequences=4, max_batch_tokens=64))
    # Memory has room for more than four sequences of 512 tokens can use.
    assert free.blocks.num_blocks == 4 * 512 // 16
    assert "KV cache: 128 blocks of 16 tokens, 2048 tokens" in caplog.text
    with pytest.raises(ValueError, match="no room"):
        Engine(text_model, EngineConfig(kv_bytes=per_block - 1))
    edge = Engine(text_model, EngineConfig(kv_bytes=10 * per_block, max_context=160, quiet=True))
    assert edge.max_context == 160
    with pytest.raises(ValueError, match=r"max_context \(161\) does not fit .* raise num_blocks or kv_bytes"):
        Engine(text_model, EngineConfig(kv_bytes=10 * per_block, max_context=161, quiet=True))


def test_sampling_defaults_of_a_checkpoint_are_not_taken(text_model: Model, tmp_path: Path, make_engine: Any) -> None:
    save(text_model, None, tmp_path / "model")
    settings = {"do_sample": True, "temperature": 0.01, "top_k": 1, "repetition_penalty": 1.5}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(settings))
    loaded = load_model(tmp_path / "model")
    a = make_engine(text_model, deterministic=True).generate([[3, 4]], PARAMS)[0]
    b = make_engine(loaded, deterministic=True).generate([[3, 4]], PARAMS)[0]
    assert a.token_ids == b.token_ids


def test_an_engine_waits_for_more_sequences_than_it_runs(text_model: Model, make_engine: Any) -> None:
    """Held sequences take rows, not places: more of them than max_sequences, with the table grown on the way."""
    engine = make_engine(text_model, max_sequences=2)
    held = [engine.add([3 + i], PARAMS, hold=True) for i in range(9)]
    while engine.has_unfinished():
        engine.step()
    assert engine.stats()["idle"] == 9
    ids = [sequence.token_ids for sequence in held]
    alone = make_engine(text_model, max_sequences=2)
    assert ids == [alone.generate([[3 + i]], PARAMS)[0].sequence.token_ids for i in range(9)]
    for sequence in held:
        engine.release(sequence)


def test_what_comes_back_prints_in_a_line_or_two(model: Model, processor: Processor) -> None:
    engine = Engine(model, EngineConfig(quiet=True, max_sequences=1), processor=processor)
    picture = processor.preprocess(Image.new("RGB", (400, 300), "red"))
    ids = processor.encode("<|vision_start|><|image_pad|><|vision_end|>What is 3?")
    long = replace(PARAMS, max_tokens=500, stop_at_tags=False)
    completion = engine.generate([Prompt(token_ids=ids, images=(picture,))], long)[0]
    assert len(repr(completion)) < 250 and "500 tokens [" in repr(completion) and "'length'" in repr(completion)
    for part in (completion.sequence, completion.sequence.prompt, picture):
        assert len(repr(part)) < 800 and "pixel_values" not in repr(part)


# Every limit of the engine at its edge and one past it.


def test_a_prompt_may_leave_room_for_one_token(text_model: Model, make_engine: Any) -> None:
    for config in (dict(max_context=40), dict(num_blocks=10)):  # 10 blocks of 4 tokens
        engine = make_engine(text_model, **config)
        assert engine.max_context == 40
        (completion,) = engine.generate([[3] * 39], replace(PARAMS, max_tokens=5))
        assert (len(completion.token_ids), completion.finish_reason.value) == (1, "context")
        with pytest.raises(ValueError, match="40 tokens, and one more must fit into 40"):
            engine.add([3] * 40, PARAMS)


@pytest.mark.parametrize(("limits", "at_once"), [({}, 24), (dict(prefill_chunk=7), 7)])
def test_a_step_computes_so_many_tokens_of_a_prompt(
    limits: dict[str, int], at_once: int, text_model: Model, make_engine: Any
) -> None:
    for length, steps in ((at_once, 1), (at_once + 1, 2), (2 * at_once + 1, 3)):
        engine = make_engine(text_model, max_batch_tokens=24, max_sequences=4, **limits)
        engine.generate([[3] * length], replace(PARAMS, max_tokens=1))
        assert engine.stats()["steps"] == steps


@pytest.mark.parametrize(("count", "at_once"), [(3, 3), (4, 3), (7, 3)])
def test_so_many_sequences_decode_at_once(count: int, at_once: int, text_model: Model, make_engine: Any) -> None:
    engine = make_engine(text_model, max_sequences=3)
    for i in range(count):
        engine.add([3 + i], PARAMS)
    running = []
    while engine.has_unfinished():
        engine.step()
        running.append(engine.stats()["running"])
    assert max(running) == at_once
    assert len(engine.generate([[3]], replace(PARAMS, n=3))) == 3
    with pytest.raises(ValueError, match=r"n=4 .* max_sequences \(3\)"):
        engine.add_group([3], replace(PARAMS, n=4))


def test_the_cache_holds_so_many_blocks_and_then_sequences_wait_their_turn(text_model: Model, make_engine: Any) -> None:
    """Two sequences of 20 tokens: 10 blocks of 4 hold both, 9 hold both only in turns, 5 one after the other."""
    alone = make_engine(text_model).generate([[3] * 8, [4] * 8], replace(PARAMS, max_tokens=12))
    for num_blocks, preempts in ((10, False), (9, True), (5, True)):
        engine = make_engine(text_model, num_blocks=num_blocks, prefix_cache=False)
        done = engine.generate([[3] * 8, [4] * 8], replace(PARAMS, max_tokens=12))
        assert [d.token_ids for d in done] == [d.token_ids for d in alone]
        assert (engine.stats()["preemptions"] > 0) == preempts
    with pytest.raises(ValueError, match="more must fit into 16"):
        make_engine(text_model, num_blocks=4).add([3] * 16, PARAMS)
