"""The CUDA kernels, compiled by g++ and run on the CPU: see csrc/README.md and tests/cuda_host/runtime/runtime.h."""

from __future__ import annotations

import itertools
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_host import build, cubin
from sequence.sequences import jagged, layer_arguments, loop_of_cells, packed


def needs_host(test):
    return pytest.mark.slow(pytest.mark.skipif(build.why_not() is not None, reason=build.why_not() or "")(test))


# How many schedules: sanitizers find a fault in any of them, the plain build only where the order shows it. Under no
# more than these the planted faults have to be caught.
SEEDS = {"plain": 4, "asan": 2, "tsan": 1}


def check_run(program, variant: build.Variant, *arguments: str) -> None:
    done = build.run(program, variant, *arguments)
    if done.returncode != 0:
        pytest.fail(f"{program.name} {' '.join(arguments)}: exit status {done.returncode}\n{report_of(done.stdout)}")


def report_of(output: str) -> str:
    """The part of an output that says what went wrong: failed checks, and a sanitizer's first report."""
    lines = output.splitlines()
    reports = re.compile(r"ERROR: \w+Sanitizer|WARNING: Thr|runtime error")
    start = next((i for i, line in enumerate(lines) if reports.search(line)), 0)
    shown = [line for line in lines if line.startswith("FAIL")][:10] + lines[start : start + 60]
    return "\n".join(line[:300] for line in shown)


@pytest.fixture(params=["tsan", "asan", "plain"])  # the slowest first
def variant(request: pytest.FixtureRequest) -> build.Variant:
    return build.VARIANTS[request.param]


@needs_host
def test_runtime_and_wrappers(variant: build.Variant) -> None:
    check_run(build.wrappers_program(variant), variant, "--seeds", str(SEEDS[variant.name]))


@needs_host
def test_launches_ask_for_what_they_need() -> None:
    check_run(build.launch_program(), build.PLAIN)


@needs_host
@pytest.mark.parametrize("part", ["mainloop", "forward", "backward", "recurrence"])
def test_kernels(part: str, variant: build.Variant) -> None:
    check_run(build.kernels_program(variant), variant, "--seeds", str(SEEDS[variant.name]), part)


def test_what_sanitizers_do_not_see_of_bfloat16_they_see_of_half() -> None:
    everything = set(build.kernel_sources(build.PLAIN))
    assert everything == {*build.KERNELS.rglob("*.cu"), *build.KERNELS.rglob("*.cpp")}
    for variant in (build.ASAN, build.TSAN):
        seen = set(build.kernel_sources(variant))
        assert seen < everything
        assert {f.with_name(f.name.replace("_bfloat16.", "_half.")) for f in everything - seen} <= seen


# ---- tests of the tests: each planted fault is caught, by these builds at least ------------------------------------

# fault: (tests to run, {build: what its report must say}). The plain build says which element is wrong or what was
# misused; a sanitizer must name the kernel's file and line.
WRONG = r"FAIL .* expected"
IN_BACKWARD = r"(backward_tiled|grad_z)\.cuh:\d+"
IN_GEMV = r"backward_gemv\.cuh:\d+"
IN_FORWARD_GEMV = r"forward_gemv\.cuh:\d+"
IN_TILED = r"forward_tiled\.cuh:\d+"
IN_EPILOGUE = r"(epilogue|operand)\.cuh:\d+"
IN_OPERAND = r"operand\.cuh:\d+"
IN_RESIDENT = r"(resident\w*|exchange)\.cuh:\d+"
IN_EXCHANGE = r"exchange\.cuh:\d+"
IN_WGMMA = r"\w*wgmma\.cuh:\d+"
IN_RECURRENCE = r"sequence/\w+\.(cuh|cu):\d+"
AT_EXIT = r"scribble\(.*\n.* thread_main"  # with an arrival of which the sanitizer keeps no stack
FAULTS = {
    "no_gemv_row_bound": ("forward_gemv", {"asan": IN_FORWARD_GEMV}),
    "no_gemv_k_bound": ("forward_gemv", {"plain": WRONG, "asan": IN_FORWARD_GEMV}),
    "no_gemv_barrier": ("forward_gemv", {"plain": WRONG, "tsan": IN_FORWARD_GEMV}),
    "no_wait_for_previous_launch": ("forward_gemv", {"plain": "without a wait for the previous launch"}),
    "cublas_no_column_bound": ("forward_cublas", {"asan": r"forward_cublas\.cuh:\d+"}),
    "shared_memory_too_small": ("forward_tiled_16x64", {"plain": IN_TILED + ": the kernel uses [0-9]+ bytes"}),
    "hx_forgotten": ("forward_tiled_16x64", {"plain": WRONG}),
    "no_output_row_bound": ("forward_tiled_16x64", {"asan": IN_TILED}),
    "no_output_column_bound": ("forward_tiled_16x64", {"asan": IN_EPILOGUE}),
    "misaligned_vector_store": ("forward_tiled_16x64", {"asan": IN_EPILOGUE}),
    "no_cluster_sync": ("forward_tiled_16x64", {"plain": WRONG, "tsan": IN_TILED}),
    "no_cluster_exit_sync": ("forward_tiled_16x64", {"plain": "has returned", "tsan": IN_TILED}),
    "counter_not_reset": ("forward_tiled_16x64", {"plain": "a counter is not left at zero"}),
    "every_block_adds_up": ("forward_tiled_16x64", {"tsan": IN_TILED}),
    "backward_no_barrier_between_tiles": (
        "backward_tiled_mid",
        {"plain": WRONG, "tsan": r"(engine|operand|mainloop|traffic)\.\w+:\d+"},
    ),
    "backward_no_store_row_bound": ("backward_tiled_small", {"asan": IN_BACKWARD}),
    "backward_no_store_column_bound": ("backward_tiled_small", {"asan": IN_BACKWARD}),
    "backward_misaligned_store": ("backward_tiled_small", {"asan": IN_BACKWARD}),
    "backward_every_column_writes_bias": ("backward_tiled_small", {"tsan": IN_BACKWARD}),
    "grad_z_no_bound": ("backward_tiled_large", {"asan": IN_BACKWARD}),
    "grad_z_no_barrier": ("backward_wgmma_128", {"plain": WRONG, "tsan": IN_BACKWARD}),
    "backward_matrix_not_switched": ("backward_wgmma_128", {"plain": WRONG}),
    "backward_kind_not_switched": ("backward_wgmma_128", {"plain": WRONG}),
    "backward_same_box_twice": ("backward_wgmma_128", {"plain": WRONG}),
    "backward_zeros_left": ("backward_without_hx", {"plain": WRONG}),
    "backward_bias_row_left_out": ("backward_wgmma_128", {"plain": WRONG}),
    "backward_zeros_not_exact": ("backward_without_hx", {"plain": WRONG}),
    "gemv_no_row_bound": ("backward_gemv", {"asan": IN_GEMV}),
    "gemv_no_column_bound": ("backward_gemv", {"asan": IN_GEMV}),
    "gemv_no_barrier_after_fill": ("backward_gemv", {"plain": WRONG, "tsan": IN_GEMV}),
    "gemv_no_barrier_before_refill": ("backward_gemv", {"plain": WRONG, "tsan": IN_GEMV}),
    "gemv_no_barrier_before_reduction": ("backward_gemv", {"plain": WRONG, "tsan": IN_GEMV}),
    "gemv_every_block_writes_bias": ("backward_gemv", {"tsan": IN_GEMV}),
    "table_no_bound": ("recurrence_tables", {"asan": IN_RECURRENCE}),
    "spread_no_column_bound": ("recurrence_stepped_16x16", {"asan": IN_RECURRENCE}),
    "previous_of_no_step": ("recurrence_previous_states", {"asan": IN_RECURRENCE}),
    "pack_no_bound": ("recurrence_stepped_16x16", {"asan": IN_RECURRENCE}),
    "pack_no_barrier": ("recurrence_stepped_16x16", {"plain": WRONG, "tsan": IN_RECURRENCE}),
    "step_gradient_of_every_row": ("recurrence_stepped_16x16", {"plain": WRONG}),
    "step_no_column_bound": ("recurrence_stepped_16x16", {"asan": IN_RECURRENCE}),
    "step_no_row_bound": ("recurrence_stepped_16x16", {"asan": IN_RECURRENCE}),
    "step_no_wait_for_previous_launch": (
        "recurrence_stepped_16x16",
        {"plain": "without a wait for the previous launch"},
    ),
    "step_one_state": ("recurrence_stepped_16x16", {"plain": WRONG, "tsan": IN_RECURRENCE + r"|operand\.cuh:\d+"}),
    "step_z_of_another": ("recurrence_stepped_16x16", {"plain": WRONG}),
    "resident_no_weight_edge": ("recurrence_resident_4", {"asan": IN_RESIDENT}),
    "resident_state_not_cleared": ("recurrence_resident_256", {"plain": WRONG}),
    "resident_no_length": ("recurrence_resident_256", {"asan": IN_RESIDENT}),
    "resident_no_first_barrier": ("recurrence_resident_4", {"plain": WRONG, "tsan": IN_RESIDENT}),
    "resident_no_step_barrier": ("recurrence_resident_256", {"plain": WRONG, "tsan": IN_RESIDENT}),
    "resident_one_state": ("recurrence_resident_256", {"plain": WRONG, "tsan": IN_RESIDENT}),
    "resident_wrong_step": ("recurrence_resident_4", {"plain": WRONG}),
    "resident_no_table_barrier": (
        "recurrence_resident_256",
        {"plain": r"deadlock: .* wait in \S+ at " + IN_RESIDENT, "tsan": IN_RESIDENT},
    ),
    "resident_zeros_multiplied": ("recurrence_resident_infinities", {"plain": WRONG}),
    "resident_no_sum_barrier": ("recurrence_cluster_8", {"plain": WRONG, "tsan": IN_RESIDENT}),
    "cluster_idle_warp_stays": (
        "recurrence_idle_warps",
        {"plain": "deadlock: .* wait in mbarrier wait at " + IN_EXCHANGE},
    ),
    "cluster_no_first_barrier": (
        "recurrence_cluster_4",
        {"plain": r"st\.async: no mbarrier\.init yet", "tsan": IN_RESIDENT},
    ),
    "cluster_no_wait": ("recurrence_cluster_16bit", {"plain": WRONG, "tsan": IN_RESIDENT}),
    "cluster_wrong_parity": (
        "recurrence_cluster_16bit",
        {"plain": r"st\.async: block \d of the cluster has returned", "tsan": IN_RESIDENT},
    ),
    "cluster_wrong_bytes": ("recurrence_cluster_4", {"plain": "deadlock: .* wait in mbarrier wait at " + IN_EXCHANGE}),
    "cluster_no_warp_barrier": ("recurrence_cluster_1", {"tsan": IN_RESIDENT}),
    "cluster_one_state": ("recurrence_cluster_16bit", {"plain": WRONG, "tsan": IN_RESIDENT}),
    "grid_no_wait": ("recurrence_grid_8", {"plain": WRONG, "tsan": IN_EXCHANGE}),
    "grid_flag_before_data": ("recurrence_grid_8", {"plain": WRONG, "tsan": IN_EXCHANGE}),
    "grid_one_state": ("recurrence_grid_16bit", {"plain": WRONG}),
    "grid_no_barrier_after_copy": ("recurrence_grid_16bit", {"plain": WRONG, "tsan": IN_RESIDENT}),
    "grid_no_row_edge": ("recurrence_grid_16bit", {"plain": WRONG}),
    "no_row_bound": ("mainloop_simt_float", {"asan": IN_OPERAND}),
    "no_k_bound": ("mainloop_tensor_core_half", {"plain": WRONG, "asan": IN_OPERAND}),
    "ragged_tail_not_cleared": ("mainloop_tensor_core_half", {"plain": WRONG}),
    "misaligned_vector_copy": ("mainloop_tensor_core_half", {"plain": r"operand\.cuh:\d+: cp\.async: misaligned"}),
    "misaligned_staged_load": ("mainloop_simt_bfloat16", {"asan": r"operand\.cuh:\d+.*misaligned address"}),
    "wrong_fragment": ("mainloop_tensor_core_half", {"plain": WRONG}),
    "missed_cp_async_wait": ("mainloop_tensor_core_half", {"plain": WRONG + r"|cp\.async still in flight"}),
    "no_stage_barrier": ("mainloop_simt_float", {"plain": WRONG, "tsan": r"(engine|operand|traffic)\.\w+:\d+"}),
    "wrong_stage": ("mainloop_tensor_core_half", {"plain": WRONG}),
    "no_barrier_before_epilogue": (
        "mainloop_tensor_core_half",
        {"plain": WRONG, "tsan": r"(engine|mainloop)\.cuh:\d+"},
    ),
    "no_wait_for_tile": ("forward_wgmma_64", {"plain": IN_WGMMA}),
    "wrong_phase": ("forward_wgmma_64", {"plain": "deadlock: .* wait in mbarrier wait at " + IN_WGMMA}),
    "wrong_byte_count": ("forward_wgmma_64", {"plain": "deadlock: .* wait in mbarrier wait at " + IN_WGMMA}),
    "early_release": ("forward_wgmma_64", {"plain": IN_WGMMA, "tsan": IN_WGMMA}),
    "no_wait_for_wgmma": ("forward_wgmma_64", {"plain": IN_WGMMA, "tsan": IN_WGMMA}),
    "wgmma_adds_to_garbage": ("forward_wgmma_64", {"plain": WRONG}),
    "weights_not_switched": ("forward_wgmma_64", {"plain": WRONG}),
    "no_proxy_fence": ("forward_wgmma_64", {"tsan": IN_WGMMA}),
    "no_wait_for_stores": ("forward_wgmma_256", {"tsan": IN_WGMMA}),
    "no_wait_for_bias": ("forward_wgmma_64", {"plain": WRONG, "tsan": IN_WGMMA}),
    "bias_overwritten": ("forward_wgmma_64", {"plain": "deadlock: .* wait in mbarrier wait at " + IN_WGMMA}),
    "no_fence_of_inits": ("forward_wgmma_256", {"tsan": IN_WGMMA}),
    "peer_not_asked": ("forward_wgmma_256", {"plain": WRONG, "tsan": IN_WGMMA}),
    "peer_exits_early": ("forward_wgmma_256", {"plain": IN_WGMMA + ": .* has returned", "tsan": AT_EXIT}),
    "same_part_of_k": ("forward_wgmma_in_4", {"plain": WRONG}),
    "sums_over_stages": ("forward_wgmma_in_2", {"plain": WRONG, "tsan": IN_WGMMA}),
    "sums_not_released": ("forward_wgmma_in_2", {"tsan": IN_WGMMA}),
    "no_wait_for_sums": ("forward_wgmma_in_4", {"plain": WRONG, "tsan": IN_WGMMA}),
    "sums_not_kept": ("forward_wgmma_in_4", {"plain": IN_WGMMA + ": .* has returned", "tsan": IN_WGMMA}),
    "tf32_not_rounded": ("forward_wgmma_tf32_128x64", {"plain": WRONG}),
    "split_no_proxy_fence": ("forward_wgmma_128", {"tsan": IN_WGMMA}),
    "split_no_barrier": ("forward_wgmma_128", {"plain": WRONG, "tsan": IN_WGMMA}),
    "low_parts_by_tile": ("forward_wgmma_64", {"plain": WRONG}),
    "split_no_cross_term": ("forward_split_products", {"plain": WRONG}),
    "split_long_sums": ("forward_split_products", {"plain": WRONG}),
    "split_nan_left": ("forward_split_infinities", {"plain": WRONG}),
}
# What no kernel of the project does, in the small kernels of the wrappers' tests.
IN_WRAPPERS = r"test_wrappers\.cpp:\d+"
WRAPPER_FAULTS = {
    "no_fence_before_store": ("tma_store_writes", {"tsan": IN_WRAPPERS}),
    "unordered_sum": ("blocks_add_up", {"plain": "FAIL"}),
    "sum_without_its_turn": ("blocks_add_up", {"plain": "FAIL", "tsan": IN_WRAPPERS}),
    "misaligned_vector_load": ("vector_loads", {"asan": IN_WRAPPERS + ".*runtime error: .*misaligned address"}),
    "no_cluster_wait": ("cluster_blocks_read", {"plain": "FAIL", "tsan": IN_WRAPPERS}),
    "relaxed_arrival": ("cluster_blocks_read", {"tsan": IN_WRAPPERS}),
    "arrival_without_release": ("mbarrier_of_another", {"tsan": IN_WRAPPERS}),
    "wait_without_acquire": ("mbarrier_of_another", {"tsan": IN_WRAPPERS}),
    "async_store_not_awaited": ("async_stores_exchange", {"plain": "FAIL", "tsan": IN_WRAPPERS}),
    "async_store_wrong_byte_count": (
        "async_stores_exchange",
        {"plain": "deadlock: .* wait in mbarrier wait at " + IN_WRAPPERS},
    ),
    "async_store_wait_without_acquire": ("async_stores_exchange", {"tsan": IN_WRAPPERS}),
    "async_store_into_memory_in_use": ("async_stores_exchange", {"tsan": IN_WRAPPERS}),
    "exit_before_async_store": (
        "a_block_waits_for_async_stores",
        {"plain": IN_WRAPPERS + ": st.async: block 0 of the cluster has returned", "tsan": IN_WRAPPERS},
    ),
    "not_cooperative": ("cooperative_blocks_wait", {"plain": IN_WRAPPERS + ": polls without end"}),
    "early_block_exit": (
        "cluster_blocks_read",
        {"plain": "block [0-7] of the cluster has returned", "tsan": IN_WRAPPERS},
    ),
}


def declared_faults() -> list[str]:
    text = (build.FIXTURES / "faults.h").read_text()
    return re.findall(r"fault\((\w+)\)", text)


def test_every_planted_fault_has_its_test() -> None:
    assert sorted(declared_faults()) == sorted([*FAULTS, *WRAPPER_FAULTS])
    sources = "".join(f.read_text() for f in sorted(build.KERNELS.rglob("*.cu*")))
    for fault in FAULTS:
        assert f"RNN_EXT_PLANTED({fault})" in sources, f"no kernel carries {fault}"
    wrappers = (build.TESTS / "test_wrappers.cpp").read_text()
    for fault in WRAPPER_FAULTS:
        assert f"RNN_EXT_PLANTED({fault})" in wrappers, f"no test carries {fault}"


@needs_host
@pytest.mark.skipif("RNN_EXT_FAULT" in os.environ, reason="a fault is planted by hand")
@pytest.mark.parametrize("fault", [*FAULTS, *WRAPPER_FAULTS])
def test_planted_fault_is_caught(fault: str) -> None:
    tests, builds = (FAULTS | WRAPPER_FAULTS)[fault]
    program = build.kernels_program if fault in FAULTS else build.wrappers_program
    for name, expected in builds.items():
        variant = build.VARIANTS[name]
        done = build.run(program(variant), variant, "--fault", fault, "--seeds", str(SEEDS[name]), tests)
        assert done.returncode != 0, f"the {name} build does not notice {fault}"
        assert re.search(expected, done.stdout), f"{name} build, {fault}:\n{report_of(done.stdout)}"


# ---- the discipline that lets one source run on both machines ------------------------------------------------------

# What must not stand in a kernel file, and the files that are there for it.
BREACHES = {
    r"\basm\b": ("ptx.cuh", "ptx_sm90.cuh"),
    r"\b__shared__\b": ("launch.cuh",),
    r"<<<": (),
    r"\b(__nanosleep|volatile|__threadfence\w*|__CUDA_ARCH__)\b": ("ptx.cuh", "ptx_sm90.cuh"),
    r"\bwhile\s*\([^;]*\b(ld_acquire|try_wait|atomic\w*)": ("ptx.cuh", "ptx_sm90.cuh"),
    r"\batomic(Add|Sub|Max|Min|Exch|CAS|Inc|Or)\s*\(": (),  # order between blocks: the release/acquire wrappers
    r"\bcooperative_groups\b|\bcuda::(atomic|barrier)": (),
    r"#\s*include\s*[<\"](torch|ATen|c10|pybind11)/": (),
}


def breaches(name: str, text: str) -> list[str]:
    """What in a kernel file keeps it from running on the host, as `file:line: text`."""
    found = []
    code = re.sub(r"/\*.*?\*/|//[^\n]*", lambda m: "\n" * m[0].count("\n"), text, flags=re.DOTALL)
    for number, line in enumerate(code.splitlines(), 1):
        for pattern, allowed in BREACHES.items():
            if name not in allowed and re.search(pattern, line):
                found.append(f"{name}:{number}: {line.strip()}")
    for smem in re.findall(r"RNN_EXT_SMEM\((\w+),", code):
        if name != "launch.cuh" and not re.search(rf"static_assert\(sizeof\({smem}\)", code):
            found.append(f"{name}: no static_assert on the size of {smem}")
    return found


def kernel_files() -> list[Path]:
    return sorted([*build.KERNELS.rglob("*.cu*"), *build.KERNELS.rglob("*.h")])


@pytest.mark.parametrize("file", kernel_files(), ids=lambda f: f.name)
def test_kernel_sources_keep_to_the_discipline(file: Path) -> None:
    assert breaches(file.name, file.read_text()) == []


@pytest.mark.parametrize(
    "code",
    [
        'asm volatile("bar.sync 0;");',
        "__shared__ float tile[32];",
        "kernel<<<grid, block>>>(p);",
        "while (ptx::ld_acquire(counter) < n) {}",
        "volatile int flag;",
        "atomicAdd(&sum, x);",
        "__threadfence();",
        "#if __CUDA_ARCH__ >= 800",
        "#include <ATen/ATen.h>",
        "RNN_EXT_SMEM(Smem, smem);",
    ],
)
def test_breaches_are_seen(code: str) -> None:
    assert breaches("kernel.cuh", f"void f() {{\n  {code}\n}}\n")
    assert not breaches("kernel.cuh", f"// {code}\n")


def test_the_map_names_every_header() -> None:
    headers = {f.relative_to(build.KERNELS).as_posix() for f in build.KERNELS.rglob("*.*h")}
    section = (build.CSRC / "README.md").read_text().split("## A map of `cuda/`")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    named = set(re.findall(r"`(\w+/\w+\.\w+)`", " ".join(row.split("|")[1] for row in rows)))
    assert headers <= named
    assert [name for name in sorted(named) if not (build.KERNELS / name).exists()] == []


# ---- what the host cannot see: the compiled code -------------------------------------------------------------------


def needs_nvcc(test):
    return pytest.mark.slow(pytest.mark.skipif(cubin.why_not() is not None, reason=cubin.why_not() or "")(test))


# Instructions that the code of an architecture must contain, in some kernel of the file.
STARTS_EARLY = ["PREEXIT", "ACQBULK", r"CCTL\.E\.PF2"]
REQUIRED = {
    "forward_gemv_float.cu": {"sm_75": [r"LDG\.E\.128", "FFMA", r"SHFL\.BFLY"], "sm_90a": STARTS_EARLY},
    "forward_gemv_double.cu": {"sm_75": [r"LDG\.E\.128", "DFMA", r"SHFL\.BFLY"], "sm_90a": STARTS_EARLY},
    "forward_gemv_half.cu": {"sm_75": [r"LDG\.E\.128", "FFMA", r"MUFU\.TANH"], "sm_90a": STARTS_EARLY},
    "forward_gemv_bfloat16.cu": {"sm_75": [r"LDG\.E\.128", "FFMA", r"MUFU\.TANH"], "sm_90a": STARTS_EARLY},
    "forward_tiled_float.cu": {
        "sm_75": ["FFMA", r"LDS(\.U)?\.128", r"STG\.E\.128", r"ATOMG?\.E\.INC\.STRONG\.GPU"],
        "sm_80": [r"LDGSTS\.E ", r"LDGSTS\.E\.BYPASS\.128", r"HMMA\.1688\.F32\.TF32"],
        "sm_90a": [r"UCGABAR_ARV", r"LD\.E\.128"],
    },
    "forward_tiled_double.cu": {"sm_75": ["DFMA"], "sm_80": ["DMMA", r"LDGSTS\.E\.BYPASS\.128"]},
    "forward_tiled_half.cu": {
        "sm_75": [r"LDSM\.16\.M88\.4", r"HMMA\.(1688|16816)\.F32", r"MUFU\.TANH"],
        "sm_80": [r"HMMA\.16816\.F32", r"LDGSTS\.E\.BYPASS\.128"],
    },
    "forward_tiled_bfloat16.cu": {
        "sm_75": ["FFMA", r"MUFU\.TANH"],
        "sm_80": [r"HMMA\.16816\.F32\.BF16", r"LDSM\.16\.M88\.4", r"LDGSTS\.E\.BYPASS\.128"],
    },
    "backward_tiled_float.cu": {
        "sm_75": ["FFMA", r"LDG\.E\.128", r"STG\.E\.128", r"LDS(\.U)?\.128"],
        "sm_80": [r"LDGSTS\.E\.BYPASS\.128"],
    },
    "backward_tiled_double.cu": {"sm_75": ["DFMA"], "sm_80": [r"LDGSTS\.E\.BYPASS\.128", "DMMA"]},
    "backward_tiled_half.cu": {
        "sm_75": [r"HMMA\.16(88|816)\.F32 ", r"LDSM\.16\.M88\.4", r"LDSM\.16\.MT88\.4", r"LDG\.E\.128", r"STG\.E\.128"],
        "sm_80": [r"LDGSTS\.E\.BYPASS\.128", r"HMMA\.16816\.F32 "],
    },
    "backward_tiled_bfloat16.cu": {"sm_80": [r"LDGSTS\.E\.BYPASS\.128", r"HMMA\.16816\.F32\.BF16"]},
    **{
        f"backward_gemv_{dtype}.cu": {"sm_75": [r"LDG\.E\.128", r"STG\.E\.128", r"LDS(\.U)?\.128"]}
        for dtype in ("float", "double", "half", "bfloat16")
    },
    **{
        f"stepped_{dtype}.cu": {
            "sm_75": [r"STG\.E\.128", *at_75],
            "sm_80": [r"LDGSTS\.E", *at_80],
            "sm_90a": STARTS_EARLY,
        }
        for dtype, at_75, at_80 in (
            ("float", ["FFMA"], [r"LDS(\.U)?\.128", r"HMMA\.1688\.F32\.TF32"]),
            ("double", ["DFMA"], ["DMMA"]),
            ("half", [r"HMMA\.(1688|16816)\.F32", r"MUFU\.TANH"], [r"LDGSTS\.E\.BYPASS\.128", r"HMMA\.16816\.F32"]),
            ("bfloat16", ["FFMA", r"MUFU\.TANH"], [r"LDGSTS\.E\.BYPASS\.128", r"HMMA\.16816\.F32\.BF16"]),
        )
    },
    **{
        f"{direction}_resident_{dtype}.cu": {
            "sm_80": [
                r"LDS\.128",
                r"LDG\.E\.128",
                *at_80,
                r"LDGSTS\.E\.BYPASS\.128",  # of a grid, as the following
                r"RED\S*\.ADD\.STRONG\.GPU",
                r"LD(G)?\S*\.STRONG\.GPU",
            ],
            "sm_90a": [r"CCTL\.E\.PF2", "STAS", r"SYNCS\.PHASECHK", "UCGABAR_WAIT"],
        }
        for direction in ("forward", "backward")
        for dtype, at_80 in (
            ("float", ["FFMA", r"HMMA\.1688\.F32\.TF32"]),
            ("half", [r"HMMA\.16816\.F32 "]),
            ("bfloat16", [r"HMMA\.16816\.F32\.BF16"]),
        )
    },
    "forward_wgmma.cu": {
        "sm_90a": [
            r"UTMALDG\.2D ",
            r"UTMALDG\.2D\.MULTICAST",
            r"UTMASTG\.2D",
            r"STSM\.16\.M88\.4",
            r"SYNCS\.PHASECHK",
            r"UTMACCTL\.PF",
            r"LD\.E\.128",  # of other blocks' shared memory
            r"USETMAXREG",
            *(rf"HGMMA\.64x{n}x16\.F32{t}" for n in (64, 128, 256) for t in (" ", r"\.BF16")),
            *(rf"HGMMA\.64x{n}x8\.F32\.TF32" for n in (64, 128, 256)),
        ]
    },
    "backward_wgmma.cu": {
        "sm_90a": [
            r"UTMALDG\.2D ",
            r"UTMALDG\.2D\.MULTICAST",
            r"UTMASTG\.2D",
            r"STSM\.16\.M88\.4",
            r"UTMACCTL\.PF",
            r"USETMAXREG",
            *(
                rf"HGMMA\.64x{n}x16\.F32{t}.* gdesc\[\w+\]{major}\.tnspB"
                for n in (128, 256)
                for t in (" ", r"\.BF16")
                for major in ("", r"\.tnspA")
            ),
        ]
    },
    "golden.cu": {
        "sm_75": [r"LDSM\.16\.M88\.4", r"LDSM\.16\.MT88\.2", r"MUFU\.TANH", r"ATOMG?\.E\.INC\.STRONG\.GPU"],
        "sm_80": [
            r"LDGSTS\.E\.BYPASS\.128",
            r"LDGDEPBAR",
            r"HMMA\.1688\.F32\.TF32",
            r"HMMA\.16816\.F32 ",
            r"HMMA\.16816\.F32\.BF16",
            r"DMMA",
        ],
        "sm_90a": [
            r"UTMALDG\.2D ",
            r"UTMALDG\.2D\.MULTICAST",
            r"UTMASTG\.2D",
            r"STSM\.16\.M88\.4",
            *STARTS_EARLY,
            r"UCGABAR_ARV",
            r"UCGABAR_WAIT",
            r"SYNCS\.ARRIVE\.TRANS64\.RED",
            *(rf"STAS{bits} " for bits in ("", r"\.64", r"\.128")),
            r"SYNCS\.PHASECHK",
            r"BPT\.TRAP",  # of a wait that does not end: on this architecture, no other wrapper traps
            r"USETMAXREG\.DEALLOC",
            r"USETMAXREG\.TRY_ALLOC",
            *(rf"HGMMA\.64x{n}x16\.F32{t}" for n in (64, 128, 256) for t in (" ", r"\.BF16")),
            *(rf"HGMMA\.64x{n}x8\.F32\.TF32" for n in (64, 128, 256)),
        ],
    },
}
ARCHS = ["sm_75", "sm_80", "sm_90a"]
SOURCES = sorted(build.KERNELS.rglob("*.cu"))
LAUNCHERS = {"backward.cu", "forward.cu"}  # no kernels of their own


def required(file: str, arch: str) -> list[str]:
    """What is required from `arch` downwards."""
    return [op for a in ARCHS[: ARCHS.index(arch) + 1] for op in REQUIRED.get(file, {}).get(a, [])]


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("file", [*SOURCES, build.TESTS / "golden.cu"], ids=lambda f: f.name)
def test_compiled_code(file: Path, arch: str) -> None:
    if arch == "sm_75" and "_resident_" in file.name:
        pytest.skip("from sm_80 on: what is compiled below is never launched")
    code = cubin.built_or_compiled(file, arch)
    kernels = cubin.resources(code)
    assert kernels or file.name in LAUNCHERS
    for kernel in kernels:
        assert kernel.stack == kernel.local == 0, f"{kernel}: registers spilled, or an array indexed at run time"
        assert kernel.max_threads is not None, f"{kernel}: no __launch_bounds__"
        assert kernel.registers * kernel.max_threads <= 65536, f"{kernel}: does not fit a multiprocessor"
    sass = cubin.sass(code)
    assert [op for op in required(file.name, arch) if not re.search(op, sass)] == []
    if "HGMMA" in sass:
        cubin.compile(file, arch)  # which minds what ptxas says of them
        assert cubin.barriers_before_products(code) == []  # of kernels that have such products


@needs_nvcc
@pytest.mark.parametrize(
    "file",
    sorted([*build.KERNELS.rglob("forward_gemv_*.cu"), *build.KERNELS.rglob("stepped_*.cu")]),
    ids=lambda f: f.name,
)
def test_what_may_start_early_touches_no_memory_before_its_wait(file: Path) -> None:
    """But for prefetches to L2, which show nothing of what is there."""
    for kernel, lines in cubin.instructions(cubin.built_or_compiled(file, "sm_90a")).items():
        if "recurrence_step" not in kernel and "gemv" not in kernel:
            continue  # the launches around a recurrence
        (wait,) = (i for i, line in enumerate(lines) if "ACQBULK" in line)
        assert [line for line in lines[:wait] if re.search(r"\b(LD|ST|LDG|STG|ATOMG?|RED)\b", line)] == [], kernel


@needs_nvcc
@pytest.mark.parametrize("file", sorted(build.KERNELS.rglob("forward_tiled_*.cu")), ids=lambda f: f.name)
def test_the_last_barrier_of_a_cluster_does_not_wait_for_stores(file: Path) -> None:
    """They would have to reach memory before the arrival: they come between it and the wait."""
    for kernel, lines in cubin.instructions(cubin.built_or_compiled(file, "sm_90a")).items():
        (_, last_arrival), (first_wait, last_wait) = (
            [i for i, line in enumerate(lines) if op in line] for op in ("UCGABAR_ARV", "UCGABAR_WAIT")
        )
        assert any("STG" in line for line in lines[last_arrival:last_wait]), kernel
        assert not any("STG" in line for line in lines[first_wait:last_arrival]), kernel


@needs_nvcc
def test_stack_frames_are_seen(tmp_path: Path) -> None:
    source = tmp_path / "indexed_array.cu"
    source.write_text(
        "__global__ void __launch_bounds__(96) f(float* p, int n) {\n"
        "  float v[64];\n"
        "  for (int i = 0; i < n; ++i) v[i] = p[i];\n"
        "  for (int i = 0; i < n; ++i) p[i] = v[n - 1 - i];\n"
        "}\n"
    )
    (kernel,) = cubin.resources(cubin.compile(source, "sm_80"))
    assert kernel.stack >= 256
    assert kernel.max_threads == 96


@needs_nvcc
def test_serialised_wgmma_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "touches_sums_in_flight.cu"
    source.write_text(
        '#include "cuda/ptx/ptx_sm90.cuh"\n'
        "using namespace rnn_ext::cuda;\n"
        "__global__ void __launch_bounds__(128) f(float* p, uint64_t a, uint64_t b, int n) {\n"
        "  float sums[32] = {};\n"
        "  ptx::wgmma_fence();\n"
        "  for (int i = 0; i < n; ++i) {\n"
        "    ptx::wgmma<__half, 64>(sums, a, b, 1);\n"
        "    sums[0] += 1.f;\n"
        "  }\n"
        "  ptx::wgmma_commit();\n"
        "  ptx::wgmma_wait<0>();\n"
        "  for (int i = 0; i < 32; ++i) p[32 * threadIdx.x + i] = sums[i];\n"
        "}\n"
    )
    with pytest.raises(RuntimeError, match="GMMA in function"):
        cubin.compile(source, "sm_90a")


# ---- the launchers as operators ------------------------------------------------------------------------------------

NONLINEARITIES = [torch.tanh, torch.relu, torch.sigmoid]  # in the order of csrc/core/params.h
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
KERNELS = re.findall(r'\{"((?:forward|backward)_\w+)",', (build.FIXTURES / "kernels.h").read_text())
FORWARD = [name for name in KERNELS if name.startswith("forward")]
BACKWARD = [name for name in KERNELS if name.startswith("backward")]
# What they take is theirs to say: the tests give them rows of a multiple of 16 bytes, and dtypes that all of them have.
ALIGNED = re.findall(r'\{"(\w+)",[^}]*_takes', (build.FIXTURES / "kernels.h").read_text())


@pytest.fixture(scope="module")
def ops():
    torch.ops.load_library(str(build.torch_operators()))
    return torch.ops.rnn_ext_cuda_host


def operands(batch: int, input_size: int, hidden_size: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """input, hx, weight_ih, weight_hh, bias_ih, bias_hh."""
    sizes = [(batch, input_size), (batch, hidden_size), (hidden_size, input_size), (hidden_size, hidden_size)]
    scale = hidden_size**-0.5
    tensors = [torch.randn(size, dtype=torch.float64) for size in sizes[:2]]
    tensors += [torch.randn(size, dtype=torch.float64) * scale for size in [*sizes[2:], (hidden_size,), (hidden_size,)]]
    return [t.to(dtype) for t in tensors]


def reference(f, x, h, weight_ih, weight_hh, bias_ih, bias_hh):
    """In float64, from the rounded operands."""
    x, h, weight_ih, weight_hh, bias_ih, bias_hh = (
        t.double() if t is not None else None for t in (x, h, weight_ih, weight_hh, bias_ih, bias_hh)
    )
    z = x @ weight_ih.T
    for term in (bias_ih, bias_hh, h @ weight_hh.T if h is not None else None):
        z = z if term is None else z + term
    return f(z)


def check_forward(ops, kernel: str, seed: int, *arguments: torch.Tensor | None) -> None:
    for i, f in enumerate(NONLINEARITIES):
        output = ops.forward(*arguments, i, kernel, seed)
        torch.testing.assert_close(output, reference(f, *arguments).to(output.dtype))


@needs_host
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", [name for name in FORWARD if name not in ALIGNED])
def test_forward_operator(ops, kernel: str, dtype: torch.dtype) -> None:
    for seed, (sizes, layout) in enumerate(
        [((1, 1, 1), "nt"), ((3, 10, 5), "nn"), ((20, 7, 33), "tn"), ((65, 40, 70), "nn"), ((9, 70, 40), "tt")]
    ):
        x, h, weight_ih, weight_hh, bias_ih, bias_hh = operands(*sizes, dtype)
        if layout[0] == "t":
            x, h = x.T.contiguous().T, h.T.contiguous().T
        if layout[1] == "t":
            weight_ih, weight_hh = weight_ih.T.contiguous().T, weight_hh.T.contiguous().T
        hx = None if seed == 1 else h
        check_forward(ops, kernel, seed, x, hx, weight_ih, weight_hh, None if seed == 2 else bias_ih, bias_hh)


@needs_host
@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [
        *itertools.product([k for k in FORWARD if k in ALIGNED], DTYPES[2:]),
        ("forward_wgmma_64", DTYPES[0]),
        ("forward_wgmma_128", DTYPES[0]),
    ],
    ids=str,
)
def test_forward_operator_of_aligned_rows(ops, kernel: str, dtype: torch.dtype) -> None:
    for seed, sizes in enumerate([(1, 8, 8), (3, 80, 72), (140, 136, 264)]):
        x, h, weight_ih, weight_hh, bias_ih, bias_hh = operands(*sizes, dtype)
        check_forward(ops, kernel, seed, x, None if seed == 1 else h, weight_ih, weight_hh, bias_ih, bias_hh)


class Cell(torch.autograd.Function):
    """The two launchers as one differentiable function."""

    @staticmethod
    def forward(ctx, ops, kernels, f, *arguments):
        output = ops.forward(*arguments, f, kernels[0], 5)
        ctx.save_for_backward(output, *arguments[:4])
        ctx.ops, ctx.kernel, ctx.f = ops, kernels[1], f
        return output

    @staticmethod
    def backward(ctx, grad_output):
        output, *arguments = ctx.saved_tensors
        return None, None, None, *ctx.ops.backward(grad_output, output, *arguments, ctx.f, ctx.kernel, 5)


@needs_host
@pytest.mark.parametrize("f", range(3), ids=[f.__name__ for f in NONLINEARITIES])
@pytest.mark.parametrize(
    "kernels", [(FORWARD[0], name) for name in BACKWARD if name not in ALIGNED], ids=lambda k: k[1]
)
def test_operators_pass_gradcheck(ops, kernels: tuple[str, str], f: int) -> None:
    arguments = [t.requires_grad_() for t in operands(3, 4, 5, torch.float64)]
    assert torch.autograd.gradcheck(lambda *a: Cell.apply(ops, kernels, f, *a), arguments)


@needs_host
@pytest.mark.parametrize("kernel", KERNELS)
def test_operators_give_the_same_bits_under_every_schedule(ops, kernel: str) -> None:
    batch = 8 if "gemv" in kernel else 33
    dtype = torch.float16 if kernel in ALIGNED else torch.float32
    x, h, weight_ih, weight_hh, bias_ih, bias_hh = operands(batch, 24, 40, dtype)

    def run(seed: int) -> list[torch.Tensor]:
        if kernel.startswith("forward"):
            return [ops.forward(x, h, weight_ih, weight_hh, bias_ih, bias_hh, 0, kernel, seed)]
        return ops.backward(torch.cos(h), torch.tanh(h), x, h, weight_ih, weight_hh, 0, kernel, seed)

    first = run(0)
    for seed in range(1, 8):
        assert all(torch.equal(a, b) for a, b in zip(first, run(seed), strict=True))


@needs_host
@pytest.mark.parametrize("kernel", FORWARD)
def test_operators_keep_nan_and_infinity(ops, kernel: str) -> None:
    dtype = torch.float16 if kernel in ALIGNED else torch.float32
    special = torch.zeros(4, 8, dtype=dtype)
    special[:, 3] = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0])
    ones = torch.ones(8, 8, dtype=dtype)
    for i, f in enumerate(NONLINEARITIES):
        output = ops.forward(special, None, ones, ones, None, None, i, kernel, 1)
        torch.testing.assert_close(output, f(special[:, 3:4]).expand(4, 8), equal_nan=True)


# ---- a layer over a sequence, whole ---------------------------------------------------------------------------------

RECURRENCE = re.findall(r'"(recurrence_\w+)"\)', (build.FIXTURES / "kernels.h").read_text())
SOME_LENGTHS = [5, 0, 3, 3]


class Layer(torch.autograd.Function):
    """The operator's two passes, as on CUDA but for the device. `options` are the operator's last five arguments."""

    @staticmethod
    def forward(ctx, ops, kernel, options, most_bytes_of_z, *arguments):
        output, h_n = ops.layer(*arguments, *options, kernel, 3, most_bytes_of_z)
        ctx.save_for_backward(output, *arguments[:4])
        ctx.ops, ctx.kernel, ctx.options = ops, kernel, options
        return output, h_n

    @staticmethod
    def backward(ctx, grad_output, grad_h_n):
        nonlinearity, *others = ctx.options
        mask = ctx.needs_input_grad[4:]
        found = iter(
            ctx.ops.layer_backward(
                grad_output, grad_h_n, *ctx.saved_tensors, nonlinearity, mask, *others, ctx.kernel, 3
            )
        )
        return None, None, None, None, *(next(found) if needed else None for needed in mask)


LAYOUTS = ["padded", "batch_first", "lengths", "lengths_batch_first", "packed", "jagged"]


def layer_case(layout: str, reverse: bool, dtype: torch.dtype, nonlinearity: str = "tanh", hx: bool = True):
    """The arguments of a layer of 5 steps, 4 rows; options; and what a loop of cells gives, in the same layout."""
    arguments = layer_arguments(5, 4, 3, 7, dtype=dtype)
    if not hx:
        arguments = arguments._replace(hx=None)
    lengths = None if layout in ("padded", "batch_first") else [5, 3, 3, 1] if layout == "packed" else SOME_LENGTHS
    batch_first = layout.endswith("batch_first")
    expected = loop_of_cells(*arguments, nonlinearity, reverse=reverse, lengths=lengths)
    x = arguments.input
    if lengths is not None:  # padding is not read
        x = x.masked_fill(torch.arange(5).view(5, 1, 1) >= torch.tensor(lengths).view(1, 4, 1), torch.nan)
    if layout == "packed":
        x, batch_sizes = packed(x, lengths)
        expected = (packed(expected[0], lengths)[0], expected[1])
        options = (nonlinearity, reverse, False, None, batch_sizes)
    elif layout == "jagged":
        x, numbers = jagged(x, lengths)
        expected = (jagged(expected[0], lengths)[0], expected[1])
        options = (nonlinearity, reverse, False, numbers, None)
    else:
        if batch_first:
            x, expected = x.transpose(0, 1).contiguous(), (expected[0].transpose(0, 1), expected[1])
        options = (nonlinearity, reverse, batch_first, None if lengths is None else torch.tensor(lengths), None)
    return arguments._replace(input=x), options, expected


@needs_host
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layer_operator(ops, layout: str, reverse: bool, dtype: torch.dtype) -> None:
    for i, kernel in enumerate(RECURRENCE[:2]):
        arguments, options, expected = layer_case(layout, reverse, dtype, ["tanh", "relu"][i], hx=i == 0)
        for most_bytes_of_z in (1 << 20, 2 * 4 * 7 * arguments.input.element_size()):  # also two steps at a time
            found = ops.layer(*arguments, *options, kernel, i, most_bytes_of_z)
            tolerance = {"rtol": 5e-2, "atol": 5e-2} if dtype.itemsize == 2 else {}
            torch.testing.assert_close(found, expected, **tolerance)


@needs_host
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layer_operator_passes_gradcheck(ops, layout: str, reverse: bool) -> None:
    for kernel in RECURRENCE[:2]:
        (x, *others), options, _ = layer_case(layout, reverse, torch.float64, "sigmoid")
        there = ~x.isnan()
        leaves = [x[there].requires_grad_(), *(t.requires_grad_() for t in others)]

        def run(values, *others, kernel=kernel, x=x, there=there, options=options):
            return Layer.apply(ops, kernel, options, 1 << 20, x.masked_scatter(there, values), *others)

        assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
        grad = torch.autograd.grad(Layer.apply(ops, kernel, options, 1 << 20, x.requires_grad_(), *others)[0].sum(), x)[
            0
        ]
        assert (grad[~there] == 0).all()


@needs_host
def test_layer_operator_of_nothing(ops) -> None:
    arguments, options, _ = layer_case("lengths", False, torch.float32)
    options = ("tanh", False, False, torch.zeros(4, dtype=torch.int64), None)
    output, h_n = ops.layer(*arguments, *options, RECURRENCE[0], 0, 1 << 20)
    assert (output == 0).all() and torch.equal(h_n, arguments.hx)
    empty = arguments._replace(input=arguments.input[:, :0], hx=arguments.hx[:0])
    output, h_n = ops.layer(*empty, "tanh", False, False, None, None, RECURRENCE[0], 0, 1 << 20)
    assert output.shape == (5, 0, 7) and h_n.shape == (0, 7)
    narrow = arguments._replace(input=arguments.input[:, :, :0], weight_ih=arguments.weight_ih[:, :0])
    found = ops.layer(*narrow, "tanh", False, False, None, None, RECURRENCE[0], 0, 1 << 20)
    torch.testing.assert_close(found, loop_of_cells(*narrow))


# ---- golden vectors ------------------------------------------------------------------------------------------------


def close(host: str, device: str, compare: str) -> bool:
    if compare == "exact":
        return host == device
    x, y = (struct.unpack("<f", int(word, 16).to_bytes(4, "little"))[0] for word in (host, device))
    return abs(x - y) <= float(compare) * max(abs(x), abs(y), 1e-3)


def golden_lines(text: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split()[1:] for line in text.splitlines() if line and not line.startswith("#")}


def differences(host: dict[str, list[str]], device: dict[str, list[str]]) -> list[str]:
    """The wrappers of which the host body does not do what the GPU did."""
    found = []
    for name, (compare, *words) in device.items():
        if name not in host or host[name][0] != compare or len(host[name]) - 1 != len(words):
            found.append(f"{name} is not what it was when the GPU ran it")
            continue
        wrong = [i for i, pair in enumerate(zip(host[name][1:], words, strict=True)) if not close(*pair, compare)]
        if wrong:
            found.append(f"{name} differs in words {wrong[:10]}")
    return found


@pytest.fixture(scope="module")
def host_lines() -> dict[str, list[str]]:
    program = build.build_program("golden", build.PLAIN, [build.TESTS / "golden.cu"])
    names = build.run(program, build.PLAIN).stdout.split()
    done = build.run(program, build.PLAIN, *names)
    assert done.returncode == 0, done.stdout
    lines = golden_lines(done.stdout)
    assert list(lines) == names
    return lines


@needs_host
def test_host_bodies_agree_with_a_gpu(host_lines: dict[str, list[str]]) -> None:
    files = sorted((build.HERE / "golden").glob("*.txt"))
    for file in files:
        assert not differences(host_lines, golden_lines(file.read_text())), file.name
    if not files:
        pytest.skip("no GPU has confirmed the host bodies yet: tests/cuda_host/golden.sh asks one")


@needs_host
def test_differences_from_a_gpu_are_seen(host_lines: dict[str, list[str]]) -> None:
    assert not differences(host_lines, host_lines)
    for name, (compare, *words) in host_lines.items():
        wrong = f"{int(words[0], 16) ^ 1 << 20:08x}"  # a bit that even a float's tolerance minds
        changed = {**host_lines, name: [compare, wrong, *words[1:]]}
        assert len(differences(host_lines, changed)) == 1, name


def test_every_wrapper_is_among_the_golden_vectors() -> None:
    golden = (build.TESTS / "golden.cu").read_text()
    for header in ("ptx.cuh", "ptx_sm90.cuh"):
        wrappers = re.findall(r"RNN_EXT_PTX_INLINE \w+ (\w+)\(", (build.KERNELS / "ptx" / header).read_text())
        assert len(wrappers) > 15
        missing = [w for w in wrappers if not re.search(rf"\bptx::{w}\b", golden)]
        assert missing in ([], ["wgmma_descriptor"]), header  # the part that two wrappers share


def golden_sh(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", build.HERE / "golden.sh", *arguments]
    environment = {**os.environ, "PYTHON": sys.executable, **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@needs_nvcc
def test_golden_vectors_of_the_gpu_at_hand(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    file = tmp_path / "golden.txt"
    if torch.cuda.is_available():
        done = golden_sh(file)
        assert done.returncode == 0, done.stderr
        assert not differences(request.getfixturevalue("host_lines"), golden_lines(file.read_text()))
    else:  # it compiles and starts, finds no device, and leaves no file that looks like a result
        done = golden_sh(file, "sm_90a")
        assert done.returncode != 0 and re.search("^device: .*CUDA", done.stderr, re.MULTILINE), done.stderr
        assert not file.exists()


@pytest.mark.slow
def test_a_wrapper_that_fails_or_hangs_costs_no_other_its_golden_vector(tmp_path: Path) -> None:
    nvcc = tmp_path / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    program = """#!/bin/sh
case "$1" in
  "") echo breaks; echo hangs; echo works; echo works_too ;;
  breaks) echo "breaks: unspecified launch failure" >&2; exit 1 ;;
  hangs) sleep 60 ;;
  *) echo "$1 exact 00000001" ;;
esac
"""
    # The last argument is where the program goes.
    version = '[ "$1" = --version ] && echo release 13.0 && exit\n'
    nvcc.write_text(f"#!/bin/sh\n{version}for last; do :; done\ncat >$last <<'END'\n{program}END\nchmod +x $last\n")
    nvcc.chmod(0o755)
    header = tmp_path / "toolkit" / "include" / "cuda_runtime.h"
    header.parent.mkdir()
    header.touch()
    file = tmp_path / "golden.txt"
    done = golden_sh(file, "sm_90a", CUDA_HOME=str(tmp_path / "toolkit"))
    assert done.returncode == 1, done.stderr
    word = ["exact", "00000001"]
    assert golden_lines(file.read_text()) == {"works": word, "works_too": word}
    comments = "\n".join(line for line in file.read_text().splitlines() if line.startswith("# FAILED"))
    assert re.fullmatch(
        "# FAILED breaks, status 1: breaks: unspecified launch failure \n"
        "# FAILED hangs, status 137: .*killed after 5 s ",
        comments,
    )
