"""The clustering numbers against brute force and against values worked by hand."""

import itertools
import math

import numpy as np
import pytest

import metrics


def random_tree(rng, n_splits):
    """parents and leaves of a random binary tree, with ids as TreeVAE gives them."""
    parents, leaves = [-1, 0, 0], [1, 2]
    for _ in range(n_splits):
        i = leaves.pop(rng.integers(len(leaves)))
        leaves += [len(parents), len(parents) + 1]
        parents += [i, i]
    return parents, leaves


def brute_force_purity(parents, leaf_of_image, labels):
    def path(i):
        return [i] + (path(parents[i]) if parents[i] >= 0 else [])
    shares = []
    for a, b in itertools.combinations(range(len(labels)), 2):
        if labels[a] == labels[b]:
            up = set(path(leaf_of_image[b]))
            ancestor = next(i for i in path(leaf_of_image[a]) if i in up)
            under = [labels[k] for k in range(len(labels)) if ancestor in path(leaf_of_image[k])]
            shares.append(under.count(labels[a]) / len(under))
    return sum(shares) / len(shares)


@pytest.mark.parametrize("seed", range(8))
def test_dendrogram_purity_is_the_mean_over_all_pairs(seed):
    rng = np.random.default_rng(seed)
    parents, leaves = random_tree(rng, seed)
    leaf_of_image, labels = rng.choice(leaves, 40), rng.integers(0, 4, 40)
    expected = brute_force_purity(parents, leaf_of_image.tolist(), labels.tolist())
    assert metrics.dendrogram_purity(parents, leaf_of_image, labels) == pytest.approx(expected)


def test_dendrogram_purity_does_not_care_about_left_and_right_or_pruned_nodes():
    labels = np.array([0, 0, 1, 1, 2])
    one = metrics.dendrogram_purity([-1, 0, 0, 2, 2], np.array([1, 3, 3, 4, 4]), labels)
    other = metrics.dendrogram_purity([-1, 0, 0, 1, 1], np.array([2, 4, 4, 3, 3]), labels)
    pruned = metrics.dendrogram_purity([-1, 0, 0, 2, 2, -2, 4], np.array([1, 3, 3, 6, 6]), labels)
    assert one == pytest.approx(other) == pytest.approx(pruned)
    assert metrics.dendrogram_purity([-1, 0, 0], np.array([1, 2, 2]), np.array([0, 1, 1])) == 1.0
    assert math.isnan(metrics.dendrogram_purity([-1, 0, 0], np.array([1, 2]), np.array([0, 1])))


@pytest.mark.parametrize("shape", [(3, 3), (3, 5), (5, 3), (1, 4), (6, 6)])
def test_accuracy_is_the_best_of_all_matchings(shape):
    rng = np.random.default_rng(sum(shape))
    for _ in range(20):
        clusters, labels = rng.integers(0, shape[0], 60), rng.integers(0, shape[1], 60)
        clusters[:shape[0]], labels[:shape[1]] = range(shape[0]), range(shape[1])
        counts = np.array([[np.sum((clusters == i) & (labels == j)) for j in range(shape[1])] for i in range(shape[0])])
        small = counts if shape[0] <= shape[1] else counts.T
        best = max(sum(small[i, j] for i, j in enumerate(p)) for p in itertools.permutations(range(small.shape[1]), len(small)))
        assert metrics.cluster_accuracy(clusters * 7 + 1, labels) == pytest.approx(best / 60)      # ids may have gaps


def test_values_worked_by_hand():
    leaf, labels = np.array([1, 1, 1, 2, 2, 2]), np.array([0, 0, 1, 1, 1, 1])
    assert metrics.leaf_purity(leaf, labels) == pytest.approx(5 / 6)
    assert metrics.cluster_accuracy(leaf, labels) == pytest.approx(5 / 6)
    # I = 1/3 ln 2 + 1/6 ln(1/2) + 1/2 ln(3/2); H(leaf) = ln 2; H(class) = 1/3 ln 3 + 2/3 ln(3/2)
    information = math.log(2) / 3 - math.log(2) / 6 + math.log(1.5) / 2
    entropies = math.log(2) + math.log(3) / 3 + 2 * math.log(1.5) / 3
    assert metrics.normalized_mutual_info(leaf, labels) == pytest.approx(2 * information / entropies)


def test_edges():
    labels = np.array([0, 1, 2, 0, 1, 2])
    assert metrics.normalized_mutual_info(labels + 3, labels) == pytest.approx(1)
    assert metrics.normalized_mutual_info(np.zeros(6, int), labels) == pytest.approx(0)
    assert metrics.normalized_mutual_info(np.zeros(6, int), np.zeros(6, int)) == 1
    assert metrics.leaf_purity(np.zeros(6, int), labels) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="one label for each image"):
        metrics.leaf_purity(np.zeros(5, int), labels)


def test_adjusted_rand_index_by_hand():
    """Worked out on paper: leaves {a a b | b b} of five images; 4 and 4 pairs together, 2 in both, 10 in all."""
    clusters, labels = [3, 3, 3, 4, 4], [0, 0, 1, 1, 1]
    chance = 4 * 4 / 10
    assert metrics.adjusted_rand_index(clusters, labels) == pytest.approx((2 - chance) / (4 - chance))
    assert metrics.adjusted_rand_index([1, 1, 2], [5, 5, 7]) == 1 and metrics.adjusted_rand_index([1, 1], [0, 0]) == 1
    rng = np.random.default_rng(0)
    assert abs(metrics.adjusted_rand_index(rng.integers(0, 4, 20000), rng.integers(0, 5, 20000))) < 0.002       # chance is 0
