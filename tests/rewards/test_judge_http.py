"""A judge behind a server, through `open_scorer`: what it is asked, how often, and what happens when it is not well."""

import json
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.rewards.judge_server import NO, SOON, YES, Asked, JudgeServer, Reply, says
from tests.rewards.rollouts import answered, question, rollout
from tests.trace_rules import assert_consistent
from thyme.rewards import JudgeConfig, Reward, RewardConfig
from thyme.rewards.judge import JudgeUnavailable
from thyme.rewards.judge_prompts import CONSISTENCY, CORRECTNESS
from thyme.rewards.opening import open_scorer
from thyme.rewards.scorer import ScorerError
from thyme.rollout.types import Rollout
from thyme.trace import Trace, tracing

FULL = Reward(total=2.0, result=1.0, consistency=1.0, formatting=1.0)
FORM_ALONE = Reward(total=0.5, formatting=1.0)


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with JudgeServer() as opened:
        yield opened


def judge(server: JudgeServer, **settings: Any) -> JudgeConfig:
    return JudgeConfig(url=server.url, model="judge", **settings)


def group(*answers: str, id: str = "q") -> list[Rollout]:
    asked = question(id)
    return [rollout(asked, answered(answer), index=index) for index, answer in enumerate(answers)]


def keys(server: JudgeServer) -> list[str]:
    return sorted(asked.key for asked in server.asked)


@pytest.mark.parametrize(
    ("config", "answer", "reply", "reward", "asked"),
    [
        (RewardConfig(), "blue", YES, FULL, [CONSISTENCY]),
        (RewardConfig(), "azure", YES, FULL, [CONSISTENCY, CORRECTNESS]),
        (RewardConfig(), "red", NO, FORM_ALONE, [CORRECTNESS]),
        (RewardConfig(), "I cannot tell.", YES, FORM_ALONE, []),
        (RewardConfig(), "", YES, FORM_ALONE, []),
        (RewardConfig(mode="result"), "blue", YES, Reward(total=1.0, result=1.0, formatting=1.0), []),
        (RewardConfig(mode="result"), "azure", YES, Reward(total=1.0, result=1.0, formatting=1.0), [CORRECTNESS]),
        (RewardConfig(consistency=0), "blue", YES, Reward(total=1.5, result=1.0, formatting=1.0), []),
        (
            RewardConfig(mode="additive"),
            "red",
            says(lambda asked: asked.key == CONSISTENCY),
            Reward(total=1.0, consistency=1.0, formatting=1.0),
            [CONSISTENCY, CORRECTNESS],
        ),
    ],
)
def test_rules_first_and_the_judge_only_where_it_can_matter(
    server: JudgeServer, config: RewardConfig, answer: str, reply: Any, reward: Reward, asked: list[str]
) -> None:
    server.reply = reply
    with open_scorer(config, judge(server)) as scorer:
        assert scorer.submit(group(answer)).result(30) == [reward]
        metrics = scorer.metrics()
    assert keys(server) == asked
    assert metrics["judge/calls"] == len(asked) and metrics["judge/failures"] == 0
    assert ("judge/call_s_p95" in metrics) is bool(asked)


def test_the_request_is_a_chat_completion_with_the_settings(
    server: JudgeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    settings = judge(server, api_key_env="MY_KEY", max_tokens=77, temperature=0.25)
    with open_scorer(RewardConfig(mode="result"), settings) as scorer:
        scorer.submit(group("azure")).result(30)
    (asked,) = server.asked
    assert asked.body.keys() == {"model", "messages", "temperature", "max_completion_tokens"}
    assert (asked.body["model"], asked.body["temperature"], asked.body["max_completion_tokens"]) == ("judge", 0.25, 77)
    headers = {name.lower(): value for name, value in asked.headers.items()}
    assert headers["authorization"] == "Bearer secret"
    for text in ("Which color is the sign?", "azure", "blue"):
        assert f"\n{text}\n" in asked.prompt


def test_rewards_come_in_the_order_of_the_rollouts(server: JudgeServer) -> None:
    """The first one asked about is answered last."""
    others = threading.Semaphore(0)

    def reply(asked: Asked, _: int) -> Reply:
        if "azure" in asked.prompt:
            for _ in range(2):
                assert others.acquire(timeout=30)
        else:
            others.release()
        return Reply(json.dumps({asked.key: int("navy" in asked.prompt)}))

    server.reply = reply
    with open_scorer(RewardConfig(mode="result"), judge(server)) as scorer:
        rewards = scorer.submit(group("azure", "navy", "red")).result(30)
    assert [reward.result for reward in rewards] == [0.0, 1.0, 0.0]


def test_no_more_requests_are_open_than_allowed_and_as_many_are(server: JudgeServer) -> None:
    """Three at a time and no fewer: each waits until three are there, and then for a fourth."""
    barrier, fourth = threading.Barrier(3), threading.Event()

    def reply(asked: Asked, number: int) -> Reply:
        if server.open > 3:
            fourth.set()
        barrier.wait(timeout=30)
        assert not fourth.wait(0.1)
        return NO(asked, number)

    server.reply = reply
    with open_scorer(RewardConfig(mode="result"), judge(server, concurrency=3, retries=0)) as scorer:
        futures = [scorer.submit(group(*(f"{n} {g}" for n in range(4)), id=f"q{g}")) for g in range(3)]
        assert all(reward.total == 0.0 for future in futures for reward in future.result(60))
    assert len(server.asked) == 12 and server.most_open == 3


def test_requests_that_overlap_have_rows_of_their_own_in_a_trace(server: JudgeServer) -> None:
    barrier = threading.Barrier(3)

    def reply(asked: Asked, number: int) -> Reply:
        barrier.wait(timeout=30)
        return YES(asked, number)

    server.reply = reply
    with tracing(Trace()) as recorded, open_scorer(RewardConfig(mode="result"), judge(server)) as scorer:
        scorer.submit(group("azure", "navy", "indigo")).result(30)
    events = recorded.events()
    assert_consistent(events)
    asked = [event for event in events if event.get("cat") == "judge"]
    assert [event["name"] for event in asked] == ["ask"] * 3 and len({event["tid"] for event in asked}) == 3


def test_submitting_waits_for_nothing_and_one_group_does_not_wait_for_another(server: JudgeServer) -> None:
    gate = threading.Event()

    def reply(asked: Asked, number: int) -> Reply:
        if "slow" in asked.prompt:
            assert gate.wait(30)
        return YES(asked, number)

    server.reply = reply
    with open_scorer(RewardConfig(), judge(server)) as scorer:
        slow = scorer.submit(group("slow blue", id="slow"))
        assert scorer.submit(group("azure", id="quick")).result(30) == [FULL]
        assert not slow.done()
        gate.set()
        assert slow.result(30) == [FULL]


def test_what_is_asked_twice_at_a_time_is_asked_once(server: JudgeServer) -> None:
    with open_scorer(RewardConfig(), judge(server)) as scorer:
        server.reply = lambda asked, number: YES(asked, number)
        assert scorer.submit(group("azure", "azure", "azure", "azure")).result(30) == [FULL] * 4
    assert keys(server) == [CONSISTENCY, CORRECTNESS]


FAULTS: dict[str, Reply] = {
    "server error": Reply(status=500, headers=SOON),
    "overload": Reply(status=503, headers=SOON),
    "too many requests": Reply(status=429, headers=SOON),
    "lost connection": Reply(drops=True),
    "no verdict": Reply("The answer is right."),
    "no words": Reply(None, ended="length"),
    "no completion": Reply(body="{}"),
    "no JSON": Reply(body="<html>busy</html>", headers={"content-type": "text/html"}),
    "cut JSON": Reply(body='{"choices": ['),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_passes_is_tried_again_and_counted(server: JudgeServer, fault: str) -> None:
    server.reply = lambda asked, number: YES(asked, number) if number else FAULTS[fault]
    with open_scorer(RewardConfig(mode="result"), judge(server, retries=1)) as scorer:
        assert scorer.submit(group("azure")).result(30)[0].total == 1.0
        metrics = scorer.metrics()
        assert (metrics["judge/calls"], metrics["judge/retries"], metrics["judge/failures"]) == (1, 1, 0)
        assert scorer.metrics() == dict.fromkeys(
            ("judge/calls", "judge/cache_hits", "judge/retries", "judge/failures"), 0.0
        )
    assert len(server.asked) == 2


MESSAGES = {
    "server error": "HTTP 500",
    "too many requests": "HTTP 429",
    "lost connection": "no connection",
    "no verdict": "its answer is no verdict: 'The answer is right.' (ended by stop)",
    "no words": "its answer is no verdict: '' (ended by length; raise judge.max_tokens)",
    "no completion": "its answer is no verdict: '' (ended by no chat completion)",
}


@pytest.mark.parametrize("fault", MESSAGES)
def test_what_does_not_pass_fails_its_group_and_no_other(server: JudgeServer, fault: str) -> None:
    """No reward of 0 for what is not known."""
    server.reply = lambda asked, number: FAULTS[fault] if "azure" in asked.prompt else YES(asked, number)
    with open_scorer(RewardConfig(mode="result"), judge(server, retries=1)) as scorer:
        bad, good = scorer.submit(group("blue", "azure", id="bad")), scorer.submit(group("navy", id="good"))
        assert good.result(30)[0].total == 1.0
        with pytest.raises(JudgeUnavailable) as error:
            bad.result(30)
        assert scorer.metrics()["judge/failures"] == 1
        assert scorer.submit(group("navy", id="good")).result(30)[0].total == 1.0
    message = str(error.value)
    assert message.startswith(f"question 'bad', rollout 1: judge 'judge' at {server.url}: ")
    assert MESSAGES[fault] in message and message.endswith("(judge.retries = 1)") and "\n" not in message
    assert sum("azure" in asked.prompt for asked in server.asked) == 2


@pytest.mark.parametrize("drips", [False, True])
def test_a_request_that_hangs_ends_in_time(server: JudgeServer, drips: bool) -> None:
    """Also one that keeps the line busy: no silence of it is longer than the time-out, all of it is."""

    def reply(asked: Asked, number: int) -> Reply:
        if drips:
            return Reply(drips=True, headers={"content-length": "1000000"})
        server.closed.wait(30)
        return Reply()

    server.reply = reply
    in_time = r"no answer (within judge\.timeout_s = 0\.2|in time)"
    settings = judge(server, timeout_s=0.2, retries=0)
    with open_scorer(RewardConfig(mode="result"), settings) as scorer, pytest.raises(JudgeUnavailable, match=in_time):
        scorer.submit(group("azure")).result(30)
    server.stop()


def test_a_server_that_is_not_there_fails_the_group(server: JudgeServer) -> None:
    server.stop()
    with open_scorer(RewardConfig(mode="result"), judge(server, retries=0)) as scorer:
        with pytest.raises(JudgeUnavailable, match="no connection"):
            scorer.submit(group("azure")).result(30)
        assert scorer.submit(group("blue")).result(30)[0].total == 1.0  # the rules need no judge


@pytest.mark.parametrize(("status", "hint"), [(401, "; the key is that of $OPENAI_API_KEY"), (404, "")])
def test_a_refusal_of_the_first_request_ends_the_run(server: JudgeServer, status: int, hint: str) -> None:
    server.reply = lambda asked, _: Reply(status=status, body='{"error": {"message": "no such thing"}}')
    with open_scorer(RewardConfig(mode="result"), judge(server)) as scorer:
        with pytest.raises(ScorerError) as error:
            scorer.submit(group("azure")).result(30)
        with pytest.raises(ScorerError):
            scorer.submit(group("azure"))
    assert f"refuses its first request: HTTP {status}" in str(error.value) and "no such thing" in str(error.value)
    assert str(error.value).endswith(hint)
    assert len(server.asked) == 1


def test_a_refusal_after_a_verdict_is_one_groups_failure(server: JudgeServer) -> None:
    server.reply = lambda asked, number: Reply(status=401) if number else YES(asked, number)
    with open_scorer(RewardConfig(mode="result"), judge(server)) as scorer:
        assert scorer.submit(group("azure")).result(30)[0].total == 1.0
        with pytest.raises(JudgeUnavailable, match="HTTP 401"):
            scorer.submit(group("navy")).result(30)
        scorer.submit(group("blue")).result(30)


def test_a_cached_verdict_needs_no_server(server: JudgeServer, tmp_path: Path) -> None:
    settings = judge(server, cache=str(tmp_path / "verdicts"), retries=0)
    asked = group("azure", "navy", "blue")
    server.reply = says(lambda asked: "navy" not in asked.prompt)
    with open_scorer(RewardConfig(), settings) as scorer:
        first = scorer.submit(asked).result(30)
        assert scorer.metrics()["judge/cache_hits"] == 0
    server.stop()
    with open_scorer(RewardConfig(), settings) as scorer:
        assert scorer.submit(asked).result(30) == first == [FULL, FORM_ALONE, FULL]
        metrics = scorer.metrics()
        assert (metrics["judge/calls"], metrics["judge/cache_hits"]) == (0, 4)
        with pytest.raises(JudgeUnavailable):
            scorer.submit(group("teal")).result(30)
    other = JudgeConfig(url=server.url, model="another judge", cache=settings.cache, retries=0)
    with open_scorer(RewardConfig(), other) as scorer, pytest.raises(JudgeUnavailable):
        scorer.submit(asked).result(30)
    elsewhere = JudgeConfig(url="http://127.0.0.1:9/v1", model="judge", cache=settings.cache, retries=0)
    with open_scorer(RewardConfig(), elsewhere) as scorer:  # the same model, wherever it runs
        assert scorer.submit(asked).result(30) == first


@pytest.mark.parametrize("damage", ["", "{", "null", '{"verdict": 1}', '{"said": 1}', '{"said": "yes"}'])
def test_a_damaged_verdict_is_asked_for_again(server: JudgeServer, tmp_path: Path, damage: str) -> None:
    settings = judge(server, cache=str(tmp_path))
    for _ in range(2):
        with open_scorer(RewardConfig(mode="result"), settings) as scorer:
            assert scorer.submit(group("azure")).result(30)[0].total == 1.0
    assert len(server.asked) == 1
    (file,) = tmp_path.rglob("*.json")
    good = file.read_text()
    file.write_text(damage)
    with open_scorer(RewardConfig(mode="result"), settings) as scorer:
        assert scorer.submit(group("azure")).result(30)[0].total == 1.0
    assert len(server.asked) == 2 and file.read_text() == good
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_failure_is_not_cached(server: JudgeServer, tmp_path: Path) -> None:
    server.reply = lambda asked, number: Reply("maybe")
    with open_scorer(RewardConfig(mode="result"), judge(server, cache=str(tmp_path), retries=0)) as scorer:
        with pytest.raises(JudgeUnavailable):
            scorer.submit(group("azure")).result(30)
        server.reply = YES
        assert scorer.submit(group("azure")).result(30)[0].total == 1.0


def test_a_cache_that_fills_up_loses_no_verdict(
    server: JudgeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "thyme.rewards")
    with open_scorer(RewardConfig(mode="result"), judge(server, cache=str(tmp_path))) as scorer:

        def full(*_: object, **__: object) -> Any:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("tempfile.mkstemp", full)
        for answer in ("azure", "navy"):
            assert scorer.submit(group(answer)).result(30)[0].total == 1.0
    assert [record.message for record in caplog.records] == [
        f"judge.cache {tmp_path}: a verdict is not kept: [Errno 28] No space left on device"
    ]


def test_a_cache_that_is_no_folder_is_refused_at_once(server: JudgeServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    settings = judge(server, cache=str(tmp_path / "file"))
    with (
        pytest.raises(ValueError, match=r"judge\.cache '.*file': cannot be written to"),
        open_scorer(RewardConfig(), settings),
    ):
        pass


def test_a_judge_without_its_client_says_what_to_install(server: JudgeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with (
        pytest.raises(ValueError, match=r"judge.url: a judge needs the openai package: pip install 'thyme\[judge\]'"),
        open_scorer(RewardConfig(), judge(server)),
    ):
        pass


def test_at_the_end_open_requests_are_cancelled_and_no_thread_is_left(server: JudgeServer) -> None:
    arrived = threading.Event()

    def reply(asked: Asked, number: int) -> Reply:
        arrived.set()
        server.closed.wait(30)
        return YES(asked, number)

    server.reply = reply
    before = {thread for thread in threading.enumerate() if "reward" in thread.name}
    with open_scorer(RewardConfig(), judge(server)) as scorer:
        future = scorer.submit(group("azure"))
        assert arrived.wait(30)
    assert future.cancelled()
    assert {thread for thread in threading.enumerate() if "reward" in thread.name} == before


def test_a_formula_that_cannot_be_compared_is_an_error_of_its_own(
    server: JudgeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: str) -> bool:
        raise RuntimeError("too long")

    monkeypatch.setattr("thyme.rewards.rules.matches", fails)
    with open_scorer(RewardConfig(), judge(server)) as scorer:
        (reward,) = scorer.submit(group("azure")).result(30)
    assert reward == Reward(total=0.5, formatting=1.0, error="result: RuntimeError: too long")


def test_a_function_of_ones_own_may_ask_the_judge(server: JudgeServer, tmp_path: Path) -> None:
    server.reply = lambda asked, number: (
        Reply(status=500, headers=SOON) if "sick" in asked.prompt else YES(asked, number)
    )
    (tmp_path / "mine.py").write_text("""
async def reward(rollouts, judge):
    return [0.25 * await judge.correct("q", rollout.answer, "blue") for rollout in rollouts]

def deaf(rollouts): ...
def plain(rollouts, judge): ...
""")
    settings = judge(server, retries=0)
    with open_scorer(RewardConfig(function=f"{tmp_path}/mine.py:reward"), settings) as scorer:
        assert scorer.submit(group("azure", "navy")).result(30) == [Reward(total=0.25)] * 2
        assert scorer.metrics()["judge/calls"] == 2
        with pytest.raises(JudgeUnavailable):
            scorer.submit(group("sick")).result(30)
    for name, message in (("deaf", "takes no argument `judge`"), ("plain", "declare it with async def")):
        config = RewardConfig(function=f"{tmp_path}/mine.py:{name}")
        with pytest.raises(ValueError, match=message), open_scorer(config, settings):
            pass


RUBRIC = """
import asyncio

def score(text):
    return int(text) if text.isdigit() and int(text) <= 10 else None

async def reward(rollouts, judge):
    prompts = [f"From 0 to 10, how poetic is {rollout.answer!r}?" for rollout in rollouts]
    scores = await asyncio.gather(*(judge.ask(prompt, score) for prompt in prompts))
    return [{"poetry": score / 10} for score in scores]
"""


def test_a_function_of_ones_own_may_ask_questions_of_its_own(server: JudgeServer, tmp_path: Path) -> None:
    """The scale is theirs; tries, bounds and cache are the judge's."""
    server.reply = lambda asked, number: Reply("11") if number == 0 else Reply(str(len(asked.prompt) % 10))
    (tmp_path / "mine.py").write_text(RUBRIC)
    config = RewardConfig(function=f"{tmp_path}/mine.py:reward")
    settings = judge(server, cache=str(tmp_path / "cache"), concurrency=1, retries=1)
    with open_scorer(config, settings) as scorer:
        first = scorer.submit(group("azure", "navy")).result(30)
        assert scorer.metrics()["judge/retries"] == 1
    expected = [len(f"From 0 to 10, how poetic is {answer!r}?") % 10 / 10 for answer in ("azure", "navy")]
    assert first == [Reward(total=value, parts={"poetry": value}) for value in expected]
    server.stop()
    with open_scorer(config, settings) as scorer:
        assert scorer.submit(group("azure", "navy")).result(30) == first


def test_the_example_asks_the_runs_judge(server: JudgeServer) -> None:
    example = Path(__file__).parents[2] / "examples" / "ask_a_judge.py"
    server.reply = lambda asked, number: Reply("8/10" if "The color is blue." in asked.prompt else "11")
    with open_scorer(RewardConfig(function=f"{example}:reward"), judge(server)) as scorer:
        right, wrong = scorer.submit(group("blue", "red")).result(30)
    assert right == Reward(total=1.4, result=1.0, parts={"clarity": 0.4})
    assert wrong == Reward(total=0.0, parts={"clarity": 0.0})


def test_the_same_rewards_as_without_a_server(server: JudgeServer) -> None:
    """With a server that answers as the rule judge does, each reward is that of `score`, whatever the mode."""
    from thyme.rewards import RuleJudge, score

    rule = RuleJudge()
    texts = [answered("blue"), answered("red"), answered("blue", "It is red."), "blue", answered("blue") + "\n"]
    told: dict[str, bool] = {}

    class Noted(RuleJudge):
        def consistent(self, thinking: str, answer: str) -> bool:
            from thyme.rewards.judge_prompts import consistency_prompt

            told[consistency_prompt(thinking, answer)] = verdict = rule.consistent(thinking, answer)
            return verdict

    server.reply = says(lambda asked: told.get(asked.prompt, False))
    asked = question()
    rollouts = [rollout(asked, text, index=index, tokens=index) for index, text in enumerate(texts)]
    configs: list[Callable[[], RewardConfig]] = [
        RewardConfig,
        lambda: RewardConfig(mode="additive", consistency=0.3),
        lambda: RewardConfig(mode="result"),
        lambda: RewardConfig(overlong_buffer_tokens=4, tool_bonus=0.1),
    ]
    for make in configs:
        expected = [score(one, Noted(), make(), max_tokens=4) for one in rollouts]
        with open_scorer(make(), judge(server), max_tokens=4) as scorer:
            assert scorer.submit(rollouts).result(30) == expected
        with open_scorer(make(), max_tokens=4) as scorer:
            assert scorer.submit(rollouts).result(30) == expected
