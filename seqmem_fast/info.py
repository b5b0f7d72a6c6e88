"""``python -m seqmem_fast info``: what a bug report needs."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence
from importlib import metadata, util

import torch

from seqmem_fast import _C


def main(arguments: Sequence[str]) -> int:
    """Print the collected facts as a list, or as JSON."""
    parser = argparse.ArgumentParser(prog="python -m seqmem_fast info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    facts = collect()
    if parser.parse_args(arguments).json:
        print(json.dumps(facts, indent=2))
    else:
        width = max(map(len, facts))
        print("\n".join(f"{name:{width}}  {value}" for name, value in facts.items()))
    return 0


def collect() -> dict[str, str | int]:
    """The facts, in reading order."""
    build = _C.build_info()
    return {
        "seqmem_fast": build["version"],
        "torch": torch.__version__,
        "built against": f"torch {build['torch']}, C++ {build['cplusplus']}",
        "compiler": build["compiler"],
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": processor(),
        "ISA in use": _C.cpu_capability(),
        "ISA available": ", ".join(available_isas(build["isas"])),
        "ISA compiled": ", ".join(build["isas"]),
        "bf16 runs on": bf16(build["bf16"]),
        "ATEN_CPU_CAPABILITY": os.environ.get("ATEN_CPU_CAPABILITY", "not set"),
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count() or 1,
        "OpenMP": build["openmp"],
        "CUDA kernels": "built" if build["cuda"] else "not built",
        "CUDA in torch": torch.version.cuda or "none",
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "Triton": metadata.version("triton") if util.find_spec("triton") else "not installed",
    }


def available_isas(compiled: Sequence[str]) -> list[str]:
    """The compiled ISAs that this processor can run, whatever ATEN_CPU_CAPABILITY asks for."""
    has = torch.cpu.get_capabilities()
    needs = {
        "baseline": (),
        "avx2": ("avx2", "fma3"),
        "avx512": ("avx512_f", "avx512_vl", "avx512_bw", "avx512_dq", "fma3"),
    }
    return [isa for isa in compiled if all(has.get(flag, False) for flag in needs[isa])]


def bf16(compiled: Sequence[str]) -> str:
    """What multiplies bf16 in LSTMs and attention: tiles, dot products or float32's kernels."""
    used = {
        "amx": "AMX tiles",
        "avx512_bf16": "AVX512-BF16 dot products",
        "float32": "float32 kernels",
    }[_C.bf16_in_use()]
    return f"{used}; compiled: {', '.join(compiled) or 'float32 alone'}"


def processor() -> str:
    """The processor's name as torch tells it, or else its family."""
    return str(torch.cpu.get_capabilities().get("cpu_name") or platform.machine())
