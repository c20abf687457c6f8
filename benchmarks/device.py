"""The ceilings of the device at hand, measured, and the floor that they put under a case's time.

    python benchmarks/device.py [--device cpu|cuda]

Facts, all of one device:
    copy_gb_s       10⁹ bytes a second of a copy that no cache holds, bytes read and written counted
    caches          [bytes, 10⁹ bytes a second] of each level, the nearest first: on a GPU its L2, and a copy within it,
                    the start of the kernel taken out; on a CPU what the levels of all threads' cores hold together, and
                    a sum that reads again and again what they hold
    gemm_tflop_s    10¹² floating-point operations a second of a large matrix product, by dtype; "tf32" on a GPU
    launch_us       microseconds of the smallest eager operation, host included
    autograd_us     microseconds of forward and backward of one small ATen function with six leaves, host included
    instruction_set  that rnn_ext's CPU kernels run in
    node_us         microseconds of the smallest kernel as a node of a CUDA graph: what any launch costs the device
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import Case
from timing import device_sampler, host_sampler, time_calls

from rnn_ext import _C

KIB, MIB = 2**10, 2**20
LONGEST = 5.0  # seconds: what a fact's samples may take together


def best(sample: Callable[[], float], rounds: int) -> float:
    """The least of `rounds` samples, or of those that LONGEST leaves time for, at least one."""
    end = time.perf_counter() + LONGEST
    least = sample()
    for _ in range(rounds - 1):
        if time.perf_counter() > end:
            break
        least = min(least, sample())
    return least


def host_seconds(run: Any, rounds: int = 9) -> float:
    """Seconds of one run, the best of `rounds`, host included."""
    return best(host_sampler(run, 2e-3), rounds)


def seconds(run: Any, device: torch.device, nodes: int = 1, rounds: int = 9) -> float:
    """Seconds of one run, the best of `rounds`: device time of `nodes` runs in a graph, host time on a CPU."""
    if device.type != "cuda":
        return host_seconds(run, rounds)
    return best(device_sampler([run] * nodes, 2e-3), rounds)


def copy_seconds(size: int, device: torch.device, nodes: int = 1) -> float:
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    return seconds(lambda: target.copy_(source), device, nodes)


def cpu_cache_bytes() -> list[int]:
    """Of each level, what the threads' cores hold together; the third is theirs in common."""
    sizes = {1: 32 * KIB, 2: MIB, 3: 32 * MIB}  # where the system doesn't say
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        if kind != "Instruction" and size.endswith("K") and int(level) in sizes:
            sizes[int(level)] = int(size[:-1]) * KIB
    return [size * (torch.get_num_threads() if level < 3 else 1) for level, size in sizes.items()]


def read_gb_s(size: int) -> float:
    """10⁹ bytes a second at which all threads together, each for itself, read `size` bytes again and again."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # to wait for another would be part of the time
    try:
        repeats = max(2, MIB // size)
        again = torch.randn(size // 4).expand(repeats, size // 4)
        out = torch.empty(repeats)
        return threads * repeats * size / host_seconds(lambda: torch.sum(again, 1, out=out), rounds=50) / 1e9
    finally:
        torch.set_num_threads(threads)


def caches(device: torch.device, copy_gb_s: float) -> list[list[float]]:
    """The fact of this name."""
    if device.type != "cuda":
        sizes = cpu_cache_bytes()
        # Each is measured with data well below what a thread has of it, and above the level before.
        first, second = (sizes[level] // 2 // torch.get_num_threads() for level in (0, 1))
        rates = [read_gb_s(size) for size in (first, second, min(4 * second, sizes[2] // 2))]
        return [[size, max(rates[level:])] for level, size in enumerate(sizes)]
    size = torch.cuda.get_device_properties(device).L2_cache_size
    # Source and target together fill at most half of it.
    times = [copy_seconds(part, device, nodes=50) for part in (size // 16, size // 4)]
    # On a busy machine the difference may come out too small: the start is at most three quarters of the time.
    rate = 2 * (size // 4 - size // 16) / max(times[1] - times[0], times[1] / 4) / 1e9
    return [[size, max(rate, copy_gb_s)]]


def product(dtype: torch.dtype, size: int, device: torch.device) -> Callable[[], torch.Tensor]:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))  # zeros would run faster
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def cpu_product_size(dtype: torch.dtype) -> int:
    """The largest size up to 1024 whose product takes a quarter of a second at most, going by half that size: without
    instructions for a dtype, as for bfloat16 on AVX2, a product may take a thousand times as long as with them.
    """
    size = 128
    while size < 1024:
        run = product(dtype, size, torch.device("cpu"))
        run()  # lazy initialisation stays out of the estimate
        if 2**3 * min(time_calls(run, 1) for _ in range(3)) > 0.25:
            break
        size *= 2
    return size


def gemm_tflop_s(dtype: torch.dtype, size: int, device: torch.device) -> float:
    rounds = 5 if device.type == "cuda" else 100  # other processes leave few of a CPU's samples alone
    return 2 * size**3 / seconds(product(dtype, size, device), device, rounds=rounds) / 1e12


def autograd_seconds(device: torch.device) -> float:
    """Forward and backward of an ATen function with as many leaves as the cell: x, h and four parameters."""
    leaves = [torch.ones(1, device=device, requires_grad=True) for _ in range(6)]
    grad_output = torch.ones(len(leaves), device=device)
    # For over a second, as other processes slow a CPU down for tenths of one.
    return host_seconds(lambda: torch.autograd.grad(torch.cat(leaves), leaves, grad_output), rounds=500)


def probe(device: torch.device, dtypes: list[str]) -> dict[str, Any]:
    """The facts named above, in a few seconds."""
    cuda = device.type == "cuda"
    large = 512 * MIB if cuda else 64 * MIB
    gemm = {}
    for name in dtypes:
        dtype = getattr(torch, name)
        fast = name in ("float16", "bfloat16")
        size = (8192 if fast else 4096) if cuda else cpu_product_size(dtype)
        gemm[name] = gemm_tflop_s(dtype, size, device)
    if cuda and "float32" in dtypes:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        gemm["tf32"] = gemm_tflop_s(torch.float32, 8192, device)
        torch.set_float32_matmul_precision(before)
    one = torch.ones(1, device=device)
    copy_gb_s = 2 * large / copy_seconds(large, device) / 1e9
    return {
        "copy_gb_s": copy_gb_s,
        "caches": caches(device, copy_gb_s),
        "gemm_tflop_s": gemm,
        "launch_us": host_seconds(one.neg) * 1e6,
        "autograd_us": autograd_seconds(device) * 1e6,
        "node_us": seconds(one.neg_, device, nodes=200) * 1e6 if cuda else None,
        "instruction_set": None if cuda else _C.cpu_capability(),
    }


def peak_tflop_s(dtype: str, facts: dict[str, Any]) -> float:
    gemm = facts["gemm_tflop_s"]
    # float32 is also had from three tf32 products of split operands (3xTF32).
    return max(gemm[dtype], gemm.get("tf32", 0) / 3) if dtype == "float32" else gemm[dtype]


def bandwidth_gb_s(size: int, clock: str, facts: dict[str, Any]) -> float:
    """Of the nearest cache that holds `size` bytes, or of memory."""
    levels = [] if clock == "cold" else facts["caches"]
    return next((rate for capacity, rate in levels if size <= capacity), facts["copy_gb_s"])


def floor_us(case: Case, clock: str, facts: dict[str, Any]) -> float:
    """Microseconds that no implementation should undercut by much: max(FLOP / peak, bytes / bandwidth), and what it
    costs to start that, on the host's clock through autograd.

    All operands come once from where they fit together, and U at each later step from where it fits alone.
    """
    compute = case.flop / peak_tflop_s(case.dtype, facts) * 1e-6
    once = case.bytes / bandwidth_gb_s(case.bytes, clock, facts)
    again = case.recurrent_reads * case.recurrent_bytes / bandwidth_gb_s(case.recurrent_bytes, "warm", facts)
    work = max(compute, (once + again) * 1e-3)
    if clock != "host":
        return work + case.launches * facts["node_us"]
    start = facts["autograd_us" if case.backward else "launch_us"]
    return work + start if facts["node_us"] is None else max(work, start)  # a GPU works while the host goes on


def gpu_state() -> dict[str, str] | None:
    """Clocks, temperature, power and the reasons for throttling (bits; 0: none) as nvidia-smi tells them."""
    gpu = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    for reasons in ("clocks_event_reasons.active", "clocks_throttle_reasons.active"):  # the second: older drivers
        fields = ["clocks.sm", "clocks.max.sm", "clocks.mem", "temperature.gpu", "power.draw", reasons]
        command = ["nvidia-smi", f"--id={gpu}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
        try:
            line = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
        except (OSError, subprocess.SubprocessError):
            continue
        return dict(zip(fields, (value.strip() for value in line.split(",")), strict=True))
    return None


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the device's ceilings.")
    parser.add_argument("--device", default=default_device(), choices=("cpu", "cuda"))
    device = torch.device(parser.parse_args().device)
    dtypes = ["float64", "float32", "bfloat16"] + (["float16"] if device.type == "cuda" else [])
    facts = probe(device, dtypes)
    if device.type == "cuda":
        facts["state"] = gpu_state()
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
