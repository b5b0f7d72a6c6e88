"""What torch.utils.flop_counter finds: as much as in a reference that computes products."""

from __future__ import annotations

import importlib
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from seqmem_fast.ops.common import STEMS
from seqmem_fast.reference.common import Sample

# These multiply and sum up element by element, which torch does not count.
ELEMENTWISE = ("additive_attention", "delta_memory", "dynamic_memory")
DENSE = ("block_sparse_attention",)  # whose reference computes the other blocks' scores too
OPS = sorted({*STEMS.values()})


def flops(function: Any, *args: Any, **kwargs: Any) -> tuple[int, int]:
    """Of the call, and of its backward."""
    args, kwargs = tree_map_only(
        Tensor,
        lambda t: t.detach().requires_grad_() if t.is_floating_point() else t,
        (args, kwargs),
    )
    with FlopCounterMode(display=False) as counter:
        found = tree_leaves(function(*args, **kwargs))
        forward = counter.get_total_flops()
        learning = [t for t in found if isinstance(t, Tensor) and t.requires_grad]
        torch.autograd.backward(learning, [torch.ones_like(t) for t in learning])
    return forward, counter.get_total_flops() - forward


def samples(op: str, sizes: tuple[int, ...] | None = None) -> list[Sample]:
    options = {} if sizes is None else {"sizes": sizes}
    return [*importlib.import_module(f"seqmem_fast.reference.{op}").sample_inputs(**options)]


@pytest.mark.slow
@pytest.mark.parametrize("op", [op for op in OPS if op not in ELEMENTWISE + DENSE])
def test_as_many_as_in_the_reference(op: str) -> None:
    functions = importlib.import_module(f"seqmem_fast.ops.{op}")
    reference = importlib.import_module(f"seqmem_fast.reference.{op}")
    for sample in samples(op):
        name = sample.function or op
        ours = flops(getattr(functions, name), *sample.args, **sample.kwargs)
        right = flops(getattr(reference, name), *sample.args, **sample.kwargs)[0]
        if (sizes := sample.kwargs.get("batch_sizes")) is not None:  # the reference pads
            right = right * int(sizes.sum()) // (len(sizes) * int(sizes[0]))
        assert ours == (right, 2 * right), sample.name


def test_what_references_compute_element_by_element() -> None:
    from seqmem_fast import ops

    attention = next(iter(samples("additive_attention", (2, 3, 5, 7, 11))))
    found = flops(ops.additive_attention, *attention.args)
    assert found == (2 * 2 * 3 * 5 * (7 + 11), 4 * 2 * 3 * 5 * (7 + 11))
    memory = next(iter(samples("dynamic_memory", (2, 5, 3, 7))))
    query, slots, *nets = memory.args[:6]
    hops = 4
    row = 2 * slots.size(-2) * slots.size(-1) + nets[0].numel() + nets[2].numel()
    found = flops(ops.dynamic_memory, query, slots, *nets, hops)
    assert found == (2 * hops * 2 * row, 4 * hops * 2 * row)
    delta = next(iter(samples("delta_memory", (2, 3, 5, 7, 11))))
    assert flops(ops.delta_memory, *delta.args)[0] == 2 * 3 * 2 * 3 * 5 * 7 * 11


def test_of_blocks_the_listed_ones_count() -> None:
    from seqmem_fast import ops

    q, k, v = (torch.randn(2, 4, 50, n) for n in (3, 3, 5))
    blocks = ops.block_list(torch.eye(5).bool())
    products = 2 * 4 * 5 * 10 * 10 * (3 + 5)
    assert flops(ops.block_sparse_attention, q, k, v, blocks, (10, 10)) == (
        2 * products,
        4 * products,
    )
    top = flops(ops.top_k_attention, q, k, v, 7)
    chosen = 2 * 4 * 50 * 7 * (3 + 5)
    assert top == (2 * 2 * 4 * 50 * 50 * 3 + 2 * chosen, 4 * chosen)


def test_every_op_has_a_formula() -> None:
    for name in STEMS:
        if not name.startswith("check_"):
            assert getattr(torch.ops.seqmem, name) in flop_registry, name


@pytest.mark.slow
def test_the_counter_is_not_imported_before_it_is_asked_for() -> None:
    program = (
        "import sys, seqmem_fast, torch\n"
        "assert 'torch.utils.flop_counter' not in sys.modules\n"
        "from torch.utils.flop_counter import flop_registry\n"
        "assert torch.ops.seqmem.lstm in flop_registry\n"
        "assert not any('flops' in type(f).__module__ for f in sys.meta_path)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
