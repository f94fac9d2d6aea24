"""The diffusion model: noise schedule, DDPM objective, DDPM and DDIM sampling, U-Net.

Stage 2 of TreeDiffusion: section 3.2, Appendix B. Forward, an image x_0 becomes Gaussian noise in T
small steps. The net eps_psi(x_t, t, y) learns to predict the noise in x_t (its U-Net gives v, from
which eps follows: `eps_net`); sampling starts from pure noise and removes a little at each step.
y, from `path_encoder`, conditions the image on a path of the tree, eq. (6).

Images are (B, C, H, W) in [-1, 1], y is (B, emb_dim) or None, t is (B,) long in 0..T-1. The paper
counts t from 1: abar[t] is its abar_{t+1}, and its abar_0 = 1. Comments write abar_t for abar[t].
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class Diffusion(nn.Module):
    """The noise schedule and what follows from it. `net` is eps_psi: net(xt, t, y) -> eps."""
    def __init__(self, timesteps=1000, beta_start=1e-4, beta_end=0.02):
        super().__init__()
        self.timesteps = timesteps
        beta = torch.linspace(beta_start, beta_end, timesteps, dtype=torch.float64)
        alpha = 1 - beta
        abar = torch.cumprod(alpha, 0)  # eq. (5): prod_{s <= t} alpha_s
        abar_prev = F.pad(abar[:-1], (1, 0), value=1.0)
        tables = dict(beta=beta, alpha=alpha, abar=abar, abar_prev=abar_prev)
        tables["one_minus_abar"] = 1 - abar  # in float64: float32 has few digits near abar = 1
        tables["one_minus_abar_prev"] = 1 - abar_prev
        tables["beta_tilde"] = (1 - abar_prev) / (1 - abar) * beta  # eq. (26), 0 at the first t
        for name, table in tables.items():  # (T, 1, 1, 1), so that abar[t] scales images
            self.register_buffer(name, table.float().view(-1, 1, 1, 1))

    # -- identities: any two of x_0, x_t, eps and v give the others --
    def add_noise(self, x0, t, eps):
        """x_t ~ q(x_t | x_0), eqs. (5), (24): all steps of eqs. (3), (4), (22), (23) at once."""
        return self.abar[t].sqrt() * x0 + self.one_minus_abar[t].sqrt() * eps  # eps ~ N(0, I)

    def predict_x0(self, xt, eps, t):
        """x0^: eq. (5) solved for x_0."""
        return (xt - self.one_minus_abar[t].sqrt() * eps) / self.abar[t].sqrt()

    def predict_eps(self, xt, x0, t):
        """Eq. (5) solved for eps."""
        return (xt - self.abar[t].sqrt() * x0) / self.one_minus_abar[t].sqrt()

    def eps_from_v(self, xt, v, t):
        """eps from v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0 (Salimans and Ho 2022)."""
        return self.one_minus_abar[t].sqrt() * xt + self.abar[t].sqrt() * v

    def posterior(self, x0, xt, t):
        """q(x_{t-1} | x_t, x_0), eq. (25): its mean mu~ and variance beta~."""
        of_x0 = self.abar_prev[t].sqrt() * self.beta[t] / self.one_minus_abar[t]
        of_xt = self.alpha[t].sqrt() * self.one_minus_abar_prev[t] / self.one_minus_abar[t]
        return of_x0 * x0 + of_xt * xt, self.beta_tilde[t]  # eq. (26)

    def mu_psi(self, xt, eps, t):
        """The mean of p(x_{t-1} | x_t), eq. (28): eq. (26) with x0^ for x_0."""
        return (xt - self.beta[t] / self.one_minus_abar[t].sqrt() * eps) / self.alpha[t].sqrt()

    def loss(self, net, x0, y=None, t=None, eps=None, of="eps"):
        """L_simple, eq. (30), as a mean over pixels. t, eps: drawn if None. of="v": see below."""
        t = torch.randint(self.timesteps, (len(x0),), device=x0.device) if t is None else t
        eps = torch.randn_like(x0) if eps is None else eps
        # By (5), (28): mu~ - mu_psi = beta_t / sqrt(alpha_t (1 - abar_t)) (eps_psi - eps).
        # Its square / (2 sigma_t^2) is eq. (29); without it samples are better (Ho et al. 2020).
        error = (net(self.add_noise(x0, t, eps), t, y) - eps) ** 2
        if of == "v":
            # Not in the paper: |v - v_psi|^2, since eps's error is sqrt(abar_t) times v's. Large t
            # count for more: there the image is all noise, and y alone says what to draw
            error = error / self.abar[t]
        return error.mean()

    # -- sampling --
    @torch.no_grad()
    def ddpm_sample(self, net, shape, y=None, x_T=None, variance="posterior", clip=True):
        """The chain of eqs. (6), (27), from noise x_T (drawn if None).
        variance: that of eq. (28), "posterior" (beta~_t) or "beta" (beta_t).
        """
        sigma2 = dict(posterior=self.beta_tilde, beta=self.beta)[variance]
        x = torch.randn(shape, device=self.beta.device) if x_T is None else x_T
        for step in reversed(range(self.timesteps)):
            t = torch.full((len(x),), step, device=x.device)
            eps = net(x, t, y)
            mean = self.mu_psi(x, eps, t)  # eq. (28)
            if clip:  # x0^ to images' range, then eq. (26)
                x0 = self.predict_x0(x, eps, t).clamp(-1, 1)
                mean, _ = self.posterior(x0, x, t)
            if step == 0:
                return mean  # without noise
            x = mean + sigma2[t].sqrt() * torch.randn_like(x)  # x_{t-1}

    def ddim_times(self, steps, spacing="quadratic"):
        """The t that DDIM visits, increasing. ValueError for steps not in 1..T.
        tau_i, i = 1..S: "linear" i T / S, "quadratic" 0.8 T (i / S)^2 (Song et al., D.2).
        """
        if not 1 <= steps <= self.timesteps:
            raise ValueError(f"steps must be in 1..{self.timesteps}, not {steps}")
        share = torch.arange(1, steps + 1, dtype=torch.float64) / steps  # i / S
        # Quadratic: denser where the image is nearly clean; from 0.8 T, where sqrt(abar) is 0.04
        tau = self.timesteps * dict(linear=share, quadratic=0.8 * share**2)[spacing]
        tau = (tau - 1e-6).ceil().long()  # whole numbers; 1e-6: float error
        return (tau.unique() - 1).tolist()  # our t, from 0; small ones may coincide

    @torch.no_grad()
    def ddim_sample(self, net, shape, y=None, steps=100, eta=0.0, spacing="quadratic",
                    x_T=None, clip=True, seen=None):
        """DDIM (Song et al. 2020): at most `steps` jumps from noise x_T to images.
        eta in 0..1, else ValueError: 0 adds no noise; 1, linear with T steps, is `ddpm_sample`.
        seen: a list, each jump appends (t, x_t, x0^).
        """
        if not 0 <= eta <= 1:  # above 1, s^2 may exceed 1 - abar_prev
            raise ValueError(f"eta must be in 0..1, not {eta}")
        times = self.ddim_times(steps, spacing)
        x = torch.randn(shape, device=self.beta.device) if x_T is None else x_T
        for i in reversed(range(len(times))):
            t = torch.full((len(x),), times[i], device=x.device)  # as in training: not i
            eps = net(x, t, y)
            x0 = self.predict_x0(x, eps, t)
            if clip:
                x0 = x0.clamp(-1, 1)  # range of images
                eps = self.predict_eps(x, x0, t)  # so that eq. (5) still holds
            if seen is not None:
                seen.append((times[i], x, x0))
            if i == 0:
                return x0  # abar_prev = 1
            prev = times[i - 1]
            abar, abar_prev = self.abar[t], self.abar[prev]  # their alpha is our abar
            var, var_prev = self.one_minus_abar[t], self.one_minus_abar[prev]  # 1 - abar
            s = eta * (var_prev / var).sqrt() * (1 - abar / abar_prev).sqrt()  # their eq. (16)
            x = abar_prev.sqrt() * x0 + (var_prev - s**2).sqrt() * eps  # their eq. (12)
            if eta > 0:
                x = x + s * torch.randn_like(x)  # the noise term of (12)


def eps_net(diffusion, unet, image=None):
    """eps_psi from a U-Net that predicts v. image: the leaf's reconstruction, or None."""
    # Why v: x0^ = sqrt(abar_t) x_t - sqrt(1 - abar_t) v, so an error in v does not grow in x0^. An
    # error in eps grows by sqrt((1 - abar_t) / abar_t), 25 at DDIM's first step: speckle
    def net(xt, t, y):
        x = xt if image is None else torch.cat([xt, image], 1)  # as in DiffuseVAE
        return diffusion.eps_from_v(xt, unet(x, t, y), t)  # float32, even if v is bfloat16
    return net


def autocast(device):
    """bfloat16 arithmetic where the device computes with it, else nothing."""
    able = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    if device.type == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=able)


@torch.no_grad()
def update_average(average, net, step, decay):
    """One step of the moving average of a net's weights, with which images are drawn."""
    # 0.9999 from the first step on would keep the random weights for some 50,000 steps
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1 - decay)


# == The U-Net ==
def time_features(t, dim):
    """(B,) -> (B, dim): cosines and sines of t at dim / 2 frequencies from 1 to about 1/10000."""
    freqs = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t[:, None].float() * freqs
    return torch.cat([angles.cos(), angles.sin()], 1)


def zero(layer):
    """The layer, zero-initialised: a residual branch starts at 0."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class GroupNorm(nn.GroupNorm):
    """Group norm, computed in its input's dtype."""
    def __init__(self, c):
        # At most 32 groups of 8 or more channels: with 1 (instance norm) the net forgets brightness
        super().__init__(math.gcd(32, c, max(1, c // 8)), c)

    def forward(self, x):
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):  # else float32, twice the memory traffic
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)


class Attention(nn.Module):
    """Residual self-attention over positions; heads of 64 channels."""
    def __init__(self, c):
        super().__init__()
        self.heads = c // math.gcd(c, 64)  # smaller if 64 does not divide c
        self.norm = GroupNorm(c)
        self.qkv = nn.Conv2d(c, 3 * c, 1)
        self.out = zero(nn.Conv2d(c, c, 1))

    def forward(self, x):
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).view(B, 3, self.heads, -1, H * W)
        q, k, v = qkv.transpose(3, 4).unbind(1)  # each (B, heads, H W, C / heads)
        h = F.scaled_dot_product_attention(q, k, v)  # softmax(q k^T / sqrt(d)) v
        return x + self.out(h.transpose(2, 3).reshape(B, C, H, W))


class ResBlock(nn.Module):
    """A residual block, conditioned on time and path, then attention, if any."""
    def __init__(self, c_in, c_out, emb_dim, dropout, attend):
        super().__init__()
        self.norm1 = GroupNorm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.scale_shift = nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, 2 * c_out))
        self.norm2 = GroupNorm(c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)
        self.attention = Attention(c_out) if attend else nn.Identity()

    def forward(self, x, emb):
        scale, shift = self.scale_shift(emb)[:, :, None, None].chunk(2, 1)  # (B, c_out, 1, 1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.norm2(h) * (1 + scale) + shift  # time and path come in
        h = self.conv2(self.dropout(F.silu(h)))  # 0 before training
        return self.attention(self.skip(x) + h)


class UNet(nn.Module):
    """v_psi(x_t, t, y): (B, C + extra, H, W), (B,), (B, emb_dim) or None -> v (B, C, H, W).
    Each multiplier is a scale of `blocks` residual blocks, at half the side each time. Attention
    is in the middle and at the sides in `attention`. extra: channels after those of x_t.
    ValueError for a side or channels that do not fit.
    """
    def __init__(self, image_shape, channels=64, multipliers=(1, 2, 2, 2), blocks=2,
                 attention=(16,), dropout=0.3, extra=0):
        super().__init__()
        c_image, side, _ = image_shape  # square
        # Zeros around make the side a multiple of 2^(scales - 1): 28 -> 32 for four scales
        pad = -side % 2 ** (len(multipliers) - 1)
        sides = [(side + pad) // 2**k for k in range(len(multipliers))]  # of feature maps
        if pad % 2 == 1:
            raise ValueError(f"side {side} is odd: it cannot halve")
        if channels % 2 == 1:
            raise ValueError(f"{channels} channels are odd: t has cosines and sines")
        if not set(attention) <= set(sides):
            raise ValueError(f"attention at {attention}, but feature maps of side {sides}")
        self.pad = pad // 2
        dim = 4 * channels
        self.channels, self.emb_dim = channels, dim
        self.time = nn.Sequential(nn.Linear(channels, dim), nn.SiLU(), nn.Linear(dim, dim))
        # Down: each output is also a skip connection
        self.down = nn.ModuleList([nn.Conv2d(c_image + extra, channels, 3, padding=1)])
        c, skips = channels, [channels]  # channels, now and of each skip
        for m, side in zip(multipliers, sides):
            if side < sides[0]:
                self.down.append(nn.Conv2d(c, c, 3, stride=2, padding=1))  # half the side
                skips.append(c)
            for _ in range(blocks):
                c_in, c = c, m * channels
                self.down.append(ResBlock(c_in, c, dim, dropout, side in attention))
                skips.append(c)
        self.middle = nn.ModuleList(
            ResBlock(c, c, dim, dropout, attend) for attend in (True, False))
        # Up: each block takes a skip connection, the latest first
        self.up = nn.ModuleList()
        for k in reversed(range(len(sides))):
            for _ in range(blocks + 1):  # + 1: the skip of the scale's convolution
                c_in, c = c + skips.pop(), multipliers[k] * channels
                self.up.append(ResBlock(c_in, c, dim, dropout, sides[k] in attention))
            if k > 0:  # twice the side; the channels of the next scale
                c_in, c = c, multipliers[k - 1] * channels
                conv = nn.Conv2d(c_in, c, 3, padding=1)
                self.up.append(nn.Sequential(nn.Upsample(scale_factor=2), conv))
        conv = zero(nn.Conv2d(c, c_image, 3, padding=1))  # v is 0 before training
        self.last = nn.Sequential(GroupNorm(c), nn.SiLU(), conv)

    def forward(self, x, t, y=None):
        emb = self.time(time_features(t, self.channels))  # (B, emb_dim)
        if y is not None:
            emb = emb + y  # section 3.2
        h = F.pad(x, [self.pad] * 4)  # 28 -> 32
        skips = []
        for layer in self.down:
            h = layer(h, emb) if isinstance(layer, ResBlock) else layer(h)
            skips.append(h)
        for block in self.middle:
            h = block(h, emb)
        for layer in self.up:
            if isinstance(layer, ResBlock):
                h = layer(torch.cat([h, skips.pop()], 1), emb)
            else:
                h = layer(h)
        return F.pad(self.last(h), [-self.pad] * 4)  # cut back


if __name__ == "__main__":
    torch.manual_seed(0)
    diffusion = Diffusion()
    images = torch.stack([torch.eye(8), torch.eye(8).flip(0)])[:, None] * 1.8 - 0.9  # (2, 1, 8, 8)
    unet = UNet((1, 8, 8), channels=16, multipliers=(1, 2), blocks=1, attention=(), dropout=0.0)
    net = eps_net(diffusion, unet)
    table = nn.Embedding(2, unet.emb_dim)  # for the path encoder
    print(f"Training on images {tuple(images.shape)}: a diagonal, its mirror image")
    optimizer = torch.optim.Adam([*unet.parameters(), *table.parameters()], lr=2e-3)
    for step in range(201):
        kind = torch.randint(2, (32,))
        loss = diffusion.loss(net, images[kind], table(kind))
        if step % 50 == 0:
            print(f"  step {step:3d}: eq. (30) = {loss.item():.3f}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"DDIM at t = {diffusion.ddim_times(8)[::-1]}, y {tuple(table.weight.shape)}:")
    drawn = diffusion.ddim_sample(net, images.shape, table.weight, steps=8)
    for rows in drawn[:, 0].transpose(0, 1):  # (2, 8): a row of both images
        print("  " + "    ".join("".join(".#"[int(p > 0)] for p in row) for row in rows))
