"""The diffusion model: a noise schedule, a U-Net that predicts the noise, the DDPM objective, DDPM and DDIM sampling.

This is stage 2 of TreeDiffusion: section 3.2 and Appendix B of the paper, equations (3)-(6) and (22)-(30).

Forward, an image x_0 is drowned in Gaussian noise over T small steps; the U-Net learns to predict the noise in x_t; backward,
starting from pure noise, what it predicts is taken out step by step. The conditioning vector y, made of a tree path by
`path_encoder.PathEncoder`, is added to the U-Net's embedding of the time: it tells the net which cluster to draw.

In: images (B, C, H, W) in [-1, 1], y (B, emb) or None. Out: the same kind of images.
Times: t is a (B,) long tensor in 0..T-1. The paper counts 1..T, so its beta_t, alpha_t, abar_t are our `beta[t - 1]`,
`alpha[t - 1]`, `abar[t - 1]`; abar before the first step is 1 in both.

Read `Diffusion` first (each method is an equation or two), then `UNet` from its forward pass.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class Diffusion(nn.Module):
    """The noise schedule and everything that follows from it. It has no parameters; `.to(device)` moves its tables.

    The tables are (T, 1, 1, 1), so that abar[t] is (B, 1, 1, 1) and multiplies images. A net is called net(x_t, t, y) and returns its
    estimate of eps, with the shape of x_t.
    """

    def __init__(self, timesteps=1000, beta_start=1e-4, beta_end=0.02):
        super().__init__()
        beta = torch.linspace(beta_start, beta_end, timesteps, dtype=torch.float64)
        abar = torch.cumprod(1 - beta, 0)                          # eq. (5): abar_t = prod_{s <= t} alpha_s
        abar_prev = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
        self.timesteps = timesteps
        tables = dict(beta=beta, alpha=1 - beta, abar=abar, abar_prev=abar_prev,
                      # 1 - abar_t loses its digits in float32 when abar_t is near 1: take it in float64 here
                      one_minus_abar=1 - abar, one_minus_abar_prev=1 - abar_prev)
        for name, table in tables.items():
            self.register_buffer(name, table.float().view(-1, 1, 1, 1), persistent=False)

    # -- the forward process ------------------------------------------------------------------------------------------

    def add_noise(self, x0, t, eps):
        """A sample of q(x_t | x_0), eqs. (5) and (24): in one go, what the chain of eqs. (3), (4), (22), (23) does in the
        paper's t steps of x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) noise.
        """
        return self.abar[t].sqrt() * x0 + self.one_minus_abar[t].sqrt() * eps

    def posterior(self, x0, xt, t):
        """q(x_{t-1} | x_t, x_0) -> mean (B, C, H, W), variance (B, 1, 1, 1): eqs. (25), (26)."""
        beta, one_minus_abar, one_minus_abar_prev = self.beta[t], self.one_minus_abar[t], self.one_minus_abar_prev[t]
        mean = (self.abar_prev[t].sqrt() * beta / one_minus_abar * x0
                + self.alpha[t].sqrt() * one_minus_abar_prev / one_minus_abar * xt)
        return mean, one_minus_abar_prev / one_minus_abar * beta

    # -- training -----------------------------------------------------------------------------------------------------

    def loss(self, net, x0, y=None, t=None, eps=None):
        """L_simple, eq. (30), averaged over the pixels; one random t and one random eps for each image, unless given: a scalar.

        Put x_0 of eq. (5) into eq. (26): mu~ = (x_t - beta_t / sqrt(1 - abar_t) eps) / sqrt(alpha_t), so that in eq. (29)
        |mu~ - mu_psi|^2 = beta_t^2 / (alpha_t (1 - abar_t)) |eps - eps_psi|^2. Eq. (30) leaves that factor and 1 / (2 sigma_t^2)
        out: the best prediction at each t stays the same, only the times are weighted differently, for better samples (Ho et al. 2020).
        """
        t = torch.randint(self.timesteps, (len(x0),), device=x0.device) if t is None else t
        eps = torch.randn_like(x0) if eps is None else eps
        return F.mse_loss(net(self.add_noise(x0, t, eps), t, y).float(), eps)

    # -- sampling -----------------------------------------------------------------------------------------------------

    def predict(self, net, xt, t, y, clip):
        """The net's guess of the image, x0^ = (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t), and the eps that goes with it.

        Images live in [-1, 1], so x0^ is clipped to it; eps is then computed anew, so that x_t = sqrt(abar_t) x0^ +
        sqrt(1 - abar_t) eps still holds. DDIM uses both, DDPM only x0^.
        """
        eps = net(xt, t, y).float()
        signal, noise = self.abar[t].sqrt(), self.one_minus_abar[t].sqrt()
        x0 = (xt - noise * eps) / signal                           # eq. (5) solved for x_0
        if clip:
            x0 = x0.clamp(-1, 1)
            eps = (xt - signal * x0) / noise
        return x0, eps

    @torch.no_grad()
    def ddpm_sample(self, net, shape, y=None, x_T=None, variance="posterior", clip=True):
        """Ancestral sampling, eqs. (6), (27), (28): T steps from noise to images of the given shape (B, C, H, W).

        The mean is mu~ of eq. (26) with x0^ for x_0; where x0^ is not clipped that is exactly mu_psi of eq. (28). sigma_t^2:
        "posterior" is beta~_t, "beta" is beta_t. x_T: the noise to start from, drawn if None. ValueError for another variance.
        """
        if variance not in ("posterior", "beta"):
            raise ValueError(f"variance must be 'posterior' or 'beta', not {variance!r}")
        x = torch.randn(shape, device=self.beta.device) if x_T is None else x_T
        for step in reversed(range(self.timesteps)):
            t = torch.full((len(x),), step, device=x.device)
            x0, _ = self.predict(net, x, t, y, clip)
            mean, var = self.posterior(x0, x, t)
            var = self.beta[t] if variance == "beta" else var
            x = mean + var.sqrt() * torch.randn_like(x) if step > 0 else mean   # abar_prev = 1: the last mean is x0^ itself
        return x

    def ddim_times(self, steps, spacing="quadratic"):
        """The increasing subsequence tau of times that DDIM visits, as our t in 0..T-1.

        "linear": tau_i = i T / S; "quadratic": tau_i = 0.8 T (i / S)^2, denser where the image is nearly clean; i = 1..S.
        Song et al., appendix D.2. Times are rounded up, and duplicates among small ones dropped. The quadratic one starts
        at 0.8 T, where for T = 1000 sqrt(abar) = 0.04 is left of the image: pure noise may stand for x_t. ValueError outside 1..T
        steps, or for another spacing.
        """
        if not 1 <= steps <= self.timesteps or spacing not in ("linear", "quadratic"):
            raise ValueError(f"steps must be in 1..{self.timesteps} and spacing linear or quadratic, not {steps}, {spacing!r}")
        i = torch.arange(1, steps + 1, dtype=torch.float64) / steps
        tau = self.timesteps * (i if spacing == "linear" else 0.8 * i ** 2)
        return (tau - 1e-6).ceil().long().clamp(min=1).unique().sub(1).tolist()    # 8.000000001 is 8

    @torch.no_grad()
    def ddim_sample(self, net, shape, y=None, steps=100, eta=0.0, spacing="quadratic", x_T=None, clip=True, seen=None):
        """DDIM (Song et al. 2020): `steps` jumps, fewer where times coincide, from noise to images of the given shape (B, C, H, W).

        eta = 0: no noise on the way, the image is a function of x_T; eta = 1, linear, T steps: DDPM with variance "posterior".
        The net is asked at the time t it jumps from, not at the jump's number. seen: a list to which each jump adds (t, x_t, x0^).
        """
        x = torch.randn(shape, device=self.beta.device) if x_T is None else x_T
        times = self.ddim_times(steps, spacing)[::-1]
        for time, prev in zip(times, times[1:] + [None]):
            t = torch.full((len(x),), time, device=x.device)
            x0, eps = self.predict(net, x, t, y, clip)
            if seen is not None:
                seen.append((time, x, x0))
            if prev is None:                                       # the last jump lands on abar = 1: the image itself
                return x0
            mean, s = self.ddim_jump(x0, eps, time, prev, eta)
            x = mean + s * torch.randn_like(x) if eta > 0 else mean

    def ddim_jump(self, x0, eps, time, prev, eta):
        """One DDIM jump from `time` to `prev`: the mean (B, C, H, W) and standard deviation s of x_prev.

        x_prev = sqrt(abar_prev) x0^ + sqrt(1 - abar_prev - s^2) eps + s noise, Song et al.'s eq. (12), and by their eq. (16) s = eta
        sqrt((1 - abar_prev) / (1 - abar_t)) sqrt(1 - abar_t / abar_prev); their alpha is our abar. For neighbouring times and
        eta = 1, s^2 is beta~_t.
        """
        s = eta * (self.one_minus_abar[prev] / self.one_minus_abar[time] * (1 - self.abar[time] / self.abar[prev])).sqrt()
        return self.abar[prev].sqrt() * x0 + (self.one_minus_abar[prev] - s ** 2).clamp(min=0).sqrt() * eps, s


def guided(net, weight):
    """Classifier-free guidance (Ho and Salimans 2022): a net that returns (1 + w) eps(x_t, t, y) - w eps(x_t, t, no y).

    "No y" is y = 0. It exaggerates what y does, and needs a net that was trained with the y of some images set to 0 (--drop-condition; not
    in `loss`). Weight 0: the net itself.
    """
    def steered(x, t, y):
        with_y, without = net(x.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([y, torch.zeros_like(y)])).float().chunk(2)
        return (1 + weight) * with_y - weight * without
    return steered if weight else net


def beside(net, image):
    """A net that also sees an image (B, C, H, W) in [-1, 1], the tree's reconstruction (section 4.1): a UNet with extra = C.

    x may hold several copies of the batch, as in guided(beside(net, image), w).
    """
    return lambda x, t, y: net(torch.cat([x, image.repeat(len(x) // len(image), 1, 1, 1)], 1), t, y)


# == The U-Net eps_psi(x_t, t, y) =====================================================================================

def time_features(t, dim):
    """Sines and cosines of t at dim / 2 frequencies from 1 down to nearly 1/10000: (B,) -> (B, dim)."""
    freqs = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t[:, None].float() * freqs
    return torch.cat([angles.cos(), angles.sin()], 1)


def zero(module):
    """Zero-initialise: residual branches and the U-Net's h start at 0."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def norm(c):
    """Group norm with at least 8 channels a group (at most 32 groups), so that a group's channels keep their relative sizes.

    One channel a group would be instance norm, which forgets how bright the image and how strong the noise is: with it, samples
    of small U-Nets came out on grey backgrounds and with noise left in them.
    """
    return nn.GroupNorm(math.gcd(32, c, max(1, c // 8)), c)


class ResBlock(nn.Module):
    """x + conv(conv(x)), with the embedding of time and path as scale and shift after the second norm."""

    def __init__(self, c_in, c_out, emb_dim, dropout):
        super().__init__()
        self.conv1 = nn.Sequential(norm(c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1))
        self.scale_shift = nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, 2 * c_out))
        self.norm2 = norm(c_out)
        self.conv2 = nn.Sequential(nn.SiLU(), nn.Dropout(dropout), zero(nn.Conv2d(c_out, c_out, 3, padding=1)))
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x, emb):
        scale, shift = self.scale_shift(emb)[:, :, None, None].chunk(2, 1)           # emb: (B, emb_dim)
        return self.skip(x) + self.conv2(self.norm2(self.conv1(x)) * (1 + scale) + shift)


class Attention(nn.Module):
    """Self-attention over the positions of a feature map, added to its input; heads of 64 channels where those divide."""

    def __init__(self, c):
        super().__init__()
        self.heads = c // math.gcd(c, 64)
        self.norm, self.qkv, self.out = norm(c), nn.Conv2d(c, 3 * c, 1), zero(nn.Conv2d(c, c, 1))

    def forward(self, x):
        B, C, H, W = x.shape
        q, k, v = self.qkv(self.norm(x)).view(B, 3, self.heads, C // self.heads, H * W).transpose(3, 4).unbind(1)
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(B, C, H, W))


class UNet(nn.Module):
    """eps_psi(x_t, t, y): (B, C, H, W), (B,), (B, emb_dim) or None -> (B, C, H, W).

    One scale for each multiplier, half the side each time; `blocks` residual blocks a scale; self-attention where the
    feature map's side is in `attention`, and in the middle. Square images, whose side, if it does not halve that often, is
    zero-padded (28 -> 32 for four scales) and cut back. extra: further channels of the input, after those of x_t, see `beside`.

    Beyond the paper, the layers give h, and eps_psi = sqrt(1 - abar_t) x_t + sqrt(abar_t) h. The best h is v = sqrt(abar_t) eps -
    sqrt(1 - abar_t) x_0 (Salimans and Ho 2022), and x0^ = sqrt(abar_t) x_t - sqrt(1 - abar_t) h: an error of h does not grow in x0^.
    That of a net which gives eps directly grows by sqrt((1 - abar_t) / abar_t), 25 where DDIM begins, and small nets left it as noise in the
    black. In h, eq. (30) is abar_t |v - h|^2. timesteps: T, of the schedule with the default betas.
    """

    def __init__(self, image_shape, channels=64, multipliers=(1, 2, 2, 2), blocks=2, attention=(16,), dropout=0.3, extra=0, timesteps=1000):
        super().__init__()
        self.schedule = Diffusion(timesteps)
        c_image, side, _ = image_shape
        step = 2 ** (len(multipliers) - 1)
        if -side % step % 2:
            raise ValueError(f"an image of side {side} cannot be padded evenly for {len(multipliers)} scales; use an even side")
        self.pad = (-side % step) // 2
        side += 2 * self.pad
        self.channels, self.emb_dim = channels, 4 * channels
        self.time = nn.Sequential(nn.Linear(channels, self.emb_dim), nn.SiLU(), nn.Linear(self.emb_dim, self.emb_dim))
        self.first = nn.Conv2d(c_image + extra, channels, 3, padding=1)

        def stage(c_in, c_out, side):
            layers = [ResBlock(c_in, c_out, self.emb_dim, dropout)]
            return nn.ModuleList(layers + [Attention(c_out)] * (side in attention))

        c, skips = channels, [channels]
        self.down = nn.ModuleList()
        for k, m in enumerate(multipliers):
            for _ in range(blocks):
                self.down.append(stage(c, m * channels, side))
                c = m * channels
                skips.append(c)
            if k < len(multipliers) - 1:
                self.down.append(nn.ModuleList([nn.Conv2d(c, c, 3, stride=2, padding=1)]))
                skips.append(c)
                side //= 2
        self.middle = nn.ModuleList([ResBlock(c, c, self.emb_dim, dropout), Attention(c), ResBlock(c, c, self.emb_dim, dropout)])
        self.up = nn.ModuleList()
        for k, m in reversed(list(enumerate(multipliers))):
            for b in range(blocks + 1):
                self.up.append(stage(c + skips.pop(), m * channels, side))
                c = m * channels
                if b == blocks and k > 0:
                    self.up[-1].extend([nn.Upsample(scale_factor=2), nn.Conv2d(c, c, 3, padding=1)])
                    side *= 2
        self.last = nn.Sequential(norm(c), nn.SiLU(), zero(nn.Conv2d(c, c_image, 3, padding=1)))

    def forward(self, x, t, y=None):
        emb = self.time(time_features(t, self.channels))               # (B, emb_dim)
        if y is not None:
            emb = emb + y                                              # section 3.2: the path joins the time
        h = self.first(F.pad(x, [self.pad] * 4))
        skips = [h]
        for layers in self.down:
            h = run(layers, h, emb)
            skips.append(h)
        h = run(self.middle, h, emb)
        for layers in self.up:
            h = run(layers, torch.cat([h, skips.pop()], 1), emb)
        h = F.pad(self.last(h).float(), [-self.pad] * 4)               # cut back
        return self.schedule.add_noise(h, t, x[:, :h.shape[1]])        # sqrt(abar) h + sqrt(1 - abar) x_t, without extra channels


def run(layers, h, emb):
    """Apply layers in turn; residual blocks also take the embedding."""
    for layer in layers:
        h = layer(h, emb) if isinstance(layer, ResBlock) else layer(h)
    return h


if __name__ == "__main__":
    torch.manual_seed(0)
    diffusion, images = Diffusion(), torch.stack([torch.eye(8), torch.eye(8).flip(0)])[:, None] * 1.8 - 0.9
    print("Forward, eq. (5): what is left of the image and how much noise there is at the paper's t = 1, 250, 500, 750, 1000:")
    for t in (0, 249, 499, 749, 999):
        print(f"  t {t + 1:4d}: sqrt(abar) {math.sqrt(diffusion.abar[t]):.3f}, sqrt(1 - abar) {math.sqrt(diffusion.one_minus_abar[t]):.3f}")
    net = UNet((1, 8, 8), channels=16, multipliers=(1, 2), blocks=1, attention=(), dropout=0.0)
    y_of = nn.Embedding(2, net.emb_dim)                            # stands for the path encoder: one y for each of two images
    x0, t, eps = images, torch.tensor([100, 700]), torch.randn_like(images)
    xt = diffusion.add_noise(x0, t, eps)
    mean, var = diffusion.posterior(x0, xt, t)
    print(f"\nShapes: x_t {tuple(xt.shape)}, t {tuple(t.shape)}, y {tuple(y_of(torch.tensor([0, 1])).shape)} -> eps {tuple(net(xt, t).shape)};"
          f"\n  q(x_t-1 | x_t, x_0), eq. (26): mean {tuple(mean.shape)}, beta~ {[f'{v:.4f}' for v in var.flatten().tolist()]}")
    print(f"\nTraining, eq. (30), {sum(p.numel() for p in net.parameters())} parameters, two 8 x 8 images, a diagonal and its mirror image:")
    optimizer = torch.optim.Adam([*net.parameters(), *y_of.parameters()], lr=2e-3)
    for step in range(301):
        kind = torch.randint(2, (32,))
        loss = diffusion.loss(net, images[kind], y_of(kind))
        if step % 100 == 0:
            print(f"  step {step:3d}: L_simple {loss.item():.3f}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.eval().requires_grad_(False)
    print(f"\nSampling from noise with DDIM at t = {diffusion.ddim_times(8)[::-1]} (8 of 1000 steps), asking by y for one image, then the other:")
    drawn = diffusion.ddim_sample(net, (2, 1, 8, 8), y_of(torch.tensor([0, 1])).detach(), steps=8)
    for row in range(8):
        print("  " + "    ".join("".join("#" if pixel > 0 else "." for pixel in image[0, row]) for image in drawn))
