"""A step that the device has been given and whose results the host has not read."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thyme.engine.batch import Batch
from thyme.engine.download import Arriving
from thyme.engine.sequence import Sampled
from thyme.engine.step_record import Launched


@dataclass(slots=True)
class InFlight:
    """One step, until it is read."""

    batch: Batch
    arriving: Arriving
    """[7, S] int32 of the samples, see `_unpack`, and if tokens are scored [3, F] float32."""
    first_hidden: Any = None
    """See Sampled."""
    recorded: Launched | None = None
    """For its record, where the engine's steps are recorded."""
    samples: NDArray[np.int64] = field(init=False)
    """Those that count, by index in S; of drafts the first."""

    def __post_init__(self) -> None:
        self.samples = self.batch.drawing

    def drop(self, rows: NDArray[np.int64]) -> int:
        """The rounds of these rows had ended before this step: what it draws for them does not count. Returns how many
        tokens that is."""
        stay = ~np.isin(self.batch.sample_rows[self.samples], rows)
        self.samples = self.samples[stay]
        return int((~stay).sum())

    def result(self) -> Sampled:
        """Waits for the device.

        Raises:
            ValueError: the logits were not finite.
        """
        packed, *scores = self.arriving()
        return _unpack(packed, scores[0] if scores else None, self.first_hidden)


def _unpack(packed: NDArray[np.int32], scores: NDArray[np.float32] | None = None, first_hidden: Any = None) -> Sampled:
    """Rows: token; state, event << 16, kind << 20, phase << 24; then log-prob, log-prob at temperature 1, entropy,
    temperature and kept mass, float32."""
    found = packed[1]
    records = packed[2:].view(np.float32)
    broken = int((~np.isfinite(records[2])).sum())
    if broken:
        raise ValueError(
            f"the model's logits hold NaN or infinity, or nothing finite that may be sampled, in {broken} of "
            f"{len(found)} rows: its weights are broken, load those of an earlier checkpoint"
        )
    return Sampled(
        token_ids=packed[0].astype(np.int64),
        events=(found >> 16 & 0xF).astype(np.uint8),
        kinds=(found >> 20 & 0xF).astype(np.uint8),
        phases=(found >> 24).astype(np.uint8),
        states=(found & 0xFFFF).astype(np.uint16),
        records=records,
        scores=scores,
        first_hidden=first_hidden,
    )
