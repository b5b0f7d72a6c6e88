"""What the tests of several pictures share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from seqmem_fast import cli


def panels(figure: Any) -> dict[str, Any]:
    return {axes.get_title(loc="left"): axes for axes in figure.axes if axes.get_title(loc="left")}


def shown(axes: Any) -> torch.Tensor:
    return torch.from_numpy(axes.images[0].get_array().filled(float("nan")).copy())


def trained(task: str, model: str, folder: Path, *options: str) -> str:
    """The option that names the checkpoint of a small network after one step."""
    pytest.importorskip("safetensors")
    pytest.importorskip("rich")
    kept = f"--checkpoint={folder / 'kept'}"
    tiny = ["--steps=1", "--sequences=1", "--controller-size=8", "--memory-size=6"]
    assert cli.main(["train", task, kept, f"--model={model}", *tiny, *options]) == 0
    return kept


def check_drawn(task: str, out: Path, *options: str) -> None:
    """`plot` of that task leaves a picture."""
    assert cli.main(["plot", task, f"--out={out}", *options]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
