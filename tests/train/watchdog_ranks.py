"""What a rank of tests/train/test_watchdog.py runs: a step in which it is killed or over its deadline."""

import sys
import threading

import torch

from thyme.data.rows import Demonstration
from thyme.model import build
from thyme.toy.model import tiny_config, tiny_processor
from thyme.toy.scenarios import demonstrations
from thyme.train.config import DistributedConfig, SftConfig
from thyme.train.distributed import open_world
from thyme.train.sft import row_samples, train_sft


def stuck_for_good() -> None:
    threading.Event().wait()


def main() -> None:
    """The second rank stops inside of its second step, and both say when they are there."""
    torch.set_num_threads(1)
    config = DistributedConfig(update_deadline_s=float(sys.argv[1]))
    with open_world(config) as world:
        processor = tiny_processor()
        model = build(tiny_config(), processor, seed=0)
        rows = demonstrations(0, 2, {"arithmetic": 1.0})

        def take(start: int, n: int) -> list[Demonstration]:
            if start:
                print("second step", flush=True)
                if not world.is_main:
                    stuck_for_good()
            return rows

        samples = row_samples(processor, take, "all", "short")
        train_sft(model, processor, samples, SftConfig(steps=2, batch_size=2), world=world)


if __name__ == "__main__":
    main()
