"""The machines (controllers with a memory of slots), described as far as their tests differ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from types import ModuleType
from typing import Any

import torch
from op_suite import Case, Function, Threaded
from torch import Tensor
from torch.utils._pytree import tree_map_only

from seqmem_fast import ops
from seqmem_fast.ops.dnc import _words_of
from seqmem_fast.reference import dnc, lrua, ntm
from seqmem_fast.reference.common import Sample
from seqmem_fast.reference.dnc import DNCOptions, DNCState
from seqmem_fast.reference.lrua import LRUAState
from seqmem_fast.reference.ntm_addressing import NTMState

Sizes = tuple[int, int, int, int, int, int]
SIZES = (5, 3, 4, 6, 10, 5)  # T, B, I, C, N, M; slots that fill no whole vectors
BATCH = (1, 1, 0, 0, 0, 0, 0, 0, 0)  # the batch dimension of a state's parts


@dataclass(frozen=True)
class Machine:
    """One op; `sample`, `case` and `raw` are calls of it."""

    op: str
    state: Any  # the NamedTuple
    reference: ModuleType
    options: Callable[[dict[str, Any]], list[Any]]  # the raw op's, but for its last two
    padded: str  # the sample with lengths and reset
    traces: slice  # which of the raw op's traces have a gradient
    kept: int  # from which result on the raw op's backward takes them, beside features
    constant: str = ""  # a part of the state that has no gradient
    unpacked: bool = False  # the raw op takes the state's parts one by one
    norm: bool = False  # it takes a layer norm

    def run(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(ops, self.op)(*args, **kwargs)

    def trace(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(ops, f"{self.op}_trace")(*args, **kwargs)

    def exact(self, *args: Any, **kwargs: Any) -> Any:
        """The reference, with its trace."""
        return getattr(self.reference, f"{self.op}_trace")(*args, **kwargs)

    @property
    def names(self) -> list[str]:
        return [sample.name for sample in self.reference.sample_inputs()]

    def sample(
        self,
        name: str = "plain",
        dtype: torch.dtype = torch.float64,
        sizes: Sizes = SIZES,
        **kwargs: Any,
    ) -> Sample:
        samples = self.reference.sample_inputs(dtype=dtype, sizes=sizes, **kwargs)
        return next(s for s in samples if s.name == name)

    def threaded(self, **defaults: Any) -> Threaded:
        """Calls below and above the size at which one takes several threads."""
        sizes = (4, 1, 5, 16, 12, 6), (6, 37, 5, 40, 70, 20)
        samples = [self.sample(dtype=torch.float32, sizes=one) for one in sizes]
        cases = [self.case(sample, **defaults) for sample in samples]
        return [(case.op, case.tensors) for case in cases]

    def learning(self, state: Any) -> tuple[Any, ...]:
        """The parts of a state, or of what goes with one, that have a gradient."""
        pairs = zip(self.state._fields, state, strict=True)
        return tuple(part for name, part in pairs if name != self.constant)

    def case(self, sample: Sample, **defaults: Any) -> Case:
        """The op and its traces, of positional tensors: input, state, weight and bias of the head
        values, controller, norm, initial, lengths, reset. What has no gradient is no result, and
        no argument but for lengths and reset."""
        input, state, controller, *head = sample.args
        options = {**defaults, **sample.kwargs}
        norm, first = options.pop("norm", ()), options.pop("initial", None)
        lengths, reset = options.pop("lengths", None), options.pop("reset", None)
        groups = [self.learning(state), head, controller, norm]
        groups.append(() if first is None else self.learning(first))
        ends = accumulate(map(len, groups), initial=1)
        slices = [slice(*both) for both in pairwise(ends)]
        make, fields, chosen = self.state, self.state._fields, self.traces
        at = fields.index(self.constant) if self.constant else len(fields)

        def whole(parts: Any, like: Any, rows: int | None) -> Any:
            held = [part[:rows].to(parts[0].dtype) for part in like[at : at + 1]]
            return make(*parts[:at], *held, *parts[at:])

        def bind(name: str, functions: Any) -> Function:
            function = getattr(functions, name)

            def call(*tensors: Any) -> tuple[Tensor, ...]:
                parts, ends, layers, scale, start = [tensors[one] for one in slices]
                given = {**options, "norm": scale} if norm else options
                features, final, trace = function(
                    tensors[0],
                    whole(parts, state, tensors[0].size(1)),
                    layers,
                    *ends,
                    initial=None if first is None else whole(start, first, None),
                    lengths=tensors[-2],
                    reset=tensors[-1],
                    **given,
                )
                traces = (trace,) if isinstance(trace, Tensor) else trace
                return features, *final[:at], *final[at + 1 :], *traces[chosen]

            return call

        batch = self.learning(BATCH[: len(fields)])
        return Case(
            bind(sample.function, ops),
            bind(sample.function, self.reference),
            (input, *(t for group in groups for t in group), lengths, reset),
            (1, *batch, *[None] * sum(map(len, groups[1:])), 0, 1),
            (1, *batch, *[1] * (chosen.stop - chosen.start)),
        )

    def raw(self, sample: Sample) -> tuple[list[Any], list[Any]]:
        """The tensors and options of the op as the dispatcher has it, but for its last two."""
        input, state, controller, *head = sample.args
        kwargs = dict(sample.kwargs)
        norm, *rest = (kwargs.pop(name, None) for name in ("norm", "initial", "lengths", "reset"))
        tensors = [input, *state] if self.unpacked else [input, list(state)]
        tensors += [list(controller), *head, *([list(norm or ())] if self.norm else [])]
        return [*tensors, list(rest[0] or ()), *rest[1:]], self.options(kwargs)

    def leaves(self, tensors: list[Any]) -> list[Any]:
        """Copies of such tensors that ask for a gradient, where they have one."""

        def leaf(a: Any, differs: bool = True) -> Any:
            if isinstance(a, list) and self.constant and len(a) == len(self.state._fields):
                names = zip(a, self.state._fields, strict=True)
                return [leaf(part, name != self.constant) for part, name in names]
            if not differs:
                return a
            return tree_map_only(Tensor, lambda t: t.clone().requires_grad_(), a)

        return [leaf(a) for a in tensors[:-2]] + tensors[-2:]

    @property
    def outputs(self) -> int:
        """How many results of the raw op come before what only its backward takes."""
        return 1 + len(self.state._fields) + self.traces.stop

    def learning_of(self, found: Any) -> list[Any]:
        """Those of the raw op's outputs that have a gradient."""
        end = 1 + len(self.state._fields)
        return [found[0], *self.learning(found[1:end]), *found[end : self.outputs][self.traces]]


def _dnc_options(kwargs: dict[str, Any]) -> list[Any]:
    kind = kwargs.pop("controller_type", "lstm")
    options = DNCOptions(**kwargs)
    return [_words_of(options, kind), options.norm_floor, options.eps, options.mask_min]


def _is_lstm(kwargs: dict[str, Any]) -> bool:
    return kwargs.get("controller_type", "lstm") == "lstm"


NTM = Machine(
    "ntm",
    NTMState,
    ntm,
    lambda kwargs: [
        kwargs.get("heads", "wr"),
        kwargs.get("shift_range", 1),
        _is_lstm(kwargs),
        kwargs.get("squash", True),
    ],
    padded="all_padded",
    traces=slice(0, 1),
    kept=6,
    unpacked=True,
)
LRUA = Machine(
    "lrua",
    LRUAState,
    lrua,
    lambda kwargs: [
        _is_lstm(kwargs),
        kwargs.get("add", "own") == "own",
        kwargs.get("strength", False),
        kwargs.get("erase_all", False),
        kwargs.get("gamma", 0.95),
    ],
    padded="all_padded",
    traces=slice(1, 3),
    kept=9,
    constant="usage",
)
DNC = Machine(
    "dnc", DNCState, dnc, _dnc_options, padded="reset", traces=slice(0, 3), kept=10, norm=True
)
