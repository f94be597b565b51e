"""The rollout engine: paged KV cache, continuous batching, the tag automaton. Names are imported on first use."""

from typing import TYPE_CHECKING

from thyme._lazy import facade

if TYPE_CHECKING:
    from thyme.engine.config import EngineConfig as EngineConfig
    from thyme.engine.engine import Delta as Delta
    from thyme.engine.engine import Engine as Engine
    from thyme.engine.params import Prompt as Prompt
    from thyme.engine.params import SamplingParams as SamplingParams
    from thyme.engine.phases import Phases as Phases
    from thyme.engine.phases import PhaseSampling as PhaseSampling
    from thyme.engine.phases import TagPair as TagPair
    from thyme.engine.sequence import Completion as Completion
    from thyme.engine.sequence import FinishReason as FinishReason
    from thyme.engine.sequence import Sequence as Sequence
    from thyme.engine.sequence import SequenceStatus as SequenceStatus
    from thyme.engine.tags import TagAutomaton as TagAutomaton
    from thyme.engine.tags import TokenKind as TokenKind
else:
    __all__, __getattr__ = facade(
        __name__,
        {
            "config": ["EngineConfig"],
            "engine": ["Delta", "Engine"],
            "params": ["Prompt", "SamplingParams"],
            "phases": ["PhaseSampling", "Phases", "TagPair"],
            "sequence": ["Completion", "FinishReason", "Sequence", "SequenceStatus"],
            "tags": ["TagAutomaton", "TokenKind"],
        },
    )
