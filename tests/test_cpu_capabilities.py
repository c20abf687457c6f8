"""The CPU kernels are compiled once for each instruction set; a test run would otherwise only see this machine's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rnn_ext import _C

CAPABILITIES = ("default", "avx2", "avx512", "avx512_bf16")


def run(capability: str, *command: str, **variables: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"RNN_EXT_CPU_CAPABILITY": capability} | variables
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=600)


def skip_unless_usable(capability: str) -> None:
    in_use = run(capability, "-c", "import rnn_ext; print(rnn_ext._C.cpu_capability())").stdout.strip()
    if in_use != capability:
        pytest.skip(f"this CPU, or this build, has no {capability} kernels")


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_values_are_right_with_the_kernels_of_every_instruction_set(capability):
    if capability == _C.cpu_capability():
        pytest.skip("the kernels of this run itself")
    skip_unless_usable(capability)
    files = [str(Path(__file__).parent / name) for name in ("cell/test_numerics.py", "sequence/test_kernels.py")]
    result = run(capability, "-m", "pytest", "-q", "-x", "-m", "not cuda", "-p", "no:cacheprovider", *files)
    assert result.returncode == 0, result.stdout


# 5 rows go through the kernels for few, 64 through those for many; with 600 units blocks of the weights are copied.
SMALL_STACKS = """
import threading, torch, rnn_ext

def both_directions():
    torch.set_num_threads(int({threads}))
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for batch, size in ((5, 300), (64, 300), (64, 600), (300, 40)):
            cell = rnn_ext.RNNCell(size, size, dtype=dtype)
            x = torch.randn(batch, size, dtype=dtype)
            y = torch.ops.rnn_ext.rnn_cell(x, x, *(p.detach() for p in cell.parameters()))
            torch.ops.rnn_ext.rnn_cell_backward(y, y, x, x, cell.weight_ih, cell.weight_hh, "tanh", [True] * 6)
            steps = x.expand(9, batch, size)
            weights = [p.detach() for p in cell.parameters()]
            y, h = torch.ops.rnn_ext.rnn_layer(steps, x, *weights)
            options = (False, False, None, None)
            torch.ops.rnn_ext.rnn_layer_backward(y, h, y, steps, x, *weights[:2], "tanh", [True] * 6, *options)

threading.stack_size(128 << 10)
thread = threading.Thread(target=both_directions)
thread.start()
thread.join()
print("done")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="sets the threads' stacks")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_no_kernel_overflows_a_small_stack(capability, threads):
    """128 KB in the caller's thread, Python's and PyTorch's own frames included, and 64 KB in OpenMP's: in a process of
    its own, which an overflow ends."""
    skip_unless_usable(capability)
    result = run(capability, "-c", SMALL_STACKS.format(threads=threads), OMP_STACKSIZE="64k")
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr


TWO_CALLS = """
import torch, rnn_ext
for _ in range(2):
    try:
        rnn_ext.RNNCell(4, 5)(torch.zeros(3, 4))
    except ValueError as error:
        print(error)
"""


@pytest.mark.parametrize("capability", ["avx51", "AVX2", "avx512 ", "0"])
def test_an_unknown_instruction_set_is_refused_in_every_call(capability):
    result = run(capability, "-c", TWO_CALLS)
    wanted = f"RNN_EXT_CPU_CAPABILITY must be default, avx2, avx512, avx512_bf16 or unset, got {capability}\n"
    assert (result.stdout, result.returncode) == (2 * wanted, 0), result.stderr


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_an_instruction_set_is_used_or_refused_never_replaced(capability):
    result = run(capability, "-c", "import rnn_ext; print(rnn_ext._C.cpu_capability())")
    refusal = f"ValueError: RNN_EXT_CPU_CAPABILITY={capability}, but the most that this CPU and this build have is "
    assert result.stdout == f"{capability}\n" or (result.stdout == "" and refusal in result.stderr)
