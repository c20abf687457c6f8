"""The runner of the tests on a GPU: what a test that hangs, crashes or breaks the context costs the others."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ISOLATED = Path(__file__).resolve().parent / "isolated.py"

# A stand-in for torch, whose context a test can break.
TESTS = """
import os, sys, time, types
import pytest

def fine(): pass
def broken(): raise RuntimeError("CUDA error: unspecified launch failure\\nand more")

cuda = types.SimpleNamespace(is_initialized=lambda: True, synchronize=fine)
sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)

def test_first(): pass
def test_fails(): assert 1 + 1 == 3
@pytest.mark.parametrize("case", ["short", "long"])
def test_hangs(case):
    if case == "long":
        with open(__file__ + ".pid", "w") as pid:
            pid.write(str(os.getpid()))
        os.rename(pid.name, __file__ + ".hangs")
        time.sleep(60)
def test_crashes(): os.abort()
@pytest.mark.skip
def test_skipped(): pass
@pytest.mark.xfail
def test_fails_as_expected(): assert False
def test_breaks_the_context(): cuda.synchronize = broken
def test_last(): cuda.synchronize()
"""
OUTCOMES = {
    "test_fails": "failed",
    "test_hangs[long]": "TIME OUT",
    "test_crashes": "CRASHED, status -6",
    "test_breaks_the_context": "CONTEXT BROKEN",
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "test_planted.py"
    file.write_text(TESTS)
    return file


def isolated(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ISOLATED, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("how", ["--workers=1", "--workers=2", "--each"])
def test_a_lost_test_costs_no_other_its_run(file: Path, how: str) -> None:
    result = isolated(how, "--limit=3", "-q", file)
    assert result.returncode == 1, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    bad = lines[-1 - len(OUTCOMES) : -1]
    assert {line.rpartition("::")[2]: line.partition(": ")[0] for line in bad} == OUTCOMES
    counts = dict(reversed(part.split(" ", 1)) for part in lines[-1].split(", "))
    assert counts == {
        "passed": "3",
        "skipped": "1",
        "xfailed": "1",
        **{outcome.partition(",")[0]: "1" for outcome in OUTCOMES.values()},
    }
    assert "test_hangs[long] took over 3 s" in result.stdout
    assert "in test_hangs\n" in result.stdout, "the stacks of a test that hangs are printed"
    assert "CUDA error: unspecified launch failure" in result.stdout


def test_success_needs_a_test_that_passed(file: Path) -> None:
    assert isolated("-q", file, "-k", "first or skipped").returncode == 0
    assert isolated("-q", file, "-k", "skipped").returncode == 1
    assert isolated("-q", file.with_name("test_absent.py")).returncode == 1


@pytest.fixture
def tool(tmp_path: Path) -> Path:
    """Stands for compute-sanitizer: a program that starts the tests and has a status of its own."""
    tool = tmp_path / "tool"
    tool.write_text('#!/bin/sh\n"$@"\nexit 9\n')
    tool.chmod(0o755)
    return tool


def test_the_status_of_what_the_tests_run_under_counts(file: Path, tool: Path) -> None:
    """It finds faults in tests that pass."""
    result = isolated("--under", f"{tool} ", "-q", file, "-k", "first")
    assert result.returncode == 1
    assert result.stdout.splitlines()[-1] == "1 passed, 1 STATUS 9"


def test_an_interrupt_keeps_what_was_run_and_leaves_no_process(file: Path, tool: Path, tmp_path: Path) -> None:
    command = [sys.executable, ISOLATED, "--limit=60", "--under", tool, "-q", file, "-k", "first or hangs or skipped"]
    hanging = file.with_name(file.name + ".hangs")
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log)
        while not hanging.exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 1
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[-1] == "2 passed, 1 INTERRUPTED, 1 NOT RUN"
    status = Path("/proc", hanging.read_text(), "status")
    for _ in range(100):  # what was killed may take a moment to go
        try:
            if "(zombie)" in status.read_text():
                return
        except OSError:
            return
        time.sleep(0.05)
    pytest.fail("the test that hangs still runs")
