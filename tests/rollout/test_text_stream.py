"""A round's text in pieces: nothing of a tag, nothing of a character before it is whole, and nothing lost."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from thyme.rollout.text_stream import TextStream

PIECES = ["a", "<", "<co", "de>", "<answer", ">", "x < y", "</code>", "\n", "é", "图"]
PROMPT = b"what?"


def decode(ids: Sequence[int]) -> str:
    return bytes(ids).decode(errors="replace")


@given(st.lists(st.sampled_from(PIECES), max_size=12), st.lists(st.integers(1, 5), min_size=60, max_size=60))
def test_streamed_pieces_join_to_the_text_before_the_first_tag(pieces: list[str], steps: list[int]) -> None:
    """One token is one byte; each step brings a few."""
    text = "".join(pieces)
    ids = PROMPT + text.encode()
    stream = TextStream(decode, len(PROMPT))
    shown, end = "", len(PROMPT)
    for step in steps:
        end = min(end + step, len(ids))
        shown += stream.push(ids[:end])
        assert "\ufffd" not in shown
    starts = [at for tag in ("<code>", "<answer>") if (at := text.find(tag)) >= 0]
    assert "<code>" not in shown and "<answer>" not in shown
    assert text.startswith(shown) and len(shown) <= min(starts, default=len(text))
    assert shown + stream.end(text, with_unclosed=True) == text


def test_a_round_that_closed_a_block_or_answered_shows_no_more_than_what_stands_before_it() -> None:
    stream = TextStream(decode, 0)
    assert stream.push(b"see <co") == "see "
    assert stream.end("see <code>c</code>", with_unclosed=False) == ""
