"""TreeVAE: a variational autoencoder whose latent variables form a binary tree.
Stage 1 of TreeDiffusion: section 3.1, Appendix A.

At each internal node i a *router* sends an image x to the left child, c_i = 0, or to the right,
c_i = 1. P(i; c), the probability that x reaches node i, is the product of q(c_j | x) on the way.
The leaves are the clusters. Node i has a latent map z_i, leaf l a decoder from z_l to the image.

    inference: d_h by depth, z_i by node generation, top-down               equations
    x --encoder--> d_H -> ... -> d_0     z_0 ~ N(0, I)                      (12); (7)
    d_0 -> q(z_0 | x), q(c_0 | x)        router p(c_0 | z_0)                (16), (18); (9)
    d_1 -> q(z_1 | z_0, x), ...          transformations z_0 -> z_1, z_2    (13)-(17); (8)
                                         decoders z_1 -> x, z_2 -> x        (11)

Images are (B, C, H, W) in [0, 1]. Stage 2 conditions its U-Net on a *path*: the z of all nodes
from the root to a leaf. Index p: generative model, theta in the paper; q: inference model, phi.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PRUNED = -2  # in place of a pruned node's parent
VAR_FLOOR = 1e-7  # where q = p, KL is 0 at any variance: without a floor both shrink, until NaN
MAP_SIDES = {16: [4], 28: [7, 4], 32: [8, 4], 64: [16, 8, 4]}  # of maps, by image side; 16: tests


class Gaussian(NamedTuple):
    """A diagonal Gaussian of z: mean and variance, (B, latent_channels, r, r) each."""
    mu: Tensor
    var: Tensor

    def sample(self):
        """One reparametrised sample of z."""
        return self.mu + self.var.sqrt() * torch.randn_like(self.mu)

    def log_prob(self, z):
        """log N(z; mu, var), summed over z's dimensions: (B,) nats."""
        log_p = -0.5 * ((z - self.mu) ** 2 / self.var + (2 * math.pi * self.var).log())
        return log_p.flatten(1).sum(1)

    def kl(self, p):
        """KL(self || p), summed over z's dimensions: (B,) nats."""
        ratio = (self.var + (self.mu - p.mu) ** 2) / p.var
        return 0.5 * (ratio - 1 - (self.var / p.var).log()).flatten(1).sum(1)


def precision_weighted(q, p):
    """Eq. (15): the product of two Gaussian densities, normalised."""
    # q is what the image says of z_i, p what the parent says: each counts by its precision 1 / var
    s = q.var + p.var
    mu = (q.mu * p.var + p.mu * q.var) / s
    return Gaussian(mu, q.var * p.var / s)  # var = 1 / (1 / var_q + 1 / var_p)


class Path(NamedTuple):
    """The paths of B images from the root to a leaf; the tree's longest has D nodes."""
    z: Tensor      # (B, D, latent_channels, r, r), root first; 0 after the leaf
    nodes: Tensor  # (B, D) long, node ids; -1 after the leaf


# == The networks ==
# d_h and z_i are r x r maps; with r = 1 they are vectors, as in the original TreeVAE.

class Conv(nn.Conv2d):
    """A convolution, computed as a linear layer where map and kernel are 1 x 1."""
    def forward(self, x):
        if x.shape[2:] == self.kernel_size == (1, 1):  # 2.5 times as fast on a CPU
            return F.linear(x.flatten(1), self.weight.flatten(1), self.bias)[:, :, None, None]
        return super().forward(x)


def block(c_in, c_out, kernel=1, stride=1, conv=Conv, **kwargs):
    """Convolution, batch norm, activation. The stride divides the map's side."""
    # Batch norm centres a router's features, so that a new router sends images both ways
    layer = conv(c_in, c_out, kernel, stride, padding=(kernel - stride + 1) // 2, **kwargs)
    return nn.Sequential(layer, nn.BatchNorm2d(c_out), nn.LeakyReLU(0.1, inplace=True))


class Residual(nn.Module):
    """h + f(h): what "resnet" adds to "cnn" at each resolution."""
    def __init__(self, channels):
        super().__init__()
        self.f = nn.Sequential(block(channels, channels, 3), block(channels, channels, 3))

    def forward(self, h):
        return h + self.f(h)


def make_encoder(kind, image_shape, width, channels, r):
    """x (B, C, H, W) -> d_H (B, channels, r, r), eq. (12)."""
    side = image_shape[-1]
    if side not in MAP_SIDES:
        raise ValueError(f"images of side {side}: resize them to 28, 32 or 64")
    c = [width] + [2 * width] * (len(MAP_SIDES[side]) - 1)  # channels at each side
    layers = [block(image_shape[0], c[0], 8, 4)]  # overlapping patches: no layer at full size
    for k in range(len(c)):
        if k > 0:
            layers.append(block(c[k - 1], c[k], 3, 2))
        if kind == "resnet":
            layers.append(Residual(c[k]))
    layers.append(block(c[-1], channels, 4 // r, 4 // r))  # 4 x 4 -> r x r
    return nn.Sequential(*layers)


def make_decoder(kind, image_shape, width, channels, r):
    """z_l (B, channels, r, r) -> mu_x before its last activation, (B, C, H, W), eq. (11)."""
    if kind == "mlp":  # r = 1
        last = Conv(4 * width, math.prod(image_shape), 1)
        return nn.Sequential(block(channels, 4 * width), block(4 * width, 4 * width), last,
                             nn.Flatten(), nn.Unflatten(1, image_shape))
    sides = MAP_SIDES[image_shape[-1]][::-1]  # the encoder's, mirrored
    c = [2 * width] * (len(sides) - 1) + [width]
    up = nn.ConvTranspose2d  # multiplies the side by the stride
    layers = [block(channels, c[0], 4 // r, 4 // r, up)]  # r x r -> 4 x 4
    for k, side in enumerate(sides):
        if k > 0:
            layers.append(block(c[k - 1], c[k], 3, 2, up, output_padding=1 - side % 2))
        if kind == "resnet":
            layers.append(Residual(c[k]))
    # 16 channels become the 4 x 4 pixels of a patch
    layers += [nn.Conv2d(width, 16 * image_shape[0], 3, padding=1), nn.PixelShuffle(4)]
    return nn.Sequential(*layers)


class ToGaussian(nn.Module):
    """Features (B, c_in, r, r) -> a Gaussian of z, eqs. (13), (14)."""
    def __init__(self, c_in, channels):
        super().__init__()
        self.linear = Conv(c_in, 2 * channels, 1)

    def forward(self, h):
        mu, raw_var = self.linear(h).float().chunk(2, 1)
        return Gaussian(mu, F.softplus(raw_var) + VAR_FLOOR)


class Router(nn.Module):
    """Features (B, c_in, r, r) -> (B,), the logit of P(c_i = 0), the paper's r: eqs. (9), (18)."""
    def __init__(self, c_in, hidden, r, kernel):
        super().__init__()
        last = nn.Linear(hidden * r * r, 1)
        self.net = nn.Sequential(block(c_in, hidden, kernel), nn.Flatten(), last)

    def forward(self, h):
        return self.net(h).float().squeeze(1)


class Node(nn.Module):
    """The networks of one node, by its place in the tree: see `TreeVAE._equip`."""
    def __init__(self):
        super().__init__()
        self.evidence = None        # d -> mu^_q, sigma^2^_q of z_i, (13), (14); every node
        self.transformation = None  # z_pa(i) -> p(z_i | z_pa(i)), (8); all but the root
        self.router_p = None        # z_i -> p(c_i | z_i), (9); with two children
        self.router_q = None        # d -> q(c_i | x), (18); with two children
        self.decoder = None         # z_i -> p(x | z_i), (11); leaves


class Visit(NamedTuple):
    """What `TreeVAE.walk` computes at one node."""
    node: int
    z: Tensor            # (B, latent_channels, r, r), a sample of q
    q: Gaussian          # q(z_i | z_pa(i), x), eqs. (16), (17)
    p: Gaussian          # p(z_i | z_pa(i)), eqs. (7), (8)
    logit_q: Tensor      # (B,) logit of r_q, eq. (18); None without a router
    logit_p: Tensor      # (B,) logit of r_p, eq. (9); or None
    log_reach_q: Tensor  # (B,) log P(i; c)


class TreeVAE(nn.Module):
    """A tree of latent variables with the networks of its nodes: eqs. (1), (2).
    image_shape: (C, H, W), H = W = 28, 32 or 64. likelihood: "bernoulli" (grey) or "gaussian".
    latent_channels, representation_dim: z_i is (latent_channels, r, r), r in {1, 2, 4}.
    bottom_up_channels: of d_h and the nodes' hidden layers. max_depth: H.
    encoder: "cnn" or "resnet"; decoder: these or, with r = 1, "mlp"; width: their channels.
    contrastive: with the heads of `contrastive_loss`. parents: the tree to build.
    ValueError for unknown settings or combinations.
    """
    # parents[i] is node i's parent: -1 at the root, PRUNED if i was pruned. Ids number the nodes in
    # order of creation, never reused: they rise along a path, and from a left child to the right.

    def __init__(self, image_shape, likelihood="bernoulli", latent_channels=16,
                 bottom_up_channels=32, representation_dim=4, max_depth=7, encoder="cnn",
                 decoder="cnn", width=32, contrastive=False, parents=(-1, 0, 0)):
        super().__init__()
        r = representation_dim
        known = likelihood in ("bernoulli", "gaussian") and encoder in ("cnn", "resnet")
        if not known or decoder not in ("cnn", "resnet", "mlp"):
            raise ValueError(f"unknown: likelihood {likelihood}, encoder {encoder} or {decoder}")
        if r not in (1, 2, 4) or (decoder == "mlp" and r != 1):
            raise ValueError(f"representation_dim must be 1, 2 or 4, and 1 with an mlp, not {r}")
        self.image_shape = tuple(image_shape)
        self.likelihood = likelihood
        self.latent_shape = (latent_channels, r, r)  # of z_i
        self.hidden = bottom_up_channels  # of d_h
        self.max_depth = max_depth
        self.decoder, self.width = decoder, width
        self.kernel = 1 if r == 1 else 3  # on r x r maps
        self.encoder = make_encoder(encoder, self.image_shape, width, self.hidden, r)
        self.bottom_up = nn.ModuleList(  # MLP_h, h = 0 .. H - 1
            [block(self.hidden, self.hidden, self.kernel) for _ in range(max_depth)])
        self.heads = nn.ModuleList()  # projections of d_h, h = 0 .. H
        for _ in range(max_depth + 1 if contrastive else 0):
            first = nn.Linear(self.hidden * r * r, self.hidden)
            last = nn.Linear(self.hidden, 10)
            self.heads.append(nn.Sequential(nn.Flatten(), first, nn.LeakyReLU(0.1), last))
        self.parents = list(parents)
        self.nodes = nn.ModuleList([Node() for _ in parents])
        for i in self.ids:
            self._equip(i)

    # -- the tree --

    @property
    def ids(self):
        """The ids of all nodes, parents before children."""
        return [i for i, parent in enumerate(self.parents) if parent != PRUNED]

    @property
    def leaves(self):
        """The leaves' ids, left to right: the columns of `leaf_probs`."""
        def leaves_of(i):
            return [l for child in self.children_of(i) for l in leaves_of(child)] or [i]
        return leaves_of(0)

    @property
    def device(self):
        return next(self.parameters()).device

    def children_of(self, i):
        """The ids of node i's children, left to right; one if the other was pruned."""
        return [j for j, parent in enumerate(self.parents) if parent == i]

    def path_to(self, i):
        """P_i: the ids from the root to node i."""
        path = [i]
        while path[0] != 0:
            path.insert(0, self.parents[path[0]])
        return path

    def depth(self, i):
        """The depth of node i; 0 at the root."""
        return len(self.path_to(i)) - 1

    def _equip(self, i):
        """Add the networks that node i's place in the tree needs, remove the others."""
        node = self.nodes[i]
        c, r, _ = self.latent_shape
        n_children = len(self.children_of(i))
        if node.evidence is None:
            node.evidence = ToGaussian(self.hidden, c)
        if node.transformation is None and i != 0:
            node.transformation = nn.Sequential(
                block(c, self.hidden, self.kernel), ToGaussian(self.hidden, c))
        if n_children < 2:
            node.router_p, node.router_q = None, None
        elif node.router_q is None:
            node.router_p = Router(c, self.hidden, r, self.kernel)
            node.router_q = Router(self.hidden, self.hidden, r, self.kernel)
        if n_children > 0:
            node.decoder = None
        elif node.decoder is None:
            node.decoder = make_decoder(self.decoder, self.image_shape, self.width, c, r)
        node.to(self.device).train(self.training)

    # -- inference --

    def bottom_up_pass(self, x):
        """x -> [d_0, ..., d_H], each (B, bottom_up_channels, r, r), eq. (12)."""
        d = [self.encoder(x)]  # d_H
        for mlp in reversed(self.bottom_up):
            d.insert(0, mlp(d[0]))  # d_h = MLP_h(d_{h+1})
        return d

    def _descend(self, i, log_reach, logit):
        """log P(i; c) of node i and its router's logit, (B,) each -> {child: its log P}."""
        children = self.children_of(i)
        if len(children) < 2:  # a leaf, or one child was pruned
            return {child: log_reach for child in children}
        left, right = children
        return {left: log_reach + F.logsigmoid(logit),  # c_i = 0
                right: log_reach + F.logsigmoid(-logit)}  # c_i = 1

    def _leaf_probs(self, logits, n):
        """Router logits, {id: (n,)} -> leaf probabilities, (n, n_leaves)."""
        log_reach = {0: torch.zeros(n, device=self.device)}
        for i in self.ids:
            log_reach |= self._descend(i, log_reach[i], logits.get(i))
        return torch.stack([log_reach[l] for l in self.leaves], 1).exp()

    def leaf_probs(self, x):
        """P(l; c) of the leaves, left to right: (B, n_leaves), eqs. (12), (18)."""
        d = self.bottom_up_pass(x)  # no z and no decoder: deterministic in eval mode
        logits = {i: self.nodes[i].router_q(d[self.depth(i)])
                  for i in self.ids if self.nodes[i].router_q}
        return self._leaf_probs(logits, len(x))

    def walk(self, d, below=None):
        """A sample of all z, no decisions -> [Visit]. below: only the path to it and what is below.
        d: `bottom_up_pass`.
        """
        z, visits = {}, []
        log_reach = {0: torch.zeros(len(d[0]), device=d[0].device)}
        for i in self.ids:
            path = self.path_to(i)
            if below is not None and below not in path and i not in self.path_to(below):
                continue
            node, d_i = self.nodes[i], d[len(path) - 1]
            q = node.evidence(d_i)  # eqs. (13), (14), and at the root (16)
            if i == 0:
                p = Gaussian(torch.zeros_like(q.mu), torch.ones_like(q.var))  # eq. (7)
            else:
                p = node.transformation(z[self.parents[i]])  # eq. (8)
                q = precision_weighted(q, p)  # eqs. (15), (17)
            z[i] = q.sample()
            logit_q, logit_p = None, None
            if node.router_q:
                logit_q = node.router_q(d_i)  # eq. (18): sees d, not z
                logit_p = node.router_p(z[i])  # eq. (9)
            log_reach |= self._descend(i, log_reach[i], logit_q)
            visits.append(Visit(i, z[i], q, p, logit_q, logit_p, log_reach[i]))
        return visits

    # -- the ELBO --

    def log_p_x(self, leaf, z, x):
        """log p(x | z_l), eq. (11), summed over pixels: (B,) nats."""
        out = self.nodes[leaf].decoder(z).float()
        if self.likelihood == "gaussian":
            return Gaussian(out, torch.ones_like(out)).log_prob(x)  # sigma = 1
        return (x * out - F.softplus(out)).flatten(1).sum(1)  # x log mu + (1 - x) log(1 - mu)

    def elbo(self, x, visits=None):
        """L(x | T), eq. (21), and its terms, from one `walk`: {name: (B,)} in nats."""
        if visits is None:
            visits = self.walk(self.bottom_up_pass(x))
        names = ("reconstruction", "kl_root", "kl_nodes", "kl_decisions")
        terms = {name: torch.zeros_like(visits[0].log_reach_q) for name in names}
        for v in visits:
            # The expectation over the decisions is exact: it weights node i's terms by P(i; c)
            reach = v.log_reach_q.exp()  # (B,), 1 at the root
            terms["kl_root" if v.node == 0 else "kl_nodes"] += reach * v.q.kl(v.p)
            if v.logit_q is not None:
                r_q = v.logit_q.sigmoid()
                # log( q(c_i | x) / p(c_i | z_i) ) for c_i = 0 and c_i = 1
                left = F.logsigmoid(v.logit_q) - F.logsigmoid(v.logit_p)
                right = F.logsigmoid(-v.logit_q) - F.logsigmoid(-v.logit_p)
                terms["kl_decisions"] += reach * (r_q * left + (1 - r_q) * right)
            if self.nodes[v.node].decoder:
                terms["reconstruction"] += reach * self.log_p_x(v.node, v.z, x)
        kl = terms["kl_root"] + terms["kl_nodes"] + terms["kl_decisions"]
        return dict(elbo=terms["reconstruction"] - kl, **terms)

    def loss(self, x, kl_weight=1.0, below=None, view=None, contrastive_weight=100.0):
        """The loss, a scalar in nats an image; {name: scalar} of its parts; the `walk` of x.
        Minus eq. (21), its KL terms weighted; given a second view of the images, plus the weighted
        `contrastive_loss`. below: see `walk`.
        """
        d = self.bottom_up_pass(x if view is None else torch.cat([x, view]))
        visits = self.walk([h[:len(x)] for h in d], below)  # of x, not of its view
        means = {name: term.mean() for name, term in self.elbo(x, visits).items()}
        kl = means["kl_root"] + means["kl_nodes"] + means["kl_decisions"]
        loss = kl_weight * kl - means["reconstruction"]
        if view is not None:
            means["contrastive"] = self.contrastive_loss(d, visits, below)
            loss = loss + contrastive_weight * means["contrastive"]
        for v in visits:
            if self.nodes[v.node].decoder:
                means[f"P_{v.node}"] = v.log_reach_q.exp().mean()  # P(l; c)
        return loss, means, visits

    def contrastive_loss(self, d, visits, below=None):
        """NT-Xent between images and their views: a scalar. below: this node's router alone.
        d: `bottom_up_pass` of the images, then of the views; visits: `walk` of the images.
        """
        total = 0.0
        # Decisions, summed over routers: an image and its view go the same way, other images do not
        decide = [v for v in visits if v.logit_q is not None and below in (None, v.node)]
        if decide:
            views = [(v.node, d[self.depth(v.node)][len(v.z):]) for v in decide]
            r_view = torch.stack([self.nodes[i].router_q(h) for i, h in views]).sigmoid()
            r = torch.stack([v.logit_q for v in decide]).sigmoid()  # (n_routers, B)
            a = torch.stack([r, 1 - r], -1)  # (n_routers, B, 2)
            b = torch.stack([r_view, 1 - r_view], -1)
            log_reach = torch.stack([v.log_reach_q.detach() for v in decide])
            total = total + nt_xent(a, b, 1.0, log_reach).sum()
        # Features, averaged over depths: d_h becomes invariant to crops. a, b: (H + 1, B, 10)
        if below is None:
            a, b = torch.stack([head(h) for head, h in zip(self.heads, d)]).chunk(2, 1)
            total = total + nt_xent(a, b, 0.5, a.new_zeros(a.shape[:2])).mean()
        return total

    @torch.no_grad()
    def log_likelihood(self, x, n_samples=1000):
        """A lower bound on log p(x), eq. (20), in expectation; above the ELBO: (B,) nats.
        log sum_k sum_l [p(z^k_P_l) / q(z^k_P_l | x)] P_p(l | z^k) p(x | z^k_l) / K, K = n_samples.
        """
        # z is sampled, the leaves are summed: the mean inside the log is unbiased
        d = self.bottom_up_pass(x)
        samples = []
        for _ in range(n_samples):
            log_w = {0: 0.0}
            leaves = []
            for v in self.walk(d):
                w = log_w[v.node] + v.p.log_prob(v.z) - v.q.log_prob(v.z)  # log [p / q] P_p, so far
                log_w |= self._descend(v.node, w, v.logit_p)
                if self.nodes[v.node].decoder:
                    leaves.append(w + self.log_p_x(v.node, v.z, x))
            samples.append(torch.stack(leaves).logsumexp(0))  # sum_l, (B,)
        return torch.stack(samples).logsumexp(0) - math.log(n_samples)

    # -- paths and images --
    # z does not depend on the decisions: sample all z, then a leaf, and pick its path.

    def sample_latents(self, n):
        """n samples of the prior of all z: {id: (n, latent_channels, r, r)}."""
        z = {0: torch.randn(n, *self.latent_shape, device=self.device)}  # eq. (7)
        for i in self.ids[1:]:
            z[i] = self.nodes[i].transformation(z[self.parents[i]]).sample()  # eq. (8)
        return z

    def prior_leaf_probs(self, z):
        """z of `sample_latents` -> P_p(l | z) by the generative routers, eq. (9): (n, n_leaves)."""
        logits = {i: self.nodes[i].router_p(z[i]) for i in self.ids if self.nodes[i].router_p}
        return self._leaf_probs(logits, len(z[0]))

    def pick_path(self, z, leaf):
        """z of all nodes, {id: (B, ...)}, and leaf (B,), columns of `leaf_probs` -> Path."""
        D = max(len(self.path_to(l)) for l in self.leaves)
        path_z = torch.zeros(len(leaf), D, *self.latent_shape, device=leaf.device)
        nodes = torch.full((len(leaf), D), -1, device=leaf.device)
        for column, l in enumerate(self.leaves):
            here = leaf == column  # (B,)
            for k, i in enumerate(self.path_to(l)):
                path_z[:, k] = torch.where(here[:, None, None, None], z[i], path_z[:, k])
                nodes[:, k] = torch.where(here, i, nodes[:, k])
        return Path(path_z, nodes)

    def infer_path(self, x, leaf=None):
        """A sample of eq. (2) -> Path. leaf: (B,) long, columns of `leaf_probs`; None: sampled."""
        visits = self.walk(self.bottom_up_pass(x))
        if leaf is None:  # l ~ P(l; c), eq. (6)
            probs = self._leaf_probs({v.node: v.logit_q for v in visits}, len(x))
            leaf = probs.multinomial(1).squeeze(1)
        return self.pick_path({v.node: v.z for v in visits}, leaf)

    def sample_path(self, n):
        """n samples of eqs. (1), (10), the prior -> Path."""
        z = self.sample_latents(n)
        leaf = self.prior_leaf_probs(z).multinomial(1).squeeze(1)
        return self.pick_path(z, leaf)

    def decode(self, path):
        """mu_x of eq. (11) at each path's leaf: images, (B, C, H, W) in [0, 1]."""
        images = 0.0  # (B, C, H, W)
        end = path.nodes.amax(1)  # leaf
        for leaf in self.leaves:  # each decodes all B: picking its rows would make a GPU wait
            out = self.nodes[leaf].decoder(path.z[:, self.depth(leaf)]).float()
            mu_x = out.sigmoid() if self.likelihood == "bernoulli" else out.clamp(0, 1)
            images = torch.where((end == leaf)[:, None, None, None], mu_x, images)
        return images

    # -- growing and pruning --

    def next_split(self, probs, min_images, groups=None):
        """The growth rule. -> (leaf to split, its images: (N,) bool), or None.
        probs: `leaf_probs` of the N training images. A leaf has the images with P(l; c) at least
        min(1 / #leaves, 1/2); the leaf with the most is split, if they are at least min_images.
        """
        leaves = self.leaves
        has = probs >= min(1 / len(leaves), 0.5)
        sizes = has.sum(0)
        if groups:  # beyond the paper: an image counts once, and a leaf of one cluster stays
            sizes = torch.bincount(probs.argmax(1), minlength=len(leaves))
            sizes *= torch.tensor([len(groups[l]) > 1 for l in leaves], device=sizes.device)
        for column in sizes.argsort(descending=True, stable=True).tolist():
            if sizes[column] >= min_images and self.depth(leaves[column]) < self.max_depth:
                return leaves[column], has[:, column]
        return None

    def next_prune(self, probs, share=0.01):
        """The leaf with the fewest images, by argmax, if under `share` of them; else None."""
        sizes = torch.bincount(probs.argmax(1), minlength=len(self.leaves))
        return self.leaves[sizes.argmin()] if sizes.min() < share * len(probs) else None

    def grow(self, node_id):
        """Split a leaf -> its children's ids. ValueError if it cannot be split."""
        if node_id not in self.leaves or self.depth(node_id) >= self.max_depth:
            raise ValueError(f"node {node_id} is no leaf, or at max_depth: it cannot be split")
        self.parents += [node_id, node_id]
        self.nodes.extend([Node(), Node()])
        children = self.children_of(node_id)
        for i in [node_id, *children]:
            self._equip(i)
        return children

    def prune(self, node_id):
        """Remove a leaf. ValueError if it cannot be pruned."""
        if node_id not in self.leaves or node_id == 0:
            raise ValueError(f"node {node_id} is no leaf, or the root: it cannot be pruned")
        parent = self.parents[node_id]
        self.parents[node_id] = PRUNED
        self.nodes[node_id] = Node()
        if self.children_of(parent) or parent == 0:
            self._equip(parent)  # it stays, with one child and no router: depths must not shift
        else:
            self.prune(parent)  # a parent left with no child goes too

    def train_only(self, node=None):
        """Train everything, or only what `grow(node)` added: its routers and its children."""
        # Frozen parts are in eval mode, or their batch norm would drift to one leaf's images
        self.requires_grad_(node is None).train(node is None)
        if node is not None:
            new = [self.nodes[child] for child in self.children_of(node)]
            for part in [self.nodes[node].router_p, self.nodes[node].router_q, *new]:
                part.requires_grad_(True).train()


def nt_xent(a, b, temperature, log_weight):
    """NT-Xent (Chen et al. 2020) of two views a, b of B images, at K routers or depths: (K,).
    l_i = -log( exp(s(a_i, a_i') / tau) / sum_{k != i} w_k exp(s(a_i, a_k) / tau) ), s the cosine
    similarity, i' the other view of i; the mean of w_i l_i. a, b: (K, B, c); log_weight: (K, B).
    """
    # w_k: image k's P(node; c), 1 for features. The authors have no w_k and divide by sum w_i
    views = F.normalize(torch.cat([a, b], 1).float(), dim=2)  # (K, 2B, c)
    K, n, _ = views.shape  # n = 2B
    log_w = log_weight.repeat(1, 2)  # (K, 2B)
    itself = torch.eye(n, dtype=torch.bool, device=a.device)
    logits = views @ views.mT / temperature + log_w[:, None]  # (K, 2B, 2B)
    logits = logits.masked_fill(itself, -math.inf).flatten(0, 1)
    partner = torch.arange(n, device=a.device).roll(n // 2).repeat(K)  # i' = i + B or i - B
    # Cross-entropy weights the numerator, too: it is l_i - log w_i', and w_i' = w_i
    l = F.cross_entropy(logits, partner, reduction="none").view(K, n) + log_w
    return (log_w.exp() * l).mean(1)


# == Beyond the paper ==
# With the ELBO alone a new router keeps whatever split it finds first. `next_phase` in train.py
# plans the splits: it clusters features that the contrastive loss made invariant to crops.

def decision_loss(tree, visits, targets, node=None):
    """Cross-entropy of P(l; c) to targets (B, n_leaves); or of node's router_q, to (B, 2)."""
    log_reach = {v.node: v.log_reach_q for v in visits}
    ends = tree.leaves if node is None else tree.children_of(node)
    log_p = torch.stack([log_reach[i] for i in ends], 1)  # (B, n); softmax takes out P(node)
    return F.cross_entropy(log_p, targets)  # a row's sum weights its image


@torch.no_grad()
def plan_splits(tree, batches, view, n_leaves, n_points=2000, n_voters=7):
    """Clusters of the images in batches, and how to split them.
    -> shares (N, n_leaves + 2) of the clusters among an image's nearest points; merges {group: its
    two sides}, all tuples. view(x): another view of a batch.
    """
    head = tree.heads[-1][:-1]  # without its last layer, where NT-Xent spreads the images evenly
    features = torch.cat([sum(head(tree.bottom_up_pass(view(x))[-1]) for _ in range(4)) / 4
                          for x in batches])  # (N, hidden): a mean of four views
    # n_points of them are clustered; each image follows the n_voters nearest points
    points = features[torch.randperm(len(features))[:n_points].to(features.device)]
    clusters, merges = spectral_clusters(points.cpu().double(), n_leaves + 2, n_leaves)
    clusters, shares = clusters.to(features), []
    for some in features.split(5000):
        near = torch.cdist(some, points).topk(min(n_voters, len(points)), largest=False).indices
        shares.append(clusters[near].mean(1))
    return torch.cat(shares), merges


def spectral_clusters(points, n_clusters, n_dims):
    """Spectral clustering, after Ng, Jordan, Weiss (2001), in n_dims eigenvectors.
    points: (N, k) -> one-hot (N, n_clusters); merges, see above.
    """
    distance = torch.cdist(points, points).fill_diagonal_(math.inf)
    n_near = min(max(10, 3 * len(points) // 100), len(points) - 1)
    nearest = distance.topk(n_near, largest=False).indices
    graph = torch.zeros_like(distance).scatter_(1, nearest, 1.0)
    graph = graph + graph.T + 1e-6 / (1 + distance)  # W; the last: if there are no edges
    degree = graph.sum(1)  # the diagonal of D
    affinity = graph / (degree[:, None] * degree).sqrt()  # D^-1/2 W D^-1/2
    # In its largest eigenvectors the points of a cluster lie in one direction
    rows = F.normalize(torch.linalg.eigh(affinity).eigenvectors[:, -n_dims:])
    # K-means of directions, from 20 starts at once: points far from each other
    centres = rows[torch.randint(len(rows), (20, 1))]
    for _ in range(n_clusters - 1):
        far = 1 - (rows @ centres.mT).amax(2)  # (20, N)
        centres = torch.cat([centres, rows[far.clamp(min=1e-9).multinomial(1)]], 1)
    for _ in range(30):
        member = F.one_hot((rows @ centres.mT).argmax(2), n_clusters).double()
        centres = F.normalize(member.mT @ rows, dim=2)
    clusters = member[(rows @ centres.mT).amax(2).sum(1).argmax()]  # the best start
    # Average linkage: the groups with the most edges for their volumes merge, until one is left
    groups, merges = [(k,) for k in range(n_clusters) if clusters[:, k].any()], {}
    while len(groups) > 1:
        member = torch.stack([clusters[:, group].sum(1) for group in map(list, groups)], 1)
        edges = member.T @ graph @ member
        volume = edges.sum(1)
        density = edges / (volume[:, None] * volume)
        i, j = divmod(density.triu(1).argmax().item(), len(groups))  # i < j
        merges[groups[i] + groups[j]] = groups[i], groups[j]
        groups[i] += groups.pop(j)
    return clusters, merges


if __name__ == "__main__":
    torch.manual_seed(0)
    tree = TreeVAE((1, 28, 28), latent_channels=8, representation_dim=1, max_depth=3, width=8)
    x = (torch.rand(64, 1, 28, 28) < torch.rand(64, 1, 1, 1)).float()
    for v in tree.walk(tree.bottom_up_pass(x)):
        print(f"node {v.node}: z {tuple(v.z.shape)}, KL(q || p) {v.q.kl(v.p).mean():.2f} nats")
    optimizer = torch.optim.Adam(tree.parameters(), lr=1e-2)
    for step in range(61):
        loss, terms, visits = tree.loss(x)  # eq. (21)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step}: " + ", ".join(f"{k} {v:.2f}" for k, v in terms.items()))
    print(f"node 2 is split into {tree.grow(2)}: parents {tree.parents}")
