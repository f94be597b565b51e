"""The toy model and a few pictures, shared by the training tests."""

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from thyme.model import ImageInputs, Model, Processor, build
from thyme.toy.model import tiny_config, tiny_processor


@pytest.fixture(scope="session")
def processor() -> Processor:
    return tiny_processor()


@pytest.fixture
def model(processor: Processor) -> Model:
    return build(tiny_config(), processor, seed=0)


@pytest.fixture(scope="session")
def picture(processor: Processor) -> Callable[[int], ImageInputs]:
    """A preprocessed picture of noise, the same for the same number."""

    def make(number: int) -> ImageInputs:
        pixels = np.random.default_rng(number).integers(0, 256, (84, 84, 3), dtype=np.uint8)
        return processor.preprocess(Image.fromarray(pixels))

    return make
