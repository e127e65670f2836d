"""Stage 2: the U-Net on latents, conditioned on the LR picture by concatenation (Rombach et al. 2022, section 3.3 and 4.4).

  python train_unet.py --config config/photo-x4-cpu.toml --data DATA --to RUN [--minutes M]

v-prediction on the zero-terminal-SNR schedule (Lin et al. 2024), so that the first step of a trailing schedule starts from
pure noise as it does in use. The weight of a timestep is min(SNR + 1, gamma) / (SNR + 1) on the v loss: 1 on noisy steps,
capped on clean ones (min-SNR of Hang et al. 2023 in the form that does not vanish at SNR 0). A share of the timesteps is
drawn from those that 1- and 4-step trailing schedules visit. Reads RUN/autoencoder-final.pt. Run it again to go on from
RUN/unet.pt. Writes RUN/unet.csv, RUN/unet-*.png and RUN/unet-final.pt (averaged weights).
"""

import argparse
import os

import torch
import torch.nn.functional as F

import common
import networks
import wiring
import workers
from train_autoencoder import decode, encode


def draw_timesteps(count, share, device):
    """One timestep per item: from {999, 749, 499, 249} with 999 twice as likely, or uniform."""
    few = torch.tensor([*networks.trailing_timesteps(1), *networks.trailing_timesteps(4)], device=device)
    picked = few[torch.randint(len(few), (count,), device=device)]
    return torch.where(torch.rand(count, device=device) < share, picked, torch.randint(1000, (count,), device=device))


def predict(unet, z, lr, t):
    return unet(torch.cat([z, lr], 1), t).sample


@torch.no_grad()
def sample(unet, scheduler, lr, latent_channels, steps, generator=None, z=None):
    """DDIM with eta 0 from pure noise: the latent of `steps` steps, f32."""
    if z is None:
        z = torch.randn((lr.shape[0], latent_channels, *lr.shape[2:]), generator=generator).to(lr.device)
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        v = predict(unet, z, lr, torch.full((lr.shape[0],), int(t), device=lr.device)).float()
        z = scheduler.step(v, t, z).prev_sample
    return z


@torch.no_grad()
def validate(unet, vae, scheduler, crops, path, perceptual=None, refine=None):
    """A line that compares bicubic, 1 and 4 steps with the truth (PSNR-Y in dB, gradient energy over the truth's, feature
    distance where `perceptual` is given), and a sheet: bicubic, 1 step, 4 steps, truth. `refine` makes of a decoded picture and
    its LR what is shown."""
    hr, lr = crops
    columns = {"bicubic": F.interpolate(lr, scale_factor=4, mode="bicubic", align_corners=False)}
    for steps in (1, 4):
        z = sample(unet, scheduler, lr, vae.config.latent_channels, steps, torch.Generator().manual_seed(0))
        out = torch.cat([decode(vae, x[None]).float() for x in z])
        columns[f"{steps} step"] = refine(out, lr) if refine else out
    common.sheet(path, list(zip(*columns.values(), hr)))
    line = []
    for name, x in columns.items():
        entry = f"{name} {common.psnr_y(x, hr):.2f} dB sharp {common.sharpness(x, hr):.2f}"
        if perceptual:
            entry += " distance %.4f" % (sum(float(perceptual(p[None], q[None])) for p, q in zip(x, hr)) / len(hr))
        line.append(entry)
    return "validation: " + "; ".join(line)


@torch.no_grad()
def anchored_line(vae, data, config, device, crops=64):
    """Slope and offset [3] of the first three latent channels as a line in the LR picture's colours (least squares)."""
    items = common.Crops(data, config, 1 << 44, config["train_unet"]["crop"])
    pairs = [items[(1 << 43) + i] for i in range(crops)]
    z = torch.cat([encode(vae, hr[None].to(device))[0][:, :3] for hr, _ in pairs]).transpose(0, 1).flatten(1)
    x = torch.stack([lr for _, lr in pairs]).to(device).transpose(0, 1).flatten(1)
    slope = ((x - x.mean(1, keepdim=True)) * z).mean(1) / x.var(1, unbiased=False)
    return slope.tolist(), (z.mean(1) - slope * x.mean(1)).tolist()


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--config", required=True)
    p.add_argument("--data", required=True)
    p.add_argument("--to", required=True)
    p.add_argument("--minutes", type=float, help="end the schedule at this wall time if the steps have not run out before")
    workers.add_arguments(p)
    return p.parse_args()


def train(team, a):
    config = common.load_config(a.config)
    c, device = config["train_unet"], common.pick_device(config)
    torch.manual_seed(config["seed"] + 1)
    vae = networks.build_autoencoder(config).to(device).requires_grad_(False)
    first = common.load_checkpoint(os.path.join(a.to, "autoencoder-final.pt"))
    if first is None:
        raise SystemExit(f"{a.to}/autoencoder-final.pt is not there: run train_autoencoder.py to its end first")
    vae.load_state_dict(first["vae"])
    unet, scheduler = networks.build_unet(config), networks.build_scheduler(config)
    if config["unet"]["wired"]:
        wiring.wire_unet(unet, networks.Signal(scheduler, "cpu"), *anchored_line(vae, a.data, config, device))
        wiring.freeze_gains(unet)
    unet.to(device)
    signal = networks.Signal(scheduler, device)
    opt = torch.optim.AdamW([q for q in unet.parameters() if q.requires_grad], lr=c["lr"], betas=(0.9, 0.98), weight_decay=1e-4)
    ema = common.Average(unet, c["ema"])
    step, spent, checkpoint = 0, 0.0, os.path.join(a.to, "unet.pt")
    state = common.load_checkpoint(checkpoint)
    if state:
        unet.load_state_dict(state["unet"]); opt.load_state_dict(state["opt"]); ema.load(state["ema"])
        step, spent = state["step"], state["spent"]
        print(f"going on from step {step}")
    clock, log = common.Clock(c["steps"], a.minutes, spent), common.Log(os.path.join(a.to, "unet.csv"), config["log"]["every"], team)
    crops = tuple(x.to(device) for x in common.validation_crops(a.data, config, 192, 12))

    def save(at):
        common.save_checkpoint(checkpoint, {"unet": unet.state_dict(), "opt": opt.state_dict(), "ema": ema.state(), "step": at,
                                            "spent": clock.spent()})

    everything = [q for q in unet.parameters() if q.requires_grad]
    team.start(everything)
    progress = clock.progress(step)
    done = step
    for step, hr, lr in common.batches(a.data, config, "train_unet", step, c["steps"], device, team):
        if progress >= 1:
            break
        torch.manual_seed((config["seed"] * 1_000_003 + step) * team.size + team.rank)
        common.set_rate(opt, c["lr"] * common.rate(step, progress, c["warmup"]))
        with common.autocast(device):
            with torch.no_grad():
                z0 = encode(vae, hr)[0].float()
            t, eps = draw_timesteps(len(z0), c["few_step_share"], device), torch.randn_like(z0)
            at, st = signal.at(t)
            v = predict(unet, at * z0 + st * eps, lr, t).float()
            error = (v - (at * eps - st * z0)).pow(2).mean((1, 2, 3))
            inverse = (1 - signal.bar[t]).clamp_min(1e-6)  # 1 / (SNR + 1)
            loss = (error * (c["snr_gamma"] * inverse).clamp_max(1)).mean()
        opt.zero_grad(set_to_none=True)
        loss.backward()
        progress = team.progress(clock.progress(step + 1))
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        opt.step()
        ema.update(unet)
        last = t == 999
        team.merge(everything)
        done = step + 1
        log.add(step, clock.spent(), {"v": error.mean(), "v_first_step": error[last].mean() if last.any() else error.mean()})
        if team.leads and (step + 1) % config["log"]["checkpoint_every"] == 0:
            save(step + 1)
        if team.leads and (step + 1) % config["log"]["sheet_every"] == 0:
            with ema.applied(unet), common.autocast(device):
                print(validate(unet, vae, scheduler, crops, os.path.join(a.to, f"unet-{step + 1:06d}.png")), flush=True)
    if not team.leads:
        return
    save(done)
    unet.load_state_dict(ema.shadow)
    print(validate(unet, vae, scheduler, crops, os.path.join(a.to, "unet-final.png")))
    common.save_checkpoint(os.path.join(a.to, "unet-final.pt"), {"unet": unet.state_dict(), "step": done, "seconds": clock.spent()})


if __name__ == "__main__":
    workers.run(train, arguments())
