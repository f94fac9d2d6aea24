"""Every number that the papers report, from finished runs.

    python metrics.py runs/a runs/b ...    a table (seeds of one method: mean ± std), metrics.json
"""

import argparse
import json

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import sample
import train
from treevae import make_encoder

URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
       "pt_inception-2015-12-05-6726825d.pth")
METHODS = {"path": "TreeDiffusion", "none + reconstruction": "TreeVAE + Diffusion"}
NOT_METHOD = ("seed", "out", "device", "data_root", "tree")  # may differ in a column


# -- Clustering: leaf_of_image (N,) node ids, labels (N,) classes --

def contingency(clusters, labels):
    """How many images of each cluster are of each class: (n_clusters, n_classes), by id."""
    of_cluster = np.unique(clusters)[:, None] == clusters  # (n_clusters, N)
    of_class = np.unique(labels)[:, None] == labels  # (n_classes, N)
    return of_cluster.astype(int) @ of_class.T


def dendrogram_purity(parents, leaf_of_image, labels):
    """Dendrogram purity (Heller and Ghahramani 2005), in [0, 1]; NaN without a pair of one class:
    the share of that class under the pair's lowest common ancestor, averaged over all pairs."""
    under = np.zeros((len(parents), len(np.unique(labels))))  # images of a class under a node
    under[np.unique(leaf_of_image)] = contingency(leaf_of_image, labels)  # in id order, both
    pairs = np.zeros_like(under)  # pairs of a class that have this lowest common ancestor
    for i in reversed(range(len(parents))):  # a child's id is larger than its parent's
        below = under[i] * (under[i] - 1) / 2  # those that meet here or deeper
        pairs[i] += below
        if parents[i] >= 0:
            under[parents[i]] += under[i]
            pairs[parents[i]] -= below
    share = under / np.maximum(1, under.sum(1, keepdims=True))
    return (pairs * share).sum() / pairs.sum() if pairs.any() else float("nan")


def leaf_purity(leaf_of_image, labels):
    """The share of images that are of their leaf's majority class, in [0, 1]."""
    return contingency(leaf_of_image, labels).max(1).sum() / len(labels)


def cluster_accuracy(leaf_of_image, labels):
    """The share of images in the class of their leaf, by the best one-to-one matching."""
    counts = contingency(leaf_of_image, labels).astype(np.int32)
    if counts.shape[0] < counts.shape[1]:
        counts = counts.T  # the fewer, some 20, are the columns
    best = np.zeros(2 ** counts.shape[1], np.int32)  # how many images a set of columns can match
    for row in counts:  # a row takes one column or none
        before = best.copy()
        for c, n in enumerate(row):  # bit c of a set: 0 without column c, 1 with it
            with_c = best.reshape(-1, 2, 2 ** c)[:, 1]
            np.maximum(with_c, before.reshape(-1, 2, 2 ** c)[:, 0] + n, out=with_c)
    return best[-1] / len(labels)


def entropy(counts):
    """Entropy in nats of each histogram of counts (..., K), none of them empty: (...,)."""
    p = counts / np.sum(counts, -1, keepdims=True)  # (..., K)
    return -(p * np.log(np.where(p > 0, p, 1))).sum(-1)  # 0 log 0 = 0


def normalized_mutual_info(leaf_of_image, labels):
    """Mutual information over the mean of both entropies, in [0, 1]; 1 if both are constant."""
    counts = contingency(leaf_of_image, labels)
    both = entropy(counts.sum(1)) + entropy(counts.sum(0))  # H(leaf) + H(class)
    return 2 * (both - entropy(counts.ravel())) / both if both > 0 else 1.0


# -- Frechet distance, and the networks whose features it compares --

def moments(features):
    """Mean (D,) and unbiased covariance (D, D) of features (N, D), in float64."""
    return features.mean(0, dtype=np.float64), np.cov(features, rowvar=False, dtype=np.float64)


def frechet_distance(mu1, cov1, mu2, cov2):
    """|mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of Gaussians (Dowson and Landau 1982)."""
    values, vectors = np.linalg.eigh(cov1)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T  # C1^(1/2)
    # C1 C2 has the eigenvalues of C1^(1/2) C2 C1^(1/2), which is symmetric
    overlap = np.sqrt(np.linalg.eigvalsh(root @ cov2 @ root).clip(0)).sum()
    shift = np.subtract(mu1, mu2)
    return max(0.0, shift @ shift + np.trace(cov1) + np.trace(cov2) - 2 * overlap)


class InceptionFeatures(torchvision.models.Inception3):
    """The FID network: images (B, 1 or 3, H, W) in [0, 1] -> features (B, 2048)."""

    def __init__(self, weights):
        super().__init__(num_classes=1008, aux_logits=False, init_weights=False)
        self.load_state_dict(weights)
        self.fc = nn.Identity()  # features, not classes
        for block in self.children():
            if hasattr(block, "branch_pool"):  # as TensorFlow did in 2015: the padding left out,
                block.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
                block.register_forward_hook(self.pool_again)
        self.Mixed_7c.pool = nn.MaxPool2d(3, 1, 1)  # and a maximum in the last block
        self.eval().requires_grad_(False)

    @staticmethod
    def pool_again(block, inputs, out):  # a block's last branch anew
        branch = block.branch_pool(block.pool(inputs[0]))
        return torch.cat([out[:, :-branch.shape[1]], branch], 1)

    def forward(self, x):  # size and range are pytorch-fid's
        x = F.interpolate(x.expand(-1, 3, -1, -1), (299, 299), mode="bilinear")
        return super().forward(2 * x - 1)


def load_inception(file):
    """{"FID": network} with the weights in a file, or by "download"; {} without a connection."""
    read, source = torch.load, file
    if file == "download":
        read, source = torch.hub.load_state_dict_from_url, URL
    try:
        return {"FID": InceptionFeatures(read(source, map_location="cpu", weights_only=True))}
    except Exception as error:  # damage has many names
        if file != "download":
            train.fail(f"{file} is not a copy of {URL} ({type(error).__name__})")
        print(f"no FID, only FD: no copy of {URL} ({type(error).__name__})")
        return {}


def load_classifier(run, epochs=5, lr=3e-3):
    """A small ResNet trained on the labels: x in [0, 1] -> logits; [:-1] gives FD's features."""
    data, device, few = run.data, run.device, run.config.max_images  # few: 0, or --quick
    name = run.config.dataset.replace("/", "_") + (f"-{few}" if few else "")
    file = run.folder.parent / f"classifier-{name}.pt"  # all runs are measured by the same one
    torch.manual_seed(0)
    classifier = nn.Sequential(make_encoder("resnet", run.tree.image_shape, 64, 128, 1),
                               nn.Flatten(), nn.Linear(128, len(data.classes))).to(device)
    if not file.exists():
        n_batches = max(1, len(data.images) // 128)  # equal: batch norm refuses one of 1 image
        optimizer = torch.optim.AdamW(classifier.parameters(), lr)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, epochs * n_batches)
        for k in range(epochs):
            train.live(f"classifier: epoch {k + 1} of {epochs}")
            for rows in torch.randperm(len(data.images)).tensor_split(n_batches):
                x = data.images[rows].to(device).float() / 255
                if x.shape[1] == 3:  # colour overfits sooner
                    x = train.random_view(x, train.COLOUR)
                with train.autocast(device):
                    loss = F.cross_entropy(classifier(x), data.labels[rows].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        train.replace_file(file, lambda f: torch.save(classifier.state_dict(), f))
    classifier.load_state_dict(torch.load(file, map_location=device, weights_only=True))
    return classifier.eval().requires_grad_(False)


# -- A measurement, part by part --

def batches(run, title, images):
    """Images uint8, batch by batch: x (B, C, H, W) in [0, 1] on the device; and a live line."""
    parts = images.split(train.rows_at_once(run.tree.image_shape))
    for k, part in enumerate(parts):
        train.live(f"{title}: batch {k + 1} of {len(parts)}")
        yield part.to(run.device).float() / 255


def clustering_scores(run):
    """The sizes of the leaves, and how well they agree with the labels, if any."""
    probs = train.leaf_probs(run.tree, run.data.test_images.to(run.device))  # (N, L)
    leaf = np.array(run.tree.leaves)[probs.argmax(1).cpu()]  # (N,) most probable
    scores = {"leaf_sizes": {i: int((leaf == i).sum()) for i in run.tree.leaves}}
    if run.data.classes:
        labels = run.data.test_labels.numpy()
        scores["dendrogram_purity"] = dendrogram_purity(run.tree.parents, leaf, labels)
        scores["leaf_purity"] = leaf_purity(leaf, labels)
        scores["accuracy"] = cluster_accuracy(leaf, labels)
        scores["NMI"] = normalized_mutual_info(leaf, labels)
    return scores


def elbo_terms(run, ll_samples, seed):
    """The ELBO by term, eq. (21), kl_nodes by depth, log p(x): means over test images, nats."""
    tree, images, means = run.tree, run.data.test_images, {}
    for k, x in enumerate(batches(run, "ELBO", images)):
        torch.manual_seed(seed + k)
        terms = tree.elbo(x)  # {name: (B,)}
        torch.manual_seed(seed + k)  # the same z: the depths add up to kl_nodes
        for visit in tree.walk(tree.bottom_up_pass(x)):
            if visit.node != 0:
                name = f"kl_depth_{tree.depth(visit.node)}"
                kl = visit.log_reach_q.exp() * visit.q.kl(visit.p)  # P(i; c) KL(q || p)
                terms[name] = terms.get(name, 0) + kl
        if ll_samples:
            terms["log_likelihood"] = tree.log_likelihood(x, ll_samples)
        for name, term in terms.items():
            means[name] = means.get(name, 0) + term.sum().item() / len(images)
    return means


def denoising_loss(run, n, seed, parts=10):
    """Eq. (30) of n test images given their paths: a mean over pixels and over `parts` times t
    an image, one in each tenth of 0..T-1."""
    T, images, total = run.diffusion.timesteps, run.data.test_images[:n], 0.0
    for k, x in enumerate(batches(run, "denoising loss", images)):
        torch.manual_seed(seed + k)  # runs on the same tree: the same paths, t and noise
        path = run.tree.infer_path(x)  # leaf sampled from P(l; c): eq. (6)
        net, y = train.conditioned(run.config, run.diffusion, run.networks, run.tree, path)
        for part in range(parts):
            t = ((part + torch.rand(len(x))) * T / parts).long().clamp(max=T - 1).to(x.device)
            eps = torch.randn(x.shape).to(x.device)  # the CPU's: the same everywhere
            total += len(x) * run.diffusion.loss(net, 2 * x - 1, y, t, eps).item()
    return total / (parts * len(images))


def draw(run, n, steps, seed):
    """n reconstructions and new images, {(what, who): uint8}, and the new ones' leaves (n,)."""
    tree, images, leaves = run.tree, {}, []
    torch.manual_seed(seed)
    for x in batches(run, "images", run.data.test_images[:n]):
        paths = {"reconstructions": tree.infer_path(x, tree.leaf_probs(x).argmax(1)),
                 "new_images": tree.sample_path(len(x))}
        leaves.append(paths["new_images"].nodes.amax(1).cpu())  # ids rise along a path
        for what, path in paths.items():
            drawn = sample.draw_images(run, path, steps, 0.0)
            for who, x in zip(("TreeVAE", "diffusion"), drawn):
                if x is not None:  # there is a stage 2; 8 bits, as in files
                    images.setdefault((what, who), []).append((255 * x).round().byte())
    return {key: torch.cat(parts) for key, parts in images.items()}, torch.cat(leaves).numpy()


def outputs(run, network, images):
    """A network's outputs for images (N, C, H, W) uint8: (N, D)."""
    return torch.cat([network(x).float().cpu() for x in batches(run, "features", images)]).numpy()


def leaf_entropies(run, images, leaves, steps):
    """Table 2, Figure 5: the classes of each leaf's new images; draws leaf_classes.png."""
    classifier, scores, counts = load_classifier(run), {}, {}
    of_leaf = np.array(run.tree.leaves)[:, None] == leaves  # (L, n)
    for (what, who), drawn in images.items():
        if what == "new_images":
            classes = outputs(run, classifier, drawn).argmax(1)  # (n,)
            counts[who] = of_leaf @ np.eye(len(run.data.classes), dtype=int)[classes]
            scores[f"leaf_entropy_{who}"] = entropy(counts[who][of_leaf.any(1)]).mean()
    sample.draw_leaf_classes(run, counts, run.folder / "leaf_classes.png", steps)
    return scores


def measure(folder, flags):
    """All numbers of one run: {name: number}, what metrics.json in its folder holds."""
    run = train.load_run(folder, flags.device, flags.data_root)
    config, device = run.config, run.device.type
    n = min(len(run.data.test_images), flags.images or (200 if config.max_images else 10000))
    steps = flags.steps or (15 if device == "cpu" else 100)
    y = config.condition + " + reconstruction" * config.with_reconstruction
    method = METHODS.get(y, f"Diffusion ({y})") if run.networks is not None else "TreeVAE"
    result = {"run": str(folder), "method": method, "settings": vars(config)}
    result |= {"images": n, "steps": steps} | clustering_scores(run)
    result |= elbo_terms(run, flags.ll_samples, flags.seed)
    if run.networks is not None:
        result["denoising_loss"] = denoising_loss(run, min(n, 2000), flags.seed)
    networks = {"FD": load_classifier(run)[:-1]} if run.data.classes else {}
    if flags.inception_weights or device == "cuda":
        networks |= load_inception(flags.inception_weights or "download")
    images, leaves = draw(run, n, steps, flags.seed) if networks else ({}, None)
    if run.data.classes:
        result |= leaf_entropies(run, images, leaves, steps)
    for name, network in networks.items():  # Tables 1, 3: distances to all test images
        test = moments(outputs(run, network.to(device), run.data.test_images))
        for (what, who), drawn in images.items():
            found = moments(outputs(run, network, drawn))
            result[f"{name}_{what}_{who}"] = frechet_distance(*found, *test)
    file = run.folder / "metrics.json"
    train.replace_file(file, lambda f: f.write(json.dumps(result, indent=1).encode()))
    train.live(f"wrote {file}", last=True)
    return result


def table(results):
    """Numbers side by side, in Markdown; runs that differ in their seed share a column."""
    groups = {}
    for result in results:
        same = {k: v for k, v in result["settings"].items() if k not in NOT_METHOD}
        groups.setdefault(f"{result['method']} {same}", []).append(result)
    names = dict.fromkeys(k for r in results for k, value in r.items() if isinstance(value, float))
    columns = [["run", "-" * 28, "method", *(name.replace("_", " ") for name in names)]]
    for group in groups.values():  # of runs
        title = group[0]["run"] if len(group) == 1 else f"mean ± std ({len(group)} seeds)"
        columns.append([title, "-" * 28, group[0]["method"]])
        for name in names:  # NaN: a run lacks it
            values = [result.get(name, np.nan) for result in group]
            spread = f" ± {np.std(values, ddof=1):.2g}" if len(group) > 1 else ""
            columns[-1].append(f"{np.mean(values):.5g}{spread}")
    return "\n".join("".join(f"| {cell:28} " for cell in row) + "|" for row in zip(*columns))


def main(argv=None):
    """Measure each run; print all numbers side by side."""
    parser = argparse.ArgumentParser(description="Every number of the papers, of finished runs.")
    add = parser.add_argument
    add("runs", nargs="+", metavar="run", help="such as runs/fashion")
    add("--data-root", help="default: the run's")
    add("--device", default="auto", help="cuda, mps or cpu")
    add("--images", type=int, default=0, help="0: all test images, 10000 at most; 200 of --quick")
    add("--steps", type=int, default=0, help="of DDIM; 0: 15 on a CPU, else 100")
    add("--inception-weights", metavar="FILE", help="for FID; on CUDA \"download\"")
    add("--ll-samples", type=int, default=0, help="for the bound on log p(x): none; papers: 1000")
    add("--seed", type=int, default=0)
    flags = parser.parse_args(argv)
    if flags.images == 1 or min(flags.images, flags.steps, flags.ll_samples, flags.seed) < 0:
        train.fail("--images must be 2 or more; --steps, --ll-samples and --seed 0 or more")
    print(table([measure(folder, flags) for folder in dict.fromkeys(flags.runs)]))


if __name__ == "__main__":
    train.run(main)
