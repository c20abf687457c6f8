"""``python -m rnn_ext``: what was built, for which architectures, and which kernels this machine would use."""

import platform

import torch

from . import _C, __version__, is_cuda_built


def main() -> None:
    """Prints the report."""
    print(f"rnn_ext {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(
        f"CPU kernels    built; this machine runs the {_C.cpu_capability()} ones on {torch.get_num_threads()} threads"
    )
    if not is_cuda_built():
        print("CUDA kernels   not built: CUDA tensors go through ATen (RNN_EXT_CUDA=1 at installation demands them)")
        return
    print(f"CUDA kernels   built for {_C.cuda_archs} with torch's CUDA {torch.version.cuda}")
    if not torch.cuda.is_available():
        print("GPU            none visible: the CPU kernels are used")
    for i in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(i)
        major, minor = torch.cuda.get_device_capability(i)
        print(f"GPU {i}          {name}, compute capability {major}.{minor}: the tiled kernels, forward and backward")


if __name__ == "__main__":
    main()
