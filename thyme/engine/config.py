"""EngineConfig: sizes and switches of the engine. Standard library only."""

from dataclasses import dataclass
from typing import Literal, get_args

AttentionName = Literal["auto", "triton", "flash_attn", "reference"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How much the engine holds, how much it does in one step, and what it guarantees."""

    block_size: int = 16
    """Tokens in one block of the KV cache."""
    num_blocks: int | None = None
    """Blocks of the KV cache; None: from kv_bytes, or else from free memory."""
    kv_bytes: int | None = None
    """Bytes of the KV cache, over all layers; None: from free memory."""
    memory_fraction: float = 0.5
    """Share of the free memory the KV cache may take where neither num_blocks nor kv_bytes says its size. It never
    takes more than max_sequences sequences of max_context tokens need."""
    max_sequences: int = 128
    """Sequences decoded at once; more may wait, or be held."""
    max_batch_tokens: int = 2048
    """Tokens in one step, decoded and prefilled together."""
    prefill_chunk: int | None = None
    """Most tokens of one sequence prefilled in one step; None: as many as the step has room for."""
    max_context: int | None = None
    """Tokens of one sequence, prompt included; None: what the model is meant for, or the cache if that is less."""
    prefix_cache: bool = True
    """Keep full blocks of finished sequences, and find them again when a prompt begins alike."""
    attention: AttentionName = "auto"
    """What computes attention over the cache. auto: flash-attn where it is installed and takes the shape (fp16 or bf16
    on a GPU, block_size a multiple of 256, not deterministic), else ours: Triton on a GPU, which reads a prompt that
    several sequences share once for all that decode (not when deterministic), C++ on a CPU. reference: plain torch."""
    deterministic: bool = False
    """Tokens and log-probs of a sequence are bitwise the same however it is batched, chunked, cached or preempted. On a
    CPU this is promised for one machine with one version of torch: another CPU's matrix products round differently. On
    a GPU it does not hold yet beyond 512 tokens of context between decoding and chunks. See ModelRunner."""
    pack_weights: bool | None = None
    """Keep a second copy of each projection's weight, in the order that a CPU's products read: two to four times faster
    in float32, up to twice in bfloat16, for the memory of the weights once more. It is made anew when the weights
    change and given back by sleep. None: on a CPU in float32 or bfloat16, where the copy takes no more than a quarter
    of the free memory, and not under deterministic: the trainer's products are not packed, and its log-probs would
    differ from the engine's in the last bits."""
    quiet: bool = False
    """Do not log the size of the cache at start."""

    def __post_init__(self) -> None:
        for name in ("block_size", "max_sequences", "max_batch_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"EngineConfig.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("num_blocks", "kv_bytes", "prefill_chunk", "max_context"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"EngineConfig.{name} must be at least 1 or absent, got {value}")
        if self.pack_weights and self.deterministic:
            raise ValueError(
                "EngineConfig.pack_weights does not go with deterministic, which promises the bits of the trainer's "
                "products: leave one of the two out"
            )
        if self.num_blocks is not None and self.kv_bytes is not None:
            raise ValueError("EngineConfig: give num_blocks or kv_bytes, not both")
        if self.attention not in get_args(AttentionName):
            raise ValueError(
                f"EngineConfig.attention must be one of {', '.join(get_args(AttentionName))}, got {self.attention!r}"
            )
        if not 0.0 < self.memory_fraction <= 1.0:
            raise ValueError(f"EngineConfig.memory_fraction must lie in (0, 1], got {self.memory_fraction}")
        if self.max_batch_tokens < self.max_sequences:
            raise ValueError(
                f"EngineConfig.max_batch_tokens ({self.max_batch_tokens}) must be at least max_sequences "
                f"({self.max_sequences}): each decoding sequence takes one token of a step"
            )
        if self.prefill_chunk is not None and self.prefill_chunk > self.max_batch_tokens:
            raise ValueError(
                f"EngineConfig.prefill_chunk ({self.prefill_chunk}) cannot be reached in a step of max_batch_tokens "
                f"({self.max_batch_tokens}): lower prefill_chunk or raise max_batch_tokens"
            )
        if self.num_blocks is not None and self.max_context is not None:
            check_context(self.max_context, self.num_blocks, self.block_size)


def check_context(max_context: int, num_blocks: int, block_size: int) -> None:
    """A sequence of `max_context` tokens must fit into the cache.

    Raises:
        ValueError: it does not.
    """
    if max_context > num_blocks * block_size:
        raise ValueError(
            f"EngineConfig.max_context ({max_context}) does not fit into {num_blocks} blocks of {block_size} "
            f"tokens ({num_blocks * block_size}): lower max_context or raise num_blocks or kv_bytes"
        )
