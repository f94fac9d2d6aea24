"""The diffusion model: a noise schedule, the DDPM objective, DDPM and DDIM sampling, and a U-Net.

This is stage 2 of TreeDiffusion, section 3.2 and Appendix B of the paper. Forward, an image x_0 is
turned into Gaussian noise in T small steps. The net eps_psi(x_t, t, y) learns to predict the noise
in x_t; backward, from pure noise, a little of what it predicts is taken out at each step. The
vector y of `path_encoder.PathEncoder` is added to the U-Net's embedding of the time: this is what
conditions the image on a path of the tree, eq. (6).

Images are (B, C, H, W) in [-1, 1], y is (B, emb_dim) or None. t is (B,) long in 0..T-1: the paper
counts 1..T, so its abar_t is our abar[t - 1], beta_t our beta[t - 1]; its abar_0 is 1.
Read `Diffusion` first (each method is an equation or two), then `UNet` from its forward pass.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class Diffusion(nn.Module):
    """The noise schedule and all that follows from it. `net` is eps_psi: net(xt, t, y) -> eps.

    Nothing in it is trained. Tables are (T, 1, 1, 1), so that abar[t] (B, 1, 1, 1) scales images.
    """

    def __init__(self, timesteps=1000, beta_start=1e-4, beta_end=0.02):
        super().__init__()
        self.timesteps = timesteps
        beta = torch.linspace(beta_start, beta_end, timesteps, dtype=torch.float64)
        alpha = 1 - beta
        abar = torch.cumprod(alpha, 0)  # eq. (5): prod_{s <= t} alpha_s
        abar_prev = torch.cat([torch.ones_like(abar[:1]), abar[:-1]])
        tables = dict(beta=beta, alpha=alpha, abar=abar, abar_prev=abar_prev)
        tables["one_minus_abar"] = 1 - abar  # in float64: float32 has few digits near abar = 1
        tables["one_minus_abar_prev"] = 1 - abar_prev
        tables["beta_tilde"] = (1 - abar_prev) / (1 - abar) * beta  # eq. (26), 0 at the first t
        for name, table in tables.items():
            self.register_buffer(name, table.float().view(-1, 1, 1, 1), persistent=False)

    # -- identities: any two of x_0, x_t, eps and v give the others -----------------------------
    def add_noise(self, x0, t, eps):
        """A sample of q(x_t | x_0), eqs. (5), (24), in one step, with standard normal eps: the same
        distribution as t steps of eqs. (3), (4), (22), (23).
        """
        return self.abar[t].sqrt() * x0 + self.one_minus_abar[t].sqrt() * eps

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
        """q(x_{t-1} | x_t, x_0), eq. (25): mean mu~ (B, C, H, W), variance beta~ (B, 1, 1, 1)."""
        of_x0 = self.abar_prev[t].sqrt() * self.beta[t] / self.one_minus_abar[t]
        of_xt = self.alpha[t].sqrt() * self.one_minus_abar_prev[t] / self.one_minus_abar[t]
        return of_x0 * x0 + of_xt * xt, self.beta_tilde[t]  # eq. (26)

    def mu_psi(self, xt, eps, t):
        """The mean of p(x_{t-1} | x_t), eq. (28): eq. (26) with x0^ for x_0."""
        return (xt - self.beta[t] / self.one_minus_abar[t].sqrt() * eps) / self.alpha[t].sqrt()

    def loss(self, net, x0, y=None, t=None, eps=None):
        """L_simple, eq. (30), as a mean over pixels -> scalar. t (B,), eps: drawn if None."""
        t = torch.randint(self.timesteps, (len(x0),), device=x0.device) if t is None else t
        eps = torch.randn_like(x0) if eps is None else eps
        # With mu_psi of eq. (28) and x_0 from eq. (5), eq. (29) is a factor times the same square:
        # |mu~ - mu_psi|^2 = beta_t^2 / (alpha_t (1 - abar_t)) |eps - eps_psi|^2. Without the factor
        # the best eps_psi is the same and the samples are better (Ho et al. 2020).
        return F.mse_loss(net(self.add_noise(x0, t, eps), t, y), eps)  # eq. (30)

    # -- sampling ---------------------------------------------------------------------------------
    @torch.no_grad()
    def ddpm_sample(self, net, shape, y=None, x_T=None, variance="posterior", clip=True):
        """All T steps of eqs. (6), (27) from noise x_T (drawn if None) to images (B, C, H, W).

        sigma_t^2 of eq. (28): variance "posterior" is beta~_t, "beta" is beta_t; else ValueError.
        """
        if variance not in ("posterior", "beta"):
            raise ValueError(f"variance must be 'posterior' or 'beta', not {variance!r}")
        sigma2 = self.beta if variance == "beta" else self.beta_tilde
        x = torch.randn(shape, device=self.beta.device) if x_T is None else x_T
        for step in reversed(range(self.timesteps)):
            t = torch.full((len(x),), step, device=x.device)
            eps = net(x, t, y)
            mean = self.mu_psi(x, eps, t)  # eq. (28)
            if clip:  # x0^ to [-1, 1], where images are; eq. (26) is the mean that goes with it
                x0 = self.predict_x0(x, eps, t).clamp(-1, 1)
                mean, _ = self.posterior(x0, x, t)
            if step == 0:
                return mean  # abar_prev = 1: x0^ itself, no noise
            x = mean + sigma2[t].sqrt() * torch.randn_like(x)  # x_{t-1}

    def ddim_times(self, steps, spacing="quadratic"):
        """The increasing list of our t that DDIM visits. ValueError for other steps or spacings.

        tau_i for i = 1..S: "linear" i T / S, "quadratic" 0.8 T (i / S)^2 (Song et al., D.2).
        """
        if not 1 <= steps <= self.timesteps:
            raise ValueError(f"steps must be in 1..{self.timesteps}, not {steps}")
        if spacing not in ("linear", "quadratic"):
            raise ValueError(f"spacing must be 'linear' or 'quadratic', not {spacing!r}")
        i = torch.arange(1, steps + 1, dtype=torch.float64)  # (S,)
        tau = self.timesteps * i / steps
        if spacing == "quadratic":
            # Denser where the image is nearly clean. It starts at 0.8 T, where sqrt(abar) = 0.04
            # (T = 1000): so little of an image that pure noise may stand for x_t.
            tau = 0.8 * self.timesteps * (i / steps) ** 2
        tau = (tau - 1e-6).ceil().long()  # rounded up, after 1e-6 for float error
        return (tau.unique() - 1).tolist()  # small ones may coincide

    @torch.no_grad()
    def ddim_sample(self, net, shape, y=None, steps=100, eta=0.0, spacing="quadratic",
                    x_T=None, clip=True, seen=None):
        """DDIM (Song et al. 2020): `steps` jumps from noise x_T to images (B, C, H, W).

        eta in 0..1, else ValueError: at 0 no noise is added, the image is a function of x_T;
        at 1, linear, T steps: DDPM. seen: a list to which each jump appends (t, x_t, x0^).
        """
        if not 0 <= eta <= 1:  # above 1, s^2 may exceed 1 - abar_prev
            raise ValueError(f"eta must be in 0..1, not {eta}")
        times = self.ddim_times(steps, spacing)
        x = torch.randn(shape, device=self.beta.device) if x_T is None else x_T
        for i in reversed(range(len(times))):
            t = torch.full((len(x),), times[i], device=x.device)  # as in training: not i
            eps = net(x, t, y)  # (B, C, H, W)
            x0 = self.predict_x0(x, eps, t)
            if clip:
                x0 = x0.clamp(-1, 1)  # where images are
                eps = self.predict_eps(x, x0, t)  # so that eq. (5) still holds
            if seen is not None:
                seen.append((times[i], x, x0))
            if i == 0:
                return x0  # abar_prev = 1: x0^ itself
            t_prev = torch.full_like(t, times[i - 1])
            abar, abar_prev = self.abar[t], self.abar[t_prev]  # (B, 1, 1, 1); Song et al.: alpha
            noise, noise_prev = self.one_minus_abar[t], self.one_minus_abar[t_prev]  # 1 - abar
            s = eta * (noise_prev / noise).sqrt() * (1 - abar / abar_prev).sqrt()  # their eq. (16)
            x = abar_prev.sqrt() * x0 + (noise_prev - s**2).sqrt() * eps  # their eq. (12)
            if eta > 0:
                x = x + s * torch.randn_like(x)  # its last term


def eps_net(diffusion, unet, image=None):
    """eps_psi(x_t, t, y), as `Diffusion` takes it, of a U-Net that gives v.

    image (B, C, H, W) in [-1, 1], the leaf's reconstruction, is concatenated to x_t (DiffuseVAE).
    """
    # Why v: x0^ = sqrt(abar_t) x_t - sqrt(1 - abar_t) v, so an error in v does not grow in x0^.
    # That of a net that gives eps grows by sqrt((1 - abar_t) / abar_t), 25 at DDIM's first step:
    # speckle on black grounds. The loss stays eq. (30), which equals abar_t |v - v_psi|^2.
    def net(xt, t, y):
        x = xt if image is None else torch.cat([xt, image], 1)  # (B, C + extra, H, W)
        return diffusion.eps_from_v(xt, unet(x, t, y), t)  # float32, also where v is bfloat16
    return net


# == The U-Net ====================================================================================
def time_features(t, dim):
    """(B,) -> (B, dim): cosines and sines of t at dim / 2 frequencies, 1 down to almost 1/10000."""
    freqs = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t[:, None].float() * freqs  # (B, dim / 2)
    return torch.cat([angles.cos(), angles.sin()], 1)


def zero(layer):
    """The same layer, zero-initialised: a residual branch adds nothing at first."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class GroupNorm(nn.GroupNorm):
    """Group norm over c channels that computes in its input's dtype."""

    def __init__(self, c):
        # at least 8 channels a group: with one (instance norm) the net forgets brightness
        super().__init__(math.gcd(32, c, max(1, c // 8)), c)

    def forward(self, x):
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)  # (c,)
        with torch.autocast(x.device.type, enabled=False):  # else float32, twice the memory traffic
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)


class Attention(nn.Module):
    """Self-attention over the positions of a feature map, added to it; heads of 64 channels."""

    def __init__(self, c):
        super().__init__()
        self.heads = c // math.gcd(c, 64)  # fewer channels where 64 do not fit
        self.norm = GroupNorm(c)
        self.qkv = nn.Conv2d(c, 3 * c, 1)
        self.out = zero(nn.Conv2d(c, c, 1))

    def forward(self, x):
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).view(B, 3, self.heads, C // self.heads, H * W)  # q, k, v in 1
        q, k, v = qkv.transpose(3, 4).unbind(1)  # each (B, heads, H W, C / heads)
        h = F.scaled_dot_product_attention(q, k, v)  # softmax(q k^T / sqrt(d)) v
        return x + self.out(h.transpose(2, 3).reshape(B, C, H, W))


class ResBlock(nn.Module):
    """A residual block, conditioned on the embedding of time and path; then attention, if any."""

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
        h = self.conv1(F.silu(self.norm1(x)))  # (B, c_out, H, W)
        h = self.norm2(h) * (1 + scale) + shift  # where time and path come in
        h = self.conv2(self.dropout(F.silu(h)))  # 0 before training
        return self.attention(self.skip(x) + h)


class UNet(nn.Module):
    """v_psi(x_t, t, y): (B, C + extra, H, W), (B,), (B, emb_dim) or None -> v (B, C, H, W).

    A scale for each multiplier, half the side each time, `blocks` residual blocks a scale, with
    attention where the feature map's side is in `attention` and in the middle. Square images.
    extra: input channels after those of x_t. ValueError for a side that does not fit.
    """

    def __init__(self, image_shape, channels=64, multipliers=(1, 2, 2, 2), blocks=2,
                 attention=(16,), dropout=0.3, extra=0):
        super().__init__()
        c_image, side, _ = image_shape
        # Zeros around the image so that its side halves at every scale: 28 -> 32 for four scales
        missing = -side % 2 ** (len(multipliers) - 1)
        sides = [(side + missing) // 2**k for k in range(len(multipliers))]  # of feature maps
        if missing % 2 == 1:
            raise ValueError(f"side {side} is odd: it does not pad evenly to halve")
        if not set(attention) <= set(sides):
            raise ValueError(f"attention at {list(attention)}, but feature maps of side {sides}")
        self.pad = missing // 2
        self.channels, self.emb_dim = channels, 4 * channels
        self.time = nn.Sequential(nn.Linear(channels, self.emb_dim), nn.SiLU(),
                                  nn.Linear(self.emb_dim, self.emb_dim))
        # Down: what each layer gives is a skip connection, too
        self.down = nn.ModuleList([nn.Conv2d(c_image + extra, channels, 3, padding=1)])
        c, skips = channels, [channels]  # channels now, and of each skip connection
        for m, side in zip(multipliers, sides):
            if side < sides[0]:
                self.down.append(nn.Conv2d(c, c, 3, stride=2, padding=1))  # half the side
                skips.append(c)
            for _ in range(blocks):
                c_in, c = c, m * channels
                self.down.append(ResBlock(c_in, c, self.emb_dim, dropout, side in attention))
                skips.append(c)
        self.middle = nn.ModuleList([ResBlock(c, c, self.emb_dim, dropout, attend=True),
                                     ResBlock(c, c, self.emb_dim, dropout, attend=False)])
        # Up: each residual block takes in a skip connection, the latest first
        self.up = nn.ModuleList()
        for m, side in reversed(list(zip(multipliers, sides))):
            for _ in range(blocks + 1):  # one more than down, which has the convolutions' skips
                c_in, c = c + skips.pop(), m * channels
                self.up.append(ResBlock(c_in, c, self.emb_dim, dropout, side in attention))
            if side < sides[0]:
                conv = nn.Conv2d(c, c, 3, padding=1)
                self.up.append(nn.Sequential(nn.Upsample(scale_factor=2), conv))  # twice the side
        conv = zero(nn.Conv2d(c, c_image, 3, padding=1))  # v is 0 before training
        self.last = nn.Sequential(GroupNorm(c), nn.SiLU(), conv)

    def forward(self, x, t, y=None):
        emb = self.time(time_features(t, self.channels))  # (B, emb_dim)
        if y is not None:
            emb = emb + y  # section 3.2: the path joins the time
        h = F.pad(x, [self.pad] * 4)  # zeros, 28 -> 32
        skips = []
        for layer in self.down:
            h = layer(h, emb) if isinstance(layer, ResBlock) else layer(h)
            skips.append(h)
        for block in self.middle:
            h = block(h, emb)  # at the smallest side
        for layer in self.up:
            if isinstance(layer, ResBlock):
                h = layer(torch.cat([h, skips.pop()], 1), emb)  # with the skip connection
            else:
                h = layer(h)  # twice the side
        return F.pad(self.last(h), [-self.pad] * 4)  # v, cut back to (B, C, H, W)


if __name__ == "__main__":
    torch.manual_seed(0)
    diffusion = Diffusion()
    images = torch.stack([torch.eye(8), torch.eye(8).flip(0)])[:, None] * 1.8 - 0.9  # (2, 1, 8, 8)
    unet = UNet((1, 8, 8), channels=16, multipliers=(1, 2), blocks=1, attention=(), dropout=0.0)
    net = eps_net(diffusion, unet)
    table = nn.Embedding(2, unet.emb_dim)  # stands for the path encoder: a y for each image
    print(f"Training on images {tuple(images.shape)}: a diagonal, its mirror image")
    optimizer = torch.optim.Adam([*unet.parameters(), *table.parameters()], lr=2e-3)
    for step in range(201):
        kind = torch.randint(2, (32,))  # which of the two images
        loss = diffusion.loss(net, images[kind], table(kind))
        if step % 50 == 0:
            print(f"  step {step:3d}: eq. (30) = {loss.item():.3f}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"DDIM at t = {diffusion.ddim_times(8)[::-1]}, y {tuple(table.weight.shape)}:")
    drawn = diffusion.ddim_sample(net, (2, 1, 8, 8), table.weight, steps=8)
    for rows in drawn[:, 0].transpose(0, 1):  # (2, 8): one row of both images
        print("  " + "    ".join("".join(".#"[int(p > 0)] for p in row) for row in rows))
