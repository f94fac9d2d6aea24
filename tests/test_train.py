"""train.py: what each phase optimises, on which images, what it leaves alone, what is saved."""

import copy
import csv
import inspect
import json
import math
import pathlib
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

ADAM, LOSS, PHASE = torch.optim.Adam, train.TreeVAE.loss, train.train_phase
NEXT, CONDITIONED, CLIP = train.next_phase, train.conditioned, nn.utils.clip_grad_norm_
DIFFUSION_LOSS, INFER_PATH = train.Diffusion.loss, train.TreeVAE.infer_path
CUT = torch.nn.functional.binary_cross_entropy_with_logits
OFF = train.COLOUR | dict(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, brightness=0.0, contrast=0.0,
                          saturation=0.0, hue=0.0, grey=0.0, jitter=1.1)


def indices(x, images):
    """Which images x (B, C, H, W) in [0, 1] are, by their pixels."""
    known = {image.numpy().tobytes(): k for k, image in enumerate(images)}
    return [known[image.numpy().tobytes()] for image in (x * 255).round().byte()]


def flat(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def set_of(tree):
    """A copy of all weights and buffers."""
    return {name: value.clone() for name, value in tree.state_dict().items()}


class Spy:
    """Records a run, step by step: `phases` of stage 1, `steps` of stage 2."""

    def __init__(self, patch, images):
        self.phases, self.steps, self.average, self.frames = [], [], None, []
        spy = self

        class Adam(ADAM):
            def __init__(self, params, **kwargs):
                super().__init__(params, **kwargs)
                spy.optimizers.append(self)

            def step(self, *args):
                group, now = self.param_groups[0], spy.now
                now["lr"], now["decay"] = group["lr"], group["weight_decay"]
                now["fresh"] = not self.state
                now["trained"] = {id(p) for p in group["params"]}
                if "cut" in now:
                    now["cut"] = now["cut"].grad.item()
                if "networks" in now:
                    gradients = [p.grad for p in group["params"] if p.grad is not None]
                    now["norm"] = torch.stack([g.norm() for g in gradients]).norm().item()
                    now["before"] = flat(now["networks"])
                super().step(*args)
                if "networks" in now:
                    now["after"] = flat(now["networks"])

        def tree_loss(tree, *args, **kwargs):
            bound = inspect.signature(LOSS).bind(tree, *args, **kwargs)
            bound.apply_defaults()
            now = dict(bound.arguments, modes={name for name, module in tree.named_modules()
                                               if module.training})
            now["rows"] = indices(now["x"], images)
            spy.now = now
            spy.phases[-1]["steps"].append(now)
            return LOSS(tree, *args, **kwargs)

        def cut_loss(logit, target):
            cut = CUT(logit, target)
            cut.retain_grad()
            spy.now |= dict(cut=cut, target=target)
            return cut

        def train_phase(config, state, tree, *args):
            before = set_of(tree)
            names = {id(p): name for name, p in tree.named_parameters()}
            tree.eval()
            phase = dict(name=state["phase"], node=state["node"], rows=state["rows"], steps=[],
                         parents=list(tree.parents), names=names, leaves=tree.leaves,
                         target=state["target"], probs=train.leaf_probs(tree, images))
            tree.train()
            spy.phases.append(phase)
            PHASE(config, state, tree, *args)
            after = tree.state_dict()
            phase["changed"] = {k for k in before if not torch.equal(before[k], after[k])}

        def infer_path(tree, x, leaf=None):
            spy.path = INFER_PATH(tree, x, leaf)
            spy.chunk_rows, spy.tree_training = indices(x, images), tree.training
            spy.leaf_is_drawn = leaf is None
            spy.seen = 0
            return spy.path

        def conditioned(config, diffusion, networks, tree, path):
            here = slice(spy.seen, spy.seen + len(path.z))
            spy.now = dict(networks=networks, unet_training=networks.training, path=path,
                           mine=spy.path.z[here].equal(path.z)
                           and spy.path.nodes[here].equal(path.nodes),
                           rows=spy.chunk_rows[here], tree_training=spy.tree_training,
                           drawn=spy.leaf_is_drawn, tree=set_of(tree))
            spy.seen += len(path.z)
            spy.steps.append(spy.now)
            return CONDITIONED(config, diffusion, networks, tree, path)

        def diffusion_loss(diffusion, net, x0, y=None, **kwargs):
            value = DIFFUSION_LOSS(diffusion, net, x0, y, **kwargs)
            spy.now |= dict(x0=x0, y=y, loss=value.item())
            return value

        def clip(parameters, norm):
            spy.now["clip"] = norm
            return CLIP(parameters, norm)

        self.optimizers = []
        patch.setattr(torch.optim, "Adam", Adam)
        patch.setattr(nn.utils, "clip_grad_norm_", clip)
        patch.setattr(train.F, "binary_cross_entropy_with_logits", cut_loss)
        patch.setattr(train.TreeVAE, "loss", tree_loss)
        patch.setattr(train.TreeVAE, "infer_path", infer_path)
        patch.setattr(train, "train_phase", train_phase)
        patch.setattr(train, "conditioned", conditioned)
        patch.setattr(train.Diffusion, "loss", diffusion_loss)
        patch.setattr(train, "CHUNK", 4)


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


# -- stage 1, as it ran ------------------------------

def test_the_order_of_phases(ran):
    names = [phase["name"] for phase in ran.phases]
    # The root's second training, along the cut, is no split: the third split comes after it
    assert names[:7] == ["initial"] + 4 * ["grow"] + ["intermediate", "grow"]
    assert names[-1] == "finetune" and names.count("finetune") == 1
    assert [len(phase["leaves"]) for phase in ran.phases[:7]] == [2, 2, 3, 4, 5, 5, 6]
    assert ran.phases[1]["node"] == 0 and ran.phases[1]["rows"].tolist() == list(range(240))
    assert len(ran.phases[-1]["leaves"]) <= 6


def test_every_weight_arrives_in_the_step(ran):
    starts = dict(initial=0.05, grow=0.15, intermediate=0.15, finetune=0.15)
    contrasts = dict(initial=50.0, intermediate=10.0, finetune=10.0)
    epochs = dict(initial=3, grow=3, intermediate=2, finetune=4)
    for phase in ran.phases:
        name, steps = phase["name"], phase["steps"]
        per_epoch = len(steps) // epochs[name]
        for k, step in enumerate(steps):
            epoch, done = k // per_epoch, k / len(steps)
            rate = max(0.1, 1 / 3) if name == "finetune" else 0.1
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
            node = "" if phase["node"] is None else str(phase["node"])
            assert (row["phase"], row["epoch"], row["node"]) == (phase["name"], str(epoch + 1), node)
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
        assert step["drawn"] and step["mine"] and step["unet_training"] and not step["tree_training"]
        x = data.images[step["rows"]].float() / 127.5 - 1
        assert torch.allclose(step["x0"], x, atol=1e-6) and step["x0"].shape == (32, 1, 28, 28)
        assert step["x0"].min() == -1 and step["x0"].max() > 0.6
        assert step["y"].shape[0] == 32
        assert all(torch.equal(v, step["tree"][k]) for k, v in ran.tree["state_dict"].items())
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
    assert all(torch.equal(v, other["state_dict"][k]) for k, v in ran.tree["state_dict"].items())
    assert len(other["frames"]) == len(ran.tree["frames"])
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
    assert all(torch.equal(v, other["state_dict"][k]) for k, v in one["state_dict"].items())
    one, other = [torch.load(folder / "diffusion.pt") for folder in (tmp_path, ran.folder)]
    assert all(torch.equal(value, other[name]) for name, value in one.items())
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
        assert all(torch.equal(value, saved[key]) for key, value in module.state_dict().items())
        assert not any(m.training for m in module.modules())
        assert not any(p.requires_grad for p in module.parameters())
