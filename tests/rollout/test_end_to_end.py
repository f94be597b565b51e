"""Image and question to code to sandbox to answer, with the real engine, sandbox and processor.

The model is the toy, taught two demonstrations by heart in seconds: a crop of a crop, whose second round needs the
first one's variables, and a product that only code is trusted with.
"""

import io
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from tests.by_heart import by_heart
from thyme.data.rows import Demonstration
from thyme.engine import Engine, EngineConfig
from thyme.engine.tags import TokenKind
from thyme.evals import evaluate, no_code_control
from thyme.model import Model, save
from thyme.model.attention import PackedAttention
from thyme.pictures import read_picture
from thyme.rollout import RolloutConfig, RolloutLoop, read_rollouts, write_rollouts
from thyme.rollout.dialect import Dialect, write_dialect
from thyme.rollout.prompts import build_prompt
from thyme.rollout.types import Question, Rollout, RolloutStatus
from thyme.sandbox import Sandbox, Status
from thyme.toy.scenarios import demonstrations
from thyme.train.tokenization import positions, supervised_sample
from thyme.verbs.ask import Config, answer

CONFIG = RolloutConfig(prompt_style="short", max_tokens_per_round=72, max_tokens=160, max_rounds=2)


@pytest.fixture(scope="module")
def rows() -> list[Demonstration]:
    return [demonstrations(0, 1, {scenario: 1.0})[0] for scenario in ("zoom", "arithmetic")]


@pytest.fixture(scope="module")
def model(rows: list[Demonstration]) -> Model:
    return by_heart(rows)


def make_loop(model: Model, sandbox: Sandbox, **config: bool) -> RolloutLoop:
    assert model.processor is not None
    engine = Engine(model, EngineConfig(max_sequences=16, num_blocks=256, quiet=True, **config))
    return RolloutLoop(engine, sandbox, model.processor, CONFIG)


@pytest.fixture(scope="module")
def greedy(model: Model, sandbox: Sandbox, rows: list[Demonstration]) -> list[Rollout]:
    groups = make_loop(model, sandbox).run([row.question for row in rows], CONFIG.sampling(n=1, temperature=0.0))
    return [group[0] for group in groups]


def test_two_rounds_of_code_lead_to_the_answer(greedy: list[Rollout], rows: list[Demonstration]) -> None:
    zoom, product = greedy
    assert zoom.text == rows[0].response and product.text == rows[1].response
    assert (zoom.status, zoom.answer) == (RolloutStatus.ANSWERED, rows[0].question.solution)
    assert zoom.num_code == 2 and zoom.code_ok and product.answer == rows[1].question.solution
    # The second block cuts what the first one left in the session, so the crop is the demonstration's.
    for turn, expected in zip(zoom.turns, rows[0].images[1:], strict=False):
        assert turn.result is not None and turn.result.status is Status.OK
        assert turn.result.images[0].tobytes() == expected.tobytes()


def test_the_trajectory_is_what_training_would_make_of_the_text(
    greedy: list[Rollout], rows: list[Demonstration], model: Model
) -> None:
    processor = model.processor
    assert processor is not None
    for rollout, row in zip(greedy, rows, strict=True):
        prompt = build_prompt(row.question, "short", processor).token_ids
        taught = supervised_sample(processor, prompt, row.response, rollout.images, rule="all")
        count = len(rollout.token_ids)
        np.testing.assert_array_equal(rollout.token_ids, taught.token_ids[:count])  # less the end of the turn
        np.testing.assert_array_equal(rollout.sampled, taught.weights[:count] > 0)
        features = sum(image.num_tokens for image in rollout.images)
        np.testing.assert_array_equal(rollout.kinds == TokenKind.IMAGE, rollout.token_ids == processor.image_token_id)
        assert (rollout.kinds == TokenKind.IMAGE).sum() == features


@torch.no_grad()
def test_recorded_logprobs_are_those_of_one_full_forward_pass(
    model: Model,
    sandbox: Sandbox,
    rows: list[Demonstration],
    tolerances: dict[tuple[str, torch.dtype], tuple[float, float]],
) -> None:
    """Over rounds, appended images and shared prompts: the engine's record against the trainer's own computation."""
    processor = model.processor
    assert processor is not None and processor.image_token_id is not None
    [group, _] = make_loop(model, sandbox).run(
        [row.question for row in rows], CONFIG.sampling(n=3, temperature=1.0, seed=1)
    )
    banned = [*processor.never_sampled_ids, *range(processor.vocab_size, model.config.text.vocab_size)]
    for rollout in group:
        ids = torch.from_numpy(rollout.token_ids)
        features = model.encode_images(
            torch.from_numpy(np.concatenate([image.pixel_values for image in rollout.images])),
            [image.grid for image in rollout.images],
        )
        hidden = model(
            ids,
            torch.from_numpy(positions(processor, rollout.token_ids, rollout.images)),
            PackedAttention([len(ids)]),
            image_features=features,
            image_positions=torch.nonzero(ids == processor.image_token_id)[:, 0],
        )
        logits = model.logits(hidden)
        logits[:, banned] = -torch.inf
        expected = logits.log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0].numpy()
        at = np.flatnonzero(rollout.sampled)
        atol, _ = tolerances["model_logits", torch.float32]
        np.testing.assert_allclose(rollout.logprobs_raw[at], expected[at - 1], atol=atol, rtol=0)
        code = rollout.kinds == TokenKind.CODE
        assert not rollout.temperatures[code].any() and not rollout.logprobs[code].any()
        text = (rollout.kinds == TokenKind.TEXT) & rollout.sampled
        assert (rollout.temperatures[text] == 1).all()
        np.testing.assert_allclose(rollout.logprobs[text], rollout.logprobs_raw[text], atol=1e-6, rtol=0)


def test_a_deterministic_run_repeats_bit_for_bit(model: Model, sandbox: Sandbox, rows: list[Demonstration]) -> None:
    questions = [row.question for row in rows]
    first, second = (
        make_loop(model, sandbox, deterministic=True).run(questions, CONFIG.sampling(n=3, temperature=1.0, seed=5))
        for _ in range(2)
    )
    alone = make_loop(model, sandbox, deterministic=True).run(
        questions[:1], CONFIG.sampling(n=3, temperature=1.0, seed=5)
    )
    loop = make_loop(model, sandbox, deterministic=True, run_ahead=True)
    ahead = loop.run(questions, CONFIG.sampling(n=3, temperature=1.0, seed=5))
    assert loop.engine.stats()["dropped_tokens"] > 0
    others = [*second[0], *second[1], *alone[0], *ahead[0], *ahead[1]]
    for a, b in zip([*first[0], *first[1], *first[0], *first[0], *first[1]], others, strict=True):
        for name in ("token_ids", "logprobs", "logprobs_raw", "entropies", "kinds", "rounds"):
            assert getattr(a, name).tobytes() == getattr(b, name).tobytes(), name
    assert len({r.text for r in first[0]}) > 1, "sampling strays, else this shows nothing"


def test_real_rollouts_survive_the_disk(greedy: list[Rollout], model: Model, tmp_path: Path) -> None:
    write_rollouts(tmp_path / "rollouts" / "step_0.jsonl", greedy)
    for (back, _), rollout in zip(
        read_rollouts(tmp_path / "rollouts" / "step_0.jsonl", processor=model.processor), greedy, strict=True
    ):
        assert back.text == rollout.text and back.turns[0].result is not None
        np.testing.assert_array_equal(back.logprobs, rollout.logprobs)
        assert [image.digest for image in back.images] == [image.digest for image in rollout.images]


def test_evaluation_and_the_control_without_code(model: Model, sandbox: Sandbox, rows: list[Demonstration]) -> None:
    loop = make_loop(model, sandbox)
    questions = [row.question for row in rows]
    result = evaluate(loop, questions)
    assert result.overall.accuracy == 1.0 and result.overall.code_share == 1.0 and result.overall.code_ok == 1.0
    assert set(result.scenarios) == {"zoom", "arithmetic"}
    control = no_code_control(loop, questions)
    assert control.overall.code_share == 0.0 and control.overall.n == 2
    assert loop.engine.stats()["blocks_used"] == 0


def test_an_interrupt_leaves_engine_and_sandbox_usable(
    model: Model, sandbox: Sandbox, rows: list[Demonstration]
) -> None:
    """Interrupted with code still running: the blocks are free, the threads gone, and the next run is as ever."""
    loop = make_loop(model, sandbox)
    step = loop.engine.step

    def interrupted() -> list:
        ended = step()
        if ended:
            loop.engine.step = step  # type: ignore[method-assign]
            raise KeyboardInterrupt
        return ended

    loop.engine.step = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        loop.run([row.question for row in rows], CONFIG.sampling(n=3))
    assert loop.engine.stats()["blocks_used"] == 0 and not loop.engine.has_unfinished()
    assert not [t for t in threading.enumerate() if t.name.startswith("thyme-rollout")]
    [[rollout]] = loop.run([rows[0].question], CONFIG.sampling(n=1, temperature=0.0))
    assert rollout.answer == rows[0].question.solution


def test_ask_prints_thoughts_code_images_and_answer(
    model: Model, rows: list[Demonstration], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    question: Question = rows[0].question
    assert question.image is not None
    question.image.save(tmp_path / "sign.png")
    save(model, model.processor, tmp_path / "model")
    write_dialect(tmp_path / "model", Dialect(prompt_style="short"))
    out = io.StringIO()
    config = Config(model="model", image="sign.png", question=question.question, max_tokens=200, name="kept")
    rollout = answer(config, Console(file=out, soft_wrap=True, highlight=False))
    assert rollout.answer == question.solution
    printed = out.getvalue()
    parts = [
        "is tiny: column",
        "image.crop(",
        "sandbox: ok",
        "is small: column",
        "// 6",
        f"Answer: {question.solution}",
    ]
    found = [printed.find(part) for part in parts]
    assert -1 not in found and found == sorted(found), printed
    kept = list((tmp_path / "runs" / "kept" / "images").glob("*.png"))
    assert len(kept) == 2 and all(path.name in printed.replace("\n", "") for path in kept)
    assert {read_picture(path).tobytes() for path in kept} == {image.tobytes() for image in rows[0].images[1:]}
