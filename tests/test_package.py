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
from rnn_ext import _C
from rnn_ext.__main__ import GPUS

ROOT = Path(__file__).parents[1]

API = {
    "RNN",
    "RNNCell",
    "LazyRNNCell",
    "ElmanNetwork",
    "rnn_cell",
    "rnn_layer",
    "RNNCellFunction",
    "convert",
    "is_cuda_built",
}


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
        (
            rnn_ext.rnn_layer,
            "input, hx, weight_ih, weight_hh, bias_ih=None, bias_hh=None, nonlinearity='tanh', "
            "reverse=False, lengths=None, batch_first=False",
        ),
        (
            rnn_ext.RNN,
            "input_size, hidden_size, num_layers=1, nonlinearity='tanh', bias=True, batch_first=False, dropout=0.0, "
            "bidirectional=False, device=None, dtype=None, **kwargs",
        ),
        (
            rnn_ext.ElmanNetwork,
            "input_size, hidden_size, output_size, num_layers=1, nonlinearity='tanh', bias=True, batch_first=False, "
            "dropout=0.0, bidirectional=False, readout_bias=False, device=None, dtype=None",
        ),
    ],
)
def test_signatures_are_the_promised_ones(f, parameters):
    found = [p.replace(annotation=p.empty) for p in inspect.signature(f).parameters.values()]
    assert ", ".join(map(str, found)) == parameters


def test_the_class_relations_are_the_promised_ones():
    assert issubclass(rnn_ext.RNNCell, nn.RNNCell)
    assert issubclass(rnn_ext.RNN, nn.RNN)
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


def test_explain_is_a_command():
    command = [sys.executable, "-m", "rnn_ext", "--explain", "1", "256", "256", "float32", "--gpu", "h100"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^forward runs: gemv ", done.stdout, re.MULTILINE)
    assert "tiled_64x64" in done.stdout and "no GPU has confirmed it" in done.stdout
    environment = {**os.environ, "RNN_EXT_KERNEL": "cudnn"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "RNN_EXT_KERNEL=cudnn: there is no such kernel" in done.stderr


@pytest.mark.parametrize("options", [["--cpu"], pytest.param([], id="no GPU is visible")])
def test_explain_is_a_command_for_the_cpu_too(options):
    command = [sys.executable, "-m", "rnn_ext", "--explain", "10", "4", "5", "float32", *options]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"the {_C.cpu_capability()} kernels" in done.stdout
    assert re.search(r"^forward runs: dot_products for 10 rows, on 1 thread$", done.stdout, re.MULTILINE)
    assert re.search(r"^backward runs: outer_products on 1 thread; dz on 1 thread$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("options", [[], ["--explain", "10", "4", "5", "float32", "--cpu"]], ids=["report", "explain"])
def test_a_refused_setting_ends_the_command_without_a_traceback(options):
    environment = {**os.environ, "RNN_EXT_CPU_CAPABILITY": "avx51"}
    command = [sys.executable, "-m", "rnn_ext", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert "error: RNN_EXT_CPU_CAPABILITY must be default, avx2" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("options", [["--cpu", "--gpu", "h100"], ["--cpu", "--tf32"]], ids=" ".join)
def test_a_gpus_options_are_refused_for_the_cpu(options, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rnn_ext", "--explain", "10", "4", "5", "float32", *options])
    with pytest.raises(SystemExit, match="2"):
        report.main()
    assert "not allowed with argument" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_the_cpu_has_a_kernel_for_every_case(dtype):
    for sizes in ["1 0 1", "1 4096 4096", "17 33 35", "300 7 5001", "65536 64 64", "4096 4096 4096"]:
        text = report.explain_cpu([*sizes.split(), dtype])
        assert "forward runs: " in text and "backward runs: " in text
    assert "dz twice, in blocks of" in report.explain_cpu(["65536", "64", "64", "bfloat16"])


@pytest.mark.parametrize(
    "case, message",
    [("64 64 64 int32", "no kernel computes in Int"), ("0 64 64 float32", "expected positive sizes, got batch 0")],
)
def test_a_case_that_the_cpu_has_no_kernel_for_is_refused(case, message):
    with pytest.raises(ValueError, match=message):
        report.explain_cpu(case.split())


needs_wgmma = pytest.mark.skipif(
    rnn_ext.is_cuda_built() and "9.0a" not in _C.cuda_archs, reason="this build has no kernels for sm_90a"
)


@pytest.fixture
def explain(monkeypatch):
    """What --explain prints of a case "B I H DTYPE [GPU [tf32]]" under these environment variables."""
    for name in ("RNN_EXT_KERNEL", "RNN_EXT_BACKWARD_KERNEL", "RNN_EXT_3XTF32"):
        monkeypatch.delenv(name, raising=False)

    def explain(case: str, **variables: str) -> str:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        words = case.split()
        return report.explain(words[:4], words[4] if len(words) > 4 else "h100", "tf32" in words[5:])

    return explain


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_every_gpu_has_a_kernel_for_every_case(explain, gpu, dtype):
    for sizes in ["1 1 1", "1 4096 4096", "17 33 35", "64 1024 1024", "300 7 5001", "4096 4096 4096"]:
        text = explain(f"{sizes} {dtype} {gpu}")
        assert "forward runs: " in text and "backward runs: " in text


@pytest.mark.parametrize(
    "case, kernel",
    [
        ("1 256 256 float32", "gemv"),
        ("256 1024 1024 float32", "tiled_"),
        ("256 1024 1024 float32 h100 tf32", "tf32_"),
        pytest.param("1024 4096 4096 bfloat16", "wgmma_128x256", marks=needs_wgmma),
        pytest.param(
            "1024 1024 1024 float16 h200", "wgmma_128x256 .* clusters of 8, .* K split in 4", marks=needs_wgmma
        ),
        pytest.param("1024 2048 2048 bfloat16", "wgmma_128x256 .* clusters of 4, .* K split in 2", marks=needs_wgmma),
        ("1024 1023 1024 float16", "staged_"),  # rows that TMA can't take
        ("16 1024 1024 float16", "tiled_"),  # too few tiles for wgmma
        ("1024 4096 4096 bfloat16 a100", "tiled_"),
        pytest.param("1024 4096 4096 float32", "3xtf32_", marks=needs_wgmma),
        pytest.param("4096 4096 4096 float32 h100 tf32", "wgmma_tf32_128x256", marks=needs_wgmma),
        pytest.param("1024 1024 1024 float32 h100 tf32", "wgmma_tf32_128x256 .* K split in 4", marks=needs_wgmma),
        ("4096 4096 4096 float32 a100 tf32", "tf32_"),
        ("8192 256 256 float32", "tiled_"),  # sums too short for it
        ("4096 4096 4096 float16 t4", "staged_"),
        ("16 1024 1024 bfloat16 b200", "tiled_"),
        ("4096 4096 4096 bfloat16 b200", "cublas"),  # its tensor-core instructions are not in these kernels
        ("4096 4096 4096 float32 b200", "tiled_"),
        ("4096 4096 4096 float32 b200 tf32", "cublas"),
    ],
)
def test_the_forward_kernel_of_a_case(explain, case, kernel):
    assert re.search(f"^forward runs: {kernel}", explain(case), re.MULTILINE)


@pytest.mark.parametrize(
    "case, kernel",
    [
        ("1 256 256 float32", "gemv .*"),
        ("16 256 256 bfloat16", "tiled_small .* 1 launch"),
        ("4096 4096 4096 float32", "tiled_large .* 2 launches"),
        ("4096 4096 4096 bfloat16 a100", "tiled_large .* 2 launches"),
        pytest.param("4096 4096 4096 bfloat16", "wgmma_128x256 .* 2 launches", marks=needs_wgmma),
        ("64 63 64 bfloat16", "tiled_staged .* 1 launch"),
        ("4096 4096 4096 float16 t4", "tiled_staged .* 1 launch"),
    ],
)
def test_the_backward_kernel_of_a_case(explain, case, kernel):
    assert re.search(f"^backward runs: {kernel}$", explain(case), re.MULTILINE)


@needs_wgmma
def test_3xtf32_is_used_unless_it_is_forbidden(explain):
    case = "1024 4096 4096 float32"
    assert "forward runs: 3xtf32_" in explain(case, RNN_EXT_3XTF32="1")
    forbidden = explain(case, RNN_EXT_3XTF32="0")
    assert "forward runs: tiled_" in forbidden and "RNN_EXT_3XTF32=0 forbids it" in forbidden
    with pytest.raises(ValueError, match="RNN_EXT_KERNEL=3xtf32_128x64: RNN_EXT_3XTF32=0 forbids it"):
        explain(case, RNN_EXT_KERNEL="3xtf32_128x64")
    with pytest.raises(ValueError, match="RNN_EXT_3XTF32 must be 0, 1 or unset, got off"):
        explain(case, RNN_EXT_3XTF32="off")


def test_the_forced_kernels_are_the_ones_that_run(explain):
    forced = explain("64 1024 1024 float32", RNN_EXT_KERNEL="tiled_64x64:2", RNN_EXT_BACKWARD_KERNEL="tiled_large")
    assert re.search("^forward is forced to run: tiled_64x64 .* K split in 2 as a cluster$", forced, re.MULTILINE)
    assert re.search("^backward is forced to run: tiled_large ", forced, re.MULTILINE)


@pytest.mark.parametrize(
    "case, kernel, message",
    [
        ("9 64 64 float64", "gemv", "it takes batches of up to 8, not 9"),
        ("64 64 64 float32", "tf32_64x64", "PyTorch's setting for matmul does not allow tf32"),
        pytest.param("64 64 64 float32", "wgmma_tf32_128x64", "PyTorch's setting for matmul", marks=needs_wgmma),
        ("64 63 64 float16", "tiled_64x64", "its copies need 16-bit operands with unit stride along K"),
        ("64 64 64 float32", "tiled_64x64:9", "K can't be split in 9"),
        pytest.param("64 60 64 float16", "wgmma_128x64", "TMA needs rows", marks=needs_wgmma),
        ("64 64 64 float16", "wgmma_128x64:2", "wgmma_128x64 does not split K over blocks"),
        ("64 64 64 float16", "wgmma_128x256:3", "wgmma_128x256 splits K in 2 or 4, not 3"),
        ("64 64 64 float16", "wgmma_128x256:4", "K can't be split in 4: it has 2 slices"),
        (
            "64 256 256 float16",
            "wgmma_128x256:4:workspace",
            "wgmma_128x256 splits K over the blocks of a cluster alone",
        ),
        ("64 64 64 float32", "wgmma_128x64", "it is not compiled for this dtype"),
        ("64 64 64 float16 b200", "wgmma_128x64", "it is not for compute capability 10.0"),
        ("64 64 64 float32", "cublas:2", "cublas does not split K over blocks"),
        ("64 64 64 float32", "cudnn", "there is no such kernel; there are gemv, "),
    ],
)
def test_a_forward_kernel_that_cannot_take_the_case_is_refused(explain, case, kernel, message):
    with pytest.raises(ValueError, match=re.escape(f"RNN_EXT_KERNEL={kernel}: {message}")):
        explain(case, RNN_EXT_KERNEL=kernel)


@pytest.mark.parametrize(
    "case, kernel, message",
    [
        ("9 64 64 float64", "gemv", "it takes batches of up to 8, not 9"),
        ("64 63 64 float16", "tiled_mid", "its copies need 16-bit operands with unit stride along rows"),
        ("64 64 64 float32 t4", "tiled_large", "it is not for compute capability 7.5"),
        ("64 64 64 float32", "wgmma_128x128", "it is not compiled for this dtype"),
        ("64 64 64 float32", "cublas", "there is no such kernel; there are gemv, tiled_small, "),
    ],
)
def test_a_backward_kernel_that_cannot_take_the_case_is_refused(explain, case, kernel, message):
    with pytest.raises(ValueError, match=re.escape(f"RNN_EXT_BACKWARD_KERNEL={kernel}: {message}")):
        explain(case, RNN_EXT_BACKWARD_KERNEL=kernel)


# The largest H whose U stays on an H100's chip: in one block, 16, and 132, of those that have a warp or more for it.
@pytest.mark.parametrize(
    "dtype, limits",
    [
        ("float32", {"resident_1": 256, "resident_8": 256, "cluster_1": 1056, "cluster_8": 864, "grid_1": 2560}),
        ("bfloat16", {"resident_256": 256, "resident_384": 384, "cluster_16bit": 1408, "grid_16bit": 4224}),
    ],
)
def test_explain_of_a_sequence_names_the_families_and_their_limits(dtype, limits):
    for family, most in limits.items():
        fits = report.explain_sequence(["50", "16", "8", str(most), dtype], "h100")
        beyond = report.explain_sequence(["50", "16", "8", str(most + 1), dtype], "h100")
        assert not re.search(rf"  {family} .*U fits", fits)
        assert f"U fits up to H = {most}, not {most + 1}" in re.search(rf"^ .*  {family} .*$", beyond, re.MULTILINE)[0]


@pytest.mark.parametrize(
    "case, kernel",
    [
        ("50 1 8 128 float32 h100", "resident_1 .*1 launch of 1 blocks of 256 threads, 1 rows each"),
        ("50 1000 8 64 float32 h100", "resident_8 .*1 launch of 125 blocks of 128 threads, 8 rows each"),
        ("50 64 8 256 bfloat16 h100", "resident_256 "),
        ("50 64 8 320 float16 a100", "resident_384 "),
        ("1024 16 8 768 bfloat16 h100", "cluster_16bit .*1 launch of 128 blocks .*1 rows each, 8 of them share U"),
        ("50 16 8 1760 bfloat16 h100", "grid_16bit .*1 launch of 110 blocks .*, 8 rows each, 55 of them share U"),
        ("50 16 8 1000 float32 a100", "grid_1 "),
        ("50 64 8 256 float64 h100", "stepped_"),
        ("50 64 8 256 float16 t4", "stepped_"),
    ],
)
def test_the_kernel_of_a_sequence(case, kernel):
    *words, gpu = case.split()
    assert len(re.findall(f"a step runs: {kernel}", report.explain_sequence(words, gpu))) == 2


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_every_gpu_has_a_kernel_for_every_sequence(gpu, dtype):
    for sizes in ["1 1 1 1", "50 16 1760 1760", "7 300 3 5001"]:
        text = report.explain_sequence([*sizes.split(), dtype], gpu)
        assert re.search(r"^forward, a step runs: (stepped|resident|cluster|grid)_", text, re.MULTILINE)
        assert re.search(r"^backward, a step runs: (stepped|resident|cluster|grid)_", text, re.MULTILINE)


@pytest.mark.parametrize(
    "case, kernel, message",
    [
        ("0 16 64 64 float32", "", "expected a positive number of steps, got 0"),
        ("5 0 64 64 float32", "", "expected positive sizes, got batch 0"),
        ("5 16 64 64 int32", "", "no kernel computes in Int"),
        (
            "5 16 64 64 float32",
            "gemv",
            "RNN_EXT_SEQUENCE_KERNEL=gemv: there is no such kernel; there are stepped_16x16",
        ),
        ("5 16 64 64 float32", "stepped_16x16", "it is not compiled for this dtype"),
    ],
)
def test_a_sequence_that_no_kernel_takes_is_refused(monkeypatch, case, kernel, message):
    monkeypatch.setenv("RNN_EXT_SEQUENCE_KERNEL", kernel)
    with pytest.raises(ValueError, match=message):
        report.explain_sequence(case.split(), "h100")


def test_explain_takes_a_sequence_with_its_steps_first(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", "rnn_ext --explain 50 16 1760 1760 bfloat16 --gpu h100".split())
    report.main()
    output = capsys.readouterr().out
    assert re.search(r"^forward, a step runs: grid_16bit +1 launch of 110 blocks", output, re.MULTILINE)
    assert "no GPU has confirmed it" in output
    for words in ("3 4 float32", "1 2 3 4 5 float32", "5 1 2 3 float32 --cpu", "5 1 2 3 float32 --tf32"):
        monkeypatch.setattr(sys, "argv", ["rnn_ext", "--explain", *words.split()])
        with pytest.raises(SystemExit, match="2"):
            report.main()


def test_a_dtype_that_no_kernel_computes_in_is_refused(explain):
    with pytest.raises(ValueError, match="no kernel computes in"):
        explain("64 64 64 int32")
