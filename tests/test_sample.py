"""sample.py: which z, noise and images go into each picture, on a tiny run whose routers are known."""

import matplotlib.axes
import numpy as np
import pytest
import torch
from torch import nn

import sample
import train
from diffusion import Diffusion, UNet
from path_encoder import PathEncoder
from treevae import TreeVAE


class Router(nn.Module):
    """The logit of going left, a * z + b of the first number of z."""

    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = a, b

    def forward(self, z):
        return self.a * z[:, 0, 0, 0] + self.b


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Leaves 1, 3, 4; a path goes left at the root where z_0 > 0; at node 2 by the toss of a coin."""
    torch.manual_seed(1)
    tree = TreeVAE((1, 28, 28), latent_channels=2, bottom_up_channels=4, representation_dim=1,
                   max_depth=2, width=2, parents=(-1, 0, 0, 2, 2))
    tree.nodes[0].router_p, tree.nodes[2].router_p = Router(1e4, 0), Router(0, 0)
    unet = UNet((1, 28, 28), channels=4, multipliers=(1, 1), blocks=1, attention=())
    for p in unet.parameters():
        nn.init.normal_(p, std=0.2)                            # its last layer would be zero
    networks = nn.ModuleDict(dict(unet=unet, path_encoder=PathEncoder((2, 1, 1), 5, unet.emb_dim)))
    images = torch.randint(256, (40, 1, 28, 28), dtype=torch.uint8)
    labels = torch.arange(40) % 4
    data = train.Data(images, labels, images, labels, list("abcd"))
    frames = [dict(title="", parents=parents, leaves=leaves, shares=[0.2] * 3, images=images[:3])
              for parents, leaves in (([-1, 0, 0], [1, 2]), ([-1, 0, 0, 2, 2], [1, 3, 4]))]
    run = train.Run(tmp_path, train.Config(), torch.device("cpu"), data,
                    tree.eval().requires_grad_(False), networks.eval().requires_grad_(False),
                    Diffusion(), frames)
    monkeypatch.setattr(train, "load_run", lambda folder, device, data_root: run)
    return run


@pytest.fixture
def calls(monkeypatch):
    """Records the calls of a function of a module: calls(module, name) -> [(args, kwargs, result)]."""
    def watch(module, name):
        real, seen = getattr(module, name), []

        def watched(*args, **kwargs):
            result = real(*args, **kwargs)
            seen.append((args, kwargs, result))
            return result
        monkeypatch.setattr(module, name, watched)
        return seen
    return watch


def test_images_of_paths_in_batches_and_at_once(run, monkeypatch, calls):
    path, seen = run.tree.sample_path(300), []                 # 255 go through the nets at once
    sampled = calls(run.diffusion, "ddim_sample")
    torch.manual_seed(5)
    decoded, denoised = sample.draw_images(run, path, 3, 0.0, seen=seen)
    torch.manual_seed(5)
    x_T = torch.randn(300, 1, 28, 28)
    net, y = train.conditioned(run.config, run.diffusion, run.networks, run.tree, path)
    x = run.diffusion.ddim_sample(net, x_T.shape, y, 3, 0.0, x_T=x_T)
    assert [len(args[2]) for args, _, _ in sampled] == [255, 45, 300]
    assert torch.allclose(denoised, (x + 1) / 2, atol=0.03) and len(seen) == 6       # bf16 on some
    assert torch.allclose(decoded, run.tree.decode(path), atol=1e-5)
    assert denoised.min() >= 0 and denoised.max() <= 1 and denoised.std() > 0.1
    again = sample.draw_images(run, path, 3, 0.0, x_T)[1]
    assert torch.equal(again, denoised)
    sample.draw_images(run, run.tree.sample_path(2), 4, 0.5)
    assert sampled[-1][0][3:] == (4, 0.5)
    assert sample.draw_images(run._replace(networks=None), path, 3, 0.0)[1] is None


def test_paths_are_the_first_that_come_to_a_leaf(run, calls):
    pool = calls(run.tree, "sample_latents")
    path = sample.paths_to_leaves(run, 5)
    (n,), _, z = pool[0]
    z_0 = z[0][:, 0, 0, 0]
    assert n == 2048 and path.nodes.amax(1).tolist() == [1] * 5 + [3] * 5 + [4] * 5
    assert torch.equal(path.z[:5, 0], z[0][z_0 > 0][:5])
    others = path.z[5:, 0, 0, 0, 0].tolist()                   # of leaves 3 and 4, no row twice
    assert len(set(others)) == 10 and set(others) <= set(z_0[z_0 < 0][:30].tolist())
    sample.paths_to_leaves(run, 1000)
    assert pool[1][0] == (4000,)


def test_where_the_prior_comes_too_seldom_the_most_probable_rows_follow(run, calls):
    run.tree.nodes[2].router_p = Router(3, -14)                # leaf 3: hardly ever
    pool = calls(run.tree, "sample_latents")
    path = sample.paths_to_leaves(run, 6)
    z = pool[0][2]
    rows = run.tree.prior_leaf_probs(z)[:, 1].topk(6).indices
    assert path.nodes[6:12].tolist() == [[0, 2, 3]] * 6
    assert torch.equal(path.z[6:12], torch.stack([z[i][rows] for i in (0, 2, 3)], 1))


def test_paths_through_a_node(run, calls):
    pool = calls(run.tree, "sample_latents")
    path = sample.paths_to_leaves(run, 40, [2])
    z_0 = pool[0][2][0]
    assert torch.equal(path.z[:, 0], z_0[z_0[:, 0, 0, 0] < 0][:40])
    assert (path.nodes[:, 1] == 2).all() and set(path.nodes[:, 2].tolist()) == {3, 4}
    assert 10 < (path.nodes[:, 2] == 3).sum() < 30             # each goes on to the leaf it came to
    run.tree.nodes[0].router_p, run.tree.nodes[2].router_p = Router(1, 40), Router(50, 0)
    path = sample.paths_to_leaves(run, 40, [2])                # none comes there
    z = pool[1][2]
    assert torch.equal(path.z[:, 0], z[0][(-z[0][:, 0, 0, 0]).topk(40).indices])
    assert torch.equal(path.nodes[:, 2] == 3, path.z[:, 1, 0, 0, 0] > 0)       # the likely leaf


def test_one_root_shares_noise_and_the_z_of_shared_nodes(run, calls):
    drawn, pool = calls(sample, "draw_images"), calls(run.tree, "sample_latents")
    decoded, denoised = sample.one_root(run, 2)
    (_, path, steps, eta, x_T), _, _ = drawn[0]
    z = pool[0][2]
    assert (steps, eta) == (2, 0.0) and path.nodes.amax(1).tolist() == [1, 3, 4] * 4
    x_T, z_path = x_T.unflatten(0, (4, 3)), path.z.unflatten(0, (4, 3))
    assert torch.equal(x_T, x_T[:, :1].expand_as(x_T))
    assert torch.equal(z_path[:, :, 0], z[0][:, None].expand(-1, 3, -1, -1, -1))
    for leaf in (1, 2):                                        # 3 and 4 share node 2
        assert torch.equal(z_path[:, leaf, 1], z[2])
    for k in range(1, 4):
        assert not torch.equal(x_T[k], x_T[0]) and not torch.equal(z[0][k], z[0][0])
    assert decoded.shape == denoised.shape == (12, 1, 28, 28)


def test_reconstructions_take_the_most_probable_leaf(run, calls, monkeypatch):
    column = torch.arange(40) % 3
    monkeypatch.setattr(run.tree, "leaf_probs", lambda x: torch.eye(3)[column[:len(x)]])
    drawn, grids = calls(sample, "draw_images"), calls(sample, "draw_grids")
    inferred = calls(run.tree, "infer_path")
    sample.main([str(run.folder), "--n", "3", "--steps", "2", "--eta", "0.3"])
    x = run.data.test_images[:6] / 255
    (_, path, *how), _, images = drawn[3]
    assert path.nodes.amax(1).tolist() == [1, 3, 4] * 2 and how == [2, 0.3]
    assert torch.equal(inferred[0][0][0], x) and path is inferred[0][2]
    _, shown, columns = grids[2][0]
    assert columns == 6 and torch.equal(shown[0], x) and shown[1:] == images and grids[2][1]["stacked"]


@pytest.mark.parametrize("at_once", [2, 255])
def test_denoising_shows_what_ddim_saw(run, monkeypatch, at_once, calls):
    monkeypatch.setattr(train, "rows_at_once", lambda image_shape: at_once)
    drawn = calls(sample, "draw_images")
    images, times = sample.denoising(run, 25, 0.0)
    (_, path, steps, _), kwargs, result = drawn[0]
    of_ddim = [t + 1 for t in run.diffusion.ddim_times(25, "quadratic")][::-1]
    assert times == of_ddim[::2] and times[0] == of_ddim[0] and steps == 25
    assert path.nodes.amax(1).tolist() == [1, 3, 4] and images.shape[:2] == (3, len(times) + 1)
    assert torch.equal(images[:, -1], result[1])
    x_t = torch.cat([x for t, x, _ in kwargs["seen"] if t == times[1] - 1])
    assert torch.equal(images[:, 1], ((x_t + 1) / 2).clamp(0, 1))
    assert sample.denoising(run, 2, 0.0)[1] == [t + 1 for t in run.diffusion.ddim_times(
        2, "quadratic")][::-1]


def test_tree_png_has_the_shares_and_classes_of_the_test_images(run, monkeypatch, calls):
    column = (torch.arange(40) >= 10).long() + (torch.arange(40) >= 38)          # 10, 28, 2 images
    monkeypatch.setattr(train, "leaf_probs", lambda tree, images: torch.eye(3)[column])
    counts = sample.count_test_images(run)
    assert counts.tolist() == [[3, 3, 2, 2], [7, 7, 7, 7], [0, 0, 1, 1]]
    assert sample.count_test_images(run._replace(data=run.data._replace(
        test_labels=torch.zeros(40).long(), classes=[]))).tolist() == [[10], [28], [2]]
    figures, shown = calls(sample, "save_figure"), calls(matplotlib.axes.Axes, "imshow")
    counts[2] = [0, 0, 1, 3]
    sample.draw_leaf_classes(run, {"": counts}, run.folder / "tree.png", 2)
    ax = figures[0][0][0].axes[0]
    texts = [text.get_text() for text in ax.texts]
    assert [text for text in texts if "leaf" in text] == ["leaf 1: 25%", "leaf 3: 70%", "leaf 4: 5%"]
    assert texts[-1] == "d 75%\nc 25%" and texts[-2].count("\n") == 2 and "0" in texts
    assert [round(bar.get_width() / 0.94, 3) for bar in ax.patches[-4:]] == [0.75, 0.25, 0, 0]
    assert len(shown) == 3 and all(0 <= args[1].min() < args[1].max() <= 1 for args, _, _ in shown)


def test_grids_are_laid_out_row_by_row(run, calls):
    shown, figures = calls(matplotlib.axes.Axes, "imshow"), calls(sample, "save_figure")
    images = torch.linspace(0, 0.9, 6)[:, None, None, None].expand(-1, 1, 28, 28)
    for stacked in (False, True):
        sample.draw_grids(run.folder / "a.png", (images, 1 - images, None), 3, rows=["r", "s"],
                          heads=list("xyz"), stacked=stacked)
        first, second = figures[-1][0][0].axes                 # and none for None
        assert (first.get_position().y0 > second.get_position().y1) == stacked
    assert [label.get_text() for label in first.get_yticklabels()] == ["r", "s"]
    grid, other = shown[0][0][1], shown[1][0][1]
    assert grid.shape == (59, 88, 3) and np.allclose(grid[:, :, 0], grid[:, :, 2])
    centres = grid[15::29, 15::29, 0].flatten()
    assert np.allclose(centres, images[:, 0, 0, 0]) and grid[0].min() == 1
    assert np.allclose(other[15::29, 15::29, 1].flatten(), 1 - images[:, 0, 0, 0])


def write_log(folder):                                         # a note, and stage 2, come last
    lines = ["phase,step,elbo,reconstruction,kl_root,kl_nodes,kl_decisions,loss,note"]
    for k, phase in enumerate(["initial"] * 2 + ["grow"] * 2 + ["finetune"] * 2):
        lines.append(f"{phase},,{-k - 1},{-k},{k},{2 * k},{3 * k},,")
    lines += ["finetune,,,,,,,,pruned"] + [f"diffusion,{50 * k},,,,,,{k}," for k in range(1, 31)]
    (folder / "log.csv").write_text("\n".join(lines))


def test_curves_are_the_numbers_of_the_log(run, calls):
    write_log(run.folder)
    figures = calls(sample, "save_figure")
    sample.draw_curves(run.folder / "log.csv", run.folder / "curves.png")
    lines = {line.get_label(): line for ax in figures[0][0][0].axes for line in ax.lines}
    for name, factor, less in (("elbo", -1, 1), ("kl_nodes", 2, 0), ("kl_decisions", 3, 0)):
        expected = [factor * k - less for k in (0, 1, np.nan, np.nan, 4, 5)]
        assert np.array_equal(lines[name].get_ydata(), expected, equal_nan=True)
    bands = [patch.get_x() for patch in figures[0][0][0].axes[1].patches]
    assert lines["elbo"].get_xdata().tolist() == [1, 2, 3, 4, 5, 6] and bands == [2.5, 3.5]
    assert lines["loss"].get_xdata()[-1] == 1500 and lines["loss"].get_ydata()[2] == 3
    means = lines["running mean"].get_ydata()
    assert means[0] == 1 and means[4] == 3 and means[-1] == np.mean(range(11, 31))


def test_growth_gif_has_a_frame_for_each_phase(run, calls):
    shown = calls(matplotlib.axes.Axes, "imshow")
    sample.draw_growth(run.frames, run.folder / "growth.gif")
    parts = (run.folder / "growth.gif").read_bytes().split(b"!\xf9\x04")[1:]
    assert [int.from_bytes(part[1:3], "little") for part in parts] == [100, 400]     # 1/100 s
    assert [file.name for file in run.folder.iterdir()] == ["growth.gif"]
    assert np.allclose(shown[0][0][1][:, :, 0], run.frames[0]["images"][0, 0] / 255)


@pytest.mark.parametrize("stages", [1, 2])
def test_the_command_draws_every_picture(run, calls, monkeypatch, capsys, stages):
    if stages == 1:
        run = run._replace(networks=None)
        monkeypatch.setattr(train, "load_run", lambda *args: run)
    else:
        write_log(run.folder)
    grids, drawn = calls(sample, "draw_grids"), calls(sample, "draw_images")
    sample.main([str(run.folder), "--n", "2", "--steps", "3", "--eta", "0.1"])
    expected = {"tree.png", "leaves.png", "one_root.png", "reconstructions.png", "growth.gif"}
    expected |= {"denoising.png", "curves.png", "log.csv"} if stages == 2 else set()
    assert {file.name for file in run.folder.iterdir()} == expected
    assert str(run.folder) in capsys.readouterr().out
    names = ["leaf 1", "leaf 3", "leaf 4"]
    assert grids[0][1]["rows"] == names and grids[1][1] == {"heads": names, "stacked": True}
    if stages == 2:
        assert grids[3][1]["rows"] == names and grids[3][1]["heads"][-1] == 0
    made = {args[0].name: (args[1], args[2]) for args, _, _ in grids}
    assert made["leaves.png"] == (drawn[1][2], 2)              # both of the same paths
    assert drawn[1][0][1].nodes.amax(1).tolist() == [1, 1, 3, 3, 4, 4]
    assert [args[2:4] for args, _, _ in drawn[:2]] == [(3, 0.1)] * 2
    assert made["one_root.png"][1] == 3
    sample.main([str(run.folder), "--n", "3", "--steps", "2", "--node", "2"])
    images, columns = grids[-1][0][1:3]
    assert columns == 3 and len(images[0]) == 9 and images == drawn[-1][2]
    assert (drawn[-1][0][1].nodes == 2).any(1).all() and "node_2.png" in capsys.readouterr().out
    assert (run.folder / "node_2.png").read_bytes()[:4] == b"\x89PNG"


def test_the_defaults_and_the_seed(run, monkeypatch):
    seen = []

    def fake(run, path, *how):
        seen.append((path.z, *how))
        return torch.rand(len(path.z), 1, 28, 28), None
    monkeypatch.setattr(sample, "draw_images", fake)
    for seed in ([], ["--seed", "0"], ["--seed", str(2**99 + 1)]):
        sample.main([str(run.folder), "--node", "1", *seed])
    assert seen[0][0].shape[0] == 64 and seen[0][1:] == (100, 0.0)
    assert torch.equal(seen[0][0], seen[1][0]) and not torch.equal(seen[0][0], seen[2][0])


@pytest.mark.parametrize("argv", [["--n", "0"], ["--n", "65"], ["--eta", "-0.1"], ["--eta", "1.1"],
                                  ["--steps", "0"], ["--steps", "1001"], ["--node", "5"]])
def test_a_wrong_flag_is_one_sentence(run, argv, capsys):
    with pytest.raises(SystemExit) as stop:
        sample.main([str(run.folder), *argv])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert not list(run.folder.iterdir())
