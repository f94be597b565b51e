"""A judge's server that fails at random, and what must hold however it does."""

import hashlib
import json
import threading
from collections import Counter

import pytest

from tests.rewards.judge_server import SOON, Asked, JudgeServer, Reply
from tests.rewards.rollouts import answered, question, rollout
from thyme.rewards import JudgeConfig, JudgeUnavailable, RewardConfig, open_scorer

RETRIES = 2
FAULTS = [
    Reply(status=500, headers=SOON),
    Reply(status=429, headers=SOON),
    Reply("I am not sure."),
    Reply('{"Correctness": 1} or {"Correctness": 0}'),
    Reply(None, ended="length"),
]


def chance(*what: object) -> int:
    """From 0 to 255, the same for the same."""
    return hashlib.sha256(repr(what).encode()).digest()[0]


def is_faulty(answer: str, attempt: int) -> bool:
    return chance("fault", answer, attempt) < 90


def is_right(answer: str) -> bool:
    return chance("right", answer) < 128


@pytest.mark.parametrize("groups", [12, pytest.param(400, marks=pytest.mark.soak)])
def test_every_group_has_its_true_rewards_or_fails_and_every_request_is_counted(
    groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which groups fail follows from which tries do: those with an answer all of whose tries are faulty."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    tries: Counter[str] = Counter()
    lock = threading.Lock()

    def reply(asked: Asked, number: int) -> Reply:
        answer = asked.prompt.split("#### Generated Answer: \n")[1].split("\n")[0]
        with lock:
            attempt = tries[answer]
            tries[answer] += 1
        if is_faulty(answer, attempt):
            return FAULTS[chance("which", answer, attempt) % len(FAULTS)]
        return Reply(json.dumps({"Correctness": int(is_right(answer))}))

    answers = [[f"shade {group} {index}" for index in range(4)] for group in range(groups)]
    lost = {a for group in answers for a in group if all(is_faulty(a, attempt) for attempt in range(RETRIES + 1))}
    assert 0 < len(lost) < groups
    with JudgeServer(reply) as server:
        settings = JudgeConfig(url=server.url, model="judge", retries=RETRIES, concurrency=16)
        with open_scorer(RewardConfig(mode="result"), settings) as scorer:
            futures = []
            for number, group in enumerate(answers):
                asked = question(str(number))
                futures.append(scorer.submit([rollout(asked, answered(a), index=i) for i, a in enumerate(group)]))
            for group, future in zip(answers, futures, strict=True):
                if lost & set(group):
                    with pytest.raises(JudgeUnavailable):
                        future.result(300)
                else:
                    assert [reward.total for reward in future.result(300)] == [float(is_right(a)) for a in group]
            metrics = scorer.metrics()
    assert metrics["judge/calls"] == 4 * groups and metrics["judge/failures"] == len(lost)
    assert metrics["judge/calls"] + metrics["judge/retries"] == len(server.asked)
    assert server.most_open <= 16
