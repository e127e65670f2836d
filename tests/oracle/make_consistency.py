"""Writes tests/fixtures/consistency.safetensors: back-projection onto the input with Pillow's own bicubic
resampling (mode F, so nothing is rounded to 8 bits)."""

import numpy as np
import torch
from PIL import Image

from oracle_common import FIXTURES, randn, write_tensors

# Factor, height and width of the input. Kernels are cut at both ends at once in the smaller ones.
CASES = [(2, 1, 1), (2, 3, 9), (4, 1, 2), (4, 2, 3), (4, 4, 5), (4, 9, 7), (4, 6, 13), (8, 5, 6)]
ROUNDS = 2


def resample(picture, height, width):
    """[3, H, W] f32 to [3, height, width]."""
    planes = [Image.fromarray(p).resize((width, height), Image.Resampling.BICUBIC) for p in picture]
    return np.stack([np.asarray(p) for p in planes])


def main():
    tensors = {}
    for seed, (factor, h, w) in enumerate(CASES):
        lr = randn((3, h, w), 100 + seed).numpy().clip(-1, 1)
        hr = randn((3, h * factor, w * factor), 200 + seed).numpy() * 0.7
        strength = [1.0, 0.25, 0.8][seed % 3]
        result = hr
        for _ in range(ROUNDS):
            lacking = lr - resample(result, h, w)
            result = result + np.float32(strength) * resample(lacking, h * factor, w * factor)
        name = f"x{factor}-{h}x{w}"
        last = lambda a: torch.from_numpy(np.ascontiguousarray(a.transpose(1, 2, 0)))
        tensors |= {f"{name}.lr": last(lr), f"{name}.hr": last(hr), f"{name}.result": last(result),
                    f"{name}.strength": torch.tensor([strength])}
    write_tensors(FIXTURES / "consistency.safetensors", tensors)


if __name__ == "__main__":
    main()
