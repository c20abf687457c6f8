"""The machine code of CUDA sources, without a GPU: compiles them, or takes what is built, and says what it uses."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from . import build

FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "-cubin"]
SERIALISED_WGMMA = r"\(C75\d\d\)"  # ptxas notes that it made one wgmma wait for the other, or put waits of its own


def nvcc() -> str | None:
    """The toolkit's compiler."""
    toolkit = build.toolkit()
    return str(toolkit / "bin" / "nvcc") if toolkit else None


def cuobjdump() -> str | None:
    """The disassembler: a toolkit's, or the one in the triton wheel that torch's CUDA build brings."""
    compiler = nvcc()
    beside = Path(compiler).parent / "cuobjdump" if compiler else None
    if beside and beside.is_file():
        return str(beside)
    spec = importlib.util.find_spec("triton")
    for folder in spec.submodule_search_locations or [] if spec else []:
        tool = Path(folder) / "backends" / "nvidia" / "bin" / "cuobjdump"
        if tool.is_file():
            return str(tool)
    return shutil.which("cuobjdump")


def why_not() -> str | None:
    """What is missing, if anything."""
    if nvcc() is None:
        return "no nvcc to compile the CUDA kernels (set CUDA_HOME to a toolkit)"
    if cuobjdump() is None:
        return "no cuobjdump to look at compiled kernels (it comes with a toolkit and with triton)"
    return None


@dataclass(frozen=True)
class Kernel:
    """What one kernel uses: registers a thread, and bytes a thread of stack and local memory."""

    name: str
    registers: int
    stack: int
    local: int
    max_threads: int | None


@dataclass(frozen=True)
class Code:
    """Machine code: what a file has for one architecture."""

    file: Path
    arch: str


def compile(source: Path, arch: str) -> Code:
    """The code of one source, compiled here."""
    arguments = [*FLAGS, f"-arch={arch}", *build.INCLUDES]
    parts = [nvcc() or "", " ".join(arguments), source.read_text(), build.headers_digest()]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
    output = build.CACHE / f"{source.stem}.{arch}.{key}.cubin"
    build.run_compiler([*arguments, str(source)], output, compiler=nvcc(), refuse=SERIALISED_WGMMA)
    return Code(output, arch)


def built_or_compiled(source: Path, arch: str) -> Code:
    """The code in the extension's own build, if that is there, newer than the sources, and made for `arch`."""
    inputs = [source, *build.CSRC.rglob("*.h"), *build.CSRC.rglob("*.cuh")]
    for built in build.ROOT.glob(f"build/temp.*/{source.relative_to(build.ROOT).with_suffix('.o')}"):
        code = Code(built, arch)
        if built.stat().st_mtime > max(f.stat().st_mtime for f in inputs) and f".{arch}.cubin" in _dump("-lelf", code):
            return code
    return compile(source, arch)


def _dump(option: str, code: Code) -> str:
    environment = {**os.environ, "PATH": f"{Path(cuobjdump() or '').parent}:{os.environ['PATH']}"}  # it calls nvdisasm
    command = [cuobjdump() or "cuobjdump", option, "-arch", code.arch, str(code.file)]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def resources(code: Code) -> list[Kernel]:
    """All its kernels."""
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", _dump("-res-usage", code))
    bounds = {}
    for section in re.split(r"\n(?=\.nv\.info)", _dump("-elf", code)):
        name = re.match(r"\.nv\.info\.(\S+)", section)
        limit = re.search(r"EIATTR_MAX_THREADS\s+Format:\s*\S+\s+Value:\s*((?:0x[0-9a-f]+\s*)+)", section)
        if name and limit:
            x, y, z = (int(v, 16) for v in limit[1].split()[:3])
            bounds[name[1]] = x * y * z
    return [Kernel(n, int(reg), int(stack), int(local), bounds.get(n)) for n, reg, stack, local in usage]


def sass(code: Code) -> str:
    """The disassembly."""
    return _dump("-sass", code)


def instructions(code: Code) -> dict[str, list[str]]:
    """By kernel, in the order in which they lie."""
    by_kernel = {}
    for text in re.split(r"\n\s*Function : ", sass(code))[1:]:
        by_kernel[text.split()[0]] = re.findall(r"/\*[0-9a-f]{4,}\*/\s+([^;]+?)\s*;", text)
    return by_kernel


def barriers_before_products(code: Code) -> list[str]:
    """Memory barriers of kernels that multiply by wgmma, at their start and in their loops: up to the last product.

    The block's own in front of a fence.proxy.async is none of them: a kernel that writes operands needs it.
    """
    found = []
    for kernel, lines in instructions(code).items():
        products = [i for i, line in enumerate(lines) if "HGMMA" in line]
        for i in range(products[-1]) if products else ():
            is_proxy_fence = "MEMBAR.ALL.CTA" in lines[i] and "FENCE.VIEW.ASYNC" in lines[i + 1]
            if "MEMBAR" in lines[i] and not is_proxy_fence:
                found.append(f"{kernel}: {lines[i]}")
    return found
