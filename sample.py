"""Pictures out of a finished run.

    python sample.py runs/fashion              the pictures below, in the run's folder
    python sample.py runs/fashion --leaf 5     new images of one cluster: leaf_5.png
    python sample.py runs/fashion --node 2     new images of all clusters below a node: node_2.png

tree.png           the tree, generated images at every leaf, the leaf's share of the test images and the classes in it
leaves.png         new images of each leaf: TreeVAE's own decoder beside the diffusion model, on the same paths
one_root.png       the same z_0 and the same noise x_T sent through every leaf, even where it would never go (Figure 4 of the paper)
denoising.png      one image of each leaf on its way out of the noise
interpolation.png  one root sample turning into another, the rest of the randomness held, under one leaf
growth.gif         the tree while it grew, a frame after every phase of stage 1
reconstructions.png    test images, their reconstructions by the tree, and by the diffusion model on the same path

metrics.py draws its pictures by this file, too.
"""

import argparse
import math
from pathlib import Path as File

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.animation import FuncAnimation
from torchvision.utils import make_grid

import train
from diffusion import Diffusion, guided
from treevae import Path


# of Okabe and Ito, which colour-blind eyes tell apart, and two more
COLOURS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#000000", "#999999", "#8b5a2b"]


class Painter:
    """A run with the settings of sampling: from paths to images. Its networks are frozen, so nothing here keeps a graph."""

    def __init__(self, folder, device, steps, eta, guidance=0.0, data_root=None, need_diffusion=True):
        self.config, self.device, self.data, self.tree, self.networks = train.load_run(folder, device, data_root, need_diffusion)
        self.diffusion, self.steps, self.eta, self.guidance = Diffusion(self.config.timesteps).to(self.device), steps, eta, guidance

    def noise(self, n):
        """x_T: (n, C, H, W), all at once and on the CPU, so that neither batches nor the device change it."""
        return torch.randn(n, *self.tree.image_shape).to(self.device)

    def draw(self, path, x_T=None, batch_size=64, seen=None, eta=None):
        """Images of n paths: by the tree's decoders and by diffusion; both (n, C, H, W) in [0, 1], on the CPU.

        eta: of DDIM, the painter's if None. seen: a list for what DDIM saw on the way, batch by batch, as `Diffusion.ddim_sample` has it.
        """
        x_T, images = self.noise(len(path.z)) if x_T is None else x_T, []
        for rows in torch.arange(len(path.z), device=self.device).split(batch_size):
            net, y = train.conditioned(self.networks, self.config, self.tree, Path(path.z[rows], path.nodes[rows]))
            with train.autocast(self.config, self.device):
                images.append(self.diffusion.ddim_sample(guided(net, self.guidance), x_T[rows].shape, y, self.steps,
                                                         self.eta if eta is None else eta, x_T=x_T[rows], seen=seen))
        return self.tree.decode(path).cpu(), (torch.cat(images).cpu() + 1) / 2

    def new_paths(self, n, nodes=None, pools=8):
        """n new paths through each of some nodes, by default the leaves in the order of `tree.leaves`.

        Paths are drawn from the prior, `pools` times 4096 at most, and kept by the nodes they come to, so that a leaf's z_0 is one that
        leads there. Where the prior reaches a node too seldom, the missing ones are sent there.
        """
        kept = {node: self.tree.sample_path(0) for node in (self.tree.leaves if nodes is None else nodes)}
        for _ in range(pools):
            paths = self.tree.sample_path(4096)
            for node, some in kept.items():
                rows = (paths.nodes == node).any(1).nonzero().squeeze(1)[:n - len(some.z)]
                kept[node] = join([some, Path(paths.z[rows], paths.nodes[rows])])
            if all(len(some.z) == n for some in kept.values()):
                break
        return join([part for node, some in kept.items() for part in (some, self.tree.sample_path(n - len(some.z), node))])


def join(paths):
    """Several Path, one after another, as one."""
    return Path(*map(torch.cat, zip(*paths)))


def draw_grids(file, size, columns, grids, rows=1, leaves=()):
    """A picture of grids of images, {title: (n, C, H, W) in [0, 1]}, below one another in so many rows; leaves: names of a grid's lines."""
    figure, axes = plt.subplots(rows, len(grids) // rows, figsize=size, layout="constrained", squeeze=False)
    for ax, (title, images) in zip(axes.flat, grids.items()):
        ax.imshow(make_grid(images.clamp(0, 1), columns, padding=1, pad_value=1).permute(1, 2, 0).numpy(), interpolation="nearest")
        for k, leaf in enumerate(leaves):
            ax.text(-3, (k + 0.5) * (images.shape[2] + 1), leaf, ha="right", va="center", fontsize=8)
        ax.set_title(title, fontsize=9)
        ax.axis("off")
    train.save_figure(figure, file)


def draw_tree(painter, images, file):
    """tree.png. images: (n_leaves, n, C, H, W) in [0, 1], generated."""
    tree, data = painter.tree, painter.data
    column = train.leaf_probs(tree, data.test_images.to(painter.device)).argmax(1).cpu()
    shares = (torch.bincount(column, minlength=len(tree.leaves)) / len(column)).tolist()
    figure, ax = plt.subplots(figsize=(1.5 * len(tree.leaves) + 1, 6 + 0.6 * max(map(tree.depth, tree.leaves))))
    bottom = train.draw_tree(ax, tree.parents, tree.leaves, shares, (255 * images[:, :3].clamp(0, 1)).byte())
    if data.classes:
        for k in range(len(tree.leaves)):
            counts = np.bincount(data.test_labels[column == k], minlength=len(data.classes))
            order = counts.argsort()[::-1]                             # one bar: the classes in this leaf, largest first
            width = 0.94 * counts[order] / max(1, counts.sum())
            ax.barh([bottom - 0.15] * len(width), width, 0.22, k - 0.47 + width.cumsum() - width, edgecolor="white", lw=0.3,
                    color=np.resize(COLOURS, len(counts))[order])
            top = [f"{data.classes[c]} {100 * counts[c] / counts.sum():.0f}%" for c in order[:3] if counts[c]]
            ax.text(k, bottom - 0.32, "\n".join(top), ha="center", va="top", parse_math=False,
                    fontsize=6 if max(map(len, data.classes)) < 14 else 5)
        ax.set_ylim(bottom - 0.8, None)
    ax.set_title("Share of the test images at each leaf, the classes in it, and new images that diffusion draws for it", fontsize=9)
    train.save_figure(figure, file)


def draw_denoising(painter, file, columns=10):
    """denoising.png: what DDIM has of one image of each leaf, x_t, at `columns` of its steps, and the image it ends with."""
    seen, path = [], painter.new_paths(1)
    _, drawn = painter.draw(path, batch_size=len(path.z), seen=seen)
    chosen = [seen[int(k)] for k in np.linspace(0, len(seen) - 1, min(columns, len(seen)))]
    rows = torch.cat([torch.stack([(x.cpu() + 1) / 2 for _, x, _ in chosen], 1), drawn[:, None]], 1)
    title = "x_t of one image of each leaf (rows) at t = " + ", ".join(str(t + 1) for t, _, _ in chosen) + ", 0"
    draw_grids(file, (0.62 * rows.shape[1], 0.62 * rows.shape[0] + 0.4), rows.shape[1], {title: rows.flatten(0, 1)})


def draw_interpolation(painter, seed, file, n=10, rows=3):
    """interpolation.png: z_0 from one sample of the first leaf's to another; all further randomness is the same along a row.

    cos(a) z + sin(a) z', a from 0 to a right angle, is as long as samples of N(0, I) are; the middle of a straight line is shorter.
    """
    tree, paths, noise = painter.tree, [], []
    for row, (start, end) in enumerate(painter.new_paths(2 * rows, tree.leaves[:1]).z[:, 0].split(2)):
        noise.append(painter.noise(1).expand(n, -1, -1, -1))
        for angle in torch.linspace(0, math.pi / 2, n):
            torch.manual_seed(seed + row)                              # the z below the root differ by z_0 alone
            paths.append(tree.sample_path(1, tree.leaves[0], (angle.cos() * start + angle.sin() * end)[None]))
        torch.manual_seed(seed + rows + row)
    decoded, drawn = painter.draw(join(paths), torch.cat(noise), eta=0.0)
    both = torch.stack([part.view(rows, n, *tree.image_shape) for part in (decoded, drawn)], 1)
    title = f"From one z_0 to another under leaf {tree.leaves[0]}; TreeVAE above diffusion, {rows} pairs"
    draw_grids(file, (0.62 * n, 0.62 * 2 * rows + 0.4), n, {title: both.flatten(0, 2)})


def draw_leaf_classes(painter, counts, file):
    """leaf_classes.png, Figure 5: the tree, new images at its leaves, and what a classifier sees in all new images of each leaf.

    counts: {who drew: (n_leaves, n_classes)}, the images of each predicted class.
    """
    tree, classes, path = painter.tree, painter.data.classes, painter.new_paths(3)
    images = painter.draw(path)[1] if painter.networks else painter.tree.decode(path).cpu()
    who, of_leaf = list(counts)[-1], next(iter(counts.values())).sum(1)
    figure, ax = plt.subplots(figsize=(1.5 * len(tree.leaves) + 1, 9))
    bottom = train.draw_tree(ax, tree.parents, tree.leaves, of_leaf / of_leaf.sum(),
                             (255 * images.view(len(tree.leaves), 3, *tree.image_shape)).round().byte())
    for name, table in counts.items():
        bottom -= 1.15
        ax.text(-0.6, bottom + 0.5, name, ha="right", va="center", fontsize=7)
        for k, row in enumerate(table):                                # a histogram 0.94 wide and 1 high, its class c at colour c
            x = k - 0.47 + 0.94 * (np.arange(len(row)) + 0.5) / len(row)
            bars = ax.bar(x, row / max(1, row.sum()), 0.8 / len(row), bottom, color=np.resize(COLOURS, len(row)))
            ax.plot([k - 0.47, k + 0.47], [bottom, bottom], color="0.6", lw=0.6)
    ax.set_ylim(bottom - 0.1, None)
    ax.legend(bars, classes, loc="upper center", bbox_to_anchor=(0.5, 0), ncol=5, fontsize=7, frameon=False)
    ax.set_title(f"New images by {who}, and how a classifier divides all new images of a leaf among the classes (bars, 0 to 1):\n"
                 "one high bar is a leaf of one class. In percent: how many of the new images come to the leaf", fontsize=9)
    train.save_figure(figure, file)


def draw_growth_scores(growth, file):
    """growth_scores.png. growth: rows of number of leaves, dendrogram purity, NMI."""
    figure, ax = plt.subplots(figsize=(5.5, 3.2), layout="constrained")
    leaves, *scores = zip(*growth)
    for values, name, marker, colour in zip(scores, ("dendrogram purity", "NMI"), "os", COLOURS):
        ax.plot(leaves, values, marker + "-", label=name, color=colour)
    ax.set(xlabel="leaves", xticks=sorted(set(leaves)), ylim=(0, 1))
    ax.legend()
    ax.set_title("What each split adds: test images in the final tree's clusters,\nmerged to the leaves that the tree had then", fontsize=9)
    train.save_figure(figure, file)


def draw_text(text, file):
    """A picture of a table."""
    figure = plt.figure(figsize=(1, 1))
    figure.text(0, 0, text, family="monospace", fontsize=8)
    train.save_figure(figure, file)


def draw_growth(frames, file):
    """growth.gif: the frames that training left, one a second, the last one longer."""
    figure, ax = plt.subplots(figsize=(8, 5))
    def draw(frame):
        ax.clear()
        train.draw_tree(ax, **frame)
        ax.set(xlim=(-0.6, max(len(frame["leaves"]) for frame in frames) - 0.4), ylim=(-1.7, None))
    film = FuncAnimation(figure, draw, frames + 3 * frames[-1:])
    part = file.with_name("part_" + file.name)                         # the writer goes by the name's end
    film.save(part, writer="pillow", fps=1, dpi=80)
    part.replace(file)
    plt.close(figure)


def main(argv=None):
    """Load a run, draw its pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the folder of a run, such as runs/fashion")
    parser.add_argument("--data-root", help="folder of downloaded data sets (default: the run's)")
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--leaf", type=int, help="only draw new images of this leaf (a node id, as in tree.png)")
    one.add_argument("--node", type=int, help="only draw new images of the leaves below this node")
    parser.add_argument("--steps", type=int, default=100, help="DDIM steps, 1..T (default: 100)")
    parser.add_argument("--eta", type=float, default=0.0, help="DDIM noise: 0 none, 1 as in DDPM (default: 0)")
    parser.add_argument("--guidance", type=float, default=0.0, help="classifier-free guidance, for runs with --drop-condition (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="seed of paths and noise (default: 0)")
    parser.add_argument("--n", type=int, default=8, help="images a row, 1..64 (default: 8)")
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"], help="where to compute (default: auto)")
    flags = parser.parse_args(argv)
    if not (1 <= flags.n <= 64 and 0 <= flags.eta <= 1 and 0 <= flags.seed < 2 ** 31):
        train.fail(f"--n must be in 1..64, --eta in 0..1 and --seed in 0..2147483647, not {flags.n}, {flags.eta} and {flags.seed}")
    folder, painter = File(flags.run), Painter(flags.run, flags.device, flags.steps, flags.eta, flags.guidance, flags.data_root)
    tree, n = painter.tree, flags.n
    if not 0 <= flags.guidance < 100 or flags.guidance and not painter.config.drop_condition:
        train.fail(f"--guidance must be in 0..100, and 0 for a run that was trained without --drop-condition, not {flags.guidance}")
    if not 1 <= flags.steps <= painter.config.timesteps:
        train.fail(f"--steps must be in 1..{painter.config.timesteps}, not {flags.steps}")
    torch.manual_seed(flags.seed)

    kind = "node" if flags.leaf is None else "leaf"
    node = getattr(flags, kind)
    if node is not None:
        if node not in (tree.leaves if kind == "leaf" else tree.ids):
            train.fail(f"this tree has no such node as {node}; its leaves are {tree.leaves}, its nodes {tree.ids}")
        decoded, drawn = painter.draw(painter.new_paths(n * n, [node]))
        file, where = folder / f"{kind}_{node}.png", f"leaf {node}" if kind == "leaf" else f"below node {node}"
        draw_grids(file, (10, 5.3), n, {f"TreeVAE's decoder, {where}": decoded, f"diffusion, {where}": drawn})
        print(f"wrote {file}")
        return

    decoded, drawn = painter.draw(painter.new_paths(n))
    by_leaf = drawn.view(len(tree.leaves), n, *tree.image_shape)
    draw_tree(painter, by_leaf, folder / "tree.png")

    draw_grids(folder / "leaves.png", (0.8 * n, 0.42 * len(tree.leaves) + 0.4), n,
               {"TreeVAE's decoder": decoded, "diffusion, same paths": drawn}, leaves=tree.leaves)

    roots = torch.randn(4, *tree.latent_shape, device=painter.device)
    paths = join([tree.sample_path(len(roots), leaf, roots) for leaf in tree.leaves])
    decoded, drawn = painter.draw(paths, painter.noise(len(roots)).repeat(len(tree.leaves), 1, 1, 1), eta=0.0)
    both = torch.stack([part.view(len(tree.leaves), len(roots), *tree.image_shape).transpose(0, 1) for part in (decoded, drawn)], 1)
    draw_grids(folder / "one_root.png", (0.62 * len(tree.leaves), 6), len(tree.leaves), {
        "As Figure 4: one z_0 and one x_T through every leaf (columns);\n4 samples, TreeVAE above diffusion": both.flatten(0, 2)})

    x = painter.data.test_images[:2 * n].to(painter.device).float() / 255
    decoded, drawn = painter.draw(tree.infer_path(x, tree.leaf_probs(x).argmax(1)))
    draw_grids(folder / "reconstructions.png", (2 * n * 0.6, 2.6), 2 * n,
               {"test images": x.cpu(), "TreeVAE's decoder": decoded, "diffusion": drawn}, rows=3)
    draw_denoising(painter, folder / "denoising.png")
    draw_interpolation(painter, flags.seed, folder / "interpolation.png")
    if state := train.load_state(painter.config):                      # else the run was copied without its checkpoint
        draw_growth(state["frames"], folder / "growth.gif")
    print(f"wrote tree, leaves, one_root, reconstructions, denoising and interpolation.png and growth.gif into {folder}")


if __name__ == "__main__":
    train.run_program(main)
