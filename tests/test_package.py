"""The package as installed: its names, its version, its type marker and its report."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import rnn_ext
import rnn_ext.__main__ as report
from rnn_ext.__main__ import GPUS

ROOT = Path(__file__).parents[1]

API = {"RNNCell", "LazyRNNCell", "rnn_cell", "RNNCellFunction", "convert_rnn_cells", "is_cuda_built"}


def test_every_public_name_is_exported_and_documented():
    assert API <= set(rnn_ext.__all__)
    assert all(hasattr(rnn_ext, name) for name in rnn_ext.__all__)
    assert all(inspect.getdoc(getattr(rnn_ext, name)) for name in API)


@pytest.mark.parametrize(
    "f, parameters",
    [
        (rnn_ext.RNNCell, "input_size, hidden_size, bias=True, nonlinearity='tanh', device=None, dtype=None"),
        (rnn_ext.LazyRNNCell, "hidden_size, bias=True, nonlinearity='tanh', device=None, dtype=None"),
        (rnn_ext.rnn_cell, "input, hx, weight_ih, weight_hh, bias_ih=None, bias_hh=None, nonlinearity='tanh'"),
    ],
)
def test_signatures_are_the_promised_ones(f, parameters):
    found = [p.replace(annotation=p.empty) for p in inspect.signature(f).parameters.values()]
    assert ", ".join(map(str, found)) == parameters


def test_the_class_relations_are_the_promised_ones():
    assert issubclass(rnn_ext.RNNCell, nn.RNNCell)
    assert issubclass(rnn_ext.LazyRNNCell, rnn_ext.RNNCell)
    assert issubclass(rnn_ext.RNNCellFunction, torch.autograd.Function)


def test_the_autograd_function_is_usable_on_its_own():
    x = torch.randn(3, 4, requires_grad=True)
    cell = nn.RNNCell(4, 5)
    output = rnn_ext.RNNCellFunction.apply(x, None, *cell.parameters(), "tanh")
    torch.testing.assert_close(output, cell(x))
    (gradient,) = torch.autograd.grad(output.sum(), x)
    torch.testing.assert_close(gradient, torch.autograd.grad(cell(x).sum(), x)[0])


def test_whether_cuda_was_built_is_a_bool():
    assert type(rnn_ext.is_cuda_built()) is bool


def test_the_type_marker_is_installed():
    assert importlib.resources.files(rnn_ext).joinpath("py.typed").is_file()


def test_the_version_is_the_one_of_the_metadata():
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", rnn_ext.__version__)
    try:
        installed = importlib.metadata.version("rnn_ext")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("rnn_ext is built in place, not installed")
    assert installed == rnn_ext.__version__


def test_the_version_is_written_in_one_place():
    sources = [*ROOT.glob("*.toml"), *ROOT.glob("*.py"), *ROOT.glob("rnn_ext/*.py"), *ROOT.glob("csrc/**/*.[ch]*")]
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("the sources are not beside the tests")
    literal = re.compile(rf"[\"']{re.escape(rnn_ext.__version__)}[\"']")
    assert [p.name for p in sources if literal.search(p.read_text())] == ["_version.py"]


def test_launches_neither_wait_nor_allocate_outside_pytorch():
    """Either would keep a call out of a CUDA graph. Test programs and their host runtime are not launch paths."""
    sources = [p for p in ROOT.glob("csrc/**/*") if p.suffix in (".h", ".cuh", ".cpp", ".cu")]
    if not sources:
        pytest.skip("the sources are not beside the tests")
    code = {p: re.sub(r"//.*", "", p.read_text()) for p in sources}
    assert any("cudaLaunchKernel" in text or "<<<" in text for text in code.values())
    forbidden = re.compile(r"cuda(Malloc|Free|HostAlloc|Memcpy|Memset|(Device|Stream|Event)Synchronize)\w*|\.item\b")
    found = {str(p.relative_to(ROOT)): m.group() for p, text in code.items() if (m := forbidden.search(text))}
    assert found == {}


def test_the_report_names_version_devices_and_architectures():
    command = [sys.executable, "-m", "rnn_ext"]
    report = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert rnn_ext.__version__ in report
    assert torch.__version__ in report
    assert re.search(r"CPU kernels\s+built", report)
    assert re.search(
        r"CUDA kernels\s+built for \S*\d\.\d" if rnn_ext.is_cuda_built() else r"CUDA kernels\s+not built", report
    )


@pytest.mark.cuda
def test_the_package_never_touches_the_gpu_on_import():
    """A CUDA context made on import would break fork-based data loaders."""
    code = "import torch, rnn_ext; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], timeout=120, check=True)


def explain(*arguments: str, kernel: str = "", split_tf32: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rnn_ext", "--explain", *arguments],
        cwd=ROOT,
        env={**os.environ, "RNN_EXT_KERNEL": kernel, "RNN_EXT_3XTF32": split_tf32},
        capture_output=True,
        text=True,
    )


def test_explain_names_the_kernel_and_the_others():
    done = explain("1", "256", "256", "float32", "--gpu", "h100")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^runs: gemv ", done.stdout, re.MULTILINE)
    assert "tiled_64x64" in done.stdout and "no GPU has confirmed it" in done.stdout


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_every_gpu_has_a_kernel_for_every_case(gpu, dtype):
    for case in [(1, 1, 1), (1, 4096, 4096), (17, 33, 35), (64, 1024, 1024), (300, 7, 5001), (4096, 4096, 4096)]:
        assert "runs: " in report.explain([*map(str, case), dtype], gpu)


def test_tf32_is_used_only_where_it_is_allowed():
    case = ("256", "1024", "1024", "float32", "--gpu", "h100")
    assert re.search(r"^runs: tiled_", explain(*case).stdout, re.MULTILINE)
    assert re.search(r"^runs: tf32_", explain(*case, "--tf32").stdout, re.MULTILINE)


@pytest.mark.parametrize(
    "case, kernel",
    [
        ("1024 4096 4096 bfloat16 --gpu h100", "wgmma_128x256"),
        ("1024 1024 1024 float16 --gpu h200", "wgmma_128x128"),
        ("1024 1023 1024 float16 --gpu h100", "staged_"),  # rows that the copy engine can't take
        ("16 1024 1024 float16 --gpu h100", "tiled_"),  # too few tiles
        ("1024 4096 4096 bfloat16 --gpu a100", "tiled_"),
        ("1024 4096 4096 bfloat16 --gpu b200", "tiled_"),
        ("1024 4096 4096 float32 --gpu h100", "3xtf32_"),
        ("8192 256 256 float32 --gpu h100", "tiled_"),  # sums too short for it
    ],
)
def test_large_shapes_run_on_wgmma(case, kernel):
    assert re.search(f"^runs: {kernel}", explain(*case.split()).stdout, re.MULTILINE)


def test_3xtf32_is_used_unless_it_is_forbidden():
    case = ("1024", "4096", "4096", "float32", "--gpu", "h100")
    assert re.search(r"^runs: 3xtf32_", explain(*case, split_tf32="1").stdout, re.MULTILINE)
    forbidden = explain(*case, split_tf32="0").stdout
    assert re.search(r"^runs: tiled_", forbidden, re.MULTILINE) and "RNN_EXT_3XTF32=0 forbids it" in forbidden
    assert "RNN_EXT_3XTF32=0 forbids it" in explain(*case, kernel="3xtf32_128x64", split_tf32="0").stderr
    wrong = explain(*case, split_tf32="off")
    assert wrong.returncode == 2 and "RNN_EXT_3XTF32 must be 0, 1 or unset, got off" in wrong.stderr


@pytest.mark.parametrize(
    "case, kernel, message",
    [
        ("9 64 64 float64", "gemv", "it takes batches of up to 8, not 9"),
        ("64 64 64 float32", "tf32_64x64", "PyTorch's setting for matmul does not allow tf32"),
        ("64 63 64 float16", "tiled_64x64", "its copies need 16-bit operands with unit stride along K"),
        ("64 64 64 float32", "tiled_64x64:9", "K can't be split in 9"),
        ("64 60 64 float16", "wgmma_128x64", "the copy engine needs rows"),
        ("64 64 64 float16", "wgmma_128x64:2", "wgmma_128x64 does not split K over blocks"),
        ("64 64 64 float32", "wgmma_128x64", "it is not compiled for this dtype"),
        ("64 64 64 float16 --gpu b200", "wgmma_128x64", "it is for compute capability 9.0 alone"),
        ("64 64 64 float32", "cublas", "there is no such kernel; there are gemv, "),
        ("64 64 64 int32", "", "no kernel computes in"),
    ],
)
def test_a_kernel_that_cannot_take_the_case_is_refused(case, kernel, message):
    done = explain(*case.split(), kernel=kernel)
    assert done.returncode == 2 and message in done.stderr, done.stderr
