"""The state machine of the rollout loop, against a scripted engine and a scripted sandbox."""

import asyncio
import dataclasses
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.sandbox.host import eventually
from thyme.engine.tags import TokenKind
from thyme.rollout import events
from thyme.rollout.config import RolloutConfig
from thyme.rollout.rollout import RolloutLoop
from thyme.rollout.sampling import Sampling
from thyme.rollout.types import Question, Rollout, RolloutStatus
from thyme.sandbox import SandboxResult, Status

PAD, VISION_START, VISION_END, IM_END = 1, 2, 3, 4
SPECIALS = {"<|image_pad|>": PAD, "<|vision_start|>": VISION_START, "<|vision_end|>": VISION_END, "<|im_end|>": IM_END}
CODE = 0xE000  # one token for "<code>", as the toy tokenizer has it
TOKENS_PER_IMAGE = 3
ANSWER = ("A<answer>7</answer>", "stop", "</answer>")
SOME_CODE = ("<code>c</code>", "stop", "</code>")


class Processor:
    """One token per character, plus the specials and one for <code>."""

    vocab_size = CODE + 1
    image_token_id = PAD
    never_sampled_ids = (PAD, VISION_START, VISION_END)
    IMAGE_TEXT = "<|vision_start|><|image_pad|><|vision_end|>"

    def encode(self, text: str) -> list[int]:
        for special, token in SPECIALS.items():
            text = text.replace(special, chr(token))
        return [ord(c) for c in text.replace("<code>", chr(CODE))]

    def encode_untrusted(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def encode_parts(self, parts: Any) -> list[int]:
        return [i for text, trusted in parts for i in (self.encode(text) if trusted else self.encode_untrusted(text))]

    def decode(self, ids: list[int]) -> str:
        return "".join("<code>" if i == CODE else chr(i) for i in ids)

    def token_bytes(self, token: int) -> bytes:
        return b"<code>" if token == CODE else b"?"

    def chat(self, user: str, system: str | None = None) -> str:
        return user.replace("<image>", self.IMAGE_TEXT)

    def preprocess(self, image: Image.Image) -> Any:
        return SimpleNamespace(num_tokens=TOKENS_PER_IMAGE, digest=str(image.size), size=image.size)

    def expand(self, ids: list[int], images: Any) -> list[int]:
        return [j for i in ids for j in ([i] * (TOKENS_PER_IMAGE if i == PAD else 1))]


@dataclass(eq=False)
class Sequence:
    id: int
    seed: int
    token_ids: list[int]
    images: list[Any]
    max_tokens: int
    rounds: int = 0
    pending: list[int] = field(default_factory=list)
    state: str = "decoding"

    def __len__(self) -> int:
        return len(self.token_ids)


class Engine:
    """Each decoding sequence gets one character of its script per step."""

    def __init__(self, script: Callable[[int, int], tuple[str, str, str | None]], deterministic: bool = False) -> None:
        self.script = script  # (sequence index, round) -> text, finish_reason, stop_reason
        self.config = SimpleNamespace(deterministic=deterministic, max_sequences=4)
        self.max_context = 200
        self.sequences: list[Sequence] = []
        self.log: list[tuple[Any, ...]] = []
        self.params: list[Any] = []
        self.fail_at_step: BaseException | None = None
        self.num_steps = 0
        self.processor = Processor()

    def stats(self) -> dict[str, int]:
        nothing_guessed = dict.fromkeys(("verifications", "drafted_tokens", "accepted_tokens"), 0)
        return {"prefilled_tokens": sum(len(s.token_ids) for s in self.sequences)} | nothing_guessed

    def add_group(self, prompt: Any, params: Any, hold: bool) -> list[Sequence]:
        assert hold and params.n <= self.config.max_sequences
        self.params.append(params)
        ids = self.processor.expand(prompt.token_ids, prompt.images)
        group = [
            Sequence(len(self.sequences) + i, params.seed + i, list(ids), list(prompt.images), params.max_tokens)
            for i in range(params.n)
        ]
        self.sequences += group
        return group

    def step(self) -> list[Any]:
        self.num_steps += 1
        if self.fail_at_step and self.num_steps == 3:
            raise self.fail_at_step
        decoding = [s for s in self.sequences if s.state == "decoding"]
        assert decoding, "step with nothing to decode"
        return [c for s in decoding if (c := self._advance(s)) is not None]

    def _advance(self, s: Sequence) -> Any:
        text, finish, stop = self.script(s.id, s.rounds)
        ids = self.processor.encode(text)
        s.token_ids.append(ids[len(s.pending)])
        s.pending.append(ids[len(s.pending)])
        if len(s.pending) < len(ids):
            if len(s.pending) < s.max_tokens:
                return None
            finish, stop = "length", None
        drawn, s.pending, s.state, s.rounds = s.pending, [], "held", s.rounds + 1
        kinds = [TokenKind.END if i == IM_END else TokenKind.TEXT for i in drawn]
        numbers = np.arange(len(drawn), dtype=np.float32) + 1
        return SimpleNamespace(
            sequence=s,
            token_ids=drawn,
            kinds=kinds,
            finish_reason=finish,
            stop_reason=stop,
            weight_version=5,
            logprobs=-numbers,
            logprobs_raw=-2 * numbers,
            entropies=numbers,
            temperatures=0 * numbers + 1,
            phases=np.zeros(len(drawn), dtype=np.uint8),
        )

    def append(self, s: Sequence, ids: Any, images: Any = (), max_tokens: int | None = None) -> None:
        assert s.state == "held" and (max_tokens is None or max_tokens > 0)
        self.log.append(("append", self.num_steps, s.id))
        s.token_ids += ids
        s.images += images
        s.state, s.max_tokens = "decoding", max_tokens or s.max_tokens

    def release(self, s: Sequence) -> None:
        assert s.state == "held"
        s.state = "gone"

    def abort(self, s: Sequence) -> None:
        s.state = "gone"


class Session:
    def __init__(self, sandbox: "Sandbox", image: Any, image_path: str | None) -> None:
        self.sandbox, self.image, self.image_path = sandbox, image, image_path
        self.codes: list[str] = []
        self.closed = self.killed = False

    async def arun(self, code: str) -> SandboxResult:
        if self.closed:
            return SandboxResult(status=Status.REFUSED)
        self.codes.append(code)
        try:
            return await self.sandbox.behavior(self)
        except asyncio.CancelledError:
            self.killed = True
            raise

    def close(self) -> None:
        self.closed = True


Behavior = Callable[[Session], Awaitable[SandboxResult]]


class Sandbox:
    def __init__(self, behavior: Behavior, max_sessions: int = 64) -> None:
        self.behavior = behavior
        self.config = SimpleNamespace(workers=4, max_sessions=max_sessions, timeout_s=10.0, max_aspect=200.0)
        self.sessions: list[Session] = []

    def session(
        self, image: Any = None, image_path: str | None = None, *, seed: int = 0, more_images: Any = ()
    ) -> Session:
        assert sum(not s.closed for s in self.sessions) < self.config.max_sessions
        self.sessions.append(Session(self, image, image_path))
        return self.sessions[-1]


def returns(result: SandboxResult) -> Behavior:
    async def behavior(session: Session) -> SandboxResult:
        return result

    return behavior


def printed(text: str) -> Behavior:
    return returns(SandboxResult(status=Status.OK, stdout=text + "\n", wall_s=0.5))


async def until(condition: Callable[[], bool]) -> None:
    """What a snippet waits for; fails the run where it does not come."""
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


async def forever(session: Session) -> SandboxResult:
    """A snippet that only ends when it is killed."""
    await until(lambda: False)
    raise AssertionError


def question(name: str = "q", image: Image.Image | None = None) -> Question:
    return Question(id=name, image=image, image_path="pic.png" if image else "", question="what?", solution="7")


def loop(script: Any, behavior: Any = None, *, deterministic: bool = False, sessions: int = 64, **config: Any) -> Any:
    if isinstance(script, list):
        rounds = script
        script = lambda index, round_index: rounds[round_index]  # noqa: E731
    sandbox = Sandbox(behavior or printed("out"), sessions)
    config = {"prompt_style": "short", **config}
    return RolloutLoop(Engine(script, deterministic), sandbox, Processor(), RolloutConfig(**config))  # type: ignore


def run_one(loop: RolloutLoop, **kwargs: Any) -> Rollout:
    [[rollout]] = loop.run([question()], loop.config.sampling(n=1, **kwargs))
    return rollout


def nothing_leaked(loop: Any) -> bool:
    threads = [t for t in threading.enumerate() if t.name.startswith("thyme-rollout")]
    gone = all(s.state == "gone" for s in loop.engine.sequences)
    return gone and all(s.closed for s in loop.sandbox.sessions) and not threads


def test_an_answer_without_code_is_one_round_and_opens_no_session() -> None:
    it = loop([ANSWER])
    rollout = run_one(it)
    assert (rollout.status, rollout.answer, rollout.text) == (RolloutStatus.ANSWERED, "7", "A<answer>7</answer>")
    assert len(rollout.turns) == 1 and rollout.num_code == 0 and rollout.code_ok
    assert not it.sandbox.sessions and nothing_leaked(it)
    prompt = len("what?")
    assert rollout.sampled.tolist() == [False] * prompt + [True] * len("A<answer>7</answer>")
    assert set(rollout.kinds[:prompt]) == {TokenKind.PROMPT}
    np.testing.assert_array_equal(rollout.logprobs[prompt:], -np.arange(1, 20))
    np.testing.assert_array_equal(rollout.logprobs_raw[prompt:], -2 * np.arange(1, 20))
    assert not rollout.logprobs[:prompt].any() and not rollout.entropies[:prompt].any()
    assert set(rollout.weight_versions[prompt:]) == {5} and set(rollout.weight_versions[:prompt]) == {-1}


def test_code_result_and_answer_make_two_rounds_in_one_trajectory() -> None:
    it = loop([("x<code>```python\nprint(1)\n```</code>\n", "stop", "</code>"), ANSWER])
    rollout = run_one(it)
    first = "x<code>```python\nprint(1)\n```</code>\n"
    assert rollout.text == first + "<sandbox_output>out</sandbox_output>" + ANSWER[0]
    turn = rollout.turns[0]
    assert (turn.text, turn.code, turn.output_text) == (first, "print(1)", "<sandbox_output>out</sandbox_output>")
    assert turn.result is not None and turn.num_images == 0 and rollout.turns[1].code is None
    assert rollout.sandbox_s == 0.5 and rollout.num_code == 1
    # What was appended is what the ids say, and is neither sampled nor of the next round.
    output = rollout.kinds == TokenKind.SANDBOX
    assert Processor().decode(rollout.token_ids[output].tolist()) == "<sandbox_output>out</sandbox_output>"
    assert not rollout.sampled[output].any() and set(rollout.rounds[output]) == {0}
    assert set(rollout.rounds[np.flatnonzero(output)[-1] + 1 :]) == {1}
    arrays = (rollout.kinds, rollout.rounds, rollout.sampled, rollout.temperatures, rollout.logprobs)
    assert {len(a) for a in arrays} == {len(rollout.token_ids)}
    assert it.timing.code_blocks == 1 and it.timing.sandbox_s == 0.5


def test_returned_images_become_image_tokens_and_follow_the_question_s() -> None:
    crops = tuple(Image.new("RGB", (9, 8 + i)) for i in range(2))
    it = loop([SOME_CODE, ANSWER], returns(SandboxResult(status=Status.OK, stdout="a.png", images=crops)))
    [[rollout]] = it.run([question(image=Image.new("RGB", (50, 40)))], it.config.sampling(n=1))
    assert rollout.turns[0].output_text == "<sandbox_output><image><image></sandbox_output>"
    assert [i.size for i in rollout.images] == [(50, 40), (9, 8), (9, 9)]
    np.testing.assert_array_equal(rollout.kinds == TokenKind.IMAGE, rollout.token_ids == PAD)
    assert (rollout.token_ids == PAD).sum() == 3 * TOKENS_PER_IMAGE
    session = it.sandbox.sessions[0]
    assert session.image is rollout.question.image and session.image_path == "pic.png"


def test_a_rollout_keeps_its_session_over_rounds_and_shares_it_with_nobody() -> None:
    it = loop([SOME_CODE, SOME_CODE, ANSWER])
    it.run([question("a"), question("b")], it.config.sampling(n=2))
    assert [len(s.codes) for s in it.sandbox.sessions] == [2] * 4 and nothing_leaked(it)


@pytest.mark.parametrize(
    ("last", "status"),
    [
        (("no answer" + chr(IM_END), "eos", None), RolloutStatus.EOS_WITHOUT_ANSWER),
        (("</answer>", "stop", "</answer>"), RolloutStatus.EOS_WITHOUT_ANSWER),
        (("<answer>6</answer>\n", "stop", "</answer>"), RolloutStatus.ANSWERED),
        (("ab", "length", None), RolloutStatus.LENGTH),
        (("ab", "context", None), RolloutStatus.CONTEXT),
        (("abab", "repetition", None), RolloutStatus.REPETITION),
        (("<sandbox_output>", "stop", "forged"), RolloutStatus.FORGED),
        (("ab", "abort", None), RolloutStatus.ABORTED),
    ],
)
def test_each_way_to_end_has_its_status(last: tuple[str, str, str | None], status: RolloutStatus) -> None:
    rollout = run_one(loop([SOME_CODE, last]))
    assert rollout.status is status
    assert rollout.text.endswith(last[0].rstrip("\n" + chr(IM_END)))
    assert len(rollout.token_ids) == len(rollout.kinds) and rollout.sampled[-1]


def test_one_block_more_than_max_rounds_ends_it_unrun() -> None:
    it = loop([SOME_CODE] * 3, max_rounds=2)
    rollout = run_one(it)
    assert rollout.status is RolloutStatus.MAX_ROUNDS and rollout.num_code == 2 and len(rollout.turns) == 3
    assert rollout.turns[2].result is None and len(it.sandbox.sessions[0].codes) == 2


def test_an_output_with_too_many_images_ends_it_unappended() -> None:
    crop = SandboxResult(status=Status.OK, images=(Image.new("RGB", (9, 9)),))
    it = loop([SOME_CODE] * 9, returns(crop), max_images=3)
    [[rollout]] = it.run([question(image=Image.new("RGB", (9, 9)))], it.config.sampling(n=1))
    assert rollout.status is RolloutStatus.MAX_IMAGES and len(rollout.images) == 3
    assert [turn.num_images for turn in rollout.turns] == [1, 1, 0] and rollout.turns[2].output_text == ""
    assert (rollout.token_ids == PAD).sum() == 3 * TOKENS_PER_IMAGE


def test_an_output_that_does_not_fit_the_context_ends_it_unappended() -> None:
    rollout = run_one(loop([SOME_CODE, ANSWER], printed("x" * 200)))
    assert rollout.status is RolloutStatus.CONTEXT and rollout.turns[0].output_text == ""


def test_tokens_are_limited_per_round_and_in_all() -> None:
    per_round = run_one(loop([SOME_CODE, ("y" * 50, "eos", None)], max_tokens_per_round=20))
    assert per_round.status is RolloutStatus.LENGTH and per_round.num_sampled == 9 + 20
    in_all = run_one(loop([SOME_CODE, ("y" * 50, "eos", None)], max_tokens=25))
    assert in_all.status is RolloutStatus.LENGTH and in_all.num_sampled == 25
    nothing_left = run_one(loop([SOME_CODE, ANSWER], max_tokens=9))
    assert nothing_left.status is RolloutStatus.LENGTH and nothing_left.turns[0].output_text == ""


# Every limit of a rollout at its edge, and one past it: (config, rounds, what a snippet prints, how it ends, its size).
CROP = SandboxResult(status=Status.OK, images=(Image.new("RGB", (9, 9)),))
EDGES = {
    "max_rounds": [
        (dict(max_rounds=2), [SOME_CODE] * 2 + [ANSWER], None, "answered", 2),
        (dict(max_rounds=2), [SOME_CODE] * 3 + [ANSWER], None, "max_rounds", 2),
        (dict(max_rounds=0), [ANSWER], None, "answered", 0),
        (dict(max_rounds=0), [SOME_CODE, ANSWER], None, "max_rounds", 0),
    ],
    "max_images": [
        (dict(max_images=3), [SOME_CODE] * 3 + [ANSWER], CROP, "answered", 3),
        (dict(max_images=3), [SOME_CODE] * 4 + [ANSWER], CROP, "max_images", 4),
    ],
    "max_tokens_per_round": [
        (dict(max_tokens_per_round=19), [ANSWER], None, "answered", 0),
        (dict(max_tokens_per_round=18), [ANSWER], None, "length", 0),
    ],
    "max_tokens": [
        (dict(max_tokens=28), [SOME_CODE, ANSWER], None, "answered", 1),
        (dict(max_tokens=27), [SOME_CODE, ANSWER], None, "length", 1),
    ],
}


@pytest.mark.parametrize(("name", "at"), [(name, at) for name, cases in EDGES.items() for at in range(len(cases))])
def test_a_limit_ends_a_rollout_one_past_it_and_not_before(name: str, at: int) -> None:
    config, rounds, result, ends, num_code = EDGES[name][at]
    rollout = run_one(loop(rounds, None if result is None else returns(result), **config))
    assert (rollout.status.value, rollout.num_code) == (ends, num_code)
    assert (rollout.answer is not None) == (ends == "answered")


@pytest.mark.parametrize(("length", "marked"), [(30, False), (31, True)])
def test_printed_text_is_cut_one_past_its_limit(length: int, marked: bool) -> None:
    rollout = run_one(loop([SOME_CODE, ANSWER], printed("x" * length), max_output_chars=30))
    assert ("more characters" in rollout.turns[0].output_text) == marked
    assert "x" * 30 in rollout.turns[0].output_text and "x" * 31 not in rollout.turns[0].output_text


@pytest.mark.parametrize("most", [1, 2, 5])
def test_so_many_rollouts_are_in_flight_and_no_more(most: int) -> None:
    it = loop([ANSWER], max_in_flight=most)
    open_at_once: list[int] = []
    step = it.engine.step

    def watched() -> list[Any]:
        open_at_once.append(sum(s.state == "decoding" for s in it.engine.sequences))
        return step()

    it.engine.step = watched
    it.engine.config.max_sequences = 8
    it.run([question(str(i)) for i in range(6)], it.config.sampling(n=1))
    assert max(open_at_once) == most


def test_others_decode_while_code_runs() -> None:
    """The first rollout's code returns only once the second rollout has ended: a barrier would wait for ever."""
    other_done = threading.Event()

    def script(index: int, round_index: int) -> tuple[str, str, str | None]:
        if index == 1:
            other_done.set()
        return SOME_CODE if index == 0 and round_index == 0 else ANSWER

    async def behavior(session: Session) -> SandboxResult:
        await until(other_done.is_set)
        return SandboxResult(status=Status.OK)

    [[first], [second]] = loop(script, behavior).run([question("a"), question("b")], Sampling())
    assert first.num_code == 1 and second.num_code == 0


def test_more_code_runs_at_once_than_there_are_threads() -> None:
    """No thread waits for a snippet: all return only once all run, and the process has fewer threads than that."""
    started, threads = [], []

    async def behavior(session: Session) -> SandboxResult:
        started.append(session)
        await until(lambda: len(started) == 24)
        threads.append(threading.active_count())
        return SandboxResult(status=Status.OK)

    before = threading.active_count()
    it = loop(lambda index, round_index: SOME_CODE if round_index == 0 else ANSWER, behavior)
    it.run([question(str(i)) for i in range(6)], it.config.sampling(n=4))
    assert len(threads) == 24 and set(threads) == {before + 1}
    assert nothing_leaked(it)


def test_it_runs_inside_a_program_with_an_event_loop_of_its_own() -> None:
    async def program() -> Rollout:
        return run_one(loop([SOME_CODE, ANSWER]))

    assert asyncio.run(program()).num_code == 1


def test_the_first_result_is_admitted_when_all_wait() -> None:
    """The first snippet returns only after the second rollout went on."""
    went_on = threading.Event()

    def script(index: int, round_index: int) -> tuple[str, str, str | None]:
        if index == 1 and round_index == 1:
            went_on.set()
        return SOME_CODE if round_index == 0 else ANSWER

    async def behavior(session: Session) -> SandboxResult:
        await until(lambda: session.image_path == "fast" or went_on.is_set())
        return SandboxResult(status=Status.OK)

    slow, fast = (dataclasses.replace(question(name), image_path=name) for name in ("slow", "fast"))
    it = loop(script, behavior)
    it.run([slow, fast], it.config.sampling(n=1))
    assert [entry[2] for entry in it.engine.log] == [1, 0] and it.timing.idle_s > 0


@pytest.mark.parametrize("slow", [0, 1, 2])
def test_under_a_deterministic_engine_arrival_times_change_nothing(slow: int) -> None:
    """Whichever session is slow, results are admitted in the order of the code and at the same steps."""

    def script(index: int, round_index: int) -> tuple[str, str, str | None]:
        return ("x" * index + SOME_CODE[0], "stop", "</code>") if round_index < 2 else ("z" * 30, "eos", None)

    async def behavior(session: Session) -> SandboxResult:
        if it.sandbox.sessions.index(session) == slow:
            await asyncio.sleep(0.03)
        return SandboxResult(status=Status.OK)

    it = loop(script, behavior, deterministic=True, result_delay_steps=4)
    it.run([question()], it.config.sampling(n=3))
    # Block i of 9 + i characters ends at step 9 + i. Nothing else decodes at 11: the first is admitted at once, the
    # others 4 steps after their end; so again in the second round.
    steps = [(entry[2], entry[1]) for entry in it.engine.log]
    assert steps == [(0, 11), (1, 14), (2, 15), (0, 24), (1, 28), (2, 30)]


def test_deterministic_admission_does_not_wait_for_those_who_still_decode() -> None:
    def script(index: int, round_index: int) -> tuple[str, str, str | None]:
        return SOME_CODE if index == 0 and round_index == 0 else ("z" * 40, "eos", None)

    it = loop(script, deterministic=True, result_delay_steps=4)
    it.run([question()], it.config.sampling(n=2))
    assert it.engine.log == [("append", 9 + 4, 0)]


def test_never_more_rollouts_in_flight_than_sessions() -> None:
    it = loop([SOME_CODE, SOME_CODE, ANSWER], sessions=5, max_in_flight=6)
    # A group larger than the limit is started in parts.
    rollouts = it.run([question(str(i)) for i in range(4)], it.config.sampling(n=5))
    assert [len(group) for group in rollouts] == [5] * 4
    assert all([r.index for r in group] == list(range(5)) for group in rollouts)
    assert all(np.diff([r.seed for r in group]).tolist() == [1] * 4 for group in rollouts)


def test_seeds_follow_the_question_and_not_its_place() -> None:
    a, b = question("a"), question("b")
    forward = loop([ANSWER]).run([a, b, a], Sampling(n=2, seed=3))
    backward = loop([ANSWER]).run([b, a], Sampling(n=2, seed=3))
    assert [r.seed for r in forward[0]] == [r.seed for r in backward[1]]
    assert forward[0][0].seed != forward[2][0].seed, "the same question twice gets other draws"
    assert forward[0][0].seed != loop([ANSWER]).run([a], Sampling(seed=4))[0][0].seed


def test_without_code_the_tag_is_banned_and_a_spelled_out_block_is_not_run() -> None:
    it = loop([SOME_CODE])
    rollout = run_one(it, allow_code=False)
    assert rollout.status is RolloutStatus.MAX_ROUNDS and not it.sandbox.sessions
    [params] = it.engine.params
    assert CODE in params.banned_ids and set(Processor.never_sampled_ids) < set(params.banned_ids)
    assert params.stop == ("<code>",)
    spelled = run_one(loop([("<code>", "stop", "<code>")]), allow_code=False)
    assert spelled.status is RolloutStatus.MAX_ROUNDS


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_an_exception_leaves_nothing_behind(error: BaseException) -> None:
    """Even with a snippet running: it is killed."""

    def script(index: int, round_index: int) -> tuple[str, str, str | None]:
        assert it.engine.num_steps < 2 or eventually(lambda: it.sandbox.sessions and it.sandbox.sessions[0].codes)
        return SOME_CODE if index == 0 else ("z" * 99, "eos", None)

    it = loop(script, forever)
    it.engine.fail_at_step = error
    it.engine.num_steps = -8  # the first block is out by then
    with pytest.raises(type(error)):
        it.run([question()], it.config.sampling(n=3))
    assert [session.killed for session in it.sandbox.sessions] == [True] and nothing_leaked(it)


def test_a_session_that_opens_too_late_is_closed_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is being left while a session is still being opened."""
    opening, left = threading.Event(), threading.Event()

    def script(index: int, round_index: int) -> tuple[str, str, str | None]:
        assert it.engine.num_steps < 2 or opening.wait(20)
        return SOME_CODE if index == 0 else ("z" * 99, "eos", None)

    it = loop(script)
    it.engine.fail_at_step, it.engine.num_steps = RuntimeError("out of memory"), -8
    opened, join = it.sandbox.session, threading.Thread.join

    def late(*args: Any, **kwargs: Any) -> Session:
        opening.set()
        assert left.wait(20)
        return opened(*args, **kwargs)

    def leave(thread: threading.Thread) -> None:  # the executor waits for its thread: it has told it to stop
        left.set()
        join(thread)

    it.sandbox.session = late
    monkeypatch.setattr(threading.Thread, "join", leave)
    with pytest.raises(RuntimeError):
        it.run([question()], it.config.sampling(n=2))
    [session] = it.sandbox.sessions
    assert not session.codes and nothing_leaked(it)


def test_a_failing_sandbox_is_not_swallowed() -> None:
    async def behavior(session: Session) -> SandboxResult:
        raise OSError("fork: no more processes")

    it = loop([SOME_CODE, ANSWER], behavior)
    with pytest.raises(OSError, match="no more processes"):
        it.run([question()], it.config.sampling(n=2))
    assert nothing_leaked(it)


def test_bad_arguments_name_themselves() -> None:
    with pytest.raises(ValueError, match="n: 0"):
        loop([ANSWER]).run([question()], Sampling(n=0))
    with pytest.raises(ValueError, match="max_images: -1"):
        RolloutConfig(max_images=-1)
    with pytest.raises(ValueError, match="prompt_style: 'long'"):
        RolloutConfig(prompt_style="long")  # type: ignore[arg-type]


def stream(it: Any) -> Iterator[events.Event]:
    yield from it.stream(question())


def test_the_stream_tells_what_happens_in_order() -> None:
    it = loop([("Look < here.<code>c</code>", "stop", "</code>"), ("So <answer>7</answer>", "stop", "</answer>")])
    seen = list(stream(it))
    assert [type(e).__name__ for e in seen if not isinstance(e, events.TextPiece)] == [
        "CodeBlock",
        "CodeResult",
        "Answer",
        "End",
    ]
    text = [e.text for e in seen if isinstance(e, events.TextPiece)]
    assert "".join(text) == "Look < here.So " and len(text) > 10, "as decoded, tags and their content apart"
    code, answer = (e for e in seen if isinstance(e, events.CodeBlock | events.Answer))
    assert (code.code, answer.answer) == ("c", "7")
    assert isinstance(seen[-1], events.End) and nothing_leaked(it)


def test_the_stream_shows_what_never_became_code_or_answer() -> None:
    seen = list(stream(loop([("a<code>half", "length", None)])))
    assert "".join(e.text for e in seen if isinstance(e, events.TextPiece)) == "a<code>half"


def test_closing_the_stream_cancels_the_snippet() -> None:
    it = loop([SOME_CODE, ANSWER], forever)
    running = it.stream(question())
    assert any(isinstance(event, events.CodeBlock) for event in running)
    assert eventually(lambda: [session.codes for session in it.sandbox.sessions] == [["c"]])
    running.close()
    assert it.sandbox.sessions[0].killed and nothing_leaked(it)
