"""Where other programs keep threads from running, calls do with fewer of them for a while."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# Two threads on one core: while either runs, the other is kept from it.
SCRIPT = """
import os, time
import torch
import seqmem_fast as sf
from seqmem_fast import _C

torch.manual_seed(0)
torch.set_num_threads(2)
before = _C.available_threads()
lstm = sf.LSTM(64, 128)
x = torch.randn(100, 16, 64)
with torch.no_grad():
    quiet = lstm(x)[0]
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    for task in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(task), os.sched_getaffinity(0))
    seen = []
    for _ in range(50):
        same = torch.equal(lstm(x)[0], quiet)
        seen.append(_C.available_threads())
        assert same
    time.sleep(3)
    print(before, min(seen), _C.available_threads())
"""


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processors")
def test_a_team_without_cores_is_given_up_for_a_while() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.stdout.split() == ["2", "1", "2"], done.stdout + done.stderr
