"""Tools around the cell: type checkers, help(), the profiler and the FLOP counter."""

from __future__ import annotations

import doctest
import importlib
import inspect
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from entries import every_entry, every_module, first, operators_run
from references import random_arguments
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import rnn_ext
from rnn_ext import _integrations

# Type checkers

USE = """
import torch
from torch import Tensor, nn

import rnn_ext


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = rnn_ext.RNNCell(10, 20, bias=False, nonlinearity="relu", device="cpu", dtype=torch.float32)
        self.rnn = rnn_ext.RNN(10, 20, 2, "relu", dropout=0.1, bidirectional=True, dtype=torch.float32)
        self.network = rnn_ext.ElmanNetwork(10, 20, 5, batch_first=True)
        self.lazy = rnn_ext.LazyRNNCell(20, dtype=torch.float64)

    def forward(self, x: Tensor, hx: Tensor | None = None) -> Tensor:
        return rnn_ext.rnn_cell(x, hx, self.cell.weight_ih, self.cell.weight_hh, None, bias_hh=self.cell.bias_hh)


rnn: nn.RNN = Model().rnn
output, h_n = Model().network(torch.zeros(2, 3, 10), lengths=[1, 2])
output, h_n = rnn_ext.rnn_layer(torch.zeros(2, 3, 4), None, torch.zeros(5, 4), torch.zeros(5, 5), lengths=[2, 1, 0])
model: Model = rnn_ext.convert(Model(), inverse=True)
cell: nn.RNNCell = rnn_ext.LazyRNNCell(5)
size: int = rnn_ext.RNNCell(4, 5).input_size
built: bool = rnn_ext.is_cuda_built()
version: str = rnn_ext.__version__
reveal_type(rnn_ext.rnn_cell(torch.zeros(4), None, cell.weight_ih, cell.weight_hh))
"""
MISUSE = {
    "arg-type": "rnn_ext.RNNCell('4', 5)",
    "call-arg": "rnn_ext.LazyRNNCell()",
    "assignment": "wrong: int = rnn_ext.convert(Model())",
    "attr-defined": "rnn_ext.no_such_name",
}


@pytest.mark.slow
def test_mypy_strict_accepts_uses_and_reports_misuses(tmp_path, pytestconfig):
    """In a user's project, without the project's own configuration."""
    pytest.importorskip("mypy", reason="mypy is not installed")
    file = tmp_path / "use.py"
    file.write_text(USE + "\n".join(MISUSE.values()) + "\n")
    environment = {"MYPYPATH": str(Path(rnn_ext.__file__).parents[1])}
    cache = pytestconfig.rootpath / ".mypy_cache"  # as make lint leaves it: torch's own sources take most of a minute
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", f"--cache-dir={cache}", file.name]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    report = run.stdout.splitlines()
    assert [line for line in report if "Revealed type" in line and "Tensor" in line], run.stdout + run.stderr
    errors = [line for line in report if "error:" in line]
    assert [line.rsplit("[", 1)[1].rstrip("]") for line in errors] == list(MISUSE)


# Documentation

PUBLIC = (
    rnn_ext.RNN,
    rnn_ext.ElmanNetwork,
    rnn_ext.RNNCell,
    rnn_ext.LazyRNNCell,
    rnn_ext.rnn_cell,
    rnn_ext.rnn_layer,
    rnn_ext.RNNCellFunction,
    rnn_ext.convert,
)


@pytest.mark.parametrize("item", PUBLIC, ids=lambda item: item.__name__)
def test_docstrings_render(item, capsys):
    help(item)
    text = inspect.getdoc(item)
    assert text.splitlines()[0] in capsys.readouterr().out
    pytest.importorskip("docutils", reason="docutils is not installed")
    from docutils import nodes
    from docutils.core import publish_doctree
    from docutils.parsers.rst import roles

    for role in ("class", "func"):  # Sphinx's
        roles.register_generic_role(role, nodes.literal)
    publish_doctree(text, settings_overrides={"halt_level": 2})


def test_examples_in_docstrings_run():
    globals = {"rnn_ext": rnn_ext, "torch": torch}
    examples = [e for item in PUBLIC for e in doctest.DocTestFinder(recurse=False).find(item, globs=globals)]
    results = [doctest.DocTestRunner().run(example) for example in examples]
    assert sum(r.attempted for r in results) >= 3
    assert sum(r.failed for r in results) == 0


# The profiler


@every_entry
def test_profiler_ranges_carry_the_operators_names(cell, device):
    args = random_arguments(device=device).leaves()
    names = operators_run(lambda: cell(*args).sum().backward())
    assert (names.count("rnn_ext::rnn_cell"), names.count("rnn_ext::rnn_cell_backward")) == (1, 1)


@every_module
def test_profiler_ranges_of_a_compiled_module_carry_the_operators_names(cls, shape, device):
    module = torch.compile(cls(7, 5, device=device), fullgraph=True, backend="aot_eager")
    x = torch.randn(shape, device=device)
    first(module(x)).sum().backward()
    names = operators_run(lambda: first(module(x)).sum().backward())
    (operator,) = {"rnn_ext::rnn_cell", "rnn_ext::rnn_layer"} & set(names)
    assert (names.count(operator), names.count(f"{operator}_backward")) == (1, 1)


# __torch_function__


class Record(TorchFunctionMode):
    def __init__(self) -> None:
        self.seen: list = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_a_torch_function_mode_sees_the_call_and_leaves_the_result_to_the_operator(grad, device):
    """As it sees torch.rnn_tanh_cell within nn.RNNCell."""
    cell = rnn_ext.RNNCell(7, 5, device=device).requires_grad_(grad)
    x = torch.randn(3, 7, device=device)
    with Record() as mode:
        names = operators_run(
            lambda: torch.testing.assert_close(cell(x), rnn_ext.rnn_cell(x, None, *cell.parameters()))
        )
    assert mode.seen.count(rnn_ext.rnn_cell) == 2
    assert names.count("rnn_ext::rnn_cell") == 2
    with Record() as mode, torch._C.DisableTorchFunction():
        cell(x)
    assert not mode.seen


@pytest.mark.parametrize("place", range(6))
def test_a_tensor_subclass_may_override_the_function(place, device):
    class Overrides(Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            return "ours" if function is rnn_ext.rnn_cell else super().__torch_function__(function, types, args, kwargs)

    args = list(random_arguments(device=device))
    args[place] = args[place].as_subclass(Overrides)
    assert rnn_ext.rnn_cell(*args) == "ours"


# FLOPs


def flops(f) -> dict[str, int]:
    with FlopCounterMode(display=False) as counter:
        f()
    return {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}


@pytest.mark.parametrize("frozen", [(), ("input",), ("input", "hx"), ("weight_ih", "weight_hh")], ids=str)
@every_entry
def test_the_flop_counter_counts_what_it_does_for_nn_rnncell(cell, frozen, device):
    args = random_arguments(3, 7, 5, device=device).leaves()
    for name in frozen:
        getattr(args, name).requires_grad_(False)
    ours, theirs = (flops(lambda f=f: f(*args).sum().backward()) for f in (cell, torch.rnn_tanh_cell))
    assert list(ours) == ["rnn_ext.rnn_cell", "rnn_ext.rnn_cell_backward"]
    assert sum(ours.values()) == sum(theirs.values())


def test_the_flop_counter_leaves_out_what_an_absent_hx_spares(device):
    x, _, *parameters = random_arguments(3, 7, 5, device=device).leaves()
    assert flops(lambda: rnn_ext.rnn_cell(x, None, *parameters).sum().backward()) == {
        "rnn_ext.rnn_cell": 2 * 3 * 5 * 7,
        "rnn_ext.rnn_cell_backward": 2 * 3 * 5 * 7 * 2,
    }


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "bias": False}], ids=["one", "four"])
@pytest.mark.parametrize("kind", ["padded", "lengths", "packed", "nested"])
def test_the_flop_counter_counts_what_it_does_for_nn_rnn(kind, options, frozen):
    """A loop's products. Lengths count whole, since it sees sizes and no numbers."""
    x = torch.randn(6, 3, 7)
    rows = [x[:n, row] for row, n in enumerate((6, 4, 1))]
    nested = torch.nested.nested_tensor(rows, layout=torch.jagged)
    theirs = x if kind in ("padded", "lengths") else pack_sequence(rows)
    ours = nested if kind == "nested" else theirs
    counts = []
    for cls, data in ((nn.RNN, theirs), (rnn_ext.RNN, ours)):
        rnn = cls(7, 5, **options).requires_grad_(not frozen)
        hx = torch.zeros(len(rnn.all_weights), 3, 5, requires_grad=True)

        kwargs = {"lengths": [6, 0, 2]} if kind == "lengths" and cls is rnn_ext.RNN else {}

        def run(rnn=rnn, data=data, hx=hx, kwargs=kwargs):
            output, _ = rnn(data, hx, **kwargs)
            values = output if isinstance(output, Tensor) else output.data
            (values.values() if values.is_nested else values).sum().backward()

        counts.append(sum(flops(run).values()))
    assert counts[0] == counts[1] > 0


def test_the_flop_counter_finds_the_cell_among_a_models_modules(device):
    model = nn.ModuleDict({"cell": rnn_ext.RNNCell(7, 5, device=device)})
    model.forward = lambda x: model["cell"](x)
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(3, 7, device=device))
    assert sum(counter.get_flop_counts()["ModuleDict.cell"].values()) == 2 * 3 * 5 * 7


# Modules that are told about the operators when they are imported


def run_in_a_new_process(program: str) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(rnn_ext.__file__).parents[1]), *sys.path])}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr


def test_the_flop_counter_counts_where_it_was_looked_for_before_and_is_reloaded_later():
    """And it is left with its own loader, as if it had been imported without the extension."""
    run_in_a_new_process("""
        import copy, importlib, importlib.util, inspect
        import rnn_ext, torch

        name = "torch.utils.flop_counter"
        spec = importlib.util.find_spec(name)
        assert "FlopCounterMode" in spec.loader.get_source(name) and copy.copy(spec.loader).path == spec.origin

        module = importlib.import_module(name)
        for module in (module, importlib.reload(module)):
            with module.FlopCounterMode(display=False) as counter:
                rnn_ext.RNNCell(7, 5)(torch.randn(3, 7))
            assert counter.get_total_flops() == 2 * 3 * 5 * 7
            for loader in (module.__loader__, module.__spec__.loader):
                assert type(loader) is type(torch.__loader__)
            assert "FlopCounterMode" in inspect.getsource(module)
    """)


def test_a_registration_that_fails_leaves_the_users_import_alone(tmp_path, monkeypatch, caplog):
    """It uses private names, which one day mean something else."""
    (tmp_path / "imported_later.py").write_text("answer = 42")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(_integrations, "_registrations", {})
    for name in ("imported_later", "sys"):
        _integrations._once_imported(name)(lambda: 1 / 0)
        module = importlib.import_module(name)
        assert f"{name} can't be told" in caplog.text
        assert getattr(module, "answer", 42) == 42
