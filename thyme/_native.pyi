"""Thyme's C++ core (csrc/). The public faces are thyme.repetition and thyme.kernels.paged_attention."""

from collections.abc import Sequence

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
