"""torch.onnx.export takes our modules, and ONNX Runtime computes what they compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import seqmem_fast as sf

pytest.importorskip("onnxscript")
ort: Any = pytest.importorskip("onnxruntime")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
DIM = torch.export.Dim


def exported(module: nn.Module, args: tuple[Any, ...], **options: Any) -> tuple[Any, list[str]]:
    """A function that ONNX Runtime runs, and the names of the ONNX operators in it."""
    with torch.no_grad():
        program = torch.onnx.export(module.eval(), args, dynamo=True, verbose=False, **options)
    assert program is not None
    model = program.model_proto
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def run(*inputs: Tensor) -> list[Tensor]:
        feed = {name: each.numpy() for name, each in zip(names, inputs, strict=True)}
        return [torch.from_numpy(each) for each in session.run(None, feed)]

    return run, [node.op_type for node in model.graph.node]


def close(ours: Any, theirs: list[Tensor]) -> None:
    flat = [each.detach() for each in torch.utils._pytree.tree_leaves(ours)]
    torch.testing.assert_close(flat, theirs, rtol=1e-4, atol=1e-5)


class Speech(nn.Module):
    """Layers as a user joins them."""

    def __init__(self, layer: Any, attention: Any) -> None:
        super().__init__()
        self.lstm = layer(4, 6, num_layers=2, bidirectional=True, batch_first=True)
        self.attention = attention(12, 3, batch_first=True)

    def forward(self, x: Tensor, padding: Tensor) -> Any:
        hidden, state = self.lstm(x)
        return *self.attention(hidden, hidden, hidden, key_padding_mask=padding), *state


@pytest.mark.parametrize("ours", [True, False])
def test_layers_become_onnx_s_own_lstm_for_any_batch_and_time(ours: bool) -> None:
    torch.manual_seed(0)
    model = Speech(sf.LSTM, sf.Attention) if ours else Speech(nn.LSTM, nn.MultiheadAttention)
    if not ours:
        assert len(sf.accelerate(model).swapped) == 2
    sizes = {0: DIM("batch", min=2), 1: DIM("time", min=2)}
    example = torch.randn(2, 5, 4), torch.zeros(2, 5, dtype=torch.bool)
    run, kinds = exported(model, example, dynamic_shapes=(sizes, sizes))
    assert kinds.count("LSTM") == 4 and kinds.count("Softmax") == 1 and "Loop" not in kinds
    padding = torch.arange(7) >= torch.tensor([[7], [3], [1]])
    inputs = torch.randn(3, 7, 4), padding
    close(model(*inputs), run(*inputs))


class Called(nn.Module):
    """An LSTM with what torch's has not."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.lstm, self.options = sf.LSTM(4, 6, bias=False), options

    def forward(self, x: Tensor, lengths: Tensor, h: Tensor, c: Tensor) -> Any:
        return self.lstm(x, (h, c), lengths=lengths, **self.options)


@pytest.mark.parametrize("gates", [False, True])
def test_lengths(gates: bool) -> None:
    """They go to ONNX's LSTM, unless gates are wanted: then one step follows the other."""
    model = Called(return_gates=gates)
    state = torch.randn(1, 3, 6), torch.randn(1, 3, 6)
    x = torch.randn(4, 3, 4)
    run, kinds = exported(model, (x, torch.tensor([4, 4, 4]), *state))
    assert kinds.count("LSTM") == (0 if gates else 1)
    lengths = torch.tensor([1, 4, 0])
    close(model(x, lengths, *state), run(x, lengths, *state))


@pytest.mark.parametrize("norm", [False, True])
def test_zoneout_and_layer_norm_step_by_step(norm: bool) -> None:
    """For the time that was exported, and any batch."""
    lstm = sf.LSTM(4, 6, bidirectional=True, zoneout_h=0.2, zoneout_c=0.1, layer_norm=norm)
    x = torch.randn(3, 2, 4)
    run, kinds = exported(lstm, (x,), dynamic_shapes=({1: DIM("batch", min=2)},))
    assert "LSTM" not in kinds
    x = torch.randn(3, 5, 4)
    close(lstm(x), run(x))


def test_other_ops_are_taken_apart() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = sf.LSTMCell(4, 6)
            self.align = sf.AdditiveAttention(6, 4, 5)

        def forward(self, x: Tensor) -> Any:
            h, c = self.cell(x[0])
            values = x.transpose(0, 1)
            return h, c, *self.align(h[:, None], values, values), sf.ops.sparsemax(c)

    model, x = Several(), torch.randn(4, 3, 4)
    run, _ = exported(model, (x,))
    close(model(x), run(x))
