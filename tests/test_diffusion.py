"""Stage 2 against the paper: schedule, posterior, loss, samplers, U-Net, path encoder."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion import (
    Attention, Diffusion, GroupNorm, ResBlock, UNet, autocast, eps_net, time_features)
from path_encoder import SIGNALS, PathEncoder

BETA = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).view(-1, 1, 1, 1)
ABAR = torch.cumprod(1 - BETA, 0)


def randomised(module):                                                  # no parameter is zero
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return module.eval()


def some_eps(x, t, y):                                                   # far out of [-1, 1]
    return torch.sin(3 * x + t.view(-1, 1, 1, 1) + y) * 1.5


def test_the_jump_is_the_chain():
    diffusion, mean, var = Diffusion(200, 1e-3, 0.05), 1.0, 0.0
    for t in range(200):
        beta = 1e-3 + (0.05 - 1e-3) * t / 199
        mean, var = math.sqrt(1 - beta) * mean, (1 - beta) * var + beta  # eq. (4); then (5)
        assert diffusion.add_noise(1.0, [t], 0.0).item() == pytest.approx(mean, rel=1e-5)
        assert diffusion.add_noise(0.0, [t], 1.0).item() == pytest.approx(var**0.5, rel=1e-5)


@pytest.mark.parametrize("t", [1, 10, 500, 999])
def test_the_posterior_is_bayes_rule_on_a_grid(t):                       # eqs. (25), (26)
    x0, xt = 0.6, 0.1 if t > 100 else 0.55
    grid = torch.linspace(-6, 6, 600_001, dtype=torch.float64)
    density = (-(xt - (1 - BETA[t]).sqrt() * grid)**2 / (2 * BETA[t])
               - (grid - ABAR[t - 1].sqrt() * x0)**2 / (2 * (1 - ABAR[t - 1]))).softmax(-1)
    mean = (density * grid).sum()
    mu, var = Diffusion().posterior(x0, xt, [t])
    assert mu.item() == pytest.approx(mean.item(), rel=1e-4)
    assert var.item() == pytest.approx((density * (grid - mean)**2).sum().item(), rel=1e-3)


def test_x0_eps_and_v_determine_each_other_and_mu_psi_is_eq_28():
    diffusion, t = Diffusion(), torch.tensor([0, 10, 300, 700, 999])
    x0, eps = torch.randn(2, 5, 1, 4, 4, dtype=torch.float64)
    xt = ABAR[t].sqrt() * x0 + (1 - ABAR[t]).sqrt() * eps
    v = ABAR[t].sqrt() * eps - (1 - ABAR[t]).sqrt() * x0
    assert torch.allclose(diffusion.eps_from_v(xt, v, t), eps, atol=1e-6)
    assert torch.allclose(diffusion.predict_x0(xt, eps, t), x0, atol=1e-5)
    mu_psi = (xt - BETA[t] / (1 - ABAR[t]).sqrt() * eps) / (1 - BETA[t]).sqrt()
    mean, var = diffusion.posterior(x0, xt, t)                           # eq. (26)
    assert torch.allclose(diffusion.mu_psi(xt, eps, t), mu_psi, atol=1e-6) and var[0] == 0
    assert torch.allclose(mean, mu_psi, atol=1e-5)


def test_the_loss_is_l_simple_over_every_time_with_standard_noise():
    t, asked = torch.tensor([0, 5, 100, 400, 800, 999]), []
    x0, eps = torch.randn(2, 6, 1, 4, 4)
    xt = ABAR[t].sqrt() * x0 + (1 - ABAR[t]).sqrt() * eps
    expected = (eps - some_eps(xt, t, 0.5)).square().mean().item()      # eq. (30)
    assert Diffusion().loss(some_eps, x0, 0.5, t, eps).item() == pytest.approx(expected, rel=1e-3)
    v = ABAR[t].sqrt() * eps - (1 - ABAR[t]).sqrt() * x0                 # Salimans and Ho 2022
    guess = (some_eps(xt, t, 0.5) - (1 - ABAR[t]).sqrt() * xt) / ABAR[t].sqrt()
    of_v = Diffusion().loss(some_eps, x0, 0.5, t, eps, "v").item()
    assert of_v == pytest.approx((v - guess).square().mean().item(), rel=1e-3)
    diffusion = Diffusion(5, 0.1, 0.9)
    diffusion.loss(lambda *args: asked.append(args) or args[0], torch.zeros(5000, 1, 2, 2), "y")
    xt, t, y = asked[0]
    assert y == "y" and t.max() == 4 and t.bincount().min() > 850        # 0 and T - 1, too
    eps = xt / diffusion.one_minus_abar[t].sqrt()                        # as x_0 = 0
    assert abs(eps.mean()) < 0.04 and abs(eps.std() - 1) < 0.04 and len(eps.unique()) > 19_000


@pytest.mark.parametrize("eta, clip", [(0.0, True), (0.0, False), (0.5, True), (1.0, False)])
def test_ddim_is_eq_12_of_its_paper(eta, clip):
    x_T, seen, times = 2 * torch.randn(4, 1, 4, 4), [], [99, 66, 33]
    diffusion = Diffusion(100, 1e-4, BETA[99].item())                    # the first 100 betas
    torch.manual_seed(3)
    out = diffusion.ddim_sample(some_eps, x_T.shape, 0.5, 3, eta, "linear", x_T, clip, seen)
    assert [jump[0] for jump in seen] == times and seen[0][1] is x_T and out is seen[2][2]
    torch.manual_seed(3)
    for k, (t, x, x0) in enumerate(seen):
        eps = some_eps(x, torch.full((4,), t), 0.5)
        guess = (x - (1 - ABAR[t]).sqrt() * eps) / ABAR[t].sqrt()
        guess = guess.clamp(-1, 1) if clip else guess
        assert torch.allclose(x0.double(), guess, atol=1e-4)
        if k < 2:
            now, prev = ABAR[t], ABAR[times[k + 1]]
            eps = (x - now.sqrt() * guess) / (1 - now).sqrt()
            s = eta * ((1 - prev) / (1 - now)).sqrt() * (1 - now / prev).sqrt()
            x = prev.sqrt() * guess + (1 - prev - s**2).sqrt() * eps + s * torch.randn_like(x)
            assert torch.allclose(seen[k + 1][1].double(), x, atol=1e-4)


@pytest.mark.parametrize("variance, table, clip", [
    ("posterior", "beta_tilde", True), ("beta", "beta", False)])
def test_ddpm_is_eq_27(variance, table, clip):
    diffusion, x = Diffusion(5, 0.1, 0.5), torch.randn(4, 1, 4, 4, requires_grad=True)
    torch.manual_seed(3)
    out = diffusion.ddpm_sample(some_eps, x.shape, 0.5, x, variance, clip)
    torch.manual_seed(3)
    for t in torch.arange(5).flip(0).view(5, 1).expand(5, 4):
        x0 = diffusion.predict_x0(x, some_eps(x, t, 0.5), t)
        mean, _ = diffusion.posterior(x0.clamp(-1, 1) if clip else x0, x, t)
        x = mean + getattr(diffusion, table)[t].sqrt() * torch.randn_like(x)
    assert torch.allclose(out, mean, atol=1e-4) and not out.requires_grad    # no noise at the end


def test_a_sample_is_a_function_of_x_T_unless_noise_is_added():
    times, seen, scale = Diffusion().ddim_times, [], torch.tensor(1.5, requires_grad=True)
    net = eps_net(Diffusion(), lambda x, t, y: scale * torch.sin(3 * x))
    one, two = [Diffusion().ddim_sample(net, (4, 1, 8, 8), seen=seen) for _ in range(2)]
    again = Diffusion().ddim_sample(net, one.shape, x_T=seen[0][1])      # no noise by default
    assert torch.equal(again, one) and not torch.equal(two, one)
    assert one.abs().max() <= 1 and not one.requires_grad and times(1) == [799]
    assert [jump[0] for jump in seen] == 2 * times(100)[::-1]            # by default, too
    assert times(10) == [7, 31, 71, 127, 199, 287, 391, 511, 647, 799]   # 0.8 T (1/10)^2 = 8
    assert times(1000)[:3] == [0, 1, 2] and times(3, "linear") == [333, 666, 999]


def test_wrong_settings_are_named():
    diffusion, shape, times = Diffusion(8), (1, 1, 4, 4), Diffusion(8).ddim_times
    for word, call, *settings in (("8", times, 0), ("8", times, 9),
            ("eta", diffusion.ddim_sample, None, shape, None, 5, 1.5),
            (r"14.*\[32, 16, 8, 4\]", UNet, (1, 28, 28), 8, (1, 2, 2, 2), 2, (14,)),
            ("side 7", UNet, (1, 7, 7), 8, (1, 2), 2, ()), ("9 channels", UNet, (1, 8, 8), 9),
            ("signal", PathEncoder, (2, 1, 1), 3, 8, "root")):
        with pytest.raises(ValueError, match=word):
            call(*settings)


def test_time_features_are_sinusoids_and_y_is_added_to_their_embedding():
    features = time_features(torch.arange(1000), 16)
    angles = torch.arange(1000)[:, None] * 10000 ** (-torch.arange(8, dtype=torch.float64) / 8)
    assert torch.allclose(features.double(), torch.cat([angles.cos(), angles.sin()], 1), atol=1e-3)
    unet = randomised(UNet((1, 8, 8), 8, (1, 2), 1, (), extra=1))
    t, (x, image) = torch.tensor([500, 900]), torch.randn(2, 2, 1, 8, 8)
    y = unet.time(time_features(t - 1, 8)) - unet.time(time_features(t, 8))
    v = unet(torch.cat([x, image], 1), t - 1)
    eps = eps_net(Diffusion(), unet, image)(x, t, y)
    assert torch.allclose(eps, Diffusion().eps_from_v(x, v, t), atol=1e-5)


def test_a_residual_block_scales_and_shifts_after_its_second_norm():
    x, emb = torch.randn(2, 64, 3, 4), torch.randn(2, 6)
    assert torch.equal(ResBlock(64, 64, 6, 0.5, attend=True)(x, emb), x)     # identity at first
    block = randomised(ResBlock(64, 128, 6, 0.5, attend=True))
    scale, shift = block.scale_shift[1](F.silu(emb)).view(2, 2, 128, 1, 1).unbind(1)
    h = block.norm2(block.conv1(F.silu(block.norm1(x))))
    h = block.skip(x) + block.conv2(F.silu(h + h * scale + shift))
    layer = block.attention                                              # over positions
    normed = F.group_norm(h, 16, layer.norm.weight, layer.norm.bias)     # 8 channels a group
    q, k, v = layer.qkv(normed).view(2, 3, 2, 64, 12).unbind(1)          # two heads
    weights = (q.transpose(2, 3) @ k / 8).softmax(-1)                    # (2, 2, from, to)
    h = h + layer.out((v @ weights.transpose(2, 3)).view(h.shape))
    assert torch.allclose(block(x, emb), h, rtol=1e-3, atol=1e-2)
    assert not torch.allclose(block.train()(x, emb), h, rtol=0.1, atol=1)    # dropout
    assert [GroupNorm(c).num_groups for c in (4, 8, 64, 512)] == [1, 1, 8, 32]


def test_the_unet_starts_at_v_0_attends_where_asked_and_pairs_its_skip_connections():
    unet, x = UNet((3, 28, 28), attention=(16, 8), dropout=0.2), torch.randn(2, 3, 28, 28)
    sides, down, up = [], [], []
    for layer in unet.modules():
        if isinstance(layer, Attention):
            layer.register_forward_hook(lambda layer, inputs, out: sides.append(out.shape[-1]))
        assert not isinstance(layer, torch.nn.Dropout) or layer.p == 0.2
    v = unet(x, torch.tensor([3, 900]))
    assert not v.any() and v.shape == x.shape and sides == [16, 16, 8, 8, 4, 8, 8, 8, 16, 16, 16]
    default = UNet((1, 28, 28))                                          # 5 blocks attend
    assert sum(p.numel() for p in default.parameters()) == 9_144_833 + 5 * 66_304
    assert default.middle[0].dropout.p == 0.3 and randomised(unet)
    for layer in unet.down:
        layer.register_forward_hook(lambda layer, inputs, out: down.append((inputs[0], out)))
    for block in [layer for layer in unet.up if isinstance(layer, ResBlock)]:
        block.register_forward_hook(lambda block, inputs, out: up.append(inputs[0]))
    unet.last.register_forward_hook(lambda layer, inputs, out: down[0][0])   # the padded image
    assert torch.equal(unet(x, torch.ones(2)), x) and torch.equal(down[0][0], F.pad(x, [2] * 4))
    for h, (_, skip) in zip(up, down[::-1], strict=True):
        assert h.shape[1] > skip.shape[1] and torch.equal(h[:, -skip.shape[1]:], skip)


@pytest.mark.parametrize("able, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_a_step_does_not_wait_for_the_device_and_runs_in_bfloat16(able, dtype, monkeypatch):
    class Watch(TorchDispatchMode):          # no .item(), no bool(), no tensor made of a number
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function.overloadpacket.__name__ not in ("_local_scalar_dense", "lift_fresh")
            return function(*args, **(kwargs or {}))
    unet, nodes, norms = UNet((1, 8, 8), 8, (1, 2), 1, ()), torch.tensor([[0, 1], [0, -1]]), []
    encoder, net = PathEncoder((2, 1, 1), 2, unet.emb_dim), eps_net(Diffusion(), unet)
    monkeypatch.setattr(F, "group_norm", lambda x, *how, real=F.group_norm: norms.append(
        (x.dtype, torch.is_autocast_enabled("cpu"))) or real(x, *how))   # CUDA's: float32
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: able)
    with Watch(), autocast(torch.device("cpu")):
        y = encoder(torch.zeros(2, 2, 2, 1, 1), nodes)
        loss = Diffusion().loss(net, torch.zeros(2, 1, 8, 8), y)
        loss.backward()
    assert set(norms) == {(dtype, False)} and loss.dtype == torch.float32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **how: able or any(how.values()))
    monkeypatch.setattr(torch, "autocast", lambda *given, enabled: enabled)
    assert autocast(torch.device("cuda")) == able


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("signal", SIGNALS[:-1])
def test_y_is_the_sum_over_what_the_signal_names(signal, joint):         # section 3.2
    encoder, z = PathEncoder((2, 3, 3), 7, 16, signal, joint), torch.randn(3, 3, 2, 3, 3)
    nodes = torch.tensor([[0, 1, 4], [0, 2, 6], [0, 2, -1]])
    y, by_hand = encoder(z, nodes), torch.zeros(3, 16)
    chosen = nodes >= 0 if signal == "path" else nodes == torch.tensor([[4], [6], [2]])
    assert set(encoder.first) == {"z", "id"} - {dict(zip(SIGNALS, ["", "", "z", "id"]))[signal]}
    for row, depth in chosen.nonzero().tolist():
        inputs = dict(z=z[row, depth].flatten(), id=nodes[row, depth])
        hidden = [first(inputs[name]) for name, first in encoder.first.items()]
        parts = [sum(hidden)] if joint else hidden                      # f(z_i, i), or f_z and f_id
        by_hand[row] += sum(f(h) for f, h in zip(encoder.second, parts, strict=True))
    assert torch.allclose(y, by_hand, atol=1e-5) and by_hand.abs().max() > 0.1
