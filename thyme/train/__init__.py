"""Training: base stage, SFT, math annealing and GRPO-ATS over one model shared with the engine."""

from typing import TYPE_CHECKING

from thyme._lazy import facade

if TYPE_CHECKING:
    from thyme.train.advantages import group_advantages as group_advantages
    from thyme.train.masks import loss_spans as loss_spans
    from thyme.train.metrics import MetricsLog as MetricsLog
    from thyme.train.optim import build_optimizer as build_optimizer
    from thyme.train.packing import Sample as Sample
    from thyme.train.packing import TrainBatch as TrainBatch
    from thyme.train.packing import pack as pack
    from thyme.train.rl import train_rl as train_rl
    from thyme.train.sft import train_sft as train_sft
else:
    __all__, __getattr__ = facade(
        __name__,
        {
            "advantages": ["group_advantages"],
            "masks": ["loss_spans"],
            "metrics": ["MetricsLog"],
            "optim": ["build_optimizer"],
            "packing": ["Sample", "TrainBatch", "pack"],
            "rl": ["train_rl"],
            "sft": ["train_sft"],
        },
    )
