"""Silhouettes against scikit-learn's and by hand; the groups of classes."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from locallearn.analysis.figures.semantics import label_offsets
from locallearn.analysis.semantics import (
    cosine_distances,
    directions,
    embed,
    euclidean_distances,
    num_arrangements,
    silhouette,
)
from locallearn.analysis.superclasses import CIFAR10, CIFAR100, groups_of
from locallearn.errors import UserError

# Superclass of each class of CIFAR-100 in label order, as the dataset's own files have it.
COARSE = [
    *(4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11),
    *(6, 11, 5, 10, 7, 6, 13, 15, 3, 15, 0, 11, 1, 10, 12, 14, 16, 9, 11, 5),
    *(5, 19, 8, 8, 15, 13, 14, 17, 18, 10, 16, 4, 17, 4, 2, 0, 17, 4, 18, 17),
    *(10, 3, 2, 12, 12, 16, 12, 1, 9, 19, 2, 10, 0, 1, 16, 12, 9, 13, 15, 13),
    *(16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14, 13),
]


def test_superclasses_of_cifar100_are_the_datasets_own() -> None:
    names = sorted(name for members in CIFAR100.values() for name in members)
    order = list(CIFAR100)
    assert [order.index(group) for group in groups_of(names, None)] == COARSE


def test_groups_of_cifar10_in_any_order() -> None:
    names = ["truck", *CIFAR10["animals"], "ship", "airplane", "automobile"]
    assert groups_of(names, None) == ["vehicles", *["animals"] * 6, *["vehicles"] * 3]


def clusters() -> tuple[torch.Tensor, list[str]]:
    """Four classes near each of three directions."""
    centres = 5 * torch.eye(3, 12)
    vectors = centres.repeat_interleave(4, 0) + 0.1 * torch.randn(12, 12)
    return vectors, [group for group in "abc" for _ in range(4)]


def test_known_clusters_score_near_one() -> None:
    vectors, groups = clusters()
    result = silhouette(cosine_distances(directions(vectors)), groups)
    assert result.value > 0.95
    assert abs(result.mean) < 0.2
    assert result.p_value == 1 / 1000
    of_points = silhouette(euclidean_distances(embed(directions(vectors)).points), groups)
    assert of_points.p_value < 0.01


def test_groups_that_mean_nothing_score_as_shuffled() -> None:
    vectors, groups = clusters()
    across = [groups[(5 * i) % 12] for i in range(12)]  # each cluster split among the groups
    result = silhouette(cosine_distances(directions(vectors)), across)
    assert result.value < 0.1
    assert result.p_value > 0.1


@pytest.mark.parametrize("groups", [["a", "a", "b", "b", "b", "c"], ["x", "y", "y", "y", "x", "x"]])
def test_silhouette_is_scikit_learns(groups: list[str]) -> None:
    """A group of one class among them, which counts zero."""
    from sklearn.metrics import silhouette_score  # two seconds, for this test alone

    distances = cosine_distances(directions(torch.randn(6, 4)))
    expected = silhouette_score(distances, groups, metric="precomputed")
    assert silhouette(distances, groups).value == pytest.approx(expected, abs=1e-12)


def test_distances_by_hand() -> None:
    """The mean of these is (1, 0): left are right, left, up, down."""
    vectors = torch.tensor([[2.0, 0.0], [0.0, 0.0], [1.0, 3.0], [1.0, -3.0]])
    expected = [[0, 2, 1, 1], [2, 0, 1, 1], [1, 1, 0, 2], [1, 1, 2, 0]]
    assert np.allclose(cosine_distances(directions(vectors)), expected)
    points = euclidean_distances(np.array([[0.0, 0.0], [3.0, 4.0]]))
    assert points.tolist() == [[0, 5], [5, 0]]


@pytest.mark.parametrize(
    ("groups", "num"),
    [("aab", 3), ("aabb", 3), ("aaaabb", 15), ("aabbcc", 15), ("abcd", 1), ("aabbc", 15)],
)
def test_arrangements_by_hand(groups: str, num: int) -> None:
    """aabb: the first class's companion is one of three; aabbcc: then the next one's, of three."""
    assert num_arrangements(groups) == num
    different = {
        frozenset(frozenset(i for i, g in enumerate(order) if g == name) for name in set(order))
        for order in set(itertools.permutations(groups))
    }
    assert len(different) == num


@pytest.mark.parametrize(("num", "perplexity"), [(4, 1), (10, 3), (94, 30)])
def test_perplexity_fits_the_number_of_classes(num: int, perplexity: float) -> None:
    rows = directions(torch.randn(num, 8))
    embedding = embed(rows)
    assert embedding.perplexity == perplexity
    assert embedding.points.shape == (num, 2)
    assert np.array_equal(embedding.points, embed(rows).points)


def test_too_few_classes_or_none_that_differ() -> None:
    with pytest.raises(UserError, match="needs 4 of them, the run has 3"):
        directions(torch.randn(3, 3))
    with pytest.raises(UserError, match="do not differ from the mean of all"):
        directions(torch.ones(5, 3))


NAMES = ["cat", "dog", "car", "bus"]


def test_groups_from_files(tmp_path: Path) -> None:
    expected = ["pets", "pets", "wheels", "wheels"]
    as_json, as_csv = tmp_path / "g.json", tmp_path / "g.csv"
    as_json.write_text(json.dumps({"pets": ["cat", "dog"], "wheels": ["bus", "car"]}))
    as_csv.write_text("group,class\npets,cat\npets, dog\n\nwheels,car\nwheels,bus\n")
    assert groups_of(NAMES, as_json) == groups_of(NAMES, as_csv) == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("g.json", "{", "is no valid JSON"),
        ("g.json", "[1]", r"must be \{group: \[class, \.\.\.\]\}"),
        ("g.json", '{"a": "cat"}', r"must be \{group"),
        ("g.json", '{"a": ["cat", "dog"], "b": ["car"]}', "has no group for: bus"),
        ("g.json", '{"a": ["cat", "cow"], "b": ["car"]}', "'cow' is no class of the run. Its cl"),
        ("g.json", '{"a": ["cat", "dog"], "b": ["cat", "car", "bus"]}', "'cat' is in two groups"),
        ("g.json", '{"a": ["cat", "dog", "car", "bus"]}', "two groups are needed"),
        ("g.json", '{"a": ["cat"], "b": ["dog"], "c": ["car"], "d": ["bus"]}', "of two classes"),
        ("g.csv", "pets,cat,dog\n", "line 1: expected group,class"),
        ("g.csv", "pets,\n", "line 1: expected group,class"),
    ],
)
def test_bad_groups(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        groups_of(NAMES, tmp_path / name)


def test_groups_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="known of CIFAR-10 and CIFAR-100 alone; give --groups"):
        groups_of(NAMES, None)
    with pytest.raises(UserError, match=r"nothing\.json does not exist"):
        groups_of(NAMES, tmp_path / "nothing.json")
    (tmp_path / "g.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is no text in UTF-8"):
        groups_of(NAMES, tmp_path / "g.csv")


def test_labels_keep_out_of_each_others_way() -> None:
    """Two points side by side: the second label goes where the first is not."""
    places = np.array([[0.0, 0.0], [10.0, 0.0]])
    first, second = label_offsets(places, ["elephant", "elephant"], 8)
    assert first == (0, pytest.approx(0.55 * 8 + 5))
    assert second == (0, pytest.approx(-0.55 * 8 - 5))
    assert math.dist(first, second) > 2 * 0.55 * 8
