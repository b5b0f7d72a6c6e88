"""`pytest benchmarks`: every row of every bench_<op>.py with every contender in it."""

from __future__ import annotations

from typing import Any


def pytest_generate_tests(metafunc: Any) -> None:
    """Gives the tests that take a row and a contender's name those of their file's ROWS."""
    if {"row", "name"} <= set(metafunc.fixturenames):
        rows = metafunc.module.ROWS
        cases = [(row, name) for row in rows for name in row.build().contenders]
        ids = [f"{row}-{name}".replace(" ", "-") for row, name in cases]
        metafunc.parametrize(("row", "name"), cases, ids=ids)
