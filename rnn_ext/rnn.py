"""The modules for whole sequences: torch.nn.RNN's parameters and behaviour over rnn_layer, and Elman's network."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from . import _C, _aten
from .functional import checked_lengths, nested_like, nested_rows, run_layer

_FIRST = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
_NONLINEARITIES = {"RNN_TANH": "tanh", "RNN_RELU": "relu", "RNN_SIGMOID": "sigmoid"}


class RNN(nn.RNN):
    r"""A multi-layer Elman RNN over whole sequences, fused: a drop-in for nn.RNN.

    .. math:: h_t = f(x_t W^\top + b_{ih} + h_{t-1} U^\top + b_{hh})

    Args:
        input_size: I, the number of features of x.
        hidden_size: H, the number of features of h.
        num_layers: how many layers lie on top of each other, each on the h of the one below.
        nonlinearity: f: ``"tanh"``, ``"relu"`` or, beyond nn.RNN, ``"sigmoid"``.
        bias: whether the layers have ``bias_ih`` and ``bias_hh``.
        batch_first: the batch is the first dimension of input and output; hx and h_n stay as they are.
        dropout: the probability of zeroing each h on its way to the next layer, in training.
        bidirectional: each layer also runs from the last step to the first, with parameters of its own.
        device: where the parameters are created.
        dtype: the parameters' dtype.
        kwargs: nothing; proj_size is refused in nn.RNN's words.

    Attributes:
        weight_ih_l[k]: W of layer k, of shape (H, I), or (H, D H) for k > 0, D being the number of directions.
        weight_hh_l[k]: U of layer k, of shape (H, H).
        bias_ih_l[k]: of shape (H).
        bias_hh_l[k]: of shape (H).

    The other direction's names end in ``_reverse``. All are drawn from U(-1/√H, 1/√H), in nn.RNN's order.

    Shape:
        input (T, B, I), or (B, T, I) with batch_first, (T, I) unbatched, a PackedSequence, or a nested tensor (B, j, I)
        of the jagged layout; hx (L D, B, H), or (L D, H) unbatched, zeros if not given; output as the input, with D H
        features, and of a nested one with its offsets; h_n as hx.

    ``lengths`` in a call makes rows shorter than T, as packing and unpacking them does, but without sorting or
    copying: B whole numbers from 0 to T in any order, a tensor on any device or a list; see :func:`rnn_ext.rnn_layer`.

    Raises:
        ValueError, RuntimeError: those of nn.RNN; ValueError for lengths of another shape, dtype or range, or with an
            unbatched, packed or nested input, and for a nested input that doesn't fit, or has gaps.

    Example:
        >>> rnn = rnn_ext.RNN(10, 20, num_layers=2)
        >>> output, h_n = rnn(torch.randn(5, 3, 10))
        >>> output, h_n = rnn(torch.randn(5, 3, 10), lengths=[5, 2, 4])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        known = "tanh" if nonlinearity == "sigmoid" else nonlinearity
        sizes = (input_size, hidden_size, num_layers)
        super().__init__(*sizes, known, bias, batch_first, dropout, bidirectional, device=device, dtype=dtype, **kwargs)
        if nonlinearity == "sigmoid":
            self.nonlinearity, self.mode = "sigmoid", "RNN_SIGMOID"

    def flatten_parameters(self) -> None:
        """For cuDNN, as in nn.RNN, where it runs these layers; our kernels need no flat buffer."""
        if self.mode != "RNN_SIGMOID" and not _C.cuda_built:
            super().flatten_parameters()

    def forward(
        self,
        input: Any,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> tuple[Any, Tensor]:
        """The output and h_n; the output is a PackedSequence where input is."""
        first = None
        if (  # the commonest call, on which a small layer's cost depends
            not torch.compiler.is_compiling()
            and lengths is None
            and type(input) is Tensor
            and input.dim() == 3
            and (input.is_cpu or (_C.cuda_built and input.is_cuda))
            and len(self._all_weights) == 1
            and (hx is None or hx.dim() == 3)
            and self.mode in _NONLINEARITIES
        ):
            first = _C.get_parameters(self, _FIRST) if self.bias else self._read(0)
            try:
                result = _C.rnn_layer(
                    input, hx, *first, _NONLINEARITIES[self.mode], False, self.batch_first, None, None, True
                )
                if result is not None:
                    return result
            except RuntimeError:  # which comes again, in nn.RNN's words
                pass
        return self._stack(input, hx, lengths, first)

    def _read(self, place: int) -> tuple[Any, Any, Any, Any]:
        """The parameters of a layer's direction, as getattr gives them, each once: a parametrization may count."""
        names = tuple(self._all_weights[place])
        if torch.compiler.is_compiling():
            found: Any = tuple([getattr(self, name) for name in names])
        else:
            found = _C.get_parameters(self, names)
        return found if self.bias else (*found, None, None)

    def _stack(self, given: Any, hx: Any, lengths: Any, first: Any) -> tuple[Any, Tensor]:
        """Every layer and direction, on every kind of input. `first`: the parameters of the first that were read."""
        if isinstance(given, torch.fx.Proxy):  # symbolic tracing takes nn.RNN for a leaf, by the name of its module
            path = given.tracer.path_of_module(self)  # type: ignore[attr-defined]
            kwargs = {} if lengths is None else {"lengths": lengths}
            return given.tracer.create_proxy("call_module", path, (given, hx), kwargs)  # type: ignore[return-value]
        compiling = torch.compiler.is_compiling()
        places = self.num_layers * (2 if self.bidirectional else 1)
        packed = isinstance(given, PackedSequence)
        nested = isinstance(given, Tensor) and given.is_nested
        if lengths is not None and (packed or nested):
            kind = "a PackedSequence" if packed else "nested"
            raise ValueError(f"lengths are for padded input, but the input is {kind}, with lengths of its own")
        unbatched = not packed and given.dim() == 2
        batch_first = self.batch_first and not packed and not nested and not unbatched
        batch_sizes = None
        state = hx
        if packed:
            input, batch_sizes, sorted_indices, unsorted_indices = given
            fits = input.dim() == 2
            if hx is not None:
                state = hx if sorted_indices is None else hx.index_select(1, sorted_indices)
                batch = state.size(1) if compiling else int(batch_sizes[0])  # there the layer looks
            elif compiling:  # a graph must know how many rows h_n has without a look into batch_sizes, if it can
                batch = int(batch_sizes[0]) if sorted_indices is None else sorted_indices.size(0)
                state = input.new_zeros(places, batch, self.hidden_size)
        elif nested:
            input, lengths = nested_rows(given)
            batch, fits = lengths.size(0), True
        else:
            input = given
            fits = input.dim() in (2, 3) and (hx is None or hx.dim() == input.dim())
            if fits and unbatched:
                input, state = input.unsqueeze(1), None if hx is None else hx.unsqueeze(1)
            batch = input.size(0 if batch_first else 1) if fits else 0
        if not _C.cuda_built and input.is_cuda and lengths is None and self.mode in ("RNN_TANH", "RNN_RELU"):
            if not compiling and not _aten.transforms_active():
                return super().forward(given, hx)  # cuDNN, all layers at once
        weights = [first if first and place == 0 else self._read(place) for place in range(places)]
        fits = fits and input.size(-1) == self.input_size and self.mode in _NONLINEARITIES
        fits = fits and (input.dtype == weights[0][0].dtype or torch._C._is_any_autocast_enabled())
        if not fits or (state is not None and state.shape != (places, batch, self.hidden_size)):
            if nested:
                of_state = "" if state is None else f" and hx of shape {list(state.shape)}"
                raise ValueError(
                    f"a nested input of {batch} rows with {input.size(-1)} features of {input.dtype}{of_state} doesn't "
                    f"fit {self} with {weights[0][0].dtype} parameters and hx of shape "
                    f"{[places, batch, self.hidden_size]}"
                )
            return super().forward(given, hx)  # which has the words for it
        if lengths is not None and not nested:
            lengths = checked_lengths(given, lengths, batch_first)

        output, h_n = self._run(input, state, weights, batch_first, lengths, batch_sizes)
        if packed:
            if unsorted_indices is not None:
                h_n = h_n.index_select(1, unsorted_indices)
            return PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices), h_n
        if nested:
            return nested_like(given, output), h_n
        return (output.squeeze(1), h_n.squeeze(1)) if unbatched else (output, h_n)

    def _run(
        self,
        input: Tensor,
        hx: Tensor | None,
        weights: list[tuple[Any, Any, Any, Any]],
        batch_first: bool,
        lengths: Tensor | None,
        batch_sizes: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        directions = 2 if self.bidirectional else 1
        states = [None] * len(weights) if hx is None else hx.unbind(0)
        ends = []
        transposed = batch_first and self.num_layers > 1
        if transposed:  # dropout draws its masks over (T, B, H), as in nn.RNN
            input = input.transpose(0, 1)
        for layer in range(self.num_layers):
            last = layer == self.num_layers - 1
            if last and transposed:
                input = input.transpose(0, 1)
            outputs = []
            for direction in range(directions):
                place = layer * directions + direction
                output, h_n = run_layer(
                    input,
                    states[place],
                    *weights[place],
                    _NONLINEARITIES[self.mode],
                    direction == 1,
                    batch_first and last,
                    lengths,
                    batch_sizes,
                )
                outputs.append(output)
                ends.append(h_n)
            input = outputs[0] if directions == 1 else torch.cat(outputs, -1)
            if self.dropout > 0 and self.training and not last:
                input = F.dropout(input, self.dropout)
        return input, torch.stack(ends)


class ElmanNetwork(nn.Module):
    r"""Elman's network, an :class:`RNN` with a linear readout, :math:`y_t = V h_t`.

    Args:
        input_size: I, the number of features of x.
        hidden_size: H, the number of features of h.
        output_size: O, the number of features of y.
        num_layers: as for :class:`RNN`, like those that follow.
        nonlinearity: f.
        bias: whether the layers have biases.
        batch_first: the batch is the first dimension of input and y.
        dropout: between the layers.
        bidirectional: the readout then sees both directions, of 2 H features.
        readout_bias: whether the readout has a bias.
        device: where the parameters are created.
        dtype: the parameters' dtype.

    Attributes:
        rnn: the RNN.
        readout: the nn.Linear, whose weight is V, of shape (O, H) or (O, 2 H).

    Shape:
        As for RNN, with O features in y, which is packed where the input is, and zero from the end of each row on
        where ``lengths`` are given.

    Example:
        >>> network = rnn_ext.ElmanNetwork(10, 20, 5)
        >>> y, h_n = network(torch.randn(7, 3, 10))

    Source: J. L. Elman, Finding Structure in Time, Cognitive Science 14 (1990).
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        output_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        readout_bias: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = (input_size, hidden_size, num_layers)
        self.rnn = RNN(*sizes, nonlinearity, bias, batch_first, dropout, bidirectional, device, dtype)
        features = 2 * hidden_size if bidirectional else hidden_size
        self.readout = nn.Linear(features, output_size, readout_bias, device, dtype)

    def forward(
        self,
        input: Any,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> tuple[Any, Tensor]:
        """Y and h_n."""
        output, h_n = self.rnn(input, hx, lengths=lengths)
        if isinstance(output, PackedSequence):
            return output._replace(data=self.readout(output.data)), h_n
        y = self.readout(output)
        if lengths is not None and self.readout.bias is not None:
            rows = torch.as_tensor(lengths, device=y.device)
            steps = torch.arange(y.size(1 if self.rnn.batch_first else 0), device=y.device)
            ended = steps >= rows.unsqueeze(1) if self.rnn.batch_first else steps.unsqueeze(1) >= rows
            y = y.masked_fill(ended.unsqueeze(-1), 0)
        return y, h_n
