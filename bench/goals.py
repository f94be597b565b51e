"""What our kernels should reach, by the title of the group: fractions of the ceilings that the same process measured on
the same GPU, its copy rate or its matmul rate, whichever binds; derived from what the best public kernels reach on an
H200 (4.3 TB/s, 788 TFLOP/s in bfloat16). Printed as met or missed on every GPU; nothing fails on them.

The few calls that are too small to be bound by either have a time.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Goal:
    figure: str
    """Which entry of extra_info."""
    limit: float
    unit: str
    at_most: bool

    def __str__(self) -> str:
        limit = f"{self.limit:.0%}" if self.unit == "%" else f"{self.limit:g} {self.unit}"
        return f"{'<=' if self.at_most else '>='} {limit}"

    def met(self, info: dict[str, Any]) -> bool:
        return info[self.figure] <= self.limit if self.at_most else info[self.figure] >= self.limit


def _warm_ms(limit: float) -> Goal:
    return Goal("warm_ms", limit, "ms warm", at_most=True)


def _of_ceiling(limit: float) -> Goal:
    return Goal("of_ceiling", limit, "%", at_most=False)


GOALS = {
    # One read for the forward, a read and a write for the backward. Trained or not, each row's gradient is written.
    "grpo_loss forward + backward: 8192 x 152064 bfloat16, 100% trained": _of_ceiling(0.85),
    "grpo_loss forward + backward: 8192 x 152064 bfloat16, 40% trained": _of_ceiling(0.85),
    "linear_logprob forward: 8192 x 3584 x 152064 bfloat16, 100% trained": _of_ceiling(0.76),
    # The title counts 6 N H V flops; what is recomputed makes them 8, at three quarters of the ceiling.
    "linear_logprob forward + backward: 8192 x 3584 x 152064 bfloat16, 100% trained": _of_ceiling(0.57),
    # Liger-Kernel's newest rates of both ways come to 46 ms there.
    "linear_grpo_loss forward + backward: 8192 x 3584 x 152064 bfloat16, 100% trained": _of_ceiling(0.74),
    "sample: 1 x 152064 bfloat16": _warm_ms(0.010),
    "sample: 8 x 152064 bfloat16": _warm_ms(0.010),
    "sample: 256 x 152064 bfloat16": _of_ceiling(0.70),
    "sample with top_k 50: 256 x 152064 bfloat16": _of_ceiling(0.60),
    "sample with top_p 0.9: 256 x 152064 bfloat16": _of_ceiling(0.60),
    "sample with min_p 0.05: 256 x 152064 bfloat16": _of_ceiling(0.60),
    "paged_attention decode: 64 x 1 new of up to 4096, 28/4 heads of 128, blocks of 16": _of_ceiling(0.80),
    "paged_attention decode, ragged: 64 x 1 new of up to 16000, 28/4 heads of 128, blocks of 16": _of_ceiling(0.72),
    # Few sequences fill a card only where they are split.
    "paged_attention decode, one sequence: 1 x 1 new of up to 16384, 28/4 heads of 128, blocks of 16": _of_ceiling(
        0.60
    ),
    "paged_attention decode, one short: 1 x 1 new of up to 4096, 28/4 heads of 128, blocks of 16": _of_ceiling(0.60),
    "paged_attention decode, eight: 8 x 1 new of up to 4096, 28/4 heads of 128, blocks of 16": _of_ceiling(0.60),
    "paged_attention prefill: 1 x 8192 new of up to 8192, 28/4 heads of 128, blocks of 256": _of_ceiling(0.57),
    "rmsnorm: 8192 x 3584 bfloat16": _of_ceiling(0.90),
    "add_rmsnorm: 8192 x 3584 bfloat16": _of_ceiling(0.90),
    "swiglu: 8192 x 18944 bfloat16": _of_ceiling(0.90),
    "mrope: 8192 tokens, 28/4 heads of 128 bfloat16": _of_ceiling(0.90),
    "mrope_write_kv with bias: 8192 tokens, 28/4 heads of 128 bfloat16": _of_ceiling(0.90),
}
