"""The doctor's self-test of parity: a small random model with a picture, by the engine and by the trainer.

The engine's paged cache, chunks and sampler on one side, one full forward pass on the other: the same tokens, the same
log-probs.
"""

from typing import Any

from thyme.verbs.doctor_check import Check

_TOKENS = 24
_TOLERANCE = {"cpu": 1e-3, "cuda": 2e-2}
"""Nats in float32; a GPU's matrix products may round their inputs to TF32."""
_REMEDY = (
    "pip install -e . anew; if it stays, report it with what `thyme doctor` prints: RL would train on wrong ratios"
)


def parity_checks() -> list[Check]:
    """Greedy tokens, and log-probs of sampled ones."""
    try:
        return _checks()
    except Exception as failure:  # whatever it is, it is what was to be found out
        found = f"{type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''}"
        return [_check("engine and trainer", False, found)]


def _checks() -> list[Check]:
    import numpy as np
    import torch
    from PIL import Image

    from thyme.engine import Engine, EngineConfig, Prompt, SamplingParams
    from thyme.model import build
    from thyme.model.attention import PackedAttention
    from thyme.model.rope import mrope_positions
    from thyme.toy.model import tiny_config, tiny_processor

    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor = tiny_processor()
    model = build(tiny_config(), processor, seed=0, device=device)
    assert model.config.vision is not None
    noise = np.random.default_rng(0).integers(0, 256, (84, 112, 3), dtype=np.uint8)
    image = processor.preprocess(Image.fromarray(noise))
    prompts = [
        Prompt(processor.encode(f"{processor.IMAGE_TEXT}What digit is on the red sign?"), (image,)),
        Prompt(processor.encode("What digit?")),
    ]
    # Small blocks and chunks: a prompt of this size takes several of both.
    engine = Engine(model, EngineConfig(num_blocks=64, block_size=4, prefill_chunk=5, max_sequences=4, quiet=True))
    fixed: dict[str, Any] = {
        "max_tokens": _TOKENS,
        "banned_ids": (),
        "ignore_eos": True,
        "repetition": None,
        "stop_at_tags": False,
    }
    gap = worst = 0.0
    for temperature in (0.0, 1.0):
        params = SamplingParams(temperature=temperature, adaptive=False, seed=1, **fixed)
        for completion, prompt in zip(engine.generate(prompts, params), prompts, strict=True):
            ids = [*completion.sequence.prompt.token_ids.tolist(), *completion.token_ids]
            positions, _ = mrope_positions(
                ids,
                [picture.grid for picture in prompt.images],
                image_token_id=model.config.image_token_id,
                spatial_merge_size=model.config.vision.spatial_merge_size,
            )
            tokens = torch.tensor(ids, device=device)
            shown = torch.isin(tokens, torch.tensor([model.config.image_token_id], device=device)).nonzero().flatten()
            features = None
            if prompt.images:
                features = model.encode_images(torch.as_tensor(image.pixel_values).to(device), [image.grid])
            with torch.no_grad():
                hidden = model(
                    tokens,
                    torch.from_numpy(positions).to(device),
                    PackedAttention([len(ids)]),
                    image_features=features,
                    image_positions=shown if prompt.images else None,
                )
                logprobs = model.logits(hidden[-_TOKENS - 1 : -1]).float().log_softmax(-1)
            drawn = torch.tensor(completion.token_ids, device=device)[:, None]
            own = logprobs.gather(1, drawn)[:, 0]
            recorded = torch.from_numpy(completion.logprobs_raw).to(device)
            worst = max(worst, float((own - recorded).abs().max()))
            if temperature == 0.0:
                gap = max(gap, float((logprobs.max(-1).values - own).max()))
    limit = _TOLERANCE[device]
    return [
        _check("greedy tokens", gap <= limit, f"the engine's token is the trainer's best, to {gap:.1e} nats"),
        _check("log-probs", worst <= limit, f"engine and trainer differ by {worst:.1e} nats"),
    ]


def _check(name: str, ok: bool, found: str) -> Check:
    return Check(part="parity", name=name, ok=ok, needed=True, found=found, remedy="" if ok else _REMEDY)
