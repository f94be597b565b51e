"""A toy that knows some demonstrations by heart."""

from collections.abc import Sequence

import torch

from thyme.data.rows import Demonstration
from thyme.model import Model, build
from thyme.model.attention import PackedAttention
from thyme.rollout.prompts import build_prompt
from thyme.toy.model import tiny_config, tiny_processor
from thyme.train.packing import pack
from thyme.train.tokenization import supervised_sample


def by_heart(rows: Sequence[Demonstration], *, steps: int = 34, learning_rate: float = 2e-3) -> Model:
    """Knows the rows by heart (as called without more about 97 % sure of each token, so that sampling still strays)."""
    processor = tiny_processor()
    model = build(tiny_config(), processor=processor, seed=0)
    samples = []
    for row in rows:
        prompt = build_prompt(row.question, "short", processor).token_ids
        images = [processor.preprocess(image) for image in row.images]
        samples.append(supervised_sample(processor, prompt, row.response, images, rule="all"))
    [batch] = pack(samples, image_token_id=tiny_config().image_token_id)
    assert batch.pixel_values is not None
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    for _ in range(steps):
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
