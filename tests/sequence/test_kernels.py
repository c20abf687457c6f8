"""The CPU kernels of a layer: values around their own sizes, in every dtype, layout and division over threads."""

from __future__ import annotations

import pytest
import torch
from references import Arguments
from sequences import jagged, layer_arguments, loop_of_cells, packed
from torch import Tensor, nn

import rnn_ext

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
# (T, B, I, H): tiles of 4 to 12 rows, panels of 4 to 32 columns, runs of 128 or 256 terms, blocks of 256 to 512 rows;
# the last two with large weights, whose backward pass goes in parts.
SHAPES = [
    (1, 1, 1, 1),
    (5, 1, 3, 33),
    (3, 2, 17, 8),
    (4, 4, 40, 16),
    (9, 7, 5, 31),
    (3, 13, 270, 70),
    (40, 25, 2, 9),
    (20, 30, 40, 48),
    (2, 500, 6, 12),
    (7, 33, 60, 130),
    (5, 7, 500, 610),
    (5, 3, 1100, 490),
]


def run(layer, args: Arguments, grads: list[Tensor], *options, **kwargs) -> list[Tensor]:
    """Output, h_n and the gradients of all arguments."""
    leaves = args.leaves()
    results = layer(*leaves, *options, **kwargs)
    return [*(t.detach() for t in results), *torch.autograd.grad(results, leaves.present(), grads)]


def operator(*tensors: Tensor, reverse=False, batch_first=False, lengths=None, batch_sizes=None, nonlinearity="tanh"):
    results = rnn_ext._C.rnn_layer(*tensors, nonlinearity, reverse, batch_first, lengths, batch_sizes, False)
    assert results is not None  # the kernels take it
    return results


def seeds(args: Arguments) -> list[Tensor]:
    steps, batch, _ = args.input.shape
    hidden_size = args.weight_hh.size(0)
    like = args.input
    return [like.new_empty(steps, batch, hidden_size).normal_(), like.new_empty(batch, hidden_size).normal_()]


def nn_rnn(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    input, hx, *weights = tensors
    output, h_n = torch.rnn_tanh(input, hx[None], weights, True, 1, 0.0, False, False, False)
    return output, h_n[0]


@every_dtype
@pytest.mark.parametrize(
    "shape", [*SHAPES, (30, 13, 740, 530), (9, 230, 20, 720)], ids=lambda shape: "x".join(map(str, shape))
)
def test_errors_are_at_most_twice_nn_rnns(shape, dtype):
    """Against float64, besides a floor of some units in the last place, since errors add up over the steps. In float64
    nn.RNN is itself the reference, and errs as well: both by as much as the terms of a sum add up to."""
    args = layer_arguments(*shape, dtype=dtype)
    grads = seeds(args)
    exact = run(nn_rnn, args.map(lambda t: t.double()), [g.double() for g in grads])
    names = ["output", "h_n", "input", "hx", "weight_ih", "weight_hh", "bias_ih", "bias_hh"]
    for name, ours, theirs, value in zip(
        names, run(operator, args, grads), run(nn_rnn, args, grads), exact, strict=True
    ):
        scale = value.abs().max()
        floor = (2 + shape[0] ** 0.5) * torch.finfo(dtype).eps
        if dtype == torch.float64:
            floor = 2 * (2 + sum(shape) ** 0.5) * torch.finfo(dtype).eps
        error, allowed = ((t.double() - value).abs().max() / scale for t in (ours, theirs))
        assert error <= 2 * allowed + floor, name


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu", "sigmoid"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[0] * s[1] < 1000], ids=lambda s: "x".join(map(str, s)))
def test_rows_of_any_lengths_equal_a_loop_of_cells(shape, reverse, nonlinearity):
    steps, batch, *_ = shape
    args = layer_arguments(*shape)
    lengths = torch.randint(0, steps + 1, (batch,))
    lengths[torch.randint(batch, ())] = steps
    grads = seeds(args)
    options = {"nonlinearity": nonlinearity, "reverse": reverse}
    expected = run(loop_of_cells, args, grads, lengths=lengths.tolist(), **options)
    torch.testing.assert_close(run(operator, args, grads, lengths=lengths, **options), expected)

    numbers = lengths.tolist()
    for place in (0, 2):  # output and the input's gradient
        expected[place] = jagged(expected[place], numbers)[0]
    rows = args._replace(input=jagged(args.input, numbers)[0])
    row_grads = [jagged(grads[0], numbers)[0], grads[1]]
    torch.testing.assert_close(run(operator, rows, row_grads, lengths=lengths, **options), expected)

    sorted_lengths = lengths.clamp(min=1).sort(descending=True).values.tolist()
    expected = run(loop_of_cells, args, grads, lengths=sorted_lengths, **options)
    data, batch_sizes = packed(args.input, sorted_lengths)
    ours = run(
        operator,
        args._replace(input=data),
        [packed(grads[0], sorted_lengths)[0], grads[1]],
        batch_sizes=batch_sizes,
        **options,
    )
    for place in (0, 2):
        expected[place] = packed(expected[place], sorted_lengths)[0]
    torch.testing.assert_close(ours, expected)


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@every_dtype
@pytest.mark.parametrize(
    "shape, lengths",
    [
        ((60, 24, 40, 40), False),
        ((60, 24, 40, 40), True),
        ((30, 3, 20, 150), False),
        ((30, 5, 20, 150), False),
        ((4, 30, 33, 520), False),
        ((6, 25, 1000, 450), True),
    ],
    ids=["rows", "lengths", "columns", "groups_of_columns", "shared_columns", "parts"],
)
def test_bits_do_not_depend_on_the_number_of_threads(shape, lengths, dtype, set_threads):
    args = layer_arguments(*shape, dtype=dtype)
    grads = seeds(args)
    options = {"lengths": torch.randint(0, shape[0] + 1, (shape[1],))} if lengths else {}
    set_threads(1)
    alone = run(operator, args, grads, **options)
    for threads in (2, 3, 5):
        set_threads(threads)
        for ours, expected in zip(run(operator, args, grads, **options), alone, strict=True):
            assert torch.equal(ours, expected)


@every_dtype
@pytest.mark.parametrize("sizes", [(12, 20), (13, 21)], ids=str)
def test_any_strides_give_the_bits_of_contiguous_arguments(sizes, dtype):
    args = layer_arguments(6, 5, *sizes, dtype=dtype)
    grads = seeds(args)
    expected = run(operator, args, grads)

    def spread(t: Tensor) -> Tensor:
        wide = t.new_full((*t.shape[:-1], 2 * t.size(-1) + 1), torch.nan)
        return wide[..., 1::2].copy_(t)

    def turned(t: Tensor) -> Tensor:
        return t.transpose(0, -1).contiguous().transpose(0, -1)

    def cut(t: Tensor) -> Tensor:
        wide = t.new_full((*t.shape[:-1], 32), torch.nan)
        return wide[..., : t.size(-1)].copy_(t)

    for change in (spread, turned, cut):
        other = run(operator, args.map(change), [change(g) for g in grads])
        assert all(torch.equal(a, b) for a, b in zip(other, expected, strict=True))
    batch_first = args._replace(input=args.input.transpose(0, 1))
    other = run(operator, batch_first, [grads[0].transpose(0, 1), grads[1]], batch_first=True)
    other[0], other[2] = (t.transpose(0, 1) for t in (other[0], other[2]))
    assert all(torch.equal(a, b) for a, b in zip(other, expected, strict=True))


def test_an_expanded_gradient_is_that_of_its_copy():
    args = layer_arguments(6, 5, 12, 20)
    ones = torch.ones(())
    grads = [ones.expand(6, 5, 20).double(), ones.expand(5, 20).double()]
    copies = [g.contiguous() for g in grads]
    assert all(torch.equal(a, b) for a, b in zip(run(operator, args, grads), run(operator, args, copies), strict=True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("place", ["input", "hx", "weight_ih", "weight_hh", "bias_ih", "grad_output"])
@pytest.mark.parametrize("dtype, sizes", [(torch.float32, (4, 6)), (torch.bfloat16, (5, 17))], ids=str)
def test_nan_and_infinity_spread_as_in_nn_rnn(dtype, sizes, place, value):
    args = layer_arguments(5, 3, *sizes, dtype=dtype)
    args.weight_hh.abs_().div_(10)  # so that an infinite gradient is one at all steps
    grads = seeds(args)
    spoilt = grads[0][-1] if place == "grad_output" else getattr(args, place)
    spoilt.view(-1)[0] = value
    for ours, theirs in zip(run(operator, args, grads), run(nn_rnn, args, grads), strict=True):
        if dtype == torch.float32:
            torch.testing.assert_close(ours, theirs, equal_nan=True)
        else:  # rounded elsewhere
            for kind in (torch.isnan, torch.isposinf, torch.isneginf):
                assert torch.equal(kind(ours), kind(theirs))


def test_a_long_sequence_equals_its_parts():
    """Forward and backward through 100,000 steps: no recursion, and blocks of steps don't show."""
    args = layer_arguments(100_000, 1, 2, 3)
    grads = seeds(args)

    def in_parts(input, hx, *weights):
        outputs = []
        for part in input.split(7_777):
            output, hx = operator(part, hx, *weights)
            outputs.append(output)
        return torch.cat(outputs), hx

    torch.testing.assert_close(run(operator, args, grads), run(in_parts, args, grads))


@pytest.mark.parametrize("shape", [(64, 1, 16, 32), (100, 10, 4, 5), (35, 20, 200, 200)])
def test_no_more_is_saved_for_backward_than_by_nn_rnn(shape):
    steps, batch, input_size, hidden_size = shape

    def saved_bytes(module: nn.RNN) -> int:
        saved = {}

        def pack(t: Tensor) -> Tensor:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            module(torch.randn(steps, batch, input_size, requires_grad=True))
        return sum(saved.values())

    ours, theirs = (saved_bytes(module(input_size, hidden_size)) for module in (rnn_ext.RNN, nn.RNN))
    assert ours <= 1.1 * theirs


def test_frozen_weights_save_nothing_for_themselves():
    args = layer_arguments()
    leaves = args._replace(input=args.input.requires_grad_())
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        operator(*leaves)
    assert len(saved) == 3  # output, W and U
    assert not any(t.data_ptr() in (args.input.data_ptr(), args.hx.data_ptr()) for t in saved)
