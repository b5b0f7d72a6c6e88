"""Where other programs keep threads from running, calls do with fewer of them for a while."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

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


# The rule itself, by a clock of its own: when a pause ends after each stall, in milliseconds.
POLICY = """
#include <cstdio>
#include "common/busy.cpp"
using namespace seqmem;

int64_t now = kMillisecond;

void stall(double after_ms, double length_ms) {
  now += int64_t(after_ms * kMillisecond);
  const int64_t begin = now, length = int64_t(length_ms * kMillisecond);
  for (int part = 1; part <= 2; ++part) note_stall(begin, begin + length * part / 2, 1);
  now += length;
  const int64_t end = pause_end.load();
  std::printf("%d ", end > now ? int((end - now + length / 2) / kMillisecond) : 0);
  if (end > now) now = end;  // calls use fewer threads until then
}

int main() {
  for (int i = 0; i < 20; ++i) stall(1000, 0.4);
  stall(1000, 3);
  for (int i = 0; i < 5; ++i) stall(4, 3);
  stall(100, 3);
  stall(20, 3);
}
"""


def run(script: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", BEGIN + script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.slow
@needs_two
def test_a_team_without_cores_is_given_up_for_a_while() -> None:
    assert run(OFTEN) == ["2", "1", "2"]


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a compiler")
def test_only_stalls_close_together_begin_a_pause(tmp_path: Path) -> None:
    """One of 0.4 ms a second costs less than a pause; where others want the core, pauses grow."""
    source, program = tmp_path / "policy.cpp", tmp_path / "policy"
    source.write_text(POLICY)
    csrc = Path(__file__).parents[1] / "csrc"
    command = ["c++", "-std=c++20", f"-I{csrc}", str(source), "-o", str(program), "-pthread"]
    subprocess.run(command, check=True)
    pauses = [int(word) for word in subprocess.check_output([program], text=True).split()]
    rare, often, again = pauses[:20], pauses[20:26], pauses[26:]
    assert rare == [0] * 20
    assert often == [0, 20, 80, 320, 1280, 2000]
    assert again == [0, 20]
