"""Settings that every test runs under."""

import functools
import gc
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

# cuBLAS asks for this under deterministic algorithms, which every test runs with.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.runtime import interpreter

    prepare = functools.cache(interpreter._patch_lang)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        """A kernel's functions prepare Triton's modules once, not at each of their calls."""
        prepare(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
    ask, known = interpreter._get_np_dtype, {}

    def np_dtype(dtype: Any) -> Any:
        """Asked several times for every operation, and slow to say; a block's is its elements'."""
        name = dtype.scalar.name
        if name not in known:
            known[name] = ask(dtype)
        return known[name]

    interpreter._get_np_dtype = np_dtype

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores already
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow tests first: started last, one of them would leave the other workers idle."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish() -> None:
    """The thousands of tests stay until the end: no collection of garbage looks through them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fresh memory is NaN, so that an element a kernel forgets to write shows itself.

    `torch.use_deterministic_algorithms` would import the compiler: 2 s of every process.
    """
    torch.set_deterministic_debug_mode("error")
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.set_deterministic_debug_mode("default")


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def restored_threads() -> Iterator[None]:
    """For tests that change the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
