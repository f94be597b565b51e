"""One copy a step: what is packed comes back as it was, and a decode step sends nothing otherwise."""

from typing import Any

import numpy as np
import pytest
import torch

from thyme.engine import SamplingParams
from thyme.engine.upload import Upload
from thyme.model import Model

CPU = torch.device("cpu")
ARRAYS = {
    "ints": np.arange(7, dtype=np.int32),
    "table": np.arange(12, dtype=np.int64).reshape(3, 4)[:, :3],  # not contiguous
    "none": np.zeros(0, dtype=np.int64),
    "floats": np.linspace(-1, 1, 5, dtype=np.float32),
    "pairs": np.arange(6, dtype=np.int64).reshape(2, 3),
}


def test_what_is_packed_comes_back() -> None:
    upload = Upload(CPU, packs=True)
    for _ in range(3):
        sent = upload(ARRAYS)
        for name, array in ARRAYS.items():
            assert np.array_equal(sent[name].numpy(), array)
            assert sent[name].numpy().dtype == array.dtype
            assert sent[name].data_ptr() % 16 == 0
    assert upload.copies == 3


def test_the_same_shapes_lie_at_the_same_place() -> None:
    """Until more is sent than there was room for."""
    upload = Upload(CPU, packs=True)
    one = {name: x.data_ptr() for name, x in upload(ARRAYS).items()}
    assert {name: x.data_ptr() for name, x in upload(ARRAYS).items()} == one
    large = np.arange(50_000, dtype=np.int64)
    assert torch.equal(upload({"large": large})["large"], torch.from_numpy(large))


def test_a_cpu_shares_memory() -> None:
    upload = Upload(CPU)
    assert upload(ARRAYS)["ints"].data_ptr() == ARRAYS["ints"].ctypes.data
    assert upload.copies == 0


@pytest.mark.parametrize("limits", [{}, {"top_p": 0.9}])
def test_a_decode_step_makes_one_copy(
    text_model: Model, make_engine: Any, prompts: Any, limits: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(max_tokens=6, temperature=0.8, seed=9, banned_ids=(), ignore_eos=True, **limits)
    expected = [completion.token_ids for completion in make_engine(text_model).generate(prompts, params)]
    engine = make_engine(text_model)
    upload = engine.runner._upload = Upload(CPU, packs=True)
    shared: list[np.ndarray] = []
    from_numpy = torch.from_numpy
    monkeypatch.setattr(torch, "from_numpy", lambda array: shared.append(array) or from_numpy(array))
    done = []
    for prompt in prompts:
        engine.add(prompt, params)
    while engine.has_unfinished():
        done += engine.step()
    assert upload.copies == engine.stats()["steps"]
    assert not [array for array in shared if array.dtype != np.float64]  # those are the reference's uniform numbers
    assert [one.token_ids for one in sorted(done, key=lambda one: one.sequence.id)] == expected
