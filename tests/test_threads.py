"""Many threads, forked processes and DataLoader workers: all compute what one thread computes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from op_suite import differentiable, values_and_gradients
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import seqmem_fast as sf
from seqmem_fast.ops.hard_attention import sample_at
from seqmem_fast.reference import (
    additive_attention,
    attention,
    delta_memory,
    dnc,
    dynamic_memory,
    entmax,
    lrua,
    ntm,
)
from seqmem_fast.reference import ntm_addressing as functionals


class Work:
    """A call of an op or a module on tensors of its own; calling it gives the same each time."""

    def __init__(self, function: Callable[..., Any], *tensors: Tensor | None, **kwargs: Any):
        self.function, self.tensors, self.kwargs = function, tensors, kwargs

    def outputs(self, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """The floating outputs, those of a state included."""
        found = self.function(*(tensors or self.tensors), **self.kwargs)
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


def first(samples: Any) -> tuple[Tensor, ...]:
    return tuple(next(iter(samples)).args)


def functional(name: str) -> list[Work]:
    both = []
    for sizes in ((1, 9, 5, 2, 3), (8, 256, 32, 2, 3)):
        samples = functionals.sample_inputs(sizes=sizes)
        sample = next(s for s in samples if s.name == f"{name}_heads")
        both.append(Work(getattr(sf.ops, sample.function), *sample.args))
    return both


def op(function: Callable[..., Any], samples: Callable[..., Any], *sizes: Any) -> list[Work]:
    return [Work(function, *first(samples(sizes=one))) for one in sizes]


# Of each op: below and above the sizes at which a call takes several threads.
WORKS: dict[str, Callable[[], list[Work]]] = {
    "attention": lambda: op(
        sf.ops.attention, attention.sample_inputs, (1, 3, 9, 8, 8), (4, 96, 128, 32, 32)
    ),
    "additive_attention": lambda: op(
        sf.ops.additive_attention,
        additive_attention.sample_inputs,
        (1, 3, 9, 8, 8),
        (4, 48, 64, 16, 16),
    ),
    "delta_memory": lambda: op(
        sf.ops.delta_memory,
        delta_memory.sample_inputs,
        (1, 3, 1, 5, 6),
        (2, 80, 2, 64, 40),
    ),
    "dnc": lambda: [computer((4, 1, 5, 16, 12, 6)), computer((6, 37, 5, 40, 70, 20))],
    "entmax": lambda: op(sf.ops.entmax15, entmax.sample_inputs, (4, 3, 7), (60, 20, 900)),
    "dynamic_memory": lambda: op(
        sf.ops.dynamic_memory, dynamic_memory.sample_inputs, (2, 9, 8, 8), (32, 256, 32, 32)
    ),
    "hard_attention": lambda: [Work(hard_loss, torch.randn(rows, 10)) for rows in (3, 8_000)],
    "lrua": lambda: [least_used((4, 1, 5, 16, 12, 6)), least_used((6, 37, 5, 40, 70, 20))],
    "ntm": lambda: [sequence((4, 1, 5, 16, 12, 6)), sequence((6, 37, 5, 40, 70, 20))],
    "ntm_addressing": lambda: functional("addressing"),
    "ntm_read": lambda: functional("read"),
    "ntm_write": lambda: functional("write"),
    "lstm": lambda: [
        Work(sf.LSTM(16, 16), torch.randn(20, 1, 16)),
        Work(sf.LSTM(32, 64, 2, bidirectional=True), torch.randn(12, 8, 32)),
        Work(sf.LSTM(32, 320), torch.randn(12, 1, 32)),
        Work(sf.LSTM(64, 128), torch.randn(30, 24, 64)),
    ],
}


def all_works() -> list[Work]:
    return [work for make in WORKS.values() for work in make()]


def sequence(sizes: tuple[int, int, int, int, int, int]) -> Work:
    """ops.ntm; the module's output layer is torch's, whose bits depend on the thread count."""
    input, state, controller, *head = first(ntm.sample_inputs(sizes=sizes))

    def call(input: Tensor, *rest: Tensor) -> Any:
        return sf.ops.ntm(input, sf.NTMState(*rest[:5]), rest[7:], *rest[5:7])

    return Work(call, input, *state, *head, *controller)


def least_used(sizes: tuple[int, int, int, int, int, int]) -> Work:
    """ops.lrua, likewise; usage is no argument, as it has no gradient."""
    input, state, controller, *head = next(lrua.sample_inputs(sizes=sizes)).args

    def call(input: Tensor, *rest: Tensor) -> Any:
        given = sf.LRUAState(*rest[:3], state.usage, *rest[3:5])
        features, last = sf.ops.lrua(input, given, rest[7:], *rest[5:7])
        return features, last.memory, last.read_weights

    return Work(call, input, *state[:3], *state[4:], *head, *controller)


def computer(sizes: tuple[int, int, int, int, int, int]) -> Work:
    """ops.dnc, likewise."""
    input, state, controller, *interface = first(dnc.sample_inputs(sizes=sizes))
    parts = len(state)

    def call(input: Tensor, *rest: Tensor) -> Any:
        given, weights = dnc.DNCState(*rest[:parts]), rest[parts:]
        return sf.ops.dnc(input, given, weights[2:], *weights[:2])

    return Work(call, input, *state, *interface, *controller)


def hard_loss(logits: Tensor) -> tuple[Tensor, ...]:
    """Both of hard attention's ops, with numbers that are no matter of chance."""
    rows = torch.arange(logits.size(0))
    action, log_prob, entropy = sample_at(logits, (rows % 97) / 97)
    return log_prob, entropy, sf.ops.reinforce_loss(logits, action, (rows % 5).to(logits.dtype))


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
@pytest.mark.parametrize("name", WORKS)
def test_calls_with_other_thread_counts_between(name: str, restored_threads: None) -> None:
    for work in WORKS[name]():
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
    names = WORKS if context == "fork" else ["lstm"]
    large = [WORKS[name]()[-1] for name in names]
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
