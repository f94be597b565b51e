"""Settings of the training stages: an optimizer with its schedule, and what each stage adds. Standard library only."""

from dataclasses import dataclass
from typing import Literal, get_args

LossRule = Literal["paper", "code", "all"]
Normalization = Literal["group_tokens", "batch_tokens", "sequence_mean", "constant"]
GreedyTokens = Literal["raw", "exclude", "is_pi", "soft"]
PHASES = ("rollout", "reward", "update", "save")
"""What a training step spends its time on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageConfig:
    """What every stage has; steps are optimizer steps."""

    steps: int = 100
    """Optimizer steps."""
    batch_size: int = 32
    """Sequences in an optimizer step."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """"muon": Muon for the matrices inside blocks, AdamW for the rest. "adamw": AdamW for everything."""
    optimizer_state: Literal["fp32", "bf16", "8bit"] = "fp32"
    """What is kept of each weight beside the model's. "fp32": a float32 master (where the model is not float32 itself)
    and float32 moments. "bf16" and "8bit", for AdamW: no master, moments so small, and weights in bfloat16 rounded at
    random to either side, so that small steps add up; these need torchao (extra `train`)."""
    optimizer_offload: bool = False
    """Masters and moments live in host memory and are stepped there; gradients then add up in the model's dtype."""
    learning_rate: float = 1e-3
    """Peak rate of AdamW."""
    muon_learning_rate: float = 1e-2
    """Peak rate of Muon, whose updates are orthogonal matrices: about ten times AdamW's."""
    weight_decay: float = 0.0
    """Decoupled decay of matrices, per unit of learning rate; norms and biases have none."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 leaves them."""
    warmup_steps: int = 0
    """The rate rises linearly to its peak over this many steps."""
    schedule: Literal["linear", "cosine"] = "linear"
    """How the rate falls in the last `decay_share` of the steps; it is flat before."""
    decay_share: float = 0.0
    """Share of all steps, at the end, in which the rate falls; 0 keeps it flat."""
    final_rate: float = 0.0
    """Share of the peak rate that is left at the end of the decay."""
    max_tokens_per_micro_batch: int = 16_384
    """No forward pass holds more packed tokens than this (a single longer sample may)."""
    fused_head: bool = False
    """The LM head's product is part of the loss and no logits are stored (`thyme.kernels.linear_logprob`): what makes a
    large vocabulary fit. A small one is quicker without."""
    max_skipped_steps: int = 3
    """A step whose loss or gradient is not finite changes nothing; so many in a row end the stage with an error."""
    save_steps: int = 0
    """A checkpoint to resume from is written every so many steps; 0: never."""

    def __post_init__(self) -> None:
        one_of(self, "optimizer", ("muon", "adamw"))
        one_of(self, "optimizer_state", ("fp32", "bf16", "8bit"))
        if self.optimizer_state != "fp32":
            rule = "'fp32' where {}: there is no other state for that"
            require(self, "optimizer_state", self.optimizer == "adamw", rule.format("optimizer is 'muon'"))
            require(self, "optimizer_state", not self.optimizer_offload, rule.format("optimizer_offload is on"))
        one_of(self, "schedule", ("linear", "cosine"))
        for name in ("steps", "batch_size", "max_tokens_per_micro_batch", "max_skipped_steps"):
            require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("learning_rate", "muon_learning_rate"):
            require(self, name, getattr(self, name) > 0, "positive")
        for name in ("weight_decay", "max_grad_norm", "warmup_steps", "save_steps"):
            require(self, name, getattr(self, name) >= 0, "at least 0")
        for name in ("decay_share", "final_rate"):
            require(self, name, 0 <= getattr(self, name) <= 1, "in [0, 1]")


@dataclass(frozen=True, slots=True, kw_only=True)
class SftConfig(StageConfig):
    """The cold start: demonstrations with code, images and sandbox output."""

    steps: int = 170
    batch_size: int = 36
    learning_rate: float = 7.5e-4
    muon_learning_rate: float = 7.5e-3
    warmup_steps: int = 5
    decay_share: float = 0.35
    loss_rule: LossRule = "paper"
    """Which rounds of a response are trained (`thyme.train.masks`)."""

    def __post_init__(self) -> None:
        StageConfig.__post_init__(self)
        one_of(self, "loss_rule", get_args(LossRule))


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnealConfig(SftConfig):
    """Math annealing after the cold start: a lower rate, arithmetic rows, every round trained, until a gate is met."""

    steps: int = 120
    """At most so many; the stage ends when the gate is met."""
    learning_rate: float = 4e-4
    muon_learning_rate: float = 4e-3
    decay_share: float = 0.0
    loss_rule: LossRule = "all"
    gate_steps: int = 10
    """The gate is checked every so many steps."""
    gate_accuracy: float = 0.9
    """Held-out rows whose trained text is predicted right to the last token, as a share."""

    def __post_init__(self) -> None:
        SftConfig.__post_init__(self)
        require(self, "gate_steps", self.gate_steps >= 1, "at least 1")
        require(self, "gate_accuracy", 0 <= self.gate_accuracy <= 1, "in [0, 1]")


@dataclass(frozen=True, slots=True, kw_only=True)
class RlConfig(StageConfig):
    """GRPO-ATS: one on-policy step on each batch of rollouts. Temperatures and group size are RolloutConfig's."""

    steps: int = 20
    batch_size: int = 16
    """Questions in an optimizer step; each has a group of rollouts."""
    optimizer: Literal["muon", "adamw"] = "adamw"
    learning_rate: float = 1e-4
    warmup_steps: int = 3
    kl_coef: float = 0.001
    """Weight of KL(policy, starting model) in the loss (Thyme: 0.001); 0 needs no copy of the starting model."""
    greedy_tokens: GreedyTokens = "raw"
    """What the gradient of a greedy (code) token is: `thyme.kernels.grpo_loss.GrpoLossConfig`."""
    normalization: Normalization = "group_tokens"
    """Over what the loss is a mean (`thyme.train.objective.normalize`); "group_tokens" is Thyme's."""
    normalization_tokens: int = 1024
    """Tokens a rollout is divided by under normalization "constant"."""
    advantage_scale: Literal["std", "none"] = "std"
    """Whether advantages are divided by the group's standard deviation."""
    record_steps: int = 5
    """The rollouts of every so many steps are written to the run folder; 0: none."""
    freeze_vision: bool = False
    """Keep the vision tower's blocks as they are; the merger is trained (Thyme's RL stage does so)."""

    def __post_init__(self) -> None:
        StageConfig.__post_init__(self)
        one_of(self, "greedy_tokens", get_args(GreedyTokens))
        one_of(self, "normalization", get_args(Normalization))
        one_of(self, "advantage_scale", ("std", "none"))
        for name in ("kl_coef", "record_steps"):
            require(self, name, getattr(self, name) >= 0, "at least 0")
        require(self, "normalization_tokens", self.normalization_tokens >= 1, "at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class DistributedConfig:
    """Several ranks under torchrun, and how long each part of a step may take, on one process too."""

    shard_ranks: int = 0
    """Ranks among which the trainer's state is cut; 0: all. The number of ranks of a node keeps a copy of it on each
    node, and only gradients travel between nodes (HSDP)."""
    timeout_s: float = 600.0
    """A collective of tensors that a rank does not join within this time ends the run."""
    object_timeout_s: float = 7200.0
    """Likewise of what is no tensor: ranks wait here for the slowest one's rollouts."""
    rollout_deadline_s: float = 7200.0
    """Sampling the rollouts of a step may take so long; 0: any time."""
    reward_deadline_s: float = 3600.0
    """Scoring them likewise."""
    update_deadline_s: float = 3600.0
    """Forward passes, backward passes and the optimizer's step likewise."""
    save_deadline_s: float = 3600.0
    """Writing a checkpoint likewise."""

    def __post_init__(self) -> None:
        require(self, "shard_ranks", self.shard_ranks >= 0, "at least 0")
        for name in ("timeout_s", "object_timeout_s"):
            require(self, name, getattr(self, name) > 0, "positive")
        for phase in PHASES:
            name = f"{phase}_deadline_s"
            require(self, name, getattr(self, name) >= 0, "at least 0")

    def deadlines(self) -> dict[str, float]:
        """Seconds by phase; phases without a deadline are left out."""
        seconds = {phase: getattr(self, f"{phase}_deadline_s") for phase in PHASES}
        return {phase: limit for phase, limit in seconds.items() if limit > 0}


def require(config: object, name: str, ok: bool, rule: str) -> None:
    """Raises ValueError naming field, value and rule unless `ok`."""
    if not ok:
        raise ValueError(f"{type(config).__name__}.{name}: {getattr(config, name)!r} must be {rule}")


def one_of(config: object, name: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless the field's value is one of `choices`."""
    require(config, name, getattr(config, name) in choices, f"one of {', '.join(map(repr, choices))}")
