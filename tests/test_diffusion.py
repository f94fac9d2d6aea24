"""Stage 2 against the paper: the schedule, the posterior, the loss, both samplers, the U-Net and its conditioning."""

import math

import pytest
import torch

import diffusion
import path_encoder
from diffusion import Diffusion, UNet
from path_encoder import PathEncoder


def normal_pdf(x, mu, var):
    return torch.exp(-((x - mu) ** 2) / (2 * var)) / math.sqrt(2 * math.pi * var)


def gaussian_eps(diffusion, mean, var):
    """The exact E[eps | x_t] when x_0 ~ N(mean, var): the best any net can do."""
    def net(x, t, y):
        abar = diffusion.abar[t].view(-1, 1, 1, 1)
        return (1 - abar).sqrt() * (x - abar.sqrt() * mean) / (abar * var + 1 - abar)
    return net


# -- forward ----------------------------------------------------------------------------------------------------------

def test_add_noise_is_the_chain_applied_t_times():
    """Eq. (5) against eq. (4) step by step: mean, variance and quantiles of x_t from one x_0."""
    diffusion, n = Diffusion(timesteps=200, beta_end=0.05), 100_000
    rng = torch.Generator().manual_seed(0)
    x = torch.full((n,), 0.8)
    for t in range(60):
        beta = 1e-4 + (0.05 - 1e-4) * t / 199                                  # the linear schedule, by hand
        x = math.sqrt(1 - beta) * x + math.sqrt(beta) * torch.randn(n, generator=rng)
    x0 = torch.full((n, 1, 1, 1), 0.8)
    jump = diffusion.add_noise(x0, torch.full((n,), 59), torch.randn(n, 1, 1, 1, generator=rng)).flatten()
    assert jump.mean().item() == pytest.approx(x.mean().item(), abs=0.015)
    assert jump.std().item() == pytest.approx(x.std().item(), abs=0.01)
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    assert torch.allclose(jump.quantile(levels), x.quantile(levels), atol=0.025)


@pytest.mark.parametrize("t", [1, 10, 500, 999])
def test_posterior_is_bayes_rule_on_a_grid(t):
    """Eqs. (25), (26): q(x_{t-1} | x_t, x_0) is proportional to q(x_t | x_{t-1}) q(x_{t-1} | x_0)."""
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    abar = torch.cumprod(1 - beta, 0)
    x0, xt = 0.6, 0.1 if t > 100 else 0.55
    grid = torch.linspace(-6, 6, 1_200_001, dtype=torch.float64)
    density = (normal_pdf(math.sqrt(1 - beta[t]) * grid, xt, beta[t].item())
               * normal_pdf(grid, math.sqrt(abar[t - 1]) * x0, (1 - abar[t - 1]).item()))
    density /= torch.trapezoid(density, grid)
    mean = torch.trapezoid(density * grid, grid).item()
    variance = torch.trapezoid(density * (grid - mean) ** 2, grid).item()
    mu, var = Diffusion().posterior(torch.full((1, 1, 1, 1), x0), torch.full((1, 1, 1, 1), xt), torch.tensor([t]))
    assert mu.item() == pytest.approx(mean, rel=1e-4)
    assert var.item() == pytest.approx(variance, rel=1e-3)


def test_posterior_of_the_first_step_is_the_image():
    """abar_0 = 1: at the paper's t = 1 the mean is x_0 and there is no variance."""
    x0 = torch.rand(2, 1, 4, 4)
    mean, var = Diffusion().posterior(x0, torch.randn(2, 1, 4, 4), torch.zeros(2, dtype=torch.long))
    assert torch.allclose(mean, x0, atol=1e-6) and (var == 0).all()


def test_mu_psi_is_the_posterior_mean_at_the_predicted_image():
    """Eq. (28)'s mean, with eps, equals eq. (26)'s, with x0^; what eq. (29) compares becomes what eq. (30) compares."""
    diffusion = Diffusion()
    xt, eps, t = torch.randn(5, 1, 4, 4), torch.randn(5, 1, 4, 4), torch.tensor([1, 10, 300, 700, 999])
    x0, _ = diffusion.predict(lambda x, t, y: eps, xt, t, None, clip=False)
    beta, abar = diffusion.beta[t].view(-1, 1, 1, 1), diffusion.abar[t].view(-1, 1, 1, 1)
    mu_psi = (xt - beta / (1 - abar).sqrt() * eps) / (1 - beta).sqrt()
    assert torch.allclose(diffusion.posterior(x0, xt, t)[0], mu_psi, atol=1e-4)


def test_loss_is_l_simple():
    """Eq. (30) rewritten plainly, for given times and noise."""
    diffusion, x0, eps = Diffusion(), torch.rand(6, 1, 4, 4) * 2 - 1, torch.randn(6, 1, 4, 4)
    t = torch.tensor([0, 5, 100, 400, 800, 999])
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    total = 0.0
    for k in range(6):
        abar = float(torch.prod(1 - beta[:t[k] + 1]))
        total += ((eps[k] - 0.3 * (math.sqrt(abar) * x0[k] + math.sqrt(1 - abar) * eps[k])) ** 2).mean().item() / 6
    assert diffusion.loss(lambda x, t, y: 0.3 * x, x0, None, t, eps).item() == pytest.approx(total, rel=1e-5)


# -- sampling ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_with_the_exact_eps_returns_the_gaussian(eta):
    diffusion = Diffusion()
    torch.manual_seed(0)
    x = diffusion.ddim_sample(gaussian_eps(diffusion, 0.3, 0.04), (200, 1, 10, 10), steps=1000, eta=eta, spacing="linear", clip=False)
    assert x.mean().item() == pytest.approx(0.3, abs=0.01)
    assert x.std().item() == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_ddpm_with_the_exact_eps_returns_the_gaussian(variance):
    diffusion = Diffusion()
    torch.manual_seed(0)
    x = diffusion.ddpm_sample(gaussian_eps(diffusion, 0.3, 0.04), (200, 1, 10, 10), variance=variance, clip=False)
    assert x.mean().item() == pytest.approx(0.3, abs=0.01)
    assert x.std().item() == pytest.approx(0.2, abs=0.01)


def test_ddim_with_eta_one_over_all_steps_is_ddpm():
    """Each jump to the step before has DDPM's mean, eq. (26), and its variance beta~."""
    diffusion = Diffusion()
    x0, xt = torch.rand(1, 1, 4, 4) * 2 - 1, torch.randn(1, 1, 4, 4)
    assert diffusion.ddim_times(1000, "linear") == list(range(1000))
    for step in (1, 2, 50, 500, 999):
        abar = diffusion.abar[step]
        eps = (xt - abar.sqrt() * x0) / (1 - abar).sqrt()
        mean, s = diffusion.ddim_jump(x0, eps, step, step - 1, eta=1.0)
        mu, var = diffusion.posterior(x0, xt, torch.tensor([step]))
        assert s.item() ** 2 == pytest.approx(var.item(), rel=5e-3)
        assert torch.allclose(mean, mu, atol=2e-3)


@pytest.mark.parametrize("steps", [1, 2, 10, 100, 1000])
@pytest.mark.parametrize("spacing, last", [("linear", 999), ("quadratic", 799)])
def test_ddim_subsequences_rise_from_the_start_to_the_right_end(steps, spacing, last):
    times = Diffusion().ddim_times(steps, spacing)
    assert times == sorted(set(times)) and times[-1] == last and times[0] >= 0
    assert len(times) == steps if spacing == "linear" else len(times) <= steps
    if steps == 2:
        assert times == ([499, 999] if spacing == "linear" else [199, 799])    # 0.8 T (1/2)^2 = 200 = the paper's t
    if steps == 1000 and spacing == "linear":
        assert times[0] == 0


def test_samplers_ask_at_the_original_times_and_end_at_the_image():
    """The net hears the t of the full schedule; a net that always names the noise of one image brings that image back."""
    diffusion, asked, image = Diffusion(), [], torch.rand(1, 1, 4, 4) * 2 - 1
    def net(x, t, y):
        asked.append(t[0].item())
        abar = diffusion.abar[t].view(-1, 1, 1, 1)
        return (x - abar.sqrt() * image) / (1 - abar).sqrt()
    out = diffusion.ddim_sample(net, (2, 1, 4, 4), steps=10)
    assert asked == diffusion.ddim_times(10)[::-1] and asked[0] == 799
    assert torch.allclose(out, image.expand(2, -1, -1, -1), atol=1e-5)


def test_clipping_keeps_images_in_range_and_eps_consistent():
    diffusion, x = Diffusion(), 3 * torch.randn(4, 1, 4, 4)
    t = torch.full((4,), 400)
    x0, eps = diffusion.predict(lambda x, t, y: torch.zeros_like(x), x, t, None, clip=True)
    assert x0.abs().max() <= 1
    assert torch.allclose(diffusion.add_noise(x0, t, eps), x, atol=1e-5)


def test_ddim_is_deterministic_in_the_noise_and_in_any_split():
    torch.manual_seed(0)
    net = UNet((1, 8, 8), channels=8, multipliers=(1, 2), blocks=1, attention=(), dropout=0.0).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    diffusion, x_T = Diffusion(), torch.randn(6, 1, 8, 8)
    y = torch.randn(6, net.emb_dim)
    whole = diffusion.ddim_sample(net, x_T.shape, y, steps=5, x_T=x_T)
    parts = torch.cat([diffusion.ddim_sample(net, x_T[k:k + 2].shape, y[k:k + 2], steps=5, x_T=x_T[k:k + 2]) for k in (0, 2, 4)])
    assert torch.allclose(whole, parts, atol=1e-5)


def test_wrong_sampling_settings_are_named():
    with pytest.raises(ValueError, match="1..1000"):
        Diffusion().ddim_times(0)
    with pytest.raises(ValueError, match="variance"):
        Diffusion().ddpm_sample(None, (1, 1, 4, 4), variance="best")


# -- the nets ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape, multipliers, attention", [((1, 28, 28), (1, 2, 2, 2), (16,)), ((1, 28, 28), (1, 2, 2), ()),
                                                           ((3, 32, 32), (1, 2, 2, 2), (16, 8)), ((3, 64, 64), (1, 2, 2, 2, 4), (16, 8))])
def test_unet_shapes_start_and_conditioning(shape, multipliers, attention):
    torch.manual_seed(0)
    net = UNet(shape, channels=8, multipliers=multipliers, blocks=1, attention=attention, dropout=0.1).eval()
    x, t = torch.randn(2, *shape), torch.tensor([3, 900])
    diffusion = Diffusion()                                                    # the last convolution starts at 0, and so h:
    assert torch.allclose(diffusion.predict(net, x, t, None, clip=False)[0], diffusion.abar[t].sqrt().view(2, 1, 1, 1) * x, atol=1e-3)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    y = torch.randn(2, net.emb_dim)
    out = net(x, t, y)
    assert out.shape == x.shape
    assert not torch.allclose(out, net(x, t)) and not torch.allclose(out, net(x, t.flip(0), y))
    assert torch.allclose(out[:1], net(x[:1], t[:1], y[:1]), atol=1e-4)         # images do not see each other


def test_unet_with_the_true_v_predicts_the_true_eps():
    """eps_psi is sqrt(1 - abar) x_t + sqrt(abar) h: exact for h = sqrt(abar) eps - sqrt(1 - abar) x_0, which the layers are made to give."""
    diffusion, t = Diffusion(50), torch.tensor([0, 20, 49])
    net = UNet((1, 8, 8), channels=8, multipliers=(1,), blocks=1, attention=(), dropout=0.0, timesteps=50)
    x0, eps = torch.randn(2, 3, 1, 8, 8, dtype=torch.float64)
    signal, noise = diffusion.abar[t].sqrt().view(3, 1, 1, 1), diffusion.one_minus_abar[t].sqrt().view(3, 1, 1, 1)
    net.last.register_forward_hook(lambda layer, inputs, out: signal * eps - noise * x0)
    assert torch.allclose(net(diffusion.add_noise(x0, t, eps).float(), t).double(), eps, atol=1e-5)


def test_appendix_d_unet_has_the_size_of_the_authors():
    """64 channels, (1, 2, 2, 2), two blocks a scale, attention only in the middle: 9.26 M parameters."""
    net = UNet((1, 28, 28), 64, (1, 2, 2, 2), 2, attention=())
    assert sum(p.numel() for p in net.parameters()) == 9_259_713


def test_path_encoder_is_a_masked_sum():
    """Section 3.2: y is the same under any order of the path and any padding, and hears every z and every id."""
    torch.manual_seed(0)
    encoder = PathEncoder((2, 3, 3), n_nodes=7, emb_dim=16)
    z, nodes = torch.randn(4, 3, 2, 3, 3), torch.tensor([[0, 1, 4], [0, 2, 6], [0, 1, 3], [0, 2, -1]])
    y = encoder(z, nodes)
    assert y.shape == (4, 16)
    assert torch.allclose(encoder(z[:, [2, 0, 1]], nodes[:, [2, 0, 1]]), y, atol=1e-6)
    padded = torch.cat([z, torch.randn(4, 2, 2, 3, 3)], 1), torch.cat([nodes, torch.full((4, 2), -1)], 1)
    assert torch.allclose(encoder(*padded), y, atol=1e-6)
    by_hand = sum(encoder.f_z(z[1, k].flatten()) + encoder.f_id(nodes[1, k]) for k in range(3))
    assert torch.allclose(y[1], by_hand, atol=1e-5)
    for k in range(3):
        other_z, other_nodes = z.clone(), nodes.clone()
        other_z[0, k] += 1
        other_nodes[0, k] = 5
        assert not torch.allclose(encoder(other_z, nodes)[0], y[0]) and not torch.allclose(encoder(z, other_nodes)[0], y[0])


def test_the_loss_goes_down_and_y_is_used():
    """Two kinds of images told apart by y alone: the net learns to draw the one it is asked for."""
    torch.manual_seed(0)
    diffusion = Diffusion()
    net = UNet((1, 4, 4), channels=32, multipliers=(1,), blocks=1, attention=(), dropout=0.0)
    table = torch.nn.Embedding(2, net.emb_dim)
    optimizer = torch.optim.Adam([*net.parameters(), *table.parameters()], lr=2e-3)
    losses = []
    for _ in range(300):
        kind = torch.randint(2, (64,))
        x0 = (2.0 * kind - 1).view(-1, 1, 1, 1).expand(-1, 1, 4, 4) * 0.9
        loss = diffusion.loss(net, x0, table(kind))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.3 * sum(losses[:10])
    images = diffusion.ddim_sample(net.eval(), (8, 1, 4, 4), table(torch.tensor([0, 1] * 4)), steps=20)
    assert images[0::2].mean() < -0.5 and images[1::2].mean() > 0.5


# -- conditioning -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("signal", path_encoder.SIGNALS)
def test_each_signal_hears_what_it_should(signal):
    torch.manual_seed(0)
    encoder = path_encoder.PathEncoder((2, 1, 1), n_nodes=5, emb_dim=6, signal=signal)
    nodes, z = torch.tensor([[0, 1, 4], [0, 2, -1]]), torch.randn(2, 3, 2, 1, 1)
    y = encoder(z, nodes)
    if signal == "none":
        assert y is None
        return
    def changed(z, nodes):
        return [not torch.allclose(a, b, atol=1e-6) for a, b in zip(encoder(z, nodes), y)]
    def moved(level):
        return torch.stack([z[:, k] + (k == level) for k in range(3)], 1)
    assert y.shape == (2, 6)
    assert changed(moved(0), nodes) == [signal == "path"] * 2                                      # the root's z
    assert changed(moved(1), nodes) == [signal == "path", signal != "leaf-index"]                   # the second image's leaf is there
    assert changed(moved(2), nodes) == [signal != "leaf-index", False]                              # the other's is padding
    assert changed(z, torch.tensor([[0, 1, 3], [0, 2, -1]])) == [signal != "leaf-latent", False]    # another leaf


def test_guidance_is_its_formula_and_none_at_weight_zero():
    def net(x, t, y):
        return x * y.sum(1).view(-1, 1, 1, 1) + t.view(-1, 1, 1, 1)
    x, t, y = torch.randn(3, 1, 4, 4), torch.tensor([1, 2, 3]), torch.randn(3, 5)
    assert diffusion.guided(net, 0.0) is net
    expected = 3.0 * net(x, t, y) - 2.0 * net(x, t, torch.zeros_like(y))
    assert torch.allclose(diffusion.guided(net, 2.0)(x, t, y), expected, atol=1e-5)


def test_a_reconstruction_beside_the_image_is_seen_also_under_guidance():
    torch.manual_seed(0)
    net = UNet((1, 8, 8), channels=8, multipliers=(1, 2), blocks=1, attention=(), dropout=0.0, extra=1).eval()
    torch.nn.init.normal_(net.last[2].weight)
    x, t, y, seen = torch.randn(2, 1, 8, 8), torch.tensor([5, 700]), torch.randn(2, net.emb_dim), torch.rand(2, 1, 8, 8)
    out = diffusion.beside(net, seen)(x, t, y)
    assert out.shape == x.shape and not torch.allclose(out, diffusion.beside(net, seen + 0.5)(x, t, y))
    steered = diffusion.guided(diffusion.beside(net, seen), 1.0)(x, t, y)
    assert torch.allclose(steered, 2 * out - diffusion.beside(net, seen)(x, t, torch.zeros_like(y)), atol=1e-4)
