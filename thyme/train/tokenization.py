"""From a prompt and a response to a supervised Sample.

The response is encoded piece by piece, cut where the sandbox's text begins and ends, exactly as the rollout loop
appends it. So no token straddles the model's words and the sandbox's, and a token is trained if and only if all its
characters lie in trained spans.
"""

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from thyme.model.image_processor import ImageInputs
from thyme.model.processor import Processor
from thyme.model.rope import mrope_positions
from thyme.train.config import LossRule
from thyme.train.masks import loss_spans
from thyme.train.packing import Sample

_SANDBOX_MARKS = re.compile(r"(<sandbox_output>|</sandbox_output>|<image>)")


def supervised_sample(
    processor: Processor,
    prompt_ids: Sequence[int],
    response: str,
    images: Sequence[ImageInputs],
    *,
    rule: LossRule = "paper",
) -> Sample:
    """A sample whose trained tokens, and the end of the turn, have weight 1.

    Args:
        processor: its tokenizer encodes the response; special-token strings in it stay plain text.
        prompt_ids: up to and including the assistant's header; one image-pad id per image, or already expanded.
        response: the assistant turn, `<image>` where a produced image stands.
        images: all images in order, the prompt's first.
        rule: which rounds are trained (`thyme.train.masks`).

    Raises:
        ValueError: images and placeholders don't match.
    """
    ids = list(prompt_ids)
    trained = [False] * len(ids)
    for piece, is_trained in _pieces(response, rule):
        piece_ids = _encode(processor, piece)
        ids += piece_ids
        trained += [is_trained] * len(piece_ids)
    ids.append(end_of_turn(processor))
    trained.append(True)

    expanded = np.asarray(processor.expand(ids, images), dtype=np.int64)
    # An image pad became several; nothing else moved.
    counts = np.ones(len(ids), dtype=np.int64)
    if len(expanded) != len(ids):
        counts[np.asarray(ids) == processor.image_token_id] = [image.num_tokens for image in images]
    weights = np.repeat(np.asarray(trained, dtype=np.float32), counts)
    return Sample(
        token_ids=expanded,
        positions=positions(processor, expanded, images),
        weights=weights,
        images=tuple(images),
    )


def positions(processor: Processor, token_ids: NDArray[np.int64], images: Sequence[ImageInputs]) -> NDArray[np.int64]:
    """M-RoPE positions [3, T] of a whole sequence, images expanded."""
    config = processor.image_config
    return mrope_positions(
        token_ids,
        [image.grid for image in images],
        image_token_id=processor.image_token_id,
        spatial_merge_size=1 if config is None else config.merge_size,
    )[0]


def end_of_turn(processor: Processor) -> int:
    """The id that ends the assistant's turn: <|im_end|>, or the first end-of-sequence id where there is none."""
    return processor.eos_token_ids[0] if processor.im_end_id is None else processor.im_end_id


def _pieces(response: str, rule: LossRule) -> list[tuple[str, bool]]:
    """The response in pieces that are trained or not as a whole, each sandbox tag and image on its own."""
    pieces: list[tuple[str, bool]] = []
    at = 0
    for start, end in loss_spans(response, rule):
        pieces += [(piece, False) for piece in _SANDBOX_MARKS.split(response[at:start]) if piece]
        pieces.append((response[start:end], True))
        at = end
    return pieces + [(piece, False) for piece in _SANDBOX_MARKS.split(response[at:]) if piece]


def _encode(processor: Processor, piece: str) -> list[int]:
    if piece == "<image>":
        return processor.encode(processor.IMAGE_TEXT)
    if piece in ("<sandbox_output>", "</sandbox_output>"):
        return processor.encode(piece)
    return processor.encode_untrusted(piece)
