"""EngineConfig: sizes and switches of the engine. Standard library only."""

from dataclasses import dataclass
from typing import Literal, get_args

from thyme.limits import check_numbers

EngineDtype = Literal["model", "fp8"]
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
    image_cache_bytes: int = 256 << 20
    """Bytes of encoded pictures that are kept when nobody shows them any more, those unused for longest leaving
    first: an equal picture is then not encoded again."""
    encoder_budget: int | None = 4096
    """Image tokens encoded in one step, so that no picture holds up those that decode for long; one picture a step is
    always encoded. None: no limit."""
    pin_bytes: int | None = None
    """Bytes of KV that sequences between their rounds may keep ahead of the prefix cache, blocks that running ones
    share not counted; None: all that nobody needs. What runs or is admitted never waits for them."""
    pin_seconds: float | None = 60.0
    """How long a sequence between its rounds keeps KV ahead of the prefix cache; None: however long its pause is."""
    host_kv_bytes: int = 0
    """Bytes of host memory, pinned on a GPU, for KV that sequences lose which do not run, preempted or between their
    rounds: it is copied back, bit by bit, where that takes less time than to compute it again, and dropped when the
    weights change. 0: none."""
    attention: AttentionName = "auto"
    """What computes attention over the cache. auto: FlashAttention where one is installed that takes the shape (fp16 or
    bf16 on a GPU, not deterministic; 3 or 4 on Hopper, 4 on Blackwell, else 2, whose blocks are multiples of 256), else
    ours: Triton on a GPU, which reads a prompt that several sequences share once for all that decode (not when
    deterministic), C++ on a CPU. reference: plain torch. Which one it is stands in the log."""
    head_dtype: Literal["float32", "model"] = "float32"
    """Of the logits that are drawn from. float32: sums of the LM head's products are not rounded, as in the trainer's
    fused head: rounding them to bfloat16 alone moves a log-prob by up to 0.07 nats. model: that of the weights."""
    deterministic: bool = False
    """Tokens and log-probs of a sequence are bitwise the same however it is batched, chunked, cached or preempted. On a
    CPU this is promised for one machine with one version of torch: another CPU's matrix products round differently. A
    trainer computes the very log-probs there, with one torch thread or two. On a GPU only attention and sampling are
    computed so: attention adds up a context in one order however its tokens come, over tiles of one shape, which leaves
    to the hardware that a tensor core computes each row of a tile alike, wherever it stands in it. That is not proven
    on a card yet, and cuBLAS promises nothing of the kind. See ModelRunner."""
    decode_graphs: bool | None = None
    """Steps that only decode are captured as CUDA graphs, padded to one of a few sizes, and replayed: their launches
    then cost the host next to nothing. None: on a GPU, where attention is ours. On a CPU nothing is captured: the same
    function is called on the same buffers, which is slower than without and for tests."""
    run_ahead: bool | None = None
    """A step is planned and launched while the device is at the one before, whose results are read after that: the
    device then waits for the host no more. Rounds are returned one call of `step` later, and for one that ends other
    than by its length a token is computed in vain (dropped_tokens of `Engine.stats`). What is drawn is the same. Before
    a step with guessed tokens, with a repetition penalty, or without blocks for all that run, the one before is read.
    None: on a GPU. On a CPU a launch computes, so that nothing is gained: for tests."""
    pack_weights: bool | None = None
    """Keep a second copy of each projection's weight, in the order that a CPU's products read: two to four times faster
    in float32, up to twice in bfloat16, for the memory of the weights once more. It is made anew when the weights
    change and given back by sleep. None: on a CPU in float32 or bfloat16, where the copy takes no more than a quarter
    of the free memory, and not under deterministic: the trainer's products are not packed, and its log-probs would
    differ from the engine's in the last bits."""
    weight_dtype: EngineDtype = "model"
    """Of the decoder's projections, in the engine alone. fp8: a copy in e4m3 by blocks of 128 x 128, made at start and
    after each change of the weights, which stay as they are: half the bytes of bfloat16 to read in decoding, and a
    mismatch with the trainer (`thyme rollout` prints it). On a CPU it saves no time: weights are widened in each
    call."""
    kv_dtype: EngineDtype = "model"
    """Of the KV cache. fp8: e4m3 with a power of two for each head of each token, 1 + 1 / D bytes a number: twice the
    tokens of bfloat16 in the same memory. Attention is then ours; on a CPU what a step reads is widened first."""
    speculation: Literal["off", "greedy", "all"] = "off"
    """Which tokens are guessed and verified several in one step (`thyme.engine.speculation`): those at temperature 0,
    as code has it, or all. What is drawn is what is drawn without: the same bits under deterministic, else but for what
    products of other shapes round differently."""
    speculation_batch: int = 8
    """Most sequences that run in a step with guessed tokens: with more of them the device has enough to do."""
    draft_tokens: int = 16
    """Most tokens that are guessed of one sequence in a step."""
    draft_bytes: int = 64 << 20
    """Bytes of what guesses are taken from, those prompts that were not seen for longest leaving first."""
    quiet: bool = False
    """Do not log the size of the cache at start."""

    def __post_init__(self) -> None:
        check_numbers(self, "EngineConfig")
        for name in (
            "block_size",
            "max_sequences",
            "max_batch_tokens",
            "speculation_batch",
            "draft_tokens",
            "draft_bytes",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"EngineConfig.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("num_blocks", "kv_bytes", "prefill_chunk", "max_context", "encoder_budget"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"EngineConfig.{name} must be at least 1 or absent, got {value}")
        if self.pack_weights and self.deterministic:
            raise ValueError(
                "EngineConfig.pack_weights does not go with deterministic, which promises the bits of the trainer's "
                "products: leave one of the two out"
            )
        for name in ("pin_bytes", "pin_seconds", "image_cache_bytes", "host_kv_bytes"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"EngineConfig.{name} must be at least 0 or absent, got {value}")
        if self.num_blocks is not None and self.kv_bytes is not None:
            raise ValueError("EngineConfig: give num_blocks or kv_bytes, not both")
        if self.attention not in get_args(AttentionName):
            raise ValueError(
                f"EngineConfig.attention must be one of {', '.join(get_args(AttentionName))}, got {self.attention!r}"
            )
        for name in ("weight_dtype", "kv_dtype"):
            if getattr(self, name) not in get_args(EngineDtype):
                known = " or ".join(get_args(EngineDtype))
                raise ValueError(f"EngineConfig.{name} must be {known}, got {getattr(self, name)!r}")
        if self.pack_weights and self.weight_dtype == "fp8":
            raise ValueError(
                "EngineConfig.pack_weights does not go with weight_dtype fp8, whose products read another copy: leave "
                "one of the two out"
            )
        if self.head_dtype not in ("float32", "model"):
            raise ValueError(f"EngineConfig.head_dtype must be float32 or model, got {self.head_dtype!r}")
        if self.speculation not in ("off", "greedy", "all"):
            raise ValueError(f"EngineConfig.speculation must be off, greedy or all, got {self.speculation!r}")
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
