"""What every test shares: the interpreter switch, seeds, threads, the one table of tolerances, the tiny family."""

import os
import signal

import torch

if not torch.cuda.is_available():
    # Triton decides at import between compiling and interpreting, so this must precede every kernel import.
    os.environ["TRITON_INTERPRET"] = "1"
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # So a shell starts what it runs in the background; it would pass on to every process that a test interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from PIL import Image
from transformers import PreTrainedTokenizerFast

from tests import tiny
from thyme.model import ImageInputs, Model, Processor, build
from thyme.sandbox import Sandbox, SandboxConfig
from thyme.toy.model import tiny_config, tiny_processor

# Absolute and relative tolerance by quantity and dtype, against a float64 reference on the same inputs.
# A kernel may also use `err <= 1.5 * err(plain fp32 torch) + eps` where that is tighter.
TOLERANCES: dict[tuple[str, torch.dtype], tuple[float, float]] = {
    ("logprob", torch.float32): (2e-5, 0.0),
    ("logprob", torch.float16): (5e-5, 0.0),
    ("logprob", torch.bfloat16): (5e-5, 0.0),
    ("entropy", torch.float32): (1e-4, 0.0),
    ("entropy", torch.float16): (1e-4, 0.0),
    ("entropy", torch.bfloat16): (1e-4, 0.0),
    ("loss", torch.float32): (2e-5, 1e-5),
    ("grad", torch.float32): (1e-6, 1e-5),
    ("grad", torch.float16): (1e-4, 2e-3),
    ("grad", torch.bfloat16): (1e-3, 8e-3),
    ("attention", torch.float32): (2e-6, 1e-5),
    ("attention", torch.float16): (1e-3, 2e-3),
    ("attention", torch.bfloat16): (8e-3, 1.6e-2),
    ("model_logits", torch.float32): (1e-4, 1e-4),
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(int(os.environ.get("THYME_TEST_THREADS", "1")))


@pytest.fixture(scope="session")
def tolerances() -> dict[tuple[str, torch.dtype], tuple[float, float]]:
    return TOLERANCES


@pytest.fixture(scope="session")
def processor() -> Processor:
    """The toy's."""
    return tiny_processor()


@pytest.fixture
def model(processor: Processor) -> Model:
    """The toy with random weights."""
    return build(tiny_config(), processor, seed=0)


@pytest.fixture(scope="session")
def picture(processor: Processor) -> Callable[[int], ImageInputs]:
    """A preprocessed picture of noise, the same for the same number."""

    def make(number: int) -> ImageInputs:
        pixels = np.random.default_rng(number).integers(0, 256, (84, 84, 3), dtype=np.uint8)
        return processor.preprocess(Image.fromarray(pixels))

    return make


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    """Two workers and the limits of every day."""
    with Sandbox(SandboxConfig(workers=2)) as sandbox:
        yield sandbox


@pytest.fixture(scope="session")
def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """Qwen's kind of tokenizer (see `tiny.byte_level_tokenizer`)."""
    return tiny.byte_level_tokenizer()
