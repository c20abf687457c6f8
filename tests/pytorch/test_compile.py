"""torch.compile: one graph, our operators in it both ways, one compilation for all batch sizes."""

from __future__ import annotations

import pytest
import torch
import torch._inductor.lowering
from entries import every_module, first, through_autograd_function, values_and_gradients
from functorch.compile import make_boxed_func
from references import NONLINEARITIES, eager_cell, output_and_gradients, random_arguments, seeded
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch._inductor.decomposition import select_decomp_table

import rnn_ext

pytestmark = pytest.mark.slow

rnn_cell_op = torch.ops.rnn_ext.rnn_cell
rnn_cell_backward_op = torch.ops.rnn_ext.rnn_cell_backward

VARIANTS = {"all": {}, "no_hx": {"hx": False}, "no_bias": {"bias": "none"}, "bias_hh_only": {"bias": "hh"}}
every_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())


@every_variant
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("cell", [rnn_ext.rnn_cell, through_autograd_function], ids=["function", "autograd_function"])
def test_the_compiled_function_gives_eager_results_without_graph_breaks(cell, backend, nonlinearity, variant, device):
    args = random_arguments(device=device, **variant)
    grad_output = torch.randn(3, 5, dtype=torch.float64).to(device)
    compiled = torch.compile(cell, fullgraph=True, backend=backend)
    torch.testing.assert_close(
        output_and_gradients(compiled, args, nonlinearity, grad_output),
        output_and_gradients(eager_cell, args, nonlinearity, grad_output),
    )


def output_and_parameter_gradients(cell: nn.Module, call, *inputs) -> tuple[Tensor, list[Tensor]]:
    output = call(*inputs)
    return output, list(torch.autograd.grad(output.sum(), list(cell.parameters())))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_cells_give_eager_results_without_graph_breaks(mode, device):
    """Module and function, by Inductor; on CUDA, reduce-overhead captures the graphs and replays them."""
    cell = rnn_ext.RNNCell(7, 5, device=device)
    compiled = torch.compile(cell, fullgraph=True, mode=mode)
    compiled_function = torch.compile(rnn_ext.rnn_cell, fullgraph=True, mode=mode)
    x, hx = torch.randn(3, 7, device=device), torch.randn(3, 5, device=device)
    for inputs in ((x, hx), (x,), (x[0], hx[0])):
        expected = output_and_parameter_gradients(cell, cell, *inputs)
        for _ in range(3):  # under reduce-overhead: warm-up, capture, replay
            output, gradients = output_and_parameter_gradients(cell, compiled, *inputs)
            torch.testing.assert_close((output, gradients), expected)

    def of_function(x, hx):
        return compiled_function(x, hx, *cell.parameters(), nonlinearity="tanh")

    expected = output_and_parameter_gradients(cell, cell, x, hx)
    torch.testing.assert_close(output_and_parameter_gradients(cell, of_function, x, hx), expected)


def test_inductor_compiles_in_continuous_integration(monkeypatch, device):
    """With CI set, as on GitHub's runners, it raises for an operator with a decomposition unless told otherwise."""
    monkeypatch.setenv("CI", "true")
    for op in (rnn_cell_op.default, rnn_cell_backward_op.default):
        monkeypatch.delitem(torch._inductor.lowering.lowerings, op, raising=False)
    cell = rnn_ext.RNNCell(7, 5, device=device)
    x = torch.randn(3, 7, device=device)
    expected = output_and_parameter_gradients(cell, cell, x)
    with torch.compiler.config.patch(force_disable_caches=True):
        torch.testing.assert_close(output_and_parameter_gradients(cell, torch.compile(cell), x), expected)


def test_a_compiled_training_step_equals_nn_rnncells(device):
    """Loss, backward and optimizer in one function, over two steps of a sequence."""
    x, hx = torch.randn(2, 3, 7, device=device), torch.zeros(3, 5, device=device)
    results = []
    for cls in (rnn_ext.RNNCell, nn.RNNCell):
        cell = seeded(cls, 7, 5, device=device)
        optimizer = torch.optim.SGD(cell.parameters(), lr=0.1)

        @torch.compile(backend="aot_eager")
        def train(x, hx, cell=cell, optimizer=optimizer):
            optimizer.zero_grad()
            loss = cell(x[1], cell(x[0], hx)).pow(2).mean()
            loss.backward()
            optimizer.step()
            return loss.detach()

        results.append([[train(x, hx) for _ in range(3)], list(cell.parameters())])
        torch._dynamo.reset()
    torch.testing.assert_close(*results)


def test_a_compiled_loop_over_time_gives_eager_results(device):
    cell = rnn_ext.RNNCell(7, 5, device=device)
    steps = torch.randn(4, 3, 7, device=device)

    def unroll(steps):
        hx = None
        for step in steps:
            hx = cell(step, hx)
        return hx

    compiled = torch.compile(unroll, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        output_and_parameter_gradients(cell, compiled, steps),
        output_and_parameter_gradients(cell, unroll, steps),
    )


def test_compiled_graphs_contain_the_fused_operators_both_ways(device):
    """Dynamo cannot trace the eager entry points; the operators must take their place, not the ATen composition.

    Nor may Inductor's table of decompositions, which gathers some by itself, take them apart.
    """
    called: dict[str, list] = {}

    def record(direction):
        def compiler(graph, _):
            called[direction] = [node.target for node in graph.graph.nodes if node.op == "call_function"]
            return make_boxed_func(graph.forward)

        return compiler

    backend = aot_autograd(
        fw_compiler=record("forward"), bw_compiler=record("backward"), decompositions=select_decomp_table()
    )
    cell = rnn_ext.RNNCell(7, 5, device=device)
    torch.compile(cell, fullgraph=True, backend=backend)(torch.randn(3, 7, device=device)).sum().backward()
    assert called["forward"].count(rnn_cell_op.default) == 1
    assert called["backward"].count(rnn_cell_backward_op.default) == 1
    for targets in called.values():
        assert not {torch.ops.aten.addmm.default, torch.ops.aten.mm.default} & set(targets)


def test_a_compiled_cell_is_compiled_again_for_the_second_batch_size_and_no_further(device):
    """Without being told that the batch is dynamic, PyTorch finds out by the second size."""
    cell = rnn_ext.RNNCell(7, 5, device=device)
    counter = CompileCounter()
    compiled = torch.compile(cell, fullgraph=True, backend=counter)
    for batch in (4, 2, 3, 17, 64):
        x, hx = torch.randn(batch, 7, device=device), torch.randn(batch, 5, device=device)
        torch.testing.assert_close(compiled(x, hx), cell(x, hx))
    assert counter.frame_count == 2


@every_module
def test_a_compiled_module_with_dynamic_sizes_is_compiled_once(cls, shape, device):
    """Forward and backward: the sizes that AOTAutograd's graphs assume count too."""
    module = cls(7, 5, device=device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for steps, batch in ((6, 2), (9, 3), (2, 17)):
        x = torch.randn(*(steps, batch)[3 - len(shape) :], 7, device=device)
        torch.testing.assert_close(values_and_gradients(module, compiled, x), values_and_gradients(module, module, x))
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 3


def test_the_graph_of_a_compiled_rnn_does_not_grow_with_the_steps():
    """Nor does the time to compile it, as that of nn.RNN does, which Dynamo unrolls."""
    nodes = []
    for steps in (5, 500):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        torch.compile(rnn_ext.RNN(7, 5), fullgraph=True, backend=counter)(torch.randn(steps, 3, 7))
        nodes.append([node.name for graph in counter.graphs for node in graph.graph.nodes])
    assert nodes[0] == nodes[1]


@every_module
def test_compiled_autograd_gives_eager_gradients(cls, shape, device):
    """A compiled module's backward pass is one graph; an eager one's has a break at the node, which is in C++."""
    module, x = cls(7, 5, device=device), torch.randn(shape, device=device)
    expected = list(torch.autograd.grad(first(module(x)).pow(2).sum(), list(module.parameters())))
    for call, graphs in ((module, 2), (torch.compile(module, fullgraph=True, backend="aot_eager"), 1)):
        module.zero_grad()
        counter = CompileCounter()
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend=counter)):
            first(call(x)).pow(2).sum().backward()
        assert counter.frame_count == graphs
        torch.testing.assert_close([p.grad for p in module.parameters()], expected)


def test_compiled_functorch_transforms_equal_eager(device):
    args = random_arguments(device=device)

    def per_row(x, hx):
        return torch.func.vmap(torch.func.grad(lambda x, hx: rnn_ext.rnn_cell(x, hx, *args[2:]).sum()))(x, hx)

    compiled = torch.compile(per_row, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args[:2]), per_row(*args[:2]))


def test_a_compiled_cell_of_another_dtype_falls_back_to_aten():
    cell = rnn_ext.RNNCell(4, 5, dtype=torch.complex64)
    x = torch.randn(3, 4, dtype=torch.complex64)
    torch.testing.assert_close(torch.compile(cell, fullgraph=True, backend="aot_eager")(x), cell(x))
