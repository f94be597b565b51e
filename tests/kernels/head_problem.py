"""What the tests of the fused head share: problems, calls that return gradients too, and a mode that watches torch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Run = Callable[..., tuple[Tensor, Any]]
# On a CPU the public op's row pass is the C++ for float32, and the reference for the other dtypes.
IDS = ["ref", "native", "triton"]


def problem(num_rows: int = 12, vocab: int = 300, features: int = 24, dtype: Any = torch.float64) -> dict[str, Any]:
    """Masked rows, four temperatures, padding past vocab_size, banned ids."""
    excluded = {"vocab_size": vocab - 40, "banned_ids": (2, vocab - 45)} if vocab > 60 else {}
    return {
        "hidden": torch.randn(num_rows, features, dtype=torch.float64).to(dtype),
        "weight": (torch.randn(vocab, features, dtype=torch.float64) / 3).to(dtype),
        "targets": torch.randint(3, vocab - 45, (num_rows,)) if excluded else torch.randint(0, vocab, (num_rows,)),
        "temperature": torch.tensor([1.0, 0.0, 1.6, 1.0, 0.7])[torch.arange(num_rows) % 5],
        "mask": torch.arange(num_rows) % 4 != 3,
        **excluded,
    }


def call(run: Run, args: dict[str, Any], entropy: float = 0.3, **more: Any) -> list[Tensor]:
    """logprob, entropy, and the gradients of a sum that tells the rows apart."""
    args = args | more
    hidden, weight = (args.pop(name).detach().clone().requires_grad_() for name in ("hidden", "weight"))
    logprob, entropies = run(hidden, weight, args.pop("targets"), **args)
    total = (logprob * torch.linspace(0.5, 1.5, len(logprob), dtype=logprob.dtype)).sum()
    (total + entropy * entropies.sum() if entropy else total).backward()
    return [logprob.detach(), entropies.detach(), hidden.grad, weight.grad]


def close(got: list[Tensor], exact: list[Tensor], tolerances: dict, scale: float = 1.0) -> None:
    """`scale` allows the gradients, sums over words or rows, that many times the rounding of one logit's."""
    for name, a, b in zip(("logprob", "entropy", "grad", "grad"), got, exact, strict=True):
        atol, rtol = tolerances[name, a.dtype]
        torch.testing.assert_close(a.double(), b, atol=atol * (scale if name == "grad" else 1), rtol=rtol)


class Watch(TorchDispatchMode):
    """Every torch op with the shape of what it returned."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[int, ...], int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage().nbytes()
                self.seen.append((func.overloadpacket.__name__, tuple(tensor.shape), storage))
        return out

    def matmuls(self, shape: Callable[[tuple[int, ...]], bool]) -> int:
        return sum(name in ("mm", "addmm", "addmm_") and shape(size) for name, size, _ in self.seen)


class Products(Watch):
    """Also multiplies 16-bit matrices into float32 on a CPU, where torch has no such product."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        mm, addmm = torch.ops.aten.mm, torch.ops.aten.addmm
        if func not in (mm.dtype, mm.dtype_out, addmm.dtype_out):
            return super().__torch_dispatch__(func, types, args, kwargs)
        with torch.utils._python_dispatch._disable_current_modes():
            *total, a, b, _ = args
            product = a.float() @ b.float()
            product = total[0] + product if total else product
            out = kwargs["out"].copy_(product) if "out" in kwargs else product
        self.seen.append((func.overloadpacket.__name__, tuple(out.shape), out.untyped_storage().nbytes()))
        return out
