"""Values: as accurate as nn.RNNCell, NaN and Inf where it has them, and bit for bit the same in every run."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from references import (
    NONLINEARITIES,
    Arguments,
    eager_cell,
    float64_reference,
    output_and_gradients,
    random_arguments,
)
from torch import Tensor

from rnn_ext import _C, rnn_cell

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def strided(t: Tensor) -> Tensor:
    """Every second element of every dimension of a larger tensor."""
    view = t.new_full([2 * n for n in t.shape], math.nan)[(slice(None, None, 2),) * t.dim()]
    return view.copy_(t)


def misaligned(t: Tensor) -> Tensor:
    """Contiguous, one element after an aligned address."""
    return t.new_full([t.numel() + 1], math.nan)[1:].view(t.shape).copy_(t)


def row_slice(t: Tensor) -> Tensor:
    """Contiguous rows, with a gap between them."""
    return t.new_full([*t.shape[:-1], t.shape[-1] + 3], math.nan)[..., : t.shape[-1]].copy_(t)


LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() == 2 else t,
    "row_slice": row_slice,
    "strided": strided,
    "expanded": lambda t: t[:1].expand_as(t),
    "misaligned": misaligned,
}

# (B, I, H): empty, one, odd, round, a little over a tile in every dimension, over every block of the CPU kernels
# (256 columns, 264 rows, 256 terms), a batch past the pairwise sums of the bias gradient, long sums, and products that
# the CPU leaves to a library.
SIZES = [
    (0, 4, 5),
    (4, 0, 5),
    (4, 5, 0),
    (1, 1, 1),
    (3, 7, 5),
    (32, 64, 64),
    (65, 33, 129),
    (129, 65, 17),
    (290, 40, 275),
    (4200, 3, 2),
    (9, 4096, 65),
    (2, 2047, 2049),
    (290, 600, 700),
]


def pairwise(**factors) -> list[dict]:
    """Few rows in which every pair of values of every two factors meets (greedy, from a fixed seed)."""
    rng = random.Random(0)
    names = list(factors)
    missing = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(names, 2)
        for i in range(len(factors[a]))
        for j in range(len(factors[b]))
    }

    def pairs(row: tuple[int, ...]):
        return set(itertools.combinations(zip(names, row, strict=True), 2)) & missing

    def candidate(must: tuple) -> tuple[int, ...]:
        row = {name: rng.randrange(len(values)) for name, values in factors.items()} | dict(must)
        return tuple(row[name] for name in names)

    rows = []
    while missing:
        must = min(missing)
        best = max((candidate(must) for _ in range(30)), key=lambda row: len(pairs(row)))
        missing -= pairs(best)
        rows.append({name: factors[name][i] for name, i in zip(names, best, strict=True)})
    return rows


GRID = pairwise(
    size=SIZES,
    layout=list(LAYOUTS),
    dtype=FLOATING,
    bias=["both", "none", "ih", "hh"],
    nonlinearity=NONLINEARITIES,
    hx=[True, False],
)


def row_id(row: dict) -> str:
    size = "x".join(map(str, row["size"]))
    hx = "hx" if row["hx"] else "no_hx"
    return f"{size}-{row['layout']}-{str(row['dtype'])[6:]}-bias_{row['bias']}-{row['nonlinearity']}-{hx}"


def assert_as_accurate_as_eager(args: Arguments, nonlinearity: str, grad_output: Tensor, size_of_z: float = 1) -> None:
    """Largest error against float64: at most twice that of PyTorch's own cell, plus a floor.

    The floor: the last rounding, that of the activation (PyTorch's are good to 1 ulp), and one of the sum cost
    eps / 2 to eps each, and the eager result may be exact by luck: 4 eps of the largest value. In float64 the
    reference rounds as much as the cells do; sums of n terms then differ by about sqrt(n) eps times their size.
    """
    ours = output_and_gradients(rnn_cell, args, nonlinearity, grad_output)
    # Contiguous, since oneDNN's bfloat16 matmul on AMX machines multiplies a row's padding by zero (oneDNN issue
    # 5717), and the gaps of some layouts hold NaN.
    contiguous = args.map(lambda t: t.clone(memory_format=torch.contiguous_format))
    eager = output_and_gradients(eager_cell, contiguous, nonlinearity, grad_output.contiguous())
    reference = float64_reference(args, nonlinearity, grad_output)
    assert ours.keys() == reference.keys()
    dtype = grad_output.dtype
    n = sum(args.input.shape) + args.weight_hh.shape[0]
    floor = torch.finfo(dtype).eps * (4 + (size_of_z * math.sqrt(n) if dtype == torch.float64 else 0))
    for name, exact in reference.items():
        result = ours[name]
        assert (result.shape, result.dtype, result.device) == (exact.shape, dtype, exact.device), name
        if exact.numel() == 0:
            continue
        error, eager_error = ((t.double() - exact).abs().max().item() for t in (result, eager[name]))
        limit = 2 * eager_error + floor * exact.abs().max().item()
        assert error <= limit, f"{name}: error {error:.3g}, eager {eager_error:.3g}, limit {limit:.3g}"


@pytest.mark.parametrize("row", GRID, ids=row_id)
def test_output_and_gradients_are_as_accurate_as_eager(row, device):
    args = random_arguments(
        *row["size"],
        hx=row["hx"],
        bias=row["bias"],
        dtype=row["dtype"],
        device=device,
        exact=row["nonlinearity"] == "relu",
    )
    layout = LAYOUTS[row["layout"]]
    batch, _, hidden_size = row["size"]
    grad_output = torch.randn(batch, hidden_size, dtype=torch.float64).to(device, row["dtype"])
    assert_as_accurate_as_eager(args.map(layout), row["nonlinearity"], layout(grad_output))


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # `device` is a constant
)
@given(
    size=st.tuples(*[st.integers(0, 40)] * 3),
    layouts=st.lists(st.sampled_from(list(LAYOUTS)), min_size=7, max_size=7),
    dtype=st.sampled_from(FLOATING),
    nonlinearity=st.sampled_from(NONLINEARITIES),
)
def test_every_argument_may_have_its_own_layout(device, size, layouts, dtype, nonlinearity):
    args = random_arguments(*size, dtype=dtype, device=device, exact=nonlinearity == "relu")
    grad_output = torch.randn(size[0], size[2]).to(device, dtype)
    *args, grad_output = (LAYOUTS[name](t) for name, t in zip(layouts, [*args, grad_output], strict=True))
    assert_as_accurate_as_eager(Arguments(*args), nonlinearity, grad_output)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_saturated_cells_are_as_accurate_as_eager(nonlinearity, dtype, device):
    """Large z: where the activation is flat, its derivative comes from the rounded output."""
    args = random_arguments(17, 40, 24, dtype=dtype, device=device, exact=nonlinearity == "relu")
    args = args._replace(input=args.input * 16)
    grad_output = torch.randn(17, 24).to(device, dtype)
    assert_as_accurate_as_eager(args, nonlinearity, grad_output, size_of_z=16)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("size", [(60000, 3, 2), (3, 5000, 2)], ids=str)
def test_long_sums_of_one_sign_are_as_accurate_as_eager(size, dtype, device):
    """A running sum in float32 loses about sqrt(n) eps of terms that never cancel; ATen sums pairwise or in blocks."""
    args = random_arguments(*size, dtype=dtype, device=device).map(torch.abs)
    args = args._replace(weight_ih=args.weight_ih / math.sqrt(size[1]))  # sums of positive terms: z stays small
    assert_as_accurate_as_eager(args, "sigmoid", torch.ones(size[0], size[2], device=device, dtype=dtype))


# On the CPU a backward in 16 bits whose dz would take over half a megabyte more than nn.RNNCell's goes by blocks of dz:
# of a few columns, of a row or a column, of many rows.
MANY_ROWS = [(40000, 9, 12), (2100, 64, 256), (4000, 70, 100), (300000, 3, 1)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", MANY_ROWS, ids=str)
def test_gradients_of_many_rows_are_as_accurate_as_eager(size, dtype, device):
    args = random_arguments(*size, dtype=dtype, device=device)
    assert_as_accurate_as_eager(args, "tanh", torch.randn(size[0], size[2]).to(device, dtype))


GRAD_OUTPUTS = {
    "expanded": lambda batch, size: torch.ones(()).expand(batch, size),
    "one_row": lambda batch, size: torch.randn(size).expand(batch, size),
    "one_column": lambda batch, size: torch.randn(batch, 1).expand(batch, size),
    "transposed": lambda batch, size: torch.randn(size, batch).t(),
}


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("size", [(3, 7, 5), (65, 33, 129), (40000, 9, 12)], ids=str)
@pytest.mark.parametrize("make", GRAD_OUTPUTS.values(), ids=GRAD_OUTPUTS.keys())
def test_a_gradient_of_any_strides_gives_the_bits_of_its_contiguous_copy(make, size, dtype):
    args = random_arguments(*size, dtype=dtype)
    grad_output = make(size[0], size[2]).to(dtype)
    results = [output_and_gradients(rnn_cell, args, "tanh", g) for g in (grad_output, grad_output.contiguous())]
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize(("nonlinearity", "limit"), [("tanh", 1.5), ("sigmoid", 2.5)])
def test_activations_in_float32_are_within_units_in_the_last_place(nonlinearity, limit, device):
    """Every power of two times 3000 numbers in [1, 2), of both signs: these products are exact."""
    mantissas = 1 + torch.rand(3000, 1)
    powers = torch.ldexp(torch.ones(47, 1), torch.arange(-40, 7).unsqueeze(1))
    z = torch.cat((powers, -powers))
    output = rnn_cell(
        z.to(device), None, mantissas.to(device), torch.zeros(3000, 3000, device=device), nonlinearity=nonlinearity
    )
    exact = getattr(torch, nonlinearity)(z.double() * mantissas.T.double())
    unit = torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent - 24)
    error = ((output.cpu().double() - exact).abs() / unit)[unit >= 2**-149].max().item()  # of normal numbers
    assert error <= limit


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_outputs_are_rounded_once_from_float32_sums(dtype, nonlinearity, device):
    args = random_arguments(9, 300, 40, dtype=dtype, device=device)
    output = rnn_cell(*args, nonlinearity).double()
    exact = float64_reference(args, nonlinearity, output)["output"]
    # One rounding to nearest is half an eps; CUDA's tanh.approx may cost another half. The sums: a few float32 eps.
    roundings = 0.5 if device == "cpu" else 1
    limit = roundings * torch.finfo(dtype).eps * exact.abs() + 64 * torch.finfo(torch.float32).eps
    assert ((output - exact).abs() <= limit).all()


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize("hx", [True, False], ids=["hx", "no_hx"])
def test_unbatched_input_is_a_batch_of_one_without_its_dimension(hx, nonlinearity, device):
    batch = random_arguments(1, hx=hx, dtype=torch.float32, device=device)
    single = batch._replace(input=batch.input[0], hx=batch.hx[0] if hx else None)
    grad_output = torch.randn(1, 5).to(device)
    expected = output_and_gradients(rnn_cell, batch, nonlinearity, grad_output)
    for name, result in output_and_gradients(rnn_cell, single, nonlinearity, grad_output[0]).items():
        unbatch = name in ("output", "input", "hx")
        assert torch.equal(result, expected[name][0] if unbatch else expected[name]), name


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=["nan", "inf", "minus_inf"])
@pytest.mark.parametrize("where", ["input", "hx", "weight_ih", "weight_hh", "bias_ih", "bias_hh", "grad_output"])
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_and_inf_spread_as_in_eager(dtype, nonlinearity, where, value, device):
    args = random_arguments(9, 12, 10, dtype=dtype, device=device, exact=nonlinearity == "relu")
    grad_output = torch.randn(9, 10).to(device, dtype)
    poisoned = grad_output if where == "grad_output" else getattr(args, where)
    poisoned.view(-1)[poisoned.numel() // 2] = value
    ours = output_and_gradients(rnn_cell, args, nonlinearity, grad_output)
    # In float32, since oneDNN's bfloat16 matmul on AMX machines spreads NaN to other rows (oneDNN issue 5717).
    eager = output_and_gradients(eager_cell, args.map(Tensor.float), nonlinearity, grad_output.float())
    for name, expected in eager.items():
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(ours[name]), kind(expected)), f"{kind.__name__} of {name}"
        # Where they are finite: a dozen terms of unit size, each a few roundings away from float32's.
        few = 16 * torch.finfo(dtype).eps
        finite = expected.isfinite()
        torch.testing.assert_close(ours[name].float()[finite], expected[finite], rtol=few, atol=few)


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_nan_everywhere_is_nan_in_every_element(nonlinearity, device):
    """Vector code and its scalar remainder must agree on NaN: no maximum or clamp may swallow one."""
    args = random_arguments(5, 19, 37, dtype=torch.float32, device=device).map(lambda t: t * math.nan)
    assert rnn_cell(*args, nonlinearity).isnan().all()


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_without_hx_weight_hh_is_not_read(nonlinearity, device):
    """hx=None skips that half of the sum instead of multiplying by zeros, so NaN there cannot reach the output."""
    args = random_arguments(hx=False, dtype=torch.float32, device=device)
    expected = rnn_cell(*args, nonlinearity)
    poisoned = args._replace(weight_hh=args.weight_hh * math.nan)
    assert torch.equal(rnn_cell(*poisoned, nonlinearity), expected)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("size", [(3, 7, 5), (6, 1030, 70), (200, 90, 130)], ids=str)
def test_results_are_bitwise_the_same_from_run_to_run(size, dtype, device):
    args = random_arguments(*size, dtype=dtype, device=device)
    grad_output = torch.randn(size[0], size[2]).to(device, dtype)
    first = output_and_gradients(rnn_cell, args, "tanh", grad_output)
    for _ in range(5):
        again = output_and_gradients(rnn_cell, args, "tanh", grad_output)
        assert all(torch.equal(again[name], first[name]) for name in first)


# Enough work for several threads, not so much that a library takes it, which may add up differently.
SHARED_WORK = [(1, 1000, 150), (60, 40, 40)] if _C.cpu_capability() == "default" else [(1, 2000, 300), (200, 90, 130)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SHARED_WORK, ids=str)
def test_results_are_bitwise_the_same_for_any_number_of_threads(size, dtype):
    args = random_arguments(*size, dtype=dtype)
    grad_output = torch.randn(size[0], size[2], dtype=dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 8):
            torch.set_num_threads(n)
            results.append(output_and_gradients(rnn_cell, args, "tanh", grad_output))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(other[name], results[0][name]) for name in other)


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_a_row_does_not_depend_on_the_rest_of_its_batch(nonlinearity, device):
    """A NaN in one row of the batch must leave every other row as it was (no read past a row's end)."""
    args = random_arguments(70, 33, 65, dtype=torch.float32, device=device)
    expected = rnn_cell(*args, nonlinearity)
    args.input[40] = math.nan
    result = rnn_cell(*args, nonlinearity)
    others = torch.arange(70) != 40
    assert result[40].isnan().all()
    assert torch.equal(result[others], expected[others])


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("size", [(3, 7, 5), (41, 33, 65)], ids=str)
def test_gaps_between_rows_stay_out_of_the_results(size, dtype, device):
    """Vectors and pairs of terms past a row's end may not even be multiplied by zero: the gaps hold NaN."""
    args = random_arguments(*size, dtype=dtype, device=device).map(row_slice)
    grad_output = row_slice(torch.randn(size[0], size[2]).to(device, dtype))
    for name, result in output_and_gradients(rnn_cell, args, "tanh", grad_output).items():
        assert result.isfinite().all(), name


def test_arguments_are_left_unchanged(device):
    args = random_arguments(dtype=torch.float32, device=device)
    before = args.map(torch.clone)
    output_and_gradients(rnn_cell, args, "tanh", torch.ones(3, 5, device=device))
    assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True))


def test_a_recurrence_over_many_steps_follows_eager(device):
    """Errors must not build up over the steps of a sequence, nor gradients on the way back through it."""
    args = random_arguments(8, 16, 32, dtype=torch.float64, device=device)
    steps = torch.randn(50, 8, 16, dtype=torch.float64).to(device)

    def run(cell):
        leaves = args.leaves()
        hx = leaves.hx
        for step in steps:
            hx = cell(step, hx, *leaves[2:])
        return hx, torch.autograd.grad(hx.sum(), leaves[1:])

    torch.testing.assert_close(run(rnn_cell), run(eager_cell))
