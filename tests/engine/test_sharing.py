"""What is equal is computed once: in groups, in duplicates, under a common prefix, and where blocks were taken back."""

from typing import Any

import numpy as np
import pytest
import torch

from thyme.engine import Engine, Prompt, SamplingParams
from thyme.engine.live_prompts import LivePrompts, content_of
from thyme.model import Model

GREEDY = SamplingParams(max_tokens=7, temperature=0.0, adaptive=False, banned_ids=(), ignore_eos=True, repetition=None)


def sampled(max_tokens: int, **options: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, seed=1, banned_ids=(), ignore_eos=True, repetition=None, **options)


def ids(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 60, length).tolist()


def finish(engine: Engine) -> None:
    while engine.has_unfinished():
        engine.step()


@pytest.mark.parametrize("chunk", [None, 20])
def test_the_same_prompt_added_often_is_computed_once(text_model: Model, make_engine: Any, chunk: int | None) -> None:
    engine = make_engine(text_model, block_size=16, num_blocks=200, prefill_chunk=chunk)
    for _ in range(16):
        engine.add(ids(105, 1), sampled(8))
    finish(engine)
    stats = engine.stats()
    assert (stats["prefilled_tokens"], stats["unique_tokens"]) == (105, 105)


@pytest.mark.parametrize("chunk", [None, 48])
def test_a_common_system_prompt_is_computed_once(text_model: Model, make_engine: Any, chunk: int | None) -> None:
    engine = make_engine(text_model, block_size=16, num_blocks=600, prefill_chunk=chunk)
    system = ids(320, 1)
    for i in range(16):
        engine.add([*system, i + 3, *ids(19, 2)], sampled(8))
    finish(engine)
    stats = engine.stats()
    assert (stats["prefilled_tokens"], stats["unique_tokens"]) == (640, 640)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 105])
def test_groups_and_duplicates_together(text_model: Model, make_engine: Any, length: int) -> None:
    engine = make_engine(text_model, block_size=16, num_blocks=200)
    for n in (4, 1, 3):
        engine.add_group(ids(length, 1), sampled(8, n=n))
    finish(engine)
    stats = engine.stats()
    assert stats["prefilled_tokens"] == stats["unique_tokens"] == length


def test_a_duplicate_that_comes_later_computes_the_open_block_alone(text_model: Model, make_engine: Any) -> None:
    engine = make_engine(text_model, block_size=16, num_blocks=200)
    for _ in range(3):
        engine.add(ids(105, 1), sampled(8))
        engine.step()
    finish(engine)
    stats = engine.stats()
    assert (stats["prefilled_tokens"], stats["unique_tokens"]) == (105 + 9 + 9, 105)


def test_preempted_siblings_compute_their_prompt_once(text_model: Model, make_engine: Any) -> None:
    engine = make_engine(text_model, block_size=16, num_blocks=40)
    engine.add_group(ids(105, 1), sampled(100, n=16))
    finish(engine)
    stats = engine.stats()
    assert stats["preemptions"] > 0
    assert stats["prefilled_tokens"] - stats["recomputed_tokens"] == stats["unique_tokens"] == 105
    assert stats["recomputed_tokens"] <= 16 * stats["evicted_blocks"]  # of each sequence the end that others needed


@pytest.mark.parametrize("leaver", [0, 1, 3])
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_one_of_those_that_share_a_prompt_under_way_is_aborted(
    text_model: Model, make_engine: Any, leaver: int, steps: int
) -> None:
    prompts = [ids(70, 1), ids(70, 1), [*ids(64, 1), 5, 6], ids(70, 1)]
    expected = [make_engine(text_model).generate([prompt], GREEDY)[0].token_ids for prompt in prompts]
    engine = make_engine(text_model, block_size=16, prefill_chunk=20)
    sequences = [engine.add(prompt, GREEDY) for prompt in prompts]
    for _ in range(steps):
        engine.step()
        engine.scheduler.check_integrity()
    engine.abort(sequences[leaver])
    finish(engine)
    for number, sequence in enumerate(sequences):
        if number != leaver:
            assert sequence.token_ids[sequence.prompt_len :] == expected[number]
    if leaver:
        assert engine.stats()["prefilled_tokens"] == engine.stats()["unique_tokens"]


@pytest.mark.parametrize("chunk", [None, 20])
def test_nothing_of_a_step_that_failed_is_read(
    text_model: Model, make_engine: Any, monkeypatch: pytest.MonkeyPatch, chunk: int | None
) -> None:
    prompts = [ids(70, 1), [*ids(64, 1), 5, 6], ids(70, 1), ids(40, 1)]
    expected = [make_engine(text_model).generate([prompt], GREEDY)[0].token_ids for prompt in prompts]
    engine: Engine = make_engine(text_model, block_size=16, prefill_chunk=chunk)
    engine.runner.kv_cache.fill_(1e3)
    sequences = [engine.add(prompt, GREEDY) for prompt in prompts[:2]]
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "_forward", lambda *_: (_ for _ in ()).throw(RuntimeError("planted")))
        with pytest.raises(RuntimeError, match="planted"):
            engine.step()
    engine.scheduler.check_integrity()
    engine.abort(sequences[0])
    sequences += [engine.add(prompt, GREEDY) for prompt in prompts[2:]]
    finish(engine)
    for sequence, tokens in zip(sequences[1:], expected[1:], strict=True):
        assert sequence.token_ids[sequence.prompt_len :] == tokens


def test_a_prompt_begun_under_other_weights_is_not_joined(text_model: Model, make_engine: Any, score: Any) -> None:
    engine = make_engine(text_model, prefill_chunk=20)
    first = engine.add(ids(50, 1), GREEDY)
    engine.step()
    weight = text_model.decoder.layers[0].self_attn.qkv.weight
    saved = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.mul_(-1.5)
        engine.weights_updated()
        sequences = [engine.add(ids(50, 1), GREEDY) for _ in range(3)]
        finish(engine)
        for sequence in sequences:
            tokens = sequence.token_ids[50:]
            assert tokens == score(text_model, ids(50, 1) + tokens)[49:-1].argmax(-1).tolist()
    finally:
        with torch.no_grad():
            weight.copy_(saved)
    assert engine.stats()["prefilled_tokens"] == 2 * 50
    assert first.token_ids[:50] == ids(50, 1)


def test_nobody_reads_a_block_before_the_step_that_writes_it(
    text_model: Model, make_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slots are marked when a step writes them; each sequence's context may hold marked ones alone."""
    engine: Engine = make_engine(text_model, block_size=4, num_blocks=60, prefill_chunk=9, max_batch_tokens=64)
    written = np.zeros(60 * 4, dtype=bool)
    launch = engine.runner.launch

    def watched(batch: Any, bans: Any) -> Any:
        for source, target in batch.copies.T:
            written[target * 4 : target * 4 + 4] = written[source * 4 : source * 4 + 4]
        written[batch.slot_mapping] = True
        for blocks, length in zip(batch.block_tables, batch.context_lens, strict=True):
            slots = blocks[np.arange(length) // 4] * 4 + np.arange(length) % 4
            assert written[slots].all()
        return launch(batch, bans)

    monkeypatch.setattr(engine.runner, "launch", watched)
    system = ids(30, 1)
    for i in range(24):
        engine.add_group([*system, *ids(i % 7, i % 3)], sampled(12, n=1 + i % 3))
        if i % 5 == 0:
            engine.step()
    finish(engine)
    assert engine.stats()["preemptions"] > 0 and engine.stats()["cached_tokens"] > 0


@pytest.mark.parametrize("chunk", [None, 6])
def test_pictures_that_several_prompts_show_are_encoded_once(
    vision_model: Model, make_engine: Any, make_image: Any, shown: Any, chunk: int | None
) -> None:
    image, other = make_image(4, 6, 1), make_image(4, 6, 2)
    engine = make_engine(vision_model, prefill_chunk=chunk)
    params = SamplingParams(max_tokens=4, seed=1, banned_ids=(60, 61, 62, 63), repetition=None)
    for i in range(4):
        engine.add(Prompt([3, 4, 5, *shown(image), 7, 8, i + 3], (image,)), params)
        engine.add(Prompt([3, 4, 5, *shown(other), 7, 8, 9], (other,)), params)
    finish(engine)
    stats = engine.stats()
    assert stats["images_encoded"] == 2
    # What follows the picture begins within a block of four: of each question its own token and what precedes it there.
    assert stats["unique_tokens"] == 14 + 3 + 10
    assert stats["prefilled_tokens"] == stats["unique_tokens"] + 3 * (13 - 12)


# What is unique.


def test_unique_tokens_are_those_that_begin_no_other_prompt(make_image: Any) -> None:
    """Against comparing with each of the others."""
    draw = np.random.default_rng(0)
    live: list[tuple[list[Any], bytes]] = []
    prompts = LivePrompts()
    for _ in range(600):
        if live and draw.random() < 0.4:
            _, content = live.pop(int(draw.integers(len(live))))
            prompts.remove(content)
            continue
        parts, token_ids, digests, starts = [], [], [], []
        for _ in range(int(draw.integers(1, 5))):
            if draw.random() < 0.3:
                digest, count = f"picture {draw.integers(2)}", 3
                starts.append(len(token_ids))
                digests.append(digest)
                parts += [(digest, i) for i in range(count)]
                token_ids += [60] * count
            else:
                some = draw.integers(0, 2, 2).tolist()
                parts += some
                token_ids += some
        content = content_of(np.array(token_ids, dtype=np.int32), digests, starts)
        alike = [next((i for i, (a, b) in enumerate(zip(parts, p, strict=False)) if a != b), None) for p, _ in live]
        best = max(
            (min(len(parts), len(p)) if i is None else i for i, (p, _) in zip(alike, live, strict=True)), default=0
        )
        assert prompts.add(content, starts) == len(parts) - best
        live.append((parts, content))
