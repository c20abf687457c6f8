"""What autograd saves: checkpointing, saved-tensor hooks, retained graphs, and tensors changed too early."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from entries import every_entry, every_module, first, through_module, values_and_gradients
from references import eager_cell, seeded, small_arguments
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

import rnn_ext
from rnn_ext import rnn_cell


@every_entry
def test_a_graph_can_be_walked_twice_only_if_retained(cell, device):
    args = small_arguments(device)
    loss = cell(*args).sum()
    first = torch.autograd.grad(loss, args, retain_graph=True)
    second = torch.autograd.grad(loss, args)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, args)


@every_entry
@pytest.mark.parametrize("changed", ["input", "hx", "weight_ih", "weight_hh", "output"])
def test_in_place_change_of_a_saved_tensor_is_caught(cell, changed, device):
    def change_and_differentiate(f) -> None:
        args = small_arguments(device)
        output = f(*args)
        with torch.no_grad():
            (output if changed == "output" else getattr(args, changed)).add_(1)
        output.sum().backward()

    for f in (eager_cell, cell):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            change_and_differentiate(f)


@pytest.mark.parametrize("cell", [rnn_cell, through_module], ids=["function", "module"])
@pytest.mark.parametrize("saves_for", ["input", "hx", "weight_ih", "weight_hh"])
def test_a_tensor_that_no_asked_gradient_needs_may_be_changed(cell, saves_for, device):
    """An optimizer may step the weights of a first layer before its backward: its input needs no gradient."""
    other = {"input": "weight_ih", "hx": "weight_hh", "weight_ih": "input", "weight_hh": "hx"}[saves_for]

    def gradients(f, change: bool) -> list[Tensor]:
        torch.manual_seed(0)
        args = small_arguments(device)
        getattr(args, saves_for).requires_grad_(False)
        output = f(*args)
        if change:
            with torch.no_grad():
                getattr(args, other).add_(1)
        return torch.autograd.grad(output.sum(), [t for t in args if t.requires_grad])

    gradients(eager_cell, change=True)
    torch.testing.assert_close(gradients(cell, change=True), gradients(cell, change=False))


def test_saved_tensor_hooks_see_the_saved_tensors(device):
    """Activation offloading and quantisation hook in here; so does memory accounting."""
    args = small_arguments(device)
    packed = []

    def pack(t: Tensor) -> Tensor:
        packed.append(t)
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = rnn_cell(*args)
    assert {tuple(t.shape) for t in packed} >= {(2, 3), (2, 2)}
    gradients = torch.autograd.grad(output.sum(), args)
    torch.testing.assert_close(gradients, torch.autograd.grad(eager_cell(*args).sum(), args))


@every_module
def test_saved_tensors_may_be_kept_elsewhere(cls, shape, device):
    module, x = cls(7, 5, device=device), torch.randn(shape, device=device)
    expected = values_and_gradients(module, module, x)

    def call(x):
        with save_on_cpu(), torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
            return module(x)

    torch.testing.assert_close(values_and_gradients(module, call, x), expected)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@every_module
def test_anomaly_mode_names_the_node_whose_gradient_is_nan(cls, shape, device):
    module, x = cls(7, 5, device=device), torch.randn(shape, device=device)
    expected = values_and_gradients(module, module, x)
    with torch.autograd.detect_anomaly():
        torch.testing.assert_close(values_and_gradients(module, module, x), expected)
        with pytest.raises(RuntimeError, match=r"RNN(Cell|Layer)Backward.* returned nan"):
            first(module(x * torch.nan)).sum().backward()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradients(use_reentrant, device):
    args = small_arguments(device)
    output = checkpoint(rnn_cell, *args, use_reentrant=use_reentrant)
    output.sum().backward()
    expected = torch.autograd.grad(eager_cell(*args).sum(), args)
    torch.testing.assert_close([t.grad for t in args], list(expected))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpointed_sequence_trains_as_nn_rnncells(use_reentrant, device):
    """The usual use: the steps of a long sequence are computed again in the backward pass, two at a time."""
    x = torch.randn(4, 3, 4, device=device)
    results = []
    for cls in (rnn_ext.RNNCell, nn.RNNCell):
        cell = seeded(cls, 4, 5, device=device)

        def two_steps(x, hx, cell=cell):
            return cell(x[1], cell(x[0], hx))

        hx = torch.zeros(3, 5, device=device, requires_grad=True)
        for steps in x.split(2):
            hx = checkpoint(two_steps, steps, hx, use_reentrant=use_reentrant)
        hx.sum().backward()
        results.append([p.grad for p in cell.parameters()])
    torch.testing.assert_close(*results)


@every_entry
@pytest.mark.parametrize("saved_before", range(5))
def test_a_pack_hook_that_raises_leaves_nothing_behind(cell, saved_before, device):
    """Checkpoint's early stop is such a hook: once a step, so that a leak would grow with the sequence."""

    class Packed:
        pass

    packed, operands = [], []

    def pack(_: Tensor) -> Packed:
        if len(packed) == saved_before:
            raise StopIteration("no further")
        token = Packed()
        packed.append(weakref.ref(token))
        return token

    def call() -> None:
        args = small_arguments(device)
        operands.extend(map(weakref.ref, args))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda _: None):
            cell(*args)

    with pytest.raises(StopIteration, match="no further"):
        call()
    gc.collect()
    assert len(packed) == saved_before
    assert [ref() for ref in packed + operands] == [None] * (saved_before + len(operands))


def test_checkpointing_keeps_no_step_alive(device):
    cell = rnn_ext.RNNCell(4, 5, device=device)
    x, h = torch.randn(3, 4, device=device), torch.randn(3, 5, device=device, requires_grad=True)
    checkpoint(lambda h: cell(x, h), h, use_reentrant=False).sum().backward()
    kept = weakref.ref(h)
    del h
    gc.collect()
    assert kept() is None


@every_entry
def test_saving_on_the_cpu_gives_the_same_gradients(cell, device):
    args = small_arguments(device)
    with save_on_cpu():
        output = cell(*args)
    torch.testing.assert_close(
        torch.autograd.grad(output.sum(), args), torch.autograd.grad(eager_cell(*args).sum(), args)
    )


@every_entry
def test_no_input_is_saved_that_no_gradient_needs(cell, device):
    """With frozen weights (adapters, inference with gradients of the input) neither x nor h is kept alive."""
    args = small_arguments(device)
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        getattr(args, name).requires_grad_(False)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        output = cell(*args)
    assert set(saved) == {output.data_ptr(), args.weight_ih.data_ptr(), args.weight_hh.data_ptr()}
