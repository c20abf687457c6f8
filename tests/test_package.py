"""The package as installed: its names, its version, its type marker and its report."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import rnn_ext

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
