"""Many threads, forked processes and DataLoader workers: all compute what one thread computes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import seqmem_fast as sf


def steps(module: sf.LSTM, x: Tensor) -> list[Tensor]:
    """Output, final state and all gradients of one training step."""
    x = x.detach().requires_grad_()
    output, state = module(x)
    leaves = [x, *module.parameters()]
    return [
        output.detach(),
        *(s.detach() for s in state),
        *torch.autograd.grad(output.sum(), leaves),
    ]


def modules() -> list[tuple[sf.LSTM, Tensor]]:
    """Below and above the sizes at which a call takes several threads."""
    torch.manual_seed(0)
    return [
        (sf.LSTM(16, 16), torch.randn(20, 1, 16)),
        (sf.LSTM(64, 128), torch.randn(30, 24, 64)),
        (sf.LSTM(32, 320), torch.randn(12, 1, 32)),
        (sf.LSTM(32, 64, 2, bidirectional=True), torch.randn(12, 8, 32)),
    ]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.mark.sanitize
def test_eight_threads_at_once() -> None:
    work = modules()
    expected = [steps(*one) for one in work]
    failures: list[str] = []
    start = threading.Barrier(8)

    def loop(index: int) -> None:
        start.wait()
        for turn in range(12):
            k = (index + turn) % len(work)
            try:
                if not same(steps(*work[k]), expected[k]):
                    failures.append(f"thread {index}, module {k}: other bits")
            except Exception as error:
                failures.append(f"thread {index}, module {k}: {error!r}")

    threads = [threading.Thread(target=loop, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.sanitize
def test_calls_with_other_thread_counts_between(restored_threads: None) -> None:
    module, x = modules()[1]
    expected = steps(module, x)
    for count in (1, 4, 2, 8, 1, 3):
        torch.set_num_threads(count)
        assert same(steps(module, x), expected)


class Features(Dataset[Tensor]):
    """Items that a worker computes with the module, as some pipelines do."""

    def __init__(self, module: sf.LSTM, x: Tensor) -> None:
        self.module, self.x = module, x

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        with torch.no_grad():
            output, _ = self.module(self.x * (index + 1))
        return torch.as_tensor(output)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_dataloader_workers(context: str) -> None:
    module, x = modules()[1]
    steps(module, x)  # the parent's thread pool exists before the fork
    data = Features(module, x)
    loader = DataLoader(data, batch_size=1, num_workers=2, multiprocessing_context=context)
    for index, item in enumerate(loader):
        torch.testing.assert_close(item[0], data[index], rtol=0, atol=0)


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
    work = modules()
    expected = [steps(*one) for one in work]

    def check() -> bool:
        torch.set_num_threads(1)
        return all(
            torch.equal(module(x)[0], result[0])
            for (module, x), result in zip(work, expected, strict=True)
        )

    in_child(check)
    assert all(same(steps(*one), result) for one, result in zip(work, expected, strict=True))
