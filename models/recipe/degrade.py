"""Low-resolution inputs: PIL bicubic, and the blind degradations (blur, noise, JPEG) of LDM-BSR in a plain form.

Pictures are uint8 [H, W, 3] in and out.
"""

import io

import numpy as np
from PIL import Image, ImageFilter


def bicubic(a, scale):
    return np.asarray(Image.fromarray(a).resize((a.shape[1] // scale, a.shape[0] // scale), Image.BICUBIC))


def low_resolution(a, scale, options, rng):
    """Bicubic, or with `options["probability"]` the degraded chain: Gaussian blur on the HR, reduction by a filter drawn
    at random, Gaussian noise (grey or coloured) on the LR, JPEG; noise and JPEG in either order, as in BSR."""
    if rng.random() >= options["probability"]:
        return bicubic(a, scale)
    size = (a.shape[1] // scale, a.shape[0] // scale)
    im = Image.fromarray(a).filter(ImageFilter.GaussianBlur(rng.uniform(*options["blur_sigma"])))
    kernel = (Image.BICUBIC, Image.BILINEAR, Image.BOX, Image.LANCZOS)[int(rng.integers(4))]
    x = np.asarray(im.resize(size, kernel))

    def noise(v):
        sigma = rng.uniform(*options["noise_sigma"])
        n = rng.normal(0.0, sigma, v.shape if rng.random() < 0.6 else v.shape[:2] + (1,))
        return np.clip(np.rint(v + n), 0, 255).astype(np.uint8)

    def jpeg(v):
        b = io.BytesIO()
        Image.fromarray(v).save(b, "JPEG", quality=int(rng.integers(options["jpeg_quality"][0], options["jpeg_quality"][1] + 1)))
        return np.asarray(Image.open(b).convert("RGB"))

    for step in (noise, jpeg) if rng.random() < 0.7 else (jpeg, noise):
        x = step(x)
    return x
