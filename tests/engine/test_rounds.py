"""Held sequences: appended to, they go on exactly as if everything had been there from the start."""

from typing import Any

import pytest
from PIL import Image

from thyme.engine import Completion, Engine, Prompt, SamplingParams, Sequence, SequenceStatus, TokenKind
from thyme.model import Model, build

GREEDY = SamplingParams(
    max_tokens=7, temperature=0.0, adaptive=False, banned_ids=(60, 61, 62, 63), ignore_eos=True, repetition=None
)


def finish(engine: Engine) -> dict[int, Completion]:
    done: dict[int, Completion] = {}
    while engine.has_unfinished():
        done |= {completion.sequence.id: completion for completion in engine.step()}
    return done


def rounds(engine: Engine, sequences: list[Sequence], outputs: list[tuple[list[int], tuple[Any, ...]]]) -> list[Any]:
    """Every sequence through one round more than there are outputs; returns the completions per sequence."""
    history = []
    done = finish(engine)
    history.append([done[sequence.id] for sequence in sequences])
    for ids, images in outputs:
        for sequence in sequences:
            engine.append(sequence, ids, images)
        done = finish(engine)
        history.append([done[sequence.id] for sequence in sequences])
    return list(zip(*history, strict=True))


@pytest.mark.parametrize("config", [{}, dict(prefill_chunk=3), dict(num_blocks=30), dict(prefix_cache=False)], ids=str)
def test_append_goes_on_like_full_recompute(
    vision_model: Model, make_engine: Any, make_image: Any, shown: Any, score: Any, config: dict[str, Any]
) -> None:
    images = [make_image(4, 6, 1), make_image(2, 4, 2), make_image(4, 4, 3)]
    engine = make_engine(vision_model, **config)
    prompts = [Prompt([3, *shown(images[0]), 5], images[:1]), Prompt([7, 8]), Prompt([9] * 8)]
    sequences = [engine.add(prompt, GREEDY, hold=True) for prompt in prompts]
    outputs = [([10, *shown(images[1]), 11], (images[1],)), ([12], ()), ([*shown(images[2]), 13, 14], (images[2],))]
    given = [0, *(len(ids) for ids, _ in outputs)]
    for sequence, completions in zip(sequences, rounds(engine, sequences, outputs), strict=True):
        ids = sequence.token_ids
        greedy = score(vision_model, ids, sequence.images)[:, :60].argmax(-1).tolist()
        start = sequence.prompt_len
        for completion, skipped in zip(completions, given, strict=True):
            start += skipped
            assert completion.token_ids == ids[start : start + 7] == greedy[start - 1 : start + 6]
            start += 7
        assert start == len(ids)
        engine.release(sequence)


def test_one_image_id_is_expanded(make_engine: Any) -> None:
    from PIL import Image

    from thyme.toy.model import tiny_config, tiny_processor

    processor = tiny_processor()
    engine = make_engine(build(tiny_config(), processor))
    image = Image.new("RGB", (90, 90), "red")
    size = processor.preprocess(image).num_tokens
    sequence = engine.add(Prompt(processor.chat("<image>what?"), [image]), SamplingParams(max_tokens=2), hold=True)
    assert sequence.token_ids.count(processor.image_token_id) == size
    finish(engine)
    length = len(sequence)
    engine.append(sequence, processor.encode(f"a{processor.IMAGE_TEXT}b"), [image])
    assert len(sequence) == length + 4 + size
    finish(engine)
    assert len(sequence.images) == 2
    assert engine.stats()["images_encoded"] == 1  # the same picture
    engine.release(sequence)


def test_an_older_sequence_is_not_stopped_for_a_younger_one(text_model: Model, make_engine: Any) -> None:
    """Though it runs again only since the younger one has been running."""
    engine = make_engine(text_model, num_blocks=10, prefix_cache=False)
    params = SamplingParams(max_tokens=14, seed=1, banned_ids=(), ignore_eos=True, repetition=None)
    older = engine.add([5, 6, 7], params, hold=True)
    finish(engine)
    younger = engine.add([8, 9, 10], params)
    engine.step()
    engine.append(older, [4])
    while not engine.stats()["preemptions"]:
        engine.step()
    assert (older.status, younger.status) == (SequenceStatus.RUNNING, SequenceStatus.WAITING)
    finish(engine)
    engine.release(older)


def test_only_appended_tokens_are_prefilled(text_model: Model, make_engine: Any) -> None:
    engine = make_engine(text_model)
    group = engine.add_group(list(range(3, 17)), SamplingParams(n=4, max_tokens=5, seed=1, banned_ids=()), hold=True)
    finish(engine)
    assert engine.stats()["prefilled_tokens"] == 14
    for sequence in group:
        engine.append(sequence, [20, 21, 22])
    finish(engine)
    stats = engine.stats()
    assert stats["prefilled_tokens"] == stats["unique_tokens"] == 14 + 4 * 3
    assert stats["recomputed_tokens"] == 0
    for sequence in group:
        engine.release(sequence)


def test_a_held_sequence_keeps_its_blocks_until_nothing_else_can_give_any(text_model: Model, make_engine: Any) -> None:
    engine = make_engine(text_model, num_blocks=16, prefix_cache=False)
    held = engine.add(list(range(3, 19)), GREEDY, hold=True)
    finish(engine)
    kept = engine.stats()["blocks_used"]
    assert kept == 6  # 22 of its 23 tokens have been computed
    engine.generate([[5] * 12, [6] * 12], GREEDY)
    assert engine.stats()["evictions"] == 0
    assert engine.stats()["blocks_used"] == kept
    engine.generate([[7] * 50], GREEDY)  # needs 14 of the 16 blocks
    assert engine.stats()["evictions"] == 1
    before = held.token_ids
    engine.append(held, [9])
    completion = finish(engine)[held.id]
    alone = make_engine(text_model).generate([[*before, 9]], GREEDY)[0]
    assert completion.token_ids == alone.token_ids
    engine.release(held)


def test_kinds_of_a_whole_trajectory(vision_model: Model, make_engine: Any, make_image: Any, shown: Any) -> None:
    engine = make_engine(vision_model)
    image = make_image(4, 4, 1)
    sequence = engine.add(Prompt([3, *shown(image), 4], (image,)), GREEDY, hold=True)
    finish(engine)
    engine.append(sequence, [5, *shown(image), 6], (image,))
    finish(engine)
    kinds = engine.table.kinds[sequence.row, : len(sequence)].tolist()
    p, i, t, s = TokenKind.PROMPT, TokenKind.IMAGE, TokenKind.TEXT, TokenKind.SANDBOX
    assert kinds == [p, p, *[i] * 4, p, p, *[t] * 7, s, s, *[i] * 4, s, s, *[t] * 7]
    engine.release(sequence)


def test_max_tokens_of_the_next_round(text_model: Model, make_engine: Any) -> None:
    engine = make_engine(text_model)
    sequence = engine.add([3, 4], GREEDY, hold=True)
    lengths = [len(finish(engine)[sequence.id].token_ids)]
    for max_tokens in (2, None):
        engine.append(sequence, [5], max_tokens=max_tokens)
        lengths.append(len(finish(engine)[sequence.id].token_ids))
    assert lengths == [7, 2, 7]
    engine.release(sequence)


def test_resumed_sequences_go_before_new_ones(text_model: Model, make_engine: Any) -> None:
    engine = make_engine(text_model, max_sequences=2)
    held = engine.add([3], GREEDY, hold=True)
    finish(engine)
    new = [engine.add([4 + i], GREEDY) for i in range(3)]
    engine.append(held, [9])
    order = list(finish(engine))
    assert order.index(held.id) < order.index(new[1].id)
    engine.release(held)


def test_append_is_refused(text_model: Model, make_engine: Any) -> None:
    engine = make_engine(text_model, max_context=32)
    sequence = engine.add([3, 4], GREEDY, hold=True)
    with pytest.raises(ValueError, match="WAITING: only a sequence added with hold=True"):
        engine.append(sequence, [5])
    finish(engine)
    picture = Image.new("RGB", (28, 28))
    for ids, images, match in (
        ([99], (), "token id 99"),
        ([-1], (), "token id -1"),
        ([5] * 30, (), "39 tokens.*32"),
        ("text", (), "no tokenizer"),
        ([5], (picture,), "a picture needs a processor"),
    ):
        with pytest.raises(ValueError, match=f"^append: .*{match}"):
            engine.append(sequence, ids, images)
    with pytest.raises(ValueError, match="max_tokens must be at least 1"):
        engine.append(sequence, [5], max_tokens=0)
    assert sequence.status is SequenceStatus.HELD  # a refusal leaves it as it was
    engine.append(sequence, [5])
    finish(engine)
    engine.release(sequence)
    with pytest.raises(ValueError, match="FINISHED"):
        engine.append(sequence, [5])
    other = engine.add([3], GREEDY)
    finish(engine)
    with pytest.raises(ValueError, match="FINISHED"):
        engine.append(other, [5])


def test_release_and_abort_in_every_state(text_model: Model, make_engine: Any) -> None:
    engine = make_engine(text_model, max_sequences=1)
    running, waiting = engine.add([3, 4], GREEDY, hold=True), engine.add([5], GREEDY)
    engine.step()
    engine.step()
    for sequence in (running, waiting):
        with pytest.raises(ValueError, match="abort it, or let its round end"):
            engine.release(sequence)
    completion = engine.abort(running)
    assert completion is not None
    assert (completion.finish_reason, completion.stop_reason) == ("abort", None)
    assert completion.token_ids == running.token_ids[2:]
    assert len(completion.logprobs) == len(completion.token_ids) == 2
    empty = engine.abort(waiting)
    assert empty is not None
    assert (empty.token_ids, empty.logprobs.shape, waiting.token_ids) == ([], (0,), [5])
    held = engine.add([6], GREEDY, hold=True)
    finish(engine)
    ids = held.token_ids
    assert engine.abort(held) is None  # its round was over
    assert held.token_ids == ids
    for sequence in (running, waiting, held):
        assert sequence.status is SequenceStatus.FINISHED
        assert engine.abort(sequence) is None
        engine.release(sequence)  # nothing left to do
    assert not engine.has_unfinished()
    assert engine.step() == []
