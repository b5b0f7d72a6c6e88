"""Many threads, forked processes and DataLoader workers: all compute what one thread computes."""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from op_suite import differentiable, values_and_gradients
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from seqmem_fast.ops.common import STEMS

OPS = sorted({*STEMS.values()})


class Work:
    """A call of an op or a module on tensors of its own; calling it gives the same each time."""

    def __init__(self, function: Callable[..., Any], tensors: tuple[Tensor | None, ...]) -> None:
        self.function, self.tensors = function, tensors

    def outputs(self, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """The floating outputs, those of a state included."""
        found = self.function(*(tensors or self.tensors))
        leaves = torch.utils._pytree.tree_leaves(found)
        return tuple(t for t in leaves if isinstance(t, Tensor) and t.is_floating_point())

    def __call__(self) -> list[Tensor]:
        """Outputs and all gradients of one training step."""
        if not isinstance(self.function, torch.nn.Module):
            return values_and_gradients(self.outputs, self.tensors)
        tensors = differentiable(self.tensors)
        outputs = self.outputs(*tensors)
        leaves = [*tensors, *self.function.parameters()]
        grads = torch.autograd.grad([o.square().sum() for o in outputs], leaves)
        return [*(o.detach() for o in outputs), *grads]


def works(stem: str) -> list[Work]:
    """Calls below and above the size for several threads, which stand beside the op's tests."""
    return [Work(*pair) for pair in importlib.import_module(f"test_{stem}").threaded()]


def all_works() -> list[Work]:
    return [work for stem in OPS for work in works(stem)]


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.mark.sanitize
def test_eight_threads_at_once() -> None:
    """Each runs all ops, and no two the same one at the same time."""
    work = all_works()
    expected = [one() for one in work]
    failures: list[str] = []
    start = threading.Barrier(8)

    def loop(index: int) -> None:
        start.wait()
        for turn in range(len(work)):
            k = (3 * index + turn) % len(work)
            try:
                if not same(work[k](), expected[k]):
                    failures.append(f"thread {index}, work {k}: other bits")
            except Exception as error:
                failures.append(f"thread {index}, work {k}: {error!r}")

    threads = [threading.Thread(target=loop, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.sanitize
@pytest.mark.parametrize("stem", OPS)
def test_calls_with_other_thread_counts_between(stem: str, restored_threads: None) -> None:
    for work in works(stem):
        expected = work()
        for count in (1, 4, 2, 8, 1, 3):
            torch.set_num_threads(count)
            assert same(work(), expected)


class Items(Dataset[list[Tensor]]):
    """Items that a worker computes with our ops, as some pipelines do."""

    def __init__(self, work: list[Work]) -> None:
        self.work = work

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> list[Tensor]:
        with torch.no_grad():
            return [
                output
                for one in self.work
                for output in one.outputs(
                    *(t if t is None else t * (1 + index / 8) for t in one.tensors)
                )
            ]


@pytest.mark.slow
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_dataloader_workers(context: str) -> None:
    # A spawned worker is a fresh process, which has nothing of this one's to trip over.
    both = [works(stem) for stem in (OPS if context == "fork" else ["lstm"])]
    large = [work for some in both for work in some[len(some) // 2 :]]
    for work in large:
        work()  # the parent's thread pool exists before the fork
    data = Items(large)
    workers = 2 if context == "fork" else 1
    loader = DataLoader(data, batch_size=None, num_workers=workers, multiprocessing_context=context)
    for index, item in enumerate(loader):
        assert same(item, data[index])


def in_child(check: Callable[[], Any], seconds: int = 60) -> None:
    """Run ``check`` after a bare fork; a false or late answer fails."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = 0 if check() else 2
        finally:
            os._exit(code)
    timer = threading.Timer(seconds, os.kill, (pid, 9))
    timer.start()
    try:
        _, status = os.waitpid(pid, 0)
    finally:
        timer.cancel()
    assert os.waitstatus_to_exitcode(status) == 0


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_use_after_fork(restored_threads: None) -> None:
    """In the child one thread must do: libgomp's pool does not survive a fork."""
    work = all_works()
    expected = [one() for one in work]

    def check() -> bool:
        torch.set_num_threads(1)
        with torch.no_grad():  # autograd's own threads do not survive either
            return all(
                same(one.outputs(), result[: len(one.outputs())])
                for one, result in zip(work, expected, strict=True)
            )

    in_child(check)
    assert all(same(one(), result) for one, result in zip(work, expected, strict=True))
