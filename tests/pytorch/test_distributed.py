"""Distributed training: two gloo processes on the CPU compute what one process does with nn.RNNCell."""

from __future__ import annotations

import datetime
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist
from entries import first, operators_run
from references import seeded
from torch import Tensor, nn

import rnn_ext

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("this build of torch has no gloo", allow_module_level=True)

WORLD = 2
BATCH, INPUT, HIDDEN, STEPS = 6, 4, 5, 3


def join(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # A rank that waits for one that failed gives up after the timeout.
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD, timeout=timeout)


@pytest.fixture(scope="module")
def on_both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., list[Any]]]:
    """Runs a function of this file in both processes at once, and returns what each of them does."""
    store = str(tmp_path_factory.mktemp("gloo") / "store")
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit locks of threads that it doesn't have
    pools = [ProcessPoolExecutor(1, spawn, join, (rank, store)) for rank in range(WORLD)]
    yield lambda f, *args: [future.result() for future in [pool.submit(f, *args) for pool in pools]]
    for pool in pools:
        pool.submit(dist.destroy_process_group)
        pool.shutdown()


class Cells(nn.Module):
    """Two cells over a sequence; the second one starts without hx."""

    def __init__(self, theirs: bool = False) -> None:
        super().__init__()
        cls = nn.RNNCell if theirs else rnn_ext.RNNCell
        self.lower, self.upper = cls(INPUT, HIDDEN), cls(HIDDEN, HIDDEN, nonlinearity="relu")

    def forward(self, steps: Tensor) -> Tensor:
        h = None
        for step in steps.unbind(1):
            h = self.lower(step, h)
        return self.upper(h)


class Sequences(nn.Module):
    """Two networks over a sequence; the second one begins with the states in which the first one ends."""

    def __init__(self, theirs: bool = False) -> None:
        super().__init__()
        cls = nn.RNN if theirs else rnn_ext.RNN
        self.lower = cls(INPUT, HIDDEN, 2, batch_first=True)
        self.upper = cls(HIDDEN, HIDDEN, bidirectional=True, nonlinearity="relu", batch_first=True)

    def forward(self, steps: Tensor) -> Tensor:
        output, h_n = self.lower(steps)
        return self.upper(output, h_n)[0]


# The operator of each, and how often it runs in a forward pass.
OPERATORS = {Cells: ("rnn_ext::rnn_cell", STEPS + 1), Sequences: ("rnn_ext::rnn_layer", 4)}
every_model = pytest.mark.parametrize("model", OPERATORS, ids=["cells", "sequences"])


def batch() -> Tensor:
    return torch.randn(BATCH, STEPS, INPUT, generator=torch.Generator().manual_seed(1))


def mine(t: Tensor) -> Tensor:
    """The rows of this process."""
    return t.chunk(WORLD)[dist.get_rank()]


def train(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Two steps of SGD: the gradients of the second, which see the parameters that the first has left."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).pow(2).mean().backward()
        optimizer.step()
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}


def in_one_process(model: type[nn.Module]) -> dict[str, Tensor]:
    return train(seeded(model, theirs=True), batch())


# DistributedDataParallel


def train_by_ddp(cls: type[nn.Module], views: bool) -> dict[str, Tensor]:
    model = seeded(cls)
    model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=views, static_graph=views)
    return train(model, mine(batch()))


@pytest.mark.parametrize("views", [False, True], ids=["plain", "gradients_as_views"])
@every_model
def test_ddp_gradients_equal_one_processs(model, views, on_both):
    """A cell without hx gives its weight_hh zeros, not None, which spares DDP the search for unused parameters."""
    for gradients in on_both(train_by_ddp, model, views):
        torch.testing.assert_close(gradients, in_one_process(model))


# FSDP2


def train_by_fsdp(cls: type[nn.Module], low: bool) -> tuple[dict[str, Tensor], list[str]]:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import DTensor, init_device_mesh

    mesh = init_device_mesh("cpu", (WORLD,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if low else None, reduce_dtype=torch.float32)
    model = seeded(cls)
    for part in (model.lower, model.upper, model):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    results = {}
    names = operators_run(lambda: results.update(train(model, mine(batch()))))
    return {name: g.full_tensor() for name, g in results.items()}, names


@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
@every_model
def test_fsdp_gradients_equal_one_processs_and_come_from_the_operators(model, low, on_both):
    # Parameters, hidden states and their gradients, of unit size, are rounded to bfloat16 a dozen times.
    tolerance = {"rtol": 16 * torch.finfo(torch.bfloat16).eps, "atol": 0.01} if low else {}
    operator, calls = OPERATORS[model]
    for gradients, names in on_both(train_by_fsdp, model, low):
        torch.testing.assert_close(gradients, in_one_process(model), **tolerance)
        assert (names.count(operator), names.count(f"{operator}_backward")) == (2 * calls, 2 * calls)


# DTensor


def output_and_gradients(cell: nn.Module, inputs: list[Tensor], differentiated: str) -> list[Tensor]:
    """Of the inputs, of the parameters or of both ("all")."""
    leaves = [t.detach().requires_grad_(differentiated != "parameters") for t in inputs]
    cell.requires_grad_(differentiated != "inputs")
    output = first(cell(*leaves))
    wanted = [t for t in (*leaves, *cell.parameters()) if t.requires_grad]
    return [output.detach(), *torch.autograd.grad(output.pow(2).sum(), wanted)]


# A cell, or a layer of each direction; where the batch of each input is, and how many results are shards of it.
SHARDED = {
    "cell": (rnn_ext.RNNCell, {}, (0, 0)),
    "sequence": (rnn_ext.RNN, {}, (1, 1)),
    "sequence_batch_first": (rnn_ext.RNN, {"batch_first": True, "bidirectional": True}, (0, 1)),
}
every_sharded = pytest.mark.parametrize("kind", SHARDED)


def inputs(kind: str, hx: bool) -> list[Tensor]:
    cls, options, (dim, _) = SHARDED[kind]
    x = batch()[:, 0] if cls is rnn_ext.RNNCell else batch().transpose(0, dim).contiguous()
    layers = 2 if options.get("bidirectional") else 1
    state = torch.linspace(-1, 1, layers * BATCH * HIDDEN).view(layers, BATCH, HIDDEN)
    return [x, state[0] if cls is rnn_ext.RNNCell else state] if hx else [x]


def on_dtensors(kind: str, shard: str, differentiated: str, hx: bool) -> tuple[list[Tensor], list[str], list[str]]:
    """The results, how each is placed, and the operators that ran."""
    from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (WORLD,))

    def shard_weights(name: str, cell: nn.Module, mesh: Any) -> None:
        for key, p in list(cell.named_parameters()):
            setattr(cell, key, nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])))

    cls, options, dims = SHARDED[kind]
    cell = seeded(cls, INPUT, HIDDEN, **options)
    cell = distribute_module(cell, mesh, shard_weights if shard == "weights" else None)
    placements = [Shard(dim) if shard == "batch" else Replicate() for dim in dims]
    shards = [
        distribute_tensor(t, mesh, [placement]) for t, placement in zip(inputs(kind, hx), placements, strict=False)
    ]
    results: list[Any] = []
    names = operators_run(lambda: results.extend(output_and_gradients(cell, shards, differentiated)))
    return [t.full_tensor() for t in results], [str(t.placements[0]) for t in results], names


@pytest.mark.parametrize("hx", [True, False], ids=["hx", "no_hx"])
@pytest.mark.parametrize("differentiated", ["all", "inputs", "parameters"])
@every_sharded
def test_dtensors_with_a_sharded_batch_go_through_the_operators(kind, differentiated, hx, on_both):
    """Each process computes its rows, without communication: weight gradients stay partial sums."""
    cls, options, dims = SHARDED[kind]
    module = seeded(cls.__base__, INPUT, HIDDEN, **options)
    expected = output_and_gradients(module, inputs(kind, hx), differentiated)
    of_inputs = [] if differentiated == "parameters" else [f"S({dim})" for dim in dims[: 1 + hx]]
    of_parameters = 0 if differentiated == "inputs" else len(list(module.parameters()))
    for results, placements, names in on_both(on_dtensors, kind, "batch", differentiated, hx):
        torch.testing.assert_close(results, expected)
        assert placements == [f"S({dims[0]})", *of_inputs, *["P(sum)"] * of_parameters]
        operator = "rnn_ext::rnn_cell" if kind == "cell" else "rnn_ext::rnn_layer"
        assert {operator, f"{operator}_backward"} <= set(names)
        assert not [name for name in names if "gather" in name or "reduce" in name]


@pytest.mark.slow
def test_dtensors_with_sharded_weights_give_nn_rnncells_results(on_both):
    """The operators have no rule for those; ATen's have."""
    expected = output_and_gradients(seeded(nn.RNNCell, INPUT, HIDDEN), inputs("cell", True), "all")
    for results, _, names in on_both(on_dtensors, "cell", "weights", "all", True):
        torch.testing.assert_close(results, expected)
        assert "rnn_ext::rnn_cell" not in names
