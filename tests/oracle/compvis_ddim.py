"""DDIM as the CompVis latent-diffusion sampler runs it, from its published formulas.

Song et al., "Denoising Diffusion Implicit Models", eq. 12 and 16; schedule and timestep
choice as in the CompVis code ("uniform" discretisation). No clipping, eps-prediction.
"""

import numpy as np
import torch


def alphas_cumprod(beta_start, beta_end, train_steps=1000):
    """The "linear" schedule of CompVis ("scaled_linear" in diffusers): f64, then rounded to f32."""
    betas = np.linspace(beta_start**0.5, beta_end**0.5, train_steps, dtype=np.float64) ** 2
    return torch.tensor(np.cumprod(1.0 - betas), dtype=torch.float32)


def timesteps(steps, train_steps=1000):
    """Ascending timesteps range(0, 1000, 1000 // S) + 1, or None where one of them is 1000.

    S that does not divide 1000 gives more steps than asked for. S with 999 a multiple of
    1000 // S (9, 36, 37, 251 to 333, above 500) reaches index 1000, past the end of the
    table: the original fails there.
    """
    chosen = np.arange(0, train_steps, train_steps // steps) + 1
    return chosen if chosen[-1] < train_steps else None


class Schedule:
    """Coefficients of every step, in sampling order (descending timesteps)."""

    def __init__(self, alphas, steps, eta):
        chosen = timesteps(steps, len(alphas))
        if chosen is None:
            raise ValueError(f"{steps} steps: the last timestep is {len(alphas)}, past the end of the schedule")
        alpha = alphas[torch.from_numpy(chosen)]
        previous = torch.cat([alphas[:1], alpha[:-1]])
        sigma = eta * torch.sqrt((1 - previous) / (1 - alpha) * (1 - alpha / previous))
        order = torch.arange(len(chosen) - 1, -1, -1)
        self.timesteps = torch.from_numpy(chosen)[order]
        self.alpha, self.alpha_previous, self.sigma = alpha[order], previous[order], sigma[order]

    def step(self, index, model_output, x, noise):
        a, p, s = self.alpha[index], self.alpha_previous[index], self.sigma[index]
        x0 = (x - torch.sqrt(1 - a) * model_output) / torch.sqrt(a)
        x = torch.sqrt(p) * x0 + torch.sqrt(1 - p - s**2) * model_output
        return x + s * noise if noise is not None else x


def border_weights(height, width, low=0.01, high=0.5):
    """Weight of each pixel of a tile: its distance to the nearest border as a share of the
    tile's extent in that direction (0 at the border), clipped to [low, high]. [H, W]."""
    y = torch.arange(height, dtype=torch.float32)[:, None] / (height - 1)
    x = torch.arange(width, dtype=torch.float32)[None, :] / (width - 1)
    y, x = torch.minimum(y, 1 - y), torch.minimum(x, 1 - x)
    return torch.minimum(y.expand(height, width), x.expand(height, width)).clamp(low, high)


def tiled(function, x, size, stride):
    """`function` on each tile of `x`, outputs blended by border weights.

    Tiles must fit exactly: (extent - size) is a multiple of stride in both directions.
    """
    _, _, height, width = x.shape
    assert (height - size) % stride == 0 and (width - size) % stride == 0
    weights = border_weights(size, size)
    total, norm = None, torch.zeros(height, width)
    for top in range(0, height - size + 1, stride):
        for left in range(0, width - size + 1, stride):
            out = function(x[:, :, top:top + size, left:left + size])
            if total is None:
                total = torch.zeros(1, out.shape[1], height, width)
            total[:, :, top:top + size, left:left + size] += out * weights
            norm[top:top + size, left:left + size] += weights
    return total / norm
