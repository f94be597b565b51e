"""Thyme's C++ core (csrc/). The public faces are thyme.repetition and thyme.kernels.paged_attention."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

class RepetitionDetector:
    def __init__(
        self,
        *,
        window: int,
        ratio: float,
        min_tokens: int,
        min_tail_tokens: int,
        copies: Sequence[int],
        structured_copies: int,
        structured_tokens: int,
        max_data_share: float,
        min_numbers: int,
        min_distinct: int,
        near_tokens: int,
        near_copies: int,
        near_exact_copies: int,
        near_max_period: int,
        near_edit_cost: int,
        near_line_cost: int,
        near_row_share: float,
        near_word_share: float,
        near_mark_share: float,
        classes: NDArray[np.uint8],
        capacity: int,
    ) -> None: ...
    def open(self) -> int: ...
    def fork(self, slot: int) -> int: ...
    def close(self, slot: int) -> None: ...
    def restart(self, slot: int) -> None: ...
    def hit(self, slot: int) -> tuple[str, int, int, int, int] | None: ...
    def push(self, slots: NDArray[np.int32], tokens: NDArray[np.int32]) -> NDArray[np.uint8]: ...

class _CollidingRepetitionDetector(RepetitionDetector): ...

PAGED_ATTENTION_LEVELS: tuple[str, ...]

def paged_attention_f32(
    q: NDArray[np.float32],
    k_cache: NDArray[np.float32],
    v_cache: NDArray[np.float32],
    block_tables: NDArray[np.int32],
    context_lens: NDArray[np.int32],
    cu_seqlens_q: NDArray[np.int32],
    scale: float,
    out: NDArray[np.float32],
    num_threads: int,
    level: str = "best",
) -> None:
    """Causal attention over a paged cache; shapes as in thyme.kernels.paged_attention, `out` [T, Nq, D] is filled.

    q, k_cache, v_cache and out may be strided but for the last dimension. ValueError where lengths or tables do not
    fit. The bits depend on the level, one of PAGED_ATTENTION_LEVELS (the best comes last), and on nothing else but the
    query and its context.
    """

def paged_attention_bf16(
    q: NDArray[np.int16],
    k_cache: NDArray[np.int16],
    v_cache: NDArray[np.int16],
    block_tables: NDArray[np.int32],
    context_lens: NDArray[np.int32],
    cu_seqlens_q: NDArray[np.int32],
    scale: float,
    out: NDArray[np.int16],
    num_threads: int,
    level: str = "best",
) -> None:
    """The same in bfloat16, whose bits numpy holds as int16; scores, softmax and sums are float32."""

def softmax_rows_f32(
    z: NDArray[np.float32],
    tau: NDArray[np.float32] | None,
    banned: NDArray[np.int64] | None,
    counted: NDArray[np.bool_] | None,
    stats: NDArray[np.float32],
    p: NDArray[np.float32] | None,
    num_threads: int,
) -> None:
    """The softmax pass of thyme.kernels.logit_rows for z [n, V]: stats [4, n] and, unless None, p [n, V] are filled.

    banned are ids; rows of counted False are not read, their stats are 0 and their p is left as it is. z and p may be
    strided but for the last dimension. ValueError for shapes that do not fit and ids out of range.
    """

def draw_rows_f32(
    z: NDArray[np.float32],
    tau: NDArray[np.float32],
    banned: NDArray[np.int64] | None,
    u: NDArray[np.float64],
    tokens: NDArray[np.int64],
    drawn: NDArray[np.float32],
    num_threads: int,
) -> None:
    """Draws an id of each row of z [n, V] at tau [n] by u [n] in [0, 1). Fills tokens [n], and drawn [3, n]: log-prob
    at tau, 0 at tau 0, that at temperature 1, entropy at temperature 1."""

def softmax_rows_gradient_f32(
    z: NDArray[np.float32],
    targets: NDArray[np.int64],
    tau: NDArray[np.float32] | None,
    banned: NDArray[np.int64] | None,
    stats: NDArray[np.float32],
    g: NDArray[np.float32],
    h: NDArray[np.float32] | None,
    dz: NDArray[np.float32],
    num_threads: int,
) -> None:
    """The gradient pass of thyme.kernels.logit_rows: dz [n, columns >= V] is filled, with 0 from V on; dz may be z.

    Rows whose g and h are 0 are not read. ValueError for shapes that do not fit and ids out of range.
    """

def policy_loss_f32(
    logprob: NDArray[np.float32],
    entropy: NDArray[np.float32],
    advantages: NDArray[np.float32],
    weights: NDArray[np.float32],
    old: NDArray[np.float32] | None,
    ref: NDArray[np.float32] | None,
    rollout: NDArray[np.float32] | None,
    tau: NDArray[np.float32] | None,
    segments: NDArray[np.uint8] | None,
    cu_seqlens: NDArray[np.int64] | None,
    *,
    loss: int,
    kl: int,
    greedy: int,
    kl_times_ratio: bool,
    clip_low: float,
    clip_high: float,
    ratio_cap: float,
    kl_coef: float,
    entropy_coef: float,
    rollout_cap: float,
    grads: NDArray[np.float32],
) -> NDArray[np.float32]:
    """The loss of thyme.kernels.policy_loss over N tokens: grads [2, N] receives d loss / d logprob and d entropy.

    loss, kl and greedy number GrpoLossConfig's kinds in their order; rollout_cap 0: none. Returns the metrics in their
    order, then the loss. ValueError for shapes that do not fit and cu_seqlens that do not rise from 0 to N.
    """

PACKED_PRODUCT_LEVELS_F32: tuple[str, ...]
PACKED_PRODUCT_LEVELS_BF16: tuple[str, ...]

def pack_weight_f32(weight: NDArray[np.float32], packed: NDArray[np.float32], num_threads: int) -> None:
    """Writes weight [outputs, inputs] to packed [inputs * outputs, these filled up to a multiple of 32 with zeros].
    Raises ValueError where they do not fit."""

def pack_weight_bf16(weight: NDArray[np.int16], packed: NDArray[np.int16], num_threads: int) -> None:
    """As pack_weight_f32, of bfloat16 as numpy holds it. `inputs` is even."""

def packed_product_f32(
    x: NDArray[np.float32],
    packed: NDArray[np.float32],
    bias: NDArray[np.float32] | None,
    out: NDArray[np.float32],
    num_threads: int,
    level: str = "best",
) -> None:
    """out = x W^T + bias: x [rows, inputs], W packed, bias [outputs], out [rows, outputs], which is written. A row has
    the same bits in whatever batch and at every level, one of PACKED_PRODUCT_LEVELS_F32 (the best comes last). Raises
    ValueError when shapes do not fit, or for a level that this processor does not run."""

def run_layers_f32(
    x: NDArray[np.float32],
    layers: list[Any],
    last_norm: tuple[NDArray[np.float32], float],
    num_heads: int,
    intermediate: int,
    cos: NDArray[np.float32],
    sin: NDArray[np.float32],
    slots: NDArray[np.int64],
    block_tables: NDArray[np.int32],
    context_lens: NDArray[np.int32],
    cu_seqlens_q: NDArray[np.int32],
    scale: float,
    out: NDArray[np.float32],
    num_threads: int,
) -> None:
    """A decoder's layers for the tokens of a step. x, out [tokens, hidden]; cos, sin [tokens, 1, dim / 2].

    A layer is (input_norm, qkv, out, mlp_norm, gate_up, down, k_cache, v_cache): a norm (weight [hidden], eps), a
    projection (packed weight, bias or None), the caches [blocks, block_size, kv_heads, dim], which are written. Raises
    ValueError, with nothing written, for shapes that do not fit and slots, blocks or lengths out of range."""

def run_layers_bf16(
    x: NDArray[np.int16],
    layers: list[Any],
    last_norm: tuple[NDArray[np.int16], float],
    num_heads: int,
    intermediate: int,
    cos: NDArray[np.float32],
    sin: NDArray[np.float32],
    slots: NDArray[np.int64],
    block_tables: NDArray[np.int32],
    context_lens: NDArray[np.int32],
    cu_seqlens_q: NDArray[np.int32],
    scale: float,
    out: NDArray[np.int16],
    num_threads: int,
) -> None:
    """As run_layers_f32, of bfloat16 as numpy holds it."""

def packed_product_bf16(
    x: NDArray[np.int16],
    packed: NDArray[np.int16],
    bias: NDArray[np.int16] | None,
    out: NDArray[np.int16],
    num_threads: int,
    level: str = "best",
) -> None:
    """As packed_product_f32; one of PACKED_PRODUCT_LEVELS_BF16."""

def rmsnorm_f32(
    x: NDArray[np.float32],
    residual: NDArray[np.float32] | None,
    weight: NDArray[np.float32],
    eps: float,
    out: NDArray[np.float32],
    total: NDArray[np.float32] | None,
    rstd: NDArray[np.float32] | None,
    num_threads: int,
) -> None:
    """Fills out [rows, H]; total [rows, H] with x + residual; rstd [rows]. x is [rows, H], or [T, N, H] in any layout
    whose last dimension is dense. ValueError for shapes that do not fit, as below."""

def rmsnorm_gradient_f32(
    x: NDArray[np.float32],
    rstd: NDArray[np.float32],
    weight: NDArray[np.float32],
    grad: NDArray[np.float32],
    grad_total: NDArray[np.float32] | None,
    grad_x: NDArray[np.float32],
    grad_weight: NDArray[np.float32] | None,
    num_threads: int,
) -> None:
    """Fills grad_x [rows, H] and grad_weight [H]; x is what was normalized, grad_total is added to grad_x."""

def swiglu_f32(gate: NDArray[np.float32], up: NDArray[np.float32], out: NDArray[np.float32], num_threads: int) -> None:
    """Fills out [rows, I]; gate and up [rows, I] may be strided but for the last dimension."""

def swiglu_gradient_f32(
    gate: NDArray[np.float32],
    up: NDArray[np.float32],
    grad: NDArray[np.float32],
    grad_gate: NDArray[np.float32],
    grad_up: NDArray[np.float32],
    num_threads: int,
) -> None:
    """Fills grad_gate and grad_up [rows, I], which may be strided but for the last dimension."""

def turn_heads_f32(
    heads: NDArray[np.float32],
    cos: NDArray[np.float32],
    sin: NDArray[np.float32],
    sign: float,
    out: NDArray[np.float32],
    num_threads: int,
) -> None:
    """Fills out [T, N, D] with heads [T, N, D] turned by cos, sin [T, 1, D / 2]; sign -1 turns back."""

def turn_and_store_f32(
    qkv: NDArray[np.float32],
    cos: NDArray[np.float32],
    sin: NDArray[np.float32],
    slots: NDArray[np.int64],
    k_cache: NDArray[np.float32],
    v_cache: NDArray[np.float32],
    q: NDArray[np.float32],
    num_threads: int,
) -> None:
    """Of qkv [T, Nq + 2 Nkv, D]: turned queries to q [T, Nq, D], turned keys and values to their slots of the caches
    [blocks, block_size, Nkv, D]; -1 is nowhere. ValueError for slots out of range, before anything is written."""

def write_slots(rows: NDArray[np.int16], slots: NDArray[np.int64], table: NDArray[np.int16]) -> None:
    """Row i of rows [n, width] becomes row slots[i] of table [places, width]; a slot of -1 is nowhere.

    Nothing is computed: int16 stands for whatever dtype of 2 bytes or more the rows are viewed from. rows may be
    strided but for the last dimension. ValueError for shapes that do not fit and slots out of range.
    """

# In bfloat16, whose bits numpy holds as int16; computed in float32.
def rmsnorm_bf16(
    x: NDArray[np.int16],
    residual: NDArray[np.int16] | None,
    weight: NDArray[np.int16],
    eps: float,
    out: NDArray[np.int16],
    total: NDArray[np.int16] | None,
    rstd: NDArray[np.float32] | None,
    num_threads: int,
) -> None: ...
def swiglu_bf16(gate: NDArray[np.int16], up: NDArray[np.int16], out: NDArray[np.int16], num_threads: int) -> None: ...
def turn_heads_bf16(
    heads: NDArray[np.int16],
    cos: NDArray[np.float32],
    sin: NDArray[np.float32],
    sign: float,
    out: NDArray[np.int16],
    num_threads: int,
) -> None: ...
def turn_and_store_bf16(
    qkv: NDArray[np.int16],
    cos: NDArray[np.float32],
    sin: NDArray[np.float32],
    slots: NDArray[np.int64],
    k_cache: NDArray[np.int16],
    v_cache: NDArray[np.int16],
    q: NDArray[np.int16],
    num_threads: int,
) -> None: ...
