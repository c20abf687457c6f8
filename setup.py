"""Builds rnn_ext._C: the CPU kernels always, the CUDA kernels where torch is a CUDA build and a toolkit is found.

Environment:
    RNN_EXT_CUDA          1 demands CUDA, 0 builds the CPU part alone; unset: CUDA where it can be had
    CUDA_HOME             the toolkit, if it is not found by itself
    TORCH_CUDA_ARCH_LIST  e.g. "8.0+PTX;9.0a"; unset: the GPUs that are visible, else that list
    MAX_JOBS, NVCC_THREADS  parallel compilations, and threads within one nvcc
"""

import glob
import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

try:
    import torch
except ImportError:
    sys.exit(
        "rnn_ext is compiled against the torch that is installed, and none is found.\n"
        "Install torch (2.11 to 2.15) first, then: pip install --no-build-isolation ."
    )

DEFAULT_ARCHS = "8.0+PTX;9.0a"


def find_toolkit() -> Path | None:
    """The folder of a CUDA toolkit, known by its headers: an nvcc on the PATH may be a wrapper from elsewhere."""
    nvcc = shutil.which("nvcc")
    candidates = [
        os.environ.get("CUDA_HOME"),
        os.environ.get("CUDA_PATH"),
        Path(nvcc).resolve().parent.parent if nvcc else None,
        "/usr/local/cuda",
        *sorted(glob.glob("/usr/local/cuda-*"), reverse=True),
    ]
    for candidate in candidates:
        if candidate and (Path(candidate) / "include" / "cuda_runtime.h").is_file():
            if (Path(candidate) / "bin" / "nvcc").is_file():
                return Path(candidate)
    return None


def choose_cuda() -> Path | None:
    """The toolkit to build with, or None for a CPU build."""
    wanted = os.environ.get("RNN_EXT_CUDA", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"RNN_EXT_CUDA must be 0, 1 or unset, got {wanted!r}")
    if wanted == "0":
        return None
    toolkit = find_toolkit()
    missing = []
    if torch.version.cuda is None:
        missing.append(
            f"a CUDA build of torch (torch {torch.__version__} is a CPU build: install one from pytorch.org)"
        )
    if toolkit is None:
        missing.append("a CUDA toolkit (no folder with bin/nvcc and include/cuda_runtime.h: set CUDA_HOME to one)")
    if missing and wanted == "1":
        sys.exit("RNN_EXT_CUDA=1, but this is missing:\n  - " + "\n  - ".join(missing))
    return None if missing else toolkit


def visible_archs() -> str:
    """The architectures of the GPUs that are visible (9.0 as 9.0a, for wgmma), else the default list."""
    if not torch.cuda.is_available():
        return DEFAULT_ARCHS
    found = sorted({torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())})
    return ";".join("9.0a" if arch == (9, 0) else "{}.{}".format(*arch) for arch in found)


toolkit = choose_cuda()
if toolkit is not None:
    os.environ["CUDA_HOME"] = str(toolkit)  # before cpp_extension is imported: it guesses at import
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", visible_archs())
archs = os.environ["TORCH_CUDA_ARCH_LIST"].replace(" ", ";") if toolkit else ""

from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension  # noqa: E402

sources = [f for f in sorted(glob.glob("csrc/*.cpp") + glob.glob("csrc/cpu/*.cpp")) if f != "csrc/ops_cuda.cpp"]
sources += sorted(glob.glob("csrc/cuda/*.cpp"))  # which kernel runs when, also told where there is no CUDA
macros = [("RNN_EXT_CUDA_ARCHS", f'"{archs}"'), ("NDEBUG", None)]
cxx_flags = ["-O3", "-fvisibility=hidden", "-Wall", "-fopenmp"]  # without OpenMP, at::parallel_for has one thread
nvcc_flags = ["-O3", "-lineinfo"]
if toolkit is not None:
    sources += ["csrc/ops_cuda.cpp", *sorted(glob.glob("csrc/cuda/*.cu"))]
    macros.append(("RNN_EXT_WITH_CUDA", None))
    if threads := os.environ.get("NVCC_THREADS"):
        nvcc_flags.append(f"--threads={threads}")

extension = (CUDAExtension if toolkit else CppExtension)(
    name="rnn_ext._C",
    sources=sources,
    depends=glob.glob("csrc/**/*.h", recursive=True) + glob.glob("csrc/**/*.cuh", recursive=True),
    define_macros=macros,
    extra_compile_args={"cxx": cxx_flags, "nvcc": nvcc_flags} if toolkit else cxx_flags,
    extra_link_args=["-fopenmp"],  # torch has loaded a library of that name, and it is that one
)

if any(command.startswith(("build", "install", "develop", "bdist", "editable")) for command in sys.argv[1:]):
    print(f"rnn_ext: torch {torch.__version__}, CPU" + (f" and CUDA for {archs} ({toolkit})" if toolkit else " alone"))

setup(
    ext_modules=[extension],
    cmdclass={"build_ext": BuildExtension},
    install_requires=["torch>=2.11"],
)
