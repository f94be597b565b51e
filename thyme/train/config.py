"""Settings of the training stages: an optimizer with its schedule, and what each stage adds. Standard library only."""

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from thyme.config import RARE

LossRule = Literal["paper", "code", "all"]
Normalization = Literal["group_tokens", "batch_tokens", "sequence_mean", "constant"]
Backend = Literal["none", "tensorboard", "trackio", "wandb"]
GreedyTokens = Literal["raw", "exclude", "is_pi", "soft"]
PHASES = ("rollout", "reward", "update", "save")
"""What a training step spends its time on."""
LossKind = Literal["ppo", "gspo", "gspo_token", "cispo"]
KlKind = Literal["k1", "k2", "k3"]
Truncated = Literal["train", "mask", "zero"]
MismatchMask = Literal["none", "token", "sequence"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageConfig:
    """What every stage has; steps are optimizer steps."""

    steps: int = 100
    """Optimizer steps."""
    epochs: float = 0.0
    """Passes over the files of `data.train`, in place of `steps`; 0: as `steps` says."""
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
    weight_decay: float = field(default=0.0, metadata=RARE)
    """Decoupled decay of matrices, per unit of learning rate; norms and biases have none."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 leaves them."""
    warmup_steps: int = 0
    """The rate rises linearly to its peak over this many steps."""
    warmup_share: float = 0.0
    """The same as a share of all steps; the longer of the two holds."""
    schedule: Literal["linear", "cosine"] = "linear"
    """How the rate falls in the last `decay_share` of the steps; it is flat before."""
    decay_share: float = 0.0
    """Share of all steps, at the end, in which the rate falls; 0 keeps it flat."""
    final_rate: float = 0.0
    """Share of the peak rate that is left at the end of the decay."""
    max_tokens_per_micro_batch: int = 16_384
    """No forward pass holds more packed tokens than this (a single longer sample may)."""
    fused_head: bool | None = None
    """The LM head's product is part of the loss and no logits are stored (`thyme.kernels.linear_logprob`): what makes a
    large vocabulary fit. None: from 32,768 words on, where the logits of 4,096 trained tokens and their gradient would
    take half a GiB in bfloat16; fewer are quicker without."""
    max_skipped_steps: int = field(default=3, metadata=RARE)
    """A step whose loss or gradient is not finite changes nothing; so many in a row end the stage with an error."""
    save_steps: int = 0
    """A checkpoint to resume from is written every so many steps; 0: at the end of the stage alone."""
    keep_checkpoints: int = field(default=0, metadata=RARE)
    """The newest so many of those are kept and older ones deleted, each time after the next one is complete; 0: all."""
    best_metric: str = field(default="", metadata=RARE)
    """A metric of the stage, such as "reward/mean": the checkpoint with the best mean of it since the checkpoint before
    is kept beside the newest, and checkpoints/best.json names it."""
    best_mode: Literal["max", "min"] = field(default="max", metadata=RARE)
    """Whether the best is the highest or the lowest."""
    on_save_error: Literal["stop", "continue"] = field(default="stop", metadata=RARE)
    """What a checkpoint that cannot be written (no room, no permission) does: "stop" ends the run with one line, to be
    resumed from the last complete checkpoint; "continue" warns and tries again at the next one."""
    activation_checkpointing: bool = False
    """Of each decoder layer and vision block keep only the inputs, and compute it once more in the backward pass: far
    fewer activations for a third more arithmetic. The gradients are the same. `thyme plan` says what it saves."""
    freeze_vision: bool = False
    """Keep the vision tower's patch embedding and blocks as they are; Thyme does so in every stage."""
    freeze_merger: bool = False
    """Keep the merger, through which pictures reach the decoder, as it is; Thyme does so in SFT and not in RL."""

    def __post_init__(self) -> None:
        one_of(self, "optimizer", ("muon", "adamw"))
        one_of(self, "optimizer_state", ("fp32", "bf16", "8bit"))
        if self.optimizer_state != "fp32":
            rule = "'fp32' where {}: there is no other state for that"
            require(self, "optimizer_state", self.optimizer == "adamw", rule.format("optimizer is 'muon'"))
            require(self, "optimizer_state", not self.optimizer_offload, rule.format("optimizer_offload is on"))
        one_of(self, "schedule", ("linear", "cosine"))
        one_of(self, "best_mode", ("max", "min"))
        one_of(self, "on_save_error", ("stop", "continue"))
        for name in ("steps", "batch_size", "max_tokens_per_micro_batch", "max_skipped_steps"):
            require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("learning_rate", "muon_learning_rate"):
            require(self, name, getattr(self, name) > 0, "positive")
        for name in ("weight_decay", "max_grad_norm", "warmup_steps", "save_steps", "keep_checkpoints"):
            require(self, name, getattr(self, name) >= 0, "at least 0")
        require(self, "epochs", 0 <= self.epochs < float("inf"), "at least 0")
        for name in ("warmup_share", "decay_share", "final_rate"):
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
    max_row_tokens: int = 0
    """Rows of more tokens, pictures included, are left out and counted; 0: none is."""

    def __post_init__(self) -> None:
        StageConfig.__post_init__(self)
        require(self, "max_row_tokens", self.max_row_tokens >= 0, "at least 0")
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
class LossConfig:
    """The policy loss: what `thyme.kernels.grpo_loss.GrpoLossConfig` has beside `rl.kl_coef` and `rl.greedy_tokens`."""

    loss: LossKind = "ppo"
    """"ppo": a ratio per token, clipped. "gspo": its geometric mean over the rollout, with that gradient; "gspo_token":
    the same value with the gradient of the token. "cispo": the clipped ratio weighs the log-prob, no token is lost."""
    clip_eps_low: float = 0.2
    """The ratio is clipped to at least 1 - this where the advantage is negative."""
    clip_eps_high: float = 0.2
    """The ratio is clipped to at most 1 + this where the advantage is positive; DAPO's clip-higher is 0.28."""
    ratio_cap: float | None = None
    """Two-sided clip: the ratio never counts for more than this, also where the advantage is negative; none: no cap."""
    kl: KlKind = "k3"
    """Estimator of the KL to the starting model; d = ref - logprob. k1: -d, k2: d^2 / 2, k3: exp(d) - d - 1."""
    kl_times_ratio: bool = False
    """Multiply the estimator by the token's ratio, which makes its gradient unbiased off-policy."""
    entropy_coef: float = 0.0
    """Coefficient of the entropy bonus (entropy at temperature 1)."""
    rollout_ratio_cap: float | None = None
    """Truncated importance sampling: a token counts by min(trainer's probability / engine's, this); none: by 1."""

    def __post_init__(self) -> None:
        one_of(self, "loss", get_args(LossKind))
        one_of(self, "kl", get_args(KlKind))
        for name in ("clip_eps_low", "clip_eps_high", "entropy_coef"):
            require(self, name, 0 <= getattr(self, name) < math.inf, "finite and at least 0")
        for name in ("ratio_cap", "rollout_ratio_cap"):
            cap = getattr(self, name)
            require(self, name, cap is None or 0 < cap < math.inf, "finite and positive, or none")
        if self.ratio_cap is not None:
            least = 1 + self.clip_eps_high
            require(self, "ratio_cap", self.ratio_cap >= least, f"at least 1 + clip_eps_high ({least:g})")
            require(self, "ratio_cap", self.loss != "cispo", "none where loss is 'cispo', which clips every ratio")


@dataclass(frozen=True, slots=True, kw_only=True)
class MismatchConfig:
    """What is done where trainer and engine disagree about probabilities: masked importance sampling, and an alarm."""

    mask: MismatchMask = "none"
    """What is left out where the trainer's probability over the engine's is not in [low, high]. "token": that token;
    "sequence": the rollout, by the geometric mean over its tokens. Takes a forward pass more."""
    low: float = 0.5
    """Smallest ratio that is trained."""
    high: float = 2.0
    """Largest ratio that is trained."""
    on_mismatch: Literal["warn", "abort"] = "warn"
    """What happens where the two differ by more than max_kl in text, in code or over all. "warn": a line in the log
    after the step; "abort": the run ends with an error before the batch's first update, which takes a forward pass
    more."""
    max_kl: float = 0.1
    """Largest divergence of trainer and engine, a mean over a batch's trained tokens, in nats."""
    max_token: float | None = None
    """Under "abort": largest difference of the two log-probs of one token, in nats; none: any. 0, where a deterministic
    engine on a CPU promises equal bits, ends the run at the first bit that differs."""

    def __post_init__(self) -> None:
        one_of(self, "mask", get_args(MismatchMask))
        require(self, "low", 0 <= self.low <= 1, "in [0, 1]: a ratio of 1 is no mismatch")
        require(self, "high", self.high >= 1, "at least 1: a ratio of 1 is no mismatch")
        one_of(self, "on_mismatch", ("warn", "abort"))
        require(self, "max_kl", self.max_kl >= 0, "at least 0")
        require(self, "max_token", self.max_token is None or self.max_token >= 0, "at least 0, or none")


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectConfig:
    """Which groups of rollouts make a batch; as it stands all that were asked, those without spread included.

    Either setting takes more questions than batch_size a step, so that the data is gone through sooner.
    """

    max_refills: int = 0
    """Dynamic sampling (DAPO): groups without spread are dropped and the next questions asked in their place, in so
    many rounds at most after the first; what is missing then stays missing. 0: off."""
    oversample: float = 1.0
    """Oversample, filter, rank (PyVision-RL): so many times the questions that a batch needs are asked, rounded up, and
    the groups with the largest spread kept, the earlier where it is equal. 1: off."""

    def __post_init__(self) -> None:
        require(self, "max_refills", self.max_refills >= 0, "at least 0")
        require(self, "oversample", 1 <= self.oversample < math.inf, "at least 1, and finite")

    @property
    def is_on(self) -> bool:
        """Whether anything is selected."""
        return self.max_refills > 0 or self.oversample > 1


@dataclass(frozen=True, slots=True, kw_only=True)
class AlarmConfig:
    """Warnings where RL goes wrong without an error (`thyme.train.alarms`); none of them ends a run."""

    enabled: bool = True
    """Whether anything is watched."""
    window: int = 20
    """Steps whose median is the level that a step is compared with."""
    warmup: int = 5
    """Steps before the first comparison."""
    fall: float = 0.5
    """Share of its level under which the share of rollouts with code, the entropy, or the share of snippets that run
    without an error is an alarm."""
    result_fall: float = 0.75
    """Share of its level under which right answers are an alarm, where their form is as good as it was."""
    spike: float = 5.0
    """Times its level beyond which the gradient's norm, or the divergence of trainer and engine, is an alarm."""
    mismatch_kl: float = 0.01
    """A divergence of trainer and engine up to this is no alarm, however small it was before."""

    def __post_init__(self) -> None:
        for name in ("window", "warmup"):
            require(self, name, getattr(self, name) >= 1, "at least 1")
        require(self, "warmup", self.warmup <= self.window, f"at most window ({self.window})")
        for name in ("fall", "result_fall"):
            require(self, name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        require(self, "spike", self.spike > 1, "above 1")
        require(self, "mismatch_kl", self.mismatch_kl >= 0, "at least 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class RlConfig(StageConfig):
    """GRPO-ATS: an optimizer step or several on each batch of rollouts. Temperatures and group size: RolloutConfig."""

    steps: int = 20
    """Batches of rollouts; each makes updates_per_batch * epochs_per_batch optimizer steps at one learning rate."""
    batch_size: int = 16
    """Questions in a batch; each has a group of rollouts."""
    updates_per_batch: int = 1
    """Mini-batches that a batch is cut into, by question, in order; each makes an optimizer step of its own."""
    epochs_per_batch: int = 1
    """Times that a batch is gone through. Beyond one update a batch the later ones are off-policy: the ratio is against
    the policy before the first, whose log-probs take one forward pass more, and clipping acts."""
    optimizer: Literal["muon", "adamw"] = "adamw"
    learning_rate: float = 1e-4
    warmup_steps: int = 3
    kl_coef: float = 0.001
    """Weight of KL(policy, starting model) in the loss (Thyme: 0.001); 0 needs no copy of the starting model."""
    reference: Literal["device", "host"] = "device"
    """Where the starting model's copy lies. "host": decoder layers and vision blocks in host memory, each brought to
    the device while it runs, so that no more than one of them is there; log-probs are the same."""
    greedy_tokens: GreedyTokens = "raw"
    """What the gradient of a greedy (code) token is: `thyme.kernels.grpo_loss.GrpoLossConfig`."""
    loss: LossConfig = field(default_factory=LossConfig)
    mismatch: MismatchConfig = field(default_factory=MismatchConfig)
    select: SelectConfig = field(default_factory=SelectConfig)
    share_prefixes: bool = field(default=True, metadata=RARE)
    """What rollouts have in common from their beginning on, the prompt with its pictures above all, goes through a
    forward and backward pass once (`thyme.train.prefix_sharing`). Losses and gradients are the same up to rounding."""
    normalization: Normalization = "group_tokens"
    """Over what the loss is a mean (`thyme.train.objective.normalize`); "group_tokens" is Thyme's."""
    normalization_tokens: int = field(default=1024, metadata=RARE)
    """Tokens a rollout is divided by under normalization "constant"."""
    truncated: Truncated = "train"
    """What a rollout counts that a limit of tokens, the context or an abort cut off. "train": as any other, with what
    it earned (Thyme); "mask": its reward is in its group's baseline, its tokens are not trained (DAPO's overlong
    filtering); "zero": it earned 0, and is trained. One that was stopped for repeating itself is none of these."""
    credit: Literal["group", "branch"] = "group"
    """Among whom a rollout's reward is compared. "group": all of its question, and where it branched off another one
    its prefix is trained with it. "branch": the siblings of each branch point, every token trained once, with the
    advantage of what it decided (`thyme.train.advantages.branch_advantages`). The same without branches."""
    advantage_scale: Literal["std", "none"] = "std"
    """Whether advantages are divided by the group's standard deviation."""
    max_unscored_steps: int = field(default=3, metadata=RARE)
    """A group that the scorer cannot judge is left out; so many steps in a row without any scored group end the
    stage with an error."""
    record_steps: int = 5
    """The rollouts of every so many steps are written to the run folder, and those of a step in which an alarm begins;
    0: only these."""
    alarms: AlarmConfig = field(default_factory=AlarmConfig)

    def __post_init__(self) -> None:
        StageConfig.__post_init__(self)
        one_of(self, "reference", ("device", "host"))
        one_of(self, "greedy_tokens", get_args(GreedyTokens))
        one_of(self, "normalization", get_args(Normalization))
        one_of(self, "truncated", get_args(Truncated))
        one_of(self, "advantage_scale", ("std", "none"))
        one_of(self, "credit", ("group", "branch"))
        for name in ("kl_coef", "record_steps"):
            require(self, name, getattr(self, name) >= 0, "at least 0")
        for name in ("normalization_tokens", "max_unscored_steps", "updates_per_batch", "epochs_per_batch"):
            require(self, name, getattr(self, name) >= 1, "at least 1")
        rule = f"at most batch_size ({self.batch_size}), the questions that it cuts into parts"
        require(self, "updates_per_batch", self.updates_per_batch <= self.batch_size, rule)

    @property
    def needs_old_logprobs(self) -> bool:
        """Whether log-probs are computed before the first update of a batch."""
        compares = self.mismatch.mask != "none" or self.mismatch.on_mismatch == "abort"
        return self.updates_per_batch * self.epochs_per_batch > 1 or compares


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackConfig:
    """Where metrics are shown beside metrics.jsonl."""

    to: Backend = "none"
    """"tensorboard" writes runs/<name>/tensorboard/; "trackio" keeps its own local store; "wandb" as its login says."""
    project: str = "thyme"
    """Name of the project at trackio and Weights & Biases; the run there is called as here."""

    def __post_init__(self) -> None:
        one_of(self, "to", get_args(Backend))
        require(self, "project", bool(self.project), "a name")


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
