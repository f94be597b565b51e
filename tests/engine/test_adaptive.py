"""Adaptive temperature: code greedy, text drawn, switched by tags however the tokens cut them."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests import tiny
from thyme.engine import Completion, SamplingParams, TokenKind, in_flight
from thyme.model import Model, ModelConfig, build

PARAMS = SamplingParams(max_tokens=150, temperature=1.0, seed=0, stop_at_tags=False, ignore_eos=True, repetition=None)


@pytest.fixture(scope="module")
def model(fragments: Any) -> Model:
    text = tiny.text_config(vocab_size=fragments.vocab_size, max_position_embeddings=32768, initializer_range=0.2)
    return build(ModelConfig(model_type="qwen2", text=text), seed=5)


def temperatures(tokens: list[bytes], text: float, code: float) -> list[float]:
    """Of each token: was a code block open in the text before it?"""
    result, seen = [], b""
    for token in tokens:
        rest, is_open = seen, False
        while match := re.search(b"</code>" if is_open else b"<code>", rest):
            rest, is_open = rest[match.end() :], not is_open
        result.append(code if is_open else text)
        seen += token or b"\0"
    return result


def spelled(fragments: Any, completion: Completion) -> list[bytes]:
    return [fragments.token_bytes(token) for token in completion.token_ids]


def test_temperature_follows_the_text(model: Model, fragments: Any, make_engine: Any) -> None:
    engine = make_engine(model, processor=fragments)
    completions = engine.generate([[1, 2]], SamplingParams(**{**_fields(PARAMS), "n": 24, "code_temperature": 0.5}))
    for completion in completions:
        assert completion.temperatures.tolist() == temperatures(spelled(fragments, completion), 1.0, 0.5)
    used = np.concatenate([completion.temperatures for completion in completions])
    assert 0.05 < (used == 0.5).mean() < 0.95  # both occur
    opened_split = [
        tokens[i]
        for completion in completions
        for tokens in [spelled(fragments, completion)]
        for i in range(1, len(tokens))
        if completion.temperatures[i - 1] == 1.0 and i + 1 < len(tokens) and completion.temperatures[i + 1] == 0.5
    ]
    assert {b"<code>"} < set(opened_split)  # whole, split and fused openings all happened


def _fields(params: SamplingParams) -> dict[str, Any]:
    return {name: getattr(params, name) for name in params.__dataclass_fields__}


def test_code_is_greedy_and_text_is_not(model: Model, fragments: Any, make_engine: Any, score: Any) -> None:
    engine = make_engine(model, processor=fragments)
    completions = engine.generate([[1, 2]], SamplingParams(**{**_fields(PARAMS), "n": 8}))
    differs = 0
    for completion in completions:
        logits = score(model, completion.sequence.token_ids)[1:-1]
        drawn = torch.tensor(completion.token_ids)
        code = torch.from_numpy(completion.temperatures) == 0.0
        assert torch.equal(drawn[code], logits.argmax(-1)[code])
        differs += int((drawn[~code] != logits.argmax(-1)[~code]).sum())
        raw = logits.log_softmax(-1).gather(1, drawn[:, None])[:, 0].numpy()
        np.testing.assert_allclose(completion.logprobs_raw, raw, atol=2e-5)
        np.testing.assert_array_equal(completion.logprobs[code.numpy()], 0.0)
        np.testing.assert_allclose(completion.logprobs[~code.numpy()], raw[~code.numpy()], atol=2e-5)
    assert differs > 50
    assert len({tuple(completion.token_ids) for completion in completions}) == 8  # text differs between seeds


def test_kinds_follow_the_text(model: Model, fragments: Any, make_engine: Any) -> None:
    engine = make_engine(model, processor=fragments)
    completions = engine.generate([[1, 2]], SamplingParams(**{**_fields(PARAMS), "n": 8}))
    for completion in completions:
        kinds, ids = completion.kinds, np.array(completion.token_ids)
        assert set(kinds[ids == 0].tolist()) <= {TokenKind.END}
        code = completion.temperatures == 0.0
        assert set(kinds[code].tolist()) <= {TokenKind.CODE, TokenKind.TAG, TokenKind.END}
        assert set(kinds[~code].tolist()) <= {TokenKind.TEXT, TokenKind.ANSWER, TokenKind.TAG, TokenKind.END}
        for token in (b"<code></code>", b"<answer></answer>", b"\n</answer>\n"):
            at = (ids == fragments.tokens.index(token)) & ~code
            assert set(kinds[at].tolist()) <= {TokenKind.TAG}


def test_not_adaptive_is_one_temperature(model: Model, fragments: Any, make_engine: Any) -> None:
    params = SamplingParams(**{**_fields(PARAMS), "adaptive": False, "temperature": 0.6})
    engine = make_engine(model, processor=fragments)
    completion = engine.generate([[1, 2]], params)[0]
    assert completion.temperatures.tolist() == [np.float32(0.6)] * 150
    same = engine.generate([[1, 2]], SamplingParams(**{**_fields(params), "adaptive": True, "code_temperature": 0.6}))[
        0
    ]
    assert same.token_ids == completion.token_ids
    np.testing.assert_array_equal(same.logprobs, completion.logprobs)


def test_a_round_ends_at_a_tag_and_the_next_starts_afresh(model: Model, fragments: Any, make_engine: Any) -> None:
    engine = make_engine(model, processor=fragments)
    params = SamplingParams(max_tokens=60, seed=3, ignore_eos=True, repetition=None, code_temperature=0.5, n=24)
    group = engine.add_group([1, 2], params, hold=True)
    done: dict[int, list[Completion]] = {sequence.id: [] for sequence in group}
    for _ in range(3):
        while engine.has_unfinished():
            for completion in engine.step():
                done[completion.sequence.id].append(completion)
        for sequence in group:  # an opened block, but given, not sampled: the automaton does not run over it
            engine.append(sequence, [fragments.tokens.index(b"<code>"), fragments.tokens.index(b"x")])
    while engine.has_unfinished():
        for completion in engine.step():
            done[completion.sequence.id].append(completion)
    reasons = set()
    for completions in done.values():
        assert len(completions) == 4
        for completion in completions:
            tokens = spelled(fragments, completion)
            assert completion.temperatures.tolist() == temperatures(tokens, 1.0, 0.5)
            assert completion.finish_reason in ("stop", "length")
            if completion.finish_reason == "stop":
                reasons.add(completion.stop_reason)
                assert completion.kinds[-1] == TokenKind.TAG
                ends = {"forged": b"<sandbox_output>"}.get(completion.stop_reason, completion.stop_reason.encode())
                assert ends in b"".join(token or b"\0" for token in tokens)
    assert reasons == {"</code>", "</answer>", "forged"}
    for sequence in group:
        engine.release(sequence)


def test_preemption_keeps_the_place_in_the_code(model: Model, fragments: Any, make_engine: Any) -> None:
    params = SamplingParams(**{**_fields(PARAMS), "n": 8, "code_temperature": 0.5, "max_tokens": 60})
    roomy = make_engine(model, processor=fragments, deterministic=True).generate([[1, 2]], params)
    engine = make_engine(model, processor=fragments, deterministic=True, num_blocks=40)
    for one, other in zip(roomy, engine.generate([[1, 2]], params), strict=True):
        assert one.temperatures.tolist() == other.temperatures.tolist()
        assert one.token_ids == other.token_ids
    assert engine.stats()["preemptions"] > 0


@pytest.mark.parametrize("run_ahead", [False, True])
@pytest.mark.parametrize("place", ["_upload", "_forward", "_unpack"])
def test_a_step_that_fails_moves_no_automaton(
    model: Model, fragments: Any, make_engine: Any, monkeypatch: pytest.MonkeyPatch, place: str, run_ahead: bool
) -> None:
    """Whether before the device is told of a round that begins, or when it has drawn; rows of the table are used again,
    by sequences that were in code."""
    params = replace(PARAMS, n=8, max_tokens=20, code_temperature=0.5)

    def fails(*_: Any) -> None:
        raise RuntimeError("planted")

    def rounds(failing: range) -> list[Completion]:
        sizes = dict(prefill_chunk=2, num_blocks=80, run_ahead=run_ahead)
        engine = make_engine(model, processor=fragments, deterministic=True, **sizes)
        for token in (1, 3):
            engine.add_group([token, 2, 5, 6, 7], replace(params, seed=token), hold=True)
        done, step = [], 0
        while engine.has_unfinished():
            with monkeypatch.context() as patch:
                if step in failing:
                    patch.setattr(in_flight if place == "_unpack" else engine.runner, place, fails)
                try:
                    ended = engine.step()
                except RuntimeError:
                    ended = []
            step += 1
            done += ended
            for completion in ended:
                if len(completion.sequence.starts) == 3:
                    engine.release(completion.sequence)
                else:
                    engine.append(completion.sequence, [1, 2] if len(completion.sequence.starts) == 1 else [])
        return done

    expected = {
        (c.sequence.id, len(c.token_ids), tuple(c.token_ids)): c.temperatures.tolist() for c in rounds(range(0))
    }
    assert len({t for used in expected.values() for t in used}) == 2
    found = {
        (c.sequence.id, len(c.token_ids), tuple(c.token_ids)): c.temperatures.tolist() for c in rounds(range(0, 200, 3))
    }
    assert found == expected
