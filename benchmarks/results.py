"""Result files: their schema, how one is made, read, and checked.

A file is one JSON object with the fields of FIELDS; its `rows` are objects with the fields of ROW. Times are
microseconds a call. A row is one peer's time for one case on one clock:

    host    from the first line of Python to the last kernel's end, calls queued back to back
    warm    device time, replays of a CUDA graph of many calls on the same operands (in L2 if they fit)
    cold    device time, each call on operands of its own that are not in L2
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
NOISE = 0.06  # differences under 6 % are called noise
CLOCKS = ("host", "warm", "cold")

text, number, whole, optional = (str,), (int, float), (int,), (type(None),)

FIELDS: dict[str, tuple[tuple[type, ...], str]] = {
    "schema": (whole, "2; a change that a reader must know of raises it"),
    "gpu": (text + optional, "name of the GPU that was measured; null: the CPU was measured"),
    "cpu": (text, "name of the processor"),
    "threads": (whole, "torch.get_num_threads()"),
    "load": (number, "other work on the machine before the run: load average of the last minute"),
    "driver": (text + optional, "version of the NVIDIA driver"),
    "torch": (text, "torch.__version__"),
    "cuda": (text + optional, "torch.version.cuda"),
    "python": (text, "version of Python"),
    "date": (text, "UTC, ISO 8601"),
    "command": (text, "what was run, from the repository's root, without its --output"),
    "commit": (text, "git commit, '+' after it if files differed; from RNN_EXT_COMMIT where there is no git"),
    "csrc_tree": (text, "git tree hash of csrc/ as measured (git rev-parse COMMIT:csrc)"),
    "complete": ((bool,), "false: interrupted, and rows holds what had been measured"),
    "facts": (
        (dict,),
        "the device's measured ceilings, see device.py, and `versions` of what was measured and isn't torch",
    ),
    "gpu_state": ((dict, *optional), "'before' and 'after': clocks, temperature, power, throttling (nvidia-smi)"),
    "rows": ((list,), "see ROW"),
}

ROW: dict[str, tuple[tuple[type, ...], str]] = {
    "layer": (text, "cell or sequence"),
    "group": (text, "what the case stands for, key of cases.GROUPS"),
    "T": (whole, "steps; 1 of a cell"),
    "B": (whole, "rows of the batch"),
    "I": (whole, "features of x"),
    "H": (whole, "features of h"),
    "layers": (whole, "num_layers"),
    "directions": (whole, "1, or 2: bidirectional"),
    "layout": (text, "padded, packed or lengths, see cases.LAYOUTS"),
    "dtype": (text, "of every tensor"),
    "nonlinearity": (text, "tanh or relu"),
    "pass": (text, "forward (no_grad), forward_grad (recorded, not run back), forward_backward (all gradients)"),
    "peer": (text, "key of the layer's peers"),
    "clock": (text, "host, warm or cold"),
    "median_us": (number + optional, "median over rounds; null: not measured, see note"),
    "q25_us": (number + optional, "lower quartile"),
    "q75_us": (number + optional, "upper quartile"),
    "speedup": (number + optional, "median over rounds of this peer's time / rnn_ext's; above 1 rnn_ext is faster"),
    "speedup_q25": (number + optional, "lower quartile"),
    "speedup_q75": (number + optional, "upper quartile"),
    "rounds": (whole, "samples taken"),
    "kernels": (number + optional, "kernels launched a call, counted by the profiler; null on a CPU or not counted"),
    "floor_us": (number, "what the device's ceilings and PyTorch's own costs allow, see device.floor_us"),
    "floor_ratio": (number + optional, "median_us / floor_us"),
    "gflop_s": (number + optional, "FLOP of the GEMMs / median_us, in 10⁹ a second"),
    "peak_share": (
        number + optional,
        "gflop_s / what facts says of a GEMM of this dtype; a share of the device's best",
    ),
    "saved_bytes": (whole + optional, "kept for the backward besides input, hx and parameters; null: not counted"),
    "peak_bytes": (
        whole + optional,
        "most memory that a training step takes at once, results included; null: not counted",
    ),
    "error": (number + optional, "largest ‖got − want‖ / ‖want‖ of the results against float64"),
    "note": (text, "why nothing was measured; else empty"),
}


class SchemaError(ValueError):
    """A result file is not what this page says."""


def check_fields(record: dict[str, Any], schema: dict[str, tuple[tuple[type, ...], str]], where: str) -> None:
    if set(record) != set(schema):
        raise SchemaError(f"{where}: missing {set(schema) - set(record)}, unknown {set(record) - set(schema)}")
    for name, (types, _) in schema.items():
        value = record[name]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise SchemaError(f"{where}: {name} is {value!r}, not {' or '.join(t.__name__ for t in types)}")


def validate(document: dict[str, Any]) -> None:
    """Raises SchemaError unless the document follows the schema."""
    check_fields(document, FIELDS, "document")
    for i, row in enumerate(document["rows"]):
        check_fields(row, ROW, f"row {i}")
        if row["clock"] not in CLOCKS:
            raise SchemaError(f"row {i}: clock is {row['clock']!r}")
        if (row["median_us"] is None) != bool(row["note"]):
            raise SchemaError(f"row {i}: a row has either a time or a note")


def read(path: Path) -> dict[str, Any]:
    document = json.loads(path.read_text())
    try:
        validate(document)
    except SchemaError as error:
        raise SchemaError(f"{path}: {error}") from None
    return document


def write(document: dict[str, Any], path: Path) -> None:
    """One row a line, so that a diff of two results can be read; whole or not at all, whatever ends the run."""
    validate(document)
    head = json.dumps({**document, "rows": []}, indent=1, allow_nan=False).removesuffix("[]\n}")
    rows = ",\n".join("  " + json.dumps(row, allow_nan=False) for row in document["rows"])
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.write_text(f"{head}[\n{rows}\n ]\n}}\n")
    unfinished.replace(path)


def is_noise(median: float, low: float, high: float) -> bool:
    """Whether a ratio says nothing: within NOISE of one, or its quartiles on either side of one."""
    return 1 / (1 + NOISE) < median < 1 + NOISE or low < 1 < high


def formatted(row: dict[str, Any]) -> str:
    """A row's speed-up, '~' before it where it is noise."""
    noise = is_noise(row["speedup"], row["speedup_q25"], row["speedup_q75"])
    return f"{'~' if noise else ''}{row['speedup']:.2f}"


def mean_speedup(rows: Iterable[dict[str, Any]]) -> str:
    """The geometric mean of the rows' speed-ups, '~' before it where it is noise; '-' of none."""
    found = [row["speedup"] for row in rows if row["speedup"] is not None]
    if not found:
        return "-"
    mean = statistics.geometric_mean(found)
    return f"{'~' if is_noise(mean, mean, mean) else ''}{mean:.2f}"


def select(rows: Iterable[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    """The rows that have a time and these values; `pass_` stands for pass, a Python keyword."""
    if "pass_" in wanted:
        wanted["pass"] = wanted.pop("pass_")
    return [r for r in rows if r["median_us"] is not None and all(r[k] == v for k, v in wanted.items())]


def values(rows: Iterable[dict[str, Any]], name: str) -> list[Any]:
    """The different values of a field, in the order of their first row."""
    return list(dict.fromkeys(row[name] for row in rows))


def busy() -> str:
    """A warning if other work runs on this machine; else empty."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load < cores / 2:
        return ""
    return f"this machine is busy (load average {load:.1f} on {cores} cores): times are unreliable"


def output_of(*command: str) -> str | None:
    try:
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def commit() -> str:
    if given := os.environ.get("RNN_EXT_COMMIT"):
        return given
    head = output_of("git", "rev-parse", "--short=12", "HEAD")
    if head is None:
        return "unknown"
    return head + ("+" if output_of("git", "status", "--porcelain", "-uno") else "")


def git_object(kind: str, content: bytes) -> bytes:
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content).digest()


def tree_hash(folder: Path) -> bytes:
    """Git's hash of a folder, from the files alone, so that it is known where there is no .git."""
    entries = []
    for path in folder.iterdir():
        if path.is_dir():
            entries.append((f"{path.name}/", b"40000", path.name, tree_hash(path)))
        else:
            mode = b"100755" if path.stat().st_mode & 0o100 else b"100644"
            entries.append((path.name, mode, path.name, git_object("blob", path.read_bytes())))
    # Git sorts a folder as if its name ended in a slash.
    ordered = sorted(entries, key=lambda entry: entry[0].encode())
    return git_object("tree", b"".join(mode + b" " + name.encode() + b"\0" + sha for _, mode, name, sha in ordered))


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def command_line() -> str:
    """The command, without its --output: where a file once lay says nothing about what it holds."""
    script = Path(sys.argv[0]).resolve()
    name = script.relative_to(REPOSITORY) if script.is_relative_to(REPOSITORY) else script.name
    options = sys.argv[1:]
    if "--output" in options:
        at = options.index("--output")
        del options[at : at + 2]
    return shlex.join(["python", str(name), *options])


def new_document(device: torch.device, facts: dict[str, Any], state: Callable[[], Any]) -> dict[str, Any]:
    """A document without rows yet; `state` reads the GPU's clocks."""
    cuda = device.type == "cuda"
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None
    return {
        "schema": 2,
        "gpu": torch.cuda.get_device_name(device) if cuda else None,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "driver": driver.splitlines()[0] if driver else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command_line(),
        "commit": commit(),
        "csrc_tree": tree_hash(REPOSITORY / "csrc").hex(),
        "complete": False,
        "facts": facts,
        "gpu_state": {"before": state()} if cuda else None,
        "rows": [],
    }
