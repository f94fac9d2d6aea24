"""The path encoder: from a path of the tree to the vector that conditions the U-Net.

Stage 1 turns an image into a path: the latents z_i of the nodes from the root to one leaf l. The
path encoder turns the path into one vector,

    y = sum_{i in P_l} [ f_z(z_i) + f_id(i) ]              (section 3.2, unnumbered)

which the U-Net adds to its time embedding. f_z says what the image looks like at each level of
the tree, f_id which nodes it passes, so which cluster it is in. Both train with the U-Net. Beyond
the paper, `joint`: one network f(z_i, i), as z_i means something else at each node.

In: z (B, D, latent_channels, r, r) and nodes (B, D), the fields of `treevae.Path`: D nodes are on
the longest path, shorter ones are padded with node -1. Out: y (B, emb_dim).
"""

import math

import torch
from torch import nn

# What y is made of. "path" is the paper's; the others are its ablation (section 4.3, Table 3):
# the leaf's z and index, its index, its z, and nothing (y is None).
SIGNALS = ("path", "leaf", "leaf-index", "leaf-latent", "none")


class PathEncoder(nn.Module):
    """y of section 3.2. latent_shape: (latent_channels, r, r); n_nodes: pruned ones included.
    joint: see above. ValueError for a signal not in SIGNALS.
    """
    def __init__(self, latent_shape, n_nodes, emb_dim, signal="path", joint=False):
        super().__init__()
        if signal not in SIGNALS:
            raise ValueError(f"signal must be one of {', '.join(SIGNALS)}, not {signal!r}")
        self.signal, self.joint = signal, joint
        self.first = nn.ModuleDict()  # first layers of f_z and f_id
        if signal in ("path", "leaf", "leaf-latent"):
            self.first["z"] = nn.Linear(math.prod(latent_shape), emb_dim)
        if signal in ("path", "leaf", "leaf-index"):
            # Ids are names, so one-hot. A linear layer of a one-hot vector is nn.Embedding
            self.first["id"] = nn.Embedding(n_nodes, emb_dim)
        self.second = nn.ModuleList()  # second layers; joint: one for both
        for _ in list(self.first)[:1 if joint else 2]:
            self.second.append(nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, emb_dim)))

    def forward(self, z, nodes):
        """z (B, D, latent_channels, r, r), nodes (B, D) long -> y (B, emb_dim), None for "none"."""
        if self.signal == "none":
            return None
        is_leaf = nodes == nodes.amax(1, keepdim=True)  # (B, D): ids rise along a path
        chosen = nodes >= 0 if self.signal == "path" else is_leaf
        inputs = dict(z=z.flatten(2), id=nodes.clamp(min=0))  # -1: masked below
        hidden = [first(inputs[name]) for name, first in self.first.items()]  # (B, D, emb_dim)
        if self.joint:
            hidden = [sum(hidden)]
        terms = sum(second(h) for second, h in zip(self.second, hidden))  # of y, by node
        return (terms * chosen.unsqueeze(2)).sum(1)  # over i in P_l


if __name__ == "__main__":
    torch.manual_seed(0)
    nodes = torch.tensor([[0, 1, 4], [0, 2, -1]])  # -1 pads the shorter path
    z = torch.randn(2, 3, 8, 1, 1)
    print(f"Two paths of a tree: nodes {nodes.tolist()}, z {tuple(z.shape)}")
    moved = z + torch.tensor([1.0, 0, 0]).view(3, 1, 1, 1)  # the root's z
    for signal in SIGNALS[:-1]:
        encoder = PathEncoder((8, 1, 1), n_nodes=5, emb_dim=64, signal=signal)
        y = encoder(z, nodes)
        change = (encoder(moved, nodes) - y).abs().max().item()
        print(f"  {signal:11s}  y {tuple(y.shape)}, moved by the root's z: {change:.2f}")
