"""What the references of all ops share."""

from __future__ import annotations

from typing import Any, NamedTuple


class Sample(NamedTuple):
    """The arguments of one call, under a name that says which option it reaches."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = {}  # noqa: RUF012  (never changed)
    function: str = ""  # the function's name in `ops/<op>.py`, where it is not the op's own
