"""The rooms of csrc/, and which of them may use which: the picture that csrc/README.md draws."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"

# Room or file: what its files may include. The longest name that fits a file counts.
MAY_INCLUDE = {
    "core/": {"core/"},
    "operators/": {"core/", "operators/"},
    "operators/bindings.cpp": {"operators/", "cell/", "sequence/", "cpu/", "cuda/"},
    "cell/": {"core/", "operators/", "cell/", "cpu/cell/launch.h", "cuda/cell/launch.h"},
    "cell/params.h": {"core/"},
    "operators/cuda.h": {"operators/", "cuda/plan/types.h"},
    "sequence/": {
        "core/",
        "operators/",
        "sequence/",
        "cpu/sequence/launch.h",
        "cuda/sequence/launch.h",
        "cuda/sequence/params.h",
    },
    "sequence/params.h": {"core/"},
    "cpu/": {"core/", "cell/params.h", "cpu/"},
    "cpu/simd/": {"cpu/simd/"},
    "cpu/cell/": {
        "core/",
        "cell/params.h",
        "cpu/aten_gemm.h",
        "cpu/isa.h",
        "cpu/kernels.h",
        "cpu/parallel.h",
        "cpu/cell/",
    },
    "cpu/sequence/": {"core/", "sequence/params.h", "cpu/isa.h", "cpu/acc_type.h", "cpu/parallel.h", "cpu/sequence/"},
    "cuda/ptx/": {"core/", "cuda/ptx/"},
    "cuda/blocks/": {"core/", "cuda/ptx/", "cuda/plan/types.h", "cuda/blocks/"},
    "cuda/plan/": {"cuda/plan/"},
    "cuda/plan/types.h": {"core/host_device.h"},
    "cuda/cell/": {"core/", "cell/params.h", "cuda/ptx/", "cuda/blocks/", "cuda/plan/", "cuda/cell/"},
    "cuda/sequence/": {"core/", "sequence/params.h", "cuda/ptx/", "cuda/blocks/", "cuda/plan/", "cuda/sequence/"},
}
# The host runtime's, in place of the device's instructions: tests/cuda_host/runtime/.
OF_THE_HOST_RUNTIME = {"cuda_host.h", "tensor_core.h", "hopper.h"}
SUFFIXES = {".h", ".cpp", ".cu", ".cuh"}


def files() -> list[str]:
    return sorted(p.relative_to(CSRC).as_posix() for p in CSRC.rglob("*") if p.suffix in SUFFIXES)


def includes(text: str) -> list[str]:
    return re.findall(r'^\s*#\s*include\s+"([^"]+)"', text, re.MULTILINE)


def why_not(file: str, included: str) -> str:
    """What is wrong with an include; empty if nothing is."""
    room = Path(file).parent
    if included in OF_THE_HOST_RUNTIME and room == Path("cuda/ptx"):
        return ""
    if not (CSRC / included).is_file():
        return f"{file} includes {included}, which is no path from csrc/"
    rules = [rule for rule in MAY_INCLUDE if file.startswith(rule)]
    if not rules:
        return f"{file} is in no room"
    if not included.startswith(tuple(MAY_INCLUDE[max(rules, key=len)])):
        return f"{file} may not include {included}"
    return ""


@pytest.mark.parametrize("file", files())
def test_a_room_uses_only_what_it_may(file: str) -> None:
    found = [why_not(file, included) for included in includes((CSRC / file).read_text())]
    assert [reason for reason in found if reason] == []


@pytest.mark.parametrize(
    "file, included",
    [
        ("core/params.h", "cell/params.h"),
        ("operators/node.h", "cell/ops.h"),
        ("cell/params.h", "operators/operands.h"),
        ("cuda/blocks/operand.cuh", "cell/params.h"),
        ("cuda/blocks/operand.cuh", "cuda/plan/cell_forward.h"),
        ("cuda/ptx/ptx.cuh", "cuda/blocks/math.cuh"),
        ("cuda/plan/cell_forward.h", "cuda/blocks/math.cuh"),
        ("cuda/cell/forward.cu", "launch.h"),
        ("cuda/cell/forward.cu", "hopper.h"),
        ("sequence/ops.cpp", "cell/ops.h"),
        ("cpu/sequence/launch.cpp", "cpu/cell/launch.h"),
        ("cpu/cell/launch.cpp", "cpu/sequence/kernels.h"),
        ("cuda/sequence/stepped.cuh", "cuda/cell/forward.cuh"),
        ("cuda/cell/forward.cuh", "cuda/sequence/rows.cuh"),
        ("somewhere/else.h", "core/params.h"),
    ],
)
def test_breaches_are_seen(file: str, included: str) -> None:
    assert why_not(file, included)


def test_kernels_of_cuda_and_what_they_are_told_know_no_torch() -> None:
    torch = re.compile(r"^\s*#\s*include\s*[<\"](torch|ATen|c10|pybind11)/", re.MULTILINE)
    knowing = {file for file in files() if torch.search((CSRC / file).read_text())}
    assert not [file for file in knowing if file.startswith(("core/", "cuda/", "cell/params.h"))]
    assert knowing  # the pattern finds those that may


def test_plans_are_plain_cpp() -> None:
    """They also run where there is no CUDA: what they include in angle brackets is the standard library's."""
    headers = {file: re.findall(r"#\s*include\s*<([^>]+)>", (CSRC / file).read_text()) for file in files()}
    assert not [(file, h) for file, hs in headers.items() if file.startswith("cuda/plan/") for h in hs if "." in h]
    assert "cuda_runtime.h" in headers["cuda/ptx/launch.cuh"]  # the pattern finds it where it may stand
