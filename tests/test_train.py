"""The commands: both stages end to end, interruption, data sets, and what a user sees for a mistake."""

import json
import os
import pickle
import socket
import subprocess
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torchvision.transforms.v2.functional import rgb_to_grayscale as grey

import metrics
import sample
import train

ROOT = Path(__file__).parent.parent
TINY = ["--quick", "--max-images", "192", "--max-leaves", "3", "--finetune-epochs", "1", "--bottom-up-channels", "16", "--tree-width", "4",
        "--unet-channels", "8", "--unet-multipliers", "1,2", "--device", "cpu", "--max-depth", "3", "--tree-batch-size", "16",
        "--subtree-batch-size", "8", "--tree-lr", "0.003"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "shapes"
    train.main([*TINY, "--out", str(folder)])
    return folder


# -- the pipeline -----------------------------------------------------------------------------------------------------

def test_a_run_leaves_all_its_files(finished):
    names = {path.name for path in finished.iterdir()}
    assert names >= {"config.json", "log.csv", "tree.pt", "diffusion.pt", "checkpoint.pt", "curves.png", "growth.png"}
    assert not any(name.endswith(".part") for name in names)
    header, *rows = (finished / "log.csv").read_text().splitlines()
    assert header.startswith("seconds,phase,node,epoch,elbo,reconstruction,kl_root,kl_nodes,kl_decisions,contrastive,leaf_shares,note")
    assert [row.split(",")[1] for row in rows][:3] == ["initial", "initial", "grow"] and rows[-1].split(",")[1] == "diffusion"


def test_stage_2_on_the_tree_of_another_run(finished, tmp_path, capsys):
    train.main(["--tree", str(finished), "--condition", "none", "--with-reconstruction", "--out", str(tmp_path / "other"), "--device", "cpu"])
    assert "grow" not in capsys.readouterr().out
    trees = [torch.load(folder / "tree.pt") for folder in (finished, tmp_path / "other")]
    assert trees[0]["parents"] == trees[1]["parents"]
    assert all(torch.equal(value, trees[1]["state_dict"][name]) for name, value in trees[0]["state_dict"].items())
    configs = [train.load_config(folder) for folder in (finished, tmp_path / "other")]
    assert configs[1].seed == configs[0].seed and configs[1].max_images == 192 and configs[1].condition == "none"
    assert len(train.load_state(configs[1])["frames"]) == len(train.load_state(configs[0])["frames"])
    state = train.load_state(configs[0]) | dict(phase="grow")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text((finished / "config.json").read_text())
    torch.save(state, tmp_path / "half" / "checkpoint.pt")
    for folder, words in ((tmp_path / "half", "is not grown yet"), (tmp_path / "nothing", "there is no run")):
        with pytest.raises(SystemExit) as stop:
            train.main(["--tree", str(folder), "--out", str(tmp_path / "new"), "--device", "cpu"])
        assert stop.value.code == 2 and words in capsys.readouterr().err
        assert not (tmp_path / "new" / "config.json").exists()


def test_flags_of_runs_that_are_there_already(finished, tmp_path, capsys):
    """--tree keeps the data set of its run, the user's own images too; --resume does not go on with another."""
    config = json.loads((finished / "config.json").read_text()) | dict(dataset=str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert train.parse_flags(["--tree", str(tmp_path), "--out", "new"])[0].dataset == str(tmp_path)
    assert train.parse_flags(["--resume", "--compile", "--out", str(finished)])[0].compile
    with pytest.raises(SystemExit) as stop:
        train.main(["--resume", "--dataset", "mnist", "--out", str(finished)])
    assert stop.value.code == 2 and "is of shapes, not of mnist" in capsys.readouterr().err


def test_pictures_and_metrics_of_a_run(finished, capsys, monkeypatch):
    monkeypatch.setitem(metrics.RECIPES, "small", (1, 3e-3))
    sample.main([str(finished), "--n", "2", "--steps", "3", "--device", "cpu"])
    for name in ("tree.png", "leaves.png", "one_root.png", "reconstructions.png", "denoising.png", "interpolation.png",
                 "growth.gif"):
        assert (finished / name).stat().st_size > 5000
    leaf = train.load_run(finished, "cpu")[3].leaves[0]
    sample.main([str(finished), "--leaf", str(leaf), "--n", "2", "--steps", "2", "--eta", "0.5", "--device", "cpu"])
    sample.main([str(finished), "--node", "0", "--n", "2", "--steps", "2", "--device", "cpu"])
    assert (finished / f"leaf_{leaf}.png").exists() and (finished / "node_0.png").exists()
    metrics.main([str(finished), "--device", "cpu", "--ll-samples", "2", "--images", "64", "--steps", "2"])
    result = json.loads((finished / "metrics.json").read_text())
    assert 0 < result["dendrogram_purity"] <= 1 and sum(result["leaf_sizes"]) == result["images"] == 2000
    parts = [result[name] for name in ("reconstruction", "kl_root", "kl_nodes", "kl_decisions")]
    assert result["elbo"] == pytest.approx(parts[0] - sum(parts[1:]), abs=1e-2)
    assert result["elbo"] - 20 < result["log_likelihood"] < 0
    assert "dendrogram purity" in capsys.readouterr().out


def test_sampling_is_the_same_for_a_seed(finished):
    painter = sample.Painter(finished, "cpu", steps=3, eta=0.0)
    images = []
    for batch_size in (64, 3):
        torch.manual_seed(4)
        images.append(painter.draw(painter.new_paths(2), batch_size=batch_size)[1])
    assert torch.allclose(*images, atol=0.02)                                  # bf16 rounds by batch


def test_one_leaf_is_a_plain_vae(tmp_path):
    train.main([*TINY, "--max-leaves", "1", "--out", str(tmp_path)])
    assert torch.load(tmp_path / "tree.pt", weights_only=True)["parents"] == [-1]
    _, _, data, tree, _ = train.load_run(tmp_path, "cpu")
    assert tree.leaf_probs(data.images[:3].float() / 255).tolist() == [[1.0]] * 3
    sample.main([str(tmp_path), "--n", "1", "--steps", "2", "--device", "cpu"])


def test_compile_is_of_the_u_net_and_keeps_its_names(finished, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    train.main(["--tree", str(finished), "--compile", "--out", str(tmp_path), "--device", "cpu"])
    assert [type(module) for module in compiled] == [train.UNet]
    ours, plain = (torch.load(folder / "diffusion.pt", weights_only=True) for folder in (tmp_path, finished))
    assert ours.keys() == plain.keys()


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("after_steps", [2, 25, -1])
def test_an_interrupted_run_resumes_to_the_same_weights(finished, tmp_path, monkeypatch, after_steps):
    folder, steps = tmp_path / "run", [0]
    save = train.Run.save
    def checkpoint_every_step(run, **state):
        save(run, **state)
        run.saved = -1e9
    def die(run, text, last=False):
        steps[0] += 1
        if steps[0] > after_steps >= 0 or after_steps == -1 and text.startswith("diffusion") and steps[0] % 3 == 0:
            raise Interrupted
    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "save", checkpoint_every_step)
        patch.setattr(train.Run, "say", die)
        patch.setattr(train.Run, "due", lambda run: True)
        with pytest.raises(Interrupted):
            train.main([*TINY, "--out", str(folder)])
    train.main(["--resume", "--out", str(folder)])
    for name in ("tree.pt", "diffusion.pt"):
        one, other = (torch.load(path / name, weights_only=True) for path in (finished, folder))
        if name == "tree.pt":
            assert one["parents"] == other["parents"]
            one, other = one["state_dict"], other["state_dict"]
        assert all(torch.equal(one[key], other[key]) for key in one), name


@pytest.mark.parametrize("signal, reconstruction", [("leaf", False), ("none", True), ("path", True)])
def test_every_conditioning_trains_and_samples(tmp_path, signal, reconstruction):
    config = train.Config(condition=signal, with_reconstruction=reconstruction, unet_channels=8, unet_multipliers="1,2", drop_condition=0.5)
    tree = train.build_tree(config, (1, 28, 28)).eval()
    networks = train.build_denoiser(config, tree).eval()
    for p in networks["unet"].parameters():                                    # some start at 0
        torch.nn.init.normal_(p, std=0.1)
    path = tree.sample_path(3)
    net, y = train.conditioned(networks, config, tree, path)
    x, t = torch.randn(3, 1, 28, 28), torch.tensor([1, 500, 900])
    assert net(x, t, y).shape == x.shape and (y is None) == (signal == "none")
    other = path._replace(z=path.z + torch.tensor([1.0, 0.0])[: path.z.shape[1]].view(1, -1, 1, 1, 1))   # another root alone
    net_2, y_2 = train.conditioned(networks, config, tree, other)
    assert torch.equal(net(x, t, y), net_2(x, t, y_2)) == (signal != "path")    # only the whole path tells of the root
    leaf = path._replace(z=path.z + 1)
    assert not torch.equal(net(x, t, y), (lambda n, c: n(x, t, c))(*train.conditioned(networks, config, tree, leaf)))


def test_another_seed_gives_another_run(finished, tmp_path):
    train.main([*TINY, "--seed", "2", "--diffusion-epochs", "0", "--out", str(tmp_path / "run")])
    one, other = (torch.load(path / "tree.pt", weights_only=True)["state_dict"] for path in (finished, tmp_path / "run"))
    assert not torch.equal(one["encoder.1.0.weight"], other["encoder.1.0.weight"])


def test_every_preset_builds_its_networks():
    for name, settings in train.PRESETS.items():
        config = train.Config(**settings)
        train.check(config)
        tree = train.build_tree(config, (1, 28, 28)).eval()
        networks = train.build_denoiser(config, tree).eval()
        path = tree.sample_path(2)
        out = networks["unet"](torch.zeros(2, 1, 28, 28), torch.zeros(2, dtype=torch.long), networks["path_encoder"](*path))
        assert out.shape == (2, 1, 28, 28), name
    paper = train.Config(**train.PRESETS["paper"])
    assert (paper.latent_channels, paper.representation_dim, paper.bottom_up_channels, paper.max_depth) == (16, 4, 32, 7)
    assert (paper.initial_epochs, paper.subtree_epochs, paper.intermediate_epochs, paper.finetune_epochs) == (150, 150, 80, 200)


def test_appendix_d_in_colour():
    config, _ = train.parse_flags(["--preset", "paper", "--dataset", "cifar10"])
    assert (config.encoder, config.latent_channels, config.bottom_up_channels, config.representation_dim) == ("resnet", 64, 128, 4)
    assert (config.contrastive, config.contrastive_later, config.guide, config.augmented_elbo) == (100, 1, 0, True)
    assert (config.intermediate_epochs, config.finetune_epochs, config.kl_start, config.kl_per_epoch) == (0, 0, 0.01, 0.01)
    assert (config.unet_channels, config.unet_attention) == (128, "16,8")
    assert train.parse_flags(["--dataset", "shapes-rgb", "--preset", "tiny"])[0].initial_epochs == 15


# -- random views ------------------------------------------------------------------------------------------------------

def test_random_views_keep_what_they_must():
    """Each change alone has something that it leaves as it was; torchvision's transforms have the same."""
    still = train.Views((1, 1), (1, 1), (0, 0, 0, 0), 1.0, 0.0, gamma=0.0)
    x = 0.4 + 0.2 * torch.rand(64, 3, 32, 32)                                   # so that nothing is clamped
    def only(**change):
        torch.manual_seed(0)
        return train.random_view(x, still._replace(**change))
    upright = only()
    flipped = torch.tensor([not torch.allclose(upright[i], x[i], atol=1e-4) for i in range(64)])
    assert 15 < flipped.sum() < 49                                              # every image for itself
    assert torch.allclose(upright, torch.where(flipped[:, None, None, None], x.flip(3), x), atol=1e-4)
    brighter = only(jitter=(0.4, 0, 0, 0)) / upright
    assert torch.allclose(brighter, brighter[:, :1, :1, :1].expand_as(x), atol=1e-3) and brighter.std() > 0.1
    contrast = only(jitter=(0, 0.4, 0, 0))
    assert torch.allclose(grey(contrast).mean((1, 2, 3)), grey(upright).mean((1, 2, 3)), atol=1e-3)
    assert (contrast.std((1, 2, 3)) / upright.std((1, 2, 3))).std() > 0.1
    assert torch.allclose(grey(only(jitter=(0, 0, 0.4, 0))), grey(upright), atol=2e-3)
    turned = only(jitter=(0, 0, 0, 0.1))
    assert torch.allclose(turned.sum(1), upright.sum(1), atol=1e-4) and (turned - upright).abs().max() > 0.02
    assert torch.allclose(only(grey_p=1.0), grey(upright).expand_as(x), atol=2e-3)
    assert torch.allclose(only(jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.0), upright, atol=1e-4)


def test_a_view_is_a_part_of_its_image():
    torch.manual_seed(0)
    columns = torch.linspace(0, 1, 28).expand(200, 1, 28, 28)                   # brightness tells the place
    view = train.random_view(columns, train.Views((0.25, 0.25), (1, 1), (0, 0), gamma=0.0))
    assert torch.allclose((view.amax((1, 2, 3)) - view.amin((1, 2, 3))), torch.tensor(0.5), atol=0.03)   # half as wide
    middle = view.mean((1, 2, 3))
    assert middle.min() < 0.3 and middle.max() > 0.7
    assert train.random_view(torch.rand(1, 3, 64, 64), train.VIEWS[3]).shape == (1, 3, 64, 64)


# -- the algorithm of stage 1 -----------------------------------------------------------------------------------------

def test_phases_follow_the_algorithm(monkeypatch):
    """initial, the root's split, three more, intermediate, ..., prune, finetune, diffusion; leaves that pruning will take do not count."""
    config = train.Config(max_leaves=5, max_depth=4, tree_batch_size=10, intermediate_epochs=1)
    tree = train.build_tree(config, (1, 28, 28))
    images = torch.zeros(1000, 1, 28, 28, dtype=torch.uint8)
    def probs(tree, images):                                                    # even leaves, but node 3 gets next to nothing
        columns = torch.arange(1000) % len(tree.leaves)
        if 3 in tree.leaves:
            column = tree.leaves.index(3)
            columns[columns == column] = (column + 1) % len(tree.leaves)
        return torch.eye(len(tree.leaves))[columns]
    monkeypatch.setattr(train, "leaf_probs", probs)
    seen, phase = [], "initial"
    while phase != "diffusion":
        phase, node, mask, note = train.next_phase(tree, images, config, phase)
        seen.append(phase)
        assert phase != "grow" or (f"leaf {node} has the most images, {mask.sum()}" if node else "the root's routers") in note
        assert (phase == "grow") == (node is not None) and (mask is None or mask.shape == (1000,))
    assert seen == ["grow", "grow", "grow", "grow", "intermediate", "grow", "finetune", "diffusion"] and "pruned: " not in note
    assert len(tree.leaves) == 5 and 3 not in tree.leaves                       # six were grown, one was pruned


def test_ema_warms_up():
    """With a decay of min(d, (1 + n) / (10 + n)) the average follows the weights early on, as a hand-run average does."""
    decay, average, weight = 0.9999, 1.0, 1.0
    for n in range(1, 200):
        weight = 1.0 + n
        d = min(decay, (1 + n) / (10 + n))
        average = d * average + (1 - d) * weight
    network = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(network.weight, 1.0)
    ema = train.moving_average(network, 0.9999)
    for n in range(200):
        torch.nn.init.constant_(network.weight, 1.0 + n)
        ema.update_parameters(network)
    assert ema.module.weight.item() == pytest.approx(average, rel=1e-4) and average > 150


# -- several processes ------------------------------------------------------------------------------------------------

ONE_PHASE = """
import sys, torch, train
sys.argv = ["test"]
device = train.pick_device("cpu")
torch.manual_seed(train.world()[0])                                   # each process starts from other weights and must not keep them
net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
run = train.Run(train.Config(out=OUT), device)
images = torch.randint(0, 256, (40, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
def step_loss(x, epoch, progress):
    if progress == STOP and train.world()[0] == 0:                    # a signal that reaches one process alone
        run.stop = 2
    loss = (net(x).squeeze(1) - x.mean((1, 2, 3))).square().mean()
    return loss, {"loss": loss}
train.train_phase(run, "test", step_loss, net, images, 3, 8, 1e-2, "constant", grad_clip=0.5)
train.write(OUT + "/net.pt", lambda file: torch.save([net.state_dict(), [row["loss"] for row in run.state["log"]]], file))
"""


def launch(n, *command, cwd=None, code=0):
    """Start n processes as torchrun does, on this machine's loopback; -> what each printed. They must all end with this exit code."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    def env(rank):
        group = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=n, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, GLOO_SOCKET_IFNAME="lo")
        return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | {k: str(v) for k, v in group.items() if n > 1}
    runs = [subprocess.Popen([sys.executable, *command], env=env(rank), cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for rank in range(n)]
    outputs = [run.communicate(timeout=200)[0] for run in runs]
    assert [run.returncode for run in runs] == n * [code], outputs
    return outputs


def test_two_processes_train_as_one(tmp_path):
    results = []
    for n in (1, 2):
        folder = tmp_path / str(n)
        folder.mkdir()
        (folder / "script.py").write_text(f"OUT, STOP = {str(folder)!r}, None\n" + ONE_PHASE)
        launch(n, str(folder / "script.py"))
        results.append(torch.load(folder / "net.pt", weights_only=True))
    (one, one_losses), (two, two_losses) = results
    assert all(torch.allclose(one[key], two[key], atol=1e-6) for key in one)    # the same gradients, step by step
    assert one_losses == pytest.approx(two_losses, abs=2e-5)


def test_a_signal_to_one_process_stops_both_after_the_same_step(tmp_path):
    (tmp_path / "script.py").write_text(f"OUT, STOP = {str(tmp_path)!r}, 7 / 15\n" + ONE_PHASE)
    launch(2, str(tmp_path / "script.py"), code=130)
    state = train.read_saved(tmp_path / "checkpoint.pt")
    assert (state["epoch"], state["batch"]) == (1, 3) and not (tmp_path / "net.pt").exists()    # 8 of 3 x 5 steps are done


def test_both_stages_run_on_two_processes(tmp_path):
    first, second = launch(2, str(ROOT / "train.py"), *TINY, "--out", str(tmp_path / "run"), cwd=tmp_path)
    assert "done in" in first and "cpu x 2" in first and second == ""           # one of them speaks, and writes
    assert (tmp_path / "run" / "diffusion.pt").exists() and len(train.load_run(tmp_path / "run", "cpu")[3].leaves) >= 2


# -- data sets --------------------------------------------------------------------------------------------------------

def write_idx(path, array):
    """MNIST's file format: two zero bytes, type 8 (uint8), number of dimensions, each as a big-endian int32, the bytes."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.mark.parametrize("name, folder", [("fashion", "FashionMNIST"), ("mnist", "MNIST")])
def test_data_sets_load_from_their_public_layout(tmp_path, name, folder):
    raw = tmp_path / folder / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, n in (("train", 30), ("t10k", 10)):
        write_idx(raw / f"{part}-images-idx3-ubyte", rng.integers(0, 256, (n, 28, 28)))
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(n) % 10)
    data = train.load_data(train.Config(dataset=name, data_root=str(tmp_path)))
    assert data.images.shape == (30, 1, 28, 28) and data.images.dtype == torch.uint8 and data.test_images.shape[0] == 10
    assert data.test_labels.tolist() == list(range(10)) and len(data.classes) == 10


def test_cifar10_loads_from_its_public_layout(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]:
        (folder / name).write_bytes(pickle.dumps({"data": rng.integers(0, 256, (4, 3072)).astype(np.uint8), "labels": [0, 1, 2, 3]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda path, md5=None: path.exists() if hasattr(path, "exists") else True)
    data = train.load_data(train.Config(dataset="cifar10", data_root=str(tmp_path)))
    assert data.images.shape == (20, 3, 32, 32) and data.images.dtype == torch.uint8 and data.test_images.shape == (4, 3, 32, 32)
    first = pickle.loads((folder / "data_batch_1").read_bytes())["data"][0].reshape(3, 32, 32)
    assert (data.images[0].numpy() == first).all() and data.labels[:4].tolist() == [0, 1, 2, 3] and data.classes[0] == "a"


def test_shapes_are_the_same_everywhere_and_even():
    images, labels = train.draw_shapes(400, seed=0)
    again, _ = train.draw_shapes(400, seed=0)
    assert torch.equal(images, again) and images.shape == (400, 1, 28, 28) and images.float().max() > 200
    assert torch.bincount(labels).min() > 25 and len(train.SHAPES) == 8
    colour, same_labels = train.draw_shapes(400, seed=0, colour=True)
    assert colour.shape == (400, 3, 32, 32) and torch.equal(labels, same_labels)
    centre = images[:, 0, 12:16, 12:16].float().mean((1, 2))
    assert centre[labels < 4].min() > 150 and centre[(labels >= 4) & (labels != 7)].max() < 60      # filled or outlined


# -- mistakes ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("argv, words", [
    (["--colour"], "unrecognized arguments"),
    (["--dataset", "cats"], "invalid choice: 'cats'"),
    (["--seed", "one"], "invalid int value"),
    (["--tree-lr", "nan"], "--tree-lr must be"),
    (["--tree-batch-size", "0"], "--tree-batch-size must be"),
    (["--max-leaves", "0"], "--max-leaves must be"),
    (["--max-leaves", "40", "--max-depth", "5"], "at most 32 leaves"),
    (["--max-leaves", "30", "--min-share", "0.05"], "lower --min-share"),
    (["--unet-multipliers", "1,two"], "separated by commas"),
    (["--representation-dim", "4"], "1 with an mlp"),
    (["--device", "cuda"], "there is no cuda device"),
    (["--resume"], "there is no run"),
    (["--resume", "--seed", "2"], "leave out --seed"),
    (["--unet-channels", "9"], "must be even"),
    (["--condition", "none", "--drop-condition", "0.1"], "nothing to drop"),
    (["--max-images", "1"], "--max-images not 1"),
    (["--seed", "100000000000000"], "--seed must be"),
])
def test_wrong_flags_are_one_sentence(tmp_path, capsys, argv, words):
    if words == "there is no cuda device" and torch.cuda.is_available():
        argv[1], words = "mps", "there is no mps device"
    with pytest.raises(SystemExit) as stop:
        train.main([*argv, "--out", str(tmp_path / "run")])
    assert stop.value.code == 2 and words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_no_network_and_no_data_is_one_sentence_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no network")
    monkeypatch.setattr(torchvision.datasets.utils, "_urlretrieve", no_network)
    with pytest.raises(SystemExit) as stop:
        train.main(["--dataset", "fashion", "--data-root", str(tmp_path / "data"), "--out", str(tmp_path / "run")])
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.err.count("\n") == 1 and "--data-root" in captured.err
    assert list(tmp_path.iterdir()) == []


def test_a_finished_run_is_not_overwritten(finished, tmp_path, capsys):
    config = json.loads((finished / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"preset": "tiny"}))
    with pytest.raises(SystemExit) as stop:
        train.main([*TINY, "--out", str(tmp_path)])
    assert stop.value.code == 2 and "holds a run already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("name, damage, words", [
    ("config.json", b"{", "not a run's settings"), ("config.json", b'{"colour": 1}', "not a run's settings"),
    ("tree.pt", b"not a checkpoint", "cannot be read"), ("diffusion.pt", None, "is missing"),
    ("config.json", b'{"bottom_up_channels": 24}', "do not fit"), ("config.json", b'{"dataset": "cats"}', "must be one of"),
    ("config.json", b'{"seed": "1"}', "must be of type int"),
])
def test_damaged_runs_are_one_sentence(finished, tmp_path, capsys, name, damage, words):
    for path in finished.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    if damage is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(damage)
    with pytest.raises(SystemExit) as stop:
        sample.main([str(tmp_path), "--device", "cpu"])
    assert stop.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("argv, words", [(["--leaf", "99"], "no such node as 99"), (["--steps", "0"], "--steps must be"),
                                         (["--n", "0"], "--n must be"), (["--eta", "-1"], "--eta in 0..1")])
def test_wrong_sampling_flags_are_one_sentence(finished, capsys, argv, words):
    with pytest.raises(SystemExit) as stop:
        sample.main([str(finished), "--device", "cpu", *argv])
    assert stop.value.code == 2 and words in capsys.readouterr().err
