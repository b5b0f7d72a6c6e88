"""The LSTM on GPU: the choice of its kernels, and all of it run where a GPU is."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import seqmem_fast as sf
from seqmem_fast.reference import lstm as reference


@pytest.fixture
def triton() -> Any:
    return pytest.importorskip("triton")


def test_the_route_follows_from_the_shape(triton: Any) -> None:
    from seqmem_fast._triton.lstm_routes import OnChipPlan, on_chip_plan

    def plan(hidden: int, batch: int, dtype: torch.dtype) -> OnChipPlan | None:
        return on_chip_plan(hidden, batch, dtype, torch.device("cpu"))

    assert plan(5, 1, torch.float32) == (1, 16, False, "ieee", 4)
    assert plan(64, 4096, torch.float32) == (1, 64, False, "ieee", 8)
    assert plan(33, 512, torch.bfloat16) == (1, 64, False, "ieee", 8)
    assert plan(33, 513, torch.bfloat16) == (16, 64, True, "ieee", 4)
    assert plan(128, 1, torch.float16) == (16, 128, True, "ieee", 8)
    for hidden, dtype in ((65, torch.float32), (129, torch.float16), (5, torch.float64)):
        assert plan(hidden, 4096, dtype) is None
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert plan(64, 513, torch.float32) == (16, 64, True, "tf32", 8)
        assert plan(64, 512, torch.float32) == (1, 64, False, "ieee", 8)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def test_missing_triton_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from seqmem_fast import _triton

    monkeypatch.setitem(sys.modules, "triton", None)
    for name in [name for name in sys.modules if name.startswith("seqmem_fast._triton.")]:
        monkeypatch.delitem(sys.modules, name)
    kernel = _triton._on_first_call("seqmem::lstm", "lstm", "lstm")
    with pytest.raises(RuntimeError, match=r"pip install seqmem_fast\[triton\]"):
        kernel()


def test_lengths_on_a_gpu_are_clamped_and_host_memory_is_not_captured(
    triton: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from seqmem_fast._triton.common import row_lengths

    lengths, cpu = torch.tensor([-3, 5, 99], dtype=torch.int32), torch.device("cpu")
    assert torch.equal(row_lengths("lstm", lengths, cpu, 20), torch.tensor([0, 5, 20]))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(TypeError, match=r"seqmem::ntm: expected lengths on the GPU while a CUDA"):
        row_lengths("ntm", lengths, torch.device("cuda"), 20)


# ---- on a GPU -----------------------------------------------------------------------------------

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
# H for every route: multiply-adds, their largest, clusters of 8 and of 16 blocks, clusters on 16
# bits alone, none
HIDDEN = [5, 64, 100, 200, 400, 520]
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 6e-3}


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def leaves(args: Any, device: str, dtype: torch.dtype) -> Any:
    if isinstance(args, (tuple, list)):
        return tuple(leaves(a, device, dtype) for a in args)
    if isinstance(args, Tensor) and args.is_floating_point():
        return args.detach().to(device, dtype, copy=True).requires_grad_()
    return args


def flat(args: Any) -> list[Tensor]:
    if isinstance(args, (tuple, list)):
        return [a for item in args for a in flat(item)]
    return [args] if isinstance(args, Tensor) else []


def check_on_gpu(dtype: torch.dtype, sizes: tuple[int, int, int, int]) -> None:
    """Every option, forward and backward, beside the reference in float64."""
    for sample in reference.sample_inputs(dtype=dtype, sizes=sizes):
        on_gpu = leaves(sample.args, "cuda", dtype)
        right = leaves(sample.args, "cpu", torch.float64)
        options = {
            key: value.cuda() if key in ("reset", "lengths") else value
            for key, value in sample.kwargs.items()
        }
        ours = flat(sf.ops.lstm_trace(*on_gpu, **options))
        theirs = flat(reference.lstm_trace(*right, **sample.kwargs))
        for a, b in zip(ours, theirs, strict=True):
            assert relative(a, b) <= BOUNDS[dtype], sample.name
        seeds = [torch.randn_like(b) for b in theirs]
        torch.autograd.backward(theirs, seeds)
        torch.autograd.backward(ours, [s.to("cuda", dtype) for s in seeds])
        for a, b in zip(flat(on_gpu), flat(right), strict=True):
            assert a.grad is not None and b.grad is not None
            assert relative(a.grad, b.grad) <= 10 * BOUNDS[dtype], sample.name


@gpu
@needs_gpu
@pytest.mark.parametrize("batch", [3, 600])  # 600 rows turn 16-bit storage to tensor cores
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_gpu_agrees_with_float64(dtype: torch.dtype, hidden: int, batch: int) -> None:
    check_on_gpu(dtype, (6, batch, 7, hidden))


CLUSTERS = [
    *((torch.float32, tile) for tile in (1, 4, 8)), (torch.bfloat16, 8), (torch.float16, 8),
]  # fmt: skip


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype, tile", CLUSTERS, ids=str)
@pytest.mark.parametrize("hidden", [65, 128, 150, 192, 256, 300, 384, 500])
def test_gpu_clusters_agree_with_float64(
    hidden: int, dtype: torch.dtype, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from seqmem_fast._triton import lstm_routes

    weight_hh = torch.empty(4 * hidden, hidden, dtype=dtype, device="cuda")
    if lstm_routes.cluster_tile(weight_hh, 1, True) == 0:
        pytest.skip("needs a CUDA build and a GPU with clusters of this size")
    monkeypatch.setattr(lstm_routes, "cluster_tile", lambda *_: tile)
    check_on_gpu(dtype, (5, 11, 3, hidden))


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_gpu_cell_agrees_with_the_cpu(hidden: int, dtype: torch.dtype) -> None:
    for sample in reference.cell_sample_inputs(dtype=dtype, sizes=(9, 7, hidden)):
        on_gpu, on_cpu = leaves(sample.args, "cuda", dtype), leaves(sample.args, "cpu", dtype)
        ours, theirs = sf.ops.lstm_cell(*on_gpu), sf.ops.lstm_cell(*on_cpu)
        for a, b in zip(ours, theirs, strict=True):
            assert relative(a, b) <= BOUNDS[dtype], sample.name
        seeds = [torch.randn_like(b) for b in theirs]
        torch.autograd.backward(theirs, seeds)
        torch.autograd.backward(ours, [s.cuda() for s in seeds])
        for a, b in zip(flat(on_gpu), flat(on_cpu), strict=True):
            assert a.grad is not None and b.grad is not None
            assert relative(a.grad, b.grad) <= 10 * BOUNDS[dtype], sample.name


@gpu
@needs_gpu
@pytest.mark.parametrize("hidden", [32, 64, 128, 256])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_gpu_is_as_exact_as_cudnn(hidden: int, bidirectional: bool) -> None:
    """Whose own error reaches 6e-6 in float32 (seen on an H200) where it keeps weights on chip."""
    options = {"num_layers": 2, "bidirectional": bidirectional, "batch_first": True}
    theirs = nn.LSTM(24, hidden, **options).cuda()
    ours = sf.LSTM(24, hidden, **options).cuda()
    ours.load_state_dict(theirs.state_dict())
    exact = nn.LSTM(24, hidden, **options, dtype=torch.float64)
    exact.load_state_dict(theirs.state_dict())
    given = torch.randn(8, 40, 24)

    def values(module: Any, x: Tensor) -> list[Tensor]:
        x.requires_grad_()
        output, state = module(x)
        output.square().mean().backward()
        grads = [x.grad, *(p.grad for p in module.parameters())]
        return [t.detach() for t in (output, *state, *grads) if t is not None]

    right = values(exact, given.double())
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # its default is TF32
        peers = values(theirs, given.cuda())
    for mine, peer, best in zip(values(ours, given.cuda()), peers, right, strict=True):
        assert relative(mine, best) <= max(2e-6, relative(peer, best))


@gpu
@needs_gpu
@pytest.mark.parametrize("hidden", [64, 200, 400])
def test_gpu_same_bits_every_time(hidden: int) -> None:
    module = sf.LSTM(16, hidden).cuda()
    x = torch.randn(50, 33, 16, device="cuda")
    seen = []
    for _ in range(3):
        module.zero_grad()
        module(x)[0].sum().backward()
        seen.append([module(x)[0].detach(), *(p.grad.clone() for p in module.parameters())])
    for again in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, seen[0], strict=True))


@gpu
@needs_gpu
@pytest.mark.parametrize("hidden", [64, 200, 400])
def test_gpu_streams_and_graphs(hidden: int) -> None:
    """No hidden synchronisation or default stream: a call can be captured and replayed."""
    module = sf.LSTM(16, hidden).cuda().eval()
    x = torch.randn(20, 4, 16, device="cuda")
    with torch.inference_mode():
        expected = module(x)[0]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            assert torch.equal(module(x)[0], expected)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = module(x)[0]
        x.mul_(0.5)
        graph.replay()
        assert torch.equal(captured, module(x)[0])


@gpu
@needs_gpu
def test_gpu_lengths_are_clamped_and_captured() -> None:
    """Nobody waits to read them; what a replay would read from freed memory is refused."""
    module, x = sf.LSTM(16, 64).cuda(), torch.randn(20, 4, 16, device="cuda")
    lengths = torch.tensor([-3, 5, 20, 99], device="cuda")
    on_cpu = torch.tensor([0, 5, 20, 20])
    packed = nn.utils.rnn.pack_padded_sequence(x, on_cpu.clamp_min(1), enforce_sorted=False)
    with torch.inference_mode():
        module(packed)
        expected = module(x, lengths=on_cpu)[0]
        assert torch.equal(module(x, lengths=lengths)[0], expected)
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            with pytest.raises(TypeError, match="expected lengths on the GPU while a CUDA graph"):
                module(x, lengths=on_cpu)
            with pytest.raises(TypeError, match="expected no packed input"):
                module(packed)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = module(x, lengths=lengths)[0]
        lengths.copy_(torch.tensor([20, 1, 2, 3]))
        graph.replay()
        assert torch.equal(captured, module(x, lengths=lengths)[0])


@gpu
@needs_gpu
def test_gpu_autocast_and_compile() -> None:
    module = sf.LSTM(16, 64).cuda()
    x = torch.randn(20, 4, 16, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        output, _ = module(x)
    assert output.dtype == torch.bfloat16 and relative(output, module(x)[0]) <= 5e-2
    whole = torch.compile(module, fullgraph=True)
    assert relative(whole(x)[0], module(x)[0]) <= 1e-6
