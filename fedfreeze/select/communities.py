"""Communities of devices with alike data: signatures -> sparse neighbour graph -> Louvain, split again where large.

The paper has a community-detection step (RL-CD) in its participant selector [paper]; how it works is not public, so all
of this is an engineering reconstruction [ours].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from fedfreeze.compute import torch_threads
from fedfreeze.seeds import derive_seed

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

BLOCK_ROWS = 256
"""Rows of the cosine matrix that exist at a time: BLOCK_ROWS x n numbers, never n x n."""

ALIKE = 0.5
"""Cosine of two communities' mean directions from which they count as one. [ours]"""

NEAR = 0.5
"""Share of a device's largest cosine under which a neighbour is none: the nearest of a device may all be far. [ours]"""

# Gain of modularity under which Louvain ends a level, and the whole.
_TOLERANCE = 1e-7

# A signature whose distance from the population's mean is under this share of the signatures' size tells nothing: what
# is left after centring is rounding, and scaling it to length 1 would make noise look like data.
_NEGLIGIBLE = 1e-5


def unit_vectors(signatures: np.ndarray) -> np.ndarray:
    """Return signatures (n, d) less their mean, each scaled to length 1, float32; zeros where nothing is left.

    Centring is [ours]: what a model gets wrong for everybody (a bias towards some classes, features that are all
    positive) is part of every signature, so that uncentred cosines are all near 1 and hide how devices differ.
    """
    centred = signatures.astype(np.float32)
    size = float(np.sqrt(np.square(centred, dtype=np.float64).sum(axis=1).max(initial=0.0)))
    centred -= centred.mean(axis=0, dtype=np.float64).astype(np.float32)
    lengths = np.sqrt(np.square(centred, dtype=np.float64).sum(axis=1))
    told = lengths > _NEGLIGIBLE * size
    scale = np.zeros(len(centred), dtype=np.float32)
    scale[told] = 1 / lengths[told]
    centred *= scale[:, None]
    return centred


def nearest_neighbours(
    vectors: np.ndarray, neighbours: int, *, block_rows: int = BLOCK_ROWS
) -> tuple[np.ndarray, np.ndarray]:
    """Return for each unit vector (n, d) its nearest others by cosine: their rows and the cosines, (n, min(k, n - 1)).

    At most `block_rows` rows of the cosine matrix exist at a time.
    """
    n = len(vectors)
    k = min(neighbours, n - 1)
    rows = np.empty((n, max(k, 0)), dtype=np.int64)
    cosines = np.empty((n, max(k, 0)), dtype=np.float32)
    if k < 1:
        return rows, cosines
    everyone = torch.from_numpy(vectors)
    with torch_threads(1):  # bits must not depend on cores or on what a launcher sets
        for begin in range(0, n, block_rows):
            block = everyone[begin : begin + block_rows] @ everyone.T
            own = torch.arange(len(block))
            block[own, begin + own] = -torch.inf
            found = block.topk(k, dim=1)
            rows[begin : begin + len(block)] = found.indices.numpy()
            cosines[begin : begin + len(block)] = found.values.numpy()
    return rows, cosines


def neighbour_graph(vectors: np.ndarray, neighbours: int) -> "csr_matrix":
    """Return the graph of unit vectors (n, d): an edge where one is among the other's nearest, weight: cosine > 0.

    As its adjacency matrix (n, n). Sparse, as the modularity of a dense graph of cosines is near zero whatever its
    groups; without negative edges, as Louvain's modularity is not made for them; without those under NEAR, as a group
    smaller than `neighbours` would otherwise reach into others, and Louvain joins small groups over the weakest edge
    (its resolution limit). [ours]
    """
    from scipy.sparse import csr_matrix  # here, as scipy takes a part of a second of every start

    rows, cosines = nearest_neighbours(vectors, neighbours)
    n, k = rows.shape
    told = (cosines > 0) & (cosines >= NEAR * cosines[:, :1])
    one, two, weights = np.repeat(np.arange(n), k)[told.ravel()], rows[told], cosines[told]
    # the two ends may have found each other in different blocks, whose last bits differ: the first one counts
    _, first = np.unique(np.minimum(one, two) * n + np.maximum(one, two), return_index=True)
    one, two, weights = one[first], two[first], weights[first]
    both = np.concatenate([weights, weights]).astype(np.float64)
    return csr_matrix((both, (np.concatenate([one, two]), np.concatenate([two, one]))), shape=(n, n))


def louvain(graph: "csr_matrix", seed: int) -> list[list[int]]:
    """Return the communities of a graph, as rows of its adjacency matrix (Louvain, Blondel et al., 2008), in order.

    Nodes without an edge, which Louvain leaves alone one by one, are one community together: they have in common that
    nothing tells them from the average device. [ours]
    """
    from sknetwork.clustering import Louvain

    has_edges = np.diff(graph.indptr) > 0
    linked, alone = np.flatnonzero(has_edges), np.flatnonzero(~has_edges).tolist()
    found = [alone] if alone else []
    if len(linked):
        method = Louvain(
            tol_optimization=_TOLERANCE,
            tol_aggregation=_TOLERANCE,
            shuffle_nodes=True,
            return_probs=False,
            return_aggregate=False,
            random_state=seed % 2**32,
        )
        labels = method.fit_predict(graph[linked][:, linked])
        order = np.argsort(labels, kind="stable")
        borders = np.flatnonzero(np.diff(labels[order])) + 1
        found += [part.tolist() for part in np.split(linked[order], borders)]
    return _ordered(found)


def merge_alike(communities: Sequence[Sequence[int]], vectors: np.ndarray) -> list[list[int]]:
    """Join communities whose mean directions have a cosine of ALIKE or more, the most alike first. [ours]

    Within a large group of equal devices the nearest neighbours are a matter of sampling noise, and Louvain finds parts
    in that noise. The noise is gone from the parts' means, which agree; the means of really different groups do not.
    """
    merged = [sorted(community) for community in communities]
    sums = np.stack([vectors[community].sum(axis=0, dtype=np.float64) for community in merged])
    while len(merged) > 1:
        lengths = np.sqrt(np.square(sums).sum(axis=1))
        means = sums / np.where(lengths > 0, lengths, 1)[:, None]
        # few rows, and no BLAS: its bits would depend on its threads
        cosines = np.stack([(means * mean).sum(axis=1) for mean in means])
        np.fill_diagonal(cosines, -np.inf)
        first, second = divmod(int(cosines.argmax()), len(merged))
        if cosines[first, second] < ALIKE:
            break
        first, second = min(first, second), max(first, second)
        merged[first] = sorted([*merged[first], *merged.pop(second)])
        sums[first] += sums[second]
        sums = np.delete(sums, second, axis=0)
    return _ordered(merged)


def split_large(graph: "csr_matrix", community: Sequence[int], limit: int, seed: int) -> list[list[int]]:
    """Split a community of more than `limit` nodes by Louvain on its own edges, and its parts likewise.

    A part that Louvain does not split stays whole, however large: its devices are alike, so any cut through it would be
    arbitrary, and the choice inside it goes by utility all the same. [ours]
    """
    if len(community) <= limit:
        return [sorted(community)]
    members = np.sort(np.asarray(community, dtype=np.int64))
    inner = graph[members][:, members]
    parts = louvain(inner, seed)
    if len(parts) > 1:
        parts = [small for part in parts for small in split_large(inner, part, limit, seed)]
    return _ordered([members[part].tolist() for part in parts])


@dataclass(frozen=True)
class Communities:
    """Communities of rows 0..n-1, each as its parts: a community within the limit is its only part."""

    parts: list[list[list[int]]]
    """Community -> part -> rows, ascending; communities and parts in the order of their first rows."""

    @property
    def top(self) -> list[list[int]]:
        """The communities without their parts."""
        return [sorted(row for part in community for row in part) for community in self.parts]


def find_communities(signatures: np.ndarray, *, neighbours: int, limit: int, seed: int, key: int) -> Communities:
    """Return communities of devices with alike signatures (n, d). [ours; that there are communities: paper]

    `limit`: a community of more devices is split into parts. `seed`, `key`: of the run and of this occasion (a round).
    """
    if not len(signatures):
        return Communities([])
    vectors = unit_vectors(signatures)
    graph = neighbour_graph(vectors, neighbours)
    louvain_seed = derive_seed(seed, "communities", key)
    top = merge_alike(louvain(graph, louvain_seed), vectors)
    return Communities([split_large(graph, community, limit, louvain_seed) for community in top])


def _ordered(communities: Sequence[Sequence[int]]) -> list[list[int]]:
    return sorted((sorted(community) for community in communities), key=lambda community: community[0])
