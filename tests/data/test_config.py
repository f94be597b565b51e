"""The [data] table: what it takes, and what it refuses in words."""

import tomllib
from typing import Any

import pytest

from thyme.config import from_dict, to_toml
from thyme.data.config import DataConfig


def test_a_recipe_says_it_and_reads_back() -> None:
    raw = {"train": ["a.parquet", "more"], "heldout": ["b.jsonl"], "format": "verl", "images": "pictures"}
    config = from_dict(DataConfig, raw)
    assert config.train == ("a.parquet", "more") and config.images == "pictures"
    assert from_dict(DataConfig, tomllib.loads(to_toml(config))) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": "parquet"}, "format: 'parquet' must be one of 'auto', 'thyme', 'messages'"),
        ({"train": ("a", "")}, "train: an empty path"),
        ({"train": ("a", "b"), "heldout": ("b",)}, "heldout: 'b' is in train too"),
        ({"workers": -1}, "workers: -1 must be at least 0"),
        ({"ahead_steps": -1}, "ahead_steps: -1 must be at least 0"),
        ({"ahead_mib": 0}, "ahead_mib: 0 must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**values)
