"""The work that every engine of the race is given, as ids and lengths. Needs numpy alone: peers have other packages."""

from dataclasses import dataclass

import numpy as np

VOCABULARY = 4096
SHAPE = dict(
    vocab_size=VOCABULARY,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
    initializer_range=0.1,
)
"""A Qwen2 of 25.7 M parameters."""


@dataclass(frozen=True)
class Session:
    """A prompt, then turns; what is appended before a turn is empty for the first."""

    prompt: list[int]
    lengths: tuple[int, ...]
    """Tokens sampled in each turn."""
    appended: tuple[list[int], ...] = ()
    """Given tokens after each turn but the last."""


@dataclass(frozen=True)
class Workload:
    sessions: tuple[Session, ...]
    temperature: float = 0.0
    n: int = 1
    """Samples of each session's first turn."""
    tool_ms: float = 0.0
    """How long a session is away between two turns."""
    adaptive: bool = False
    """Thyme watches tags and their temperature while it decodes; peers have no such thing."""

    @property
    def num_tokens(self) -> int:
        """That are sampled."""
        return self.n * sum(sum(session.lengths) for session in self.sessions)


def plain() -> Workload:
    """64 ragged requests, greedy."""
    draw = np.random.default_rng(0)
    prompts = [draw.integers(0, VOCABULARY, int(n)).tolist() for n in draw.integers(16, 257, 64)]
    lengths = draw.integers(16, 129, 64).tolist()
    return Workload(tuple(Session(p, (n,)) for p, n in zip(prompts, lengths, strict=True)))


def groups() -> Workload:
    """8 prompts, 8 samples of each at temperature 1."""
    draw = np.random.default_rng(1)
    prompts = [draw.integers(0, VOCABULARY, int(n)).tolist() for n in draw.integers(128, 257, 8)]
    return Workload(tuple(Session(p, (96,)) for p in prompts), temperature=1.0, n=8)


def _sessions(seed: int, ids: int) -> tuple[Session, ...]:
    draw = np.random.default_rng(seed)
    return tuple(
        Session(
            draw.integers(0, ids, int(draw.integers(32, 129))).tolist(),
            tuple(draw.integers(16, 65, 4).tolist()),
            tuple(draw.integers(0, ids, int(n)).tolist() for n in draw.integers(16, 65, 3)),
        )
        for _ in range(32)
    )


def turns() -> Workload:
    """32 sessions of 4 turns, greedy; a session's next turn begins when its last one ends."""
    return Workload(_sessions(2, VOCABULARY))


def loop() -> Workload:
    """The same, sampled at temperature 1, with a tool of 5 ms between turns and adaptive temperature watched."""
    return Workload(_sessions(3, 90), temperature=1.0, tool_ms=5.0, adaptive=True)


WORKLOADS = {"plain": plain, "groups": groups, "turns": turns, "loop": loop}
