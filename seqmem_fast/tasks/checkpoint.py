"""A checkpoint that is whole at every moment: tensors in safetensors, all else in JSON.

A folder holds `checkpoint.json` and the tensor file it names. Tensors are written first, under a
name of their own; replacing the JSON file then makes them the checkpoint, in one step. Whatever
interrupts the writing, the folder holds the old checkpoint or the new one.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

INDEX = "checkpoint.json"
FORMAT = 1


class CheckpointError(RuntimeError):
    """There is no checkpoint, or it is damaged."""


def exists(folder: Path) -> bool:
    """Whether the folder holds a checkpoint, be it damaged."""
    return (folder / INDEX).is_file()


def step_of(folder: Path) -> int | None:
    """That of the folder's checkpoint, None where it holds none that can be read."""
    try:
        return int(json.loads((folder / INDEX).read_text())["facts"]["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Makes the folder, tries whether it can be written, and keeps other trainings out.

    Raises:
        CheckpointError: another training writes there.
        OSError: the folder cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    replace(folder / "try", b"")
    (folder / "try").unlink()
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems know no locks
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CheckpointError(f"another training writes to {folder}") from None
        yield
    finally:
        os.close(handle)


def save(folder: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Makes these the folder's checkpoint; `facts` must be fit for JSON.

    Raises:
        CheckpointError: safetensors is not installed.
        OSError: the folder cannot be written.
    """
    serialize = require_safetensors().save
    folder.mkdir(parents=True, exist_ok=True)
    content = serialize({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
    digest = hashlib.sha256(content).hexdigest()
    name = f"tensors-{digest[:16]}.safetensors"
    replace(folder / name, content)
    index = {"format": FORMAT, "tensors": name, "sha256": digest, "facts": facts}
    replace(folder / INDEX, (json.dumps(index, indent=2) + "\n").encode())
    for other in folder.glob("tensors-*"):
        if other.name != name:
            other.unlink()


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The folder's tensors and facts.

    Raises:
        CheckpointError: there is none, it is damaged, or safetensors is not installed.
    """
    deserialize = require_safetensors().load
    if not exists(folder):
        raise CheckpointError(f"no checkpoint in {folder}")
    try:
        index = json.loads((folder / INDEX).read_text())
        form, name, digest = index["format"], index["tensors"], index["sha256"]
        facts = dict(index["facts"])
        name = Path(name).name
    except (ValueError, KeyError, TypeError) as error:
        why = "not text" if isinstance(error, UnicodeDecodeError) else repr(error)
        raise CheckpointError(f"damaged checkpoint: {folder / INDEX} ({why})") from error
    if form != FORMAT:
        raise CheckpointError(f"{folder / INDEX}: expected format {FORMAT}, got {form}")
    try:
        content = (folder / name).read_bytes()
    except OSError as error:
        raise CheckpointError(f"damaged checkpoint: {error}") from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise CheckpointError(f"damaged checkpoint: {folder / name} is not what was written")
    return deserialize(content), facts


def replace(path: Path, content: bytes) -> None:
    """The file becomes `content` or stays as it was, even if the machine stops in between."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)  # the new name itself must reach the disk too
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def require_safetensors() -> Any:
    """The module safetensors.torch; CheckpointError where it is not installed."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise CheckpointError(
            "checkpoints need safetensors: run `pip install safetensors`"
        ) from error
    return safetensors.torch
