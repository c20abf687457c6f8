"""Clocks: host-inclusive time, device time by graph replay, kernels launched a call. Seconds everywhere.

Implementations are timed in alternating rounds, so that what disturbs the machine disturbs all of them, and a speed-up
is the median over rounds of the ratio within a round.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch

Run = Callable[[], Any]
Item = TypeVar("Item")
LEAST = 3  # rounds of which quartiles can be told
REST = 2e-3  # seconds before a sample: the last peer's threads have stopped spinning


def keep_freed_memory() -> None:
    """Has glibc's malloc keep what is freed, for every implementation alike.

    By default it hands large blocks back to the system or not, depending on what happens to lie next to them. To fault
    them in again can take as long as the call that is timed.
    """
    set_malloc_thresholds(trim=2**30, mmap=2**25)  # the most that every version takes


def return_freed_memory() -> None:
    """Has it hand back all but small blocks at once, so that the process's pages are those in use."""
    set_malloc_thresholds(trim=2**17, mmap=2**17)


def set_malloc_thresholds(trim: int, mmap: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_mmap_threshold = -1, -3
        mallopt(m_trim_threshold, trim)
        mallopt(m_mmap_threshold, mmap)


def synchronize() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def time_calls(run: Run, calls: int) -> float:
    """Seconds a call, from the first line of Python to the last kernel's end."""
    synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    synchronize()
    return (time.perf_counter() - start) / calls


def host_sampler(run: Run, sample_seconds: float) -> Callable[[], float]:
    """A function that takes one sample of about `sample_seconds`, after warming up for as long, or of one call."""
    seconds = time_calls(run, 1)
    if seconds < 50 * sample_seconds:  # lazy initialisation stays out of the estimate
        seconds = min(seconds, time_calls(run, 1))
    for _ in range(2):  # the second estimate is free of what the first still had to load
        if seconds < sample_seconds:
            seconds = time_calls(run, max(1, int(sample_seconds / 2 / seconds)))
    calls = max(1, round(sample_seconds / seconds))
    return lambda: time_calls(run, calls)


def capture(runs: Sequence[Run]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """All `runs` in one CUDA graph, and the last one's result, which each replay writes anew."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for run in [runs[0], runs[0], *runs]:  # capture must meet no lazy initialisation
            run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for run in runs:
            result = run()
    return graph, result


def device_sampler(
    runs: Sequence[Run], sample_seconds: float, flush: torch.Tensor | None = None
) -> Callable[[], float]:
    """A function that takes one sample of the device's seconds a run, from replays of one graph of all `runs`.

    Warm (`flush` is None): replays back to back. Cold: `flush`, larger than the L2, is read before each replay; the
    caller gives each run operands of its own, so that no run finds in L2 what an earlier one loaded. The host queues
    the replay while the device is still busy with what goes before the first event.
    """
    graph, _ = capture(runs)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def sample(replays: int) -> float:
        if flush is None:
            graph.replay()
        else:
            flush.sum()
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / replays / len(runs)

    sample(1)
    replays = 1 if flush is not None else max(1, round(sample_seconds / (sample(1) * len(runs))))
    return lambda: sample(replays)


def sample_in_turns(
    samplers: dict[Item, Callable[[], float]], rounds: int, seconds: float = float("inf")
) -> dict[Item, list[float]]:
    """`rounds` samples of each, in alternating order; fewer, but LEAST, where they would take more than `seconds`."""
    samples: dict[Item, list[float]] = {name: [] for name in samplers}
    names = list(samplers)
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        for i in range(rounds):
            if i >= LEAST and (time.perf_counter() - start) * (i + 1) / i > seconds:
                break
            for name in names if i % 2 == 0 else reversed(names):
                time.sleep(REST)
                samples[name].append(samplers[name]())
    finally:
        if collecting:
            gc.enable()
    return samples


def quartiles(values: Iterable[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile."""
    values = list(values)
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def kernels_in(events: Iterable[Any], gap: float) -> dict[str, int]:
    """How many kernels of a profiler's trace started in each range marked by the host, give or take half the gap."""
    cuda = torch.autograd.DeviceType.CUDA
    ranges, starts = {}, []
    for event in events:
        if event.is_user_annotation:  # also ranges that Inductor marks, and the device's copy of each
            if event.device_type != cuda:
                ranges[event.name] = event.time_range
        elif event.device_type == cuda and not event.name.startswith(("Memcpy", "Memset")):
            starts.append(event.time_range.start)
    margin = gap / 2 * 1e6  # the events' times are in microseconds
    return {
        name: sum(time.start - margin <= start <= time.end + margin for start in starts)
        for name, time in ranges.items()
    }


def kernels_per_call(cases: Iterable[Callable[[], Run]], calls: int = 4) -> list[float | None]:
    """Kernels launched by a call of each case's run, as one session of the profiler counts them; None if it failed.

    Copies and memory sets are no kernels. A case makes its run when its turn comes, so that one at a time has memory.
    To start and stop the profiler takes longer than most cases, and what its trace has of a case is told by the time.
    """
    from torch.profiler import ProfilerActivity, profile, record_function

    gap = 2e-3  # seconds without a kernel on either side of a case: more than the two clocks can be apart
    names: list[str | None] = []
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for case in cases:
            try:
                run = case()
                run()
                synchronize()
                time.sleep(gap)
                names.append(f"case {len(names)}")
                with record_function(names[-1]):
                    for _ in range(calls):
                        run()
                    synchronize()
                time.sleep(gap)
            except Exception:  # it stands in the results with the reason that its measurement gave
                names.append(None)
            run = None
    counts = kernels_in(profiler.events(), gap)
    return [None if name is None else counts.get(name, 0) / calls for name in names]
