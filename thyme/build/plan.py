"""Which raw rows are built, in which scenario: a list of items that any process makes alike from files and recipe."""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from thyme.build.config import SCENARIOS, BuildConfig, Scenario
from thyme.build.raw import RawRows
from thyme.build.scenarios import choose
from thyme.shard import Shard

_NONE = 255
_CHANGES_NOTHING = {"concurrency", "ray_workers", "ray_address", "ray_batch"}
"""Settings that say how rows are built and not what comes out."""


class Item(NamedTuple):
    """One piece of work."""

    number: int
    """Its place in the plan."""
    row: int
    """The raw row's index."""
    scenario: Scenario | None
    """None where the row is fit for none of them; and for RL."""


class Plan:
    """The items of a build; memory is 9 bytes an item.

    Args:
        raw: the rows.
        config: sample, shares, seed.
    """

    def __init__(self, raw: RawRows, config: BuildConfig) -> None:
        self._config = config
        count = min(config.count or len(raw), len(raw))
        chosen = np.random.default_rng(config.seed).permutation(len(raw))[:count]
        self._rows = array("q", sorted(int(row) for row in chosen))
        self._scenarios = array("B")
        if config.rows == "sft":
            for row in self._rows:
                scenario = choose(raw.traits(row), config.shares, config.seed, raw.name(row))
                self._scenarios.append(_NONE if scenario is None else SCENARIOS.index(scenario))
        names = hashlib.sha256(repr(raw.files).encode())
        for row in self._rows:
            names.update(raw.name(row).encode() + b"\n")
        self._digest = names.hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Item:
        at = self._scenarios[number] if self._scenarios else _NONE
        return Item(number, self._rows[number], None if at == _NONE else SCENARIOS[at])

    def of(self, shard: Shard) -> range:
        """The numbers of a shard's items."""
        return range(shard.index - 1, len(self), shard.count)

    def identity(self, **models: Any) -> dict[str, Any]:
        """What the outcomes depend on, JSON-able: the rows by name, the recipe, and the models."""
        settings = {k: v for k, v in asdict(self._config).items() if k not in _CHANGES_NOTHING}
        return {"items": self._digest, "build": settings, **models}
