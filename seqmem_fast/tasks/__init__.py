"""Tasks that need a memory, as generators: the five of the NTM paper (Graves, Wayne & Danihelka,
arXiv 1410.5401, section 4), copying in turn and graph traversal (the DNC paper, Graves et al.
2016), one-shot classification (Santoro et al., arXiv 1605.06065), two for memories of a fixed
size, overwriting recall and distant recall, and one for attention to a window, long copy.

    loader = DataLoader(Stream(CopyTask(), batch_size=16), batch_size=None)

Each task is a class whose fields are its sizes. `python -m seqmem_fast train copy` trains on it;
what was tried and measured stands in docs/training.md.
"""

from .associative_recall import AssociativeRecallTask
from .copy import CopyTask
from .copy_in_turn import CopyInTurnTask
from .distant_recall import DistantRecallTask
from .dynamic_ngrams import DynamicNgramsTask
from .graph_traversal import GraphTraversalTask
from .long_copy import LongCopyTask
from .one_shot import OneShotTask
from .overwrite_recall import OverwriteRecallTask
from .priority_sort import PrioritySortTask
from .repeat_copy import RepeatCopyTask
from .task import Batch, Probe, Score, Stream, Task, evaluate, loss_of, wrong_bits

__all__ = [
    "TASKS",
    "AssociativeRecallTask",
    "Batch",
    "CopyInTurnTask",
    "CopyTask",
    "DistantRecallTask",
    "DynamicNgramsTask",
    "GraphTraversalTask",
    "LongCopyTask",
    "OneShotTask",
    "OverwriteRecallTask",
    "PrioritySortTask",
    "Probe",
    "RepeatCopyTask",
    "Score",
    "Stream",
    "Task",
    "evaluate",
    "loss_of",
    "wrong_bits",
]

TASKS: dict[str, type[Task]] = {
    "associative_recall": AssociativeRecallTask,
    "copy": CopyTask,
    "copy_in_turn": CopyInTurnTask,
    "distant_recall": DistantRecallTask,
    "dynamic_ngrams": DynamicNgramsTask,
    "graph_traversal": GraphTraversalTask,
    "long_copy": LongCopyTask,
    "one_shot": OneShotTask,
    "overwrite_recall": OverwriteRecallTask,
    "priority_sort": PrioritySortTask,
    "repeat_copy": RepeatCopyTask,
}
