"""A round that was cut goes on, in code too; and tokens that are given as if they had been drawn."""

from typing import Any

import numpy as np
import pytest
import torch

from tests import tiny
from thyme.engine import Engine, FinishReason, Prompt, SamplingParams, TokenKind
from thyme.model import Model, ModelConfig, build

ARRAYS = ("logprobs", "logprobs_raw", "entropies", "temperatures", "kept_mass", "kinds")


def params(max_tokens: int, **options: Any) -> SamplingParams:
    settings = dict(code_temperature=0.0, seed=7, ignore_eos=True, stop_at_tags=False, repetition=None)
    return SamplingParams(max_tokens=max_tokens, **{**settings, **options})


@pytest.fixture(scope="module")
def model(fragments: Any) -> Model:
    text = tiny.text_config(vocab_size=fragments.vocab_size + 3)
    return build(ModelConfig(model_type="qwen2", text=text), seed=5)


def finish(engine: Engine) -> dict[int, Any]:
    done: dict[int, Any] = {}
    while engine.has_unfinished():
        done |= {completion.sequence.id: completion for completion in engine.step()}
    return done


def ids_of(fragments: Any, *tokens: bytes) -> list[int]:
    return [fragments.tokens.index(token) for token in tokens]


def test_a_round_cut_inside_code_goes_on_in_code(model: Model, fragments: Any, make_engine: Any) -> None:
    engine = make_engine(model, processor=fragments)
    opening = ids_of(fragments, b"x", b"<code>", b"y")
    sequence = engine.add([3, 4], params(4), hold=True, forced=opening)
    (first,) = finish(engine).values()
    assert (first.finish_reason, first.temperatures.tolist()) == ("length", [1, 1, 0, 0])
    engine.append(sequence, [], max_tokens=3)
    (second,) = finish(engine).values()
    assert second.temperatures.tolist() == [0, 0, 0]
    engine.append(sequence, [5], max_tokens=2)  # what is appended is no text of its own
    (third,) = finish(engine).values()
    assert third.temperatures[0] == 1
    engine.release(sequence)


def test_a_cut_changes_no_token(model: Model, fragments: Any, make_engine: Any) -> None:
    whole = make_engine(model, processor=fragments, deterministic=True).generate([[3, 4]] * 6, params(40, n=2))
    engine = make_engine(model, processor=fragments, deterministic=True, num_blocks=60)
    group = [s for _ in range(6) for s in engine.add_group([3, 4], params(7, n=2), hold=True)]
    parts: dict[int, list[Any]] = {sequence.id: [] for sequence in group}
    for length in (7, 1, 13, 19):
        for sequence in group:
            if parts[sequence.id]:
                engine.append(sequence, [], max_tokens=length)
        for number, completion in finish(engine).items():
            parts[number].append(completion)
    for sequence, expected in zip(group, whole, strict=True):
        for name in ("token_ids", *ARRAYS):
            found = np.concatenate([np.asarray(getattr(part, name)) for part in parts[sequence.id]])
            assert np.array_equal(found, np.asarray(getattr(expected, name))), name
        engine.release(sequence)
    assert any(kind == TokenKind.CODE for completion in whole for kind in completion.kinds)


def test_an_id_that_the_tokenizer_lacks_does_not_end_code(model: Model, fragments: Any, make_engine: Any) -> None:
    engine = make_engine(model, processor=fragments)
    beyond = fragments.vocab_size
    forced = [*ids_of(fragments, b"<code>", b"x"), beyond, *ids_of(fragments, b"y", b"<co"), beyond, 3]
    (completion,) = engine.score([[3]], [forced], params(1, banned_ids=()))
    assert completion.temperatures.tolist() == [1, 0, 0, 0, 0, 0, 0]
    assert completion.kinds.tolist()[2] == TokenKind.CODE
    forced = [*ids_of(fragments, b"<co"), beyond, *ids_of(fragments, b"de>", b"x")]
    (completion,) = engine.score([[3]], [forced], params(1, banned_ids=()))
    assert completion.temperatures.tolist() == [1, 1, 1, 1]  # the tag was broken


@pytest.mark.parametrize("config", [{}, dict(prefill_chunk=3), dict(num_blocks=24, max_sequences=4)], ids=str)
def test_drawn_tokens_score_as_they_were_recorded(
    model: Model, fragments: Any, make_engine: Any, config: dict[str, Any]
) -> None:
    prompts = [[3, 4, 5, 6, 7, 8, 9], [4, 5], [3, 4, 5, 6, 7, 8, 9], list(range(3, 20))]
    how = params(30, temperature=0.8, banned_ids=(0,))
    drawn = make_engine(model, processor=fragments).generate(prompts, how)
    engine = make_engine(model, processor=fragments, **config)
    scored = engine.score(prompts, [completion.token_ids for completion in drawn], how)
    for completion, again in zip(drawn, scored, strict=True):
        assert again.token_ids == completion.token_ids
        assert again.finish_reason is FinishReason.LENGTH
        for name in ARRAYS:
            np.testing.assert_allclose(getattr(again, name), getattr(completion, name), atol=2e-5, err_msg=name)
    if not config:
        assert engine.stats()["unique_tokens"] == 2 + 17  # one prompt is there twice, and begins another


def test_scores_are_of_the_present_weights(model: Model, fragments: Any, make_engine: Any) -> None:
    engine = make_engine(model, processor=fragments)
    (before,) = engine.score([[3, 4]], [[5, 6, 7]])
    weight = model.decoder.layers[0].self_attn.qkv.weight
    saved = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.mul_(-1.5)
        engine.weights_updated()
        (after,) = engine.score([[3, 4]], [[5, 6, 7]])
    finally:
        with torch.no_grad():
            weight.copy_(saved)
    assert np.abs(before.logprobs_raw - after.logprobs_raw).max() > 1e-2
    assert (before.weight_version.tolist(), after.weight_version.tolist()) == ([0] * 3, [1] * 3)


def test_a_forced_beginning_goes_on_as_if_it_had_been_drawn(model: Model, fragments: Any, make_engine: Any) -> None:
    """Replay of a trace: the same seed draws the same rest, at the same temperatures."""
    how = params(30)
    whole = make_engine(model, processor=fragments, deterministic=True).generate([[3, 4]] * 4, how)
    engine = make_engine(model, processor=fragments, deterministic=True, num_blocks=40)
    for cut in (1, 12, 29):
        for expected in whole:
            engine.add([3, 4], how, forced=expected.token_ids[:cut])
        for completion in finish(engine).values():
            assert completion.token_ids == whole[0].token_ids
            assert completion.temperatures.tolist() == whole[0].temperatures.tolist()
            np.testing.assert_allclose(completion.logprobs, whole[0].logprobs, atol=2e-5)


def test_forced_ids_with_pictures(vision_model: Model, make_engine: Any, make_image: Any, shown: Any) -> None:
    image = make_image(4, 4, 1)
    prompt = Prompt([3, *shown(image), 5], (image,))
    how = params(9, banned_ids=(60, 61, 62, 63))
    (drawn,) = make_engine(vision_model).generate(prompt, how)
    (scored,) = make_engine(vision_model, prefill_chunk=2).score([prompt], [drawn.token_ids], how)
    np.testing.assert_allclose(scored.logprobs_raw, drawn.logprobs_raw, atol=2e-5)


@pytest.mark.parametrize(
    ("forced", "options", "match"),
    [
        ([], {}, "0 forced ids: give at least one"),
        ([3] * 9, {}, "9 forced ids: .* fewer than max_tokens"),
        ([99], {}, "token id 99"),
        ([3], dict(top_k=4), "no log-probs under truncation"),
    ],
)
def test_forced_ids_are_refused(
    model: Model, fragments: Any, make_engine: Any, forced: list[int], options: dict[str, Any], match: str
) -> None:
    engine = make_engine(model, processor=fragments)
    with pytest.raises(ValueError, match=f"^add: .*{match}"):
        engine.add([3], params(9, **options), forced=forced)
    assert not engine.has_unfinished()


def test_an_aborted_round_has_what_is_scored_of_its_forced_ids(model: Model, fragments: Any, make_engine: Any) -> None:
    forced = list(range(3, 23))
    (expected,) = make_engine(model, processor=fragments).score([[5, 6, 7]], [forced], params(1))
    engine = make_engine(model, processor=fragments, prefill_chunk=6)
    for steps, scored in ((0, 0), (1, 4), (2, 10), (4, 21)):  # two of the prompt's tokens have no forced one after them
        sequence = engine.add([5, 6, 7], params(40), forced=forced)
        for _ in range(steps):
            engine.step()
        completion = engine.abort(sequence)
        assert completion is not None and len(completion.token_ids) == len(completion.logprobs) == scored
        at = min(scored, 20)
        assert completion.token_ids[:at] == forced[:at]
        np.testing.assert_allclose(completion.logprobs_raw[:at], expected.logprobs_raw[:at], atol=2e-5)


# Pausing.


def test_sequences_outlive_a_sleep(model: Model, fragments: Any, make_engine: Any) -> None:
    prompts = [[3, 4, 5], [6] * 20, [3, 4, 5]]
    whole = make_engine(model, processor=fragments, deterministic=True).generate(prompts, params(30))
    engine = make_engine(model, processor=fragments, deterministic=True)
    sequences = [engine.add(prompt, params(30)) for prompt in prompts]
    held = engine.add([9] * 12, params(3), hold=True)
    for _ in range(8):
        engine.step()
    engine.pause()
    with pytest.raises(ValueError, match="paused: resume it first"):
        engine.step()
    with engine.asleep():
        assert engine.stats()["kv_bytes"] == engine.stats()["blocks_used"] == 0
        with pytest.raises(ValueError, match="wake it first"):
            engine.resume()
    engine.runner.kv_cache.fill_(torch.nan)
    engine.append(held, [])
    engine.resume()
    done = finish(engine)
    for sequence, expected in zip(sequences, whole, strict=True):
        for name in ("token_ids", *ARRAYS):
            assert np.array_equal(getattr(done[sequence.id], name), getattr(expected, name)), name
    assert engine.stats()["preemptions"] == 0
    engine.release(held)


def test_a_pause_alone_computes_nothing_again(model: Model, fragments: Any, make_engine: Any) -> None:
    engine = make_engine(model, processor=fragments)
    for prompt in ([3] * 9, [4] * 5):
        engine.add(prompt, params(12))
    for _ in range(5):
        engine.step()
        engine.pause()
        assert engine.stats()["running"] == 0
        engine.resume()
    finish(engine)
    assert engine.stats()["recomputed_tokens"] == 0


def test_kept_mass_is_what_truncation_leaves(model: Model, fragments: Any, make_engine: Any) -> None:
    how = params(12, top_k=3, temperature=0.7, adaptive=False, banned_ids=())
    cut, greedy = make_engine(model, processor=fragments).generate(
        [[3, 4]] * 2, [how, params(12, top_k=3, temperature=0.0, adaptive=False)]
    )
    from tests.engine.conftest import _score

    logits = _score(model, cut.sequence.token_ids)[1:-1] / 0.7
    expected = logits.softmax(-1).topk(3).values.sum(-1)
    np.testing.assert_allclose(cut.kept_mass, expected.numpy(), atol=2e-5)
    assert greedy.kept_mass.tolist() == [1.0] * 12
