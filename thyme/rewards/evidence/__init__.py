"""Evidence: does what a tool returned hold what the answer says? By rules and a text reader, without a judge.

The verdicts' rules and their error rates: docs/evidence.md.
"""

from thyme.rewards.evidence.reader import Line, Reader, TextReader, default_reader
from thyme.rewards.evidence.verdicts import (
    Call,
    CallEvidence,
    Evidence,
    Verdict,
    evidence,
    holds_evidence,
    rollout_evidence,
)

__all__ = [
    "Call",
    "CallEvidence",
    "Evidence",
    "Line",
    "Reader",
    "TextReader",
    "Verdict",
    "default_reader",
    "evidence",
    "holds_evidence",
    "rollout_evidence",
]
