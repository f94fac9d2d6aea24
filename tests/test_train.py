"""train.py: what each phase optimises, on which images, what it leaves alone, what is saved."""

import copy
import csv
import inspect
import json
import math
import pickle
import types
import urllib.error

import numpy as np
import pytest
import torch
import torchvision
from conftest import FLAGS, as_argv
from torch import nn
from torchvision.transforms import functional as TF

import train

LOSS = train.TreeVAE.loss
OFF = train.COLOUR | dict(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, brightness=0.0, jitter=1.1,
                          contrast=0.0, saturation=0.0, hue=0.0, grey=0.0)


def indices(x, images):
    """Which images x (B, C, H, W) in [0, 1] are, by their pixels."""
    known = {image.numpy().tobytes(): k for k, image in enumerate(images)}
    return [known[image.numpy().tobytes()] for image in (x * 255).round().byte()]


def flat(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def same(one, other):
    """Two state_dicts, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


class Spy:
    """Records a run: `phases` of stage 1 with their steps, `steps` of stage 2."""

    def __init__(self, patch, images):
        self.images, self.phases, self.steps, self.optimizers = images, [], [], []
        patch.setattr(train, "CHUNK", 4)
        for owner, name in ((torch.optim.Adam, "step"), (torch.optim.Adam, "__init__"),
                            (nn.utils, "clip_grad_norm_"), (train.TreeVAE, "loss"),
                            (train.F, "binary_cross_entropy_with_logits"), (train, "train_phase"),
                            (train.TreeVAE, "infer_path"), (train, "conditioned"),
                            (train.Diffusion, "loss")):
            patch.setattr(owner, name, self.around(getattr(self, f"on_{name.strip('_')}"
                          if owner is not train.Diffusion else "on_eq_30"), getattr(owner, name)))

    def around(self, seen, real):
        return lambda *args, **kwargs: seen(real, *args, **kwargs)

    def on_init(self, real, adam, *args, **kwargs):
        self.optimizers.append(adam)
        return real(adam, *args, **kwargs)

    def on_step(self, real, adam, *args):
        group, now = adam.param_groups[0], self.now
        now |= dict(lr=group["lr"], decay=group["weight_decay"], fresh=not adam.state,
                    trained={id(p) for p in group["params"]})
        if "cut" in now:
            now["cut"] = now["cut"].grad.item()
        if "networks" in now:
            now["norm"] = torch.stack([p.grad.norm() for p in group["params"]
                                       if p.grad is not None]).norm().item()
            now["before"] = flat(now["networks"])
        real(adam, *args)
        if "networks" in now:
            now["after"] = flat(now["networks"])

    def on_clip_grad_norm(self, real, parameters, norm):
        self.now["clip"] = norm
        return real(parameters, norm)

    def on_loss(self, real, tree, *args, **kwargs):
        bound = inspect.signature(LOSS).bind(tree, *args, **kwargs)
        bound.apply_defaults()
        self.now = dict(bound.arguments, modes={k for k, m in tree.named_modules() if m.training})
        self.now["rows"] = indices(self.now["x"], self.images)
        self.phases[-1]["steps"].append(self.now)
        return real(tree, *args, **kwargs)

    def on_binary_cross_entropy_with_logits(self, real, logit, target):
        cut = real(logit, target)
        cut.retain_grad()
        self.now |= dict(cut=cut, target=target)
        return cut

    def on_train_phase(self, real, config, state, tree, *args):
        before = copy.deepcopy(tree.state_dict())
        tree.eval()
        phase = dict(name=state["phase"], node=state["node"], rows=state["rows"], steps=[],
                     parents=list(tree.parents), leaves=tree.leaves, target=state["target"],
                     names={id(p): name for name, p in tree.named_parameters()},
                     probs=train.leaf_probs(tree, self.images))
        tree.train()
        self.phases.append(phase)
        real(config, state, tree, *args)
        after = tree.state_dict()
        phase["changed"] = {k for k in before if not torch.equal(before[k], after[k])}

    def on_infer_path(self, real, tree, x, leaf=None):
        self.chunk = dict(path=real(tree, x, leaf), rows=indices(x, self.images), seen=0,
                          drawn=leaf is None and not tree.training)
        return self.chunk["path"]

    def on_conditioned(self, real, config, diffusion, networks, tree, path):
        here = slice(self.chunk["seen"], self.chunk["seen"] + len(path.z))
        self.chunk["seen"] += len(path.z)
        mine = [part[here] for part in self.chunk["path"]]
        self.now = dict(networks=networks, training=networks.training, path=path,
                        mine=all(a.equal(b) for a, b in zip(mine, path)),
                        rows=self.chunk["rows"][here], drawn=self.chunk["drawn"],
                        tree=copy.deepcopy(tree.state_dict()))
        self.steps.append(self.now)
        return real(config, diffusion, networks, tree, path)

    def on_eq_30(self, real, diffusion, net, x0, y=None):
        loss = real(diffusion, net, x0, y)
        self.now |= dict(x0=x0, y=y, loss=loss.item())
        return loss


@pytest.fixture(scope="module")
def ran(data, tmp_path_factory):
    """A whole run and what was seen of it."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train.DATASETS, "known", train.DataSet(lambda config: data))
        spy = Spy(patch, data.images)
        train.main(as_argv(out=folder))
    spy.folder = folder
    spy.log = list(csv.DictReader((folder / "log.csv").read_text().splitlines()))
    spy.tree = torch.load(folder / "tree.pt", weights_only=True)
    return spy


# -- views ------------------------------

def always(monkeypatch, share):
    """Every draw is this far from the lower end of its range to the upper one."""
    monkeypatch.setattr(torch.Tensor, "uniform_",
                        lambda x, low, high: x.fill_(low + share * (high - low)))


def test_views_crop_and_flip():
    ramp = (torch.arange(32) + 0.5) / 32
    x = torch.stack([ramp.expand(32, 32), ramp[:, None].expand(32, 32), 0 * ramp.expand(32, 32)])
    x = x.expand(600, 3, 32, 32)
    assert torch.allclose(train.random_view(x, OFF), x, atol=1e-5)
    assert torch.allclose(train.random_view(x, OFF | dict(flip=1.0)), x.flip(3), atol=1e-5)
    view = train.random_view(x, OFF | dict(scale=(0.2, 0.6), ratio=(0.8, 1.25), flip=0.3))
    width = 32 * (view[:, 0, 16, 16] - view[:, 0, 16, 15])           # negative: mirrored
    height = 32 * (view[:, 1, 16, 16] - view[:, 1, 15, 16])
    area, ratio = width.abs() * height, width.abs() / height
    for value, low, high in ((area, 0.2, 0.6), (ratio, 0.8, 1.25)):
        assert low - 1e-3 < value.min() < low * 1.1 and high / 1.1 < value.max() < high + 1e-3
    assert abs(ratio.log().mean()) < 0.02 and 0.22 < (width < 0).float().mean() < 0.38
    for middle, extent in ((view[:, 0, :, 15:17].mean((1, 2)), width.abs()),
                           (view[:, 1, 15:17].mean((1, 2)), height)):
        place = (middle - 0.5) / (0.5 - extent / 2)                  # -1..1: inside the image
        assert place.abs().max() < 1 + 1e-3 and place.std() > 0.5 and abs(place.mean()) < 0.1
    wide = train.random_view(x, OFF | dict(ratio=(2.0, 2.0)))        # no wider than the image is
    assert torch.allclose(wide[:, 0, 16, 16] - wide[:, 0, 16, 15], torch.tensor(1 / 32), atol=1e-4)


def test_views_of_colours(monkeypatch):
    x = 0.2 + 0.5 * torch.rand(400, 3, 8, 8)
    some = x[:1].expand(400, -1, -1, -1)
    view = train.random_view(some, OFF | dict(brightness=0.3, jitter=0.8))
    factor = (view / some).mean((1, 2, 3))
    still = (factor - 1).abs() < 1e-4
    assert 0.13 < still.float().mean() < 0.27 and factor.std() > 0.1
    assert 0.7 - 1e-4 < factor.min() < 0.72 and 1.28 < factor.max() < 1.3 + 1e-4
    view = train.random_view(x, OFF | dict(grey=0.25))
    is_grey = (view - TF.rgb_to_grayscale(x)).abs().amax((1, 2, 3)) < 1e-4
    assert 0.17 < is_grey.float().mean() < 0.33
    assert torch.allclose(view[~is_grey], x[~is_grey], atol=1e-4)
    grey = x[:, :1].expand(-1, 3, -1, -1)
    view = train.random_view(grey, OFF | dict(hue=0.5, saturation=0.5))
    assert torch.allclose(view, grey, atol=1e-3)
    bright = train.random_view(grey[:, :1] + 0.4, train.GREY)
    assert bright.min() >= 0 and bright.max() == 1 and bright.shape == (400, 1, 8, 8)
    gamma = train.random_view(grey[:, :1], train.GREY | OFF | dict(gamma=0.5))
    power = (gamma.log() / grey[:, :1].log()).mean((1, 2, 3)).log()
    assert -0.5 < power.min() < -0.45 and 0.45 < power.max() < 0.5 and abs(power.mean()) < 0.05
    for share, sign in ((1.0, 1), (0.0, -1)):              # the ends of each range, by torchvision
        always(monkeypatch, share)
        for name in ("brightness", "contrast", "saturation"):
            theirs = getattr(TF, f"adjust_{name}")(x, 1 + sign * 0.3)
            mine = train.random_view(x, OFF | {name: 0.3})
            assert torch.allclose(mine, theirs, atol=1e-4), name
        mine = train.random_view(x, OFF | dict(hue=1 / 3))
        assert torch.allclose(mine, TF.adjust_hue(x, sign / 3), atol=1e-4)


# -- data sets ------------------------------

def test_shapes(monkeypatch):
    means = ([60.8, 56.9, 47.3, 68.1, 36.0, 42.3, 40.7, 64.1],
             [76.2, 70.5, 73.0, 82.7, 70.4, 69.7, 66.9, 74.3])
    stds = ([101.3, 96.8, 91.0, 103.2, 77.6, 82.8, 81.1, 93.7],
            [57.0, 59.2, 53.4, 57.4, 46.6, 52.2, 50.5, 55.7])
    for k, shape in enumerate([(1, 28, 28), (3, 32, 32)]):
        images, labels = train.draw_shapes(240, 5, k == 1)
        assert images.shape == (240, *shape) and images.dtype == torch.uint8
        assert labels.bincount(minlength=8).min() > 15     # balanced
        found = [images[labels == label].float() for label in range(8)]
        assert [x.mean().item() for x in found] == pytest.approx(means[k], abs=0.1)
        assert [x.std().item() for x in found] == pytest.approx(stds[k], abs=0.1)
    monkeypatch.setattr(train, "draw_shapes", lambda *args: args[:2])
    for name in ("shapes", "shapes-rgb"):
        n, seed, test_n, test_seed, classes = train.load_shapes(train.Config(dataset=name))
        assert (n, test_n) == (8000, 2000) and seed != test_seed
        assert classes[0] == "filled disc" and classes[7] == "outlined cross"


def write(folder, name, value, side=40, colour=False, high=None):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image = torch.full((3, high or side, side), value, dtype=torch.uint8)
    image[0] = 9 if colour else value
    torchvision.utils.save_image(image / 255, path)


def test_folders_of_images(tmp_path):
    for k in range(30):
        write(tmp_path / "a", f"{'owl' if k % 3 else 'emu'}/{k:02}.png", 5 * k, colour=True)
        write(tmp_path / "b", f"{k:02}.png", 5 * k, side=60, high=90)
        part = "test" if k >= 20 else "train"
        write(tmp_path / "c", f"{part}/{'owl' if k % 2 else 'emu'}/{k:02}.PNG", 5 * k, side=20)
    write(tmp_path / "a", ".hidden.png", 255)
    a, b, c = [train.load_data(train.Config(dataset=str(tmp_path / name))) for name in "abc"]
    assert a.images.shape == (27, 3, 32, 32)
    assert a.classes == ["emu", "owl"] == c.classes and b.classes == []
    for data, step in ((a, 3), (c, 2)):
        for images, labels in ((data.images, data.labels), (data.test_images, data.test_labels)):
            k = images[:, -1, 0, 0] // 5
            assert torch.equal(labels, (k % step > 0).long())
    assert b.images.shape == (27, 1, 64, 64) and c.images.shape == (20, 1, 28, 28)
    assert not b.labels.any() and not b.test_labels.any() and len(c.test_images) == 10
    for data in (a, b):                                    # a tenth is held out, always the same
        values = torch.cat([data.images, data.test_images])[:, -1, 0, 0] // 5
        assert len(data.test_images) == 3 and sorted(values.tolist()) == list(range(30))
    assert torch.equal(train.load_files(train.Config(dataset=str(tmp_path / "b"))).images, b.images)


def test_omniglot_and_celeba(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(train.datasets, "Omniglot", lambda *a, **k: asked.append((a[1], k)))
    monkeypatch.setattr(train.datasets, "CelebA", lambda *a, **k: asked.append((a[1], k)))
    for k, name in enumerate(["Bengali", "Braille", "Greek", "Glagolitic", "Oriya",
                              "Old_Church_Slavonic_(Cyrillic)"]):
        part = "images_background" if k < 3 else "images_evaluation"
        for n in range(4):
            write(tmp_path / "omniglot-py", f"{part}/{name}/character{n}/{n}.png", 40 * k, side=28)
    found = train.load_data(train.Config(dataset="omniglot", data_root=str(tmp_path)))
    assert found.classes == sorted(found.classes) and len(found.classes) == 5
    assert "Greek" not in found.classes and len(found.images) + len(found.test_images) == 20
    value = dict(zip(found.labels.tolist(), (found.images[:, 0, 0, 0] // 40).tolist()))
    assert [value[k] for k in range(5)] == [0, 1, 3, 5, 4]
    folder = tmp_path / "celeba" / "img_align_celeba"
    face = torch.zeros(3, 218, 178, dtype=torch.uint8)
    face[:, 35:183, 15:163] = 200                          # the middle 148 x 148
    folder.mkdir(parents=True)
    for k in range(10):
        torchvision.utils.save_image(face / 255, folder / f"{k}.jpg")
    found = train.load_data(train.Config(dataset="celeba", data_root=str(tmp_path)))
    assert found.images.shape == (9, 1, 64, 64) and found.images.min() > 180
    assert found.classes == [] and [a for a, _ in asked] == [True, False, "all"]
    assert all(k == dict(download=True) for _, k in asked)


@pytest.mark.parametrize("name, kind", [("mnist", "MNIST"), ("fashion", "FashionMNIST"),
                                        ("cifar10", "CIFAR10"), ("cifar100", "CIFAR100")])
def test_torchvisions_data_sets(name, kind, tmp_path, monkeypatch):
    def fake(root, train, download):
        n, shape = (6, 4)[not train], (28, 28) if "mnist" in kind.lower() else (32, 32, 3)
        images = torch.arange(n * math.prod(shape)).reshape(n, *shape).byte()
        images = images if len(shape) == 2 else images.numpy()
        assert download and root == str(tmp_path)
        labels = list(range(n))
        return types.SimpleNamespace(data=images, targets=labels if train else torch.tensor(labels),
                                     classes=["x"] * 10, base_folder="c")
    (tmp_path / "c").mkdir()
    for file, n in (("train", 6), ("test", 4)):
        (tmp_path / "c" / file).write_bytes(pickle.dumps(dict(coarse_labels=[2] * n)))
    (tmp_path / "c" / "meta").write_bytes(pickle.dumps(dict(coarse_label_names=list("pqr"))))
    monkeypatch.setattr(train.datasets, kind, fake)
    found = train.load_data(train.Config(dataset=name, data_root=str(tmp_path), max_images=5))
    grey = "cifar" not in name
    assert found.images.shape == ((5, 1, 28, 28) if grey else (5, 3, 32, 32))
    assert len(found.test_images) == 4 and found.images.is_contiguous()
    assert found.images[0, :, 0, 1].tolist() == ([1] if grey else [3, 4, 5])
    fine = name != "cifar100"
    assert found.labels.tolist() == (list(range(5)) if fine else [2] * 5)
    assert found.test_labels.tolist() == (list(range(4)) if fine else [2] * 4)
    assert found.classes == (["x"] * 10 if fine else list("pqr"))


# -- stage 1, phase by phase ------------------------------

class FakeTree(nn.Module):
    """One weight; remembers what `loss` was called with."""

    def __init__(self):
        super().__init__()
        self.weight, self.calls, self.leaves = nn.Parameter(torch.ones(1)), [], [1, 2]

    def train_only(self, node):
        self.node = node

    def loss(self, *args):
        self.calls.append(args)
        return self.weight.sum() * args[0].mean(), dict(elbo=self.weight.sum())


def fake_phase(monkeypatch, tmp_path, images, name="initial", **settings):
    """`train_phase` with a FakeTree. -> its calls of loss, [(x, kl_weight, node, view, weight)]"""
    config, tree, rates = train.Config(dataset="known", **settings), FakeTree(), []
    def step(self, *args, real=torch.optim.Adam.step):
        rates.append(self.param_groups[0]["lr"])
        real(self, *args)
    monkeypatch.setattr(torch.optim.Adam, "step", step)
    monkeypatch.setattr(train, "save_state", lambda *args, **kwargs: None)
    state = dict(phase=name, node=None, target=None, rows=None, optimizer=None, n_phases=0, done=0,
                 seconds=0.0, log=[])
    train.train_phase(config, state, tree, images, tmp_path)
    return tree.calls, rates, state


def test_step_decay_batches_and_plain_training(data, monkeypatch, tmp_path):
    calls, rates, state = fake_phase(
        monkeypatch, tmp_path, data.images[:50], initial_epochs=201, tree_lr_decay="step",
        contrastive=0.0, kl_start=0.5, kl_per_epoch=0.001)
    assert len(rates) == 3 * 201 and all(len(call[0]) == 16 for call in calls)
    assert rates == pytest.approx(300 * [1e-3] + 300 * [1e-4] + 3 * [1e-5])
    assert all(call[3] is None for call in calls) and calls[-1][1] == pytest.approx(0.7)
    assert indices(calls[0][0], data.images) and len(state["log"]) == 201


def test_augmented_elbo_and_the_views_of_a_data_set(data, monkeypatch, tmp_path):
    seen = []
    def random_view(x, how):
        seen.append(how)
        return x - len(seen)
    monkeypatch.setattr(train, "random_view", random_view)
    monkeypatch.setitem(train.DATASETS, "known", train.DataSet(None, views=dict(flip=0.25)))
    images = data.images[:16]
    for augmented, colour in ((True, False), (False, True)):
        seen.clear()
        x = images.expand(-1, 3, -1, -1) if colour else images
        calls, _, _ = fake_phase(monkeypatch, tmp_path, x, "finetune", finetune_epochs=1,
                                 augmented_elbo=augmented, contrastive=10.0, contrastive_later=0.3)
        (x, _, _, view, weight), = calls
        assert weight == pytest.approx(3.0) and (view - x).mean() == (1 if augmented else -1)
        assert seen[0] == (train.COLOUR if colour else train.GREY) | dict(flip=0.25)


def test_batch_size_follows_small_data():
    sizes = [train.batch_size_for(range(n), 256) for n in (16, 320, 640, 2048, 5120, 60000)]
    assert sizes == [16, 16, 32, 64, 256, 256] and train.batch_size_for(range(60000), 64) == 64


def shift(monkeypatch, parents, sizes, phase, n=1000, soft=1.0, **settings):
    """`next_phase` of a tree whose leaves are the most probable of `sizes` images -> state, tree"""
    config = train.Config(**dict(latent_channels=2, bottom_up_channels=8, cut=0.0) | settings)
    tree = train.build_tree(config, (1, 28, 28), parents)
    sizes = dict(zip(tree.leaves, sizes))

    def leaf_probs(tree, images):         # a pruned leaf's images go to the last one
        share = [sizes.get(leaf, 0) for leaf in tree.leaves]
        share[-1] += n - sum(share)
        hard = torch.eye(len(share)).repeat_interleave(torch.tensor(share), 0)
        return soft * hard + (1 - soft) / len(share)
    monkeypatch.setattr(train, "leaf_probs", leaf_probs)
    state = dict(phase=phase, n_phases=4, frames=[], done=3, optimizer=1, node=1, rows=1, target=1)
    train.next_phase(config, state, tree, torch.zeros(n, 1, 28, 28, dtype=torch.uint8))
    assert state["n_phases"] == 5 and state["done"] == 0 and state["optimizer"] is None
    return state, tree


TWO, FIVE = [-1, 0, 0], [-1, 0, 0, 1, 1, 2, 2, 3, 3]      # FIVE has been split three times


def test_growth(monkeypatch):
    state, tree = shift(monkeypatch, TWO, [300, 700], "initial")
    assert state["phase"] == "grow" and state["node"] == 2 and tree.parents == TWO + [2, 2]
    assert state["rows"].tolist() == list(range(300, 1000)) and state["target"] is None
    state, _ = shift(monkeypatch, FIVE, [200] * 5, "grow", intermediate_epochs=2)
    assert state["phase"] == "intermediate" and state["node"] is None and state["rows"] is None
    state, _ = shift(monkeypatch, FIVE, [200] * 5, "grow", intermediate_epochs=0)
    assert state["phase"] == "grow"
    state, _ = shift(monkeypatch, FIVE[:5], [300, 300, 400], "grow", intermediate_epochs=2)
    assert state["phase"] == "grow" and state["node"] == 2
    state, _ = shift(monkeypatch, FIVE, [200] * 5, "intermediate", intermediate_epochs=2)
    assert state["phase"] == "grow"
    for settings in (dict(max_leaves=5), dict(max_depth=2), dict(tree_batch_size=512)):
        parents, sizes = (FIVE[:7], [250] * 4) if "max_depth" in settings else (FIVE, [200] * 5)
        state, tree = shift(monkeypatch, parents, sizes, "grow", n=sum(sizes), **settings)
        # batches of 512 are 2^5 at 1,000 images: at least 20 an epoch
        assert state["phase"] == ("grow" if "tree_batch_size" in settings else "finetune")
    state, tree = shift(monkeypatch, FIVE, [200] * 5, "grow", finetune_epochs=0, max_leaves=4)
    assert state["phase"] == "diffusion" and len(tree.leaves) == 4     # too many for max_leaves
    state, _ = shift(monkeypatch, TWO, [990, 10], "initial", max_leaves=2)
    assert state["phase"] == "finetune" and state["note"] == "pruned: nothing"
    state, _ = shift(monkeypatch, TWO, [991, 9], "initial", max_leaves=2)     # 9: pruned anyway
    assert state["phase"] == "grow"
    state, tree = shift(monkeypatch, FIVE, [200] * 3 + [395, 5], "finetune")
    assert state["phase"] == "diffusion" and state["note"] == "pruned: 6" and len(tree.leaves) == 4
    assert [f["title"] for f in state["frames"]] == ["finetune: 5 leaves", "pruned: 4 leaves"]
    state, _ = shift(monkeypatch, FIVE, [996, 1, 1, 1, 1], "grow", max_leaves=2)
    assert state["phase"] == "finetune"                   # 2 x max_leaves at the most


def test_growth_along_the_cut(monkeypatch):
    monkeypatch.setattr(train, "cut_targets", lambda features: features[:, 0] * 0 + 0.5)
    guided = dict(cut=1.0, contrastive=1.0)
    state, tree = shift(monkeypatch, TWO, [300, 700], "initial", max_leaves=2, **guided)
    assert state["node"] == 0 and tree.parents == TWO and len(state["rows"]) == 1000
    assert state["target"].tolist() == [0.5] * 1000
    state, _ = shift(monkeypatch, TWO, [300, 700], "grow", max_leaves=3, **guided)
    assert state["node"] == 2 and len(state["target"]) == 700
    state, _ = shift(monkeypatch, TWO, [300, 700], "initial", cut=1.0, contrastive=0.0)
    assert state["node"] == 2 and state["target"] is None


# -- settings ------------------------------

def test_paper_is_appendix_d():
    columns = [train.choose_settings(dict(dataset=name, preset="paper"), False)
               for name in ("mnist", "cifar10", "celeba")]
    table = dict(
        encoder=["cnn", "resnet", "resnet"], decoder=["cnn", "resnet", "resnet"],
        max_depth=[7, 7, 7], max_leaves=[10, 10, 10], representation_dim=[4, 4, 4],
        latent_channels=[16, 64, 64], bottom_up_channels=[32, 128, 128],
        tree_batch_size=[256, 256, 128], grow_batch_size=[256, 256, 128],
        initial_epochs=[150] * 3, grow_epochs=[150] * 3, intermediate_epochs=[80, 0, 0],
        finetune_epochs=[200, 0, 0], contrastive=[0, 100, 100], contrastive_later=[None, 1, 1],
        augmented_elbo=[False, True, True], cut=[0, 0, 0], tree_lr_decay=["step"] * 3,
        kl_start=[0.5, 0.01, 0.01], kl_start_later=[0.5, 0.01, 0.01],
        kl_per_epoch=[0.001, 0.01, 0.01], unet_channels=[64, 128, 128], unet_blocks=[2, 2, 2],
        unet_attention=["16", "16,8", "16,8"], dropout=[0.3] * 3, diffusion_lr=[2e-4] * 3,
        unet_multipliers=["1,2,2,2", "1,2,2,2", "1,2,2,2,4"], diffusion_batch_size=[256, 256, 32],
        diffusion_lr_decay=["constant"] * 3, warmup_steps=[5000] * 3, ema_decay=[0.9999] * 3,
        diffusion_epochs=[1000, 1000, 500])
    for name, values in table.items():
        for config, value in zip(columns, values):
            assert value is None or getattr(config, name) == value, name


def test_the_other_presets():
    """What README's numbers were measured with; a name not listed is that of the preset tiny."""
    tiny = dict(
        latent_channels=8, bottom_up_channels=128, representation_dim=1, encoder="cnn",
        decoder="mlp", max_depth=6, max_leaves=10, initial_epochs=20, grow_epochs=5,
        intermediate_epochs=0, finetune_epochs=12, tree_batch_size=256, grow_batch_size=128,
        tree_lr_decay="cosine", kl_start=0.02, kl_start_later=0.1, kl_per_epoch=0.08,
        contrastive=100.0, contrastive_later=0.1, augmented_elbo=False, cut=30.0, condition="path",
        with_reconstruction=False, unet_channels=32, unet_multipliers="1,2,2", unet_blocks=1,
        unet_attention="", dropout=0.0, diffusion_epochs=3, diffusion_batch_size=32,
        diffusion_lr=1e-3, diffusion_lr_decay="cosine", warmup_steps=200, ema_decay=0.9999, seed=1,
        max_images=0, data_root="data", out="", tree="", device="auto")
    small = dict(unet_channels=64, dropout=0.1, diffusion_epochs=20, diffusion_batch_size=128,
                 warmup_steps=500)
    shapes = dict(max_leaves=8, initial_epochs=16, finetune_epochs=8, tree_batch_size=64,
                  grow_batch_size=64, kl_per_epoch=0.13, diffusion_epochs=8, unet_channels=16,
                  unet_multipliers="1,2,4")
    quick = dict(max_images=2048, max_leaves=5, initial_epochs=2, grow_epochs=2,
                 intermediate_epochs=1, finetune_epochs=2, tree_batch_size=64, grow_batch_size=32,
                 unet_channels=16, diffusion_epochs=1, warmup_steps=5)
    rgb = dict(tree_batch_size=128, kl_per_epoch=0.08)
    for dataset, preset, is_quick, changes in (
            ("fashion", "tiny", False, {}), ("fashion", "small", False, small),
            ("shapes", "tiny", False, shapes), ("shapes-rgb", "tiny", False, shapes | rgb),
            ("shapes", "tiny", True, shapes | quick),
            ("omniglot", "tiny", False, dict(max_leaves=5)),
            ("cifar100", "small", False, small | dict(max_leaves=20))):
        config = train.choose_settings(dict(dataset=dataset, preset=preset), is_quick)
        assert train.asdict(config) == tiny | changes | dict(dataset=dataset, preset=preset)
    assert train.COLOUR == dict(       # Appendix A's, and CelebA's
        scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3), flip=0.5, brightness=0.4, contrast=0.4,
        saturation=0.4, hue=0.1, jitter=0.8, grey=0.2, gamma=0.0)
    assert train.DATASETS["celeba"].views == dict(
        scale=(0.75, 1.0), ratio=(0.8, 1.25), brightness=0.2, contrast=0.2, saturation=0.2, hue=0.0,
        grey=0.0)
    assert train.GREY == dict(
        scale=(0.35, 1.0), ratio=(3 / 4, 4 / 3), flip=0.5, brightness=0.5, contrast=0.0,
        saturation=0.0, hue=0.0, jitter=1.0, grey=0.0, gamma=0.5)
    assert train.DATASETS["mnist"].views == dict(flip=0.0) == train.DATASETS["omniglot"].views


@pytest.mark.parametrize("preset", train.PRESETS)
@pytest.mark.parametrize("dataset", [*train.DATASETS, "a/folder"])
def test_kl_weight_ends_at_1(dataset, preset):
    for quick in (False, True):
        config = train.choose_settings(dict(dataset=dataset, preset=preset), quick)
        last = "finetune" if config.finetune_epochs else "grow"
        weight = train.kl_weight(config, last, getattr(config, f"{last}_epochs") - 1)
        assert weight == 1 and train.kl_weight(config, "initial", 0) == config.kl_start < 1


def test_what_is_typed_goes_first(monkeypatch):
    def choose(quick=False, gpu=False, **typed):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        return train.choose_settings(typed, quick)
    assert choose().preset == "tiny" == choose(gpu=True).preset
    assert choose(gpu=True, dataset="fashion").preset == "small"
    assert choose(max_leaves=3, quick=True).max_leaves == 3
    assert choose(quick=True).max_leaves == 5 and choose().max_leaves == 8
    assert choose(dataset="cifar100", preset="paper").max_leaves == 20


# -- stage 1, as it ran ------------------------------

def test_the_order_of_phases(ran):
    names = [phase["name"] for phase in ran.phases]
    # The root's second training, along the cut, is no split: the third split comes after it
    assert names[:6] == ["initial"] + 4 * ["grow"] + ["intermediate"]
    assert names[-1] == "finetune" and names.count("finetune") == 1
    assert [len(phase["leaves"]) for phase in ran.phases[:6]] == [2, 2, 3, 4, 5, 5]
    assert ran.phases[1]["node"] == 0 and ran.phases[1]["rows"].tolist() == list(range(240))
    assert len(ran.phases[-1]["leaves"]) <= 5


def test_every_weight_arrives_in_the_step(ran):
    starts = dict(initial=0.05, grow=0.15, intermediate=0.15, finetune=0.15)
    contrasts = dict(initial=50.0, intermediate=10.0, finetune=10.0)
    epochs = dict(initial=3, grow=3, intermediate=2, finetune=3)
    for phase in ran.phases:
        name, steps = phase["name"], phase["steps"]
        per_epoch = len(steps) // epochs[name]
        for k, step in enumerate(steps):
            epoch, done = k // per_epoch, k / len(steps)
            rate = 1 / 2 if name == "finetune" else 0.1
            assert step["kl_weight"] == pytest.approx(min(1, starts[name] + rate * epoch))
            assert step["lr"] == pytest.approx(1e-3 * 0.5 * (1 + math.cos(math.pi * done)))
            assert step["decay"] == 1e-5 and step["fresh"] == (k == 0)
            assert step["below"] == phase["node"]
            if name == "grow":
                assert step["view"] is None and step["visits"] is not None
                assert step["cut"] == pytest.approx(100 * max(0, 1 - 2 * done), rel=1e-5)
            else:
                assert step["contrastive_weight"] == pytest.approx(contrasts[name])
                assert step["view"].shape == step["x"].shape and "cut" not in step
    assert ran.phases[-1]["steps"][-1]["kl_weight"] == 1
    assert len({id(optimizer) for optimizer in ran.optimizers}) == len(ran.phases) + 1


def test_epochs_see_each_image_once_in_a_new_order(ran):
    for phase in ran.phases:
        mine = range(240) if phase["rows"] is None else phase["rows"].tolist()
        batch = min(16, len(mine))
        per_epoch = len(mine) // batch
        orders = []
        for k in range(0, len(phase["steps"]), per_epoch):
            order = sum([step["rows"] for step in phase["steps"][k:k + per_epoch]], [])
            assert len(order) == len(set(order)) == per_epoch * batch
            assert set(order) <= set(mine)
            orders.append(tuple(order))
        assert len(set(orders)) == len(orders) > 1 and orders[0] != tuple(sorted(orders[0]))


def test_a_split_sees_its_leaf_and_changes_nothing_else(ran):
    for phase in ran.phases[2:]:
        if phase["name"] == "grow":
            node, leaves = phase["node"], phase["leaves"]
            children = [i for i, parent in enumerate(phase["parents"]) if parent == node]
            columns = [leaves.index(child) for child in children]
            reach = phase["probs"][:, columns].sum(1)
            has = reach >= min(1 / (len(leaves) - 1), 0.5)
            near = (reach - min(1 / (len(leaves) - 1), 0.5)).abs() < 1e-5
            assert set(has.nonzero().flatten().tolist()) ^ set(phase["rows"].tolist()) \
                <= set(near.nonzero().flatten().tolist())
            prefixes = tuple(f"nodes.{i}." for i in children) \
                + (f"nodes.{node}.router_p", f"nodes.{node}.router_q")
            assert phase["changed"] and all(name.startswith(prefixes) for name in phase["changed"])
            for step in phase["steps"]:
                trained = {phase["names"][i] for i in step["trained"]}
                assert trained == {n for n in phase["names"].values() if n.startswith(prefixes)}
                outside = {m for m in step["modes"] if not (m + ".").startswith(prefixes)}
                assert not outside
            first = phase["steps"][0]     # the target of each image is its own
            places = [phase["rows"].tolist().index(row) for row in first["rows"]]
            assert torch.equal(first["target"], phase["target"][places])
            assert 0 < phase["target"].mean() < 1


def test_all_parameters_train_in_the_other_phases(ran):
    for phase in ran.phases:
        if phase["name"] != "grow":
            parts = {".".join(name.split(".")[:3]) for name in phase["names"].values()}
            changed = {".".join(name.split(".")[:3]) for name in phase["changed"]}
            assert parts <= changed
            assert len(phase["steps"][0]["trained"]) == len(phase["names"])
            assert "" in phase["steps"][0]["modes"] and "encoder" in phase["steps"][0]["modes"]


def test_the_log_says_what_happened(ran):
    assert list(ran.log[0]) == [
        "seconds", "phase", "node", "epoch", "step", "kl_weight", "elbo", "reconstruction",
        "kl_root", "kl_nodes", "kl_decisions", "contrastive", "cut", "loss", "leaf_shares", "note"]
    epochs = [row for row in ran.log if row["epoch"]]
    for phase in ran.phases:
        for epoch in range(FLAGS[f"{phase['name']}_epochs"]):
            row = epochs.pop(0)
            assert row["phase"] == phase["name"] and row["epoch"] == str(epoch + 1)
            assert row["node"] == ("" if phase["node"] is None else str(phase["node"]))
            parts = [float(row[f"kl_{name}"]) for name in ("root", "nodes", "decisions")]
            assert float(row["elbo"]) == pytest.approx(float(row["reconstruction"]) - sum(parts),
                                                       abs=1e-3)
            shares = dict(part.split(":") for part in row["leaf_shares"].split())
            if phase["name"] != "grow":
                assert sum(map(float, shares.values())) == pytest.approx(1, abs=1e-3)
                assert set(shares) == {str(leaf) for leaf in phase["leaves"]} and row["contrastive"]
            else:
                assert len(shares) == 2 and float(row["cut"]) > 0
    assert not epochs
    notes = {row["phase"]: row["note"] for row in ran.log if row["note"]}
    assert notes["finetune"].startswith("pruned: ") and " images" in notes["grow"]


def test_frames_are_the_tree_after_every_phase(ran, data):
    frames = ran.tree["frames"]
    titles = [frame["title"].split(":")[0] for frame in frames]
    assert [title for title in titles if title != "pruned"] == [p["name"] for p in ran.phases]
    for frame in frames:
        assert sum(frame["shares"]) == pytest.approx(1, abs=1e-5)
        assert frame["images"].shape == (len(frame["leaves"]), 1, 28, 28)
        mean = torch.einsum("l,lchw->chw", torch.tensor(frame["shares"]), frame["images"].float())
        assert (mean - data.images.float().mean(0)).abs().max() < 60
    assert frames[-1]["parents"] == ran.tree["parents"]


# -- stage 2, as it ran ------------------------------

def test_stage_2_steps(ran, data):
    assert len(ran.steps) == 14
    for k, step in enumerate(ran.steps):
        assert step["lr"] == pytest.approx(
            2e-3 * 0.5 * (1 + math.cos(math.pi * k / 14)) * min(1, (k + 1) / 5))
        assert step["decay"] == 0 and step["fresh"] == (k == 0)
        assert step["clip"] == 1.0 and step["norm"] <= 1 + 1e-4
        assert step["drawn"] and step["mine"] and step["training"]
        x = data.images[step["rows"]].float() / 127.5 - 1
        assert torch.allclose(step["x0"], x, atol=1e-6) and step["x0"].shape == (32, 1, 28, 28)
        assert step["x0"].min() == -1 and step["x0"].max() > 0.6
        assert step["y"].shape[0] == 32
        assert same(step["tree"], ran.tree["state_dict"])
    assert len({tuple(step["rows"]) for step in ran.steps}) == 14


def test_the_leaf_of_a_path_is_drawn_and_each_path_is_its_images(data):
    config = train.Config(latent_channels=2, bottom_up_channels=8)
    tree = train.build_tree(config, (1, 28, 28)).eval()
    nn.init.zeros_(tree.nodes[0].router_q.net[-1].weight)
    nn.init.zeros_(tree.nodes[0].router_q.net[-1].bias)
    path = tree.infer_path(data.images.float() / 255)
    assert 80 < (path.nodes[:, 1] == 1).sum() < 160       # P = 1/2: both leaves


def test_diffusion_pt_is_the_average(ran):
    average = ran.steps[0]["before"]
    for k, step in enumerate(ran.steps):
        decay = min(0.5, (1 + k) / (10 + k))
        average = decay * average + (1 - decay) * step["after"]
    saved = torch.load(ran.folder / "diffusion.pt", weights_only=True)
    networks = copy.deepcopy(ran.steps[0]["networks"])
    last = flat(networks)
    networks.load_state_dict(saved)
    assert torch.allclose(flat(networks), average, atol=1e-6)
    assert not torch.allclose(flat(networks), last, atol=1e-4)
    assert not torch.equal(ran.steps[0]["before"], ran.steps[0]["after"])


def test_log_rows_of_stage_2(ran):
    rows = [row for row in ran.log if row["phase"] == "diffusion" and row["step"]]
    assert [int(row["step"]) for row in rows] == [4, 8, 12, 14]
    for row, first in zip(rows, (0, 4, 8, 12)):
        losses = [step["loss"] for step in ran.steps[first:first + 4]]
        assert float(row["loss"]) == pytest.approx(np.mean(losses), abs=2e-3 * np.mean(losses))


def test_another_stage_2_on_the_same_tree(ran, data, known, tmp_path, monkeypatch):
    spy = Spy(monkeypatch, data.images)
    images = []
    def eps_net(diffusion, unet, image=None, real=train.eps_net):
        images.append(image)
        return real(diffusion, unet, image)
    monkeypatch.setattr(train, "eps_net", eps_net)
    train.main(["--tree", str(ran.folder), "--condition", "none", "--with-reconstruction", "--seed",
                "8", "--diffusion-lr-decay", "constant", "--diffusion-epochs", "1", "--out",
                str(tmp_path / "other")])
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    mine = dict(condition="none", with_reconstruction=True, seed=8, diffusion_epochs=1,
                diffusion_lr_decay="constant", tree=str(ran.folder), out=str(tmp_path / "other"))
    assert config == json.loads((ran.folder / "config.json").read_text()) | mine
    other = torch.load(tmp_path / "other" / "tree.pt", weights_only=True)
    assert other["parents"] == ran.tree["parents"] and not spy.phases
    assert same(other["state_dict"], ran.tree["state_dict"])
    assert len(other["frames"]) == len(ran.tree["frames"])
    assert train.begin(["--tree", str(ran.folder)])[0].out == "runs/known"
    rates = [2e-3 * min(1, (k + 1) / 5) for k in range(7)]
    assert [step["lr"] for step in spy.steps] == pytest.approx(rates)
    run = train.load_run(tmp_path / "other")
    for step, image in zip(spy.steps, images):
        assert step["y"] is None
        assert torch.allclose(image, 2 * run.tree.decode(step["path"]) - 1, atol=0.02)
        assert image.min() < -0.5                          # in [-1, 1]


# -- interruption, files ------------------------------

def test_an_interrupted_run_ends_as_the_whole_one(ran, known, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "CHUNK", 4)
    monkeypatch.setattr(train, "SAVE_SECONDS", -1.0)
    argv = as_argv(out=tmp_path)
    for phase in ("initial", "grow", "intermediate", "finetune", "diffusion"):
        count = [0]
        def die(state, title, *args, real=train.report):
            count[0] += state["phase"] == phase
            if count[0] == 2:                              # the second epoch's, or chunk's
                raise RuntimeError("killed")
            real(state, title, *args)
        with monkeypatch.context() as patch:
            patch.setattr(train, "report", die)
            with pytest.raises(RuntimeError, match="killed"):
                train.main(argv)
        assert not (tmp_path / "diffusion.pt").exists()
        assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["phase"] == phase
        argv = ["--resume", "--out", str(tmp_path)]
    train.main(argv)
    one, other = torch.load(tmp_path / "tree.pt"), ran.tree
    assert one["parents"] == other["parents"]
    assert same(one["state_dict"], other["state_dict"])
    one, other = [torch.load(folder / "diffusion.pt") for folder in (tmp_path, ran.folder)]
    assert same(one, other)
    log = list(csv.DictReader((tmp_path / "log.csv").read_text().splitlines()))
    assert [row | dict(seconds="") for row in log] == [row | dict(seconds="") for row in ran.log]


def test_a_save_that_fails_leaves_the_file_as_it_was(tmp_path):
    def save(file):
        file.write(b"half")
        raise OSError("the disk is full")
    train.replace_file(tmp_path / "file", lambda file: file.write(b"whole"))
    with pytest.raises(OSError):
        train.replace_file(tmp_path / "file", save)
    assert (tmp_path / "file").read_bytes() == b"whole"
    train.replace_file(tmp_path / "file", lambda file: file.write(b"next"))
    assert (tmp_path / "file").read_bytes() == b"next"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_load_run(ran, known):
    run = train.load_run(ran.folder, "cpu", "elsewhere")
    assert run.folder == ran.folder and run.config.data_root == "elsewhere"
    assert run.config.latent_channels == 2 and run.frames[0]["title"] == "initial: 2 leaves"
    for module, name in ((run.tree, "tree.pt"), (run.networks, "diffusion.pt")):
        saved = torch.load(ran.folder / name)
        saved = saved.get("state_dict", saved)
        assert same(module.state_dict(), saved)
        assert not any(m.training for m in module.modules())
        assert not any(p.requires_grad for p in module.parameters())


# -- one sentence for each mistake ------------------------------

def stops(capsys, function, *words):
    """It ends with exit code 2 and one line that has these words."""
    with pytest.raises(SystemExit) as stop:
        train.run(function)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and error.startswith("error: ")
    assert all(word in error for word in words), error


def test_mistakes(ran, known, tmp_path, capsys, monkeypatch):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no route\nto host")
    monkeypatch.setattr(train.datasets, "MNIST", no_network)
    half = tmp_path / "half"
    half.mkdir()
    (half / "config.json").write_text((ran.folder / "config.json").read_text())
    (half / "checkpoint.pt").write_bytes(b"PK\x03\x04")
    out = ["--out", str(tmp_path / "new")]
    for argv, *words in (
            (["--leaves", "3"], "--leaves"), (["--seed", "x"], "seed"), (["--preset", "a"], "'a'"),
            (["--condition", "leafs"], "leafs"), (["--dataset", "nothing"], "fashion", "'nothing'"),
            (["--dataset", "mnist"], "mnist", "no route to host", "--data-root"),
            (["--device", "cuda:99"], "cuda:99"), (["--unet-multipliers", "a"], "'a'"),
            (["--decoder", "vit"], "vit"), (["--tree", str(tmp_path / "no")], "no/config.json"),
            (["--out", str(ran.folder)], "holds a run", "--resume", "--out"),
            (["--out", str(tmp_path / "no"), "--resume"], "missing"),
            (["--out", str(half), "--resume"], "half/checkpoint.pt", "damaged"),
            (["--out", str(half), "--resume", "--seed", "9"], "config.json")):
        if "--resume" not in argv:         # what is named last counts
            argv = [*out, "--dataset", "known", "--device", "cpu", *argv]
        stops(capsys, lambda: train.main(argv), *words)
    assert not (tmp_path / "new").exists()
    stops(capsys, lambda: train.load_run(half), "tree.pt", "missing")
    (half / "tree.pt").write_bytes((ran.folder / "tree.pt").read_bytes())
    stops(capsys, lambda: train.load_run(half, "cpu"), "diffusion.pt", "missing")


def test_ctrl_c_out_of_memory_and_what_is_no_mistake_of_the_user(capsys):
    def raising(error):
        def function():
            raise error
        return function
    stops(capsys, raising(KeyboardInterrupt()), "--resume")
    stops(capsys, raising(torch.OutOfMemoryError("CUDA out of memory")), "--tree-batch-size")
    stops(capsys, raising(RuntimeError("can't allocate memory: 9 GB")), "--diffusion-batch-size")
    with pytest.raises(RuntimeError, match="shapes differ"):
        train.run(raising(RuntimeError("shapes differ")))


# -- devices, sizes, the live line ------------------------------

def test_devices_and_sizes(data, monkeypatch, capsys):
    assert train.pick_device("cpu").type == "cpu"
    assert torch.get_float32_matmul_precision() == "high"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert train.pick_device("auto").type == "cpu"
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    with train.autocast(torch.device("cpu")):
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.bfloat16
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    with train.autocast(torch.device("cpu")):
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.float32
    sizes = [train.rows_at_once(shape) for shape in ((1, 28, 28), (3, 64, 64), (3, 999, 999))]
    assert sizes == [255, 48, 1]
    seen = []
    tree = types.SimpleNamespace(leaf_probs=lambda x: seen.append(x) or x.mean((1, 2, 3))[:, None])
    probs = train.leaf_probs(tree, data.images.repeat(10, 1, 1, 1))
    assert [len(x) for x in seen] == [2000, 400] and seen[0].max() <= 1
    assert torch.allclose(probs[:240, 0], data.images.float().mean((1, 2, 3)) / 255)
    train.live("half")
    train.live("whole", last=True)
    assert "half" not in capsys.readouterr().out
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    train.live("half")
    assert capsys.readouterr().out.endswith("half")


def test_the_live_line_and_the_first_line(known, tmp_path, capsys):
    tiny = dict(max_leaves=1, initial_epochs=1, finetune_epochs=0, diffusion_epochs=0)
    train.main(as_argv(out=tmp_path, **tiny))
    first, *lines = capsys.readouterr().out.splitlines()
    assert all(word in first for word in ("known: 240 images", "tiny", "cpu", str(tmp_path)))
    line, = [line for line in lines if "initial 1/1" in line]
    assert "elbo -" in line and "images/s" in line
    assert torch.load(tmp_path / "tree.pt")["parents"] == [-1]
    run = train.load_run(tmp_path, "cpu")
    assert run.networks is None and run.tree.leaves == [0]
    state = dict(seconds=5.0, phase="initial", log=[])
    train.report(state, "grow 1/3", dict(epoch=1, elbo=-9.0), 100, 2.0, 0)
    assert state["log"] == [dict(seconds=7, phase="initial", epoch=1, elbo=-9.0)]
    assert "00:00:00 left  50 images/s  elbo -9" in capsys.readouterr().out
