"""What a training stage needs of each GPU's memory, by phase, counted from configs before anything is loaded.

Exact: parameters, masters, moments, gradients and copies, which are counted on a model of the meta device. By formula,
within a few percent of what is counted: activations (thyme.train.activations). Allowances, which nothing here measures:
the inside of the optimizer's step, and what `reserve_gib` keeps back for CUDA itself and for gaps between tensors.

On several GPUs each rank has shards of float32 weights, moments and gradients, one block gathered at a time, and the
whole model in its own dtype for its engine (thyme.train.sharding).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache

import torch

from thyme.model.config import LoraConfig, ModelConfig
from thyme.model.fp8 import fp8_nbytes
from thyme.model.lora import add_adapters
from thyme.model.model import Model
from thyme.train.activations import Pass, backward_bytes, forward_bytes, saved_bytes
from thyme.train.config import RlConfig, StageConfig
from thyme.train.optim import is_block_matrix
from thyme.train.reference import blocks
from thyme.train.trainable import FUSED_VOCABULARY, frozen_parts

GIB = 2**30
_HEAD_WORKSPACE = GIB
"""Of thyme.kernels.linear_logprob."""
_BLOCK8 = 256
"""Numbers that share a scale in torchao's 8-bit moments, which smaller parameters do not have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A stage on a model on a machine."""

    model: ModelConfig
    """What is trained."""
    stage: StageConfig
    """Of an RlConfig the rollouts count too."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Rank 0: every weight."""
    itemsize: int = 2
    """Bytes of a weight of the model: 2 for bfloat16, 4 for float32."""
    gpus: int = 1
    """Ranks that share the optimizer's state."""
    image_share: float = 0.4
    """Of the tokens of a micro-batch, those that show pictures, none twice; all others count as trained."""
    longest: int = 0
    """Tokens of the longest sample; a sample longer than a micro-batch has one of its own."""
    step_tokens: int = 2048
    """The engine's max_batch_tokens."""
    sequences: int = 128
    """The engine's max_sequences."""
    fp8_weights: bool = False
    """The engine's weight_dtype is fp8: it has a copy while it is awake."""
    fp8_cache: bool = False
    """Its kv_dtype is."""

    def __post_init__(self) -> None:
        if self.gpus > 1 and (self.stage.optimizer_offload or self.stage.optimizer_state != "fp32"):
            key = "optimizer_offload" if self.stage.optimizer_offload else "optimizer_state"
            raise ValueError(
                f"{key}: {getattr(self.stage, key)!r} is for one GPU: several share float32 weights and moments"
            )

    @property
    def tokens(self) -> int:
        """Of a micro-batch, at most."""
        return max(self.stage.max_tokens_per_micro_batch, self.longest)

    @property
    def fuses_head(self) -> bool:
        """As `thyme.train.trainable.fuses_head`."""
        said = self.stage.fused_head
        return said if said is not None else self.model.text.vocab_size >= FUSED_VOCABULARY

    @property
    def needs_reference(self) -> bool:
        """A second copy of the weights is kept for the KL term."""
        return isinstance(self.stage, RlConfig) and self.stage.kl_coef > 0 and self.lora.rank == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Numbers in parameters."""

    all: int
    """Every parameter, adapters included."""
    trained: int
    """Those that get a gradient."""
    moments: int
    """Bytes of the optimizer's moments."""
    blocks: int
    """In decoder layers and vision blocks."""
    block: int
    """In the largest of them."""
    largest: int
    """In the largest trained parameter."""
    matrix: int
    """In the largest matrix that Muon has."""
    fp8: int
    """Bytes of the decoder's projections in 8 bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Bytes per GPU. The KV cache is no part of it: it gets what the rollout leaves."""

    phases: dict[str, dict[str, int]]
    """Phase -> what is there -> bytes."""
    host: int
    """Bytes of host memory that all ranks of a machine of `Job.gpus` GPUs need together, images and Python left out."""
    kv_token: int
    """Bytes of one token in the KV cache."""
    counts: Counts
    """Of the model."""

    def total(self, phase: str) -> int:
        """Bytes of a phase."""
        return sum(self.phases[phase].values())

    def kv_bytes(self, budget: int) -> int:
        """What a budget of so many bytes leaves for the KV cache, which exists in the rollout only."""
        return max(0, budget - self.total("rollout")) if "rollout" in self.phases else 0

    def fits(self, budget: int, kv_bytes: int = 0) -> bool:
        """Whether every phase fits, the rollout with a KV cache of `kv_bytes`."""
        return all(self.total(phase) + kv_bytes * (phase == "rollout") <= budget for phase in self.phases)


def plan(job: Job) -> Plan:
    """Counts what each phase of the job holds.

    Raises:
        ValueError: nothing of the model is trained.
    """
    counts = count(job)
    how = _pass(job)
    text, vision = job.model.text, job.model.vision
    here = _standing(job, counts)
    grown, at_end = _gradients(job, counts)
    phases = {"load": {name: size for name, size in here.items() if name != "moments"}}
    if isinstance(job.stage, RlConfig):
        decode = forward_bytes(text, vision, tokens=job.step_tokens, patches=4 * job.step_tokens, itemsize=job.itemsize)
        phases["rollout"] = here | {"workspace": decode + job.sequences * text.vocab_size * (job.itemsize + 4)}
        if job.fp8_weights:
            phases["rollout"]["weights in fp8"] = counts.fp8
        if job.stage.kl_coef > 0 or job.stage.needs_old_logprobs:
            forward = forward_bytes(text, vision, tokens=how.tokens, patches=how.patches, itemsize=job.itemsize)
            inside = max(forward, _head_workspace(job, how.rows)) + _streamed(job, counts)
            phases["reference"] = here | {"gradients": grown, "workspace": inside}
    inside = max(backward_bytes(text, vision, how), _head_gradient(job, how.rows)) + _gathered(job, counts)
    start = here | {"gradients": grown, "activations": saved_bytes(text, vision, how), "workspace": inside}
    end = here | {"gradients": at_end, "workspace": inside}
    phases["backward"] = max(start, end, key=lambda phase: sum(phase.values()))
    phases["step"] = here | {"gradients": grown, "workspace": _step_workspace(job, counts)}
    return Plan(phases=phases, host=_host(job, counts), kv_token=kv_token_nbytes(job), counts=counts)


def kv_token_nbytes(job: Job) -> int:
    """Bytes of one token in the KV cache, over all layers."""
    text = job.model.text
    head = text.head_dim + 1 if job.fp8_cache else text.head_dim * job.itemsize
    return 2 * text.num_hidden_layers * text.num_key_value_heads * head


def count(job: Job) -> Counts:
    """Counts the parameters of the job's model and of what it trains, on the meta device.

    Raises:
        ValueError: nothing of the model is trained.
    """
    model = _without_memory(job.model, job.lora)
    frozen = {id(p) for part in frozen_parts(model, job.stage) for p in part.parameters()}
    named = list(model.named_parameters())
    trained = [(name, p) for name, p in named if p.requires_grad and id(p) not in frozen]
    if not trained:
        raise ValueError("no parameter of the model is trained: freeze less")
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks(model)]
    muon = [is_block_matrix(name, p) and job.stage.optimizer == "muon" for name, p in trained]
    return Counts(
        all=sum(p.numel() for _, p in named),
        trained=sum(p.numel() for _, p in trained),
        moments=sum(_moments(job, p.numel(), is_muon) for (_, p), is_muon in zip(trained, muon, strict=True)),
        blocks=sum(sizes),
        block=max(sizes),
        largest=max(p.numel() for _, p in trained),
        matrix=max((p.numel() for (_, p), is_muon in zip(trained, muon, strict=True) if is_muon), default=0),
        fp8=fp8_nbytes(model),
    )


@lru_cache(maxsize=8)
def _without_memory(config: ModelConfig, lora: LoraConfig) -> Model:
    with torch.device("meta"):
        model = Model(config)
    if lora.rank:
        add_adapters(model, lora)
    return model


def _moments(job: Job, numbers: int, is_muon: bool) -> int:
    """Bytes of what the optimizer keeps of a parameter beside its master."""
    state = job.stage.optimizer_state
    if state == "fp32":
        return 4 * numbers if is_muon else 8 * numbers
    if state == "8bit" and numbers >= 4096 and numbers % _BLOCK8 == 0:
        return 2 * (numbers + 4 * numbers // _BLOCK8 + 4 * 256)
    return 2 * job.itemsize * numbers


def _standing(job: Job, counts: Counts) -> dict[str, int]:
    """What is there in every phase."""
    stage, ranks = job.stage, job.gpus
    here = {"weights": job.itemsize * counts.all}
    on_gpu = not stage.optimizer_offload
    if ranks > 1:
        here["masters"] = _ceil(4 * counts.all, ranks)  # shards of all weights, frozen ones too
        here["moments"] = _ceil(counts.moments, ranks)
    elif on_gpu:
        if stage.optimizer_state == "fp32" and job.itemsize < 4:
            here["masters"] = 4 * counts.trained
        here["moments"] = counts.moments
    if job.needs_reference:
        far = counts.blocks if isinstance(stage, RlConfig) and stage.reference == "host" else 0
        here["reference"] = job.itemsize * (counts.all - far)
        if ranks > 1 and not far:
            here["reference"] = _ceil(here["reference"], ranks)  # shards in the model's dtype
    return here


def _gradients(job: Job, counts: Counts) -> tuple[int, int]:
    """Bytes of gradients where a micro-batch's backward pass begins, another having gone before, and where it ends."""
    if job.gpus > 1:
        shards = _ceil(4 * counts.trained, job.gpus)
        return shards, shards
    if job.stage.optimizer_state == "fp32" and job.itemsize < 4 and not job.stage.optimizer_offload:
        return 4 * counts.trained, (4 + job.itemsize) * counts.trained  # added up in float32, made in the model's dtype
    return job.itemsize * counts.trained, job.itemsize * (counts.trained + counts.largest)


def _gathered(job: Job, counts: Counts) -> int:
    """What ranks gather to compute: what is in no block all the time, two blocks, and their gradients before these are
    reduced in float32."""
    if job.gpus == 1:
        return 0
    root = counts.all - counts.blocks
    return job.itemsize * (root + 2 * counts.block) + (job.itemsize + 4) * (root + counts.block)


def _streamed(job: Job, counts: Counts) -> int:
    """Of a reference that is not whole on the device: the block that runs and the one that follows it, and of a sharded
    one also what is in no block."""
    if not job.needs_reference or not isinstance(job.stage, RlConfig):
        return 0
    if job.stage.reference == "host":
        return 2 * job.itemsize * counts.block
    return job.itemsize * (counts.all - counts.blocks + 2 * counts.block) if job.gpus > 1 else 0


def _head_workspace(job: Job, rows: int) -> int:
    logits = rows * job.model.text.vocab_size * job.itemsize
    return min(_HEAD_WORKSPACE, logits) if job.fuses_head else logits


def _head_gradient(job: Job, rows: int) -> int:
    """A fused head's tiles, and the gradient of its weight, which more than one chunk of rows sums in float32 before it
    is rounded, when the tiles are gone."""
    if not job.fuses_head:
        return 0
    text, tiles = job.model.text, _head_workspace(job, rows)
    gradient = job.itemsize * text.vocab_size * text.hidden_size if job.lora.rank == 0 else 0
    if job.itemsize == 4 or rows * text.vocab_size * job.itemsize <= _HEAD_WORKSPACE:
        return tiles + gradient
    return 4 * gradient // job.itemsize + max(tiles, gradient)


def _step_workspace(job: Job, counts: Counts) -> int:
    """An allowance: the largest parameter in float32, and of Muon's largest matrix what five iterations hold."""
    return 4 * counts.largest + 10 * counts.matrix


def _host(job: Job, counts: Counts) -> int:
    """Bytes of host memory: an offloaded optimizer's masters, gradients and moments, and a reference's blocks."""
    held = 0
    if job.stage.optimizer_offload:
        held += 8 * counts.trained + counts.moments
    if job.needs_reference and isinstance(job.stage, RlConfig) and job.stage.reference == "host":
        held += job.itemsize * counts.blocks * job.gpus
    return held


def _pass(job: Job) -> Pass:
    vision = job.model.vision
    shown = math.ceil(job.tokens * job.image_share) if vision is not None else 0
    full = job.lora.rank == 0
    return Pass(
        tokens=job.tokens,
        patches=shown * vision.spatial_merge_size**2 if vision is not None else 0,
        rows=job.tokens - shown,
        itemsize=job.itemsize,
        recomputes=job.stage.activation_checkpointing,
        fused_head=job.fuses_head,
        lora=job.lora,
        trains_tower=full and not job.stage.freeze_vision,
        trains_merger=full and not job.stage.freeze_merger,
    )


def _ceil(numbers: int, parts: int) -> int:
    return -(-numbers // parts)
