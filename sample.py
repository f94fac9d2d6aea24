"""Every picture of a finished run, into its folder.

    python sample.py runs/fashion             the pictures below
    python sample.py runs/fashion --node 2    node_2.png: new images below node 2

tree.png: the tree, new images and the classes at its leaves
leaves.png: new images of each leaf, by decoder and by diffusion
one_root.png: Figure 4, one z_0 and x_T for all leaves
reconstructions.png: test images, and what both make of their paths
denoising.png: an image of each leaf as it leaves the noise
growth.gif: its splits in turn
curves.png: the losses of both stages
"""

import argparse
import csv

import numpy as np
import torch
from matplotlib.animation import PillowWriter
from matplotlib.figure import Figure
from torchvision.utils import make_grid

import train
from diffusion import autocast
from treevae import Path

# Okabe and Ito's for the colour-blind, and two more
COLOURS = "#0072b2 #e69f00 #009e73 #cc79a7 #56b4e9 #d55e00 #f0e442 #000000 #999999 #8b5a2b".split()
TITLES = "test images", "TreeVAE's decoder", "diffusion"
PIXELS = 200_000  # through a network at once: 255 images of 28 x 28


def draw_images(run, path, steps, eta, x_T=None, seen=None):
    """Images of n paths by decoder and by diffusion, None without stage 2: (n, C, H, W) in [0, 1].
    x_T: the noise. seen: a list, to which each batch adds DDIM's (t, x_t, x0^)."""
    if x_T is None:
        x_T = torch.randn(len(path.z), *run.tree.image_shape)  # on the CPU: the same on any device
    decoded, denoised = [], []
    for rows in torch.arange(len(x_T)).split(PIXELS // x_T[0, 0].numel()):
        part, noise = Path(path.z[rows], path.nodes[rows]), x_T[rows].to(run.device)
        decoded.append(run.tree.decode(part).cpu())
        if run.networks:
            with autocast(run.device):
                net, y = train.conditioned(run.config, run.diffusion, run.networks, run.tree, part)
                x = run.diffusion.ddim_sample(net, noise.shape, y, steps, eta, x_T=noise, seen=seen)
            denoised.append((x.cpu() + 1) / 2)  # [-1, 1] -> [0, 1]
    return torch.cat(decoded), torch.cat(denoised) if denoised else None


def paths_to_leaves(run, n, nodes=None):
    """A Path: n new paths to each leaf, or through each of `nodes`. First those of a pool of prior
    samples that pass the node; if fewer than n, the likeliest others are sent there."""
    tree, rows, columns = run.tree, [], []
    z = tree.sample_latents(max(2048, 4 * n))  # {node: (pool, c, r, r)}
    probs = tree.prior_leaf_probs(z)  # (pool, n_leaves)
    sampled = probs.multinomial(1).squeeze(1)  # (pool,) each path's leaf, a column of probs
    for node in nodes or tree.leaves:
        below = torch.tensor([node in tree.path_to(i) for i in tree.leaves], device=run.device)
        passed = below[sampled]  # (pool,) bool
        score = torch.where(passed, 2.0, (probs * below).sum(1))  # 2 > P_p(node | z)
        likely = probs.masked_fill(~below, -torch.inf).argmax(1)  # the others' leaf
        rows.append(score.argsort(descending=True, stable=True)[:n])
        columns.append(torch.where(passed, sampled, likely)[rows[-1]])
    z = {i: z_i[torch.cat(rows)] for i, z_i in z.items()}
    return tree.pick_path(z, torch.cat(columns))


def one_root(run, steps, n=4):
    """Figure 4, as `draw_images`; row k * n_leaves + l is leaf l of sample k."""
    n_leaves = len(run.tree.leaves)
    # z does not depend on the decisions: the paths of a sample share z where they share a node
    z = run.tree.sample_latents(n)  # {node: (n, c, r, r)}
    z = {i: z_i.repeat_interleave(n_leaves, 0) for i, z_i in z.items()}
    path = run.tree.pick_path(z, torch.arange(n_leaves, device=run.device).repeat(n))
    x_T = torch.randn(n, *run.tree.image_shape).repeat_interleave(n_leaves, 0)  # x_T, too
    return draw_images(run, path, steps, 0.0, x_T)  # eta = 0: no other noise


def denoising(run, steps, eta):
    """x_t of an image of each leaf at up to 19 of DDIM's times, then the image: (n_leaves,
    columns, C, H, W) in [0, 1]; and the times, in 1..T."""
    seen = []
    _, images = draw_images(run, paths_to_leaves(run, 1), steps, eta, seen=seen)
    times = run.diffusion.ddim_times(steps)[::-max(1, steps // 10)]  # noisiest first
    # `seen` has each time once for every batch of leaves
    noisy = [torch.cat([x.cpu() for t, x, _ in seen if t == time]) for time in times]
    columns = [((x + 1) / 2).clamp(0, 1) for x in noisy] + [images]
    return torch.stack(columns, 1), [t + 1 for t in times]


def count_test_images(run):
    """Test images by most probable leaf and true class: (n_leaves, n_classes)."""
    leaf = train.leaf_probs(run.tree, run.data.test_images.to(run.device)).argmax(1).cpu()
    counts = np.zeros((len(run.tree.leaves), max(1, len(run.data.classes))))
    np.add.at(counts, (leaf, run.data.test_labels), 1)
    return counts


def draw_grids(file, images, columns, rows=(), heads=(), stacked=False, titles=TITLES[1:]):
    """A grid of each (n, C, H, W) in images, if not None; rows, heads: labels left and on top."""
    grids = [x for x in images if x is not None]
    n, _, side, _ = grids[0].shape
    down, across = (len(grids), 1) if stacked else (1, len(grids))
    size = across * max(2, 0.6 * columns) + 0.7, down * (0.6 * n / columns + 0.5)  # inches
    figure = Figure(size, layout="constrained")
    for ax, title, x in zip(figure.subplots(down, across, squeeze=False).flat, titles, grids):
        grid = make_grid(x, columns, padding=1, pad_value=1)  # grey -> three equal channels
        ax.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
        ax.set_title(title, size=10)
        ax.set_yticks((side + 1) * (np.arange(len(rows)) + 0.5), rows)
        ax.set_xticks((side + 1) * (np.arange(len(heads)) + 0.5), heads)
        ax.tick_params(length=0, labeltop=True, labelbottom=False, labelsize=8)
        ax.spines[:].set_visible(False)
    figure.savefig(file, dpi=150, bbox_inches="tight")


def draw_tree(ax, parents, leaves, shares, images, title):
    """A tree; a leaf is 1 wide. Below leaf k: images[k] (n, C, H, W) in [0, 1], its share."""
    place = {leaf: (k, 0.0) for k, leaf in enumerate(leaves)}  # {node: (x, y)}
    for i in reversed(range(len(parents))):  # children first
        children = [place[j] for j, parent in enumerate(parents) if parent == i]
        if children:
            x, y = np.mean(children, 0)[0], np.max(children, 0)[1] + 0.6  # between, above
            place[i] = (x, y)
            ax.text(x, y, i, size=7, ha="center", va="center", bbox=dict(boxstyle="circle", fc="w"))
            for x_j, y_j in children:
                ax.plot([x, x_j, x_j], [y, y, y_j], color="0.6")
    n = images.shape[1]
    for k, leaf in enumerate(leaves):
        strip = make_grid(images[k], 1, padding=1, pad_value=1).permute(1, 2, 0)
        ax.imshow(strip.numpy(), extent=(k - 0.47, k + 0.47, -n + 0.03, -0.03))
        ax.text(k, -n, f"leaf {leaf}: {shares[k]:.0%}", size=8, ha="center", va="top")
    ax.set(xlim=(-0.55, len(leaves) - 0.45), ylim=(-n - 0.25, place[0][1] + 0.3), aspect="equal")
    ax.set_title(title, size=10)
    ax.axis("off")


def draw_leaf_classes(run, counts, file, steps, eta=0.0):
    """tree.png, or Figure 5: the tree, three new images of each leaf, bars of the classes in
    counts {title: (n_leaves, n_classes)}."""
    decoded, denoised = draw_images(run, paths_to_leaves(run, 3), steps, eta)
    images = (decoded if denoised is None else denoised).unflatten(0, (-1, 3))
    shares = count_test_images(run).sum(1) / len(run.data.test_images)
    ax = Figure().add_axes((0, 0, 1, 1))
    draw_tree(ax, run.tree.parents, run.tree.leaves, shares, images,
              "New images, share of the test images, classes")
    y = -3.35  # below three images and the share
    for name, table in counts.items():
        ax.text(-0.55, y, name, size=8, ha="right", va="center")
        for k, row in enumerate(table):
            order = np.argsort(-row)  # the largest class first
            part = row[order] / max(1, row.sum())
            left = k - 0.47 + 0.94 * (part.cumsum() - part)  # its edge
            ax.barh(y, 0.94 * part, 0.18, left, color=np.resize(COLOURS, len(row))[order])
            # The first three names, cut to a leaf's width
            names = [f"{run.data.classes[c][:18]} {p:.0%}" for c, p in zip(order[:3], part) if p]
            ax.text(k - 0.47, y - 0.15, "\n".join(names), size=6.5, va="top", parse_math=False)
        y -= 0.75
    ax.set_ylim(y + 0.2, None)
    ax.figure.set_size_inches(1.4 * np.ptp(ax.get_xlim()), 1.4 * np.ptp(ax.get_ylim()))
    ax.figure.savefig(file, dpi=150, bbox_inches="tight")


def draw_growth(run, file):
    """growth.gif: the tree split by split, with the mean test image of each of its leaves."""
    tree, images = run.tree, run.data.test_images
    probs = train.leaf_probs(tree, images.to(run.device)).cpu()  # (N, n_leaves)
    figure, writer = Figure((0.9 * len(tree.leaves) + 1, 5)), PillowWriter(fps=1)
    with writer.saving(figure, file, dpi=100):
        for size in range(1, len(tree.parents) + 1, 2):  # a split adds two ids
            # Where the path to each of today's leaves ended
            ends = [max(i for i in tree.path_to(leaf) if i < size) for leaf in tree.leaves]
            leaves = list(dict.fromkeys(ends))  # left to right
            reach = torch.stack([probs[:, np.equal(ends, i)].sum(1) for i in leaves], 1)  # P(i; c)
            means = torch.einsum("nl,nchw->lchw", reach / reach.sum(0), images / 255)
            title = f"leaves: {len(leaves)}"
            figure.clear()
            ax = figure.add_axes((0, 0, 1, 0.92))
            draw_tree(ax, tree.parents[:size], leaves, reach.mean(0), means[:, None], title)
            ax.set(xlim=(-0.55, len(tree.leaves) - 0.45), anchor="N")  # one scale for all
            writer.grab_frame()


def draw_curves(log, file):
    """curves.png: stage 1's terms by epoch, stage 2's loss by step."""
    rows = list(csv.DictReader(log.read_text().splitlines()))
    left, middle, right = Figure((13, 3.4), layout="constrained").subplots(1, 3)
    epochs = [row for row in rows if row["elbo"]]
    split = np.array([row["phase"] == "grow" for row in epochs], bool)
    terms = {left: ["elbo", "reconstruction"], middle: ["kl_root", "kl_nodes", "kl_decisions"]}
    for ax, names in terms.items():
        for name in names:
            # A split's terms are those of one branch: no line
            y = np.where(split, np.nan, [float(row[name]) for row in epochs])
            ax.plot(range(1, len(y) + 1), y, ".-", label=name)
        for k in np.flatnonzero(split):  # epoch k + 1
            ax.axvspan(k + 0.5, k + 1.5, color="0.92", lw=0)
        ax.set(xlabel="epoch of stage 1 (grey: only a split trains)", ylabel="nats an image")
    steps = [int(row["step"]) for row in rows if row["loss"]]
    losses = [float(row["loss"]) for row in rows if row["loss"]]
    right.plot(steps, losses, ".-", label="loss")
    right.set(xlabel="step of stage 2", ylabel="loss a pixel")
    for ax in left, middle, right:
        ax.legend(fontsize=8, loc="center")
        ax.set_visible(len(ax.lines[0].get_xdata()) > 0)  # one stage alone was trained
    ax.figure.savefig(file, dpi=150, bbox_inches="tight")


def main(argv=None):
    """Load a run, draw its pictures."""
    parser = argparse.ArgumentParser()
    add = parser.add_argument
    add("run", help="like runs/fashion")
    add("--node", type=int, help="only draw n x n new images below this node or leaf")
    add("--steps", type=int, default=25, help="of DDIM, 1..T (25)")
    add("--eta", type=float, default=1.0, help="DDIM's noise, 0..1 (1); one_root: 0")
    add("--seed", type=int, default=0)
    add("--n", type=int, default=8, help="images a row, 1..64 (8)")
    flags = parser.parse_args(argv)
    run = train.load_run(flags.run)
    folder, tree, T = run.folder, run.tree, run.diffusion.timesteps
    n, node, steps, eta = flags.n, flags.node, flags.steps, flags.eta
    if not (1 <= n <= 64 and 1 <= steps <= T and 0 <= eta <= 1 and node in (None, *tree.ids)):
        train.fail(f"--n must be in 1..64, --steps in 1..{T}, --eta in 0..1, --node in {tree.ids}")
    torch.manual_seed(flags.seed)
    if node is not None:
        file = folder / f"node_{node}.png"
        draw_grids(file, draw_images(run, paths_to_leaves(run, n * n, [node]), steps, eta), n)
        print(f"wrote {file}")
        return
    names = [f"leaf {leaf}" for leaf in tree.leaves]
    counts = {"": count_test_images(run)} if run.data.classes else {}
    draw_leaf_classes(run, counts, folder / "tree.png", steps, eta)
    images = draw_images(run, paths_to_leaves(run, n), steps, eta)
    draw_grids(folder / "leaves.png", images, n, rows=names)
    draw_grids(folder / "one_root.png", one_root(run, steps), len(names), heads=names, stacked=True)
    x = run.data.test_images[:2 * n].to(run.device).float() / 255
    path = tree.infer_path(x, tree.leaf_probs(x).argmax(1))
    images = x.cpu(), *draw_images(run, path, steps, eta)
    draw_grids(folder / "reconstructions.png", images, 2 * n, stacked=True, titles=TITLES)
    if run.networks:
        images, times = denoising(run, steps, eta)
        draw_grids(folder / "denoising.png", [images.flatten(0, 1)], images.shape[1], rows=names,
                   heads=[*times, 0], titles=["x_t, t ="])
    draw_growth(run, folder / "growth.gif")
    draw_curves(folder / "log.csv", folder / "curves.png")
    print(f"wrote the pictures into {folder}")


if __name__ == "__main__":
    train.run(main)
