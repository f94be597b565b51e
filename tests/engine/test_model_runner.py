"""What the device sends back after a step."""

import numpy as np
import pytest

from thyme.engine.in_flight import _unpack


def packed(entropy: list[float]) -> np.ndarray:
    """Rows: token, event and kind, then log-prob, log-prob at temperature 1, entropy, temperature."""
    rows = np.zeros((6, len(entropy)), dtype=np.int32)
    rows[0] = 7
    rows[2:].view(np.float32)[2] = entropy
    return rows


def test_the_entropies_are_looked_at_before_a_token_is_used() -> None:
    """On a GPU they are what tells that weights are NaN: the drawn token is an id like any other."""
    assert _unpack(packed([0.5, 0.0])).token_ids.tolist() == [7, 7]
    with pytest.raises(ValueError, match=r"logits hold NaN or infinity.* in 1 of 3 rows: its weights are broken"):
        _unpack(packed([0.5, float("nan"), 1.0]))
