"""A reward of your own: a list of rollouts in, a number for each out.

    python examples/write_a_reward.py

and as the reward of a run: `thyme rl --reward.function examples/write_a_reward.py:reward`.

This one is the paper's, less a little for each token, so that of two right answers the shorter is the better one. The
rollouts here are those of a model with random weights, with engine and sandbox as in training, so none is right: all
that is left to reward is brevity, and GRPO's advantages say so.
"""

from collections.abc import Sequence

import torch
from PIL import Image

from thyme.engine import Engine, EngineConfig
from thyme.model import build
from thyme.rewards import combine, formatting, result
from thyme.rollout import Question, Rollout, RolloutConfig, RolloutLoop
from thyme.sandbox import Sandbox, SandboxConfig
from thyme.toy.model import tiny_config, tiny_processor
from thyme.train.advantages import group_advantages

PER_TOKEN = 0.002


def reward(rollouts: Sequence[Rollout]) -> list[float]:
    """Correctness and format as in the paper, without its judge of consistency, less the price of the tokens."""
    rewards = []
    for rollout in rollouts:
        question = rollout.question
        right = result(rollout.answer, question.solution, question.question)
        rewards.append(combine(right, 0.0, formatting(rollout.text)) - PER_TOKEN * rollout.num_sampled)
    return rewards


def main() -> None:
    processor = tiny_processor()
    model = build(tiny_config(), processor, seed=0)
    sign = Image.new("RGB", (252, 252), "firebrick")
    question = Question(id="sign", image=sign, image_path="sign.png", question="What digit is it?", solution="7")
    config = RolloutConfig(group_size=8, max_tokens=96, prompt_style="short")
    with Sandbox(SandboxConfig(workers=1)) as sandbox:
        loop = RolloutLoop(
            Engine(model, EngineConfig(max_context=1024), processor=processor), sandbox, processor, config
        )
        (group,) = loop.run([question])
    rewards = reward(group)
    advantages = group_advantages(torch.tensor([rewards]))[0].tolist()
    for rollout, value, advantage in zip(group, rewards, advantages, strict=True):
        ended = f"{rollout.num_sampled:3d} tokens, {rollout.status.value}"
        print(f"{ended:<32} reward {value:+.3f}  advantage {advantage:+.3f}")


if __name__ == "__main__":
    main()
