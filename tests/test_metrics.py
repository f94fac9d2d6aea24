"""Numbers against brute force, closed forms and values by hand; a run whose numbers are known."""

import dataclasses
import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import metrics
import sample
import train
from treevae import Path

approx = pytest.approx


def brute_force_purity(parents, leaf_of_image, labels):
    def path(i):
        return {i} | (path(parents[i]) if parents[i] >= 0 else set())
    shares = []
    for a, b in itertools.combinations(range(len(labels)), 2):
        if labels[a] == labels[b]:
            ancestor = max(path(leaf_of_image[a]) & path(leaf_of_image[b]))
            under = [labels[k] for k, leaf in enumerate(leaf_of_image) if ancestor in path(leaf)]
            shares.append(under.count(labels[a]) / len(under))
    return sum(shares) / len(shares)


def test_dendrogram_purity_is_the_mean_over_all_pairs():
    rng, parents, leaves = np.random.default_rng(0), [-1, 0, 0], [1, 2]
    for _ in range(7):                                 # ids in the order in which TreeVAE grows
        leaf, labels = rng.choice(leaves, 40), rng.integers(0, 4, 40)
        expected = brute_force_purity(parents, leaf.tolist(), labels.tolist())
        assert metrics.dendrogram_purity(parents, leaf, labels) == approx(expected)
        i = leaves.pop(rng.integers(len(leaves)))
        leaves += [len(parents), len(parents) + 1]
        parents += [i, i]
    pruned, labels = [-1, 0, 0, 2, 2, -2, 4], np.array([0, 0, 1, 1, 2])    # 6 is an only child
    found = metrics.dendrogram_purity(pruned, np.array([1, 3, 3, 6, 6]), labels)
    assert found == metrics.dendrogram_purity(pruned[:5], np.array([1, 3, 3, 4, 4]), labels)
    assert math.isnan(metrics.dendrogram_purity([-1, 0, 0], np.array([1, 2]), np.array([0, 1])))


@pytest.mark.parametrize("shape", [(1, 1), (3, 3), (3, 5), (5, 3), (1, 4), (6, 6)])
def test_accuracy_is_the_best_of_all_matchings(shape):
    rng = np.random.default_rng(sum(shape))
    for _ in range(10):
        clusters, labels = rng.integers(0, shape[0], 60), rng.integers(0, shape[1], 60)
        clusters[:shape[0]], labels[:shape[1]] = range(shape[0]), range(shape[1])
        counts = np.zeros(shape, int)
        np.add.at(counts, (clusters, labels), 1)
        assert (metrics.contingency(clusters * 7 + 1, labels) == counts).all()     # ids have gaps
        few = counts if shape[0] <= shape[1] else counts.T
        best = max(sum(few[i, j] for i, j in enumerate(p))
                   for p in itertools.permutations(range(few.shape[1]), len(few)))
        assert metrics.cluster_accuracy(clusters * 7 + 1, labels) == approx(best / 60)


def test_scores_by_hand():
    leaf, labels = np.array([1, 1, 1, 2, 2, 2]), np.array([0, 0, 1, 1, 1, 1])
    assert metrics.leaf_purity(leaf, labels) == approx(5 / 6)
    # I = 1/3 ln 2 + 1/6 ln(1/2) + 1/2 ln(3/2); H(leaf) = ln 2; H(class) = 1/3 ln 3 + 2/3 ln(3/2)
    information = math.log(2) / 3 - math.log(2) / 6 + math.log(1.5) / 2
    entropies = math.log(2) + math.log(3) / 3 + 2 * math.log(1.5) / 3
    assert metrics.normalized_mutual_info(leaf, labels) == approx(2 * information / entropies)
    assert metrics.normalized_mutual_info(np.zeros(6), np.zeros(6)) == 1
    found = metrics.entropy([[2, 2, 2, 2], [5, 5, 0, 0], [3, 1, 0, 0]])
    assert found == approx([math.log(4), math.log(2), math.log(4) - 0.75 * math.log(3)])


def test_frechet_distance_in_closed_form():
    """Common axes: the sum over them of (m - n)^2 + (s - t)^2. a a^T, b b^T: the root is |a b|."""
    assert metrics.frechet_distance([1.0], [[4.0]], [3.0], [[9.0]]) == approx(4 + 1)
    rng = np.random.default_rng(0)
    axes, (s, t, m, n) = np.linalg.qr(rng.normal(size=(6, 6)))[0], rng.uniform(0, 3, (4, 6))
    one, two = axes * s ** 2 @ axes.T, axes * t ** 2 @ axes.T
    found = metrics.frechet_distance(axes @ m, one, axes @ n, two)
    assert found == approx(((m - n) ** 2 + (s - t) ** 2).sum())
    a, b = rng.normal(size=(2, 50))                    # singular
    found = metrics.frechet_distance(a, np.outer(a, a), b, np.outer(b, b))
    assert found == approx((a - b) @ (a - b) + a @ a + b @ b - 2 * abs(a @ b), abs=1e-3)
    assert 0 <= metrics.frechet_distance(a, np.outer(a, a), a, np.outer(a, a)) < 1e-3
    x = rng.normal(size=(2, 7, 7))                     # no common axes: C1 C2's eigenvalues
    one, two = x[0] @ x[0].T, x[1] @ x[1].T
    root = np.sqrt(np.linalg.eigvals(one @ two).real).sum()
    found = metrics.frechet_distance(np.zeros(7), one, np.ones(7), two)
    assert found == approx(7 + np.trace(one) + np.trace(two) - 2 * root)
    x = 1000 + rng.normal(size=(200, 5)).astype(np.float32)      # moments are in float64
    mean, cov = metrics.moments(x)
    assert mean == approx(x.astype(np.float64).mean(0), rel=1e-14)
    assert cov == approx(np.cov(x.astype(np.float64).T), rel=1e-9)


@pytest.fixture(scope="module")
def weights():
    """Weights such as the public file's: torchvision's names and shapes, but 1008 classes."""
    torch.manual_seed(0)
    peer = torchvision.models.Inception3(1008, aux_logits=False, init_weights=False)
    return {name: torch.full_like(w, 0.1) if name.endswith("running_var") else w
            for name, w in peer.state_dict().items()}  # or the signal would die out on its way


def test_inception_pools_and_scales_as_the_fid_network(weights):
    network, seen = metrics.InceptionFeatures(weights), []
    for name, c in dict(Mixed_5c=256, Mixed_6e=768, Mixed_7b=1280, Mixed_7c=2048).items():
        x, block = torch.rand(1, c, 4, 4), getattr(network, name)
        around = [x[..., max(0, r - 1):r + 2, max(0, c - 1):c + 2].flatten(2)
                  for r in range(4) for c in range(4)]           # the padding is left out
        pooled = [part.amax(2) if name == "Mixed_7c" else part.mean(2) for part in around]
        expected = block.branch_pool(torch.stack(pooled, 2).view_as(x))
        plain = block.forward(x)[:, :-expected.shape[1]]         # forward: no hook
        assert torch.allclose(block(x), torch.cat([plain, expected], 1), atol=1e-5)
    network.Conv2d_1a_3x3.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    network.Mixed_7c.register_forward_hook(lambda _, inputs, out: seen.append(out))
    x = torch.rand(2, 1, 28, 28)
    features = network(x)
    assert torch.allclose(features, seen[1].mean((2, 3)), atol=1e-5) and not features.requires_grad
    centre = 2 * x[:, :, 13:15, 13:15].mean((2, 3)).expand(2, 3) - 1
    assert seen[0].shape == (2, 3, 299, 299) and seen[0].min() < -0.9 and seen[0].max() > 0.9
    assert torch.allclose(seen[0][..., 149, 149], centre, atol=0.1)


def test_inception_from_a_file_a_download_or_nowhere(weights, tmp_path, monkeypatch, capsys):
    torch.save(weights, tmp_path / "good.pth")
    network, first = metrics.load_inception(tmp_path / "good.pth"), "Conv2d_1a_3x3.conv.weight"
    assert torch.equal(network["FID"].state_dict()[first], weights[first])
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "foreign.pth")
    for name in ("foreign.pth", "missing.pth"):
        with pytest.raises(SystemExit) as end:
            metrics.load_inception(str(tmp_path / name))
        said = capsys.readouterr().err
        assert end.value.code == 2 and said.count("\n") == 1 and name in said

    def download(url, map_location, weights_only):
        assert url == metrics.URL and weights_only
        if network is None:
            raise OSError("no route to host")          # URLError is one
        return weights
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    assert metrics.load_inception("download")["FID"].training is False
    network = None
    assert metrics.load_inception("download") == {}
    assert capsys.readouterr().out.startswith("no FID, only FD: ")


@pytest.mark.parametrize("channels", [1, 3])
def test_the_classifier_is_trained_once_for_a_data_set(channels, tmp_path, monkeypatch):
    labels = torch.arange(1025) % 2                    # 8 * 128 + 1: no batch of a single image
    images = torch.randint(0, 60, (1025, channels, 8, 8)) + 120 * labels[:, None, None, None]
    data = train.Data(images.byte(), labels, images[:9], labels[:9], ["dark", "bright"])
    run = make_run(tmp_path / "a", SimpleNamespace(image_shape=(channels, 8, 8)), data,
                   dataset="my/set", max_images=1025)
    monkeypatch.setattr(metrics, "make_encoder", lambda *shape: nn.Sequential(
        nn.Flatten(), nn.Linear(64 * channels, 128), nn.BatchNorm1d(128), nn.ReLU()))
    random_view, seen = train.random_view, []
    monkeypatch.setattr(train, "random_view", lambda *of: seen.append(of) or random_view(*of))
    classifier, x = metrics.load_classifier(run), images.float() / 255
    assert (classifier(x).argmax(1) == labels).float().mean() > 0.95 and not classifier.training
    assert classifier[:-1](x).shape == (1025, 128) and len(seen) == (40 if channels == 3 else 0)
    assert (tmp_path / "classifier-my_set-1025.pt").exists()
    monkeypatch.setattr(torch.optim, "AdamW", None)    # a second training would fail
    assert torch.equal(metrics.load_classifier(run)(x), classifier(x))


LEAF = torch.tensor([0] * 9 + [1] * 9 + [2] * 12)      # the leaves' columns of 30 test images
LABELS = torch.tensor([0] * 6 + [1] * 12 + [2] * 12)
REACH = {1: 0.75, 2: 0.25, 3: 0.5, 4: 0.25}            # P(i; c), the same for all


class KnownTree:
    """Of 4 x 4 images whose first pixel is 20, 120 or 220, by leaf. z: 0 sampled, 1 best, 2 new."""
    parents, leaves, image_shape = [-1, 0, 0, 1, 1], [3, 4, 2], (1, 4, 4)
    depth = {0: 0, 1: 1, 2: 1, 3: 2, 4: 2}.get

    def leaf_probs(self, x):
        return 0.1 + 0.7 * nn.functional.one_hot((x[:, 0, 0, 0] * 2.55 - 0.2).round().long(), 3)

    def path(self, column, z):
        nodes = torch.tensor([[0, 1, 3], [0, 1, 4], [0, 2, -1]])[column]
        return Path(torch.full((len(column), 3, 1, 1, 1), z), nodes)

    def infer_path(self, x, leaf=None):
        assert leaf is None or leaf.tolist() == self.leaf_probs(x).argmax(1).tolist()
        sampled = torch.randint(0, 3, (len(x),))
        return self.path(sampled, 0.0) if leaf is None else self.path(leaf, 1.0)

    def sample_path(self, n):
        return self.path(torch.randint(0, 2, (n,)) * 2, 2.0)     # never to leaf 4

    def bottom_up_pass(self, x):
        return torch.rand(len(x)) + x.mean((1, 2, 3))

    def elbo(self, x):
        u = self.bottom_up_pass(x)
        kl_nodes = sum(p * (u + i) for i, p in REACH.items())
        return {"reconstruction": u, "kl_nodes": kl_nodes, "elbo": -3 * u, "kl_root": 2 * u}

    def walk(self, u):
        yield SimpleNamespace(node=0)
        for i, reach in REACH.items():
            q = SimpleNamespace(kl=lambda p, i=i: u + i if p == "p" else None)
            yield SimpleNamespace(node=i, q=q, p="p", log_reach_q=torch.tensor(reach).log())

    def log_likelihood(self, x, n_samples):
        return n_samples * x[:, 0, 0, 0]


def make_run(folder, model=None, data=None, stage_2=True, **settings):
    asked = []                                         # of the diffusion: (net, x0, y, t, eps)

    def loss(*given):
        asked.append(given)
        return given[1].mean() + given[3].float().mean()
    x = torch.randint(0, 256, (30, 1, 4, 4), generator=torch.manual_seed(1)).byte()
    x[:, 0, 0, 0] = 20 + 100 * LEAF
    data = data or train.Data(x, LABELS, x, LABELS, ["a", "b", "c"])
    config = train.Config(**{"dataset": "known", "out": str(folder)} | settings)
    return train.Run(folder, config, torch.device("cpu"), data, model or KnownTree(),
                     "networks" if stage_2 else None,
                     SimpleNamespace(timesteps=25, loss=loss, asked=asked), [])


@pytest.fixture
def known(monkeypatch, tmp_path):
    """measure(name, *flags, **settings) of a known run -> metrics.json; what is drawn, and how."""
    runs, drawn, called = {}, {}, []

    def draw_images(run, path, steps, eta):
        called.append((steps, eta))
        both = [torch.rand(len(path.z), 1, 4, 4), torch.rand(len(path.z), 1, 4, 4) / 2]
        for who in range(2):
            drawn.setdefault((int(path.z.max()), who), []).append((path.nodes.amax(1), both[who]))
        return both if run.networks else (both[0], None)
    head = nn.Linear(16, 3, bias=False)                # the class: the brightest of 3 pixels
    head.weight = nn.Parameter(torch.eye(3, 16), requires_grad=False)
    monkeypatch.setattr(metrics, "load_classifier", lambda run: nn.Sequential(nn.Flatten(), head))
    monkeypatch.setattr(train, "load_run", lambda folder, device, root: runs[str(folder)])
    monkeypatch.setattr(train, "rows_at_once", lambda shape: 7)
    monkeypatch.setattr(train, "conditioned", lambda *given: (given[4], given[:4]))
    monkeypatch.setattr(sample, "draw_images", draw_images)
    monkeypatch.setattr(sample, "draw_leaf_classes", lambda *given: called.append(given))

    def measure(name, *flags, **settings):
        (tmp_path / name).mkdir(exist_ok=True)
        runs[name] = settings.pop("run", None) or make_run(tmp_path / name, **settings)
        metrics.main([*runs, *flags])
        return json.loads((tmp_path / name / "metrics.json").read_text())
    return SimpleNamespace(measure=measure, runs=runs, drawn=drawn, called=called)


def test_all_numbers_of_a_known_run(known, tmp_path):
    found = known.measure("a", "--images", "20", "--steps", "3", "--ll-samples", "4", seed=5)
    run = known.runs["a"]
    x = run.data.test_images.flatten(1).numpy() / 255
    assert (found["method"], found["images"], found["steps"]) == ("TreeDiffusion", 20, 3)
    assert found["settings"] == dataclasses.asdict(run.config)
    # leaf 3: 6 a and 3 b; leaf 4: 9 b; leaf 2: 12 c. Pairs of b: 3 + 36 in a leaf, 27 at node 1
    purity = (15 * 6 / 9 + 3 * 3 / 9 + 36 + 27 * 12 / 18 + 66) / (15 + 3 + 36 + 27 + 66)
    assert found["leaf_sizes"] == {"3": 9, "4": 9, "2": 12}
    assert found["dendrogram_purity"] == approx(purity)
    assert found["leaf_purity"] == found["accuracy"] == approx(27 / 30)
    assert found["NMI"] == approx(metrics.normalized_mutual_info(LEAF.numpy(), LABELS.numpy()))
    u = found["reconstruction"]                        # in the walk, too: the depths add up
    assert u == approx(0.5 + x.mean(), abs=0.2)
    assert found["elbo"] == approx(-3 * u) and found["kl_root"] == approx(2 * u)
    assert found["kl_depth_1"] == approx(u + 0.75 * 1 + 0.25 * 2)
    assert found["kl_depth_2"] == approx(0.75 * u + 0.5 * 3 + 0.25 * 4)
    assert found["kl_depth_1"] + found["kl_depth_2"] == approx(found["kl_nodes"])
    assert found["log_likelihood"] == approx(4 * x[:, 0].mean())
    for (z, who), parts in known.drawn.items():        # 20 of each, in 8 bits, with all 30
        leaves, images = (torch.cat(part) for part in zip(*parts))
        images = np.round(images.flatten(1).numpy() * 255) / 255
        name, what = ("TreeVAE", "diffusion")[who], "new_images" if z == 2 else "reconstructions"
        fd = metrics.frechet_distance(images.mean(0), np.cov(images.T), x.mean(0), np.cov(x.T))
        assert len(images) == 20 and found[f"FD_{what}_{name}"] == approx(fd)
        if z == 2:
            counts = np.zeros((5, 3), int)
            np.add.at(counts, (leaves, images[:, :3].argmax(1)), 1)
            assert known.called[-1][1][name].tolist() == counts[[3, 4, 2]].tolist()
            entropies = metrics.entropy(counts[[3, 2]])          # leaf 4 has none
            assert found[f"leaf_entropy_{name}"] == approx(entropies.mean())
    assert len(known.drawn) == 4 and set(known.called[:-1]) == {(3, 0.0)}
    assert known.called[-1][0] is run and known.called[-1][2] == tmp_path / "a/leaf_classes.png"


def test_denoising_loss_takes_t_of_every_part_and_the_same_noise_for_each_run(known, tmp_path):
    run, other = make_run(tmp_path / "a"), make_run(tmp_path / "b", condition="none")
    found, x = metrics.denoising_loss(run, 20, 3), run.data.test_images[:20].float() / 255
    assert metrics.denoising_loss(other, 20, 3) == found != metrics.denoising_loss(other, 20, 4)
    assert len(run.diffusion.asked) == 3 * 10                # batches of 7, 7, 6; 10 parts
    for k, ((path, x0, y, t, eps), again) in enumerate(
            zip(run.diffusion.asked, other.diffusion.asked)):
        assert torch.allclose(x0, 2 * x.split(7)[k // 10] - 1)
        assert y == (run.config, run.diffusion, "networks", run.tree) and (path.z == 0).all()
        assert k % 10 * 2.5 // 1 <= t.min() and t.max() < (k % 10 + 1) * 2.5       # T = 25
        assert eps.shape == x0.shape and abs(eps.std() - 1) < 0.4 and t.shape == (len(x0),)
        assert torch.equal(t, again[3]) and torch.equal(eps, again[4])
        assert torch.equal(path.nodes, again[0].nodes)
    t = torch.cat([part[3] for part in run.diffusion.asked])
    assert found == approx((2 * x - 1).mean().item() + t.float().mean().item(), rel=1e-5)
    assert (t.min(), t.max()) == (0, 24)
    assert not torch.equal(run.diffusion.asked[0][4], run.diffusion.asked[10][4])


def test_seeds_of_one_method_are_mean_and_std_in_one_column(known, tmp_path, capsys):
    purer = make_run(tmp_path / "b", seed=2, out="x", device="cpu", tree="y")
    purer.data.test_images[:15, 0, 0, 0] = 220
    numbers = [known.measure("a"), known.measure("b", run=purer), known.measure("c", seed=3)]
    known.measure("d", latent_channels=3)
    known.measure("e", condition="leaf", with_reconstruction=True)
    known.measure("f", condition="none", with_reconstruction=True)
    capsys.readouterr()
    assert known.measure("g", "a", stage_2=False, max_images=50)["images"] == 30   # all there are
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.split("\n") if "|" in line]
    rows = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}
    assert rows["run"] == ["mean ± std (3 seeds)", *"defg"]
    assert rows["method"] == ["TreeDiffusion", "TreeDiffusion", "Diffusion (leaf + reconstruction)",
                              "TreeVAE + Diffusion", "TreeVAE"]
    values = [each["leaf_purity"] for each in numbers]
    std = math.sqrt(sum((v - sum(values) / 3) ** 2 for v in values) / 2)
    assert std > 0.05 and rows["leaf purity"][:2] == [f"{sum(values) / 3:.5g} ± {std:.2g}", "0.9"]
    assert rows["FD new images diffusion"][4] == rows["denoising loss"][4] == "nan"
    assert rows["FD new images TreeVAE"][4] != "nan" and "log likelihood" not in rows


def test_images_and_networks_there_are_not(known, tmp_path, monkeypatch):
    asked, many = [], make_run(tmp_path / "a")
    many = many._replace(data=many.data._replace(test_images=many.data.images.repeat(9, 1, 1, 1),
                                                 test_labels=LABELS.repeat(9)))
    monkeypatch.setattr(metrics, "load_inception", lambda where: asked.append(where) or {})
    without = known.measure("a", run=many)
    assert (without["images"], without["steps"], asked) == (270, 15, [])   # a CPU: not asked for
    quick = many._replace(config=dataclasses.replace(many.config, max_images=5))
    assert known.measure("a", run=quick)["images"] == 200
    assert known.measure("a", "--inception-weights", "download", run=many) == without
    monkeypatch.setattr(metrics, "load_inception", lambda where: {"FID": nn.Flatten()})
    found = known.measure("a", "--inception-weights", "here.pth", run=many)
    for name in ("reconstructions_TreeVAE", "new_images_diffusion"):
        assert found[f"FID_{name}"] == found[f"FD_{name}"] == without[f"FD_{name}"]
    monkeypatch.setattr(metrics, "load_classifier", None)
    found = known.measure("a", run=many._replace(data=many.data._replace(classes=[])))
    assert not [k for k in found if k.startswith(("FD", "leaf_p", "leaf_e"))] and "elbo" in found


@pytest.mark.parametrize("argv", [["--images", "1"], ["--steps", "-1"], ["--ll-samples", "-1"],
                                  ["--seed", "-1"], ["--images", "x"], ["--device", "abacus"]])
def test_wrong_flags_are_exit_code_2(monkeypatch, capsys, argv):
    monkeypatch.setattr(train, "load_run", lambda folder, device, root: train.pick_device(device))
    with pytest.raises(SystemExit) as end:
        metrics.main(["nowhere", *argv])
    assert end.value.code == 2 and argv[0] in capsys.readouterr().err
