"""PyTorch's own module tests, on its own samples of nn.RNNCell and nn.RNN, for our classes.

torch.testing._internal.common_modules describes the samples and the wrong inputs of every module; the checks that
PyTorch runs over them stand in its repository (test/test_modules.py) and are written anew here. Its check of memory
formats has no counterpart: channels_last needs inputs of four or five dimensions.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call

import rnn_ext

DTYPES = (torch.float32, torch.float64)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_mode = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


OURS = {nn.RNNCell: rnn_ext.RNNCell, nn.RNN: rnn_ext.RNN}


@pytest.fixture(scope="module", params=OURS, ids=lambda cls: cls.__name__)
def info(request):
    """The ModuleInfo of a class, and the global state as it was before PyTorch's test suite was imported."""
    flag = "__allow_nonbracketed_mutation_flag"
    allowed = getattr(torch.backends, flag)
    calls = {cls: cls.__call__ for cls in (torch._C.ScriptFunction, torch._C.ScriptMethod)}
    name = "torch.testing._internal.common_modules"
    common_modules = pytest.importorskip(name, exc_type=ImportError)
    setattr(torch.backends, flag, allowed)
    for cls, call in calls.items():
        cls.__call__ = call
    infos = [i for i in common_modules.module_db if i.module_cls is request.param]
    if not infos:
        pytest.skip(f"{name} of torch {torch.__version__} doesn't describe {request.param}")
    return infos[0]


class Sample:
    """One of PyTorch's samples: a module of our class and the arguments of a call."""

    def __init__(self, cls, sample, device: str, dtype: torch.dtype, training: bool = True) -> None:
        made, called = sample.constructor_input, sample.forward_input
        self.make = lambda cls=OURS[cls], **changes: cls(
            *made.args, **(made.kwargs | {"device": device, "dtype": dtype} | changes)
        ).train(training)
        self.theirs = cls
        self.cell = self.make()
        self.args, self.kwargs = called.args, called.kwargs
        self.reference_fn = sample.reference_fn

    def __call__(self, cell: nn.Module | None = None) -> Tensor | tuple[Tensor, Tensor]:
        return (cell or self.cell)(*self.args, **self.kwargs)


def total(output: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    return output.sum() if isinstance(output, Tensor) else sum(t.sum() for t in output)


def samples(info, device: str, dtype: torch.dtype, *, requires_grad: bool = False, training: bool = True):
    torch.manual_seed(0)
    described = info.module_inputs_func(
        info, device=device, dtype=dtype, requires_grad=requires_grad, training=training
    )
    assert described
    return [Sample(info.module_cls, sample, device, dtype, training) for sample in described]


@every_mode
@every_dtype
def test_forward_equals_the_samples_reference_and_torch_nn(info, dtype, training, device):
    for sample in samples(info, device, dtype, training=training):
        output = sample()
        if sample.reference_fn is not None:
            torch.testing.assert_close(output, sample.reference_fn(sample.cell, *sample.args, **sample.kwargs))
        theirs = sample.make(sample.theirs)
        theirs.load_state_dict(sample.cell.state_dict())
        torch.testing.assert_close(output, sample(theirs))


def test_the_factory_arguments_reach_every_parameter(info, device):
    for sample in samples(info, device, torch.float32):
        for dtype in DTYPES:
            parameters = list(sample.make(dtype=dtype).parameters())
            assert {(p.device.type, p.dtype) for p in parameters} == {(device, dtype)}
        with torch.device("meta"):
            assert all(p.is_meta for p in sample.make(device=None).parameters())


def test_repr_and_str_work(info):
    for sample in samples(info, "cpu", torch.float32):
        assert repr(sample.cell) == str(sample.cell) == str(rnn_ext.convert(sample.cell, inverse=True))


@every_mode
def test_a_pickled_cell_gives_the_same_output(info, training, device):
    for sample in samples(info, device, torch.float32, training=training):
        for copied in (pickle.loads(pickle.dumps(sample.cell)), copy.deepcopy(sample.cell)):
            assert copied.training == training
            torch.testing.assert_close(sample(copied), sample(), rtol=0, atol=0)


def test_train_and_eval_modes_do_not_differ(info, device):
    for sample in samples(info, device, torch.float64):
        torch.testing.assert_close(sample(), sample(copy.deepcopy(sample.cell).eval()), rtol=0, atol=0)


@every_dtype
def test_inputs_and_parameters_may_be_non_contiguous(info, dtype, device):
    """Outputs and gradients, of inputs and parameters, are those of contiguous ones."""

    def spread(t: Tensor) -> Tensor:
        wide = t.detach().new_zeros(*t.shape, 2)
        wide[..., 0] = t.detach()
        return wide[..., 0]

    for sample in samples(info, device, dtype, requires_grad=True):
        results = []
        for layout in (torch.clone, spread):
            parameters = {k: layout(p.detach()).requires_grad_() for k, p in sample.cell.named_parameters()}
            args = [layout(t.detach()).requires_grad_() for t in sample.args]
            output = functional_call(sample.cell, parameters, tuple(args), sample.kwargs)
            gradients = torch.autograd.grad(total(output), [*args, *parameters.values()])
            results.append([output, gradients])
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck], ids=["gradcheck", "gradgradcheck"])
def test_derivatives_match_finite_differences(info, check, device):
    all_samples = samples(info, device, torch.float64, requires_grad=True)
    for sample in all_samples[:: max(1, len(all_samples) // 8)]:
        names = [name for name, _ in sample.cell.named_parameters()]

        def f(*tensors, sample=sample, names=names):
            args, parameters = tensors[: len(sample.args)], tensors[len(sample.args) :]
            return functional_call(sample.cell, dict(zip(names, parameters, strict=True)), args)

        assert check(f, (*sample.args, *sample.cell.parameters()))


@pytest.mark.parametrize("swap", [False, True], ids=["set_data", "swap_tensors"])
def test_to_and_to_empty_move_every_parameter_and_keep_the_objects(info, swap, device):
    try:
        for sample in samples(info, device, torch.float32):
            torch.__future__.set_swap_module_params_on_conversion(swap)
            before = list(sample.cell.parameters())
            total(sample()).backward()
            sample.cell.to(torch.float64)
            assert all(a is b for a, b in zip(before, sample.cell.parameters(), strict=True))
            assert all(p.dtype == p.grad.dtype == torch.float64 for p in before)
            empty = sample.make(device="meta").to_empty(device=device)
            assert {p.device.type for p in empty.parameters()} == {device}
            if info.module_cls is nn.RNN:  # whose weak references are in the way of this one
                torch.__future__.set_swap_module_params_on_conversion(False)
            empty.load_state_dict(sample.cell.state_dict())
            torch.testing.assert_close(sample(empty), sample(sample.cell.to(torch.float32)), check_dtype=False)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@every_dtype
def test_wrong_inputs_raise_the_described_errors(info, dtype, device):
    described = info.module_error_inputs_func(info, device=device, dtype=dtype, requires_grad=False, training=False)
    assert described
    for wrong in described:
        made, called = wrong.module_error_input.constructor_input, wrong.module_error_input.forward_input
        with pytest.raises(wrong.error_type, match=wrong.error_regex):
            module = OURS[info.module_cls](*made.args, **({"device": device, "dtype": dtype} | made.kwargs))
            assert called is not None
            module(*called.args, **called.kwargs)


@pytest.mark.cuda
def test_cpu_and_cuda_agree_on_outputs_and_gradients(info):
    for sample in samples(info, "cpu", torch.float32, requires_grad=True):
        results = []
        for device in ("cpu", "cuda"):
            cell = copy.deepcopy(sample.cell).to(device)
            args = [t.detach().to(device).requires_grad_() for t in sample.args]
            output = cell(*args)
            outputs = (output,) if isinstance(output, Tensor) else output
            gradients = torch.autograd.grad(total(output), [*args, *cell.parameters()])
            results.append([t.cpu() for t in (*outputs, *gradients)])
        torch.testing.assert_close(*results)


@pytest.mark.cuda
def test_a_cell_moves_between_devices_and_back(info):
    for sample in samples(info, "cpu", torch.float32):
        expected = sample()
        for device in ("cuda", "cpu"):
            sample.cell.to(device)
            assert {p.device.type for p in sample.cell.parameters()} == {device}
            sample.args = [t.to(device) for t in sample.args]
            torch.testing.assert_close(sample(), expected, check_device=False)
