"""The tasks' generators: small cases by hand, masks, seeds, and the DataLoader."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

pytest.importorskip("matplotlib")  # whose fonts one_shot reads

from seqmem_fast import tasks
from seqmem_fast.tasks import TASKS, Batch, Stream, Task, underground

SMALL: dict[str, tuple[Task, dict[str, int]]] = {
    "copy": (tasks.CopyTask(bits=3), {"length": 2}),
    "copy_in_turn": (tasks.CopyInTurnTask(bits=3), {"length": 2, "sequences": 3}),
    "repeat_copy": (tasks.RepeatCopyTask(bits=2), {"length": 2, "repeats": 3}),
    "associative_recall": (tasks.AssociativeRecallTask(bits=2, item_length=2), {"items": 3}),
    "distant_recall": (
        tasks.DistantRecallTask(keys=5, values=3, words=2, history=16, apart=4),
        {"history": 20},
    ),
    "dynamic_ngrams": (tasks.DynamicNgramsTask(order=3, length=9), {"length": 9}),
    "graph_traversal": (
        tasks.GraphTraversalTask(node_labels=5, edge_labels=3, max_nodes=4, max_edges=6),
        {"nodes": 4, "edges": 6, "path": 3},
    ),
    "long_copy": (tasks.LongCopyTask(symbols=3, delays=2, length=5), {"length": 7}),
    "one_shot": (tasks.OneShotTask(classes=3, side=10, letters=60), {"images": 4}),
    "overwrite_recall": (tasks.OverwriteRecallTask(keys=3, values=4, writes=7), {"writes": 9}),
    "priority_sort": (
        tasks.PrioritySortTask(bits=4, items=5, highest=3),
        {"items": 5, "highest": 3},
    ),
}


def draw(name: str, rows: int = 4, seed: int = 0) -> Batch:
    task, size = SMALL[name]
    return task.batch(rows, torch.Generator().manual_seed(seed), **size)


def test_there_is_a_case_for_every_task() -> None:
    assert SMALL.keys() == TASKS.keys()


@pytest.mark.parametrize("name", TASKS)
def test_shapes_values_and_masks(name: str) -> None:
    task, _ = SMALL[name]
    batch = draw(name)
    steps, rows, width = batch.input.shape
    assert (rows, width) == (4, task.input_size)
    assert batch.target.shape == (steps, rows, task.output_size)
    assert batch.mask.shape == (steps, rows)
    assert batch.lengths.tolist() == [steps] * rows
    assert set(batch.target.unique().tolist()) <= {0.0, 1.0}
    assert {1.0} <= set(batch.mask.unique().tolist()) <= {0.0, 1.0}
    assert not batch.target[batch.mask == 0].any()


@pytest.mark.parametrize("name", TASKS)
def test_the_seed_decides(name: str) -> None:
    one, same, other = (draw(name, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one.input, other.input)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    draw(name)
    assert torch.equal(before, torch.get_rng_state())


def test_copy_by_hand() -> None:
    batch = draw("copy")
    assert batch.mask[:, 0].tolist() == [0, 0, 0, 1, 1]
    assert torch.equal(batch.target[3:], batch.input[:2, :, :3])
    assert batch.input[2].tolist() == [[0, 0, 0, 1]] * 4
    assert not batch.input[3:].any() and not batch.input[:2, :, 3].any()


def test_copy_in_turn_by_hand() -> None:
    batch = draw("copy_in_turn")
    assert batch.mask[:, 0].tolist() == [0, 0, 0, 1, 1] * 3
    for start in (0, 5, 10):
        assert torch.equal(
            batch.target[start + 3 : start + 5], batch.input[start : start + 2, :, :3]
        )
        flags = batch.input[start : start + 5, :, 3:]
        assert flags.transpose(0, 1).tolist() == [[[1, 0], [1, 0], [0, 1], [0, 0], [0, 0]]] * 4
        assert not batch.input[start + 2 : start + 5, :, :3].any()
    assert tasks.CopyInTurnTask().draw(torch.Generator(), stage=0)["sequences"] in (1, 2)


def test_repeat_copy_by_hand() -> None:
    batch = draw("repeat_copy")
    shown = batch.input[:2, :, :2]
    assert batch.mask[:, 0].tolist() == [0] * 3 + [1] * 7
    assert torch.equal(batch.target[3:9, :, :2], torch.cat([shown, shown, shown]))
    assert batch.target[:, 0, 2].tolist() == [0] * 9 + [1]
    assert not batch.target[9, :, :2].any()
    assert not batch.input[3:].any() and not batch.input[:2, :, 2].any()


def test_the_number_of_copies_is_normalised() -> None:
    task = tasks.RepeatCopyTask()
    values = torch.tensor([task.normalised(n) for n in range(1, 11)], dtype=torch.float64)
    assert abs(float(values.mean())) < 1e-12
    assert abs(float(values.var(correction=0)) - 1) < 1e-12
    shown = task.batch(2, torch.Generator(), length=1, repeats=10).input[1, :, 8]
    torch.testing.assert_close(shown, torch.full((2,), 4.5 / math.sqrt(8.25)))
    assert tasks.RepeatCopyTask(min_repeats=4, max_repeats=4).normalised(4) == 1


def test_training_meets_repeat_copy_vectors_without_bits() -> None:
    task, size = tasks.RepeatCopyTask(), {"length": 6, "repeats": 2}

    def blanks(batch: Batch) -> float:
        vectors = batch.input[:6, :, :8]
        assert torch.equal(batch.target[7:19, :, :8], vectors.repeat(2, 1, 1))
        return float((vectors.sum(2) == 0).any(0).float().mean())

    shown = task.training_batch(4000, torch.Generator().manual_seed(0), **size)
    drawn = task.batch(4000, torch.Generator().manual_seed(0), **size)
    chance = 1 - (1 - 2**-8) ** 6  # that uniform bits give one
    assert abs(blanks(drawn) - chance) < 0.01
    assert abs(blanks(shown) - (1 - (1 - chance) * 7 / 8)) < 0.025  # five standard deviations
    assert not torch.equal(shown.input, drawn.input)


def edges_of(task: tasks.GraphTraversalTask, row: Tensor, told: int) -> dict[Any, int]:
    """Source and kind -> destination, of the first steps of a row [T, I]."""
    sizes = task.node_labels, task.edge_labels, task.node_labels, 1
    source, kind, destination, asked = row[:told].split(sizes, 1)
    assert all(bool((part.sum(1) == 1).all()) for part in (source, kind, destination))
    assert not asked.any()
    keys = zip(source.argmax(1).tolist(), kind.argmax(1).tolist(), strict=True)
    return dict(zip(keys, destination.argmax(1).tolist(), strict=True))


@pytest.mark.parametrize("place", [0, 1])
def test_graph_traversal_by_hand(place: int) -> None:
    task = tasks.GraphTraversalTask(questions=3) if place else SMALL["graph_traversal"][0]
    assert isinstance(task, tasks.GraphTraversalTask)
    size = {"path": 3, "map": 1} if place else SMALL["graph_traversal"][1]
    batch = task.batch(32, torch.Generator().manual_seed(0), **size)
    told = 20 if place else 6
    assert batch.mask[:, 0].tolist() == [0] * told + [1] * (3 * task.questions)
    nodes, kinds = task.node_labels, task.edge_labels
    for row in range(32):
        edges = edges_of(task, batch.input[:, row], told)
        assert len(edges) == told and all(a != b for (a, _), b in edges.items())
        at = -1
        for step, shown in enumerate(batch.input[told:, row]):
            assert bool(shown[:nodes].any()) == (step % 3 == 0)
            assert not shown[nodes + kinds : -1].any() and shown[-1] == 1
            if step % 3 == 0:
                at = int(shown[:nodes].argmax())
            at = edges[at, int(shown[nodes : nodes + kinds].argmax())]
            assert batch.target[told + step, row].nonzero().flatten().tolist() == [at]


def test_an_edge_of_a_random_graph_is_not_known_by_its_label_alone() -> None:
    task = tasks.GraphTraversalTask()
    batch = task.batch(50, torch.Generator().manual_seed(0), nodes=8, edges=20, path=1)
    kinds = [{kind for _, kind in edges_of(task, batch.input[:, row], 20)} for row in range(50)]
    assert max(map(len, kinds)) <= 13 and min(map(len, kinds)) <= 4
    assert len(set().union(*kinds)) == task.edge_labels  # which ones differs from row to row


def test_a_curriculum_of_graphs_lets_paths_grow() -> None:
    task, generator = tasks.GraphTraversalTask(), torch.Generator().manual_seed(0)
    for stage, most in ((0, (8, 20, 1)), (1, (8, 20, 2)), (3, (8, 20, 4)), (None, (8, 20, 4))):
        drawn = [task.draw(generator, stage) for _ in range(400)]
        assert tuple(max(d[name] for d in drawn) for name in ("nodes", "edges", "path")) == most
        assert all(2 <= d["nodes"] <= d["edges"] for d in drawn)
        assert max(d["edges"] for d in drawn if d["nodes"] == 2) == 5
    assert task.stages == 3


def test_the_underground_in_words() -> None:
    task = tasks.GraphTraversalTask()
    batch, words = task.batch_in_words(torch.Generator().manual_seed(3), path=4, map=1)
    inner = underground.MAPS[0]
    assert sorted(words.edges) == sorted(inner.edges) and len(inner.edges) == 20
    assert len(words.walks) == 4 and all(len(walk) == 4 for walk in words.walks)
    for walk in words.walks:
        assert set(walk) <= set(inner.edges)
        assert all(one[2] == next_one[0] for one, next_one in pairwise(walk))
    named = [words.nodes[label] for label in batch.target[20:, 0].argmax(1).tolist()]
    assert named == [to for walk in words.walks for _, _, to in walk]
    again = task.batch(1, torch.Generator().manual_seed(3), path=4, map=1)
    assert all(map(torch.equal, batch, again))


@pytest.mark.parametrize("place", underground.MAPS)
def test_a_map_leads_there_and_back(place: underground.Map) -> None:
    ways = {(one, by): other for one, by, other in place.edges}
    assert len(ways) == len(place.edges)  # no station has two edges of one label
    assert {one for one, _, _ in place.edges} == set(place.stations)
    assert all((other, one) in {(a, b) for a, _, b in place.edges} for one, _, other in place.edges)
    oxford = {by: to for (one, by), to in ways.items() if one == "Oxford Circus"}
    assert oxford["Central east"] == "Tottenham Court Road"
    assert oxford["Bakerloo south"] == "Piccadilly Circus"


def test_answers_along_a_graph_are_scored_edge_by_edge() -> None:
    task = tasks.GraphTraversalTask(questions=2)
    batch = task.batch(3, torch.Generator().manual_seed(0), nodes=8, edges=20, path=4)
    logits = batch.target * 50
    assert task.wrong(logits, batch).tolist() == [0] * 3 and task.loss(logits, batch) < 1e-6
    assert task.loss(torch.zeros_like(logits), batch).item() == pytest.approx(math.log(16))
    logits[20 + 1, 0] *= -1  # the 2nd edge of the first of two questions
    assert task.wrong(logits, batch).tolist() == [1, 0, 0]
    found = task.further(logits, batch)
    assert {name: share.tolist() for name, share in found.items()} == {
        "1st": [1, 1, 1],
        "2nd": [0.5, 1, 1],
        "3rd": [1, 1, 1],
        "4th": [1, 1, 1],
    }


@pytest.mark.parametrize("name", sorted(TASKS.keys() - {"repeat_copy", "one_shot"}))
def test_other_tasks_train_on_what_they_are_judged_by(name: str) -> None:
    task = tasks.TASKS[name]()
    size = task.draw(torch.Generator().manual_seed(1))
    shown = task.training_batch(3, torch.Generator().manual_seed(2), **size)
    drawn = task.batch(3, torch.Generator().manual_seed(2), **size)
    assert all(map(torch.equal, shown, drawn))


def test_associative_recall_by_hand() -> None:
    batch = draw("associative_recall", rows=32)
    assert batch.input.shape[0] == 3 * 3 + 2 + 2 + 2
    assert batch.mask[:, 0].tolist() == [0] * 13 + [1] * 2
    for row in range(32):
        shown = batch.input[:, row]
        assert shown[:, 2].nonzero().flatten().tolist() == [0, 3, 6]
        assert shown[:, 3].nonzero().flatten().tolist() == [9, 12]
        items = [shown[start : start + 2, :2].tolist() for start in (1, 4, 7)]
        query = shown[10:12, :2].tolist()
        answers = [items[i + 1] for i in range(2) if items[i] == query]
        assert batch.target[13:, row].tolist() in answers
        assert not shown[13:].any()


def test_every_item_but_the_last_is_asked_for() -> None:
    task = tasks.AssociativeRecallTask(bits=8)
    batch = task.batch(64, torch.Generator().manual_seed(0), items=4)
    query = batch.input[17:20, :, :8]
    asked = [
        [
            bool((batch.input[4 * i + 1 : 4 * i + 4, row, :8] == query[:, row]).all())
            for i in range(4)
        ]
        for row in range(64)
    ]
    counts = torch.tensor(asked).sum(0).tolist()
    assert min(counts[:3]) > 8 and counts[3] == 0


def test_priority_sort_by_hand() -> None:
    batch = draw("priority_sort")
    for row in range(4):
        shown = batch.input[:5, row]
        wanted = sorted(shown.tolist(), key=lambda vector: -vector[4])[:3]
        assert batch.target[5:, row].tolist() == [vector[:4] for vector in wanted]
    assert batch.mask[:, 0].tolist() == [0] * 5 + [1] * 3
    assert not batch.input[5:].any()
    assert batch.input[:5, :, 4].abs().max() <= 1 and batch.input[:5, :, 4].min() < 0


def test_ngrams_predict_the_next_bit() -> None:
    batch = draw("dynamic_ngrams")
    assert batch.input.shape == (8, 4, 1)
    assert batch.mask[:, 0].tolist() == [0] + [1] * 7  # two bits make the first context
    assert torch.equal(batch.target[1:-1, :, 0], batch.input[2:, :, 0])


def test_ngram_frequencies_follow_a_beta_law_per_context() -> None:
    """After one context the share of ones in a long row is its table entry: arcsine over rows."""
    task = tasks.DynamicNgramsTask(order=2, length=600)
    batch = task.batch(400, torch.Generator().manual_seed(3), length=600)
    before, after = batch.input[..., 0], batch.target[..., 0]
    visits = (before == 1).sum(0)
    shares = ((before == 1) * after).sum(0)[visits > 100] / visits[visits > 100]
    assert shares.numel() > 150
    assert abs(float(shares.mean()) - 0.5) < 0.15
    assert float(((shares < 0.05) | (shares > 0.95)).float().mean()) > 0.15  # uniform: 0.1


def test_the_optimal_estimator_by_hand() -> None:
    task = tasks.DynamicNgramsTask(order=2, length=4)
    bits = torch.tensor([1.0, 1.0, 1.0, 0.0])
    batch = Batch(
        bits[:-1].view(3, 1, 1), bits[1:].view(3, 1, 1), torch.ones(3, 1), torch.tensor([3])
    )
    # After a 1 came 1, 1, 0: chances 1/2, then 3/4, then 1 - 5/6.
    wanted = -sum(math.log2(chance) for chance in (1 / 2, 3 / 4, 1 / 6))
    assert abs(task.best_cost(batch) - wanted) < 1e-5


def test_the_optimal_estimator_beats_a_coin_and_nothing_beats_it() -> None:
    task = tasks.DynamicNgramsTask()
    batch = task.batch(50, torch.Generator().manual_seed(0), length=200)
    cost = task.best_cost(batch)
    assert 100 < cost < 195 * 0.8


class Oracle(torch.nn.Module):
    """Says a given target, with some bits flipped."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self.target = target

    def forward(self, input: Tensor) -> Tensor:
        return (self.target * 2 - 1) * 30


def test_wrong_bits_count_only_where_the_mask_is() -> None:
    batch = draw("copy")
    flipped = batch.target.clone()
    flipped[:3] = 1  # not asked for
    flipped[3, 1] = 1 - flipped[3, 1]
    flipped[4, 2, 0] = 1 - flipped[4, 2, 0]
    logits = Oracle(flipped)(batch.input)
    assert tasks.wrong_bits(logits, batch).tolist() == [0, 3, 1, 0]
    torch.testing.assert_close(tasks.loss_of(logits, batch), torch.tensor(4 * 30 / 24.0))


def test_evaluate_gives_means_over_sequences() -> None:
    task, size = SMALL["copy"]
    target = task.batch(3, torch.Generator().manual_seed(7), **size).target
    target[3, 1] = 1 - target[3, 1]
    score = tasks.evaluate(Oracle(target), task, size, 3, 7)
    assert score.wrong_bits == 1.0
    assert abs(score.perfect - 2 / 3) < 1e-6
    assert abs(score.cost - 3 * 30 / math.log(2) / 3) < 1e-3
    assert score.best_cost is None


def test_evaluate_knows_the_least_cost() -> None:
    task = tasks.DynamicNgramsTask(order=2, length=20)
    zeros = torch.nn.Linear(1, 1)
    torch.nn.init.zeros_(zeros.weight)
    torch.nn.init.zeros_(zeros.bias)
    score = tasks.evaluate(zeros, task, None, 30, 0, batch_size=20)
    assert abs(score.cost - 19) < 1e-3  # a coin for each bit
    assert score.best_cost is not None and 0 < score.best_cost < 19


def test_a_dataloader_takes_the_stream() -> None:
    stream = Stream(tasks.CopyTask(bits=2, max_length=3), 5, seed=3)
    loaded = iter(DataLoader(stream, batch_size=None))
    direct = iter(stream)
    sizes = set()
    for _ in range(12):
        ours, theirs = next(direct), next(loaded)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        sizes.add(ours.input.shape[0])
    assert sizes == {3, 5, 7}


def test_workers_of_a_dataloader_draw_apart() -> None:
    stream = Stream(tasks.CopyTask(max_length=1), 8, seed=3)
    loaded = iter(DataLoader(stream, batch_size=None, num_workers=2))
    first, second = next(loaded), next(loaded)
    assert not torch.equal(first.input, second.input)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: tasks.CopyTask(bits=0), "copy: expected bits of at least 1, got 0"),
        (
            lambda: tasks.CopyTask(min_length=5, max_length=4),
            "min_length <= max_length, got 5 and 4",
        ),
        (lambda: tasks.CopyTask(min_length=0), "1 <= min_length"),
        (lambda: tasks.RepeatCopyTask(max_repeats=0), "min_repeats <= max_repeats"),
        (lambda: tasks.AssociativeRecallTask(min_items=1), "expected min_items from 2, got 1"),
        (lambda: tasks.DynamicNgramsTask(order=1), "expected order from 2, got 1"),
        (lambda: tasks.DynamicNgramsTask(order=6, length=5), "expected length from 6 on, got 5"),
        (lambda: tasks.PrioritySortTask(items=3), "1 <= highest <= items, got 16 and 3"),
        (lambda: tasks.OneShotTask(classes=1), "one_shot: expected classes from 2, got 1"),
        (lambda: tasks.OneShotTask(letters=40), "expected letters from 50, got 40"),
        (lambda: tasks.OneShotTask(images=0), "expected images of at least 1, got 0"),
        (lambda: tasks.GraphTraversalTask(max_nodes=1), "expected 2 to 16 nodes, got 1"),
        (lambda: tasks.GraphTraversalTask(max_edges=7), "expected 8 to 128 edges, got 7"),
        (lambda: tasks.GraphTraversalTask(questions=0), "expected questions of at least 1, got 0"),
        (
            lambda: tasks.GraphTraversalTask().batch(1, torch.Generator(), map=3),
            "expected map from 0 to 2, got 3",
        ),
        (
            lambda: tasks.GraphTraversalTask(node_labels=8).batch(1, torch.Generator(), map=2),
            "map 2 needs 16 labels of nodes and 14 of edges, got 8 and 16",
        ),
        (lambda: tasks.CopyTask().batch(1, torch.Generator(), length=0), "length of at least 1"),
        (lambda: Stream(tasks.CopyTask(), 0), "batch_size of at least 1, got 0"),
    ],
)
def test_sizes_out_of_range_are_named(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_probes_go_beyond_training(name: str) -> None:
    task = TASKS[name]()
    probes = task.probes()
    assert probes[0].trained and not probes[-1].trained
    for probe in probes[:2]:
        batch = task.batch(2, torch.Generator(), **probe.size)
        assert batch.input.shape[1] == 2
