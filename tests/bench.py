"""Speed, by hand: python tests/bench.py tree|diffusion. The yardstick is a product of matrices."""

import sys

import torch
from torch.utils.benchmark import Timer

sys.path.insert(0, ".")  # run it from the project's root
from diffusion import Diffusion, UNet, eps_net  # noqa: E402
from path_encoder import PathEncoder  # noqa: E402
from train import CHUNK  # noqa: E402
from treevae import TreeVAE  # noqa: E402

TEN_LEAVES = (-1, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 9, 9)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
medians = []  # in seconds; the first is the yardstick


def report(name, work):
    timer = Timer("work()", globals=dict(work=work), num_threads=torch.get_num_threads())
    medians.append(timer.blocked_autorange(min_run_time=3).median)  # it waits for a GPU
    print(f"{name:44s}{1e3 * medians[-1]:9.1f} ms{medians[-1] / medians[0]:9.2f} yardsticks")


def training_step(net, loss):
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], fused=True)
    def step():
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return step


def bench_tree():
    """Stage 1 at 28 x 28 x 1, batch 256: Appendix D's tree, then that of the preset tiny."""
    x = torch.rand(256, 1, 28, 28, device=device)
    tiny = dict(latent_channels=8, bottom_up_channels=128, representation_dim=1, decoder="mlp")
    for title, settings in (("Appendix D", {}), ("tiny", tiny)):
        for parents in ((-1, 0, 0), TEN_LEAVES):
            tree = TreeVAE((1, 28, 28), parents=parents, **settings).to(device)
            step = training_step(tree, lambda: tree.loss(x)[0])
            report(f"{title}: training step, {len(tree.leaves)} leaves", step)
        tree = TreeVAE((1, 28, 28), parents=TEN_LEAVES[:17], **settings).to(device)
        tree.grow(9)
        tree.train_only(9)
        step = training_step(tree, lambda: tree.loss(x, below=9)[0])
        report(f"{title}: step of growing the 9-leaf tree", step)


def bench_diffusion():
    """Stage 2 at 28 x 28 x 1, batch 32: Appendix D's U-Net, with attention in the middle only."""
    diffusion, x = Diffusion().to(device), torch.rand(32, 1, 28, 28, device=device)
    tree = TreeVAE((1, 28, 28), parents=TEN_LEAVES).to(device).eval().requires_grad_(False)
    unet = UNet((1, 28, 28), attention=()).to(device)
    encoder = PathEncoder(tree.latent_shape, len(tree.parents), unet.emb_dim).to(device)
    report(f"paths of {CHUNK} batches", lambda: tree.infer_path(x.repeat(CHUNK, 1, 1, 1)))
    y, net = encoder(*tree.infer_path(x)).detach(), eps_net(diffusion, unet)
    step = training_step(unet, lambda: diffusion.loss(net, x, y))
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            unet.train()
            report(f"training step, {dtype}", step)
            unet.eval()  # dropout is for training
            report(f"10 DDIM steps, {dtype}", lambda: diffusion.ddim_sample(net, x.shape, y, 10))


print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
a, b = torch.randn(2, 2048, 2048, device=device)
report("2048 x 2048 x 2048 products", lambda: a @ b)
dict(tree=bench_tree, diffusion=bench_diffusion)[sys.argv[1]]()
