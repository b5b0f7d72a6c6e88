"""Hostile arguments for every op of torch.ops.seqmem: forwards, backwards and checks.

A case calls one op with random arguments that only follow its schema, or with those of a real call,
as autograd makes it for the cases of the op's suite, of which one or two are spoilt. The op may
return or refuse. A failure is a process that dies or hangs, any other exception, and a Meta key
that disagrees with the CPU. Each case is made from the seed, the op and its number alone:

    python tests/fuzz.py --seconds 600         the campaign
    python tests/fuzz.py --op lstm --case 17   one case, in this process
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import multiprocessing
import os
import random
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # the suites, and the package beside them

import torch  # noqa: E402
from op_suite import OpSuite, differentiable, strided  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

HANG = 60  # seconds
MOST_FAILURES = 30  # deaths of a process; then the campaign ends
SIZES = (0, 1, 2, 3, 5, 8, 17)
INTEGERS = (0, 1, 2, 3, -1, 2**20, 2**40, 2**63 - 1, -(2**63))
FLOATS = (0.0, -1.0, 1e300, float("nan"), float("inf"))
STRINGS = ("", "r", "wr", "rw" * 40, "x", "r\0w", "ä")
DTYPES = (
    *(torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32),
    *(torch.bool, torch.uint8, torch.complex64, torch.float8_e4m3fn),
)
# Refusals of torch itself: of the schema, and of memory for a result that was asked for.
REFUSAL = re.compile(
    r"seqmem(::|: out of memory)|fixed-size array|allocate memory|not enough memory|overflow"
)
VALUES = re.compile(
    r"(lengths|action|batch_sizes|index in)\b|alpha in|expected blocks that exist"
)  # refused for what a meta tensor does not hold

Arguments = list[Any]


def ops() -> dict[str, Any]:
    names = (name for name in torch._C._dispatch_get_all_op_names() if name.startswith("seqmem::"))
    return {name[8:]: getattr(torch.ops.seqmem, name[8:]).default for name in sorted(names)}


class Recorder(TorchDispatchMode):
    """Keeps the arguments of every call of our ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, list[Arguments]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "seqmem":
            self.calls.setdefault(func._opname, []).append(list(args))
        return func(*args, **(kwargs or {}))


def descendants(suite: type) -> Iterator[Any]:
    for below in suite.__subclasses__():
        if hasattr(below, "names"):
            yield below
        yield from descendants(below)


def recorded() -> dict[str, list[Arguments]]:
    """Real calls of every op, from all suites."""
    for path in sorted(HERE.glob("test_*.py")):
        if re.search(r"^class \w+\(\w*Suite\)", path.read_text(), re.MULTILINE):
            importlib.import_module(path.stem)
    suites = sorted(descendants(OpSuite), key=lambda suite: (suite.__module__, suite.__name__))
    torch.manual_seed(0)
    with Recorder() as recorder:
        for suite in suites:
            names = getattr(suite, "all_names", suite.names)
            for name, dtype in itertools.product(names, DTYPES[:4]):
                case = suite().case(name, dtype)
                outputs = case.op(*differentiable(case.tensors))
                torch.autograd.backward([o.sum() for o in outputs if o.requires_grad])
    return recorder.calls


class Maker:
    """All that is random about one case."""

    def __init__(self, seed: str) -> None:
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(self.rng.getrandbits(40))

    def tensor(self) -> Tensor:
        shape = [self.rng.choice(SIZES) for _ in range(self.rng.randrange(5))]
        values = torch.randn(shape, generator=self.generator)
        return values.to(self.rng.choice((*DTYPES, *[torch.float32] * 5)))

    def value(self, kind: str) -> Any:
        """Anything that the schema lets through."""
        if kind.startswith("Optional["):
            return None if self.rng.random() < 0.4 else self.value(kind[9:-1])
        if kind.startswith("List["):
            return [
                self.value(kind[5:-1]) for _ in range(self.rng.choice((0, 1, 2, 3, 4, 5, 7, 8)))
            ]
        if kind == "Tensor":
            return self.tensor()
        if kind == "bool":
            return self.rng.random() < 0.5
        return self.rng.choice({"int": INTEGERS, "float": FLOATS, "str": STRINGS}[kind])

    def spoil(self, arguments: Arguments, kinds: Sequence[str]) -> None:
        """One argument, in place."""
        k = self.rng.randrange(len(arguments))
        old = arguments[k]
        if kinds[k].startswith("Optional[") and self.rng.random() < 0.2:
            arguments[k] = None if old is not None else self.value(kinds[k][9:-1])
        elif isinstance(old, Tensor):
            others = [a for a in arguments if isinstance(a, Tensor)]
            arguments[k] = self.spoilt(old, others)
        elif isinstance(old, list):
            arguments[k] = self.spoilt_list(old)
        else:
            arguments[k] = self.value(kinds[k])

    def spoilt_list(self, values: list[Any]) -> list[Any]:
        if not values:
            return [self.tensor()]
        k = self.rng.randrange(len(values))
        what = self.rng.randrange(4)
        if what == 0:
            return values[:k] + values[k + 1 :]
        if what == 1:
            return [*values, values[k]]
        old = values[k]
        new = self.spoilt(old, values) if isinstance(old, Tensor) else not old
        return [*values[:k], new, *values[k + 1 :]]

    def spoilt(self, t: Tensor, others: Sequence[Tensor]) -> Tensor:
        try:
            return self.rng.choice(SPOILS)(self, t, others) if is_plain(t) else t
        except RuntimeError:  # torch has no such tensor, of float8 above all
            return t

    def dim(self, t: Tensor) -> int:
        return self.rng.randrange(t.dim())


def resized(maker: Maker, t: Tensor, others: Sequence[Tensor]) -> Tensor:
    if t.dim() == 0:
        return t.expand(maker.rng.choice(SIZES))
    d = maker.dim(t)
    size = maker.rng.choice((*SIZES, t.size(d) - 1, t.size(d) + 1, 2 * t.size(d)))
    if t.size(d) == 0 or size <= 0:
        return t.new_zeros([max(size, 0) if k == d else n for k, n in enumerate(t.shape)])
    return t.index_select(d, torch.arange(size) % t.size(d))


def reshaped(maker: Maker, t: Tensor, others: Sequence[Tensor]) -> Tensor:
    what = maker.rng.randrange(5)
    if t.dim() == 0 or what == 0:
        return t.unsqueeze(0)
    if what == 1:
        return t.transpose(maker.dim(t), maker.dim(t))
    if what == 2:
        return t.flatten()
    if what == 3:
        return t.new_zeros(0)
    return t.sum(maker.dim(t)).to(t.dtype)


def restrided(maker: Maker, t: Tensor, others: Sequence[Tensor]) -> Tensor:
    """The same shape, laid out in another way."""
    what = maker.rng.randrange(4)
    if what == 0:
        return t.flatten()[:1].sum().to(t.dtype).expand(t.shape)
    if what == 1 and t.dim():
        return strided(t)
    if what == 2 and t.numel():  # elements that share memory
        return t.flatten()[: sum(t.shape) + 1].clone().as_strided(t.shape, [1] * t.dim())
    return torch.cat((t.flatten()[:1], t.flatten()))[1:].view(t.shape)  # not aligned


def refilled(maker: Maker, t: Tensor, others: Sequence[Tensor]) -> Tensor:
    if t.dtype == torch.bool:
        return torch.full_like(t, maker.rng.random() < 0.5)
    if not t.is_floating_point() and not t.is_complex():
        bounds = torch.iinfo(t.dtype)
        value = maker.rng.choice([v for v in INTEGERS if bounds.min <= v <= bounds.max])
        return t.clone().flatten().index_fill(0, torch.arange(min(1, t.numel())), value).view_as(t)
    return torch.full_like(t, maker.rng.choice((0.0, 1e4, -torch.finfo(t.dtype).max, *FLOATS[3:])))


def of_another_kind(maker: Maker, t: Tensor, others: Sequence[Tensor]) -> Tensor:
    what = maker.rng.randrange(7)
    if what == 0:
        return t.to_sparse()
    if what == 1:
        return torch.nested.nested_tensor([t.detach(), t.detach()])
    if what == 2 and t.dtype == torch.float32:
        return torch.quantize_per_tensor(t, 0.1, 0, torch.quint8)
    if what == 3 and t.dtype == torch.float32 and t.numel():
        return t.to_mkldnn()
    if what == 4:
        return torch._neg_view(t) if t.dtype != torch.bool else t
    if what == 5:
        return torch._efficientzerotensor(t.shape, dtype=t.dtype)
    return t.detach().to("meta").requires_grad_(t.requires_grad)  # a leaf: no way back


def demanding(maker: Maker, t: Tensor, others: Sequence[Tensor]) -> Tensor:
    return t.clone().requires_grad_() if t.is_floating_point() else t


def exchanged(maker: Maker, t: Tensor, others: Sequence[Tensor]) -> Tensor:
    return maker.rng.choice(others)


def retyped(maker: Maker, t: Tensor, others: Sequence[Tensor]) -> Tensor:
    return t.to(maker.rng.choice(DTYPES))


Spoil = Callable[[Maker, Tensor, Sequence[Tensor]], Tensor]
SPOILS: tuple[Spoil, ...] = (
    *(resized, resized, reshaped, restrided, refilled, retyped),
    *(of_another_kind, demanding, exchanged),
)


def is_plain(t: Tensor) -> bool:
    dense = t.layout == torch.strided and not t.is_nested and not t.is_quantized
    return dense and t.device.type == "cpu"


def copied(value: Any) -> Any:
    if isinstance(value, list):
        return [copied(v) for v in value]
    return value.detach().clone() if isinstance(value, Tensor) else value


def arguments_of(op: Any, calls: Sequence[Arguments], maker: Maker) -> Arguments:
    kinds = [str(argument.type) for argument in op._schema.arguments]
    if not calls or maker.rng.random() < 0.2:
        return [maker.value(kind) for kind in kinds]
    arguments = copied(maker.rng.choice(calls))
    for _ in range(maker.rng.choice((1, 1, 1, 2, 3))):
        maker.spoil(arguments, kinds)
    return arguments


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def outcome(op: Any, arguments: Arguments) -> Any:
    """What the op returns, or the exception with which it refuses."""
    try:
        return op(*arguments)
    except (ValueError, TypeError, NotImplementedError) as error:
        return error
    except RuntimeError as error:
        if "INTERNAL ASSERT" in str(error) or not REFUSAL.search(str(error)):
            raise
        return error


def differentiate(result: Any) -> None:
    """Backwards through what asks for a gradient."""
    outputs = [t for t in tensors_in(result) if t.requires_grad]
    if outputs:
        torch.autograd.backward([t.sum() for t in outputs])


def on_meta(value: Any) -> Any:
    if isinstance(value, list):
        return [on_meta(v) for v in value]
    return value.detach().to("meta") if isinstance(value, Tensor) else value


def check_meta(op: Any, arguments: Arguments, found: Any) -> None:
    """The Meta key comes to the same as the CPU; autograd may keep some results to itself."""
    if not all(is_plain(t) and not t.requires_grad for t in tensors_in(arguments)):
        return
    if isinstance(found, RuntimeError) or VALUES.search(str(found)):
        return
    meta = outcome(op, on_meta(arguments))
    if isinstance(found, Exception) or isinstance(meta, Exception):
        names = [argument.name for argument in op._schema.arguments]
        packed = dict(zip(names, arguments, strict=True)).get("batch_sizes") is not None
        if packed or VALUES.search(str(meta)):  # on meta, hx tells a packed input's batch
            return
        assert str(found) == str(meta), f"cpu: {found!r:.200}, meta: {meta!r:.200}"
        return
    for a, b in zip(tensors_in(found), tensors_in(meta), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, f"{a.shape, a.dtype} {b.shape, b.dtype}"


def run(name: str, op: Any, seed: int, number: int, calls: dict[str, list[Arguments]]) -> None:
    arguments = arguments_of(
        op, calls.get(name.removeprefix("check_"), ()), Maker(f"{seed} {name} {number}")
    )
    found = outcome(op, arguments)
    differentiate(found)
    check_meta(op, arguments, found)


def reproduction(seed: int, name: str, number: int) -> str:
    return f"python tests/fuzz.py --seed {seed} --op {name} --case {number}"


def work(names: Sequence[str], seed: int, cases: range, end: float, at: Any, failed: Any) -> None:
    """Runs cases until the time is up; `at` is the one that runs."""
    warnings.simplefilter("ignore")
    table, calls = ops(), recorded()
    for case in cases:
        if time.time() > end:
            break
        at.value = case
        name, number = names[case % len(names)], case // len(names)
        try:
            run(name, table[name], seed, number, calls)
        except Exception as error:
            what = f"{type(error).__name__}: {error}".split("\n")[0][:300]
            print(f"{reproduction(seed, name, number)}: {what}", flush=True)
            with failed.get_lock():
                failed.value += 1


class Worker:
    """A process that runs cases, watched for its end."""

    def __init__(
        self, context: Any, names: Sequence[str], seed: int, cases: range, end: float, failed: Any
    ) -> None:
        self.cases, self.at, self.failed = cases, context.Value("q", -1), failed
        self.seen, self.moved = -1, time.monotonic()
        arguments = (names, seed, cases, end, self.at, failed)
        self.process = context.Process(target=work, args=arguments)
        self.process.start()

    def ended(self) -> bool:
        """Of itself, or because it did not move on."""
        if self.at.value != self.seen:
            self.seen, self.moved = self.at.value, time.monotonic()
        patience = HANG if self.seen >= 0 else 10 * HANG  # the start takes longer than a case
        if self.process.is_alive() and time.monotonic() > self.moved + patience:
            self.process.kill()
            self.process.join()
        return not self.process.is_alive()


def campaign(names: Sequence[str], seed: int, count: int, seconds: float, jobs: int) -> int:
    """Workers until the time or the cases are used up; returns the number of failures."""
    context = multiprocessing.get_context("spawn")
    end, failed, cases = time.time() + seconds, context.Value("q", 0), 0
    waiting = [range(k, count, jobs) for k in range(jobs)]
    running: list[Worker] = []
    while waiting or running:
        running += [Worker(context, names, seed, mine, end, failed) for mine in waiting]
        waiting = []
        time.sleep(0.1)
        for worker in [worker for worker in running if worker.ended()]:
            running.remove(worker)
            case, code = worker.at.value, worker.process.exitcode
            if case < 0 and code == 0:
                continue  # the time was up
            if case < 0:
                raise RuntimeError(f"a worker has ended before its first case, exit code {code}")
            cases += (case - worker.cases.start) // jobs + 1
            if code != 0:
                failed.value += 1
                where = reproduction(seed, names[case % len(names)], case // len(names))
                print(f"{where}: the process has ended, exit code {code}", flush=True)
                if time.time() < end and failed.value < MOST_FAILURES:
                    waiting.append(range(case + jobs, count, jobs))
    print(f"{cases} cases of {len(names)} ops, {failed.value} failures (--seed {seed})")
    return failed.value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--op", help="this op alone")
    parser.add_argument("--case", type=int, help="this case of that op alone, in this process")
    parser.add_argument("--seconds", type=float, default=1e6)
    parser.add_argument("--count", type=int, default=10**9, help="the most cases")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    if args.case is None:
        names = [args.op] if args.op else list(ops())
        return min(campaign(names, args.seed, args.count, args.seconds, args.jobs), 1)
    warnings.simplefilter("ignore")
    run(args.op, ops()[args.op], args.seed, args.case, recorded())
    return 0


if __name__ == "__main__":
    sys.exit(main())
