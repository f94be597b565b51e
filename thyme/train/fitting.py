"""What to change so that a job fits its GPUs: changes are tried in order, and only those that are needed are named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from thyme.train.config import RlConfig
from thyme.train.memory import Job, plan

_LEAST_TOKENS = 4096
"""Micro-batches are not made smaller than this."""


def fitting(job: Job, budget: int, kv_bytes: int) -> dict[str, Any] | None:
    """The changes that make `job` fit.

    First what leaves the result as it is (recomputing, the fused head, where the reference lies, smaller micro-batches,
    where the optimizer's state lies), then what is trained less of (the tower, 8-bit moments without masters, LoRA).

    Args:
        job: what does not fit, or does.
        budget: bytes of a GPU that a phase may take.
        kv_bytes: what the rollout needs for its KV cache.

    Returns:
        Key -> value, keys of the stage's table or "lora.rank", empty where the job fits as it is; None: they do not
        make it fit.
    """

    def fits(changes: Mapping[str, Any]) -> bool:
        return plan(changed(job, changes)).fits(budget, kv_bytes)

    changes: dict[str, Any] = {}
    for step in [{}, *_steps(job)]:
        changes |= step
        if fits(changes):
            break
    else:
        return None
    for key in reversed(list(changes)):  # the last one was needed, and may have made others superfluous
        without = {k: v for k, v in changes.items() if k != key}
        if _is_whole(without) and fits(without):
            changes = without
    return changes


def changed(job: Job, changes: Mapping[str, Any]) -> Job:
    """The job with these keys said."""
    stage = {key: value for key, value in changes.items() if key != "lora.rank"}
    lora = replace(job.lora, rank=changes["lora.rank"]) if "lora.rank" in changes else job.lora
    return replace(job, stage=replace(job.stage, **stage), lora=lora)


def _steps(job: Job) -> list[dict[str, Any]]:
    """Changes in the order in which they are tried; those that would say what is said already are left out."""
    stage = job.stage
    steps: list[dict[str, Any]] = []
    if not stage.activation_checkpointing:
        steps.append({"activation_checkpointing": True})
    if not job.fuses_head:
        steps.append({"fused_head": True})
    if job.needs_reference and isinstance(stage, RlConfig) and stage.reference == "device":
        steps.append({"reference": "host"})
    tokens = stage.max_tokens_per_micro_batch // 2
    while tokens >= max(_LEAST_TOKENS, job.longest):
        steps.append({"max_tokens_per_micro_batch": tokens})
        tokens //= 2
    is_alone = job.gpus == 1 and stage.optimizer_state == "fp32"
    if is_alone and not stage.optimizer_offload:
        steps.append({"optimizer_offload": True})
    if job.model.vision is not None and not stage.freeze_vision:
        steps.append({"freeze_vision": True})
    if is_alone:
        steps.append({"optimizer": "adamw", "optimizer_state": "8bit", "optimizer_offload": False})
    if job.lora.rank == 0:
        steps.append({"lora.rank": 16})
    return steps


def _is_whole(changes: Mapping[str, Any]) -> bool:
    """Whether no key is left of the change to 8-bit moments without the others."""
    return "optimizer_state" not in changes or {"optimizer", "optimizer_offload"} <= changes.keys()
