"""Whether classes that mean similar things come to lie close together (the paper's figure 3).

Shapes: K classes, D length of a class's vector, P permutations.

A class's vector is its column of M, by which LLS-MxM mixes the waves into what a latent of that
class is compared with (the paper's "row of M": D = M^T B, so M^T has a row for each class), or its
mean latent. What all classes share is removed, v_c less the mean over classes: the softmax does
not see it.

    d(i, j)    = 1 - cos(v_i, v_j)
    a(i)       = mean of d(i, j) over the other classes j of i's group
    b(i)       = least, over the other groups, of the mean of d(i, j) over the group
    s(i)       = (b - a) / max(a, b);   0 where i is alone in its group
    silhouette = mean of s(i) over the classes, in [-1, 1]

Source: Rousseeuw, "Silhouettes" (J. Comput. Appl. Math. 20, 1987).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from locallearn.analysis.shuffling import Array, Shuffled
from locallearn.errors import UserError

NUM_PERMUTATIONS = 999
_MAX_PERPLEXITY = 30.0
_MIN_CLASSES = 4


def directions(vectors: Tensor) -> Array:
    """(K, D), float64: the vectors less their mean, at length one.

    Raises:
        UserError: fewer than four classes, or a class whose vector is the mean itself.
    """
    values: Array = vectors.detach().cpu().double().numpy()
    if len(values) < _MIN_CLASSES:
        raise UserError(
            f"an arrangement of classes needs {_MIN_CLASSES} of them, the run has {len(values)}."
        )
    values = values - values.mean(axis=0)
    norms = np.linalg.norm(values, axis=1, keepdims=True)
    if not np.isfinite(norms).all() or (norms <= 1e-15).any():
        raise UserError(
            "the vectors of some classes do not differ from the mean of all; there is nothing to "
            "compare. Train the run for longer, or choose another --block."
        )
    rows: Array = values / norms
    return rows


def cosine_distances(rows: Array) -> Array:
    """d, (K, K), of rows of length one."""
    distances: Array = np.clip(1 - rows @ rows.T, 0, 2)
    np.fill_diagonal(distances, 0)
    return distances


def silhouette(distances: Array, groups: Sequence[str], *, seed: int = 0) -> Shuffled:
    """The mean silhouette beside what it is with the groups dealt out to the classes at random.

    Arguments:
        distances: (K, K).
        groups: K names.
        seed: of the permutations.
    """
    numbers = np.unique(groups, return_inverse=True)[1]
    members = np.eye(numbers.max() + 1)[numbers]  # (K, groups)
    generator = np.random.default_rng(seed)
    value = _silhouette(distances, members)
    shuffled = np.array(
        [
            _silhouette(distances, members[generator.permutation(len(members))])
            for _ in range(NUM_PERMUTATIONS)
        ]
    )
    return Shuffled.of(value, shuffled)


def num_arrangements(groups: Sequence[str]) -> int:
    """How many ways there are to part the classes into groups of these sizes.

    K! / (product of n_g! * product of m_n!), m_n groups having n classes: a permutation that only
    renames groups of one size changes no silhouette. No p-value is below one in as many.

    Arguments:
        groups: K names.
    """
    sizes = list(Counter(groups).values())
    alike = [*sizes, *Counter(sizes).values()]
    return math.factorial(len(groups)) // math.prod(math.factorial(n) for n in alike)


def _silhouette(distances: Array, members: Array) -> float:
    """The module's formula; members: (K, groups), one where the class is in the group."""
    sizes = members.sum(axis=0)
    sums = distances @ members
    own_size = members @ sizes
    own = (sums * members).sum(axis=1)
    a = own / np.maximum(own_size - 1, 1)
    b = np.where(members > 0, np.inf, sums / sizes).min(axis=1)
    largest = np.maximum(a, b)
    s = np.divide(b - a, largest, out=np.zeros_like(a), where=largest > 0)
    return float(np.where(own_size > 1, s, 0.0).mean())


@dataclass(frozen=True)
class Embedding:
    """points: (K, 2), no unit; perplexity: t-SNE's."""

    points: Array
    perplexity: float


def embed(rows: Array, *, seed: int = 0) -> Embedding:
    """t-SNE of the classes by cosine distance, begun at their principal components.

    Arguments:
        rows: (K, D), of length one.
        seed: of what is left to chance.

    The perplexity is min(30, (K - 1) / 3).

    Source: van der Maaten and Hinton, "Visualizing Data using t-SNE" (JMLR 9, 2008).
    """
    from sklearn.manifold import TSNE

    perplexity = min(_MAX_PERPLEXITY, (len(rows) - 1) / 3)
    model = TSNE(perplexity=perplexity, metric="cosine", init="pca", random_state=seed)
    points: Array = model.fit_transform(rows).astype(np.float64)
    return Embedding(points, perplexity)


def euclidean_distances(points: Array) -> Array:
    """(K, K), of the embedding's points."""
    distances: Array = np.linalg.norm(points[:, None] - points[None], axis=2)
    return distances
