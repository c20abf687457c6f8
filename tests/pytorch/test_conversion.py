"""convert: the class of each cell and each RNN changes, there and back, and nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from entries import every_module, first
from references import seeded
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import rnn_ext


class Model(nn.Module):
    """Cells at every depth, one of them twice, and what must be left alone."""

    class Custom(nn.RNNCell):
        def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
            return super().forward(input, hx) + 1

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.RNNCell(4, 5)
        self.nested = nn.Sequential(nn.Linear(5, 5), nn.ModuleDict({"inner": nn.RNNCell(5, 5, False, "relu")}))
        self.shared = self.first
        self.custom = self.Custom(5, 5)
        self.lstm = nn.LSTMCell(5, 5)
        self.rnn = nn.RNN(5, 5, 2, "relu", bidirectional=True)
        self.ours = rnn_ext.RNNCell(5, 5, nonlinearity="sigmoid")

    def forward(self, x: Tensor) -> Tensor:
        h = self.shared(x, self.first(x))
        h = self.nested[1]["inner"](self.nested[0](h), h)
        h = self.rnn(h[None])[0][0, :, 5:]
        return self.ours(self.custom(h), h)


def test_conversion_reaches_every_cell_and_rnn_and_nothing_else():
    model = rnn_ext.convert(Model())
    for cell in (model.first, model.nested[1]["inner"], model.shared, model.ours):
        assert type(cell) is rnn_ext.RNNCell
    assert type(model.rnn) is rnn_ext.RNN
    assert type(model.custom) is Model.Custom
    assert type(model.lstm) is nn.LSTMCell
    assert model.shared is model.first


def test_conversion_changes_neither_outputs_nor_gradients_nor_the_state_dict():
    x = torch.randn(3, 4)

    def run(model: Model):
        output = model(x)
        used = {k: p for k, p in model.named_parameters() if not k.startswith("lstm")}
        gradients = torch.autograd.grad(output.sum(), list(used.values()))
        return output, dict(zip(used, gradients, strict=True))

    model = Model()
    before, names = run(model), list(model.state_dict())
    torch.testing.assert_close(run(rnn_ext.convert(model)), before)
    assert list(model.state_dict()) == names


def test_conversion_shares_the_parameters():
    """Optimizers made before the conversion must go on working."""
    model = Model()
    before = dict(model.named_parameters())
    assert rnn_ext.convert(model) is model
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)


def test_conversion_keeps_hooks_flags_and_attributes():
    model = Model().eval()
    calls = []
    model.first.register_forward_hook(lambda *_: calls.append("forward"))
    model.first.register_forward_pre_hook(lambda *_: calls.append("pre"))
    model.first.bias_ih.requires_grad_(False)
    model.first.label = "kept"
    rnn_ext.convert(model)
    model.first(torch.zeros(3, 4))
    assert calls == ["pre", "forward"]
    assert not any(module.training for module in model.modules())
    assert not model.first.bias_ih.requires_grad
    assert model.first.label == "kept"


def test_conversion_of_a_bare_cell_gives_a_fused_cell():
    cell = nn.RNNCell(4, 5)
    converted = rnn_ext.convert(cell)
    assert type(converted) is rnn_ext.RNNCell
    assert converted.weight_ih is cell.weight_ih


def test_conversion_twice_is_conversion_once():
    model = rnn_ext.convert(Model())
    modules = list(model.modules())
    assert all(a is b for a, b in zip(modules, rnn_ext.convert(model).modules(), strict=True))


def parametrized(cls=nn.RNNCell, suffix: str = "") -> nn.Module:
    cell = parametrizations.weight_norm(seeded(cls, 4, 5), f"weight_hh{suffix}")
    return parametrizations.spectral_norm(cell, f"weight_ih{suffix}").eval()


@pytest.mark.parametrize("batch", [False, True], ids=["unbatched", "batched"])
def test_conversion_keeps_the_parametrizations_of_an_rnn(batch):
    rnn = parametrized(nn.RNN, "_l0")
    x = torch.randn(3, 2, 4) if batch else torch.randn(3, 4)
    expected = rnn(x)
    assert rnn_ext.convert(rnn) is rnn and isinstance(rnn, rnn_ext.RNN)
    torch.testing.assert_close(rnn(x), expected)
    assert parametrize.is_parametrized(rnn_ext.convert(rnn, inverse=True), "weight_hh_l0")
    assert type(rnn).__mro__[1] is nn.RNN
    torch.testing.assert_close(rnn(x), expected)


def test_conversion_keeps_parametrizations():
    """torch.nn.utils.parametrize gives such a cell a class of its own, below nn.RNNCell."""
    model = nn.Sequential(parametrized())
    x = torch.randn(3, 4)
    expected, state = model(x), model.state_dict()
    rnn_ext.convert(model)
    assert isinstance(model[0], rnn_ext.RNNCell)
    assert parametrize.is_parametrized(model[0], "weight_hh")
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model.state_dict(), state)
    assert type(copy.deepcopy(model)[0]) is type(model[0])
    for name in ("weight_hh", "weight_ih"):
        parametrize.remove_parametrizations(model[0], name)
    assert type(model[0]) is rnn_ext.RNNCell
    torch.testing.assert_close(model(x), expected)


def test_conversion_of_a_parametrized_cell_leaves_its_copies_alone():
    """deepcopy shares the class that was made for the parametrized cell."""
    cell = parametrized()
    copied = copy.deepcopy(cell)
    rnn_ext.convert(cell)
    assert isinstance(cell, rnn_ext.RNNCell)
    assert not isinstance(copied, rnn_ext.RNNCell)


def test_pruned_cells_are_converted_with_their_masks_and_hooks():
    cell = prune.l1_unstructured(nn.RNNCell(4, 5), "weight_hh", amount=0.5)
    x, hx = torch.randn(3, 4), torch.randn(3, 5)
    expected = cell(x, hx)
    rnn_ext.convert(cell)
    assert (type(cell), prune.is_pruned(cell)) == (rnn_ext.RNNCell, True)
    torch.testing.assert_close(cell(x, hx), expected)


def test_an_optimizer_made_before_goes_on_training_as_without_the_conversion():
    x = torch.randn(3, 4)
    results = []
    for convert in (lambda model: model, rnn_ext.convert):
        model = seeded(Model)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        for step in range(4):
            if step == 2:
                convert(model)
            optimizer.zero_grad()
            model(x).sum().backward()
            optimizer.step()
        results.append(dict(model.named_parameters()))
    torch.testing.assert_close(*results)


# And back


def test_the_inverse_undoes_the_conversion():
    model = Model()
    del model.ours  # which is no nn.RNNCell to begin with
    model.parametrized = parametrized()
    kinds = {name: type(module) for name, module in model.named_modules()}
    parameters = dict(model.named_parameters())
    calls = []
    model.first.register_forward_hook(lambda *_: calls.append("forward"))
    assert rnn_ext.convert(rnn_ext.convert(model), inverse=True) is model
    kinds["parametrized"] = type(model.parametrized)
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert kinds["parametrized"].__mro__[1] is nn.RNNCell
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert model.shared is model.first
    model.first(torch.randn(3, 4))
    assert calls == ["forward"]


@pytest.mark.parametrize("cls", [rnn_ext.RNNCell, rnn_ext.RNN])
def test_the_inverse_leaves_subclasses_and_the_sigmoid_alone(cls):
    class Custom(cls):
        pass

    assert type(rnn_ext.convert(Custom(4, 5), inverse=True)) is Custom
    assert type(rnn_ext.convert(cls(4, 5, nonlinearity="sigmoid"), inverse=True)) is cls


def test_the_inverse_of_an_rnn_is_nn_rnn():
    theirs, ours = seeded(nn.RNN, 4, 5, 2), rnn_ext.convert(seeded(rnn_ext.RNN, 4, 5, 2), inverse=True)
    assert type(ours) is nn.RNN and repr(ours) == repr(theirs)
    x = torch.randn(3, 2, 4)
    assert all(map(torch.equal, ours(x), theirs(x)))


@pytest.mark.filterwarnings("ignore:.*deprecated")
@every_module
def test_dynamic_quantization_works_after_the_inverse(cls, shape):
    """It looks modules up by their exact type. Of nn.RNN torch.ao has no quantized form, and leaves it as it is."""
    quantization = pytest.importorskip("torch.ao.quantization", reason="torch.ao has moved to torchao")
    if not torch.backends.quantized.supported_engines[-1:]:
        pytest.skip("this build of torch has no engine for quantized operators")
    base = cls.__base__
    theirs, ours = nn.Sequential(seeded(base, 7, 5)), nn.Sequential(seeded(cls, 7, 5))
    x = torch.randn(shape)
    before = quantization.quantize_dynamic(ours, {base})
    assert type(before[0]) is cls
    theirs, ours = (
        quantization.quantize_dynamic(model, {base}) for model in (theirs, rnn_ext.convert(ours, inverse=True))
    )
    assert type(ours[0]) is type(theirs[0])
    assert (type(ours[0]) is base) == (base is nn.RNN)
    assert torch.equal(first(ours(x)), first(theirs(x)))


def test_conversion_of_a_model_without_cells_returns_it_unchanged():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
    assert rnn_ext.convert(model) is model
    assert [type(m) for m in model] == [nn.Linear, nn.Tanh]
