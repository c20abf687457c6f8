"""Builds rnn_ext._C: the CPU kernels always, the CUDA kernels where torch is a CUDA build and a toolkit is found.

Environment:
    RNN_EXT_CUDA          1 demands CUDA, 0 builds the CPU part alone; unset: CUDA where it can be had
    CUDA_HOME             the toolkit, if it is not found by itself
    TORCH_CUDA_ARCH_LIST  e.g. "8.0+PTX;9.0a"; unset: the GPUs that are visible, else that list
    MAX_JOBS, NVCC_THREADS  parallel compilations, and threads within one nvcc

It works in its own folder, wherever it is called from.
"""

from __future__ import annotations

import glob
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools

try:
    import torch
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    sys.exit(
        "rnn_ext is compiled against the torch that is installed, and none is found.\n"
        "Install torch (2.11 to 2.15) first, then: pip install --no-build-isolation ."
    )

SETUPTOOLS = 77  # the first that reads pyproject.toml's licence
OLDEST_TORCH, NEWEST_TORCH = (2, 11), (2, 15)
DEFAULT_ARCHS = "8.0+PTX;9.0a"
TOOLKITS = ["/usr/local/cuda", "/usr/local/cuda-*"]
TOOLKIT = "a folder with include/cuda_runtime.h and a bin/nvcc that runs"


def warn(text: str) -> None:
    print(f"rnn_ext: warning: {text}", file=sys.stderr)


def check_versions() -> None:
    """Ends where setuptools or torch are too old, before they end in less obvious words."""
    if int(setuptools.__version__.split(".")[0]) < SETUPTOOLS:
        sys.exit(
            f"rnn_ext needs setuptools {SETUPTOOLS} or newer to be built, found {setuptools.__version__}.\n"
            f"Install it first: pip install 'setuptools>={SETUPTOOLS}'"
        )
    release = tuple(map(int, torch.__version__.split(".")[:2]))
    tested = "{}.{} to {}.{}".format(*OLDEST_TORCH, *NEWEST_TORCH)
    if release < OLDEST_TORCH:
        sys.exit(f"rnn_ext needs torch {tested}, found {torch.__version__}. Install another torch first.")
    if release > NEWEST_TORCH:
        warn(f"torch {torch.__version__} is newer than those that rnn_ext is tested with, {tested}")


def check_compiler() -> None:
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]  # it may be, e.g., "ccache g++"
    if shutil.which(compiler) is None:
        sys.exit(f"rnn_ext needs a C++ compiler, and there is no {compiler}: install g++, or set CXX to a compiler.")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        sys.exit(f"rnn_ext needs Python's headers, and there is no {header}: install python3-dev or the like.")


def whole_number(variable: str, least: int) -> str:
    """The environment variable, a whole number of at least `least`; "" where it is unset or empty."""
    value = os.environ.get(variable, "")
    if value and not (value.isdecimal() and int(value) >= least):
        sys.exit(f"{variable} must be a whole number from {least} up, or unset, got {value!r}")
    return value


def cuda_version(folder: Path) -> str | None:
    """The version of the CUDA toolkit in a folder, e.g. "13.0"; None where there is none.

    A toolkit is known by its headers: an nvcc on the PATH may be a wrapper from elsewhere.
    """
    nvcc = folder / "bin" / "nvcc"
    if not (folder / "include" / "cuda_runtime.h").is_file() or shutil.which(nvcc) is None:
        return None
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    version = re.search(r"release (\d+\.\d+)", said)
    return version[1] if version else None


def find_toolkit(torch_cuda: str | None) -> tuple[Path | None, list[str]]:
    """The first toolkit of the major version of torch's CUDA (of any, for None), and what stood in its way.

    That is: toolkits of other versions, and variables that name no toolkit.
    """
    nvcc = shutil.which("nvcc")
    folders = [(f"{v}={os.environ[v]}", os.environ[v]) for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    if nvcc:
        folders.append((nvcc, Path(nvcc).resolve().parent.parent))
    folders += [(path, path) for pattern in TOOLKITS for path in sorted(glob.glob(pattern), reverse=True)]
    passed_over = []
    for name, folder in folders:
        version = cuda_version(Path(folder))
        if version is None:
            if "=" in name:
                passed_over.append(f"{name} is no CUDA toolkit ({TOOLKIT})")
        elif torch_cuda and version.split(".")[0] != torch_cuda.split(".")[0]:
            built = f"torch {torch.__version__} is built for CUDA {torch_cuda}"
            passed_over.append(f"{name} is CUDA {version}, and {built}")
        else:
            return Path(folder), passed_over
    return None, passed_over


def choose_cuda() -> Path | None:
    """The toolkit to build with, or None for a CPU build."""
    wanted = os.environ.get("RNN_EXT_CUDA", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"RNN_EXT_CUDA must be 0, 1 or unset, got {wanted!r}")
    if wanted == "0":
        return None
    torch_cuda = torch.version.cuda
    toolkit, passed_over = find_toolkit(torch_cuda)
    missing = []
    if torch_cuda is None:
        missing.append(
            f"a CUDA build of torch (torch {torch.__version__} is a CPU build: install one from pytorch.org)"
        )
    if toolkit is None:
        kind = f"a toolkit of CUDA {torch_cuda.split('.')[0]}" if torch_cuda else "a CUDA toolkit"
        missing.append("\n    ".join([f"{kind} (set CUDA_HOME to one: {TOOLKIT})", *passed_over]))
    if wanted == "1" and missing:
        items = "".join(f"\n  - {item}" for item in missing)
        sys.exit(f"RNN_EXT_CUDA=1, but this is missing:{items}\nRNN_EXT_CUDA=0 builds the CPU kernels alone.")
    if torch_cuda is None:  # then no toolkit is expected
        return None
    for reason in passed_over:
        warn(reason)
    if toolkit is None:
        warn(f"no CUDA kernels are built, as {kind} is not found; RNN_EXT_CUDA=1 demands them, 0 does without")
    return toolkit


def choose_archs() -> str:
    """The architectures to compile for: TORCH_CUDA_ARCH_LIST, else the visible GPUs', else the default list."""
    archs = [arch for arch in re.split(r"[;\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "")) if arch]
    for arch in archs:
        if not re.fullmatch(r"\d+\.\d+[a-z]?(\+PTX)?|[A-Z][a-z]+(\+[A-Z][a-z]+)?|native", arch):
            sys.exit(f"TORCH_CUDA_ARCH_LIST must be like {DEFAULT_ARCHS!r}, or unset; {arch!r} is no architecture")
    if archs and archs != ["native"]:
        return ";".join(archs)
    if not torch.cuda.is_available():
        return DEFAULT_ARCHS
    found = sorted({torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())})
    return ";".join("9.0a" if arch == (9, 0) else "{}.{}".format(*arch) for arch in found)  # 9.0a: for wgmma


def requirement() -> str:
    """The torch that runs what is compiled for this one, as the metadata name it."""
    version = str(torch.__version__)
    abi = runpy.run_path("rnn_ext/_build.py")["abi"](version)
    return "torch==" + (version.split("+")[0] if abi == version else f"{abi}.*")


class RecordedBuild:
    """What our build_ext does besides: it tells what fails, and leaves the record that rnn_ext/_build.py reads."""

    record: dict[str, str | None]

    def build_extensions(self) -> None:
        check_compiler()
        try:
            super().build_extensions()
        except RuntimeError as error:  # the compiler has said why, or this does: a traceback would hide it
            without = "\nRNN_EXT_CUDA=0 builds the CPU kernels alone." if self.record["cuda"] else ""
            sys.exit(f"rnn_ext could not be built: {error}{without}")

    def run(self) -> None:
        self.force = True  # without ninja, too: what was compiled for another torch must not stay
        super().run()
        library = Path(self.get_ext_fullpath("rnn_ext._C"))  # in the sources, if built in place
        library.with_suffix(".json").write_text(json.dumps(self.record) + "\n")


def main() -> None:
    os.chdir(Path(__file__).resolve().parent)
    if os.environ.get("CXX") == "":  # as good as unset, for us alone
        del os.environ["CXX"]
    os.environ["PATH"] += os.pathsep + sysconfig.get_path("scripts")  # ninja, in a venv that isn't activated
    check_versions()
    whole_number("MAX_JOBS", 1)
    nvcc_threads = whole_number("NVCC_THREADS", 0)
    toolkit = choose_cuda()
    archs = ""
    if toolkit is not None:
        archs = choose_archs()
        os.environ["CUDA_HOME"] = str(toolkit)  # before cpp_extension is imported: it guesses at import
        os.environ["TORCH_CUDA_ARCH_LIST"] = archs

    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    sources = [f for f in sorted(glob.glob("csrc/**/*.cpp", recursive=True)) if not f.endswith("_cuda.cpp")]
    macros = [
        ("RNN_EXT_CUDA_ARCHS", f'"{archs}"'),
        ("RNN_EXT_TORCH", f'"{torch.__version__}"'),  # another torch: other commands, so that nothing old is linked
        ("NDEBUG", None),
    ]
    # Without OpenMP, at::parallel_for has one thread. -g, of Python's own flags, takes half of the compiler's time.
    cxx_flags = ["-O3", "-g0", "-fvisibility=hidden", "-Wall", "-fopenmp"]
    cxx_flags += ["-Wframe-larger-than=32768", "-Werror=frame-larger-than=32768"]  # a thread may have 128 KB
    nvcc_flags = ["-O3", "-lineinfo"]
    if toolkit is not None:
        sources += sorted(glob.glob("csrc/**/*_cuda.cpp", recursive=True) + glob.glob("csrc/**/*.cu", recursive=True))
        macros.append(("RNN_EXT_WITH_CUDA", None))
        if nvcc_threads:
            nvcc_flags.append(f"--threads={nvcc_threads}")

    extension = (CUDAExtension if toolkit else CppExtension)(
        name="rnn_ext._C",
        sources=sources,
        include_dirs=[str(Path("csrc").resolve())],  # ninja compiles in the folder of the objects
        depends=glob.glob("csrc/**/*.h", recursive=True) + glob.glob("csrc/**/*.cuh", recursive=True),
        define_macros=macros,
        extra_compile_args={"cxx": cxx_flags, "nvcc": nvcc_flags} if toolkit else cxx_flags,
        extra_link_args=["-fopenmp"],  # torch has loaded a library of that name, and it is that one
    )
    record = {"torch": str(torch.__version__), "cuda": torch.version.cuda if toolkit else None}

    if any(command.startswith(("build", "install", "develop", "bdist", "editable")) for command in sys.argv[1:]):
        built = f"CPU and CUDA for {archs} ({toolkit})" if toolkit else "CPU alone"
        print(f"rnn_ext: torch {torch.__version__}, {built}")

    setuptools.setup(
        ext_modules=[extension],
        cmdclass={"build_ext": type("build_ext", (RecordedBuild, BuildExtension), {"record": record})},
        install_requires=[requirement()],
    )


if __name__ == "__main__":  # so it is called by pip, too; the tests import the functions
    main()
