"""Numbers against brute force, closed forms and values by hand; a run whose numbers are known."""

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import metrics
import sample
import train
from diffusion import Diffusion

approx = pytest.approx
LEAF = torch.tensor([0] * 9 + [1] * 9 + [2] * 12)      # the leaves' columns of 30 test images
LABELS = torch.tensor([0] * 6 + [1] * 12 + [2] * 12)


def test_clustering_scores_by_brute_force_and_by_hand():
    rng, parents = np.random.default_rng(0), [-1, 0, 0, 1, 1, 4, 4, 2, -2]       # 8 was pruned
    paths = {3: {0, 1, 3}, 5: {0, 1, 4, 5}, 6: {0, 1, 4, 6}, 7: {0, 2, 7}}
    leaf, labels, shares = rng.choice([*paths], 60), rng.integers(0, 4, 60), []
    for a, b in itertools.combinations(range(60), 2):
        if labels[a] == labels[b]:
            ancestor = max(paths[leaf[a]] & paths[leaf[b]])
            under = labels[[ancestor in paths[i] for i in leaf]]
            shares.append((under == labels[a]).mean())
    assert metrics.dendrogram_purity(parents, leaf, labels) == approx(np.mean(shares))
    assert math.isnan(metrics.dendrogram_purity([-1, 0, 0], np.array([1, 2]), np.array([0, 1])))
    for k, n_classes in 5 * [(1, 1), (3, 3), (3, 5), (5, 3), (1, 4), (5, 5)]:
        clusters, labels = rng.integers(0, k, 60), rng.integers(0, n_classes, 60)
        counts, _, _ = np.histogram2d(clusters, labels, range(6))
        best = max(counts[range(5), order].sum() for order in itertools.permutations(range(5)))
        clusters = clusters * 7 + 1                    # ids have gaps
        assert metrics.cluster_accuracy(clusters, labels) == approx(best / 60)
    leaf, labels = np.array([1, 1, 1, 2, 2, 2]), np.array([0, 0, 1, 1, 1, 1])
    assert metrics.leaf_purity(leaf, labels) == approx(5 / 6)
    information = math.log(2) / 3 - math.log(2) / 6 + math.log(1.5) / 2
    entropies = math.log(2) + math.log(3) / 3 + 2 * math.log(1.5) / 3
    assert metrics.normalized_mutual_info(leaf, labels) == approx(2 * information / entropies)
    assert metrics.normalized_mutual_info(np.zeros(6), np.zeros(6)) == 1
    assert metrics.entropy([[2, 2, 0], [7, 0, 0]]) == approx([math.log(2), 0])


def test_frechet_distance_in_closed_form():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 50))                    # singular: the root of a a^T b b^T is |a b|
    found = metrics.frechet_distance(a, np.outer(a, a), b, np.outer(b, b))
    assert found == approx((a - b) @ (a - b) + a @ a + b @ b - 2 * abs(a @ b), abs=1e-3)
    one, two = [x @ x.T for x in rng.normal(size=(2, 7, 7))]
    root = np.sqrt(np.linalg.eigvals(one @ two).real).sum()      # no common axes
    found = metrics.frechet_distance(np.zeros(7), one, np.ones(7), two)
    assert found == approx(7 + np.trace(one) + np.trace(two) - 2 * root)
    x = 1000 + rng.normal(size=(200, 5)).astype(np.float32)      # moments are in float64
    for found, exact in zip(metrics.moments(x), (x.mean(0, float), np.cov(x.T, dtype=float))):
        assert found == approx(exact, rel=1e-9)


def test_inception_pools_and_scales_as_the_fid_network(monkeypatch, capsys):
    weights = torchvision.models.Inception3(1008, aux_logits=False, init_weights=False).state_dict()
    with pytest.raises(SystemExit, match="2"):
        metrics.load_inception("missing.pth")
    assert "missing.pth" in capsys.readouterr().err
    web = {(metrics.URL, True): weights}
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url",
                        lambda url, map_location, weights_only: web.pop((url, weights_only)))
    network = metrics.load_inception("download")["FID"]
    assert metrics.load_inception("download") == {}    # a second time it fails
    for name, c in dict(Mixed_5c=256, Mixed_6e=768, Mixed_7b=1280, Mixed_7c=2048).items():
        h, block = torch.rand(1, c, 4, 4), getattr(network, name)
        pooled = F.avg_pool2d(h, 3, 1, 1) / F.avg_pool2d(torch.ones_like(h), 3, 1, 1)
        if name == "Mixed_7c":
            pooled = F.max_pool2d(h, 3, 1, 1)
        branch = block.branch_pool(pooled)
        assert torch.allclose(block(h)[:, -branch.shape[1]:], branch, atol=1e-5)
    x, inputs = torch.rand(2, 1, 28, 28), []
    network.Conv2d_1a_3x3.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    assert network(x).shape == (2, 2048) and inputs[0].shape == (2, 3, 299, 299)
    centre = 2 * x[:, :, 13:15, 13:15].mean((2, 3)).expand(2, 3) - 1
    assert torch.allclose(inputs[0][..., 149, 149], centre, atol=0.1)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_classifier_is_trained_once_for_a_data_set(channels, tmp_path, monkeypatch):
    labels = torch.arange(1025) % 2                    # 8 * 128 + 1: no batch of a single image
    images = torch.randint(0, 60, (1025, channels, 8, 8)) + 120 * labels[:, None, None, None]
    data = train.Data(images.byte(), labels, images[:9], labels[:9], ["dark", "bright"])
    run = make_run(tmp_path / "a", dataset="my/set")
    run = run._replace(data=data, tree=SimpleNamespace(image_shape=(channels, 8, 8)))
    monkeypatch.setattr(metrics, "make_encoder", lambda *shape: nn.Sequential(
        nn.Flatten(), nn.Linear(64 * channels, 128), nn.BatchNorm1d(128), nn.ReLU()))
    views, rates, x, step = [], [], images / 255, torch.optim.AdamW.step
    monkeypatch.setattr(train, "random_view", lambda config, x: views.append(config) or x)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (
        rates.append(self.param_groups[0]["lr"]), step(self)))
    classifier = metrics.load_classifier(run)
    assert len(rates) == 40 and max(rates) == pytest.approx(3e-3, rel=0.05) and rates[-1] < 1e-4
    assert (classifier(x).argmax(1) == labels).float().mean() > 0.95 and not classifier.training
    assert classifier[:-1](x).shape == (1025, 128) and views == 20 * (channels - 1) * [run.config]
    assert (tmp_path / "classifier-my_set-1025.pt").exists()
    monkeypatch.setattr(torch.optim, "AdamW", None)    # a second training would fail
    assert torch.equal(metrics.load_classifier(run)(x), classifier(x))


def make_run(folder, **settings):
    """A run on images whose first pixel is 20, 120 or 220, by leaf."""
    x = torch.randint(0, 256, (30, 1, 28, 28), generator=torch.manual_seed(1)).byte()
    x[:, 0, 0, 0] = 20 + 100 * LEAF
    config = train.Config(**dict(latent_channels=2, bottom_up_channels=4) | settings)
    tree = train.build_tree(config, x.shape[1:], (-1, 0, 0, 1, 1)).eval().requires_grad_(False)
    tree.leaf_probs = lambda x: 0.1 + 0.7 * F.one_hot((x[:, 0, 0, 0] * 2.55 - 0.2).round().long())
    tree.log_likelihood = lambda x, n_samples: n_samples * x[:, 0, 0, 0]
    tree.nodes[0].router_q.forward = lambda d: torch.full((len(d),), -999.0)     # to leaf 2
    tree.nodes[1].router_p.forward = lambda z: torch.full((len(z),), 99.0)       # not to leaf 4
    data = train.Data(x, LABELS, x, LABELS, range(16))
    return train.Run(folder, config, torch.device("cpu"), data, tree, "networks", Diffusion(25))


@pytest.fixture
def known(monkeypatch):
    """measure(run, *flags) -> metrics.json of a run; what is drawn, and how."""
    drawn, figures = [], []
    def draw_images(run, path, steps, eta):
        both = torch.rand(2, len(path.z), 1, 28, 28)
        drawn.append(((steps, eta), path.nodes.amax(1), both))
        return both[0], both[1] if run.networks else None
    classifier = nn.Sequential(nn.AvgPool2d(7), nn.Flatten(), nn.Identity())     # the brightest
    monkeypatch.setattr(metrics, "load_classifier", lambda run: classifier)
    monkeypatch.setattr(sample, "PIXELS", 7 * 784)
    monkeypatch.setattr(train, "conditioned", lambda *given: (lambda xt, t, y: 0 * xt, given))
    monkeypatch.setattr(sample, "draw_images", draw_images)
    monkeypatch.setattr(sample, "draw_leaf_classes", lambda *given: figures.append(given))
    def measure(run, *flags):
        monkeypatch.setattr(train, "load_run", lambda folder, device: run)
        metrics.main(2 * [str(run.folder)] + ["--device", "cpu", *flags])    # of the two, one
        return json.loads((run.folder / "metrics.json").read_text())
    return SimpleNamespace(measure=measure, drawn=drawn, figures=figures)


def test_all_numbers_of_a_known_run(known, tmp_path):
    run = make_run(tmp_path, seed=5)
    run.tree.nodes[0].router_q.forward = lambda d: torch.zeros(len(d))
    found = known.measure(run, "--images=20", "--steps=3", "--ll-samples=4")
    leaf, labels, images = np.array([3, 4, 2])[LEAF], LABELS.numpy(), run.data.test_images / 255
    assert found == found | dict(images=20, steps=3, settings=vars(run.config),
        leaf_sizes={"3": 9, "4": 9, "2": 12}, leaf_purity=approx(0.9), accuracy=approx(0.9),
        leaf_entropy_test_images=approx(math.log(3) / 3 - math.log(4) / 9))   # 6 : 3; two are pure
    assert found["dendrogram_purity"] == metrics.dendrogram_purity([-1, 0, 0, 1, 1], leaf, labels)
    assert found["NMI"] == approx(metrics.normalized_mutual_info(leaf, labels))
    for name, term in run.tree.elbo(images).items():
        assert found[name] == approx(term.mean().item(), rel=0.1)
    assert found["kl_nodes"] == approx(found["kl_depth_1"] + found["kl_depth_2"])
    assert found["log_likelihood"] == approx(4 * images[:, 0, 0, 0].mean())
    assert found["denoising_loss"] == metrics.denoising_loss(run, 20, 0)
    features = metrics.load_classifier(run)[:-1]
    test = metrics.moments(features(images).numpy())             # of all 30
    for k, what in enumerate(("reconstructions", "new_images")):           # by turns, in batches
        how, leaves, drawn = zip(*known.drawn[k::2])
        leaves = torch.cat(leaves).tolist()
        assert set(how) == {(3, 0.0)} and len(leaves) == 20
        assert k or leaves == [3] * 9 + [4] * 9 + [2] * 2        # the most probable ones
        for name, x in zip(("TreeVAE", "diffusion"), torch.cat(drawn, 1)):
            x = features((x * 255).round() / 255).numpy()        # 8 bits
            fd = metrics.frechet_distance(*metrics.moments(x), *test)
            assert found[f"FD_{what}_{name}"] == approx(fd)
            if k == 1:
                counts, _, _ = np.histogram2d(leaves, x.argmax(1), (range(6), range(17)))
                assert known.figures[0][1][name].tolist() == counts[[3, 4, 2]].tolist()
                entropies = metrics.entropy(counts[[3, 2]])      # leaf 4 has none
                assert found[f"leaf_entropy_{name}"] == approx(entropies.mean())
    assert known.figures[0][::2] == (run, tmp_path / "leaf_classes.png")


def test_denoising_loss_takes_t_of_every_part_and_the_same_noise_for_each_run(known, tmp_path):
    run, asked = make_run(tmp_path), []          # asked: x0, y, t, eps
    x = 2 * (run.data.test_images[:20] / 255) - 1
    run.diffusion.loss = lambda net, x0, y, t, eps: (
        asked.append((x0, y, t, eps)) or (x0 + eps).mean() + t.float().mean())
    found, again, other = [metrics.denoising_loss(run, 20, seed) for seed in (3, 3, 4)]
    assert found == again != other and len(asked) == 90 and max(of[2].max() for of in asked) == 24
    for k, (x0, y, t, eps) in enumerate(asked[:30]):             # batches of 7, 7, 6; 10 parts
        assert y[:4] == (run.config, run.diffusion, "networks", run.tree)
        assert torch.allclose(x0, x.split(7)[k // 10]) and (y[4].nodes[:, 1] == 2).all()  # sampled
        assert k % 10 * 2.5 // 1 <= t.min() and t.max() < (k % 10 + 1) * 2.5       # T = 25
        assert eps.shape == x0.shape and abs(eps.std() - 1) < 0.05 and t.shape == (len(x0),)
    t, eps = [torch.cat([of[k] for of in asked[:30]]).float().mean().item() for k in (2, 3)]
    assert found == approx(x.mean().item() + t + eps, rel=1e-5)


def test_seeds_of_one_method_are_mean_and_std_in_one_column():
    one = {"run": "a", "method": "TreeDiffusion", "settings": dict(seed=1, out="a", dropout=0.1),
           "images": 9, "leaf_purity": 0.7, "FD": 3.25}
    settings = dict(seed=2, out="x", device="cpu", tree="y", data_root="z", dropout=0.1)
    seeds = [one, one | {"leaf_purity": 0.8, "settings": settings}, one | {"leaf_purity": 0.9}]
    tree = {"run": "c", "method": "TreeVAE", "settings": settings, "leaf_purity": 0.6}
    found = metrics.table([*seeds, one | {"run": "b", "settings": dict(dropout=0.2)}, tree])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in found.split("\n")]
    assert rows[:1] + rows[2:] == [
        ["run", "mean ± std (3 seeds)", "b", "c"], ["method", *["TreeDiffusion"] * 2, "TreeVAE"],
        ["leaf purity", "0.8 ± 0.1", "0.7", "0.6"], ["FD", "3.25 ± 0", "3.25", "nan"]]


def test_images_and_networks_there_are_not(known, tmp_path, monkeypatch, capsys):
    run, asked = make_run(tmp_path, quick=True, with_reconstruction=True), []
    images, labels = run.data.images.repeat(70, 1, 1, 1), LABELS.repeat(70)
    run = run._replace(data=run.data._replace(test_images=images, test_labels=labels))
    inception = {"FID": metrics.load_classifier(run)[:-1]}
    monkeypatch.setattr(sample, "PIXELS", 300 * 784)
    monkeypatch.setattr(metrics, "denoising_loss", lambda run, n, seed: float(n))
    monkeypatch.setattr(metrics, "load_inception", lambda where: asked.append(where) or inception)
    without = known.measure(run)
    assert (without["images"], without["steps"], asked) == (200, 15, [])   # no FID on a CPU
    found = known.measure(run, "--inception-weights", "here.pth")
    fid = {k: v for k, v in found.items() if k.startswith("FID")}
    assert len(fid) == 4 and all(v == without[k.replace("FID", "FD")] for k, v in fid.items())
    vars(run.config).update(quick=False, condition="none")
    found = known.measure(run._replace(data=run.data._replace(classes=[])))
    assert (found["images"], found["denoising_loss"], asked) == (2100, 2000, ["here.pth"])
    assert not [k for k in found if k.startswith(("FD", "leaf_p", "leaf_e"))] and "elbo" in found
    tree = known.measure(run._replace(networks=None))
    assert [run["method"] for run in (without, found, tree)] == [
        "path + reconstruction", "none + reconstruction", "TreeVAE"]
    assert "FD_new_images_TreeVAE" in tree and not [k for k in tree if "diffusion" in k]
    for flag in ("--images=1", "--steps=-1", "--ll-samples=-1", "--seed=-1"):
        with pytest.raises(SystemExit, match="2"):
            metrics.main(["nowhere", flag])
        assert flag.split("=")[0] in capsys.readouterr().err
