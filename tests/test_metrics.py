"""The numbers against brute force, closed forms and values worked by hand; and what becomes of a run's numbers."""

import dataclasses
import itertools
import json
import math
import socket
import urllib.error

import numpy as np
import pytest
import torch
import torchvision

import metrics
import sample
import train


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


def test_entropy_of_one_class_of_none_and_by_hand():
    assert metrics.entropy([0, 7, 0]) == 0
    assert math.isnan(metrics.entropy([0, 0, 0]))
    assert metrics.entropy([3, 1]) == pytest.approx(math.log(4) - 0.75 * math.log(3))
    assert metrics.entropy([[2, 2, 2, 2], [5, 5, 0, 0]]) == pytest.approx([math.log(4), math.log(2)])


def test_leaf_histograms_keep_empty_leaves_and_classes():
    found = metrics.leaf_histograms([3, 5, 4], np.array([4, 3, 4, 4]), np.array([0, 2, 2, 0]), 4)
    assert found.tolist() == [[0, 0, 1, 0], [0, 0, 0, 0], [2, 0, 1, 0]]
    assert np.nanmean(metrics.entropy(found)) == pytest.approx((0 + math.log(3) - 2 / 3 * math.log(2)) / 2)


def test_clusters_of_an_earlier_tree():
    """1 and 2 under the root, then 3 and 4 under 1, then 5 and 6 under 4, of which 6 was pruned."""
    parents, leaf = [-1, 0, 0, 1, 1, 4, -2], np.array([2, 5, 3, 5])
    assert metrics.collapse(parents, leaf, [1, 2]).tolist() == [2, 1, 1, 1]
    assert metrics.collapse(parents, leaf, [3, 4, 2]).tolist() == [2, 4, 3, 4]
    assert metrics.collapse(parents, leaf, [3, 5, 6, 2]).tolist() == metrics.collapse(parents, leaf, [3, 5, 2]).tolist() == leaf.tolist()


# -- Frechet distance -------------------------------------------------------------------------------------------------

def covariance(rng, d, rank=None):
    a = rng.normal(size=(d, rank or d))
    return a @ a.T


def test_frechet_distance_of_gaussians_that_commute():
    """On the line (m - n)^2 + (s - t)^2; with common eigenvectors the sum of that over them."""
    assert metrics.frechet_distance([1.0], [[4.0]], [3.0], [[9.0]]) == pytest.approx(2 ** 2 + (2 - 3) ** 2)
    rng = np.random.default_rng(0)
    axes, s, t, m, n = np.linalg.qr(rng.normal(size=(6, 6)))[0], *rng.uniform(0, 3, (4, 6))
    found = metrics.frechet_distance(axes @ m, axes * s ** 2 @ axes.T, axes @ n, axes * t ** 2 @ axes.T)
    assert found == pytest.approx(((m - n) ** 2 + (s - t) ** 2).sum())


@pytest.mark.parametrize("seed", range(4))
def test_frechet_distance_of_gaussians_that_do_not_commute(seed):
    """The eigenvalues a, b of the 2 x 2 product have a + b = tr and a b = det: (sqrt a + sqrt b)^2 = tr + 2 sqrt det."""
    rng = np.random.default_rng(seed)
    one, two, m, n = covariance(rng, 2), covariance(rng, 2), *rng.normal(size=(2, 2))
    root = math.sqrt(np.trace(one @ two) + 2 * math.sqrt(np.linalg.det(one @ two)))
    expected = ((m - n) ** 2).sum() + np.trace(one) + np.trace(two) - 2 * root
    assert metrics.frechet_distance(m, one, n, two) == pytest.approx(expected) == metrics.frechet_distance(n, two, m, one)
    one, two = covariance(rng, 7), covariance(rng, 7)
    root = np.sqrt(np.linalg.eigvals(one @ two).real).sum()
    assert metrics.frechet_distance(np.zeros(7), one, np.zeros(7), two) == pytest.approx(np.trace(one) + np.trace(two) - 2 * root)


def test_frechet_distance_with_singular_covariances():
    """C = a a^T and b b^T: the root's trace is |a b|. And a point: what is left is the mean's distance and the other's trace."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 50))
    found = metrics.frechet_distance(np.zeros(50), np.outer(a, a), np.zeros(50), np.outer(b, b))
    assert found == pytest.approx(a @ a + b @ b - 2 * abs(a @ b), abs=1e-6)
    assert metrics.frechet_distance(a, np.zeros((50, 50)), b, np.outer(b, b)) == pytest.approx((a - b) @ (a - b) + b @ b)


@pytest.mark.parametrize("d, rank", [(1, 1), (30, 30), (200, 200), (200, 3), (200, 120)])
def test_frechet_distance_of_equals_is_zero(d, rank):
    rng = np.random.default_rng(d + rank)
    cov, mu = 10 * covariance(rng, d, rank), 100 * rng.normal(size=d)
    assert metrics.frechet_distance(mu, cov, mu, cov) == pytest.approx(0, abs=1e-6)
    assert metrics.frechet_distance(mu, np.zeros((d, d)), mu, np.zeros((d, d))) == 0


def test_moments_in_batches_are_those_of_numpy():
    x = np.random.default_rng(0).normal(size=(200, 5)) @ np.random.default_rng(1).normal(size=(5, 5)) + 1e7
    moments = metrics.Moments()
    for part in np.split(x, [1, 2, 50, 153]):
        moments.add(part)
    assert moments.n == 200 and moments.mean == pytest.approx(x.mean(0), rel=1e-14)
    assert moments.cov == pytest.approx(np.cov(x.T), rel=1e-6)
    moments = metrics.Moments()
    moments.add(torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16).float())
    assert moments.mean.dtype == np.float64 and moments.cov.tolist() == [[0, 0], [0, 0]]


# -- the FID network --------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def inception():
    torch.manual_seed(0)
    network = metrics.InceptionFeatures()
    for name, buffer in network.named_buffers():                               # or random weights would die out on the way
        if name.endswith("running_var"):
            buffer.fill_(0.1)
    return network


def test_inception_has_the_keys_and_shapes_of_the_public_file(inception):
    """Its 94 convolutions with batch norm and its 1008 classes, under the names of torchvision's network without AuxLogits."""
    found = {name: tuple(t.shape) for name, t in inception.state_dict().items()}
    peer = torchvision.models.inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    assert found == {name: tuple(t.shape) for name, t in peer.state_dict().items()} and len(found) == 94 * 6 + 2
    assert found["fc.weight"] == (1008, 2048) and found["fc.bias"] == (1008,)
    assert found["Conv2d_1a_3x3.conv.weight"] == (32, 3, 3, 3) and found["Mixed_5b.branch_pool.conv.weight"] == (32, 192, 1, 1)
    assert found["Mixed_6b.branch7x7_2.conv.weight"] == (128, 128, 1, 7) and found["Mixed_7c.branch_pool.bn.running_var"] == (192,)


@pytest.mark.parametrize("name, channels", [("Mixed_5c", 256), ("Mixed_6e", 768), ("Mixed_7b", 1280), ("Mixed_7c", 2048)])
def test_inception_pools_as_the_fid_network(inception, name, channels):
    x, block = torch.rand(1, channels, 5, 5), getattr(inception, name)
    around = [[x[:, :, max(0, r - 1):r + 2, max(0, c - 1):c + 2].flatten(2) for c in range(5)] for r in range(5)]
    pooled = torch.stack([torch.stack([part.amax(2) if name == "Mixed_7c" else part.mean(2) for part in row], 2) for row in around], 2)
    expected = block.branch_pool(pooled)
    found, plain = block(x), block.forward(x)                                  # forward alone knows nothing of the hook
    assert torch.allclose(found[:, -expected.shape[1]:], expected, atol=1e-5)
    assert torch.equal(found[:, :-expected.shape[1]], plain[:, :-expected.shape[1]]) and not torch.allclose(found, plain, atol=1e-3)


def test_inception_features_are_the_pooled_last_block(inception):
    seen = []
    first = inception.Conv2d_1a_3x3.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    last = inception.Mixed_7c.register_forward_hook(lambda layer, inputs, out: seen.append(out))
    x = torch.rand(2, 1, 28, 28)
    features = inception(x)
    first.remove(), last.remove()
    assert seen[0].shape == (2, 3, 299, 299) and -1 <= seen[0].min() < -0.9 and 0.9 < seen[0].max() <= 1
    assert torch.allclose(seen[0][:, :, 149, 149], 2 * x[:, :, 13:15, 13:15].mean((2, 3)).expand(2, 3) - 1, atol=0.1)
    assert features.shape == (2, 2048) and torch.allclose(features, seen[1].mean((2, 3)), atol=1e-5)
    assert torch.allclose(inception(x.repeat(1, 3, 1, 1)), features, atol=1e-5) and not inception.training


def test_inception_weights_from_a_file(inception, tmp_path, capsys):
    weights, file = inception.state_dict(), tmp_path / "weights.pth"
    torch.save(weights, file)
    assert all(torch.equal(a, b) for a, b in zip(metrics.load_inception(str(file)).state_dict().values(), weights.values()))
    torch.save({name: t for name, t in weights.items() if not name.endswith("tracked")}, tmp_path / "older.pth")
    assert metrics.load_inception(str(tmp_path / "older.pth")) is not None
    (tmp_path / "truncated.pth").write_bytes(file.read_bytes()[:100000])
    (tmp_path / "text.pth").write_text("<html>404</html>")
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "foreign.pth")
    torch.save([1], tmp_path / "list.pth")
    for name in ("missing", "truncated", "text", "foreign", "list"):
        with pytest.raises(SystemExit) as end:
            metrics.load_inception(str(tmp_path / f"{name}.pth"))
        said = capsys.readouterr().err
        assert end.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1 and f"{name}.pth" in said and "http" in said


def test_without_a_network_there_is_a_sentence_and_no_fid(tmp_path, monkeypatch, capsys):
    def no_network(url, file, **kwargs):
        assert url == metrics.WEIGHTS_URL and socket.getdefaulttimeout() <= 10
        raise urllib.error.URLError("no route to host")
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    metrics.load_inception.cache_clear()
    assert metrics.load_inception("download") is None and socket.getdefaulttimeout() is None
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "no FID, only FD (classifier)" in said and "no route to host" in said
    assert metrics.load_inception("download") is None and not capsys.readouterr().out          # asked once


# -- a run ------------------------------------------------------------------------------------------------------------

def make_run(folder, data, seed=1, **settings):
    """A folder as train.py leaves it, with random weights."""
    folder.mkdir()
    torch.manual_seed(seed)
    config = train.Config(preset="tiny", out=str(folder), bottom_up_channels=16, tree_width=4, unet_channels=8, unet_multipliers="1,2", **settings)
    tree = train.build_tree(config, tuple(data.images.shape[1:]), [-1, 0, 0, 1, 1]).eval()
    frames = [dict(parents=[-1, 0, 0], leaves=[1, 2]), dict(parents=tree.parents, leaves=tree.leaves)]
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    torch.save({"parents": tree.parents, "state_dict": tree.state_dict()}, folder / "tree.pt")
    torch.save(train.build_denoiser(config, tree).state_dict(), folder / "diffusion.pt")
    torch.save({"frames": frames}, folder / "checkpoint.pt")
    return folder


@pytest.fixture
def data(monkeypatch):
    """shapes, but less of them, and a classifier of one epoch."""
    data = train.Data(*train.draw_shapes(600, 0), *train.draw_shapes(120, 1), train.SHAPES)
    monkeypatch.setattr(train, "load_data", lambda config: data)
    monkeypatch.setitem(metrics.RECIPES, "small", (1, 3e-3))
    monkeypatch.setitem(metrics.RECIPES, "resnet50", (1, 1e-3))
    return data


FLAGS = ["--device", "cpu", "--images", "70", "--steps", "2"]


def numbers_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_all_numbers_of_a_run(tmp_path, data, capsys):
    folder = make_run(tmp_path / "a", data)
    metrics.main([str(folder), *FLAGS, "--ll-samples", "2", "--images", "150"])                   # more than the 120 test images
    found, said = numbers_of(folder), capsys.readouterr().out
    assert found["elbo"] == pytest.approx(found["reconstruction"] - found["kl_root"] - found["kl_nodes"] - found["kl_decisions"], abs=0.01)
    assert found["elbo, bits a dimension"] == pytest.approx(-found["elbo"] / math.log(2) / 784)
    for who in ("TreeVAE", "diffusion"):
        assert sum(map(sum, found["predicted"][who])) == 150 and 0 <= found[f"leaf entropy by {who}"] <= math.log(8)
        for what in ("reconstructions", "new images"):
            assert found[f"FD (classifier) of {what} by {who}"] > 0
    assert "no FID" in said and not any(name.startswith("FID") for name in found)
    assert "| dendrogram purity" in said and "| log likelihood, nats" in said and "| classifier accuracy" in said
    assert [row[0] for row in found["growth"]] == [2, 3] and found["growth"][1][1] == pytest.approx(found["dendrogram_purity"])
    assert all((folder / name).stat().st_size > 5000 for name in ("leaf_classes.png", "growth_scores.png"))
    assert {path.name for path in tmp_path.iterdir()} == {"a", "classifier-shapes-small.pt"}


def test_denoising_loss_by_time(tmp_path, data, monkeypatch):
    painter, asked = sample.Painter(make_run(tmp_path / "a", data, timesteps=25), "cpu", 2, 0.0), []
    def zero(x, t, y):
        asked.append(t)
        return torch.zeros_like(x)
    monkeypatch.setattr(train, "conditioned", lambda *args: (zero, None))
    found = metrics.denoising_loss(painter, data.test_images)
    names = ["denoising loss, all t"] + [f"denoising loss, t in {5 * b // 2}..{(5 * (b + 1) + 1) // 2 - 1}" for b in range(10)]
    assert list(found) == names and found[names[0]] == pytest.approx(sum(found[name] for name in names[1:]) / 10)
    assert all(value == pytest.approx(1, abs=0.02) for value in found.values())                  # E eps^2
    assert [(t.min().item(), t.max().item()) for t in asked] == [(5 * b // 2, (5 * (b + 1) + 1) // 2 - 1) for b in range(10)]
    other = [loss for name, loss in metrics.denoising_loss(painter, data.test_images, seed=1).items()]
    assert metrics.denoising_loss(painter, data.test_images) == found and other != list(found.values())


def test_what_is_known_is_used_again_until_something_changes(tmp_path, data, monkeypatch):
    folder, titles = make_run(tmp_path / "a", data), []
    watch = train.Run.watch
    monkeypatch.setattr(train.Run, "watch", lambda run, title, items: titles.append(title.split()[0]) or watch(run, title, items))
    def parts(*more):
        titles.clear()
        metrics.main([str(folder), *FLAGS, *more])
        return list(titles)
    images = ["test", "reconstructions", "new"]
    assert parts() == ["ELBO", "classifier", *images] and parts() == []
    first = numbers_of(folder)
    assert parts("--ll-samples", "2") == ["log"] and parts() == [] and numbers_of(folder).items() >= first.items()
    assert "denoising loss, t in 900..999" in first
    assert parts("--seed", "3") == ["ELBO", *images] and numbers_of(folder)["elbo"] != first["elbo"]
    assert parts() == ["ELBO", *images] and numbers_of(folder) == first
    make_run(tmp_path / "b", data, seed=2)
    (tmp_path / "b" / "tree.pt").replace(folder / "tree.pt")                   # trained again
    assert parts() == ["ELBO", *images]
    (folder / "metrics.json").write_text("[1]")
    assert parts() == ["ELBO", *images]


def test_a_killed_run_keeps_what_it_has(tmp_path, data, monkeypatch):
    folder = make_run(tmp_path / "a", data)
    def killed(*args):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(sample, "draw_leaf_classes", killed)
        with pytest.raises(KeyboardInterrupt):
            metrics.main([str(folder), *FLAGS])
    kept = numbers_of(folder)
    assert "elbo" in kept and "FD (classifier) of reconstructions by diffusion" in kept and "leaf entropy by TreeVAE" not in kept
    metrics.main([str(folder), *FLAGS])
    assert numbers_of(folder).items() > kept.items()


def test_runs_side_by_side(tmp_path, data, capsys):
    runs = [make_run(tmp_path / "a", data), make_run(tmp_path / "b", data, condition="none", with_reconstruction=True),
            make_run(tmp_path / "c", data, condition="leaf-index")]
    (runs[2] / "diffusion.pt").unlink()                                        # stage 1 only
    metrics.main([*map(str, runs), *FLAGS])
    text = (tmp_path / "table3.md").read_text()
    rows = {row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:-1]] for row in text.splitlines()}
    assert len({len(row) for row in text.splitlines()}) == 1 and text in capsys.readouterr().out and (tmp_path / "table3.png").exists()
    assert rows["method"] == ["TreeDiffusion", "TreeVAE + Diffusion", "TreeVAE"] and rows["images, DDIM steps"] == ["70, 2"] * 3
    row = rows["FD (classifier) of new images by diffusion"]
    assert row[2] == "-" and row[0] == f"{numbers_of(runs[0])['FD (classifier) of new images by diffusion']:.3f}"


def test_data_without_labels_skips_what_needs_them(tmp_path, data, monkeypatch, capsys):
    folder = make_run(tmp_path / "a", data)
    monkeypatch.setattr(train, "load_data", lambda config: data._replace(classes=[], labels=None, test_labels=None))
    metrics.main([str(folder), *FLAGS])
    found = numbers_of(folder)
    assert "elbo" in found and "dendrogram_purity" not in found and "no labels" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"a"}


@pytest.mark.parametrize("kind, n, colour, d", [("small", 129, False, 128), ("small", 129, True, 128), ("resnet50", 12, False, 2048)])
def test_a_classifier_is_trained_once(tmp_path, data, kind, n, colour, d, capsys):
    data = data._replace(images=train.draw_shapes(n, 0, colour)[0], labels=data.labels[:n])      # 129: no batch of one is left over
    run, file = train.Run(train.Config(), torch.device("cpu"), {"seconds": 0.0}), tmp_path / "classifier.pt"
    trunk, head = metrics.load_classifier(run, kind, data, file)
    x = data.images[:4].float() / 255
    assert trunk(x).shape == (4, d) and head(trunk(x)).shape == (4, 8)
    again, _ = metrics.load_classifier(run, kind, data, file)
    assert torch.equal(again(x), trunk(x)) and capsys.readouterr().out.count("classifier") == 1
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(SystemExit):
        metrics.load_classifier(run, kind, data, file)
    assert "delete it" in capsys.readouterr().err


@pytest.mark.parametrize("argv, words", [(["--images", "1"], "--images"), (["--steps", "0"], "--steps"), (["--ll-samples", "-1"], "--ll-samples")])
def test_wrong_flags_are_one_sentence(tmp_path, capsys, argv, words):
    with pytest.raises(SystemExit) as end:
        metrics.main([str(tmp_path), *argv])
    assert end.value.code == 2 and words in capsys.readouterr().err
