"""Parts of work by i/n."""

import pytest

from thyme.shard import Shard


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2"])
def test_a_shard_is_i_of_n(text: str) -> None:
    with pytest.raises(ValueError, match="must be i/n"):
        Shard.read(text)
    assert Shard.read("") == Shard() and Shard.read("2/8").name == "00001-of-00008"


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_item_is_of_one_shard(count: int) -> None:
    shards = [Shard(index, count) for index in range(1, count + 1)]
    assert [sum(shard.has(item) for shard in shards) for item in range(20)] == [1] * 20
