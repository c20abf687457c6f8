"""convert_rnn_cells: the class of each cell changes, there and back, and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

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
        self.ours = rnn_ext.RNNCell(5, 5, nonlinearity="sigmoid")

    def forward(self, x: Tensor) -> Tensor:
        h = self.shared(x, self.first(x))
        h = self.nested[1]["inner"](self.nested[0](h), h)
        return self.ours(self.custom(h), h)


def test_conversion_reaches_every_cell_and_only_cells():
    model = rnn_ext.convert_rnn_cells(Model())
    for cell in (model.first, model.nested[1]["inner"], model.shared, model.ours):
        assert type(cell) is rnn_ext.RNNCell
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
    torch.testing.assert_close(run(rnn_ext.convert_rnn_cells(model)), before)
    assert list(model.state_dict()) == names


def test_conversion_shares_the_parameters():
    """Optimizers made before the conversion must go on working."""
    model = Model()
    before = dict(model.named_parameters())
    assert rnn_ext.convert_rnn_cells(model) is model
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
    rnn_ext.convert_rnn_cells(model)
    model.first(torch.zeros(3, 4))
    assert calls == ["pre", "forward"]
    assert not any(module.training for module in model.modules())
    assert not model.first.bias_ih.requires_grad
    assert model.first.label == "kept"


def test_conversion_of_a_bare_cell_gives_a_fused_cell():
    cell = nn.RNNCell(4, 5)
    converted = rnn_ext.convert_rnn_cells(cell)
    assert type(converted) is rnn_ext.RNNCell
    assert converted.weight_ih is cell.weight_ih


def test_conversion_twice_is_conversion_once():
    model = rnn_ext.convert_rnn_cells(Model())
    modules = list(model.modules())
    assert all(a is b for a, b in zip(modules, rnn_ext.convert_rnn_cells(model).modules(), strict=True))


def test_conversion_leaves_a_parametrized_cell_working():
    cell = parametrizations.weight_norm(nn.RNNCell(4, 5), "weight_hh")
    x = torch.randn(3, 4)
    expected = cell(x)
    converted = rnn_ext.convert_rnn_cells(nn.Sequential(cell))
    assert parametrize.is_parametrized(converted[0], "weight_hh")
    torch.testing.assert_close(converted(x), expected)


def test_conversion_of_a_model_without_cells_returns_it_unchanged():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
    assert rnn_ext.convert_rnn_cells(model) is model
    assert [type(m) for m in model] == [nn.Linear, nn.Tanh]
