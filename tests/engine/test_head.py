"""The logits that tokens are drawn from are sums in float32, whatever the weights are."""

from typing import Any

import numpy as np
import pytest
import torch

from tests import tiny
from thyme.engine import EngineConfig, SamplingParams
from thyme.kernels.linear_logprob import linear_logprob
from thyme.model import Model, ModelConfig, build
from thyme.model.packed import packs

PARAMS = SamplingParams(max_tokens=20, seed=3, banned_ids=(), ignore_eos=True, repetition=None)


@pytest.fixture(scope="module")
def model() -> Model:
    """Large logits of many parts, where bfloat16 has no more than three digits."""
    text = tiny.text_config(vocab_size=5000, initializer_range=0.15)
    return build(ModelConfig(model_type="qwen2", text=text, eos_token_ids=(2,)), seed=3, dtype=torch.bfloat16)


def worst(model: Model, engine: Any, monkeypatch: pytest.MonkeyPatch) -> float:
    """Largest difference of a recorded log-prob from the one of the trainer's fused head on the same hidden state."""
    hidden: list[torch.Tensor] = []
    runs = model if engine.runner.view is None else engine.runner.view.model
    head = runs.logits
    monkeypatch.setattr(runs, "logits", lambda rows, **options: (hidden.append(rows), head(rows, **options))[1])
    (completion,) = engine.generate([[5, 6, 7]], PARAMS)
    monkeypatch.setattr(runs, "logits", head)
    targets = torch.tensor(completion.token_ids)
    expected = linear_logprob(torch.cat(hidden).float(), model.lm_head_weight.float(), targets)[0]
    return float(np.abs(completion.logprobs - expected.detach().numpy()).max())


def test_log_probs_are_those_of_the_fused_head(model: Model, make_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert EngineConfig().head_dtype == "float32"
    for packed in {packs(torch.bfloat16), False}:
        assert worst(model, make_engine(model, pack_weights=packed), monkeypatch) < 2e-5
        assert worst(model, make_engine(model, pack_weights=packed, head_dtype="model"), monkeypatch) > 2e-3


@pytest.mark.parametrize("rows", [1, 16, 40])
def test_the_product_is_that_of_float32(model: Model, rows: int) -> None:
    """In parts of the vocabulary that do not divide it."""
    hidden = torch.randn(rows, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = hidden.double() @ model.lm_head_weight.double().t()
    with torch.no_grad():
        for min_rows in (0, 16):
            found = model.logits(hidden, min_rows=min_rows, dtype=torch.float32)
            assert found.dtype == torch.float32 and found.shape == (rows, 5000)
            torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    assert model.logits(hidden).dtype == torch.bfloat16


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="head_dtype must be float32 or model, got 'half'"):
        EngineConfig(head_dtype="half")  # type: ignore[arg-type]
