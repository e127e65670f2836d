"""Evaluation of a diffusers folder on the held-back photographs, against bicubic enlargement.

  python evaluate.py --model FOLDER --data DATA --to OUT [--steps 1,4,20] [--crop 512] [--consistency 0] [--limit N]

Each photograph is cut to its centre (at most `crop` px a side, sides multiples of 4), reduced by PIL's bicubic filter to the
LR, and enlarged in f32 by DDIM with eta 0 from noise seeded by 0. Writes OUT/truth, OUT/lr, OUT/bicubic, OUT/steps-N (PNG),
OUT/sheet.png (a 128 px detail of each: bicubic, the step counts, truth) and OUT/evaluation.json; prints the table of means:

  psnr_y   dB, BT.601 studio-range Y of the 8-bit pictures, border of 4 px cut;  ssim_y  Gaussian 11x11 sigma 1.5 on the same
  hed      feature distance of HED's VGG16, five stages, LPIPS 0.1 vgg heads as channel weights; not LPIPS, lower is nearer
  sharp    gradient energy of the result over that of the truth
  colour   largest channel difference of the mean colour, of 255
  lr_psnr  dB, the result reduced by PIL bicubic against the LR
  rec      (row `autoencoder`) is the truth through the model's own encoder and decoder
"""

import argparse
import io
import json
import os
import time

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DModel
from PIL import Image
from skimage.metrics import structural_similarity

import common
import degrade
import networks
from consistency import Consistency
from train_autoencoder import decode, encode
from train_unet import sample


class Hed(networks.Perceptual):
    def __init__(self, assets):
        super().__init__(5, assets)
        raw = networks.wheel("lpips", "0.1.4", assets).read("lpips/weights/v0.1/vgg.pth")
        linear = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
        self.heads = [linear[f"lin{i}.model.1.weight"].flatten() for i in range(5)]

    @torch.no_grad()
    def features(self, a):
        out = []
        for f in self.stages(common.to_tensor(a)[None]):
            out.append(f / (f.pow(2).sum(1, keepdim=True).sqrt() + 1e-10))
        return out

    def between(self, fa, fb):
        return sum(float(((a - b).pow(2).mean((0, 2, 3)) * h).sum()) for a, b, h in zip(fa, fb, self.heads))


def luma(a):
    return 16 + (a.astype(np.float64) @ np.array([65.481, 128.553, 24.966])) / 255


def db(mse):
    return 10 * np.log10(255 ** 2 / max(mse, 1e-9))


def energy(y):
    return (np.diff(y, axis=0) ** 2).mean() + (np.diff(y, axis=1) ** 2).mean()


def measure(truth, result, lr):
    t, r = luma(truth)[4:-4, 4:-4], luma(result)[4:-4, 4:-4]
    s = structural_similarity(t, r, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    return {"psnr_y": db(((t - r) ** 2).mean()), "ssim_y": float(s), "sharp": energy(r) / max(energy(t), 1e-9),
            "colour": float(np.abs(result.mean((0, 1)) - truth.mean((0, 1))).max()),
            "lr_psnr": db(((degrade.bicubic(result, 4).astype(np.float64) - lr) ** 2).mean())}


@torch.no_grad()
def enlarge(parts, lr, steps, consistency):
    """uint8 LR to uint8 HR. `consistency` rounds of back-projection afterwards: the LR's residual, enlarged, is added."""
    vae, unet, scheduler = parts
    x = common.to_tensor(lr)[None]
    z = sample(unet, scheduler, x, vae.config.latent_channels, steps, torch.Generator().manual_seed(0))
    out = decode(vae, z / vae.config.scaling_factor)
    return common.to_image(Consistency()(out, x, consistency)[0])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True)
    p.add_argument("--data", required=True)
    p.add_argument("--to", required=True)
    p.add_argument("--steps", default="1,4,20")
    p.add_argument("--crop", type=int, default=512)
    p.add_argument("--consistency", type=int, default=2, help="rounds of back-projection onto the LR (0: the model alone)")
    p.add_argument("--limit", type=int, help="at most so many photographs")
    p.add_argument("--assets", default=".assets")
    a = p.parse_args()
    vae = AutoencoderKL.from_pretrained(a.model, subfolder="vqvae").eval()
    unet = UNet2DModel.from_pretrained(a.model, subfolder="unet").eval()
    parts = vae, unet, DDIMScheduler.from_pretrained(a.model, subfolder="scheduler")
    hed, steps = Hed(a.assets), [int(s) for s in a.steps.split(",")]
    names = ["bicubic", *[f"steps-{s}" for s in steps], "autoencoder"]
    for d in ("truth", "lr", *names):
        os.makedirs(os.path.join(a.to, d), exist_ok=True)
    with open(os.path.join(a.data, "index.json")) as f:
        files = json.load(f)["validation"]
    pictures, rows = {}, []
    for path in files[:a.limit]:
        stem = os.path.splitext(os.path.basename(path))[0]
        im = Image.open(path).convert("RGB")
        w, h = (min(a.crop, v) // 4 * 4 for v in im.size)
        x, y = (im.width - w) // 2, (im.height - h) // 2
        truth = np.asarray(im.crop((x, y, x + w, y + h)))
        lr = degrade.bicubic(truth, 4)
        results, seconds = {"bicubic": np.asarray(Image.fromarray(lr).resize((w, h), Image.BICUBIC))}, {}
        for s in steps:
            start = time.process_time()
            results[f"steps-{s}"] = enlarge(parts, lr, s, a.consistency)
            seconds[f"steps-{s}"] = time.process_time() - start
        with torch.no_grad():
            results["autoencoder"] = common.to_image(decode(vae, encode(vae, common.to_tensor(truth)[None])[0])[0])
        wanted = hed.features(truth)
        pictures[stem] = {}
        for name, r in results.items():
            pictures[stem][name] = {**measure(truth, r, lr), "hed": hed.between(hed.features(r), wanted),
                                    "cpu_seconds": seconds.get(name, 0.0)}
            Image.fromarray(r).save(os.path.join(a.to, name, stem + ".png"))
        Image.fromarray(truth).save(os.path.join(a.to, "truth", stem + ".png"))
        Image.fromarray(lr).save(os.path.join(a.to, "lr", stem + ".png"))
        cy, cx = h // 2 - 64, w // 2 - 64
        rows.append(np.concatenate([v[cy:cy + 128, cx:cx + 128] for v in [*list(results.values())[:-1], truth]], 1))
        print(stem, " ".join(f"{n} {v['psnr_y']:.2f}/{v['hed']:.4f}" for n, v in pictures[stem].items()), flush=True)
    half = -(-len(rows) // 2)
    rows += [np.zeros_like(rows[0])] * (2 * half - len(rows))
    Image.fromarray(np.concatenate([np.concatenate([rows[i], rows[half + i]], 1) for i in range(half)], 0)).save(os.path.join(a.to, "sheet.png"))
    keys = ["psnr_y", "ssim_y", "hed", "sharp", "colour", "lr_psnr", "cpu_seconds"]
    means = {n: {k: float(np.mean([v[n][k] for v in pictures.values()])) for k in keys} for n in names}
    with open(os.path.join(a.to, "evaluation.json"), "w") as f:
        json.dump({"crop": a.crop, "consistency": a.consistency, "photographs": len(pictures), "means": means, "pictures": pictures}, f, indent=1)
    print("| | " + " | ".join(keys) + " |\n|" + "---|" * (len(keys) + 1))
    for n in names:
        print(f"| {n} | " + " | ".join(format(means[n][k], ".4f" if k in ("ssim_y", "hed") else ".2f") for k in keys) + " |")


if __name__ == "__main__":
    main()
