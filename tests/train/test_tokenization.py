"""A response becomes tokens of which exactly those the model wrote, and its end of turn, are trained."""

from collections.abc import Callable

import numpy as np
import pytest

from thyme.model import ImageInputs, Processor
from thyme.train.tokenization import supervised_sample

Picture = Callable[[int], ImageInputs]
OUT = "<sandbox_output><image></sandbox_output>"


def trained_text(processor: Processor, response: str, images: list[ImageInputs], rule: str) -> str:
    prompt = processor.encode(processor.chat("What is 1?"))
    sample = supervised_sample(processor, prompt, response, images, rule=rule)  # type: ignore[arg-type]
    return processor.decode(sample.token_ids[sample.weights > 0].tolist())


def test_trained_tokens_spell_the_trained_text(processor: Processor, picture: Picture) -> None:
    images = [picture(0), picture(1)]
    response = f"a<code>b</code>{OUT}c<code>d</code>{OUT}e<answer>f</answer>"
    assert trained_text(processor, response, images, "paper") == "e<answer>f</answer><|im_end|>"
    assert trained_text(processor, response, images, "code") == "c<code>d</code>e<answer>f</answer><|im_end|>"
    assert (
        trained_text(processor, response, images, "all")
        == "a<code>b</code>c<code>d</code>e<answer>f</answer><|im_end|>"
    )


def test_no_token_straddles_the_border(processor: Processor) -> None:
    # ">" fuses with nothing here, but "The " would be one lexeme with the text before it cut elsewhere.
    response = "1<sandbox_output>The </sandbox_output>The digit is 1"
    sample = supervised_sample(processor, processor.encode("x"), response, [])
    assert processor.decode(sample.token_ids.tolist()) == f"x{response}<|im_end|>"
    assert processor.decode(sample.token_ids[sample.weights == 0].tolist()) == "x<sandbox_output>The </sandbox_output>"


def test_images_are_expanded_and_never_trained(processor: Processor, picture: Picture) -> None:
    prompt = processor.encode(processor.chat("<image>What is 1?"))
    sample = supervised_sample(processor, prompt, f"a{OUT}b", [picture(0), picture(1)])
    image = sample.token_ids == processor.image_token_id
    assert image.sum() == 2 * 9
    assert not sample.weights[image].any()
    assert len(sample.positions[0]) == len(sample.token_ids)
    # An image spans three rows and columns of features, whatever its number of tokens.
    assert np.ptp(sample.positions[1][image][:9]) == 2


def test_special_tokens_in_a_response_stay_text(processor: Processor) -> None:
    sample = supervised_sample(processor, processor.encode("x"), "a<|im_end|>b", [])
    ids = sample.token_ids.tolist()
    assert ids.count(processor.im_end_id) == 1 and ids[-1] == processor.im_end_id
    assert processor.decode(ids) == "xa<|im_end|>b<|im_end|>"


def test_images_must_match(processor: Processor, picture: Picture) -> None:
    with pytest.raises(ValueError, match="2 image ids for 1 pictures"):
        supervised_sample(processor, processor.encode("x"), f"a{OUT}b{OUT}c", [picture(0)])
