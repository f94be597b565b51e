"""What sharing prefixes saves: tokens that samples have, that are distinct, and that passes compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

from thyme.train.metrics import Metrics
from thyme.train.packing import Sample, TrainBatch, token_keys
from thyme.train.prefix_sharing import distinct_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """What sharing did to some micro-batches: tokens, and pictures, of each kind."""

    tokens: int = 0
    """Of all samples."""
    unique: int = 0
    """Distinct ones."""
    computed: int = 0
    """That a pass over the micro-batches computes."""
    pictures: int = 0
    """Distinct ones."""
    encoded: int = 0
    """That a pass encodes."""

    @classmethod
    def of(cls, samples: Sequence[Sample], batches: Sequence[TrainBatch], image_token_id: int | None) -> Self:
        """Of the micro-batches that these samples were packed into."""
        samples = [sample for sample in samples if sample.weights.any()]
        return cls(
            tokens=sum(len(sample.token_ids) for sample in samples),
            unique=distinct_tokens(token_keys(samples, image_token_id)),
            computed=sum(len(batch.input_ids) for batch in batches),
            pictures=len({image.digest for sample in samples for image in sample.images}),
            encoded=sum(len(batch.grids) for batch in batches),
        )

    @classmethod
    def metrics(cls, parts: Sequence[Shared]) -> Metrics:
        """Of all ranks and mini-batches together; nothing of nothing."""
        total = {f.name: sum(getattr(part, f.name) for part in parts) for f in fields(cls)}
        if not total["tokens"]:
            return {}
        out: Metrics = {
            "batch/tokens": total["computed"],
            "batch/unique_tokens": total["unique"],
            "batch/computed_per_unique": total["computed"] / total["unique"],
            "batch/shared_frac": 1 - total["computed"] / total["tokens"],
        }
        if total["pictures"]:
            out["batch/encoded_per_picture"] = total["encoded"] / total["pictures"]
        return out
