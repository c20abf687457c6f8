"""torch.export and AOTInductor, and the older ways to take a graph: torch.fx and TorchScript."""

from __future__ import annotations

import io
import operator

import pytest
import torch
from references import NONLINEARITIES, random_arguments
from torch import Tensor, nn
from torch._decomp import get_decompositions
from torch.fx.experimental.proxy_tensor import make_fx

import rnn_ext

rnn_cell_op = torch.ops.rnn_ext.rnn_cell
rnn_cell_backward_op = torch.ops.rnn_ext.rnn_cell_backward

BATCH = torch.export.Dim("batch")


def exported_cell(
    device: str, *, hx: bool = True, strict: bool = False
) -> tuple[nn.Module, torch.export.ExportedProgram]:
    cell = rnn_ext.RNNCell(7, 5, device=device)
    inputs = (torch.randn(3, 7, device=device), torch.randn(3, 5, device=device))[: 2 if hx else 1]
    shapes = tuple({0: BATCH} for _ in inputs)
    return cell, torch.export.export(cell, inputs, dynamic_shapes=shapes, strict=strict)


def called(graph_module: torch.fx.GraphModule) -> list:
    return [node.target for node in graph_module.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("hx", [True, False], ids=["hx", "no_hx"])
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
def test_an_exported_cell_is_the_operator_and_takes_any_batch(strict, hx, device):
    cell, program = exported_cell(device, hx=hx, strict=strict)
    assert called(program.graph_module) == [rnn_cell_op.default]
    assert called(program.run_decompositions().graph_module) == [rnn_cell_op.default]
    for batch in (1, 3, 8):
        inputs = [torch.randn(batch, n, device=device) for n in (7, 5)][: 2 if hx else 1]
        torch.testing.assert_close(program.module()(*inputs), cell(*inputs))


def test_an_exported_cell_is_saved_loaded_and_trained(device):
    cell, program = exported_cell(device)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    x, hx = torch.randn(4, 7, device=device), torch.randn(4, 5, device=device)
    for module in (cell, loaded):
        module(x, hx).sum().backward()
    torch.testing.assert_close(
        {name: p.grad for name, p in loaded.named_parameters()},
        {name: p.grad for name, p in cell.named_parameters()},
    )


def test_an_exported_cell_is_transformed_as_the_cell(device):
    """Its graph calls the operator, which must know what rnn_cell does."""
    cell, program = exported_cell(device, hx=False)
    x = torch.randn(3, 7, device=device)
    for transform in (torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        torch.testing.assert_close(transform(program.module())(x), transform(cell)(x))


def test_an_exported_rnn_is_the_operator_and_takes_any_length_and_batch():
    rnn = rnn_ext.RNN(3, 4, num_layers=2, bidirectional=True)
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    exported = torch.export.export(rnn, (torch.randn(6, 5, 3),), dynamic_shapes={"input": dynamic})
    targets = [node.target for node in exported.graph.nodes]
    assert targets.count(torch.ops.rnn_ext.rnn_layer.default) == 4
    for steps, batch in ((6, 5), (9, 2), (2, 7)):
        x = torch.randn(steps, batch, 3)
        torch.testing.assert_close(exported.module()(x), rnn(x))


class Network(nn.Module):
    """A cell above two layers of both directions."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.rnn = rnn_ext.RNN(7, 4, 2, bidirectional=True, device=device)
        self.cell = rnn_ext.RNNCell(8, 5, device=device)

    def forward(self, x: Tensor, lengths: Tensor, hx: Tensor) -> tuple[Tensor, Tensor]:
        output, h_n = self.rnn(x, lengths=lengths)
        return self.cell(output[0], hx), h_n


def of_network(steps: int, batch: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    lengths = torch.arange(batch) % (steps + 1)
    return torch.randn(steps, batch, 7, device=device), lengths, torch.randn(batch, 5, device=device)


NETWORK_SHAPES = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}, *[{0: torch.export.Dim.DYNAMIC}] * 2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_an_exported_network_is_compiled_ahead_of_time_by_aotinductor(device, tmp_path):
    """For any number of steps and any batch."""
    network = Network(device)
    program = torch.export.export(network, of_network(6, 4, device), dynamic_shapes=NETWORK_SHAPES)
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "network.pt2"))
    loaded = torch._inductor.aoti_load_package(package)
    for sizes in ((6, 4), (9, 2), (2, 8)):
        inputs = of_network(*sizes, device)
        torch.testing.assert_close(loaded(*inputs), network(*inputs))


# Consumers that know ATen alone


def lowered(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    table = torch.export.default_decompositions()
    table.update(get_decompositions([rnn_cell_op, rnn_cell_backward_op]))
    return program.run_decompositions(table)


@pytest.mark.parametrize("hx", [True, False], ids=["hx", "no_hx"])
def test_decompositions_lower_an_exported_cell_to_aten(hx, device):
    cell, program = exported_cell(device, hx=hx)
    program = lowered(program)
    assert {target.namespace for target in called(program.graph_module)} == {"aten"}
    for batch in (1, 3, 8):
        inputs = [torch.randn(batch, n, device=device) for n in (7, 5)][: 2 if hx else 1]
        torch.testing.assert_close(program.module()(*inputs), cell(*inputs))


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize("unbatched", [True, False], ids=["unbatched", "batched"])
@pytest.mark.parametrize("hx", [True, False], ids=["hx", "no_hx"])
def test_decompositions_compute_what_the_operators_do(hx, unbatched, nonlinearity, device):
    args = random_arguments(device=device, hx=hx)
    if unbatched:
        args = args._replace(input=args.input[0], hx=args.hx[0] if hx else None)
    output = rnn_cell_op(*args, nonlinearity)
    calls = [
        (rnn_cell_op, (*args, nonlinearity)),
        (rnn_cell_backward_op, (torch.randn_like(output), output, *args[:4], nonlinearity, [True, hx, *[True] * 4])),
    ]
    for op, arguments in calls:
        table = get_decompositions([op])
        traced = make_fx(lambda *args, op=op: op(*args), decomposition_table=table)(*arguments)
        assert all(target.namespace == "aten" for target in called(traced) if target is not operator.getitem)
        torch.testing.assert_close(traced(*arguments), op(*arguments))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("hx", [True, False], ids=["hx", "no_hx"])
@pytest.mark.parametrize("dynamo", [True, False], ids=["torch_export", "torchscript"])
def test_a_cell_exported_to_onnx_gives_eager_results_for_any_batch(dynamo, hx, tmp_path):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    cell = rnn_ext.RNNCell(7, 5).eval()
    inputs = (torch.randn(3, 7), torch.randn(3, 5))[: 2 if hx else 1]
    names = ["input", "hx"][: len(inputs)]
    if dynamo:
        dynamic = {"dynamic_shapes": tuple({0: BATCH} for _ in inputs)}
    else:
        dynamic = {"dynamic_axes": {name: {0: "batch"} for name in names}}
    file = tmp_path / "cell.onnx"
    torch.onnx.export(cell, inputs, file, input_names=names, dynamo=dynamo, **dynamic)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for batch in (1, 3, 8):
        inputs = [torch.randn(batch, n) for n in (7, 5)][: len(names)]
        (output,) = session.run(None, dict(zip(names, (t.numpy() for t in inputs), strict=True)))
        torch.testing.assert_close(torch.from_numpy(output), cell(*inputs).detach())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_network_exported_to_onnx_holds_onnxs_rnn_and_takes_any_steps_and_batch(tmp_path):
    """With lengths, of which some are 0; ATen's operators would be some for each step of one T."""
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    network, file = Network().eval(), tmp_path / "network.onnx"
    exported = torch.onnx.export(
        network, of_network(6, 4), dynamo=True, dynamic_shapes=NETWORK_SHAPES, input_names=["x", "lengths", "hx"]
    )
    assert [node.op_type for node in exported.model.graph].count("RNN") == 4
    exported.save(file)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for sizes in ((6, 4), (9, 2), (2, 8)):
        inputs = of_network(*sizes)
        found = session.run(None, {name: t.numpy() for name, t in zip(("x", "lengths", "hx"), inputs, strict=True)})
        torch.testing.assert_close([torch.from_numpy(t) for t in found], list(network(*inputs)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "options",
    [{"nonlinearity": "sigmoid", "batch_first": True}, {"nonlinearity": "relu", "bias": False}],
    ids=["sigmoid_batch_first", "relu_no_bias"],
)
def test_an_rnn_exported_to_onnx_gives_eager_results(options, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    rnn, x = rnn_ext.RNN(7, 5, **options).eval(), torch.randn(6, 3, 7)
    hx = torch.randn(1, 6 if rnn.batch_first else 3, 5)
    torch.onnx.export(rnn, (x, hx), tmp_path / "rnn.onnx", dynamo=True, input_names=["x", "hx"])
    session = onnxruntime.InferenceSession(tmp_path / "rnn.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": x.numpy(), "hx": hx.numpy()})
    torch.testing.assert_close([torch.from_numpy(t) for t in found], list(rnn(x, hx)))


class Model(nn.Module):
    def __init__(self, device: str = "cpu", bias: bool = True, nonlinearity: str = "tanh") -> None:
        super().__init__()
        self.cell = rnn_ext.RNNCell(7, 5, bias, nonlinearity, device)

    def forward(self, x: Tensor, hx: Tensor | None = None) -> Tensor:
        return self.cell(x, hx) + 1


# fx


@pytest.mark.parametrize("module", [lambda d: rnn_ext.RNNCell(7, 5, device=d), Model], ids=["cell", "model"])
def test_fx_traces_the_cell_as_one_call(module, device):
    """nn.RNNCell, too, is a leaf where a model contains it."""
    module = module(device)
    traced = torch.fx.symbolic_trace(module)
    assert called(traced)[0] is rnn_ext.rnn_cell
    for inputs in (
        (torch.randn(3, 7, device=device), torch.randn(3, 5, device=device)),
        (torch.randn(7, device=device),),
    ):
        torch.testing.assert_close(traced(*inputs), module(*inputs))
    traced(*inputs).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_traces_the_operator(mode, device):
    args = random_arguments(device=device)
    traced = make_fx(lambda *args: rnn_ext.rnn_cell(*args), tracing_mode=mode)(*args)
    assert called(traced) == [rnn_cell_op.default]
    torch.testing.assert_close(traced(*args), rnn_ext.rnn_cell(*args))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_traces_the_layers_operators_both_ways(mode):
    rnn, x = rnn_ext.RNN(7, 5), torch.randn(6, 3, 7)

    def gradients(x, *parameters):
        return torch.autograd.grad(rnn_ext.rnn_layer(x, None, *parameters)[0].pow(2).sum(), parameters)

    traced = make_fx(gradients, tracing_mode=mode)(x, *rnn.parameters())
    targets = called(traced)
    assert targets.count(torch.ops.rnn_ext.rnn_layer.default) == 1
    assert targets.count(torch.ops.rnn_ext.rnn_layer_backward.default) == 1
    torch.testing.assert_close(traced(x, *rnn.parameters()), gradients(x, *rnn.parameters()))


# TorchScript

no_deprecation = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@no_deprecation
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_a_scripted_model_calls_the_operator_and_trains(nonlinearity, bias, device):
    model = Model(device, bias, nonlinearity)
    scripted = torch.jit.script(model)
    assert "rnn_ext::rnn_cell" in str(scripted.inlined_graph)
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    x, hx = torch.randn(3, 7, device=device), torch.randn(3, 5, device=device)
    for inputs in ((x, hx), (x,), (x[0], hx[0])):
        results = []
        for module in (model, scripted, loaded):
            output = module(*inputs)
            results.append([output, list(torch.autograd.grad(output.sum(), list(module.parameters())))])
        torch.testing.assert_close(results[1], results[0])
        torch.testing.assert_close(results[2], results[0])


@no_deprecation
def test_a_scripted_function_may_call_rnn_cell(device):
    @torch.jit.script
    def scripted(x: Tensor, w: Tensor, u: Tensor) -> Tensor:
        return rnn_ext.rnn_cell(x, None, w, u, nonlinearity="relu")

    x, w, u = (torch.randn(shape, device=device) for shape in ((3, 7), (5, 7), (5, 5)))
    torch.testing.assert_close(scripted(x, w, u), rnn_ext.rnn_cell(x, None, w, u, nonlinearity="relu"))


@no_deprecation
def test_a_traced_cell_gives_eager_results(device):
    cell = rnn_ext.RNNCell(7, 5, device=device)
    traced = torch.jit.trace(cell, (torch.randn(3, 7, device=device), torch.randn(3, 5, device=device)))
    x, hx = torch.randn(4, 7, device=device), torch.randn(4, 5, device=device)
    torch.testing.assert_close(traced(x, hx), cell(x, hx))
