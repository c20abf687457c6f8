"""Bad input fails as in nn.RNN, and what nn.RNN takes is taken."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnn_ext

# Every case is a function of a class, run on both; sizes are T = 2, B = 3, I = 4, H = 5 unless the case says so.
Case = Callable[[type[nn.RNN]], object]


def zeros(*shape: int, **kwargs) -> Tensor:
    return torch.zeros(shape, **kwargs)


def call(*args, edit: dict[str, Tensor | None] | None = None, autocast: bool = False, **kwargs) -> Case:
    def case(cls: type[nn.RNN]):
        rnn = cls(4, 5, **kwargs)
        for name, value in (edit or {}).items():
            setattr(rnn, name, None if value is None else nn.Parameter(value))
        with torch.autocast("cpu", enabled=autocast):
            return rnn(*args)

    return case


def construct(*args, **kwargs) -> Case:
    return lambda cls: cls(*args, **kwargs)


def outcome(case: Case, cls: type[nn.RNN]) -> Exception | None:
    try:
        case(cls)
    except Exception as error:
        return error
    return None


def inference_tensor() -> Tensor:
    with torch.inference_mode():
        return zeros(2, 3, 4)


X, HX = zeros(2, 3, 4), zeros(1, 3, 5)
PACKED = pack_padded_sequence(X, torch.tensor([2, 1, 1]))
UNSORTED = pack_padded_sequence(X, torch.tensor([1, 2, 1]), enforce_sorted=False)
DEEP = {"num_layers": 2, "bidirectional": True}

# nn.RNN's type and words.
SAME_WORDS = {
    "input_0d": call(zeros()),
    "input_1d": call(zeros(4)),
    "input_4d": call(zeros(1, 2, 3, 4)),
    "input_4d_batch_first": call(zeros(1, 2, 3, 4), batch_first=True),
    "input_size": call(zeros(2, 3, 6)),
    "input_size_zero": call(zeros(2, 3, 0)),
    "input_size_unbatched": call(zeros(2, 6)),
    "input_size_batch_first": call(zeros(3, 2, 6), batch_first=True),
    "input_size_packed": call(PACKED._replace(data=zeros(4, 6))),
    "input_size_of_an_empty_batch": call(zeros(2, 0, 6)),
    "input_size_before_hidden_size": call(zeros(2, 3, 6), zeros(1, 3, 7)),
    "input_size_stacked": call(zeros(2, 3, 6), **DEEP),
    "packed_data_3d": call(PACKED._replace(data=zeros(4, 1, 4))),
    "packed_data_1d": call(PACKED._replace(data=zeros(4))),
    "hx_1d": call(X, zeros(5)),
    "hx_2d": call(X, zeros(3, 5)),
    "hx_4d": call(X, zeros(1, 1, 3, 5)),
    "hx_3d_unbatched": call(zeros(2, 4), zeros(1, 1, 5)),
    "hx_1d_unbatched": call(zeros(2, 4), zeros(5)),
    "hx_2d_packed": call(PACKED, zeros(3, 5)),
    "hx_4d_packed": call(PACKED, zeros(1, 1, 3, 5)),
    "hx_2d_packed_unsorted": call(UNSORTED, zeros(1, 5)),
    "hidden_size": call(X, zeros(1, 3, 6)),
    "hidden_size_unbatched": call(zeros(2, 4), zeros(1, 6)),
    "hidden_size_packed": call(PACKED, zeros(1, 3, 6)),
    "hidden_size_packed_unsorted": call(UNSORTED, zeros(1, 3, 6)),
    "batch": call(X, zeros(1, 2, 5)),
    "batch_first": call(zeros(3, 2, 4), zeros(1, 2, 5), batch_first=True),
    "batch_packed": call(PACKED, zeros(1, 2, 5)),
    "batch_packed_unsorted": call(UNSORTED, zeros(1, 2, 5)),
    "hx_of_one_row_is_not_broadcast": call(X, zeros(1, 1, 5)),
    "layers": call(X, zeros(2, 3, 5)),
    "layers_stacked": call(X, zeros(1, 3, 5), **DEEP),
    "layers_unbatched": call(zeros(2, 4), zeros(3, 5), **DEEP),
    "no_layers": call(X, zeros(0, 3, 5)),
    "no_steps": call(zeros(0, 3, 4)),
    "no_steps_batch_first": call(zeros(3, 0, 4), batch_first=True),
    "no_steps_unbatched": call(zeros(0, 4)),
    "no_steps_with_hx": call(zeros(0, 3, 4), HX),
    "no_steps_stacked": call(zeros(0, 3, 4), **DEEP),
    "no_steps_in_an_empty_batch": call(zeros(0, 0, 4)),
    "input_float64": call(X.double()),
    "input_float16": call(X.half()),
    "input_bfloat16": call(X.bfloat16(), HX),
    "input_int": call(X.long()),
    "input_bool": call(X.bool()),
    "input_complex": call(X.cfloat()),
    "input_float64_packed": call(PACKED._replace(data=PACKED.data.double())),
    "input_float64_unbatched": call(zeros(2, 4).double()),
    "dtype_before_size": call(zeros(2, 3, 6).double()),
    "dimensions_before_dtype": call(zeros(4).double()),
    "weight_float64": call(X, edit={"weight_ih_l0": zeros(5, 4).double()}),
    "input_none": call(None),
    "input_list": call([0.0] * 4),
    "input_number": call(1.0),
    "input_numpy": call(np.zeros((2, 3, 4), np.float32)),
    "input_tuple": call((X, X)),
    "hx_list": call(X, [0.0]),
    "hx_pair_as_of_an_lstm": call(X, (HX, HX)),
    "proj_size": construct(4, 5, proj_size=2),
    "proj_size_zero": construct(4, 5, proj_size=0),
    "unknown_nonlinearity": construct(4, 5, nonlinearity="softsign"),
    "unknown_nonlinearity_by_position": construct(4, 5, 1, "Tanh"),
    "negative_dropout": construct(4, 5, dropout=-0.1),
    "large_dropout": construct(4, 5, dropout=1.5),
    "dropout_true": construct(4, 5, dropout=True),
    "dropout_a_string": construct(4, 5, dropout="0.1"),
    "bias_a_number": construct(4, 5, bias=1),
    "batch_first_a_number": construct(4, 5, batch_first=1),
    "batch_first_a_string": construct(4, 5, batch_first="yes"),
    "input_size_not_positive": construct(0, 5),
    "input_size_negative": construct(-1, 5),
    "input_size_a_float": construct(4.0, 5),
    "hidden_size_not_positive": construct(4, 0),
    "hidden_size_a_string": construct(4, "5"),
    "no_layer": construct(4, 5, 0),
    "layers_negative": construct(4, 5, num_layers=-1),
    "layers_a_float": construct(4, 5, num_layers=1.5),
    "integer_parameters": construct(4, 5, dtype=torch.int64),
    "unknown_device": construct(4, 5, device="nowhere"),
    "unknown_mode": lambda cls: setattr((rnn := cls(4, 5)), "mode", "RNN_X") or rnn(X),
    "check_input": lambda cls: cls(4, 5).check_input(zeros(2, 3, 6), None),
    "check_hidden_size": lambda cls: cls(4, 5).check_hidden_size(zeros(1, 2, 5), (1, 3, 5)),
    "check_forward_args": lambda cls: cls(4, 5).check_forward_args(X, zeros(1, 2, 5), None),
}


@pytest.mark.parametrize("case", SAME_WORDS.values(), ids=SAME_WORDS.keys())
def test_wrong_calls_fail_in_the_words_of_nn_rnn(case):
    expected, error = outcome(case, nn.RNN), outcome(case, rnn_ext.RNN)
    assert expected is not None
    assert (type(error), str(error)) == (type(expected), str(expected))


# nn.RNN's type; where PyTorch's words name sizes, dtypes or devices, ours name those listed here.
OTHERS: dict[str, tuple[Case, list[str]]] = {
    "hx_float64": (call(X, HX.double()), ["Double", "Float"]),
    "hx_int": (call(X, HX.long()), ["Long", "Float"]),
    "hx_float64_packed": (call(PACKED, HX.double()), ["Double", "Float"]),
    "weight_hh_float64": (call(X, edit={"weight_hh_l0": zeros(5, 5).double()}), ["Double", "Float"]),
    "bias_ih_float64": (call(X, edit={"bias_ih_l0": zeros(5).double()}), ["Double", "Float"]),
    "weight_ih_columns": (call(X, edit={"weight_ih_l0": zeros(5, 6)}), ["4", "6"]),
    "weight_hh_rows": (call(X, edit={"weight_hh_l0": zeros(6, 5)}), ["5", "6"]),
    "weight_hh_columns": (call(X, edit={"weight_hh_l0": zeros(5, 6)}), ["5", "6"]),
    "bias_too_long": (call(X, edit={"bias_hh_l0": zeros(6)}), ["5", "6"]),
    "input_meta": (call(X.to("meta")), ["meta", "cpu"]),
    "hx_meta": (call(X, HX.to("meta")), ["meta", "cpu"]),
    "parameters_meta": (call(X, device="meta"), ["meta", "cpu"]),
    "no_input": (call(), ["input"]),
    "too_many_arguments": (call(X, HX, HX), ["3 positional", "4"]),
    "unknown_keyword": (lambda cls: cls(4, 5)(X, h=HX), ["'h'"]),
    "no_hidden_size": (construct(4), ["hidden_size"]),
    "unknown_argument": (construct(4, 5, layers=2), ["layers"]),
    "inference_tensor_to_differentiate": (lambda cls: cls(4, 5)(inference_tensor()), ["Inference"]),
    "batch_sizes_of_other_data": (call(PACKED._replace(data=zeros(3, 4))), ["3"]),
    "batch_sizes_rise": (call(PackedSequence(zeros(4, 4), torch.tensor([1, 3]))), []),
}


@pytest.mark.parametrize("case, words", OTHERS.values(), ids=OTHERS.keys())
def test_other_wrong_calls_fail_as_in_nn_rnn(case, words):
    expected, error = outcome(case, nn.RNN), outcome(case, rnn_ext.RNN)
    assert expected is not None
    assert type(error) is type(expected), error
    for word in words:
        assert word in str(error)


def as_sigmoid(cls: type[nn.RNN]) -> type[nn.RNN]:
    class Sigmoid(cls):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **{"nonlinearity": "sigmoid", **kwargs})

    return Sigmoid


@pytest.mark.parametrize(
    "name", [n for n in SAME_WORDS if n.startswith(("input", "hx", "hidden", "batch", "no_steps"))]
)
def test_a_sigmoid_rnn_fails_like_a_tanh_rnn(name):
    expected, error = outcome(SAME_WORDS[name], nn.RNN), outcome(SAME_WORDS[name], as_sigmoid(rnn_ext.RNN))
    assert (type(error), str(error)) == (type(expected), str(expected))


# Odd, but nn.RNN takes them.
ACCEPTED = {
    "empty_batch": call(zeros(2, 0, 4)),
    "empty_batch_with_hx": call(zeros(2, 0, 4), zeros(1, 0, 5), batch_first=False),
    "empty_batch_stacked": call(zeros(0, 2, 4), batch_first=True, **DEEP),
    "complex": call(torch.ones(2, 3, 4).cfloat() * 1j, dtype=torch.complex64),
    "meta": call(X.to("meta"), HX.to("meta"), device="meta"),
    "meta_without_hx": call(X.to("meta"), device="meta", **DEEP),
    "keywords": lambda cls: cls(4, 5)(input=X, hx=HX),
    "explicit_none": call(X, None),
    "parameter_as_input": call(nn.Parameter(torch.ones(2, 3, 4))),
    "hx_that_requires_grad": call(X, HX.clone().requires_grad_()),
    "expanded_hx": call(X, zeros(1, 1, 5).expand(1, 3, 5)),
    "packed_hx_unsorted": call(UNSORTED, torch.arange(15.0).view(1, 3, 5)),
    "autocast": call(torch.ones(2, 3, 4), autocast=True),
    "autocast_hx": call(torch.ones(2, 3, 4), torch.ones(4, 3, 5), autocast=True, **DEEP),
    "autocast_bfloat16_input": call(torch.ones(2, 3, 4).bfloat16(), autocast=True),
    "inference_tensor": lambda cls: torch.inference_mode()(lambda: cls(4, 5)(X))(),
    "negated_view": call(torch.full((2, 3, 4), 1j).conj().imag),
}


@pytest.mark.parametrize("case", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_what_nn_rnn_takes_is_taken(case):
    results = []
    for cls in (nn.RNN, rnn_ext.RNN):
        torch.manual_seed(0)
        output, h_n = case(cls)
        results.append([output.data if isinstance(output, PackedSequence) else output, h_n])
    tolerance = {}
    if results[0][0].dtype == torch.bfloat16:  # in which nn.RNN rounds each sum
        tolerance = {"rtol": 0, "atol": torch.finfo(torch.bfloat16).eps}
    torch.testing.assert_close(results[1], results[0], **tolerance)


# lengths


def lengths_call(lengths, input: Tensor | PackedSequence = X, **kwargs) -> Case:
    return lambda cls: cls(4, 5, **kwargs)(input, lengths=lengths)


WRONG_LENGTHS = {
    "too_few": (lengths_call([1, 2]), ["3", "2"]),
    "too_many": (lengths_call(torch.tensor([1, 2, 1, 1])), ["3", "4"]),
    "2d": (lengths_call(torch.tensor([[1, 2, 1]])), ["3", "[1, 3]"]),
    "0d": (lengths_call(torch.tensor(2)), ["3"]),
    "number": (lengths_call(2), ["3"]),
    "negative": (lengths_call([1, -1, 2]), ["0", "2", "-1"]),
    "too_long": (lengths_call(torch.tensor([1, 3, 2])), ["0", "2", "3"]),
    "too_long_batch_first": (lengths_call([4, 1], zeros(2, 3, 4), batch_first=True), ["0", "3", "4"]),
    "float_tensor": (lengths_call(torch.tensor([1.0, 2.0, 1.0])), ["float32"]),
    "float_list": (lengths_call([1, 2.5, 1]), ["float32"]),
    "bool": (lengths_call(torch.tensor([True, True, False])), ["bool"]),
    "complex": (lengths_call(torch.tensor([1j, 1j, 1j])), ["complex64"]),
    "strings": (lengths_call(["1", "2", "1"]), []),
    "text": (lengths_call("121"), []),
    "none_inside": (lengths_call([1, None, 2]), []),
    "packed": (lengths_call([2, 1, 1], PACKED), ["PackedSequence"]),
    "unbatched": (lengths_call([2], zeros(2, 4)), ["2-D"]),
    "empty_batch": (lengths_call([1], zeros(2, 0, 4)), ["0", "1"]),
}


@pytest.mark.parametrize("case, words", WRONG_LENGTHS.values(), ids=WRONG_LENGTHS.keys())
def test_wrong_lengths_are_value_errors_with_the_numbers(case, words):
    error = outcome(case, rnn_ext.RNN)
    assert type(error) is ValueError, error
    assert all(word in str(error) for word in words), error


JAGGED = torch.nested.nested_tensor([zeros(2, 4), zeros(1, 4), zeros(3, 4)], layout=torch.jagged)
GAPS = torch.nested.nested_tensor_from_jagged(zeros(6, 4), torch.tensor([0, 3, 6]), torch.tensor([2, 1]))
WRONG_NESTED = {
    "lengths": (lengths_call([2, 1, 3], JAGGED), ["nested"]),
    "features": (call(torch.cat([JAGGED, JAGGED], -1), batch_first=True), ["3 rows", "8 features", "RNN(4, 5"]),
    "dtype": (call(JAGGED.double()), ["float64", "float32"]),
    "hx_rows": (call(JAGGED, zeros(1, 2, 5)), ["[1, 2, 5]", "[1, 3, 5]"]),
    "hx_layers": (call(JAGGED, HX, **DEEP), ["[1, 3, 5]", "[4, 3, 5]"]),
    "hx_2d": (call(JAGGED, zeros(3, 5)), ["[3, 5]", "[1, 3, 5]"]),
    "gaps": (call(GAPS), ["without gaps", "2"]),
    "strided": (call(torch.nested.nested_tensor([zeros(2, 4), zeros(1, 4)])), ["jagged", "strided", "2"]),
    "transposed": (call(JAGGED.transpose(1, 2)), ["(B, j, I)", "3"]),
    "2d": (call(torch.nested.nested_tensor([zeros(2), zeros(1)], layout=torch.jagged)), ["2-D"]),
    "4d": (call(torch.nested.nested_tensor([zeros(2, 3, 4)], layout=torch.jagged)), ["4-D"]),
    "offsets": (call(torch.nested.nested_tensor_from_jagged(zeros(6, 4), torch.tensor([0, 3, 5]))), ["5", "6"]),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("case, words", WRONG_NESTED.values(), ids=WRONG_NESTED.keys())
def test_wrong_nested_inputs_are_value_errors_with_the_numbers(case, words):
    error = outcome(case, rnn_ext.RNN)
    assert type(error) is ValueError, error
    assert all(word in str(error) for word in words), error


def test_shapes_are_looked_at_before_lengths():
    error = outcome(lambda cls: cls(4, 5)(zeros(2, 3, 6), lengths=[9, 9, 9]), rnn_ext.RNN)
    expected = outcome(SAME_WORDS["input_size"], nn.RNN)
    assert (type(error), str(error)) == (type(expected), str(expected))


def test_lengths_of_an_empty_batch_are_an_empty_list():
    output, h_n = rnn_ext.RNN(4, 5)(zeros(2, 0, 4), lengths=[])
    assert (output.shape, h_n.shape) == ((2, 0, 5), (1, 0, 5))


# rnn_layer and the operator


W, U, B_IH = zeros(5, 4), zeros(5, 5), zeros(5)
WRONG_LAYERS = {
    "input_1d": ((zeros(4), None, W, U), ValueError, ["1d"]),
    "input_4d": ((zeros(1, 2, 3, 4), None, W, U), ValueError, ["4d"]),
    "no_steps": ((zeros(0, 3, 4), None, W, U), RuntimeError, ["larger than 0"]),
    "input_size": ((zeros(2, 3, 6), None, W, U), RuntimeError, ["6", "4"]),
    "hx_3d": ((X, HX, W, U), RuntimeError, ["3-d", "2-d"]),
    "hx_2d_unbatched": ((zeros(2, 4), zeros(1, 5), W, U), RuntimeError, ["1-d"]),
    "hx_rows": ((X, zeros(2, 5), W, U), RuntimeError, ["3", "2"]),
    "hx_columns": ((X, zeros(3, 6), W, U), RuntimeError, ["5", "6"]),
    "weight_ih_rows": ((X, None, zeros(6, 4), U), RuntimeError, ["5", "6"]),
    "weight_hh_rows": ((X, None, W, zeros(6, 5)), RuntimeError, ["5", "6"]),
    "bias": ((X, None, W, U, zeros(6)), RuntimeError, ["6", "5"]),
    "nonlinearity": ((X, None, W, U, B_IH, None, "softsign"), RuntimeError, ["softsign"]),
    "dtype": ((X.double(), None, W, U), RuntimeError, ["float", "double"]),
    "hx_dtype": ((X, zeros(3, 5).double(), W, U), RuntimeError, ["float", "double"]),
    "device": ((X.to("meta"), None, W, U), RuntimeError, ["meta", "cpu"]),
}


@pytest.mark.parametrize("args, kind, words", WRONG_LAYERS.values(), ids=WRONG_LAYERS.keys())
@pytest.mark.parametrize("through_operator", [False, True], ids=["function", "operator"])
def test_a_layer_refuses_what_would_read_out_of_bounds(args, kind, words, through_operator):
    if through_operator:
        with pytest.raises((RuntimeError, ValueError)):
            torch.ops.rnn_ext.rnn_layer(*args)
        return
    with pytest.raises(kind) as error:
        rnn_ext.rnn_layer(*args)
    assert all(word in str(error.value).lower() for word in words), error.value


def backward_arguments() -> dict:
    return {
        "grad_output": zeros(2, 3, 5),
        "grad_h_n": zeros(3, 5),
        "output": zeros(2, 3, 5),
        "input": zeros(2, 3, 4),
        "hx": zeros(3, 5),
        "weight_ih": W,
        "weight_hh": U,
        "nonlinearity": "tanh",
        "output_mask": [True] * 6,
        "reverse": False,
        "batch_first": False,
        "lengths": None,
        "batch_sizes": None,
    }


@pytest.mark.parametrize(
    "name, value",
    [
        ("grad_output", zeros(2, 2, 5)),
        ("grad_output", zeros(2, 3, 5).double()),
        ("grad_h_n", zeros(2, 5)),
        ("output", zeros(2, 2, 5)),
        ("output", zeros(2, 3, 6)),
        ("output", zeros(3, 5)),
        ("input", zeros(1, 3, 4)),
        ("input", zeros(2, 3, 6)),
        ("hx", zeros(2, 5)),
        ("weight_ih", zeros(4, 4)),
        ("weight_hh", zeros(5, 4)),
        ("weight_hh", None),
        ("weight_ih", None),
        ("input", None),
        ("nonlinearity", "softsign"),
        ("output_mask", [True] * 5),
        ("lengths", torch.tensor([1, 2])),
        ("lengths", torch.tensor([1, 2, 3])),
        ("lengths", torch.tensor([1.0, 2.0, 1.0])),
        ("batch_sizes", torch.tensor([3, 3])),
    ],
)
def test_the_backward_operator_refuses_what_would_read_out_of_bounds(name, value):
    torch.ops.rnn_ext.rnn_layer_backward(**backward_arguments())
    with pytest.raises((RuntimeError, ValueError)):
        torch.ops.rnn_ext.rnn_layer_backward(**(backward_arguments() | {name: value}))
