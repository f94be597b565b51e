"""Attention over a tree of prefixes against a loop over tokens in float64, and against every sequence by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from thyme.model import packed_attention, tree_parts
from thyme.model.prefix_tree import PrefixTree
from thyme.model.tree_attention import tree_attention
from thyme.model.tree_parts import Backend, CpuFlash, CudaFlash, Part, Plain, parts_of, serves

# A prompt and its rollouts; branches of branches, of equal lengths too; several roots; a chain; nothing shared; single
# tokens; one sequence.
TREES = {
    "group": PrefixTree((9, 3, 5, 3, 1), (-1, 0, 0, 0, 0)),
    "branches": PrefixTree((4, 2, 3, 3, 1, 1, 5, 2, 2), (-1, 0, 1, 1, 0, 4, 4, 6, 6)),
    "roots": PrefixTree((5, 3, 2, 7, 6, 3, 3, 4), (-1, 0, 0, -1, 3, 3, -1, 6)),
    "chain": PrefixTree((2, 1, 4, 3), (-1, 0, 1, 2)),
    "apart": PrefixTree((3, 5, 3), (-1, -1, -1)),
    "singles": PrefixTree((1, 1, 1, 1, 1), (-1, 0, 0, 2, -1)),
    "one": PrefixTree((7,), (-1,)),
}


def way(tree: PrefixTree, node: int) -> list[int]:
    """Packed tokens from the root to the node's last one."""
    return [t for n in tree.path(node) for t in range(tree.starts[n], tree.starts[n] + tree.lengths[n])]


def naive(q: Tensor, k: Tensor, v: Tensor, tree: PrefixTree, scale: float) -> Tensor:
    """Token by token, head by head."""
    out, share = [], q.shape[1] // k.shape[1]
    for node, (start, length) in enumerate(zip(tree.starts, tree.lengths, strict=True)):
        seen = way(tree, node)
        for t in range(start, start + length):
            keys = seen[: seen.index(t) + 1]
            scores = [k[keys, head // share] @ q[t, head] * scale for head in range(q.shape[1])]
            out.append(torch.stack([s.softmax(0) @ v[keys, h // share] for h, s in enumerate(scores)]))
    return torch.stack(out)


def alone(q: Tensor, k: Tensor, v: Tensor, tree: PrefixTree, scale: float) -> Tensor:
    """Every node behind a copy of its ancestors, as packed sequences."""
    ways = [way(tree, node) for node in range(len(tree.lengths))]
    tokens, ends = torch.tensor([t for w in ways for t in w]), torch.tensor([len(w) for w in ways]).cumsum(0)
    out = packed_attention(q[tokens], k[tokens], v[tokens], [len(w) for w in ways], causal=True, scale=scale)
    own = [torch.arange(end - n, end) for end, n in zip(ends.tolist(), tree.lengths, strict=True)]
    return out[torch.cat(own)]


def run(attend: Callable[[Tensor, Tensor, Tensor], Tensor], fused: Tensor, heads: tuple[int, int]) -> list[Tensor]:
    """What comes out, and the gradient of the projection that queries, keys and values are slices of."""
    qkv = fused.clone().requires_grad_()
    out = attend(*qkv.split((heads[0], heads[1], heads[1]), 1))
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).sin().view(out.shape).to(out.dtype)
    (grad,) = torch.autograd.grad(out, qkv, weight)
    return [out.detach(), grad]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain torch then has to put blocks of queries together here."""
    monkeypatch.setattr(tree_parts, "_BLOCK", 3)


@pytest.mark.parametrize("backend", [CpuFlash, Plain], ids=["flash", "plain"])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_values_and_gradients(
    tree: PrefixTree, heads: tuple[int, int], backend: type[Backend], tolerances: Any, small_blocks: None
) -> None:
    fused = torch.randn(sum(tree.lengths), heads[0] + 2 * heads[1], 12, dtype=torch.float64)
    expected = run(lambda q, k, v: naive(q, k, v, tree, 0.3), fused, heads)
    shared = run(lambda q, k, v: tree_attention(q, k, v, tree, scale=0.3, backend=backend), fused, heads)
    copies = run(lambda q, k, v: alone(q, k, v, tree, 0.3), fused, heads)
    for x, y, z in zip(expected, shared, copies, strict=True):
        torch.testing.assert_close(x, y, atol=1e-13, rtol=1e-12)
        torch.testing.assert_close(x, z, atol=1e-13, rtol=1e-12)
    for dtype in (torch.float32, torch.bfloat16):
        narrow = fused.to(dtype)
        out, grad = run(lambda q, k, v: tree_attention(q, k, v, tree, scale=0.3, backend=backend), narrow, heads)
        assert out.dtype == grad.dtype == dtype
        wide = run(lambda q, k, v: naive(q, k, v, tree, 0.3), narrow.double(), heads)
        atol, rtol = tolerances["attention", dtype]
        torch.testing.assert_close(out.double(), wide[0], atol=atol, rtol=rtol)
        torch.testing.assert_close(grad.double(), wide[1], atol=4 * atol, rtol=2 * rtol)


def test_a_prefixs_keys_get_the_gradient_of_all_that_descend_from_it() -> None:
    """The sum of what each of them gives it, each computed in a tree without the others."""
    tree, fused = TREES["group"], torch.randn(21, 4, 8, dtype=torch.float64)
    prefix = slice(0, 9)

    def of_keys(tokens: list[int], tree: PrefixTree) -> Tensor:
        qkv = fused[tokens].clone().requires_grad_()
        q, k, v = qkv.split((2, 1, 1), 1)
        (grad,) = torch.autograd.grad(tree_attention(q, k, v, tree)[9:].square().sum(), qkv)
        return grad[prefix]

    whole = of_keys(list(range(21)), tree)
    parts = []
    for node in range(1, 5):
        start, length = tree.starts[node], tree.lengths[node]
        parts.append(of_keys([*range(9), *range(start, start + length)], PrefixTree((9, length), (-1, 0))))
    assert all(part.abs().max() > 1e-3 for part in parts)
    torch.testing.assert_close(whole, torch.stack(parts).sum(0), atol=1e-13, rtol=1e-12)


def test_a_token_knows_nothing_of_siblings_and_of_what_follows_it() -> None:
    """Their queries, keys and values may be anything."""
    tree, fused = TREES["branches"], torch.randn(23, 4, 8)
    for node in range(len(tree.lengths)):
        seen, other = way(tree, node), fused.clone()
        other[[t for t in range(23) if t not in seen]] = 1e4
        before, after = (tree_attention(*x.split((2, 1, 1), 1), tree) for x in (fused, other))
        assert torch.equal(before[seen], after[seen])


def test_nodes_of_a_depth_are_one_part_where_a_backend_takes_any_lengths() -> None:
    tree = TREES["roots"]
    own, ancestors = parts_of(tree, torch.device("cpu"), together=True)
    assert [part.query_lengths for part in own] == [tree.lengths] and own[0].queries == slice(0, 33)
    ((level,),) = ancestors
    assert (level.query_lengths, level.key_lengths) == ((5, 9, 4), (5, 7, 3))
    assert level.cu_queries.tolist() == [0, 5, 14, 18] and level.cu_keys.tolist() == [0, 5, 12, 15]
    assert level.queries.tolist() == [*range(5, 10), *range(17, 26), *range(29, 33)]  # type: ignore[union-attr]
    own, ancestors = parts_of(tree, torch.device("cpu"), together=False)
    assert sorted(part.query_lengths for part in own) == [(2,), (3, 3, 3), (4,), (5,), (6,), (7,)]
    assert [len(part.query_lengths) for level in ancestors for part in level] == [1, 1, 1]


def test_no_tensor_has_tokens_times_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor that plain torch makes beside the heads has one block of queries by the keys of a node."""
    monkeypatch.setattr(tree_parts, "_BLOCK", 32)
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            self.size = max(self.size, out.numel() if isinstance(out, Tensor) else 0)
            return out

    tree = PrefixTree((600,) * 4, (-1, 0, 0, 0))
    qkv = torch.randn(2400, 3, 8, requires_grad=True)
    for backend in (CpuFlash, Plain):
        with Largest() as largest:
            tree_attention(*qkv.split((1, 1, 1), 1), tree, backend=backend).sum().backward()
        assert largest.size <= 2400 * 3 * 8


@pytest.mark.parametrize(
    ("lengths", "parents", "words"),
    [
        ((), (), "every length must be at least 1, got none"),
        ((3, 0), (-1, 0), "every length must be at least 1"),
        ((3, 2), (-1,), "1 parents for 2 nodes"),
        ((3, 2), (-1, 1), "node 1 is not right behind what node 1"),
        ((3, 2), (1, -1), "node 0 is not right behind what node 1"),
        ((3, 2, 2, 1), (-1, 0, 0, 1), "node 3 is not right behind what node 1"),
    ],
)
def test_what_is_no_tree_depth_first(lengths: tuple[int, ...], parents: tuple[int, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PrefixTree(lengths, parents)


def test_a_tree_of_other_tokens_is_refused() -> None:
    q = torch.randn(4, 2, 8)
    with pytest.raises(ValueError, match="the tree has 7 tokens, q has 4"):
        tree_attention(q, q, q, TREES["one"])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_values_and_gradients_on_a_gpu(tree: PrefixTree, dtype: torch.dtype, tolerances: Any) -> None:
    fused = torch.randn(sum(tree.lengths), 8, 64, dtype=dtype)
    wide = run(lambda q, k, v: naive(q, k, v, tree, 0.125), fused.double(), (4, 2))
    out, grad = run(lambda q, k, v: tree_attention(q, k, v, tree), fused.cuda(), (4, 2))
    atol, rtol = tolerances["attention", dtype]
    torch.testing.assert_close(out.double().cpu(), wide[0], atol=atol, rtol=rtol)
    torch.testing.assert_close(grad.double().cpu(), wide[1], atol=4 * atol, rtol=4 * rtol)
    assert tree_parts.backend_of(fused.cuda()) is (Plain if dtype == torch.float32 else CudaFlash)


class _Shifted(CpuFlash):
    @staticmethod
    def forward(part: Part, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = CpuFlash.forward(part, q, k, v, scale)
        return out, lse + 0.1


class _Changed(CpuFlash):
    @staticmethod
    def forward(part: Part, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        raise TypeError("_flash_attention_forward() got an unexpected argument")


def test_a_backend_is_tried_before_it_is_trusted(caplog: pytest.LogCaptureFixture) -> None:
    cpu = torch.device("cpu")
    assert serves(CpuFlash, cpu, torch.float32) and serves(Plain, cpu, torch.bfloat16) and not caplog.records
    assert not serves(_Shifted, cpu, torch.float32) and "other values" in caplog.text
    assert not serves(_Changed, cpu, torch.float32) and "unexpected argument" in caplog.text
