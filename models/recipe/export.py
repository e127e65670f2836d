"""Export: the trained parts become a diffusers folder (LDMSuperResolutionPipeline: vqvae/, unet/, scheduler/).

  python export.py --config config/photo-x4-cpu.toml --run RUN --to FOLDER [--average CHECKPOINT]

Takes the furthest stage that RUN holds: finetune-final.pt, else finetune-latest.pt, else unet-final.pt. With --average, half of
another checkpoint of the same stage goes into the weights: an earlier one tempers what the critic overdid (network
interpolation, Wang et al. 2018, section 3.4). The folder is written beside its name and moved there when it is whole. The
autoencoder stands under `vqvae/`, the name that pipeline gives to its first stage; its class is AutoencoderKL.
"""

import argparse
import os
import shutil

import torch
from diffusers import LDMSuperResolutionPipeline

import common
import finetune
import networks


def load(config, run, average=None):
    """(autoencoder, U-Net, name of the checkpoint they came from), weights of the furthest stage."""
    vae, unet = networks.build_autoencoder(config), networks.build_unet(config)
    first = common.load_checkpoint(os.path.join(run, "autoencoder-final.pt"))
    names = [n for n in ("finetune-final.pt", "finetune-latest.pt", "unet-final.pt") if os.path.exists(os.path.join(run, n))]
    if first is None or not names:
        raise SystemExit(f"{run} holds no finished stage: train_autoencoder.py and train_unet.py come first")
    vae.load_state_dict(first["vae"])
    state = common.load_checkpoint(os.path.join(run, names[0]))
    if "unet" in state:
        unet.load_state_dict(state["unet"])
    else:
        weights = state["both"]
        if average:
            other = finetune.averaged(average)
            weights = {k: torch.lerp(v, other[k], 0.5) for k, v in weights.items()}
        finetune.load_weights(finetune.trainable(vae, unet), weights)
    return vae.eval(), unet.eval(), f"{names[0]}, step {state['step']}"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--config", required=True)
    p.add_argument("--run", required=True)
    p.add_argument("--to", required=True)
    p.add_argument("--average", help="another checkpoint of the last stage, of which half goes in")
    a = p.parse_args()
    config = common.load_config(a.config)
    vae, unet, name = load(config, a.run, a.average)
    part = a.to.rstrip("/") + ".part"
    shutil.rmtree(part, ignore_errors=True)
    LDMSuperResolutionPipeline(vqvae=vae, unet=unet, scheduler=networks.build_scheduler(config)).save_pretrained(part)
    shutil.rmtree(a.to, ignore_errors=True)
    os.replace(part, a.to)
    print(f"{a.to}: from {name}")


if __name__ == "__main__":
    main()
