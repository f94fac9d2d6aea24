"""Train TreeDiffusion from images to samples: first the tree (stage 1), then the diffusion model on its paths (stage 2).

    python train.py                        the embedded data set `shapes`, no download: minutes on a laptop CPU
    python train.py --dataset fashion      Fashion-MNIST, downloaded through torchvision into --data-root
    python train.py --dataset fashion --resume      goes on where it stopped, whatever stopped it
    python train.py --dataset ~/pictures/birds      your own images: a folder of them, or an .npz
    python train.py --tree runs/fashion --condition none --out runs/none      stage 2 alone, on another run's tree
    torchrun --nproc_per_node=2 train.py ...        the same on two GPUs: each has its part of every batch

Everything lands in runs/<dataset> (or --out): config.json, log.csv, tree.pt, diffusion.pt, checkpoint.pt, curves.png and
growth.png. `sample.py` and `metrics.py` take that folder.

Read first `train_tree`, `next_phase`, `train_phase` (the loop of both stages) and `train_diffusion`, then `main`, the recipe. The
settings and data sets above them and the run's files below are for looking things up.
"""

import argparse
import atexit
import contextlib
import csv
import hashlib
import io
import json
import math
import os
import re
import signal
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path as File
from typing import Callable, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import distributed as dist
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torchvision import datasets as sets
from torchvision.transforms import functional as TF

from diffusion import Diffusion, UNet, beside
from path_encoder import SIGNALS, PathEncoder
from treevae import Path, TreeVAE, normalized_cut

try:
    import fcntl
except ImportError:                                                    # Windows
    fcntl = None
    import msvcrt

plt.switch_backend("Agg")                                              # no window


def fail(sentence):
    """End the program with one sentence on stderr and exit code 2: for mistakes of the user, not of the code."""
    print(f"error: {sentence}", file=sys.stderr)
    raise SystemExit(2)


def note(sentence):
    """Say on stderr what is not as the user may expect it, but no reason to stop."""
    if world()[0] == 0:
        print(f"note: {sentence}", file=sys.stderr)


def first_line(error):
    """What an exception says, shortened to one line."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(":. ")


# == Settings: one dataclass; every field is a flag. A preset is a set of other defaults. =============================

def setting(default, help, choices=None, least=0):
    """A field of Config: its default in the preset tiny, its help line, what it may be."""
    return field(default=default, metadata={"help": help, "choices": choices, "least": least})


@dataclass
class Config:
    """All settings of a run; config.json is this, and `python train.py --help` prints it."""
    dataset: str = setting("shapes", "data set: shapes, shapes-rgb (embedded), mnist, fashion, cifar10, cifar100, omniglot, "
                           "omniglot-50, news20 (downloaded), celeba, cubicc (in --data-root), or the path of a folder of images "
                           "or an .npz file")
    preset: str = setting("auto", "sizes and epochs: tiny (a laptop CPU), small (one consumer GPU), paper (Appendix D)", ["auto", "tiny", "small", "paper"])
    data_root: str = setting("data", "folder of downloaded data sets")
    out: str = setting("", "the run's folder; runs/<dataset> if empty")
    seed: int = setting(1, "seed of all randomness")
    image_size: int = setting(0, "side to which images are resized, 28, 32 or 64; 0: the nearest of these", [0, 28, 32, 64])
    max_images: int = setting(0, "train on the first so many images only; 0 means all")
    device: str = setting("auto", "cuda, mps or cpu; auto takes the first there is", ["auto", "cuda", "mps", "cpu"])
    bf16: bool = setting(True, "bfloat16 arithmetic in the U-Net where the device has it")
    compile: bool = setting(False, "train the U-Net through torch.compile: a minute or more to begin with, then faster steps")
    # stage 1: the tree
    latent_channels: int = setting(8, "channels of each z_i", least=1)
    bottom_up_channels: int = setting(128, "channels of each d_h, and of the hidden layers in the tree", least=1)
    representation_dim: int = setting(1, "r: z_i and d_h are r x r maps", [1, 2, 4])
    encoder: str = setting("cnn", "cnn, resnet, or mlp (with r = 1)", ["cnn", "resnet", "mlp"])
    decoder: str = setting("mlp", "the same for the leaves' decoders", ["cnn", "resnet", "mlp"])
    tree_width: int = setting(32, "their size: channels next to the image of a cnn; an mlp has 8 and 4 times as many units", least=1)
    max_depth: int = setting(6, "depth the tree may reach", least=1)
    max_leaves: int = setting(10, "leaves (clusters) the tree may reach; 1: the root alone, a plain VAE", least=1)
    min_share: float = setting(0.01, "leaves with a smaller share of the images do not count towards max_leaves, and are pruned before fine-tuning")
    tree_batch_size: int = setting(256, "images a step when all parameters train; a leaf with fewer images is never split", least=2)
    subtree_batch_size: int = setting(128, "images a step while only a new split trains", least=2)
    tree_lr: float = setting(1e-3, "learning rate of Adam, stage 1")
    tree_lr_decay: str = setting("cosine", "within a phase: cosine (to 0) or step (x0.1 every 100 epochs)", ["cosine", "step"])
    weight_decay: float = setting(1e-5, "weight decay of Adam, stage 1")
    contrastive: float = setting(100.0, "weight of the contrastive loss in the initial phase; 0: no contrastive loss at all")
    contrastive_later: float = setting(0.1, "the share of that weight when all parameters train again, and in splits without a guide")
    augmented_elbo: bool = setting(False, "the ELBO, too, sees random views of the images, as in the paper")
    guide: float = setting(30.0, "weight that makes a new router follow the best cut of its images' features; falls to 0 in half of the split's epochs")
    initial_epochs: int = setting(20, "epochs of the root and its two leaves", least=1)
    subtree_epochs: int = setting(5, "epochs of each new split, on its leaf's images", least=1)
    intermediate_epochs: int = setting(0, "epochs of all parameters after every third split")
    finetune_epochs: int = setting(12, "epochs of all parameters once the tree is grown and pruned")
    kl_start: float = setting(0.02, "KL weight in the first epoch of the initial phase; small, or q collapses to the prior (kl_root to 0)")
    kl_start_later: float = setting(0.1, "the same in all later phases")
    kl_per_epoch: float = setting(0.08, "what an epoch adds to it, up to 1")
    # stage 2: the diffusion model
    tree: str = setting("", "folder of a run whose tree and settings are taken, so that only stage 2 is trained: for comparisons")
    condition: str = setting("path", "what of the tree the U-Net is told, the paper's ablation", list(SIGNALS))
    with_reconstruction: bool = setting(False, "the U-Net also sees the leaf's reconstruction; with --condition none: \"TreeVAE + Diffusion\"")
    drop_condition: float = setting(0.0, "share of images whose condition is dropped in training, for sample.py --guidance")
    unet_channels: int = setting(32, "channels of the U-Net at full size", least=1)
    unet_multipliers: str = setting("1,2,2", "channels at each scale, in multiples of that; comma-separated")
    unet_blocks: int = setting(1, "residual blocks a scale", least=1)
    unet_attention: str = setting("", "sides of the feature maps with self-attention (the middle always has it)")
    dropout: float = setting(0.0, "dropout in the residual blocks")
    timesteps: int = setting(1000, "T, steps of the noise schedule; with far fewer than 1000 the last x_t is not yet pure noise", least=1)
    diffusion_epochs: int = setting(3, "epochs of stage 2; 0 trains only the tree")
    diffusion_batch_size: int = setting(32, "images a step, stage 2", least=1)
    diffusion_lr: float = setting(1e-3, "learning rate of Adam, stage 2")
    diffusion_lr_decay: str = setting("cosine", "cosine (to 0) or constant", ["cosine", "constant"])
    warmup_steps: int = setting(200, "steps in which that rises linearly from 0", least=1)
    grad_clip: float = setting(1.0, "largest norm of the gradient, stage 2")
    ema_decay: float = setting(0.9999, "decay of the weights' moving average, reached through (1 + step) / (10 + step)")

    @property
    def guided(self):
        """Whether splits follow the images' features, which the contrastive loss teaches."""
        return self.guide > 0 and self.contrastive > 0


FREE = ("device", "data_root", "compile")                              # what a resumed run may change
SAVE_SECONDS = 60.0                                                    # between two checkpoints
CACHE_SECONDS = 0.5                                                    # what is decoded faster is not cached
PATHS_AHEAD = 512                                                      # images: of 32 at a time, a path costs 4 times as much
PRESETS = {
    "tiny": {},
    "small": dict(diffusion_epochs=60, unet_channels=64, unet_multipliers="1,2,2,2", unet_blocks=2, unet_attention="16",
                  dropout=0.1, diffusion_batch_size=256, diffusion_lr=4e-4, warmup_steps=1000,
                  initial_epochs=20, subtree_epochs=8, finetune_epochs=24, kl_per_epoch=0.045),
    "paper": dict(latent_channels=16, bottom_up_channels=32, representation_dim=4, encoder="cnn", decoder="cnn", tree_width=32, max_depth=7,
                  max_leaves=10, tree_batch_size=256, subtree_batch_size=256, tree_lr=1e-3, tree_lr_decay="step", initial_epochs=150,
                  subtree_epochs=150, intermediate_epochs=80, finetune_epochs=200, weight_decay=1e-5, kl_start=0.5,
                  kl_start_later=0.5, kl_per_epoch=0.001, contrastive=0.0, guide=0.0, unet_channels=64, unet_multipliers="1,2,2,2",
                  unet_blocks=2, unet_attention="16", dropout=0.3, diffusion_epochs=300, diffusion_batch_size=256,
                  diffusion_lr=2e-4, diffusion_lr_decay="constant", warmup_steps=5000, grad_clip=1.0, ema_decay=0.9999),
}
PAPER_COLOUR = dict(encoder="resnet", decoder="resnet", latent_channels=64, bottom_up_channels=128, contrastive=100.0,
                    contrastive_later=1.0, augmented_elbo=True, intermediate_epochs=0, finetune_epochs=0, kl_start=0.01, kl_start_later=0.01,
                    kl_per_epoch=0.01, unet_channels=128, unet_attention="16,8")                 # over "paper" at 32x32x3
PAPER_64 = PAPER_COLOUR | dict(tree_batch_size=128, subtree_batch_size=128, unet_multipliers="1,2,2,2,4", diffusion_batch_size=32)
VECTORS = dict(encoder="mlp", decoder="mlp", representation_dim=1, contrastive=0.0, guide=0.0, augmented_elbo=False,
               diffusion_epochs=0)                                                               # all that vectors allow
DRAWN = dict(max_leaves=8, initial_epochs=16, finetune_epochs=8, tree_batch_size=64, subtree_batch_size=64,
             kl_per_epoch=0.13, diffusion_epochs=8, diffusion_batch_size=32, diffusion_lr=1e-3, warmup_steps=200, unet_channels=16,
             unet_blocks=1, unet_multipliers="1,2,4")
DRAWN_RGB = DRAWN | dict(initial_epochs=15, tree_batch_size=128, kl_per_epoch=0.08)
QUICK = dict(max_images=2048, max_leaves=5, initial_epochs=2, subtree_epochs=2, intermediate_epochs=1,
             finetune_epochs=2, tree_batch_size=64, subtree_batch_size=32, unet_channels=16, diffusion_epochs=1, warmup_steps=5)
HOW_LONG = {"tiny": "shapes takes about 6 minutes on two cores without a GPU, fashion or mnist about 30",
            "small": "made for some 10 minutes on a consumer GPU, but not measured yet",
            "paper": "some 2,000 epochs of stage 1 and 300 of stage 2: many hours on a GPU"}


# == Data: everything in memory as uint8, on the training device; labels are for looking at results only ==============

class Data(NamedTuple):
    """images: (N, C, H, W) uint8, or vectors (N, n) in steps of 1/255; labels: (N,) long; each for training and for testing.

    classes: the labels' names; [] where there are none, and the labels all 0. views: for `random_view`. words: what the n numbers of a
    vector count.
    """
    images: torch.Tensor
    labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    classes: list
    views: "Views" = None
    words: list = None


SHAPES = [f"{how} {what}" for how in ("filled", "outlined") for what in ("disc", "ellipse", "triangle", "cross")]


def draw_shapes(n, seed, colour=False):
    """n drawings and their classes, (n,) long: grey, (n, 1, 28, 28) uint8, or in colour, (n, 3, 32, 32).

    The true tree: filled or outlined, then round (disc, ellipse) or angular (triangle, cross), then the shape itself.
    Position, size, rotation, stroke and brightness vary, but less within a class than between classes. In colour, shape and
    ground have any bright and any dark colour, which says nothing about the class.
    """
    rng, side = np.random.default_rng(seed), 32 if colour else 28
    label = rng.integers(0, 8, n)
    def vary(low, high):
        return rng.uniform(low, high, (n, 1, 1))
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    angle, size = vary(-0.15, 0.15), vary(0.94, 1.06)
    x, y = x - vary(-1, 1), y - vary(-1, 1)
    u, v = (x * np.cos(angle) + y * np.sin(angle)) / size, (y * np.cos(angle) - x * np.sin(angle)) / size
    # signed distances to the outline, in pixels, negative inside
    disc = np.hypot(u, v) - 8
    ellipse = (np.hypot(u / 12, v / 5) - 1) * 6
    triangle = np.maximum(np.abs(u) * 0.87 - v * 0.5, v) - 5.5
    cross = np.minimum(np.maximum(np.abs(u) - 11, np.abs(v) - 3), np.maximum(np.abs(v) - 11, np.abs(u) - 3))
    distance = np.choose((label % 4)[:, None, None], [disc, ellipse, triangle, cross])
    outlined = (label >= 4)[:, None, None]
    distance = np.where(outlined, np.abs(distance) - vary(1.0, 1.4), distance)
    images = (vary(0.85, 1) * np.clip(0.5 - distance, 0, 1))[:, None]
    if colour:
        bright, dark = rng.uniform(0.5, 1, (n, 3, 1, 1)), rng.uniform(0, 0.4, (n, 3, 1, 1))
        images = dark + images * (bright - dark)
    return torch.from_numpy((255 * images).astype(np.uint8)), torch.from_numpy(label)


def fetch(config, read, download):
    """read(data_root); what it does not find there is downloaded into a folder of its own, then moved to data_root."""
    root, missing = File(config.data_root), "there is nothing"
    try:
        if found := read(root):
            return found
    except Exception as error:                                         # a damaged file shows itself in many ways
        missing = first_line(error)
    fresh = [path for path in [root, *root.parents] if not path.exists()]
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download_", dir=root) as part, contextlib.redirect_stdout(io.StringIO()):
            download(part)
            for path in filter(File.is_file, File(part).rglob("*")):
                target = root / path.relative_to(part)
                target.parent.mkdir(parents=True, exist_ok=True)
                path.replace(target)
        return read(root)
    except Exception as error:
        fail(f"{config.dataset} can be neither read from {str(root)!r} ({missing}) nor downloaded ({first_line(error)}); "
             "connect to the network once, or point --data-root at a folder that has it")
    finally:
        for path in fresh:                                             # no trace of a download that failed
            with contextlib.suppress(OSError):
                path.rmdir()


def load_arrays(kind, config):
    """One of torchvision's data sets that are arrays."""
    def read(folder, download=False):
        return [kind(folder, train=train, download=download) for train in (True, False)]
    train, test = fetch(config, read, lambda folder: read(folder, download=True))
    arrays = [array for part in (train, test) for array in as_images(part.data, config.data_root, part.targets)]
    return Data(*map(torch.as_tensor, arrays), train.classes)


class CIFAR20(sets.CIFAR100):
    """CIFAR-100 by its 20 superclasses. torchvision reads the 100 fine labels alone; a letter here is the superclass of each."""
    meta = sets.CIFAR100.meta | {"key": "coarse_label_names"}
    superclass = "eboiaghhsddojshldjhlglfkhgnpdpalbkmoqjlfftiipnorskqerecaresrkdcmmqmbjtckabqmjnpnqtcegtffitsbcpgarion"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.targets = [ord(self.superclass[fine]) - ord("a") for fine in self.targets]


def image_files(folder):
    """The paths of all image files in a folder and the folders in it, sorted, without hidden ones."""
    return sorted(os.path.join(at, name) for at, _, names in os.walk(folder) for name in names
                  if name.lower().endswith(sets.folder.IMG_EXTENSIONS) and not name.startswith("."))


def cached(config, source, files, make):
    """make(), made of files, or what it gave before, if that took long and no file was changed since.

    The cache lies next to the source, or in data_root where that cannot be written; it is checked like any other file.
    """
    name = File(config.dataset).name + f"_{config.image_size}" * bool(config.image_size) + ".cache"
    places = [source.parent / name, File(config.data_root) / name]
    stamps = [(path, (file := os.lstat(path)).st_size, file.st_mtime_ns) for path in files]
    key = hashlib.sha256(repr(("turned", stamps)).encode("utf-8", "surrogateescape")).hexdigest()
    for place in places:
        with contextlib.suppress(Exception):                           # there is none, or it is damaged
            if (saved := read_saved(place))["key"] == key:
                return saved["made"]
    began, made = time.monotonic(), make()
    if time.monotonic() - began > CACHE_SECONDS and world()[0] == 0:
        for place in places:
            with contextlib.suppress(OSError):
                place.parent.mkdir(parents=True, exist_ok=True)
                replace_file(place, lambda file: torch.save(dict(key=key, made=made), file))
                break
    return made


def nearest(side):
    """The side that images of another side are resized to: 28, 32 or 64, which halve down to 4."""
    return min((28, 32, 64), key=lambda known: abs(known - side))


def decode(path, crop, side=None):
    """An image file's middle square, of at most crop pixels, resized -> (3, side, side) uint8; or why it cannot be read."""
    try:
        with open(path, "rb") as file:
            if re.match(rb"\x89PNG.{20}\x10\0", file.read(26), re.DOTALL):      # which the loader would cut off at 255
                return "16 bits a pixel, 8 are wanted"
        image = sets.folder.default_loader(path)
        with contextlib.suppress(Exception):                           # EXIF's orientation, if it can be read, as Pillow's transposes
            image = image.transpose({2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}[image.getexif()[274]])
        image = TF.center_crop(image, min(crop, *image.size))
        return TF.pil_to_tensor(TF.resize(image, [side, side]) if side else image)
    except Exception as error:                                         # a damaged file shows itself in many ways
        return first_line(error).partition(" <")[0]


def read_images(config, source, files, crop=10 ** 9):
    """Decode image files, with a live count -> (N, C, side, side) uint8, grey if all are; the N files that could be read."""
    def make():
        some = [x for x in (decode(path, crop) for path in files[::1 + len(files) // 20]) if torch.is_tensor(x)]
        side = config.image_size or nearest(np.median([x.shape[1] for x in some] or [28]))
        images, good, bad, shown = torch.empty(len(files), 3, side, side, dtype=torch.uint8), [], [], time.monotonic()
        with ThreadPoolExecutor() as pool:
            for start in range(0, len(files), 500):                    # not all at once: an interruption waits for what was begun
                part = files[start:start + 500]
                for path, x in zip(part, pool.map(lambda path: decode(path, crop, side), part)):
                    if torch.is_tensor(x):
                        images[len(good)] = x
                        good.append(path)
                    else:
                        bad.append(f"{os.path.relpath(path, source)!r} ({x})")
                if time.monotonic() - shown > pause():
                    shown = time.monotonic()
                    show(f"{source}: decoded {start + len(part)} of {len(files)} images")
        show(f"{source}: decoded {len(good)} images; the middle square of each is now {side} x {side}", last=True)
        images = images[:len(good)]
        grey = all((x[:, :1] == x[:, 1:]).all() for x in images.split(1000))
        return dict(images=images[:, :1].clone() if grey else images, files=good, bad=bad)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*decompression bomb")
        made = cached(config, source, files, make)
    if made["bad"]:
        names = ", ".join(made["bad"][:5] + ["..."] * (len(made["bad"]) > 5))
        note(f"{len(made['bad'])} of {len(files)} images cannot be read and are left out: {names}")
    if not made["files"]:
        fail(f"there is no image in {str(source)!r}; give it files such as .png or .jpg")
    return made["images"], made["files"]


def divide(images, names, test=None, groups=None, every=10):
    """Data of images (N, ...) and their classes' names (N,), in an order that is random but always the same.

    test: (N,) bool, which images are for testing. If there is none, every so-many-th of each group, by default of each class;
    if that leaves none for testing, all are for both.
    """
    classes, labels = np.unique(names, return_inverse=True)
    classes, labels = [str(name).encode("utf-8", "replace").decode() for name in classes], torch.from_numpy(labels)
    if len(classes) == 1 and classes[0]:
        note(f"there is one class only, {classes[0]!r}: the labels say nothing and are left out")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    if test is None or not any(test):
        groups = labels if groups is None else torch.from_numpy(np.unique(groups, return_inverse=True)[1])
        test = torch.zeros(len(labels), dtype=torch.bool)
        test[order[groups[order].argsort(stable=True)][every - 1::every]] = True
    test = torch.as_tensor(test)[order]
    a, b = order[~test], order[test] if test.any() else order
    return Data(images[a], labels[a], images[b], labels[b], classes if len(classes) > 1 else [])


def load_omniglot(config):
    """Omniglot: the classes are alphabets, TreeVAE's five or all 50; a fifth of each character's drawings is for testing."""
    files = fetch(config, lambda root: image_files(root / "omniglot-py"),
                  lambda folder: [sets.Omniglot(folder, background, download=True) for background in (True, False)])
    five = ("Bengali", "Braille", "Glagolitic", "Old_Church_Slavonic_(Cyrillic)", "Oriya")
    files = [path for path in files if config.dataset == "omniglot-50" or path.split(os.sep)[-3] in five]
    images, files = read_images(config, File(config.data_root) / "omniglot-py", files)
    places = [path.split(os.sep)[-3:-1] for path in files]             # Oriya, character07
    return divide(images, [alphabet for alphabet, _ in places], groups=list(map("/".join, places)), every=5)


def load_celeba(config):
    """CelebA's aligned faces, the middle 148 x 148 of 178 x 218 pixels, without labels."""
    def read(root):
        rows = (root / "celeba" / "list_eval_partition.txt").read_text().splitlines()
        return {name: part for name, part in map(str.split, rows)}, image_files(root / "celeba" / "img_align_celeba")
    part_of, files = fetch(config, read, lambda folder: sets.CelebA(folder, "all", download=True))
    images, files = read_images(config, File(config.data_root) / "celeba", files, crop=148)
    return divide(images, [""] * len(files), [part_of.get(os.path.basename(path)) == "2" for path in files])


def load_news20(config):
    """20 Newsgroups by date as vectors of 2,000 TF-IDF features, those of sklearn's TfidfVectorizer(max_features=2000)."""
    def read(root):
        return [str(path) for part in ("train", "test") for path in sorted((root / f"20news-bydate-{part}").glob("*/*"))]
    url, md5 = "http://qwone.com/~jason/20Newsgroups/20news-bydate.tar.gz", "d6e9e45cb8cb77ec5276dfa6dfc14318"
    files = fetch(config, read, lambda folder: sets.utils.download_and_extract_archive(url, folder, md5=md5))
    places = [path.split(os.sep)[-3:] for path in files]               # 20news-bydate-train, sci.space, 60821
    test = np.array([part.endswith("test") for part, _, _ in places])
    def make():
        texts = [Counter(re.findall(r"\b\w\w+\b", File(path).read_text("latin-1").lower())) for path in files]
        counts = Counter(word for text, held_out in zip(texts, test) if not held_out for word in text.elements())
        words = sorted(sorted(counts, key=lambda word: (-counts[word], word))[:2000])
        column, x = {word: j for j, word in enumerate(words)}, np.zeros((len(texts), len(words)), np.float32)
        for row, text in zip(x, texts):
            for word in text.keys() & column.keys():
                row[column[word]] = text[word]
        x *= np.log((1 + (~test).sum()) / (1 + (x[~test] > 0).sum(0))) + 1
        x /= np.linalg.norm(x, axis=1, keepdims=True).clip(min=1)      # only that of a text without these words is below 1
        return dict(x=torch.from_numpy((255 * x).round().astype(np.uint8)), words=words)
    made = cached(config, File(files[0]).parents[1], files, make)
    return divide(made["x"], [group for _, group, _ in places], test)._replace(words=made["words"])


def as_images(x, where, labels=None):
    """Images in any usual shape and range -> (N, C, H, W) uint8, and labels, (N,) numbers or names, "" where there are none."""
    x = np.asarray(x)
    x = x[:, None] if x.ndim == 3 else np.moveaxis(x, 3, 1) if x.ndim == 4 and x.shape[3] in (1, 3) else x
    if x.ndim != 4 or x.shape[1] not in (1, 3) or 0 in x.shape or x.dtype.kind not in "buif":
        fail(f"the images in {where} must be numbers of shape (N, H, W), (N, H, W, 3) or (N, 3, H, W), not {x.dtype} of shape {x.shape}")
    low, high = x.min(), x.max()
    if not 0 <= low <= high <= 255:                                    # NaN is not either
        fail(f"the pixels of the images in {where} must be in 0..1 or in 0..255; they are in {low}..{high}")
    if x.dtype != np.uint8 or high <= 1:
        x = (x * np.float32(255 if high < 1.01 else 1)).round().clip(0, 255).astype(np.uint8)    # 1.0000001 is 1
    labels = np.asarray([""] * len(x) if labels is None else labels)
    if labels.shape != (len(x),) or labels.dtype.kind not in "biuU":
        fail(f"the labels in {where} must be {len(x)} whole numbers or names, one an image, not {labels.dtype} of shape {labels.shape}")
    return torch.from_numpy(np.ascontiguousarray(x)), labels


def load_folder(config, folder):
    """A folder of image files, with a folder for each class or not, in train/ and test/ or not; or of CUBICC's tensors."""
    if (folder / "images.pt").exists():
        images, labels = (torch.load(folder / f"{name}.pt", weights_only=True).numpy() for name in ("images", "labels"))
        train, *test = (np.load(folder / f"{part}_split.npy", allow_pickle=False) for part in ("train", "validation", "test"))
        rows = np.concatenate([train, *test])
        images, labels = as_images(images, folder, labels.squeeze())
        return divide(images[rows], labels[rows], np.arange(len(rows)) >= len(train))
    folders = {path.name for path in folder.iterdir() if path.is_dir()}         # a class, too, may be called train
    parts = [folder / "train", folder / "test"] if {"train", "test"} <= folders or folders == {"train"} else [folder]
    images, files = read_images(config, folder, [path for part in parts for path in image_files(part)])
    below = [os.path.relpath(path, folder).split(os.sep) for path in files]     # test, birds, 1.png
    names = [place[len(parts) - 1] if len(place) > len(parts) else "" for place in below]
    return divide(images, [""] * len(names) if "" in names else names, [len(parts) > 1 and place[0] == "test" for place in below])


def load_own(config, name=None):
    """Images of the user's own: a folder, or an .npz with `images` and, if there are any, `labels`. name: in data_root."""
    path = File(config.data_root) / name if name else File(config.dataset)
    try:
        if path.is_dir():
            return load_folder(config, path)
        with zipfile.ZipFile(path) as archive:
            if sum(part.file_size for part in archive.infolist()) > 100 * path.stat().st_size + 2 ** 30:
                fail(f"{path} is a decompression bomb: unpacked it would be more than a hundred times its size")
        with np.load(path, allow_pickle=False) as arrays:
            images, labels = as_images(arrays["images"], path, arrays["labels"] if "labels" in arrays else None)
    except Exception as error:
        fail(f"{path} is not a folder of images, nor an .npz file with `images` ({type(error).__name__}: {first_line(error)})")
    return divide(images, labels)


class Views(NamedTuple):
    """How much the random views of an image differ; the names are those of torchvision's transforms."""
    scale: tuple = (0.35, 1.0)       # share of the image's area in the crop, at most 1
    ratio: tuple = (3 / 4, 4 / 3)    # of the crop's width to its height
    jitter: tuple = (0.5, 0.0)       # brightness and contrast; colour: also saturation and hue
    jitter_p: float = 1.0
    grey_p: float = 0.0
    gamma: float = 0.5               # largest change of the exponent's logarithm
    flip_p: float = 0.5              # left to right


VIEWS = {1: Views(), 3: Views((0.2, 1.0), (3 / 4, 4 / 3), (0.4, 0.4, 0.4, 0.1), 0.8, 0.2, 0.0)}   # by channels; colour: the paper's


def random_view(x, views):
    """Another look at images x (B, C, H, W) in [0, 1]: cropped and stretched, flipped, in other colours. The same shape.

    Every image has its own random numbers, in one pass over the batch on its device; torchvision's transforms draw one set
    a call. The changes of colour are linear, so they make one 3 x 3 matrix; hue turns the colours about the grey axis.
    """
    def uniform(low, high):
        return torch.empty(len(x), device=x.device).uniform_(low, high)
    area, ratio = uniform(*views.scale), uniform(*map(math.log, views.ratio)).exp()
    size = torch.stack([area * ratio, area / ratio], 1).sqrt().clamp(max=1)    # (B, 2) width, height; the image's are 1
    centre = torch.stack([uniform(-1, 1), uniform(-1, 1)], 1) * (1 - size)
    flip = torch.stack([torch.where(uniform(0, 1) < views.flip_p, -1.0, 1.0), torch.ones(len(x), device=x.device)], 1)
    grid = nn.functional.affine_grid(torch.cat([torch.diag_embed(size * flip), centre[:, :, None]], 2), x.shape, align_corners=False)
    x = nn.functional.grid_sample(x, grid, padding_mode="border", align_corners=False)

    def factor(strength):                                                      # 1 where this image is not jittered
        return torch.where(jittered, uniform(1 - strength, 1 + strength), 1.0)[:, None, None]
    jittered = uniform(0, 1) < views.jitter_p
    grey = torch.tensor([0.299, 0.587, 0.114], device=x.device) if x.shape[1] == 3 else torch.ones(1, device=x.device)
    to_grey, same = grey.expand(len(grey), -1), torch.eye(len(grey), device=x.device)
    matrix = factor(views.jitter[0]) * same
    contrast = factor(views.jitter[1])
    if x.shape[1] == 3:
        saturation, angle = factor(views.jitter[2]), 2 * math.pi * (factor(views.jitter[3]) - 1)
        axis = torch.tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]], device=x.device) / math.sqrt(3)
        hue = same + angle.sin() * axis + (1 - angle.cos()) * axis @ axis      # Rodrigues' rotation about (1, 1, 1)
        matrix = hue @ (saturation * same + (1 - saturation) * to_grey) @ matrix
        matrix = torch.where((uniform(0, 1) < views.grey_p)[:, None, None], to_grey @ matrix, matrix)
    x = (matrix @ x.flatten(2)).view_as(x)
    mean = (grey @ x.flatten(2)).mean(1)[:, None, None, None]
    x = (contrast[..., None] * x + (1 - contrast[..., None]) * mean).clamp(0, 1)
    return x ** uniform(-views.gamma, views.gamma).exp()[:, None, None, None]


class DataSet(NamedTuple):
    """A row of the table of data sets. The likelihood is not in it: normal where there are three channels, else Bernoulli."""
    load: Callable                   # config -> Data
    settings: dict = {}              # over those of the presets tiny and small
    paper: dict = {}                 # over those of the preset paper
    always: dict = {}                # over those of any preset and of --quick
    views: Views = None              # None: by channels


DATASETS = {
    "shapes": DataSet(lambda config: Data(*draw_shapes(8000, 0), *draw_shapes(2000, 1), SHAPES), DRAWN),
    "shapes-rgb": DataSet(lambda config: Data(*draw_shapes(8000, 0, True), *draw_shapes(2000, 1, True), SHAPES), DRAWN_RGB,
                          PAPER_COLOUR, views=Views((0.6, 1.0), (0.9, 1.1), (0.4, 0.4, 0.4, 0.1), 0.8, 0.2, 0.0)),     # a disc stays a disc
    "mnist": DataSet(partial(load_arrays, sets.MNIST), views=Views(flip_p=0.0)),      # a mirrored digit is another sign
    "fashion": DataSet(partial(load_arrays, sets.FashionMNIST)),
    "cifar10": DataSet(partial(load_arrays, sets.CIFAR10), {}, PAPER_COLOUR),
    "cifar100": DataSet(partial(load_arrays, CIFAR20), dict(max_leaves=20), PAPER_COLOUR | dict(max_leaves=20)),
    "omniglot": DataSet(load_omniglot, dict(max_leaves=5), dict(max_leaves=5), dict(image_size=28), Views(flip_p=0.0)),
    "omniglot-50": DataSet(load_omniglot, dict(max_leaves=50), dict(max_leaves=50), dict(image_size=28), Views(flip_p=0.0)),
    "celeba": DataSet(load_celeba, {}, PAPER_64, dict(image_size=64),
                      Views((0.75, 1.0), (0.8, 1.25), (0.2, 0.2, 0.2, 0.0), 0.8, 0.0, 0.0)),
    "cubicc": DataSet(partial(load_own, name="CUBICC"), {}, PAPER_64, dict(image_size=64)),
    "news20": DataSet(load_news20, dict(max_leaves=20), dict(max_leaves=20, max_depth=6, latent_channels=8, kl_start=0.0,
                                                             kl_start_later=0.0, bottom_up_channels=128), VECTORS),
}
OWN = DataSet(load_own, {}, PAPER_COLOUR)


def load_data(config):
    """The data set of a config, read from disk, downloaded or drawn. -> Data; a clear failure when it cannot be had."""
    known = DATASETS.get(config.dataset, OWN)
    data, some = known.load(config), slice(config.max_images or None)
    data = data._replace(images=data.images[some], labels=data.labels[some])
    if data.images.dim() == 4:
        side, views = config.image_size or nearest(min(data.images.shape[2:])), known.views or VIEWS[data.images.shape[1]]
        data = data._replace(images=resized(data.images, side), test_images=resized(data.test_images, side), views=views)
    if len(data.images) < 2:
        fail(f"{config.dataset} has {len(data.images)} image to train on; batch norm needs two")
    return data


def resized(x, side):
    """Images (N, C, H, W) uint8, their middle square resized to side."""
    if x.shape[2:] == (side, side):
        return x
    return torch.cat([TF.resize(TF.center_crop(part, min(x.shape[2:])), [side, side]) for part in x.split(1000)])


# == The run: its folder, its files, its live line ====================================================================

def world():
    """(rank, n) of this process among those that torchrun started; (0, 1) where it did not."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def agree(tensors, mean=True):
    """Give tensors, in place and as one message, the same values in all processes: their means, or those of the first."""
    n = world()[1]
    tensors = [t.detach() for t in tensors if n > 1 and t is not None and t.is_floating_point()]
    if tensors:
        flat = torch.cat([t.flatten().float() for t in tensors])
        dist.all_reduce(flat) if mean else dist.broadcast(flat, 0)
        for t, part in zip(tensors, flat.split([t.numel() for t in tensors])):
            t.copy_(part.view_as(t) / (n if mean else 1))


def any_of(number, device):
    """The largest of all processes' numbers. A signal may reach them in different steps; all must stop after the same one."""
    if world()[1] > 1:
        numbers = torch.tensor([number], device=device)
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return numbers.item()
    return number


def replace_file(path, save, old=None):
    """Replace a file atomically: save(file) writes one beside it, which is renamed once it is on the disk for sure, so that no
    reader ever sees a half. old: a name for what was there before. OSError where it cannot be.
    """
    path, part = File(path), File(path).with_name(File(path).name + ".part")
    try:
        with open(part, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        if old and path.exists():
            os.replace(path, old)
        os.replace(part, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise error.__context__ if isinstance(error.__context__, OSError) else error     # torch.save hides why


def write(path, save, old=None):
    """`replace_file` for a run's files: a failure is the end. Of several processes only the first writes."""
    if world()[0] == 0:
        try:
            replace_file(path, save, old)
        except OSError as error:
            fail(f"{path} cannot be written ({first_line(error)}): make room, then go on with --resume; what was saved is there")


def read_saved(path, device="cpu"):
    """What torch.save wrote, tensors and plain values only; some exception or other if the file is missing or damaged."""
    with zipfile.ZipFile(path) as archive:                             # torch.load itself looks at no check sum
        if archive.testzip():
            raise zipfile.BadZipFile("a check sum is wrong")
    return torch.load(path, map_location=device, weights_only=True)


@contextlib.contextmanager
def alone_in(folder):
    """Make a run's folder and keep other runs out of it; the lock goes with the process, however that ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a")
    except OSError as error:
        fail(f"the run's folder cannot be written: {first_line(error)}")
    with file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError as error:
            if isinstance(error, (BlockingIOError, PermissionError)):           # else it is a file system without locks
                fail(f"{folder} is in use by another run: wait for it, or choose another folder by --out")
        yield


@contextlib.contextmanager
def stoppable(run):
    """While a run trains, SIGINT and SIGTERM ask it to save and stop at the next step that it can; a second one does not ask."""
    def ask(number, frame):
        run.stop = number
        signal.signal(number, before[number])
    both, before = (signal.SIGINT, signal.SIGTERM), {}
    with contextlib.suppress(ValueError):                              # signals belong to the main thread
        asked = [number for number in both if signal.getsignal(number) not in (signal.SIG_IGN, None)]
        before |= {number: signal.signal(number, ask) for number in asked}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def pause():
    """Seconds between two versions of the live line: on a terminal, in a log."""
    return 0.5 if sys.stdout.isatty() else 60


def show(text, last=False):
    """The live line, which its last version leaves standing."""
    if world()[0] == 0:
        tty = sys.stdout.isatty()
        print(f"\r\033[K{text}" if tty else text, end="" if tty and not last else "\n", flush=True)


class Run:
    """A run's folder and its `state`: all that goes on after an interruption, saved to checkpoint.pt every minute.

    The checkpoint before it stays as checkpoint_old.pt. stop: the signal that asked the run to stop, or 0.

    state: phase ("initial", "grow", "intermediate", "finetune", "diffusion" or "done"); node, mask, guide: the leaf being split, its
    images and where they fall apart; epoch and batch, the next; parents and tree, as they were when the phase began; training, the
    networks and optimizer as they are now; random states; sums and log; frames, pictures of the tree; config and images, whose run it is.
    """

    def __init__(self, config, device, state=None):
        self.config, self.device, self.folder = config, device, File(config.out)
        self.state = state or dict(phase="initial", node=None, guide=None, epoch=0, batch=0,
                                   parents=[-1, 0, 0][:2 * config.max_leaves - 1], seconds=0.0, log=[], frames=[])
        self.saved = self.shown = time.monotonic()
        self.started, self.stop = self.saved - self.state["seconds"], 0

    def seconds(self):
        """How long the run has been going, stops left out."""
        return time.monotonic() - self.started

    def save(self, **state):
        """Update the state and write checkpoint.pt and log.csv."""
        self.state.update(state, seconds=self.seconds(), random=random_state(self.device))
        names, table = list(dict.fromkeys(name for row in self.state["log"] for name in row)), io.StringIO()
        csv.writer(table).writerows([names, *([row.get(name) for name in names] for row in self.state["log"])])
        write(self.folder / "log.csv", lambda file: file.write(table.getvalue().encode()))
        write(self.folder / "checkpoint.pt", lambda file: torch.save(self.state, file), old=self.folder / "checkpoint_old.pt")
        self.saved = time.monotonic()

    def due(self):
        """Whether the live line wants to be redrawn."""
        return time.monotonic() - self.shown > pause()

    def say(self, text, last=False):
        """Redraw the live line."""
        show(text, last)
        self.shown = time.monotonic()

    def watch(self, title, items):
        """The items of a list, one by one, with a live line that says how far this is and how long it will take."""
        began = time.monotonic()
        for k, item in enumerate(items):
            if k and self.due():
                self.say(f"{title}  {100 * k // len(items)}%  {clock((time.monotonic() - began) * (len(items) / k - 1))} left")
            yield item
        self.say(f"{title}: {clock(time.monotonic() - began)}", last=True)


def random_state(device):
    """The state of torch's generators, the CPU's and the device's."""
    own = {} if device.type == "cpu" else {device.type: torch.get_device_module(device).get_rng_state()}
    return {"cpu": torch.get_rng_state()} | own


def set_random_state(states, device):
    """Put back what `random_state` gave, as far as this device has a part in it."""
    torch.set_rng_state(states["cpu"])
    if device.type != "cpu" and device.type in states:
        torch.get_device_module(device).set_rng_state(states[device.type])


def clock(seconds):
    """75 -> "1:15"."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


# == Training =========================================================================================================

def train_phase(run, title, step_loss, network, images, epochs, batch_size, lr, lr_decay, weight_decay=0.0, warmup_steps=1,
                grad_clip=None, ema=None, prepare=lambda x: (), ahead=1):
    """The loop of every phase: epochs over `images` (uint8) with a fresh Adam. Resumes in the middle of an epoch.

    step_loss(x, epoch, progress, *made) -> the scalar to minimise, {name: scalar} to log; x (B, C, H, W) in [0, 1], progress 0..1.
    made: what prepare(x) gives, a row an image. It is called for `ahead` batches at once; the run is saved, and stopped, between such groups.
    lr_decay: "cosine" to 0 over the phase, "step" x0.1 every 100 epochs, or "constant". Over warmup_steps lr rises linearly to that.
    """
    state, device = run.state, run.device
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=lr, weight_decay=weight_decay,
                                 fused=device.type in ("cuda", "cpu"))
    saved = {"network": network, "optimizer": optimizer} | ({"ema": ema} if ema else {})
    if state.get("training"):                                          # resumed in the middle of this phase
        for name, part in saved.items():
            part.load_state_dict(state["training"][name])
        for p, moments in optimizer.state.items():                     # fused Adam wants them laid out as p is on this device
            moments.update({name: torch.zeros_like(p).copy_(moments[name]) for name in ("exp_avg", "exp_avg_sq")})
        set_random_state(state["random"], device)
    (rank, n) = world()
    agree(network.state_dict().values(), mean=False)
    if rank:
        torch.manual_seed(run.config.seed + 1_000_003 * (rank + n * len(state["log"])))      # other noise for other images
    batch_size = min(batch_size, len(images)) // n * n                 # the same with any number of processes
    n_batches = len(images) // batch_size                              # the last, smaller one is left out; the next epoch shuffles anew
    sums, began, first = state["sums"] if state.get("training") else {}, time.monotonic(), state["epoch"] * n_batches + state["batch"]

    def means(steps):
        """The means of what was logged in the steps of this epoch; stops the run where one is not a number."""
        values = {name: float(value) / steps for name, value in sums.items()}
        weights = nn.utils.get_total_norm([p.detach() for p in network.parameters()]).item()
        if not math.isfinite(sum(values.values()) + weights):
            bad = ", ".join(name for name, value in values.items() if not math.isfinite(value)) or "a weight"
            fail(f"{title}, epoch {epoch + 1}, step {batch + 1}: {bad} is not a number any more; checkpoint.pt still holds the last "
                 "good state; start anew with a lower learning rate or another --seed")
        return values

    for epoch in range(state["epoch"], epochs):
        shuffle = torch.Generator().manual_seed(1_000_003 * run.config.seed + len(state["log"]))   # the same when resumed
        order = torch.randperm(len(images), generator=shuffle).to(device)
        for batch in range(state["batch"], n_batches):
            step = epoch * n_batches + batch
            progress = step / (epochs * n_batches)
            decay = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "step": 0.1 ** (epoch // 100), "constant": 1.0}[lr_decay]
            optimizer.param_groups[0]["lr"] = lr * decay * min(1, (step + 1) / warmup_steps)
            if batch % ahead == 0 or batch == state["batch"]:
                group = order[batch * batch_size:min((batch // ahead + 1) * ahead, n_batches) * batch_size][rank::n]
                x = images[group].float() / 255
                batches = zip(*(rows.split(batch_size // n) for rows in (x, *prepare(x))))
            x, *made = next(batches)
            loss, terms = step_loss(x, epoch, progress, *made)
            network.zero_grad()
            loss.backward()
            agree([p.grad for p in network.parameters()])
            if grad_clip:
                nn.utils.clip_grad_norm_(network.parameters(), grad_clip)
            optimizer.step()
            if ema:
                ema.update_parameters(network)
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value.detach()
            if run.due():
                speed = (step + 1 - first) / (time.monotonic() - began)
                run.say(f"{title}  epoch {epoch + 1}/{epochs}  {in_words(means(batch + 1))}  {speed * batch_size:.0f} images/s  "
                        f"{clock((epochs * n_batches - step - 1) / speed)} left in this phase")
            if (batch + 1) % ahead and batch + 1 < n_batches:
                continue
            stop = any_of(run.stop, device)
            if stop or time.monotonic() - run.saved > SAVE_SECONDS:
                means(batch + 1)                                       # ends the run where something is not a number: that is not saved
                run.save(epoch=epoch, batch=batch + 1, training={name: part.state_dict() for name, part in saved.items()},
                         sums={name: float(value) for name, value in sums.items()})
            if stop:
                run.say(f"stopped and saved; it goes on with python train.py --resume --out {run.folder}", last=True)
                if n > 1:
                    dist.barrier()                                     # torchrun ends all once the first is gone
                raise SystemExit(128 + stop)
        agree([value for _, value in sorted(sums.items()) if torch.is_tensor(value)])
        row = means(n_batches)
        shares = " ".join(f"{name[2:]}:{value:.3f}" for name, value in row.items() if name.startswith("P_"))
        state["log"].append(dict(seconds=round(run.seconds(), 1), phase=state["phase"], node=state["node"],
                                 epoch=epoch + 1, **{name: round(value, 5) for name, value in row.items() if not name.startswith("P_")},
                                 leaf_shares=shares))
        sums.clear()
        state["batch"] = 0
    agree(network.buffers())                                           # batch norm's running statistics
    run.say(f"{clock(run.seconds())}  {title}, {epochs} epochs: {in_words(row)}", last=True)


def in_words(terms):
    """{"elbo": -240.12, "P_3": 0.2} -> "elbo -240.1": the terms of the loss, without the leaves' shares."""
    return "  ".join(f"{name} {value:.4g}" for name, value in terms.items() if not name.startswith("P_"))


@torch.no_grad()
def leaf_probs(tree, images):
    """P(l; c) of all images (N, C, H, W) uint8: (N, n_leaves). The tree must be in eval mode."""
    probs = torch.cat([tree.leaf_probs(x.float() / 255) for x in images.split(2000)])
    agree([probs], mean=False)                                         # a last digit may differ between two GPUs
    return probs


def next_phase(tree, images, config, phase):
    """The algorithm of stage 1: what follows the phase that just ended. Grows or prunes the tree on the way.

    -> phase; the leaf being split and the (N,) mask of its images, or None if everything trains; what was done and why.
    """
    tree.eval()
    if phase == "finetune":
        return "diffusion", None, None, "the tree is done"
    if phase == "initial" and config.guided and config.max_leaves > 1:
        everything = torch.ones(len(images), dtype=torch.bool, device=images.device)
        return "grow", 0, everything, "the root's routers and children train again, along the best cut"
    splits = (len(tree.parents) - 3) // 2                              # after the root's
    if phase == "grow" and splits and splits % 3 == 0 and config.intermediate_epochs:
        return "intermediate", None, None, f"all parameters train after {splits} splits"
    probs = leaf_probs(tree, images)
    sizes = torch.bincount(probs.argmax(1), minlength=len(tree.leaves))
    stay = (sizes >= config.min_share * len(images)).sum()             # leaves that pruning will take do not count
    if stay < config.max_leaves and len(tree.leaves) < 2 * config.max_leaves:    # or leaves that stay tiny would be split for ever
        if split := tree.next_split(probs, config.tree_batch_size, hard=config.guided):
            leaf, mask = split
            n = sizes[tree.leaves.index(leaf)] if config.guided else mask.sum()
            children = tree.grow(leaf)
            return "grow", leaf, mask, (f"leaf {leaf} has the most images, {n:d}: it is split into {children[0]} and {children[1]}, "
                                        f"which train on {mask.sum():d}")
    pruned = []                                                        # while there are too many leaves, the smallest goes anyway
    while leaf := tree.next_prune(leaf_probs(tree, images), config.min_share if len(tree.leaves) <= config.max_leaves else 1.0):
        tree.prune(leaf)
        pruned.append(leaf)
    done = f"the tree is grown; pruned: {', '.join(map(str, pruned)) or 'nothing'}"
    return "finetune" if config.finetune_epochs else "diffusion", None, None, done


def train_tree(run, tree, data):
    """Stage 1: initial, then grow (and intermediate) until the tree is full, prune, fine-tune."""
    config, state = run.config, run.state
    epochs_of = dict(initial=config.initial_epochs, grow=config.subtree_epochs, intermediate=config.intermediate_epochs,
                     finetune=config.finetune_epochs)
    while (phase := state["phase"]) in epochs_of:
        node = state["node"]                                           # the leaf that was split; None if everything trains
        guide = state["guide"] and [part.to(run.device) for part in state["guide"]]
        kl_start = config.kl_start if phase == "initial" else config.kl_start_later
        contrastive = config.contrastive * (1.0 if phase == "initial" else config.contrastive_later)

        def step_loss(x, epoch, progress):
            view = random_view(x, data.views) if contrastive and not guide else None     # a guide is all that a split needs
            if config.augmented_elbo:
                x = random_view(x, data.views)
            return tree.loss(x, min(1.0, kl_start + config.kl_per_epoch * epoch), node, view, contrastive,
                             guide, config.guide * max(0.0, 1 - 2 * progress) if guide else 0.0)

        tree.train_only(node)                                          # a split: its routers and children; all else is frozen
        train_phase(run, phase if node is None else f"grow {node}", step_loss, tree,
                    data.images if node is None else data.images[state["mask"].to(run.device)], epochs_of[phase],
                    config.tree_batch_size if node is None else config.subtree_batch_size, config.tree_lr, config.tree_lr_decay,
                    config.weight_decay)
        title = f"{phase}: {len(tree.leaves)} leaves" if node is None else f"leaf {node} was split" if node else "the root along the best cut"
        state["frames"].append(picture_of(tree, data.images, title))
        n_leaves = len(tree.leaves)
        phase, node, mask, why = next_phase(tree, data.images, config, phase)
        state["log"].append(dict(seconds=round(run.seconds(), 1), phase=phase, node=node, note=why))
        if len(tree.leaves) < n_leaves:
            state["frames"].append(picture_of(tree, data.images, f"pruned: {len(tree.leaves)} leaves"))
        guide = make_guide(tree, data.images[mask]) if node is not None and config.guided else None
        run.save(phase=phase, node=node, mask=mask if mask is None else mask.cpu(), guide=guide, epoch=0, batch=0, training=None,
                 parents=list(tree.parents), tree=tree.state_dict())


@torch.no_grad()
def make_guide(tree, images, n=2000):
    """Where the images of a leaf fall apart by themselves: features of n of them, and which go left; None if all are alike."""
    x = images[torch.randperm(len(images))[:n].to(images.device)].float() / 255
    points = tree.eval().features(tree.bottom_up_pass(x))
    agree([points], mean=False)
    if (points == points[0]).all():
        return None
    left = normalized_cut(points).float().to(points.device)
    agree([left], mean=False)                                          # which side is which is arbitrary
    return [points.cpu(), left.cpu() > 0.5]


def build_tree(config, image_shape, parents=(-1, 0, 0)):
    """The TreeVAE of a config."""
    return TreeVAE(image_shape, "gaussian" if image_shape[0] == 3 else "bernoulli", config.latent_channels,
                   config.bottom_up_channels, config.representation_dim, config.max_depth, config.encoder, config.decoder, config.tree_width,
                   config.contrastive > 0, parents)


def build_denoiser(config, tree, device="cpu"):
    """The networks of stage 2: {"unet", "path_encoder"}. On CUDA the convolutions are channels_last, which bf16 is fast in."""
    unet = UNet(tree.image_shape, config.unet_channels, json.loads(f"[{config.unet_multipliers}]"), config.unet_blocks,
                json.loads(f"[{config.unet_attention}]"), config.dropout, tree.image_shape[0] * config.with_reconstruction, config.timesteps)
    parts = {"unet": unet, "path_encoder": PathEncoder(tree.latent_shape, len(tree.parents), unet.emb_dim, config.condition)}
    return nn.ModuleDict(parts).to(device, memory_format=torch.channels_last if "cuda" in str(device) else torch.preserve_format)


def conditioned(networks, config, tree, path):
    """What a path tells the U-Net: the net to ask, which sees the reconstruction if it shall, and y (B, emb_dim) or None."""
    net = networks["unet"]
    if config.with_reconstruction:
        net = beside(net, 2 * tree.decode(path) - 1)
    return net, networks["path_encoder"](*path)


def autocast(config, device):
    """bfloat16 where the device computes with it, else nothing."""
    able = (torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else
            device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())
    return torch.autocast(device.type, torch.bfloat16, enabled=config.bf16 and able)


def moving_average(networks, decay):
    """The exponential moving average of weights: a copy to be told of each step by `.update_parameters(networks)`.

    The decay warms up, since 0.9999 from the first step would keep the random weights for some 50,000 steps.
    """
    def update(averages, parameters, _):
        n = ema.n_averaged.item()                                      # on the CPU, where it does not wait for the GPU
        torch._foreach_lerp_(averages, parameters, 1 - min(decay, (1 + n) / (10 + n)))
    ema = AveragedModel(networks, multi_avg_fn=update)
    return ema


def train_diffusion(run, tree, data):
    """Stage 2: the tree is frozen; the U-Net and the path encoder learn to denoise each image given its sampled path."""
    config, device = run.config, run.device
    tree.requires_grad_(False).eval()                                  # eval: a path is then what it is in sampling
    diffusion, networks = Diffusion(config.timesteps).to(device), build_denoiser(config, tree, device)
    ema = moving_average(networks, config.ema_decay)
    if config.compile:
        networks["unet"].compile()

    def step_loss(x, epoch, progress, *path):
        with autocast(config, device):
            net, y = conditioned(networks, config, tree, Path(*path))
            if config.drop_condition and y is not None:
                y = y * (torch.rand(len(x), 1, device=device) >= config.drop_condition)
            loss = diffusion.loss(net, 2 * x - 1, y)                   # eq. (30)
        return loss, {"loss": loss}

    train_phase(run, "diffusion", step_loss, networks, data.images, config.diffusion_epochs, config.diffusion_batch_size,
                config.diffusion_lr, config.diffusion_lr_decay, 0.0, config.warmup_steps, config.grad_clip, ema,
                tree.infer_path, max(1, PATHS_AHEAD // config.diffusion_batch_size))         # the leaf sampled from P(l; c): eq. (6)
    write(run.folder / "diffusion.pt", lambda file: torch.save(ema.module.state_dict(), file))
    run.save(phase="done", training=None)


# == Pictures =========================================================================================================

@torch.no_grad()
def picture_of(tree, images, title):
    """A frame of the growing tree, what `draw_tree` wants: of each leaf its share of the images, and what its decoder draws."""
    tree.eval()
    sizes = torch.bincount(leaf_probs(tree, images[:10000]).argmax(1), minlength=len(tree.leaves))
    drawn = []
    for leaf in tree.leaves:                                           # paths are sent there, and weighted by how probably they would have gone
        path, way, log_p = tree.sample_path(64, leaf), tree.path_to(leaf), torch.zeros(64, device=images.device)
        for h, i in enumerate(way[:-1]):
            router = tree.nodes[i].router_p
            log_p = tree.children_reach(i, log_p, router and router(path.z[:, h]))[way[h + 1]]
        drawn.append(torch.tensordot(log_p.softmax(0), tree.decode(path), 1))
    return dict(title=title, parents=list(tree.parents), leaves=tree.leaves, shares=(sizes / sizes.sum()).tolist(),
                images=(255 * torch.stack(drawn)).byte().cpu()[:, None])


def draw_tree(ax, parents, leaves, shares, images, title="", words=None):
    """Draw a tree with its leaves' images (L, n, C, H, W) uint8, n below one another, and their shares of the data; of vectors
    (L, n, len(words)) the words of their largest entries. -> the y below which nothing is drawn yet; leaf k is at x = k, 1 wide.
    """
    place = {leaf: (column, 0.0) for column, leaf in enumerate(leaves)}
    for i in reversed(range(len(parents))):                            # children before parents: ids grow downwards
        below = [place[j] for j, parent in enumerate(parents) if parent == i and j in place]
        if below:
            place[i] = (sum(x for x, _ in below) / len(below), max(y for _, y in below) + 0.6)
    for i, (x, y) in place.items():
        if i:
            up_x, up_y = place[parents[i]]
            ax.plot([up_x, x, x], [up_y, up_y, y], color="0.6", lw=1, zorder=1)
        if i not in leaves:
            ax.text(x, y, i, ha="center", va="center", fontsize=6, zorder=2, bbox=dict(boxstyle="circle", fc="white", ec="0.5"))
    for column, leaf in enumerate(leaves):
        for row, image in enumerate(images[column]):
            if words:
                largest = [words[k] for k in image.argsort(descending=True)[:6]]
                ax.text(column, -row - 0.5, "\n".join(largest), ha="center", va="center", fontsize=5, parse_math=False)
                continue
            ax.imshow(image.permute(1, 2, 0).expand(-1, -1, 3).numpy(), zorder=3,
                      extent=(column - 0.47, column + 0.47, -row - 0.97, -row - 0.03))
        ax.text(column, -row - 1.05, f"leaf {leaf}\n{100 * shares[column]:.0f}%", ha="center", va="top", fontsize=7)
    bottom = -images.shape[1] - 0.55
    ax.set(xlim=(-0.6, len(leaves) - 0.4), ylim=(bottom, place[0][1] + 0.3), aspect="equal")
    ax.set_title(title, fontsize=9)
    ax.axis("off")
    return bottom


def save_figure(figure, path):
    """Write a figure as PNG, atomically, and close it."""
    write(path, lambda file: figure.savefig(file, format="png", dpi=150, bbox_inches="tight", facecolor="white"))
    plt.close(figure)


def draw_training(run, words=None):
    """curves.png: the terms of the ELBO and the diffusion loss by epoch; growth.png: the tree after every phase."""
    losses = [row["loss"] for row in run.state["log"] if "loss" in row]
    figure, axes = plt.subplots(1, 2 + bool(losses), figsize=(13, 3.2), layout="constrained")
    rows = [row for row in run.state["log"] if "elbo" in row]
    for ax, names in zip(axes, (["elbo", "reconstruction"], ["kl_root", "kl_nodes", "kl_decisions"])):
        for name in names:                                             # while a split trains its terms are those of one branch
            ax.plot([math.nan if row["phase"] == "grow" else row[name] for row in rows], ".-", label=name)
        for k in (k for k, row in enumerate(rows) if row["phase"] == "grow"):
            ax.axvspan(k - 0.5, k + 0.5, color="0.92", zorder=0, lw=0)
        ax.set(xlabel="epoch of stage 1 (grey: only a new split trains)", ylabel="nats an image")
        ax.legend(loc="center")                                        # over the grey: there is no line
    if losses:
        axes[2].plot(range(1, len(losses) + 1), losses, ".-")
        axes[2].set(xlabel="epoch of stage 2", ylabel="L_simple, eq. (30), a pixel")
    save_figure(figure, run.folder / "curves.png")

    frames, columns = run.state["frames"], 4
    lines = math.ceil(len(frames) / columns)
    figure = plt.figure(figsize=(15, 2.6 * lines), layout="constrained")
    for k, frame in enumerate(frames):
        draw_tree(figure.add_subplot(lines, columns, k + 1), **frame, words=words)
    save_figure(figure, run.folder / "growth.png")


# == From the command line to a finished run, and back from a folder ==================================================

def parse_flags(argv):
    """argv -> Config, and "resume", "overwrite" or "start". What is not typed comes from --quick, the data set or the preset."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog="In brackets: the preset tiny. Other presets and "
                                     "some data sets have settings of their own; a run's are in its config.json.",
                                     argument_default=argparse.SUPPRESS)                         # only what is typed
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--resume", dest="how", action="store_const", const="resume", help="go on with the run in the folder, with its own settings")
    how.add_argument("--overwrite", dest="how", action="store_const", const="overwrite",
                     help="start anew in a folder that holds a run, whose files go")
    parser.add_argument("--quick", action="store_true", help="a few steps of every phase, to see that all works here")
    for f in fields(Config):
        choices = f.metadata["choices"]
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(
            type=f.type, choices=choices, metavar=None if choices else "N" if f.type in (int, float) else "TEXT")
        parser.add_argument("--" + f.name.replace("_", "-"),
                            help=f"{f.metadata['help']} (tiny: {f.default if f.default != '' else 'empty'})", **kind)
    typed = vars(parser.parse_args(argv))
    quick, how = typed.pop("quick", False), typed.pop("how", "start")
    source = asdict(load_config(typed["tree"])) if typed.get("tree") and how != "resume" else {}
    own = os.path.expanduser(typed.get("dataset", ""))
    if own not in DATASETS and os.path.exists(own):
        typed["dataset"] = os.path.realpath(own)                       # the same from any folder
    dataset = typed.get("dataset") or source.get("dataset", "shapes")
    typed["out"] = typed.get("out") or f"runs/{File(dataset).name.removesuffix('.npz')}"
    names = [f.name for f in fields(Config)]
    stage_2 = ("out", "device", "data_root", "seed", "bf16", "compile", *names[names.index("tree"):])
    may = ("dataset", "out", *FREE) if how == "resume" else stage_2 if source else (*names, "quick")
    if kept := [name for name in [*typed, *["quick"] * quick] if name not in may]:
        fail(f"a resumed run keeps its own settings, and --tree those of the tree: leave out --{kept[0].replace('_', '-')}, or "
             "train anew in another folder with --out")
    if how == "resume":
        config = load_config(typed["out"], **{name: typed[name] for name in FREE if name in typed})
        if typed.get("dataset", config.dataset) != config.dataset:
            fail(f"the run in {config.out} is of {config.dataset}, not of {typed['dataset']}: --out names the run to go on with")
        return config, how
    preset = typed.pop("preset", "auto")
    if preset == "auto":
        preset = "small" if torch.cuda.is_available() else "tiny"
    known = DATASETS.get(dataset, OWN)
    of_data = known.paper if preset == "paper" else known.settings
    defaults = source or PRESETS[preset] | of_data | (QUICK if quick else {}) | known.always | dict(preset=preset + " --quick" * quick)
    return check(Config(**(defaults | typed))), how


def check(config):
    """The config, if its settings can work; else a failure that names the one that cannot, before anything is written."""
    for f in fields(Config):
        value, flag, choices = getattr(config, f.name), "--" + f.name.replace("_", "-"), f.metadata["choices"]
        if type(value) is not f.type and not (f.type is float and type(value) is int):
            fail(f"{flag} must be of type {f.type.__name__}, not {value!r}")
        if choices and str(value).removesuffix(" --quick") not in map(str, choices):
            fail(f"{flag} must be one of {', '.join(map(str, choices))}, not {value!r}")
        if f.type in (int, float) and not f.metadata["least"] <= value < 2 ** 31:
            fail(f"{flag} must be a number of at least {f.metadata['least']} and below 2^31, not {value}")
    if config.dataset not in DATASETS and not os.path.exists(config.dataset):
        fail(f"invalid choice: {config.dataset!r}; --dataset must be one of {', '.join(DATASETS)}, or the path of a folder of "
             "images or an .npz file")
    for name, may_be_empty in (("unet_multipliers", ""), ("unet_attention", "|")):
        if not re.fullmatch(r"[1-9][0-9]*(,[1-9][0-9]*)*" + may_be_empty, getattr(config, name)):
            fail(f"--{name.replace('_', '-')} must be whole numbers separated by commas, such as 1,2,2, not {getattr(config, name)!r}")
    if config.representation_dim != 1 and "mlp" in (config.encoder, config.decoder):
        fail("--representation-dim must be 1 with an mlp as --encoder or --decoder")
    if config.max_leaves > 2 ** min(config.max_depth, 30):
        fail(f"a tree of depth {config.max_depth} has at most {2 ** config.max_depth} leaves: raise --max-depth or lower --max-leaves")
    if config.min_share * config.max_leaves > 1:
        fail(f"{config.max_leaves} leaves cannot all have a share of {config.min_share}: lower --min-share or --max-leaves")
    if config.tree and (not config.diffusion_epochs or os.path.realpath(config.tree) == os.path.realpath(config.out)):
        fail("--tree trains stage 2 of another run: choose another folder by --out, and --diffusion-epochs, which is "
             f"{config.diffusion_epochs}")
    if config.drop_condition and config.condition == "none":
        fail("--drop-condition has nothing to drop with --condition none")
    if config.unet_channels % 2 or max(config.dropout, config.drop_condition) >= 1 or config.max_images == 1 or config.timesteps > 10000:
        fail("--unet-channels must be even, --dropout and --drop-condition below 1, --timesteps at most 10000 (abar_T would be 0) and "
             "--max-images not 1: batch norm needs two images")
    return config


def load_checkpoint(path, device):
    """A file written by torch.save, tensors and plain values only; a clear failure if it is missing or damaged."""
    try:
        return read_saved(path, device)
    except FileNotFoundError:
        fail(f"{path} is missing: this run has not come that far, or trains no stage 2 (--diffusion-epochs 0); "
             f"go on with python train.py --resume --out {File(path).parent}")
    except Exception as error:                                         # a damaged file shows itself in many ways
        fail(f"{path} cannot be read ({type(error).__name__}): it is damaged or not ours; train again, or put back a copy")


def identity(config):
    """What a checkpoint and a config must agree in: all settings but those that a resumed run may change."""
    return {name: value for name, value in asdict(config).items() if name not in ("out", *FREE)}


def load_state(config, images=None):
    """The state of a run: checkpoint.pt or, where that is missing, damaged or foreign, the one before; None if there is neither.

    images: the check sum of those that it must be about.
    """
    wrong = []
    for name in ("checkpoint.pt", "checkpoint_old.pt"):
        try:
            state = dict(read_saved(File(config.out) / name))
            if asdict(Config()) | state["config"] != asdict(Config()) | identity(config) or images not in (None, state["images"]):
                raise ValueError("it is of a run with other settings or other images")
            if wrong:
                note(f"{wrong[0]}; going on from {name}")
            return state
        except FileNotFoundError:
            pass
        except Exception as error:                                     # a damaged file shows itself in many ways
            wrong.append(f"{name} cannot be used ({type(error).__name__}: {first_line(error)})")
    if wrong:
        fail(f"in {config.out} {' and '.join(wrong)}; put back a copy, or start anew with --overwrite")


def load_config(folder, **changes):
    """config.json of a run's folder -> Config, with changes; a clear failure if there is none or it is not one of ours."""
    path = File(folder) / "config.json"
    try:
        config = Config(**(json.loads(path.read_text()) | changes | dict(out=str(folder))))
    except FileNotFoundError:
        fail(f"there is no run in {str(folder)!r} (no config.json); train one with python train.py --out {folder}")
    except (ValueError, TypeError, OSError, RecursionError) as error:
        fail(f"{path} is not a run's settings: {first_line(error)}")
    return check(config)


def pick_device(name):
    """The named device, or the first there is of cuda, mps, cpu."""
    able = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    there = [name for name, yes in able.items() if yes]
    if name not in ("auto", *there):
        fail(f"there is no {name} device here; use --device {there[0]}, or leave it out")
    torch.set_float32_matmul_precision("high")                         # TF32 on CUDA
    torch.backends.cudnn.benchmark = True
    name = there[0] if name == "auto" else name
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():       # started by torchrun
        dist.init_process_group("nccl" if name == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    if name == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device(name)


def load_run(folder, device="auto", data_root=None, need_diffusion=True):
    """A trained run -> (config, device, data, tree, networks), in eval mode; networks is None where there is no stage 2."""
    config = load_config(folder, **({"data_root": data_root} if data_root else {}))
    device, data = pick_device(device), load_data(config)
    saved = load_checkpoint(File(folder) / "tree.pt", device)
    networks = None
    try:
        tree = build_tree(config, tuple(data.images.shape[1:]), saved["parents"]).to(device)
        tree.load_state_dict(saved["state_dict"])
        if need_diffusion:
            weights = load_checkpoint(File(folder) / "diffusion.pt", device)
            networks = build_denoiser(config, tree, device)
            networks.load_state_dict(weights)
            networks.requires_grad_(False).eval()
    except Exception as error:
        fail(f"the weights in {folder} do not fit its config.json ({first_line(error)})")
    return config, device, data, tree.requires_grad_(False).eval(), networks


FILES = ("config.json", "checkpoint.pt", "checkpoint_old.pt", "log.csv", "tree.pt", "diffusion.pt", "metrics.json", "growth.gif",
         *(f"{name}.png" for name in ("growth", "growth_scores", "curves", "tree", "leaves", "one_root", "reconstructions", "denoising",
                                      "interpolation", "leaf_*", "node_*")))                     # what --overwrite takes away


def taken(folder, images):
    """What of another run's state its tree is: stage 2 goes on from there. images: their check sum, as in `load_state`."""
    state = load_state(load_config(folder), images)
    if not state:
        fail(f"there is no checkpoint.pt in {folder}, which has the tree and how it grew")
    if state["phase"] not in ("diffusion", "done"):
        fail(f"the tree in {folder} is not grown yet: go on with it by --resume --out {folder}")
    log = [row for row in state["log"] if "loss" not in row]
    return dict(phase="diffusion", node=None, log=log, **{name: state[name] for name in ("parents", "tree", "frames")})


def begin(config, device, data, how):
    """A new run in its folder, or the one that is there as its checkpoint has it. -> Run, TreeVAE"""
    mark = dict(config=identity(config), images=zlib.crc32(data.images[::1 + len(data.images) // 10000].numpy().tobytes()))
    state = load_state(config, mark["images"]) if how == "resume" else None
    (rank, n) = world()
    if n > 1:
        dist.barrier()                                                 # nobody writes before all have looked
    torch.manual_seed(config.seed)
    try:
        run = Run(config, device, state)
        if config.tree and not state:
            run.state.update(taken(config.tree, mark["images"]))
        tree = build_tree(config, tuple(data.images.shape[1:]), run.state["parents"]).to(device)
        if "tree" in run.state:
            tree.load_state_dict(run.state["tree"])
        if state:
            set_random_state(state["random"], device)
    except (RuntimeError, KeyError, TypeError, AttributeError, ValueError) as error:
        fail(f"no tree can be made with these settings, or the run's checkpoint does not fit them ({first_line(error)})")
    if state is None and rank == 0:
        for old in [path for pattern in FILES * (how == "overwrite") for path in run.folder.glob(pattern)]:
            old.unlink()
        write(run.folder / "config.json", lambda file: file.write(json.dumps(asdict(config), indent=1).encode()))
        run.save(**mark, tree=tree.state_dict(), training=None)
    return run, tree


def train_both(run, tree, data):
    """Stage 1, stage 2, and what they leave in the folder."""
    config = run.config
    try:
        train_tree(run, tree, data)
        write(run.folder / "tree.pt", lambda file: torch.save({"parents": tree.parents, "state_dict": tree.state_dict()}, file))
        if run.state["phase"] == "diffusion" and config.diffusion_epochs:
            train_diffusion(run, tree, data)
    except RuntimeError as error:
        if "out of memory" not in str(error) and "allocate memory" not in str(error):
            raise
        phase = run.state["phase"]
        flag = {"diffusion": "diffusion_batch_size", "grow": "subtree_batch_size"}.get(phase, "tree_batch_size")
        fail(f"{run.device} ran out of memory in the phase {phase}: halve --{flag.replace('_', '-')}, which is "
             f"{getattr(config, flag)}, and " + (f"go on in another folder with --tree {run.folder}" if phase == "diffusion" else "start anew"))


def main(argv=None):
    """The recipe: settings, data, folder, stage 1, stage 2, pictures."""
    config, how = parse_flags(argv)
    folder = File(config.out)
    if how == "start" and any((folder / name).exists() for name in ("config.json", "checkpoint.pt", "tree.pt")):
        fail(f"{folder} holds a run already: go on with it by --resume, replace it by --overwrite, or choose another by --out")
    if how == "overwrite" and (folder / "config.json").exists() and not (folder / "log.csv").exists():
        load_config(folder)                                            # which is a run's, or nothing is overwritten
    device, data = pick_device(config.device), load_data(config)
    (rank, n) = world()
    sizes = (config.tree_batch_size, config.subtree_batch_size, config.diffusion_batch_size)
    if any(size % n for size in sizes) or min(*sizes[:2], len(data.images)) < 2 * n:
        fail(f"the three batch sizes must be multiples of the number of processes, {n}, and those of the tree give each two images or more")
    vectors = data.images.dim() == 2
    for name in [name for name in VECTORS if vectors and getattr(config, name) != VECTORS[name]]:
        fail(f"--{name.replace('_', '-')} must be {VECTORS[name]} here: of vectors there are neither random views nor a stage 2")
    with alone_in(folder) if rank == 0 else contextlib.nullcontext():
        run, tree = begin(config, device, data, how)
        say = partial(show, last=True)
        say(f"{config.dataset}: {len(data.images)} training {'vectors' if vectors else 'images'} {tuple(data.images.shape[1:])}; "
            f"preset {config.preset}; on {device}{f' x {n}' * (n > 1)} ({torch.get_num_threads()} threads); into {folder}\n"
            f"{HOW_LONG.get(config.preset, 'half a minute')}" + "; there is no stage 2 for vectors" * vectors)
        if len(data.images) < config.tree_batch_size:
            note(f"{len(data.images)} images are fewer than a batch of {config.tree_batch_size}: that has all, no leaf is split")
        data = data._replace(images=data.images.to(device))
        with stoppable(run):
            train_both(run, tree, data)
        draw_training(run, data.words)
        sizes = torch.bincount(leaf_probs(tree.eval(), data.images).argmax(1), minlength=len(tree.leaves)).tolist()
        say("leaves: " + ", ".join(f"{leaf}: {100 * size / len(data.images):.1f}%" for leaf, size in zip(tree.leaves, sizes)))
        say(f"done in {clock(run.seconds())}; now: "
            + f"python sample.py {folder} and " * bool(config.diffusion_epochs) + f"python metrics.py {folder}")


def run_program(main):
    """Run a program's main: Ctrl-C, SIGTERM and a reader that stops reading (`| head`) end it without a traceback."""
    def interrupt(number, frame):
        raise KeyboardInterrupt(number)
    signal.signal(signal.SIGTERM, interrupt)
    sys.stdout.reconfigure(errors="backslashreplace")                  # a file's name may be anything
    try:
        main()
    except KeyboardInterrupt as stop:
        print("\nstopped; a run in training goes on with python train.py --resume", file=sys.stderr)
        raise SystemExit(128 + (stop.args or (signal.SIGINT,))[0])
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1)


if __name__ == "__main__":
    run_program(main)
