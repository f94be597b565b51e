"""The compile gate, in a child process that compiles (this one interprets), and what makes a kernel compile twice."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import configurations
import counted
import gate
import model
import pytest

ROOT = Path(__file__).resolve().parents[2]


def child(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
    )


WITH_KERNELS = {path.stem for path in (ROOT / "kernels").glob("*.py") if "@triton.jit" in path.read_text()}
MODULES = sorted(WITH_KERNELS - {"attention_tiles"})  # which only has what the kernels of others call


def check_table(output: str, module: str) -> None:
    lines = output.partition(f"\n{module}, sm_90\n{counted.header()}\n")[2].partition("\n\n")[0].splitlines()
    rows = [counted.parsed(line) for line in lines if line[0] not in " g"]
    assert rows
    for row in rows:
        assert 0 < row.registers <= 255, row
        assert 0 <= row.shared <= 232_448, row
        assert 0 < row.least <= row.most, row


@pytest.mark.parametrize("module", MODULES)
def test_every_kernel_that_is_launched_is_compiled(module: str) -> None:
    everyday = [one for one in configurations.configurations() if one.module == module and not one.rare]
    launched = configurations.launched(module)
    assert launched
    assert {one.kernel for one in everyday} == launched


def test_at_most_sixteen_configurations_an_op() -> None:
    everyday = [one for one in configurations.configurations() if not one.rare]
    per_op = Counter(one.op for one in everyday)
    assert max(per_op.values()) <= 16, per_op
    assert {one.op for one in everyday if one.spot} == set(per_op)


def test_every_configuration_compiles_for_sm_90() -> None:
    done = child("bench/gate.py")
    assert done.returncode == 0, done.stdout + done.stderr
    for module in MODULES:
        check_table(done.stdout, module)
    assert "gate: all within limits, no spills" in done.stdout


@pytest.mark.parametrize(
    ("module", "kernel", "what", "most"),
    [
        ("sample_cut", "_candidates_kernel", "bf16, 151665", 12.0),
        ("token_logprobs", "_backward_kernel", "bf16, entropy", 31.5),  # with bans in the block, and its target
        ("row_stats", "_partial_kernel", "bf16, 151665 ids", 17.5),  # with bans in the block: 13.9 without
    ],
)
def test_rows_of_logits_issue_few_instructions(module: str, kernel: str, what: str, most: float) -> None:
    done = child("bench/sass.py", module, kernel, "--what", what)
    (each,) = re.findall(r"to ([\d.]+) for each of", done.stdout)
    assert float(each) <= most, done.stdout
    assert "denormal repairs 0" in done.stdout
    assert "votes 0" in done.stdout


@pytest.mark.soak
def test_rare_configurations_compile_for_sm_90() -> None:
    done = child("bench/gate.py", "--rare")
    assert done.returncode == 0, done.stdout + done.stderr
    for module in MODULES:
        check_table(done.stdout, module)


@pytest.mark.soak
@pytest.mark.parametrize("target", ["sm_80", "sm_100", "sm_120"])
def test_the_other_targets(target: str) -> None:
    done = child("bench/gate.py", "--targets", target)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"swiglu, {target}\n" in done.stdout


def test_kernels_that_share_bits_multiply_alike() -> None:
    """Prefill, prefix and decode for any batch: one instruction, one layout of products, one order of a row's sum."""
    script = """
import re, sys
sys.path.insert(0, "bench")
import gate
for one in gate.configurations():
    if one.what.endswith("for any batch") and one.types["q_ptr"] == "*bf16" and one.constants["DIM"] == 128:
        asm = gate.built(one, 90).asm
        layouts = re.findall(r"= (#ttg\\.nvidia_mma<.*>)", asm["ttgir"])
        cache = "/fp8" * (one.types["k_ptr"] == "*fp8e4nv")
        print(one.kernel + cache, *sorted(layouts), sorted(set(re.findall(r"wgmma\\.mma_async\\S*", asm["ptx"]))))
"""
    done = child("-c", script)
    assert done.returncode == 0, done.stderr
    found = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    for cache in ("", "/fp8"):
        alike = {name: found.pop(name + cache) for name in ("_prefill_kernel", "_prefix_kernel", "_decode_kernel")}
        assert len(set(alike.values())) == 1, alike
        assert "wgmma" in alike["_decode_kernel"]
    assert not found


def test_the_gate_sees_what_it_guards_against() -> None:
    """A tile far too wide for one warp must come out as spills, a missing instruction as missing."""
    script = """
import dataclasses, sys
sys.path.insert(0, "bench")
import gate
plain = next(c for c in gate.configurations() if c.op == "token_logprobs" and c.kernel == "_backward_kernel" and c.spot)
wide = dataclasses.replace(plain, options={"num_warps": 1}, instructions=("wgmma",),
    constants=plain.constants | {"BLOCK": 4096})
print(*gate.failures(gate.compiled(wide, 90), 90), sep="\\n")
"""
    done = child("-c", script)
    assert "bytes of stack: registers spill" in done.stdout, done.stdout + done.stderr
    assert "no wgmma in the PTX" in done.stdout


def test_too_much_shared_memory_fails() -> None:
    fine = {"registers": 64, "stack": 0, "shared": 166_912, "missing": [], "misfits": [], "moved_twice": []}
    assert gate.failures(fine, 80) == []
    assert gate.failures(fine | {"shared": 200_000}, 90) == []
    assert gate.failures(fine | {"shared": 200_000}, 80) == ["200000 bytes of shared memory, 166912 there are"]


ROW = counted.Row(
    op="rmsnorm",
    kernel="_forward_kernel",
    what="bf16, 3584, for rollout",
    registers=64,
    shared=1_024,
    programs=4,
    waits="1,2",
    least=9.6,
    most=12.0,
    exps=1.0,
    denormal=0,
    narrow=0,
    votes=0,
    shuffles=8,
    barriers=2,
)


def configuration(**more: Any) -> configurations.Configuration:
    common = {"module": "rmsnorm", "op": ROW.op, "kernel": ROW.kernel, "what": ROW.what, "constants": {}, "options": {}}
    return configurations.Configuration(**common | {"types": {"x_ptr": "*bf16"}} | more)


@pytest.mark.parametrize(
    ("worse", "text"),
    [
        ({"most": 12.1}, "most 12.1, 12 before"),
        ({"least": 9.7}, "least 9.7, 9.6 before"),
        ({"programs": 3}, "an SM 3, 4 before"),
        ({"narrow": 2}, "narrow 2, 0 before"),
        ({"denormal": 34}, "repairs 34, 0 before"),
        ({"votes": 1}, "votes 1, 0 before"),
        ({"barriers": 3}, "bar 3, 2 before"),
        ({"waits": "0,2"}, "waits 0,2, 1,2 before"),
        ({"registers": 72, "shared": 2_048}, None),  # what of them counts is how many programs fit
        ({"most": 11.9, "programs": 5, "waits": "2,2"}, None),
    ],
)
def test_a_kernel_may_not_get_worse_than_what_is_kept(
    worse: dict[str, Any], text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counted, "FOLDER", tmp_path)
    assert gate.against_kept("3.6.0", "rmsnorm", [ROW]) == []  # a version of which nothing is kept
    counted.keep("3.6.0+git", "rmsnorm", [counted.line(ROW, model.Work(shape="1 x 1", elements=1), "budget 14")])
    assert gate.against_kept("3.6.0", "rmsnorm", [ROW]) == []
    changed = dataclasses.replace(ROW, **worse)
    name = ", ".join(ROW.key)
    assert gate.against_kept("3.6.0", "rmsnorm", [changed]) == ([f"{name}: {text}"] if text else [])
    assert bool(gate.better("3.6.0", "rmsnorm", [changed])) == ("most" in worse and text is None)


def test_rows_that_are_kept_are_those_that_are_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counted, "FOLDER", tmp_path)
    counted.keep("3.6.0", "rmsnorm", [counted.line(ROW, model.Work(), "")])
    other = dataclasses.replace(ROW, what="fp32, 3584")
    assert gate.against_kept("3.6.0", "rmsnorm", [ROW, other]) == [
        "rmsnorm, _forward_kernel, fp32, 3584: shipped, but not kept; run gate.py --update"
    ]
    assert gate.against_kept("3.6.0", "rmsnorm", []) == [
        "rmsnorm, _forward_kernel, bf16, 3584, for rollout: kept, but not shipped; run gate.py --update"
    ]


@pytest.mark.parametrize("version", ["3.6.0", "3.7.1"])
@pytest.mark.parametrize("module", MODULES)
def test_what_is_kept_of_each_version_is_what_is_shipped(module: str, version: str) -> None:
    shipped = [one for one in configurations.configurations() if one.module == module and not one.rare]
    assert list(counted.kept(version, module)) == [(one.op, one.kernel, one.what) for one in shipped]


@pytest.mark.parametrize(
    ("more", "row", "rules"),
    [
        ({}, {"denormal": 9, "narrow": 9}, set()),
        ({"budget": 12}, {}, set()),
        ({"budget": 11.5}, {"denormal": 9, "narrow": 9}, {"budget", "denormal", "narrow"}),
        ({"budget": 12, "types": {"x_ptr": "*fp32"}}, {"narrow": 9}, set()),
        ({"options": {"num_stages": 3}}, {"waits": "0,2"}, {"waits"}),
        ({"options": {"num_stages": 2}}, {"waits": "0,2"}, set()),
        ({"options": {"num_stages": 3}}, {"waits": "-"}, set()),
    ],
)
def test_the_rules_of_a_kernel(more: dict[str, Any], row: dict[str, Any], rules: set[str]) -> None:
    assert set(gate.over(configuration(**more), dataclasses.replace(ROW, **row))) == rules


def test_ops_of_one_kernel_and_configuration_are_compiled_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "compiled", lambda one, capability: {"op": one.op})
    results = gate._Results("0", forget=True)
    assert [results.of(configuration(op=op), 90)["op"] for op in ("rmsnorm", "add_rmsnorm")] == [
        "rmsnorm",
        "add_rmsnorm",
    ]


def test_times_at_a_shape() -> None:
    """The figures of the H100: 132 multiprocessors, four instructions of a warp each clock, 16 exponentials."""
    work = model.Work(shape="8192 x 152064", elements=8_192 * 152_064, num_bytes=2 * 8_192 * 152_064, flops=989e9)
    row = dataclasses.replace(ROW, most=27.6)
    assert counted.times(row, work) == (
        "8192 x 152064, ms: issue 1.5, exp2 0.347, bytes H100 0.826, H200 0.579, matmul 1.25"
    )
    assert counted.times(row, model.Work()) == ""


# Runs the gate on one module, with a better row kept of one of its kernels, then keeps what there is.
RATCHET = """
import pathlib, re, sys
sys.path[:0] = [".", "bench"]
import counted, gate
real = counted.path("3.6.0", "swiglu").read_text()
counted.FOLDER = pathlib.Path(sys.argv.pop())
sys.argv[1:] = ["--module", "swiglu"]
import triton
file = counted.path(triton.__version__, "swiglu")
file.parent.mkdir(parents=True)
file.write_text(re.sub(r"(_backward_kernel .* 18944 .* )\\d+\\.\\d( +\\d+\\.\\d +\\d+ +0 )", r"\\1 9.9\\2", real))
print(gate.main())
sys.argv.append("--update")
print(gate.main(), file.read_text().count("_kernel"))
"""


def test_the_gate_fails_with_both_figures_until_the_row_is_kept(tmp_path: Path) -> None:
    done = child("-c", RATCHET, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert re.search(r"FAILED: swiglu, _backward_kernel, bf16, 18944: most \d\d\.\d, 9\.9 before", done.stdout)
    assert "gate: 1 failures\n1\n" in done.stdout
    assert done.stdout.endswith("gate: all within limits, no spills\n0 4\n")


# One line of each kind as Triton 3.6 prints it, types shortened.
HOST_COPY = (
    "ttng.async_tma_copy_global_to_local %hidden[%a, %b] %c, %d, %true : !tt.tensordesc<tensor<128x64xbf16, #shared>>, "
    "!ttg.memdesc<1xi64, #bar> -> !ttg.memdesc<{0}xbf16, #shared, #smem, mutable>"
)
MADE = """
%c64_i32 = arith.constant 64 : i32
%c256_i32 = arith.constant 256 : i32
ttng.tensormap_create %w_7, %w_ptr, [%c64_i32, %c256_i32], [%n, %v], [%s], [%one, %one] {{elem_type = 10 : i32}} : ()
%w_9 = ttng.reinterpret_tensor_descriptor %w_7 : !tt.ptr<i8> to !tt.tensordesc<tensor<{0}xbf16, #shared1>>
"""


def test_a_bulk_copy_brings_what_its_destination_holds() -> None:
    """Warp specialization halves a tile, and the box of the host's descriptor does not follow."""
    assert gate.misfits(HOST_COPY.format("128x64")) == gate.misfits(HOST_COPY.format("1x128x64")) == []
    assert gate.misfits(HOST_COPY.format("64x64")) == ["copy of 128x64 into 64x64"]
    assert gate.misfits(MADE.format("256x64")) == []
    assert gate.misfits(MADE.format("64x256")) == ["descriptor %w_7 of 256x64 into 64x256"]
    fine = {"registers": 64, "stack": 0, "shared": 0, "missing": [], "moved_twice": []}
    assert gate.failures(fine | {"misfits": ["copy of 128x64 into 64x64"]}, 90) == ["bulk copy of 128x64 into 64x64"]


SECOND_HALF = """
    partition1(%num_rows: i32) num_warps(4) {
      %c64_i32_12 = arith.constant {async_task_id = array<i32: 2>} 64 : i32
      %z = arith.addi %61, %c64_i32_12 {async_task_id = array<i32: 2>} : i32
      %row = tt.make_range {async_task_id = array<i32: 2>, end = 128 : i32, start = 64 : i32} : tensor<64xi32, #blocked>
      %row_27 = tt.splat %ROW {async_task_id = array<i32: 2>} : i32 -> tensor<64xi32, #blocked>
      %row_28 = arith.addi %row_27, %row {async_task_id = array<i32: 2>} : tensor<64xi32, #blocked>
"""


def test_rows_of_a_specialized_half_are_moved_on_once() -> None:
    """As Triton 3.6 compiled the fused head until a GPU showed that half of its rows were wrong, and as it does now."""
    (found,) = gate.moved_twice(SECOND_HALF.replace("%ROW", "%z"))
    assert found.startswith("%row_28: a range from 64 on")
    assert gate.moved_twice(SECOND_HALF.replace("%ROW", "%61")) == []


def test_the_gate_refuses_to_gate_the_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "bench/gate.py"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "TRITON_INTERPRET=1 is set" in done.stderr


def test_what_the_7b_model_launches_is_what_is_compiled() -> None:
    done = child("bench/launches.py")
    assert done.returncode == 0, "\n".join(line for line in done.stdout.splitlines() if "NOT" in line) + done.stderr


# Launches each kernel's Python side on CPU tensors with a recorder in the kernel's place, and asks Triton's own binder
# for what it would look the compiled kernel up under.
KEYS = """
import json, sys
sys.path.insert(0, "bench")
import launches
import torch
from thyme.kernels import grpo_loss, kv_cache, mrope, paged_attention, rmsnorm, sample
from thyme.kernels import shared_prefix, swiglu, token_logprobs

recorders = launches.record()
for n in (1, 2, 3, 16, 17, 64, 1000):
    for clip, kl, tau in ((0.1, 0.5, 1.0), (0.3, 0.1, 0.7)):
        logits = torch.randn(n, 320, requires_grad=True)
        ones = torch.ones(n)
        config = grpo_loss.GrpoLossConfig(clip_eps_low=clip, clip_eps_high=clip, kl_coef=kl)
        out, _ = grpo_loss.grpo_loss_triton(
            logits, torch.zeros(n, dtype=torch.int64), ones, ones, temperature=ones * tau, config=config,
            cu_seqlens=torch.tensor([0, n], dtype=torch.int32)
        )
        out.backward()
for n in (1, 2, 16, 33):
    for top_k in (1, 16, 50):
        index = torch.arange(n)
        more = {"seed": index, "position": index, "top_k": top_k, "bitwise_logprobs": True}
        sample.sample_triton(torch.randn(n, 320), torch.ones(n), **more)
    token_logprobs.token_logprobs_triton(torch.randn(n, 320), index)  # without temperature or mask: the same binary
    tail = torch.arange(n + 1)[1:]  # and for vectors that begin anywhere
    token_logprobs.token_logprobs_triton(
        torch.randn(n, 320), tail, temperature=torch.ones(n + 1)[1:], mask=torch.ones(n + 1, dtype=torch.bool)[1:]
    )
    room = torch.randn(n + 1, 321, requires_grad=True)
    for view in (room[1:], room[:n, 1:], room[:n, :320], room[1:, 3:304]):  # and for logits that do
        more = {"seed": index, "position": index, "bitwise_logprobs": True}
        sample.sample_triton(view, torch.ones(n + 1)[1:], top_p=0.9, **more | {"seed": tail})
        token_logprobs.token_logprobs_triton(view, index)[0].sum().backward()
for n in (1, 2, 16, 33):
    for width in (1, 7, 16, 64, 512):
        kv = torch.zeros(40, 16, 2, 16)
        groups = torch.tensor([0, n], dtype=torch.int32)
        for hint in (None, 1):
            paged_attention.paged_attention_triton(
                torch.zeros(n, 4, 16), kv, kv, torch.zeros(n, width, dtype=torch.int32),
                torch.ones(n, dtype=torch.int32), torch.arange(n + 1, dtype=torch.int32), scale=0.5,
                max_query_len=hint,
            )
        paged_attention.paged_attention_triton(
            torch.zeros(n, 4, 16), kv, kv, torch.zeros(n, width, dtype=torch.int32),
            torch.ones(n, dtype=torch.int32), torch.arange(n + 1, dtype=torch.int32), scale=0.7,
            shared=shared_prefix.SharedPrefix(groups, torch.zeros(1, dtype=torch.int32)),
        )
weight = torch.ones(64, requires_grad=True)
for length in (3, 4, 16, 17):
    x = torch.randn(2, length, 64, requires_grad=True)
    out, total = rmsnorm.add_rmsnorm_triton(x, x, weight, 1e-6)
    (out.sum() + total.sum()).backward()
for n in (1, 2, 16, 17, 300, 5000):
    x = torch.randn(n, 64, requires_grad=True)
    for eps in (1e-6, 1e-5):
        out, total = rmsnorm.add_rmsnorm_triton(x, x, weight, eps)
        (swiglu.swiglu_triton(out).sum() + total.sum()).backward()
    with torch.no_grad():
        heads, slots = out.view(n, 4, 16), torch.arange(n)
        cos, sin = mrope.mrope_tables(slots[None], torch.ones(8))
        mrope.mrope_triton(heads, cos, sin)
        k_cache, v_cache = torch.zeros(2, 400, 16, 1, 16)
        kv_cache.mrope_write_kv_triton(heads, cos, sin, k_cache, v_cache, slots)
print(json.dumps({name: len(recorder.launches) for name, recorder in recorders.items() if recorder.launches}))
"""


def test_nothing_recompiles_for_another_length_or_hyperparameter() -> None:
    done = child("-c", KEYS)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(done.stdout)
    ops = {"kv_cache", "mrope", "policy_tokens", "rmsnorm", "swiglu"}
    ops |= {"row_stats", "sample_blocks", "sample_cut", "token_logprobs"}
    ops |= {f"attention_{name}" for name in ("decode", "merge", "prefill", "prefix")}
    assert {name.split(".")[0] for name in counts} == ops  # linear_logprob counts its own
    assert counts.pop("attention_decode._decode_kernel") == 2  # with a shared prefix, and without
    assert set(counts.values()) == {1}, counts
