"""The model against transformers in float32: logits and gradients, loaded from the folders transformers writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from thyme.model import Model, load_model
from thyme.model.weights import hub_tensors

FAMILIES = ("qwen2", "qwen3", "llama", "llama-biased", "llama3")

# Window of 56 px = 2x2 merged patches: grids that fill windows, that leave edges on one or both sides, and one that
# is a single window.
GRIDS = [(1, 8, 8), (1, 6, 10), (1, 10, 6), (1, 2, 2), (1, 4, 4), (1, 2, 14)]

BATCHES: dict[str, list[list[Any]]] = {
    "text": [[9], [5], [9]],
    "one image": [[3, (1, 6, 10), 5]],
    "image first and last": [[(1, 6, 4)], [(1, 4, 4), 2, (1, 4, 4)]],
    "every grid": [[2, grid, 3] for grid in GRIDS],
    "several images in one sequence": [[1, (1, 4, 4), (1, 6, 10), 4, (1, 4, 4), 7], [12], [2, (1, 10, 10), 2]],
}


def loaded(reference: Any, folder: Path) -> Model:
    reference.save_pretrained(folder)
    return load_model(folder)


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerances: Any) -> None:
    atol, rtol = tolerances[("model_logits", torch.float32)]
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=rtol)


@pytest.mark.parametrize("name", BATCHES)
def test_logits_of_vision_model(
    name: str, hf_vision_model: Callable[..., Any], make_batch: Any, tmp_path: Path, tolerances: Any
) -> None:
    reference = hf_vision_model()
    batch = make_batch(BATCHES[name])
    with torch.no_grad():
        close(batch.ours(loaded(reference, tmp_path)), batch.theirs(reference), tolerances)


@pytest.mark.parametrize(
    "vision, text, tied",
    [
        ({"window_size": 112, "fullatt_block_indexes": []}, {}, True),  # windows only; tied head
        ({"window_size": 84, "fullatt_block_indexes": [0, 1, 2]}, {"num_key_value_heads": 4}, False),  # no windows
        (
            {"window_size": 28, "depth": 1, "fullatt_block_indexes": []},
            {"num_key_value_heads": 1},
            False,
        ),  # 1x1 windows
    ],
)
def test_logits_of_vision_variants(
    vision: dict[str, Any],
    text: dict[str, Any],
    tied: bool,
    hf_vision_model: Callable[..., Any],
    make_batch: Any,
    tmp_path: Path,
    tolerances: Any,
) -> None:
    reference = hf_vision_model(vision, tied, **text)
    model = loaded(reference, tmp_path)
    assert (model.lm_head is None) == tied
    batch = make_batch([[4, (1, 14, 10), 3], [5, (1, 6, 6), (1, 4, 6), 2]])
    with torch.no_grad():
        close(batch.ours(model), batch.theirs(reference), tolerances)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_text_models(
    family: str, hf_text_model: Callable[[str], Any], make_batch: Any, tmp_path: Path, tolerances: Any
) -> None:
    reference = hf_text_model(family)
    batch = make_batch([[33], [7], [130], [33]])
    with torch.no_grad():
        close(batch.ours(loaded(reference, tmp_path)), batch.theirs(reference), tolerances)


@pytest.mark.parametrize("family", ["vision", "qwen3", "llama-biased"])
def test_gradients_of_one_step(
    family: str,
    hf_vision_model: Callable[..., Any],
    hf_text_model: Callable[[str], Any],
    make_batch: Any,
    tmp_path: Path,
) -> None:
    reference = hf_vision_model(tied=True) if family == "vision" else hf_text_model(family)
    model = loaded(reference, tmp_path)
    batch = make_batch([[4, (1, 6, 10), 9], [30]] if family == "vision" else [[12], [30]])
    targets = torch.randint(0, 160, (sum(map(len, batch.ids)),))
    losses = [F.cross_entropy(logits, targets) for logits in (batch.ours(model), batch.theirs(reference))]
    assert abs(losses[0] - losses[1]) < 1e-5
    sum(losses).backward()
    theirs = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): p.grad
        for name, p in reference.named_parameters()
    }
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.data = parameter.grad
    ours = dict(hub_tensors(model))
    assert ours.keys() == theirs.keys()
    for name, grad in ours.items():
        error = (grad - theirs[name]).abs().max()
        # Relative to the matrix's own scale, since a key bias's gradient is pure rounding in both.
        assert error < 1e-4 * theirs[name].abs().max() + 1e-6, (name, error)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(8))
def test_logits_of_large_grids(
    seed: int, hf_vision_model: Callable[..., Any], make_batch: Any, tmp_path: Path, tolerances: Any
) -> None:
    reference = hf_vision_model({"window_size": 112, "depth": 4, "fullatt_block_indexes": [1, 3]})
    generator = torch.Generator().manual_seed(seed)
    sides = (2 * torch.randint(1, 32, (2, 3, 2), generator=generator)).tolist()
    batch = make_batch([[3, *[(1, h, w) for h, w in images], 5] for images in sides], seed)
    with torch.no_grad():
        close(batch.ours(loaded(reference, tmp_path)), batch.theirs(reference), tolerances)
