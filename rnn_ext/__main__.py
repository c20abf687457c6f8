"""What was built, for which architectures, and which kernel runs when.

python -m rnn_ext                                                                 what was built
python -m rnn_ext --explain BATCH INPUT_SIZE HIDDEN_SIZE DTYPE [--gpu G | --cpu]  the kernels for a cell, and why
python -m rnn_ext --explain STEPS BATCH INPUT_SIZE HIDDEN_SIZE DTYPE [--gpu G]    the same for a layer of a sequence

RNN_EXT_CPU_CAPABILITY=default, avx2, avx512 or avx512_bf16 keeps the CPU kernels to that instruction set.
RNN_EXT_KERNEL=NAME, NAME:SPLITS or NAME:SPLITS:workspace forces a forward kernel that --explain lists, and
RNN_EXT_BACKWARD_KERNEL=NAME one for the backward; RNN_EXT_SEQUENCE_KERNEL=NAME one for the steps of a sequence.
RNN_EXT_3XTF32=0 keeps float32 off the tensor cores of sm_90a, where three products of tf32 make one of float32.
"""

import argparse
import os
import platform
from collections.abc import Sequence

import torch

from . import _C, __version__, is_cuda_built

KIB = 1024
# Compute capability times ten, multiprocessors, bytes of shared memory a block may have.
GPUS = {
    "t4": (75, 40, 64 * KIB),
    "a100": (80, 108, 163 * KIB),
    "a10": (86, 72, 99 * KIB),
    "l4": (89, 58, 99 * KIB),
    "h100": (90, 132, 227 * KIB),
    "h200": (90, 132, 227 * KIB),
    "b200": (100, 148, 227 * KIB),
}


def describe_gpu(name: str | None) -> tuple[int, int, int]:
    """The GPU of that name, or the visible one, or an H100."""
    if name is None and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties()
        return (
            10 * properties.major + properties.minor,
            properties.multi_processor_count,
            properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]  # the stub lacks it
        )
    return GPUS[name or "h100"]


def parse(case: Sequence[str]) -> tuple[int, int, int, torch.dtype]:
    """Batch, input_size, hidden_size and dtype, from their names."""
    *sizes, name = case
    batch, input_size, hidden_size = map(int, sizes)
    return batch, input_size, hidden_size, parse_dtype(name)


def parse_dtype(name: str) -> torch.dtype:
    """The dtype of that name."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"there is no dtype torch.{name}")
    return dtype


def explain_cpu(case: Sequence[str]) -> str:
    """Which kernels run on this CPU, with hx and for all gradients, and why.

    Args:
        case: batch, input_size, hidden_size and the name of a dtype.

    Raises:
        ValueError: for sizes or a dtype that no kernel takes, or an RNN_EXT_CPU_CAPABILITY that is not there.
    """
    return _C.explain_cpu(*parse(case))


def explain(case: Sequence[str], gpu: str | None = None, tf32: bool = False) -> str:
    """Which kernels would run, on contiguous tensors with hx and for all gradients, and what the model says of others.

    Args:
        case: batch, input_size, hidden_size and the name of a dtype.
        gpu: one of GPUS; None is the visible one, else an H100.
        tf32: whether PyTorch's precision setting lets float32 products be computed in tf32.

    Raises:
        ValueError: for sizes or a dtype that no kernel takes, an RNN_EXT_KERNEL or RNN_EXT_BACKWARD_KERNEL that
            can't take the case, or another RNN_EXT_3XTF32 than 0 or 1.
    """
    variables = ("RNN_EXT_3XTF32", "RNN_EXT_KERNEL", "RNN_EXT_BACKWARD_KERNEL")
    settings = (os.environ.get(name, "") for name in variables)
    return _C.explain(*parse(case), *describe_gpu(gpu), tf32, *settings)


def explain_sequence(case: Sequence[str], gpu: str | None = None) -> str:
    """Which kernels would run the steps of a layer over a sequence, and what the model says of others.

    Args:
        case: steps, batch, input_size, hidden_size and the name of a dtype.
        gpu: one of GPUS; None is the visible one, else an H100.

    Raises:
        ValueError: for sizes or a dtype that no kernel takes, or an RNN_EXT_SEQUENCE_KERNEL that can't take the case.
    """
    *sizes, name = case
    steps, batch, input_size, hidden_size = map(int, sizes)
    forced = os.environ.get("RNN_EXT_SEQUENCE_KERNEL", "")
    return _C.explain_sequence(steps, batch, input_size, hidden_size, parse_dtype(name), *describe_gpu(gpu), forced)


def describe() -> str:
    """What was built, and what is there to run it.

    Raises:
        ValueError: for an RNN_EXT_CPU_CAPABILITY that is not there.
    """
    lines = [
        f"rnn_ext {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        f"CPU kernels    built; this machine runs the {_C.cpu_capability()} ones on {torch.get_num_threads()} threads",
    ]
    if not is_cuda_built():
        lines.append(
            "CUDA kernels   not built: CUDA tensors go through ATen (RNN_EXT_CUDA=1 at installation demands them)"
        )
        return "\n".join(lines)
    lines.append(f"CUDA kernels   built for {_C.cuda_archs} with torch's CUDA {torch.version.cuda}")
    if not torch.cuda.is_available():
        lines.append("GPU            none visible: the CPU kernels are used")
    for i in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(i)
        major, minor = torch.cuda.get_device_capability(i)
        lines.append(
            f"GPU {i}          {name}, compute capability {major}.{minor}: --explain says which kernel runs when"
        )
    return "\n".join(lines)


def main() -> None:
    """Prints the report."""
    parser = argparse.ArgumentParser(
        prog="python -m rnn_ext", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--explain", nargs="+", metavar="NUMBER", help="[STEPS] BATCH INPUT_SIZE HIDDEN_SIZE DTYPE")
    device = parser.add_mutually_exclusive_group()
    device.add_argument("--gpu", choices=GPUS, help="that one's kernels; default: the visible one's")
    device.add_argument("--cpu", action="store_true", help="this CPU's kernels; the default where no GPU is visible")
    parser.add_argument("--tf32", action="store_true", help="as if PyTorch allowed tf32 in products, on a GPU")
    arguments = parser.parse_args()
    if arguments.cpu and arguments.tf32:
        parser.error("argument --tf32: not allowed with argument --cpu")
    if arguments.explain and len(arguments.explain) not in (4, 5):
        parser.error(f"argument --explain: expected 4 or 5 arguments, got {len(arguments.explain)}")
    sequence = arguments.explain and len(arguments.explain) == 5
    if sequence and (arguments.cpu or arguments.tf32):
        parser.error("argument --explain: STEPS are for a GPU, and without --tf32")
    on_gpu = arguments.gpu or arguments.tf32 or torch.cuda.is_available()
    try:
        if not arguments.explain:
            print(describe())
        elif sequence:
            print(explain_sequence(arguments.explain, arguments.gpu), end="")
        elif arguments.cpu or not on_gpu:
            print(explain_cpu(arguments.explain), end="")
        else:
            print(explain(arguments.explain, arguments.gpu, arguments.tf32), end="")
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
