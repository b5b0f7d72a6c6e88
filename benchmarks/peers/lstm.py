"""The LSTM as torch users run it, as this package runs it, by ONNX Runtime and by a JAX scan.

All sides hold the same weights and take (x, *rest): x [T, B, I] ([B, I] for a cell), and beside it
hx and cx (cell), lengths [B] or reset [T, B]. ONNX Runtime and JAX are optional.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

import seqmem_fast
from benchmarks.harness.rows import Contender, uninstalled
from seqmem_fast.reference import lstm as reference

ONNX = "ONNX Runtime"
JAX = "JAX lax.scan"
Outputs = tuple[Tensor, ...]


class Side(nn.Module):
    """A way to use a module; its forward gives output, hy and cy, a cell's hy and cy."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.hidden_size = cast(int, module.hidden_size)


class Layer(Side):
    """The module over the whole sequence."""

    def forward(self, x: Tensor) -> Outputs:
        output, state = self.module(x)
        return output, *state


class Cell(Side):
    """One step of a cell."""

    def forward(self, x: Tensor, hx: Tensor, cx: Tensor) -> Outputs:
        hy, cy = self.module(x, (hx, cx))
        return hy, cy


class CellSteps(Side):
    """A loop over a cell, as a decoder's."""

    def forward(self, x: Tensor, hx: Tensor, cx: Tensor) -> Outputs:
        for step in x.unbind(0):
            hx, cx = self.module(step, (hx, cx))
        return hx, cx


class Packed(Side):
    """Variable lengths as nn.LSTM takes them: pack, run, pad."""

    def forward(self, x: Tensor, lengths: Tensor) -> Outputs:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
        packed_output, state = self.module(packed)
        output, _ = nn.utils.rnn.pad_packed_sequence(packed_output, total_length=x.shape[0])
        return output, *state


class Lengths(Side):
    """Variable lengths as this package takes them."""

    def forward(self, x: Tensor, lengths: Tensor) -> Outputs:
        output, state = self.module(x, lengths=lengths)
        return output, *state


class Reset(Side):
    """A rollout with episode ends, in one call."""

    def forward(self, x: Tensor, reset: Tensor) -> Outputs:
        output, state = self.module(x, reset=reset)
        return output, *state


class CellLoop(Side):
    """The usual rollout: a loop over nn.LSTMCell, the state masked at each step."""

    def forward(self, x: Tensor, reset: Tensor) -> Outputs:
        keep = (~reset).to(x.dtype).unsqueeze(-1)  # [T, B, 1]
        h = c = x.new_zeros(x.shape[1], self.hidden_size)
        steps = []
        for step, k in zip(x.unbind(0), keep.unbind(0), strict=True):
            h, c = self.module(step, (h * k, c * k))
            steps.append(h)
        return torch.stack(steps), h.unsqueeze(0), c.unsqueeze(0)


class LayerLoop(Side):
    """The other usual rollout: nn.LSTM called for one step at a time."""

    def forward(self, x: Tensor, reset: Tensor) -> Outputs:
        keep = (~reset).to(x.dtype).unsqueeze(-1)  # [T, B, 1]
        h = c = x.new_zeros(1, x.shape[1], self.hidden_size)
        steps = []
        for step, k in zip(x.split(1), keep.unbind(0), strict=True):
            output, (h, c) = self.module(step, (h * k, c * k))
            steps.append(output)
        return torch.cat(steps), h, c


class Reference(Side):
    """The package's plain PyTorch, with the module's weights."""

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Outputs:
        rest: dict[str, Any] = {}
        if extra is not None:
            rest["reset" if extra.dtype == torch.bool else "lengths"] = extra
        output, state = reference.lstm(x, None, *self.module.parameters(), **rest)
        return output, *state


# What a user of torch alone would write; where there are two ways, the faster counts.
TORCH: dict[str, dict[str, type[Side]]] = {
    "layer": {"nn.LSTM": Layer},
    "cell": {"nn.LSTMCell": Cell},
    "steps": {"steps of nn.LSTMCell": CellSteps},
    "lengths": {"nn.LSTM, packed": Packed},
    "rollout": {"loop over nn.LSTMCell": CellLoop, "loop over nn.LSTM": LayerLoop},
}
OURS: dict[str, tuple[type[nn.Module], type[Side]]] = {
    "layer": (seqmem_fast.LSTM, Layer),
    "cell": (seqmem_fast.LSTMCell, Cell),
    "steps": (seqmem_fast.LSTMCell, CellSteps),
    "lengths": (seqmem_fast.LSTM, Lengths),
    "rollout": (seqmem_fast.LSTM, Reset),
}


def by_torch(kind: str, weights: nn.LSTM) -> dict[str, Side]:
    """All of torch's ways."""
    return {
        name: side(_copied(weights, nn.LSTMCell if name.endswith("nn.LSTMCell") else nn.LSTM))
        for name, side in TORCH[kind].items()
    }


def ours(kind: str, weights: nn.LSTM) -> Side:
    """The same work through this package's modules."""
    family, side = OURS[kind]
    return side(_copied(weights, family))


@torch.no_grad()
def _copied(weights: nn.LSTM, family: type[nn.Module]) -> nn.Module:
    """Weights by order (ih, hh, then the biases), since a cell's names lack the layer."""
    is_cell = family in (nn.LSTMCell, seqmem_fast.LSTMCell)
    layers = {} if is_cell else {"num_layers": weights.num_layers}
    dtype = weights.weight_ih_l0.dtype
    module = family(weights.input_size, weights.hidden_size, dtype=dtype, **layers)
    for source, target in zip(weights.parameters(), module.parameters(), strict=True):
        target.copy_(source)
    return module


def absent(kind: str, dtype: str, layers: int) -> dict[str, str]:
    """Which of ONNX Runtime and JAX do not stand in a row, and why."""
    if layers > 1:
        return {name: f"{name}'s rows have one layer" for name in (ONNX, JAX)}
    reasons = {ONNX: _onnx_missing(kind, dtype), JAX: _jax_missing(kind, dtype)}
    return {name: reason for name, reason in reasons.items() if reason}


def others(
    kind: str, weights: nn.LSTM, absent: Mapping[str, str]
) -> dict[str, Callable[[str], Contender]]:
    """Those that do, made from the mode."""
    made: dict[str, Callable[[str], Contender]] = {
        ONNX: partial(onnx_runtime, weights, kind),
        JAX: partial(jax_scan, weights),
    }
    return {name: make for name, make in made.items() if name not in absent}


def _arrays(module: nn.Module) -> list[np.ndarray]:
    return [p.detach().numpy() for p in module.parameters()]  # ih, hh, two biases


def _onnx_missing(kind: str, dtype: str) -> str | None:
    if dtype != "float32":
        return "ONNX Runtime's CPU LSTM has no bfloat16"
    if kind == "steps":
        return "ONNX's LSTM takes whole sequences"
    if kind == "rollout":
        return "ONNX's LSTM has no reset"
    return uninstalled("ONNX Runtime", "onnx", "onnxruntime")


def _jax_missing(kind: str, dtype: str) -> str | None:
    if dtype != "float32":
        return "JAX's row is float32 alone"
    if kind in ("cell", "steps", "lengths"):
        return "JAX's row is a scan over whole sequences"
    return uninstalled("JAX", "jax")


def onnx_model(module: nn.Module, kind: str) -> bytes:
    """One LSTM node holding the module's weights, gates reordered from i, f, g, o to i, o, f, g."""
    from onnx import TensorProto, helper, numpy_helper

    def reorder(a: np.ndarray) -> np.ndarray:
        i, f, g, o = np.split(a, 4)
        return np.concatenate([i, o, f, g])

    w_ih, w_hh, b_ih, b_hh = (reorder(a) for a in _arrays(module))
    constants = {"W": w_ih[None], "R": w_hh[None], "B": np.concatenate([b_ih, b_hh])[None]}
    dims: dict[str, list[str | int]] = {"X": ["T", "B", w_ih.shape[1]]}
    types = {"X": TensorProto.FLOAT}
    if kind == "lengths":
        dims["lengths"], types["lengths"] = ["B"], TensorProto.INT32
    if kind == "cell":
        for name in ("h", "c"):
            dims[name], types[name] = [1, "B", w_hh.shape[1]], TensorProto.FLOAT
    optional = [name if name in dims else "" for name in ("lengths", "h", "c")]
    node = helper.make_node(
        "LSTM", ["X", "W", "R", "B", *optional], ["Y", "Y_h", "Y_c"], hidden_size=w_hh.shape[1]
    )
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("Y", "Y_h", "Y_c")
    ]
    graph = helper.make_graph(
        [node],
        "lstm",
        [helper.make_tensor_value_info(name, types[name], dims[name]) for name in dims],
        outputs,
        [numpy_helper.from_array(np.ascontiguousarray(a), name) for name, a in constants.items()],
    )
    opset = helper.make_opsetid("", 17)
    return helper.make_model(graph, opset_imports=[opset], ir_version=8).SerializeToString()


def onnx_runtime(module: nn.Module, kind: str, mode: str) -> Contender:
    """ONNX Runtime with as many threads as torch, spinning as it does by default; infers only."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    session = ort.InferenceSession(
        onnx_model(module, kind), options, providers=["CPUExecutionProvider"]
    )

    def prepare(args: tuple[Tensor, ...]) -> dict[str, np.ndarray]:
        if kind == "cell":
            return {name: a[None].numpy() for name, a in zip("Xhc", args, strict=True)}
        feed = {"X": args[0].numpy()}
        if kind == "lengths":
            feed["lengths"] = args[1].to(torch.int32).numpy()
        return feed

    def call(feed: dict[str, np.ndarray]) -> Any:
        return session.run(None, feed)

    def values(feed: dict[str, np.ndarray]) -> list[Tensor]:
        y, h, c = (torch.from_numpy(a) for a in call(feed))
        return [h[0], c[0]] if kind == "cell" else [y[:, 0], h, c]

    return Contender(ONNX, prepare, call, values, pool=ONNX)


def jax_scan(module: nn.Module, mode: str) -> Contender:
    """A jitted lax.scan, the input projection hoisted out of it; resets cut the state."""
    import jax
    import jax.numpy as jnp

    def run(weights: list[Any], x: Any, keep: Any) -> Any:
        w_ih, w_hh, b_ih, b_hh = weights
        projected = x @ w_ih.T + (b_ih + b_hh)

        def step(carry: Any, inputs: Any) -> Any:
            h, c = carry
            z, k = inputs
            if k is not None:
                h, c = h * k, c * k
            i, f, g, o = jnp.split(z + h @ w_hh.T, 4, axis=-1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        zeros = jnp.zeros((x.shape[1], w_hh.shape[1]), x.dtype)
        (h, c), output = jax.lax.scan(step, (zeros, zeros), (projected, keep))
        return output, h[None], c[None]

    def total(weights: list[Any], x: Any, keep: Any) -> Any:
        return run(weights, x, keep)[0].sum()

    work = jax.jit(run if mode == "inference" else jax.grad(total, argnums=(0, 1)))
    weights = [jnp.asarray(a) for a in _arrays(module)]

    def prepare(args: tuple[Tensor, ...]) -> Any:
        keep = jnp.asarray((~args[1]).float().numpy())[..., None] if len(args) > 1 else None
        return jnp.asarray(args[0].detach().numpy()), keep

    def call(inputs: Any) -> Any:
        return jax.block_until_ready(work(weights, *inputs))

    def values(inputs: Any) -> list[Tensor]:
        found = call(inputs)
        flat = found if mode == "inference" else (found[1], *found[0])
        return [torch.from_numpy(np.array(a)) for a in flat]

    return Contender(JAX, prepare, call, values, pool=JAX, compiles=True)
