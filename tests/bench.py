"""Speed, by hand: PYTHONPATH=. python tests/bench.py."""

import torch
from torch.utils.benchmark import Timer

from diffusion import Diffusion, UNet, autocast, eps_net
from treevae import TreeVAE

TEN_LEAVES = (-1, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 9, 9)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def report(name, work):
    timer = Timer("work()", globals=dict(work=work), num_threads=torch.get_num_threads())
    ms = 1e3 * timer.blocked_autorange(min_run_time=3).median  # it waits for a GPU
    print(f"{name:40s}{ms:9.1f} ms")


def training_step(net, loss):
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], fused=True)
    def step():
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return step


def bench_tree():
    """Stage 1 of the preset tiny at 28 x 28 x 1, batch 256."""
    x = torch.rand(256, 1, 28, 28, device=device)
    tiny = dict(latent_channels=8, bottom_up_channels=128, representation_dim=1, decoder="mlp")
    for parents in ((-1, 0, 0), TEN_LEAVES):
        tree = TreeVAE((1, 28, 28), parents=parents, **tiny).to(device)
        step = training_step(tree, lambda: tree.loss(x)[0])
        report(f"training step, {len(tree.leaves)} leaves", step)
    tree = TreeVAE((1, 28, 28), parents=TEN_LEAVES[:17], **tiny).to(device)
    tree.grow(9)
    tree.train_only(9)
    report("step of growing a leaf", training_step(tree, lambda: tree.loss(x, below=9)[0]))


def bench_diffusion():
    """Stage 2 of the preset paper at 28 x 28 x 1, batch 32, attention in the middle alone."""
    diffusion, x = Diffusion().to(device), torch.rand(32, 1, 28, 28, device=device)
    unet = UNet((1, 28, 28), attention=()).to(device)
    y, net = torch.randn(32, unet.emb_dim, device=device), eps_net(diffusion, unet)
    with autocast(device):
        report("training step", training_step(unet, lambda: diffusion.loss(net, x, y)))


print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
bench_tree()
bench_diffusion()
