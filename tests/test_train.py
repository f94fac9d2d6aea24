"""train.py: what each phase optimises, on which images, what it leaves alone, what is saved."""

import copy
import csv
import functools
import itertools
import json
import math
import types
from unittest.mock import Mock

import pytest
import torch
from torch import nn
from torchvision.transforms import functional as TF

import train

exactly = functools.partial(torch.testing.assert_close, rtol=0, atol=0)
TWO, FIVE = [-1, 0, 0], [-1, 0, 0, 1, 1, 2, 2, 3, 3]      # FIVE has been split three times
DATA = train.Data(*train.draw_shapes(240, 5, False), *train.draw_shapes(80, 6, False), range(8))
train.DATASETS["known"] = train.DataSet(lambda config: DATA)
KNOWN = {image.numpy().tobytes(): k for k, image in enumerate(DATA.images)}
FLAGS = dict(  # small, but every phase and every term of the loss has its turn
    dataset="known", device="cpu", seed=3, latent_channels=2, bottom_up_channels=32, max_depth=4,
    max_leaves=5, initial_epochs=3, grow_epochs=3, intermediate_epochs=2, finetune_epochs=3,
    tree_batch_size=32, grow_batch_size=16, kl_start=0.05, kl_start_later=0.15, kl_per_epoch=0.1,
    contrastive=50.0, plan=100.0, unet_channels=8, unet_multipliers="1,2", dropout=0.1,
    diffusion_epochs=2, diffusion_batch_size=32, diffusion_lr=2e-3, warmup_steps=5, ema_decay=0.5)


def as_argv(settings):
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]


def indices(x):
    return [KNOWN[image.numpy().tobytes()] for image in (x * 255).round().byte()]


class Spy:
    """Records a run: `phases` of stage 1 with their steps, `steps` of stage 2."""
    def __init__(self, patch):
        self.phases, self.steps = [], []
        patch.setattr(train, "CHUNK", 4)
        for owner, name, seen in (
                (torch.optim.Adam, "step", self.on_step), (train.TreeVAE, "loss", self.on_loss),
                (train, "decision_loss", self.on_plan), (train, "train_phase", self.on_phase),
                (train.TreeVAE, "infer_path", self.on_path),
                (train, "conditioned", self.on_conditioned),
                (train.Diffusion, "loss", self.on_eq_30)):
            patch.setattr(owner, name, lambda *args, seen=seen, real=getattr(owner, name), **kwargs:
                          seen(real, *args, **kwargs))

    def on_phase(self, real, config, state, tree, *args):
        before = copy.deepcopy(tree).eval()
        probs = before.leaf_probs(DATA.images.float() / 255).detach()
        self.phases.append(state | dict(steps=[], leaves=tree.leaves, probs=probs))
        real(config, state, tree, *args)
        after = tree.state_dict()
        self.phases[-1]["changed"] = {
            name: not torch.equal(v, after[name]) for name, v in before.state_dict().items()}

    def on_loss(self, real, tree, x, kl_weight, below, view, contrast):
        self.now = dict(kl_weight=kl_weight, below=below, view=view, contrast=contrast)
        self.phases[-1]["steps"].append(self.now)
        result = real(tree, x, kl_weight, below, view, contrast)
        self.now |= dict(visits=result[-1], rows=indices(x))
        return result

    def on_plan(self, real, tree, visits, target, node):
        self.now |= dict(plan=real(tree, visits, target, node), target=target)
        assert visits is self.now["visits"]
        self.now["plan"].retain_grad()
        return self.now["plan"]

    def on_path(self, real, tree, x, leaf=None):
        self.chunk = dict(path=real(tree, x, leaf), rows=indices(x),
                          sampled=leaf is None and not tree.training)
        return self.chunk["path"]

    def on_conditioned(self, real, config, diffusion, networks, tree, path):
        first = len(self.steps) % 4 * len(path.z)
        here = slice(first, first + len(path.z))
        self.now = dict(path=path, rows=self.chunk["rows"][here], training=networks.training,
                        mine=all(a[here].equal(b) for a, b in zip(self.chunk["path"], path)),
                        sampled=self.chunk["sampled"], weights=copy.deepcopy(networks.state_dict()))
        self.steps.append(self.now)
        self.networks, self.frozen = networks, tree
        return real(config, diffusion, networks, tree, path)

    def on_eq_30(self, real, diffusion, net, x0, y=None, of="eps"):
        loss = real(diffusion, net, x0, y, of=of)
        self.now |= dict(x0=x0, y=y, loss=loss.item(), of=of)
        return loss

    def on_step(self, real, adam):
        grads = [p.grad for p in adam.param_groups[0]["params"] if p.grad is not None]
        group = adam.param_groups[0]
        self.now |= dict(lr=group["lr"], decay=group["weight_decay"], fresh=not adam.state,
                         norm=nn.utils.get_total_norm(grads).item())
        real(adam)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        spy = Spy(patch)
        train.main(as_argv(FLAGS | dict(out=folder)))
    spy.folder, spy.tree = folder, torch.load(folder / "tree.pt", weights_only=True)
    spy.log = list(csv.DictReader((folder / "log.csv").read_text().splitlines()))
    return spy


def test_every_weight_arrives_in_the_step(ran):
    names = [phase["phase"] for phase in ran.phases]
    assert names[:6] == ["initial"] + 4 * ["grow"] + ["intermediate"] and names[-1] == "finetune"
    assert [len(phase["leaves"]) for phase in ran.phases[:6]] == [2, 2, 3, 4, 5, 5]
    assert ran.phases[1]["node"] == 0 and len(ran.phases[-1]["leaves"]) <= 5
    for name, phase in zip(names, ran.phases):
        n_steps = len(phase["steps"])
        start = 0.05 if name == "initial" else 0.15
        rate = 1 / 2 if name == "finetune" else 0.1
        for k, step in enumerate(phase["steps"]):
            epoch, done = k * FLAGS[f"{name}_epochs"] // n_steps, k / n_steps
            assert step["kl_weight"] == pytest.approx(min(1, start + rate * epoch))
            assert step["lr"] == pytest.approx(1e-3 * 0.5 * (1 + math.cos(math.pi * done)))
            assert (step["decay"], step["fresh"], step["below"]) == (1e-5, k == 0, phase["node"])
            contrast, plan = dict(initial=(50, 0), grow=(0, 100)).get(name, (0, 100 / 3))
            assert step["contrast"] == contrast and (step["view"] is None) == (contrast == 0)
            assert float(step["plan"].grad if "plan" in step else 0) == pytest.approx(plan)


def test_a_split_sees_its_leaf_and_changes_nothing_else(ran):
    for phase in ran.phases:
        node, leaves, mine = phase["node"], phase["leaves"], ""              # all parameters train
        whole = phase["phase"] in ("intermediate", "finetune")
        if whole:                                          # the clusters stay near what they were
            torch.testing.assert_close(phase["target"], phase["probs"])
            for step in phase["steps"]:
                assert torch.equal(step["target"], phase["target"][step["rows"]])
        if node is not None:
            children = [i for i, parent in enumerate(phase["parents"]) if parent == node]
            reach = phase["probs"][:, [leaves.index(child) for child in children]].sum(1)
            has = reach > min(1 / (len(leaves) - 1), 0.5) - 1e-6
            assert phase["rows"].tolist() == has.nonzero().squeeze(1).tolist()
            routers = (f"{node}.router_p", f"{node}.router_q")
            mine = tuple(f"nodes.{part}." for part in (*routers, *children))
            for step in phase["steps"]:                    # the target of each image is its own
                places = [phase["rows"].tolist().index(row) for row in step["rows"]]
                assert torch.equal(step["target"], phase["target"][places])
                logit = next(v.logit_q for v in step["visits"] if v.node == node)
                log_p = train.F.logsigmoid(torch.stack([logit, -logit], 1))
                plan = -(step["target"] * log_p).sum(1).mean()
                torch.testing.assert_close(step["plan"], plan)
            assert 0 < phase["target"][:, 0].mean() < 1
            mine_of = phase["shares"][phase["rows"]][:, list(phase["groups"][node])]
            torch.testing.assert_close(phase["target"].sum(1), mine_of.sum(1))
        for name, changed in phase["changed"].items():     # batch statistics, too
            kept = whole and name.startswith("heads.")     # without contrast
            assert changed == name.startswith(mine) or kept, name


def test_each_epoch_sees_each_image_once_and_is_logged(ran):
    log = [row for row in ran.log if row["epoch"]]
    for phase in ran.phases:
        name, node = phase["phase"], "" if phase["node"] is None else str(phase["node"])
        mine = range(240) if phase["rows"] is None else phase["rows"].tolist()
        n_seen = len(mine) // 16 * 16
        seen = [row for step in phase["steps"] for row in step["rows"]]
        orders = [tuple(seen[k:k + n_seen]) for k in range(0, len(seen), n_seen)]
        assert len(set(orders)) == len(orders) == FLAGS[f"{name}_epochs"]
        for epoch, order in enumerate(orders, 1):
            assert len(order) == len(set(order)) == n_seen and set(order) <= set(mine)
            row = log.pop(0)
            assert (row["phase"], row["node"], row["epoch"]) == (name, node, str(epoch))
            assert float(row["contrastive" if name == "initial" else "plan"]) > 0
            shares = dict(part.split(":") for part in row["leaf_shares"].split())
            assert node or set(shares) == {str(leaf) for leaf in phase["leaves"]}
    assert not log


def test_stage_2_learns_on_sampled_paths(ran):
    assert len(ran.steps) == 14 == len({tuple(step["rows"]) for step in ran.steps})
    average = ran.steps[0]["weights"]
    afters = [step["weights"] for step in ran.steps[1:]] + [ran.networks.state_dict()]
    for k, (step, after) in enumerate(zip(ran.steps, afters)):
        cosine = 0.5 * (1 + math.cos(math.pi * k / 14))
        assert step["lr"] == pytest.approx(2e-3 * cosine * min(1, (k + 1) / 5))
        assert step["decay"] == 0 and step["fresh"] == (k == 0) and step["of"] == "v"
        assert step["sampled"] and step["mine"] and step["training"]
        x = DATA.images[step["rows"]].float() / 127.5 - 1
        assert torch.allclose(step["x0"], x, atol=1e-6) and len(step["y"]) == 32 == len(x)
        decay = min(0.5, (1 + k) / (10 + k))
        average = {name: decay * average[name] + (1 - decay) * after[name] for name in after}
    assert max(step["norm"] for step in ran.steps) == pytest.approx(1)           # clipped to 1
    assert all(not after[name].equal(w) for name, w in ran.steps[0]["weights"].items())
    exactly(ran.frozen.state_dict(), ran.tree["tree"])
    saved = torch.load(ran.folder / "diffusion.pt", weights_only=True)
    assert all(torch.allclose(saved[name], average[name], atol=1e-6) for name in average)
    rows = [row for row in ran.log if row["phase"] == "diffusion" and row["step"]]
    assert [int(row["step"]) for row in rows] == [4, 8, 12, 14]
    for row, first in zip(rows, (0, 4, 8, 12)):
        losses = [step["loss"] for step in ran.steps[first:first + 4]]
        assert float(row["loss"]) == pytest.approx(sum(losses) / len(losses), rel=2e-3)


def test_another_stage_2_on_the_same_tree(ran, tmp_path, monkeypatch, capsys):
    spy, images = Spy(monkeypatch), []
    monkeypatch.setattr(train, "eps_net", lambda diffusion, unet, image, real=train.eps_net:
                        images.append(image) or real(diffusion, unet, image))
    config, paper = json.loads((ran.folder / "config.json").read_text()), tmp_path / "paper"
    config["preset"] = "paper"        # its schedule and loss
    paper.mkdir()
    (paper / "config.json").write_text(json.dumps(config))
    (paper / "tree.pt").write_bytes((ran.folder / "tree.pt").read_bytes())
    mine = dict(condition="none", seed=8, diffusion_epochs=1, tree=str(paper), out=str(tmp_path))
    train.main([*as_argv(mine), "--with-reconstruction"])
    assert capsys.readouterr().out.splitlines()[1].startswith("diffusion 7/7  0 min left")
    found = json.loads((tmp_path / "config.json").read_text())
    assert found == config | mine | dict(with_reconstruction=True)
    with pytest.raises(ZeroDivisionError):                 # a save that fails: the file stays
        train.replace_file(tmp_path / "tree.pt", lambda file: 1 / file.write(b""))
    run = train.load_run(tmp_path, "cpu")
    assert run.tree.parents == ran.tree["parents"] and not spy.phases
    assert ran.networks["path_encoder"].joint and not run.networks["path_encoder"].joint
    networks = torch.load(tmp_path / "diffusion.pt")
    for module, saved in ((run.tree, ran.tree["tree"]), (run.networks, networks)):
        exactly(module.state_dict(), saved)
        assert not any(m.training for m in module.modules())
        assert not any(p.requires_grad for p in module.parameters())
    rates = [2e-3 * min(1, (k + 1) / 5) for k in range(7)]
    assert [step["lr"] for step in spy.steps] == pytest.approx(rates)
    for step, image in zip(spy.steps, images):
        assert step["y"] is None and step["of"] == "eps" and image.min() < -0.5    # in [-1, 1]
        assert torch.allclose(image, 2 * run.tree.decode(step["path"]) - 1, atol=0.02)


def test_an_interrupted_run_ends_as_the_whole_one(ran, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "CHUNK", 4)
    monkeypatch.setattr(train, "SAVE_STEPS", 4)
    argv = as_argv(FLAGS | dict(out=tmp_path))
    for phase in ("", "initial", "grow", "intermediate", "finetune", "diffusion"):
        def die(state, *args, count=itertools.count(), real=train.report):
            if not phase or state["phase"] == phase and next(count):  # the second epoch or chunk
                raise RuntimeError("killed")
            real(state, *args)
        with monkeypatch.context() as patch:
            patch.setattr(train, "report", die)
            with pytest.raises(RuntimeError, match="killed"):
                train.main(argv)
        saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        assert saved["phase"] == (phase or "initial")
        argv = ["--resume", "--out", str(tmp_path)]
    train.main(argv)
    exactly(torch.load(tmp_path / "tree.pt")["tree"], ran.tree["tree"])
    exactly(*[torch.load(folder / "diffusion.pt") for folder in (tmp_path, ran.folder)])
    log = csv.DictReader((tmp_path / "log.csv").read_text().splitlines())
    assert [row | dict(seconds=0) for row in log] == [row | dict(seconds=0) for row in ran.log]


def test_mistakes_are_one_sentence_and_exit_code_2(ran, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train.datasets, "MNIST", Mock(side_effect=OSError("no\nroute")))
    (tmp_path / "config.json").write_text((ran.folder / "config.json").read_text())
    assert train.load_file(tmp_path, "config.json").out == str(tmp_path)     # a copy is a run here
    torch.save(types.SimpleNamespace(), tmp_path / "checkpoint.pt")          # more than weights
    new, resume = as_argv(FLAGS | dict(out=tmp_path / "new")), [f"--out={tmp_path}", "--resume"]
    for call, *words in (
            ([*new, "--leaves", "3"], "--leaves"), ([*new, "--decoder", "vit"], "vit"),
            ([*new, "--condition", "twig"], "--condition", "leaf-index"),
            ([*new, "--grow-batch-size", "0"], "batch-size 0"), ([*new, "--device", "tpu"], "tpu"),
            ([*new, "--dataset", "none"], "fashion", "none", "fewer than 20"),
            ([*new, "--dataset", "mnist"], "mnist", "no route", "--data-root"),
            ([*new, "--tree", str(tmp_path / "no")], "no/config.json"),
            *(([f"--tree={ran.folder}", *new[-1:], flag], "--tree keeps", "stage 1") for flag in (
                "--quick", "--preset=tiny", "--dataset=mnist", "--plan=1", "--latent-channels=2")),
            ([f"--tree={ran.folder}", *new[-1:], "--diffusion-epochs=0"], "--diffusion-epochs"),
            ([*new, "--out", str(ran.folder)], "holds a run", "--resume", "--out"),
            (resume, "checkpoint.pt", "damaged"), ([*resume, "--seed", "9"], "config.json"),
            (lambda: train.load_run(tmp_path), "tree.pt", "missing"),
            (Mock(side_effect=KeyboardInterrupt), "--resume"),
            (Mock(side_effect=torch.OutOfMemoryError), "--tree-batch-size")):
        with pytest.raises(SystemExit) as stop:
            train.run(call if callable(call) else lambda: train.main(call))
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and error.startswith("error: ")
        assert all(word in error for word in words), error
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("parents, sizes, ended, settings, follows, node, n_leaves", [
    (TWO, [300, 700], "initial", {}, "grow", 2, 3),
    (FIVE, [200] * 5, "grow", dict(intermediate_epochs=2), "intermediate", None, 5),
    (FIVE[:5], [300, 300, 400], "grow", dict(intermediate_epochs=2), "grow", 2, 4),
    (FIVE, [200] * 5, "intermediate", dict(intermediate_epochs=2), "grow", 7, 6),
    (FIVE, [200] * 5, "grow", dict(max_leaves=5), "finetune", None, 5),
    (FIVE[:7], [250] * 4, "grow", dict(max_depth=2), "finetune", None, 4),
    (FIVE, [200] * 5, "grow", dict(tree_batch_size=512), "grow", 7, 6),      # 2^5 of 1,000 images
    (FIVE, [200] * 5, "grow", dict(finetune_epochs=0, max_leaves=5), "diffusion", None, 5),
    (TWO, [990, 10], "initial", dict(max_leaves=2), "finetune", None, 2),
    (FIVE, [996, 1, 1, 1, 1], "grow", dict(max_leaves=5), "finetune", None, 1),
    (FIVE, [200, 200, 200, 395, 5], "finetune", {}, "diffusion", None, 4),
    (TWO, [300, 700], "initial", dict(max_leaves=2, plan=1.0), "grow", 0, 2),
    (TWO, [700, 300], "grow", dict(max_leaves=3, plan=1.0), "grow", 2, 3),   # 1 is one cluster
    (TWO, [300, 700], "grow", dict(max_leaves=2, plan=1.0), "finetune", None, 2),
    (TWO, [300, 700], "initial", dict(plan=1.0, contrastive=0.0), "grow", 2, 3)])
def test_growth(parents, sizes, ended, settings, follows, node, n_leaves, monkeypatch):
    """`next_phase` of a tree whose leaves are the most probable of `sizes` of 1,000 images."""
    config = train.Config(**dict(latent_channels=2, bottom_up_channels=8, plan=0.0) | settings)
    tree = train.build_tree(config, (1, 28, 28), parents)
    size_of = dict(zip(tree.leaves, sizes))
    def leaf_probs(tree, images):     # a pruned leaf's images go to the last one
        share = [size_of.get(leaf, 0) for leaf in tree.leaves]
        share[-1] += 1000 - sum(share)
        return torch.eye(len(share)).repeat_interleave(torch.tensor(share), 0)
    def plan_splits(tree, batches, view, n_leaves):
        assert n_leaves == config.max_leaves and not torch.cat([view(x) for x in batches]).any()
        return planned["shares"], planned["merges"]
    merges = {(1, 2): ((1,), (2,)), (0, 1, 2): ((0,), (1, 2))}
    planned = dict(shares=torch.tensor([[0.25, 0.5, 0.2]] * 1000), merges=merges,
                   groups={0: (0, 1, 2), 1: (0,), 2: (1, 2)})
    monkeypatch.setattr(train, "leaf_probs", leaf_probs)
    monkeypatch.setattr(train, "random_view", lambda c, x, scale: x * (scale != (0.7, 1.0)))
    monkeypatch.setattr(train, "plan_splits", plan_splits)
    state = dict(phase=ended, n_phases=4, done=3, optimizer=1, node=1, rows=1, target=1)
    state |= planned if config.plan and ended != "initial" else {}
    train.next_phase(config, state, tree, torch.ones(1000, 1, 28, 28, dtype=torch.uint8))
    assert (state["phase"], state["node"], len(tree.leaves)) == (follows, node, n_leaves)
    assert (state["n_phases"], state["done"], state["optimizer"]) == (5, 0, None)
    rows = {0: range(1000), 2: range(1000 - sizes[-1], 1000), 7: range(sizes[0])}.get(node)
    assert state["rows"] is rows is None or state["rows"].tolist() == list(rows)
    target = None
    if config.plan and config.contrastive:                  # of the plan, or P(l; c)
        target = leaf_probs(tree, 0)
        if node is not None:
            target = torch.tensor([[0.25, 0.7] if node == 0 else [0.5, 0.2]] * len(rows))
            assert state["groups"] == planned["groups"] | ({3: (1,), 4: (2,)} if node else {})
    assert state["target"] is target is None or torch.allclose(state["target"], target)
    assert ended != "finetune" or state["note"] == "pruned: 6"


def test_paper_is_appendix_d():
    grey = dict(
        encoder="cnn", decoder="cnn", max_depth=7, max_leaves=10, representation_dim=4,
        latent_channels=16, bottom_up_channels=32, tree_batch_size=256, grow_batch_size=256,
        initial_epochs=150, grow_epochs=150, intermediate_epochs=80, finetune_epochs=200,
        contrastive=0, plan=0, kl_start=0.5, kl_start_later=0.5, kl_per_epoch=0.001,
        unet_channels=64, unet_multipliers="1,2,2,2", unet_blocks=2, unet_attention="16",
        dropout=0.3, diffusion_epochs=1000, diffusion_batch_size=256, diffusion_lr=2e-4,
        warmup_steps=5000, ema_decay=0.9999)
    colour = grey | dict(
        encoder="resnet", decoder="resnet", latent_channels=64, bottom_up_channels=128,
        contrastive=100, intermediate_epochs=0, finetune_epochs=0, kl_start=0.01,
        kl_start_later=0.01, kl_per_epoch=0.01, unet_channels=128, unet_attention="16,8")
    large = colour | dict(tree_batch_size=128, grow_batch_size=128, diffusion_epochs=500,
                          unet_multipliers="1,2,2,2,4", diffusion_batch_size=32)
    for dataset, values in dict(mnist=grey, omniglot=grey, cifar10=colour, cifar100=colour,
                                celeba=large | dict(diffusion_epochs=200), folder=large).items():
        config = vars(train.choose_settings(dict(dataset=dataset, preset="paper")))
        assert config == config | values
    assert train.kl_weight(train.Config(**grey), "finetune", 20) == pytest.approx(0.7)


def test_the_other_presets_and_what_is_typed(monkeypatch):
    """What README's numbers were measured with; a name not listed is that of the preset tiny."""
    tiny = dict(
        dataset="shapes", preset="tiny", data_root="data", out="", seed=1, device="auto",
        quick=False, latent_channels=8, bottom_up_channels=128, representation_dim=1, encoder="cnn",
        decoder="mlp", max_depth=6, max_leaves=10, initial_epochs=20, grow_epochs=5,
        intermediate_epochs=0, finetune_epochs=12, tree_batch_size=256, grow_batch_size=128,
        kl_start=0.02, kl_start_later=0.1, kl_per_epoch=0.08, contrastive=100.0, plan=30.0, tree="",
        condition="path", with_reconstruction=False, unet_channels=16, unet_multipliers="1,2,4",
        unet_blocks=1, unet_attention="", dropout=0.0, diffusion_epochs=6, diffusion_batch_size=32,
        diffusion_lr=4e-3, warmup_steps=200, ema_decay=0.9999)
    small = dict(preset="small", unet_channels=32, diffusion_epochs=36, diffusion_batch_size=128)
    shapes = dict(max_leaves=8, initial_epochs=16, finetune_epochs=16, tree_batch_size=64,
                  grow_batch_size=64, kl_per_epoch=0.13, diffusion_epochs=8)
    quick = dict(max_leaves=5, initial_epochs=2, grow_epochs=2, intermediate_epochs=1,
                 finetune_epochs=2, unet_channels=16, diffusion_epochs=1, warmup_steps=5)
    rgb = dict(tree_batch_size=128, kl_per_epoch=0.08)
    monkeypatch.setattr(torch, "ones", lambda n, device: None)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for gpu, typed, changes in (
            (False, dict(dataset="fashion"), {}), (True, dict(dataset="fashion"), small),
            (True, dict(dataset="a/folder"), small | dict(diffusion_batch_size=32)),
            (True, {}, shapes), (True, dict(dataset="shapes-rgb"), shapes | rgb),
            (True, dict(dataset="mnist", device="cpu", quick=True), quick),
            (False, dict(quick=True, max_leaves=3), shapes | quick | dict(max_leaves=3))):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        assert vars(train.choose_settings(typed)) == tiny | changes | typed
        assert train.pick_device("auto").type == ("cuda" if gpu else "cpu")
    colour = dict(scale=(0.2, 1), ratio=(3 / 4, 4 / 3), flip=0.5, brightness=0.4, contrast=0.4,
                  saturation=0.4, hue=0.1, jitter=0.8, grey=0.2, gamma=0)        # Appendix A's
    grey = colour | dict(scale=(0.35, 1), brightness=0.5, jitter=1, gamma=0.5)
    assert (train.COLOUR, train.GREY) == (colour, grey)
    face = dict(scale=(0.75, 1), ratio=(0.8, 1.25), brightness=0.2, contrast=0.2, saturation=0.2)
    found = {name: data_set.views for name, data_set in train.DATASETS.items()}
    assert found == found | dict(celeba=face | dict(hue=0, grey=0), mnist=dict(flip=0))
    for dataset, preset, more in itertools.product(        # of each, the KL weight ends at 1
            [*train.DATASETS, "a/folder"], train.PRESETS, ({}, dict(quick=True))):
        config = train.choose_settings(dict(dataset=dataset, preset=preset) | more)
        last = "finetune" if config.finetune_epochs else "grow"
        assert train.kl_weight(config, last, getattr(config, f"{last}_epochs") - 1) == 1
        assert train.kl_weight(config, "initial", 0) == config.kl_start < 1


def test_step_decay_and_augmented_elbo(tmp_path, monkeypatch):
    calls, rates, tree = [], [], nn.Linear(1, 1)
    tree.train_only = calls.append
    tree.loss = lambda *a: calls.append(a) or (tree.weight.sum(), dict(elbo=torch.tensor(7)), [])
    monkeypatch.setattr(train, "random_view", lambda config, x: x + 1)
    monkeypatch.setattr(torch.optim.Adam, "step",
                        lambda adam: rates.append(adam.param_groups[0]["lr"]))
    argv, rgb = ["--preset=paper", "--initial-epochs=101"], DATA.images[:16].expand(-1, 3, -1, -1)
    train.train_phase(*train.begin([*argv, f"--out={tmp_path}"]), tree, rgb, tmp_path)
    assert rates == pytest.approx(100 * [1e-3] + [1e-4])
    assert (tmp_path / "log.csv").read_text().count(",7.0,") == 101        # means of an epoch
    node, (x, _, _, view, _), *_ = calls                   # no contrastive loss; ELBO of a view
    assert node is None and view is None and 1 <= x.min() < x.max() <= 2


def test_views(monkeypatch):
    off = dict.fromkeys(train.COLOUR, 0.0) | dict(scale=(1, 1), ratio=(1, 1), jitter=1.1)
    monkeypatch.setattr(train, "COLOUR", off)
    random_view = functools.partial(train.random_view, train.Config())
    x = 0.1 + 0.75 * torch.rand(400, 3, 16, 16)
    for how, other, share in (                             # each image by itself
            (dict(flip=0.3), x.flip(3), 0.3), (dict(grey=0.25), TF.rgb_to_grayscale(x), 0.25),
            (dict(brightness=0.3, jitter=0.8), x, 0.2)):
        is_other = (random_view(x, **how) - other).abs().amax((1, 2, 3)) < 1e-4
        assert abs(is_other.float().mean() - share) < 0.08, how
    for end, sign in ((0, -1), (1, 1)):                    # of each range, by torchvision
        monkeypatch.setattr(torch.Tensor, "uniform_", lambda x, *ends: x.fill_(ends[end]))
        factors = [(name, 0.3, 1 + sign * 0.3) for name in ("brightness", "contrast", "saturation")]
        for name, strength, value in (
                *factors, ("hue", 1 / 3, sign / 3), ("gamma", 0.5, math.exp(sign * 0.5))):
            theirs = getattr(TF, f"adjust_{name}")(x, value)
            assert torch.allclose(random_view(x, **{name: strength}), theirs, atol=1e-4), name
        for scale, ratio, boxes in (                       # top, left, height, width
                ((1 / 4, 9 / 16), (1, 1), [(0, 0, 8, 8), (4, 4, 12, 12)]),
                ((1 / 4, 1 / 2), (1 / 4, 2), [(0, 0, 16, 4), (8, 0, 8, 16)])):
            theirs = TF.resized_crop(x, *boxes[end], [16, 16], antialias=False)
            error = (random_view(x, scale=scale, ratio=ratio) - theirs).abs()
            assert error[..., 2:-2, 2:-2].max() < 1e-4     # a crop's edge has no neighbours


@pytest.mark.parametrize("name, shape", [("shapes", (1, 28, 28)), ("shapes-rgb", (3, 32, 32))])
def test_shapes(name, shape):
    images, labels, test_images, test_labels, classes = train.load_data(train.Config(dataset=name))
    assert images.shape == (8000, *shape) and test_images.shape == (2000, *shape)
    assert labels[:6].tolist() == [6, 5, 4, 2, 2, 0] and test_labels[:3].tolist() == [3, 4, 6]
    means = [images[labels == k, :, shape[1] // 2, shape[1] // 2].float().mean() for k in range(8)]
    assert min(means[:4]) > 120 > max(means[4:]) and len(classes) == 8   # filled, outlined


@pytest.mark.parametrize("name, path, size, top, left, side, shape", [
    ("own", "{bird}/a/{k:02}.png", (40, 40), 0, 0, 40, (27, 3, 32, 32)),
    ("small", "{bird}/{k:02}.png", (26, 28), 0, 1, 26, (27, 1, 28, 28)),
    ("wide", "{k:02}.JPEG", (60, 90), 0, 15, 60, (27, 1, 64, 64)),
    ("omniglot", "{bird}/b/{k:02}.png", (105, 105), 0, 0, 105, (27, 1, 28, 28)),
    ("celeba", "celeba/a/{k:02}.png", (218, 178), 40, 15, 148, (27, 1, 64, 64))])
def test_folders_of_images(name, path, size, top, left, side, shape, tmp_path, monkeypatch):
    for kind in ("Omniglot", "CelebA"):
        monkeypatch.setattr(train.datasets, kind, lambda root, download: types.SimpleNamespace(
            root=root, target_folder=root) if download else None)
    birds = ["owl" if k % 2 else "emu" for k in range(30)]
    for k, bird in enumerate(birds):
        file = tmp_path / path.format(k=k, bird=bird)
        file.parent.mkdir(parents=True, exist_ok=True)
        image = torch.full((3, *size), 255, dtype=torch.uint8)
        seen = image[:, top:top + side, left:left + side]              # all that is to be seen
        seen[:] = 5 * k + 100                                          # up to its very edge
        seen[:, 1:-1, 1:-1] = 5 * k
        if name == "own":
            image[0] = 9                                               # in colour
        TF.to_pil_image(image).save(file)
    dataset = name if name in train.DATASETS else str(tmp_path)
    found = train.load_data(train.Config(dataset=dataset, data_root=str(tmp_path)))
    images = torch.cat([found.images, found.test_images])[:, -1].int()
    middle, k = images[:, 9:-9, 9:-9], ((images[:, 9, 9] + 2) // 5).tolist()     # JPEG: + - 1
    assert (middle - middle[:, :1, :1]).abs().max() <= (2 if name == "wide" else 0)
    for edge in (images[:, 0, 9], images[:, -1, 9], images[:, 9, 0], images[:, 9, -1]):
        assert 10 < (edge - images[:, 9, 9]).min() and (edge - images[:, 9, 9]).max() < 110
    assert found.images.shape == shape and sorted(k) == list(range(30))
    assert k[:27] != sorted(k[:27])                        # in no order
    labels = torch.cat([found.labels, found.test_labels])
    if "bird" in path:
        assert [found.classes[label] for label in labels] == [birds[i] for i in k]
    else:
        assert found.classes == [] and not labels.any()


@pytest.mark.parametrize("name, kind", [("mnist", "MNIST"), ("fashion", "FashionMNIST"),
                                        ("cifar10", "CIFAR10"), ("cifar100", "CIFAR100")])
def test_torchvisions_data_sets(name, kind, monkeypatch):
    def fake(root, train, download):
        assert root == "here" and download
        n = 3000 if train else 4
        images = (torch.arange(n)[:, None, None, None] + torch.arange(3)).expand(n, 32, 32, 3)
        images = images.byte() if "cifar" in name else images[..., 0].byte()
        return types.SimpleNamespace(data=images.numpy(), targets=list(range(n)), classes=["x"])
    monkeypatch.setattr(train.datasets, kind, fake)
    found = train.load_data(train.Config(dataset=name, data_root="here", quick=True))
    assert found.images[7, :, 0, 1].tolist() == ([7, 8, 9] if "cifar" in name else [7])
    assert found.images.is_contiguous() and len(found.images) == 2048 == len(found.labels)
    assert len(found.test_images) == 4 and found.labels[7] == 7 and found.classes == ["x"]
