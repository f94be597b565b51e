"""Every reason for which a round ends, and which of two counts."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from thyme.engine import Engine, SamplingParams, TokenKind
from thyme.engine.sequence import Sequence
from thyme.engine.stopping import TextMatcher
from thyme.model import Model, ModelConfig, TextConfig
from thyme.repetition import RepetitionConfig


class Scripted(Model):
    """A model that says what the script says: the successor of token i of its vocabulary is script[i]."""

    def __init__(self, script: list[int]) -> None:
        size = len(script)
        text = TextConfig(
            vocab_size=size,
            hidden_size=size + size % 2,
            intermediate_size=2,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=size + size % 2,
        )
        super().__init__(ModelConfig(model_type="qwen2", text=text))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
            self.decoder.norm.weight.fill_(1.0)
            self.decoder.embed_tokens.weight.copy_(torch.eye(*self.decoder.embed_tokens.weight.shape))
            for token, successor in enumerate(script):
                self.lm_head_weight[successor, token] = 1.0


GREEDY = dict(temperature=0.0, max_tokens=50)


@pytest.fixture
def say(fragments: Any, make_engine: Any) -> Any:
    """Fragments, one after another -> the engine of a model that says them, and the first one's id."""

    def make(*parts: bytes, **config: Any) -> tuple[Engine, list[int]]:
        script = list(range(fragments.vocab_size))
        ids = [fragments.tokens.index(part) for part in parts]
        assert len(set(ids)) == len(ids), "each fragment once"
        for token, successor in itertools.pairwise(ids):
            script[token] = successor
        return make_engine(Scripted(script), processor=fragments, **config), ids

    return make


@pytest.mark.parametrize(
    ("parts", "stop_reason"),
    [
        ((b"x", b"<code>", b"y", b"</", b"code>", b"1"), "</code>"),
        ((b"y", b"<co", b"de>", b"x</code>y", b"1"), "</code>"),
        ((b"x", b"<answer>", b"1", b"</ans", b"wer>", b"y"), "</answer>"),
        ((b"x", b"</answer>", b"y"), "</answer>"),
        ((b"x", b"<sandbox", b"_output>", b"y"), "forged"),
        ((b"x", b"<", b"sandbox_", b"output>\n\n", b"y"), "forged"),
    ],
)
def test_tags_end_a_round(say: Any, parts: tuple[bytes, ...], stop_reason: str) -> None:
    engine, ids = say(*parts)
    completion = engine.generate([ids[:1]], SamplingParams(**GREEDY))[0]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop_reason)
    assert completion.token_ids == ids[1:-1]  # kept as sampled, the token that completes the tag included
    assert completion.kinds[-1] == TokenKind.TAG
    going_on = engine.generate([ids[:1]], SamplingParams(**GREEDY, stop_at_tags=False, repetition=None))[0]
    assert going_on.finish_reason == "length"
    assert going_on.token_ids[: len(ids) - 1] == ids[1:]


@pytest.mark.parametrize("parts", [(b"x", b"</code>", b""), (b"x", b"<code>", b"</answer>", b"")])
def test_tags_that_do_not_count_do_not_end_it(say: Any, parts: tuple[bytes, ...]) -> None:
    engine, ids = say(*parts)  # ends at eos, which is id 0, the fragment without bytes
    completion = engine.generate([ids[:1]], SamplingParams(**GREEDY))[0]
    assert (completion.finish_reason, completion.stop_reason) == ("eos", None)
    assert completion.token_ids == ids[1:]
    assert completion.kinds[-1] == TokenKind.END


def test_eos_can_be_ignored(say: Any) -> None:
    engine, ids = say(b"x", b"", b"y")
    completion = engine.generate([ids[:1]], SamplingParams(**GREEDY, ignore_eos=True, repetition=None))[0]
    assert (completion.finish_reason, len(completion.token_ids)) == ("length", 50)
    assert completion.token_ids[:2] == ids[1:]


def test_stop_ids(say: Any) -> None:
    engine, ids = say(b"x", b"y", b"1", b"c")
    completion = engine.generate([ids[:1]], SamplingParams(**GREEDY, stop_token_ids=(ids[2], ids[3])))[0]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", ids[2])
    assert completion.token_ids == ids[1:3]


@pytest.mark.parametrize(
    ("stop", "count"), [(("1",), 3), (("y1",), 3), (("e>1", "never"), 3), (("de>",), 1), (("ode>y1",), 3)]
)
def test_stop_texts_may_be_split_and_fused(say: Any, stop: tuple[str, ...], count: int) -> None:
    engine, ids = say(b"x", b"<code>", b"y", b"1", b"c")
    if stop == ("e>1", "never"):
        engine, ids = say(b"x", b"<", b"code>", b"1", b"c")
    completion = engine.generate([ids[:1]], SamplingParams(**GREEDY, stop=stop))[0]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop[0])
    assert completion.token_ids == ids[1 : 1 + count]


def test_the_prompt_does_not_complete_a_stop_text(say: Any) -> None:
    engine, ids = say(b"<co", b"de>", b"1", b"")
    completion = engine.generate([ids[:1]], SamplingParams(**GREEDY, stop=("code>",)))[0]
    assert completion.finish_reason == "eos"


def test_matcher_against_find() -> None:
    draw = np.random.default_rng(0)
    for _ in range(300):
        texts = tuple({"".join(draw.choice(list("ab"), int(draw.integers(1, 5)))) for _ in range(3)})
        tokens = [bytes(draw.choice(list(b"ab"), int(draw.integers(0, 4))).tolist()) for _ in range(12)]
        matcher = TextMatcher(texts, tokens.__getitem__)
        seen = b""
        for i, token in enumerate(tokens):
            seen += token
            ends = sorted((seen.find(t.encode()) + len(t), -len(t), t) for t in texts if t.encode() in seen)
            assert matcher.push(i) == (ends[0][2] if ends else None)
            if ends:
                break


def test_length_and_context(text_model: Model, make_engine: Any) -> None:
    engine = make_engine(text_model, max_context=20)
    params = dict(seed=0, banned_ids=(), ignore_eos=True, repetition=None)
    length, context = engine.generate(
        [[3, 4, 5], list(range(3, 17))],
        [SamplingParams(max_tokens=9, **params), SamplingParams(max_tokens=9, **params)],
    )
    assert (length.finish_reason, len(length.token_ids)) == ("length", 9)
    assert (context.finish_reason, len(context.token_ids)) == ("context", 6)
    both = engine.generate([list(range(3, 17))], SamplingParams(max_tokens=6, **params))[0]
    assert both.finish_reason == "length"


def test_the_cache_bounds_the_context(text_model: Model, make_engine: Any) -> None:
    engine = make_engine(text_model, num_blocks=5)
    assert engine.max_context == 20
    completion = engine.generate([[3] * 10], SamplingParams(seed=0, banned_ids=(), ignore_eos=True))[0]
    assert (completion.finish_reason, len(completion.token_ids)) == ("context", 10)


def test_repetition_ends_a_round_on_the_token_that_completes_it(say: Any, fragments: Any, make_engine: Any) -> None:
    script = list(range(fragments.vocab_size))
    x, y, one = (fragments.tokens.index(part) for part in (b"x", b"y", b"1"))
    script[x], script[y], script[one] = y, one, x
    config = RepetitionConfig(max_period=8, min_tail_tokens=12, copies=((8, 4),), max_data_share=1.0)
    engine = make_engine(Scripted(script), processor=fragments, repetition=config)
    completion = engine.generate([[x]], SamplingParams(**GREEDY))[0]
    assert completion.finish_reason == "repetition"
    assert len(completion.token_ids) == 12
    hit = completion.repetition
    assert (hit.rule, hit.index, hit.start, hit.period, hit.copies) == ("tail", 11, 0, 3, 4)
    unwatched = engine.generate([[x]], SamplingParams(**GREEDY, repetition=None))[0]
    assert (unwatched.finish_reason, unwatched.repetition) == ("length", None)


def test_the_vocabulary_says_what_is_a_table(fragments: Any, make_engine: Any) -> None:
    script = list(range(fragments.vocab_size))
    one, end, x, y = (fragments.tokens.index(part) for part in (b"1", b"\n", b"x", b"y"))
    script[one], script[end], script[x], script[y] = end, one, y, x
    config = RepetitionConfig(max_period=8, min_tail_tokens=12, copies=((8, 4),))
    engine = make_engine(Scripted(script), processor=fragments, repetition=config)
    params = SamplingParams(**{**GREEDY, "max_tokens": 40})
    column, words = engine.generate([[one], [x]], params)
    assert (column.finish_reason, len(column.token_ids)) == ("length", 40)
    assert (words.finish_reason, len(words.token_ids)) == ("repetition", 12)


def test_each_round_has_its_own_repetition_segment(fragments: Any, make_engine: Any) -> None:
    config = RepetitionConfig(max_period=8, min_tail_tokens=12, copies=((8, 4),), max_data_share=1.0)
    engine = make_engine(Scripted(list(range(fragments.vocab_size))), processor=fragments, repetition=config)
    sequence: Sequence = engine.add([5], SamplingParams(temperature=0.0, max_tokens=8), hold=True)
    for expected in ("length", "length", "repetition"):
        while engine.has_unfinished():
            completion = engine.step()
        assert completion[0].finish_reason == expected
        if expected != "repetition":
            engine.append(sequence, [5], max_tokens=8 if len(sequence) < 12 else 40)
    engine.release(sequence)


@pytest.mark.parametrize(
    ("last", "options", "reason"),
    [
        (b"", dict(stop_token_ids=(0,)), ("eos", None)),
        (b"", dict(stop_token_ids=(0,), ignore_eos=True), ("stop", 0)),
        (b"</answer>", dict(stop=("</answer>",)), ("stop", "</answer>")),
        (b"y", dict(stop=("y",), max_tokens=2), ("stop", "y")),
        (b"y", dict(max_tokens=2), ("length", None)),
    ],
)
def test_of_two_reasons_the_first_in_rank_counts(say: Any, last: bytes, options: dict[str, Any], reason: Any) -> None:
    engine, ids = say(b"x", b"1", last)
    completion = engine.generate([ids[:1]], SamplingParams(**{**GREEDY, **options}))[0]
    assert (completion.finish_reason, completion.stop_reason) == reason
    assert completion.token_ids == ids[1:]
