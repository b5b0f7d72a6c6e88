"""What a reader must know of the machine before believing a number measured on it."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from seqmem_fast import info

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "benchmarks"
RESULTS = HERE / "results"

# glibc that keeps freed memory: no page is ever faulted in twice (regime M; D is the default)
KEEPING = {
    "MALLOC_TOP_PAD_": "268435456",
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "2147483648",
}


def malloc_regime(environ: Mapping[str, str] = os.environ) -> str:
    """ "D" (glibc's defaults), "M" (freed memory is kept) or "other"."""
    tuned = {k: v for k, v in environ.items() if k.startswith("MALLOC_")}
    if environ.get("LD_PRELOAD"):
        return "other"
    return "D" if not tuned else "M" if tuned == KEEPING else "other"


def child_environment(regime: str, threads: int) -> dict[str, str]:
    """The environment of a benchmark process; glibc reads MALLOC_* only when a process starts."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    if regime == "M":
        env.update(KEEPING)
    elif regime != "D":
        raise ValueError(f"malloc regime must be 'D' or 'M', got {regime!r}")
    # NPROC sizes JAX's pool, which has no call for it
    env.update(OMP_NUM_THREADS=str(threads), NPROC=str(threads), JAX_PLATFORMS="cpu")
    return env


def ensure_process(module: str, regime: str, threads: int) -> None:
    """Starts this program again where its environment is not the one asked for."""
    wanted = child_environment(regime, threads)
    if wanted != dict(os.environ):
        os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], wanted)


def ops() -> list[str]:
    """The ops that have a table: those with a bench_<op>.py, the LSTM first."""
    names = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))
    return sorted(names, key="lstm".__ne__)


def isa_extensions() -> list[str]:
    """The vector and matrix extensions that decide which kernel runs."""
    known = ("avx2", "f16c", "avx512f", "avx512vl", "avx512_bf16", "amx_bf16", "asimd", "sve")
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.is_file() else set()
    return [name for name in known if name in flags]


def commit() -> str | None:
    """The commit measured, with "+" if files differ from it; None outside a git clone."""
    command = ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def describe() -> dict[str, Any]:
    """Everything about the machine and the build, ready for JSON."""
    facts = info.collect()
    return {
        "cpu": facts["processor"],
        "isa": isa_extensions(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "bf16_in_hardware": bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()),
        "threads": torch.get_num_threads(),
        "malloc": malloc_regime(),
        "torch": torch.__version__,
        "libc": " ".join(platform.libc_ver()),
        "info": facts,
        "commit": commit(),
        "load_average": round(os.getloadavg()[0], 2),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def busy() -> str | None:
    """A warning where other programs want the processors too; None on a quiet machine."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load <= cores + 0.5:  # what an earlier pass of ours leaves behind
        return None
    return f"{load:.1f} processes want the {cores} processor(s): times and ratios will be wrong"


def one_line(machine: Mapping[str, Any]) -> str:
    """The machine in one line, for the head of a table or a chart."""
    return (
        f"{machine['cpu']}, {machine['torch_isa']}, {machine['threads']} thread(s), "
        f"torch {machine['torch']}, malloc {machine['malloc']}, {machine['date'][:10]}"
    )
