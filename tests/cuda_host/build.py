"""Compiles and runs the programs of this folder: the CUDA kernels under g++, in three variants.

Objects are kept in build/cuda_host/, named by a hash of all that went into them, so that a run without changes compiles
nothing and processes of one test run share their work.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import platform
import re
import runpy
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
HOST_RUNTIME, FIXTURES, TESTS = HERE / "runtime", HERE / "fixtures", HERE / "tests"
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
KERNELS = CSRC / "cuda"
CACHE = ROOT / "build" / "cuda_host"

INCLUDES = [f"-I{HOST_RUNTIME}", f"-I{FIXTURES}", f"-I{CSRC}"]
# -g1: the lines that reports name. Variables, which nothing shows, take up to a third of the compiler's time.
COMMON = ["-std=c++17", "-g1", "-fPIC", "-DRNN_EXT_CUDA_HOST", *INCLUDES]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-tsan", "-Wno-error=tsan"]

# The runtime is compiled without sanitizers, or they would take its bookkeeping for the kernel's memory traffic; and
# without the optimisation that makes a loop a call of memcpy, which they intercept.
RUNTIME = ["runtime.cpp", "fiber.cpp", "tensor_core.cpp", "hopper.cpp", "cuda_api.cpp"]
RUNTIME_FLAGS = ["-O2", "-fno-tree-loop-distribute-patterns"]
TRAFFIC = ["traffic.cpp"]


@dataclass(frozen=True)
class Variant:
    """One way to build the programs, and what to set when they run."""

    name: str
    define: tuple[str, ...]  # for the runtime too
    flags: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()
    dtypes: tuple[str, ...] = ()  # of its kernels, where those are not all


# bfloat16's kernels access memory and wait as half's do, or those of float with operands of 16 bits, which
# test_mainloop.cpp has. They differ in conversions and products, which the plain build compares; for the sanitizers,
# they would be a sixth of what there is to compile, and as much to run.
WITHOUT_BFLOAT16 = ("float", "double", "__half")

PLAIN = Variant("plain", (), ("-O2",))
# Of what is undefined, not what AddressSanitizer reports as well, at the access: pointers, checked wherever they are
# formed, take a quarter of the compiler's time.
ASAN = Variant(
    "asan",
    ("-DEMU_ASAN",),
    (
        *("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
        "-fno-sanitize=null,object-size,pointer-overflow",
    ),
    (("ASAN_OPTIONS", "detect_leaks=0:allocator_may_return_null=1"), ("UBSAN_OPTIONS", "print_stacktrace=1")),
    WITHOUT_BFLOAT16,
)
# -O2: at -O1 accumulators stay in memory, and every access to them is then checked, twenty times slower.
TSAN = Variant(
    "tsan",
    ("-DEMU_TSAN",),
    ("-O2", "-fsanitize=thread"),
    (("TSAN_OPTIONS", "halt_on_error=1"),),
    WITHOUT_BFLOAT16,
)
VARIANTS = {v.name: v for v in (PLAIN, ASAN, TSAN)}


@functools.cache
def toolkit() -> Path | None:
    """The CUDA toolkit that setup.py finds; of any version, as nothing here meets torch's CUDA."""
    return runpy.run_path(str(ROOT / "setup.py"))["find_toolkit"](None)[0]


@functools.cache
def cuda_include() -> Path | None:
    """A folder with the CUDA headers: the toolkit's, or the one that torch's CUDA build brings."""
    site = Path(sysconfig.get_path("purelib"), "nvidia")
    candidates = [*site.glob("cu*/include"), site / "cuda_runtime" / "include"]
    if found := toolkit():
        candidates.insert(0, found / "include")
    headers = ("cuda.h", "cuda_runtime.h", "cuda_fp16.h", "crt/host_defines.h")
    return next((folder for folder in candidates if all((folder / h).is_file() for h in headers)), None)


def host_compiler() -> str | None:
    """The host compiler: g++, whose inline assembly and sanitizers the runtime is written for."""
    return shutil.which(os.environ.get("RNN_EXT_HOST_CXX", "g++"))


def why_not() -> str | None:
    """What is missing for these tests, if anything."""
    if platform.system() != "Linux":
        return "the host runtime of the CUDA kernels needs Linux"
    if host_compiler() is None:
        return "no g++ to compile the CUDA kernels for the host"
    if cuda_include() is None:
        return "no CUDA headers (set CUDA_HOME to a toolkit)"
    return None


@functools.cache
def _version() -> str:
    return subprocess.run([host_compiler() or "g++", "--version"], capture_output=True, text=True, check=True).stdout


@functools.cache
def headers_digest() -> str:
    """A hash of every header that a program here can include."""
    digest = hashlib.sha256()
    for header in sorted(f for d in (HERE, CSRC) for pattern in ("*.h", "*.cuh") for f in d.rglob(pattern)):
        digest.update(str(header).encode() + b"\0" + header.read_bytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _lock(path: Path, wait: bool):
    """One process builds a file, the others wait for it, or are told that they would have to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(path.name + ".lock"), "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def run_compiler(
    arguments: list[str], output: Path, compiler: str | None = None, refuse: str = "", wait: bool = True
) -> None:
    """Runs the host compiler, or another one, unless `output` is there already; shows its messages if it fails.

    It has failed, too, if the pattern `refuse` is given and found in its messages. Without `wait` it leaves alone what
    another process is at.
    """
    if output.exists():
        return
    with _lock(output, wait) as is_ours:
        if output.exists() or not is_ours:
            return
        unfinished = output.with_name(f"{output.name}.{os.getpid()}.tmp")
        command = [compiler or host_compiler() or "g++", *arguments, "-o", str(unfinished)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0 or (refuse and re.search(refuse, done.stdout + done.stderr)):
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        os.replace(unfinished, output)


def build_object(source: Path, flags: list[str], wait: bool = True) -> Path:
    """Compiles one file, kernels and all as C++, into the cache."""
    arguments = [*COMMON, *flags, f"-isystem{cuda_include()}"]
    parts = [_version(), " ".join(arguments), source.name, source.read_text(), headers_digest()]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
    output = CACHE / f"{source.name}.{key}.o"
    run_compiler([*arguments, "-x", "c++", "-c", str(source)], output, wait=wait)
    return output


def build_objects(sources: list[Path], flags: list[str]) -> list[Path]:
    """All of them. Two processes that want the same share the work."""
    for source in sources:
        build_object(source, flags, wait=False)
    return [build_object(source, flags) for source in sources]


def build_runtime(variant: Variant) -> list[Path]:
    """The objects of the host runtime."""
    objects = [build_object(HOST_RUNTIME / f, [*RUNTIME_FLAGS, *WARNINGS, *variant.define]) for f in RUNTIME]
    objects += [build_object(HOST_RUNTIME / f, [*variant.flags, *WARNINGS, *variant.define]) for f in TRAFFIC]
    return objects


def kernel_flags(variant: Variant) -> list[str]:
    """For what runs as CUDA code. Registers start out as a pattern that no sum survives, not as zero."""
    flags = [*variant.flags, *variant.define, *WARNINGS, "-ftrivial-auto-var-init=pattern"]
    if variant.dtypes:
        flags.append(f"-DRNN_EXT_FOR_EACH_DTYPE(f)={' '.join(f'f({dtype})' for dtype in variant.dtypes)}")
    return flags


def build_program(name: str, variant: Variant, sources: list[Path]) -> Path:
    """Links `sources`, compiled for `variant`, with the runtime."""
    objects = build_runtime(variant) + build_objects(sources, kernel_flags(variant))
    key = hashlib.sha256("\0".join(o.name for o in objects).encode()).hexdigest()[:20]
    output = CACHE / f"{name}.{variant.name}.{key}"
    run_compiler([*variant.flags, *map(str, objects)], output)
    return output


def wrappers_program(variant: Variant) -> Path:
    """The tests of the runtime and of the PTX wrappers."""
    return build_program("test_wrappers", variant, [TESTS / "test_wrappers.cpp"])


def launch_program() -> Path:
    """The tests of launch.cuh as nvcc sees it, on a runtime that only takes down what it is asked for."""
    source = TESTS / "test_launch.cpp"
    arguments = ["-std=c++17", f"-I{CSRC}", f"-isystem{cuda_include()}", *WARNINGS, str(source)]
    parts = [_version(), " ".join(arguments), source.read_text(), headers_digest()]
    output = CACHE / f"test_launch.{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:20]}"
    run_compiler(arguments, output)
    return output


def kernel_sources(variant: Variant) -> list[Path]:
    """The kernels of the variant's dtypes, and their launchers."""
    sources = sorted([*KERNELS.rglob("*.cu"), *KERNELS.rglob("*.cpp")])
    instances = tuple(f"_{dtype.removeprefix('__')}.cu" for dtype in variant.dtypes)
    return [f for f in sources if f.parent.name != "instances" or not instances or f.name.endswith(instances)]


def kernels_program(variant: Variant) -> Path:
    """The tests of the project's kernels."""
    tests = [TESTS / f"test_{part}.cpp" for part in ("kernels", "mainloop", "backward_plan", "recurrence")]
    sources = [*tests, *kernel_sources(variant)]
    return build_program("test_kernels", variant, sources)


def torch_operators() -> Path:
    """A library that registers torch.ops.rnn_ext_cuda_host: the launchers on CPU tensors."""
    import torch
    from torch.utils import cpp_extension

    torch_flags = [f"-isystem{folder}" for folder in cpp_extension.include_paths()]
    abi = int(torch.compiled_with_cxx11_abi())
    # Another torch may stand at the same place: its version makes the object another one.
    torch_flags += ["-O1", "-std=c++20", f"-D_GLIBCXX_USE_CXX11_ABI={abi}", f"-DTORCH_VERSION_IS={torch.__version__}"]
    objects = build_runtime(PLAIN)
    objects += build_objects(kernel_sources(PLAIN), kernel_flags(PLAIN))
    of_torch = [FIXTURES / "torch_ops.cpp", CSRC / "operators" / "checks.cpp", CSRC / "sequence" / "arguments.cpp"]
    objects += [build_object(f, torch_flags) for f in of_torch]
    key = hashlib.sha256("\0".join(o.name for o in objects).encode()).hexdigest()[:20]
    output = CACHE / f"torch_ops.{key}.so"
    # -Bsymbolic: the runtime's cudaGetDevice and its like, not those of a libcudart that torch has loaded.
    link = ["-shared", "-Wl,-Bsymbolic", *map(str, objects)]
    libraries = [f"-L{folder}" for folder in cpp_extension.library_paths()] + ["-ltorch", "-ltorch_cpu", "-lc10"]
    run_compiler([*link, *libraries], output)
    return output


@functools.cache
def _without_address_randomisation() -> list[str]:
    """What to put before a command so that an old ThreadSanitizer finds its memory where it expects it."""
    return ["setarch", platform.machine(), "-R"] if shutil.which("setarch") else []


def _with_lines(report: str) -> str:
    """A sanitizer's report, with the source lines of those frames for which it found none: `#0 ... (program+0x123)`."""

    def line_of(frame: re.Match[str]) -> str:
        command = ["addr2line", "-i", "-e", frame[1], frame[2]]  # with what is inlined there
        done = subprocess.run(command, capture_output=True, text=True)
        return f"{frame[0]} {done.stdout.strip()}"

    return re.sub(r"\((/\S+)\+(0x[0-9a-f]+)\)$", line_of, report, flags=re.MULTILINE)


def run(program: Path, variant: Variant, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Runs a program; stdout and stderr come back in one text."""
    environment = {**os.environ, **dict(variant.environment)}

    def start(prefix: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*prefix, str(program), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout,
            env=environment,
        )

    done = start([])
    if "unexpected memory mapping" in done.stdout and _without_address_randomisation():
        done = start(_without_address_randomisation())
    done.stdout = _with_lines(done.stdout)
    return done
