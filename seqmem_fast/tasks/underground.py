"""Parts of the London Underground, as the DNC paper asks about it: station, line, next station.

Only lines that stop at two neighbouring stations of a part are edges, one in each direction.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

Edge = tuple[str, str, str]  # from, by, to

# Stations in the order of the first direction.
LINES: dict[tuple[str, str, str], tuple[str, ...]] = {
    ("Bakerloo", "south", "north"): (
        "Baker Street",
        "Regent's Park",
        "Oxford Circus",
        "Piccadilly Circus",
        "Charing Cross",
        "Embankment",
        "Waterloo",
    ),
    ("Central", "east", "west"): (
        "Bond Street",
        "Oxford Circus",
        "Tottenham Court Road",
        "Holborn",
    ),
    ("District", "east", "west"): ("Westminster", "Embankment"),
    ("Jubilee", "south", "north"): (
        "Baker Street",
        "Bond Street",
        "Green Park",
        "Westminster",
        "Waterloo",
    ),
    ("Northern", "south", "north"): (
        "Warren Street",
        "Goodge Street",
        "Tottenham Court Road",
        "Leicester Square",
        "Charing Cross",
        "Embankment",
        "Waterloo",
    ),
    ("Piccadilly", "east", "west"): (
        "Green Park",
        "Piccadilly Circus",
        "Leicester Square",
        "Covent Garden",
        "Holborn",
    ),
    ("Victoria", "south", "north"): ("Warren Street", "Oxford Circus", "Green Park"),
}
INNER = (
    "Bond Street",
    "Charing Cross",
    "Green Park",
    "Leicester Square",
    "Oxford Circus",
    "Piccadilly Circus",
    "Tottenham Court Road",
)


class Map(NamedTuple):
    """A graph whose nodes and labels have names."""

    stations: tuple[str, ...]
    lines: tuple[str, ...]
    edges: tuple[Edge, ...]


def part(stations: tuple[str, ...]) -> Map:
    """What lies between these stations."""
    edges: list[Edge] = []
    for (line, there, back), stops in LINES.items():
        for one, other in pairwise(stops):
            if one in stations and other in stations:
                edges += [(one, f"{line} {there}", other), (other, f"{line} {back}", one)]
    lines = sorted({by for _, by, _ in edges})
    return Map(stations, tuple(lines), tuple(edges))


MAPS = (part(INNER), part(tuple(sorted({stop for stops in LINES.values() for stop in stops}))))
