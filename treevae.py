"""TreeVAE: a variational autoencoder whose latent variables form a binary tree, learnt without labels.

This is stage 1 of TreeDiffusion: section 3.1 and Appendix A of the paper, equations (1), (2) and (7)-(21); the text has no (19).

An image x walks from the root to a leaf. At each internal node a *router* decides, c_i = 0: left, or 1: right, so every
node i is reached with a probability P(i; c), the product of q(c_j | x) over the decisions on its way. The leaves are the
clusters. Each node carries a latent map z_i, and each leaf has a decoder of its own, which draws the image from z_l.

          inference: d upwards, then z down     generation, top-down
          x --encoder--> d_H -> ... -> d_0      z_0 ~ N(0, I)                           eqs. (12); (7)
          d_0 -> q(z_0 | x), q(c_0 | x)         router p(c_0 | z_0)                     eqs. (16), (18); (9)
          d_1 -> q(z_1 | z_0, x), ...           transformations z_0 -> z_1, z_0 -> z_2  eqs. (13)-(15), (17); (8)
                                                decoders z_1 -> x, z_2 -> x             eq. (11)

In: images (B, C, H, W) in [0, 1]. Out: the terms of the ELBO in nats an image, leaf probabilities, and *paths*: the z of
every node from the root to one leaf, which stage 2 turns into its conditioning.

Read the networks first, then `TreeVAE` from top to bottom: the tree, inference, the ELBO, generation, growing and
pruning. Index p belongs to the generative model (theta in the paper), q to the inference model (phi).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

PRUNED = -2  # stands for the parent of a node that was pruned; its id is never used again


class Gaussian(NamedTuple):
    """A diagonal normal distribution of z: mean and variance, both (B, latent_channels, r, r)."""
    mu: torch.Tensor
    var: torch.Tensor

    def sample(self):
        """One reparametrised sample, (B, latent_channels, r, r)."""
        return self.mu.addcmul(self.var.sqrt(), torch.randn_like(self.mu))

    def log_prob(self, z):
        """log N(z; mu, var) in nats, summed over the dimensions of z: (B,)."""
        return -0.5 * ((z - self.mu) ** 2 / self.var + self.var.log() + math.log(2 * math.pi)).flatten(1).sum(1)

    def kl(self, other):
        """KL(self || other) in nats, summed over the dimensions of z: (B,)."""
        ratio = (self.var + (self.mu - other.mu) ** 2) / other.var
        return 0.5 * (ratio - 1 + other.var.log() - self.var.log()).flatten(1).sum(1)

    def times(self, other):
        """The product of two normal densities, normalised: eq. (15) with its fractions cleared, so that only the sum of the
        variances is divided by. Each counts by its precision: what the image says, and what the parent does.
        """
        share = other.var / (self.var + other.var)
        return Gaussian(other.mu.lerp(self.mu, share), share * self.var)


class Path(NamedTuple):
    """The paths of B images from the root to one leaf each; D is the number of nodes on the longest path of the tree.

    z:     (B, D, latent_channels, r, r)  the latents, root first; zero where a path is shorter
    nodes: (B, D) long                    the node ids, root first; -1 where a path is shorter. Ids rise along a path, so
                                          `nodes.amax(1)` is the leaf's, and `nodes >= 0` leaves the padding out.
    """
    z: torch.Tensor
    nodes: torch.Tensor


# == The networks =====================================================================================================
# All latent maps are r x r; at r = 1 each convolution among them is a linear layer, and with an MLP as encoder and decoders the
# model is the vector form of the original TreeVAE.

class Conv(nn.Conv2d):
    """A convolution that knows it is a linear layer where map and kernel are 1 x 1: 2.5 times faster there on a CPU."""

    def forward(self, x):
        if x.shape[2:] == self.kernel_size == (1, 1):
            return F.linear(x.flatten(1), self.weight.flatten(1), self.bias)[:, :, None, None]
        return super().forward(x)


def block(c_in, c_out, kernel=1, conv=Conv, padding=None, **kwargs):
    """Convolution, batch norm, activation: what every network here is made of. Padding: by default an odd kernel keeps the size.

    Batch norm is more than speed: it centres what a router's logit is made from, so that a fresh router divides its images.
    With group norm in its place the first router sent all of Fashion-MNIST to one side within an epoch.
    """
    layer = conv(c_in, c_out, kernel, padding=kernel // 2 if padding is None else padding, **kwargs)
    return nn.Sequential(layer, nn.BatchNorm2d(c_out), nn.LeakyReLU(0.1, inplace=True))


def dense(c_in, c_out):
    """A linear layer, batch norm, activation: `block` for vectors."""
    return nn.Sequential(nn.Linear(c_in, c_out), nn.BatchNorm1d(c_out), nn.LeakyReLU(0.1, inplace=True))


def map_sides(side):
    """The sides of the feature maps after a convolution of stride 4, halved down to 4: 28 -> [7, 4], 64 -> [16, 8, 4]."""
    sides = [side // 4]
    while sides[-1] > 4:
        sides.append((sides[-1] + 1) // 2)
    if side % 4 or sides[-1] != 4:
        raise ValueError(f"an image of side {side} does not halve down to 4; resize it to 28, 32 or 64")
    return sides


class Residual(nn.Module):
    """h + f(h), f two 3 x 3 blocks: what a "resnet" has after each change of resolution and a "cnn" has not."""

    def __init__(self, channels):
        super().__init__()
        self.f = nn.Sequential(block(channels, channels, 3), block(channels, channels, 3))

    def forward(self, h):
        return h + self.f(h)


def make_encoder(kind, image_shape, width, channels, r):
    """x (B, C, H, W) -> d_H (B, channels, r, r), where eq. (12) begins.

    "mlp" (r = 1): two layers, of 8 * width and `channels` units; the image may be a vector of features, too. "cnn": one
    convolution looks at the image in overlapping patches and strides over 4 pixels, so that nothing is computed at full size;
    others halve the map; the last makes it r x r. "resnet": the same with residual blocks between.
    """
    if kind == "mlp":
        return nn.Sequential(nn.Flatten(), dense(math.prod(image_shape), 8 * width), dense(8 * width, channels),
                             nn.Unflatten(1, (channels, 1, 1)))
    layers, c = [block(image_shape[0], width, 8, stride=4, padding=2)], width
    for _ in map_sides(image_shape[-1])[1:]:
        layers += [Residual(c)] * (kind == "resnet") + [block(c, 2 * width, 3, stride=2)]
        c = 2 * width
    layers += [Residual(c)] * (kind == "resnet")
    return nn.Sequential(*layers, block(c, channels, 4 // r, stride=4 // r, padding=0))


def make_decoder(kind, image_shape, width, channels, r):
    """z_l (B, channels, r, r) -> (B, C, H, W), mu_x of eq. (11) before its last activation; the encoder's mirror image.

    "mlp": two layers of 4 * width units. "cnn": the last convolution gives the 4 x 4 pixels of each patch as channels, and
    PixelShuffle lays them out.
    """
    if kind == "mlp":
        return nn.Sequential(nn.Flatten(), dense(channels, 4 * width), dense(4 * width, 4 * width),
                             nn.Linear(4 * width, math.prod(image_shape)), nn.Unflatten(1, image_shape))
    sides = map_sides(image_shape[-1])[::-1]                                   # [4, 7] for 28
    widths = [2 * width] * (len(sides) - 1) + [width]
    layers = [block(channels, widths[0], 4 // r, nn.ConvTranspose2d, padding=0, stride=4 // r)]
    for k in range(len(sides) - 1):
        layers += [Residual(widths[k])] * (kind == "resnet") + [
            block(widths[k], widths[k + 1], 3, nn.ConvTranspose2d, stride=2, output_padding=1 - sides[k + 1] % 2)]   # 4 -> 7 or 8
    layers += [Residual(width)] * (kind == "resnet")
    return nn.Sequential(*layers, nn.Conv2d(width, 16 * image_shape[0], 3, padding=1), nn.PixelShuffle(4))


class ToGaussian(nn.Module):
    """Features (B, c_in, r, r) -> a Gaussian of z: a mean, eq. (13), and the softplus of a variance, eq. (14), linear at each position."""

    def __init__(self, c_in, channels):
        super().__init__()
        self.linear = Conv(c_in, 2 * channels, 1)

    def forward(self, h):
        mu, raw_var = self.linear(h).float().chunk(2, 1)
        return Gaussian(mu, F.softplus(raw_var))


class Router(nn.Module):
    """Features (B, c_in, r, r) -> (B,) the logit of r_i, the probability of going left: eqs. (9), (18)."""

    def __init__(self, c_in, hidden, r, kernel):
        super().__init__()
        self.net = nn.Sequential(block(c_in, hidden, kernel), nn.Flatten(), nn.Linear(hidden * r * r, 1))

    def forward(self, h):
        return self.net(h).float().squeeze(1)


class Node(nn.Module):
    """The networks of one node. Which of them it has depends on its place in the tree: see `TreeVAE._equip`."""

    def __init__(self):
        super().__init__()
        self.evidence = None         # d -> what the image says of z_i, eqs. (13), (14); every node
        self.transformation = None   # z_pa(i) -> p(z_i | z_pa(i)), eq. (8); every node but the root
        self.router_p = None         # z_i -> p(c_i | z_i), eq. (9); nodes with two children
        self.router_q = None         # d -> q(c_i | x), eq. (18); the same
        self.decoder = None          # z_i -> p(x | z_i), eq. (11); leaves


class Visit(NamedTuple):
    """What a walk down the tree finds at one node, for all B images."""
    node: int
    z: torch.Tensor            # (B, latent_channels, r, r)  a sample of q
    q: Gaussian                # q(z_i | z_pa(i), x), eqs. (16), (17)
    p: Gaussian                # p(z_i | z_pa(i)), eqs. (7), (8)
    logit_q: torch.Tensor      # (B,) logit of q(c_i = 0 | x), left, eq. (18); None where there is no decision
    logit_p: torch.Tensor      # (B,) logit of p(c_i = 0 | z_i), eq. (9); the same
    log_reach_q: torch.Tensor  # (B,) log P(i; c), the probability under q that x reaches node i
    log_reach_p: torch.Tensor  # (B,) the same under the generative routers


class TreeVAE(nn.Module):
    """A tree of latent variables, eqs. (1) and (2), with the networks of its nodes.

    image_shape: (C, H, W), H = W = 28, 32 or 64.       likelihood: "bernoulli" for grey images, "gaussian" (sigma = 1).
    latent_channels, representation_dim: z_i is (latent_channels, r, r), r = representation_dim in {1, 2, 4}.
    bottom_up_channels: channels of d_h, and the hidden width of the nodes' networks.
    max_depth: H, the depth the tree may grow to.
    encoder, decoder: "cnn", "resnet" (for colour) or "mlp" (both, for vectors of features: image_shape = (n_features,)).
    width: their size, see `make_encoder` and `make_decoder`.
    contrastive: whether there are projection heads, which `loss` with a second view needs, one a depth.
    parents: the tree to build, by default a root with two leaves.

    `parents[i]` is the id of node i's parent, -1 at the root, PRUNED (-2) once node i is gone. An id is the order of
    creation: it never changes and is never used again, and a child's is larger than its parent's. Of two children the
    one with the smaller id is the left one. Batch norm wants `.eval()` for everything but training.
    """

    def __init__(self, image_shape, likelihood="bernoulli", latent_channels=16, bottom_up_channels=32,
                 representation_dim=4, max_depth=7, encoder="cnn", decoder="cnn", width=32, contrastive=False, parents=(-1, 0, 0)):
        super().__init__()
        r = representation_dim
        if likelihood not in ("bernoulli", "gaussian") or r not in (1, 2, 4) or (
                not {encoder, decoder} <= {"cnn", "resnet", "mlp"} or "mlp" in (encoder, decoder) and r != 1):
            raise ValueError(f"likelihood {likelihood!r} with representation_dim {r}, encoder {encoder!r} and decoder {decoder!r}: "
                             "choose among bernoulli or gaussian; 1, 2 or 4; cnn or resnet, or mlp if representation_dim is 1")
        self.image_shape, self.likelihood, self.max_depth = tuple(image_shape), likelihood, max_depth
        self.latent_shape, self.hidden, self.decoder, self.width = (latent_channels, r, r), bottom_up_channels, decoder, width
        self.kernel = 3 if r > 1 else 1
        self.encoder = make_encoder(encoder, self.image_shape, width, self.hidden, r)
        self.bottom_up = nn.ModuleList([block(self.hidden, self.hidden, self.kernel) for _ in range(max_depth)])   # MLP_h, h = 0..H-1
        self.heads = nn.ModuleList([nn.Sequential(nn.Flatten(), nn.Linear(self.hidden * r * r, self.hidden), nn.LeakyReLU(0.1),
                                                  nn.Linear(self.hidden, 10)) for _ in range((max_depth + 1) * contrastive)])
        self.parents = list(parents)
        self.nodes = nn.ModuleList([Node() for _ in parents])
        for i in self.ids:
            self._equip(i)

    # -- the tree -----------------------------------------------------------------------------------------------------

    @property
    def ids(self):
        """The ids of all nodes in the tree, parents before children."""
        return [i for i, parent in enumerate(self.parents) if parent != PRUNED]

    @property
    def leaves(self):
        """The leaves' ids, left to right: the columns of `leaf_probs`."""
        def below(i):
            return [leaf for child in self.children_of(i) for leaf in below(child)] or [i]
        return below(0)

    def children_of(self, i):
        """The ids of node i's children, left to right: two; none for a leaf; one where pruning took the other."""
        return [j for j, parent in enumerate(self.parents) if parent == i]

    def path_to(self, i):
        """The ids from the root to node i, both included: P_i. ValueError for a node that is not in the tree."""
        if i not in self.ids:
            raise ValueError(f"node {i} is not in the tree, whose nodes are {self.ids}")
        return ([] if i == 0 else self.path_to(self.parents[i])) + [i]

    def depth(self, i):
        """The depth of node i; 0 at the root."""
        return len(self.path_to(i)) - 1

    def _equip(self, i):
        """Give node i the networks that its place asks for and take those that it does not; others stay as they are."""
        node, (c, r, _), n_children = self.nodes[i], self.latent_shape, len(self.children_of(i))
        device = next(self.encoder.parameters()).device
        def make(name, wanted, build):
            if not wanted:
                setattr(node, name, None)
            elif getattr(node, name) is None:
                setattr(node, name, build().to(device).train(self.training))
        make("evidence", True, lambda: ToGaussian(self.hidden, c))
        make("transformation", i != 0, lambda: nn.Sequential(block(c, self.hidden, self.kernel), ToGaussian(self.hidden, c)))
        make("router_p", n_children == 2, lambda: Router(c, self.hidden, r, self.kernel))
        make("router_q", n_children == 2, lambda: Router(self.hidden, self.hidden, r, self.kernel))
        make("decoder", n_children == 0, lambda: make_decoder(self.decoder, self.image_shape, self.width, c, r))

    # -- inference ----------------------------------------------------------------------------------------------------

    def bottom_up_pass(self, x):
        """Eq. (12): images -> [d_0, ..., d_H], each (B, bottom_up_channels, r, r); a node of depth h sees d_h."""
        d = [self.encoder(x)]
        for mlp in reversed(self.bottom_up):
            d.append(mlp(d[-1]))
        return d[::-1]

    def children_reach(self, i, log_reach, logit):
        """log P of node i's children from its own: + log r_i to the left, + log(1 - r_i) to the right. {id: (B,)}"""
        children = self.children_of(i)
        if len(children) < 2:
            return {child: log_reach for child in children}
        return {children[0]: log_reach + F.logsigmoid(logit), children[1]: log_reach + F.logsigmoid(-logit)}

    def leaf_probs(self, x):
        """P(l; c) of every leaf, left to right: (B, n_leaves), rows sum to 1. Eqs. (12) and (18) only: no z, no decoder.

        The product of the decisions on the way, in log space.
        """
        d = self.bottom_up_pass(x)
        log_reach = {0: torch.zeros(len(d[0]), device=d[0].device)}
        for i in self.ids:
            router = self.nodes[i].router_q
            log_reach |= self.children_reach(i, log_reach[i], router and router(d[self.depth(i)]))
        return torch.stack([log_reach[leaf] for leaf in self.leaves], 1).exp()

    def _posterior(self, i, d_i, z_parent):
        """q(z_i | z_pa(i), x) and p(z_i | z_pa(i)) of node i, two Gaussians; z_parent is not looked at for the root."""
        q = self.nodes[i].evidence(d_i)                                        # eqs. (13), (14)
        if i == 0:
            return q, Gaussian(torch.zeros_like(q.mu), torch.ones_like(q.var))  # eqs. (16), (7)
        p = self.nodes[i].transformation(z_parent)                             # eq. (8)
        return q.times(p), p                                                   # eqs. (15), (17)

    def walk(self, d, below=None):
        """One Monte Carlo walk over the tree, a Visit for each node, parents first: samples every z and no decision.

        d: from `bottom_up_pass`. below: visit only the nodes on the path to this one, and those under it.
        """
        ids = self.ids if below is None else [i for i in self.ids if below in self.path_to(i) or i in self.path_to(below)]
        z, start = {}, torch.zeros(len(d[0]), device=d[0].device)
        log_reach_q, log_reach_p = {0: start}, {0: start}
        for i in ids:
            node, d_i = self.nodes[i], d[self.depth(i)]
            q, p = self._posterior(i, d_i, z.get(self.parents[i]))
            z[i] = q.sample()
            logit_q = node.router_q and node.router_q(d_i)                     # eq. (18); None where there is no decision
            logit_p = node.router_p and node.router_p(z[i])                    # eq. (9)
            log_reach_q |= self.children_reach(i, log_reach_q[i], logit_q)
            log_reach_p |= self.children_reach(i, log_reach_p[i], logit_p)
            yield Visit(i, z[i], q, p, logit_q, logit_p, log_reach_q[i], log_reach_p[i])

    # -- the ELBO -----------------------------------------------------------------------------------------------------

    def log_p_x(self, leaf, z, x):
        """log p(x | z_l), eq. (11), summed over pixels and channels: (B,) nats."""
        out = self.nodes[leaf].decoder(z).float()
        if self.likelihood == "bernoulli":
            return (x * out - F.softplus(out)).flatten(1).sum(1)               # x log mu + (1 - x) log(1 - mu), mu = sigmoid(out)
        return Gaussian(out, torch.ones_like(out)).log_prob(x)

    def elbo(self, x, below=None, visits=None):
        """L(x | T), eq. (21), by one sample of the tree: dict of (B,) tensors in nats.

        "elbo" = "reconstruction" - "kl_root" - "kl_nodes" - "kl_decisions". Each z is sampled once, each KL is in closed form given
        its parent's z. The expectation over the decisions is exact: each term is multiplied by P(i; c), so that a node counts
        as often as it is reached.
        below: only the terms of the nodes on the path to this node, which do not change while a split trains but whose z are
        needed, and under it, which do; their sum is a part of the ELBO, not to be compared with the whole. visits: a `walk` that there is.
        """
        reconstruction = kl_root = kl_nodes = kl_decisions = torch.zeros(len(x), device=x.device)
        for v in visits or self.walk(self.bottom_up_pass(x), below):
            reach = v.log_reach_q.exp()                                        # P(i; c)
            if v.node == 0:
                kl_root = v.q.kl(v.p)
            else:
                kl_nodes = kl_nodes + reach * v.q.kl(v.p)
            if v.logit_q is not None:
                left, right = F.logsigmoid(v.logit_q), F.logsigmoid(-v.logit_q)                  # log q(c_i | x)
                left_p, right_p = F.logsigmoid(v.logit_p), F.logsigmoid(-v.logit_p)              # log p(c_i | z_i)
                kl_decisions = kl_decisions + reach * (left.exp() * (left - left_p) + right.exp() * (right - right_p))
            if self.nodes[v.node].decoder is not None:
                reconstruction = reconstruction + reach * self.log_p_x(v.node, v.z, x)
        return {"elbo": reconstruction - kl_root - kl_nodes - kl_decisions, "reconstruction": reconstruction,
                "kl_root": kl_root, "kl_nodes": kl_nodes, "kl_decisions": kl_decisions}

    def loss(self, x, kl_weight=1.0, below=None, view=None, contrastive_weight=100.0, guide=None, guide_weight=0.0):
        """What training minimises, a scalar in nats an image, and the batch's means of what it is made of: {name: scalar}.

        -E[log p(x | z)] + kl_weight * (the three KL), eq. (21); + contrastive_weight * `contrastive_loss`, if there is a `view`,
        other looks at the same images. The means are of `elbo`'s terms, and, as "P_3", of P(l; c) of leaf 3.

        guide, not in the paper: (points, left). points (n, hidden): `features` of some images of node `below`; left (n,) bool: their
        `normalized_cut`. The share of the 7 nearest points of an x that goes left is what its decision at `below` shall be; guide_weight
        times the cross-entropy is added. All x count alike: they are taken to be the node's.
        """
        d = self.bottom_up_pass(x if view is None else torch.cat([x, view]))
        visits = list(self.walk([h[:len(x)] for h in d], below))
        means = {name: term.mean() for name, term in self.elbo(x, visits=visits).items()}
        loss = kl_weight * (means["kl_root"] + means["kl_nodes"] + means["kl_decisions"]) - means["reconstruction"]
        if view is not None:
            means["contrastive"] = self.contrastive_loss(d, visits, below)
            loss = loss + contrastive_weight * means["contrastive"]
        if guide_weight > 0:
            points, left = guide
            logit = next(v.logit_q for v in visits if v.node == below)
            near = torch.cdist(self.features([d[-1][:len(x)]]), points).topk(min(7, len(points)), largest=False).indices      # (B, 7)
            loss = loss + guide_weight * F.binary_cross_entropy_with_logits(logit, left[near].float().mean(1))
        return loss, means | {f"P_{v.node}": v.log_reach_q.exp().mean() for v in visits if self.nodes[v.node].decoder is not None}

    def features(self, d):
        """What the contrastive loss has taught about images: (B, hidden), the projection head of d_H but its last layer.

        The last layer spreads the images out; the one before it still has them in clusters.
        """
        return self.heads[-1][:-1](d[-1])

    def contrastive_loss(self, d, visits, below=None):
        """How little two views of an image agree, and how much different images do: a scalar in nats.

        Asks that a view takes the decisions of its image (temperature 1, summed over routers), and that its d_h, through a
        projection, is the image's more than any other's (temperature 0.5, averaged over depths). The decisions of different
        images shall differ, so that a router divides its images about in halves. below: the term of this node's router alone.
        d: `bottom_up_pass` of the images, then of their views; visits: `walk` with the images' half.
        """
        total = 0.0
        for v in visits:
            if v.logit_q is not None and below in (None, v.node):
                h = d[self.depth(v.node)][len(v.logit_q):]
                r = torch.stack([v.logit_q, self.nodes[v.node].router_q(h)]).sigmoid()                # (2, B)
                total = total + nt_xent(torch.stack([r, 1 - r], -1), 1.0, v.log_reach_q.detach())
        if below is None:
            for head, h in zip(self.heads, d):
                total = total + nt_xent(head(h).unflatten(0, (2, -1)), 0.5) / len(d)
        return total

    @torch.no_grad()
    def log_likelihood(self, x, n_samples=1000, chunk=10):
        """A lower bound on log p(x), eq. (20), tighter than the ELBO: (B,) nats. `chunk` samples of the tree are held at a time.

        log (1/K) sum_k sum_l [p(z^k_P_l) / q(z^k_P_l | x)] P_p(l | z^k) p(x | z^k_l), with the z of a path in the brackets and
        P_p of the generative routers. Only z is sampled, weighted so that the mean inside the log is without bias: on average
        the bound rises with K, towards log p(x). The leaves are few and summed exactly.
        """
        d, chunks = self.bottom_up_pass(x), []
        for start in range(0, n_samples, chunk):
            k = min(chunk, n_samples - start)
            many_x, log_ratio, leaves = x.repeat(k, *[1] * (x.dim() - 1)), {-1: 0.0}, []  # -1: above the root
            for v in self.walk([h.repeat(k, 1, 1, 1) for h in d]):
                log_ratio[v.node] = log_ratio[self.parents[v.node]] + v.p.log_prob(v.z) - v.q.log_prob(v.z)
                if self.nodes[v.node].decoder is not None:
                    leaves.append(log_ratio[v.node] + v.log_reach_p + self.log_p_x(v.node, v.z, many_x))
            chunks.append(torch.logsumexp(torch.stack(leaves), 0).view(k, -1))
        return torch.logsumexp(torch.cat(chunks), 0) - math.log(n_samples)

    # -- paths and images ---------------------------------------------------------------------------------------------

    def _descend(self, n, draw, goes_left):
        """Send n images from the root to a leaf each; a node computes only the images that come to it. -> Path

        draw(i, h, rows, z_parent): z_i of the images `rows` at node i of depth h. goes_left(i, h, rows, z_i): (len(rows),) bool, asked
        only where there are two children.
        """
        device = next(self.parameters()).device
        nodes = torch.full((n, 1 + max(self.depth(leaf) for leaf in self.leaves)), -1, device=device)
        path = Path(torch.zeros(*nodes.shape, *self.latent_shape, device=device), nodes)

        def visit(i, h, rows, z_parent):
            if not len(rows):
                return
            z = draw(i, h, rows, z_parent)
            path.z[rows, h], path.nodes[rows, h] = z, i
            children = self.children_of(i)
            left = goes_left(i, h, rows, z) if len(children) == 2 else torch.ones_like(rows, dtype=torch.bool)
            for child, mask in zip(children, (left, ~left)):
                here = mask.nonzero().squeeze(1)
                visit(child, h + 1, rows[here], z[here])
        visit(0, 0, torch.arange(n, device=device), None)
        return path

    def infer_path(self, x, leaf=None):
        """A sample of eq. (2) given x: the z of every node on the path to `leaf`. -> Path

        leaf: (B,) long, a column of `leaf_probs`, not a node id; if None, each decision is sampled from eq. (18), and so the leaf
        from P(l; c). In eval mode: otherwise batch norm sees another batch at each node, and may not see one image alone.
        """
        d, leaf = self.bottom_up_pass(x), leaf if leaf is None else leaf.to(x.device)

        def draw(i, h, rows, z_parent):
            return self._posterior(i, d[h][rows], z_parent)[0].sample()                              # eqs. (16), (17)

        def goes_left(i, h, rows, z):
            if leaf is None:
                return torch.rand(len(rows), device=rows.device) < self.nodes[i].router_q(d[h][rows]).sigmoid()    # eq. (18)
            under_left = [self.children_of(i)[0] in self.path_to(l) for l in self.leaves]            # of each column
            return torch.tensor(under_left, device=rows.device)[leaf[rows]]
        return self._descend(len(x), draw, goes_left)

    def sample_path(self, n, node=None, z_root=None):
        """A sample of eqs. (1) and (10): n new paths from the prior. -> Path

        z_0 ~ N(0, I) or the given z_root (n, latent_channels, r, r); the generative routers choose the way, the
        transformations give the z. node: all paths are made to pass through this node, whatever the routers say above it; z_0 is
        of the prior all the same, not of the images that come to the node.
        """
        forced = self.path_to(node) if node is not None else []

        def draw(i, h, rows, z_parent):
            if i == 0:                                                                               # eq. (7)
                return torch.randn(n, *self.latent_shape, device=rows.device) if z_root is None else z_root
            return self.nodes[i].transformation(z_parent).sample()                                   # eq. (8)

        def goes_left(i, h, rows, z):
            if h + 1 < len(forced):
                return torch.full_like(rows, forced[h + 1] == self.children_of(i)[0], dtype=torch.bool)
            return torch.rand(len(rows), device=rows.device) < self.nodes[i].router_p(z).sigmoid()   # eq. (9)
        return self._descend(n, draw, goes_left)

    def decode(self, path):
        """The images of paths, mu_x of eq. (11) at each path's leaf: (B, C, H, W) in [0, 1], to which colour is clamped."""
        images, ends = torch.zeros(len(path.z), *self.image_shape, device=path.z.device), path.nodes.amax(1)
        for leaf in self.leaves:
            rows = (ends == leaf).nonzero().squeeze(1)
            if len(rows):
                out = self.nodes[leaf].decoder(path.z[rows, self.depth(leaf)]).float()
                images[rows] = out.sigmoid() if self.likelihood == "bernoulli" else out.clamp(0, 1)
        return images

    # -- growing and pruning ------------------------------------------------------------------------------------------

    def next_split(self, probs, min_images, hard=False):
        """The growth rule: which leaf to split. -> (leaf id, (N,) bool mask of its images), or None if none can be.

        probs: (N, n_leaves) of `leaf_probs` on the training images. A leaf has the images with P(l; c) >= min(1/#leaves,
        1/2), the 1/2 for a tree of one leaf. Of the leaves above max_depth with at least min_images, the one with the most is
        split. hard, not in the paper: an image counts for its most probable leaf alone, as in pruning, though the mask is the
        same; else an image may count for several leaves, and leaves that share their images are split again and again.
        """
        leaves = self.leaves
        has = probs >= min(1 / len(leaves), 0.5)
        sizes = torch.bincount(probs.argmax(1), minlength=len(leaves)) if hard else has.sum(0)
        for column in sizes.argsort(descending=True, stable=True).tolist():
            if sizes[column] >= min_images and self.depth(leaves[column]) < self.max_depth:
                return leaves[column], has[:, column]
        return None

    def next_prune(self, probs, share=0.01):
        """The pruning rule: the id of the smallest leaf, if it is the most probable leaf of fewer than `share` of the images."""
        sizes = torch.bincount(probs.argmax(1), minlength=len(self.leaves))
        return self.leaves[sizes.argmin()] if sizes.min() < share * len(probs) else None

    def grow(self, node_id):
        """Split a leaf: it loses its decoder and gets a pair of routers and two leaves, whose ids are returned."""
        if node_id not in self.leaves or self.depth(node_id) >= self.max_depth:
            raise ValueError(f"node {node_id} cannot be split: the leaves are {self.leaves} and max_depth is {self.max_depth}")
        self.parents += [node_id, node_id]
        self.nodes.extend([Node(), Node()])
        children = self.children_of(node_id)
        for i in [node_id, *children]:
            self._equip(i)
        return children

    def prune(self, node_id):
        """Take a leaf away. Its parent stays, with one child and no router, so that no node's depth changes; without any it goes, too."""
        if node_id not in self.leaves or node_id == 0:
            raise ValueError(f"node {node_id} cannot be pruned: the leaves are {self.leaves}")
        parent, self.parents[node_id] = self.parents[node_id], PRUNED
        self.nodes[node_id] = Node()
        if self.children_of(parent) or parent == 0:
            self._equip(parent)
        else:
            self.prune(parent)                                                 # a parent left with no child goes too

    def train_only(self, node=None):
        """Training mode for everything, or, once `node` was split, for what growing added: its routers and its children.

        Whatever is frozen is also in eval mode: its batch norm would otherwise normalise by one leaf's images and drift towards them.
        """
        self.requires_grad_(node is None).train(node is None)
        if node is not None:
            for module in [self.nodes[node].router_p, self.nodes[node].router_q, *(self.nodes[i] for i in self.children_of(node))]:
                module.requires_grad_(True).train()


def normalized_cut(points, neighbours=15, least=0.15):
    """Where points fall apart: the best cut of their nearest-neighbour graph in two (Shi and Malik 2000). (N, k) -> (N,) bool.

    The graph joins each point with its `neighbours` nearest, twice where both say so. Of the cuts along the second eigenvector of its
    normalised Laplacian, the one with the smallest cut(A, B) / vol(A) + cut(A, B) / vol(B), vol the sum of the degrees; `least`: share
    of the smaller side, so that no handful of outliers is cut off. Which side is True means nothing. O(N^3): for a few thousand points.
    """
    points = points.cpu().double()
    distance = torch.cdist(points, points).fill_diagonal_(math.inf)
    near = distance.topk(min(neighbours, len(points) - 1), largest=False).indices
    graph = torch.zeros_like(distance).scatter_(1, near, 1.0)
    graph = graph + graph.T
    degree = graph.sum(1)
    # the normalised Laplacian is 1 minus this matrix, so its second smallest eigenvalue is the second largest here; dividing by
    # the root of the degrees gives the y of (D - W) y = lambda D y, whose order is the order of the cuts
    second = torch.linalg.eigh(graph / (degree[:, None] * degree).sqrt()).eigenvectors[:, -2] / degree.sqrt()
    order = second.argsort()
    graph, weight = graph[order][:, order], degree[order].cumsum(0)            # vol of the points up to each
    cut = weight - 2 * graph.tril().sum(1).cumsum(0)                           # cut(A, B) = vol(A) - the edges inside A, each from both its ends
    cost = (cut / weight + cut / (weight[-1] - weight))[:-1]
    low = int(least * len(points))
    size = 1 + low + cost[low:len(cost) - low].argmin()
    return torch.zeros(len(points), dtype=torch.bool).index_fill(0, order[:size], True)


def nt_xent(a, temperature, log_weight=None):
    """NT-Xent of two views of B images, a (2, B, k): a scalar in nats.

    l_i = w_i [ log sum_{k != i} w_k exp(s(a_i, a_k) / tau) - s(a_i, a_i') / tau ], s the cosine similarity and a_i' the other view
    of i, averaged over the 2 B views (Chen et al. 2020). log_weight (B,): log w, 0 if None. For a decision w is P(i; c), how much an
    image has to do with it. The original TreeVAE weights by w_i alone; then a router could be content with telling its images from
    those that never come to it, and send all its own to one side.
    """
    a = F.normalize(a.float(), dim=2) / math.sqrt(temperature)
    agreement = (a[0] * a[1]).sum(1).repeat(2)                                 # s(a_i, a_i') / tau of all 2 B views
    a = a.flatten(0, 1)
    others = (a @ a.T).fill_diagonal_(-math.inf)
    log_weight = torch.zeros_like(agreement) if log_weight is None else log_weight.repeat(2)
    return (log_weight.exp() * ((others + log_weight).logsumexp(1) - agreement)).mean()


if __name__ == "__main__":
    torch.manual_seed(0)
    tree = TreeVAE((1, 28, 28), latent_channels=8, bottom_up_channels=32, representation_dim=1, max_depth=3, width=8)
    rows, columns = torch.arange(28)[:, None], torch.arange(28)[None]
    x = torch.stack([((rows - top).abs() < 3) | ((columns - left).abs() < 3) & (top > 13)              # bars, and crosses
                     for top, left in torch.randint(4, 24, (64, 2))]).float()[:, None]
    print(f"A tree with parents {tree.parents}: a root and the leaves {tree.leaves}. 64 images of bars and crosses, x {tuple(x.shape)}.\n")
    print("Inference. eq. (12): d_h, one map for each depth, from the encoder down to the root:")
    print("  " + ", ".join(f"d_{h} {tuple(d.shape[1:])}" for h, d in enumerate(tree.bottom_up_pass(x))))
    for v in tree.walk(tree.bottom_up_pass(x)):
        print(f"  node {v.node}: z {tuple(v.z.shape[1:])}, reached with P(i; c) = {v.log_reach_q.exp().mean():.2f}, "
              f"KL(q || p) = {v.q.kl(v.p).mean():.2f} nats" + (", decides" if v.logit_q is not None else ", decodes"))
    print("\nThe ELBO, eq. (21), in nats an image, while Adam learns these 64 images:")
    optimizer = torch.optim.Adam(tree.parameters(), lr=1e-2)
    for step in range(61):
        loss, terms = tree.loss(x)
        if step % 20 == 0:
            print(f"  step {step:2d}: " + ", ".join(f"{name} {value.mean():8.2f}" for name, value in terms.items()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tree.eval()
    bound = tree.log_likelihood(x[:8], 100).mean()
    print(f"\nTwo bounds on log p(x) of 8 images: about {tree.elbo(x[:8])['elbo'].mean():.1f} (ELBO), about {bound:.1f} (100 samples).")
    children = tree.grow(2)
    print(f"\nGrowing: node 2 is split into {children}; parents {tree.parents}, leaves {tree.leaves}.")
    tree.train_only(2)
    print(f"  trained now: {sum(p.numel() for p in tree.parameters() if p.requires_grad)} of "
          f"{sum(p.numel() for p in tree.parameters())} parameters; the rest is frozen, in eval mode.")
    tree.eval()
    print(f"  P(l; c) of one image over the leaves: {[round(p, 3) for p in tree.leaf_probs(x[:1])[0].tolist()]}")
    path = tree.sample_path(5)
    print(f"\nGeneration: 5 paths from the prior, z {tuple(path.z.shape)}, nodes {path.nodes.tolist()};\n"
          f"  decoded to images {tuple(tree.decode(path).shape)}.")
