"""The papers' numbers, from a finished run: how good the clusters are, and how good the model is.

    python metrics.py runs/fashion        prints a table and writes metrics.json into the run's folder

Clustering (every test image goes to its most probable leaf) and the ELBO with its terms, all on the test set. Each
function takes arrays and can be used alone; labels are used here and nowhere in training.
"""

import argparse
import json
import math
from pathlib import Path as File

import numpy as np
import torch

import train


# ---------------------------------------------------------------------------------------------------------------------
# Clustering. leaf_of_image: (N,) node ids; labels: (N,) classes, 0..K-1; parents: node id -> its parent's id, -1 at the root
# ---------------------------------------------------------------------------------------------------------------------

def contingency(clusters, labels):
    """How many images of each cluster are of each class: (n_clusters, n_classes) counts, clusters sorted by id."""
    clusters, labels = np.asarray(clusters), np.asarray(labels)
    if clusters.shape != labels.shape or clusters.size == 0:
        raise ValueError(f"one cluster and one label for each image, please: got {clusters.shape} and {labels.shape}")
    rows, columns = np.unique(clusters, return_inverse=True)[1], np.unique(labels, return_inverse=True)[1]
    counts = np.zeros((rows.max() + 1, columns.max() + 1), dtype=np.int64)
    np.add.at(counts, (rows, columns), 1)
    return counts


def dendrogram_purity(parents, leaf_of_image, labels):
    """Dendrogram purity in [0, 1] (Heller and Ghahramani 2005), exact and linear in the number of images.

    Over all pairs of different images of one class: the share of that class among the images under the pair's lowest
    common ancestor, averaged. The pairs that meet at a node are those under it less those under one of its children. NaN
    if no class has two images.
    """
    leaf_of_image = np.asarray(leaf_of_image)
    under = np.zeros((len(parents), len(np.unique(labels))))                   # (nodes, classes): images under each node
    under[np.unique(leaf_of_image)] = contingency(leaf_of_image, labels)
    pairs_in_children = np.zeros_like(under)
    total = pairs = 0.0
    for i in reversed(range(len(parents))):                                    # children before parents: ids grow downwards
        below = under[i] * (under[i] - 1) / 2
        if under[i].any():
            meet = below - pairs_in_children[i]
            total += (meet * under[i] / under[i].sum()).sum()
            pairs += meet.sum()
        if parents[i] >= 0:
            under[parents[i]] += under[i]
            pairs_in_children[parents[i]] += below
    return total / pairs if pairs else float("nan")


def leaf_purity(leaf_of_image, labels):
    """The share of images that are of their leaf's majority class, in [0, 1]."""
    return contingency(leaf_of_image, labels).max(1).sum() / len(labels)


def best_matching(profit):
    """One column for each row (or one row for each column) of largest total profit: (rows, columns) index arrays.

    The Hungarian algorithm with potentials: rows join one at a time, each by a shortest augmenting path; O(n^3).
    """
    cost = -np.asarray(profit, dtype=float)
    if cost.shape[0] > cost.shape[1]:
        columns, rows = best_matching(np.asarray(profit).T)
        return rows, columns
    n, m = cost.shape
    u, v = np.zeros(n), np.zeros(m)                                            # potentials: cost - u - v >= 0, = 0 if matched
    row_of = np.full(m, -1)
    for new in range(n):
        best, came_from, reached = np.full(m, np.inf), np.full(m, -1), np.zeros(m, dtype=bool)
        row, column = new, -1
        while True:
            slack = cost[row] - u[row] - v
            closer = ~reached & (slack < best)
            best[closer], came_from[closer] = slack[closer], column
            nearest = np.where(reached, np.inf, best)
            column = int(nearest.argmin())
            step = nearest[column]
            u[new] += step                                                     # keep the tree of reached columns tight
            u[row_of[reached]] += step
            v[reached] -= step
            best[~reached] -= step
            reached[column] = True
            if row_of[column] < 0:
                break
            row = row_of[column]
        while column >= 0:                                                     # flip the path back to the new row
            before = came_from[column]
            row_of[column] = row_of[before] if before >= 0 else new
            column = before
    columns = np.flatnonzero(row_of >= 0)
    return row_of[columns], columns


def cluster_accuracy(leaf_of_image, labels):
    """The share of images in the class that their leaf stands for, under the best one-to-one matching: in [0, 1]."""
    counts = contingency(leaf_of_image, labels)
    return counts[best_matching(counts)].sum() / len(labels)


def normalized_mutual_info(leaf_of_image, labels):
    """Mutual information of leaf and class over the arithmetic mean of their entropies, in [0, 1]; 1 if both are constant."""
    joint = contingency(leaf_of_image, labels) / len(labels)
    def entropy(p):
        return -(p[p > 0] * np.log(p[p > 0])).sum()
    of_leaf, of_class = entropy(joint.sum(1)), entropy(joint.sum(0))
    return 2 * (of_leaf + of_class - entropy(joint)) / (of_leaf + of_class) if of_leaf + of_class > 0 else 1.0


def adjusted_rand_index(leaf_of_image, labels):
    """The share of pairs of images on which leaves and classes agree, 0 for what chance gives and 1 for all of them."""
    counts = contingency(leaf_of_image, labels)
    def pairs(n):
        return (n * (n - 1) / 2).sum()
    both, of_leaf, of_class = pairs(counts), pairs(counts.sum(1)), pairs(counts.sum(0))
    chance, most = of_leaf * of_class / max(1, pairs(counts.sum())), (of_leaf + of_class) / 2
    return (both - chance) / (most - chance) if most != chance else 1.0


# ---------------------------------------------------------------------------------------------------------------------
# A run
# ---------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(tree, images, labels, ll_samples=0):
    """All numbers of a tree on images (N, C, H, W) uint8 with labels (N,): {name: number, or list by leaf}.

    ll_samples: K of `TreeVAE.log_likelihood`, on the first 1,000 images; 0: without.
    """
    leaf_of_image = np.array(tree.leaves)[train.leaf_probs(tree, images).argmax(1).cpu().numpy()]
    labels = np.asarray(labels)
    terms = [tree.elbo(x.float() / 255) for x in images.split(1000)]
    bound = [tree.log_likelihood(x.float() / 255, ll_samples) for x in images[:1000 * (ll_samples > 0)].split(100) if len(x)]
    likelihood = dict(log_likelihood=torch.cat(bound).mean().item()) if bound else {}
    sizes = [int((leaf_of_image == leaf).sum()) for leaf in tree.leaves]
    return dict(
        images=len(labels), leaves=tree.leaves, leaf_sizes=sizes, smallest_leaf=min(sizes) / len(labels),
        dendrogram_purity=dendrogram_purity(tree.parents, leaf_of_image, labels),
        leaf_purity=leaf_purity(leaf_of_image, labels), accuracy=cluster_accuracy(leaf_of_image, labels),
        normalized_mutual_info=normalized_mutual_info(leaf_of_image, labels),
        adjusted_rand_index=adjusted_rand_index(leaf_of_image, labels), **likelihood,
        confusion=[np.bincount(labels[leaf_of_image == leaf], minlength=labels.max() + 1).tolist() for leaf in tree.leaves],
        **{name: torch.cat([t[name] for t in terms]).mean().item() for name in terms[0]})


def main(argv=None):
    """Load a run, measure it, print the table, write metrics.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the folder of a run, such as runs/fashion")
    parser.add_argument("--data-root", help="folder of downloaded data sets (default: the run's)")
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"], help="where to compute (default: auto)")
    parser.add_argument("--ll-samples", type=int, default=0, help="samples of the bound on log p(x), of 1,000 images; the papers take 1000 (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the ELBO's samples (default: 0)")
    flags = parser.parse_args(argv)
    if flags.ll_samples < 0:
        train.fail(f"--ll-samples must be at least 0, not {flags.ll_samples}")
    config, device, data, tree, _ = train.load_run(flags.run, flags.device, flags.data_root, need_diffusion=False)
    torch.manual_seed(flags.seed)
    result = evaluate(tree, data.test_images.to(device), data.test_labels, flags.ll_samples)
    result = {"dataset": config.dataset, "preset": config.preset, "seed": config.seed, **result}
    path = File(flags.run) / "metrics.json"
    train.write(path, lambda file: file.write(json.dumps(result, indent=1).encode()))
    print(f"{config.dataset}, preset {config.preset}, seed {config.seed}: {result['images']} test images")
    for name in ("dendrogram_purity", "leaf_purity", "accuracy", "normalized_mutual_info", "adjusted_rand_index"):
        print(f"  {name.replace('_', ' '):24s}{result[name]:9.3f}")
    for name in ("elbo", "reconstruction", "kl_root", "kl_nodes", "kl_decisions"):
        print(f"  {name.replace('_', ' '):24s}{result[name]:9.2f} nats an image")
    if "log_likelihood" in result:
        bits = -result["log_likelihood"] / math.log(2) / data.test_images[0].numel()
        grey = f", {bits:.3f} bits a dimension" * (tree.likelihood == "bernoulli")     # in colour p(x) is a density
        print(f"  {'log p(x) is at least':24s}{result['log_likelihood']:9.2f} nats an image{grey} ({flags.ll_samples} samples)")
    print("  leaf sizes              " + ", ".join(f"{leaf}: {size}" for leaf, size in zip(result["leaves"], result["leaf_sizes"])))
    print(f"written to {path}")


if __name__ == "__main__":
    train.run_program(main)
