"""What a list shows of a recorded rollout, from its line of JSON; of whatever version wrote the line.

A line is mostly lists of numbers, one per token, which no list shows. So they are cut out before the rest is parsed:
they are the last object but one of a line that `thyme.rollout.records` wrote, and hold no braces of their own. A line
that is laid out otherwise is parsed whole.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

LONGEST_TEXT = 160
"""Characters of a question or an answer that a list shows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutSummary:
    """One rollout in a list; None where its line does not say."""

    group: int
    index: int
    seed: int
    question_id: str
    question: str
    solution: str
    answer: str | None
    scenario: str
    status: str
    rounds: int
    codes: int
    """Code blocks that were run."""
    failed: int
    """Of them, those that did not end well."""
    pictures: int
    """Pictures that code returned."""
    tokens: int
    """Tokens that the policy drew."""
    total: float | None
    """Of the reward."""
    right: bool | None
    """Whether the answer earned anything; None where nobody scored it."""
    evidence: float | None
    """What the reward gave for an answer that a tool's result holds, 1 or 0 in an evaluation; None where that was not
    looked for, or cannot be told."""
    mismatch: float | None
    """Mean over trained tokens of the divergence from engine to trainer in nats; None where it was not recorded."""
    has_ended: bool
    """False while a step is under way."""


def summarize(line: bytes) -> RolloutSummary:
    """The summary of a line of a file of rollouts, or of the journal of a step.

    Raises:
        ValueError: the line is no rollout; says what is missing.
    """
    parts = _taken_apart(line)
    if parts is None:
        whole = _object(json.loads(line))
        return summary_of(whole, _sampled(whole), mismatch_of(whole.get("tokens")))
    row, tokens = parts
    is_compared = b'"trainer_logprobs":' in tokens
    return summary_of(row, _count_sampled(tokens), mismatch_of(json.loads(tokens)) if is_compared else None)


def summary_of(row: Mapping[str, Any], tokens: int, mismatch: float | None) -> RolloutSummary:
    """The summary of a parsed line.

    Args:
        row: with or without its per-token lists.
        tokens: that the policy drew.
        mismatch: mean divergence from engine to trainer in nats.

    Raises:
        ValueError: it is no rollout.
    """
    question, turns = row.get("question"), row.get("turns")
    if not isinstance(question, Mapping) or not isinstance(turns, list):
        raise ValueError("no rollout: question or turns are missing")
    results = [turn["result"] for turn in turns if isinstance(turn, Mapping) and isinstance(turn.get("result"), dict)]
    answer = row.get("answer")
    return RolloutSummary(
        group=_whole(row.get("group")),
        index=_whole(row.get("index")),
        seed=_whole(row.get("seed")),
        question_id=str(question.get("id", "")),
        question=_short(question.get("question")),
        solution=_short(question.get("solution")),
        answer=None if answer is None else _short(answer),
        scenario=str(question.get("scenario") or ""),
        status=str(row.get("status", "")),
        rounds=len(turns),
        codes=len(results),
        failed=sum(result.get("status") != "ok" for result in results),
        pictures=sum(len(result.get("images") or ()) for result in results),
        tokens=tokens,
        mismatch=mismatch,
        has_ended=bool(row.get("has_ended", True)),
        **_earned(row.get("rewards")),
    )


def judged(summary: RolloutSummary, rewards: Mapping[str, Any]) -> RolloutSummary:
    """The summary of a rollout with what rewards beside its line say more."""
    more = _earned(rewards)
    return replace(summary, **{name: value for name, value in more.items() if getattr(summary, name) is None})


def mismatch_of(tokens: Any) -> float | None:
    """Mean over the tokens that the trainer scored of ratio - log ratio - 1, the ratio being trainer over engine."""
    differences = token_mismatches(tokens)
    found = [math.exp(min(d, 80.0)) - d - 1 for d in differences if d is not None]
    return round(sum(found) / len(found), 9) if found else None


def token_mismatches(tokens: Any) -> list[float | None]:
    """The trainer's log-prob of each token less the engine's, at the token's temperature (1 where greedy).

    Args:
        tokens: the per-token lists of a rollout; those of a run that recorded no log-probs of the trainer have none.

    Returns:
        [T] None where the token was not trained; [] where nothing was recorded.
    """
    if not isinstance(tokens, Mapping) or not isinstance(tokens.get("trainer_logprobs"), list):
        return []
    theirs, temperatures = tokens["trainer_logprobs"], tokens.get("temperatures", [])
    drawn, raw = tokens.get("logprobs", []), tokens.get("logprobs_raw", [])
    if not len(theirs) == len(temperatures) == len(drawn) == len(raw):
        return []
    engine = (r if t == 0 else d for t, d, r in zip(temperatures, drawn, raw, strict=True))
    return [None if new is None else new - old for new, old in zip(theirs, engine, strict=True)]


def _taken_apart(line: bytes) -> tuple[Mapping[str, Any], bytes] | None:
    """The line without its per-token lists, and these as bytes; None where it is laid out otherwise.

    Text cannot pretend to be the border: inside of a JSON string its quotation marks would be escaped.
    """
    start = line.rfind(b',"tokens":{')
    end = line.find(b"}", start)
    if start < 0 or end < 0:
        return None
    try:
        return _object(json.loads(line[:start] + line[end + 1 :])), line[start + len(b',"tokens":') : end + 1]
    except ValueError:
        return None


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("no rollout: not a JSON object")
    return value


def _count_sampled(tokens: bytes) -> int:
    start = tokens.find(b'"sampled":[')
    return 0 if start < 0 else tokens.count(b"1", start + len(b'"sampled":['), tokens.find(b"]", start))


def _sampled(row: Mapping[str, Any]) -> int:
    tokens = row.get("tokens")
    sampled = tokens.get("sampled") if isinstance(tokens, Mapping) else None
    return sum(map(bool, sampled)) if isinstance(sampled, Sequence) else 0


def _earned(rewards: Any) -> dict[str, Any]:
    """What a summary says of rewards: total, right and evidence."""
    rewards = rewards if isinstance(rewards, Mapping) else {}
    total = _number(rewards.get("total"))
    earned = _number(rewards.get("result", total))
    parts = rewards.get("parts")
    return {
        "total": total,
        "right": None if earned is None else earned > 0,
        "evidence": _number(parts.get("evidence")) if isinstance(parts, Mapping) else None,
    }


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if is_number else None


def _whole(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _short(value: Any) -> str:
    text = " ".join(str(value or "").split())
    return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1] + "\u2026"
