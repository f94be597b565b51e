"""What a captured graph rests on: launches and scratch depend on sizes that the host gives, never on lengths. And that
few sequences fill a card."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import triton
from torch import Tensor

from thyme.kernels import (
    attention_decode,
    attention_merge,
    attention_prefill,
    attention_prefix,
    attention_tiles,
    paged_attention,
)
from thyme.kernels.paged_attention import capacity, paged_attention_ref, paged_attention_triton
from thyme.kernels.shared_prefix import SharedPrefix

BLOCK, HEADS, KV_HEADS, DIM = 16, 28, 4, 128
MODULES = {
    "prefill": attention_prefill,
    "prefix": attention_prefix,
    "decode": attention_decode,
    "merge": attention_merge,
}
CPU = torch.device("cpu")


def _described(value: Any) -> Any:
    return (tuple(value.shape), value.stride(), value.dtype) if isinstance(value, Tensor) else value


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], list[Any]]:
    """Of a call: each launch with its grid, arguments and constants, tensors by their shape; and each allocation."""
    found: list[Any] = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **constants: found.append(
                (self.name, grid, tuple(_described(value) for value in args), tuple(constants.items()))
            )

    for name, module in MODULES.items():
        monkeypatch.setattr(module, f"_{name}_kernel", Recorder(name))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **more: found.append(("empty", size)) or empty(*size, **more))

    def run(call: Callable[[], object]) -> list[Any]:
        found.clear()
        call()
        return list(found)

    return run


def batch(contexts: list[int], width: int, *, num_groups: int | None = None) -> dict[str, Any]:
    """Decoding sequences whose tables have `width` entries; where groups are asked for, pairs share 40 blocks."""
    count = len(contexts)
    tables = np.arange(count * width, dtype=np.int32).reshape(count, width) % 7
    lengths = np.array(contexts, dtype=np.int32)
    more: dict[str, Any] = {}
    if num_groups is not None:
        ones = np.ones(count, dtype=np.int64)
        more["shared"] = SharedPrefix.find(tables, lengths, ones, BLOCK, CPU, num_groups=num_groups)
    k, v = torch.zeros(2, 7, BLOCK, KV_HEADS, DIM)
    return {
        "q": torch.zeros(count, HEADS, DIM),
        "k_cache": k,
        "v_cache": v,
        "block_tables": torch.from_numpy(tables),
        "context_lens": torch.from_numpy(lengths),
        "cu_seqlens_q": torch.arange(count + 1, dtype=torch.int32),
        "scale": 0.1,
        "max_query_len": 1,
        **more,
    }


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("groups", [None, 4])
def test_a_bucket_of_lengths_has_one_launch(record: Any, batch_invariant: bool, groups: int | None) -> None:
    width = capacity(2048, BLOCK)
    launches = []
    for contexts in ([1, 0, 1, 1], [2048] * 4, [700, 3, 1025, 512], [512, 513, 64, 2047]):
        args = batch(contexts, width, num_groups=groups)
        launches.append(record(lambda args=args: paged_attention_triton(**args, batch_invariant=batch_invariant)))
    assert all(one == launches[0] for one in launches)
    names = [entry[0] for entry in launches[0] if entry[0] != "empty"]
    assert names == ["prefix"] * (groups is not None) + ["decode", "merge"]


def test_the_widths_are_few() -> None:
    widths = [capacity(longest, BLOCK) for longest in range(1, 32_769)]
    assert sorted(set(widths)) == [32, 64, 128, 256, 512, 1024, 2048]
    assert all(width * BLOCK >= longest for longest, width in enumerate(widths, start=1))
    assert capacity(0, BLOCK) == 32
    assert capacity(600, 24) == -(-1024 // 24)


def test_groups_can_be_padded_to_one_number() -> None:
    tables = np.arange(4 * 64, dtype=np.int32).reshape(4, 64)
    ones, lengths = np.ones(4, dtype=np.int64), np.full(4, 1000, dtype=np.int32)
    none = SharedPrefix.find(tables, lengths, ones, BLOCK, CPU, num_groups=3)
    assert none is not None
    assert (none.cu_groups.tolist(), none.num_blocks.tolist()) == ([0, 4, 4, 4], [0, 0, 0])
    tables[2:, :40] = tables[2, :40]
    found = SharedPrefix.find(tables, lengths, ones, BLOCK, CPU, num_groups=4)
    assert found is not None
    assert (found.cu_groups.tolist(), found.num_blocks.tolist()) == ([0, 1, 2, 4, 4], [0, 0, 40, 0])
    with pytest.raises(ValueError, match=r"3 groups share a prefix, which is more than num_groups \(2\)"):
        SharedPrefix.find(tables, lengths, ones, BLOCK, CPU, num_groups=2)


def test_padded_groups_and_rows_compute_what_the_others_do() -> None:
    """The rows that fill a fixed batch up are 0, whatever their tables say; so for the reference."""
    torch.manual_seed(0)
    contexts = [900, 0, 850, 0]
    args = batch(contexts, capacity(900, BLOCK)) | {"max_query_len": 1}
    for name, shape in (("q", (4, 2, 16)), ("k_cache", (130, BLOCK, 1, 16)), ("v_cache", (130, BLOCK, 1, 16))):
        args[name] = torch.randn(shape)
    tables = np.stack([np.arange(64), np.full(64, -5), np.arange(64) + 64, np.full(64, 10**6)]).astype(np.int32)
    tables[2, :40] = tables[0, :40]
    order = [0, 2, 1, 3]  # siblings are neighbours
    args["block_tables"] = torch.from_numpy(tables[order])
    lengths = np.array(contexts, dtype=np.int32)[order]
    args["context_lens"] = torch.from_numpy(lengths)
    expected = paged_attention_ref(**args)
    assert expected[:2].isfinite().all()
    assert not expected[2:].any()
    torch.testing.assert_close(paged_attention_triton(**args), expected)
    shared = SharedPrefix.find(tables[order], lengths, np.ones(4, np.int64), BLOCK, CPU, num_groups=4)
    assert shared is not None
    assert shared.num_blocks.tolist() == [40, 0, 0, 0]
    torch.testing.assert_close(paged_attention_triton(**args, shared=shared), expected)


def programs(num_seqs: int, context: int) -> tuple[int, int]:
    """Programs of decode that read keys, and the most keys of one, by the rule as the device applies it."""
    width = capacity(context, BLOCK) * BLOCK
    at_least, most = paged_attention._splits(num_seqs, KV_HEADS, width, processors=132)
    wanted = triton.cdiv(triton.cdiv(context, at_least), attention_tiles.FINEST) * attention_tiles.FINEST
    length = min(max(wanted, attention_tiles.FINEST), attention_tiles.SPLIT)
    splits = triton.cdiv(context, length)
    assert splits <= most
    return num_seqs * KV_HEADS * splits, length


@pytest.mark.parametrize("context", [4096, 8192, 16_384, 32_768])
@pytest.mark.parametrize("num_seqs", range(1, 9))
def test_few_sequences_fill_the_card(num_seqs: int, context: int) -> None:
    """At 3.35 TB/s and about 0.8 us from asking to having, 20 KB on their way keep one of 132 SMs at the copy's rate; a
    program has 32 KB. 97 % of the SMs with a program each is what one sequence of 4,096 tokens can have."""
    count, length = programs(num_seqs, context)
    assert count >= 128
    assert count * length >= num_seqs * KV_HEADS * context
    per_processor = triton.cdiv(count, 132)
    assert count / (132 * per_processor) >= 0.6  # of the work that full waves would hold


def test_full_batches_are_not_cut_finer() -> None:
    assert programs(66, 4096) == (66 * KV_HEADS * 8, 512)
    assert programs(256, 700)[1] == 512
