"""Compile every Triton configuration we ship for a GPU that is not there, and refuse what would be slow on it.

    python bench/gate.py [--targets sm_90,sm_80,sm_100]

For each configuration: no stack (a spilled register shows as stack), shared memory within the chip's limit, and the
instructions that make it fast are in the PTX. Prints one line each: op, kernel, registers, shared memory, tile. Exits
with 1 when something fails. Results are kept under .cache/gate by source, so that only what changed is compiled.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes of dynamic shared memory one program may use
VOCAB = 152_064  # Qwen2.5-VL 7B: columns of the LM head, and heads and widths below


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """One compiled kernel: the types of its runtime arguments; every other argument is a constant."""

    op: str
    kernel: str
    """Name of the jit function in kernels/<op>.py."""
    what: str
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]
    instructions: tuple[str, ...] = ()
    """Regular expressions that the PTX for sm_90 must hold."""
    spot: bool = False
    """Also compiled for the other targets."""
    aligned: frozenset[str] = field(default_factory=frozenset)
    """Integer arguments that are multiples of 16 at run time; pointers always are."""


def configurations() -> list[Configuration]:
    from thyme.kernels import grpo_loss, kv_cache, paged_attention, sample

    found = []

    def add(
        op: str, kernel: str, what: str, types: str, constants: dict[str, Any], options: dict[str, int], **more: Any
    ) -> None:
        pairs = dict(pair.split(":") for pair in types.split())
        constants = constants | {name: value for name, value in options.items() if not name.startswith("num_")}
        options = {name: value for name, value in options.items() if name.startswith("num_")}
        aligned = frozenset(more.pop("aligned", "").split())
        found.append(
            Configuration(
                op=op,
                kernel=kernel,
                what=what,
                types=pairs,
                constants=constants,
                options=options,
                aligned=aligned,
                **more,
            )
        )

    wide_load = r"ld\.global\S*\.v[24]"
    tile = sample._launch_config(VOCAB)
    sizes = "stride:i64 num_rows:i32 vocab_size:i32 num_blocks:i32"
    row = "logits_ptr:*{0} temperature_ptr:*fp32 banned_ptr:*u8 partial_ptr:*fp32 argmax_ptr:*i32"
    blocks = {"BLOCKS": 64}
    for dtype, banned in (("bf16", True), ("fp32", False)):
        off = {"HAS_BANNED": banned} | ({} if banned else {"banned_ptr": None})
        add(
            "sample", "_stats_kernel", f"{dtype}{', banned ids' * banned}", f"{row.format(dtype)} {sizes}", off, tile,
            instructions=(r"ex2\.approx", wide_load), aligned="stride vocab_size", spot=banned,
        )  # fmt: skip
    drawn = "seed_ptr:*i64 position_ptr:*i64 token_ptr:*i64 logprob_ptr:*fp32 logprob_raw_ptr:*fp32"
    add(
        "sample", "_draw_kernel", "bf16, banned ids", f"{row.format('bf16')} {drawn} entropy_ptr:*fp32 {sizes}",
        {"HAS_BANNED": True} | blocks, tile, aligned="stride vocab_size", instructions=(r"mul\.lo\.s64",),
    )  # fmt: skip
    toy = sample._launch_config(163)  # many rows a program, one block: num_blocks is the constant 1
    small = f"{row.format('fp32')} {sizes}".replace(" banned_ptr:*u8", "").replace(" num_blocks:i32", "")
    constants = {"HAS_BANNED": False, "banned_ptr": None, "num_blocks": 1}
    add("sample", "_stats_kernel", "fp32, 163 ids", small, constants, toy)
    add("sample", "_draw_kernel", "fp32, 163 ids", f"{small} {drawn} entropy_ptr:*fp32", constants | {"BLOCKS": 1}, toy)
    limits = "top_k_ptr:*i64 top_p_ptr:*fp32 min_p_ptr:*fp32 kept_mass_ptr:*fp32"
    add(
        "sample", "_truncate_kernel", "bf16, banned ids",
        f"{row.format('bf16').replace(' argmax_ptr:*i32', '')} {drawn} {limits} {sizes}",
        {"HAS_BANNED": True} | blocks, tile, aligned="stride vocab_size", instructions=(wide_load,),
    )  # fmt: skip

    tile = grpo_loss._launch_config(VOCAB)
    for dtype, full in (("bf16", True), ("fp32", False)):
        # full: everything that may be asked for at once; else the plain on-policy loss at temperature 1
        pointers = f"logits_ptr:*{dtype} targets_ptr:*i64"
        extra = " tau_ptr:*fp32 banned_ptr:*u8" if full else ""
        absent = {} if full else {"tau_ptr": None, "banned_ptr": None}
        flags = {"HAS_TAU": full, "HAS_BANNED": full}
        what = f"{dtype}{', temperature, banned ids' * full}"
        add(
            "grpo_loss", "_forward_kernel", what,
            f"{pointers}{extra} mask_ptr:*u8 stats_ptr:*fp32 stride:i64 num_rows:i32 vocab_size:i32",
            flags | absent | {"HAS_MASK": True}, tile,
            aligned="stride vocab_size", instructions=(r"ex2\.approx", wide_load), spot=full,
        )  # fmt: skip
        add(
            "grpo_loss", "_backward_kernel", what + ", entropy" * full,
            f"{pointers}{extra} stats_ptr:*fp32 g_ptr:*fp32 {'h_ptr:*fp32' if full else ''} dlogits_ptr:*{dtype} "
            "stride:i64 dstride:i64 num_rows:i32 vocab_size:i32 num_columns:i32",
            flags | absent | {"HAS_H": full} | ({} if full else {"h_ptr": None}), tile,
            aligned="stride dstride vocab_size num_columns",
            instructions=(r"ex2\.approx", wide_load, r"st\.global\S*\.v[24]"), spot=full,
        )  # fmt: skip

    for what, dtype, (tokens, seqs), group, dim in (
        ("decode, 7 heads a group, D 128", "bf16", (64, 64), 7, 128),
        ("decode, 8 heads a group, D 64", "fp16", (64, 64), 8, 64),
        ("prefill, 7 heads a group, D 128", "bf16", (2048, 4), 7, 128),
    ):
        add(
            "paged_attention", "_attention_kernel", what,
            f"q_ptr:*{dtype} k_ptr:*{dtype} v_ptr:*{dtype} tables_ptr:*i32 context_ptr:*i32 cu_ptr:*i32 "
            f"out_ptr:*{dtype} scale_log2e:fp32 num_seqs:i32 q_stride:i64 q_head_stride:i64 block_stride:i64 "
            "slot_stride:i64 kv_head_stride:i64 table_stride:i64",
            {"BLOCK_SIZE": 16, "GROUP": group, "DIM": dim},
            paged_attention._launch_config(tokens, seqs, group, dim),
            aligned="q_stride q_head_stride block_stride slot_stride kv_head_stride",
            instructions=(r"mma", r"cp\.async"), spot=dtype == "bf16" and tokens == seqs,
        )  # fmt: skip
    add(
        "kv_cache", "_write_kernel", "bf16, 4 heads of 128",
        "k_ptr:*bf16 v_ptr:*bf16 k_cache_ptr:*bf16 v_cache_ptr:*bf16 slot_ptr:*i64 k_stride:i64 v_stride:i64",
        {"WIDTH": 512, "BLOCK": 512}, {"num_warps": 4},
        aligned="k_stride v_stride", instructions=(wide_load,), spot=True,
    )  # fmt: skip
    modules = {"sample": sample, "grpo_loss": grpo_loss, "paged_attention": paged_attention, "kv_cache": kv_cache}
    for configuration in found:
        assert hasattr(modules[configuration.op], configuration.kernel), configuration
    return found


def compiled(configuration: Configuration, capability: int) -> dict[str, Any]:
    """Registers, stack and shared memory in bytes, and the PTX instructions that were asked for but are not there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    import thyme.kernels  # noqa: F401  the package must exist before its modules are asked for

    kernel = getattr(sys.modules[f"thyme.kernels.{configuration.op}"], configuration.kernel)
    types = configuration.types
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    unknown = (set(types) | set(configuration.constants)) ^ set(kernel.arg_names)
    assert not unknown, f"{configuration.op}.{configuration.kernel}: arguments {sorted(unknown)}"
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if types.get(name, "").startswith("*") or name in configuration.aligned
    }
    source = ASTSource(kernel, signature, configuration.constants, aligned)
    out = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=configuration.options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(out.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    use = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", text)}
    missing = [
        wanted for wanted in configuration.instructions if capability == 90 and not re.search(wanted, out.asm["ptx"])
    ]
    return {"registers": use["REG"], "stack": use["STACK"], "shared": out.metadata.shared, "missing": missing}


def failures(result: dict[str, Any], capability: int) -> list[str]:
    found = [f"{result['stack']} bytes of stack: registers spill"] if result["stack"] else []
    if result["shared"] > SHARED_LIMIT[capability]:
        found.append(f"{result['shared']} bytes of shared memory, {SHARED_LIMIT[capability]} there are")
    return found + [f"no {wanted} in the PTX" for wanted in result["missing"]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--targets", default="sm_90", help="comma-separated; all but sm_90 compile one configuration an op or two"
    )
    parser.add_argument("--no-cache", action="store_true", help="compile everything")
    options = parser.parse_args()
    capabilities = [int(target.removeprefix("sm_")) for target in options.targets.split(",")]
    if unknown := set(capabilities) - set(SHARED_LIMIT):
        parser.error(f"--targets: sm_{min(unknown)} is not one of {', '.join(f'sm_{known}' for known in SHARED_LIMIT)}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: kernels would be interpreted, not compiled")

    import triton

    sources = (
        b"".join(path.read_bytes() for path in sorted((ROOT / "kernels").glob("*.py"))) + Path(__file__).read_bytes()
    )
    digest = hashlib.sha256(sources + triton.__version__.encode()).hexdigest()[:16]
    cache = ROOT / ".cache/gate" / f"{digest}.json"
    results = json.loads(cache.read_text()) if cache.exists() and not options.no_cache else {}

    failed = 0
    print(f"{'op':16}{'kernel':18}{'target':8}{'regs':>5}{'shared':>8}  configuration")
    for capability in capabilities:
        for configuration in configurations():
            if capability != 90 and not configuration.spot:
                continue
            key = f"{configuration.op}.{configuration.kernel} ({configuration.what}) sm_{capability}"
            result = results[key] = results.get(key) or compiled(configuration, capability)
            print(
                f"{configuration.op:16}{configuration.kernel:18}sm_{capability:<5}{result['registers']:>5}"
                f"{result['shared']:>8}  {configuration.what}; {_tile(configuration)}"
            )
            for failure in failures(result, capability):
                failed += 1
                print(f"  FAILED: {failure}")
    cache.parent.mkdir(parents=True, exist_ok=True)
    for stale in cache.parent.glob("*.json"):
        stale.unlink()
    cache.write_text(json.dumps(results, indent=1))
    print(f"gate: {failed} failures" if failed else "gate: all within limits, no spills")
    return 1 if failed else 0


def _tile(configuration: Configuration) -> str:
    shown = configuration.constants | configuration.options
    names = ("ROWS", "BLOCK", "QUERIES", "KEYS", "num_warps", "num_stages")
    return " ".join(f"{name.lower()} {shown[name]}" for name in names if name in shown)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
