"""Bad input fails as in nn.RNNCell, and what nn.RNNCell takes is taken."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import rnn_ext

# Every case is a function of a cell class, run on both; sizes are B = 3, I = 4, H = 5 unless the case says so.
Case = Callable[[type[nn.RNNCell]], object]


def zeros(*shape: int, **kwargs) -> Tensor:
    return torch.zeros(shape, **kwargs)


def call(*args, edit: dict[str, Tensor | None] | None = None, nonlinearity: str = "tanh", **kwargs) -> Case:
    """Constructs a 4 -> 5 cell, replaces the parameters in `edit`, calls it on `args`."""

    def case(cls: type[nn.RNNCell]) -> Tensor:
        cell = cls(4, 5, nonlinearity=nonlinearity, **kwargs)
        for name, value in (edit or {}).items():
            setattr(cell, name, None if value is None else nn.Parameter(value))
        return cell(*args)

    return case


def construct(*args, **kwargs) -> Case:
    return lambda cls: cls(*args, **kwargs)


def outcome(case: Case, cls: type[nn.RNNCell]) -> Exception | None:
    try:
        case(cls)
    except Exception as error:
        return error
    return None


def inference_tensor() -> Tensor:
    with torch.inference_mode():
        return zeros(3, 4)


X, HX = zeros(3, 4), zeros(3, 5)

# Errors of shape: nn.RNNCell's words, which name the sizes.
SHAPES = {
    "input_0d": call(zeros()),
    "input_3d": call(zeros(2, 3, 4)),
    "hx_0d": call(X, zeros()),
    "hx_3d": call(X, zeros(1, 3, 5)),
    "input_and_hx_3d": call(zeros(1, 3, 4), zeros(1, 3, 5)),
    "input_1d_hx_2d": call(zeros(4), zeros(1, 5)),
    "input_2d_hx_1d": call(X, zeros(5)),
    "input_2d_of_one_row_hx_1d": call(zeros(1, 4), zeros(5)),
    "input_size": call(zeros(3, 6)),
    "input_size_too_small": call(zeros(3, 3)),
    "input_size_unbatched": call(zeros(6)),
    "input_size_with_empty_batch": call(zeros(0, 6)),
    "input_transposed": call(zeros(4, 3)),
    "hidden_size": call(X, zeros(3, 6)),
    "hidden_size_unbatched": call(zeros(4), zeros(6)),
    "hidden_size_zero": call(X, zeros(3, 0)),
    "batch": call(X, zeros(2, 5)),
    "hx_of_one_row_is_not_broadcast": call(X, zeros(1, 5)),
    "input_of_one_row_is_not_broadcast": call(zeros(1, 4), HX),
    "empty_batch_and_hx_of_one_row": call(zeros(0, 4), zeros(1, 5)),
    "batch_before_hidden_size": call(X, zeros(2, 6)),
    "input_size_before_batch": call(zeros(3, 6), zeros(2, 5)),
    "weight_ih_rows": call(X, HX, edit={"weight_ih": zeros(6, 4)}),
    "weight_ih_columns": call(X, HX, edit={"weight_ih": zeros(5, 3)}),
    "weight_ih_1d": call(X, HX, edit={"weight_ih": zeros(4)}),
    "weight_ih_3d": call(X, HX, edit={"weight_ih": zeros(1, 5, 4)}),
    "weight_hh_rows": call(X, HX, edit={"weight_hh": zeros(4, 5)}),
    "weight_hh_columns": call(X, HX, edit={"weight_hh": zeros(5, 6)}),
    "weight_hh_columns_without_hx": call(X, edit={"weight_hh": zeros(5, 6)}),
    "weight_hh_rows_without_hx": call(X, edit={"weight_hh": zeros(6, 5)}),
    "shape_before_dtype_of_input": call(zeros(3, 6, dtype=torch.int64)),
    "shape_before_dtype_of_hx": call(X, zeros(3, 6, dtype=torch.float64)),
    "shape_before_device_of_input": call(zeros(3, 6, device="meta")),
    "shape_before_device_of_parameters": call(zeros(3, 6), device="meta"),
    "shape_before_dtype_of_weight": call(zeros(3, 6), edit={"weight_hh": zeros(5, 5, dtype=torch.float64)}),
    "dimensions_before_unknown_nonlinearity": call(zeros(1, 3, 4), nonlinearity="softsign"),
    "unknown_nonlinearity": call(X, nonlinearity="softsign"),
    "unknown_nonlinearity_before_size": call(zeros(3, 6), nonlinearity="softsign"),
}

# The rest: nn.RNNCell's type; where PyTorch's words name sizes or dtypes, ours name those listed here.
OTHERS: dict[str, tuple[Case, list[str]]] = {
    "input_float64": (call(X.double()), ["Double", "Float"]),
    "input_float16": (call(X.half()), ["Half", "Float"]),
    "input_bfloat16_hx_float32": (call(X.bfloat16(), HX), ["Float"]),
    "input_int": (call(X.long()), ["Long", "Float"]),
    "input_bool": (call(X.bool()), ["Bool", "Float"]),
    "input_complex": (call(X.cfloat()), ["ComplexFloat", "Float"]),
    "input_complex_relu": (call(X.cfloat(), nonlinearity="relu"), []),
    "input_float8": (call(X.to(torch.float8_e4m3fn)), ["Float8_e4m3fn", "Float"]),
    "cell_float8": (
        lambda cls: cls(4, 5).to(torch.float8_e4m3fn)(X.to(torch.float8_e4m3fn)),
        [],
    ),
    "hx_float64": (call(X, HX.double()), ["Double", "Float"]),
    "hx_int": (call(X, HX.long()), ["Long", "Float"]),
    "weight_hh_float64": (call(X, HX, edit={"weight_hh": zeros(5, 5).double()}), ["Double", "Float"]),
    "weight_ih_float64": (call(X, HX, edit={"weight_ih": zeros(5, 4).double()}), ["Double", "Float"]),
    "bias_ih_float64": (call(X, HX, edit={"bias_ih": zeros(5).double()}), ["Double", "Float"]),
    "bias_hh_float64": (call(X, edit={"bias_hh": zeros(5).double()}), ["Double", "Float"]),
    "input_meta": (call(X.to("meta")), []),
    "hx_meta": (call(X, HX.to("meta")), []),
    "cell_meta": (call(X, device="meta"), []),
    "cell_meta_hx_cpu": (call(X.to("meta"), HX, device="meta"), []),
    "bias_ih_too_long": (call(X, edit={"bias_ih": zeros(6)}), ["5", "6"]),
    "bias_ih_too_short": (call(X, edit={"bias_ih": zeros(4)}), ["5", "4"]),
    "bias_hh_too_short": (call(X, edit={"bias_hh": zeros(4)}), ["5", "4"]),
    "bias_hh_empty": (call(X, edit={"bias_hh": zeros(0)}), ["5", "0"]),
    "bias_ih_3d": (call(X, edit={"bias_ih": zeros(1, 3, 5)}), ["[1, 3, 5]", "[3, 5]"]),
    "bias_ih_of_another_batch": (call(X, edit={"bias_ih": zeros(2, 5)}), ["2", "3"]),
    "bias_ih_of_a_batch_unbatched": (call(zeros(4), edit={"bias_ih": zeros(3, 5)}), ["1", "3"]),
    "weight_hh_1d": (call(X, HX, edit={"weight_hh": zeros(5)}), []),
    "weight_ih_none": (call(X, edit={"weight_ih": None}), ["None"]),
    "weight_hh_none": (call(X, edit={"weight_hh": None}), ["None"]),
    "input_none": (call(None), ["None"]),
    "input_list": (call([0.0] * 4), ["list"]),
    "input_number": (call(1.0), ["float"]),
    "input_string": (call("input"), ["str"]),
    "input_numpy": (call(np.zeros((3, 4), np.float32)), ["ndarray"]),
    "hx_list": (call(X, [0.0] * 5), ["list"]),
    "hx_false": (call(X, False), ["bool"]),
    "hx_pair_as_of_an_lstm": (call(X, (HX, HX)), ["tuple"]),
    "no_input": (call(), ["input"]),
    "too_many_arguments": (call(X, HX, HX), ["3 positional", "4"]),
    "unknown_keyword": (lambda cls: cls(4, 5)(X, h=HX), ["'h'"]),
    "inference_tensor_to_differentiate": (lambda cls: cls(4, 5)(inference_tensor()), ["Inference"]),
    "quantized_input": (
        lambda cls: cls(4, 5)(torch._empty_affine_quantized((3, 4), scale=1.0, zero_point=0, dtype=torch.qint8)),
        [],
    ),
    "nested_input": (lambda cls: cls(4, 5)(torch.nested.nested_tensor([X], layout=torch.jagged)), []),
    "negative_input_size": (construct(-1, 5), ["-1"]),
    "negative_hidden_size": (construct(4, -5), ["-5"]),
    "float_input_size": (construct(4.0, 5), ["float"]),
    "string_hidden_size": (construct(4, "5"), []),
    "no_hidden_size": (construct(4), ["hidden_size"]),
    "integer_parameters": (construct(4, 5, dtype=torch.int64), ["floating point"]),
    "unknown_device": (construct(4, 5, device="nowhere"), ["nowhere"]),
    "unknown_argument": (construct(4, 5, num_layers=2), ["num_layers"]),
}


@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES.keys())
def test_wrong_shapes_fail_in_the_words_of_nn_rnncell(case):
    expected, error = outcome(case, nn.RNNCell), outcome(case, rnn_ext.RNNCell)
    assert expected is not None
    assert (type(error), str(error)) == (type(expected), str(expected))


@pytest.mark.parametrize("case, words", OTHERS.values(), ids=OTHERS.keys())
@pytest.mark.filterwarnings("ignore")  # of the quantized and nested prototypes
def test_other_bad_input_fails_as_in_nn_rnncell(case, words):
    expected, error = outcome(case, nn.RNNCell), outcome(case, rnn_ext.RNNCell)
    assert expected is not None
    assert type(error) is type(expected), error
    for word in words:
        assert word in str(error)


OPERANDS = {
    "input": (3, 4),
    "hx": (3, 5),
    "weight_ih": (5, 4),
    "weight_hh": (5, 5),
    "bias_ih": (5,),
    "bias_hh": (5,),
}


@pytest.mark.parametrize("on_meta", range(1, 2 ** len(OPERANDS) - 1))
@pytest.mark.parametrize("nonlinearity", ["tanh", "sigmoid"])
def test_operands_partly_on_meta_are_an_error_that_names_both_devices(nonlinearity, on_meta):
    """nn.RNNCell gives uninitialized numbers for some of them."""
    names = [name for i, name in enumerate(OPERANDS) if on_meta >> i & 1]
    operands = [zeros(*shape, device="meta" if name in names else "cpu") for name, shape in OPERANDS.items()]
    with pytest.raises(RuntimeError, match=r"on the same device, but got (cpu and meta|meta and cpu)"):
        rnn_ext.rnn_cell(*operands, nonlinearity)


# Odd, but nn.RNNCell takes them.
ACCEPTED = {
    "empty_batch": call(zeros(0, 4)),
    "empty_batch_with_hx": call(zeros(0, 4), zeros(0, 5)),
    "input_size_zero": lambda cls: cls(0, 5)(zeros(3, 0)),
    "input_size_zero_with_hx": lambda cls: cls(0, 5)(zeros(3, 0), torch.ones(3, 5)),
    "hidden_size_zero": lambda cls: cls(4, 0)(X, zeros(3, 0)),
    "hidden_size_zero_unbatched": lambda cls: cls(4, 0)(zeros(4)),
    "both_sizes_zero": lambda cls: cls(0, 0)(zeros(3, 0)),
    "no_bias": call(torch.ones(3, 4), bias=False),
    "bias_ih_removed": call(torch.ones(3, 4), edit={"bias_ih": None}),
    "bias_hh_removed": call(torch.ones(3, 4), edit={"bias_hh": None}),
    "bias_of_one_element": call(torch.ones(3, 4), edit={"bias_ih": torch.ones(1)}),
    "bias_0d": call(torch.ones(3, 4), edit={"bias_hh": torch.ones(())}),
    "bias_for_every_row": call(torch.ones(3, 4), HX, edit={"bias_ih": torch.arange(15.0).view(3, 5) / 15}),
    "bias_column": call(torch.ones(3, 4), HX, edit={"bias_hh": torch.arange(3.0).view(3, 1) / 3}),
    "both_biases_broadcast": call(torch.ones(3, 4), edit={"bias_ih": torch.ones(1), "bias_hh": torch.ones(1, 5)}),
    "sparse_input": call(torch.eye(3, 4).to_sparse()),
    "sparse_csr_input": lambda cls: cls(4, 5)(torch.eye(3, 4).to_sparse_csr()),
    "sparse_hx": call(X, torch.eye(3, 5).to_sparse()),
    "complex": call(torch.ones(3, 4).cfloat() * 1j, dtype=torch.complex64),
    "complex_unbatched": call(torch.ones(4).cdouble() * 1j, torch.ones(5).cdouble(), dtype=torch.complex128),
    "conjugated": call(torch.ones(3, 4).cfloat().conj(), dtype=torch.complex64),
    "negated_view": call(torch.full((3, 4), 1j).conj().imag),
    "meta": call(X.to("meta"), HX.to("meta"), device="meta"),
    "meta_without_hx": call(X.to("meta"), device="meta"),
    "keywords": lambda cls: cls(4, 5)(input=X, hx=HX),
    "explicit_none": call(X, None),
    "parameter_as_input": call(nn.Parameter(X)),
    "relu": call(torch.ones(3, 4), nonlinearity="relu"),
    "scripted_sizes_as_bool": lambda cls: cls(True, True)(torch.ones(3, 1)),
}


@pytest.mark.parametrize("case", ACCEPTED.values(), ids=ACCEPTED.keys())
@pytest.mark.filterwarnings("ignore:Sparse")
def test_what_nn_rnncell_takes_is_taken(case):
    results = []
    for cls in (nn.RNNCell, rnn_ext.RNNCell):
        torch.manual_seed(0)
        results.append(case(cls))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("nonlinearity", ["softsign", "", "Tanh", None, 1])
def test_unknown_nonlinearity_fails_on_the_first_call_not_before(nonlinearity):
    cell = rnn_ext.RNNCell(4, 5, nonlinearity=nonlinearity)
    with pytest.raises(RuntimeError) as error:
        cell(X)
    assert str(error.value) == f"Unknown nonlinearity: {nonlinearity}"


def as_sigmoid(case: Case) -> Exception | None:
    class Sigmoid(rnn_ext.RNNCell):
        def __init__(self, *args, nonlinearity: str = "tanh", **kwargs) -> None:
            super().__init__(*args, nonlinearity=nonlinearity.replace("tanh", "sigmoid"), **kwargs)

    return outcome(case, Sigmoid)


@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES.keys())
def test_a_sigmoid_cell_fails_like_a_tanh_cell(case):
    """nn.RNNCell has no sigmoid; its shape errors are those of the other two."""
    expected, error = outcome(case, nn.RNNCell), as_sigmoid(case)
    assert (type(error), str(error)) == (type(expected), str(expected))


class ThroughFunction(nn.RNNCell):
    """nn.RNNCell in all but the call, which goes to rnn_ext.rnn_cell or to the operator under it."""

    function = staticmethod(rnn_ext.rnn_cell)

    def forward(self, input, hx=None):
        parameters = (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        return self.function(input, hx, *parameters, self.nonlinearity)


EVERY_CASE = SHAPES | {name: case for name, (case, _) in OTHERS.items()}


@pytest.mark.parametrize("case", EVERY_CASE.values(), ids=EVERY_CASE.keys())
@pytest.mark.filterwarnings("ignore")
def test_the_function_fails_like_the_module(case):
    expected, error = outcome(case, rnn_ext.RNNCell), outcome(case, ThroughFunction)
    assert type(error) is type(expected), error


class ThroughOperator(ThroughFunction):
    function = torch.ops.rnn_ext.rnn_cell


OPERATOR_CASES = {
    name: SHAPES[name]
    for name in (
        "input_3d",
        "hx_3d",
        "input_size",
        "input_size_unbatched",
        "hidden_size",
        "batch",
        "hx_of_one_row_is_not_broadcast",
        "weight_ih_rows",
        "weight_ih_1d",
        "weight_hh_rows",
        "weight_hh_columns_without_hx",
        "unknown_nonlinearity",
    )
} | {
    name: OTHERS[name][0]
    for name in (
        "input_float64",
        "hx_float64",
        "weight_hh_float64",
        "bias_hh_float64",
        "bias_ih_too_short",
        "bias_hh_empty",
    )
}


@pytest.mark.parametrize("case", OPERATOR_CASES.values(), ids=OPERATOR_CASES.keys())
def test_the_operator_refuses_what_would_read_out_of_bounds(case):
    """torch.ops has no Python in front of it: its own checks must hold."""
    error = outcome(case, ThroughOperator)
    assert isinstance(error, (RuntimeError, ValueError)), error


def backward_arguments() -> dict:
    return {
        "grad_output": zeros(3, 5),
        "output": zeros(3, 5),
        "input": zeros(3, 4),
        "hx": zeros(3, 5),
        "weight_ih": zeros(5, 4),
        "weight_hh": zeros(5, 5),
        "nonlinearity": "tanh",
        "output_mask": [True] * 6,
    }


@pytest.mark.parametrize(
    "name, value",
    [
        ("grad_output", zeros(2, 5)),
        ("grad_output", zeros(3, 4)),
        ("grad_output", zeros(3, 5).double()),
        ("output", zeros(2, 5)),
        ("output", zeros(3, 4)),
        ("input", zeros(2, 4)),
        ("input", zeros(3, 6)),
        ("hx", zeros(2, 5)),
        ("hx", zeros(3, 6)),
        ("weight_ih", zeros(4, 4)),
        ("weight_hh", zeros(5, 4)),
        ("weight_hh", zeros(5, 5).double()),
        ("nonlinearity", "softsign"),
        ("output_mask", [True] * 5),
        ("output_mask", [True] * 7),
    ],
)
def test_the_backward_operator_refuses_what_would_read_out_of_bounds(name, value):
    torch.ops.rnn_ext.rnn_cell_backward(**backward_arguments())
    with pytest.raises((RuntimeError, ValueError)):
        torch.ops.rnn_ext.rnn_cell_backward(**(backward_arguments() | {name: value}))


@pytest.mark.parametrize("operand", ["input", "weight_ih", "weight_hh"])
def test_the_backward_operator_refuses_to_do_without_an_operand_it_needs(operand):
    with pytest.raises(RuntimeError, match=operand):
        torch.ops.rnn_ext.rnn_cell_backward(**(backward_arguments() | {operand: None}))


@pytest.mark.cuda
@pytest.mark.parametrize("moved", ["input", "hx", "weight_ih", "weight_hh", "bias_ih", "bias_hh"])
def test_a_tensor_on_another_device_fails_as_in_nn_rnncell(moved):
    def case(cls):
        cell = cls(4, 5, device="cuda")
        tensors = {"input": X.cuda(), "hx": HX.cuda()} | {k: v.detach() for k, v in cell.named_parameters()}
        tensors[moved] = tensors[moved].cpu()
        inputs = tensors.pop("input"), tensors.pop("hx")
        return functional_call(cell, tensors, inputs)

    expected, error = outcome(case, nn.RNNCell), outcome(case, rnn_ext.RNNCell)
    assert expected is not None
    assert type(error) is type(expected), error
