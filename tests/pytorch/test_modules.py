"""The modules: what nn.RNNCell's users rely on besides its values."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from entries import every_module, first
from references import NONLINEARITIES, seeded
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrizations, prune, stateless

import rnn_ext

CONSTRUCTIONS = {
    "defaults": ((4, 5), {}),
    "no_bias": ((4, 5), {"bias": False}),
    "relu": ((4, 5, True, "relu"), {}),
    "float64": ((4, 5), {"dtype": torch.float64}),
    "bfloat16_relu_no_bias": ((4, 5, False), {"nonlinearity": "relu", "dtype": torch.bfloat16}),
    "hidden_size_zero": ((4, 0), {}),
}
every_construction = pytest.mark.parametrize("args, kwargs", CONSTRUCTIONS.values(), ids=CONSTRUCTIONS.keys())


def assert_same_parameters(ours: nn.Module, theirs: nn.Module) -> None:
    """Names, order, values, dtype, device and requires_grad."""
    torch.testing.assert_close(dict(ours.named_parameters()), dict(theirs.named_parameters()), rtol=0, atol=0)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    assert all(p.requires_grad for p in ours.parameters())


# Drop-in for nn.RNNCell


@every_construction
def test_same_seed_gives_nn_rnncells_parameters(args, kwargs):
    assert_same_parameters(seeded(rnn_ext.RNNCell, *args, **kwargs), seeded(nn.RNNCell, *args, **kwargs))


def test_reset_parameters_draws_as_nn_rnncell():
    ours, theirs = rnn_ext.RNNCell(4, 5), nn.RNNCell(4, 5)
    for cell in (ours, theirs):
        torch.manual_seed(7)
        cell.reset_parameters()
    assert_same_parameters(ours, theirs)


@every_construction
def test_repr_and_attributes_are_nn_rnncells(args, kwargs):
    ours, theirs = rnn_ext.RNNCell(*args, **kwargs), nn.RNNCell(*args, **kwargs)
    assert isinstance(ours, nn.RNNCell)
    assert repr(ours) == repr(theirs)
    for name in ("input_size", "hidden_size", "bias", "nonlinearity", "training"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert (ours.bias_ih is None) == (theirs.bias_ih is None)


@every_construction
def test_state_dicts_load_both_ways(args, kwargs):
    for ours, theirs in ((rnn_ext.RNNCell, nn.RNNCell), (nn.RNNCell, rnn_ext.RNNCell)):
        source, target = ours(*args, **kwargs), theirs(*args, **kwargs)
        assert list(source.state_dict()) == list(target.state_dict())
        assert source.state_dict()._metadata == target.state_dict()._metadata
        assert target.load_state_dict(source.state_dict()) == ([], [])
        assert_same_parameters(target, source)


def through_torch_save(cell: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(cell, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_weights_only_load(cell: nn.Module) -> nn.Module:
    """Needs no more than nn.RNNCell: its class is the only one that must be declared safe."""
    file = io.BytesIO()
    torch.save(cell, file)
    file.seek(0)
    with torch.serialization.safe_globals([rnn_ext.RNNCell]):
        return torch.load(file, weights_only=True)


def through_saved_state_dict(cell: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(cell.state_dict(), file)
    file.seek(0)
    copied = type(cell)(cell.input_size, cell.hidden_size, nonlinearity=cell.nonlinearity)
    copied.load_state_dict(torch.load(file, weights_only=True))
    return copied


COPIES = {
    "pickle": lambda cell: pickle.loads(pickle.dumps(cell)),
    "deepcopy": copy.deepcopy,
    "torch_save": through_torch_save,
    "weights_only": through_weights_only_load,
    "saved_state_dict": through_saved_state_dict,
}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES.keys())
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_a_copy_is_an_independent_cell_with_the_same_output(nonlinearity, duplicate):
    cell = rnn_ext.RNNCell(4, 5, nonlinearity=nonlinearity)
    copied = duplicate(cell)
    x = torch.randn(3, 4)
    expected = cell(x)
    assert type(copied) is rnn_ext.RNNCell
    assert_same_parameters(copied, cell)
    assert torch.equal(copied(x), expected)
    with torch.no_grad():
        cell.weight_ih.zero_()
    assert torch.equal(copied(x), expected)


def test_the_sigmoid_cell_shows_its_nonlinearity():
    cell = rnn_ext.RNNCell(4, 5, nonlinearity="sigmoid")
    assert repr(cell) == "RNNCell(4, 5, nonlinearity=sigmoid)"


def test_meta_device_then_to_empty_gives_a_working_cell():
    cell = rnn_ext.RNNCell(4, 5, device="meta")
    output = cell(torch.empty(3, 4, device="meta"), torch.empty(3, 5, device="meta"))
    assert (output.device.type, output.shape) == ("meta", (3, 5))
    cell.to_empty(device="cpu")
    cell.load_state_dict(seeded(nn.RNNCell, 4, 5).state_dict())
    x = torch.randn(3, 4)
    torch.testing.assert_close(cell(x), seeded(nn.RNNCell, 4, 5)(x))


def test_device_and_dtype_arguments_and_contexts_place_the_parameters(device):
    cell = rnn_ext.RNNCell(4, 5, device=device, dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in cell.parameters()} == {(device, torch.float64)}
    assert cell(torch.randn(3, 4, device=device, dtype=torch.float64)).dtype == torch.float64
    with torch.device("meta"):
        assert rnn_ext.RNNCell(4, 5).weight_ih.is_meta
    assert {p.dtype for p in rnn_ext.RNNCell(4, 5).to(device).half().parameters()} == {torch.float16}


def test_a_subclass_may_extend_forward():
    class Doubled(rnn_ext.RNNCell):
        def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
            return 2 * super().forward(input, hx)

    cell = seeded(Doubled, 4, 5)
    x = torch.randn(3, 4)
    torch.testing.assert_close(cell(x), 2 * seeded(nn.RNNCell, 4, 5)(x))


def antisymmetric(weight: Tensor) -> Tensor:
    return weight.triu(1) - weight.triu(1).t()


class WithAProperty(rnn_ext.RNNCell):
    @property
    def weight_hh(self) -> Tensor:
        return antisymmetric(self._parameters["weight_hh"])


class WithAnAttributeOfTheClass(rnn_ext.RNNCell):
    weight_hh = torch.ones(5, 5)


class WithGetattr(rnn_ext.RNNCell):
    def __getattr__(self, name: str):
        value = super().__getattr__(name)
        return antisymmetric(value) if name == "weight_hh" else value


class WithGetattribute(rnn_ext.RNNCell):
    def __getattribute__(self, name: str):
        return antisymmetric(self._parameters[name]) if name == "weight_hh" else super().__getattribute__(name)


class Gathering(dict):
    """Parameters that are made whole when they are looked up, as DeepSpeed's sharded ones."""

    def __getitem__(self, name: str):
        return antisymmetric(super().__getitem__(name)) if name == "weight_hh" else super().__getitem__(name)


def with_a_container_of_its_own(cell: nn.RNNCell) -> None:
    cell._parameters = Gathering(cell._parameters)


def with_an_attribute_of_the_object(cell: nn.RNNCell) -> None:
    vars(cell)["weight_hh"] = torch.ones(5, 5)


def with_a_buffer(cell: nn.RNNCell) -> None:
    del cell.weight_hh
    cell.register_buffer("weight_hh", torch.ones(5, 5))


def derived(how: type | Callable[[nn.RNNCell], None]) -> rnn_ext.RNNCell:
    """A cell whose weight_hh is not the stored parameter. nn.Module refuses some of these names while it registers."""
    cell = rnn_ext.RNNCell(4, 5)
    if isinstance(how, type):
        cell.__class__ = how
    else:
        how(cell)
    return cell


def with_weights_shown(cell: nn.RNNCell, x: Tensor, h: Tensor) -> Tensor:
    return rnn_ext.rnn_cell(x, h, cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)


DERIVED = [
    WithAProperty,
    WithAnAttributeOfTheClass,
    WithGetattr,
    WithGetattribute,
    with_a_container_of_its_own,
    with_an_attribute_of_the_object,
    with_a_buffer,
]


@pytest.mark.parametrize("how", DERIVED, ids=lambda how: how.__name__)
def test_the_cell_computes_with_the_weights_that_it_shows(how):
    """Antisymmetric cells, Dale's law, masks: a subclass may derive a weight from the stored parameter."""
    cell = derived(how)
    x, h = torch.randn(3, 4), torch.randn(3, 5)
    assert torch.equal(cell(x, h), with_weights_shown(cell, x, h))


def test_a_property_put_on_the_class_counts_from_then_on(monkeypatch):
    cell = rnn_ext.RNNCell(4, 5)
    x, h = torch.randn(3, 4), torch.randn(3, 5)
    cell(x, h)
    monkeypatch.setattr(rnn_ext.RNNCell, "weight_hh", property(lambda _: torch.ones(5, 5)), raising=False)
    assert torch.equal(cell.weight_hh, torch.ones(5, 5))
    assert torch.equal(cell(x, h), with_weights_shown(cell, x, h))


def test_a_patched_look_up_of_nn_module_is_used(monkeypatch):
    """As torch.fx patches it while it traces."""
    original, seen = nn.Module.__getattr__, []
    monkeypatch.setattr(nn.Module, "__getattr__", lambda self, name: seen.append(name) or original(self, name))
    rnn_ext.RNNCell(4, 5)(torch.randn(3, 4))
    assert {"weight_ih", "weight_hh", "bias_ih", "bias_hh"} <= set(seen)


@pytest.mark.parametrize("how", [WithAProperty, WithAnAttributeOfTheClass, with_a_buffer], ids=lambda h: h.__name__)
def test_a_compiled_cell_computes_with_the_weights_that_it_shows(how):
    cell = derived(how)
    x, h = torch.randn(3, 4), torch.randn(3, 5)
    compiled = torch.compile(cell, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, h), with_weights_shown(cell, x, h))


def test_a_missing_parameter_is_nn_modules_error():
    cell = rnn_ext.RNNCell(4, 5)
    del cell.weight_hh
    with pytest.raises(AttributeError, match="'RNNCell' object has no attribute 'weight_hh'"):
        cell(torch.randn(3, 4))


def test_a_tensor_subclass_stays_what_it_is():
    class Named(torch.Tensor):
        pass

    x = torch.randn(3, 4)
    ours, theirs = (seeded(cls, 4, 5)(x.as_subclass(Named)) for cls in (rnn_ext.RNNCell, nn.RNNCell))
    assert type(ours) is type(theirs) is Named
    torch.testing.assert_close(ours, theirs)


@every_module
def test_hooks_fire_on_the_way_there_and_back(cls, shape, device):
    cell = cls(7, 5, device=device)
    parameters = {name.removesuffix("_l0"): p for name, p in cell.named_parameters()}
    seen = []
    cell.register_forward_pre_hook(lambda module, args: seen.append("pre"))
    cell.register_forward_hook(lambda module, args, output: seen.append("forward"))
    cell.register_full_backward_pre_hook(lambda module, grad_out: seen.append("backward_pre"))
    cell.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append("backward"))
    parameters["weight_hh"].register_hook(lambda grad: seen.append("weight_hh"))
    parameters["bias_ih"].register_post_accumulate_grad_hook(lambda p: seen.append("bias_ih"))
    first(cell(torch.randn(shape, device=device, requires_grad=True))).sum().backward()
    assert seen[:3] == ["pre", "forward", "backward_pre"]
    assert sorted(seen[3:]) == ["backward", "bias_ih", "weight_hh"]


def test_hooks_see_and_change_what_nn_rnncells_do(device):
    """Arguments by position and by name, the output, and the gradients of inputs and output."""
    x, hx = torch.randn(3, 4, device=device), torch.randn(3, 5, device=device)
    results = []
    for cls in (rnn_ext.RNNCell, nn.RNNCell):
        cell = seeded(cls, 4, 5, device=device)
        seen = []
        cell.register_forward_pre_hook(lambda m, args, kwargs: (args, kwargs | {"hx": hx}), with_kwargs=True)
        cell.register_forward_hook(lambda m, args, output: 2 * output)
        cell.register_full_backward_hook(lambda m, grad_in, grad_out, seen=seen: seen.extend([*grad_in, *grad_out]))
        leaf = x.clone().requires_grad_()
        output = cell(leaf)
        output.pow(2).sum().backward()
        results.append([output, leaf.grad, seen])
    torch.testing.assert_close(*results)


PARAMETRIZATIONS = {
    "weight_norm": lambda cell: parametrizations.weight_norm(cell, "weight_hh"),
    "spectral_norm": lambda cell: parametrizations.spectral_norm(cell, "weight_ih"),
    "orthogonal": lambda cell: parametrizations.orthogonal(cell, "weight_hh"),
    "prune": lambda cell: prune.l1_unstructured(cell, "weight_ih", amount=0.5),
}


@pytest.mark.parametrize("reparametrize", PARAMETRIZATIONS.values(), ids=PARAMETRIZATIONS.keys())
def test_parametrized_weights_train_as_in_nn_rnncell(reparametrize):
    """The weights are then recomputed tensors, not Parameters of the module."""
    x, results = torch.randn(3, 4), []
    for cls in (rnn_ext.RNNCell, nn.RNNCell):
        cell = reparametrize(seeded(cls, 4, 5)).eval()
        output = cell(x, torch.ones(3, 5))
        output.sum().backward()
        results.append([output, {name: p.grad for name, p in cell.named_parameters()}])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("call", [functional_call, stateless.functional_call], ids=["func", "stateless"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_functional_call_uses_the_given_parameters(call):
    cell = rnn_ext.RNNCell(4, 5)
    theirs = nn.RNNCell(4, 5)
    x = torch.randn(3, 4)
    torch.testing.assert_close(call(cell, theirs.state_dict(), (x,)), theirs(x))


@every_module
def test_a_module_loads_with_weights_only(cls, shape):
    """Needs no more than torch.nn's: its class is the only one that must be declared safe."""
    module, x, file = cls(7, 5), torch.randn(shape), io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    safe = [cls, getattr, torch.nn.Parameter]
    with torch.serialization.safe_globals(safe):
        loaded = torch.load(file, weights_only=True)
    assert torch.equal(first(loaded(x)), first(module(x)))


def double_and_run(module: nn.Module, x: Tensor, output: Tensor) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(2)
        output.copy_(first(module(x)))


@every_module
def test_a_spawned_process_runs_the_module_and_shares_its_parameters(cls, shape):
    """It gets the module pickled, and the parameters as they are."""
    module, x = cls(7, 5).share_memory(), torch.randn(shape)
    assert all(p.is_shared() for p in module.parameters())
    output = first(module(x)).detach().zero_().share_memory_()
    doubled = {name: 2 * p.detach() for name, p in module.named_parameters()}
    process = torch.multiprocessing.get_context("spawn").Process(target=double_and_run, args=(module, x, output))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    torch.testing.assert_close(dict(module.named_parameters()), doubled)
    torch.testing.assert_close(output, first(module(x)))


@every_module
def test_swapped_tensors_are_used_by_the_next_call(cls, shape, device):
    """torch.utils.swap_tensors exchanges what two Parameter objects are, under everyone who holds them."""
    cell, theirs = cls(7, 5, device=device), cls.__base__(7, 5, device=device)
    for module in (cell, theirs):
        if hasattr(module, "_flat_weight_refs"):
            module._flat_weight_refs = [None] * 4  # weak ones, which nn.RNN keeps and swap_tensors refuses
    x = torch.randn(shape, device=device)
    expected = first(theirs(x)).detach()
    held = list(cell.parameters())
    for ours, other in zip(held, list(theirs.parameters()), strict=True):
        torch.utils.swap_tensors(ours, other)
    output = first(cell(x))
    torch.testing.assert_close(output, expected)
    output.sum().backward()
    assert all(p.grad is not None and p is q for p, q in zip(held, cell.parameters(), strict=True))


def test_training_follows_nn_rnncell_step_for_step(device):
    """Twenty steps of Adam over a short sequence; float64, where the two differ by rounding alone."""
    steps = torch.randn(6, 8, 4, dtype=torch.float64).to(device)
    losses = []
    for cls in (rnn_ext.RNNCell, nn.RNNCell):
        cell = seeded(cls, 4, 5, dtype=torch.float64).to(device)
        optimizer = torch.optim.Adam(cell.parameters(), lr=0.01)
        losses.append([])
        for _ in range(20):
            hx = None
            for step in steps:
                hx = cell(step, hx)
            loss = (hx - 0.5).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert losses[0][-1] < losses[0][0]


# LazyRNNCell


def assert_became(cell: nn.Module, input_size: int, hidden_size: int) -> None:
    assert type(cell) is rnn_ext.RNNCell
    assert repr(cell) == f"RNNCell({input_size}, {hidden_size})"
    assert not any(isinstance(p, UninitializedParameter) for p in cell.parameters())


@pytest.mark.parametrize("shape", [(3, 4), (4,), (0, 4)], ids=str)
def test_a_lazy_cell_becomes_an_rnncell_on_its_first_input(shape):
    cell = rnn_ext.LazyRNNCell(5)
    assert isinstance(cell, LazyModuleMixin)
    assert isinstance(cell, nn.RNNCell)
    assert cell.has_uninitialized_params()
    x = torch.randn(shape)
    output = cell(x)
    assert_became(cell, 4, 5)
    assert output.shape == (*shape[:-1], 5)
    assert torch.equal(cell(x), output)


@pytest.mark.parametrize("hx", [True, False], ids=["hx", "no_hx"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_a_lazy_cell_draws_what_an_rnncell_made_at_its_first_call_would(bias, hx):
    state = torch.get_rng_state()
    lazy = rnn_ext.LazyRNNCell(5, bias, "relu", dtype=torch.float64)
    assert torch.equal(torch.get_rng_state(), state), "construction must not draw random numbers"
    x, h = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    torch.manual_seed(3)
    output = lazy(x, h) if hx else lazy(x)
    theirs = seeded(nn.RNNCell, 4, 5, bias, "relu", dtype=torch.float64)
    assert_same_parameters(lazy, theirs)
    torch.testing.assert_close(output, theirs(x, h) if hx else theirs(x))


def test_a_lazy_cell_keeps_its_parameter_objects():
    """An optimizer made before the first call must see the parameters that the call fills in."""
    cell = rnn_ext.LazyRNNCell(5)
    before = dict(cell.named_parameters())
    assert list(before) == ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]
    cell(torch.randn(3, 4))
    assert all(p is before[name] for name, p in cell.named_parameters())


def test_a_lazy_cell_loads_an_rnncells_state_dict_before_its_first_input():
    source = seeded(nn.RNNCell, 4, 5)
    cell = rnn_ext.LazyRNNCell(5)
    assert cell.load_state_dict(source.state_dict()) == ([], [])
    assert not cell.has_uninitialized_params()
    x = torch.randn(3, 4)
    torch.testing.assert_close(cell(x), source(x))
    assert_same_parameters(cell, source)
    assert_became(cell, 4, 5)


def test_an_uninitialized_state_dict_loads_into_a_lazy_cell():
    source, target = rnn_ext.LazyRNNCell(5), rnn_ext.LazyRNNCell(5)
    target.load_state_dict(source.state_dict())
    assert target.has_uninitialized_params()
    assert target(torch.randn(3, 4)).shape == (3, 5)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, COPIES["pickle"]], ids=["deepcopy", "pickle"])
def test_a_lazy_cell_is_copied_uninitialized(duplicate):
    copied = duplicate(rnn_ext.LazyRNNCell(5))
    assert copied.has_uninitialized_params()
    copied(torch.randn(3, 4))
    assert_became(copied, 4, 5)


def test_a_lazy_cell_follows_to_and_the_default_device_before_its_first_input():
    cell = rnn_ext.LazyRNNCell(5).to(torch.float64)
    assert cell(torch.randn(3, 4, dtype=torch.float64)).dtype == torch.float64
    cell = rnn_ext.LazyRNNCell(5, device="meta")
    assert cell(torch.empty(3, 4, device="meta")).is_meta
    assert all(p.is_meta for p in cell.parameters())


def test_a_dry_run_initializes_every_lazy_cell_of_a_model():
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells = nn.ModuleList([rnn_ext.LazyRNNCell(6), rnn_ext.LazyRNNCell(5, nonlinearity="relu")])

        def forward(self, x: Tensor) -> Tensor:
            for cell in self.cells:
                x = cell(x)
            return x

    model = Stack()
    with torch.no_grad():
        model(torch.zeros(1, 4))
    assert_became(model.cells[0], 4, 6)
    assert (model.cells[1].input_size, type(model.cells[1])) == (6, rnn_ext.RNNCell)
    model(torch.randn(3, 4)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("shape", [(), (2, 3, 4)], ids=["0d", "3d"])
def test_a_lazy_cell_refuses_a_first_input_of_wrong_dimension_and_can_be_called_again(shape):
    cell = rnn_ext.LazyRNNCell(5)
    with pytest.raises(ValueError, match=f"Expected input to be 1D or 2D, got {len(shape)}D"):
        cell(torch.zeros(shape))
    cell(torch.zeros(3, 7))
    assert_became(cell, 7, 5)


def test_a_lazy_cell_checks_its_later_inputs():
    cell = rnn_ext.LazyRNNCell(5)
    cell(torch.zeros(3, 4))
    with pytest.raises(RuntimeError, match="got 6 expected 4"):
        cell(torch.zeros(3, 6))
