"""Runs pytest in processes that a test may hang or break.

    python tests/isolated.py [--workers N] [--limit SECONDS] [--each] [--under COMMAND] PYTEST_ARGUMENTS...

A kernel that hangs can't be interrupted, and an error of one kernel is what every later call of its process gets. So N
processes share the tests, and one that loses a test is replaced for the rest of its share: when a test takes longer
than the limit (all stacks are printed), crashes, or leaves a CUDA context that can't be used. --each: a process a test.
--under: what to start a process with, such as compute-sanitizer; its exit status counts too.

Ends with the counts and the names of the tests that did not pass; exit status 1 if there are any, or none passed.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

GOOD = ("passed", "skipped", "xfailed")
STATUSES = (0, 1, 2, 5)  # of pytest: all passed, some failed, it was stopped, there were none


class Worker:
    """The plugin of a process that runs some tests and writes down what comes of each, when it comes.

    The journal has a line as a test starts, [name, null], and one as it ends, [name, outcome].
    """

    def __init__(self, journal: Path, wanted: list[str] | None, limit: float):
        self.journal, self.wanted, self.limit = journal, wanted, limit
        self.stderr = os.dup(2)  # pytest redirects its own
        self.outcome = "passed"

    def write(self, name: str, outcome: str | None) -> None:
        with open(self.journal, "a") as file:
            file.write(json.dumps([name, outcome]) + "\n")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self.wanted is None:  # only asked for the names
            for item in items:
                self.write(item.nodeid, None)
            items.clear()
        else:
            wanted = set(self.wanted)
            items[:] = [item for item in items if item.nodeid in wanted]

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item):
        self.write(item.nodeid, None)
        self.outcome = "passed"
        faulthandler.dump_traceback_later(self.limit, exit=True, file=self.stderr)
        yield
        if broken := broken_context():
            self.outcome = "CONTEXT BROKEN"
            item.session.shouldstop = f"the CUDA context can't be used after {item.nodeid}: {broken}"
        faulthandler.cancel_dump_traceback_later()
        self.write(item.nodeid, self.outcome)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.outcome != "passed" and self.outcome != "failed":
            self.outcome = "xfailed" if hasattr(report, "wasxfail") else report.outcome


def broken_context() -> str | None:
    """What is wrong with CUDA in this process, if it was used; also waits for the kernels."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except Exception as error:
            return str(error).partition("\n")[0]
    return None


class Runner:
    """The processes, and what became of the tests."""

    def __init__(self, arguments: list[str], limit: float, folder: Path, under: str = ""):
        self.arguments, self.limit, self.folder, self.under = arguments, limit, folder, shlex.split(under)
        self.outcomes: dict[str, str] = {}
        self.lock = threading.Lock()
        self.running: set[subprocess.Popen[bytes]] = set()
        self.stopped = False
        self.started = 0

    def start(self, wanted: list[str] | None) -> tuple[dict[str, str | None], str, int]:
        """Runs a worker: its journal, its output, its exit status."""
        with self.lock:
            self.started += 1
            stem = self.folder / str(self.started)
        journal, selection, log = stem.with_suffix(".journal"), stem.with_suffix(".json"), stem.with_suffix(".log")
        journal.touch()
        selection.write_text(json.dumps(wanted))
        command = [sys.executable, __file__, "--worker", str(journal), str(selection), f"--limit={self.limit}"]
        command = [*(self.under if wanted else []), *command]
        with open(log, "wb") as output:
            with self.lock:
                if self.stopped:
                    return {}, "", 1
                process = subprocess.Popen(
                    [*command, *self.arguments], stdout=output, stderr=subprocess.STDOUT, start_new_session=True
                )
                self.running.add(process)
            status = process.wait()
            with self.lock:
                self.running.discard(process)
        ended = dict(json.loads(line) for line in journal.read_text().splitlines())
        return ended, log.read_text(errors="replace"), status

    def collect(self) -> list[str]:
        names, output, _ = self.start(None)
        if not names:
            print(output)
        return list(names)

    def run(self, names: list[str]) -> None:
        """Runs these tests, in as many processes, one after the other, as they break."""
        while names and not self.stopped:
            ended, output, status = self.start(names)
            lost = [name for name, outcome in ended.items() if outcome is None]
            for name in lost:
                if self.stopped:
                    ended[name] = "INTERRUPTED"
                elif "Timeout (" in output:
                    ended[name] = "TIME OUT"
                    output += f"\nTIME OUT: {name} took over {self.limit:g} s"
                else:
                    ended[name] = f"CRASHED, status {status}"
                    output += f"\nCRASHED, status {status}: {name}"
            if not lost and status not in STATUSES and not self.stopped:
                ended[f"the process of {len(ended)} tests from {names[0]} on"] = f"STATUS {status}"
            with self.lock:
                self.outcomes |= ended
                print(output, flush=True)
            if not ended:  # it could not even start: nor would another
                break
            names = [name for name in names if name not in ended]

    def stop(self, *_: object) -> None:
        """Ends all processes, however they are stuck."""
        self.stopped = True
        for process in list(self.running):
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)  # with what it was started under


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--limit", type=float, default=60)
    parser.add_argument("--each", action="store_true")
    parser.add_argument("--under", default="")
    parser.add_argument("--worker", type=Path, nargs=2, help=argparse.SUPPRESS)  # a journal and a selection
    args, rest = parser.parse_known_args(arguments)
    if args.worker:
        journal, selection = args.worker
        sys.path.insert(0, os.getcwd())  # as python -m pytest does
        return int(pytest.main(rest, plugins=[Worker(journal, json.loads(selection.read_text()), args.limit)]))

    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(rest, args.limit, Path(folder), args.under)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, runner.stop)
        names = runner.collect()
        shares = [[name] for name in names] if args.each else [names[i :: args.workers] for i in range(args.workers)]
        with ThreadPoolExecutor(args.workers) as pool:
            list(pool.map(runner.run, shares))
    outcomes = dict.fromkeys(names, "NOT RUN") | runner.outcomes
    bad = {name: outcome for name, outcome in outcomes.items() if outcome not in GOOD}
    for name, outcome in bad.items():
        print(f"{outcome}: {name}")
    counts = Counter(outcome.partition(",")[0] for outcome in outcomes.values())
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()) or "no tests", flush=True)
    return 1 if bad or not counts["passed"] else 0


if __name__ == "__main__":
    sys.exit(main())
