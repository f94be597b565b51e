"""What engine and trainer launch on Hopper with Qwen2.5-VL-7B, recorded instead of launched: no GPU, and nothing is
computed.

    python bench/launches.py       one launch a line, in bfloat16 and float32

A launch is described by what Triton compiles for: each argument's type, whether it is a multiple of 16, constants,
warps and stages. What bench/shipped lists is written by hand: this exits with 1 when a launch is not among it.
"""

import importlib
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.fx.experimental._config
import triton
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.pop("TRITON_INTERPRET", None)  # kernels are compiled functions, or there is nothing to ask

import configurations
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from thyme.kernels import linear_logprob, linear_tiles, token_logprobs


class Recorder:
    """Stands for a kernel; `launches` are the descriptions under which Triton would look the compiled ones up."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        backend = make_backend(GPUTarget("cuda", 90, 32))
        self.binder = create_function_from_signature(kernel.signature, kernel.params, backend)
        self.launches: set[str] = set()

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            _, specialization, options = self.binder(*args, **options)
            arguments = {
                name: f"={extra}" if kind == "constexpr" else f":{kind}{'/16' * (extra == 'D')}"
                for name, (kind, extra) in zip(self.kernel.arg_names, specialization, strict=True)
            }
            self.launches.add(_described(arguments, options))

        return launch


def _described(arguments: dict[str, str], options: dict[str, Any]) -> str:
    parts = [f"{name}{value}" for name, value in arguments.items()]
    parts += [f"{name}={options[name]}" for name in ("num_warps", "num_stages") if name in options]
    return " ".join(part.replace(" ", "") for part in parts)


def compiled(configuration: configurations.Configuration) -> str:
    """The same description of what the gate compiles."""
    kernel = getattr(sys.modules[f"thyme.kernels.{configuration.module}"], configuration.kernel)
    kernel = kernel.kernel if isinstance(kernel, Recorder) else kernel
    arguments = {}
    for name in kernel.arg_names:
        kind = configuration.types.get(name)
        if kind is None:
            arguments[name] = f"={configuration.constants[name]}"
        else:
            arguments[name] = f":{kind}{'/16' * configurations.is_aligned(configuration, kernel, name)}"
    return _described(arguments, configuration.options)


def record() -> dict[str, Recorder]:
    """Puts a recorder in place of every kernel that is launched, for the rest of the process; by module.kernel.

    Tensors say that they are on a GPU, so that ops choose what they choose there; those of the device "meta" have no
    memory, and the others are filled with zeros where they would not be.
    """
    recorders = {}
    for path in sorted((configurations.ROOT / "kernels").glob("*.py")):
        module = importlib.import_module(f"thyme.kernels.{path.stem}")
        for kernel in configurations.launched(path.stem):
            recorders[f"{path.stem}.{kernel}"] = recorder = Recorder(getattr(module, kernel))
            setattr(module, kernel, recorder)
    triton.knobs.runtime.interpret = True  # read only by who asks whether Triton runs without a GPU: kernels are made
    torch.Tensor.is_cuda = property(lambda tensor: True)  # type: ignore[assignment]
    torch.cuda.device = lambda device: nullcontext()  # type: ignore[assignment, misc]
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        setattr(owner, name, _zeroed(getattr(owner, name)))
    torch.mm = _with_any_dtype(torch.mm)  # type: ignore[assignment]
    torch.fx.experimental._config.meta_nonzero_assume_all_nonzero = True  # a mask of no values masks nothing
    linear_tiles._has_tma = lambda hidden, weight: hidden.dtype != torch.float32
    return recorders


def _zeroed(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def made(*args: Any, **more: Any) -> Tensor:
        tensor = make(*args, **more)
        return tensor.zero_() if tensor.device.type == "cpu" else tensor

    return made


def _with_any_dtype(mm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A CPU has no product in a wider type than its operands'."""

    def product(a: Tensor, b: Tensor, **more: Any) -> Tensor:
        if "out_dtype" not in more or a.device.type != "cpu":
            return mm(a, b, **more)
        return more.get("out", a.new_zeros(len(a), b.shape[1], dtype=more["out_dtype"]))

    return product


def call_apart(dtype: torch.dtype) -> None:
    """What ops offer and neither engine nor trainer asks for: the head with an entropy and without, nothing banned."""
    vocab, features = 152_064, 3_584
    with torch.device("meta"):
        index, hidden = torch.zeros(2, dtype=torch.int64), torch.zeros(2, features, dtype=dtype, requires_grad=True)
        head = torch.empty(vocab, features, dtype=dtype)
        more = {"temperature": torch.ones(2), "vocab_size": 151_665}
        for tau in (torch.ones(2), None):
            for bonus in (0.0, 0.1):
                logprob, entropy = linear_logprob.linear_logprob(hidden, head, index, **more | {"temperature": tau})
                (logprob.sum() + (bonus * entropy.sum() if bonus else 0.0)).backward()
        logits = torch.zeros(2, vocab, dtype=dtype, requires_grad=True)
        token_logprobs.token_logprobs(logits, index, **more)[0].sum().backward()


if __name__ == "__main__":
    import product

    of, dtypes = product.processor(), (torch.bfloat16, torch.float32)
    models = [(product.model(of, dtype), product.policy(dtype)) for dtype in dtypes]
    recorders = record()
    for dtype, (model, policy) in zip(dtypes, models, strict=True):
        product.run_engine(of, model)
        product.run_engine(of, model, deterministic=True)
        if dtype == torch.bfloat16:
            product.run_engine(of, model, weight_dtype="fp8", kv_dtype="fp8")
            product.run_engine(of, model, weight_dtype="fp8", kv_dtype="fp8", deterministic=True)
        product.run_trainer(of, policy)
        call_apart(dtype)
    known = {(one.module, one.kernel, compiled(one)) for one in configurations.configurations()}
    missing = [name for name, recorder in recorders.items() if not recorder.launches]
    for name, recorder in recorders.items():
        for launch in sorted(recorder.launches):
            print(name, launch)
            if (*name.split("."), launch) not in known:
                missing.append(f"{name} {launch}")
    print(*(f"NOT COMPILED BY THE GATE, OR NOT LAUNCHED HERE: {one}" for one in missing), sep="\n")
    sys.exit(bool(missing))
