"""A toy that knows one demonstration by heart, and a server of it that all tests of a file share."""

from collections.abc import Iterator

import pytest
import torch

from tests.serve.served import Served
from thyme.data.rows import Demonstration
from thyme.model import Model, Processor, build
from thyme.model.attention import PackedAttention
from thyme.rollout.prompts import build_prompt
from thyme.sandbox import Sandbox
from thyme.toy.model import tiny_config, tiny_processor
from thyme.toy.scenarios import demonstrations
from thyme.train.packing import pack
from thyme.train.tokenization import supervised_sample


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="session")
def row() -> Demonstration:
    """A crop of a crop: the second code block needs what the first one left."""
    return demonstrations(0, 1, {"zoom": 1.0})[0]


@pytest.fixture(scope="session")
def taught(row: Demonstration) -> Model:
    """Answers the demonstration's question as it was shown."""
    processor = tiny_processor()
    model = build(tiny_config(), processor=processor, seed=0)
    prompt = build_prompt(row.question, "short", processor).token_ids
    images = [processor.preprocess(image) for image in row.images]
    sample = supervised_sample(processor, prompt, row.response, images, rule="all")
    [batch] = pack([sample], image_token_id=tiny_config().image_token_id)
    assert batch.pixel_values is not None
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(24):
        hidden = model(
            batch.input_ids,
            batch.positions,
            PackedAttention(batch.lengths),
            image_features=model.encode_images(batch.pixel_values, batch.grids),
            image_positions=batch.image_positions,
        )
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model.logits(hidden[batch.rows]), batch.targets).backward()
        optimizer.step()
    return model


@pytest.fixture(scope="session")
def toy(processor: Processor) -> Model:
    """Random weights: it goes on until its tokens are used up."""
    return build(tiny_config(), processor, seed=0)


@pytest.fixture(scope="module")
def served(toy: Model) -> Iterator[Served]:
    """A server of the untrained toy, without tools."""
    with Served(toy) as opened:
        yield opened


@pytest.fixture(scope="module")
def tooled(taught: Model, sandbox: Sandbox) -> Iterator[Served]:
    """A server of the taught toy, with tools."""
    with Served(taught, sandbox) as opened:
        yield opened
