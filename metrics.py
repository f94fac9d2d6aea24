"""Every number of the papers, for finished runs.

    python metrics.py runs/a runs/b    a table; each run's metrics.json
"""

import argparse
import json

import numpy as np
import torch
from torch import nn
from torchvision.models import Inception3

import sample
import train
from diffusion import autocast
from treevae import make_encoder

URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
       "pt_inception-2015-12-05-6726825d.pth")
NOT_METHOD = "seed", "out", "device", "data_root", "tree"  # differ within a column


# -- Clustering: leaf_of_image (N,) node ids, labels (N,) classes --

def contingency(clusters, labels):
    """Images by cluster and class, by id: (n_clusters, n_classes)."""
    in_cluster = np.unique(clusters)[:, None] == clusters  # (n_clusters, N)
    in_class = np.unique(labels)[:, None] == labels  # (n_classes, N)
    return in_cluster.astype(int) @ in_class.T


def dendrogram_purity(parents, leaf_of_image, labels):
    """The share of a class under the lowest common ancestor of two of its images: a mean over all
    pairs, in [0, 1] (Heller and Ghahramani 2005); NaN without a pair."""
    under = np.zeros((len(parents), len(np.unique(labels))))  # images under a node, by class
    under[np.unique(leaf_of_image)] = contingency(leaf_of_image, labels)
    for i in reversed(range(1, len(parents))):  # children first; pruned nodes have no images
        under[parents[i]] += under[i]
    pairs = under * (under - 1) / 2  # pairs under a node
    for i in range(1, len(parents)):  # parents first: pairs[i] is still all pairs under i
        pairs[parents[i]] -= pairs[i]  # these meet further down
    share = under / np.maximum(1, under.sum(1, keepdims=True))
    return (pairs * share).sum() / pairs.sum() if pairs.any() else np.nan


def leaf_purity(leaf_of_image, labels):
    """The share of images in the majority class of their leaf."""
    return contingency(leaf_of_image, labels).max(1).sum() / len(labels)


def cluster_accuracy(leaf_of_image, labels):
    """The share of images in the class of their leaf, by the best one-to-one matching."""
    counts = contingency(leaf_of_image, labels)
    if len(counts) < len(counts.T):
        counts = counts.T  # a column doubles the work
    sets = np.arange(2 ** len(counts.T))  # of columns: bit c is 1 if c is in the set
    best = np.zeros(len(sets))  # most images the rows so far can match, with columns of this set
    for row in counts:
        before = best.copy()
        for c, n in enumerate(row):
            has_c = (sets >> c) % 2 == 1  # ~has_c: the same sets without c, in the same order
            # This row takes c, the rows before it the rest of the set; or it stays unmatched
            best[has_c] = np.maximum(best[has_c], before[~has_c] + n)
    return best.max() / len(labels)


def entropy(counts):
    """Entropy in nats of histograms, counts (..., K): (...,)."""
    p = counts / np.sum(counts, -1, keepdims=True)  # (..., K)
    return -(p * np.log(np.where(p > 0, p, 1))).sum(-1)  # 0 log 0 = 0


def normalized_mutual_info(leaf_of_image, labels):
    """Mutual information over the mean of both entropies; 1 if both are 0."""
    counts = contingency(leaf_of_image, labels)
    both = entropy(counts.sum(1)) + entropy(counts.sum(0))  # H(leaf) + H(class)
    return 2 * (both - entropy(counts.ravel())) / both if both > 0 else 1.0


# -- Frechet distances --

def moments(features):
    """Mean (D,) and unbiased covariance (D, D) of features (N, D)."""
    return features.mean(0, dtype=float), np.cov(features.T, dtype=float)


def frechet_distance(mu1, cov1, mu2, cov2):
    """|mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of Gaussians (Dowson and Landau 1982)."""
    values, vectors = np.linalg.eigh(cov1)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T  # C1^(1/2)
    # C1 C2 has the eigenvalues of C1^(1/2) C2 C1^(1/2), which is symmetric
    overlap = np.sqrt(np.linalg.eigvalsh(root @ cov2 @ root).clip(0)).sum()
    return ((mu1 - mu2) ** 2).sum() + np.trace(cov1 + cov2) - 2 * overlap


def load_inception(file):
    """{"FID": net}: images (B, 1 or 3, H, W) in [0, 1] -> features (B, 2048). The weights: a
    file, or "download"; {} if that fails."""
    def rescale(net, inputs):  # size and range as in pytorch-fid
        x = inputs[0].expand(-1, 3, -1, -1)
        return 2 * nn.functional.interpolate(x, (299, 299), mode="bilinear") - 1
    def pool_again(block, inputs, out):  # out's last channels are this branch: by our pool
        branch = block.branch_pool(block.pool(inputs[0]))
        out[:, -branch.shape[1]:] = branch
    net = Inception3(1008, aux_logits=False, init_weights=False)
    load, source = torch.load, file
    if file == "download":
        load, source = torch.hub.load_state_dict_from_url, URL
    try:
        net.load_state_dict(load(source, map_location="cpu", weights_only=True))
    except Exception as error:
        if file != "download":
            train.fail(f"no FID: {error}")
        print(f"no FID: {error}")
        return {}
    net.register_forward_pre_hook(rescale)
    net.fc = nn.Identity()  # features, not classes
    for block in net.children():
        if hasattr(block, "branch_pool"):  # TensorFlow's mean, without the padding
            block.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
            block.register_forward_hook(pool_again)
    net.Mixed_7c.pool = nn.MaxPool2d(3, 1, 1)  # the last block: the maximum
    return {"FID": net.eval()}


def load_classifier(run):
    """A small ResNet trained on the labels: x in [0, 1] -> logits; [:-1]: FD's features."""
    data = run.data
    torch.manual_seed(0)
    encoder = make_encoder("resnet", run.tree.image_shape, 64, 128, 1)
    net = nn.Sequential(encoder, nn.Flatten(), nn.Linear(128, len(data.classes))).to(run.device)
    name = run.config.dataset.replace("/", "_")
    file = run.folder.parent / f"classifier-{name}-{len(data.images)}.pt"  # all runs'
    if file.exists():
        net.load_state_dict(torch.load(file, map_location=run.device, weights_only=True))
        return net.eval()
    n_batches = max(1, len(data.images) // 128)
    optimizer = torch.optim.AdamW(net.parameters())  # lr: the schedule's
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, 5 * n_batches)
    for epoch in range(1, 6):
        train.live(f"classifier: epoch {epoch}/5")
        # Equal batches: batch norm fails on a single image
        for rows in torch.randperm(len(data.images)).tensor_split(n_batches):
            x = data.images[rows].to(run.device).float() / 255
            if x.shape[1] == 3:  # colour overfits sooner
                x = train.random_view(run.config, x)
            with autocast(run.device):
                loss = nn.functional.cross_entropy(net(x), data.labels[rows].to(run.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    train.replace_file(file, lambda f: torch.save(net.state_dict(), f))
    return net.eval()


# -- A run --

def batches(run, images):
    """Images uint8 -> batches (B, C, H, W) in [0, 1] on the device; a live line."""
    parts = images.split(sample.PIXELS // images[0, 0].numel())
    for k, part in enumerate(parts, 1):
        train.live(f"batch {k}/{len(parts)}")
        yield part.to(run.device).float() / 255


def clustering_scores(run):
    """The sizes of the leaves; how well they agree with the labels, if any."""
    tree, labels = run.tree, run.data.test_labels.numpy()
    probs = train.leaf_probs(tree, run.data.test_images.to(run.device))  # (N, n_leaves)
    leaf = np.array(tree.leaves)[probs.argmax(1).cpu()]  # (N,)
    scores = {"leaf_sizes": {i: int((leaf == i).sum()) for i in tree.leaves}}
    if run.data.classes:
        scores["dendrogram_purity"] = dendrogram_purity(tree.parents, leaf, labels)
        scores["leaf_purity"] = leaf_purity(leaf, labels)
        scores["accuracy"] = cluster_accuracy(leaf, labels)
        scores["NMI"] = normalized_mutual_info(leaf, labels)
        scores["leaf_entropy_test_images"] = entropy(contingency(leaf, labels)).mean()
    return scores


def elbo_terms(run, ll_samples, seed):
    """Eq. (21) by term, kl_nodes by depth, log p(x): means in nats."""
    tree, images, means = run.tree, run.data.test_images, {}
    torch.manual_seed(seed)
    for x in batches(run, images):
        visits = tree.walk(tree.bottom_up_pass(x))
        terms = tree.elbo(x, visits)  # {name: (B,)}
        for v in visits[1:]:  # not the root
            name = f"kl_depth_{tree.depth(v.node)}"
            terms[name] = terms.get(name, 0) + v.log_reach_q.exp() * v.q.kl(v.p)  # P(i; c) KL
        if ll_samples:
            terms["log_likelihood"] = tree.log_likelihood(x, ll_samples)
        for name, term in terms.items():
            means[name] = means.get(name, 0) + term.sum().item() / len(images)
    return means


def denoising_loss(run, n, seed):
    """Eq. (30) a pixel, of n test images given their paths."""
    T, images, total = run.diffusion.timesteps, run.data.test_images[:n], 0.0
    torch.manual_seed(seed)  # on one tree: the same paths, t and noise
    for x in batches(run, images):
        path = run.tree.infer_path(x)  # leaf sampled from P(l; c): eq. (6)
        net, y = train.conditioned(run.config, run.diffusion, run.networks, run.tree, path)
        for part in range(10):  # one t an image in each tenth of 0..T-1
            t = ((part + torch.rand(len(x))) * T / 10).long().clamp(max=T - 1).to(x.device)
            eps = torch.randn(x.shape).to(x.device)  # the same on any device
            total += len(x) * run.diffusion.loss(net, 2 * x - 1, y, t, eps).item()
    return total / (10 * len(images))


def draw(run, n, steps, seed):
    """n reconstructions, n new images: {(what, who): (n, C, H, W) uint8}, new ones' leaves (n,)."""
    tree, images, leaves = run.tree, {}, []
    torch.manual_seed(seed)
    for x in batches(run, run.data.test_images[:n]):
        paths = {"reconstructions": tree.infer_path(x, tree.leaf_probs(x).argmax(1)),
                 "new_images": tree.sample_path(len(x))}
        leaves.append(paths["new_images"].nodes.amax(1).cpu())
        for what, path in paths.items():
            for who, out in zip(("TreeVAE", "diffusion"), sample.draw_images(run, path, steps, 0)):
                if out is not None:
                    images.setdefault((what, who), []).append((255 * out).round().byte())
    return {key: torch.cat(parts) for key, parts in images.items()}, torch.cat(leaves).numpy()


@torch.no_grad()
def outputs(run, net, images):
    """A network's outputs for images uint8: (N, D)."""
    return torch.cat([net(x).float().cpu() for x in batches(run, images)]).numpy()


def leaf_entropies(run, images, leaves, steps):
    """Table 2; Figure 5, leaf_classes.png: the classes of each leaf's new images."""
    classifier, scores, counts = load_classifier(run), {}, {}
    in_leaf = np.array(run.tree.leaves)[:, None] == leaves  # (n_leaves, n)
    for (what, who), x in images.items():
        if what == "new_images":
            classes = outputs(run, classifier, x).argmax(1)  # (n,)
            counts[who] = in_leaf @ np.eye(len(run.data.classes))[classes]
            scores[f"leaf_entropy_{who}"] = entropy(counts[who][in_leaf.any(1)]).mean()
    sample.draw_leaf_classes(run, counts, run.folder / "leaf_classes.png", steps)
    return scores


def measure(folder, flags):
    """All numbers of a run."""
    run = train.load_run(folder, flags.device)
    config, data, device = run.config, run.data, run.device.type
    n = min(len(data.test_images), flags.images or (200 if config.quick else 10000))
    steps = flags.steps or (15 if device == "cpu" else 100)
    method = config.condition + " + reconstruction" * config.with_reconstruction
    method = method if run.networks else "TreeVAE"
    result = dict(run=folder, method=method, settings=vars(config), images=n, steps=steps)
    result |= clustering_scores(run) | elbo_terms(run, flags.ll_samples, flags.seed)
    if run.networks:
        result["denoising_loss"] = denoising_loss(run, min(n, 2000), flags.seed)
    nets = {"FD": load_classifier(run)[:-1]} if data.classes else {}
    if flags.inception_weights or device == "cuda":
        nets |= load_inception(flags.inception_weights or "download")
    if nets:
        images, leaves = draw(run, n, steps, flags.seed)
    if data.classes:
        result |= leaf_entropies(run, images, leaves, steps)
    for name, net in nets.items():  # Tables 1, 3: to all test images
        test = moments(outputs(run, net.to(device), data.test_images))
        for (what, who), x in images.items():
            result[f"{name}_{what}_{who}"] = frechet_distance(*moments(outputs(run, net, x)), *test)
    file = run.folder / "metrics.json"
    train.replace_file(file, lambda f: f.write(json.dumps(result, indent=1).encode()))
    train.live(f"wrote {file}", last=True)
    return result


def table(results):
    """Results side by side, in Markdown; seeds of one method as mean ± std."""
    groups = {}  # {method and settings: results}
    for result in results:
        same = {k: v for k, v in result["settings"].items() if k not in NOT_METHOD}
        groups.setdefault(f"{result['method']} {same}", []).append(result)
    names = dict.fromkeys(k for r in results for k, v in r.items() if isinstance(v, float))
    columns = [["run", "---", "method", *(name.replace("_", " ") for name in names)]]
    for group in groups.values():
        title = group[0]["run"] if len(group) == 1 else f"mean ± std ({len(group)} seeds)"
        columns.append([title, "---", group[0]["method"]])
        for name in names:
            values = [r.get(name, np.nan) for r in group]
            spread = f" ± {np.std(values, ddof=1):.2g}" if len(group) > 1 else ""
            columns[-1].append(f"{np.mean(values):.5g}{spread}")
    return "\n".join("".join(f"| {cell:28} " for cell in row) + "|" for row in zip(*columns))


def main(argv=None):
    """Measure runs, print the table."""
    parser = argparse.ArgumentParser()
    add = parser.add_argument
    add("runs", nargs="+", help="like runs/fashion")
    add("--device", default="auto", help="cuda, mps or cpu")
    add("--images", type=int, default=0, help="default: up to 10000")
    add("--steps", type=int, default=0, help="of DDIM; default: 15 on a CPU, else 100")
    add("--inception-weights", help="pytorch-fid's file; default: a download, on CUDA")
    add("--ll-samples", type=int, default=0, help="of the bound on log p(x); papers: 1000")
    add("--seed", type=int, default=0)
    flags = parser.parse_args(argv)
    if flags.images == 1 or min(flags.images, flags.steps, flags.ll_samples, flags.seed) < 0:
        train.fail("--images must be at least 2; --steps, --ll-samples and --seed at least 0")
    print(table([measure(folder, flags) for folder in dict.fromkeys(flags.runs)]))


if __name__ == "__main__":
    train.run(main)
