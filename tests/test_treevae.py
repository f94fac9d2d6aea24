"""Stage 1 against the paper: every term of eq. (21), the tree's rules, growing and pruning."""

import math

import pytest
import torch
from torch import nn

import treevae
from treevae import Gaussian, TreeVAE


def make_tree(parents=(-1, 0, 0), seed=0, spread=2.0, **kwargs):
    """A small tree in eval mode whose weights are large enough for its terms to be far from 0."""
    torch.manual_seed(seed)
    settings = dict(latent_channels=2, bottom_up_channels=4, representation_dim=1, max_depth=4, width=2) | kwargs
    tree = TreeVAE((1, 16, 16), parents=parents, **settings)
    with torch.no_grad():
        for name, p in tree.named_parameters():
            if p.dim() > 1:
                p.mul_(spread)
    return tree.eval().requires_grad_(False)


def images(n, seed=1, side=16, channels=1):
    return torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(seed))


def normal_pdf(x, mu, var):
    return torch.exp(-((x - mu) ** 2) / (2 * var)) / torch.sqrt(2 * math.pi * var)


# -- Gaussians --------------------------------------------------------------------------------------------------------

def test_posterior_is_the_product_of_two_gaussians_on_a_grid():
    """Eq. (15): q ~ N(mu^, var^) N(mu_p, var_p), normalised numerically, has the mean and variance of `times`."""
    grid = torch.linspace(-30, 30, 60001, dtype=torch.float64)
    a = Gaussian(torch.tensor([[[[1.3]]]]).double(), torch.tensor([[[[0.4]]]]).double())
    b = Gaussian(torch.tensor([[[[-0.9]]]]).double(), torch.tensor([[[[2.5]]]]).double())
    density = normal_pdf(grid, a.mu.item(), a.var.squeeze()) * normal_pdf(grid, b.mu.item(), b.var.squeeze())
    density /= torch.trapezoid(density, grid)
    mean = torch.trapezoid(density * grid, grid)
    variance = torch.trapezoid(density * (grid - mean) ** 2, grid)
    product = a.times(b)
    assert product.mu.item() == pytest.approx(mean.item(), abs=1e-8)
    assert product.var.item() == pytest.approx(variance.item(), abs=1e-8)


def test_kl_and_log_prob_by_numerical_integration():
    grid = torch.linspace(-40, 40, 80001, dtype=torch.float64)
    q = Gaussian(torch.full((1, 1, 1, 1), 0.7).double(), torch.full((1, 1, 1, 1), 0.3).double())
    p = Gaussian(torch.full((1, 1, 1, 1), -0.5).double(), torch.full((1, 1, 1, 1), 1.7).double())
    few = grid[35000:46000:100]
    log_q = torch.stack([q.log_prob(z.view(1, 1, 1, 1)) for z in few]).squeeze(1)
    assert torch.allclose(log_q, normal_pdf(few, q.mu.item(), q.var.squeeze()).log())
    dq, dp = normal_pdf(grid, q.mu.item(), q.var.squeeze()), normal_pdf(grid, p.mu.item(), p.var.squeeze())
    integrand = torch.where(dq > 0, dq * (dq.clamp(min=1e-300).log() - dp.clamp(min=1e-300).log()), 0.0)
    assert q.kl(p).item() == pytest.approx(torch.trapezoid(integrand, grid).item(), abs=1e-8)


# -- the ELBO ---------------------------------------------------------------------------------------------------------

TREES = [(-1, 0, 0), (-1, 0, 0, 2, 2), (-1, 0, 0, 1, 1, 4, 4), (-1, 0, 0, 2, 2, 1, 1, 3, 3), (-1, 0, 0, -2, 1, 2, 2, 4, 4)]


@pytest.mark.parametrize("parents", TREES)
def test_elbo_is_an_explicit_sum_over_paths(parents):
    """Eq. (21) node by node equals sum_l P(l) [log p(x|z_l) - sum of the path's KL - sum of the path's log q(c)/p(c)]."""
    tree, x = make_tree(parents), images(3)
    torch.manual_seed(5)
    visits = {v.node: v for v in tree.walk(tree.bottom_up_pass(x))}
    torch.manual_seed(5)
    terms = tree.elbo(x)
    d = tree.bottom_up_pass(x)
    expected = {name: torch.zeros(3) for name in terms}
    for leaf in tree.leaves:
        path = tree.path_to(leaf)
        prob, decisions, kl_nodes = torch.ones(3), torch.zeros(3), torch.zeros(3)
        for i, child in zip(path, path[1:]):
            kids = tree.children_of(i)
            if len(kids) == 2:
                q = torch.sigmoid(tree.nodes[i].router_q(d[tree.depth(i)]))
                p = torch.sigmoid(tree.nodes[i].router_p(visits[i].z))
                if child == kids[1]:
                    q, p = 1 - q, 1 - p
                prob, decisions = prob * q, decisions + torch.log(q / p)
            parent_z = visits[i].z
            prior = tree.nodes[child].transformation(parent_z)
            evidence = tree.nodes[child].evidence(d[tree.depth(child)])
            var = 1 / (1 / evidence.var + 1 / prior.var)                       # eq. (15), as the paper writes it
            mu = var * (evidence.mu / evidence.var + prior.mu / prior.var)
            kl_nodes += torch.distributions.kl_divergence(
                torch.distributions.Normal(mu, var.sqrt()), torch.distributions.Normal(prior.mu, prior.var.sqrt())).flatten(1).sum(1)
        out = torch.sigmoid(tree.nodes[leaf].decoder(visits[leaf].z))
        log_px = (x * out.log() + (1 - x) * (1 - out).log()).flatten(1).sum(1)
        root = visits[0].q
        kl_root = torch.distributions.kl_divergence(
            torch.distributions.Normal(root.mu, root.var.sqrt()), torch.distributions.Normal(0.0, 1.0)).flatten(1).sum(1)
        for name, value in dict(reconstruction=log_px, kl_root=kl_root, kl_nodes=kl_nodes, kl_decisions=decisions).items():
            expected[name] += prob * value
    expected["elbo"] = expected["reconstruction"] - expected["kl_root"] - expected["kl_nodes"] - expected["kl_decisions"]
    for name in terms:
        assert torch.allclose(terms[name], expected[name], rtol=1e-4, atol=1e-4), name
    assert terms["kl_nodes"].min() > 0.01


def one_dimensional_tree(x):
    """A tree of one-dimensional latents and all its distributions for one image x, on a grid of z."""
    tree = make_tree(latent_channels=1, bottom_up_channels=3, max_depth=1, seed=3)
    grid = torch.linspace(-8, 8, 801)
    d = tree.bottom_up_pass(x)
    root = tree.nodes[0].evidence(d[0])
    q0 = normal_pdf(grid, root.mu.item(), root.var.squeeze())                  # (G,)
    z0 = grid.view(-1, 1, 1, 1)
    r_q, logit_p = torch.sigmoid(tree.nodes[0].router_q(d[0])), tree.nodes[0].router_p(z0)
    sides = []
    for leaf, q_c, log_p_c in ((1, r_q, -torch.log1p(torch.exp(-logit_p))), (2, 1 - r_q, -torch.log1p(torch.exp(logit_p)))):
        prior, evidence = tree.nodes[leaf].transformation(z0), tree.nodes[leaf].evidence(d[1])
        posterior = Gaussian(evidence.mu.expand_as(prior.mu), evidence.var.expand_as(prior.var)).times(prior)
        p_z = normal_pdf(grid[None], prior.mu.view(-1, 1), prior.var.view(-1, 1))                    # (G of z0, G of z_l)
        q_z = normal_pdf(grid[None], posterior.mu.view(-1, 1), posterior.var.view(-1, 1))
        log_px = -nn.functional.binary_cross_entropy_with_logits(
            tree.nodes[leaf].decoder(z0), x.expand(len(grid), -1, -1, -1), reduction="none").flatten(1).sum(1)
        sides.append((q_c.item(), log_p_c, p_z, q_z, log_px))
    return tree, grid, q0, sides


def test_elbo_terms_by_numerical_integration_in_one_dimension():
    x = images(1, seed=4)
    tree, grid, q0, sides = one_dimensional_tree(x)
    def over(values):
        return torch.trapezoid(values, grid, dim=-1)
    p0 = normal_pdf(grid, 0.0, torch.tensor(1.0))
    expected = dict(reconstruction=0.0, kl_nodes=0.0, kl_decisions=0.0,
                    kl_root=over(q0 * (q0.clamp(min=1e-38).log() - p0.clamp(min=1e-38).log())).item())
    for q_c, log_p_c, p_z, q_z, log_px in sides:
        ratio = q_z.clamp(min=1e-38).log() - p_z.clamp(min=1e-38).log()
        expected["reconstruction"] += q_c * over(q0 * over(q_z * log_px)).item()
        expected["kl_nodes"] += q_c * over(q0 * over(q_z * ratio)).item()
        expected["kl_decisions"] += q_c * over(q0 * (math.log(q_c) - log_p_c)).item()
    torch.manual_seed(0)
    samples = tree.elbo(x.expand(40000, -1, -1, -1))
    for name, value in expected.items():
        standard_error = samples[name].std().item() / 200
        assert samples[name].mean().item() == pytest.approx(value, abs=5 * standard_error + 2e-3), name
        assert abs(value) > 0.003, f"{name} is too small to be a test"


def test_log_likelihood_lies_between_the_elbo_and_the_truth_and_rises():
    x = images(1, seed=4)
    tree, grid, _, sides = one_dimensional_tree(x)
    p0 = normal_pdf(grid, 0.0, torch.tensor(1.0))
    top = max(log_px.max() for *_, log_px in sides)                            # p(x) is far below float32: scale it
    truth = sum(torch.trapezoid(p0 * log_p_c.exp() * torch.trapezoid(p_z * (log_px - top).exp(), grid, dim=1), grid)
                for _, log_p_c, p_z, _, log_px in sides).log() + top
    torch.manual_seed(0)
    many = x.expand(400, -1, -1, -1)
    bounds = [tree.log_likelihood(many, n).mean().item() for n in (1, 5, 50)]
    elbo = tree.elbo(many)["elbo"].mean().item()
    exact = tree.log_likelihood(x, 1000, chunk=300).item()
    assert elbo < bounds[0] < bounds[1] < bounds[2] < truth.item() + 0.02
    assert exact == pytest.approx(truth.item(), abs=0.05)


def test_gaussian_likelihood_is_the_density_with_sigma_one():
    tree, x = make_tree(likelihood="gaussian"), images(2)
    z = torch.randn(2, 2, 1, 1)
    out = tree.nodes[1].decoder(z)
    expected = torch.distributions.Normal(out, 1.0).log_prob(x).flatten(1).sum(1)
    assert torch.allclose(tree.log_p_x(1, z, x), expected, atol=1e-3)


# -- the tree ---------------------------------------------------------------------------------------------------------

def test_leaf_probabilities_sum_to_one_through_growing_and_pruning():
    tree, x = make_tree(max_depth=6), images(50)
    rng = torch.Generator().manual_seed(0)
    for step in range(12):
        leaves = tree.leaves
        pick = leaves[torch.randint(len(leaves), (1,), generator=rng)]
        if step % 3 == 2:
            tree.prune(pick)
        elif tree.depth(pick) < tree.max_depth:
            tree.grow(pick)
        tree.eval()
        probs = tree.leaf_probs(x)
        assert probs.shape == (50, len(tree.leaves))
        assert torch.allclose(probs.sum(1), torch.ones(50), atol=1e-5)
        d = tree.bottom_up_pass(x)
        reach = {v.node: v.log_reach_q.exp() for v in tree.walk(d)}            # the walk and the short cut agree
        assert torch.equal(torch.stack([reach[leaf] for leaf in tree.leaves], 1), probs)


def test_ids_are_stable_and_pruning_keeps_depths():
    tree = make_tree()
    assert tree.grow(1) == [3, 4] and tree.grow(4) == [5, 6] and tree.leaves == [3, 5, 6, 2]
    tree.prune(3)                                                              # its parent stays, with one child and no router
    assert tree.parents == [-1, 0, 0, -2, 1, 4, 4] and tree.leaves == [5, 6, 2] and tree.depth(5) == 3
    assert tree.nodes[1].router_q is None and tree.nodes[1].decoder is None
    assert tree.grow(5) == [7, 8]                                              # 3 is not used again
    tree.prune(2)
    tree.prune(6)
    tree.prune(7)
    assert tree.leaves == [8] and tree.leaf_probs(images(2)).tolist() == [[1.0], [1.0]]
    tree.prune(8)                                                              # parents left with no child go too
    assert tree.leaves == [0] and tree.parents == [-1] + [-2] * 8
    with pytest.raises(ValueError, match="cannot be pruned"):
        tree.prune(0)
    with pytest.raises(ValueError, match="cannot be split"):
        make_tree(max_depth=1).grow(1)


def test_pruning_passes_the_probability_through():
    """Without leaf 3, all that reached node 1 reaches leaf 4; the other leaves' P(l; c) do not change."""
    tree, x = make_tree((-1, 0, 0, 1, 1)), images(20)
    before = dict(zip(tree.leaves, tree.leaf_probs(x).T))
    tree.prune(3)
    after = dict(zip(tree.leaves, tree.eval().leaf_probs(x).T))
    assert torch.equal(after[2], before[2])
    assert torch.allclose(after[4], before[3] + before[4], atol=1e-6)


def test_swapping_children_with_routers_negated_changes_nothing(monkeypatch):
    parents, swapped = (-1, 0, 0, 1, 1, 3, 3), (-1, 0, 0, 2, 2, 3, 3)
    twin = {0: 0, 1: 2, 2: 1, 3: 3, 4: 4, 5: 5, 6: 6}                          # the root's children change sides
    a, b, x = make_tree(parents), make_tree(swapped, seed=9), images(4)
    b.encoder, b.bottom_up = a.encoder, a.bottom_up
    for i, j in twin.items():
        b.nodes[j].load_state_dict(a.nodes[i].state_dict())
    with torch.no_grad():
        for router in (b.nodes[0].router_q, b.nodes[0].router_p):
            router.net[-1].weight.neg_()
            router.net[-1].bias.neg_()
    noise = torch.randn(4, 2, 1, 1)
    monkeypatch.setattr(treevae.torch, "randn_like", lambda _: noise)          # the same noise at every node
    one, other = a.elbo(x), b.elbo(x)
    for name in one:
        assert torch.allclose(one[name], other[name], rtol=1e-5, atol=1e-5), name
    assert b.leaves == [2 if leaf == 1 else 1 if leaf == 2 else leaf for leaf in (2, 5, 6, 4)]
    assert (a.leaf_probs(x)[:, 0] - a.leaf_probs(x)[:, 3]).abs().max() > 1e-3


def test_growing_leaves_every_frozen_output_bit_identical():
    tree, x = make_tree((-1, 0, 0, 1, 1)), images(30)
    def outputs():
        tree.eval()
        torch.manual_seed(0)
        d = tree.bottom_up_pass(x)
        visits = {v.node: v for v in tree.walk(d) if v.node < 5}
        decoded = [tree.nodes[i].decoder(visits[i].z) for i in (2, 4)]
        return d + decoded + [t for v in visits.values() for t in (v.z, *v.q, *v.p, v.log_reach_q)] + [
            v.logit_q for v in visits.values() if v.node != 3 and v.logit_q is not None]
    before = outputs()
    buffers = {name: b.clone() for name, b in tree.named_buffers() if not name.startswith("nodes.3")}
    tree.grow(3)
    tree.train_only(3)
    trained = [p for p in tree.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.1, weight_decay=1e-2)
    losses = []
    for _ in range(20):
        loss, _ = tree.loss(x, below=3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
    assert not tree.encoder.training and not tree.nodes[2].decoder.training and tree.nodes[5].decoder.training
    for old, new in zip(before, outputs()):
        assert torch.equal(old, new)
    for name, old in buffers.items():
        assert torch.equal(old, dict(tree.named_buffers())[name]), name


def test_growing_sees_the_same_terms_as_the_whole_tree():
    """elbo(below=i): its gradient for the new parts is that of the whole ELBO."""
    tree, x = make_tree((-1, 0, 0, 1, 1)), images(8)
    tree.train_only(1)
    tree.eval()
    grads = []
    for below in (None, 1):
        torch.manual_seed(0)
        noise = torch.randn(8, 2, 1, 1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(treevae.torch, "randn_like", lambda _: noise)
            loss = -tree.elbo(x, below)["elbo"].mean()
        parts = [p for p in tree.parameters() if p.requires_grad]
        grads.append(torch.autograd.grad(loss, parts))
    for whole, path in zip(*grads):
        assert torch.allclose(whole, path, rtol=1e-4, atol=1e-5)


def test_growth_rule_on_hand_made_probabilities():
    tree = make_tree((-1, 0, 0, 2, 2), max_depth=2)                            # leaves 1 | 3, 4, the latter at max_depth
    probs = torch.tensor([[0.8, 0.1, 0.1]] * 4 + [[0.0, 0.9, 0.1]] * 9 + [[0.1, 0.5, 0.4]] * 3)
    leaf, mask = tree.next_split(probs, min_images=4)
    assert leaf == 1 and mask.tolist() == [True] * 4 + [False] * 12            # 3 is larger but cannot grow
    assert tree.next_split(probs, min_images=5) is None
    deeper = make_tree((-1, 0, 0, 2, 2), max_depth=3)
    leaf, mask = deeper.next_split(probs, min_images=4)
    assert leaf == 3 and mask.sum() == 12
    leaf, mask = deeper.next_split(torch.tensor([[0.34, 0.33, 0.33], [0.3, 0.2, 0.5]]), min_images=1)
    assert leaf == 1 and mask.tolist() == [True, False]                        # the threshold is 1/3 here
    shared = torch.tensor([[0.6, 0.4, 0.0]] * 2 + [[0.5, 0.1, 0.4]] + [[0.0, 0.6, 0.4]] * 4)
    leaf, mask = deeper.next_split(shared, min_images=1)
    assert leaf == 3 and mask.sum() == 6                                       # it has a share of six images,
    assert deeper.next_split(shared, 1, hard=True)[0] == 3                     # and is the most probable leaf of four
    shared = torch.tensor([[0.55, 0.45, 0.0]] * 4 + [[0.0, 0.6, 0.4]] * 3)
    assert deeper.next_split(shared, 1)[0] == 3 and deeper.next_split(shared, 1, hard=True)[0] == 1


def test_pruning_rule():
    tree = make_tree((-1, 0, 0, 2, 2))
    probs = torch.eye(3)[[0] * 500 + [1] * 495 + [2] * 5]
    assert tree.next_prune(probs) == 4
    assert tree.next_prune(torch.eye(3)[[0] * 500 + [1] * 490 + [2] * 10]) is None


# -- the contrastive loss ---------------------------------------------------------------------------------------------

def nt_xent_in_loops(a, tau, weight):
    """The formula, image by image: the l_i of 2 B views, image k weighted by weight[k] as an example and in the sum."""
    B = a.shape[1]
    views = [(a[v, i] / a[v, i].norm(), weight[i]) for v in (0, 1) for i in range(B)]
    total = 0.0
    for i, (one, w) in enumerate(views):
        partner = views[(i + B) % (2 * B)][0]
        others = sum(w_k * (one @ other / tau).exp() for k, (other, w_k) in enumerate(views) if k != i)
        total += w * -((one @ partner / tau).exp() / others).log()
    return total / (2 * B)


def test_nt_xent_against_a_double_loop_and_finite_differences():
    torch.manual_seed(0)
    a, weight = torch.randn(2, 5, 3, dtype=torch.double), torch.rand(5, dtype=torch.double)
    ones = torch.ones(5, dtype=torch.double)
    assert treevae.nt_xent(a, 0.5).item() == pytest.approx(nt_xent_in_loops(a, 0.5, ones).item(), rel=1e-5)       # the paper's
    assert treevae.nt_xent(a, 1.0, weight.log()).item() == pytest.approx(nt_xent_in_loops(a, 1.0, weight).item(), rel=1e-5)
    a.requires_grad_(True)
    treevae.nt_xent(a, 0.5, weight.log()).backward()
    for index in [(0, 0, 0), (1, 3, 2), (0, 4, 1)]:
        step = torch.zeros_like(a)
        step[index] = 1e-5
        slope = (nt_xent_in_loops(a.detach() + step, 0.5, weight) - nt_xent_in_loops(a.detach() - step, 0.5, weight)) / 2e-5
        assert a.grad[index].item() == pytest.approx(slope.item(), rel=1e-3, abs=1e-6)


def test_images_of_no_weight_take_no_part():
    torch.manual_seed(0)
    a = torch.randn(2, 6, 4)
    some = torch.tensor([0.0, 0.0, 0.0, 0.0, -60.0, -60.0])
    assert treevae.nt_xent(a, 0.5, some).item() == pytest.approx(treevae.nt_xent(a[:, :4], 0.5).item() * 4 / 6, rel=1e-4)


def test_contrastive_loss_is_over_the_routers_and_all_depths():
    tree = make_tree((-1, 0, 0, 1, 1), contrastive=True)
    x = images(12)
    d = tree.bottom_up_pass(x)
    visits = list(tree.walk([h[:6] for h in d]))
    expected = 0.0
    for v in visits:
        if v.logit_q is not None:
            r = tree.nodes[v.node].router_q(d[tree.depth(v.node)]).sigmoid()
            pairs = torch.stack([r, 1 - r], 1).unflatten(0, (2, 6)).double()
            expected += nt_xent_in_loops(pairs, 1.0, v.log_reach_q.exp().double()).item()
    router_of_1 = tree.contrastive_loss(d, visits, below=1).item()
    assert 0 < router_of_1 < expected
    for h, features in enumerate(d):
        expected += nt_xent_in_loops(tree.heads[h](features).unflatten(0, (2, 6)).double(), 0.5, torch.ones(6)).item() / len(d)
    assert tree.contrastive_loss(d, visits).item() == pytest.approx(expected, rel=1e-4)


def cost_of_cut(points, left, neighbours):
    """Shi and Malik's cost of a cut, by loops over all pairs: cut / weight of one side + cut / weight of the other."""
    n, cut, weight = len(points), 0.0, {True: 0.0, False: 0.0}
    near = [sorted(range(n), key=lambda j: ((points[i] - points[j]).norm().item() if j != i else math.inf))[:neighbours] for i in range(n)]
    for i in range(n):
        for j in range(n):
            edge = (j in near[i]) + (i in near[j])
            weight[bool(left[i])] += edge
            cut += edge * bool(left[i] and not left[j])
    return cut / max(weight[True], 1e-9) + cut / max(weight[False], 1e-9)


def test_the_best_cut_of_a_graph():
    torch.manual_seed(0)
    angle = 2 * math.pi * torch.rand(400)
    rings = torch.stack([angle.cos(), angle.sin()], 1) * torch.where(torch.arange(400) < 250, 1.0, 3.0)[:, None]
    cut = treevae.normalized_cut(rings)
    assert cut[:250].float().mean() in (0, 1) and (cut[250:] != cut[0]).all()   # one within the other: no line divides them
    points = torch.cat([torch.randn(7, 2), torch.randn(5, 2) + torch.tensor([2.5, 0.0])])
    found = cost_of_cut(points, treevae.normalized_cut(points, 4), 4)
    all_cuts = [[bool(k >> i & 1) for i in range(12)] for k in range(1, 2 ** 11)]
    best = min(cost_of_cut(points, left, 4) for left in all_cuts if 2 <= sum(left) <= 10)
    assert found == pytest.approx(best, rel=1e-9)
    skewed = torch.cat([torch.randn(95, 2) * 0.1, torch.randn(5, 2) * 0.1 + 9])
    assert 15 <= treevae.normalized_cut(skewed).sum() <= 85                     # 5 points alone would be a leaf of next to nothing
    assert treevae.normalized_cut(torch.rand(2, 3)).sum() == 1


def test_the_guide_is_a_cross_entropy():
    tree, x = make_tree((-1, 0, 0), contrastive=True), images(8)
    d = tree.bottom_up_pass(x)
    points, goes_left = tree.features(d).detach()[:4] + 1e-3, torch.tensor([True, False, False, True])
    losses = []
    for weight in (0.0, 2.0):
        torch.manual_seed(1)
        losses.append(tree.loss(x, below=0, guide=(points, goes_left), guide_weight=weight)[0].item())
    logit, total = tree.nodes[0].router_q(d[0]), 0.0
    for feature, one in zip(tree.features(d), logit):
        left = goes_left[min(range(4), key=lambda k: (feature - points[k]).norm().item())]
        total -= torch.log(one.sigmoid() if left else 1 - one.sigmoid()).item()
    assert losses[1] - losses[0] == pytest.approx(2 * total / 8, rel=1e-3)


def test_a_tree_may_start_as_its_root():
    """The root alone is a plain VAE; its split gives the tree of a root and two leaves."""
    tree, x = make_tree((-1,), contrastive=True), images(3)
    terms = tree.elbo(x)
    assert torch.equal(tree.leaf_probs(x), torch.ones(3, 1)) and not terms["kl_nodes"].any() and not terms["kl_decisions"].any()
    path = tree.infer_path(x, torch.zeros(3, dtype=torch.long))
    assert path.nodes.tolist() == [[0]] * 3 and tree.decode(tree.sample_path(2)).shape == (2, 1, 16, 16)
    assert tree.grow(0) == [1, 2] and tree.nodes[0].decoder is None
    tree.train_only(0)
    tree.loss(x, below=0)[0].backward()
    assert tree.nodes[0].evidence.linear.weight.grad is None and tree.nodes[1].evidence.linear.weight.grad is not None


# -- paths ------------------------------------------------------------------------------------------------------------

def test_inferred_paths_have_the_moments_of_q():
    """infer_path samples the same distributions as the walk: the mean z of each node over many samples."""
    tree, x = make_tree((-1, 0, 0, 2, 2)), images(1)
    many = x.expand(20000, -1, -1, -1)
    torch.manual_seed(0)
    visits = {v.node: v.z for v in tree.walk(tree.bottom_up_pass(many))}
    for column, leaf in enumerate(tree.leaves):
        path = tree.infer_path(many, torch.full((len(many),), column))
        ids = tree.path_to(leaf)
        assert path.nodes[0].tolist() == ids + [-1] * (path.nodes.shape[1] - len(ids))
        assert (path.z[:, len(ids):] == 0).all()
        for h, i in enumerate(ids):
            assert torch.allclose(path.z[:, h].mean(0), visits[i].mean(0), atol=5 * visits[i].std(0).max().item() / 100)
    leaf_share = (tree.infer_path(many).nodes.amax(1)[:, None] == torch.tensor(tree.leaves)).float().mean(0)
    assert torch.allclose(leaf_share, tree.leaf_probs(x)[0], atol=0.02)         # sampled from P(l; c), not its argmax


def test_prior_paths_follow_the_generative_model():
    tree = make_tree((-1, 0, 0, 2, 2))
    torch.manual_seed(0)
    path = tree.sample_path(20000)
    assert path.z[:, 0].mean().abs() < 0.05 and abs(path.z[:, 0].std().item() - 1) < 0.02           # eq. (7)
    right = path.nodes[:, 1] == 2
    p_left = tree.nodes[0].router_p(path.z[:, 0]).sigmoid()
    assert right.float().mean().item() == pytest.approx(1 - p_left.mean().item(), abs=0.015)         # eq. (9)
    forced = tree.sample_path(50, node=4, z_root=torch.ones(50, 2, 1, 1))
    assert (forced.nodes == torch.tensor([0, 2, 4])).all() and (forced.z[:, 0] == 1).all()
    below = tree.sample_path(200, node=2)
    assert (below.nodes[:, 1] == 2).all() and set(below.nodes[:, 2].tolist()) == {3, 4}
    decoded = tree.decode(forced)
    assert torch.allclose(decoded, tree.nodes[4].decoder(forced.z[:, 2]).sigmoid(), atol=1e-6) and decoded.shape == (50, 1, 16, 16)


@pytest.mark.parametrize("shape, likelihood, r, kind", [
    ((1, 28, 28), "bernoulli", 4, "cnn"), ((1, 28, 28), "bernoulli", 1, "mlp"), ((3, 32, 32), "gaussian", 2, "resnet"),
    ((3, 64, 64), "gaussian", 4, "resnet"), ((30,), "gaussian", 1, "mlp")])
def test_every_form_trains_grows_prunes_and_takes_a_batch_of_one(shape, likelihood, r, kind):
    torch.manual_seed(0)
    tree = TreeVAE(shape, likelihood, latent_channels=3, bottom_up_channels=4, representation_dim=r, max_depth=3, encoder=kind,
                   decoder=kind, width=4, contrastive=True)
    x = torch.rand(12, *shape)
    optimizer = torch.optim.Adam(tree.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss, _ = tree.loss(x, kl_weight=0.1, view=x + 0.1 * torch.rand_like(x), contrastive_weight=1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    children = tree.grow(1)
    tree.train_only(1)
    tree.loss(x[:7], below=1)[0].backward()                                    # a last batch of any size
    assert tree.nodes[1].router_q.net[0][0].weight.grad.abs().sum() > 0
    tree.prune(children[0])
    assert torch.allclose(tree.eval().leaf_probs(x).sum(1), torch.ones(12), atol=1e-5) and tree.leaves == [children[1], 2]
    one = tree.elbo(x[:1])
    assert all(value.shape == (1,) and value.isfinite().all() for value in one.values())
    path = tree.infer_path(x, tree.leaf_probs(x).argmax(1))
    assert tree.decode(path).shape == x.shape and 0 <= tree.decode(path).min() and tree.decode(path).max() <= 1
    assert (tree.log_likelihood(x[:2], 20) > tree.elbo(x[:2])["elbo"] - 5).all()


def test_a_tree_reloads_to_the_same_outputs(tmp_path):
    tree, x = make_tree((-1, 0, 0, 1, 1)), images(5)
    tree.prune(3)
    torch.save({"parents": tree.parents, "state_dict": tree.state_dict()}, tmp_path / "tree.pt")
    saved = torch.load(tmp_path / "tree.pt", weights_only=True)
    again = make_tree(saved["parents"], seed=7)
    again.load_state_dict(saved["state_dict"])
    assert torch.equal(tree.leaf_probs(x), again.leaf_probs(x))
    torch.manual_seed(0)
    one = tree.elbo(x)["elbo"]
    torch.manual_seed(0)
    assert one.isfinite().all() and torch.equal(one, again.elbo(x)["elbo"])


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="resize it to 28, 32 or 64"):
        TreeVAE((1, 30, 30))
    with pytest.raises(ValueError, match="poisson"):
        TreeVAE((1, 28, 28), likelihood="poisson")
