"""The CPU kernels are compiled once for each instruction set; a test run would otherwise only see this machine's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rnn_ext import _C

CAPABILITIES = ("default", "avx2", "avx512", "avx512_bf16")


def run(capability: str, *command: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"RNN_EXT_CPU_CAPABILITY": capability}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_values_are_right_with_the_kernels_of_every_instruction_set(capability):
    if capability == _C.cpu_capability():
        pytest.skip("the kernels of this run itself")
    in_use = run(capability, "-c", "import rnn_ext; print(rnn_ext._C.cpu_capability())").stdout.strip()
    if in_use != capability:
        pytest.skip(f"this CPU, or this build, has no {capability} kernels")
    file = Path(__file__).with_name("test_numerics.py")
    result = run(capability, "-m", "pytest", "-q", "-x", "-m", "not cuda", "-p", "no:cacheprovider", str(file))
    assert result.returncode == 0, result.stdout
