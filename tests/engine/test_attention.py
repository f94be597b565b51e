"""EngineConfig.attention: each backend that runs on a CPU gives the same tokens; one that cannot says so at once."""

from typing import Any

import numpy as np
import pytest

from thyme.engine import SamplingParams
from thyme.model import Model

PARAMS = SamplingParams(max_tokens=2, temperature=0.0, adaptive=False, banned_ids=(), ignore_eos=True, repetition=None)


# Triton's interpreter under numpy 2.3 warns at every loop whose bound is a kernel argument.
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
@pytest.mark.parametrize("attention", ["reference", "triton"])
def test_backends_agree(text_model: Model, make_engine: Any, prompts: list[list[int]], attention: str) -> None:
    """Prefill in chunks beside decode, so that the longest run of new tokens, which a backend is told, changes."""
    cases = prompts[5:8]
    ours = make_engine(text_model, prefill_chunk=7).generate(cases, PARAMS)
    other = make_engine(text_model, prefill_chunk=7, attention=attention).generate(cases, PARAMS)
    for one, two in zip(ours, other, strict=True):
        assert one.token_ids == two.token_ids
        np.testing.assert_allclose(one.logprobs_raw, two.logprobs_raw, atol=2e-5)


def test_what_cannot_run_is_an_error_at_the_start(text_model: Model, make_engine: Any) -> None:
    with pytest.raises(ValueError, match="attention 'flash_attn' cannot run"):
        make_engine(text_model, attention="flash_attn")
