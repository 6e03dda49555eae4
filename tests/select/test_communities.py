"""Communities: cosine neighbours against a dense calculation, Louvain against networkx, planted groups found again."""

import math
import tracemalloc

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from sklearn.metrics import adjusted_rand_score

from fedfreeze.select import communities as module
from fedfreeze.select.communities import (
    Communities,
    find_communities,
    louvain,
    merge_alike,
    nearest_neighbours,
    neighbour_graph,
    split_large,
    unit_vectors,
)
from tests.support.signatures import planted, signatures_of


def adjacency_of(graph: nx.Graph) -> csr_matrix:
    return csr_matrix(nx.to_scipy_sparse_array(graph, nodelist=sorted(graph), dtype=float))


def labels_of(found: list[list[int]]) -> np.ndarray:
    labels = np.full(sum(map(len, found)), -1)
    for number, rows in enumerate(found):
        labels[rows] = number
    return labels


def find(signatures: np.ndarray, *, neighbours: int = 10, limit: int = 20, seed: int = 0, key: int = 1) -> Communities:
    return find_communities(signatures, neighbours=neighbours, limit=limit, seed=seed, key=key)


# --- vectors and neighbours


def test_unit_vectors_are_centred_and_of_length_one():
    signatures = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32) + 100
    vectors = unit_vectors(signatures)
    expected = signatures.astype(np.float64) - signatures.mean(axis=0, dtype=np.float64)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert np.allclose(vectors, expected, atol=1e-3)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    # uncentred they would all look alike
    raw = signatures / np.linalg.norm(signatures, axis=1, keepdims=True)
    assert (raw @ raw.T).min() > 0.99
    assert (vectors @ vectors.T).min() < -0.5


def test_signatures_that_are_all_the_same_tell_nothing():
    # not a single bit of the mean need be right: what is left is rounding
    signatures = np.tile(np.random.default_rng(0).normal(size=8).astype(np.float32), (7, 1))
    assert not unit_vectors(signatures).any()
    assert find(signatures).parts == [[[0, 1, 2, 3, 4, 5, 6]]]
    assert not unit_vectors(np.zeros((3, 4), np.float32)).any()


@pytest.mark.parametrize("block_rows", [1, 7, 64, 1000])
@pytest.mark.parametrize(("n", "k"), [(90, 5), (90, 89), (90, 200), (2, 1)])
def test_blocked_neighbours_are_those_of_the_dense_matrix(block_rows, n, k):
    vectors = unit_vectors(np.random.default_rng(3).normal(size=(n, 16)).astype(np.float32))
    rows, cosines = nearest_neighbours(vectors, k, block_rows=block_rows)
    dense = vectors.astype(np.float64) @ vectors.T.astype(np.float64)
    np.fill_diagonal(dense, -np.inf)
    expected = np.argsort(-dense, axis=1)[:, : min(k, n - 1)]
    assert np.array_equal(rows, expected)
    assert np.allclose(cosines, np.take_along_axis(dense, expected, axis=1), atol=1e-6)


def test_one_device_has_no_neighbours():
    rows, cosines = nearest_neighbours(np.ones((1, 4), np.float32), 3)
    assert rows.shape == cosines.shape == (1, 0)
    assert find(np.ones((1, 4), np.float32)).parts == [[[0]]]
    assert find(np.zeros((0, 4), np.float32)).parts == []


def test_the_graph_is_sparse_symmetric_and_positive():
    vectors = unit_vectors(np.random.default_rng(4).normal(size=(60, 6)).astype(np.float32))
    adjacency = neighbour_graph(vectors, 4)
    assert (adjacency != adjacency.T).nnz == 0, "both ways, with one weight"
    graph = nx.from_scipy_sparse_array(adjacency)
    dense = vectors @ vectors.T
    np.fill_diagonal(dense, -np.inf)
    near = np.zeros((60, 60), bool)
    for node, row in enumerate(dense):
        best = np.argsort(-row)[:4]
        near[node, [other for other in best if row[other] > 0 and row[other] >= module.NEAR * row[best[0]]]] = True
    expected = {(i, j) for i in range(60) for j in range(i) if near[i, j] or near[j, i]}
    assert {(max(edge), min(edge)) for edge in graph.edges} == expected
    assert all(0 < weight <= 1.0001 for _, _, weight in graph.edges(data="weight"))
    assert graph.number_of_edges() <= 60 * 4


def test_a_dense_matrix_never_exists():
    n, d = 3000, 16
    vectors = unit_vectors(np.random.default_rng(5).normal(size=(n, d)).astype(np.float32))
    asked = []

    class Watched(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            asked.extend(o.numel() for o in torch.utils._pytree.tree_leaves(out) if isinstance(o, torch.Tensor))
            return out

    with Watched():  # torch imports its compiler for it once
        torch.ones(1) + 1
    tracemalloc.start()
    with Watched():
        nearest_neighbours(vectors, 10)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert max(asked) == module.BLOCK_ROWS * n  # of torch's memory, which tracemalloc does not see
    assert peak < n * n  # a fourth of the bytes of a dense float32 matrix


def test_threads_are_given_back_and_do_not_change_the_result():
    signatures, _ = planted(60, 5)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(nearest_neighbours(unit_vectors(signatures), 10))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert np.array_equal(found[0][0], found[1][0])
    assert found[0][1].tobytes() == found[1][1].tobytes()


# --- Louvain

KARATE = nx.convert_node_labels_to_integers(nx.karate_club_graph())
CLIQUES = nx.ring_of_cliques(8, 6)
PLANTED = nx.planted_partition_graph(5, 20, 0.5, 0.02, seed=1)


@pytest.mark.parametrize("seed", [0, 7])
def test_louvain_is_repeatable_and_draws_by_its_seed(seed):
    graph = adjacency_of(nx.gnm_random_graph(60, 150, seed=3))
    assert louvain(graph, seed) == louvain(graph, seed)
    assert any(louvain(graph, seed) != louvain(graph, other) for other in range(10))
    assert louvain(graph, 2**62 + seed) == louvain(graph, 2**62 + seed)  # seeds of runs have 63 bits


@given(st.integers(2, 40), st.integers(1, 150), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_on_graphs_without_structure_it_is_about_as_good_as_networkx(nodes, edges, seed):
    graph = nx.gnm_random_graph(nodes, edges, seed=seed)
    for number, (_, _, edge) in enumerate(graph.edges(data=True)):
        edge["weight"] = 0.1 + (number * 7919 % 100) / 100
    found = louvain(adjacency_of(graph), seed)
    assert sorted(node for community in found for node in community) == sorted(graph)
    if graph.number_of_edges():
        expected = nx.community.louvain_communities(graph, weight="weight", seed=seed)
        assert nx.community.modularity(graph, found) >= nx.community.modularity(graph, expected) - 0.06


def test_louvain_finds_what_is_known_of_these_graphs():
    # karate: the best modularity is 0.4198 (unweighted), 0.4449 (weighted)
    assert nx.community.modularity(KARATE, louvain(adjacency_of(KARATE), 0)) > 0.42
    assert louvain(adjacency_of(CLIQUES), 0) == [list(range(i, i + 6)) for i in range(0, 48, 6)]
    assert adjusted_rand_score(np.arange(100) // 20, labels_of(louvain(adjacency_of(PLANTED), 0))) == 1


def test_nodes_without_an_edge_are_one_community():
    graph = nx.Graph([(0, 3), (4, 5)])
    graph.add_nodes_from([1, 2])
    assert louvain(adjacency_of(graph), 0) == [[0, 3], [1, 2], [4, 5]]
    assert louvain(csr_matrix((4, 4)), 0) == [[0, 1, 2, 3]]


def test_parts_that_point_one_way_are_joined_and_others_are_not():
    # directions at 0, 50 and 120 degrees: the first two agree by cos 50 = 0.64, which is over ALIKE
    vectors = np.array([[math.cos(a), math.sin(a)] for a in np.radians([0, 50, 120, 120])], np.float32)
    assert merge_alike([[3, 2], [0], [1]], vectors) == [[0, 1], [2, 3]]
    assert merge_alike([[0], [2]], vectors) == [[0], [2]]
    assert merge_alike([[0, 1, 2, 3]], vectors) == [[0, 1, 2, 3]]


def test_a_large_community_is_split_and_a_clique_is_left():
    parts = split_large(adjacency_of(CLIQUES), range(48), 12, 0)
    assert parts == [list(range(i, i + 6)) for i in range(0, 48, 6)]
    assert split_large(adjacency_of(CLIQUES), range(48), 48, 0) == [list(range(48))]
    # a limit below the size of a clique: Louvain does not split it, so it stays
    assert split_large(adjacency_of(CLIQUES), range(48), 3, 0) == parts
    clubs = split_large(adjacency_of(KARATE), range(34), 8, 0)
    assert len(clubs) > len(louvain(adjacency_of(KARATE), 0)), "communities of more than 8 are split again"
    assert sorted(node for part in clubs for node in part) == list(range(34))


# --- planted groups


@pytest.mark.parametrize("noise", [1.0, 3.0])
@pytest.mark.parametrize("groups", [2, 3, 5, 10, 20])
def test_planted_groups_are_found_among_100_devices(groups, noise):
    signatures, group = planted(100, groups, noise=noise)
    found = find(signatures)
    assert len(found.parts) == groups
    assert adjusted_rand_score(group, labels_of(found.top)) >= 0.9


@pytest.mark.parametrize("groups", [2, 10])
def test_planted_groups_are_found_among_1000_devices(groups):
    signatures, group = planted(1000, groups)
    found = find(signatures)
    assert adjusted_rand_score(group, labels_of(found.top)) >= 0.9
    # each community is several times the limit, and Louvain splits them on the way down
    assert all(len(parts) > 1 for parts in found.parts)
    assert max(len(part) for parts in found.parts for part in parts) <= 20


def test_communities_are_a_partition_in_order_and_repeatable():
    mixes = np.random.default_rng(2).dirichlet([0.5] * 10, 150)
    signatures = signatures_of(mixes, np.full(150, 40))
    found = find(signatures)
    assert find(signatures) == found
    assert sorted(row for rows in found.top for row in rows) == list(range(150))
    assert [rows[0] for rows in found.top] == sorted(rows[0] for rows in found.top)
    assert all(part == sorted(part) for parts in found.parts for part in parts)
    assert 2 <= len(found.parts) <= 20
    # devices of a community have more alike label mixes than others
    labels = labels_of(found.top)
    apart = np.linalg.norm(mixes[:, None] - mixes[None], axis=2)
    same = labels[:, None] == labels[None]
    assert apart[same & ~np.eye(150, dtype=bool)].mean() < 0.75 * apart[~same].mean()


@pytest.mark.parametrize("size", [64, 512, 650])
def test_a_signature_tells_the_server_the_label_mix_sketched_or_not(size):
    # docs/selection.md warns of it: a linear fit on devices that the server simulated itself is all it takes
    mixes = np.random.default_rng(6).dirichlet([0.5] * 10, 800)
    signatures = signatures_of(mixes, np.full(800, 50), size=size).astype(np.float64)
    known, others = slice(0, 400), slice(400, 800)
    inputs = np.column_stack([signatures, np.ones(800)])
    normal = inputs[known].T @ inputs[known] + 0.1 * np.eye(inputs.shape[1])
    told = inputs[others] @ np.linalg.solve(normal, inputs[known].T @ mixes[known])
    error = np.abs(told - mixes[others]).mean()
    assert error < 0.5 * np.abs(mixes[known].mean(axis=0) - mixes[others]).mean()
