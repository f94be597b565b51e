"""What our kernels should reach on an H200, by the title of the group: derived from its copy rate (4.3 TB/s) and matmul
rate (788 TFLOP/s in bfloat16), and from what the best public kernels reach. Printed as met or missed on that GPU alone;
nothing fails on them."""

from dataclasses import dataclass
from typing import Any

GPU_NAME = "H200"


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


def _cold_ms(limit: float) -> Goal:
    return Goal("ms", limit, "ms", at_most=True)


def _warm_ms(limit: float) -> Goal:
    return Goal("warm_ms", limit, "ms warm", at_most=True)


def _of_ceiling(limit: float) -> Goal:
    return Goal("of_ceiling", limit, "%", at_most=False)


def _tflop_per_s(limit: float) -> Goal:
    return Goal("tflop_per_s", limit, "TFLOP/s", at_most=False)


GOALS = {
    "grpo_loss forward + backward: 8192 x 152064 bfloat16, 100% trained": _cold_ms(2.05),
    "grpo_loss forward + backward: 8192 x 152064 bfloat16, 40% trained": _cold_ms(0.45 * 2.05),
    "linear_logprob forward: 8192 x 3584 x 152064 bfloat16, 100% trained": _tflop_per_s(600),
    # 8 N H V flops at 600 TFLOP/s; the title's own count is 6 N H V.
    "linear_logprob forward + backward: 8192 x 3584 x 152064 bfloat16, 100% trained": _cold_ms(60),
    "sample: 1 x 152064 bfloat16": _warm_ms(0.010),
    "sample: 8 x 152064 bfloat16": _warm_ms(0.010),
    "sample: 256 x 152064 bfloat16": _cold_ms(0.026),
    "sample with top_k 50: 256 x 152064 bfloat16": _cold_ms(0.060),
    "sample with top_p 0.9: 256 x 152064 bfloat16": _cold_ms(0.060),
    "sample with min_p 0.05: 256 x 152064 bfloat16": _cold_ms(0.060),
    "paged_attention decode: 64 x 1 new of up to 4096, 28/4 heads of 128, blocks of 16": _of_ceiling(0.80),
    "paged_attention decode, ragged: 64 x 1 new of up to 16000, 28/4 heads of 128, blocks of 16": _of_ceiling(0.72),
    "paged_attention prefill: 1 x 8192 new of up to 8192, 28/4 heads of 128, blocks of 256": _tflop_per_s(450),
    "rmsnorm: 8192 x 3584 bfloat16": _of_ceiling(0.90),
    "add_rmsnorm: 8192 x 3584 bfloat16": _of_ceiling(0.90),
    "swiglu: 8192 x 18944 bfloat16": _of_ceiling(0.90),
    "mrope: 8192 tokens, 28/4 heads of 128 bfloat16": _of_ceiling(0.90),
    "mrope_write_kv with bias: 8192 tokens, 28/4 heads of 128 bfloat16": _of_ceiling(0.90),
}
