"""Speed, by hand: python tests/bench.py tree|diffusion|layout|metrics

Seconds and yardsticks; the yardstick is one 2048 x 2048 x 2048 float32 matrix product in the same process.
"""

import itertools
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import metrics  # noqa: E402
from diffusion import Diffusion, UNet  # noqa: E402
from path_encoder import PathEncoder  # noqa: E402
from train import PATHS_AHEAD  # noqa: E402
from treevae import TreeVAE, make_decoder  # noqa: E402

TEN_LEAVES = (-1, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 9, 9)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds(work, repeats=5):
    """The median time of `work`, after two calls to warm up."""
    times = []
    for k in range(repeats + 2):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[2:])[repeats // 2]


def measure_yardstick():
    """Seconds of the matrix product."""
    a, b = torch.randn(2, 2048, 2048, device=device)
    return seconds(lambda: a @ b, 11)


def report(name, s, yardstick, extra=""):
    """One line of the table."""
    print(f"  {name:52s}{1000 * s:9.1f} ms{s / yardstick:9.2f} yardsticks  {extra}", flush=True)


def training_step(network, loss):
    """A function that does one step of Adam on loss()."""
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], fused=True)
    def step():
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return step


def bench_tree(yardstick):
    """Appendix D's tree at 28 x 28 x 1, batch 256."""
    x, many = torch.rand(256, 1, 28, 28, device=device), torch.rand(10000, 1, 28, 28, device=device)
    for title, kwargs in (("Appendix D: z 16x4x4, d 32x4x4, cnn", dict(latent_channels=16, bottom_up_channels=32)),
                          ("tiny: z 8, d 128, mlp decoders", dict(latent_channels=8, bottom_up_channels=128, representation_dim=1, decoder="mlp"))):
        print(title)
        for parents, name in (((-1, 0, 0), "training step, 2 leaves"), (TEN_LEAVES, "training step, 10 leaves")):
            tree = TreeVAE((1, 28, 28), parents=parents, **kwargs).to(device)
            report(name, seconds(training_step(tree, lambda: tree.loss(x)[0])), yardstick)
        def assign():
            with torch.no_grad():
                return [tree.leaf_probs(part) for part in many.split(2000)]
        tree.eval()
        report("P(l; c) of 10,000 images, 10 leaves", seconds(assign), yardstick)
        tree = TreeVAE((1, 28, 28), parents=TEN_LEAVES[:17], **kwargs).to(device)
        node = tree.leaves[0]
        tree.grow(node)
        tree.train_only(node)
        report(f"step of growing the {len(tree.leaves) - 1}-leaf tree", seconds(training_step(tree, lambda: tree.loss(x, below=node)[0])), yardstick)


def bench_diffusion(yardstick):
    """Appendix D's U-Net at 28 x 28 (attention only in the middle, as the authors run it), batch 32."""
    diffusion, x = Diffusion().to(device), torch.rand(32, 1, 28, 28, device=device)
    tree = TreeVAE((1, 28, 28), parents=TEN_LEAVES).to(device).eval()
    net = UNet((1, 28, 28), 64, (1, 2, 2, 2), 2, attention=(), dropout=0.3).to(device)
    encoder = PathEncoder(tree.latent_shape, len(tree.parents), net.emb_dim).to(device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x, torch.zeros(32, dtype=torch.long, device=device))
    forward, peak = counter.get_total_flops(), 2 * 2048 ** 3 / yardstick
    def condition(x):
        with torch.no_grad():
            return tree.infer_path(x)
    ahead = PATHS_AHEAD // 32
    report(f"conditioning: paths, {ahead} batches at once, as in training", seconds(lambda: condition(x.repeat(ahead, 1, 1, 1))) / ahead, yardstick)
    report("the same, one batch alone", seconds(lambda: condition(x)), yardstick)
    y = encoder(*condition(x)).detach()
    for compiled, dtype in itertools.product((False, True) if device.type == "cuda" else (False,), (torch.float32, torch.bfloat16)):
        print(dtype, "compiled" * compiled)
        if compiled:
            net.compile()
        def loss():
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                return diffusion.loss(net, x, y)
        def sample():
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                return diffusion.ddim_sample(net, x.shape, y, steps=10)
        for name, work, flops in (("training step", training_step(net, loss), 3 * forward), ("10 DDIM steps", sample, 10 * forward)):
            net.train(work is not sample)                              # dropout is for training
            s = seconds(work, 3)
            report(name, s, yardstick, f"{32 / s:.0f} images/s, {100 * flops / s / peak:.0f}% of the matrix product's rate")


def bench_layout(yardstick):
    """One module for each leaf's decoder against one grouped convolution for all ten: forward and backward, batch 256."""
    z = torch.randn(256, 16, 4, 4, device=device)
    decoders = nn.ModuleList([make_decoder("cnn", (1, 28, 28), 32, 16, 4) for _ in range(10)]).to(device)
    grouped = nn.Sequential(
        nn.ConvTranspose2d(160, 640, 1, groups=10), nn.BatchNorm2d(640), nn.LeakyReLU(0.1),
        nn.ConvTranspose2d(640, 320, 3, stride=2, padding=1, groups=10), nn.BatchNorm2d(320), nn.LeakyReLU(0.1),
        nn.Conv2d(320, 160, 3, padding=1, groups=10)).to(device)
    report("ten modules in a loop", seconds(lambda: sum(d(z).square().mean() for d in decoders).backward()), yardstick)
    report("one call with ten groups", seconds(lambda: grouped(z.repeat(1, 10, 1, 1)).square().mean().backward()), yardstick)


def bench_metrics(yardstick):
    """Dendrogram purity of 1,000,000 images under a balanced tree of 100 leaves; Frechet distance of 2048 features; the FID network."""
    rng, parents = np.random.default_rng(0), [-1] + [k // 2 for k in range(198)]
    leaves, labels = rng.integers(99, 199, 1_000_000), rng.integers(0, 10, 1_000_000)
    report("dendrogram purity, 1,000,000 images, 100 leaves", seconds(lambda: metrics.dendrogram_purity(parents, leaves, labels)), yardstick)
    mu, cov = np.zeros(2048), np.cov(rng.normal(size=(2048, 3000)))
    report("Frechet distance of 2048 features", seconds(lambda: metrics.frechet_distance(mu, cov, mu, cov), 1), yardstick)
    network, x = metrics.InceptionFeatures().to(device), torch.rand(16, 1, 28, 28, device=device)
    s = seconds(lambda: network(x), 3)
    report("the FID network, 16 images", s, yardstick, f"{16 / s:.1f} images/s")


if __name__ == "__main__":
    benches = dict(tree=bench_tree, diffusion=bench_diffusion, layout=bench_layout, metrics=bench_metrics)
    if len(sys.argv) != 2 or sys.argv[1] not in benches:
        sys.exit(f"usage: python tests/bench.py {'|'.join(benches)}")
    yardstick = measure_yardstick()
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}; yardstick {1000 * yardstick:.1f} ms")
    benches[sys.argv[1]](yardstick)
