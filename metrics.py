"""Every number that the papers report, from a finished run.

    python metrics.py runs/fashion            the tables below, metrics.json and two pictures, in the run's folder
    python metrics.py runs/fashion --full     and the bound on log p(x) by 1,000 samples an image: 15 minutes more on a CPU
    python metrics.py runs/a runs/b ...       the same of each run, then all side by side: table3.md, table3.png next to the first

Test images go to their most probable leaf: dendrogram purity and other scores, growth_scores.png; the ELBO and its terms; the
denoising loss by time, which tells how much a condition helps.
Tables 1, 3: Frechet distances of reconstructions and of new images, by TreeVAE and by diffusion on the same paths, to the test
images. Table 2, Figure 5: what a classifier sees in each leaf's new images, leaf_classes.png, and the mean entropy of that.
metrics.json grows part by part; a part is computed again if the run, the settings or the code have changed since.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import socket
from pathlib import Path as File

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import sample
import train
from treevae import make_encoder

FID, FD = "FID", "FD (classifier)"    # the Frechet distance by features of the Inception network, and of a classifier of our own
WEIGHTS_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
RECIPES = {"small": (5, 3e-3), "resnet50": (20, 1e-3)}                         # a classifier's epochs and largest learning rate
NATS = ("elbo", "reconstruction", "kl_root", "kl_nodes", "kl_decisions", "log_likelihood", "standard_error")


# == Clustering =======================================================================================================
# leaf_of_image: (N,) node ids; labels: (N,) classes, 0..K-1; parents: node id -> its parent's id, -1 at the root

def contingency(clusters, labels):
    """How many images of each cluster are of each class: (n_clusters, n_classes) counts, clusters sorted by id."""
    clusters, labels = np.asarray(clusters), np.asarray(labels)
    if clusters.shape != labels.shape or clusters.size == 0:
        raise ValueError(f"one cluster and one label for each image, please: got {clusters.shape} and {labels.shape}")
    rows, columns = np.unique(clusters, return_inverse=True)[1], np.unique(labels, return_inverse=True)[1]
    shape = rows.max() + 1, columns.max() + 1
    return np.bincount(rows * shape[1] + columns, minlength=shape[0] * shape[1]).reshape(shape)


def dendrogram_purity(parents, leaf_of_image, labels):
    """Dendrogram purity in [0, 1] (Heller and Ghahramani 2005), exact and linear in the number of images.

    Over all pairs of different images of one class: the share of that class among the images under the pair's lowest common
    ancestor, averaged. The pairs that meet at a node are those under it less those under one child. NaN if there is no pair.
    """
    under = np.zeros((len(parents), len(np.unique(labels))))                   # (nodes, classes): images under each node
    under[np.unique(leaf_of_image)] = contingency(leaf_of_image, labels)
    edges = [(i, parent) for i, parent in reversed(list(enumerate(parents))) if parent >= 0]
    for i, parent in edges:                                                    # children before parents: ids grow downwards
        under[parent] += under[i]
    meet = under * (under - 1) / 2
    for i, parent in edges:
        meet[parent] -= under[i] * (under[i] - 1) / 2
    share = under / np.maximum(1, under.sum(1, keepdims=True))
    return (meet * share).sum() / meet.sum() if meet.any() else float("nan")


def leaf_purity(leaf_of_image, labels):
    """The share of images that are of their leaf's majority class, in [0, 1]."""
    return contingency(leaf_of_image, labels).max(1).sum() / len(labels)


def best_matching(profit):
    """One column for each row (or one row for each column) of largest total profit: (rows, columns) index arrays.

    The Hungarian algorithm with potentials, O(n^3): rows join one at a time, each by a shortest augmenting path.
    """
    cost = -np.asarray(profit, dtype=float)
    if cost.shape[0] > cost.shape[1]:
        return best_matching(-cost.T)[::-1]
    n, m = cost.shape
    u, v, row_of = np.zeros(n), np.zeros(m + 1), np.full(m + 1, -1)            # cost - u - v >= 0, = 0 if matched
    for row_of[m] in range(n):                                                 # column m is where the new row waits
        best, came_from, reached, column = np.full(m, np.inf), np.full(m, m), np.zeros(m + 1, dtype=bool), m
        while row_of[column] >= 0:
            reached[column], row = True, row_of[column]
            slack = cost[row] - u[row] - v[:m]
            closer = ~reached[:m] & (slack < best)
            best[closer], came_from[closer] = slack[closer], column
            column = int(np.where(reached[:m], np.inf, best).argmin())
            u[row_of[reached]] += best[column]                                 # keep the tree of reached columns tight
            v[reached] -= best[column]
            best -= best[column]
        while column != m:                                                     # flip the path back to the new row
            row_of[column], column = row_of[came_from[column]], came_from[column]
    columns = np.flatnonzero(row_of[:m] >= 0)
    return row_of[columns], columns


def cluster_accuracy(leaf_of_image, labels):
    """The share of images in the class that their leaf stands for, under the best one-to-one matching: in [0, 1]."""
    counts = contingency(leaf_of_image, labels)
    return counts[best_matching(counts)].sum() / len(labels)


def entropy(counts):
    """Entropy in nats of each histogram of counts (..., K), normalised: (...,). 0 for one class, NaN for an empty histogram."""
    counts = np.asarray(counts, dtype=float)
    p = counts / np.where(counts.any(-1, keepdims=True), counts.sum(-1, keepdims=True), np.nan)
    return -(p * np.log(np.where(p > 0, p, 1))).sum(-1)


def normalized_mutual_info(leaf_of_image, labels):
    """Mutual information of leaf and class over the arithmetic mean of their entropies, in [0, 1]; 1 if both are constant."""
    counts = contingency(leaf_of_image, labels)
    of_leaf, of_class, of_both = entropy(counts.sum(1)), entropy(counts.sum(0)), entropy(counts.ravel())
    return 2 * (of_leaf + of_class - of_both) / (of_leaf + of_class) if of_leaf + of_class > 0 else 1.0


def adjusted_rand_index(leaf_of_image, labels):
    """The share of pairs of images on which leaves and classes agree, 0 for what chance gives and 1 for all of them."""
    counts = contingency(leaf_of_image, labels)
    both, of_leaf, of_class, all_pairs = [(n * (n - 1) / 2).sum() for n in (counts, counts.sum(1), counts.sum(0), counts.sum())]
    chance, most = of_leaf * of_class / max(1, all_pairs), (of_leaf + of_class) / 2
    return (both - chance) / (most - chance) if most != chance else 1.0


def leaf_histograms(leaves, leaf_of_image, classes, n_classes):
    """How many images of each leaf are of each class: (n_leaves, n_classes) counts, empty leaves and classes included."""
    return np.stack([np.bincount(classes[leaf_of_image == leaf], minlength=n_classes) for leaf in leaves])


def collapse(parents, leaf_of_image, leaves):
    """Each image's leaf, or its ancestor among the `leaves` of an earlier tree, which has the same id in both: (N,) node ids."""
    def up(i):
        return i if i in leaves or parents[i] < 0 else up(parents[i])
    ids, index = np.unique(leaf_of_image, return_inverse=True)
    return np.array([up(i) for i in ids])[index]


# == Frechet distance, and the networks whose features it compares ====================================================

class Moments:
    """`mean` (D,) and unbiased `cov` (D, D) of features that come in batches: float64, D^2 numbers for any number of images."""
    n, mean, scatter = 0, 0.0, 0.0

    def add(self, features):
        """Take in features (B, D), merged as in Chan, Golub and LeVeque (1979): sums of squares would lose digits."""
        x = np.asarray(features, dtype=np.float64)
        shift, centred, n = x.mean(0) - self.mean, x - x.mean(0), self.n + len(x)
        self.scatter = self.scatter + centred.T @ centred + np.outer(shift, shift) * len(x) * self.n / n
        self.mean, self.n, self.cov = self.mean + shift * len(x) / n, n, self.scatter / max(1, n - 1)


def frechet_distance(mu1, cov1, mu2, cov2):
    """|mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two Gaussians, squared units; mu (D,), cov (D, D), singular or not.

    Dowson and Landau (1982), Heusel et al. (2017). The trace of the root is the sum of the singular values of C1^(1/2) C2^(1/2),
    which takes no root of what rounding leaves of a 0.
    """
    def root(cov):
        values, vectors = np.linalg.eigh(np.asarray(cov, dtype=np.float64))
        return vectors * np.sqrt(values.clip(0)) @ vectors.T
    shift = np.asarray(mu1, dtype=np.float64) - np.asarray(mu2, dtype=np.float64)
    overlap = np.linalg.svd(root(cov1) @ root(cov2), compute_uv=False).sum()
    return max(0.0, float(shift @ shift + np.trace(cov1) + np.trace(cov2) - 2 * overlap))


class InceptionFeatures(torchvision.models.Inception3):
    """The FID network: images (B, 1 or 3, H, W) in [0, 1] -> features (B, 2048). Its state_dict is that of WEIGHTS_URL's file.

    torchvision's network, but for the pooling branches, which are those of TensorFlow's of 2015: averages leave the padding
    out, and the last is a maximum. Images are resized and scaled as in pytorch-fid.
    """

    def __init__(self):
        super().__init__(num_classes=1008, aux_logits=False, init_weights=False)
        def pool_again(pool, layer, inputs, out):                              # the last branch anew, behind another pooling
            branch = layer.branch_pool(pool(*inputs))
            return torch.cat([out[:, :-branch.shape[1]], branch], 1)
        for name, layer in self.named_children():
            if hasattr(layer, "branch_pool"):                                  # blocks A, C and E
                pool = nn.MaxPool2d(3, 1, 1) if name == "Mixed_7c" else nn.AvgPool2d(3, 1, 1, count_include_pad=False)
                layer.register_forward_hook(functools.partial(pool_again, pool))
        self.eval().requires_grad_(False)

    def forward(self, x):
        x = F.interpolate(x.expand(-1, 3, -1, -1), (299, 299), mode="bilinear", align_corners=False)
        return nn.Sequential(*list(self.children())[:-2], nn.Flatten())(2 * x - 1)               # all but dropout and classes


def load_weights(network, path, advice):
    """A network with the weights in a file, in eval mode; a clear failure if they are missing, damaged or another network's."""
    try:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:                                                 # a damaged file shows itself in many ways
        train.fail(f"{path} is missing, damaged or something else ({type(error).__name__}); {advice}")
    return network.eval().requires_grad_(False)


@functools.cache
def load_inception(file):
    """InceptionFeatures with the weights in a file, or by "download"; None, and a sentence, where there is no network."""
    advice = f"--inception-weights wants the file at {WEIGHTS_URL}"
    if file == "download":
        file, timeout = File(torch.hub.get_dir()) / "checkpoints" / File(WEIGHTS_URL).name, socket.getdefaulttimeout()
        socket.setdefaulttimeout(5)                                            # one short attempt
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            if not file.exists():
                torch.hub.download_url_to_file(WEIGHTS_URL, str(file), progress=False)
        except OSError as error:
            print(f"no {FID}, only {FD}: its weights cannot be downloaded ({train.first_line(error)}); {advice}")
            return None
        finally:
            socket.setdefaulttimeout(timeout)
    return load_weights(InceptionFeatures(), file, advice)


def load_classifier(run, kind, data, path):
    """A trunk, (B, C, H, W) in [0, 1] -> features (B, D), and a linear layer to the classes; read, or trained and written.

    small: an encoder of the tree's kind, D = 128; resnet50 (He et al. 2016): with a first layer for small images, D = 2048.
    """
    torch.manual_seed(0)
    shape = tuple(data.images.shape[1:])
    if kind == "small":
        trunk, D = nn.Sequential(make_encoder("resnet", shape, 64, 128, 1), nn.Flatten()), 128
    else:
        trunk, D = torchvision.models.resnet50(), 2048
        trunk.conv1, trunk.maxpool, trunk.fc = nn.Conv2d(shape[0], 64, 3, padding=1, bias=False), nn.Identity(), nn.Identity()
    network = nn.Sequential(trunk, nn.Linear(D, len(data.classes))).to(run.device)
    if path.exists():
        return load_weights(network, path, "delete it, and it is made anew")
    (epochs, lr), images, labels = RECIPES[kind], data.images.to(run.device), data.labels.to(run.device)
    views = train.Views((0.5, 1.0), jitter=(0.2, 0.2, 0.2, 0.0), gamma=0.0)    # in colour, where it is harder to be right
    order = torch.cat([torch.randperm(len(images)) for _ in range(epochs)]).to(run.device)
    batches = order.tensor_split(max(1, len(order) // 128))                    # none of one image, which batch norm would refuse
    optimizer = torch.optim.AdamW(network.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=len(batches))
    for rows in run.watch(f"classifier ({kind}), {epochs} epochs", batches):
        x = images[rows].float() / 255
        with train.autocast(run.config, run.device):
            loss = F.cross_entropy(network(train.random_view(x, views) if shape[0] == 3 else x), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    train.write(path, lambda file: torch.save(network.state_dict(), file))
    return network.eval().requires_grad_(False)


def evaluate(run, tree, images, labels, frames):
    """Of images (N, C, H, W) uint8: the ELBO and its terms in nats; unless labels are None, how well the leaves fit them, (N,).

    In colour the bits a dimension are of a density of x in [0, 1]; of pixels in 0..255 they are 8 more.
    frames: earlier trees, {"parents", "leaves"}; "growth" has of each [number of leaves, dendrogram purity, NMI].
    """
    terms = [tree.elbo(x.float() / 255) for x in run.watch("ELBO", images.split(500))]
    leaf = np.array(tree.leaves)[train.leaf_probs(tree, images).argmax(1).cpu().numpy()]         # (N,) node ids
    sizes = [int((leaf == i).sum()) for i in tree.leaves]
    result = dict(images=len(images), leaves=tree.leaves, leaf_sizes=sizes, smallest_leaf=min(sizes) / len(images),
                  **{name: torch.cat([t[name] for t in terms]).mean().item() for name in terms[0]})
    result["elbo, bits a dimension"] = -result["elbo"] / np.log(2) / images[0].numel()
    earlier = [(frame["parents"], frame["leaves"], collapse(tree.parents, leaf, frame["leaves"])) for frame in frames]
    return result if labels is None else dict(
        dendrogram_purity=dendrogram_purity(tree.parents, leaf, labels), leaf_purity=leaf_purity(leaf, labels),
        accuracy=cluster_accuracy(leaf, labels), normalized_mutual_info=normalized_mutual_info(leaf, labels),
        adjusted_rand_index=adjusted_rand_index(leaf, labels), **result,
        confusion=leaf_histograms(tree.leaves, leaf, labels, labels.max() + 1).tolist(),
        growth=[[len(leaves), dendrogram_purity(parents, merged, labels), normalized_mutual_info(merged, labels)]
                for parents, leaves, merged in earlier])


def look_at(run, title, n, make, features, head):
    """What networks see in n images: {(name, who): Moments of features[name]}, and by the head of FD's, {who: (n,) classes}.

    make(rows) -> {who: images (B, C, H, W) uint8} of some rows of the n: they are made, looked at and forgotten.
    """
    seen, classes = {}, {}
    for rows in run.watch(title, torch.arange(n).split(256 if run.device.type == "cpu" else 1000)):
        for who, images in make(rows).items():
            for name, network in features.items():
                found = torch.cat([network(x.float() / 255) for x in images.to(run.device).split(100)])
                seen.setdefault((name, who), Moments()).add(found.cpu())
                if name == FD:
                    classes.setdefault(who, []).append(head(found).argmax(1).cpu())
    return seen, {who: torch.cat(parts).numpy() for who, parts in classes.items()}


@torch.no_grad()
def denoising_loss(painter, images, seed=0, buckets=10):
    """Eq. (30), as a mean over pixels, of images (N, C, H, W) uint8 given their paths: {"denoising loss, all t": mean, "..., t in 0..99": ...}.

    Each image gets one random t in each of `buckets` equal parts of 0..T-1. On the same tree the same seed gives the same noise, t and
    paths: what differs between two runs is the denoiser's.
    """
    T = painter.config.timesteps
    buckets = min(buckets, T)
    losses = torch.zeros(buckets, dtype=torch.float64)
    for k, rows in enumerate(images.split(250)):
        torch.manual_seed(seed + k)
        noise, times = torch.randn(buckets, *rows.shape), torch.rand(buckets, len(rows))
        x = rows.float() / 255
        net, y = train.conditioned(painter.networks, painter.config, painter.tree, painter.tree.infer_path(x))
        for b in range(buckets):
            t = ((b + times[b]) * T / buckets).long().clamp(max=T - 1).to(x.device)
            with train.autocast(painter.config, painter.device):
                losses[b] += len(x) * painter.diffusion.loss(net, 2 * x - 1, y, t, noise[b].to(x.device)).item() / len(images)
    return {"denoising loss, all t": losses.mean().item()} | {
        f"denoising loss, t in {b * T // buckets}..{((b + 1) * T - 1) // buckets}": losses[b].item() for b in range(buckets)}


def measure(folder, flags):
    """All numbers and pictures of one run, written as they are found. -> {name: number, ...}, what metrics.json holds."""
    folder, stage_2 = File(folder), (File(folder) / "diffusion.pt").exists()
    painter = sample.Painter(folder, flags.device, flags.steps, 0.0, data_root=flags.data_root, need_diffusion=stage_2)
    config, data, tree, on_cpu = painter.config, painter.data, painter.tree, painter.device.type == "cpu"
    run, images = train.Run(config, painter.device), data.test_images.to(painter.device)
    painter.steps = min(config.timesteps, flags.steps or (15 if on_cpu else 100))
    kind, features, head = flags.classifier or ("small" if on_cpu else "resnet50"), {}, None
    n_images = flags.images or (200 if config.preset.endswith("--quick") else 10000)
    told = config.condition + " + reconstruction" * config.with_reconstruction
    known_as = {"path": "TreeDiffusion", "none + reconstruction": "TreeVAE + Diffusion"}
    method = known_as.get(told, f"Diffusion ({told})") if stage_2 else "TreeVAE"
    print(f"{folder}: {method}, {config.dataset}, seed {config.seed}; Frechet distances to {len(images)} test images", flush=True)
    made_of = [folder / name for name in ("config.json", "tree.pt", "diffusion.pt")] + sorted(File(__file__).parent.glob("*.py"))
    result = dict(run=str(folder), dataset=config.dataset, preset=config.preset, seed=config.seed, method=method, protocol=dict(
        images=n_images, steps=painter.steps, seed=flags.seed, classifier=kind,
        digest=hashlib.sha256(b"".join(file.read_bytes() for file in made_of if file.exists())).hexdigest()))
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):        # there is none yet, or an older version's
        known = json.loads((folder / "metrics.json").read_text())
        result = known if known["protocol"] == result["protocol"] else result
    def save(more):
        result.update(more)
        train.write(folder / "metrics.json", lambda file: file.write(json.dumps(result, indent=1).encode()))

    if "elbo" not in result:
        torch.manual_seed(flags.seed)
        frames = train.load_checkpoint(folder / "checkpoint.pt", "cpu")["frames"]
        save(evaluate(run, tree, images, np.asarray(data.test_labels) if data.classes else None, frames))
    if stage_2 and "denoising loss, all t" not in result:
        save(denoising_loss(painter, images[:min(2500, n_images)], flags.seed))
    vectors = images.dim() == 2
    if data.classes:
        sample.draw_growth_scores(result["growth"], folder / "growth_scores.png")
    if data.classes and not vectors:
        name = f"classifier-{config.dataset.replace('/', '_')}-{kind}" + f"-{config.max_images}" * bool(config.max_images)
        features[FD], head = load_classifier(run, kind, data, folder.parent / f"{name}.pt")
    else:
        print(f"no {'images' if vectors else 'labels: no scores of the clusters'}, no classifier, so no {FD} and no leaf entropy")
    where = "" if vectors else flags.inception_weights or "download" * (not on_cpu)
    if inception := where and load_inception(where):
        features[FID] = inception.to(run.device)
    elif not where and not vectors:
        print(f"no {FID}: on a CPU it takes hours, and has to be asked for by --inception-weights FILE or download")
    def make(rows):
        if what == "test images":
            return {"data": images[rows]}
        x = images[rows].float() / 255 if what == "reconstructions" else None
        path = tree.sample_path(len(rows)) if x is None else tree.infer_path(x, tree.leaf_probs(x).argmax(1))
        leaves.append(path.nodes.amax(1).cpu())
        drawn = painter.draw(path, batch_size=64 if on_cpu else 1000) if stage_2 else [tree.decode(path).cpu()]
        return {who: (255 * x).round().byte() for who, x in zip(("TreeVAE", "diffusion"), drawn)}        # 8 bits, as in files
    n_of = {"test images": len(images), "reconstructions": min(len(images), n_images), "new images": n_images}
    for what, n in n_of.items() if any(f"{name} of new images by TreeVAE" not in result for name in features) else ():
        leaves = []
        torch.manual_seed(flags.seed)
        found, classes = look_at(run, what, n, make, features, head)
        if what == "test images":
            test = {name: (m.mean, m.cov) for (name, _), m in found.items()}
            more = {"classifier_accuracy": (classes["data"] == np.asarray(data.test_labels)).mean()} if head else {}
        else:
            more = {f"{name} of {what} by {who}": frechet_distance(m.mean, m.cov, *test[name])
                    for (name, who), m in found.items()}
        if what == "new images" and head:
            counts = {who: leaf_histograms(tree.leaves, torch.cat(leaves).numpy(), predicted, len(data.classes))
                      for who, predicted in classes.items()}
            more |= {f"leaf entropy by {who}": np.nanmean(entropy(of_leaf)) for who, of_leaf in counts.items()}
            more["predicted"] = {who: of_leaf.tolist() for who, of_leaf in counts.items()}
            sample.draw_leaf_classes(painter, counts, folder / "leaf_classes.png")
        save(more)
    if flags.ll_samples and result.get("ll_samples") != flags.ll_samples:
        torch.manual_seed(flags.seed)
        parts = run.watch(f"log p(x) by {flags.ll_samples} samples", images[:n_images].split(100))
        bound = torch.cat([tree.log_likelihood(x.float() / 255, flags.ll_samples) for x in parts])
        mean, error = bound.mean().item(), bound.std().item() / len(bound) ** 0.5
        save({"ll_samples": flags.ll_samples, "log_likelihood": mean, "standard_error": error,
              "log_likelihood, bits a dimension": -mean / np.log(2) / images[0].numel()})
    return result


def table(results):
    """The numbers that `measure` found of some runs, side by side: a Markdown table that is also aligned as text."""
    names = dict.fromkeys(name for r in results for name, value in r.items() if isinstance(value, float))
    columns = [["run", "method", "images, DDIM steps", *(name.replace("_", " ") + ", nats" * (name in NATS) for name in names)]]
    columns += [[r["run"], r["method"], "{images}, {steps}".format(**r["protocol"]),
                 *(f"{r[name]:.{5 if 'denoising' in name else 3}f}" if name in r else "-" for name in names)] for r in results]
    lines = ["| " + " | ".join(row) + " |" for row in zip(*[[cell.ljust(max(map(len, c))) for cell in c] for c in columns])]
    return "\n".join([lines[0], "|".join("-" * len(part) for part in lines[0].split("|")), *lines[1:]])


def main(argv=None):
    """Measure each run; print what was found, side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="run", help="the folder of a run, such as runs/fashion")
    parser.add_argument("--data-root", help="folder of downloaded data sets (default: the run's)")
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"], help="default: auto")
    parser.add_argument("--images", type=int, help="new images, and reconstructions at most (default: 10000; 200 of a --quick run)")
    parser.add_argument("--steps", type=int, help="DDIM steps an image, at most T (default: 15 on a CPU, else 100)")
    parser.add_argument("--classifier", choices=list(RECIPES), help="default: small on a CPU, else resnet50")
    parser.add_argument("--inception-weights", metavar="FILE", help=f"of the {FID} network, or \"download\" (default on a GPU)")
    parser.add_argument("--full", action="store_true", help="the bound on log p(x), too, by 1000 samples an image")
    parser.add_argument("--ll-samples", type=int, help="samples of that bound (default: 1000 with --full, else 0)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all samples (default: 0)")
    flags = parser.parse_args(argv)
    flags.ll_samples = 1000 * flags.full if flags.ll_samples is None else flags.ll_samples
    if (flags.ll_samples < 0 or flags.images is not None and flags.images < 2 or not 0 <= flags.seed < 2 ** 31
            or flags.steps is not None and flags.steps < 1):
        train.fail("--ll-samples must be at least 0, --images at least 2, --steps at least 1 and --seed in 0..2147483647")
    text, beside = table([measure(folder, flags) for folder in flags.runs]), File(flags.runs[0]).parent
    print(text)
    if len(flags.runs) > 1:
        train.write(beside / "table3.md", lambda file: file.write(text.encode() + b"\n"))
        sample.draw_text(text, beside / "table3.png")


if __name__ == "__main__":
    train.run_program(main)
