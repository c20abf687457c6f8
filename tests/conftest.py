"""Where the tests run: the `device` fixture repeats a test on the CPU and, marked `cuda`, on a GPU."""

from __future__ import annotations

import os

# Inductor's cache would give a rebuilt extension the graphs of the last one.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

import pytest
import torch

import rnn_ext


def why_not_cuda() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device is visible"
    if not rnn_ext.is_cuda_built():
        return "rnn_ext was built without its CUDA kernels"
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if why_not_cuda() and not config.option.collectonly:  # what there is can be asked anywhere
        there = [item for item in items if not item.get_closest_marker("cuda")]
        if len(there) < len(items):
            config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("cuda")])
            items[:] = there


def pytest_report_header() -> str:
    return f"tests marked cuda: {f'deselected, as {reason}' if (reason := why_not_cuda()) else 'run'}"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def same_random_numbers_in_every_run() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_compiler_caches(request: pytest.FixtureRequest):
    """Dynamo caches by code object: without a reset a compiled test would depend on those before it."""
    yield
    if "compil" in request.node.name:
        torch._dynamo.reset()
