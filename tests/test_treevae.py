"""Stage 1 against the paper: the terms of eq. (21), the tree's rules, growing, pruning, paths."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal
from torch.testing import assert_close

import treevae
from diffusion import Diffusion, time_features
from treevae import Gaussian, TreeVAE, make_decoder, make_encoder

TREES = [(-1,), (-1, 0, 0), (-1, 0, 0, 2, 2, 1, 1, 3, 3), (-1, 0, 0, -2, 1, 2, 2, 4, 4)]


def make_tree(parents=(-1, 0, 0), seed=0, **kwargs):
    """A small tree in eval mode whose terms are far from 0."""
    torch.manual_seed(seed)
    settings = dict(latent_channels=2, bottom_up_channels=4, representation_dim=1, max_depth=4)
    tree = TreeVAE((1, 16, 16), parents=parents, width=2, **settings | kwargs)
    for module in tree.modules():
        module.momentum = 1.0
    tree.elbo(images(64, seed))  # batch norm's statistics: or all images would look the same
    return tree.eval()


def images(n, seed=1):
    return torch.rand(n, 1, 16, 16, generator=torch.Generator().manual_seed(seed))


def seeded(call, *args, **kwargs):
    torch.manual_seed(5)
    return call(*args, **kwargs)


def test_gaussians_on_a_grid():
    """Eq. (15) is N(mu_q, var_q) N(mu_p, var_p), normalised numerically; KL by integration."""
    grid = torch.linspace(-30, 30, 60001, dtype=torch.float64)
    q, p = [Gaussian(*torch.tensor(g, dtype=torch.float64).view(2, 1, 1, 1, 1))
            for g in ((1.3, 0.4), (-0.9, 2.5))]
    log_q, log_p = [Normal(g.mu, g.var.sqrt()).log_prob(grid).flatten() for g in (q, p)]
    assert torch.allclose(q.log_prob(grid.view(-1, 1, 1, 1)), log_q)
    density = (log_q + log_p).softmax(0) / (grid[1] - grid[0])
    mean = torch.trapezoid(density * grid, grid)
    moments = torch.stack([mean, torch.trapezoid(density * (grid - mean) ** 2, grid)])
    assert_close(torch.stack(treevae.precision_weighted(q, p)).flatten(), moments)
    assert_close(q.kl(p)[0], torch.trapezoid(log_q.exp() * (log_q - log_p), grid))


def test_networks_and_settings():
    for side, r, kind in itertools.product((28, 32, 64), (1, 2, 4), ("cnn", "resnet")):
        x = torch.rand(2, 3, side, side)
        encoded = make_encoder(kind, x.shape[1:], 2, 5, r)(x)
        decoded = make_decoder(kind, x.shape[1:], 2, 5, r)(encoded)
        assert encoded.shape == (2, 5, r, r) and decoded.shape == x.shape
        decoded.sum().backward()
    def layers(net):
        assert {getattr(m, "negative_slope", 0.1) for m in net.modules()} == {0.1}
        return [(m.in_channels, m.out_channels, m.kernel_size[0], m.stride[0])
                for m in net.modules() if hasattr(m, "kernel_size")]
    assert layers(make_encoder("resnet", (3, 28, 28), 4, 9, 1)) == [
        (3, 4, 8, 4), *[(4, 4, 3, 1)] * 2, (4, 8, 3, 2), *[(8, 8, 3, 1)] * 2, (8, 9, 4, 4)]
    assert layers(make_decoder("resnet", (3, 32, 32), 4, 9, 1)) == [
        (9, 8, 4, 4), *[(8, 8, 3, 1)] * 2, (8, 4, 3, 2), *[(4, 4, 3, 1)] * 2, (4, 48, 3, 1)]
    tree, small = TreeVAE((1, 28, 28), contrastive=True), make_tree()
    assert tree.sample_path(2).z[0, 1].shape == (16, 4, 4) and tree.leaves == [1, 2]
    assert layers(tree.bottom_up) == [(32, 32, 3, 1)] * 7 and layers(tree.encoder)[0][1] == 32
    assert layers(small.bottom_up[0]) == [(4, 4, 1, 1)] and tree.heads[7][-1].out_features == 10
    tree = make_tree(encoder="resnet", decoder="mlp")
    assert len(layers(tree.encoder)) == 4 and not small.heads  # with a residual block
    assert layers(tree.nodes[2].decoder) == [(2, 8, 1, 1), (8, 8, 1, 1), (8, 256, 1, 1)]
    f, conv, h = treevae.Residual(2).eval(), treevae.Conv(2, 4, 1), torch.randn(1, 2, 1, 1)
    assert_close(f(h), h + f.f(h))
    assert_close(conv(h), F.conv2d(h, conv.weight, conv.bias))
    for settings, message in ((dict(likelihood="poisson"), "poisson"), (dict(encoder="mlp"), "mlp"),
                              (dict(decoder="vit"), "vit"), (dict(representation_dim=3), "3"),
                              (dict(decoder="mlp"), "1 with"), (dict(image_shape=[30]), "resize")):
        with pytest.raises(ValueError, match=message):
            TreeVAE(**dict(image_shape=(1, 28, 28)) | settings)


def test_the_floor_keeps_variances_and_gradients_finite():
    tree = make_tree((-1, 0, 0, 1, 1))
    for module in tree.modules():
        if isinstance(module, treevae.ToGaussian):
            module.linear.bias.data[2:] = -1e4
    for v in tree.walk(tree.bottom_up_pass(images(4))):
        assert (v.node == 0 or 0.999e-7 < v.p.var.min() < 1.001e-7) and v.q.var.min() > 0.499e-7
    tree.loss(images(4))[0].backward()
    assert all(p.grad.isfinite().all() for p in tree.parameters())


@torch.no_grad()
@pytest.mark.parametrize("parents", TREES)
def test_elbo_is_an_explicit_sum_over_paths(parents):
    """sum_l P(l) [log p(x|z_l) - the path's KL - the path's log q(c)/p(c)] equals eq. (21)."""
    tree, x = make_tree(parents), images(3)
    d = tree.bottom_up_pass(x)
    visits = {v.node: v for v in seeded(tree.walk, d)}
    total = torch.zeros(5, 3)
    for leaf, leaf_prob in zip(tree.leaves, tree.leaf_probs(x).T):
        prob, decisions, kl_nodes = torch.ones(3), torch.zeros(3), torch.zeros(3)
        for i, child in itertools.pairwise(tree.path_to(leaf)):
            if len(tree.children_of(i)) == 2:
                q = torch.sigmoid(tree.nodes[i].router_q(d[tree.depth(i)]))
                p = torch.sigmoid(tree.nodes[i].router_p(visits[i].z))
                if child == tree.children_of(i)[1]:
                    q, p = 1 - q, 1 - p
                prob, decisions = prob * q, decisions + torch.log(q / p)
            prior = tree.nodes[child].transformation(visits[i].z)
            evidence = tree.nodes[child].evidence(d[tree.depth(child)])
            kl_nodes += treevae.precision_weighted(evidence, prior).kl(prior)
        assert_close(leaf_prob, prob)
        mu_x = torch.sigmoid(tree.nodes[leaf].decoder(visits[leaf].z))
        log_px = (x * mu_x.log() + (1 - x) * (1 - mu_x).log()).flatten(1).sum(1)
        root = tree.nodes[0].evidence(d[0])
        kl_root = (root.var + root.mu ** 2 - 1 - root.var.log()).sum((1, 2, 3)) / 2
        elbo = log_px - kl_root - kl_nodes - decisions
        total += prob * torch.stack([elbo, log_px, kl_root, kl_nodes, decisions])
    names = ("elbo", "reconstruction", "kl_root", "kl_nodes", "kl_decisions")
    assert_close(seeded(tree.elbo, x), dict(zip(names, total)), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_log_likelihood_lies_between_the_elbo_and_the_integral_and_rises():
    x = images(1, seed=4)
    tree = make_tree(latent_channels=1, bottom_up_channels=3, max_depth=1, seed=3)
    z = torch.linspace(-8, 8, 801).view(-1, 1, 1, 1)
    left, p_z0 = tree.nodes[0].router_p(z).sigmoid(), Normal(0, 1).log_prob(z.flatten()).exp()
    joint = []  # log p(x, leaf), over z_0 and z_l
    for leaf, p_c in ((1, left), (2, 1 - left)):
        p = tree.nodes[leaf].transformation(z)
        log_p = Normal(p.mu, p.var.sqrt()).log_prob(z.view(1, -1, 1, 1))[:, :, 0, 0]
        log_px = tree.log_p_x(leaf, z, x)
        given_z0 = torch.trapezoid((log_p + log_px - log_px.max()).exp(), z.flatten(), dim=1)
        joint.append(torch.trapezoid(p_z0 * p_c * given_z0, z.flatten()).log() + log_px.max())
    truth = torch.stack(joint).logsumexp(0)
    many = x.expand(10000, -1, -1, -1)
    bounds = [tree.log_likelihood(many[:400], n).mean() for n in (1, 5, 50)]
    assert seeded(tree.elbo, many)["elbo"].mean() < bounds[0] < bounds[1] < bounds[2] < truth + 0.02
    exact = seeded(tree.log_likelihood, many, 2).logsumexp(0) - math.log(10000)
    assert_close(exact, truth, rtol=0, atol=0.03)


def test_gaussian_likelihood_is_the_density_with_sigma_one_and_its_images_are_clamped():
    tree, x, z = make_tree(likelihood="gaussian"), images(20), 3 * torch.randn(20, 2, 1, 1)
    out = tree.nodes[1].decoder(z)
    assert_close(tree.log_p_x(1, z, x), Normal(out, 1.0).log_prob(x).sum((1, 2, 3)))
    path = tree.pick_path({0: z, 1: z, 2: z}, torch.zeros(20, dtype=torch.long))
    assert out.min() < 0 and out.max() > 1 and torch.allclose(tree.decode(path), out.clamp(0, 1))


def nt_xent(a, b, tau, weight):
    """The formula over 2 B views: image k counts by its weight, also in the sum."""
    views, w = F.normalize(torch.cat([a, b]), dim=1), weight.repeat(2)
    similar = (views @ views.T / tau).exp()
    partner = (views * views.roll(len(a), 0)).sum(1) / tau
    others = (w * similar).sum(1) - w * similar.diag()
    return (w * (others.log() - partner)).mean()


@pytest.mark.parametrize("below, nodes", [(None, [0, 1, 2, 3, 4, 5, 6]), (1, [0, 1, 3, 4])])
def test_loss_is_exactly_its_weighted_parts(below, nodes):
    """-reconstruction + kl_weight * KLs + contrastive_weight * NT-Xent, of the nodes at `below`."""
    tree, x, view = make_tree((-1, 0, 0, 1, 1, 2, 2), contrastive=True), images(6), images(6, 2)
    d, d_view = tree.bottom_up_pass(x), tree.bottom_up_pass(view)
    loss, terms, visits = seeded(tree.loss, x, 0.3, below, view, 2.0)
    assert_close([v.z for v in visits], [v.z for v in seeded(tree.walk, d, below)])
    assert [v.node for v in visits] == nodes
    contrast = torch.zeros(())
    for v in visits:
        if v.logit_q is not None and below in (None, v.node):
            logit_view = tree.nodes[v.node].router_q(d_view[tree.depth(v.node)])
            a, b = [torch.stack([t.sigmoid(), 1 - t.sigmoid()], 1) for t in (v.logit_q, logit_view)]
            contrast += nt_xent(a, b, 1.0, v.log_reach_q.exp())
    if below is None:
        for head, h, h_view in zip(tree.heads, d, d_view):
            contrast += nt_xent(head(h), head(h_view), 0.5, torch.ones(6)) / 5
    parts = {name: part.mean() for name, part in tree.elbo(x, visits=visits).items()}
    shares = zip(tree.leaves, tree.leaf_probs(x).mean(0))
    expected = parts | {f"P_{leaf}": share for leaf, share in shares if leaf in nodes}
    assert_close(terms, expected | {"contrastive": contrast}, rtol=1e-5, atol=1e-5)
    elbo_loss = -0.7 * parts["reconstruction"] - 0.3 * parts["elbo"]
    assert_close(loss, elbo_loss + 2 * contrast)
    assert_close(seeded(tree.loss, x, 0.3, below)[0], elbo_loss)
    by_default = seeded(tree.loss, x, below=below, view=view)[0]
    assert_close(by_default, 100 * contrast - parts["elbo"])
    weights = [tree.nodes[i].router_q.net[-1].weight for i in (0, 1)]
    root, own = torch.autograd.grad(terms["contrastive"], weights, allow_unused=True)
    assert own.any() and (root is None) == (below == 1)  # the weights P(i; c) are detached


@torch.no_grad()
def test_leaf_probs_through_growing_and_pruning(monkeypatch):
    """Growing divides a leaf's probability, pruning passes it on; ids and depths never change."""
    tree, x, root = make_tree(), images(50), make_tree((-1,), contrastive=True)
    for change, node, leaves in (
            ("grow", 1, [3, 4, 2]), ("grow", 4, [3, 5, 6, 2]), ("prune", 3, [5, 6, 2]),
            ("grow", 5, [7, 8, 6, 2]), ("prune", 2, [7, 8, 6])):  # 3 is not reused
        before, parent = dict(zip(tree.leaves, tree.leaf_probs(x).T)), tree.parents[node]
        result = getattr(tree, change)(node)
        assert tree.leaves == leaves and result == (tree.children_of(node) or None)
        probs = tree.leaf_probs(x)
        assert_close(probs.sum(1), torch.ones(50))
        gets = [i for i in leaves if (parent if change == "prune" else node) in tree.path_to(i)]
        gain = sum(p - before.get(i, 0) for i, p in zip(leaves, probs.T) if i in gets)
        assert_close(gain, before[node], rtol=0, atol=1e-6)
    assert tree.parents == [-1, 0, -2, -2, 1, 4, 4, 5, 5] and tree.ids == [0, 1, 4, 5, 6, 7, 8]
    make_tree(tree.parents).load_state_dict(tree.state_dict())  # the same networks as if built
    for name, part in tree.named_modules():
        if name.endswith(("evidence", "transformation", "router_p", "decoder")):
            part.forward = None
    assert root.loss(x, view=x)[0].isfinite()  # a plain VAE
    monkeypatch.setattr(torch, "randn_like", None)
    assert torch.equal(tree.leaf_probs(x), probs)  # runs the encoder, eq. (12), q-routers alone
    for call, node_id in ((root.prune, 0), (tree.prune, 4), (tree.prune, 2), (tree.grow, 4),
                          (tree.grow, 2), (tree.grow, 7)):  # 7 is at max_depth
        with pytest.raises(ValueError, match="cannot be"):
            call(node_id)
    for leaf in (7, 8, 6):  # parents without a child go too
        tree.prune(leaf)
    assert tree.sample_path(1).nodes.tolist() == [[0]] and tree.grow(0) == [9, 10]  # the root alone


def test_growing_trains_the_new_parts_alone_as_the_whole_elbo_would(monkeypatch):
    tree, x = make_tree((-1, 0, 0, 1, 1)), images(30)
    saved = {name: value.clone() for name, value in tree.state_dict().items()}
    tree.train().grow(3)
    tree.train_only(3)
    new = ("nodes.3.router_", "nodes.5.", "nodes.6.")
    for name, p in tree.named_parameters():
        assert p.requires_grad == name.startswith(new) and (name in saved) != name.startswith(new)
    tree.loss(x, below=3)[0].backward()
    for name, value in saved.items():  # batch statistics, too
        assert name.startswith("nodes.3.decoder") or torch.equal(tree.state_dict()[name], value)
    parts = [p for p in tree.parameters() if p.requires_grad]
    monkeypatch.setattr(torch, "randn_like", lambda mu: torch.ones_like(mu) / 2)
    tree.eval()  # the gradient of the whole ELBO
    path, whole = [torch.autograd.grad(tree.loss(x, below=below)[0], parts) for below in (3, None)]
    assert_close(path, whole, rtol=1e-4, atol=1e-4)


def test_growth_and_pruning_rules_on_hand_made_probabilities():
    tree = make_tree((-1, 0, 0, 2, 2), max_depth=2)  # leaves 1 | 3, 4
    probs = torch.tensor([[0.8, 0.1, 0.1]] * 4 + [[0.0, 0.9, 0.1]] * 9 + [[0.1, 0.5, 0.4]] * 3)
    leaf, has = tree.next_split(probs, min_images=4)
    assert leaf == 1 and has.tolist() == [True] * 4 + [False] * 12  # 3 is larger but at max_depth
    deeper = make_tree((-1, 0, 0, 2, 2), max_depth=3)
    assert deeper.next_split(probs, 12)[0] == 3 and tree.next_split(probs, 5) is None
    leaf, has = deeper.next_split(torch.tensor([[0.34, 0.33, 0.33], [0.3, 0.2, 0.5]]), 1)
    assert leaf == 1 and has.tolist() == [True, False]  # at least 1 / 3, or 1 / 2
    assert make_tree((-1,)).next_split(torch.tensor([[0.5], [0.4]]), 1)[1].tolist() == [True, False]
    shared = torch.tensor([[0.55, 0.45, 0.0]] * 4 + [[0.0, 0.6, 0.4]] * 3)
    groups = {0: (0, 1, 2, 3), 1: (0, 1), 2: (2, 3), 3: (2, 3), 4: (4,)}
    assert deeper.next_split(shared, 1)[0] == 3 and deeper.next_split(shared, 5, groups) is None
    assert deeper.next_split(shared, 4, groups)[0] == 1  # the most probable leaf of 4
    assert deeper.next_split(shared, 1, groups | {1: (0,)})[0] == 3  # 1 is one cluster
    for sizes, share, leaf in (([500, 491, 9], 0.01, 4), ([500, 490, 10], 0.01, None),
                               ([500, 200, 300], 0.3, 3)):
        probs = torch.eye(3).repeat_interleave(torch.tensor(sizes), 0)
        assert tree.next_prune(probs, share) == leaf


@torch.no_grad()
@pytest.mark.parametrize("parents", TREES)
def test_paths_share_z_and_decode_at_their_own_leaf(parents):
    tree = make_tree(parents)
    leaf = torch.arange(len(tree.leaves)).repeat(2)  # two paths to each
    x = images(len(leaf))
    z_q = {v.node: v.z for v in seeded(tree.walk, tree.bottom_up_pass(x))}  # eqs. (16), (17)
    z_p = tree.sample_latents(len(leaf))
    longest = max(len(tree.path_to(i)) for i in tree.ids)
    for z, path in ((z_q, seeded(tree.infer_path, x, leaf)), (z_p, tree.pick_path(z_p, leaf))):
        decoded = tree.decode(path)
        for row, column in enumerate(leaf.tolist()):
            ids = tree.path_to(tree.leaves[column])
            assert path.nodes[row].tolist() == ids + [-1] * (longest - len(ids))
            assert torch.equal(path.z[row, :len(ids)], torch.stack([z[i][row] for i in ids]))
            assert not path.z[row, len(ids):].any()
            assert_close(decoded[row], tree.nodes[ids[-1]].decoder(z[ids[-1]])[row].sigmoid())


@torch.no_grad()
def test_leaves_are_sampled_by_their_probabilities():
    tree, x = make_tree((-1, 0, 0, 2, 2)), images(1)
    def hits(path):
        return (path.nodes.amax(1)[:, None] == torch.tensor(tree.leaves)).float()
    found = hits(seeded(tree.infer_path, x.expand(10000, -1, -1, -1))).mean(0)
    assert_close(found, tree.leaf_probs(x)[0], rtol=0, atol=0.02)  # no argmax
    path, z = seeded(tree.sample_path, 10000), seeded(tree.sample_latents, 10000)
    assert torch.equal(path.z[:, 0], z[0])
    p = tree.nodes[2].transformation(z[0])
    for noise in (z[0], (z[2] - p.mu) / p.var.sqrt()):  # eqs. (7), (8)
        assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03
    left, left_of_2 = [tree.nodes[i].router_p(z[i]).sigmoid() for i in (0, 2)]   # eq. (9)
    probs = torch.stack([left, (1 - left) * left_of_2, (1 - left) * (1 - left_of_2)], 1)
    assert_close(tree.prior_leaf_probs(z), probs)
    assert_close((hits(path) * probs).mean(0), (probs ** 2).mean(0), rtol=0, atol=0.02)


def test_spectral_clusters_and_the_order_in_which_they_merge():
    places = torch.tensor([0.0, 1, 10, 11, 30, 31, 40, 41]).double().repeat_interleave(9)
    points = places[:, None] + torch.randn(72, 1) / 10
    found, merges = treevae.spectral_clusters(points, 8, 8)
    assert torch.equal(found @ found.T == 1, places == places[:, None])
    pairs = [tuple(sorted(found[[9 * k, 9 * k + 9]].argmax(1).tolist())) for k in (0, 2, 4, 6)]
    assert set(pairs) == set(list(merges)[:4])  # they merge first; there are no edges between them
    left, right = [found[:, list(side)].sum(1) @ places for side in merges[max(merges, key=len)]]
    assert sorted([left, right]) == [9 * 22, 9 * 142]  # then those that are near
    found, _ = treevae.spectral_clusters(points, 4, 4)  # the parts are more than the clusters
    assert torch.equal(found @ found.T == 1, (places // 9) == (places // 9)[:, None])
    points = torch.randn(60, 2).double()
    found, merges = treevae.spectral_clusters(points, 6, 4)
    graph = F.one_hot(torch.cdist(points, points).argsort(1)[:, 1:11], 60).sum(1).double()
    graph = graph + graph.T + 1e-6 / (1 + torch.cdist(points, points)).fill_diagonal_(math.inf)
    scale = torch.diag(graph.sum(1) ** -0.5)  # of the Laplacian
    rows = F.normalize(torch.linalg.eigh(torch.eye(60) - scale @ graph @ scale)[1][:, :4])
    assert torch.equal((rows @ F.normalize(found.T @ rows).T).argmax(1), found.argmax(1))
    def density(left, right):
        left, right = [found[:, list(group)].sum(1) for group in (left, right)]
        return (left @ graph @ right / (left @ graph).sum() / (right @ graph).sum()).item()
    groups = [(k,) for k in range(6)]
    for group, sides in merges.items():
        best = max(density(*pair) for pair in itertools.combinations(groups, 2))
        assert density(*sides) == pytest.approx(best) and group == sum(sides, ())
        groups = [other for other in groups if other not in sides] + [group]
    found, merges = treevae.spectral_clusters(torch.eye(2).double(), 4, 2)  # too few points
    assert sorted(found.sum(0).tolist()) == [0, 0, 1, 1] and len(merges) == 1


@torch.no_grad()
def test_shares_are_those_of_the_nearest_voters(monkeypatch):
    tree, x = make_tree(contrastive=True), images(5003)
    monkeypatch.setattr(treevae, "spectral_clusters", lambda points, *sizes: (
        F.one_hot(torch.arange(len(points)) % 6, 6).double(), (points, sizes)))
    features = sum(F.leaky_relu(tree.heads[4][1](tree.encoder(x + k).flatten(1)), 0.1)
                   for k in range(4)) / 4
    for n_points, n_voters in ((4, [5]), (30, [])):            # 7 by default
        views = iter([part + k for part in x.split(2503) for k in range(4)])
        shares, (points, sizes) = seeded(treevae.plan_splits, tree, x.split(2503),
                                         lambda batch: next(views), 4, n_points, *n_voters)
        chosen = features[seeded(torch.randperm, 5003)[:n_points]]
        assert sizes == (6, 4) and torch.allclose(points, chosen.double())
        for row in (0, 1, 2, 3, 4998, 5002):
            near = (features[row] - chosen).norm(dim=1).argsort()[:sum(n_voters or [7])]
            assert_close(shares[row], F.one_hot(near % 6, 6).float().mean(0))


def test_everything_is_made_on_the_device_of_the_tree():
    x, diffusion = images(3).to("meta"), Diffusion(9).to("meta")  # raises where devices are mixed
    tree = make_tree(TREES[2], contrastive=True).to("meta").train()
    assert tree.grow(8) and tree.loss(x, view=x)  # a grown node's networks, too
    assert all(tree.decode(path).is_meta for path in (tree.sample_path(3), tree.infer_path(x)))
    def net(xt, t, y):
        return xt * time_features(t, 2)[:, :1, None, None]
    diffusion.loss(net, x)
    assert diffusion.ddpm_sample(net, x.shape).is_meta
    diffusion.ddim_sample(net, x.shape, steps=3, eta=1)
