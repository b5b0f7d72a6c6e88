"""Rows of a benchmark table, whatever the op: a file declares them, the harness does the rest.

benchmarks/bench_<op>.py in full, with LETTERS naming the sizes of a shape:

    def work(b: int, t: int, d: int) -> rows.Work:
        def sample(rng: torch.Generator) -> tuple[Any, ...]:
            return tuple(torch.randn(b, t, d, generator=rng) for _ in range(3))

        return rows.Work(sample, ours=ops.attention, peers={"eager": reference.attention})

    LETTERS = "B, T, d"
    ROWS = rows.pair("attention", "8, 512, 64", partial(work, 8, 512, 64), goals={"eager": (6, 3)})
    GPU_ROWS = rows.pair("attention", "8, 512, 64", partial(work, 8, 512, 64))

    def random_rows(rng: random.Random, place: int) -> list[rows.Row] | None:
        b, t, d = rows.draw(rng, (16, 512, 128))
        return rows.pair("attention", f"{b}, {t}, {d}", partial(work, b, t, d))

    test_row = measure.test_row  # pytest benchmarks/bench_attention.py

    if __name__ == "__main__":
        sys.exit(measure.main("attention", ROWS, LETTERS))

Sides are functions or modules called with a sample's arguments. In a training step every floating
tensor among the arguments (but for `constants`), and every parameter of a module, receives a
gradient from `loss`. All values, outputs or gradients, are compared with the first peer's (or
`exact`'s) in float64. `make bench` finds the file by its name, `random_shapes --op <op>` its
random_rows (None: the draw is too large, draw again), `benchmarks.harness.gpu` its GPU_ROWS.
`others` take peers that are not torch's; pair() makes a row for each mode.
"""

from __future__ import annotations

import copy
import importlib
import math
import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.harness.timing import TORCH_POOL

INFERENCE, TRAINING = MODES = ("inference", "training step")
OURS = "ours"
COMPILED = "torch.compile"


@dataclass(frozen=True)
class Contender:
    """A way to do a row's work: `prepare` is not timed, `call` is, `values` are checked."""

    name: str
    prepare: Callable[[Any], Any]
    call: Callable[[Any], Any]
    values: Callable[[Any], list[Tensor]]  # outputs, or gradients of inputs and weights
    pool: str = TORCH_POOL  # whose threads it uses
    compiles: bool = (
        False  # its first call does: made before all timing, its seconds kept separately
    )


@dataclass(frozen=True)
class Bench:
    """What a row compares; samples and contenders are made when they are asked for."""

    sample: Callable[[int], Any]  # seed -> the arguments of one call
    contenders: Mapping[str, Callable[[], Contender]]  # ours and the peers, the main peer first
    exact: Callable[[Any], list[Tensor]] | None = None  # a sample's values in float64
    one_of: Collection[str] = ()  # peers of which only the fastest is reported
    missing: Sequence[str] = ()  # peers that are not installed, with the reason

    @property
    def peers(self) -> list[str]:
        return [name for name in self.contenders if name != OURS]


def first_sum(outputs: Sequence[Tensor]) -> Tensor:
    """The loss of a training step unless another is given: the first output's sum."""
    return outputs[0].sum()


def sum_all(outputs: Sequence[Tensor]) -> Tensor:
    """A loss through every floating output."""
    return torch.stack([output.sum() for output in outputs if output.is_floating_point()]).sum()


@dataclass(frozen=True)
class Work:
    """One shape's work: fresh arguments, and who does it with them."""

    sample: Callable[[torch.Generator], tuple[Any, ...]]
    ours: Callable[..., Any]
    peers: Mapping[str, Callable[..., Any]]  # the first one is the main peer
    exact: Callable[..., Any] | None = None  # what float64 is computed by; the first peer if None
    loss: Callable[[Sequence[Tensor]], Tensor] = first_sum
    constants: Collection[int] = ()  # positions of arguments that take no gradient
    on_host: Collection[int] = ()  # positions of arguments that stay on the CPU beside a GPU
    compile_with: Mapping[str, Any] | None = None  # the first peer under torch.compile as well
    others: Mapping[str, Callable[[str], Contender]] = field(default_factory=dict)  # from the mode
    infer_only: Collection[str] = ()  # of the others
    one_of: Collection[str] = ()
    missing: Sequence[str] = ()
    checked: bool = True  # False where sides draw random numbers of their own


@dataclass(frozen=True)
class Row:
    """One line of the table: an op at one shape, dtype and mode; `work` must cost little."""

    op: str
    shape: str
    mode: str
    work: Callable[[], Work]
    dtype: str = "float32"
    goals: Mapping[str, float] = field(default_factory=dict)  # peer -> ratio asked for
    name: str = ""  # where the op's name says too little
    predicted_s: Callable[[], float] | None = None  # a peer's call, if it may take long
    whole_step: bool = False  # the sides take the training step themselves: timed as plain calls

    @property
    def label(self) -> str:
        return f"{self.name or self.op} {self.shape}"

    def __str__(self) -> str:
        return f"{self.label} {self.dtype} {self.mode}"

    def build(self, device: str = "cpu") -> Bench:
        """The row's samples and contenders; beside a GPU, torch's alone."""
        return bench(self.work(), INFERENCE if self.whole_step else self.mode, device)


def pair(
    op: str,
    shape: str,
    work: Callable[[], Work],
    *,
    goals: Mapping[str, tuple[float | None, float | None]] | None = None,
    modes: Collection[str] = MODES,
    dtype: str = "float32",
    name: str = "",
    predicted_s: Callable[[str], float] | None = None,
) -> list[Row]:
    """A row for each mode; goals: peer -> the ratios asked of inference and training."""
    out = []
    for place, mode in enumerate(MODES):
        asked = {peer: ratio[place] for peer, ratio in (goals or {}).items()}
        wanted = {peer: ratio for peer, ratio in asked.items() if ratio is not None}
        predicted = None if predicted_s is None else partial(predicted_s, mode)
        if mode in modes:
            out.append(Row(op, shape, mode, work, dtype, wanted, name, predicted))
    return out


def of_sizes(op: str, work: Callable[..., Work]) -> Callable[..., list[Row]]:
    """pair() of sizes: both modes of the work that they make, or of what `make` makes of them."""

    def of(
        *sizes: int,
        goals: Mapping[str, tuple[float | None, float | None]] | None = None,
        make: Callable[..., Work] = work,
    ) -> list[Row]:
        return pair(op, ", ".join(map(str, sizes)), partial(make, *sizes), goals=goals)

    return of


def uninstalled(name: str, *modules: str) -> str | None:
    """Why a peer that needs them does not stand in the table; None if it does."""
    try:
        for module in modules:
            importlib.import_module(module)
    except ImportError as error:
        return f"{name} is not installed ({error})"
    return None


def draw(rng: random.Random, most: Iterable[int]) -> list[int]:
    """A size for each bound, every order of magnitude as likely as any other."""
    return [round(math.exp(rng.uniform(0, math.log(bound)))) for bound in most]


def bench(work: Work, mode: str, device: str = "cpu") -> Bench:
    """A work's contenders in one mode; samples are made on the CPU, and moved by each contender."""
    main_peer = next(iter(work.peers.values()))
    reference = work.exact or main_peer

    def sample(seed: int) -> tuple[Any, ...]:
        args = work.sample(torch.Generator().manual_seed(seed))
        if mode != TRAINING:
            return args
        return tuple(a if k in work.constants else tree_map(_leaf, a) for k, a in enumerate(args))

    def moved(args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(
            a if k in work.on_host else tree_map(partial(_moved, device=device), a)
            for k, a in enumerate(args)
        )

    move = None if device == "cpu" else moved

    def exact(args: tuple[Any, ...]) -> list[Tensor]:
        function = reference
        if isinstance(reference, nn.Module):
            function = copy.deepcopy(reference).to(device).double()
        side = contender("float64", function, mode, work.loss, move)
        return side.values(side.prepare(tree_map(_double, args)))

    def side(name: str, function: Callable[..., Any]) -> Contender:
        there = function.to(device) if isinstance(function, nn.Module) else function
        return contender(name, there, mode, work.loss, move)

    def compiled(options: Mapping[str, Any]) -> Contender:
        torch.compiler.reset()  # graphs of one function count against a limit, then it is eager
        return replace(side(COMPILED, torch.compile(main_peer, **options)), compiles=True)

    contenders: dict[str, Callable[[], Contender]] = {
        name: partial(side, name, function)
        for name, function in {**work.peers, OURS: work.ours}.items()
    }
    if work.compile_with is not None:
        contenders[COMPILED] = partial(compiled, work.compile_with)
    if device == "cpu":
        contenders |= {
            name: partial(other, mode)
            for name, other in work.others.items()
            if mode == INFERENCE or name not in work.infer_only
        }
    return Bench(
        sample, contenders, exact if work.checked else None, work.one_of, tuple(work.missing)
    )


def _leaf(value: Any) -> Any:
    differentiable = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().requires_grad_() if differentiable else value


def _double(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def _moved(value: Any, device: str) -> Any:
    """A tensor there, as a leaf of its own."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().to(device).requires_grad_(value.requires_grad)


def _outputs(found: Any) -> Sequence[Tensor]:
    """The tensors found; a plain tuple of them as it is, since this is part of what is timed."""
    if type(found) is tuple and all(isinstance(each, Tensor) for each in found):
        return found
    return [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]


def contender(
    name: str,
    function: Callable[..., Any],
    mode: str,
    loss: Callable[[Sequence[Tensor]], Tensor] = first_sum,
    move: Callable[[tuple[Any, ...]], tuple[Any, ...]] | None = None,
) -> Contender:
    """A torch side: inference under no_grad, or forward, loss, backward and gradients cleared."""
    weights = list(function.parameters()) if isinstance(function, nn.Module) else []
    if isinstance(function, nn.Module):
        function.train(mode == TRAINING)

    def prepare(args: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[Tensor]]:
        args = args if move is None else move(args)
        leaves = [t for t in tree_leaves(args) if isinstance(t, Tensor) and t.requires_grad]
        return args, leaves + weights

    def infer(given: Any) -> Any:
        with torch.no_grad():
            return function(*given[0])

    def train(given: Any) -> None:
        args, leaves = given
        loss(_outputs(function(*args))).backward()
        for leaf in leaves:
            leaf.grad = None

    def outputs(given: Any) -> list[Tensor]:
        return [t for t in _outputs(infer(given)) if t.is_floating_point()]

    def gradients(given: Any) -> list[Tensor]:
        args, leaves = given
        loss(_outputs(function(*args))).backward()
        found = [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves]
        for leaf in leaves:
            leaf.grad = None
        return found

    if mode == INFERENCE:
        return Contender(name, prepare, infer, outputs)
    return Contender(name, prepare, train, gradients)


def error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest |a - b| / |b| among outputs, or among gradients; |a| where b is zero."""
    worst = 0.0
    for a, b in zip(found, exact, strict=True):
        size = float(b.norm())
        worst = max(worst, float((a.double() - b).norm()) / (size or 1.0))
    return worst
