"""What only a GPU can show of layers: launches, graphs, streams. The operator's values are in test_cuda_host.py too."""

from __future__ import annotations

import re

import pytest
import torch
from sequences import layer_arguments, loop_of_cells, packed
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import rnn_ext
from rnn_ext.__main__ import explain_sequence

pytestmark = pytest.mark.cuda

STEPS, BATCH = 6, 5
LENGTHS = [6, 0, 3, 3, 1]


@pytest.mark.parametrize("sizes", [(3, 7), (64, 64), (40, 200), (8, 500), (8, 1500)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("layout", ["padded", "batch_first", "lengths", "packed"])
def test_a_layer_gives_what_the_cpu_gives(layout, reverse, dtype, sizes):
    """Outputs and gradients, against a loop of cells in float64."""
    tolerance = {"rtol": 5e-2, "atol": 5e-2} if dtype.itemsize == 2 else {}
    args = layer_arguments(STEPS, BATCH, *sizes, dtype=dtype)
    lengths = {"padded": None, "batch_first": None, "lengths": LENGTHS, "packed": sorted(LENGTHS, reverse=True)}[layout]
    lengths = [max(n, 1) for n in lengths] if layout == "packed" else lengths
    batch_first = layout == "batch_first"
    wide = [t.double().requires_grad_() for t in args]
    expected, expected_h_n = loop_of_cells(*wide, reverse=reverse, lengths=lengths)
    on_gpu = [t.cuda().requires_grad_() for t in args]
    x, *others = on_gpu
    if layout == "packed":
        data, batch_sizes = packed(x, lengths)
        output, h_n = torch.ops.rnn_ext.rnn_layer(data, *others, "tanh", reverse, False, None, batch_sizes)
        expected = packed(expected, lengths)[0]
    else:
        given = x.transpose(0, 1).contiguous() if batch_first else x
        on_device = None if lengths is None else torch.tensor(lengths, device="cuda")
        output, h_n = rnn_ext.rnn_layer(given, *others, reverse=reverse, lengths=on_device, batch_first=batch_first)
        expected = expected.transpose(0, 1) if batch_first else expected
    torch.testing.assert_close((output.cpu().double(), h_n.cpu().double()), (expected, expected_h_n), **tolerance)
    grad_output, grad_h_n = torch.cos(expected.detach()), torch.sin(expected_h_n.detach())
    wanted = torch.autograd.grad((expected, expected_h_n), wide, (grad_output, grad_h_n))
    grads = (grad_output.to("cuda", dtype), grad_h_n.to("cuda", dtype))
    found = torch.autograd.grad((output, h_n), on_gpu, grads)
    for got, want in zip(found, wanted, strict=True):
        error = float((got.cpu().double() - want).norm() / want.norm())
        assert error <= {8: 1e-10, 4: 1e-4, 2: 5e-2}[dtype.itemsize]


@pytest.mark.parametrize("kernel, launches", [("stepped_16x16", 20), ("resident_256", 1), ("grid_16bit", 1)])
def test_a_layer_makes_no_copy_from_the_host_and_a_launch_a_step_or_a_pass(monkeypatch, kernel, launches):
    monkeypatch.setenv("RNN_EXT_SEQUENCE_KERNEL", kernel)
    x = torch.randn(20, 4, 32, device="cuda", dtype=torch.bfloat16)
    rnn = rnn_ext.RNN(32, 64, device="cuda", dtype=torch.bfloat16)
    lengths = [20, 3, 7, 0]

    def run():
        output, h_n = rnn(x, lengths=lengths)
        torch.autograd.grad(output.float().sum() + h_n.float().sum(), list(rnn.parameters()))

    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        run()
        torch.cuda.synchronize()
    names = [event.name for event in recorded.events() if event.device_type == DeviceType.CUDA]
    assert not [name for name in names if "HtoD" in name]
    assert sum("recurrence_step" in name or "_resident" in name for name in names) == 2 * launches


@pytest.mark.parametrize("lengths", [None, [9, 2, 5]], ids=["padded", "lengths"])
def test_forward_and_backward_are_captured_in_a_cuda_graph(lengths):
    rnn = rnn_ext.RNN(16, 24, num_layers=2, bidirectional=True, device="cuda")
    x = torch.randn(9, 3, 16, device="cuda")

    def run():
        output, h_n = rnn(x, lengths=lengths)
        return output, h_n, *torch.autograd.grad(output.sum() + h_n.sum(), list(rnn.parameters()))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.testing.assert_close(results, run())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_every_kernel_of_the_steps_can_be_forced(monkeypatch, dtype):
    steps, batch, hidden_size = 6, 20, 200
    args = layer_arguments(steps, batch, 8, hidden_size, dtype=dtype).map(lambda t: t.cuda())
    first = rnn_ext.rnn_layer(*args)
    case = [str(n) for n in (steps, batch, 8, hidden_size)]
    can_run = re.findall(
        r"^ +[\d.]+  (\w+)", explain_sequence([*case, str(dtype).removeprefix("torch.")]), re.MULTILINE
    )
    assert len(set(can_run)) >= 2
    for kernel in set(can_run):
        monkeypatch.setenv("RNN_EXT_SEQUENCE_KERNEL", kernel)
        tolerance = {"rtol": 5e-3, "atol": 5e-3} if dtype.itemsize == 2 else {}
        torch.testing.assert_close(rnn_ext.rnn_layer(*args), first, **tolerance)
