"""What is compiled of kernels/policy_tokens.py: the loss as the recipes train it, and GSPO with everything else."""

from collections.abc import Iterator
from typing import Any

from thyme.kernels import policy_tokens

VECTORS = "logprob_ptr entropy_ptr advantages_ptr weights_ptr old_ptr ref_ptr rollout_ptr temperature_ptr"
BOUNDS = "low:fp32 high:fp32 cap:fp32"
TILE = {"BLOCK": policy_tokens._BLOCK, "num_warps": 1}


def configurations() -> Iterator[dict[str, Any]]:
    for what, loss, old, cap in (
        ("first update, PPO", 0, False, False),
        ("later update, PPO", 0, True, False),
        ("GSPO, everything", 1, True, True),
    ):
        names = [name for name in VECTORS.split() if old or name != "old_ptr"]
        absent: dict[str, Any] = {} if old else {"old_ptr": None}
        sequences = " shared_ptr:*fp32" if loss == 1 else ""
        yield {
            "op": "policy_loss",
            "kernel": "_tokens_kernel",
            "what": what,
            "types": " ".join(f"{name}:*fp32" for name in names)
            + f" segments_ptr:*u8 grads_ptr:*fp32 partial_ptr:*fp32 num_tokens:i32 {BOUNDS} kl_coef:fp32 "
            f"entropy_coef:fp32 rollout_cap:fp32 log_rollout_cap:fp32{sequences}",
            "constants": absent
            | ({} if sequences else {"shared_ptr": None})
            | {"LOSS": loss, "KL": 2, "KL_TIMES_RATIO": False, "GREEDY": 0, "HAS_ROLLOUT_CAP": cap}
            | {"PLANES": policy_tokens._PLANES},
            "options": TILE,
            "elements": policy_tokens._BLOCK // 32,
            "spot": loss == 0 and not old,
        }
        if what.startswith("later"):
            continue  # its sums are finished as those of the first
        yield {
            "op": "policy_loss",
            "kernel": "_finish_kernel",
            "what": what,
            "types": "partial_ptr:*fp32 out_ptr:*fp32 loss_ptr:*fp32 num_programs:i32",
            "constants": {"MEANS": 10 + cap, "GROUPS": 2, "PLANES": policy_tokens._PLANES, "PROGRAMS": 128},
            "options": {"num_warps": 4},
        }
    yield {
        "op": "policy_loss",
        "kernel": "_sequences_kernel",
        "what": "GSPO, everything",
        "types": "logprob_ptr:*fp32 advantages_ptr:*fp32 weights_ptr:*fp32 old_ptr:*fp32 rollout_ptr:*fp32 "
        f"temperature_ptr:*fp32 cu_seqlens_ptr:*i32 shared_ptr:*fp32 num_tokens:i32 {BOUNDS} rollout_cap:fp32",
        "constants": {"ONE_GRADIENT": True, "GREEDY": 0, "HAS_ROLLOUT_CAP": True},
        "options": TILE,
    }
