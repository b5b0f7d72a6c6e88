"""Where other programs keep threads from running, calls do with fewer of them for a while."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

needs_two = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processors")

# Two threads on one core: while either runs, the other is kept from it.
BEGIN = """
import os, time
import torch
import seqmem_fast as sf
from seqmem_fast import _C

torch.manual_seed(0)
torch.set_num_threads(2)
before = _C.available_threads()

def use(*cores):
    for task in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(task), cores)

cores = sorted(os.sched_getaffinity(0))[:2]
"""
OFTEN = """
lstm = sf.LSTM(64, 128)
x = torch.randn(100, 16, 64)
with torch.no_grad():
    quiet = lstm(x)[0]
    use(cores[0])
    seen = []
    for _ in range(50):
        same = torch.equal(lstm(x)[0], quiet)
        seen.append(_C.available_threads())
        assert same
    time.sleep(3)
    print(before, min(seen), _C.available_threads())
"""


# Another program takes one of the cores for 1.5 ms, ten times a second.
RARELY = """
import multiprocessing

def take():
    os.sched_setaffinity(0, {cores[1]})
    while True:
        end = time.perf_counter() + 0.0015
        while time.perf_counter() < end:
            pass
        time.sleep(0.1)

other = multiprocessing.get_context("fork").Process(target=take, daemon=True)
other.start()
lstm = sf.LSTM(256, 256)
x = torch.randn(400, 1, 256)
seen = []
with torch.no_grad():
    end = time.perf_counter() + 4
    while time.perf_counter() < end:
        seen.append(_C.available_threads())
        lstm(x)
print(before, sorted(seen)[len(seen) // 3])
"""


def run(script: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", BEGIN + script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.slow
@needs_two
def test_a_team_without_cores_is_given_up_for_a_while() -> None:
    assert run(OFTEN) == ["2", "1", "2"]


@pytest.mark.slow
@needs_two
def test_a_stall_now_and_then_is_not_worth_fewer_threads() -> None:
    """It costs a few milliseconds; so would a pause, in which one thread does all the work."""
    assert run(RARELY) == ["2", "2"]
