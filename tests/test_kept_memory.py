"""Freed results and saved values: the next call finds their memory again, and not too much is kept.

csrc/common/kept_blocks.h. A process of its own, so that no other test's blocks are there.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from forks import run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="counts pages as Linux does")

STEP = """
import resource, torch
from seqmem_fast import ops

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def draw(*sizes):
    return torch.randn(2, 1024, 32, *sizes)

key = torch.nn.functional.normalize(draw(64), dim=-1)
given = [draw(64), key, draw(64), draw().sigmoid(), -draw().exp()]
given = [x.requires_grad_() for x in given]
grad = draw(64)
for step in range(4):
    before = faults()
    output, _ = ops.delta_memory(*given)
    torch.autograd.grad(output, given, grad)
    del output
    print(faults() - before, flush=True)
"""
KEPT = """
import torch
from seqmem_fast import ops

def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096 >> 20

x = torch.randn(1 << 16, 512)  # 128 MiB
ops.sparsemax(x[:1])
for count in (1, 3, 6):
    before = resident()
    results = [ops.sparsemax(x) for _ in range(count)]
    del results
    print(resident() - before, flush=True)
"""


def numbers(program: str, folder: Path) -> list[int]:
    done = run(program, folder)
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]


def test_a_step_finds_the_memory_of_the_last(tmp_path: Path) -> None:
    """Output, what is kept for the backward, and three gradients: 16 MiB each and more."""
    first, *_, last = numbers(STEP, tmp_path)
    assert last * 5 < first, (first, last)


@pytest.mark.slow
def test_as_much_is_kept_as_was_in_use_at_once_and_not_more_than_half_a_gibibyte(
    tmp_path: Path,
) -> None:
    one, three, six = numbers(KEPT, tmp_path)
    assert 120 <= one <= 140
    assert 250 <= three <= 270  # the two that are new
    assert six <= 150  # all that is kept is 512 MiB, of which 384 were there
