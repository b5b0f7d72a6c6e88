"""The LSTM by ONNX Runtime and by a jitted JAX scan, from the same weights; both optional."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.lstm_sides import Sample
from benchmarks.rows import Contender

ONNX = "ONNX Runtime"
JAX = "JAX lax.scan"


def _arrays(module: nn.Module) -> list[np.ndarray]:
    return [p.detach().numpy() for p in module.parameters()]  # ih, hh, two biases


def onnx_missing(kind: str, dtype: torch.dtype, mode: str) -> str | None:
    """Why ONNX Runtime does not stand in this row; None if it does."""
    if mode != "inference":
        return "ONNX Runtime does not train"
    if dtype != torch.float32:
        return "ONNX Runtime's CPU LSTM has no bfloat16"
    if kind == "rollout":
        return "ONNX's LSTM has no reset"
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        return f"ONNX Runtime is not installed ({error})"
    return None


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


def onnx_runtime(module: nn.Module, kind: str) -> Contender:
    """ONNX Runtime with as many threads as torch, spinning as it does by default."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    session = ort.InferenceSession(
        onnx_model(module, kind), options, providers=["CPUExecutionProvider"]
    )

    def prepare(s: Sample) -> dict[str, np.ndarray]:
        if kind == "cell" and s.state is not None:
            return {
                "X": s.x[None].numpy(),
                "h": s.state[0][None].numpy(),
                "c": s.state[1][None].numpy(),
            }
        feed = {"X": s.x.numpy()}
        if s.lengths is not None:
            feed["lengths"] = s.lengths.to(torch.int32).numpy()
        return feed

    def call(feed: dict[str, np.ndarray]) -> Any:
        return session.run(None, feed)

    def values(feed: dict[str, np.ndarray]) -> list[Tensor]:
        y, h, c = (torch.from_numpy(a) for a in call(feed))
        return [h[0], c[0]] if kind == "cell" else [y[:, 0], h, c]

    return Contender(ONNX, prepare, call, values, pool=ONNX)


def jax_missing(kind: str, dtype: torch.dtype) -> str | None:
    """Why JAX does not stand in this row; None if it does."""
    if dtype != torch.float32:
        return "JAX's row is float32 alone"
    if kind in ("cell", "lengths"):
        return "JAX's row is a scan over whole sequences"
    try:
        import jax  # noqa: F401
    except ImportError as error:
        return f"JAX is not installed ({error})"
    return None


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

    def prepare(s: Sample) -> Any:
        keep = None if s.reset is None else jnp.asarray((~s.reset).float().numpy())[..., None]
        return jnp.asarray(s.x.detach().numpy()), keep

    def call(inputs: Any) -> Any:
        return jax.block_until_ready(work(weights, *inputs))

    def values(inputs: Any) -> list[Tensor]:
        found = call(inputs)
        flat = found if mode == "inference" else (found[1], *found[0])
        return [torch.from_numpy(np.array(a)) for a in flat]

    return Contender(JAX, prepare, call, values, pool=JAX, compiles=True)
