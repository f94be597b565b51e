"""torch.compile(fullgraph=True) goes through every op: one node each, the same values, the same gradients."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from thyme.kernels.fp8 import quantize_weight
from thyme.kernels.fp8_linear import fp8_linear
from thyme.kernels.grpo_loss import GrpoLossConfig, grpo_loss, policy_loss
from thyme.kernels.kv_cache import mrope_write_kv
from thyme.kernels.library import OPS
from thyme.kernels.linear_grpo_loss import linear_grpo_loss
from thyme.kernels.linear_logprob import linear_logprob
from thyme.kernels.mrope import mrope, mrope_tables
from thyme.kernels.packed_product import pack_weight, packed_product
from thyme.kernels.paged_attention import paged_attention
from thyme.kernels.rmsnorm import add_rmsnorm, rmsnorm
from thyme.kernels.sample import sample
from thyme.kernels.shared_prefix import SharedPrefix
from thyme.kernels.swiglu import swiglu
from thyme.kernels.token_logprobs import token_logprobs
from thyme.kernels.truncated_logprobs import truncated_logprobs

ROWS, WIDTH, VOCAB = 6, 16, 40
Case = tuple[Callable[..., Any], list[Tensor]]


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def cases() -> dict[str, Case]:
    """(a function of the tensors that follow, for which it is differentiable)."""
    torch.manual_seed(0)
    index = torch.arange(ROWS)
    tau = torch.tensor([1.0, 0.0, 0.7, 1.0, 0.5, 1.0])
    advantages, old = torch.randn(2, ROWS)
    weights = torch.ones(ROWS) / ROWS
    config = GrpoLossConfig(loss="cispo", entropy_coef=0.1, kl_coef=0.2)
    more: dict[str, Any] = {"temperature": tau, "banned_ids": [37, 38], "old_logprobs": old, "ref_logprobs": old}
    loss = {**more, "vocab_size": VOCAB - 1, "config": config}
    tables = mrope_tables(index[None], torch.rand(4))
    slots = torch.arange(ROWS) * 2
    kv = torch.randn(2, 4, 4, 1, 8)
    paged: dict[str, Any] = {"scale": 0.3, "max_query_len": 2}
    paged["shared"] = SharedPrefix(torch.tensor([0, 3], dtype=torch.int32), torch.zeros(1, dtype=torch.int32))
    table = torch.tensor([[0, 1], [2, 3], [1, 2]], dtype=torch.int32)
    lengths, starts = (torch.tensor(x, dtype=torch.int32) for x in ([5, 8, 4], [0, 2, 4, 6]))

    def write(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        k, v = kv.clone()
        return mrope_write_kv(qkv, *tables, k, v, slots), k, v

    draw = partial(sample, temperature=tau, seed=index, position=index, top_k=5, top_p=0.9, banned_ids=[1])
    return {
        "rmsnorm": (partial(rmsnorm, eps=1e-6), [leaf(ROWS, WIDTH), leaf(WIDTH)]),
        "add_rmsnorm": (partial(add_rmsnorm, eps=1e-6), [leaf(ROWS, WIDTH), leaf(ROWS, WIDTH), leaf(WIDTH)]),
        "swiglu": (swiglu, [leaf(ROWS, WIDTH)]),
        "fp8_linear": (lambda x: fp8_linear(x, *quantize_weight(torch.ones(5, WIDTH))), [torch.randn(ROWS, WIDTH)]),
        "packed_product": (
            partial(packed_product, packed=pack_weight(torch.randn(5, WIDTH)), bias=torch.ones(5), outputs=5),
            [torch.randn(ROWS, WIDTH)],
        ),
        "mrope": (lambda heads: mrope(heads, *tables), [leaf(ROWS, 3, 8)]),
        "mrope_write_kv": (write, [torch.randn(ROWS, 4, 8)]),
        "paged_attention": (lambda q: paged_attention(q, *kv, table, lengths, starts, **paged), [torch.randn(6, 2, 8)]),
        "sample": (draw, [torch.randn(ROWS, VOCAB)]),
        "token_logprobs": (partial(token_logprobs, targets=index, temperature=tau), [leaf(ROWS, VOCAB)]),
        "truncated_logprobs": (
            lambda z: truncated_logprobs(z, z.argmax(1), temperature=tau, top_k=9, top_p=0.95),
            [leaf(ROWS, VOCAB)],
        ),
        "linear_logprob": (
            partial(linear_logprob, targets=index, mask=index != 2),
            [leaf(ROWS, WIDTH), leaf(VOCAB, WIDTH)],
        ),
        "policy_loss": (
            lambda x, h: policy_loss(x, h, advantages, weights, old_logprobs=old, config=config),
            [leaf(ROWS), leaf(ROWS)],
        ),
        "grpo_loss": (lambda z: grpo_loss(z, index, advantages, weights, **loss), [leaf(ROWS, VOCAB)]),
        "linear_grpo_loss": (
            lambda x, w: linear_grpo_loss(x, w, index, advantages, weights, **loss),
            [leaf(ROWS, WIDTH), leaf(VOCAB, WIDTH)],
        ),
    }


def tensors(out: Any) -> list[Tensor]:
    if isinstance(out, tuple):
        return [x for part in out for x in tensors(part)]
    return [out] if isinstance(out, Tensor) else []


def results(run: Callable[..., Any], leaves: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """All that it returns, and the gradients of a weighted sum of it."""
    outs = tensors(run(*leaves))
    real = [x for x in outs if x.requires_grad]
    if not real:
        return outs, []
    weights = [torch.linspace(0.5, 1.5, x.numel()).view_as(x) for x in real]
    return [x.detach() for x in outs], list(torch.autograd.grad(real, leaves, weights))


def test_every_op_has_a_case() -> None:
    assert set(cases()) == set(OPS)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", OPS)
def test_a_graph_goes_through(name: str, backend: str) -> None:
    run, leaves = cases()[name]
    nodes: list[str] = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        nodes.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    torch._dynamo.reset()
    outs, grads = results(torch.compile(run, fullgraph=True, backend=count), leaves)
    assert [node for node in nodes if "thyme" in node] == [f"thyme.{name}.default"]
    expected, expected_grads = results(run, leaves)
    for got, want in zip(outs, expected, strict=True):
        assert torch.equal(got, want)
    for got, want in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", OPS)
def test_a_registration_is_sound(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own checks: schema and mutation, fake results, autograd, and all of it through AOT dispatch."""
    run, leaves = cases()[name]
    node = getattr(torch.ops.thyme, name).default
    calls: list[tuple[Any, ...]] = []

    def graph_of(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        def call(*args: Any) -> Any:
            class Recorder(torch.fx.Interpreter):
                def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
                    if target is node:
                        calls.append(args)
                    return super().call_function(target, args, kwargs)

            return Recorder(graph).run(*args)

        return call

    torch._dynamo.reset()
    torch.compile(run, fullgraph=True, backend=graph_of)(*leaves)
    (args,) = calls
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    if any(isinstance(arg, Tensor) and arg.dtype == torch.float8_e4m3fn for arg in args):
        checks = checks[1:]  # the first compares arguments by arithmetic that torch has not for such numbers
    torch.library.opcheck(node, args, test_utils=checks)


def test_a_frozen_weight_gets_no_gradient() -> None:
    hidden, weight = leaf(ROWS, WIDTH), torch.randn(WIDTH)
    torch._dynamo.reset()
    out = torch.compile(partial(rmsnorm, eps=1e-6), fullgraph=True, backend="aot_eager")(hidden, weight)
    out.sum().backward()
    wanted = hidden.grad.clone()
    hidden.grad = None
    rmsnorm(hidden, weight, 1e-6).sum().backward()
    torch.testing.assert_close(wanted, hidden.grad)


def test_eagerly_nothing_changes() -> None:
    """The op's own function is called, with whatever it is given."""
    x = torch.randn(ROWS, WIDTH)
    with pytest.raises(ValueError, match="weight must have shape"):
        rmsnorm(x, torch.ones(3), 1e-6)
    assert rmsnorm.__doc__ is not None
    assert rmsnorm.__name__ == "rmsnorm"
