"""Consistency with the input: PIL's bicubic reduction by 4, its counterpart enlargement, and back-projection, all differentiable.

Back-projection (Irani and Peleg 1991) adds to a picture what its reduction lacks of the LR, enlarged. It leaves alone what the
LR says nothing about, so a network that is followed by it need only learn that. Edges are repeated; PIL cuts its kernel
there instead, so the outermost pixels differ a little from PIL's.
"""

import torch
import torch.nn.functional as F


def keys(x):
    """Keys' cubic kernel, a = -0.5, at |x|."""
    return torch.where(x < 1, 1.5 * x ** 3 - 2.5 * x ** 2 + 1, torch.where(x < 2, -0.5 * x ** 3 + 2.5 * x ** 2 - 4 * x + 2, 0.0))


class Consistency(torch.nn.Module):
    """Pictures are [N, 3, H, W], f32."""

    def __init__(self):
        super().__init__()
        k = keys((torch.arange(16, dtype=torch.float64) - 7.5).abs() / 4)
        self.register_buffer("down", (k / k.sum()).float())
        # Output pixel 4 i + p lies at i + (p - 1.5) / 4 of the LR grid; taps i - 2 .. i + 2.
        phases = [keys((torch.arange(-2, 3, dtype=torch.float64) - (p - 1.5) / 4).abs()) for p in range(4)]
        self.register_buffer("up", torch.stack([p / p.sum() for p in phases]).float())

    def reduce(self, x):
        n, c, h, w = x.shape
        x = F.pad(x.float(), (6, 6, 6, 6), mode="replicate").reshape(n * c, 1, h + 12, w + 12)
        x = F.conv2d(x, self.down[None, None, :, None], stride=(4, 1))
        return F.conv2d(x, self.down[None, None, None, :], stride=(1, 4)).reshape(n, c, h // 4, w // 4)

    def enlarge(self, x):
        n, c, h, w = x.shape
        x = F.pad(x.float(), (2, 2, 2, 2), mode="replicate").reshape(n * c, 1, h + 4, w + 4)
        x = F.conv2d(x, self.up[:, None, :, None]).transpose(1, 2).reshape(n * c, 1, 4 * h, w + 4)
        x = F.conv2d(x, self.up[:, None, None, :])  # [nc, 4 phases, 4h, w]
        return x.permute(0, 2, 3, 1).reshape(n, c, 4 * h, 4 * w)

    def forward(self, x, lr, rounds):
        x = x.float()
        for _ in range(rounds):
            x = x + self.enlarge(lr - self.reduce(x))
        return x
