"""Opens the scorer that a config asks for, and closes what it stands on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from thyme.rewards.config import JudgeConfig, RewardConfig
from thyme.rewards.evidence.reader import require_reader
from thyme.rewards.function import FunctionScorer, load_function
from thyme.rewards.judge import RuleJudge
from thyme.rewards.judge_http import HttpJudge
from thyme.rewards.judge_scorer import JudgeScorer
from thyme.rewards.reward import PAPER, Reward, response_limit, score
from thyme.rewards.scorer import RuleScorer, Scorer
from thyme.rewards.threads import LoopThread
from thyme.rollout.types import Rollout

NO_JUDGE = JudgeConfig()


@contextmanager
def open_scorer(
    reward: RewardConfig = PAPER, judge: JudgeConfig = NO_JUDGE, *, max_tokens: int | None = None
) -> Iterator[Scorer]:
    """A scorer for the time of a run: by rules, by a judge behind a server where rules do not decide, or by a function
    of one's own. What is still being scored at the end is cancelled.

    Args:
        reward: what is earned.
        judge: who is asked; without a `url` rules have the last word, on consistency as `RuleJudge` has it.
        max_tokens: tokens a response may have in all (`RolloutConfig.max_tokens`), where the reward shapes length.

    Raises:
        ValueError: a function that cannot be loaded, or does not fit the judge; a length buffer without or above
            max_tokens; a cache that is no folder one can write; a judge, but the `openai` package is not installed; a
            reward for evidence, but nothing that reads text is.
    """
    max_tokens = response_limit(reward, max_tokens)
    if reward.evidence:
        require_reader()

    def by_rules(rollout: Rollout) -> Reward:
        return score(rollout, RuleJudge(), reward, max_tokens=max_tokens)

    if reward.function is None and judge.url is None:
        yield RuleScorer(by_rules)
        return
    function = None if reward.function is None else load_function(reward.function)
    asked = None if judge.url is None else HttpJudge(judge)
    with ExitStack() as stack:
        loop = stack.enter_context(LoopThread("rewards"))
        if asked is not None:
            loop.at_close(asked.close)
        scorer: FunctionScorer | JudgeScorer
        if function is not None:
            scorer = FunctionScorer(
                function, str(reward.function), loop=loop, timeout_s=reward.function_timeout_s, judge=asked
            )
        else:
            assert asked is not None
            scorer = JudgeScorer(asked, reward, loop=loop, max_tokens=max_tokens)
        stack.callback(scorer.close)
        stack.callback(loop.close)  # first, so that nothing waits for a turn any more
        yield scorer
