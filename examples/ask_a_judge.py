"""A reward that asks a language model a question of its own: how well the reasoning is written, from 0 to 10.

    python examples/ask_a_judge.py

and as the reward of a run, whose judge is any OpenAI-compatible server (bounded, retried and cached as `[judge]` says):

    thyme rl --reward.function examples/ask_a_judge.py:reward --judge.url http://localhost:8000/v1 --judge.model NAME

Here a stand-in answers in the server's place: it likes short sentences. So of two right answers the plainer one wins.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from thyme.rewards import AsyncJudge, result
from thyme.rollout import Question, Rollout
from thyme.rollout.types import RolloutStatus

T = TypeVar("T")

PROMPT = """Rate from 0 to 10 how clearly this reasoning is written. Answer with the number alone.

{text}
"""


def grade(text: str) -> float | None:
    """The judge's number as a share; None, so that it is asked again, where it gave none."""
    number = text.strip().removesuffix("/10")
    return int(number) / 10 if number.isdigit() and int(number) <= 10 else None


async def reward(rollouts: Sequence[Rollout], judge: AsyncJudge) -> list[dict[str, float]]:
    """The result, and clarity where it is right; all of the group is asked about at once."""

    async def one(rollout: Rollout) -> dict[str, float]:
        question = rollout.question
        right = result(rollout.answer, question.solution, question.question)
        clarity = await judge.ask(PROMPT.format(text=rollout.text), grade) if right else 0.0
        return {"result": right, "clarity": 0.5 * clarity}

    return await asyncio.gather(*map(one, rollouts))


class StandIn:
    """Takes the place of a server's model."""

    async def ask(self, prompt: str, read: Callable[[str], T | None]) -> T:
        longest = max(len(sentence.split()) for sentence in prompt.split("\n\n", 1)[1].split("."))
        answer = read(str(max(0, 12 - longest)))
        assert answer is not None
        return answer

    async def correct(self, question: str, answer: str, solution: str) -> bool:
        raise NotImplementedError

    async def consistent(self, thinking: str, answer: str) -> bool:
        raise NotImplementedError


def written(question: Question, index: int, thinking: str, answer: str) -> Rollout:
    """A rollout of this text, as if it had been sampled."""
    none = np.zeros(0)
    arrays = ("token_ids", "kinds", "rounds", "sampled", "temperatures", "logprobs", "logprobs_raw", "entropies")
    return Rollout(
        question=question,
        group=0,
        index=index,
        seed=0,
        weight_versions=none,
        images=[],
        turns=[],
        text=f"<think>{thinking}</think>\n<answer>{answer}</answer>",
        answer=answer,
        status=RolloutStatus.ANSWERED,
        **dict.fromkeys(arrays, none),
    )


def main() -> None:
    question = Question(id="sum", image=None, image_path="", question="What is 2 + 3 + 4?", solution="9")
    group = [
        written(question, 0, "2 and 3 make 5. 5 and 4 make 9.", "9"),
        written(question, 1, "2 and 3 make 5 and as there is also a 4 the whole of it is 9.", "9"),
        written(question, 2, "2 and 3 make 6. 6 and 4 make 10.", "10"),
    ]
    for rollout, parts in zip(group, asyncio.run(reward(group, StandIn())), strict=True):
        said = "  ".join(f"{name} {value:.2f}" for name, value in parts.items())
        print(f"{rollout.answer:>3}   reward {sum(parts.values()):.2f}   {said}")


if __name__ == "__main__":
    main()
