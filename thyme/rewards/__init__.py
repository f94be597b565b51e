"""Rewards: the answer, its agreement with the reasoning, and the format (Thyme: r = R (1 + C / 2) + F / 2)."""

from thyme.rewards.config import JudgeConfig, RewardConfig
from thyme.rewards.consistency import consistency
from thyme.rewards.judge import AsyncJudge, Judge, JudgeUnavailable, RuleJudge
from thyme.rewards.opening import open_scorer
from thyme.rewards.reward import Reward, score, scored
from thyme.rewards.rules import combine, formatting, guarded, judged, result
from thyme.rewards.scorer import RuleScorer, Scorer, ScorerError
from thyme.rewards.shaping import overlong, tool_bonus

__all__ = [
    "AsyncJudge",
    "Judge",
    "JudgeConfig",
    "JudgeUnavailable",
    "Reward",
    "RewardConfig",
    "RuleJudge",
    "RuleScorer",
    "Scorer",
    "ScorerError",
    "combine",
    "consistency",
    "formatting",
    "guarded",
    "judged",
    "open_scorer",
    "overlong",
    "result",
    "score",
    "scored",
    "tool_bonus",
]
