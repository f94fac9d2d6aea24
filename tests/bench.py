"""Speed, by hand: python tests/bench.py tree|diffusion|metrics
Seconds and yardsticks; a yardstick is one 2048 x 2048 x 2048 float32 product in the same process.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import metrics  # noqa: E402
from diffusion import Diffusion, UNet, eps_net  # noqa: E402
from path_encoder import PathEncoder  # noqa: E402
from train import CHUNK, leaf_probs  # noqa: E402
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


def report(name, work, yardstick, repeats=5):
    """One line of the table."""
    s = seconds(work, repeats)
    print(f"  {name:46s}{1000 * s:9.1f} ms{s / yardstick:9.2f} yardsticks", flush=True)


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
    x = torch.rand(256, 1, 28, 28, device=device)
    many = torch.zeros(10000, 1, 28, 28, dtype=torch.uint8, device=device)
    tiny = dict(latent_channels=8, bottom_up_channels=128, representation_dim=1, decoder="mlp")
    for title, settings in (("Appendix D", {}), ("tiny", tiny)):
        for parents in ((-1, 0, 0), TEN_LEAVES):
            tree = TreeVAE((1, 28, 28), parents=parents, **settings).to(device)
            step = training_step(tree.parameters(), lambda: tree.loss(x)[0])
            report(f"{title}: training step, {len(tree.leaves)} leaves", step, yardstick)
        tree.eval()
        report(f"{title}: P(l; c) of 10,000 images", lambda: leaf_probs(tree, many), yardstick)
        tree = TreeVAE((1, 28, 28), parents=TEN_LEAVES[:17], **settings).to(device)
        node = tree.leaves[0]
        tree.grow(node)
        tree.train_only(node)
        step = training_step(tree.parameters(), lambda: tree.loss(x, below=node)[0])
        report(f"{title}: step of growing the 9-leaf tree", step, yardstick)


def bench_diffusion(yardstick):
    """Stage 2 at 28 x 28 x 1, batch 32: Appendix D's U-Net, with attention in the middle only."""
    diffusion, x = Diffusion().to(device), torch.rand(32, 1, 28, 28, device=device)
    tree = TreeVAE((1, 28, 28), parents=TEN_LEAVES).to(device).eval().requires_grad_(False)
    unet = UNet((1, 28, 28), attention=()).to(device)
    encoder = PathEncoder(tree.latent_shape, len(tree.parents), unet.emb_dim).to(device)
    many = x.repeat(CHUNK, 1, 1, 1)
    report(f"paths of {CHUNK} batches, as in training", lambda: tree.infer_path(many), yardstick)
    y, net = encoder(*tree.infer_path(x)).detach(), eps_net(diffusion, unet)
    step = training_step(unet.parameters(), lambda: diffusion.loss(net, x, y))
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            unet.train()
            report(f"training step, {dtype}", step, yardstick)
            unet.eval()  # dropout is for training
            report(f"10 DDIM steps, {dtype}",
                   lambda: diffusion.ddim_sample(net, x.shape, y, steps=10), yardstick)


def bench_metrics(yardstick):
    """A million images under a balanced tree of 100 leaves; 2048 features."""
    rng, parents = np.random.default_rng(0), [-1] + [k // 2 for k in range(198)]
    leaf, labels = rng.integers(99, 199, 1_000_000), rng.integers(0, 10, 1_000_000)
    report("dendrogram purity", lambda: metrics.dendrogram_purity(parents, leaf, labels), yardstick)
    mu, cov = np.zeros(2048), np.cov(rng.normal(size=(2048, 3000)))
    report("Frechet distance", lambda: metrics.frechet_distance(mu, cov, mu, cov), yardstick, 1)


if __name__ == "__main__":
    benches = dict(tree=bench_tree, diffusion=bench_diffusion, metrics=bench_metrics)
    if len(sys.argv) != 2 or sys.argv[1] not in benches:
        sys.exit(f"usage: python tests/bench.py {'|'.join(benches)}")
    a, b = torch.randn(2, 2048, 2048, device=device)
    yardstick = seconds(lambda: a @ b, 11)
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
          f"a yardstick is {1000 * yardstick:.1f} ms")
    benches[sys.argv[1]](yardstick)
