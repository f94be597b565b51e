"""Streams: item i is always the same item."""

import pytest

from thyme.data.streams import endless


def test_an_endless_stream_shows_every_item_once_an_epoch() -> None:
    stream = endless(list("abcde"), seed=3)
    first, second = stream(0, 5), stream(5, 5)
    assert sorted(first) == sorted(second) == list("abcde")
    assert first != second
    assert list(stream(3, 4)) == [*first[3:], *second[:2]]
    with pytest.raises(ValueError, match="empty"):
        endless([])
