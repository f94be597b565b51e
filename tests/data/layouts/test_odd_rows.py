"""Whatever a row holds where a layout has something else, reading it ends in a refusal and in nothing worse."""

import contextlib
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from thyme.data.layouts.known import LAYOUTS, PICTURE_COLUMNS, read_row
from thyme.data.problems import kind_of, text_problems
from thyme.data.refusal import BadRow
from thyme.data.resolve import resolve

_WORDS = """<image> user assistant gpt system image_url text x.png QUJD [1] { 7 \ud83d"""
_KEYS = "role content from value type text image_url url bytes path ground_truth question index split image"
_COLUMNS = """messages images image question response solution prompt reward_model extra_info data_source conversations
id system"""

WORDS = st.sampled_from(["", *_WORDS.split()])
ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 300) | st.floats() | WORDS | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_KEYS.split()), inner, max_size=4),
    max_leaves=8,
)
TURN = st.dictionaries(st.sampled_from(["role", "content", "from", "value"]), WORDS | ANY, max_size=4)
ROW = st.dictionaries(st.sampled_from(_COLUMNS.split()), st.lists(TURN, max_size=3) | ANY, max_size=7)


@settings(max_examples=200, deadline=None)
@given(value=ROW, layout=st.sampled_from(["auto", *LAYOUTS]))
def test_any_row_is_read_or_refused(value: dict[str, Any], layout: Any) -> None:
    for without in ((), PICTURE_COLUMNS):
        with contextlib.suppress(BadRow):
            row = read_row(value, layout, without=without)
            kind = kind_of(row)
            if not list(text_problems(row, kind)) and not without:
                resolve(row, kind, name="a", source="b", folder=Path("/nowhere"))
