"""The path encoder: from a path of the tree to the vector that conditions the U-Net.

Stage 1 turns an image into a path: the latents z_i of the nodes from the root to one leaf l. The
path encoder turns the path into one vector,

    y = sum_{i in P_l} [ f_z(z_i) + f_id(i) ]              (section 3.2, unnumbered)

which the U-Net adds to its time embedding. f_z says what the image looks like at each level of
the tree, f_id which nodes it passes, so which cluster it is in. Both train with the U-Net.

In: z (B, D, latent_channels, r, r) and nodes (B, D), the fields of `treevae.Path`: D is the length
of the longest path, shorter ones are padded with node -1. Out: y (B, emb_dim).
"""

import math

import torch
from torch import nn

# What y is made of. "path" is the paper's; the others are its ablation (section 4.3, Table 3):
# the leaf's z and index, its index, its z, and nothing (y is None).
SIGNALS = ("path", "leaf", "leaf-index", "leaf-latent", "none")


class PathEncoder(nn.Module):
    """y of section 3.2. latent_shape: (latent_channels, r, r); n_nodes: pruned ones included.
    ValueError for a signal not in SIGNALS.
    """
    def __init__(self, latent_shape, n_nodes, emb_dim, signal="path"):
        super().__init__()
        if signal not in SIGNALS:
            raise ValueError(f"signal must be one of {', '.join(SIGNALS)}, not {signal!r}")
        self.signal = signal
        self.f_z, self.f_id = None, None
        if signal in ("path", "leaf", "leaf-latent"):
            first = nn.Linear(math.prod(latent_shape), emb_dim)
            self.f_z = nn.Sequential(first, nn.SiLU(), nn.Linear(emb_dim, emb_dim))
        if signal in ("path", "leaf", "leaf-index"):
            # Ids are names, so one-hot: node 7 is not more than node 3. A linear layer of a
            # one-hot vector is nn.Embedding. The authors give f_id the number.
            first = nn.Embedding(n_nodes, emb_dim)
            self.f_id = nn.Sequential(first, nn.SiLU(), nn.Linear(emb_dim, emb_dim))

    def forward(self, z, nodes):
        """z (B, D, latent_channels, r, r), nodes (B, D) long -> y (B, emb_dim), None for "none"."""
        if self.signal == "none":
            return None
        is_leaf = nodes == nodes.amax(1, keepdim=True)  # (B, D): ids rise along a path
        chosen = nodes >= 0 if self.signal == "path" else is_leaf
        terms = 0.0  # f_z(z_i) + f_id(i), (B, D, emb_dim)
        if self.f_z:
            terms = terms + self.f_z(z.flatten(2))
        if self.f_id:
            terms = terms + self.f_id(nodes.clamp(min=0))  # -1: masked below
        return (terms * chosen.unsqueeze(2)).sum(1)  # over i in P_l


if __name__ == "__main__":
    torch.manual_seed(0)
    nodes = torch.tensor([[0, 1, 4], [0, 2, -1]])  # -1 pads the shorter path
    z = torch.randn(2, 3, 8, 1, 1)
    print(f"Two paths of a tree: nodes {nodes.tolist()}, z {tuple(z.shape)}")
    for signal in SIGNALS[:-1]:  # not "none": y is None, the U-Net is not conditioned
        encoder = PathEncoder((8, 1, 1), n_nodes=5, emb_dim=64, signal=signal)
        y = encoder(z, nodes)
        changes = []
        for depth in range(3):  # what y depends on
            moved = z.clone()
            moved[0, depth] += 1
            changes.append(f"{(encoder(moved, nodes) - y).abs().max().item():.2f}")
        print(f"  {signal:11s}  y {tuple(y.shape)}, moved by z of node 0, 1, 4: {changes}")
