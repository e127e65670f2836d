"""What every script of the recipe shares: configuration, crops, checkpoints, schedules, logs and sheets.

No model and no loss lives here.
"""

import contextlib
import csv
import json
import math
import os
import time
import tomllib

import numpy as np
import torch
from PIL import Image

import degrade

SCALE = 4


def load_config(path):
    with open(path, "rb") as f:
        return tomllib.load(f)


def pick_device(config):
    name = config["log"]["device"]
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def autocast(device):
    """bf16 on both devices; weights, optimiser state and losses stay f32."""
    return torch.autocast(device.type, torch.bfloat16)


# ---------------------------------------------------------------- data
class Crops(torch.utils.data.Dataset):
    """Item `i` is the crop that `(seed, i)` names, whatever came before it: so a run that is cut and resumed sees what
    an uncut run would have seen. HR and LR are f32 [3, H, W] in [-1, 1]; LR is the PIL bicubic quarter of the HR crop,
    rounded to 8 bits, or a degraded one."""

    def __init__(self, folder, config, count, crop):
        with open(os.path.join(folder, "index.json")) as f:
            self.index = json.load(f)["pictures"]
        self.pixels = np.memmap(os.path.join(folder, "pixels.bin"), np.uint8, "r")
        d = config["data"]
        self.crop, self.pick, self.seed, self.count = crop, d["pick"], config["seed"], count
        self.degradation = config["degradation"]
        usable = [p for p in self.index if min(p["height"], p["width"]) >= self.crop]
        kinds = {"photo": (1 - d["texture_weight"]) * (1 - d["half_scale_weight"]),
                 "half": (1 - d["texture_weight"]) * d["half_scale_weight"], "texture": d["texture_weight"]}
        weights = np.zeros(len(usable))
        for kind, share in kinds.items():
            # The square root of the area: large pictures have more to show, but should not crowd out the small ones.
            area = np.array([math.sqrt(p["height"] * p["width"]) if p["kind"] == kind else 0.0 for p in usable])
            if area.sum() > 0:
                weights += share * area / area.sum()
        self.usable, self.cumulative = usable, np.cumsum(weights / weights.sum())

    def __len__(self):
        return self.count

    def window(self, p, y, x):
        c = self.crop
        rows = self.pixels[p["offset"]:p["offset"] + p["height"] * p["width"] * 3].reshape(p["height"], p["width"], 3)
        return np.ascontiguousarray(rows[y:y + c, x:x + c])

    def __getitem__(self, i):
        rng = np.random.default_rng((self.seed, i))
        best, most = None, -1.0
        for _ in range(self.pick):
            p = self.usable[min(int(np.searchsorted(self.cumulative, rng.random(), "right")), len(self.usable) - 1)]
            a = self.window(p, int(rng.integers(p["height"] - self.crop + 1)), int(rng.integers(p["width"] - self.crop + 1)))
            g = a[::2, ::2, 1].astype(np.float32)
            energy = float(np.abs(np.diff(g, axis=0)).mean() + np.abs(np.diff(g, axis=1)).mean())
            if energy > most:
                best, most = a, energy
        a = np.rot90(best, int(rng.integers(4)))
        a = np.ascontiguousarray(a[:, ::-1] if rng.random() < 0.5 else a)
        lr = degrade.low_resolution(a, SCALE, self.degradation, rng)
        return to_tensor(a), to_tensor(lr)


def to_tensor(a):
    return torch.from_numpy(a.copy()).permute(2, 0, 1).float().div_(127.5).sub_(1.0)


def to_image(x):
    """[3, H, W] in [-1, 1] to 8-bit RGB, rounded to nearest."""
    a = x.detach().float().cpu().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return a.permute(1, 2, 0).numpy()


def batches(folder, config, stage, step, steps, device, team):
    """Yields (step, hr, lr) from `step` on. Stages and workers draw from disjoint item numbers."""
    size = config[stage]["batch"]
    base = {"train_autoencoder": 0, "train_unet": 1 << 40, "finetune": 1 << 41}[stage]
    data = Crops(folder, config, 1 << 42, config[stage]["crop"])
    items = (base + (s * team.size + team.rank) * size + i for s in range(step, steps) for i in range(size))
    loader = torch.utils.data.DataLoader(data, batch_size=size, sampler=items, num_workers=config["data"]["workers"],
                                         pin_memory=device.type == "cuda", drop_last=True)
    for hr, lr in loader:
        yield step, hr.to(device, non_blocking=True), lr.to(device, non_blocking=True)
        step += 1


# ---------------------------------------------------------------- schedule, averages, checkpoints
class Clock:
    """Progress of a stage from 0 to 1: by steps, or by wall time where `minutes` is given and runs out first."""

    def __init__(self, steps, minutes, spent):
        self.steps, self.seconds, self.start = steps, minutes * 60 if minutes else None, time.time() - spent

    def spent(self):
        return time.time() - self.start

    def progress(self, step):
        by_step = step / self.steps
        return max(by_step, self.spent() / self.seconds) if self.seconds else by_step


def rate(step, progress, warmup):
    """Linear warm-up, then a half cosine down to 2 %."""
    return min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def set_rate(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


class Average:
    """Exponential moving average of a module's parameters, its decay warmed up so that early averages follow."""

    def __init__(self, module, decay):
        self.decay, self.steps = decay, 0
        self.shadow = {k: v.detach().clone() for k, v in module.state_dict().items()}

    def update(self, module):
        self.steps += 1
        d = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for k, v in module.state_dict().items():
            self.shadow[k].lerp_(v.detach(), 1 - d)

    @contextlib.contextmanager
    def applied(self, module):
        """The averaged weights inside the block, the trained ones after it."""
        kept = {k: v.detach().clone() for k, v in module.state_dict().items()}
        module.load_state_dict(self.shadow)
        try:
            yield
        finally:
            module.load_state_dict(kept)

    def state(self):
        return {"steps": self.steps, "shadow": self.shadow}

    def load(self, state):
        self.steps, self.shadow = state["steps"], state["shadow"]


def save_checkpoint(path, state):
    torch.save(state, path + ".part")
    os.replace(path + ".part", path)


def load_checkpoint(path):
    """None where there is nothing to resume. Only tensors and plain values are read."""
    return torch.load(path, map_location="cpu", weights_only=True) if os.path.exists(path) else None


class Log:
    """One CSV of losses per stage, one line every `every` steps; reopened for appending on resume, so that the curve of
    a run stays one file. The leader alone writes, of its own share of the batches."""

    def __init__(self, path, every, team):
        self.path, self.every, self.leads, self.sums, self.count = path, every, team.leads, {}, 0

    def add(self, step, seconds, values):
        if not self.leads:
            return
        for k, v in values.items():
            self.sums[k] = self.sums.get(k, 0.0) + (v.item() if torch.is_tensor(v) else v)
        self.count += 1
        if (step + 1) % self.every:
            return
        means = {k: v / self.count for k, v in self.sums.items()}
        new = not os.path.exists(self.path)
        with open(self.path, "a", newline="") as f:
            w = csv.writer(f)
            if new:
                w.writerow(["step", "seconds", *means])
            w.writerow([step + 1, f"{seconds:.0f}", *(f"{v:.6g}" for v in means.values())])
        print(f"step {step + 1} {seconds:.0f}s " + " ".join(f"{k} {v:.4f}" for k, v in means.items()), flush=True)
        self.sums, self.count = {}, 0


# ---------------------------------------------------------------- validation crops and sheets
def validation_crops(folder, config, size, count):
    """`count` centre crops of the held-back photographs, in the order of their names: (HR, LR) f32 [N, 3, H, W]. The LR
    are made as in training, the same ones each time."""
    with open(os.path.join(folder, "index.json")) as f:
        files = json.load(f)["validation"]
    hr, lr = [], []
    for path in files[:: max(1, len(files) // count)][:count]:
        im = Image.open(path).convert("RGB")
        x, y = (im.width - size) // 2, (im.height - size) // 2
        a = np.asarray(im.crop((x, y, x + size, y + size)))
        hr.append(to_tensor(a))
        lr.append(to_tensor(degrade.low_resolution(a, SCALE, config["degradation"], np.random.default_rng(len(lr)))))
    return torch.stack(hr), torch.stack(lr)


def sheet(path, rows):
    """A PNG whose rows are the crops and whose columns are what was made of them. `rows` holds lists of [3, H, W]."""
    lines = [np.concatenate([to_image(x) for x in row], 1) for row in rows]
    Image.fromarray(np.concatenate(lines, 0)).save(path)


def luma(x):
    """BT.601 studio-range Y [N, H, W] of the 8-bit pictures that [N, 3, H, W] in [-1, 1] round to, a border of 4 cut."""
    w = torch.tensor([65.481, 128.553, 24.966], device=x.device)[None, :, None, None] / 255
    return ((x.float().clamp(-1, 1) + 1).mul(127.5).round() * w).sum(1)[..., 4:-4, 4:-4]


def psnr_y(a, b):
    """dB over a batch: mean of the pictures' PSNR on Y."""
    mse = (luma(a) - luma(b)).pow(2).mean((1, 2)).clamp_min(1e-9)
    return float((10 * torch.log10(255 ** 2 / mse)).mean())


def sharpness(a, b):
    """Gradient energy of `a` over that of `b` on Y, mean over the batch."""
    def energy(x):
        y = luma(x)
        return y.diff(dim=1).pow(2).mean((1, 2)) + y.diff(dim=2).pow(2).mean((1, 2))
    return float((energy(a) / energy(b).clamp_min(1e-9)).mean())
