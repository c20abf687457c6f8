"""torch.compile takes an RNN in one graph, without a setting, and still breaks the graph at nn.RNN."""

from __future__ import annotations

import pytest
import torch
from references import seeded
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils.rnn import pack_padded_sequence

import rnn_ext

pytestmark = pytest.mark.slow

OPTIONS = {
    "plain": {},
    "stacked_both_ways": {"num_layers": 2, "bidirectional": True, "batch_first": True},
    "sigmoid_no_bias": {"nonlinearity": "sigmoid", "bias": False},
}


def values_and_gradients(rnn: nn.Module, call, *inputs, **kwargs):
    output, h_n = call(*inputs, **kwargs)
    return output, h_n, *torch.autograd.grad(output.sum() + h_n.sum(), list(rnn.parameters()))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_a_compiled_rnn_gives_eager_results_in_one_graph(options, backend):
    rnn = seeded(rnn_ext.RNN, 3, 5, **options)
    assert isinstance(rnn, nn.RNN)
    x = torch.randn(6, 4, 3)
    hx = rnn(x)[1].detach()
    for inputs in ((x,), (x, hx), (x[:, 0], hx[:, 0])):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend(backend)
        compiled = torch.compile(rnn, fullgraph=True, backend=counter)
        expected = values_and_gradients(rnn, rnn, *inputs)
        torch.testing.assert_close(values_and_gradients(rnn, compiled, *inputs), expected)
        torch.testing.assert_close(values_and_gradients(rnn, compiled, *inputs), expected)
        assert counter.frame_count == 1


def test_a_compiled_model_with_an_rnn_inside_is_one_graph():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = rnn_ext.ElmanNetwork(3, 5, 2, num_layers=2)

        def forward(self, x):
            return self.network(x.relu())

    model = seeded(Model)
    x = torch.randn(6, 4, 3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(values_and_gradients(model, compiled, x), values_and_gradients(model, model, x))


def test_a_compiled_rnn_draws_dropout_as_it_does_eagerly():
    rnn = seeded(rnn_ext.RNN, 3, 5, 2, dropout=0.5)
    compiled = torch.compile(rnn, fullgraph=True, backend="eager")
    x = torch.randn(6, 4, 3)
    results = []
    for call in (rnn, compiled):
        torch.manual_seed(2)
        results.append(call(x))
    torch.testing.assert_close(*results)


def test_the_graph_still_breaks_at_nn_rnn_in_compiled_code():
    x = torch.randn(6, 4, 3)
    torch.compile(rnn_ext.RNN(3, 5), fullgraph=True, backend="eager")(x)
    assert not torch._dynamo.config.allow_rnn
    with pytest.raises(torch._dynamo.exc.Unsupported, match="RNN"):
        torch.compile(nn.RNN(3, 5), fullgraph=True, backend="eager")(x)


@pytest.mark.parametrize("hx", [False, True], ids=["no_hx", "hx"])
@pytest.mark.parametrize("enforce_sorted", [True, False], ids=["sorted", "unsorted"])
def test_a_compiled_rnn_takes_packed_input_in_one_graph(enforce_sorted, hx):
    rnn = seeded(rnn_ext.RNN, 3, 5, 2, bidirectional=True)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, hx: rnn(x, hx), fullgraph=True, backend=counter)
    for lengths in ([6, 4, 4, 1], [7, 3, 2, 1], [9, 9, 8, 1], [2, 1, 1, 1]):
        x = pack_padded_sequence(
            torch.randn(9, 4, 3), torch.tensor(lengths[:: 1 if enforce_sorted else -1]), enforce_sorted=enforce_sorted
        )
        state = torch.randn(4, 4, 5) if hx else None
        results = []
        for call in (compiled, rnn):
            output, h_n = call(x, state)
            gradients = torch.autograd.grad(output.data.sum() + h_n.pow(2).sum(), list(rnn.parameters()))
            results.append([output.data, h_n, *gradients])
        torch.testing.assert_close(*results)
    assert counter.frame_count <= 2 * 2  # AOTAutograd's joint graph may be one more; the second length is found dynamic


def test_a_compiled_rnn_takes_packed_input_with_a_graph_break_at_worst():
    """How many rows there are, a graph that may break asks batch_sizes."""
    rnn = seeded(rnn_ext.RNN, 3, 5)
    x = pack_padded_sequence(torch.randn(6, 4, 3), torch.tensor([6, 3, 2, 1]))
    compiled = torch.compile(rnn, backend="eager")
    torch.testing.assert_close(compiled(x)[0].data, rnn(x)[0].data)


def test_a_compiled_rnn_takes_nested_input_in_one_graph():
    rnn = seeded(rnn_ext.RNN, 3, 5, 2, bidirectional=True)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: rnn(x.relu()), fullgraph=True, backend=counter)
    for lengths in ([3, 5], [4, 1], [6, 2]):
        x = torch.nested.nested_tensor([torch.randn(n, 3) for n in lengths], layout=torch.jagged)
        results = []
        for call in (compiled, lambda x: rnn(x.relu())):
            output, h_n = call(x)
            gradients = torch.autograd.grad(output.values().sum() + h_n.pow(2).sum(), list(rnn.parameters()))
            results.append([output.values(), h_n, *gradients])
        torch.testing.assert_close(*results)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_rnn_takes_lengths_in_one_graph(backend):
    rnn = seeded(rnn_ext.RNN, 3, 5)
    x = torch.randn(6, 4, 3)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(lambda x, n: rnn(x, lengths=n), fullgraph=True, backend=counter)
    for lengths in (torch.tensor([3, 6, 0, 2]), torch.tensor([1, 1, 5, 6])):
        torch.testing.assert_close(compiled(x, lengths), rnn(x, lengths=lengths))
    assert counter.frame_count == 1


@pytest.mark.parametrize("strict", [False, True], ids=["not_strict", "strict"])
def test_an_exported_rnn_gives_eager_results_and_lowers_to_aten(strict):
    rnn = seeded(rnn_ext.RNN, 3, 5, 2, bidirectional=True, batch_first=True).eval()
    x = torch.randn(6, 4, 3)
    program = torch.export.export(rnn, (x,), strict=strict)
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("rnn_ext.rnn_layer.default") == 4
    torch.testing.assert_close(program.module()(x), rnn(x))
    table = torch.export.default_decompositions()
    table.update(torch._decomp.get_decompositions([torch.ops.rnn_ext.rnn_layer]))
    program = program.run_decompositions(table)
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert all(target.namespace == "aten" for target in targets)
    torch.testing.assert_close(program.module()(x), rnn(x))


def test_an_exported_rnn_takes_other_lengths_and_batches():
    class WithLengths(rnn_ext.RNN):
        def forward(self, x, n):
            return super().forward(x, lengths=n)

    rnn = seeded(WithLengths, 3, 5)
    batch = torch.export.Dim("batch", min=2, max=64)
    first = torch.randn(6, 4, 3), torch.tensor([3, 0, 6, 1])
    program = torch.export.export(rnn, first, dynamic_shapes=({1: batch}, {0: batch}))
    for inputs in (first, (torch.randn(6, 3, 3), torch.tensor([1, 2, 5]))):
        torch.testing.assert_close(program.module()(*inputs), rnn(*inputs))


def test_a_compiled_rnn_through_inductor_gives_eager_results():
    rnn = seeded(rnn_ext.RNN, 3, 5, 2)
    x = torch.randn(6, 4, 3)
    compiled = torch.compile(rnn, fullgraph=True)
    torch.testing.assert_close(values_and_gradients(rnn, compiled, x), values_and_gradients(rnn, rnn, x))
