"""benchmarks/gpu_check.sh without a GPU: its plan, and what it does with parts that fail."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
ORDER = [
    "machine", "build", "what was built", "golden vectors", "every kernel", "tests", "benchmark", "kernels",
    "sequences", "memcheck", "racecheck", "ncu", "torch.compile", "other tests",
]  # fmt: skip


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder of stand-ins: an H100's nvidia-smi."""
    folder = tmp_path / "tools"
    folder.mkdir()
    stand_in(folder / "nvidia-smi", "echo 9.0")
    return folder


def stand_in(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def gpu_check(tools: Path, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{tools}:/usr/bin:/bin"  # without a toolkit, but for the one that the script looks for
    env = {**os.environ, "PATH": path, "CUDA_HOME": str(tools), "TORCH_CUDA_ARCH_LIST": "9.0", **environment}
    command = ["bash", REPOSITORY / "benchmarks" / "gpu_check.sh", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


@pytest.fixture
def plan(tools: Path, tmp_path: Path) -> str:
    out = tmp_path / "out"
    result = gpu_check(tools, "--dry-run", out, PYTHON=sys.executable)
    assert result.returncode == 0, result.stdout + result.stderr
    assert {path.name for path in out.iterdir()} == {"log.txt", "summary.txt"}
    assert (out / "summary.txt").read_text() == result.stdout
    return result.stdout


def test_the_plan_ends_in_time_and_begins_with_what_matters_most(plan: str) -> None:
    parts = re.findall(r"^(\S.*?) +(\d+) s, until +(\d+) s: ", plan, re.MULTILINE)
    assert [name for name, _, _ in parts] == ORDER
    total = 0
    for _, limit, until in parts:
        total += int(limit)
        assert int(until) == total
    assert total <= 540
    assert plan.splitlines()[-1] == f"{total} s at most"
    assert plan.splitlines()[0] == "TORCH_CUDA_ARCH_LIST=9.0a", "9.0, as an image may preset, would leave wgmma out"


def test_the_commands_of_the_plan_have_valid_options(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    bench, cases = importlib.import_module("bench"), importlib.import_module("cases")
    commands = {}
    for line in plan.splitlines():
        if match := re.match(r"(\S.*?) +\d+ s, until +\d+ s: (.*)", line):
            commands[match[1]] = match[2]
    for name in ("benchmark", "sequences", "ncu", "torch.compile"):
        command = shlex.split(commands[name])
        args = bench.parse_arguments(command[command.index("benchmarks/bench.py") + 1 :])
        if name == "benchmark":
            flagship = [(4096,) * 3, (1024, 4096, 4096), (1024,) * 3, (64, 1024, 1024), (16, 256, 256), (1, 256, 256)]
            assert args.cases[:6] == cases.cells(*flagship)
            assert set(args.cases) == set(cases.CASES["cell", "cuda"])
            assert args.dtypes == ["bfloat16", "float32"] and args.compiled == []
    for name in ("every kernel", "tests", "memcheck", "racecheck", "other tests"):
        for path in [word for word in shlex.split(commands[name]) if word.startswith("tests/")]:
            assert (REPOSITORY / path).exists(), path
    for path in (REPOSITORY / "benchmarks").glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.mark.slow
def test_what_the_sanitizer_sees_reaches_every_family_of_kernels(plan: str) -> None:
    commands = [shlex.split(line) for line in plan.splitlines() if "compute-sanitizer" in line]
    (expression,) = {command[command.index("-k") + 1] for command in commands}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--collect-only",
        "tests/cell/test_forced_kernels.py",
        "-m",
        "cuda",
    ]

    def families(*options: str) -> set[str]:
        done = subprocess.run([*command, *options], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
        return set(re.findall(r"\[(\w+-[a-z0-9]+)_?\S*-\w+\]", done.stdout))

    assert families("-k", expression) == families() >= {"forward-wgmma", "backward-wgmma", "forward-3xtf32"}


def test_a_part_that_fails_hides_no_other(tools: Path, tmp_path: Path) -> None:
    """With a python that fails, each part fails by itself, and says so as soon as it ends."""
    out = tmp_path / "out"
    stand_in(tools / "compute-sanitizer", "exit 3")
    python = stand_in(tmp_path / "python", f'wc -l <{out}/summary.txt >>{tmp_path}/seen; echo "no $2"; exit 3')
    result = gpu_check(tools, out, PYTHON=str(python))
    assert (out / "summary.txt").read_text() == result.stdout
    lines = {name: line for line in result.stdout.splitlines() for name in ORDER if line.startswith(f"{name} ")}
    assert list(lines) == ORDER
    passed, missing = ["machine"], ["ncu"]
    for name, line in lines.items():
        verdict = "passed" if name in passed else "MISSING" if name in missing else "FAILED"
        assert re.match(rf"{name} +{verdict} ", line), line
    assert result.returncode == len(ORDER) - len(passed) - len(missing)
    assert lines["tests"].endswith("no -q"), "the last line that a part wrote tells why"
    seen = [int(number) for number in (tmp_path / "seen").read_text().split()]
    assert seen == sorted(set(seen)), "the summary has a part's line when it ends"


def test_another_architecture_than_was_asked_for_fails(tools: Path, tmp_path: Path) -> None:
    built = "rnn_ext\\nCUDA kernels   built for {} with torch"
    for arch, verdict in (("9.0", "FAILED"), ("9.0a", "passed")):
        python = stand_in(tmp_path / "python", f"printf '{built.format(arch)}\\n'")
        result = gpu_check(tools, tmp_path / "out", PYTHON=str(python))
        assert re.search(rf"^what was built +{verdict} ", result.stdout, re.MULTILINE), result.stdout
