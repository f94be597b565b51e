"""The token record of one rollout while it grows: one entry per token and column, never decoded and encoded again."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from thyme.engine.tags import TokenKind

if TYPE_CHECKING:
    from thyme.engine import Completion

COLUMNS: dict[str, type[np.generic]] = {
    "token_ids": np.int64,
    "kinds": np.uint8,
    "phases": np.uint8,
    "rounds": np.int16,
    "sampled": np.bool_,
    "temperatures": np.float32,
    "logprobs": np.float32,
    "logprobs_raw": np.float32,
    "entropies": np.float32,
    "weight_versions": np.int32,
}
LATER_COLUMNS = {"phases"}
"""Those that older records lack."""


class Trajectory:
    """Columns of `COLUMNS`, appended to in parts.

    A token nobody drew (prompt, sandbox output) has sampled False, weight version -1, and 0 for everything measured.
    """

    def __init__(self, image_token_id: int | None) -> None:
        self._image_token_id = image_token_id
        self._parts: dict[str, list[NDArray[Any]]] = {name: [] for name in COLUMNS}

    def add_given(self, token_ids: Sequence[int], kind: TokenKind, *, round_index: int) -> None:
        """Appends tokens nobody drew: image ids, which are already expanded, as IMAGE, the others as `kind`."""
        ids = np.asarray(token_ids, dtype=np.int64)
        kinds = np.full(len(ids), kind, dtype=np.uint8)
        if self._image_token_id is not None:
            kinds[ids == self._image_token_id] = TokenKind.IMAGE
        self._add(len(ids), token_ids=ids, kinds=kinds, rounds=round_index, weight_versions=-1)

    def add_round(self, completion: "Completion", *, round_index: int) -> None:
        """Appends the tokens of one decoded round with what the sampler recorded of each."""
        self._add(
            len(completion.token_ids),
            token_ids=completion.token_ids,
            kinds=completion.kinds,
            phases=completion.phases,
            rounds=round_index,
            sampled=True,
            temperatures=completion.temperatures,
            logprobs=completion.logprobs,
            logprobs_raw=completion.logprobs_raw,
            entropies=completion.entropies,
            weight_versions=completion.weight_version,
        )

    def add_columns(self, columns: Mapping[str, NDArray[Any]]) -> None:
        """Appends what `columns` of another one gave."""
        for name in COLUMNS:
            self._parts[name].append(columns[name])

    def columns(self) -> dict[str, NDArray[Any]]:
        """The finished arrays, one entry per token."""
        return {name: np.concatenate(parts) for name, parts in self._parts.items()}

    def _add(self, count: int, **values: Any) -> None:
        for name, dtype in COLUMNS.items():
            column = np.empty(count, dtype=dtype)
            column[:] = values.get(name, 0)
            self._parts[name].append(column)
