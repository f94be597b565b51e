"""Tiny random models with their transformers twins, a vocabulary of tag fragments, and scoring by the training path."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen2_5_VLForConditionalGeneration, Qwen2ForCausalLM

from tests import tiny
from thyme.engine import Engine, EngineConfig
from thyme.model import ImageInputs, Model, ModelConfig, PackedAttention, build, save
from thyme.model.rope import mrope_positions

IMAGE, START, END = 60, 61, 62


@pytest.fixture(scope="session")
def text_model() -> Model:
    return build(ModelConfig(model_type="qwen2", text=tiny.text_config(), eos_token_ids=(2,)), seed=3)


@pytest.fixture(scope="session")
def vision_model() -> Model:
    config = ModelConfig(
        model_type="qwen2_5_vl",
        text=tiny.text_config(mrope_section=(1, 2, 3)),
        vision=tiny.vision_config(),
        image_token_id=IMAGE,
        video_token_id=63,
        vision_start_token_id=START,
        vision_end_token_id=END,
        eos_token_ids=(2,),
    )
    return build(config, seed=4)


@pytest.fixture(scope="session")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Model], PreTrainedModel]:
    """The same weights in transformers."""

    def load(model: Model) -> PreTrainedModel:
        folder: Path = tmp_path_factory.mktemp("twin") / "model"
        save(model, None, folder)
        kind = Qwen2ForCausalLM if model.config.vision is None else Qwen2_5_VLForConditionalGeneration
        return kind.from_pretrained(folder).eval()

    return load


def _image(rows: int, columns: int, seed: int) -> ImageInputs:
    pixels = np.random.default_rng(seed).standard_normal((rows * columns, 1176)).astype(np.float32)
    return ImageInputs(pixels, (1, rows, columns), rows * columns // 4, f"{rows}x{columns}/{seed}")


@pytest.fixture(scope="session")
def make_image() -> Callable[[int, int, int], ImageInputs]:
    """(patch rows, patch columns, seed) -> a picture of noise."""
    return _image


def image_ids(image: ImageInputs) -> list[int]:
    return [START, *[IMAGE] * image.num_tokens, END]


@pytest.fixture(scope="session")
def shown() -> Callable[[ImageInputs], list[int]]:
    """The ids that show a picture, expanded."""
    return image_ids


@pytest.fixture
def draw() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def prompts(draw: np.random.Generator) -> list[list[int]]:
    """Ragged; lengths around the block size of 4 that the tests use."""
    return [draw.integers(3, 60, n).tolist() for n in (1, 2, 3, 4, 5, 8, 9, 16, 17, 30, 41)]


@torch.no_grad()
def _score(model: Model, token_ids: Sequence[int], images: Sequence[ImageInputs] = ()) -> Tensor:
    config = model.config
    positions, _ = mrope_positions(
        token_ids, [image.grid for image in images], image_token_id=config.image_token_id, spatial_merge_size=2
    )
    ids = torch.tensor(token_ids)
    extra: dict[str, Any] = {}
    if images:
        pixels = torch.from_numpy(np.concatenate([image.pixel_values for image in images]))
        extra["image_features"] = model.encode_images(pixels, [image.grid for image in images])
        extra["image_positions"] = (ids == IMAGE).nonzero()[:, 0]
    hidden = model(ids, torch.from_numpy(positions), PackedAttention([len(ids)]), **extra)
    return model.logits(hidden)


@pytest.fixture(scope="session")
def score() -> Callable[..., Tensor]:
    """(model, token_ids, images) -> logits [T, V] of the whole sequence at once, as the trainer computes them."""
    return _score


@pytest.fixture
def make_engine() -> Iterator[Callable[..., Engine]]:
    """An engine with small blocks; when the test is over, nothing may be left in it."""
    engines: list[Engine] = []

    def make(
        model: Model, *, processor: Any = None, repetition: Any = None, phases: Any = None, **config: Any
    ) -> Engine:
        sizes = dict(block_size=4, num_blocks=400, max_sequences=32, quiet=True)
        engine = Engine(
            model, EngineConfig(**{**sizes, **config}), processor=processor, repetition=repetition, phases=phases
        )
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.scheduler.check_integrity()
        stats = engine.stats()
        assert (stats["running"], stats["waiting"], stats["idle"], stats["blocks_used"]) == (0, 0, 0, 0)


@dataclass(frozen=True)
class Fragments:
    """A processor for text models: as many ids as fragments, which tags are made of and fused with in many ways."""

    tokens: tuple[bytes, ...]
    eos_token_ids: tuple[int, ...] = (0,)
    never_sampled_ids: tuple[int, ...] = ()

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    def token_bytes(self, token_id: int) -> bytes:
        return self.tokens[token_id]

    def encode(self, text: str) -> list[int]:
        return [self.tokens.index(bytes([byte])) for byte in text.encode()]


@pytest.fixture(scope="session")
def fragments() -> Fragments:
    text = (
        "|<code>|</code>|<co|de>|</|code>|code>\n|/code>|ode|x</code>y|></code>|<|/|>|c|<answer>|</answer>|</ans|wer>|"
        "<sandbox_output>|<sandbox|_output>|sandbox_|output>\n\n|</sandbox_output>|<code></code>|<code>x</answer></co|"
        "x|y|1| |\n|é|<<code|>>|<answer></answer>|\n</answer>\n"
    )
    return Fragments(tuple(part.encode() for part in text.split("|")))
