"""The tests that claim equal bits, on the code paths that numpy's and torch's sums take on other processors.

Which instructions OpenBLAS (numpy, and with it Triton's interpreter), MKL and torch's own loops use is decided by the
processor that the tests happen to run on; each rounds a sum in another order. A claim of equal bits has to hold on all
of them, so it may rest only on sums whose order is ours, or on inputs whose sums are exact.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

BITS = {
    "tests/test_native_attention.py": [
        "test_threads_do_not_change_bits",
        "test_chunked_prefill_gives_the_same_bits",
    ],
    "tests/kernels/test_grpo_loss.py": [
        "test_tokens_in_another_order_in_parts_and_doubled",
    ],
    "tests/kernels/test_kv_cache.py": [
        "test_the_bits_are_those_of_the_separate_steps",
        "test_a_token_does_not_know_its_batch_in_triton",
        "test_codes_are_those_of_what_a_cache_would_keep",
    ],
    "tests/kernels/test_linear_grpo_loss.py": [
        "test_on_policy_the_ratio_is_one",
        "test_no_temperature_other_than_one",
        "test_the_host_says_how_many_rows_count",
    ],
    "tests/kernels/test_linear_logprob.py": [
        "test_masked_rows_may_hold_anything",
        "test_a_row_does_not_know_its_batch",
        "test_adding_a_constant_to_the_logits_of_a_row_changes_nothing",
        "test_a_frozen_head_costs_no_matmul",
        "test_the_bits_are_those_over_stored_logits",
    ],
    "tests/kernels/test_mrope.py": [
        "test_a_token_does_not_know_its_batch[triton]",
    ],
    "tests/kernels/test_packed_product.py": [
        "test_a_row_has_its_bits_whatever_lies_beside_it",
    ],
    "tests/kernels/test_paged_attention.py": [
        "test_a_sequence_does_not_know_its_batch_in_triton",
        "test_a_shared_prefix_changes_no_step_of_the_sum",
        "test_its_bits_are_those_of_a_widened_cache",
    ],
    "tests/kernels/test_rmsnorm.py": [
        "test_a_row_does_not_know_its_batch",
        "test_the_weight_gradient_is_summed_in_a_fixed_order",
    ],
    "tests/kernels/test_sample.py": [
        "test_a_lone_row_has_the_same_bits_under_several_threads",
        "test_a_row_does_not_know_its_batch[triton-plain]",
        "test_the_first_update_is_on_policy_bit_for_bit",
    ],
    "tests/kernels/test_swiglu.py": [
        "test_a_row_does_not_know_its_batch",
    ],
    "tests/kernels/test_token_logprobs.py": [
        "test_a_row_does_not_know_its_batch",
        "test_a_row_does_not_know_the_threads[native]",
    ],
    "tests/engine/test_deterministic.py": [
        "test_bits_do_not_depend_on_the_schedule[prefill_chunk=7]",
        "test_bits_do_not_depend_on_the_number_of_rows",
    ],
    "tests/engine/test_fp8.py": [
        "test_a_whole_prompt_and_its_chunks_see_the_same_cache",
        "test_deterministic_holds",
        "test_both_under_deterministic",
        "test_copies_take_their_scales_along",
    ],
    "tests/engine/test_groups.py": [
        "test_drawn_seeds_are_recorded_and_replay",
    ],
    "tests/engine/test_speculation.py": [
        "test_random_work_has_the_bits_of_none",
        "test_phases_of_ones_own",
    ],
    "tests/model/test_attention.py": [
        "test_slices_of_a_fused_projection_equal_their_copies",
    ],
    "tests/model/test_packed_decoder.py": [
        "test_it_is_the_modules",
        "test_all_layers_in_one_call_are_the_modules",
    ],
    "tests/model/test_layers.py": [
        "test_without_gradients_the_arithmetic_is_the_same",
    ],
    "tests/train/test_attention.py": [
        "test_forward_is_the_engines_and_gradient_packed_attentions",
    ],
    "tests/train/test_rl.py": [
        "test_training_computes_the_log_probs_that_the_engine_recorded",
    ],
    "tests/train/test_shared_prefixes.py": [
        "test_log_probs_before_the_update_and_of_the_reference_are_those_of_every_rollout",
    ],
}
"""File to its tests that claim equal bits; one case of a test where the others cost much and add little."""

PROCESSORS = {
    "Haswell": ("avx2", {"avx2", "fma"}),
    "Zen": ("default", {"avx2", "fma"}),
    "SkylakeX": ("avx512", {"avx512f", "avx512bw", "avx512dq", "avx512vl"}),
}
"""What OpenBLAS takes the processor for: what torch then does, and what the real processor must be able to do."""


def _flags() -> set[str]:
    """What /proc/cpuinfo says that this processor can do."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return {flag for line in lines if line.startswith("flags") for flag in line.partition(":")[2].split()}


def _runs_here(core: str) -> bool:
    return _flags() >= PROCESSORS[core][1]


def test_the_listed_tests_exist() -> None:
    for path, names in BITS.items():
        text = (ROOT / path).read_text()
        missing = [name for name in names if f"def {name.partition('[')[0]}(" not in text]
        assert not missing, f"{path} has no test {missing}: it was renamed, or the list is wrong"


@pytest.mark.soak
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("core", [core for core in PROCESSORS if _runs_here(core)])
def test_equal_bits(core: str, threads: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Cores whose instructions this processor lacks are left out, and said to be."""
    environment = {
        "OPENBLAS_CORETYPE": core,
        "ATEN_CPU_CAPABILITY": PROCESSORS[core][0],
        "OPENBLAS_NUM_THREADS": str(threads),
        "THYME_TEST_THREADS": str(threads),
    }
    tests = [f"{path}::{name}" for path, names in BITS.items() for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not soak and not gpu", *tests]
    run = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    left_out = ", ".join(other for other in PROCESSORS if not _runs_here(other)) or "none"
    with capsys.disabled():
        print(
            f"\n{core}, {threads} threads: {run.stdout.splitlines()[-1]}; cores left out on this processor: {left_out}"
        )
