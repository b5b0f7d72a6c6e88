"""Graph traversal (DNC paper, Graves et al. 2016): along which edges to which node?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from .task import AnswersTask, Batch, Probe, Size, draw_between, ordinal, require_positive
from .underground import MAPS, Edge, Map


class Graphs(NamedTuple):
    """One graph a row; nodes and kinds of edges are numbers until they get their labels."""

    edges: Tensor  # [B, E, 2] source and kind, in the order told
    leads_to: Tensor  # [B, nodes, kinds] the destination; -1 where there is no such edge


class Words(NamedTuple):
    """A sequence in names: of stations on a map, else a letter a node, a number a kind of edge."""

    edges: list[Edge]  # in the order told
    walks: list[list[Edge]]  # of each question
    nodes: list[str]  # what each label of a node stands for


@dataclass(frozen=True)
class GraphTraversalTask(AnswersTask):
    """A graph is read, an edge a step, in random order: source, label of the edge, destination.
    Then come `questions`: a node and a label at the first step, at each further one a label alone;
    every step asks which node that edge leads to, from the node of the answer before.

    Which node and which kind of edge has which label is drawn anew for each sequence, so nothing
    can be learnt but to look edges up, and to look up the next one with what was found. An edge is
    only found by source and label together: each label stands on several edges, no node has two of
    one label. A curriculum lets paths grow; graphs of all sizes are there from the start.

    Other graphs are real: :data:`~.underground.MAPS`, parts of the London Underground, by `map`.

    With E edges, Q questions and paths of P edges: input [E + Q P, B, 2 node_labels + edge_labels
    + 1], the last channel on in questions; target [.., B, node_labels] with a 1 for the right node;
    the last Q P steps count.

    Raises:
        ValueError: a number out of range.
    """

    node_labels: Annotated[int, "different labels of nodes"] = 16
    edge_labels: Annotated[int, "different labels of edges"] = 16
    max_nodes: Annotated[int, "most nodes"] = 8
    max_edges: Annotated[int, "most edges"] = 20
    max_path: Annotated[int, "most edges of a path"] = 4
    questions: Annotated[int, "paths asked for"] = 4

    def __post_init__(self) -> None:
        require_positive(
            "graph_traversal",
            edge_labels=self.edge_labels,
            max_path=self.max_path,
            questions=self.questions,
        )
        self._check(self.max_nodes, self.max_edges)

    def _check(self, nodes: int, edges: int) -> None:
        for name, low, value, high in (
            ("nodes", 2, nodes, self.node_labels),
            ("edges", nodes, edges, nodes * self.edge_labels),
        ):
            if not low <= value <= high:
                raise ValueError(f"graph_traversal: expected {low} to {high} {name}, got {value}")

    @property
    def input_size(self) -> int:
        return 2 * self.node_labels + self.edge_labels + 1

    @property
    def output_size(self) -> int:
        return self.node_labels

    @property
    def stages(self) -> int:
        return self.max_path - 1

    def draw(self, generator: Generator, stage: int | None = None) -> Size:
        """Paths of one edge at stage 0, up to one more at each; edges in proportion to nodes."""
        path = self.max_path if stage is None else min(self.max_path, 1 + stage)
        nodes = draw_between(2, self.max_nodes, generator)
        edges = math.ceil(self.max_edges * nodes / self.max_nodes)
        edges = max(nodes, min(edges, nodes * self.edge_labels))
        return {
            "nodes": nodes,
            "edges": draw_between(nodes, edges, generator),
            "path": draw_between(1, path, generator),
            "map": 0,
        }

    def batch(
        self,
        batch_size: int,
        generator: Generator,
        *,
        nodes: int = 8,
        edges: int = 20,
        path: int = 4,
        map: int = 0,
    ) -> Batch:
        return self._batch(batch_size, generator, nodes, edges, path, map)[0]

    def batch_in_words(
        self,
        generator: Generator,
        *,
        nodes: int = 8,
        edges: int = 20,
        path: int = 4,
        map: int = 0,
    ) -> tuple[Batch, Words]:
        """A batch of one sequence, and what it says."""
        batch, labels = self._batch(1, generator, nodes, edges, path, map)
        names = (
            [chr(ord("A") + node) for node in range(self.node_labels)],
            [str(kind) for kind in range(1, self.edge_labels + 1)],
        )
        if map:
            place = map_of(map)
            for known, chosen, meant in zip(names, labels, place[:2], strict=True):
                for label, name in zip(chosen[0].tolist(), meant, strict=True):
                    known[label] = name
        nodes_named, kinds_named = names
        asked = int(batch.mask.sum())
        shown, right = batch.input[:, 0], batch.target[:, 0].argmax(1).tolist()
        source, kind, destination, _ = (
            part.argmax(1).tolist()
            for part in shown.split((self.node_labels, self.edge_labels, self.node_labels, 1), 1)
        )
        told = len(shown) - asked
        edges_told = [
            (nodes_named[a], kinds_named[by], nodes_named[b])
            for a, by, b in zip(source[:told], kind[:told], destination[:told], strict=True)
        ]
        walks: list[list[Edge]] = []
        for step in range(told, len(shown)):
            if (step - told) % path == 0:
                walks.append([])
                at = nodes_named[source[step]]
            to = nodes_named[right[step]]
            walks[-1].append((at, kinds_named[kind[step]], to))
            at = to
        return batch, Words(edges_told, walks, nodes_named)

    def _batch(
        self, batch_size: int, generator: Generator, nodes: int, edges: int, path: int, map: int
    ) -> tuple[Batch, tuple[Tensor, Tensor]]:
        """Also the labels [B, nodes] and [B, kinds] of what the graphs number."""
        require_positive("graph_traversal", path=path)
        if map:
            graphs = self._map(map, batch_size, generator)
        else:
            self._check(nodes, edges)
            graphs = self._random(batch_size, generator, nodes, edges)
        told = graphs.edges.shape[1]
        steps = told + self.questions * path
        start, kinds, answers = self._walks(graphs, generator, path)

        shape = batch_size, steps
        source = torch.full(shape, -1)
        kind, destination = source.clone(), source.clone()
        source[:, :told], kind[:, :told] = graphs.edges.unbind(2)
        rows = torch.arange(batch_size).unsqueeze(1)
        destination[:, :told] = graphs.leads_to[rows, source[:, :told], kind[:, :told]]
        source[:, told::path] = start
        kind[:, told:] = kinds.flatten(1)
        right = answers.flatten(1)

        def labelled(which: Tensor, labels: Tensor, width: int) -> Tensor:
            """One-hot [B, T, width]; nothing where there is none."""
            chosen = labels.gather(1, which.clamp(min=0)).masked_fill(which < 0, width)
            return F.one_hot(chosen, width + 1)[..., :width]

        nodes_named = _labels(batch_size, graphs.leads_to.shape[1], self.node_labels, generator)
        kinds_named = _labels(batch_size, graphs.leads_to.shape[2], self.edge_labels, generator)
        asked = (torch.arange(steps) >= told).long().view(1, -1, 1).expand(batch_size, -1, -1)
        parts = (
            labelled(source, nodes_named, self.node_labels),
            labelled(kind, kinds_named, self.edge_labels),
            labelled(destination, nodes_named, self.node_labels),
            asked,
        )
        kind_of = torch.get_default_dtype()
        input = torch.cat(parts, 2).transpose(0, 1).to(kind_of).contiguous()
        target = input.new_zeros(steps, batch_size, self.node_labels)
        target[told:] = labelled(right, nodes_named, self.node_labels).transpose(0, 1).to(kind_of)
        mask = input.new_zeros(steps, batch_size)
        mask[told:] = 1
        return Batch(input, target, mask, torch.full((batch_size,), steps)), (
            nodes_named,
            kinds_named,
        )

    def _random(self, rows: int, generator: Generator, nodes: int, edges: int) -> Graphs:
        """Every node has an edge that leads away; the rest is even chance."""
        kinds = self.edge_labels
        least = -(-edges // nodes)  # kinds, that so many edges need
        most = min(kinds, max(least, 2 * edges // 3))  # few enough that each has several edges
        used = torch.randint(least, most + 1, (rows, 1, 1), generator=generator)
        chance = torch.rand(rows, nodes, kinds, generator=generator)
        chance.masked_fill_(torch.arange(kinds) >= used, -1)
        chance.scatter_add_(2, chance.argmax(2, keepdim=True), torch.ones(rows, nodes, 1))
        chosen = chance.flatten(1).topk(edges).indices
        chosen = chosen.gather(1, torch.rand(rows, edges, generator=generator).argsort(1))
        source = chosen // kinds
        destination = torch.randint(1, nodes, (rows, edges), generator=generator)
        leads_to = torch.full((rows, nodes * kinds), -1)
        leads_to.scatter_(1, chosen, (source + destination) % nodes)
        told = torch.stack((source, chosen % kinds), 2)
        return Graphs(told, leads_to.unflatten(1, (nodes, kinds)))

    def _map(self, number: int, rows: int, generator: Generator) -> Graphs:
        place = map_of(number)
        if len(place.stations) > self.node_labels or len(place.lines) > self.edge_labels:
            raise ValueError(
                f"graph_traversal: map {number} needs {len(place.stations)} labels of nodes and "
                f"{len(place.lines)} of edges, got {self.node_labels} and {self.edge_labels}"
            )
        told = [(place.stations.index(a), place.lines.index(by)) for a, by, _ in place.edges]
        leads_to = torch.full((rows, len(place.stations), len(place.lines)), -1)
        for (source, kind), (_, _, b) in zip(told, place.edges, strict=True):
            leads_to[:, source, kind] = place.stations.index(b)
        order = torch.rand(rows, len(told), generator=generator).argsort(1)
        return Graphs(torch.tensor(told)[order], leads_to)

    def _walks(
        self, graphs: Graphs, generator: Generator, path: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Starts [B, Q], then kinds and destinations [B, Q, P], all edges out equally likely."""
        rows, nodes, kinds = graphs.leads_to.shape
        row = torch.arange(rows).unsqueeze(1)
        start = at = torch.randint(nodes, (rows, self.questions), generator=generator)
        taken, reached = [], []
        for _ in range(path):
            ways = graphs.leads_to[row, at]  # [B, Q, kinds]
            chance = torch.rand(rows, self.questions, kinds, generator=generator)
            taken.append(chance.masked_fill(ways < 0, -1).argmax(2))
            at = ways.gather(2, taken[-1].unsqueeze(2)).squeeze(2)
            reached.append(at)
        return start, torch.stack(taken, 2), torch.stack(reached, 2)

    def further(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The share of right answers after the 1st, 2nd, .. edge of a path."""
        asked = int(batch.mask[:, 0].sum())
        path = asked // self.questions
        right = self.right(logits, batch)[-asked:].float()
        right = right.unflatten(0, (self.questions, path)).mean(0)
        return {ordinal(edge): share for edge, share in enumerate(right[: self.max_path], 1)}

    def probes(self) -> list[Probe]:
        nodes, edges, path = self.max_nodes, self.max_edges, self.max_path
        most = self.node_labels
        larger = min(most, nodes + nodes // 2)
        sizes = [(nodes, edges, path, 0), (nodes, edges, 2 * path, 0)]
        sizes += [(n, edges * n // nodes, path, 0) for n in sorted({larger, most} - {nodes})]
        for number, place in enumerate(MAPS, 1):
            if len(place.stations) <= most and len(place.lines) <= self.edge_labels:
                sizes.append((len(place.stations), len(place.edges), path, number))
        return [
            Probe(
                f"{'Underground' if place else 'random'}: {n} nodes, {e} edges, paths of {p}",
                {"nodes": n, "edges": e, "path": p, "map": place},
                (n, e, p) <= (nodes, edges, path) and not place,
            )
            for n, e, p, place in sizes
        ]


def map_of(number: int) -> Map:
    """The number-th of MAPS, from 1; ValueError where there is none."""
    if not 1 <= number <= len(MAPS):
        raise ValueError(f"graph_traversal: expected map from 0 to {len(MAPS)}, got {number}")
    return MAPS[number - 1]


def _labels(rows: int, count: int, of: int, generator: Generator) -> Tensor:
    """[rows, count] different labels."""
    return torch.rand(rows, of, generator=generator).argsort(1)[:, :count]
