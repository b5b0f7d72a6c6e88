"""Side-by-side timing: every side takes turns in one process, so that noise falls on all alike."""

from __future__ import annotations

import gc
import itertools
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "processor": time.process_time}
SAMPLE_S = 0.004  # calls shorter than this are timed several at once
LEAD_IN_S = 0.05  # longer calls evict the caches themselves, so need no untimed call before
SETTLE_S = 0.002  # the sides of one pool share its threads: a breath is enough
# Of the pools measured, OpenMP's idle threads spin on for 8 ms after a call, ONNX Runtime's for 40,
# JAX's not at all; a thread that spins shows in the process's CPU time within two ticks of 4 ms.
QUIET_S = 0.01
SPIN_LIMIT_S = 0.3
TORCH_POOL = "torch"


@dataclass(frozen=True)
class Budget:
    """How long one side may be timed, in seconds, and how often."""

    side_s: float = 1.0
    cap_s: float = 12.0  # up to here at least `few` samples are taken, however slow the call
    few: int = 3
    most: int = 200
    clock: str = "wall"  # of CLOCKS; "processor" for one thread on a machine with other work


@dataclass(frozen=True)
class Side:
    """One contestant: `call` is given the next of `inputs`, fresh random ones, at each call.

    The first call of all is made through `first`, the same work with its values handed out, so
    that checking a slow side costs no further call.
    """

    name: str
    call: Callable[[Any], Any]
    inputs: Sequence[Any]
    first: Callable[[Any], Any]
    pool: str = TORCH_POOL  # whose threads do its work


@dataclass
class Timing:
    """What was measured of one side; times in seconds per call."""

    first_s: float = 0.0
    first_values: Any = None
    samples: list[float] = field(default_factory=list)
    calls: int = 0
    faults: int = 0

    @property
    def median_s(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Interquartile range over the median; 0 for fewer than four samples."""
        if len(self.samples) < 4:
            return 0.0
        low, _, high = statistics.quantiles(self.samples, n=4)
        return (high - low) / self.median_s

    @property
    def faults_per_call(self) -> float:
        return self.faults / max(self.calls, 1)


def minor_faults() -> int:
    """Pages this process has touched for the first time since it started."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def wait_until_idle() -> float:
    """Waits until no idle thread of this process spins any more; the seconds waited."""
    start = time.perf_counter()
    while time.perf_counter() - start < SPIN_LIMIT_S:
        before = time.process_time()
        time.sleep(QUIET_S)
        if time.process_time() - before < QUIET_S / 10:
            break
    return time.perf_counter() - start


class _Runner:
    """Runs one side and keeps its timing."""

    def __init__(self, side: Side, clock: Clock) -> None:
        self.clock = clock
        self.call = side.call
        self.first = side.first
        self.pool = side.pool
        self.inputs = itertools.cycle(side.inputs)
        self.timing = Timing()
        self.calls_per_sample = 1
        self.estimate_s = 0.0
        self.done = False

    def timed(self, calls: int) -> float:
        call, inputs = self.call, self.inputs
        start = self.clock()
        for _ in range(calls):
            call(next(inputs))
        return (self.clock() - start) / calls

    def warm_up(self, cap_s: float) -> None:
        """The first call separately; then enough calls to know how many make one sample."""
        start = self.clock()
        self.timing.first_values = self.first(next(self.inputs))
        self.timing.first_s = self.estimate_s = self.clock() - start
        if self.estimate_s > cap_s:  # once is all there is time for: the first call must do
            self.timing.samples.append(self.estimate_s)
            self.timing.calls = 1
            self.done = True
            return
        self.estimate_s = self.timed(1)
        if self.estimate_s < SAMPLE_S:
            self.estimate_s = self.timed(max(2, min(50, int(SAMPLE_S / self.estimate_s))))
        self.calls_per_sample = max(1, round(SAMPLE_S / self.estimate_s))

    @property
    def sample_s(self) -> float:
        return self.estimate_s * self.calls_per_sample

    def sample(self) -> None:
        if self.estimate_s < LEAD_IN_S:
            time.sleep(SETTLE_S)
            self.timed(1)  # caches and threads of this side are warm again
        before = minor_faults()
        self.timing.samples.append(self.timed(self.calls_per_sample))
        self.timing.faults += minor_faults() - before
        self.timing.calls += self.calls_per_sample


def rounds(estimate_s: float, budget: Budget) -> int:
    """How many samples of about this length fit: a few at least, unless even they pass the cap."""
    fit = int(budget.side_s / estimate_s)
    if fit < budget.few:
        fit = min(budget.few, max(1, int(budget.cap_s / estimate_s)))
    return min(fit, budget.most)


def compare(sides: Sequence[Side], budget: Budget) -> dict[str, Timing]:
    """Times the sides in turn (A B A B ...), garbage collector off; one Timing for each name.

    Every side is given the same number of samples, as many as the slowest has time for; a side
    whose first call alone passes the budget's cap is not called again. Between two pools of
    threads the turn passes only when the idle threads of the one before have gone to sleep: each
    spins during its own turn, as its users have it, and takes no core from the next.
    """
    runners = {side.name: _Runner(side, CLOCKS[budget.clock]) for side in sides}
    several_pools = len({side.pool for side in sides}) > 1
    waits = [0.0]
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for runner in runners.values():
            runner.warm_up(budget.cap_s)
            if several_pools:
                waits.append(wait_until_idle())
        running = [runner for runner in runners.values() if not runner.done]
        slowest = max((runner.sample_s for runner in running), default=budget.cap_s)
        for _ in range(rounds(slowest + max(waits), budget)):
            for runner in running:
                runner.sample()
                if several_pools:
                    wait_until_idle()
    finally:
        if was_enabled:
            gc.enable()
    return {name: runner.timing for name, runner in runners.items()}
