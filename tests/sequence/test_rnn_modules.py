"""An RNN is a module as nn.RNN is: its parameters may be saved, copied, replaced, moved, tied, normed and pruned."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from references import seeded
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnn_ext

T, B, I, H = 6, 4, 3, 5  # noqa: E741
OPTIONS = {
    "plain": {},
    "stacked_both_ways": {"num_layers": 2, "bidirectional": True, "batch_first": True, "dropout": 0.2},
    "no_bias": {"num_layers": 3, "bias": False, "nonlinearity": "relu"},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
X = torch.sin(torch.arange(T * B * I, dtype=torch.float32)).view(T, B, I)


def pair(**options) -> tuple[nn.RNN, rnn_ext.RNN]:
    return seeded(nn.RNN, I, H, **options), seeded(rnn_ext.RNN, I, H, **options)


def run(rnn: nn.RNN, x: Tensor = X) -> list[Tensor]:
    """The outputs, and the gradients of the parameters."""
    output, h_n = rnn(x)
    return [output, h_n, *torch.autograd.grad(output.sum() + h_n.sum(), list(rnn.parameters()))]


# Parameters


@every_option
def test_parameters_and_their_draws_are_nn_rnns(options):
    theirs, ours = pair(**options)
    assert isinstance(ours, nn.RNN)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for (name, p), (their_name, their_p) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == their_name and torch.equal(p, their_p)
    assert repr(ours) == repr(theirs)
    assert [[tuple(p.shape) for p in layer] for layer in ours.all_weights] == [
        [tuple(p.shape) for p in layer] for layer in theirs.all_weights
    ]
    assert all(p is q for p, q in zip(ours._flat_weights, ours.parameters(), strict=True))
    torch.manual_seed(0)
    theirs.reset_parameters()
    torch.manual_seed(0)
    ours.reset_parameters()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


@every_option
def test_state_dicts_load_both_ways(options):
    theirs, ours = seeded(nn.RNN, I, H, **options), rnn_ext.RNN(I, H, **options).eval()
    ours.load_state_dict(theirs.eval().state_dict())
    torch.testing.assert_close(run(ours), run(theirs))
    theirs.load_state_dict(rnn_ext.RNN(I, H, **options).state_dict())


def test_attributes_are_nn_rnns():
    for options in OPTIONS.values():
        theirs, ours = (rnn.__dict__ for rnn in pair(**options))
        plain = {
            k for k, v in theirs.items() if isinstance(v, (int, float, str, bool, list)) and "weight_refs" not in k
        }
        assert {k: ours[k] for k in plain if k != "_flat_weights"} == {
            k: theirs[k] for k in plain if k != "_flat_weights"
        }
        assert ours.keys() == theirs.keys()


@pytest.mark.parametrize("nonlinearity", ["tanh", "sigmoid"])
@every_option
def test_a_copy_is_an_independent_rnn_with_the_same_output(options, nonlinearity):
    rnn = seeded(rnn_ext.RNN, I, H, **(options | {"nonlinearity": nonlinearity})).eval()
    file = io.BytesIO()
    torch.save(rnn, file)
    file.seek(0)
    for copied in (copy.deepcopy(rnn), pickle.loads(pickle.dumps(rnn)), torch.load(file, weights_only=False)):
        assert type(copied) is rnn_ext.RNN
        torch.testing.assert_close(run(copied), run(rnn))
        with torch.no_grad():
            copied.weight_hh_l0.zero_()
        assert not torch.equal(copied(X)[0], rnn(X)[0])


def test_an_old_pickle_loads():
    """As torch 1.3 wrote them: all_weights in place of _all_weights, and no proj_size."""
    theirs, ours = pair(num_layers=2)
    loaded = []
    for rnn in (theirs, ours):
        state = rnn.__getstate__()
        state["all_weights"] = state.pop("_all_weights")
        del state["proj_size"]
        new = type(rnn).__new__(type(rnn))
        new.__setstate__(state)
        loaded.append(new)
    torch.testing.assert_close(run(loaded[1]), run(loaded[0]))


def test_functional_call_uses_the_given_parameters():
    theirs, ours = pair(num_layers=2)
    for dtype in (torch.float32, torch.float64):
        parameters = {k: torch.randn_like(p, dtype=dtype) for k, p in ours.named_parameters()}
        expected = functional_call(theirs, parameters, X.to(dtype))
        torch.testing.assert_close(functional_call(ours, parameters, X.to(dtype)), expected)
    torch.testing.assert_close(run(ours), run(theirs))


def test_replaced_parameters_are_used_by_the_next_call():
    theirs, ours = pair()
    for rnn in (theirs, ours):
        rnn(X)
        rnn.weight_hh_l0 = nn.Parameter(torch.eye(H))
        rnn.bias_ih_l0.data = torch.ones(H)
    torch.testing.assert_close(run(ours), run(theirs))
    assert ours._flat_weights[1] is ours.weight_hh_l0


def test_weights_may_be_tied_between_layers_and_directions():
    theirs, ours = pair(num_layers=1, bidirectional=True)
    for rnn in (theirs, ours):
        rnn.weight_hh_l0_reverse = rnn.weight_hh_l0
    assert len(list(ours.parameters())) == 7
    torch.testing.assert_close(run(ours), run(theirs))


def test_to_and_to_empty_move_every_parameter():
    for options in OPTIONS.values():
        ours = seeded(rnn_ext.RNN, I, H, **options).eval()
        expected = run(ours)
        empty = rnn_ext.RNN(I, H, **options, device="meta").eval()
        assert empty(X.to("meta"))[0].shape == expected[0].shape
        empty = empty.to_empty(device="cpu")
        empty.load_state_dict(ours.state_dict())
        torch.testing.assert_close(run(empty), expected)
        double = ours.double()
        torch.testing.assert_close(run(double, X.double()), [t.double() for t in expected], rtol=1e-5, atol=1e-5)
        assert all(p is q for p, q in zip(double._flat_weights, double.parameters(), strict=True))


def test_a_replica_for_data_parallel_reads_its_own_parameters():
    ours = seeded(rnn_ext.RNN, I, H, 2)
    replica = ours._replicate_for_data_parallel()
    assert replica._flat_weights is not ours._flat_weights
    for name, p in ours.named_parameters():
        setattr(replica, name, p.detach() * 2)
    doubled = {name: p * 2 for name, p in ours.named_parameters()}
    torch.testing.assert_close(replica(X), functional_call(ours, doubled, X))


# Parametrizations and pruning


@pytest.mark.filterwarnings("ignore:.*deprecated", "ignore:`torch.nn.utils.weight_norm`")
@pytest.mark.parametrize("kind", ["weight_norm", "old_weight_norm", "spectral_norm", "orthogonal", "pruning"])
def test_normed_and_pruned_weights_train_as_in_nn_rnn(kind):
    def changed(rnn: nn.RNN) -> nn.RNN:
        if kind == "old_weight_norm":
            return nn.utils.weight_norm(rnn, "weight_hh_l0")
        if kind == "pruning":
            return prune.l1_unstructured(rnn, "weight_hh_l0", amount=0.5)
        torch.manual_seed(1)
        return getattr(parametrizations, kind)(rnn, "weight_hh_l0")

    results = []
    for rnn in map(changed, pair(num_layers=2, dtype=torch.float64)):
        rnn.train(kind != "spectral_norm")  # nn.RNN reads a weight more than once a call, and so iterates more often
        optimizer = torch.optim.SGD(rnn.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            rnn(X.double())[0].pow(2).sum().backward()
            optimizer.step()
        results.append([rnn(X.double())[0], *rnn.parameters()])
    torch.testing.assert_close(*results)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def forward(self, weight: Tensor) -> Tensor:
        self.reads += 1
        return weight


@every_option
def test_each_weight_is_read_once_a_call(options):
    """Spectral norm's power iteration takes a step at each read."""
    rnn = seeded(rnn_ext.RNN, I, H, **options)
    counts = {}
    for name, _ in list(rnn.named_parameters()):
        counts[name] = Counting()
        parametrize.register_parametrization(rnn, name, counts[name])
    packed = pack_padded_sequence(
        X.transpose(0, 1) if rnn.batch_first else X, torch.tensor([6, 4, 2, 1]), rnn.batch_first
    )
    lengths = [1] * X.size(0 if rnn.batch_first else 1)
    for args, kwargs in (((X,), {}), ((X[:, 0],), {}), ((packed,), {}), ((X,), {"lengths": lengths})):
        for counter in counts.values():
            counter.reads = 0
        rnn(*args, **kwargs)
        assert {c.reads for c in counts.values()} == {1}
    for counter in counts.values():
        counter.reads = 0
    with forward_ad.dual_level():  # which the kernels don't take
        rnn(forward_ad.make_dual(X, X))
    assert {c.reads for c in counts.values()} == {1}


def test_a_patched_getattr_and_plain_attributes_count():
    class Doubled(rnn_ext.RNN):
        def __getattr__(self, name):
            value = super().__getattr__(name)
            return value * 2 if name == "weight_hh_l0" else value

    ours = seeded(Doubled, I, H)
    doubled = {"weight_hh_l0": ours._parameters["weight_hh_l0"] * 2}
    torch.testing.assert_close(ours(X), functional_call(seeded(nn.RNN, I, H), doubled, X))


# Calls


@every_option
def test_hooks_see_and_change_what_nn_rnns_do(options):
    results = []
    for rnn in pair(**options):
        rnn.eval()
        seen = []
        rnn.register_forward_pre_hook(lambda m, args: (args[0] * 2, *args[1:]))
        rnn.register_forward_hook(lambda m, args, output, seen=seen: seen.append(output) or (output[0] + 1, output[1]))
        rnn.register_full_backward_hook(lambda m, gi, go, seen=seen: seen.extend(go))
        x = X.clone().requires_grad_()
        output, h_n = rnn(x)
        (output.sum() + h_n.sum()).backward()
        results.append([output, h_n, *seen[0], *seen[1:], x.grad])
    torch.testing.assert_close(*results)


def test_autocast_gives_nn_rnns_dtypes_and_casts_weights_once():
    theirs, ours = pair(num_layers=2, bidirectional=True)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            results = [run(rnn) for rnn in (theirs, ours)]
        assert [t.dtype for t in results[1]] == [t.dtype for t in results[0]]
        tolerance = 4 * torch.finfo(dtype).eps  # of gradients that are sums over all steps
        torch.testing.assert_close(results[1], results[0], rtol=tolerance, atol=tolerance * T)


@pytest.mark.parametrize("kind", ["packed", "lengths", "nested"])
def test_autocast_reaches_every_kind_of_input(kind):
    theirs, ours = pair(num_layers=2)
    lengths = [6, 4, 2, 1]
    packed = pack_padded_sequence(X, torch.tensor(lengths))
    rows = torch.nested.nested_tensor([X[:n, row] for row, n in enumerate(lengths)], layout=torch.jagged)
    args, kwargs = {"packed": ((packed,), {}), "lengths": ((X,), {"lengths": lengths}), "nested": ((rows,), {})}[kind]
    with torch.autocast("cpu", torch.bfloat16):
        output, h_n = ours(*args, **kwargs)
        expected = theirs(packed)
    data = output.data if kind == "packed" else output.values() if kind == "nested" else output
    assert data.dtype == expected[0].data.dtype == torch.bfloat16
    assert h_n.dtype == expected[1].dtype
    torch.testing.assert_close(h_n, expected[1], rtol=0.05, atol=0.05)
    gradients = torch.autograd.grad(data.sum() + h_n.sum(), list(ours.parameters()))
    assert {g.dtype for g in gradients} == {torch.float32}


def test_the_eager_call_runs_the_operator_and_no_product_of_atens():
    rnn = seeded(rnn_ext.RNN, I, H)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        rnn(X)[0].sum().backward()
    names = {event.name for event in profile.events()}
    assert {"rnn_ext::rnn_layer", "rnn_ext::rnn_layer_backward"} <= names
    assert not names & {"aten::mm", "aten::addmm", "aten::linear", "aten::rnn_tanh"}


def test_vmap_grad_and_jvp_give_what_a_loop_gives():
    rnn = seeded(rnn_ext.RNN, I, H, 2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(3, T, B, I, dtype=torch.float64)
    parameters = dict(rnn.named_parameters())

    def loss(parameters, x):
        output, h_n = functional_call(rnn, parameters, (x,))
        return output.pow(2).sum() + h_n.sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(3):
        expected = torch.autograd.grad(loss(parameters, x[i]), list(parameters.values()))
        torch.testing.assert_close([t[i] for t in per_sample.values()], list(expected))
    tangent = torch.randn_like(x[0])
    _, slope = torch.func.jvp(lambda x: loss(parameters, x), (x[0],), (tangent,))
    (gradient,) = torch.autograd.grad(loss(parameters, leaf := x[0].clone().requires_grad_()), leaf)
    torch.testing.assert_close(slope, (gradient * tangent).sum())


def test_checkpointing_gives_the_same_gradients():
    rnn = seeded(rnn_ext.RNN, I, H, 2, dropout=0.5)
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        x = X.clone().requires_grad_()
        call = torch.utils.checkpoint.checkpoint if checkpointed else lambda f, x, use_reentrant: f(x)
        output, _ = call(rnn, x, use_reentrant=False)
        results.append(torch.autograd.grad(output.sum(), [x, *rnn.parameters()]))
    torch.testing.assert_close(*results)


def test_symbolic_tracing_takes_an_rnn_for_a_leaf():
    model = nn.ModuleDict({"rnn": seeded(rnn_ext.RNN, I, H)})

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner["rnn"](x.relu(), lengths=[1, 2, 3, 4])[0] + 1

    traced = torch.fx.symbolic_trace(Model())
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["inner.rnn"]
    torch.testing.assert_close(traced(X), Model()(X))


@pytest.mark.filterwarnings("ignore:.*deprecated", "ignore:Converting a tensor")
def test_a_traced_rnn_gives_the_same_output():
    for options in OPTIONS.values():
        rnn = seeded(rnn_ext.RNN, I, H, **options).eval()
        torch.testing.assert_close(torch.jit.trace(rnn, (X,))(X), rnn(X))


def test_no_call_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rnn = rnn_ext.RNN(I, H, 2, bidirectional=True)
        rnn(X)[0].sum().backward()
        rnn.double()(X.double(), lengths=[1, 2, 3, 4])


# Elman's network


@pytest.mark.parametrize("readout_bias", [False, True])
@every_option
def test_elmans_network_is_an_rnn_and_a_linear_readout(options, readout_bias):
    network = seeded(rnn_ext.ElmanNetwork, I, H, 2, readout_bias=readout_bias, **options).eval()
    assert isinstance(network.rnn, rnn_ext.RNN) and isinstance(network.readout, nn.Linear)
    assert (network.readout.bias is not None) == readout_bias
    directions = 2 if options.get("bidirectional") else 1
    assert network.readout.weight.shape == (2, directions * H)
    x = X.transpose(0, 1) if network.rnn.batch_first else X
    lengths = [4, 6, 1, 0]
    output, h_n = network.rnn(x)
    torch.testing.assert_close(network(x), (network.readout(output), h_n))
    torch.testing.assert_close(network(x, h_n), (network.readout(network.rnn(x, h_n)[0]), network.rnn(x, h_n)[1]))
    y, _ = network(x, lengths=lengths)
    expected = network.readout(network.rnn(x, lengths=lengths)[0])
    for row, n in enumerate(lengths):
        ours, theirs = (t[row] if network.rnn.batch_first else t[:, row] for t in (y, expected))
        torch.testing.assert_close(ours[:n], theirs[:n])
        assert not ours[n:].any()
    rows = torch.nested.nested_tensor([X[:n, row] for row, n in enumerate(lengths)], layout=torch.jagged)
    of_rows = expected.unbind(0 if network.rnn.batch_first else 1)
    for ours, n, theirs in zip(network(rows)[0].unbind(), lengths, of_rows, strict=True):
        torch.testing.assert_close(ours, theirs[:n])
    packed = pack_padded_sequence(x, torch.tensor([4, 6, 1, 2]), network.rnn.batch_first, enforce_sorted=False)
    y, _ = network(packed)
    assert isinstance(y, PackedSequence)
    torch.testing.assert_close(y.data, network.readout(network.rnn(packed)[0].data))
    unbatched, _ = network(X[:, 0])
    torch.testing.assert_close(unbatched, network.readout(network.rnn(X[:, 0])[0]))
