"""Pictures of what a network does inside; needs matplotlib (`pip install matplotlib`)."""

from .attention import attention
from .compressive import compressive
from .dnc import dnc
from .gates import gates, liveliest
from .graph_traversal import graph_traversal
from .ntm import ntm
from .one_shot import one_shot
from .overwrite_recall import overwrite_recall

__all__ = [
    "attention",
    "compressive",
    "dnc",
    "gates",
    "graph_traversal",
    "liveliest",
    "ntm",
    "one_shot",
    "overwrite_recall",
]
