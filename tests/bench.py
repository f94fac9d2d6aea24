"""Speed, by hand: python tests/bench.py tree|diffusion|metrics

Seconds and yardsticks; a yardstick is one 2048 x 2048 x 2048 float32 product in the same process.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import metrics  # noqa: E402
from diffusion import Diffusion, UNet, eps_net  # noqa: E402
from path_encoder import PathEncoder  # noqa: E402
from train import CHUNK  # noqa: E402
from treevae import TreeVAE  # noqa: E402

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


def report(name, s, yardstick, extra=""):
    """One line of the table."""
    print(f"  {name:46s}{1000 * s:9.1f} ms{s / yardstick:9.2f} yardsticks  {extra}", flush=True)


def training_step(parameters, loss):
    """A function that does one step of Adam on loss()."""
    optimizer = torch.optim.Adam([p for p in parameters if p.requires_grad], fused=True)

    def step():
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return step


def bench_tree(yardstick):
    """Stage 1 at 28 x 28 x 1, batch 256: Appendix D's tree, then that of the preset tiny."""
    x, many = torch.rand(256, 1, 28, 28, device=device), torch.rand(10000, 1, 28, 28, device=device)
    tiny = dict(latent_channels=8, bottom_up_channels=128, representation_dim=1, decoder="mlp")
    for title, settings in (("Appendix D", {}), ("tiny", tiny)):
        print(title)
        for parents in ((-1, 0, 0), TEN_LEAVES):
            tree = TreeVAE((1, 28, 28), parents=parents, **settings).to(device)
            s = seconds(training_step(tree.parameters(), lambda: tree.loss(x)[0]))
            report(f"training step, {len(tree.leaves)} leaves", s, yardstick)

        def assign():
            with torch.no_grad():
                return [tree.leaf_probs(part) for part in many.split(2000)]
        tree.eval()
        report("P(l; c) of 10,000 images, 10 leaves", seconds(assign), yardstick)
        tree = TreeVAE((1, 28, 28), parents=TEN_LEAVES[:17], **settings).to(device)
        node = tree.leaves[0]
        tree.grow(node)
        tree.train_only(node)
        s = seconds(training_step(tree.parameters(), lambda: tree.loss(x, below=node)[0]))
        report(f"step of growing the {len(tree.leaves) - 1}-leaf tree", s, yardstick)


def bench_diffusion(yardstick):
    """Stage 2 at 28 x 28 x 1, batch 32: Appendix D's U-Net, with attention in the middle only."""
    diffusion, x = Diffusion().to(device), torch.rand(32, 1, 28, 28, device=device)
    tree = TreeVAE((1, 28, 28), parents=TEN_LEAVES).to(device).eval()
    unet = UNet((1, 28, 28), 64, (1, 2, 2, 2), 2, attention=(), dropout=0.3).to(device)
    encoder = PathEncoder(tree.latent_shape, len(tree.parents), unet.emb_dim).to(device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(x, torch.zeros(32, dtype=torch.long, device=device))
    forward, peak = counter.get_total_flops(), 2 * 2048 ** 3 / yardstick

    def condition(x):
        with torch.no_grad():
            return tree.infer_path(x)
    s = seconds(lambda: condition(x.repeat(CHUNK, 1, 1, 1))) / CHUNK
    report(f"paths of a batch, {CHUNK} at once as in training", s, yardstick)
    y, net = encoder(*condition(x)).detach(), eps_net(diffusion, unet)
    for dtype in (torch.float32, torch.bfloat16):
        def loss():
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                return diffusion.loss(net, x, y)

        def sample():
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                return diffusion.ddim_sample(net, x.shape, y, steps=10)
        print(dtype)
        for name, work, flops in (("training step", training_step(unet.parameters(), loss), 3),
                                  ("10 DDIM steps", sample, 10)):
            unet.train(work is not sample)                # dropout is for training
            s = seconds(work, 3)
            rate = 100 * flops * forward / s / peak
            report(name, s, yardstick, f"{32 / s:.0f} images/s, {rate:.0f}% of the product's rate")


def bench_metrics(yardstick):
    """A million images under a balanced tree of 100 leaves; 2048 features; the FID network."""
    rng, parents = np.random.default_rng(0), [-1] + [k // 2 for k in range(198)]
    leaves, labels = rng.integers(99, 199, 1_000_000), rng.integers(0, 10, 1_000_000)
    s = seconds(lambda: metrics.dendrogram_purity(parents, leaves, labels))
    report("dendrogram purity, 1,000,000 images", s, yardstick)
    mu, cov = np.zeros(2048), np.cov(rng.normal(size=(2048, 3000)))
    s = seconds(lambda: metrics.frechet_distance(mu, cov, mu, cov), 1)
    report("Frechet distance of 2048 features", s, yardstick)
    network, x = metrics.InceptionFeatures().to(device), torch.rand(16, 1, 28, 28, device=device)
    report("the FID network, 16 images", seconds(lambda: network(x), 3), yardstick)


if __name__ == "__main__":
    benches = dict(tree=bench_tree, diffusion=bench_diffusion, metrics=bench_metrics)
    if len(sys.argv) != 2 or sys.argv[1] not in benches:
        sys.exit(f"usage: python tests/bench.py {'|'.join(benches)}")
    a, b = torch.randn(2, 2048, 2048, device=device)
    yardstick = seconds(lambda: a @ b, 11)
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
          f"a yardstick is {1000 * yardstick:.1f} ms")
    benches[sys.argv[1]](yardstick)
