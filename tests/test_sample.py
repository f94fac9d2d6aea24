"""sample.py: which z, noise and images go into each picture; a run whose routers are known."""

import numpy as np
import pytest
import torch

import sample
import train
from diffusion import Diffusion


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Leaves 1, 3, 4; left at the root where z_0 > 0, at node 2 by the toss of a coin."""
    torch.manual_seed(1)
    config = train.Config(latent_channels=2, bottom_up_channels=4, unet_channels=4)
    tree = train.build_tree(config, (1, 28, 28), (-1, 0, 0, 2, 2)).eval().requires_grad_(False)
    tree.nodes[0].router_p.forward = lambda z: 1e4 * z[:, 0, 0, 0]
    tree.nodes[2].router_p.forward = lambda z: 0 * z[:, 0, 0, 0]
    nets = train.build_denoiser(config, tree).eval().requires_grad_(False)
    for p in nets["unet"].parameters():
        torch.nn.init.normal_(p, std=0.2)                            # its last layer would be zero
    images, labels = torch.randint(256, (40, 1, 28, 28), dtype=torch.uint8), torch.arange(40) % 4
    data = train.Data(images, labels, images, labels, "abcd")
    run = train.Run(tmp_path, config, torch.device("cpu"), data, tree, nets, Diffusion())
    monkeypatch.setattr(train, "load_run", lambda folder: run)
    return run


@pytest.fixture
def calls(monkeypatch):
    """calls(module, name): from now on, a function's calls: [(args, kwargs, result)]."""
    def watch(module, name):
        real, seen = getattr(module, name), []
        monkeypatch.setattr(module, name, lambda *args, **kwargs: seen.append(
            (args, kwargs, real(*args, **kwargs))) or seen[-1][2])
        return seen
    return watch


def test_images_of_paths_in_batches_and_at_once(run):
    path, seen = run.tree.sample_path(260), []                 # 255 go through the nets at once
    torch.manual_seed(5)
    decoded, denoised = sample.draw_images(run, path, 3, 0.0, seen=seen)
    torch.manual_seed(5)
    x_T = torch.randn(260, 1, 28, 28)
    net, y = train.conditioned(run.config, run.diffusion, run.networks, run.tree, path)
    x = run.diffusion.ddim_sample(net, x_T.shape, y, 3, 0.0, x_T=x_T)
    assert torch.allclose(denoised, (x + 1) / 2, atol=0.03)    # bf16 on some
    assert torch.allclose(decoded, run.tree.decode(path), atol=1e-5)
    assert [len(x) for _, x, _ in seen] == [255] * 3 + [5] * 3
    assert torch.equal(sample.draw_images(run, path, 3, 0.0, x_T)[1], denoised)


def test_paths_are_the_first_that_come_to_a_leaf(run, calls):
    pool = calls(run.tree, "sample_latents")
    path = sample.paths_to_leaves(run, 5)
    (n,), _, z = pool[0]
    z_0 = z[0][:, 0, 0, 0]
    assert n == 2048 and path.nodes.amax(1).tolist() == [1] * 5 + [3] * 5 + [4] * 5
    assert torch.equal(path.z[:5, 0], z[0][z_0 > 0][:5])
    others = path.z[5:, 0, 0, 0, 0].tolist()                   # of leaves 3 and 4, no row twice
    assert len(set(others)) == 10 and set(others) <= set(z_0[z_0 < 0][:30].tolist())
    through = sample.paths_to_leaves(run, 40, [2])
    z_0 = pool[1][2][0]
    assert torch.equal(through.z[:, 0], z_0[z_0[:, 0, 0, 0] < 0][:40])
    assert (through.nodes[:, 1] == 2).all() and 10 < (through.nodes[:, 2] == 3).sum() < 30
    run.tree.nodes[0].router_p.forward = lambda z: z[:, 0, 0, 0] + 40          # none comes to 2
    run.tree.nodes[2].router_p.forward = lambda z: 50 * z[:, 0, 0, 0]
    path = sample.paths_to_leaves(run, 1000, [2])
    (n,), _, z = pool[2]
    assert n == 4000 and torch.allclose(path.z[:, 0, 0, 0, 0], z[0][:, 0, 0, 0].sort()[0][:1000])
    assert torch.equal(path.nodes[:, 2] == 3, path.z[:, 1, 0, 0, 0] > 0)       # the likely leaf


def test_one_root_shares_noise_and_the_z_of_shared_nodes(run, monkeypatch, calls):
    drawn = calls(sample, "draw_images")
    sample.one_root(run, 2)
    (_, path, steps, eta, x_T), _, _ = drawn[0]
    assert (steps, eta) == (2, 0.0) and path.nodes.amax(1).tolist() == [1, 3, 4] * 4
    x_T, z = x_T.unflatten(0, (4, 3)), path.z.unflatten(0, (4, 3))
    for shared in (x_T, z[:, :, 0], z[:, 1:, 1]):              # z_0 by all, z_2 by leaves 3 and 4
        assert torch.equal(shared, shared[:, :1].expand_as(shared))
        assert len(shared.flatten(0, 1).unique(dim=0)) == 4
    monkeypatch.setattr(sample, "PIXELS", 2 * 784)
    images, times = sample.denoising(run, 25, 0.0)
    (_, path, steps, _), kwargs, result = drawn[1]  # what DDIM saw
    assert times == [t + 1 for t in run.diffusion.ddim_times(25)][::-2]
    assert (steps, images.shape[1]) == (25, 14) and len(sample.denoising(run, 2, 0.0)[1]) == 2
    assert path.nodes.amax(1).tolist() == [1, 3, 4] and torch.equal(images[:, -1], result[1])
    x_t = torch.cat([x for t, x, _ in kwargs["seen"] if t == times[1] - 1])
    assert torch.equal(images[:, 1], ((x_t + 1) / 2).clamp(0, 1))


def test_tree_png_has_the_shares_and_classes_of_the_test_images(run, monkeypatch, calls):
    column = (torch.arange(40) >= 10).long() + (torch.arange(40) >= 38)          # 10, 28, 2 images
    monkeypatch.setattr(train, "leaf_probs", lambda tree, images: torch.eye(3)[column])
    counts = sample.count_test_images(run)
    assert counts.tolist() == [[3, 3, 2, 2], [7, 7, 7, 7], [0, 0, 1, 1]]
    unlabelled = run.data._replace(test_labels=torch.zeros(40).long(), classes=[])
    assert sample.count_test_images(run._replace(data=unlabelled)).tolist() == [[10], [28], [2]]
    figures = calls(sample.Figure, "savefig")
    counts[2] = [0, 0, 1, 3]
    sample.draw_leaf_classes(run, {"": counts}, run.folder / "tree.png", 2)
    ax = figures[0][0][0].axes[0]
    texts = [text.get_text() for text in ax.texts]
    assert {"0", "2", "leaf 1: 25%", "leaf 3: 70%", "leaf 4: 5%"} <= set(texts)
    assert texts[-1] == "d 75%\nc 25%" and texts[-2].count("\n") == 2
    assert [round(bar.get_width() / 0.94, 3) for bar in ax.patches[-4:]] == [0.75, 0.25, 0, 0]


def test_grids_are_laid_out_row_by_row(run, calls):
    figures = calls(sample.Figure, "savefig")
    images = torch.rand(2, 6, 1, 1, 1).expand(-1, -1, -1, 28, 28)
    sample.draw_grids(run.folder / "a.png", (*images, None), 3, rows="rs", stacked=True)
    first, second = figures[0][0][0].axes                      # and none for None
    for x, grid in zip(images, [ax.images[0].get_array() for ax in (first, second)]):
        assert grid.shape == (59, 88, 3) and (grid[0] == 1).all()
        assert np.allclose(grid[15::29, 15::29].reshape(6, 3), x[:, 0, 0, :1])


def test_the_command_draws_every_picture(run, calls, monkeypatch):
    monkeypatch.setattr(run.tree, "leaf_probs", lambda x: torch.eye(3)[torch.arange(len(x)) % 3])
    log = ["phase,step,elbo,reconstruction,kl_root,kl_nodes,kl_decisions,loss,note"]
    for k, phase in enumerate(["initial"] * 2 + ["grow"] * 2 + ["finetune"] * 2):
        log.append(f"{phase},,{-k - 1},{-k},{k},{2 * k},{3 * k},,")
    log += ["finetune,,,,,,,,pruned"] + [f"diffusion,{50 * k},,,,,,{k}," for k in range(1, 31)]
    (run.folder / "log.csv").write_text("\n".join(log))
    figures = calls(sample.Figure, "savefig")
    grids, drawn = calls(sample, "draw_grids"), calls(sample, "draw_images")
    paths, trees = calls(run.tree, "infer_path"), calls(sample, "draw_tree")
    sample.main([str(run.folder), "--n", "3", "--steps", "4", "--eta", "0.1"])
    files = "tree leaves one_root reconstructions denoising growth log curves".split()
    assert {file.stem for file in run.folder.iterdir()} == set(files)
    lines = {line.get_label(): line for ax in figures[-1][0][0].axes for line in ax.lines}
    np.testing.assert_equal(lines["elbo"].get_ydata(), [-1, -2, np.nan, np.nan, -5, -6])
    assert lines["loss"].get_xdata()[-1] == 1500 and lines["loss"].get_ydata()[2] == 3
    assert [args[2:4] for args, _, _ in drawn] == [(4, 0.1), (4, 0.1), (4, 0.0), (4, 0.1), (4, 0.1)]
    _, leaves, one_root, reconstructions, _ = drawn
    names = ["leaf 1", "leaf 3", "leaf 4"]
    made = {args[0].name: (*args[1:], how) for args, how, _ in grids}
    assert made["leaves.png"] == (leaves[2], 3, {"rows": names})   # both of the same paths
    assert leaves[0][1].nodes.amax(1).tolist() == [1] * 3 + [3] * 3 + [4] * 3
    assert made["one_root.png"] == (one_root[2], 3, {"heads": names, "stacked": True})
    assert made["denoising.png"][2]["rows"] == names and made["denoising.png"][2]["heads"][-1] == 0
    (x, *images), columns, how = made["reconstructions.png"]
    assert torch.equal(x, run.data.test_images[:6] / 255) and torch.equal(paths[0][0][0], x)
    assert reconstructions[0][1] is paths[0][2] and tuple(images) == reconstructions[2]
    assert paths[0][2].nodes.amax(1).tolist() == [1, 3, 4] * 2 and how["stacked"] and columns == 6
    grown = [args[1:] for args, _, _ in trees[1:]]         # a root, two leaves, three
    assert [(len(parents), leaves) for parents, leaves, *_ in grown] == [
        (1, [0]), (3, [1, 2]), (5, [1, 3, 4])]
    _, _, shares, means, _ = grown[1]                      # leaf 1 has every third image
    assert shares.tolist() == pytest.approx([14 / 40, 26 / 40])
    assert torch.allclose(means[0, 0], run.data.images[::3].float().mean(0) / 255, atol=1e-5)
    monkeypatch.setattr(train, "load_run", lambda *given: run._replace(networks=None))
    sample.main([str(run.folder), "--n", "1"])
    assert [args[0].stem for args, _, _ in grids[4:]] == ["leaves", "one_root", "reconstructions"]


def test_the_defaults_and_the_seed(run, monkeypatch, capsys):
    for flag in "n=0 n=65 eta=-0.1 eta=1.1 steps=0 steps=1001 node=5".split():
        with pytest.raises(SystemExit, match="2"):
            sample.main([str(run.folder), f"--{flag}"])
        assert capsys.readouterr().err.count("\n") == 1 and not list(run.folder.iterdir())
    drawn, grids = [], []
    monkeypatch.setattr(sample, "draw_images", lambda _, *given: drawn.append(given) or "images")
    monkeypatch.setattr(sample, "draw_grids", lambda *given: grids.append(given))
    for seed in ([], ["--seed=0"], ["--seed=7"]):
        sample.main([str(run.folder), "--node=2", *seed])
    (path, *how), (same, *_), (other, *_) = drawn
    assert how == [25, 1.0] and len(path.z) == 64 and (path.nodes[:, 1] == 2).all()
    assert torch.equal(path.z, same.z) and not torch.equal(path.z, other.z)
    assert grids[0] == (run.folder / "node_2.png", "images", 8)
