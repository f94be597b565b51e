"""Say whether a recipe fits a machine's GPUs, phase by phase, and what to change if not; loads no weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from thyme.result import Result
from thyme.verbs import anneal, rl, sft

if TYPE_CHECKING:
    from thyme.train.memory import Job, Plan

GIB = 2**30
ITEMSIZE = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True, kw_only=True)
class Config(sft.Config, anneal.Config, rl.Config):
    """A recipe, and a machine for it."""

    name: str = "plan"
    stage: Literal["rl", "sft", "anneal"] = "rl"
    """The stage that is planned."""
    gpu_gib: float = 80.0
    """Memory of one GPU."""
    gpus: int = 1
    """GPUs that train together, each with an engine of its own."""
    reserve_gib: float = 4.0
    """Of each GPU, what is kept back: CUDA's own memory, and gaps between tensors."""
    kv_gib: float = 8.0
    """KV cache that a rollout should have at least, where engine.kv_bytes and engine.num_blocks say nothing."""
    image_share: float = 0.4
    """Of the tokens of a micro-batch, those that show pictures; all others count as trained."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the model; on a GPU thyme loads a folder in bfloat16."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("gpus", "gpu_gib"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} must be at least 1")
        if not 0 <= self.reserve_gib < self.gpu_gib:
            raise ValueError(f"reserve_gib: {self.reserve_gib} must lie in [0, gpu_gib = {self.gpu_gib})")
        if self.kv_gib < 0 or not 0 <= self.image_share <= 1:
            raise ValueError(f"kv_gib: {self.kv_gib} must be at least 0, image_share: {self.image_share} in [0, 1]")


def run(config: Config) -> Result:
    """Prints the plan; the exit code is 1 where neither it nor a change that was tried fits."""
    from thyme.train.fitting import changed, fitting
    from thyme.train.memory import plan
    from thyme.verbs.jobs import job_of

    itemsize = ITEMSIZE[config.dtype]
    job = job_of(config, config.stage, itemsize=itemsize, gpus=config.gpus, image_share=config.image_share)
    budget, kv_bytes = int((config.gpu_gib - config.reserve_gib) * GIB), _kv_wanted(config, job)
    found = plan(job)
    print(f"{_head(config, job, found)}\n\n{table(found, budget, kv_bytes)}")
    changes = fitting(job, budget, kv_bytes)
    if changes is None:
        print("\nNo change that was tried makes it fit: take more or larger GPUs, or shorter samples")
        return Result(_told(found, budget, kv_bytes, None), 1)
    if changes:
        print("\nIt fits with these changes:\n")
        for key, value in changes.items():
            print(f"  {key if '.' in key else f'{config.stage}.{key}'} = {_toml(value)}")
        job = changed(job, changes)
        found = plan(job)
        print(f"\n{table(found, budget, kv_bytes)}")
    for line in _notes(config, job, found, budget):
        print(line)
    return Result(_told(found, budget, kv_bytes, changes))


def _told(found: Plan, budget: int, kv_bytes: int, changes: dict[str, Any] | None) -> dict[str, Any]:
    """For programs, in bytes of one GPU: the plan with the changes that make it fit, None where none does."""
    phases = {phase: dict(items) for phase, items in found.phases.items()}
    if "rollout" in phases:
        phases["rollout"]["KV cache"] = kv_bytes
    peak = max(sum(items.values()) for items in phases.values())
    counts = {"budget": budget, "peak": peak, "host": found.host, "kv_token": found.kv_token}
    return {"fits": peak <= budget, "changes": changes, "phases": phases, **counts, "parameters": found.counts}


def table(found: Plan, budget: int, kv_bytes: int) -> str:
    """GiB of one GPU, by phase and by what is there; the KV cache as large as it is wanted."""
    columns = {phase: dict(items) for phase, items in found.phases.items()}
    if "rollout" in columns:
        columns["rollout"]["KV cache"] = kv_bytes
    names = list(dict.fromkeys(name for items in columns.values() for name in items))
    lines = [f"{'GiB of a GPU':<14}" + "".join(f"{phase:>11}" for phase in columns)]
    for name in names:
        lines.append(f"{name:<14}" + "".join(_cell(items.get(name)) for items in columns.values()))
    totals = {phase: sum(items.values()) for phase, items in columns.items()}
    lines.append(f"{'total':<14}" + "".join(_cell(total) for total in totals.values()))
    over = {phase: total for phase, total in totals.items() if total > budget}
    peak = max(totals, key=totals.__getitem__)
    verdict = f"{', '.join(over)} {'do' if len(over) > 1 else 'does'} not fit" if over else "it fits"
    lines += ["", f"Peak {totals[peak] / GIB:.1f} of {budget / GIB:.1f} GiB, in {peak}: {verdict}"]
    return "\n".join(lines)


def _head(config: Config, job: Job, found: Plan) -> str:
    counts = found.counts
    share = f"{counts.trained / 1e9:.3f} B trained" if counts.trained < counts.all else "all trained"
    machine = f"{job.gpus} GPU{'s' if job.gpus > 1 else ''} of {config.gpu_gib:g} GiB"
    shown = round(job.tokens * job.image_share) if job.model.vision is not None else 0
    return (
        f"{config.stage} of {config.model}: {counts.all / 1e9:.3f} B parameters, {share}, {config.dtype}, {machine}\n"
        f"micro-batches of {job.tokens:,} tokens, {shown:,} of them of pictures; "
        f"head {'fused' if job.fuses_head else 'not fused'}"
    )


def _notes(config: Config, job: Job, found: Plan, budget: int) -> Iterator[str]:
    if found.host:
        yield f"Host memory for optimizer and reference: {found.host / GIB:.1f} GiB."
    if "rollout" not in found.phases:
        return
    left = found.kv_bytes(budget)
    is_said = config.engine.kv_bytes is not None or config.engine.num_blocks is not None
    taken = "" if is_said else ": `thyme rl` takes what its sequences can use of it"
    yield f"The KV cache may have {left / GIB:.1f} GiB, {left // found.kv_token:,} tokens{taken}"


def _kv_wanted(config: Config, job: Job) -> int:
    from thyme.train.memory import kv_token_nbytes

    if config.stage != "rl":
        return 0
    engine, token = config.engine, kv_token_nbytes(job)
    if engine.kv_bytes is not None:
        return engine.kv_bytes
    return int(config.kv_gib * GIB) if engine.num_blocks is None else engine.num_blocks * engine.block_size * token


def _cell(size: int | None) -> str:
    return f"{'':>11}" if size is None else f"{size / GIB:>11.1f}"


def _toml(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value).lower()
