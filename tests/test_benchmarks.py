"""The benchmarks' files and figures, on the CPU and on tiny shapes: what they write, never how fast anything is."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("tqdm")

from rnn_ext.__main__ import explain, explain_sequence

REPOSITORY = Path(__file__).resolve().parent.parent
BENCHMARKS = REPOSITORY / "benchmarks"
FIGURES = {
    "bench.json": ("speedup.png", "latency.png", "roofline.png"),
    "sequence.json": ("sequence.png", "sequence-latency.png", "sequence-roofline.png"),
}


def run(*command: str | Path, **options) -> subprocess.CompletedProcess:
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, "PYTHON": sys.executable}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, **options)


@pytest.fixture
def modules(monkeypatch):
    """The benchmarks' modules, which import each other as scripts in one folder do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for path in BENCHMARKS.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> Path:
    """The folder that a tiny benchmark wrote."""
    folder = tmp_path_factory.mktemp("bench")
    options = "--device cpu --shapes 10,4,5 1,8,8 3,8,8 --dtypes float32 bfloat16 --nonlinearities tanh relu"
    command = [sys.executable, BENCHMARKS / "bench.py", *options.split(), "--rounds", "3", "--sample-ms", "0.1"]
    result = run(*command, "--output", folder)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "geometric mean" in result.stdout
    return folder


@pytest.fixture(scope="module")
def quick_sequence(tmp_path_factory) -> Path:
    """The folder that a tiny benchmark of sequences wrote."""
    folder = tmp_path_factory.mktemp("sequence")
    shapes = "4,2,3,5 1,1,4,4 5,3,4,4:packed 5,3,4,4:lengths 3,2,4,4:bidirectional:two-layers"
    command = [sys.executable, BENCHMARKS / "bench.py", "--layer", "sequence", "--device", "cpu"]
    command += ["--shapes", *shapes.split(), "--dtypes", "float32", "bfloat16", "--seconds", "0.01"]
    result = run(*command, "--rounds", "3", "--sample-ms", "0.1", "--output", folder)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "geometric mean" in result.stdout
    return folder


@pytest.mark.parametrize("rate, size", [(1e8, 128), (4e8, 256), (1e11, 1024)])
def test_the_probe_of_a_cpu_takes_seconds_however_slow_its_products_are(modules, monkeypatch, rate, size):
    """On a clock that calls move: products `rate` floating-point operations a second, the others a microsecond each."""
    import torch

    device, timing = modules("device"), modules("timing")
    now = 0.0
    sizes = []

    class Clock:
        perf_counter = staticmethod(lambda: now)

    class One:
        def neg(self):
            nonlocal now
            now += 1e-6

    def product(a, b, out):
        nonlocal now
        sizes.append(a.shape[0])
        now += 2 * a.shape[0] ** 3 / rate

    monkeypatch.setattr(torch, "mm", product)
    monkeypatch.setattr(timing, "time", Clock)
    monkeypatch.setattr(device, "time", Clock, raising=False)
    monkeypatch.setattr(device, "copy_seconds", lambda size, *_, **__: size * 1e-9)
    monkeypatch.setattr(device, "read_gb_s", lambda size: size / 1e3)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: One())
    monkeypatch.setattr(device, "autograd_seconds", lambda _: 1e-6)
    facts = device.probe(torch.device("cpu"), ["bfloat16"])
    assert now < 10
    assert sizes[-1] == max(sizes) == size
    assert facts["gemm_tflop_s"]["bfloat16"] == pytest.approx(rate / 1e12, rel=0.01)
    sizes, rates = zip(*facts["caches"], strict=True)
    assert list(sizes) == sorted(sizes) and list(rates) == sorted(rates, reverse=True)


@pytest.mark.slow
def test_a_benchmark_of_cells_writes_what_the_schema_says(quick, modules):
    results = modules("results")
    document = results.read(quick / "bench.json")
    assert document["complete"]
    assert {row["peer"] for row in document["rows"]} == {"rnn_ext", "rnn_cell", "addmm", "rnn"}
    assert len(document["rows"]) == 3 * 2 * 2 * 3 * 4  # shapes, dtypes, nonlinearities, passes, peers
    for row in document["rows"]:
        assert row["note"] == "", row
        assert row["q25_us"] <= row["median_us"] <= row["q75_us"]
    for name in FIGURES["bench.json"]:
        assert (quick / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_benchmark_of_sequences_writes_what_the_schema_says(quick_sequence, modules):
    results = modules("results")
    document = results.read(quick_sequence / "sequence.json")
    assert document["complete"]
    assert document["facts"]["instruction_set"]
    by_case: dict[tuple, set[str]] = {}
    for row in document["rows"]:
        assert row["note"] == "", row
        assert row["q25_us"] <= row["median_us"] <= row["q75_us"]
        by_case.setdefault((row["layout"], row["layers"], row["dtype"], row["pass"]), set()).add(row["peer"])
        if row["peer"] in ("rnn_ext", "rnn") and row["pass"] == "forward_backward":
            assert row["saved_bytes"] > 0
        else:
            assert row["saved_bytes"] is None
    assert len(by_case) == 4 * 2 * 3
    for (layout, layers, *_), peers in by_case.items():
        assert {"rnn_ext", "rnn"} <= peers
        assert ("cells" in peers) == (layout == "padded" and layers == 1)
        assert ("rnn_ext-padded" in peers) == (layout != "padded")
    for name in FIGURES["sequence.json"]:
        assert (quick_sequence / name).read_bytes().startswith(b"\x89PNG")


def test_no_peer_but_torch_needs_to_be_installed(quick, modules, monkeypatch, tmp_path, capsys):
    bench, cases, results = (modules(name) for name in ("bench", "cases", "results"))
    monkeypatch.setattr(cases, "find_spec", lambda name: None)
    facts = json.loads((quick / "bench.json").read_text())["facts"]
    monkeypatch.setattr(bench, "probe", lambda device, dtypes: facts)
    options = "--layer sequence --device cpu --shapes 2,3,4,5 --dtypes float32 --rounds 1 --sample-ms 0.1"
    monkeypatch.setattr(sys, "argv", ["bench.py", *options.split(), "--output", str(tmp_path)])
    assert bench.main() == 0
    document = results.read(tmp_path / "sequence.json")
    assert {row["peer"] for row in document["rows"]} == {"rnn_ext", "rnn", "nn_cells", "cells"}
    output = capsys.readouterr().out
    for name in ("JAX", "Keras on JAX", "onnxruntime", "OpenVINO"):
        assert f"{name} takes no part" in output


def test_bytes_kept_for_the_backward_are_those_of_the_hooks(modules):
    import torch

    bench, cases = modules("bench"), modules("cases")
    x, weight = torch.ones(256, requires_grad=True), torch.ones(256, requires_grad=True)

    def run():
        y = (x * weight).exp()
        return (y * y.view(2, 128).flatten()).sum()  # saved twice, in one memory

    assert bench.saved_bytes(cases.Step(run, leaves=(x, weight))) == 256 * 4


@pytest.mark.parametrize(
    "breach", [{"rows": [{}]}, {"schema": "1"}, {"unknown": 1}, {"complete": None}], ids=lambda b: next(iter(b))
)
def test_schema_breaches_are_found(quick, modules, breach):
    results = modules("results")
    document = results.read(quick / "bench.json")
    with pytest.raises(results.SchemaError):
        results.validate({**document, **breach})


@pytest.mark.parametrize("layer", ["cell", "sequence"])
def test_wrong_results_are_not_timed(quick, modules, monkeypatch, layer):
    import torch
    from torch import nn

    bench, cases = modules("bench"), modules("cases")

    class WrongCell(nn.RNNCell):
        def forward(self, input, hx=None):
            return super().forward(input, hx) * 1.001

    class WrongRNN(nn.RNN):
        def forward(self, input, hx=None):
            output, h_n = super().forward(input, hx)
            return output * 1.001, h_n

    wrong = {
        "cell": lambda case, tensors: modules("cell_peers").module_step(WrongCell, case, tensors),
        "sequence": lambda case, tensors: modules("sequence_peers").whole_step(WrongRNN, case, tensors),
    }
    replaced = modules("peers").LAYERS[layer].replaced
    monkeypatch.setitem(modules("peers").LAYERS[layer].peers, replaced, cases.Peer("wrong", wrong[layer]))
    facts = json.loads((quick / "bench.json").read_text())["facts"]
    args = bench.parse_arguments(["--layer", layer, "--device", "cpu", "--rounds", "1", "--sample-ms", "0.1"])
    case = cases.Case(1 if layer == "cell" else 3, 2, 4, 5, layer=layer, pass_name="forward_backward")
    ours, wrong = bench.measure_case(case, ["rnn_ext", replaced], torch.device("cpu"), facts, args)
    assert ours["median_us"] > 0
    assert wrong["median_us"] is None and wrong["note"].startswith("wrong result")


@pytest.mark.parametrize("layout", ["padded", "lengths"])
def test_the_gradients_of_relu_are_those_at_a_peers_own_output(modules, layout):
    """There they are also nn.RNN's, as both are in float64."""
    import torch

    cases = modules("cases")

    case = cases.Case(6, 5, 3, 4, "float64", "relu", "forward_backward", layout=layout)
    tensors = cases.make_tensors(case, torch.device("cpu"))
    wanted = cases.reference(case, tensors)
    for got, want in zip(cases.gradients_at(case, tensors, wanted[0]), wanted[1:], strict=True):
        torch.testing.assert_close(got, want)


def test_a_right_result_of_relu_passes_where_it_was_rounded_beside_the_kink(modules):
    import torch

    cases, peers = modules("cases"), modules("cell_peers")
    case = cases.Case(1, 256, 64, 64, "bfloat16", "relu", "forward_backward", layer="cell")
    tensors = cases.make_tensors(case, torch.device("cpu"))
    result = peers.PEERS["rnn_cell"].build(case, tensors).run()
    wanted = cases.reference(case, tensors)
    assert cases.error_of(case, tensors, wanted, result) <= cases.tolerance(case)
    result[2][::2] *= 1.1  # dh, of which nothing lies beside a kink
    assert cases.error_of(case, tensors, wanted, result) > cases.tolerance(case)


@pytest.mark.parametrize("seconds, rounds", [(100.0, 20), (10.0, 5), (0.1, 3)])
def test_rounds_end_in_time_but_three_are_taken(modules, monkeypatch, seconds, rounds):
    timing = modules("timing")
    now = 0.0

    def sampler():
        nonlocal now
        now += 1.0
        return 1.0

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now, sleep=lambda _: None))
    samples = timing.sample_in_turns({"a": sampler, "b": sampler}, 20, seconds)
    assert {name: len(found) for name, found in samples.items()} == {"a": rounds, "b": rounds}


@pytest.mark.parametrize("pass_name, reads", [("forward", 1), ("forward_backward", 2)])
@pytest.mark.parametrize("H, gb_s", [(64, 8.0), (128, 4.0), (1024, 2.0)])
def test_the_floor_reads_the_recurrent_weights_at_each_step_from_their_cache(modules, H, gb_s, pass_name, reads):
    cases, device = modules("cases"), modules("device")
    facts = {
        "caches": [[2**15, 8.0], [2**17, 4.0]],
        "copy_gb_s": 2.0,
        "gemm_tflop_s": {"float32": 1e6},
        "launch_us": 1.0,
        "autograd_us": 5.0,
        "node_us": None,
    }
    case = cases.Case(101, 1, 1, H, pass_name=pass_name)
    once = case.bytes / device.bandwidth_gb_s(case.bytes, "host", facts)
    again = 100 * reads * H * H * 4 / gb_s
    start = facts["launch_us" if pass_name == "forward" else "autograd_us"]
    assert device.floor_us(case, "host", facts) == pytest.approx(start + (once + again) * 1e-3)


def test_the_peak_of_memory_is_counted(modules):
    import torch

    bench, cases = modules("bench"), modules("cases")
    step = cases.Step(lambda: (torch.ones(2**24) + 1,))
    peak = bench.peak_bytes(step, torch.device("cpu"))
    if peak is None:
        pytest.skip("this kernel doesn't count pages")
    assert 2**27 * 0.95 <= peak < 2**27 * 1.2  # 64 MiB each of the ones and of the twos


def test_flashrnn_gets_the_shapes_that_it_documents(modules, monkeypatch):
    """With a stand-in that computes what FlashRNN does of Wx (B, T, G, N, D), R (G, N, D, D) and b (G, N, D)."""
    import torch

    cases, peers = modules("cases"), modules("sequence_peers")

    def flashrnn(Wx, R, b, states, function, backend, dtype):
        assert (function, backend, dtype) == ("elman", "cuda_fused", "float32")
        (B, T, G, N, D), h, outputs = Wx.shape, states[0, :, 0, 0], []
        assert (G, N) == (1, 1) and R.shape == (1, 1, D, D) and b.shape == (1, 1, D) and states.shape == (1, B, 1, 1, D)
        for t in range(T):
            h = torch.tanh(Wx[:, t, 0, 0] + h @ R[0, 0].t() + b[0, 0])
            outputs.append(h)
        result = torch.stack(outputs, 1)[None, :, :, None]
        return result, result[:, :, -1:]

    monkeypatch.setitem(sys.modules, "flashrnn", SimpleNamespace(flashrnn=flashrnn))
    case = cases.Case(5, 2, 3, 4, pass_name="forward_backward")
    tensors = cases.make_tensors(case, torch.device("cpu"))
    step = peers.PEERS["flashrnn"].build(case, tensors)
    assert cases.error_of(case, tensors, cases.reference(case, tensors), step.run()) < 1e-5
    assert not peers.PEERS["flashrnn"].runs_on("cpu") and peers.PEERS["flashrnn"].runs_on("cuda")


@pytest.mark.parametrize(
    "options",
    [
        "--shapes 1,2,3,4",
        "--shapes 1,2,3:packed",
        "--layer sequence --shapes 1,2,3",
        "--layer sequence --shapes 1,2,3,4:no-such",
        "--layer sequence --shapes 1,2,0,4",
        "--layer sequence --peers addmm",
    ],
)
def test_options_that_mean_nothing_are_refused(modules, options, capsys):
    with pytest.raises(SystemExit):
        modules("bench").parse_arguments(options.split())
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("name, peers", [("cell", 6), ("sequence", 4)])
def test_rows_of_a_gpu(quick, modules, monkeypatch, name, peers):
    """All peers and clocks through the CUDA branches, with the CPU's tensors and clock in place of the device's."""
    import torch

    bench, cases, results, timing = (modules(name) for name in ("bench", "cases", "results", "timing"))
    layer = modules("peers").LAYERS[name]

    class Graph:
        def __init__(self, runs):
            self.runs = runs

        def replay(self):
            for run in self.runs:
                run()

    class Cuda:
        type = "cuda"

    make_tensors, cpu = cases.make_tensors, torch.device("cpu")
    monkeypatch.setattr(bench, "make_tensors", lambda case, _, seed=0: make_tensors(case, cpu, seed))
    monkeypatch.setattr(bench, "FLUSH_BYTES", 2**20)
    monkeypatch.setattr(
        bench, "kernels_per_call", lambda cases: sessions.append([case() for case in cases]) or [1.0] * len(cases)
    )
    sessions = []
    monkeypatch.setattr(timing, "capture", lambda runs: (Graph(runs), [run() for run in runs][-1]))
    seen = []

    def device_sampler(runs, seconds, flush=None):
        seen.append((len(runs), len({id(run) for run in runs}), flush is not None))
        return timing.host_sampler(Graph(runs).replay, seconds)

    monkeypatch.setattr(bench, "device_sampler", device_sampler)
    properties = type("Properties", (), {"L2_cache_size": 2**20})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)

    document = results.read(quick / "bench.json")
    document["facts"]["node_us"] = 1.0
    args = bench.parse_arguments(["--layer", name, "--device", "cuda", "--rounds", "2", "--sample-ms", "0.1"])
    known = {peer: layer.peers[peer] for peer in args.peers}
    shape = cases.Case(1, 2, 3, 4, layer=name)
    names = [key for key, peer in known.items() if not peer.compiles and not peer.missing and peer.takes(shape)]
    document["rows"] = []
    for pass_name in cases.PASSES:
        case = replace(shape, pass_name=pass_name)
        with torch.set_grad_enabled(pass_name != "forward"):
            document["rows"] += bench.measure_case(case, names, Cuda(), document["facts"], args)
    with monkeypatch.context() as broken:
        broken.setattr(bench, "kernels_per_call", lambda cases: 1 / 0)
        bench.count_kernels(document["rows"], Cuda())
    assert all(row["kernels"] is None and row["median_us"] > 0 for row in document["rows"])
    bench.count_kernels(document["rows"], Cuda())
    results.validate(document)
    assert len(sessions) == len(names) * len(cases.PASSES), "one session a peer and pass"
    count = {clock: len(results.select(document["rows"], clock=clock)) for clock in results.CLOCKS}
    assert count == {"host": 3 * peers, "warm": 2 * 4, "cold": 2 * 4}  # in a graph the same kernels run
    assert all(row["note"] == "" and row["kernels"] == 1 for row in document["rows"])
    for runs, different, cold in seen:  # a warm graph repeats one call, a cold one has operands for each
        assert different == (runs if cold else 1)


def test_kernels_are_counted_by_case(modules):
    from torch.autograd import DeviceType

    timing = modules("timing")

    def event(name, start, end, cuda=True, marked=False):
        time_range = SimpleNamespace(start=start, end=end)
        device_type = DeviceType.CUDA if cuda else DeviceType.CPU
        return SimpleNamespace(name=name, time_range=time_range, device_type=device_type, is_user_annotation=marked)

    events = [
        event("case 0", 10_000, 10_100, cuda=False, marked=True),
        event("case 0", 10_020, 10_090, marked=True),  # the device's copy of the range
        event("launch", 10_000, 10_010, cuda=False),
        event("kernel", 9_990, 10_030),  # by a clock that is a little late
        event("kernel", 10_040, 10_120),
        event("Memset (Device)", 10_050, 10_060),
        event("case 1", 15_000, 15_100, cuda=False, marked=True),
        event("kernel", 15_050, 15_060),
        event("warming up", 13_000, 13_100),
    ]
    assert timing.kernels_in(events, gap=2e-3) == {"case 0": 2, "case 1": 1}


def test_a_case_that_fails_does_not_keep_others_from_being_counted(modules, monkeypatch):
    timing = modules("timing")
    seen = []

    def kernels_in(events, gap):
        seen.extend(event.name for event in events if event.is_user_annotation)
        return dict.fromkeys(seen, 8)

    monkeypatch.setattr(timing, "kernels_in", kernels_in)
    runs = [lambda: lambda: None, lambda: 1 / 0, lambda: lambda: 1 / 0, lambda: lambda: None]
    assert timing.kernels_per_call(runs, calls=4) == [2, None, None, 2]
    assert len(seen) == 2


@pytest.mark.slow
def test_a_benchmark_without_rich_and_tqdm(tmp_path, monkeypatch):
    for name in ("rich", "tqdm"):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('no {name}')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    options = "--device cpu --shapes 2,3,4 --dtypes float32 --peers rnn_cell --rounds 1 --sample-ms 0.1"
    result = run(sys.executable, BENCHMARKS / "bench.py", *options.split(), "--output", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "no tables: no rich" in result.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"bench.json", *FIGURES["bench.json"]}


@pytest.mark.cuda
def test_a_benchmark_on_a_gpu(modules, tmp_path):
    results = modules("results")
    options = "--device cuda --shapes 10,4,5 64,64,64 --dtypes float32 bfloat16 --rounds 3 --sample-ms 0.5"
    command = [sys.executable, BENCHMARKS / "bench.py", *options.split(), "--compile-shapes"]  # none: minutes
    result = run(*command, "--passes", "forward", "forward_backward", "--output", tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    document = results.read(tmp_path / "bench.json")
    for row in results.select(document["rows"], clock="host"):
        assert row["note"] == "", row
    for row in results.select(document["rows"], peer="rnn_ext", pass_="forward"):
        assert row["kernels"] == 1, row


def test_an_interrupt_keeps_what_was_measured(modules, monkeypatch, tmp_path):
    bench, results = modules("bench"), modules("results")
    measure = bench.measure_case
    cases = []

    def interrupted(case, *rest):
        cases.append(case)
        if len(cases) > 1:
            assert len(results.read(tmp_path / "bench.json")["rows"]) == 2, "each case is saved when it ends"
            raise KeyboardInterrupt
        return measure(case, *rest)

    monkeypatch.setattr(bench, "measure_case", interrupted)
    options = "--device cpu --shapes 2,3,4 --dtypes float32 --peers rnn_cell --rounds 1 --sample-ms 0.1"
    monkeypatch.setattr(sys, "argv", ["bench.py", *options.split(), "--output", str(tmp_path)])
    assert bench.main() == 0
    document = results.read(tmp_path / "bench.json")
    assert not document["complete"]
    assert len(document["rows"]) == 2


def test_csrc_tree_is_gits(modules, tmp_path):
    if shutil.which("git") is None:
        pytest.skip("no git")
    (tmp_path / "a").mkdir()
    for name in ("a.h", "a/b.cu", "a0", "run.sh"):
        (tmp_path / name).write_text(name)
    (tmp_path / "run.sh").chmod(0o755)
    expected = modules("results").tree_hash(tmp_path).hex()
    run("git", "init", "-q", ".", cwd=tmp_path)
    run("git", "add", ".", cwd=tmp_path)
    assert run("git", "write-tree", cwd=tmp_path).stdout.strip() == expected


def test_report_writes_and_checks_the_pages(quick, quick_sequence, modules, monkeypatch, tmp_path, capsys):
    def report(*options: str) -> int:
        monkeypatch.setattr(sys, "argv", ["report.py", "--root", str(tmp_path), *options])
        return modules("report").main()

    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- performance:begin -->\nold\n<!-- performance:end -->\nafter\n")
    folder = tmp_path / "benchmarks" / "results" / "cpu"
    folder.mkdir(parents=True)
    shutil.copy(quick / "bench.json", folder)
    assert report("--check") == 1
    assert report() == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n")
    assert len([line for line in text.splitlines() if line.startswith("| forward")]) == 3
    page = folder.parent / "README.md"
    assert "nn.RNNCell µs" in page.read_text()
    assert report("--check") == 0

    assert "| a whole sequence" not in text

    shutil.copy(quick_sequence / "sequence.json", folder)
    assert report("--check") == 1
    assert report() == 0
    text = readme.read_text()
    assert len([line for line in text.splitlines() if line.startswith("| a whole sequence")]) == 3
    assert "### Whole sequences on" in page.read_text() and "5, 3, 4, 4 packed" in page.read_text()
    assert "memory of a training step" in page.read_text()
    assert report("--check") == 0

    # Numbers changed by hand.
    changes = [(readme, "backward | "), (page, "| 1"), (page, "4 packed | forward | ")]
    changes += [(folder / name, '"median_us": ') for name in ("bench.json", "sequence.json")]
    for path, digits in changes:
        original = path.read_text()
        changed = original.replace(digits, digits + "9")
        assert changed != original
        path.write_text(changed)
        assert report("--check") == 1
        path.write_text(original)
    assert report("--check") == 0
    capsys.readouterr()
    for name in ("latency.png", "sequence-latency.png"):
        (folder / name).unlink()
        assert report("--check") == 1
        assert name in capsys.readouterr().out


@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md", "docs/numerics.md", "benchmarks/README.md"])
@pytest.mark.parametrize("figure", ["12 µs", "1.5×", "2.5 times faster", "90 %", "3 TFLOP/s"])
def test_report_finds_typed_figures(modules, monkeypatch, tmp_path, capsys, page, figure):
    monkeypatch.setattr(sys, "argv", ["report.py", "--root", str(tmp_path), "--check"])
    (tmp_path / "README.md").write_text("<!-- performance:begin --><!-- performance:end -->\n")
    path = tmp_path / page
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.write(f"A step takes {figure}.\n")
    assert modules("report").typed_figures(tmp_path) == [f"{page}: {figure}"]
    assert modules("report").main() == 1
    assert "is typed" in capsys.readouterr().out


def test_the_pages_agree_with_the_committed_results():
    result = run(sys.executable, BENCHMARKS / "report.py", "--check")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
def test_the_demo_trains_four_models_alike(modules, monkeypatch, tmp_path, capsys):
    """Two steps, without the benchmark at its end."""
    demo = modules("demo")
    trained = {}
    draw = demo.draw
    monkeypatch.setattr(demo, "draw", lambda trainers, *rest: trained.update(trainers) or draw(trainers, *rest))
    monkeypatch.setattr(demo, "microbenchmark", lambda device: None)
    options = ["--device", "cpu", "--steps", "2", "--output", str(tmp_path / "demo.png")]
    monkeypatch.setattr(sys, "argv", ["demo.py", *options])
    demo.main()
    first, *others = (trainer.losses for trainer in trained.values())
    assert len(first) == 2 and len(others) == 3
    for losses in others:
        assert losses == pytest.approx(first, abs=1e-5)
    output = capsys.readouterr().out
    assert "rnn_ext.ElmanNetwork next to nn.RNN" in output and "    The " in output
    assert (tmp_path / "demo.png").exists()


def test_compare_kernels_knows_sequences(monkeypatch):
    options = "--dry-run --shapes 50,16,1760,1760 50,16,64,64:packed --dtypes bfloat16"
    result = run(sys.executable, BENCHMARKS / "compare_kernels.py", *options.split())
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line for line in lines if line.startswith("T=")] == [
        "T=50 B=16 I=1760 H=1760 bfloat16: model, measured",
        "T=50 B=16 I=64 H=64 packed bfloat16: model, measured",
    ]
    found = set()
    for line in lines:
        if line.startswith("T="):
            sizes = re.findall(r"=(\d+)", line)
        elif line.startswith(("* ", "  ")):
            found.add((line[2:].split()[1], *sizes))
    assert {("stepped_64x64", *"50 16 1760 1760".split()), ("resident_256", *"50 16 64 64".split())} <= found
    for kernel, *sizes in found:
        monkeypatch.setenv("RNN_EXT_SEQUENCE_KERNEL", kernel)
        assert f"forward, a step is forced to run: {kernel} " in explain_sequence([*sizes, "bfloat16"])


def test_compare_kernels_names_kernels_that_can_be_forced(monkeypatch):
    options = "--dry-run --shapes 64,1024,1024 --dtypes bfloat16"
    result = run(sys.executable, BENCHMARKS / "compare_kernels.py", *options.split())
    assert result.returncode == 0, result.stderr
    rows = [line.removeprefix("* ").split() for line in result.stdout.splitlines()[1:]]
    for direction, variable in (("forward", "RNN_EXT_KERNEL"), ("backward", "RNN_EXT_BACKWARD_KERNEL")):
        kernels = [row[1] for row in rows if row[0] == direction]
        assert len(kernels) == len(set(kernels)) > 3
        for kernel in kernels:
            monkeypatch.setenv(variable, kernel)
            explained = explain("64 1024 1024 bfloat16".split())
            assert f"{direction} is forced to run: {kernel.split(':')[0]} " in explained
