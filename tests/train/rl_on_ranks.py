"""What each rank of tests/train/test_distributed_rl.py runs: GRPO-ATS by all ranks, and by the first one alone.

rl_on_ranks MODEL OUT UPDATES       MODEL is a folder; OUT gets ranks/, alone/ and found.json
"""

import json
import sys
from pathlib import Path

import torch

from tests.train.rl_material import by_index, make_loop
from thyme.data.streams import endless
from thyme.model import Model, load
from thyme.rewards import RuleScorer
from thyme.sandbox import Sandbox, SandboxConfig
from thyme.toy.scenarios import demonstrations, questions
from thyme.train.config import RlConfig
from thyme.train.distributed import World, open_world
from thyme.train.metrics import Metrics
from thyme.train.rl import train_rl


def train(
    folder: Path, out: Path, config: RlConfig, sandbox: Sandbox, world: World | None
) -> tuple[Model, list[Metrics]]:
    model, processor = load(folder)
    assert processor is not None
    asked = [demonstrations(0, 1, {"arithmetic": 1.0})[0].question, *questions(0, 2, {"direct": 1.0})]
    loop = make_loop(model, sandbox)
    scorer = RuleScorer(by_index)
    history = train_rl(model, processor, loop, endless(asked), config, scorer=scorer, run_dir=out, world=world)
    return model, history


def main() -> None:
    torch.set_num_threads(1)
    folder, out = map(Path, sys.argv[1:3])
    config = RlConfig(
        steps=2,
        batch_size=3,
        warmup_steps=0,
        learning_rate=1e-3,
        record_steps=1,
        updates_per_batch=int(sys.argv[3]),
        max_tokens_per_micro_batch=250,
        kl_coef=0.01,
    )
    with Sandbox(SandboxConfig(workers=2, idle_s=60)) as sandbox, open_world() as world:
        model, history = train(folder, out / "ranks", config, sandbox, world)
        own = world.gather([p.detach().clone() for p in model.parameters()])
        if world.is_main:
            alone, expected = train(folder, out / "alone", config, sandbox, None)
            found = {
                "history": history,
                "expected": expected,
                "weights": max(
                    float((a - b).detach().abs().max())
                    for a, b in zip(model.parameters(), alone.parameters(), strict=True)
                ),
                "same_on_all": all(
                    torch.equal(a, b) for other in own for a, b in zip(model.parameters(), other, strict=True)
                ),
            }
            (out / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
