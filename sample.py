"""Every picture of a finished run, drawn into the run's folder.

    python sample.py runs/fashion              the pictures below
    python sample.py runs/fashion --node 2     more new images below one node or leaf: node_2.png

tree.png             the tree, new images and the classes at its leaves
leaves.png           new images of each leaf, by TreeVAE's decoder and by diffusion
one_root.png         Figure 4: the same z_0 and x_T sent through every leaf
reconstructions.png  test images, and what the decoder and diffusion make of their paths
denoising.png        one image of each leaf on its way out of the noise
growth.gif           the tree after each phase of stage 1
curves.png           the losses of both stages
"""

import argparse
import csv

import numpy as np
import torch
from matplotlib.animation import PillowWriter
from matplotlib.figure import Figure
from torchvision.utils import make_grid

import train
from treevae import Path

# Of the classes: Okabe and Ito's, which colour-blind eyes tell apart, and two more
COLOURS = "#0072b2 #e69f00 #009e73 #cc79a7 #56b4e9 #d55e00 #f0e442 #000000 #999999 #8b5a2b".split()
TITLES = "test images", "TreeVAE's decoder", "diffusion"


def draw_images(run, path, steps, eta, x_T=None, seen=None):
    """Images of n paths, by decoder and by diffusion: two (n, C, H, W) in [0, 1], on the CPU.
    The second is None without a stage 2. x_T: (n, C, H, W), the noise to start from, drawn if
    None. seen: a list for DDIM's (t, x_t, x0^), batch by batch."""
    if x_T is None:
        # All at once, on the CPU: neither batches nor the device change it
        x_T = torch.randn(len(path.z), *run.tree.image_shape)
    decoded, denoised = [], []
    size = train.rows_at_once(run.tree.image_shape)
    for z, nodes, noise in zip(path.z.split(size), path.nodes.split(size), x_T.split(size)):
        part = Path(z, nodes)
        decoded.append(run.tree.decode(part).cpu())
        if run.networks is not None:
            noise = noise.to(run.device)
            with train.autocast(run.device):
                net, y = train.conditioned(run.config, run.diffusion, run.networks, run.tree, part)
                x = run.diffusion.ddim_sample(net, noise.shape, y, steps, eta, x_T=noise, seen=seen)
            denoised.append((x.cpu() + 1) / 2)  # [-1, 1] -> [0, 1]
    return torch.cat(decoded), torch.cat(denoised) if denoised else None


def paths_to_leaves(run, n, nodes=None):
    """n new paths of the prior to each leaf, or through each of `nodes`, in that order: a Path.
    Where fewer than n of the sampled paths pass a node, the most probable others fill up."""
    tree, picked, leaf = run.tree, [], []
    z = tree.sample_latents(max(2048, 4 * n))  # {node: (pool, c, r, r)}
    probs = tree.prior_leaf_probs(z)  # (pool, n_leaves)
    sampled = probs.multinomial(1).squeeze(1)  # (pool,) the leaf of each path
    for node in nodes or tree.leaves:
        below = torch.tensor([node in tree.path_to(leaf) for leaf in tree.leaves]).to(probs.device)
        came = below[sampled]  # (pool,) bool
        # 2 ranks the paths that passed first; the rest follow by P_p(node | z) <= 1
        score = (probs * below).sum(1).masked_fill(came, 2.0)
        picked.append(score.argsort(descending=True, stable=True)[:n])
        # The others go to the most probable leaf below the node
        likely = probs.masked_fill(~below, -1).argmax(1)
        leaf.append(torch.where(came, sampled, likely)[picked[-1]])
    z = {i: z_i[torch.cat(picked)] for i, z_i in z.items()}  # {node: (n * len(nodes), c, r, r)}
    return tree.pick_path(z, torch.cat(leaf))


def one_root(run, steps, n=4):
    """Figure 4, as `draw_images`; row k * n_leaves + l is leaf l of sample k."""
    n_leaves = len(run.tree.leaves)
    # z does not depend on the decisions: draw it at all nodes once, then pick paths out of it.
    # So the leaves of a sample share z at every node that their paths share, and x_T.
    z = run.tree.sample_latents(n)  # {node: (n, c, r, r)}
    z = {i: z_i.repeat_interleave(n_leaves, 0) for i, z_i in z.items()}
    path = run.tree.pick_path(z, torch.arange(n_leaves, device=run.device).repeat(n))
    x_T = torch.randn(n, *run.tree.image_shape).repeat_interleave(n_leaves, 0)
    return draw_images(run, path, steps, 0.0, x_T)  # eta = 0: no other noise


def denoising(run, steps, eta):
    """x_t of an image of each leaf at ten or so of DDIM's times, the image last: (n_leaves,
    columns, C, H, W) in [0, 1]; and the times, of the paper's 1..T."""
    seen = []
    _, images = draw_images(run, paths_to_leaves(run, 1), steps, eta, seen=seen)
    times = sorted({t for t, _, _ in seen})[::-max(1, steps // 10)]  # backwards, from the noise on
    # DDIM passed a time once for each batch of leaves
    noisy = [torch.cat([x.cpu() for t, x, _ in seen if t == time]) for time in times]
    columns = [((x + 1) / 2).clamp(0, 1) for x in noisy] + [images]
    return torch.stack(columns, 1), [t + 1 for t in times]


def count_test_images(run):
    """Test images of each class at their most probable leaf: an array (n_leaves, n_classes)."""
    leaf = train.leaf_probs(run.tree, run.data.test_images.to(run.device)).argmax(1).cpu()
    counts = np.zeros((len(run.tree.leaves), max(1, len(run.data.classes))))  # all 0 if unknown
    np.add.at(counts, (leaf.numpy(), run.data.test_labels.numpy()), 1)
    return counts


def save_figure(figure, file):
    """Write a PNG, atomically."""
    train.replace_file(file, lambda out: figure.savefig(out, dpi=150, bbox_inches="tight"))


def draw_grids(file, images, columns, rows=(), heads=(), stacked=False, titles=TITLES[1:]):
    """Grids of images (n, C, H, W) in [0, 1] beside or above one another, so many columns each;
    none for None. rows, heads: the names of the rows and columns."""
    grids = [x for x in images if x is not None]
    n, _, side, _ = grids[0].shape
    down, across = (len(grids), 1) if stacked else (1, len(grids))
    size = across * max(2, 0.6 * columns) + 0.7, down * (0.6 * n / columns + 0.5)  # inches
    figure = Figure(size, layout="constrained")
    for ax, title, x in zip(figure.subplots(down, across, squeeze=False).flat, titles, grids):
        grid = make_grid(x, columns, padding=1, pad_value=1)  # grey -> three equal channels
        ax.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
        ax.set_title(title, fontsize=10)
        ax.set_yticks((side + 1) * (np.arange(len(rows)) + 0.5), rows)
        ax.set_xticks((side + 1) * (np.arange(len(heads)) + 0.5), heads)
        ax.tick_params(length=0, labeltop=True, labelbottom=False, labelsize=8)
        ax.spines[:].set_visible(False)
    save_figure(figure, file)


def draw_tree(ax, parents, leaves, shares, images, title):
    """A tree, and below leaf k, at x = k, its images (n_leaves, n, C, H, W) in [0, 1] and share."""
    place = {leaf: (k, 0.0) for k, leaf in enumerate(leaves)}
    for i in reversed(range(len(parents))):  # children come before parents
        children = [place[j] for j, parent in enumerate(parents) if parent == i]
        if children:
            x, y = np.mean(children, 0)[0], np.max(children, 0)[1] + 0.6  # in the middle, above
            place[i] = (x, y)
            ax.text(x, y, i, size=7, ha="center", va="center", bbox=dict(boxstyle="circle", fc="w"))
            for x_child, y_child in children:
                ax.plot([x, x_child, x_child], [y, y, y_child], color="0.6", zorder=1)
    n = images.shape[1]
    for k, leaf in enumerate(leaves):
        strip = make_grid(images[k], 1, padding=1, pad_value=1).permute(1, 2, 0)
        ax.imshow(strip.numpy(), extent=(k - 0.47, k + 0.47, -n + 0.03, -0.03))
        ax.text(k, -n, f"leaf {leaf}: {shares[k]:.0%}", fontsize=8, ha="center", va="top")
    ax.set(xlim=(-0.55, len(leaves) - 0.45), ylim=(-n - 0.25, place[0][1] + 0.3), aspect="equal")
    ax.set_title(title, fontsize=10)
    ax.axis("off")


def draw_leaf_classes(run, counts, file, steps=100, eta=0.0):
    """tree.png, Figure 5: three new images of each leaf, share of the test images, and the classes
    of some images: counts {their name: (n_leaves, n_classes)}."""
    decoded, denoised = draw_images(run, paths_to_leaves(run, 3), steps, eta)  # 3 a leaf
    images = (decoded if denoised is None else denoised).unflatten(0, (-1, 3))
    figure, shares = Figure(), count_test_images(run).sum(1) / len(run.data.test_images)
    ax, y = figure.add_axes((0, 0, 1, 1)), -3.35
    draw_tree(ax, run.tree.parents, run.tree.leaves, shares, images,
              "New images, share of the test images, classes")
    for name, table in counts.items():
        ax.text(-0.55, y, name, size=8, ha="right", va="center")
        for k, row in enumerate(table):
            part, order = row / max(1, row.sum()), np.argsort(-row)  # the largest class first
            left = k - 0.47 + 0.94 * (part[order].cumsum() - part[order])  # where a part begins
            colours = np.resize(COLOURS, len(row))[order]
            ax.barh(np.full(len(row), y), 0.94 * part[order], 0.18, left, color=colours)
            # Three names, cut to a leaf's width
            names = [f"{run.data.classes[c][:18]} {part[c]:.0%}" for c in order[:3] if row[c]]
            ax.text(k - 0.47, y - 0.15, "\n".join(names), size=6.5, va="top", parse_math=False)
        y -= 0.75  # the next kind of images
    ax.set_ylim(y + 0.2, None)
    figure.set_size_inches(1.4 * np.ptp(ax.get_xlim()), 1.4 * np.ptp(ax.get_ylim()))
    save_figure(figure, file)


def draw_growth(frames, file):
    """growth.gif: the tree after each phase, for a second each, the last one for four."""
    wide = max(len(frame["leaves"]) for frame in frames)
    figure, writer = Figure((0.9 * wide + 1, 5)), PillowWriter(fps=1)
    part = file.with_name("growth.part.gif")  # the writer wants the name's end
    with writer.saving(figure, part, dpi=100):
        for frame in frames + 3 * frames[-1:]:
            figure.clear()
            ax = figure.add_axes((0, 0, 1, 0.92))
            draw_tree(ax, **frame | {"images": frame["images"][:, None] / 255})
            ax.set(xlim=(-0.55, wide - 0.45), anchor="N")  # the same scale in all frames
            writer.grab_frame()
    part.replace(file)


def draw_curves(log, file, window=5):
    """curves.png: stage 1's terms by epoch, stage 2's loss by step and its mean of so many rows."""
    rows = list(csv.DictReader(log.read_text().splitlines()))  # {column: text}
    figure = Figure((13, 3.4), layout="constrained")
    panels = ["elbo", "reconstruction"], ["kl_root", "kl_nodes", "kl_decisions"], ["loss"]
    for ax, names in zip(figure.subplots(1, 3), panels):
        shown = [row for row in rows if row.get(names[0])]  # no notes, no other stage
        x = [int(row["step"]) if names == ["loss"] else k for k, row in enumerate(shown, 1)]
        for name, colour in zip(names, COLOURS):
            # A split's terms are those of one branch: nan, no line
            y = [np.nan if row["phase"] == "grow" else float(row[name]) for row in shown]
            ax.plot(x, y, ".-", color=colour, label=name)
        for k, row in enumerate(shown, 1):
            if row["phase"] == "grow":
                ax.axvspan(k - 0.5, k + 0.5, color="0.92", lw=0, zorder=0)
        ax.set(xlabel="epoch of stage 1 (grey: only a split trains)", ylabel="nats an image")
        if names == ["loss"]:
            means = [np.mean(y[max(0, k - window):k]) for k in range(1, len(y) + 1)]
            ax.plot(x, means, color=COLOURS[1], lw=2, label="running mean")
            ax.set(xlabel="step of stage 2", ylabel="loss a pixel, eq. (30)")
        ax.legend(fontsize=8, loc="center")  # where the grey is, or above the loss
    save_figure(figure, file)


def main(argv=None):
    """Load a run, draw its pictures."""
    parser = argparse.ArgumentParser(description="Draw every picture of a finished run.")
    add = parser.add_argument
    add("run", help="the folder of a run, such as runs/fashion")
    add("--data-root", help="folder of downloaded data sets (default: the run's)")
    add("--node", type=int, help="only draw new images below this node or leaf, n x n of them")
    add("--steps", type=int, default=100, help="DDIM steps, 1..T (default: 100)")
    add("--eta", type=float, default=0.0, help="DDIM noise, 0..1 (default: 0, none)")
    add("--seed", type=int, default=0, help="of paths and noise (default: 0)")
    add("--n", type=int, default=8, help="images a row, 1..64 (default: 8)")
    add("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    flags = parser.parse_args(argv)
    run = train.load_run(flags.run, flags.device, flags.data_root)
    n, steps, eta, T = flags.n, flags.steps, flags.eta, run.diffusion.timesteps
    folder, tree = run.folder, run.tree
    if not (1 <= n <= 64 and 1 <= steps <= T and 0 <= eta <= 1
            and flags.node in (None, *tree.ids)):
        train.fail(f"--n must be in 1..64, --steps in 1..{T}, --eta in 0..1, --node in {tree.ids}")
    torch.manual_seed(flags.seed % 2**32)  # so any number will do
    if flags.node is not None:
        path = paths_to_leaves(run, n * n, [flags.node])
        draw_grids(folder / f"node_{flags.node}.png", draw_images(run, path, steps, eta), n)
        print(f"wrote {folder}/node_{flags.node}.png")
        return
    names = [f"leaf {leaf}" for leaf in tree.leaves]
    counts = {"": count_test_images(run)} if run.data.classes else {}
    draw_leaf_classes(run, counts, folder / "tree.png", steps, eta)
    images = draw_images(run, paths_to_leaves(run, n), steps, eta)
    draw_grids(folder / "leaves.png", images, n, rows=names)
    draw_grids(folder / "one_root.png", one_root(run, steps), len(names), heads=names, stacked=True)
    x = run.data.test_images[:2 * n].to(run.device).float() / 255
    path = tree.infer_path(x, tree.leaf_probs(x).argmax(1))  # to the most probable leaf
    images = x.cpu(), *draw_images(run, path, steps, eta)
    draw_grids(folder / "reconstructions.png", images, 2 * n, stacked=True, titles=TITLES)
    if run.networks is not None:
        images, times = denoising(run, steps, eta)
        draw_grids(folder / "denoising.png", [images.flatten(0, 1)], images.shape[1], rows=names,
                   heads=[*times, 0], titles=["x_t, t ="])
    draw_growth(run.frames, folder / "growth.gif")
    if (folder / "log.csv").exists():
        draw_curves(folder / "log.csv", folder / "curves.png")
    print(f"wrote tree.png and the other pictures of this run into {folder}")


if __name__ == "__main__":
    train.run(main)
