"""RNN is nn.RNN: every option, on every kind of input, in outputs, gradients, parameters and draws."""

from __future__ import annotations

import itertools

import pytest
import torch
from entries import operators_run
from references import seeded
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

import rnn_ext

T, B, I, H = 6, 4, 3, 5  # noqa: E741
OPTIONS = {
    "num_layers": [1, 3],
    "bidirectional": [False, True],
    "bias": [True, False],
    "batch_first": [False, True],
}
GRID = [
    dict(zip(OPTIONS, values, strict=True)) | {"nonlinearity": ("tanh", "relu")[sum(map(bool, values[1:])) % 2]}
    for values in itertools.product(*OPTIONS.values())
]
every_option = pytest.mark.parametrize(
    "options", GRID, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items() if v not in (False, 1))
)
every_hx = pytest.mark.parametrize("hx", [False, True], ids=["no_hx", "hx"])


def pair(*args, **kwargs) -> list[nn.RNN]:
    return [seeded(cls, *args, **kwargs) for cls in (nn.RNN, rnn_ext.RNN)]


def states(rnn: nn.RNN, *batch: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rnn.num_layers * (2 if rnn.bidirectional else 1), *batch, H, dtype=dtype)


def padded(input_sizes: tuple[int, ...], rnn: nn.RNN) -> Tensor:
    x = torch.randn(input_sizes, dtype=torch.float64)
    return x.transpose(0, 1).contiguous() if rnn.batch_first and x.dim() == 3 else x


def values_and_gradients(rnn: nn.RNN, x, hx: Tensor | None) -> list[Tensor]:
    """Of a call with a fresh seed: the outputs, then the gradients of the input, hx and the parameters."""
    leaf = (x.data if isinstance(x, PackedSequence) else x).detach().requires_grad_()
    inputs = [leaf]
    if hx is not None:
        hx = hx.detach().requires_grad_()
        inputs.append(hx)
    torch.manual_seed(7)
    result = rnn(x._replace(data=leaf) if isinstance(x, PackedSequence) else leaf, hx)
    if isinstance(x, PackedSequence):
        assert isinstance(result[0], PackedSequence)
        for theirs, ours in zip(x[1:], result[0][1:], strict=True):
            assert theirs is ours
        result = result[0].data, result[1]
    weights = [torch.sin(torch.arange(t.numel(), dtype=torch.float64)).view(t.shape).to(t) for t in result]
    loss = sum((t * w).sum() for t, w in zip(result, weights, strict=True))
    return [*result, *torch.autograd.grad(loss, [*inputs, *rnn.parameters()])]


def assert_same(rnns: list[nn.RNN], x, hx: Tensor | None) -> None:
    theirs, ours = (values_and_gradients(rnn, x, hx) for rnn in rnns)
    assert [t.shape for t in ours] == [t.shape for t in theirs]
    torch.testing.assert_close(ours, theirs)
    if ours[0].numel():
        assert ours[0].untyped_storage().data_ptr() != ours[1].untyped_storage().data_ptr()


# Inputs


@every_hx
@every_option
def test_batches_give_what_nn_rnn_gives(options, hx):
    rnns = pair(I, H, dtype=torch.float64, **options)
    assert_same(rnns, padded((T, B, I), rnns[0]), states(rnns[0], B) if hx else None)


@every_hx
@every_option
def test_unbatched_input_gives_what_nn_rnn_gives(options, hx):
    rnns = pair(I, H, dtype=torch.float64, **options)
    assert_same(rnns, padded((T, I), rnns[0]), states(rnns[0]) if hx else None)


@pytest.mark.parametrize("enforce_sorted", [True, False], ids=["sorted", "unsorted"])
@every_hx
@every_option
def test_packed_input_gives_what_nn_rnn_gives(options, hx, enforce_sorted):
    rnns = pair(I, H, dtype=torch.float64, **options)
    lengths = torch.tensor([6, 4, 4, 1] if enforce_sorted else [4, 1, 6, 4])
    x = pack_padded_sequence(padded((T, B, I), rnns[0]), lengths, rnns[0].batch_first, enforce_sorted)
    assert_same(rnns, x, states(rnns[0], B) if hx else None)


def test_packed_sequences_of_one_step_and_of_one_row():
    rnns = pair(I, H, 2, bidirectional=True, dtype=torch.float64)
    for lengths in ([1], [1, 1, 1], [5], [3, 1]):
        x = pack_sequence([torch.randn(n, I, dtype=torch.float64) for n in lengths])
        assert_same(rnns, x, None)
        assert_same(rnns, x, states(rnns[0], len(lengths)))


@pytest.mark.parametrize("sizes", [(1, 1, 3), (1, 4, 3), (5, 1, 3), (4, 0, 3), (40, 2, 3)], ids=str)
@every_hx
def test_other_sizes_give_what_nn_rnn_gives(sizes, hx):
    for options in ({}, {"num_layers": 2, "bidirectional": True}, {"batch_first": True}):
        rnns = pair(I, H, dtype=torch.float64, **options)
        assert_same(rnns, padded(sizes, rnns[0]), states(rnns[0], sizes[1]) if hx else None)


def test_inputs_of_any_strides_give_what_nn_rnn_gives():
    rnns = pair(I, H, 2, dtype=torch.float64)
    wide = torch.randn(2 * T, 2 * B, 2 * I, dtype=torch.float64)
    hx = torch.randn(H, B, 2, dtype=torch.float64).permute(2, 1, 0)
    for x in (wide[::2, ::2, ::2], wide.transpose(0, 1)[:T, :B, :I], wide[:1, :B, :I].expand(T, B, I)):
        assert_same(rnns, x, hx)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_hx
def test_other_dtypes_are_as_accurate_as_nn_rnn(dtype, hx):
    """In 16 bits nn.RNN rounds each sum, and ours the state alone: at worst they are one last place apart."""
    rnns = pair(I, H, 2, dtype=dtype, bidirectional=True)
    x = torch.randn(T, B, I).to(dtype)
    state = states(rnns[0], B, dtype=dtype) if hx else None
    results = [values_and_gradients(rnn, x, state) for rnn in rnns]
    exact = values_and_gradients(rnns[0].double(), x.double(), None if state is None else state.double())
    for theirs, ours, true in zip(*results, exact, strict=True):
        assert ours.dtype == dtype
        errors = [(t.double() - true).abs().max() for t in (ours, theirs)]
        assert errors[0] <= 2 * errors[1] + torch.finfo(dtype).eps * true.abs().max()


def test_sigmoid_is_the_logistic_function():
    rnn = seeded(rnn_ext.RNN, I, H, nonlinearity="sigmoid")
    x = torch.randn(T, B, I)
    h = torch.zeros(B, H)
    outputs = []
    for x_t in x:
        h = torch.sigmoid(x_t @ rnn.weight_ih_l0.t() + rnn.bias_ih_l0 + h @ rnn.weight_hh_l0.t() + rnn.bias_hh_l0)
        outputs.append(h)
    torch.testing.assert_close(rnn(x), (torch.stack(outputs), h[None]))


# Dropout


@pytest.mark.parametrize("probability", [0.4, 1.0])
@pytest.mark.parametrize("kind", ["padded", "unbatched", "packed"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_dropout_draws_nn_rnns_masks(bidirectional, batch_first, kind, probability):
    options = {"batch_first": batch_first, "bidirectional": bidirectional, "dropout": probability}
    rnns = pair(I, H, 3, dtype=torch.float64, **options)
    x = padded((T, I) if kind == "unbatched" else (T, B, I), rnns[0])
    if kind == "packed":
        x = pack_padded_sequence(x, torch.tensor([3, 6, 1, 5]), batch_first, enforce_sorted=False)
    assert_same(rnns, x, None)
    in_training = values_and_gradients(rnns[1], x, None)[0]
    for rnn in rnns:
        rnn.eval()
    assert_same(rnns, x, None)
    assert not torch.equal(values_and_gradients(rnns[1], x, None)[0], in_training)


# Lengths


LENGTHS = [4, 6, 1, 4]


class PackedAndPadded(nn.RNN):
    def forward(self, input, hx=None):
        x = pack_padded_sequence(input, torch.tensor(LENGTHS), self.batch_first, enforce_sorted=False)
        output, h_n = super().forward(x, hx)
        return pad_packed_sequence(output, self.batch_first, total_length=T)[0], h_n


class WithLengths(rnn_ext.RNN):
    def forward(self, input, hx=None):
        return super().forward(input, hx, lengths=LENGTHS)


@every_hx
@every_option
def test_lengths_do_what_packing_and_padding_do(options, hx):
    rnns = [seeded(cls, I, H, dtype=torch.float64, **options) for cls in (PackedAndPadded, WithLengths)]
    assert_same(rnns, padded((T, B, I), rnns[0]), states(rnns[0], B) if hx else None)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_lengths_may_be_integers_of_any_kind(dtype):
    rnn = seeded(rnn_ext.RNN, I, H)
    x = torch.randn(T, B, I)
    expected = rnn(x, lengths=LENGTHS)
    for lengths in (torch.tensor(LENGTHS, dtype=dtype), tuple(LENGTHS), torch.tensor(LENGTHS).numpy()):
        torch.testing.assert_close(rnn(x, lengths=lengths), expected)


def test_lengths_changed_after_the_call_change_no_gradient():
    rnn = seeded(rnn_ext.RNN, I, H)
    x, lengths = torch.randn(T, B, I, requires_grad=True), torch.tensor(LENGTHS)
    output, _ = rnn(x, lengths=lengths)
    lengths -= 1
    (grad,) = torch.autograd.grad(output.sum(), x)
    assert all(grad[t, row].any() == (t < n) for row, n in enumerate(LENGTHS) for t in range(T))


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
def test_padding_may_be_nan_or_infinite(reverse, value):
    """It is neither read nor computed, and takes no gradient."""
    rnn = seeded(rnn_ext.RNN, I, H, 2, bidirectional=reverse)
    x = torch.randn(T, B, I)
    poisoned = x.clone()
    for row, n in enumerate(LENGTHS):
        poisoned[n:, row] = value
    results = []
    for values in (x, poisoned):
        leaf = values.clone().requires_grad_()
        output, h_n = rnn(leaf, lengths=LENGTHS)
        gradients = torch.autograd.grad(output.sum() + h_n.sum(), [leaf, *rnn.parameters()])
        results.append([output, h_n, *gradients])
    torch.testing.assert_close(*results)
    grad = torch.full_like(results[0][0], value)
    for row, n in enumerate(LENGTHS):
        grad[:n, row] = 1
    leaf = poisoned.clone().requires_grad_()
    output, _ = rnn(leaf, lengths=LENGTHS)
    assert torch.autograd.grad(output, leaf, grad)[0].isfinite().all()


# Nested tensors


def nested(*lengths: int) -> Tensor:
    rows = [torch.randn(n, I, dtype=torch.float64) for n in lengths]
    return torch.nested.nested_tensor(rows, layout=torch.jagged, requires_grad=True)


@every_hx
@every_option
def test_nested_input_gives_what_lengths_give(options, hx):
    rnn = seeded(rnn_ext.RNN, I, H, dtype=torch.float64, **options)
    numbers = [4, 0, 6, 1]
    x = nested(*numbers)
    state = states(rnn, B).requires_grad_() if hx else None
    leaves = [x, *rnn.parameters(), *([state] if hx else [])]
    output, h_n = rnn(x, state)
    assert output.layout == torch.jagged and output.shape == (*x.shape[:2], H * (2 if rnn.bidirectional else 1))
    assert output.offsets() is x.offsets() and not output.values().isnan().any()
    found = torch.autograd.grad(output.values().pow(2).sum() + h_n.sum(), leaves)

    padded = torch.nested.to_padded_tensor(x, 0.0)
    given = padded if rnn.batch_first else padded.transpose(0, 1)
    expected, expected_h_n = rnn(given, state, lengths=numbers)
    torch.testing.assert_close(h_n, expected_h_n)
    for row, theirs, n in zip(output.unbind(), expected.unbind(0 if rnn.batch_first else 1), numbers, strict=True):
        torch.testing.assert_close(row, theirs[:n])
    of_x, *others = torch.autograd.grad(expected.pow(2).sum() + expected_h_n.sum(), leaves)
    torch.testing.assert_close(found[0].values(), of_x.values())
    torch.testing.assert_close(list(found[1:]), others)


def test_nested_input_is_neither_copied_nor_padded():
    rnn, x = seeded(rnn_ext.RNN, I, H, dtype=torch.float64), nested(4, 0, 6, 1)
    names = set(operators_run(lambda: torch.autograd.grad(rnn(x)[0].values().sum(), [x, *rnn.parameters()])))
    assert {"rnn_ext::rnn_layer", "rnn_ext::rnn_layer_backward"} <= names
    assert not names & {"aten::clone", "aten::index_select", "aten::pad", "aten::linear"}


@pytest.mark.parametrize("lengths", [(), (0, 0), (1,), (3, 3)], ids=str)
def test_nested_input_of_few_or_equal_rows(lengths):
    rnn = seeded(rnn_ext.RNN, I, H, 2, bidirectional=True, dtype=torch.float64)
    rows, numbers = torch.randn(sum(lengths), I, dtype=torch.float64), torch.tensor(lengths, dtype=torch.int64)
    x = torch.nested.nested_tensor_from_jagged(rows, lengths=numbers)
    output, h_n = rnn(x)
    assert (output.values().shape, h_n.shape) == ((sum(lengths), 2 * H), (4, len(lengths), H))
    for row, theirs in zip(x.unbind(), output.unbind(), strict=True) if sum(lengths) else ():
        torch.testing.assert_close(theirs, rnn(row)[0])


@pytest.mark.cuda
@every_hx
@every_option
def test_cuda_tensors_give_what_nn_rnn_gives(options, hx):
    rnns = [rnn.cuda() for rnn in pair(I, H, dtype=torch.float64, **options)]
    x = padded((T, B, I), rnns[0]).cuda()
    packed = pack_padded_sequence(x, torch.tensor([4, 1, 6, 4]), rnns[0].batch_first, enforce_sorted=False)
    for input in (x, x[:, 0], packed):
        batch = () if input is not packed and input.dim() == 2 else (B,)
        assert_same(rnns, input, states(rnns[0], *batch).cuda() if hx else None)


@pytest.mark.cuda
@every_option
def test_cuda_and_the_cpu_agree_on_what_nn_rnn_does_not_have(options):
    for nonlinearity, lengths in (("sigmoid", None), ("sigmoid", LENGTHS), ("tanh", LENGTHS)):
        rnn = seeded(rnn_ext.RNN, I, H, dtype=torch.float64, **(options | {"nonlinearity": nonlinearity}))
        x = padded((T, B, I), rnn)
        results = []
        for device in ("cpu", "cuda"):
            rnn, leaf = rnn.to(device), x.to(device).requires_grad_()
            output, h_n = rnn(leaf, lengths=lengths)
            found = torch.autograd.grad(output.pow(2).sum() + h_n.sum(), [leaf, *rnn.parameters()])
            results.append([t.cpu() for t in (output, h_n, *found)])
        torch.testing.assert_close(*results)
