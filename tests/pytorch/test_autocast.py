"""Autocast: nn.RNNCell's dtypes, eager and compiled, and parameters whose gradients stay float32."""

from __future__ import annotations

import pytest
import torch
from references import random_arguments, seeded
from torch import nn

import rnn_ext


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("inputs", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("hx", [True, False], ids=["hx", "no_hx"])
def test_autocast_gives_nn_rnncells_dtypes(hx, nonlinearity, inputs, low, device):
    """float32 and half precisions are cast, float64 is not and then does not fit float32 parameters."""
    x, h = torch.randn(3, 4), torch.randn(3, 5)
    outcomes = []
    for cls in (rnn_ext.RNNCell, nn.RNNCell):
        cell = seeded(cls, 4, 5, nonlinearity=nonlinearity).to(device)
        leaf = x.to(device, inputs).requires_grad_()
        try:
            with torch.autocast(device, low):
                output = cell(leaf, h.to(device, inputs)) if hx else cell(leaf)
        except RuntimeError as error:
            outcomes.append(type(error))
            continue
        output.sum().backward()
        gradients = [leaf.grad, *(p.grad for p in cell.parameters())]
        outcomes.append([output.dtype, [g.dtype for g in gradients]])
        # Nine terms of unit size and a dozen roundings to `low`, on each side.
        few = 32 * torch.finfo(low).eps
        reference = seeded(nn.RNNCell, 4, 5, nonlinearity=nonlinearity)
        expected = reference(x, h if hx else None)
        torch.testing.assert_close(output.float().cpu(), expected, rtol=few, atol=few)
    assert outcomes[0] == outcomes[1]


def test_autocast_casts_the_sigmoid_cell_too(device):
    cell = rnn_ext.RNNCell(4, 5, nonlinearity="sigmoid", device=device)
    with torch.autocast(device, torch.bfloat16):
        output = cell(torch.randn(3, 4, device=device))
    output.sum().backward()
    assert output.dtype == torch.bfloat16
    assert {p.grad.dtype for p in cell.parameters()} == {torch.float32}


def test_autocast_turned_off_inside_leaves_float32(device):
    cell = rnn_ext.RNNCell(4, 5, device=device)
    x = torch.randn(3, 4, device=device)
    with torch.autocast(device, torch.bfloat16), torch.autocast(device, enabled=False):
        assert torch.equal(cell(x), cell(x))
        assert cell(x).dtype == torch.float32


def test_autocast_covers_a_sequence_whose_hidden_state_changes_dtype(device):
    """The first hx is float32, every later one bfloat16."""
    cell = rnn_ext.RNNCell(4, 5, device=device)
    with torch.autocast(device, torch.bfloat16):
        hx = torch.zeros(3, 5, device=device)
        for _ in range(3):
            hx = cell(torch.randn(3, 4, device=device), hx)
            assert hx.dtype == torch.bfloat16


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_a_compiled_cell_under_autocast_gives_what_an_eager_one_does(low, device):
    """Dtypes and values, and gradients of the parameters in float32."""
    cell = rnn_ext.RNNCell(7, 5, device=device)
    compiled = torch.compile(cell, fullgraph=True, backend="aot_eager")
    x, hx = torch.randn(3, 7, device=device), torch.randn(3, 5, device=device)
    results = []
    for call in (compiled, cell):
        with torch.autocast(device, low):
            output = call(x, hx)
        gradients = torch.autograd.grad(output.sum(), list(cell.parameters()))
        assert output.dtype == low
        assert {g.dtype for g in gradients} == {torch.float32}
        results.append([output, list(gradients)])
    torch.testing.assert_close(*results)


def test_a_compiled_cell_under_autocast_calls_the_operator(device):
    """Its float32 parameters do not fit its inputs, which is no reason to fall back to ATen here."""
    called = []

    def backend(graph, _):
        called.extend(node.target for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(rnn_ext.RNNCell(7, 5, device=device), fullgraph=True, backend=backend)
    with torch.autocast(device, torch.bfloat16):
        compiled(torch.randn(3, 7, device=device, dtype=torch.bfloat16))
    assert torch.ops.rnn_ext.rnn_cell in called


def test_autocast_inside_a_compiled_function_is_respected(device):
    cell = rnn_ext.RNNCell(7, 5, device=device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x):
        with torch.autocast(device, torch.bfloat16):
            low = cell(x)
        return low, cell(x)

    low, full = compiled(torch.randn(3, 7, device=device))
    assert (low.dtype, full.dtype) == (torch.bfloat16, torch.float32)


# The torch.autograd.Function is below autograd and above autocast.


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("create_graph", [False, True], ids=["first", "second"])
def test_the_autograd_function_under_autocast_is_the_cell_under_autocast(create_graph, low, device):
    args = random_arguments(dtype=torch.float32, device=device)
    results = []
    for cell in (rnn_ext.RNNCellFunction.apply, rnn_ext.rnn_cell):
        leaves = args.leaves()
        with torch.autocast(device, low):
            output = cell(*leaves, "tanh")
        gradients = torch.autograd.grad(output.square().sum(), leaves, create_graph=create_graph)
        if create_graph:
            gradients = torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves)
        assert output.dtype == low
        assert {g.dtype for g in gradients} == {torch.float32}
        results.append([output, *gradients])
    # Both round to `low` after each step, not in the same places.
    torch.testing.assert_close(*results, rtol=32 * torch.finfo(low).eps, atol=32 * torch.finfo(low).eps)


def test_the_autograd_function_under_autocast_leaves_other_uses_of_the_weights_their_gradients(device):
    """Autocast keeps the casts it makes, and those made inside the function have no graph."""
    args = random_arguments(dtype=torch.float32, device=device).leaves()
    with torch.autocast(device, torch.bfloat16):
        rnn_ext.RNNCellFunction.apply(*args, "tanh")
        product = nn.functional.linear(args.input, args.weight_ih)
    assert torch.autograd.grad(product.sum(), args.weight_ih)[0].abs().sum() > 0
    assert torch.is_autocast_cache_enabled()


def test_the_compiled_autograd_function_under_autocast_is_the_eager_one(device):
    args = random_arguments(dtype=torch.float32, device=device)
    results = []
    for wrap in (lambda f: f, torch.compile(fullgraph=True, backend="aot_eager")):

        @wrap
        def under_autocast(*leaves):
            with torch.autocast(device, torch.bfloat16):
                return rnn_ext.RNNCellFunction.apply(*leaves, "tanh")

        leaves = args.leaves()
        output = under_autocast(*leaves)
        results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    torch.testing.assert_close(*results)
