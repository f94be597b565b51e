"""The text of one round while it is decoded, cut into pieces to show."""

from collections.abc import Callable, Sequence


class TextStream:
    """Shows a round's text up to a code block or an answer, never half a tag and never half a character.

    Args:
        decode: token ids to text; an incomplete character becomes U+FFFD.
        num_tokens: tokens of the sequence before the round; they are not shown.
    """

    _TAGS = ("<code>", "<answer>")

    def __init__(self, decode: Callable[[Sequence[int]], str], num_tokens: int) -> None:
        self._decode = decode
        self._num_tokens = num_tokens
        self._text = ""
        self._num_shown = 0

    def push(self, token_ids: Sequence[int]) -> str:
        """Takes all tokens of the sequence so far; returns what may be shown now and was not yet."""
        piece = self._decode(token_ids[self._num_tokens :])
        if piece.endswith("\ufffd"):  # half a character: wait for the rest of it
            return ""
        self._num_tokens = len(token_ids)
        return self._feed(piece)

    def end(self, text: str, *, with_unclosed: bool) -> str:
        """The rest to show of a round that ended with `text`; also the beginning of an unclosed block if asked for."""
        shown = self._feed(text[len(self._text) :])
        if with_unclosed:
            shown += self._text[self._num_shown :]
            self._num_shown = len(self._text)
        return shown

    def _feed(self, piece: str) -> str:
        self._text += piece
        starts = [at for tag in self._TAGS if (at := self._text.find(tag)) >= 0]
        end = min(starts) if starts else len(self._text) - self._partial_tag()
        shown, self._num_shown = self._text[self._num_shown : end], max(self._num_shown, end)
        return shown

    def _partial_tag(self) -> int:
        """Characters at the end of the text that may be the beginning of a tag."""
        return max(
            (n for tag in self._TAGS for n in range(1, len(tag)) if self._text.endswith(tag[:n])),
            default=0,
        )
