"""A pytest plugin: `python -m pytest -p ptx.plugin --ptx-arch 90 --ptx-seed 0 <files>`.

Every test of the run launches Triton kernels in the interpreter.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .triton_driver import Session, emulated


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ptx-arch", type=int, default=90)
    parser.addoption("--ptx-seed", type=int, default=0)


@pytest.fixture(scope="session", autouse=True)
def ptx_session(request: pytest.FixtureRequest) -> Iterator[Session]:
    options = request.config.option
    with emulated(options.ptx_arch, options.ptx_seed) as session:
        yield session
    print(f"\nsm_{session.arch}, seed {session.seed}: {session.instructions} instructions of warps")
    for name, count in sorted(session.launches.items()):
        print(f"  {name}: {count} launches")
