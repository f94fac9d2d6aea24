"""Train TreeDiffusion: the tree (stage 1), then diffusion on its paths. First read "Training".

    python train.py                      the embedded data set `shapes`, no download
    python train.py --dataset fashion    Fashion-MNIST, downloaded; with --resume it goes on
"""

import argparse
import copy
import json
import math
import pathlib
import sys
import time
from collections import namedtuple
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torchvision import datasets
from torchvision.transforms import functional as TF

from diffusion import Diffusion, UNet, autocast, eps_net, update_average
from path_encoder import SIGNALS, PathEncoder
from treevae import Path, TreeVAE, decision_loss, plan_splits


def fail(sentence):
    """End the program for a user's mistake: one sentence on stderr, exit code 2."""
    print("error:", " ".join(str(sentence).split())[:300], file=sys.stderr)
    raise SystemExit(2)


# == Settings ==

@dataclass
class Config:
    """All settings of a run, as in its config.json. Each is a flag; defaults: tiny, on fashion."""
    dataset: str = "shapes"  # a name in DATASETS, or a folder of images
    preset: str = "tiny"     # or small, the default on a GPU, or paper (Appendix D)
    data_root: str = "data"  # for downloads
    out: str = ""            # the run's folder; empty: runs/<dataset>
    seed: int = 1
    device: str = "auto"     # cuda, mps or cpu; auto: the first there is
    quick: bool = False      # a few steps of each phase
    # stage 1
    latent_channels: int = 8       # of each z_i
    bottom_up_channels: int = 128  # of each d_h and the tree's hidden layers
    representation_dim: int = 1    # r: z_i and d_h are r x r maps
    encoder: str = "cnn"           # cnn or resnet
    decoder: str = "mlp"           # cnn, resnet, or mlp with r = 1
    max_depth: int = 6             # H
    max_leaves: int = 10           # clusters; 1: the root alone, a plain VAE
    initial_epochs: int = 20       # the root and two leaves
    grow_epochs: int = 5           # each split, on its leaf's images
    intermediate_epochs: int = 0   # all parameters, after every third split
    finetune_epochs: int = 12      # all parameters, after growing and pruning
    tree_batch_size: int = 256     # at most; see `batch_size_for`
    grow_batch_size: int = 128     # while only a split trains
    kl_start: float = 0.02         # KL weight at first
    kl_start_later: float = 0.1    # the same after the initial phase
    kl_per_epoch: float = 0.08     # what each epoch adds, up to 1
    contrastive: float = 100.0     # weight of NT-Xent
    plan: float = 30.0             # weight of the decisions' targets; a third in fine-tuning
    # stage 2
    tree: str = ""             # a run: stage 2 alone is trained, on its tree
    condition: str = "path"    # the ablation: leaf, leaf-index, leaf-latent, none
    with_reconstruction: bool = False  # the U-Net also sees the leaf's reconstruction
    unet_channels: int = 16    # at full size
    unet_multipliers: str = "1,2,4"  # of these channels, at each scale
    unet_blocks: int = 1       # residual blocks a scale
    unet_attention: str = ""   # sides of the maps with self-attention
    dropout: float = 0.0
    diffusion_epochs: int = 6  # 0: no stage 2
    diffusion_batch_size: int = 32
    diffusion_lr: float = 4e-3
    warmup_steps: int = 200    # in which that rises from 0
    ema_decay: float = 0.9999  # of the weights' moving average


PRESETS = {
    "tiny": {},
    "small": dict(unet_channels=32, diffusion_epochs=36, diffusion_batch_size=128),
    "paper": dict(  # Appendix D; where it is silent, the authors' configuration files
        latent_channels=16, bottom_up_channels=32, representation_dim=4, decoder="cnn", max_depth=7,
        initial_epochs=150, grow_epochs=150, intermediate_epochs=80, finetune_epochs=200,
        grow_batch_size=256, kl_start=0.5, kl_start_later=0.5, kl_per_epoch=0.001, contrastive=0.0,
        plan=0.0, unet_channels=64, unet_multipliers="1,2,2,2", unet_blocks=2, unet_attention="16",
        dropout=0.3, diffusion_epochs=1000, diffusion_batch_size=256, diffusion_lr=2e-4,
        warmup_steps=5000)}
PAPER_32 = dict(  # over it, at 32 x 32 x 3
    encoder="resnet", decoder="resnet", latent_channels=64, bottom_up_channels=128,
    contrastive=100.0, intermediate_epochs=0, finetune_epochs=0, kl_start=0.01,
    kl_start_later=0.01, kl_per_epoch=0.01, unet_channels=128, unet_attention="16,8")
PAPER_64 = PAPER_32 | dict(  # and at 64 x 64 x 3
    tree_batch_size=128, grow_batch_size=128, unet_multipliers="1,2,2,2,4",
    diffusion_batch_size=32, diffusion_epochs=500)
DRAWN = dict(max_leaves=8, initial_epochs=16, finetune_epochs=16, tree_batch_size=64,
             grow_batch_size=64, kl_per_epoch=0.13, diffusion_epochs=8)  # over tiny
QUICK = dict(max_leaves=5, initial_epochs=2, grow_epochs=2, intermediate_epochs=1,
             finetune_epochs=2, unet_channels=16, diffusion_epochs=1, warmup_steps=5)
HOW_LONG = dict(tiny="10 to 60 minutes on a CPU", small="10 on a GPU", paper="hours on a GPU")
TERMS = "kl_weight elbo reconstruction kl_root kl_nodes kl_decisions contrastive plan loss".split()
COLUMNS = ["seconds", "phase", "node", "epoch", "step", *TERMS, "leaf_shares", "note"]  # log.csv
CHUNK = 50  # steps of stage 2 between two rows of log.csv
SAVE_STEPS = 10 * CHUNK  # of stage 2 between two checkpoints; stage 1: each epoch


def choose_settings(typed):
    """The Config of a new run: preset, then data set, --quick, typed flags; the later one wins."""
    dataset = typed.get("dataset", "shapes")
    on_gpu = torch.cuda.is_available() and typed.get("device") != "cpu"
    preset = typed.get("preset", "small" if on_gpu and dataset[:6] != "shapes" else "tiny")
    row, quick = DATASETS.get(dataset, OWN), QUICK if "quick" in typed else {}
    settings = PRESETS[preset] | (row.paper if preset == "paper" else row.settings)
    return Config(**(settings | quick | typed | dict(preset=preset)))


def batch_size_for(images, batch_size):
    """At most 1/20 of the images, at least 16: small data sets need enough steps and splits."""
    return min(batch_size, max(16, 2 ** int(math.log2(len(images) / 20))))


def kl_weight(config, phase, epoch):
    """The weight of the KL terms of eq. (21): linear in the epoch; the last phase rises to 1."""
    # Small at first: while the decoders cannot draw yet, an informative z costs KL and gains
    # nothing, so q would collapse to the prior (kl_root to 0)
    start = config.kl_start if phase == "initial" else config.kl_start_later
    rate = config.kl_per_epoch
    if phase == "finetune":  # ends at the ELBO's 1
        rate = max(rate, 0.01, 1 / max(1, config.finetune_epochs - 1))
    return min(1.0, start + rate * epoch)


# == Data ==

# images (N, C, H, W) uint8; labels (N,) long, for evaluation; classes: their names, or []
Data = namedtuple("Data", "images labels test_images test_labels classes")
SHAPES = [f"{how} {what}" for how in ("filled", "outlined")
          for what in ("disc", "ellipse", "triangle", "cross")]


def draw_shapes(n, seed, colour):
    """n drawings and their classes, (n,): (n, 1, 28, 28) or, in colour, (n, 3, 32, 32) uint8."""
    rng, side = np.random.default_rng(seed), 32 if colour else 28
    label = rng.integers(0, 8, (n, 1, 1, 1))  # 0..3 filled, 4..7 outlined
    def vary(low, high, channels=1):  # one number per image
        return rng.uniform(low, high, (n, channels, 1, 1))
    y, x = np.mgrid[:side, :side] - (side - 1) / 2  # (side, side), 0 in the middle
    angle, size = vary(-0.15, 0.15), vary(0.94, 1.06)  # (n, 1, 1, 1)
    x, y = x - vary(-1, 1), y - vary(-1, 1)
    u = (x * np.cos(angle) + y * np.sin(angle)) / size
    v = (y * np.cos(angle) - x * np.sin(angle)) / size
    disc = np.hypot(u, v) - 8  # signed distance to the outline, in pixels, negative inside
    ellipse = (np.hypot(u / 12, v / 5) - 1) * 6
    triangle = np.maximum(np.abs(u) * 0.87 - v * 0.5, v) - 5.5
    bar = np.maximum(np.abs(u) - 11, np.abs(v) - 3)
    cross = np.minimum(bar, np.maximum(np.abs(v) - 11, np.abs(u) - 3))
    distance = np.choose(label % 4, [disc, ellipse, triangle, cross])
    distance = np.where(label < 4, distance, np.abs(distance) - vary(1.0, 1.4))
    images = vary(0.85, 1) * np.clip(0.5 - distance, 0, 1)
    if colour:  # any bright shape on any dark ground
        bright, dark = vary(0.5, 1, 3), vary(0, 0.4, 3)
        images = dark + images * (bright - dark)
    return torch.from_numpy((255 * images).astype(np.uint8)), torch.from_numpy(label.ravel())


def load_arrays(config, kind):
    """One of torchvision's data sets that are arrays."""
    parts = []
    for train in (True, False):
        part = kind(config.data_root, train=train, download=True)
        images = torch.as_tensor(part.data)  # (N, H, W), or (N, H, W, 3)
        images = images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2)
        parts += [images.contiguous(), torch.as_tensor(part.targets)]
    return Data(*parts, part.classes)


def load_folder(folder, side=None, box=None):
    """Images in a folder for each class, or in one; box: a crop. A tenth is for testing."""
    folder = pathlib.Path(folder)
    files = [file for file in sorted(folder.rglob("[!.]*"))
             if file.suffix.lower() in datasets.folder.IMG_EXTENSIONS]
    if len(files) < 20:
        raise ValueError("fewer than 20 images")
    np.random.default_rng(0).shuffle(files)  # not class by class
    names = ["".join(file.relative_to(folder).parent.parts[:1]) for file in files]
    classes, labels = np.unique(names, return_inverse=True)
    images = []
    for file in files:
        image = datasets.folder.default_loader(file).crop(box)  # RGB; None: all of it
        image = TF.center_crop(image, min(image.size))
        side = side or min((28, 32, 64), key=lambda known: abs(known - image.width))  # nearest
        images.append(TF.pil_to_tensor(TF.resize(image, [side, side])))
    images, labels, n = torch.stack(images), torch.from_numpy(labels), max(2, len(files) // 10)
    if (images.amin(1) == images.amax(1)).all():  # grey
        images = images[:, :1].contiguous()
    return Data(images[n:], labels[n:], images[:n], labels[:n],
                classes.tolist() if len(classes) > 1 else [])


COLOUR = dict(scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3), flip=0.5, brightness=0.4, contrast=0.4,
              saturation=0.4, hue=0.1, jitter=0.8, grey=0.2, gamma=0.0)  # the paper's
GREY = COLOUR | dict(scale=(0.35, 1.0), brightness=0.5, jitter=1.0, gamma=0.5)


def random_view(config, x, **changes):
    """Images x (B, C, H, W) in [0, 1], cropped, flipped, in other colours, as in torchvision."""
    how = (COLOUR if x.shape[1] == 3 else GREY) | DATASETS.get(config.dataset, OWN).views | changes
    def uniform(low, high):  # torchvision's transforms draw one number for the whole batch
        return torch.empty(len(x), 1, 1, 1, device=x.device).uniform_(low, high)
    area, ratio = uniform(*how["scale"]), uniform(*map(math.log, how["ratio"])).exp()
    width = (area * ratio).sqrt().clamp(max=1)  # of the crop; 1: the whole image's
    height = (area / ratio).sqrt().clamp(max=1)  # (B, 1, 1, 1), as all these numbers
    flip = torch.where(uniform(0, 1) < how["flip"], -1.0, 1.0)  # -1: mirrored
    right, down = uniform(-1, 1) * (1 - width), uniform(-1, 1) * (1 - height)
    theta = torch.cat([width * flip, 0 * width, right, 0 * height, height, down], 1)
    grid = F.affine_grid(theta.view(-1, 2, 3), x.shape, align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    jittered = uniform(0, 1) < how["jitter"]  # or the colours stay as they are
    def factor(strength):
        return torch.where(jittered, uniform(1 - strength, 1 + strength), 1.0)
    x = factor(how["brightness"]) * x
    if x.shape[1] == 3:
        mean = TF.rgb_to_grayscale(x).mean((2, 3), keepdim=True)  # (B, 1, 1, 1)
        x = mean + factor(how["contrast"]) * (x - mean)
        luminance = TF.rgb_to_grayscale(x)  # (B, 1, H, W)
        x = luminance + factor(how["saturation"]) * (x - luminance)
        angle, axis = 2 * math.pi * (factor(how["hue"]) - 1), x.mean(1, keepdim=True)
        cross = (x.roll(1, 1) - x.roll(-1, 1)) / math.sqrt(3)  # hue: Rodrigues' rotation about grey
        x = axis + angle.cos() * (x - axis) + angle.sin() * cross
        x = torch.where(uniform(0, 1) < how["grey"], TF.rgb_to_grayscale(x), x)
    return x.clamp(0, 1) ** uniform(-how["gamma"], how["gamma"]).exp()


# load: Config -> Data; settings go over tiny or small, paper over paper, views over GREY or COLOUR
DataSet = namedtuple("DataSet", "load settings paper views", defaults=[{}, {}, {}])
OWN = DataSet(  # small's batch is too large at 64 x 64
    lambda c: load_folder(c.dataset), dict(diffusion_batch_size=32), PAPER_64)
DATASETS = {
    "shapes": DataSet(
        lambda c: Data(*draw_shapes(8000, 0, False), *draw_shapes(2000, 1, False), SHAPES), DRAWN),
    "shapes-rgb": DataSet(
        lambda c: Data(*draw_shapes(8000, 0, True), *draw_shapes(2000, 1, True), SHAPES),
        DRAWN | dict(tree_batch_size=128, kl_per_epoch=0.08), PAPER_32,
        dict(scale=(0.6, 1.0), ratio=(0.9, 1.1))),  # a disc stays one
    "mnist": DataSet(lambda c: load_arrays(c, datasets.MNIST), views=dict(flip=0.0)),
    "fashion": DataSet(lambda c: load_arrays(c, datasets.FashionMNIST)),
    "cifar10": DataSet(lambda c: load_arrays(c, datasets.CIFAR10), {}, PAPER_32),
    "cifar100": DataSet(lambda c: load_arrays(c, datasets.CIFAR100), {}, PAPER_32),
    "omniglot": DataSet(lambda c: load_folder(  # by alphabet
        datasets.Omniglot(c.data_root, download=True).target_folder, 28), views=dict(flip=0.0)),
    "celeba": DataSet(
        lambda c: load_folder(  # the authors' crop
            datasets.CelebA(c.data_root, download=True).root + "/celeba", 64, (15, 40, 163, 188)),
        OWN.settings, PAPER_64 | dict(diffusion_epochs=200),
        dict(scale=(0.75, 1.0), ratio=(0.8, 1.25), brightness=0.2, contrast=0.2, saturation=0.2,
             hue=0.0, grey=0.0))}


def load_data(config):
    """The data set of a config: drawn, read or downloaded -> Data, on the CPU."""
    try:
        data = DATASETS.get(config.dataset, OWN).load(config)
    except Exception as error:  # no network, a damaged file
        why = "is not in --data-root and cannot be downloaded"
        if config.dataset not in DATASETS:
            why = f"is no folder of images, nor one of {', '.join(DATASETS)}"
        fail(f"--dataset {config.dataset} {why} ({error})")
    some = slice(2048 if config.quick else None)
    return data._replace(images=data.images[some], labels=data.labels[some])


# == Device, networks, files ==

def pick_device(name):
    """The named device, or the first there is of cuda, mps and cpu."""
    if name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else name
    try:
        torch.ones(1, device=name)
    except (RuntimeError, AssertionError) as error:
        fail(f"this torch cannot use --device {name} ({error})")
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA
    return torch.device(name)


def build_tree(config, image_shape, parents):
    """The TreeVAE of a config."""
    likelihood = "gaussian" if image_shape[0] == 3 else "bernoulli"
    return TreeVAE(image_shape, likelihood, config.latent_channels, config.bottom_up_channels,
                   config.representation_dim, config.max_depth, config.encoder, config.decoder,
                   contrastive=config.contrastive > 0, parents=parents)


def build_denoiser(config, tree):
    """The networks of stage 2: {"unet", "path_encoder"}."""
    multipliers = [int(m) for m in config.unet_multipliers.split(",")]
    attention = [int(side) for side in config.unet_attention.split(",") if side]
    unet = UNet(tree.image_shape, config.unet_channels, multipliers, config.unet_blocks,
                attention, config.dropout, tree.image_shape[0] * config.with_reconstruction)
    path_encoder = PathEncoder(tree.latent_shape, len(tree.parents), unet.emb_dim, config.condition,
                               joint=config.preset != "paper")
    return torch.nn.ModuleDict(dict(unet=unet, path_encoder=path_encoder))


def conditioned(config, diffusion, networks, tree, path):
    """Stage 2 given a path, eq. (6): the net eps_psi(x_t, t, y), and y (B, emb_dim) or None."""
    image = 2 * tree.decode(path) - 1 if config.with_reconstruction else None
    return eps_net(diffusion, networks["unet"], image), networks["path_encoder"](*path)


@torch.no_grad()
def leaf_probs(tree, images):
    """P(l; c) of images (N, C, H, W) uint8: (N, n_leaves). The tree must be in eval mode."""
    return torch.cat([tree.leaf_probs(x.float() / 255) for x in images.split(2000)])


def replace_file(path, save):
    """Replace a file atomically: save(file) writes one beside it, which then takes its name."""
    part = pathlib.Path(f"{path}.part")
    with open(part, "wb") as file:
        save(file)
    part.replace(path)


def save_state(folder, state, **changes):
    """Update the state; write checkpoint.pt and log.csv."""
    state.update(changes)
    rows = [["" if row.get(c) is None else str(row[c]) for c in COLUMNS] for row in state["log"]]
    log = "".join(",".join(row) + "\n" for row in [COLUMNS, *rows])
    replace_file(folder / "log.csv", lambda file: file.write(log.encode()))
    replace_file(folder / "checkpoint.pt", lambda file: torch.save(state, file))


def load_file(folder, name):
    """A file of a run's folder: config.json as a Config, or what torch.save wrote."""
    path = pathlib.Path(folder, name)
    try:
        if name == "config.json":
            return Config(**(json.loads(path.read_text()) | dict(out=str(folder))))
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in many ways
        fail(f"{path} is missing or damaged; train.py starts a run, --resume ends one ({error})")


Run = namedtuple("Run", "folder config device data tree networks diffusion")


def load_run(folder, device="auto"):
    """A finished run, in eval mode; data on the CPU; networks: None without stage 2."""
    config, saved = load_file(folder, "config.json"), load_file(folder, "tree.pt")
    device, data, networks = pick_device(device), load_data(config), None
    tree = build_tree(config, data.images.shape[1:], saved["parents"])
    tree.load_state_dict(saved["tree"])
    tree.to(device).requires_grad_(False).eval()
    if config.diffusion_epochs:
        networks = build_denoiser(config, tree).to(device).requires_grad_(False).eval()
        networks.load_state_dict(load_file(folder, "diffusion.pt"))
    return Run(pathlib.Path(folder), config, device, data, tree, networks, Diffusion().to(device))


def live(text, last=False):
    """Redraw the live line; in a log only its last version appears."""
    clear = "\r\033[K" if sys.stdout.isatty() else ""
    if clear or last:
        print(clear + text, end="\n" if last else "", flush=True)


# == Training ==
# `state` is the checkpoint, made in `begin`. n_phases: phases that ended; done: epochs or steps of
# this one; node, rows: a split, its images; target: of decisions; groups: {node: its clusters}.

def report(state, title, row, n_images, began, n_left):
    """Add a row to the log; redraw the live line. n_left: rows to come in this phase."""
    seconds = time.monotonic() - began
    state["seconds"] += seconds
    state["log"].append(dict(seconds=round(state["seconds"]), phase=state["phase"], **row))
    terms = "  ".join(f"{name} {row[name]:.4g}" for name in TERMS if name in row)
    live(f"{title}  {n_left * seconds / 60:.0f} min left  {n_images / seconds:.0f} "
         f"images/s  {terms}", last=n_left == 0)


def train_phase(config, state, tree, images, folder):
    """The epochs of one phase of stage 1: of everything or, in "grow", of a split alone."""
    phase, node, target = state["phase"], state["node"], state["target"]
    rows, batch_size = torch.arange(len(images)), config.tree_batch_size
    if phase == "grow":
        rows, batch_size = state["rows"], config.grow_batch_size
    batch_size = min(batch_size_for(images, batch_size), len(rows))
    n_batches = len(rows) // batch_size  # a last, smaller batch is left out
    n_seen, n_epochs = n_batches * batch_size, getattr(config, f"{phase}_epochs")
    contrast = config.contrastive if target is None else 0  # or a target
    plan = config.plan if phase == "grow" else config.plan / 3  # else a looser hold
    tree.train_only(node)
    optimizer = torch.optim.Adam(tree.parameters(), weight_decay=1e-5, fused=True)
    if state["optimizer"]:
        optimizer.load_state_dict(state["optimizer"])
    for epoch in range(state["done"], n_epochs):
        torch.manual_seed(hash((config.seed, state["n_phases"], epoch)))
        began, sums = time.monotonic(), {}
        weight = kl_weight(config, phase, epoch)
        order = torch.randperm(len(rows))[:n_seen]
        batches = rows[order].to(images.device).split(batch_size)
        if target is not None:
            targets = target[order].to(images.device).split(batch_size)
        for step in range(n_batches):
            lr = 0.5e-3 * (1 + math.cos(math.pi * (epoch + step / n_batches) / n_epochs))
            if config.preset == "paper":
                lr = 1e-3 * 0.1 ** (epoch // 100)
            optimizer.param_groups[0]["lr"] = lr
            x = images[batches[step]].float() / 255  # (B, C, H, W) in [0, 1]
            view = random_view(config, x) if contrast else None
            if config.preset == "paper" and x.shape[1] == 3:  # the ELBO of another view
                x = random_view(config, x)
            loss, terms, visits = tree.loss(x, weight, node, view, contrast)  # eq. (21)
            if target is not None:
                terms["plan"] = decision_loss(tree, visits, targets[step], node)
                loss = loss + plan * terms["plan"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            for name, value in terms.items():
                sums[name] = sums.get(name, 0) + value.detach()  # no .item(): no waiting
        means = {name: round(value.item() / n_batches, 4) for name, value in sums.items()}
        shares = " ".join(f"{k[2:]}:{mean}" for k, mean in means.items() if k.startswith("P_"))
        row = dict(node=node, epoch=epoch + 1, kl_weight=weight, leaf_shares=shares, **means)
        report(state, f"{phase} {epoch + 1}/{n_epochs}", row, n_seen, began, n_epochs - epoch - 1)
        save_state(folder, state, done=epoch + 1, optimizer=optimizer.state_dict(),
                   tree=tree.state_dict())


def next_phase(config, state, tree, images):
    """The algorithm of stage 1: what follows the phase that ended. Grows or prunes the tree."""
    tree.eval()
    ended, n_splits, split = state["phase"], len(tree.parents) // 2 - 1, None
    guided = config.plan > 0 and config.contrastive > 0  # the plan needs features of the contrast
    state |= dict(n_phases=state["n_phases"] + 1, done=0, optimizer=None, node=None, rows=None,
                  target=None, note="")
    probs = leaf_probs(tree, images)
    if ended == "initial" and guided and len(tree.leaves) == 2:  # plan; the root's split anew
        batches = (some.float() / 255 for some in images.split(1000))
        shares, merges = plan_splits(
            tree, batches, lambda x: random_view(config, x, scale=(0.7, 1.0)), config.max_leaves)
        state |= dict(shares=shares.cpu(), merges=merges, groups={0: max(merges, key=len)})
        split = 0, probs[:, 0] >= 0
    elif ended == "grow" and n_splits and n_splits % 3 == 0 and config.intermediate_epochs:
        return state.update(phase="intermediate", target=probs.cpu() if guided else None)
    elif ended != "finetune" and len(tree.leaves) < config.max_leaves:
        least = batch_size_for(images, config.tree_batch_size)
        split = tree.next_split(probs, least, state.get("groups"))
    if split:
        node, has = split  # its new parts train, on its images
        left, right = tree.children_of(node) or tree.grow(node)
        rows = has.cpu().nonzero().squeeze(1)
        if guided:  # its router learns to send clusters to sides
            sides = state["merges"][state["groups"][node]]
            state["groups"] |= {left: sides[0], right: sides[1]}
            shares = state["shares"][rows]  # (n_rows, n_clusters)
            state["target"] = torch.stack([shares[:, list(side)].sum(1) for side in sides], 1)
        note = f"split into {left} and {right} on {len(rows)} images"
        return state.update(phase="grow", node=node, rows=rows, note=note)
    pruned = []  # after growing, and again after fine-tuning
    while (leaf := tree.next_prune(probs)) is not None:
        tree.prune(leaf)
        pruned.append(str(leaf))
        probs = leaf_probs(tree, images)
    follows = "diffusion" if ended == "finetune" or not config.finetune_epochs else "finetune"
    if guided and follows == "finetune":  # P(l; c) is held: the ELBO alone would blur it
        state["target"] = probs.cpu()
    return state.update(phase=follows, note=f"pruned: {' '.join(pruned) or 'nothing'}")


def train_diffusion(config, state, tree, images, folder):
    """Stage 2: the tree is frozen; U-Net and path encoder learn to denoise, given the path."""
    device, paper = images.device, config.preset == "paper"
    batch_size = min(config.diffusion_batch_size, len(images))
    tree.requires_grad_(False).eval()
    torch.manual_seed(hash((config.seed, state["n_phases"], -1)))
    diffusion = Diffusion().to(device)
    networks = build_denoiser(config, tree).to(device)
    average = copy.deepcopy(networks).requires_grad_(False)
    optimizer = torch.optim.Adam(networks.parameters(), fused=True)
    saved = dict(networks=networks, average=average, optimizer=optimizer)
    if state["optimizer"]:
        for name, part in saved.items():
            part.load_state_dict(state[name])
    n_steps = config.diffusion_epochs * (len(images) // batch_size)
    for first in range(state["done"], n_steps, CHUNK):
        torch.manual_seed(hash((config.seed, state["n_phases"], first)))
        began, total, last = time.monotonic(), 0.0, min(first + CHUNK, n_steps)
        rows = torch.randint(len(images), ((last - first) * batch_size,), device=device)
        x = images[rows].float() / 255  # of `CHUNK` steps
        # l ~ P(l; c), eq. (6): the frozen tree's paths for all these steps at once: faster
        parts = [part.split(batch_size) for part in (2 * x - 1, *tree.infer_path(x))]
        for step, (x0, z, nodes) in enumerate(zip(*parts), first):  # of one batch; x0 in [-1, 1]
            lr = config.diffusion_lr * min(1, (step + 1) / max(1, config.warmup_steps))
            if not paper:
                lr = lr * 0.5 * (1 + math.cos(math.pi * step / n_steps))
            optimizer.param_groups[0]["lr"] = lr
            with autocast(device):
                net, y = conditioned(config, diffusion, networks, tree, Path(z, nodes))
                loss = diffusion.loss(net, x0, y, of="eps" if paper else "v")  # eq. (30)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(networks.parameters(), 1.0)
            optimizer.step()
            update_average(average, networks, step, config.ema_decay)
            total = total + loss.detach()
        row = dict(step=last, loss=round(total.item() / (last - first), 6))
        report(state, f"diffusion {last}/{n_steps}", row, len(x), began, (n_steps - last) / CHUNK)
        if last % SAVE_STEPS == 0 or last == n_steps:
            save_state(folder, state, done=last, **{k: v.state_dict() for k, v in saved.items()})
    replace_file(folder / "diffusion.pt", lambda file: torch.save(average.state_dict(), file))


# == From the command line to a finished run ==

def begin(argv):
    """The command line -> Config and state of a new run, or of the one to go on with."""
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    parser.error = fail  # not a list of all flags
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    choices = dict(preset=PRESETS, condition=SIGNALS)
    for f in fields(Config):
        how = dict(type=f.type, choices=choices.get(f.name), help=f"default: {f.default!r}")
        how = dict(action="store_true") if f.type is bool else how
        parser.add_argument("--" + f.name.replace("_", "-"), **how)
    typed = vars(parser.parse_args(argv))
    resume = typed.pop("resume", False)
    config = choose_settings(typed)
    state = dict(phase="initial", n_phases=0, done=0, seconds=0.0, node=None, rows=None,
                 target=None, tree=None, optimizer=None, log=[],
                 parents=[-1, 0, 0] if config.max_leaves > 1 else [-1])
    if config.tree:  # stage 2 alone, on the tree and with the settings of a run
        config = Config(**(asdict(load_file(config.tree, "config.json")) | dict(out="") | typed))
        names = list(asdict(config))
        kept = {"dataset", "preset", *names[names.index("quick"):names.index("tree")]}
        if kept & typed.keys() or not config.diffusion_epochs:
            fail("--tree keeps that run's data, preset, stage 1, and needs --diffusion-epochs > 0")
        state |= load_file(config.tree, "tree.pt") | dict(phase="diffusion")
    for name, value in asdict(config).items():
        if isinstance(value, int) and value < name.endswith(("batch_size", "max_depth")):  # 0, 1
            fail(f"--{name.replace('_', '-')} {value} is too low")
    config.out = config.out or f"runs/{pathlib.Path(config.dataset).name}"
    folder = pathlib.Path(config.out)
    if resume:
        config = load_file(folder, "config.json")
        if asdict(config) != asdict(config) | typed | dict(out=config.out):
            fail(f"{folder} goes on with the settings of its config.json, no others")
        state = load_file(folder, "checkpoint.pt")
    elif (folder / "config.json").exists():
        fail(f"{folder} holds a run: go on with --resume, or name another --out")
    return config, state


def main(argv=None):
    """The recipe: settings, data, stage 1, stage 2."""
    config, state = begin(argv)
    device, folder = pick_device(config.device), pathlib.Path(config.out)
    images = load_data(config).images.to(device)
    torch.manual_seed(hash((config.seed,)))
    tree = build_tree(config, images.shape[1:], state["parents"]).to(device)
    build_denoiser(config, tree)  # a mistake in its settings shows before stage 1
    if state["tree"]:
        tree.load_state_dict(state["tree"])
    folder.mkdir(parents=True, exist_ok=True)
    save_state(folder, state)
    settings = json.dumps(asdict(config), indent=1).encode()
    replace_file(folder / "config.json", lambda file: file.write(settings))
    print(f"{config.dataset}: {len(images)} images {tree.image_shape}; preset {config.preset} on "
          f"{device}, {HOW_LONG[config.preset]}; into {folder}")
    while state["phase"] != "diffusion":  # stage 1
        train_phase(config, state, tree, images, folder)
        torch.manual_seed(hash((config.seed, state["n_phases"], -1)))
        next_phase(config, state, tree, images)
        state["log"].append({name: state[name] for name in ("phase", "node", "note")})
        save_state(folder, state, parents=list(tree.parents), tree=tree.state_dict())
    saved = dict(parents=tree.parents, tree=tree.state_dict())
    replace_file(folder / "tree.pt", lambda file: torch.save(saved, file))
    if config.diffusion_epochs:
        train_diffusion(config, state, tree, images, folder)
    print(f"done; now python sample.py {folder} and python metrics.py {folder}")


def run(main):
    """Run a program: a user's mistake, or Ctrl-C, ends it with one sentence and exit code 2."""
    try:
        main()
    except KeyboardInterrupt:
        fail("stopped; a run in training goes on with train.py --resume and its --out")
    except (OSError, ValueError) as error:
        fail(error)
    except torch.OutOfMemoryError:
        fail("out of memory: halve --tree-batch-size or --diffusion-batch-size in a new --out")


if __name__ == "__main__":
    run(main)
