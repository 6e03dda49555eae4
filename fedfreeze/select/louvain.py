"""Louvain's communities, on plain dictionaries and with few visits: as good as networkx finds, in less time."""

import random
from collections.abc import Mapping

Adjacency = Mapping[int, Mapping[int, float]]
"""Node -> neighbour -> weight over 0, both ways; a node that is its own neighbour has its own edge once."""

# The gain of modularity from one level to the next under which the search ends, as networkx has it.
_THRESHOLD = 1e-7


def louvain_communities(adjacency: Adjacency, seed: int) -> list[list[int]]:
    """Return the communities of a graph that has an edge. [Blondel et al., 2008]

    What `networkx.community.louvain_communities` does, in the same order, but for the nodes that are passed over while
    others move (see `_one_level`).
    """
    names = list(adjacency)
    place = {name: node for node, name in enumerate(names)}
    graph = [{place[other]: weight for other, weight in adjacency[name].items()} for name in names]
    drawing = random.Random(seed)
    total = sum(_degrees(graph)) / 2
    members = [[name] for name in names]
    quality = _modularity(graph, list(range(len(graph))), total)
    while True:
        community = _one_level(graph, total, drawing)
        numbers = {old: new for new, old in enumerate(sorted(set(community)))}  # those left without members go
        community = [numbers[old] for old in community]
        joined: list[list[int]] = [[] for _ in numbers]
        for node, number in enumerate(community):
            joined[number] += members[node]
        members = joined
        better = _modularity(graph, community, total)
        if better - quality <= _THRESHOLD:
            return members
        quality = better
        graph = _condensed(graph, community, len(members))


def _degrees(graph: list[dict[int, float]]) -> list[float]:
    """Return the sum of each node's weights; an edge to itself counts twice."""
    return [sum(edges.values()) + edges.get(node, 0) for node, edges in enumerate(graph)]


def _one_level(graph: list[dict[int, float]], total: float, drawing: random.Random) -> list[int]:
    """Move single nodes to the community of a neighbour until no move gains modularity; return each one's community.

    A node is passed over as long as none of its neighbours has moved to another community than its own (Ozaki, Tezuka,
    Inaba, *A Simple Acceleration Method for the Louvain Algorithm*, 2016). Volumes change also elsewhere, so all are
    visited once more at the end, and all goes on if any of them moves: the end is one of Louvain's own.
    """
    degrees = _degrees(graph)
    volume = list(degrees)  # of each community
    community = list(range(len(graph)))
    others = [[edge for edge in edges.items() if edge[0] != node] for node, edges in enumerate(graph)]
    order = list(range(len(graph)))
    drawing.shuffle(order)
    scale = 2 * total**2
    due = bytearray(b"\1") * len(graph)
    while any(due):
        whole, moved = all(due), False
        for node in order:
            if not due[node]:
                continue
            due[node] = 0
            weights: dict[int, float] = {}
            for other, weight in others[node]:
                number = community[other]
                weights[number] = weights[number] + weight if number in weights else weight
            own, degree = community[node], degrees[node]
            volume[own] -= degree
            cost = -weights.get(own, 0.0) / total + volume[own] * degree / scale
            best, best_gain = own, 0.0
            for number, weight in weights.items():
                gain = cost + weight / total - volume[number] * degree / scale
                if gain > best_gain:
                    best, best_gain = number, gain
            volume[best] += degree
            if best != own:
                community[node] = best
                moved = True
                for other, _ in others[node]:
                    if community[other] != best:
                        due[other] = 1
        if not any(due) and (moved or not whole):
            due = bytearray(b"\1") * len(graph)
    return community


def _condensed(graph: list[dict[int, float]], community: list[int], count: int) -> list[dict[int, float]]:
    """Return the graph whose nodes are communities."""
    condensed: list[dict[int, float]] = [{} for _ in range(count)]
    for node, edges in enumerate(graph):
        one = community[node]
        row = condensed[one]
        for other, weight in edges.items():
            if other >= node:  # each edge once
                two = community[other]
                row[two] = condensed[two][one] = weight + row.get(two, 0)
    return condensed


def _modularity(graph: list[dict[int, float]], community: list[int], total: float) -> float:
    degrees = _degrees(graph)
    count = max(community) + 1
    inside, volume = [0.0] * count, [0.0] * count
    for node, edges in enumerate(graph):
        number = community[node]
        volume[number] += degrees[node]
        inside[number] += sum(weight for other, weight in edges.items() if other >= node and community[other] == number)
    return sum(one / total - (two / (2 * total)) ** 2 for one, two in zip(inside, volume, strict=True))
